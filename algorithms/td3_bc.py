"""TD3 with behaviour cloning (Fujimoto and Gu 2021, arXiv:2106.06860) on TD3, from stored data alone.

What differs from TD3 (`td3.py`, whose shapes and `step` these are):

    J_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],   lambda = alpha / E|Q_1(s, pi(s))|       eqs. 3 and 5

with means over the batch, and over the action dimensions in the square; lambda has no gradient. Observations are
standardized by the statistics of the data.

Deviations from the paper besides those of `td3.py` (but targets move by 0.005, as the paper's do):
- observations are divided by their standard deviation, to which the paper adds 0.001, and clipped at ten of them.
"""

from __future__ import annotations

from torch import Tensor

from ctrlrl.algorithms.td3 import TD3
from ctrlrl.algorithms.td3_bc_config import TD3BCConfig
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class TD3BC(TD3):
    """TD3 with behaviour cloning: what `TD3` takes, with a `TD3BCConfig`."""

    config: TD3BCConfig
    config_class = TD3BCConfig

    def policy_loss(self, batch: Batch, obs: Obs, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, eqs. 3 and 5."""
        q = self.critics(obs, action, members=slice(0, 1))  # (1, B)
        weight = self.config.alpha / q.detach().abs().mean()
        imitation = (action - self.policy.scaling.to_unit(batch.action)).square().mean()
        return imitation - weight * q.mean(), {"imitation_loss": imitation.detach(), "q_weight": weight}
