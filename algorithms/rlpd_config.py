"""The numbers of RLPD, apart from `rlpd.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.redq_config import REDQConfig


@dataclass(frozen=True, kw_only=True)
class RLPDConfig(REDQConfig):
    """Reinforcement learning with prior data. Defaults are those of Ball et al. 2023 (arXiv:2302.02948) for
    locomotion, from the authors' code."""

    layer_norm: bool = True
    """LayerNorm before each ReLU of the critics, which keeps values of actions that no data show from exploding."""
    backup_entropy: bool = True
    """Whether the critics' target holds the entropy's worth; the authors turn it off where rewards are sparse."""
    target_entropy: float | None = None
    """Of the action in [-1, 1]^A, whatever the actuator range; by default minus half the action dimension."""
