"""The numbers of REDQ, apart from `redq.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.sac_config import SACConfig


@dataclass(frozen=True, kw_only=True)
class REDQConfig(SACConfig):
    """Randomized ensembled double Q. Defaults are those of Chen et al. 2021 (arXiv:2101.05982, section 2)."""

    num_critics: int = 10
    """Critics; the policy goes up their mean."""
    subset: int = 2
    """Target critics, drawn anew for each update, whose minimum is the target: M in the paper."""
    utd: float = 20.0
    """Gradient updates per environment step, whatever the number of environments."""
    policy_delay: int = 20
    """Gradient updates of the critics per update of the policy, counted over the whole training: one per environment
    step at the default utd, as in the paper."""

    def check(self) -> None:
        super().check()
        allowed = f"between 1 and agent.num_critics = {self.num_critics}"
        self.require("subset", 1 <= self.subset <= self.num_critics, allowed)
