"""Flat files, one transition a row and episodes one after the other, cut into episodes.

Where an episode ends is where a flag says so, where the file's episode number changes, or where the next observation of
a row is not the observation of the row after it. A row's next observation is the one that the file gives for it; in
files that give none it is the next row's observation, if that row is of the same episode. Of an episode that ends
without one, the last row is kept where the task ended with it: nothing is bootstrapped from what follows, and rewards
and failures would be lost with it; the last observation then stands in for the missing one. Where the episode was cut
off, that row serves as the final observation, and its action and reward are dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.data.store import Column, Episode
from ctrlrl.errors import UsageError, nearest

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BLOCK = 32 * 2**20
"""Bytes read at a time, about."""
MOST_CHOICES = 1_000_000
"""Integer actions beyond are no discrete actions."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of a file."""

    first: int
    """The number of the first one, in the file."""
    observation: Mapping[str, Array]
    """(n, ...) by entry; an observation that is one array is called ""."""
    action: Array
    reward: Array
    terminated: Array
    """(n,) bool: the task ended with this row."""
    truncated: Array
    """(n,) bool: the episode was cut off after this row."""
    next_observation: Mapping[str, Array] | None = None
    episode: Array | None = None
    """(n,), equal within an episode and different in the next one."""
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)

    def cut(self, start: int, stop: int) -> Rows:
        """The rows from `start` to before `stop`, as views."""
        part = slice(start, stop)

        def of(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {name: array[part] for name, array in arrays.items()}

        return Rows(
            first=self.first + start,
            observation=of(self.observation),
            action=self.action[part],
            reward=self.reward[part],
            terminated=self.terminated[part],
            truncated=self.truncated[part],
            next_observation=None if self.next_observation is None else of(self.next_observation),
            episode=None if self.episode is None else self.episode[part],
            columns=of(self.columns),
        )


@dataclass
class Tally:
    """What cutting into episodes had to decide."""

    rows: int = 0
    episodes: int = 0
    dropped: int = 0
    """Actions without a next observation."""
    stood_in: int = 0
    """Terminal rows whose next observation is not in the file."""
    too_short: int = 0
    """Episodes of which nothing was left."""
    jumps: int = 0
    """Boundaries that only the next observations show."""

    def report(self, source: Path, notes: list[str]) -> None:
        """Add to `notes` what was decided, once all is read; raise UsageError if there is no episode."""
        if not self.episodes:
            raise UsageError(f"{source} holds no transition: {self.rows} rows, and none has an observation after it")
        notes.extend(self.notes())

    def notes(self) -> list[str]:
        """One sentence for each decision, for the user."""
        notes = []
        if self.stood_in:
            notes.append(
                f"the observation after the last step of {self.stood_in:,} terminated episodes is not in the file: "
                "the last one that is stands in for it (nothing is bootstrapped from it)"
            )
        if self.dropped:
            notes.append(
                f"{self.dropped:,} episodes were cut off without the observation after their last action: that action "
                "and its reward were dropped"
            )
        if self.too_short:
            notes.append(f"{self.too_short:,} episodes held a single observation, and were left out")
        if self.jumps:
            notes.append(
                f"{self.jumps:,} episodes end where no flag says so, but the next row begins elsewhere "
                f"(of {self.rows:,} rows): taken as cut off"
            )
        return notes


def episodes(
    blocks: Iterable[Rows],
    where: str,
    tally: Tally,
    *,
    cut_after: int | None = None,
    last_row_acts: bool = True,
    per_observation: bool = False,
) -> Iterator[Episode]:
    """The episodes of consecutive blocks of rows; at most a block and an episode are held.

    Args:
        where: the file, or the part of it, for messages.
        cut_after: rows after which an episode ends in any case.
        last_row_acts: whether the last row of an episode holds an action, or is its final observation only.
        per_observation: whether `Rows.columns` belong to observations, T + 1 an episode.
    """
    held: list[Rows] = []
    before: Rows | None = None
    for block in blocks:
        if not len(block):
            continue
        _require_finite(block, where)
        starts = _starts(block, before, tally)
        if cut_after is not None:
            age, begins = sum(map(len, held)), np.flatnonzero(starts)
            for begin, end in pairwise([-age, *begins.tolist(), len(block)]):
                starts[begin + cut_after : end : cut_after] = True
        if held and starts[0]:
            yield from _finish(held, tally, last_row_acts, per_observation)
            held = []
        begins = np.flatnonzero(starts[1:]) + 1
        for start, stop in pairwise([0, *begins.tolist(), len(block)]):
            held.append(block.cut(start, stop))
            if stop < len(block):
                yield from _finish(held, tally, last_row_acts, per_observation)
                held = []
        before = block.cut(len(block) - 1, len(block))
        tally.rows += len(block)
    if held:
        yield from _finish(held, tally, last_row_acts, per_observation)


def _starts(block: Rows, before: Rows | None, tally: Tally) -> Array:
    """(n,) bool: which rows begin an episode, as far as they and the row before them tell."""
    starts = np.zeros(len(block), bool)
    ends = block.terminated | block.truncated
    starts[1:] = ends[:-1]
    if before is not None:
        starts[0] = before.terminated[0] | before.truncated[0]
    if block.episode is not None:
        starts[1:] |= block.episode[1:] != block.episode[:-1]
        if before is not None and before.episode is not None:
            starts[0] |= before.episode[0] != block.episode[0]
    if block.next_observation is not None:
        jump = np.zeros(len(block), bool)
        for name, now in block.observation.items():
            later = block.next_observation[name]
            jump[1:] |= (later[:-1] != now[1:]).any(axis=tuple(range(1, now.ndim)))
            if before is not None and before.next_observation is not None:
                jump[0] |= bool((before.next_observation[name][0] != now[0]).any())
        tally.jumps += int((jump & ~starts).sum())
        starts |= jump
    return starts


def _finish(held: list[Rows], tally: Tally, last_row_acts: bool, per_observation: bool) -> Iterator[Episode]:
    """The episode that these rows make, if they make one."""

    def joined(arrays: list[Array]) -> Array:
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    last = held[-1]
    terminated, truncated = bool(last.terminated[-1]), bool(last.truncated[-1])
    steps = sum(map(len, held))
    after: Mapping[str, Array] = {}
    if last.next_observation is not None:
        after = last.next_observation
    elif last_row_acts and terminated:
        after = last.observation
        tally.stood_in += 1
    else:
        steps -= 1
        tally.dropped += last_row_acts
    if not steps:
        tally.too_short += 1
        return
    seen = {
        name: np.concatenate([*(rows.observation[name] for rows in held), *([after[name][-1:]] if after else [])])
        for name in last.observation
    }
    columns = {name: joined([rows.columns[name] for rows in held]) for name in last.columns}
    tally.episodes += 1
    yield Episode(
        observation=seen.get("", seen),
        action=joined([rows.action for rows in held])[:steps],
        reward=joined([rows.reward for rows in held])[:steps],
        terminated=terminated,
        truncated=truncated or not terminated,
        columns={name: array if per_observation else array[:steps] for name, array in columns.items()},
    )


def _require_finite(block: Rows, where: str) -> None:
    named = {"the reward": block.reward, "the action": block.action}
    named |= {f"the observation{f' {name}' if name else ''}": array for name, array in block.observation.items()}
    named |= {f"the next observation {name}".rstrip(): a for name, a in (block.next_observation or {}).items()}
    for what, array in named.items():
        require_finite(array, f"{where}: {what}", block.first)
    for name, array in block.columns.items():
        require_finite(array, f"{where}: {name}", block.first, remedy="Leave it out: name the others with --columns")


def require_finite(
    array: Array, what: str, first: int = 0, *, remedy: str = "Mend the file, or leave that episode out"
) -> None:
    """Raise UsageError naming the first row that holds NaN or infinity; `first` is the number of row 0."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise UsageError(f"{what} is NaN or infinite in row {first + row}. {remedy}")


def flags(array: Array, what: str, first: int = 0) -> Array:
    """(n,) bool from booleans, or from numbers that are 0 or 1."""
    array = array.reshape(len(array), math.prod(array.shape[1:]))
    if array.shape[1] != 1:
        raise UsageError(f"{what} has {array.shape[1]} numbers a row; a flag is one")
    array = array[:, 0]
    if array.dtype.kind != "b" and not ((array == 0) | (array == 1)).all():
        row = int(np.flatnonzero((array != 0) & (array != 1))[0])
        raise UsageError(f"{what} is {array[row]} in row {first + row}; a flag is 0 or 1")
    return array.astype(bool)


def numbers(array: Array, what: str) -> Array:
    """The array in native byte order; UsageError unless it holds integers, floats of up to 64 bits or booleans."""
    kind = array.dtype.kind
    if kind not in "fiub" or array.dtype.itemsize > 8:
        raise UsageError(f"{what} is of dtype {array.dtype}; expected numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def rewarded(array: Array, what: str) -> Array:
    """(n,) rewards from (n,) or (n, 1) numbers."""
    array = numbers(array, what)
    if array.ndim == 1:
        return array
    if array.shape[1:] != (1,):
        raise UsageError(f"{what} has shape {array.shape[1:]} a row; a reward is one number")
    return array[:, 0]


def observed(array: Array, what: str) -> Array:
    """Rows of an observation: (n, ...) with at least one dimension of its own, booleans as 0 and 1."""
    array = numbers(array, what)
    array = array.astype(np.uint8) if array.dtype.kind == "b" else array
    return array[:, None] if array.ndim == 1 else array


def column_of(array: Array, per: Any = "step") -> Column:
    """What a column of such rows is declared as."""
    return Column(dtype=array.dtype.name, shape=array.shape[1:], per=per)


def observation_box(array: Array) -> gym.Space[Any]:
    """The space of observations of which `array` holds some: all that its type can hold, as files do not say."""
    dtype = array.dtype
    bounds = (-np.inf, np.inf) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return gym.spaces.Box(bounds[0], bounds[1], array.shape[1:], dtype.type)


class ActionRange:
    """The least and the greatest of all actions, from which the action space is told where a file names none."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.low: Array | None = None
        self.high: Array | None = None

    def add(self, actions: Array, first: int) -> None:
        """Take in rows (n, ...), the first of which is row `first` of the file."""
        require_finite(actions, f"{self.source}: the action", first)
        if len(actions):
            low, high = actions.min(0), actions.max(0)
            self.low = low if self.low is None else np.minimum(self.low, low)
            self.high = high if self.high is None else np.maximum(self.high, high)

    def range(self) -> tuple[Array, Array]:
        """The least and the greatest; UsageError if there was no action."""
        if self.low is None or self.high is None:
            raise UsageError(f"{self.source} holds no transition: it has no rows")
        return self.low, self.high

    def space(self, notes: list[str]) -> gym.Space[Any]:
        """[-1, 1] where floats keep within it, else their range; as many choices as integers name."""
        low, high = self.range()
        if low.dtype.kind == "f":
            inside = (low >= -1 - 1e-5) & (high <= 1 + 1e-5)
            if not inside.all():
                notes.append(
                    f"actions reach from {low.min():.6g} to {high.max():.6g}: beyond [-1, 1], the data's own range is "
                    "taken as the action space"
                )
            flat = low == high  # a space of no width cannot be scaled
            lowest = np.where(inside, -1, np.where(flat, np.minimum(low, 0), low)).astype(low.dtype)
            highest = np.where(inside, 1, np.where(flat, np.maximum(high, 0), high)).astype(low.dtype)
            return gym.spaces.Box(lowest, highest, low.shape, low.dtype.type)
        least, most = int(low.min()), int(high.max())
        if least < 0 or most >= MOST_CHOICES:
            raise UsageError(
                f"{self.source}: integer actions reach from {least} to {most}; discrete ones count from 0, and are "
                f"below {MOST_CHOICES:,}. If they are continuous, store them as floats"
            )
        if low.ndim == 0:
            notes.append(f"the greatest action is {most}: the action space is taken as Discrete({most + 1})")
            return gym.spaces.Discrete(most + 1)
        if low.ndim > 1:
            raise UsageError(f"{self.source}: integer actions have shape {low.shape}; expected one number or a row")
        choices = (high.astype(np.int64) + 1).tolist()
        notes.append(f"the greatest actions plus one are taken as the action space: MultiDiscrete({choices})")
        return gym.spaces.MultiDiscrete(choices)


def acted(array: Array, what: str) -> Array:
    """Rows of actions: floats (n, ...) with a dimension of their own, integers (n,) or (n, k) as int64."""
    array = numbers(array, what)
    if array.dtype.kind == "f":
        return array[:, None] if array.ndim == 1 else array
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    return array.astype(np.int64)


def chosen(available: Iterable[str], options: ImportOptions, source: Path) -> list[str]:
    """Which extra columns are kept: those that --columns names, or all."""
    names = list(available)
    if options.columns is None:
        return names
    for name in options.columns:
        if name not in names:
            there = f"It has: {', '.join(names)}" if names else "It has none"
            raise UsageError(f"{source} has no column {name!r} for --columns.{nearest(name, names)} {there}")
    return [name for name in names if name in options.columns]


def column_name(name: str) -> str:
    """The name in the dataset: parts joined by dots, and none that a dataset has already."""
    name = name.replace("/", ".").replace("\\", ".").strip(".") or "unnamed"
    taken = name in ("observation", "action", "reward") or name.startswith("observation.")
    return f"info.{name}" if taken else name


def refuse_unused(options: ImportOptions, format: str, *used: str) -> None:
    """Raise UsageError where an option was given that files of this format leave no use for."""
    given = {
        "mapping": (options.mapping is not None, "--mapping", f"columns of npz, parquet and csv; {format} has its own"),
        "unsafe_pickle": (options.unsafe_pickle, "--allow-pickle", f"pickles; {format} files are none"),
        "max_episode_steps": (
            options.max_episode_steps is not None,
            "--max-episode-steps",
            f"files that do not say where episodes were cut off; {format} files do",
        ),
    }
    for name, (is_given, flag, what) in given.items():
        if is_given and name not in used:
            raise UsageError(f"{flag} is for {what}. Leave it out")
    if options.max_episode_steps is not None and options.max_episode_steps < 1:
        raise UsageError(f"--max-episode-steps must be at least 1, got {options.max_episode_steps}")


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object, or UsageError; NaN and infinities pass as floats, as Python's JSON has them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{what} is no valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{what} must be a JSON object; it is {str(value)[:40]}")
    return value


def inside(path: Path, folder: Path) -> Path:
    """`path`, which must not lead out of `folder` by a link."""
    try:
        found = path.resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a name that no file can have, or links in a circle
        raise UsageError(f"{str(path)!r} is no path: {error}") from None
    if not found.is_relative_to(folder.resolve()):
        raise UsageError(f"{path} is a link out of {folder}; copy what it points to in its place")
    return path


def size(count: float) -> str:
    """Bytes, for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
