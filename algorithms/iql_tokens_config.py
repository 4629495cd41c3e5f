"""The numbers of IQL for answers of tokens, apart from `iql_tokens.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.iql_config import ImplicitQConfig


@dataclass(frozen=True, kw_only=True)
class IQLTokensConfig(ImplicitQConfig):
    """Implicit Q-learning for answers written token by token, with the numbers of IQL."""
