"""The numbers of behaviour cloning. Apart from `bc.py` only so that the command line need not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from ctrlrl.algorithms.agent_config import ReplayAgentConfig


@dataclass(frozen=True, kw_only=True)
class BCConfig(ReplayAgentConfig):
    """Behaviour cloning. Networks, batch and step size are those of the other algorithms that learn from data."""

    critic_obs: ClassVar[None] = None
    """There is no critic."""
    policy: Literal["deterministic", "gaussian", "tanh-gaussian", "mixture", "flow"] = "deterministic"
    """Of Box actions; discrete ones have a categorical policy. deterministic: least squares, of chunks least absolute
    error. gaussian: likelihood, with a standard deviation that is the same everywhere. tanh-gaussian: SAC's policy,
    whose depends on the observation. mixture: several Gaussians. flow: flow matching. The last two are for data in
    which the same is done in different ways."""
    chunk: Annotated[int, arg(aliases=["--chunk"])] = 1
    """Actions that are planned at once, for deterministic, mixture and flow."""
    execute: int | None = None
    """How many of them are executed before it plans again; by default all."""
    ensemble: float | None = None
    """Plan at each step, and act by the mean of all plans for it, weighted by exp(-ensemble * i), i = 0 for the oldest
    (ACT's temporal ensembling, arXiv:2304.13705; there 0.01)."""
    trunk: Literal["mlp", "transformer"] = "mlp"
    """Network of chunks. Of a transformer `hidden` has the width of each layer, all alike."""
    modes: int = 5
    """Gaussians of a mixture."""
    flow_steps: int = 10
    """Euler steps from noise to a chunk."""
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
        self.require("chunk", 1 <= self.chunk <= 1000, "between 1 and 1,000")
        if self.chunk > 1:
            self.require(
                "policy", "gaussian" not in self.policy, "deterministic, mixture or flow where chunk is above 1"
            )
        self.require("execute", self.execute is None or 1 <= self.execute <= self.chunk, "between 1 and chunk")
        self.require("ensemble", self.ensemble is None or self.ensemble >= 0, "at least 0")
        if self.ensemble is not None:
            self.require("ensemble", self.chunk > 1, "left alone where chunk is 1: there is one plan for each step")
            self.require("execute", self.execute is None, "left alone where plans are put together (ensemble)")
        self.require("modes", 1 <= self.modes <= 100, "between 1 and 100")
        self.require("flow_steps", 1 <= self.flow_steps <= 1000, "between 1 and 1,000")
        if self.trunk == "transformer":
            self.require("trunk", self.plans, "mlp where neither chunk is above 1 nor policy mixture or flow")
            alike = len(set(self.hidden)) == 1 and self.hidden[0] % 4 == 0
            self.require("hidden", alike, "widths that are all alike and a multiple of 4, for a transformer")
        low_high = len(self.log_std_bounds) == 2 and -20 <= self.log_std_bounds[0] < self.log_std_bounds[1] <= 5
        self.require("log_std_bounds", low_high, "two numbers between -20 and 5, the lower one first")

    @property
    def plans(self) -> bool:
        """Whether the policy is one of chunks (`ctrlrl.nn.chunk`), if only of one action."""
        return self.chunk > 1 or self.policy in ("mixture", "flow")
