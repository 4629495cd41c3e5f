"""Minari's spaces, rebuilt from their JSON: nothing is run, and nothing is larger than the text that describes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.rows import Array
from ctrlrl.errors import UsageError

DEEPEST = 16
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One array or text of a space, where it is found in an episode, and what it becomes."""

    name: str
    """Its name in the dataset; "" where the whole space is one entry."""
    path: tuple[str | int, ...]
    """Keys of Dict spaces, indices of Tuple spaces."""
    shape: tuple[int, ...]
    """Of one entry in the file."""
    space: gym.Space[Any]

    @property
    def may_be_jpeg(self) -> bool:
        """Whether Minari would have encoded it as an image."""
        space = self.space
        large = len(self.shape) in (2, 3) and min(self.shape[:2]) >= 32
        return isinstance(space, gym.spaces.Box) and large and space.dtype == np.uint8


def entries(space: Any, what: str, path: tuple[str | int, ...] = ()) -> Iterator[Entry]:
    """The entries of an observation space, from its JSON."""
    kind = space.get("type") if isinstance(space, dict) else None
    if len(path) > DEEPEST:
        raise UsageError(f"{what} is nested more than {DEEPEST} deep")
    if kind in ("Dict", "Tuple"):
        parts = space.get("subspaces")
        if not isinstance(parts, dict if kind == "Dict" else list) or not parts:
            raise UsageError(f"{what}: a {kind} space has no subspaces")
        members = parts.items() if isinstance(parts, dict) else enumerate(parts)
        found = [entry for key, part in members for entry in entries(part, what, (*path, key))]
        names = [entry.name for entry in found]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{what}: two entries are called {twice!r} when names are joined by dots")
        yield from found
        return
    name = ".".join(str(key).replace("/", ".") for key in path)
    if kind == "Text":
        length = space.get("max_length")
        if not path:
            raise UsageError(f"{what} is one text; expected a Dict with it as an entry")
        if not isinstance(length, int) or length < 1:
            raise UsageError(f"{what}: a Text space has max_length {length!r}")
        yield Entry(name=name, path=path, shape=(), space=gym.spaces.Text(length))
        return
    box = _box(space, kind, what)
    yield Entry(name=name, path=path, shape=_shape_in_file(space, box), space=box)


def _box(space: Any, kind: Any, what: str) -> gym.spaces.Box:
    """A space of numbers, as a box."""
    if kind == "Box":
        shape, dtype = space.get("shape"), space.get("dtype")
        good = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
        if not good or dtype not in (*DTYPES, "bool"):
            raise UsageError(f"{what}: a Box has shape {shape!r} and dtype {dtype!r}")
        kept = np.dtype("uint8" if dtype == "bool" else dtype)
        try:
            with np.errstate(over="ignore"):
                read = np.dtype("float64") if kept.kind == "f" else kept
                low, high = (np.asarray(space[key], read) for key in ("low", "high"))
                if low.shape != tuple(shape) or high.shape != tuple(shape) or not (low <= high).all():
                    raise ValueError("its bounds are of another shape, or the wrong way round")
                if not shape:
                    low, high = low[None], high[None]
                return gym.spaces.Box(low.astype(kept), high.astype(kept), low.shape, kept.type)
        except (KeyError, TypeError, ValueError, OverflowError, AssertionError) as error:
            raise UsageError(f"{what}: a Box of shape {shape} cannot be built: {error}") from None
    if kind == "Discrete":
        start, n = _whole(space.get("start", 0), what), _whole(space.get("n"), what)
        return gym.spaces.Box(start, start + max(n, 1) - 1, (1,), np.int64)
    if kind == "MultiDiscrete":
        counts = _counts(space, what)
        return gym.spaces.Box(counts[1], counts[0] + counts[1] - 1, counts[0].shape, np.int64)
    if kind == "MultiBinary":
        length = space.get("n")
        shape = tuple(length) if isinstance(length, list) else (length,)
        if not all(isinstance(n, int) and 0 < n < 2**31 for n in shape) or math.prod(shape) > 2**31:
            raise UsageError(f"{what}: a MultiBinary space has n {length!r}")
        return gym.spaces.Box(0, 1, shape, np.int8)
    raise UsageError(
        f"{what} is, or has in it, a space of type {str(kind)[:40]!r}; there can be Box, Discrete, MultiDiscrete, "
        "MultiBinary, Text, Dict and Tuple"
    )


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**62:
        raise UsageError(f"{what}: expected a whole number, got {str(value)[:40]!r}")
    return value


def _counts(space: Any, what: str) -> tuple[Array, Array]:
    """nvec and start of a MultiDiscrete space."""
    counts = space.get("nvec")
    starts = space.get("start")
    listed = isinstance(counts, list) and counts and all(not isinstance(n, list) for n in counts)
    starts = [0] * len(counts) if starts is None and listed else starts
    if not listed or not isinstance(starts, list) or len(starts) != len(counts):
        raise UsageError(f"{what}: a MultiDiscrete space must have one row of numbers, got {str(counts)[:40]}")
    both = [np.array([_whole(n, what) for n in values], np.int64) for values in (counts, starts)]
    if (both[0] < 1).any():
        raise UsageError(f"{what}: a MultiDiscrete space has {counts} choices")
    return both[0], both[1]


def actions(space: dict[str, Any], what: str) -> tuple[gym.Space[Any], Entry]:
    """The action space, and the entry that it is read as."""
    kind = space.get("type")
    out: gym.Space[Any]
    if kind == "Discrete":
        n = _whole(space.get("n"), what)
        if n < 1:
            raise UsageError(f"{what}: a Discrete space has {n} choices")
        out = gym.spaces.Discrete(n, start=_whole(space.get("start", 0), what))
    elif kind == "MultiDiscrete":
        counts, starts = _counts(space, what)
        out = gym.spaces.MultiDiscrete(counts, start=starts)
    elif kind == "MultiBinary" and isinstance(space.get("n"), int):
        out = gym.spaces.MultiDiscrete([2] * int(np.prod(_box(space, kind, what).shape)))
    elif kind == "Box":
        out = _box(space, kind, what)
    else:
        raise UsageError(
            f"{what} is a space of type {str(kind)[:40]!r}; actions can be Box, Discrete, MultiDiscrete or MultiBinary"
        )
    return out, Entry(name="", path=(), shape=_shape_in_file(space, out), space=out)


def _shape_in_file(space: dict[str, Any], becomes: gym.Space[Any]) -> tuple[int, ...]:
    """The shape of one entry as Minari stores it: one number of a Discrete space has no dimension."""
    if space["type"] == "Box":
        return tuple(space["shape"])
    return () if space["type"] == "Discrete" else tuple(becomes.shape or ())
