"""The numbers of TD3+BC, apart from `td3_bc.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.algorithms.td3_config import TD3Config


@dataclass(frozen=True, kw_only=True)
class TD3BCConfig(TD3Config):
    """TD3 with behaviour cloning. Defaults are those of Fujimoto and Gu 2021 (arXiv:2106.06860)."""

    title: ClassVar[str] = "TD3+BC"
    alpha: float = 2.5
    """Weight of the critic in the policy's loss, beside an imitation of weight 1; 0 is behaviour cloning."""
    tau: float = 0.005
    """Step of the targets towards the networks, each time they move: at every second update."""
    normalize_obs: bool = True
    """Standardize observations by statistics of the data; images are scaled by 255 in any case."""

    def check(self) -> None:
        super().check()
        self.require("alpha", 0 <= self.alpha <= 1e6, "between 0 and 1,000,000")
