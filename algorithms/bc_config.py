"""The numbers of behaviour cloning. Apart from `bc.py` only so that the command line need not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ctrlrl.algorithms.agent_config import ReplayAgentConfig


@dataclass(frozen=True, kw_only=True)
class BCConfig(ReplayAgentConfig):
    """Behaviour cloning. Networks, batch and step size are those of the other algorithms that learn from data."""

    critic_obs: ClassVar[None] = None
    """There is no critic."""
    policy: Literal["deterministic", "gaussian", "tanh-gaussian"] = "deterministic"
    """Of Box actions; discrete ones have a categorical policy. deterministic: least squares. gaussian: likelihood, with
    a standard deviation that is the same everywhere. tanh-gaussian: SAC's policy, whose depends on the observation."""
    lr: float = 3e-4
    """Adam step size."""
    hidden: tuple[int, ...] = (256, 256)
    """Hidden layers of the policy."""
    normalize_obs: bool = True
    """Standardize observations by statistics of the data; images are scaled by 255 in any case."""
    log_std_bounds: tuple[float, ...] = (-5.0, 2.0)
    """Bounds of a Gaussian's log standard deviation, of the action in [-1, 1]^A (tanh-gaussian: before tanh). Where the
    data have one action for each observation, the likelihood would grow without a lower one for ever."""
    action_mask: str | None = None
    """Observation entry that says which discrete actions exist; by default `action_mask` where there is one."""

    def check(self) -> None:
        super().check()
        self.require("lr", 0 < self.lr < 1, "in (0, 1)")
        low_high = len(self.log_std_bounds) == 2 and -20 <= self.log_std_bounds[0] < self.log_std_bounds[1] <= 5
        self.require("log_std_bounds", low_high, "two numbers between -20 and 5, the lower one first")
