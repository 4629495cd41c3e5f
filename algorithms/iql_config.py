"""The numbers of IQL, apart from `iql.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig


@dataclass(frozen=True, kw_only=True)
class ImplicitQConfig(OffPolicyAgentConfig):
    """What IQL needs for actions of any kind. Defaults are those of Kostrikov et al. 2021 (arXiv:2110.06169) for
    locomotion unless noted."""

    expectile: float = 0.7
    """Which expectile of Q(s, a) over the data's actions V(s) is, in (0, 1): 0.5 is their mean, 1 would be their
    maximum. 0.9 in mazes."""
    beta: float = 3.0
    """Inverse temperature of the policy's weights exp(beta A), per unit of return: 0 clones the data. 10 in mazes."""
    max_weight: float = 100.0
    """Largest such weight (the authors' code)."""
    actor_lr_steps: int = 500_000
    """Updates of the policy over which its step size falls to 0 along a cosine: those of the whole training, of which
    the paper has a million. 0 keeps it constant."""
    learn: Literal["both", "value", "policy"] = "both"
    """What moves: `value` is V and Q alone, `policy` the policy alone, for values that were learned before."""

    def check(self) -> None:
        super().check()
        self.require("expectile", 0 < self.expectile < 1, "in (0, 1)")
        self.require("beta", self.beta >= 0, "at least 0")
        self.require("max_weight", self.max_weight > 0, "above 0")
        steps = 0 <= self.actor_lr_steps <= 16_000_000  # beyond that float32, in which they are counted, has gaps
        self.require("actor_lr_steps", steps, "between 0 (constant) and 16,000,000")


@dataclass(frozen=True, kw_only=True)
class IQLConfig(ImplicitQConfig):
    """Implicit Q-learning for continuous actions."""

    extraction: Literal["awr", "ddpg+bc"] = "awr"
    """How the policy is made of the values: by weighting the data's actions (the paper), or by going up Q from them
    (Park et al. 2024, arXiv:2406.09329)."""
    bc_weight: float = 0.3
    """ddpg+bc: weight of the data's log-likelihood beside Q over its mean size, alpha there (OGBench's default for
    IQL; its tasks take 0.003 to 3)."""
    log_std_bounds: tuple[float, ...] = (-5.0, 2.0)
    """Within which the policy's log standard deviation is kept (the authors' code)."""

    def check(self) -> None:
        super().check()
        self.require("bc_weight", self.bc_weight >= 0, "at least 0")
        low_high = len(self.log_std_bounds) == 2 and self.log_std_bounds[0] < self.log_std_bounds[1]
        self.require("log_std_bounds", low_high, "two numbers, the lower one first")
