"""A run that started with the weights of another: what the change of stages cost, and whether policy or data is better.

Returns of evaluations are J. With J(0) the policy's before anything was learned in this run:
dip: J(0) less the lowest J since. Regret: the mean over evaluations since of what they lack to J(0), 0 where they lack
nothing. Where references are known, the regret of Nakamoto et al. 2023 (arXiv:2303.05479) besides: the mean of 1 less
the normalized score, with scores cut to [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Change:
    """Figures of the run that goes on; None where there is no evaluation to tell from."""

    first: float
    """J(0)."""
    lowest: float
    lowest_step: int
    dip: float
    back: int | None
    """The first step, from the lowest on, at which J is J(0) again; None: not yet."""
    regret: float
    score_regret: float | None


def change_of(evaluations: Sequence[tuple[int, float]], reference: Mapping[str, float] | None) -> Change | None:
    """The figures of evaluations (step, mean return) from step 0 on; None where that one or all later ones lack."""
    if len(evaluations) < 2 or evaluations[0][0] != 0:
        return None
    first, after = evaluations[0][1], evaluations[1:]
    lowest_step, lowest = min(after, key=lambda one: one[1])
    score_regret = None
    if reference and {"random", "expert"} <= reference.keys() and reference["random"] != reference["expert"]:
        low, high = reference["random"], reference["expert"]
        scores = [min(1.0, max(0.0, (value - low) / (high - low))) for _, value in after]
        score_regret = 1 - sum(scores) / len(scores)
    return Change(
        first=first,
        lowest=lowest,
        lowest_step=lowest_step,
        dip=max(0.0, first - lowest),
        back=next((step for step, value in after if step >= lowest_step and value >= first), None),
        regret=sum(max(0.0, first - value) for _, value in after) / len(after),
        score_regret=score_regret,
    )


def better_of(policy_return: float, data: Mapping[str, Any] | None) -> str:
    """Which of a policy and a dataset is better by its return, and what that suggests to keep (Three Regimes of
    Offline-to-Online RL, arXiv:2510.01460: right in 45 of 63 cases, it says); "" without a dataset."""
    if data is None:
        return ""
    mean = float(data["mean_return"])
    if policy_return >= mean:
        return (
            f"the policy is better than the data ({policy_return:,.1f} against {mean:,.1f} an episode), which suggests "
            "to preserve the policy: warm up with it and leave the data behind (ctrlrl train wsrl)"
        )
    return (
        f"the data is better than the policy ({mean:,.1f} an episode against {policy_return:,.1f}), which suggests to "
        "preserve the data: train on it half and half (ctrlrl train rlpd --data)"
    )
