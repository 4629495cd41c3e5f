"""The numbers of SAC. Apart from `sac.py` only so that the command line can read them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig


@dataclass(frozen=True, kw_only=True)
class SACConfig(OffPolicyAgentConfig):
    """Soft actor-critic. Defaults are those of Haarnoja et al. 2018 (arXiv:1812.05905, table 1) unless noted."""

    alpha_lr: float = 3e-4
    """Adam step size of the temperature; 0 keeps it at initial_alpha."""
    initial_alpha: float = 1.0
    """Temperature at the start (Stable-Baselines3's and CleanRL's value; the paper does not state one)."""
    target_entropy: float | None = None
    """Of the action in [-1, 1]^A, whatever the actuator range; by default minus the action dimension."""
    log_std_bounds: tuple[float, ...] = (-20.0, 2.0)
    """Clamp of the policy's log standard deviation (the authors' code)."""

    def check(self) -> None:
        super().check()
        self.require("alpha_lr", 0 <= self.alpha_lr < 1, "in [0, 1)")
        self.require("initial_alpha", self.initial_alpha > 0, "above 0")
        low_high = len(self.log_std_bounds) == 2 and self.log_std_bounds[0] < self.log_std_bounds[1]
        self.require("log_std_bounds", low_high, "two numbers, the lower one first")
