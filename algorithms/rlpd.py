"""Reinforcement learning with prior data (Ball et al. 2023, arXiv:2302.02948, Algorithm 1) on REDQ.

Data and what the policy collects are learned from alike: each batch is half of either (the loop mixes it), from the
first update on. What differs from REDQ (`redq.py`, whose shapes and `step` these are):
- critics have LayerNorm, which bounds what they extrapolate to;
- the target entropy is -A/2;
- the entropy's worth can be left out of the critics' target (`backup_entropy`).

Deviations from the paper besides those of `sac.py`; the authors' code has each of their own:
- the critics' loss is the sum over the ensemble of half the squared error, theirs the mean of all: the same to Adam;
- weights begin as `torch.nn.Linear`'s, theirs as Xavier and Glorot's.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from torch import Tensor

from ctrlrl.algorithms.redq import REDQ
from ctrlrl.algorithms.rlpd_config import RLPDConfig


class RLPD(REDQ):
    """REDQ with LayerNorm, for data of others beside one's own: what `SAC` takes, with an `RLPDConfig`."""

    config: RLPDConfig
    title = "RLPD"
    config_class: type[RLPDConfig] = RLPDConfig
    entropy_per_action = -0.5
    """Target entropy by default, of each action dimension."""

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: RLPDConfig | None = None,
        **others: Any,
    ) -> None:
        super().__init__(observation_space, action_space, config, **others)
        if self.config.target_entropy is None:
            self.target_entropy = self.entropy_per_action * self.policy.scaling.low.numel()

    def soft_value(self, q: Tensor, cost: Tensor) -> Tensor:
        """V(s') with or without the entropy, (B,)."""
        return q - cost if self.config.backup_entropy else q
