"""The numbers of discrete IQL, apart from `iql_discrete.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.iql_config import ImplicitQConfig


@dataclass(frozen=True, kw_only=True)
class IQLDiscreteConfig(ImplicitQConfig):
    """Implicit Q-learning for discrete actions, with the numbers of IQL."""

    action_mask: str | None = None
    """Observation entry that says which actions exist, (n,); by default action_mask or candidate_mask, if there."""
