"""The numbers of SAC. Apart from `sac.py` only so that the command line can read them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ctrlrl.config import Config


@dataclass(frozen=True, kw_only=True)
class SACConfig(Config):
    """Soft actor-critic. Defaults are those of Haarnoja et al. 2018 (arXiv:1812.05905, table 1) unless noted."""

    section: ClassVar[str] = "agent"
    gamma: float = 0.99
    """Discount per environment step, in (0, 1]."""
    tau: float = 0.005
    """Step of the target critics towards the critics, per update, in (0, 1]."""
    batch_size: int = 256
    """Transitions per gradient update."""
    utd: float = 1.0
    """Gradient updates per environment step, whatever the number of environments."""
    actor_lr: float = 3e-4
    """Adam step size of the policy."""
    critic_lr: float = 3e-4
    """Adam step size of the critics."""
    alpha_lr: float = 3e-4
    """Adam step size of the temperature; 0 keeps it at initial_alpha."""
    initial_alpha: float = 1.0
    """Temperature at the start (Stable-Baselines3's and CleanRL's value; the paper does not state one)."""
    target_entropy: float | None = None
    """Of the action in [-1, 1]^A, whatever the actuator range; by default minus the action dimension."""
    hidden: tuple[int, ...] = (256, 256)
    """Hidden layers of the policy and of each critic."""
    layer_norm: bool = False
    """LayerNorm before each ReLU of the critics (not in the paper; helps at high utd)."""
    num_critics: int = 2
    """Critics whose minimum is the target; 2 is clipped double Q."""
    log_std_bounds: tuple[float, ...] = (-20.0, 2.0)
    """Clamp of the policy's log standard deviation (the authors' code)."""
    normalize_obs: bool = False
    """Standardize observations by running statistics (not in the paper); images are scaled by 255 in any case."""
    random_shift: int = 4
    """Images: shift each sampled one by up to so many pixels, at random (DrQ, arXiv:2004.13649); 0 turns it off."""
    execution: Literal["auto", "eager", "compiled", "captured"] = "auto"
    """How an update runs: as written, by torch.compile, or as a CUDA graph; the same within the precision's rounding.
    auto compiles trainings of 50,000 updates and more on a CPU, where a C++ compiler is installed, and says so."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the factors in hidden layers' products during updates; weights, the built-in networks' outputs and all that is
    computed from them are float32. auto takes bfloat16 for compiled updates on CPUs that multiply it natively."""
    policy_obs: tuple[str, ...] | None = None
    """Observation entries the policy reads; by default `policy` where there is such a group, else all."""
    critic_obs: tuple[str, ...] | None = None
    """Observation entries the critics read; by default `policy` and `privileged`, else all."""

    def check(self) -> None:
        self.require("gamma", 0 < self.gamma <= 1, "in (0, 1]")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        self.require("batch_size", 1 <= self.batch_size <= 1_000_000, "between 1 and 1,000,000")
        self.require("utd", 0 < self.utd <= 1000, "in (0, 1000]")
        self.require("actor_lr", 0 < self.actor_lr < 1, "in (0, 1)")
        self.require("critic_lr", 0 < self.critic_lr < 1, "in (0, 1)")
        self.require("alpha_lr", 0 <= self.alpha_lr < 1, "in [0, 1)")
        self.require("initial_alpha", self.initial_alpha > 0, "above 0")
        self.require("hidden", all(1 <= width <= 100_000 for width in self.hidden), "widths between 1 and 100,000")
        self.require("random_shift", 0 <= self.random_shift <= 1024, "between 0 (off) and 1,024")
        self.require("num_critics", 1 <= self.num_critics <= 100, "between 1 and 100")
        low_high = len(self.log_std_bounds) == 2 and self.log_std_bounds[0] < self.log_std_bounds[1]
        self.require("log_std_bounds", low_high, "two numbers, the lower one first")
