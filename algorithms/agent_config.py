"""The numbers that all agents share which learn from a replay. Apart from `agent.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ctrlrl.config import Config


@dataclass(frozen=True, kw_only=True)
class ReplayAgentConfig(Config):
    """A policy that learns from stored transitions. Each algorithm says where its defaults come from."""

    section: ClassVar[str] = "agent"
    batch_size: int = 256
    """Transitions per gradient update."""
    hidden: tuple[int, ...] = (256, 256)
    """Hidden layers of the policy and of each critic."""
    normalize_obs: bool = False
    """Standardize observations by running statistics; images are scaled by 255 in any case."""
    min_obs_std: float = 0.0
    """Smallest standard deviation that they are divided by, in their units: what hardly moves is not blown up."""
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

    def check(self) -> None:
        self.require("batch_size", 1 <= self.batch_size <= 1_000_000, "between 1 and 1,000,000")
        self.require("hidden", all(1 <= width <= 100_000 for width in self.hidden), "widths between 1 and 100,000")
        self.require("min_obs_std", self.min_obs_std >= 0, "at least 0")
        self.require("random_shift", 0 <= self.random_shift <= 1024, "between 0 (off) and 1,024")


@dataclass(frozen=True, kw_only=True)
class OffPolicyAgentConfig(ReplayAgentConfig):
    """An actor and a critic ensemble with target networks. Each algorithm says where its defaults come from."""

    gamma: float = 0.99
    """Discount per environment step, in (0, 1]."""
    tau: float = 0.005
    """Step of the target networks towards the networks, in (0, 1]."""
    utd: float = 1.0
    """Gradient updates per environment step, whatever the number of environments."""
    policy_delay: int = 1
    """Gradient updates of the critics per update of the policy, counted over the whole training."""
    actor_lr: float = 3e-4
    """Adam step size of the policy."""
    critic_lr: float = 3e-4
    """Adam step size of the critics."""
    layer_norm: bool = False
    """LayerNorm before each ReLU of the critics; helps at high utd."""
    num_critics: int = 2
    """Critics; of two the minimum is clipped double Q."""
    critic_obs: tuple[str, ...] | None = None
    """Observation entries the critics read; by default `policy` and `privileged`, else all."""

    def check(self) -> None:
        super().check()
        self.require("gamma", 0 < self.gamma <= 1, "in (0, 1]")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        self.require("utd", 0 < self.utd <= 1000, "in (0, 1000]")
        self.require("policy_delay", 1 <= self.policy_delay <= 1000, "between 1 and 1,000")
        self.require("actor_lr", 0 < self.actor_lr < 1, "in (0, 1)")
        self.require("critic_lr", 0 < self.critic_lr < 1, "in (0, 1)")
        self.require("num_critics", 1 <= self.num_critics <= 100, "between 1 and 100")
