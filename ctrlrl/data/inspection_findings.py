"""What is wrong with a dataset, or worth knowing before training on it; each with its remedy.

docs/data-inspect.md has a section on each code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctrlrl.data.inspection import Inspection
from ctrlrl.data.inspection_columns import ColumnSummary, listed
from ctrlrl.data.store import Array
from ctrlrl.runs.plots import plain_number

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the verdict."""

    severity: Severity
    """error: training on it goes wrong; warning: probably not what was meant; note: good to know."""
    code: str
    message: str
    remedy: str


def find(inspection: Inspection) -> list[Finding]:
    """The verdict, the worst first."""
    every = [
        *_numbers(inspection),
        *_actions(inspection),
        *_observations(inspection),
        *_rewards(inspection),
        *_rows(inspection),
        *_ends(inspection),
        *_repeats(inspection),
    ]
    return sorted(every, key=lambda one: SEVERITIES.index(one.severity))


def _numbers(it: Inspection) -> Iterator[Finding]:
    columns = [*it.observation, it.action, it.reward_column, *it.columns]
    broken = [one for one in columns if isinstance(one, ColumnSummary) and one.nonfinite]
    if broken:
        counts = [f"{one.nonfinite:,} in {one.name}, first {it.places[f'nonfinite {one.name}']}" for one in broken]
        yield Finding(
            severity="error",
            code="non-finite",
            message=f"NaN or infinity: {listed(counts)}",
            remedy="one such number makes every weight NaN: find out where it comes from, repair these episodes or "
            "leave them out, and import the data anew",
        )


def _actions(it: Inspection) -> Iterator[Finding]:
    action = it.action
    constant = action.std == 0
    if constant.any():
        yield Finding(
            severity="warning",
            code="action-constant",
            message=f"never changes: {_dimensions(action, constant)}",
            remedy="nothing can be learnt about it: check that the right columns were imported, or leave the dimension "
            "out of the action space",
        )
    outside = action.outside > 0
    if outside.any():
        worst = int(action.outside.argmax())
        seen = f"goes from {_n(action.minimum[worst])} to {_n(action.maximum[worst])}"
        declared = f"{_n(action.low[worst])} to {_n(action.high[worst])}"
        yield Finding(
            severity="error",
            code="action-out-of-bounds",
            message=f"outside the action space: {_dimensions(action, outside)}; {action.dimension(worst)} {seen}, "
            f"declared is {declared}, {_share(action.outside[worst])} of it is outside; first "
            f"{it.places['outside action']}",
            remedy="import it with the true action space, or clip the actions if the robot clipped them as well",
        )
    if _looks_normalized(action):
        reached = float(np.abs([action.minimum, action.maximum]).max())
        yield Finding(
            severity="warning",
            code="action-scale",
            message=f"actions stay in [-1, 1] (largest {_n(reached)}), while the action space goes from "
            f"{_n(action.low.min())} to {_n(action.high.max())}",
            remedy="the store keeps actions in the environment's units: if these were scaled to [-1, 1] when they were "
            "recorded, scale them back and import anew",
        )
    unbounded = ~(np.isfinite(action.low) & np.isfinite(action.high))
    if unbounded.any():
        yield Finding(
            severity="note",
            code="action-unbounded",
            message=f"no finite bounds: {_dimensions(action, unbounded)}",
            remedy="agents with squashed policies need bounds: import it with an environment (--env) that has them",
        )
    share = np.where(constant, 0.0, action.at_low + action.at_high)
    if action.real and share.max() > 0.25:
        yield Finding(
            severity="note",
            code="action-saturation",
            message=f"often at a bound: {_dimensions(action, share > 0.25)}; in {_share(share.max())} of the steps "
            f"({action.dimension(int(share.argmax()))})",
            remedy="a squashed Gaussian has no finite log-probability there: prefer algorithms that regress on the "
            "action (TD3+BC, ReBRAC), or see that actions are moved off the bounds before a density is taken",
        )


def _looks_normalized(action: ColumnSummary) -> bool:
    """Whether all that moves stays in [-1, 1] and the bounds are others: nearly reaches it, or uses a tenth of them."""
    moving = action.std > 0
    if not action.real or not moving.any() or not np.isfinite([action.low, action.high]).all():
        return False
    low, high = action.low[moving], action.high[moving]
    largest = np.maximum(np.abs(action.minimum), np.abs(action.maximum))[moving]
    other = ~(np.isclose(low, -1, atol=0.1) & np.isclose(high, 1, atol=0.1))
    used = (action.maximum - action.minimum)[moving] / (high - low)
    within = largest.max() <= 1.001 and other.any()
    return bool(within and ((largest >= 0.9).all() or (used[other] < 0.1).all()))


def _observations(it: Inspection) -> Iterator[Finding]:
    outside = [one for one in it.vectors if (one.outside > 0).any()]
    if outside:
        which = listed([_dimensions(one, one.outside > 0) for one in outside])
        most = max(float(one.outside.max()) for one in outside)
        yield Finding(
            severity="warning",
            code="observation-out-of-bounds",
            message=f"outside the observation space: {which}; up to {_share(most)} of the rows, first "
            f"{it.places[f'outside {outside[0].name}']}",
            remedy="check units and the order of entries; if the numbers are right, the declared space is not: import "
            "it with the true one",
        )
    constant = [_dimensions(one, one.std == 0) for one in it.vectors if (one.std == 0).any()]
    if constant:
        yield Finding(
            severity="note",
            code="observation-constant",
            message=f"never changes: {listed(constant)}",
            remedy="harmless in training, but a policy is unprepared if it changes on the robot: leave it out of the "
            "observation, or check that it was recorded",
        )
    limits = [(one, np.maximum(1e-4, 1e-5 * np.abs(one.mean))) for one in it.vectors if one.real]
    tiny = [(one, (one.std > 0) & (one.std < limit)) for one, limit in limits]
    if any(which.any() for _, which in tiny):
        yield Finding(
            severity="warning",
            code="observation-tiny-variance",
            message=f"hardly changes: {listed([_dimensions(one, which) for one, which in tiny if which.any()])}",
            remedy="normalization makes noise of size 1 of it: leave it out of the observation, or change its unit",
        )


def _rewards(it: Inspection) -> Iterator[Finding]:
    reward = it.reward
    if reward.kind == "constant" and it.ends.terminated:
        yield Finding(
            severity="note",
            code="reward-constant",
            message=f"every reward is {_n(reward.mode)}: only the ends of episodes tell good from bad",
            remedy="check that the terminated flags are right; they are all there is to learn from",
        )
    elif reward.kind == "constant":
        yield Finding(
            severity="warning",
            code="reward-constant",
            message=f"every reward is {_n(reward.mode)}, and no episode is terminated",
            remedy="nothing but imitation can be learnt: compute rewards, or mark the ends of the task as terminated",
        )
    elif reward.kind == "sparse":
        yield Finding(
            severity="note",
            code="reward-sparse",
            message=f"{_share(reward.mode_share)} of the rewards are {_n(reward.mode)}; there are {reward.values:,} "
            "different ones",
            remedy="credit has a long way: use a discount near 1, n-step or Monte Carlo returns, a reward of -1 a step "
            "for IQL and CQL, or hindsight goals",
        )
    if it.scores is None:
        yield Finding(
            severity="note",
            code="no-reference",
            message="no reference returns, and so no normalized score and no TQ",
            remedy="set the returns of a random and of an expert policy when the dataset is made, or inspect it with a "
            "--reference that has them",
        )


_SHIFT = "shift {} by one row within each episode, drop the row at the edge, import anew and inspect again"


def _rows(it: Inspection) -> Iterator[Finding]:
    action, reward = it.alignment.action, it.alignment.reward
    if action.verdict in ("late", "early") and action.verdict == reward.verdict:
        yield Finding(
            severity="error",
            code="observation-shifted",
            message="actions and rewards both belong to neighbouring rows: observations were stored one row "
            f"{'early' if action.verdict == 'late' else 'late'}",
            remedy=_SHIFT.format("the observations"),
        )
        return
    if action.verdict == "late":  # cannot be a delay: what an action causes comes after it
        yield Finding(
            severity="error",
            code="action-shifted",
            message=f"the observation before an action's own explains {_share(action.before)} of it, the one "
            f"after {_share(action.after)}: actions were stored one row late, or chosen by old observations",
            remedy=_SHIFT.format("the actions"),
        )
    if action.verdict == "early":
        yield Finding(
            severity="warning",
            code="action-shifted",
            message=f"beside the next observation, the one after that explains {_share(action.after_next)} "
            f"of an action, its own {_share(action.before_next)}: actions were stored a row early, or take effect late",
            remedy=_SHIFT.format("the actions") + "; with a true delay, put the last actions into the observation",
        )
    if reward.verdict == "late":
        yield Finding(
            severity="warning",
            code="reward-shifted",
            message=f"a transition explains {_share(reward.following)} of the next row's reward and "
            f"{_share(reward.own)} of its own: rewards were stored one row late, or are measured one step late",
            remedy=_SHIFT.format("the rewards"),
        )
    if reward.verdict == "early":
        yield Finding(
            severity="error",
            code="reward-shifted",
            message=f"a transition explains {_share(reward.previous)} of the previous row's reward and "
            f"{_share(reward.own)} of its own: rewards were stored one row early",
            remedy=_SHIFT.format("the rewards"),
        )


def _ends(it: Inspection) -> Iterator[Finding]:
    ends = it.ends
    terminal, cut = ends.terminal_states, ends.elsewhere_states
    spike = ends.terminated_at_longest
    if ends.longest >= 5 and spike >= 3 and spike >= 10 * ends.terminated_near_longest:
        why = " (a round number)" * (ends.longest % 50 == 0)
        if ends.horizon == ends.longest:
            why = f" (where {it.env} cuts episodes)"
        alike = terminal is not None and not terminal.differ
        yield Finding(
            severity="error" if spike >= 0.5 * ends.terminated else "warning",
            code="timeout-as-terminal",
            message=f"{spike:,} of {ends.terminated:,} terminated episodes have exactly {ends.longest:,} steps{why}, "
            "and none has more: this looks like a time limit"
            + "; terminal observations look like those before"
            * alike,
            remedy="values would be learnt that end with the clock: mark these episodes truncated and import anew; if "
            "the task does end then, put the time that is left into the observation",
        )
    elif terminal is not None and terminal.episodes >= 50 and not terminal.differ:
        yield Finding(
            severity="note",
            code="terminal-unseen",
            message=f"the last observations of {terminal.episodes:,} terminated episodes look like those before "
            f"(distance {terminal.distance:.2f}, by chance up to {terminal.critical:.2f})",
            remedy="check that terminated marks ends of the task and no cuts; if so, observations lack what ends it",
        )
    if ends.truncated_elsewhere >= max(5, 0.2 * it.episodes):
        truncated, differ = it.episodes - ends.terminated, cut is not None and cut.differ
        message = f"{ends.truncated_elsewhere:,} of {truncated:,} truncated episodes differ in length from most"
        if cut is not None and differ:
            chance = f"distance {cut.distance:.2f} in {cut.where}, by chance up to {cut.critical:.2f}"
            message += f", and end in states unlike those before ({chance}): the task may have ended there"
        yield Finding(
            severity="warning" if differ else "note",
            code="terminal-as-timeout",
            message=message,
            remedy="if these are falls or successes, mark them terminated and import anew; if the recording was "
            "stopped there, all is right",
        )


def _repeats(it: Inspection) -> Iterator[Finding]:
    repeats = it.repeats
    if repeats.first_episodes is not None:
        again, original = repeats.first_episodes
        yield Finding(
            severity="warning" if it.real else "note",
            code="duplicate-episodes",
            message=f"{repeats.episodes:,} of {it.episodes:,} episodes repeat an earlier one step by step, "
            f"first episode {again}, which repeats {original}"
            + ("" if it.real else "; where all numbers are whole, that happens"),
            remedy="they count twice in training and leak from training into validation: leave them out; collected "
            "with a deterministic policy, they need different seeds",
        )
    beside = " beside these" * (repeats.episodes > 0)
    share = (repeats.transitions - repeats.in_episodes) / it.transitions
    if it.real and share > max(0.01, 3 * repeats.error):
        first = repeats.first
        where = "" if first is None or beside else f", first number {first[0]:,}, which repeats {first[1]:,}"
        yield Finding(
            severity="warning",
            code="duplicate-transitions",
            message=f"{_share(share)} of the transitions{beside} repeat an earlier one (observation, action, reward, "
            f"next observation){where}",
            remedy="look for files that were imported twice, and for a recorder that wrote old values when no new ones "
            "had come",
        )


def _dimensions(column: ColumnSummary, which: Array) -> str:
    indices = np.flatnonzero(which)
    if len(indices) == len(which) > 1:
        return f"all {len(which)} of {column.name}"
    return listed([column.dimension(int(d)) for d in indices])


def _n(value: float) -> str:
    return plain_number(float(value))


def _share(value: float) -> str:
    """As a percentage with two digits: 0.012 %, 3.4 %, 98 %, and 100 % for all and nothing else."""
    percent = 100 * float(value)
    return f"{percent:.0f} %" if value in (0, 1) else f"{min(percent, 99.99):.{2 if percent < 99 else 4}g} %"
