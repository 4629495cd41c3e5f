"""The numbers of EXPO, apart from `expo.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig


@dataclass(frozen=True, kw_only=True)
class EXPOConfig(OffPolicyAgentConfig):
    """Expressive policy optimization. Defaults are those of the authors' code (Dong et al. 2025, arXiv:2507.07986)."""

    utd: float = 20.0
    """Gradient updates per environment step, whatever the number of environments."""
    policy_delay: int = 20
    """Gradient updates of the critics per update of base, edits and temperature, counted over the whole training."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden layers of the edits' policy and of each critic; the base is as it was trained."""
    layer_norm: bool = True
    """LayerNorm before each ReLU of the critics."""
    num_critics: int = 10
    """Critics; edits go up their mean."""
    subset: int = 2
    """Target critics, drawn anew for each choice and each target, whose minimum counts."""
    samples: int = 8
    """Actions of the base, and as many edits of them, among which the critics choose."""
    edit_scale: float = 0.05
    """Largest edit, as a share of half the range of each action: beta of the paper, 0.05 to 0.7 by task."""
    base_lr: float = 3e-4
    """Adam step size of the base."""
    base_tau: float = 0.001
    """Step of the base that acts towards the base that learns, at each of its updates."""
    alpha_lr: float = 3e-4
    """Adam step size of the temperature's logarithm; 0 keeps it as it is."""
    initial_alpha: float = 1.0
    """Temperature at the start."""
    target_entropy: float | None = None
    """Of the edits as they are applied; by default A (log edit_scale - 1/2), minus half the action dimension before
    they are scaled."""
    log_std_bounds: tuple[float, ...] = (-20.0, 2.0)
    """Bounds of the edits' log standard deviation, before tanh."""

    def check(self) -> None:
        super().check()
        allowed = f"between 1 and agent.num_critics = {self.num_critics}"
        self.require("subset", 1 <= self.subset <= self.num_critics, allowed)
        self.require("samples", 1 <= self.samples <= 1000, "between 1 and 1,000")
        self.require("edit_scale", 0 < self.edit_scale <= 2, "in (0, 2]")
        self.require("base_lr", 0 <= self.base_lr < 1, "in [0, 1)")
        self.require("base_tau", 0 < self.base_tau <= 1, "in (0, 1]")
        self.require("alpha_lr", 0 <= self.alpha_lr < 1, "in [0, 1)")
        self.require("initial_alpha", self.initial_alpha > 0, "above 0")
        low_high = len(self.log_std_bounds) == 2 and -20 <= self.log_std_bounds[0] < self.log_std_bounds[1] <= 5
        self.require("log_std_bounds", low_high, "two numbers between -20 and 5, the lower one first")
