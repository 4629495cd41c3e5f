"""Statistics of runs: few seeds, many episodes, honest intervals. NumPy only.

The interquartile mean and the stratified bootstrap follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge
of the Statistical Precipice" (arXiv 2108.13264), and its library rliable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ctrlrl.errors import UsageError

Floats: TypeAlias = npt.NDArray[np.float64]


def iqm(x: npt.ArrayLike) -> Floats:
    """Interquartile mean over the first axis: the mean of what is left without the lowest and the highest quarter.

    As in rliable, which calls `scipy.stats.trim_mean(x, 0.25)`: with n numbers, floor(n / 4) are cut at each end, whole
    numbers only. So n = 5, 6 or 7 lose one at each end, as n = 4 does, and n < 4 gives the plain mean.

    Args:
        x: (n, ...), n >= 1. For the aggregate over runs and tasks give all scores in one (n,) array.

    Returns:
        (...) float64; a zero-dimensional array for (n,).

    Raises:
        UsageError: x is empty.
    """
    ordered = np.sort(np.asarray(x, dtype=np.float64), axis=0)
    if ordered.ndim == 0 or len(ordered) == 0:
        raise UsageError(f"iqm needs at least one score along the first axis, got an array of shape {ordered.shape}")
    cut = len(ordered) // 4
    return np.asarray(ordered[cut : len(ordered) - cut].mean(axis=0))


def stratified_bootstrap(
    scores: Mapping[str, npt.ArrayLike],
    statistic: Callable[[Floats], npt.ArrayLike] = iqm,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval of `statistic`, runs being redrawn with replacement inside each task.

    Tasks are fixed and runs are random, so each resample holds as many runs of each task as there were (section 4.1 of
    the paper). A run is redrawn whole: with curves of T points the interval is pointwise.

    Args:
        scores: per task an array (runs,) or (runs, T); the number of runs may differ between tasks, T may not.
        statistic: maps the scores of all tasks together, (total runs, ...), to (...): `iqm`, say.
        resamples: number of resamples.
        confidence: in (0, 1).
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        (low, high), each of the statistic's shape. Both NaN where no task has two runs: nothing can be resampled, and
        an interval of no width would claim a certainty that one run cannot give.

    Raises:
        UsageError: no task, a task without runs, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    tasks = {task: np.asarray(values, dtype=np.float64) for task, values in scores.items()}
    for task, values in tasks.items():
        if values.ndim == 0 or len(values) == 0:
            raise UsageError(f"stratified_bootstrap: task {task!r} has no runs (shape {values.shape})")
    if not tasks:
        raise UsageError("stratified_bootstrap needs the scores of at least one task, got none")
    everything = np.concatenate(list(tasks.values()))  # (total runs, ...)
    if all(len(values) < 2 for values in tasks.values()):
        unknown = np.full(np.shape(statistic(everything)), np.nan)
        return unknown, unknown.copy()
    rng = np.random.default_rng(seed)
    firsts = np.cumsum([0, *(len(values) for values in tasks.values())])[:-1]
    rows = np.concatenate(  # (resamples, total runs): which run stands in each place
        [
            first + rng.integers(len(values), size=(resamples, len(values)))
            for first, values in zip(firsts, tasks.values(), strict=True)
        ],
        axis=1,
    )
    estimates = np.array([statistic(everything[row]) for row in rows], dtype=np.float64)
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def mean_interval(returns: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student-t interval of the mean of n episodes: mean -+ t(n - 1) * s / sqrt(n), s with n - 1 in its denominator.

    The t interval and not a bootstrap, because evaluations have few episodes (10, say), where a percentile bootstrap is
    too narrow. It speaks of this one policy on further episodes, not of further training runs.

    Args:
        returns: (n,) returns of independent episodes.
        confidence: in (0, 1).

    Returns:
        (low, high); both NaN for n < 2, which says nothing about the spread, and where a return is not finite.

    Raises:
        UsageError: a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    values = np.asarray(returns, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    mean = float(values.mean())
    half = student_t(len(values) - 1, confidence) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def student_t(freedom: int, confidence: float) -> float:
    """The t with P(|T| < t) = `confidence` for Student's distribution with `freedom` degrees of freedom (>= 1).

    Bisects the finite series of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even) over theta = atan(t / sqrt(nu)).
    """
    odd = freedom % 2
    # Coefficients of cos^odd, cos^(odd + 2), ..., cos^(freedom - 2): each is the one before times (k - 1) / k, or
    # k / (k + 1) when odd, with k = 2, 4, ...
    k = np.arange(2, freedom - 1 - odd, 2, dtype=np.float64)
    coefficients = np.cumprod(np.concatenate([[1.0], (k - 1 + odd) / (k + odd)]))
    powers = np.arange(len(coefficients)) * 2 + odd

    def inside(theta: float) -> float:
        series = math.sin(theta) * float(coefficients @ math.cos(theta) ** powers)
        if not odd:
            return series
        return 2 / math.pi * (theta + (series if freedom > 1 else 0.0))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def time_to_threshold(steps: npt.ArrayLike, values: npt.ArrayLike, threshold: float) -> int | None:
    """The step of the first evaluation at or above `threshold`, None when there is none.

    Nothing is interpolated: the answer is a step at which the run was evaluated, so it is late by up to one interval
    between evaluations. A later fall below the threshold does not count against the run.

    Args:
        steps: (T,) ascending.
        values: (T,) mean return at each step.
    """
    reached = np.flatnonzero(np.asarray(values, dtype=np.float64) >= threshold)
    return int(np.asarray(steps)[reached[0]]) if len(reached) else None


def align_curves(curves: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> tuple[Floats, Floats]:
    """Bring curves onto one grid: every step that any run was evaluated at, within the range that all runs cover.

    Between two of its own evaluations a run is interpolated linearly (which changes nothing where all runs were
    evaluated at the same steps). Before its first and after its last evaluation a run has no value and none is made up:
    the grid starts at the latest first step and ends at the earliest last step.

    Args:
        curves: (steps, values) per run, each (T_run,), steps strictly ascending.

    Returns:
        grid (T,) and values (runs, T); T = 0 where the runs share no range.

    Raises:
        UsageError: no curves, or steps that do not ascend.
    """
    if not curves:
        raise UsageError("align_curves needs at least one curve, got none")
    pairs = [(np.asarray(steps, np.float64), np.asarray(values, np.float64)) for steps, values in curves]
    for index, (steps, values) in enumerate(pairs):
        if steps.shape != values.shape or steps.ndim != 1 or bool((np.diff(steps) <= 0).any()):
            raise UsageError(
                f"align_curves: curve {index} needs steps (T,) that ascend and values (T,), "
                f"got shapes {steps.shape} and {values.shape}, steps {steps[:5].tolist()}"
            )
    if any(len(steps) == 0 for steps, _ in pairs):
        return np.empty(0), np.empty((len(pairs), 0))
    first, last = max(steps[0] for steps, _ in pairs), min(steps[-1] for steps, _ in pairs)
    grid = np.unique(np.concatenate([steps for steps, _ in pairs]))
    grid = grid[(grid >= first) & (grid <= last)]
    return grid, np.array([np.interp(grid, steps, values) for steps, values in pairs]).reshape(len(pairs), len(grid))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1 (0.95, say), got {confidence}")
