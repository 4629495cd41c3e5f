"""The numbers of DSAC-T, apart from `dsac_t.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.dsac_config import DistributionalConfig


@dataclass(frozen=True, kw_only=True)
class DSACTConfig(DistributionalConfig):
    """DSAC with three refinements (Duan et al. 2025, arXiv:2310.05858)."""

    tau: float = 0.01
    """Step of the targets towards the networks, each time they move. The paper has 0.005; since targets move at every
    second update, 0.01 is what 0.005 at every update would be, and learns faster (docs/benchmarks.md)."""
    num_critics: int = 2
    """Critics; the one with the smallest mean makes the target."""
    std_tau: float = 0.005
    """Step of the moving average of each critic's standard deviation towards the batch's mean, in (0, 1]."""
    gradient_bias: float = 0.1
    """Added to the variances that the critics' gradient is divided and multiplied by (epsilon in the paper); 0 or more,
    in squared units of the return."""

    def check(self) -> None:
        super().check()
        self.require("std_tau", 0 < self.std_tau <= 1, "in (0, 1]")
        self.require("gradient_bias", self.gradient_bias >= 0, "0 or more")
