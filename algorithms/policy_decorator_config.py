"""The numbers of Policy Decorator, apart from `policy_decorator.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.sac_config import SACConfig


@dataclass(frozen=True, kw_only=True)
class PolicyDecoratorConfig(SACConfig):
    """Bounded residual over a frozen policy. Defaults are those of the authors' code (Yuan et al. 2024,
    arXiv:2412.13630)."""

    gamma: float = 0.97
    """Discount per environment step, in (0, 1]."""
    tau: float = 0.01
    """Step of the target networks towards the networks, in (0, 1]."""
    utd: float = 0.25
    """Gradient updates per environment step, whatever the number of environments."""
    batch_size: int = 1024
    """Transitions per gradient update."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden layers of the policy and of each critic."""
    actor_lr: float = 1e-4
    """Adam step size of the policy."""
    critic_lr: float = 1e-4
    """Adam step size of the critics."""
    alpha_lr: float = 1e-4
    """Adam step size of the temperature's logarithm; 0 keeps it as it is."""
    residual_scale: float = 0.1
    """Largest residual, as a share of half the range of each action; theirs is 0.03 to 0.3 by task."""
    ramp: int = 100_000
    """Environment steps over which the chance of having the residual rises from 0 to 1, where it explores."""
    warm_up_noise: float = 0.0
    """Half width of the uniform noise on the base's actions before learning starts."""

    def check(self) -> None:
        super().check()
        self.require("residual_scale", 0 < self.residual_scale <= 2, "in (0, 2]")
        self.require("ramp", self.ramp >= 0, "at least 0")
        self.require("warm_up_noise", 0 <= self.warm_up_noise <= 2, "between 0 and 2")
