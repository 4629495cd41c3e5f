"""What the columns of a dataset hold: statistics in one pass over blocks, and rows drawn at random for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.store import Array, Dataset, Ragged
from ctrlrl.envs.worker import flatten_dict_space
from ctrlrl.runs.statistics import Floats

MAX_DIMENSIONS = 512
"""Entries with more numbers than that, pictures, are described as a whole and not number by number."""
BLOCK_NUMBERS = 2**20
"""Numbers of one column that are held at once."""
_SAMPLE_ROWS = 100_000
_SAMPLE_NUMBERS = 2**22
_AT_BOUND = 1e-4  # of the range: nearer than that is at the bound
_ROUNDING = 1e-5  # of the range: further than that is outside


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Of some numbers."""

    count: int
    mean: float
    std: float
    minimum: float
    q05: float
    q25: float
    median: float
    q75: float
    q95: float
    maximum: float

    @classmethod
    def of(cls, values: Array) -> Distribution:
        """Of at least one number."""
        x = np.asarray(values, np.float64)
        low, q05, q25, median, q75, q95, high = map(float, np.quantile(x, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
        return cls(
            count=len(x),
            mean=float(x.mean()),
            std=float(x.std()),
            minimum=low,
            q05=q05,
            q25=q25,
            median=median,
            q75=q75,
            q95=q95,
            maximum=high,
        )


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """Statistics of a column of numbers over all rows, without those that are not finite; D numbers a row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    per: str
    """`step`, or `observation`: an episode of T steps has T + 1 of those."""
    rows: int
    pooled: bool
    """Whether D = 1 stands for all numbers of an entry, as for pictures, which are then measured on drawn rows."""
    low: Floats
    """(D,), the space's bounds; infinite where there are none."""
    high: Floats
    minimum: Floats
    maximum: Floats
    mean: Floats
    std: Floats
    at_low: Floats
    """(D,), share of rows at the bound, or within 0.01 % of the range of it."""
    at_high: Floats
    outside: Floats
    """(D,), share of rows outside the bounds by more than rounding."""
    first_outside: tuple[int, int] | None
    """Row and dimension."""
    nonfinite: int
    first_nonfinite: tuple[int, int] | None
    sample: Array = field(repr=False, metadata={"json": False})
    """(S, D) rows drawn at random without repetition, in order; all of them where there are few."""

    def dimension(self, d: int) -> str:
        """`action[3]`; the name alone of a column of single numbers."""
        return self.name if self.pooled or not self.shape else f"{self.name}[{d}]"

    @property
    def real(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith("float")


@dataclass(frozen=True, kw_only=True)
class RaggedSummary:
    """Of a column whose entries differ in length: arrays, or texts. From entries drawn at random."""

    name: str
    dtype: str
    rows: int
    drawn: int
    length: Distribution | None
    """Of an entry: rows of an array, characters of a text; None where nothing was drawn."""
    distinct: int
    """Different entries among those drawn."""
    first: str
    """The first entry, if it is a text."""


@dataclass(frozen=True, kw_only=True)
class RewardSummary:
    """Rewards of all transitions."""

    distribution: Distribution
    values: int
    """How many different ones there are."""
    mode: float
    """The most frequent one."""
    mode_share: float
    exact: bool
    """Whether quantiles, values and the mode are of all rewards and not of some drawn at random."""
    sample: Array = field(repr=False, metadata={"json": False})

    @property
    def kind(self) -> str:
        """`constant`, `sparse` (nine in ten rewards are the same number) or `dense`."""
        if self.values == 1:
            return "constant"
        return "sparse" if self.mode_share >= 0.9 else "dense"


def observation_columns(dataset: Dataset) -> dict[str, Array | Ragged]:
    """The observation's entries by the names of their columns."""
    observation = dataset.observation
    if not isinstance(observation, dict):
        return {"observation": observation}
    return {f"observation.{name}": part for name, part in observation.items()}


def observation_bounds(dataset: Dataset) -> dict[str, gym.Space[Any]]:
    """The spaces of the observation's entries by the names of their columns."""
    entries = {".".join(path): entry for path, entry in flatten_dict_space(dataset.observation_space).items()}
    return {f"observation.{name}" if name else "observation": entry for name, entry in entries.items()}


def is_pooled(column: Array) -> bool:
    """Whether an entry has so many numbers that they are described as a whole."""
    return math.prod(column.shape[1:]) > MAX_DIMENSIONS or (column.dtype == np.uint8 and column.ndim >= 3)


def flat(rows: Array) -> Array:
    """(n, D)."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def drawn_rows(rows: int, wanted: int, seed: int = 0) -> Array:
    """Ascending indices of `wanted` of `rows` rows, all where there are no more; the same for the same numbers."""
    if rows <= wanted:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, wanted, replace=False))


def row_blocks(column: Array) -> Iterator[tuple[int, Array]]:
    """(first row, rows) of consecutive blocks."""
    size = max(1, BLOCK_NUMBERS // max(1, math.prod(column.shape[1:])))
    for start in range(0, len(column), size):
        yield start, column[start : start + size]


def bounds_of(space: gym.Space[Any] | None, dims: int) -> tuple[Floats, Floats]:
    """(D,) each; infinite where the space has none."""
    low, high = np.full(dims, -np.inf), np.full(dims, np.inf)
    match space:
        case gym.spaces.Box():
            low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
        case gym.spaces.Discrete():
            low, high = np.array([float(space.start)]), np.array([float(space.start + space.n - 1)])
        case gym.spaces.MultiDiscrete():
            low = np.asarray(space.start, np.float64).reshape(-1)
            high = low + np.asarray(space.nvec, np.float64).reshape(-1) - 1
    return low, high


def summarize(name: str, column: Array, per: str, space: gym.Space[Any] | None = None) -> ColumnSummary:
    """Measure a column of numbers."""
    if is_pooled(column):
        return _summarize_pooled(name, column, per)
    dims = math.prod(column.shape[1:])
    scan = _Scan(*bounds_of(space, dims))
    for start, rows in row_blocks(column):
        scan.add(start, flat(rows))
    drawn = drawn_rows(len(column), min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // max(1, dims)))
    return scan.summary(name, column, per, pooled=False, sample=np.array(flat(column[drawn])))


def _summarize_pooled(name: str, column: Array, per: str) -> ColumnSummary:
    """Statistics on drawn rows; what is not finite is looked for in all."""
    dims = math.prod(column.shape[1:])
    sample = column[drawn_rows(len(column), max(1, min(2000, 4 * _SAMPLE_NUMBERS // dims)))].reshape(-1, 1)
    scan = _Scan(*bounds_of(None, 1))
    for start in range(0, len(sample), BLOCK_NUMBERS):
        scan.add(0, sample[start : start + BLOCK_NUMBERS])
    scan.nonfinite, scan.first_nonfinite = 0, None
    if column.dtype.kind == "f":
        for start, rows in row_blocks(column):
            scan.look_for_nonfinite(start, np.isfinite(flat(rows)))
    thin = sample[drawn_rows(len(sample), _SAMPLE_ROWS)]
    return scan.summary(name, column, per, pooled=True, sample=thin)


class _Scan:
    """Statistics per dimension, block by block."""

    def __init__(self, low: Floats, high: Floats) -> None:
        dims = len(low)
        self.low, self.high = low, high
        span = np.where(np.isfinite(low) & np.isfinite(high), high - low, 0.0)
        self._near, self._beyond = _AT_BOUND * span, _ROUNDING * span
        self.count = np.zeros(dims)
        self.mean, self.m2 = np.zeros(dims), np.zeros(dims)
        self.minimum, self.maximum = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.at_low, self.at_high, self.outside = np.zeros(dims), np.zeros(dims), np.zeros(dims)
        self.first_outside: tuple[int, int] | None = None
        self.nonfinite = 0
        self.first_nonfinite: tuple[int, int] | None = None

    def add(self, start: int, rows: Array) -> None:
        x = rows.astype(np.float64)
        finite = np.isfinite(x)
        if finite.all():
            count: Any = np.full(x.shape[1], float(len(x)))
            self.minimum = np.minimum(self.minimum, x.min(axis=0))
            self.maximum = np.maximum(self.maximum, x.max(axis=0))
        else:
            self.look_for_nonfinite(start, finite)
            count = finite.sum(axis=0).astype(np.float64)
            self.minimum = np.minimum(self.minimum, np.where(finite, x, np.inf).min(axis=0))
            self.maximum = np.maximum(self.maximum, np.where(finite, x, -np.inf).max(axis=0))
        own = np.where(finite, x, 0.0).sum(axis=0) / np.maximum(count, 1)
        deviations = np.where(finite, x - own, 0.0)
        # Chan, Golub and LeVeque 1983: the sums of squares of two parts, put together without cancellation.
        total = np.maximum(self.count + count, 1)
        gap = own - self.mean
        self.m2 += np.einsum("nd,nd->d", deviations, deviations) + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count += count
        if np.isfinite(self.low).any() or np.isfinite(self.high).any():
            self._compare_with_bounds(start, x)

    def look_for_nonfinite(self, start: int, finite: Array) -> None:
        missing = finite.size - int(np.count_nonzero(finite))
        if missing and self.first_nonfinite is None:
            row, dim = np.argwhere(~finite)[0]
            self.first_nonfinite = start + int(row), int(dim)
        self.nonfinite += missing

    def _compare_with_bounds(self, start: int, x: Array) -> None:
        with np.errstate(invalid="ignore"):
            self.at_low += (x <= self.low + self._near).sum(axis=0)
            self.at_high += (x >= self.high - self._near).sum(axis=0)
            outside = (x < self.low - self._beyond) | (x > self.high + self._beyond)
        if outside.any():
            if self.first_outside is None:
                row, dim = np.argwhere(outside)[0]
                self.first_outside = start + int(row), int(dim)
            self.outside += outside.sum(axis=0)

    def summary(self, name: str, column: Array, per: str, *, pooled: bool, sample: Array) -> ColumnSummary:
        known = self.count > 0
        rows = max(1, len(column))
        return ColumnSummary(
            name=name,
            dtype=str(column.dtype.newbyteorder("=")),
            shape=column.shape[1:],
            per=per,
            rows=len(column),
            pooled=pooled,
            low=self.low,
            high=self.high,
            minimum=np.where(known, self.minimum, np.nan),
            maximum=np.where(known, self.maximum, np.nan),
            mean=np.where(known, self.mean, np.nan),
            std=np.where(known, np.sqrt(self.m2 / np.maximum(self.count, 1)), np.nan),
            at_low=self.at_low / rows,
            at_high=self.at_high / rows,
            outside=self.outside / rows,
            first_outside=self.first_outside,
            nonfinite=self.nonfinite,
            first_nonfinite=self.first_nonfinite,
            sample=sample,
        )


def summarize_ragged(name: str, column: Ragged, dtype: str) -> RaggedSummary:
    """Measure a column of arrays or texts that differ in length, on at most 10,000 of them."""
    drawn = [column[int(i)] for i in drawn_rows(len(column), 10_000)]
    texts = dtype == "text"
    return RaggedSummary(
        name=name,
        dtype=dtype,
        rows=len(column),
        drawn=len(drawn),
        length=Distribution.of(np.array([len(one) for one in drawn])) if drawn else None,
        distinct=len({one if texts else one.tobytes() for one in drawn}),
        first=column[0] if texts and drawn else "",
    )


def summarize_reward(reward: Array) -> RewardSummary:
    """Measure the rewards, those that are finite; quantiles and frequencies on drawn ones where there are very many."""
    drawn = np.array(reward[drawn_rows(len(reward), 2**24)])
    drawn = drawn[np.isfinite(drawn)]
    values, counts = np.unique(drawn, return_counts=True)
    top = int(counts.argmax())
    return RewardSummary(
        distribution=Distribution.of(drawn),
        values=len(values),
        mode=float(values[top]),
        mode_share=float(counts[top] / len(drawn)),
        exact=len(reward) <= 2**24,
        sample=drawn[drawn_rows(len(drawn), _SAMPLE_ROWS)],
    )


def place(dataset: Dataset, row: int, per: str) -> str:
    """`episode 3, step 17` of a row of a column, both counted from 0."""
    starts = dataset.starts + (np.arange(dataset.num_episodes) if per == "observation" else 0)
    episode = int(np.searchsorted(starts, row, side="right")) - 1
    return f"episode {episode}, step {row - int(starts[episode])}"


def listed(items: Sequence[str], most: int = 6) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
