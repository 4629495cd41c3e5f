"""The numbers of CQL, apart from `cql.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.sac_config import SACConfig


@dataclass(frozen=True, kw_only=True)
class CQLConfig(SACConfig):
    """Conservative Q-learning on SAC (Kumar et al. 2020, arXiv:2006.04779). Defaults are CORL's for locomotion, which
    are near the authors' code, unless noted."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden layers of the policy and of each critic."""
    actor_lr: float = 3e-5
    """Adam step size of the policy."""
    alpha_lr: float = 3e-5
    """Adam step size of the temperature; 0 keeps it at initial_alpha."""
    conservative_weight: float = 10.0
    """alpha of the paper: weight of the conservative term beside the squared error; 0 leaves SAC. 5 in mazes, where
    there is an action_gap."""
    sampled_actions: int = 10
    """Actions drawn for that term, so many from each of uniform, pi(s) and pi(s')."""
    action_gap: float | None = None
    """tau of the paper: with a number, conservative_weight gets a factor that is learned so that the term is near this
    number (a Lagrange multiplier). None: the weight stays. 0.8 in mazes."""
    lowest_gap: float | None = None
    """Transitions whose term is below this do not push it further down; None: no bound. -200 in Cal-QL's code."""
    calibrate: bool = False
    """Cal-QL (Nakamoto et al. 2023, arXiv:2303.05479): no policy's action counts as worth less than the return that the
    data had from there, which keeps the scale for learning online later."""
    backup_entropy: bool = False
    """Count the entropy of the next action in the critics' target, as SAC does."""
    max_target_backup: bool = False
    """Target: the best of sampled_actions next actions instead of one. In mazes."""
    policy_layer_norm: bool = False
    """LayerNorm before each ReLU of the policy, to go on by WSRL with it."""
    subset: int | None = None
    """Target critics whose minimum is the target, drawn anew for each update; None: all. 2 of 10 to go on by WSRL."""

    def check(self) -> None:
        super().check()
        self.require("conservative_weight", self.conservative_weight >= 0, "at least 0")
        self.require("sampled_actions", 1 <= self.sampled_actions <= 1000, "between 1 and 1,000")
        allowed = f"none, or between 1 and agent.num_critics = {self.num_critics}"
        self.require("subset", self.subset is None or 1 <= self.subset <= self.num_critics, allowed)
        penalized = self.conservative_weight > 0
        above = "none where agent.conservative_weight is 0"
        self.require("action_gap", penalized or self.action_gap is None, above)
        self.require("calibrate", penalized or not self.calibrate, "false where agent.conservative_weight is 0")
