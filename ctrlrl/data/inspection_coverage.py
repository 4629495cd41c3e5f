"""How much of a dataset is different: transitions and episodes that repeat, and state-action pairs on a grid.

Rows are compared by 64-bit hashes: of n different rows, some two collide with a probability of about n^2 / 2^65, 10^-7
for a million. Up to `EXACT` transitions the hashes are counted exactly, above that by HyperLogLog (Flajolet et al.
2007), whose standard error is 1.04 / sqrt(65536) = 0.4 %.

SACo is from Schweighofer et al. 2022, "A Dataset Perspective on Offline Reinforcement Learning" (arXiv 2111.04714):
the number of unique state-action pairs of a dataset over that of a reference dataset of the same environment. Real
numbers are put into bins of equal width between the smallest and the largest one of both datasets, dimension by
dimension; whole numbers, pictures and texts are taken as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlrl.data.inspection_columns import BLOCK_NUMBERS, ColumnSummary, flat, observation_columns
from ctrlrl.data.store import Array, Dataset, Ragged
from ctrlrl.runs.statistics import Floats

EXACT = 2**24
"""Transitions up to which what is different is counted exactly; takes 8 bytes for each and each count."""
BINS = (100, 10)
"""Bins a dimension: 100 as in the authors' code, and 10, which still tells something where 100 split everything."""
_REGISTERS = 16
_WORDS = 2**19


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What is there more than once."""

    transitions: int
    """How many repeat an earlier one: observation, action, reward and next observation are the same."""
    first: tuple[int, int] | None
    """The first one that repeats another, and that one; None where there is none, or they were not counted exactly."""
    episodes: int
    """How many repeat an earlier one, transition by transition."""
    in_episodes: int
    """Transitions of those."""
    first_episodes: tuple[int, int] | None
    error: float
    """Relative standard error of the number of different transitions; 0 where they were counted."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Different state-action pairs on one grid."""

    bins: int
    distinct: int
    share: float
    """Of the transitions."""
    reference: int | None
    """Different ones in the reference dataset, on the same grid."""
    saco: float | None
    error: float
    """Relative standard error of a count."""


class Distinct:
    """Counts different hashes: exactly, or with HyperLogLog where there are more than `EXACT`."""

    def __init__(self, rows: int) -> None:
        self.hashes: Array | None = np.empty(rows, np.uint64) if rows <= EXACT else None
        self._registers = np.zeros(2**_REGISTERS, np.uint8)
        self._filled = 0

    @property
    def error(self) -> float:
        """Relative standard error of `count`."""
        return 0.0 if self.hashes is not None else 1.04 / math.sqrt(2**_REGISTERS)

    def add(self, hashes: Array) -> None:
        """Take in some; as many in all as were announced."""
        if self.hashes is not None:
            self.hashes[self._filled : self._filled + len(hashes)] = hashes
            self._filled += len(hashes)
            return
        register = (hashes >> np.uint64(64 - _REGISTERS)).astype(np.int64)
        rest = hashes << np.uint64(_REGISTERS)
        for shift in (1, 2, 4, 8, 16, 32):  # all bits below the leading one
            rest |= rest >> np.uint64(shift)
        rank = np.minimum(64 - np.bitwise_count(rest), 64 - _REGISTERS) + 1
        np.maximum.at(self._registers, register, rank.astype(np.uint8))

    def count(self) -> int:
        """How many different ones there were."""
        if self.hashes is not None:
            ordered = np.sort(self.hashes[: self._filled])
            return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + (len(ordered) > 0)
        m = len(self._registers)
        estimate = 0.7213 / (1 + 1.079 / m) * m * m / float(np.ldexp(1.0, -self._registers.astype(np.int64)).sum())
        empty = int(np.count_nonzero(self._registers == 0))
        return round(m * math.log(m / empty) if estimate <= 2.5 * m and empty else estimate)


def hash_rows(rows: Array | Sequence[Any]) -> Array:
    """(n,) uint64 of n rows: the same for equal rows (0.0 and -0.0 are equal), whatever else they are beside."""
    if not isinstance(rows, np.ndarray):
        return np.fromiter(map(_hash_entry, rows), np.uint64, len(rows))
    return _hash_numbers(flat(rows))


def _hash_numbers(rows: Array) -> Array:
    if rows.dtype.kind == "f":
        rows = rows + rows.dtype.type(0)  # -0.0 becomes 0.0
    width = rows.shape[1] * rows.itemsize
    words = -(-width // 8)
    out = np.empty(len(rows), np.uint64)
    keys = _mixed(np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    step = max(1, _WORDS // max(1, words))
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        padded = np.zeros((len(part), words * 8), np.uint8)
        padded[:, :width] = part.view(np.uint8).reshape(len(part), width)
        out[start : start + step] = _mixed(_mixed(padded.view("<u8") + keys).sum(axis=1, dtype=np.uint64))
    return out


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of the input moves half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_entry(entry: Any) -> int:
    content = entry.encode() if isinstance(entry, str) else repr(entry.shape).encode() + entry.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _together(*hashes: Array) -> Array:
    return hash_rows(np.stack(hashes, axis=1))


@dataclass(frozen=True)
class _Block:
    """Consecutive transitions, and where their observations are."""

    steps: slice
    observations: slice
    episode: Array
    """(n,) of each transition."""
    own: Array
    """(n,) the row of each transition's observation among `observations`; the next one is one further."""


def _blocks(dataset: Dataset) -> Iterator[_Block]:
    columns = [*observation_columns(dataset).values(), dataset.action]
    numbers = max(math.prod(column.shape[1:]) if isinstance(column, np.ndarray) else 64 for column in columns)
    size = max(1, BLOCK_NUMBERS // max(1, numbers))
    for start in range(0, dataset.num_transitions, size):
        steps = np.arange(start, min(start + size, dataset.num_transitions))
        episode = np.searchsorted(dataset.starts, steps, side="right") - 1
        rows = steps + episode
        yield _Block(
            slice(start, int(steps[-1]) + 1), slice(int(rows[0]), int(rows[-1]) + 2), episode, rows - int(rows[0])
        )


Ranges = Mapping[str, tuple[Floats, Floats]]
"""Smallest and largest number of each dimension of the columns that are put into bins."""


def ranges(*summaries: ColumnSummary) -> dict[str, tuple[Floats, Floats]]:
    """What the bins reach over: of the real-valued ones among the columns."""
    return {
        one.name: (np.nan_to_num(one.minimum), np.nan_to_num(one.maximum))
        for one in summaries
        if one.real and not one.pooled
    }


def joined(first: Ranges, second: Ranges) -> dict[str, tuple[Floats, Floats]]:
    """Ranges that hold both."""
    return {
        name: (np.minimum(low, second[name][0]), np.maximum(high, second[name][1]))
        for name, (low, high) in first.items()
    }


def count(dataset: Dataset, reach: Ranges) -> tuple[Repeats, dict[int, Distinct]]:
    """What repeats, and the different state-action pairs on each grid, in one pass."""
    transitions = Distinct(dataset.num_transitions)
    grids = {bins: Distinct(dataset.num_transitions) for bins in BINS}
    episodes = np.zeros(dataset.num_episodes, np.uint64)
    columns = observation_columns(dataset)
    for block in _blocks(dataset):
        seen = {name: _part(column, block.observations) for name, column in columns.items()}
        action = dataset.action[block.steps]
        exact = {name: hash_rows(rows) for name, rows in seen.items()}
        state, act = _together(*exact.values()), hash_rows(action)
        whole = _together(state[block.own], act, hash_rows(dataset.reward[block.steps]), state[block.own + 1])
        transitions.add(whole)
        step = np.arange(block.steps.start, block.steps.stop) - dataset.starts[block.episode]
        np.add.at(episodes, block.episode, _together(whole, step.astype(np.uint64)))
        for bins, distinct in grids.items():
            state = _together(
                *(
                    hash_rows(_binned(rows, *reach[name], bins)) if name in reach else exact[name]
                    for name, rows in seen.items()
                )
            )
            act = hash_rows(_binned(action, *reach["action"], bins)) if "action" in reach else act
            distinct.add(_together(state[block.own], act))
    hashes = transitions.hashes
    keys = _together(episodes, dataset.lengths.astype(np.uint64))
    again = np.setdiff1d(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
    repeats = Repeats(
        transitions=max(0, dataset.num_transitions - transitions.count()),
        first=None if hashes is None else _first_repeat(hashes),
        episodes=len(again),
        in_episodes=int(dataset.lengths[again].sum()),
        first_episodes=_first_repeat(keys),
        error=transitions.error,
    )
    return repeats, grids


def coverage(own: Mapping[int, Distinct], rows: int, reference: Mapping[int, Distinct] | None) -> list[Coverage]:
    """Shares of different state-action pairs, and SACo where there is a reference."""
    result = []
    for bins, distinct in own.items():
        number = distinct.count()
        other = None if reference is None else reference[bins].count()
        result.append(
            Coverage(
                bins=bins,
                distinct=number,
                share=number / rows,
                reference=other,
                saco=None if other is None else number / other,
                error=max(distinct.error, 0.0 if reference is None else reference[bins].error),
            )
        )
    return result


def _part(column: Array | Ragged, rows: slice) -> Array | list[Any]:
    return [column[i] for i in range(rows.start, rows.stop)] if isinstance(column, Ragged) else column[rows]


def _binned(rows: Array | Sequence[Any], low: Floats, high: Floats, bins: int) -> Array:
    """(n, D) uint8: the bin of each number; what is not finite has one of its own."""
    x = flat(np.asarray(rows))
    width = np.where(high > low, high - low, 1.0)
    with np.errstate(invalid="ignore"):
        place = np.clip((x - low) / width * bins, 0, bins - 1)
    return np.where(np.isfinite(place), place, 255).astype(np.uint8)


def _first_repeat(hashes: Array) -> tuple[int, int] | None:
    """(index of the first one that was there before, where it was first)."""
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    if not len(again):
        return None
    index = int(again.min())
    return index, int(np.flatnonzero(hashes == hashes[index])[0])
