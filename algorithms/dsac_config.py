"""The numbers of DSAC, and those that DSAC-T shares with it, apart from the agents so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.sac_config import SACConfig


@dataclass(frozen=True, kw_only=True)
class DistributionalConfig(SACConfig):
    """What DSAC and DSAC-T have in common: the settings of the authors' code (GOPS), which trains both with them, but
    for SAC's step sizes and initial temperature. The code's (1e-4, e) are for 1.5 million updates: in the first 50,000
    they learn nothing on HalfCheetah (docs/benchmarks.md)."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden layers of the policy and of each critic."""
    policy_delay: int = 2
    """Gradient updates of the critics per update of the policy, the temperature and all targets, counted over the whole
    training."""
    log_std_bounds: tuple[float, ...] = (-20.0, 0.5)
    """Clamp of the policy's log standard deviation."""


@dataclass(frozen=True, kw_only=True)
class DSACConfig(DistributionalConfig):
    """Distributional soft actor-critic (Duan et al. 2021, arXiv:2001.02811)."""

    num_critics: int = 1
    """Critics: one, which needs no clipped double Q."""

    def check(self) -> None:
        super().check()
        self.require("num_critics", self.num_critics == 1, "1, which is what DSAC has (dsac-t has two)")
