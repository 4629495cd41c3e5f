"""Revisited behaviour-regularized actor-critic (Tarasov et al. 2023, arXiv:2305.09836) on TD3, from stored data alone.

What differs from TD3 (`td3.py`, whose shapes and `step` these are), with a and a' the data's actions at s and s', and
a~' the target policy's with its noise:

    y    = r + gamma ( min_k Q_k'(s', a~') - beta_2 |a~' - a'|^2 )                            the critics' target
    J_pi = E[ beta_1 |pi(s) - a|^2 - lambda min_k Q_k(s, pi(s)) ],   lambda = 1 / E|min_k Q_k(s, pi(s))|

Squares are summed over action dimensions, and lambda has no gradient. Critics have LayerNorm, networks three layers.

Deviations from the paper and its code, besides those of `td3.py` (but targets move by 0.005, as theirs do):
- LayerNorm comes before the ReLU; in the authors' code after it;
- where an episode was cut there is no a', and no penalty; the authors leave that transition out;
- weights begin as `torch.nn.Linear`'s; theirs do in hidden layers, with biases of 0.1 and a last layer near 0;
- the target policy moves towards the policy after its step; theirs towards the one before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.algorithms.rebrac_config import ReBRACConfig
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.errors import UsageError
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class ReBRAC(TD3):
    """Behaviour-regularized TD3: what `TD3` takes, with a `ReBRACConfig`; learns from batches with `next_action`."""

    config: ReBRACConfig
    config_class = ReBRACConfig

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(("next_action",))

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """As that of every agent.

        Raises:
            UsageError: if the batch has no `next_action`.
        """
        if batch.next_action is None:
            raise UsageError(
                "ReBRAC needs the data's action after each transition (batch.next_action), and this batch has none: "
                "sample it from a dataset (--data), or take td3-bc, which does without"
            )
        return super().update(batch)

    def next_value(self, batch: Batch, obs: Obs, action: Tensor) -> Tensor:
        """min_k Q_k'(s', a~') - beta_2 |a~' - a'|^2, (B,)."""
        assert batch.next_action is not None
        distance = (action - self.policy.scaling.to_unit(batch.next_action)).square().sum(-1)
        # After a row that ends an episode there is no action; of one that was terminated nothing counts anyway.
        penalty = torch.where(batch.end, 0.0, self.config.critic_bc * distance)
        return super().next_value(batch, obs, action) - penalty

    def policy_loss(self, batch: Batch, obs: Obs, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi."""
        q = self.critics(obs, action).amin(0)  # (B,)
        weight = 1 / q.detach().abs().mean()
        imitation = (action - self.policy.scaling.to_unit(batch.action)).square().sum(-1).mean()
        loss = self.config.actor_bc * imitation - weight * q.mean()
        return loss, {"imitation_loss": imitation.detach(), "q_weight": weight}
