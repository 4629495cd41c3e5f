"""The numbers of DroQ, apart from `droq.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.sac_config import SACConfig


@dataclass(frozen=True, kw_only=True)
class DroQConfig(SACConfig):
    """Dropout Q-functions. Defaults are those of Hiraoka et al. 2022 (arXiv:2110.02034, table 4) unless noted."""

    dropout: float = 0.01
    """Share of each hidden layer's outputs that is dropped in the critics, in (0, 1). The authors' for all environments
    in one of their two codes; in the other from 0.0001 (Hopper) to 0.1 (Humanoid)."""
    layer_norm: bool = True
    """LayerNorm after dropout and before each ReLU of the critics."""
    utd: float = 20.0
    """Gradient updates per environment step, whatever the number of environments."""
    policy_delay: int = 20
    """Gradient updates of the critics per update of the policy, counted over the whole training: one per environment
    step at the default utd, as in the paper."""

    def check(self) -> None:
        super().check()
        self.require("dropout", 0 < self.dropout < 1, "in (0, 1)")
