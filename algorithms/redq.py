"""Randomized ensembled double Q-learning (Chen et al. 2021, arXiv:2101.05982, Algorithm 1) on SAC.

What differs from SAC (`sac.py`, whose shapes and `step` these are), with K critics and many updates per step:
- the target takes the minimum over M target critics only, a random subset drawn anew for each update;
- the policy and the temperature move once in `policy_delay` updates of the critics, the targets at each one;
- the policy goes up the mean over all K critics.

Deviations from the paper besides those of `sac.py`:
- the target entropy is -A, as in SAC; the paper takes MBPO's table (Hopper -1, Walker2d -3, Ant -4, Humanoid -2), which
  `--agent.target-entropy` sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.algorithms.agent import Draws
from ctrlrl.algorithms.redq_config import REDQConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.tree import Obs


class REDQ(SAC):
    """SAC with randomized ensembled double Q: what `SAC` takes, with a `REDQConfig`."""

    config: REDQConfig
    title = "REDQ"
    config_class = REDQConfig

    def draw(self, groups: int, rows: int) -> Draws:
        """What SAC draws, and the M distinct critics of each update's target, (G, M)."""
        drawn = super().draw(groups, rows)
        order = torch.rand(groups, self.config.num_critics, generator=self.generator, device=self.device).argsort(-1)
        return *drawn, order[:, : self.config.subset]

    def next_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """min over the M of Q(s', a'), Algorithm 1 line 8, (B,); the others are not evaluated."""
        (members,) = rest
        out: Tensor = self.target_critics(obs, action, members=members).amin(0)
        return out

    def policy_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """The mean of Q(s, a) over all K, Algorithm 1 line 12, (B,)."""
        return self.value(obs, action).mean(0)
