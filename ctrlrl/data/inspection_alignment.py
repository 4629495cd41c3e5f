"""Whether rows belong together: actions and rewards against observations, and the flags of how episodes end.

**Actions.** An action shows in the observation that follows it, and not, beyond what its own observation says, in the
one before. So for the action stored with step t two shares are measured of its variance that a linear regression on
o_t and the squares of o_t leaves: how much o_(t+1) explains of it (`after`), and how much o_(t-1) does (`before`).
Aligned data has after > before; with actions stored one row late before > after, since the action already shows in
o_t. A policy that acts on what it sees makes o_(t+1) tell of the action also if that was stored one row early; then,
however, o_(t+2) tells more of it beyond o_(t+1) than o_t does. So the same two shares are taken about o_(t+1)
(`after_next`, `before_next`), and early is after_next > before_next. "More" is: at least 0.1, and half as much again or
half as much left unexplained. Where an action follows from the one before it (`memory`), by smoothing or correlated
noise, `after` must also be the largest of its kind at the row that is found. Nothing is said where observations leave
less than 5 % of the actions' variance: then they came from a policy without noise, and every shift fits.

Measured on nine MuJoCo and classic-control tasks with ten behaviour policies each (uniform, correlated, piecewise
constant, linear and neural feedback with noise and without, smoothed), 6,000 steps a set: of 90 aligned sets 63 are
called aligned and none shifted; of 90 stored one row late 59 are found and none is called aligned; of 90 stored one row
early 66 are found and 3 are called aligned. Of the rest nothing is said.

**Rewards.** The reward stored one row before, with step t, and one row after are regressed on o_t, o_(t+1), the action
that was found to belong to them, and their squares. Another row's is the right one if it leaves at most half as much
unexplained as the stored one, and explains 0.5 % of the variance more. A reward that depends on the state alone fits
two rows equally well, and nothing is said.

A real delay, of an actuator or a sensor, looks like a shift of the same kind; the numbers cannot tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np

from ctrlrl.data.inspection_columns import drawn_rows, flat, is_pooled, observation_columns
from ctrlrl.data.store import Array, Dataset, Ragged
from ctrlrl.runs.statistics import Floats

Verdict = Literal["aligned", "late", "early", "untold"]
"""`late`: stored one row after the one it belongs to; `early`: one row before."""
_ROWS, _DRAWN_NUMBERS = 20_000, 4_000_000  # at most, of transitions and of numbers of their observations
_NUMBERS = 400  # of observations, at most
_SQUARED = 64  # numbers up to which squares are regressed on as well
_MEMORY = 0.2
_LEFT = 0.05  # of the actions' variance that observations must leave


@dataclass(frozen=True, kw_only=True)
class ActionAlignment:
    """Shares of what observations leave of the actions' variance; see the head of the file."""

    verdict: Verdict
    why: str
    left: float = math.nan
    """Of the actions' variance beside o_t."""
    before: float = math.nan
    """Explained by o_(t-1) beyond o_t."""
    after: float = math.nan
    """Explained by o_(t+1) beyond o_t."""
    left_next: float = math.nan
    """Of the actions' variance beside o_(t+1)."""
    before_next: float = math.nan
    """Explained by o_t beyond o_(t+1)."""
    after_next: float = math.nan
    """Explained by o_(t+2) beyond o_(t+1)."""
    after_previous: float = math.nan
    """Explained by o_t beyond o_(t-1)."""
    memory: float = math.nan
    """Correlation of what observations leave of two actions in a row."""


@dataclass(frozen=True, kw_only=True)
class RewardAlignment:
    """Shares of the rewards' variance that transition t explains."""

    verdict: Verdict
    why: str
    previous: float = math.nan
    """Of the reward stored with step t - 1."""
    own: float = math.nan
    following: float = math.nan
    """Of the reward stored with step t + 1."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Of actions and rewards with observations, from rows drawn at random."""

    rows: int
    observations: tuple[str, ...]
    """Columns that were used: those of vectors."""
    action: ActionAlignment
    reward: RewardAlignment


@dataclass(frozen=True, kw_only=True)
class LastStates:
    """Whether the observations at which some episodes end differ from those shortly before."""

    episodes: int
    distance: float
    """Largest Kolmogorov-Smirnov distance over the numbers of an observation."""
    critical: float
    """What it exceeds by chance in one of 20 datasets, Bonferroni's correction for the numbers included."""
    where: str
    """The number that differs most."""

    @property
    def differ(self) -> bool:
        """Whether they do, beyond chance."""
        return self.distance > self.critical


@dataclass(frozen=True, kw_only=True)
class Ends:
    """How episodes end."""

    terminated: int
    truncated: int
    """Both flags may be set."""
    longest: int
    """Transitions of the longest episode."""
    terminated_at_longest: int
    terminated_near_longest: float
    """Terminated episodes for each length from 80 % of the longest up to it, on average: what chance would give."""
    truncated_elsewhere: int
    """Truncated and not terminated, at another length than most of those."""
    horizon: int | None
    """Steps after which Gymnasium cuts an episode of this environment, where it knows."""
    terminal_states: LastStates | None
    """Of terminated episodes; None for fewer than 20, or without vectors."""
    elsewhere_states: LastStates | None
    """Of those truncated elsewhere."""


def alignment(dataset: Dataset) -> Alignment:
    """Compare actions and rewards with observations, on at most 20,000 transitions inside episodes."""
    names, columns = _vectors(dataset)
    inner = np.maximum(dataset.lengths - 2, 0)  # steps that have one before and one after them
    total = int(inner.sum())
    numbers = sum(math.prod(column.shape[1:]) for column in columns)
    drawn = drawn_rows(total, min(_ROWS, _DRAWN_NUMBERS // max(1, numbers)))
    ends = np.cumsum(inner)
    episode = np.searchsorted(ends, drawn, side="right")
    step = dataset.starts[episode] + drawn - (ends[episode] - inner[episode]) + 1  # (n,)

    def refused(why: str) -> Alignment:
        return Alignment(
            rows=len(step),
            observations=names,
            action=ActionAlignment(verdict="untold", why=why),
            reward=RewardAlignment(verdict="untold", why=why),
        )

    if not columns:
        return refused("no observation is a vector of numbers")
    seen = [
        np.concatenate([flat(column[step + episode + lag]).astype(np.float64) for column in columns], axis=1)
        for lag in (-1, 0, 1, 2)
    ]  # four times (n, D)
    actions = np.split(_action_numbers(dataset, np.concatenate([step - 1, step, step + 1])), 3)  # three times (n, A)
    rewards = np.stack([dataset.reward[step + lag] for lag in (-1, 0, 1)], axis=1).astype(np.float64)
    fine = np.isfinite(np.concatenate([*seen, *actions, rewards], axis=1)).all(axis=1)
    seen, actions, rewards = [one[fine] for one in seen], [one[fine] for one in actions], rewards[fine]
    rows, dims = seen[0].shape
    if rows < max(200, 10 * (2 * dims + actions[0].shape[1])):
        return refused(f"too few transitions inside episodes ({rows:,}) for {dims} numbers")
    squared = dims <= _SQUARED and rows >= 20 * dims
    action = _action_alignment(seen, actions[1], actions[2], squared)
    # The action that belongs to the row's observation; none where that is unknown.
    fitting = {"early": actions[:1], "aligned": actions[1:2], "late": actions[2:], "untold": []}[action.verdict]
    transition = np.concatenate([seen[1], seen[2], *fitting], axis=1)
    return Alignment(
        rows=rows, observations=names, action=action, reward=_reward_alignment(transition, rewards, squared)
    )


def _vectors(dataset: Dataset) -> tuple[tuple[str, ...], list[Array]]:
    names: list[str] = []
    columns: list[Array] = []
    numbers = 0
    for name, column in observation_columns(dataset).items():
        if isinstance(column, Ragged) or is_pooled(column):
            continue
        numbers += math.prod(column.shape[1:])
        if numbers > _NUMBERS:
            break
        names.append(name)
        columns.append(column)
    return tuple(names), columns


def _action_numbers(dataset: Dataset, step: Array) -> Floats:
    """(n, A) float64: the actions of n steps; whole-numbered ones as one column for each value, up to 64 of them."""
    rows = flat(dataset.action[step])
    if isinstance(dataset.action_space, gym.spaces.Box):
        return rows.astype(np.float64)
    parts = []
    for d in range(rows.shape[1]):
        values = np.unique(rows[:, d])
        parts.append(rows[:, d : d + 1] == values if len(values) <= 64 else rows[:, d : d + 1])
    return np.concatenate(parts, axis=1).astype(np.float64)


def _action_alignment(seen: list[Floats], action: Floats, following: Floats, squared: bool) -> ActionAlignment:
    target = _standardized(action)
    if not target.shape[1]:
        return ActionAlignment(verdict="untold", why="the actions are all the same")
    left, before, after = _shares(target, seen[1], (seen[0], seen[2]), squared)
    left_next, before_next, after_next = _shares(target, seen[2], (seen[1], seen[3]), squared)
    _, after_previous = _shares(target, seen[0], (seen[1],), squared)
    memory = _memory(action, following, seen[1], seen[2], squared)
    early, late = _more(after_next, before_next) and left_next >= _LEFT, _more(before, after)
    verdict: Verdict = "untold"
    why = "the observations before and after tell about equally much of an action, or both little"
    if left < _LEFT:
        why = f"observations leave {left:.1%} of the actions' variance: a policy without noise fits every shift"
    elif early and (not late or after_next - before_next > before - after):
        verdict, why = "early", "actions show one observation later than in the next one"
    elif late:
        verdict, why = "late", "actions show in the observation they are stored with"
    elif _more(after, before):
        verdict, why = "aligned", "actions show in the next observation"
    strongest = {"late": after_previous, "aligned": after, "early": after_next}
    if verdict != "untold" and memory > _MEMORY and strongest[verdict] < max(strongest.values()):
        verdict, why = "untold", f"actions follow from the actions before them (correlation {memory:.2f})"
    return ActionAlignment(
        verdict=verdict,
        why=why,
        left=left,
        before=before,
        after=after,
        left_next=left_next,
        before_next=before_next,
        after_next=after_next,
        after_previous=after_previous,
        memory=memory,
    )


def _memory(action: Floats, following: Floats, own: Floats, after: Floats, squared: bool) -> float:
    """Correlation of what observations leave of two actions in a row, over all of their numbers."""
    varies = (action.std(axis=0) > 0) & (following.std(axis=0) > 0)
    (one, _), (other, _) = (
        _residual(_features(given, squared), x[:, varies] - x[:, varies].mean(axis=0))
        for given, x in ((own, action), (after, following))
    )
    size = np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
    known = size > 0
    return float(((one * other).sum(axis=0)[known] / size[known]).mean()) if known.any() else 0.0


def _reward_alignment(transition: Floats, rewards: Floats, squared: bool) -> RewardAlignment:
    if (rewards.std(axis=0) < 1e-9).any():
        return RewardAlignment(verdict="untold", why="the rewards are all the same")
    features = _features(transition, squared)
    target = rewards - rewards.mean(axis=0)
    rest, rank = _residual(features, target)
    freedom = len(target) / max(1, len(target) - rank)
    previous, own, following = map(float, 1 - (rest**2).sum(axis=0) / (target**2).sum(axis=0) * freedom)
    best = max(previous, following)
    verdict: Verdict = "untold"
    why = "the transition explains the rewards of neighbouring rows about as well, or none of them"
    if best >= 0.3 and best - own >= 0.005 and 1 - best <= 0.5 * (1 - own):
        # What is explained by transition t and stored with t + 1 was stored late.
        verdict = "late" if following > previous else "early"
        why = (
            "the transition explains the reward of the " + ("next" if verdict == "late" else "previous") + " row better"
        )
    elif own >= 0.3 and own - best >= 0.005 and 1 - own <= 0.5 * (1 - best):
        verdict, why = "aligned", "the transition explains its own reward best"
    return RewardAlignment(verdict=verdict, why=why, previous=previous, own=own, following=following)


def _more(one: float, other: float) -> bool:
    return one >= 0.1 and one > other and (one >= 1.5 * other or 1 - one <= 0.5 * (1 - other))


def _shares(target: Floats, given: Floats, others: Sequence[Floats], squared: bool) -> list[float]:
    """What `given` leaves of the target's variance, and the share of that which each of the others explains."""
    base = _features(given, squared)
    rest, rank = _residual(base, target)
    left = (rest**2).mean(axis=0)
    known = left > 1e-3  # below, what is left is rounding
    shares = [float(left.mean())]
    rest = rest[:, known] / np.sqrt(left[known])
    for other in others:
        new, _ = _residual(base, _standardized(other))
        unexplained, more = _residual(_standardized(new[:, new.std(axis=0) > 1e-6]), rest)
        rows = len(rest)
        freedom = (rows - rank) / max(1, rows - rank - more)  # as R^2 is adjusted for the number of regressors
        whole = float((rest**2).sum())
        shares.append(max(0.0, 1 - float((unexplained**2).sum()) / whole * freedom) if whole else 0.0)
    return shares


def _features(x: Floats, squared: bool) -> Floats:
    z = _standardized(x)
    return _standardized(np.concatenate([z, z**2], axis=1)) if squared else z


def _standardized(x: Floats) -> Floats:
    """Mean 0 and variance 1; without what is constant."""
    spread = x.std(axis=0)
    varies = spread > 1e-9 * np.maximum(1.0, np.abs(x).max(axis=0, initial=0.0))
    return np.asarray((x[:, varies] - x[:, varies].mean(axis=0)) / spread[varies])


def _residual(features: Floats, target: Floats) -> tuple[Floats, int]:
    """What linear regression leaves of the target, and the rank of the features; both have mean 0."""
    if not features.shape[1]:
        return target, 0
    values, vectors = np.linalg.eigh(features.T @ features / len(features))
    kept = values > 1e-7 * values[-1]
    basis = features @ (vectors[:, kept] / np.sqrt(values[kept]))
    return target - basis @ (basis.T @ target) / len(features), int(kept.sum())


def ends(dataset: Dataset) -> Ends:
    """How episodes end, and whether that looks like what the flags say."""
    lengths, terminated = dataset.lengths, dataset.terminated
    longest = int(lengths.max())
    own = lengths[terminated]
    values, counts = np.unique(lengths[~terminated], return_counts=True)
    usual = int(values[counts.argmax()]) if len(values) else 0
    elsewhere = np.flatnonzero(~terminated & (lengths != usual))
    first = math.ceil(0.8 * longest)
    near = int(((own >= first) & (own < longest)).sum())
    spec = gym.registry.get(dataset.env or "")
    return Ends(
        terminated=int(terminated.sum()),
        truncated=int(dataset.truncated.sum()),
        longest=longest,
        terminated_at_longest=int((own == longest).sum()),
        terminated_near_longest=near / max(1, longest - first),
        truncated_elsewhere=len(elsewhere),
        horizon=None if spec is None else spec.max_episode_steps,
        terminal_states=_last_states(dataset, np.flatnonzero(terminated)),
        elsewhere_states=_last_states(dataset, elsewhere),
    )


def _last_states(dataset: Dataset, episodes: Array) -> LastStates | None:
    """Compare the last observations of the episodes with four each from the last quarter before."""
    names, columns = _vectors(dataset)
    if len(episodes) < 20 or not columns:
        return None
    random = np.random.default_rng(0)
    if len(episodes) > 5000:
        episodes = np.sort(random.choice(episodes, 5000, replace=False))
    lengths, first = dataset.lengths[episodes], dataset.starts[episodes] + episodes
    back = np.floor(random.random((len(episodes), 4)) * np.maximum(1, lengths // 4)[:, None]).astype(np.int64)
    earlier = (first + lengths - 1)[:, None] - back  # (n, 4) rows of observations
    distance, where = 0.0, ""
    dims = sum(math.prod(column.shape[1:]) for column in columns)
    for name, column in zip(names, columns, strict=True):
        last, before = flat(column[first + lengths]), flat(column[np.sort(earlier.reshape(-1))])
        for d in range(last.shape[1]):
            found = _kolmogorov_smirnov(last[:, d], before[:, d])
            if found > distance:
                distance, where = found, f"{name}[{d}]" if column.ndim > 1 else name
    # Two samples of n and 4 n, level 0.05 shared among the numbers (the large-sample form of Kolmogorov's limit).
    n = len(episodes)
    critical = math.sqrt(-0.5 * math.log(0.05 / dims / 2)) * math.sqrt((n + 4 * n) / (n * 4 * n))
    return LastStates(episodes=n, distance=distance, critical=critical, where=where)


def _kolmogorov_smirnov(one: Array, other: Array) -> float:
    one, other = np.sort(one), np.sort(other)
    both = np.concatenate([one, other])
    return float(
        np.abs(
            np.searchsorted(one, both, side="right") / len(one)
            - np.searchsorted(other, both, side="right") / len(other)
        ).max()
    )
