"""Stable-Baselines3's replay buffers, as `model.save_replay_buffer` pickles them.

The pickle is read as data (see `pickles.py`): nothing in it runs, and only after --allow-pickle. Each environment has a
ring of rows; a row is put behind the one that was written before it, those that were never written are left out, and
episodes end at `dones`, or where the next observation of a row is not the observation of the row after it. The task
ended where `dones (1 - timeouts)` is 1. Buffers with `optimize_memory_usage` have no next observations: a row's next
observation is the one of the row behind it, except after `dones`, where the next episode has overwritten it. They do
not keep timeouts either, as those without `handle_timeout_termination`.

SB3's algorithms store the actions of a Box scaled to [-1, 1]; here they have the environment's units again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import Format, ImportOptions, Source
from ctrlrl.data.importers.limits import time_limit
from ctrlrl.data.importers.pickles import Call, array_of, number_of, read_pickle
from ctrlrl.data.importers.rows import (
    BLOCK,
    Array,
    Rows,
    Tally,
    acted,
    chosen,
    episodes,
    flags,
    numbers,
    observation_box,
    refuse_unused,
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Episode
from ctrlrl.errors import UsageError

BUFFERS = ("ReplayBuffer", "DictReplayBuffer", "HerReplayBuffer", "NStepReplayBuffer")
SPACES = ("Box", "Dict", "Discrete", "MultiDiscrete", "MultiBinary")
_RANDOM = ("__generator_ctor", "__bit_generator_ctor", "__randomstate_ctor", "PCG64", "MT19937", "SeedSequence")

ALLOWED = frozenset(
    {
        *(("stable_baselines3", name) for name in (*BUFFERS, "GoalSelectionStrategy")),
        *((package, name) for package in ("gymnasium", "gym") for name in (*SPACES, "RandomNumberGenerator")),
        *(("numpy", name) for name in ("dtype", "ndarray", "_reconstruct", "_frombuffer", "scalar", *_RANDOM)),
        ("numpy", "__pyx_unpickle_SeedSequence"),
        ("_codecs", "encode"),
        ("builtins", "getattr"),  # how Python 3.11 names a member of an enumeration
        ("collections", "OrderedDict"),
        ("copyreg", "_reconstructor"),
        ("builtins", "object"),
        ("torch", "device"),
    }
)
"""All that a buffer's pickle names, by package."""


def looks_like(path: Path) -> bool:
    """Whether it is a pickle that begins with a buffer of SB3's."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError:
        return False
    return start[:1] == b"\x80" and b"stable_baselines3" in start and b"ReplayBuffer" in start


def read(path: Path, options: ImportOptions) -> Source:
    """Read a replay buffer.

    Raises:
        UsageError: --allow-pickle was not given, or the file holds no buffer.
    """
    refuse_unused(options, "sb3", "unsafe_pickle", "max_episode_steps")
    if not path.is_file():
        raise UsageError(
            f"{path} is no replay buffer: {'it is a folder' if path.is_dir() else 'there is no such file'}"
        )
    if not options.unsafe_pickle:
        raise UsageError(
            f"{path} is a pickle, a kind of file that can run programs as it is read. ctrlrl reads it without running "
            "anything, and refuses all but arrays and what belongs to a replay buffer; still, files from others should "
            "not be pickles. To read it, add --allow-pickle"
        )
    content = read_pickle(path, ALLOWED)
    if not isinstance(content, Call) or content.of.name not in BUFFERS or not isinstance(content.state, dict):
        raise UsageError(f"{path} holds no replay buffer of Stable-Baselines3, but another object")
    chosen((), options, path)
    notes: list[str] = []
    buffer = _buffer(content.state, path)
    action_space, decode = _actions(buffer, content.state.get("action_space"), notes)
    where = {env: _rows_of(buffer, env) for env in range(buffer.envs)}
    limit = _limit(buffer, where, options, notes)

    def read_all() -> Iterator[Episode]:
        tally = Tally()
        yield from episodes(_blocks(buffer, where, limit, decode, tally), str(path), tally)
        tally.report(path, notes)

    return Source(
        observation_space=_observation_space(buffer, content.state.get("observation_space"), path),
        action_space=action_space,
        episodes=read_all(),
        env=options.env,
        provenance={"format": "sb3", "file": path.name, "buffer": content.of.name, "environments": buffer.envs},
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Buffer:
    """The arrays, each (rows, environments, ...)."""

    path: Path
    rows: int
    envs: int
    pos: int
    """The row that would have been written next."""
    full: bool
    """Whether every row was written."""
    knows_timeouts: bool
    observation: Mapping[str, Array]
    next_observation: Mapping[str, Array] | None
    """None where a row's next observation is the observation of the row behind it."""
    action: Array
    reward: Array
    done: Array
    timeout: Array


def _buffer(state: dict[Any, Any], path: Path) -> _Buffer:
    """The buffer of which `state` is the pickled content; shapes agree."""

    def of(name: str) -> Any:
        if name not in state:
            raise UsageError(f"{path}: the buffer has no {name!r}. ctrlrl reads buffers of SB3 1.3 and newer")
        return state[name]

    def entries(name: str) -> dict[str, Array]:
        value = of(name)
        if isinstance(value, Call) and value.of.name == "OrderedDict":
            value = value.items
        if not isinstance(value, dict):
            return {"": numbers(array_of(value, f"{path}: {name}"), f"{path}: {name}")}
        if not value or not all(isinstance(key, str) and key for key in value):
            raise UsageError(f"{path}: {name} has no entries that are called by a text")
        where = {key: f"{path}: {name}, {key!r}" for key in value}
        return {key: numbers(array_of(part, where[key]), where[key]) for key, part in value.items()}

    arrays = {name: array_of(of(name), f"{path}: {name}") for name in ("actions", "rewards", "dones", "timeouts")}
    saves_memory = bool(number_of(state.get("optimize_memory_usage", False), f"{path}: optimize_memory_usage"))
    if saves_memory and "next_observations" in state:
        raise UsageError(f"{path}: the buffer has next observations although optimize_memory_usage is set")
    observation = entries("observations")
    after = None if saves_memory else entries("next_observations")
    if arrays["rewards"].ndim != 2:
        raise UsageError(f"{path}: rewards have shape {arrays['rewards'].shape}; expected rows x environments")
    rows, envs = arrays["rewards"].shape
    for name, array in [*arrays.items(), *(("observations", array) for array in observation.values())]:
        wanted = 3 if name in ("actions", "observations") else 2
        if array.shape[:2] != (rows, envs) or array.ndim < wanted or (wanted == 2 and array.ndim > 2):
            raise UsageError(f"{path}: {name} have shape {array.shape}, and rewards {(rows, envs)}")
    shapes = {name: (array.shape, array.dtype) for name, array in observation.items()}
    if after is not None and {name: (array.shape, array.dtype) for name, array in after.items()} != shapes:
        raise UsageError(f"{path}: next_observations are not of the same shapes as observations")
    pos, full = number_of(of("pos"), f"{path}: pos"), bool(number_of(of("full"), f"{path}: full"))
    if not isinstance(pos, int) or not 0 <= pos < max(rows, 1):
        raise UsageError(f"{path}: pos is {pos!r}; with {rows:,} rows it is 0 to {max(rows - 1, 0):,}")
    if not envs or not (rows if full else pos):
        raise UsageError(f"{path} holds no transition: nothing was added to the buffer")
    return _Buffer(
        path=path,
        rows=rows,
        envs=envs,
        pos=pos,
        full=full,
        knows_timeouts=bool(number_of(state.get("handle_timeout_termination", True), f"{path}: timeouts")),
        observation=observation,
        next_observation=after,
        action=numbers(arrays["actions"], f"{path}: actions"),
        reward=numbers(arrays["rewards"], f"{path}: rewards"),
        done=numbers(arrays["dones"], f"{path}: dones"),
        timeout=numbers(arrays["timeouts"], f"{path}: timeouts"),
    )


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """The rows of one environment, the oldest first."""

    rows: Array
    done: Array
    timeout: Array
    whole: bool
    """Whether the first row begins an episode; in a full ring its beginning was overwritten, maybe."""


def _rows_of(buffer: _Buffer, env: int) -> _Ring:
    if not buffer.full:
        rows = np.arange(buffer.pos)
    else:  # without next observations, the row at pos has lost its observation to the newest row's next one
        oldest = buffer.pos + (buffer.next_observation is None)
        rows = np.arange(oldest, buffer.pos + buffer.rows) % buffer.rows
    done = flags(buffer.done[rows, env], f"{buffer.path}: dones of environment {env}")
    timeout = flags(buffer.timeout[rows, env], f"{buffer.path}: timeouts of environment {env}")
    return _Ring(rows=rows, done=done, timeout=timeout, whole=not buffer.full)


def _limit(buffer: _Buffer, rings: Mapping[int, _Ring], options: ImportOptions, notes: list[str]) -> int | None:
    """Steps after which an episode that is marked as done was cut off; None where the timeouts say it."""
    if buffer.knows_timeouts:
        if options.max_episode_steps is not None:
            raise UsageError(
                f"{buffer.path} has timeouts, which say where episodes were cut: leave --max-episode-steps out"
            )
        return None
    lengths = [_lengths(ring) for ring in rings.values()]
    return time_limit(np.concatenate(lengths), options, "an SB3 buffer without handle_timeout_termination", notes)


def _lengths(ring: _Ring) -> Array:
    """Steps of each episode that is marked as done."""
    ends = np.flatnonzero(ring.done)
    return np.diff(ends, prepend=-1)


def _blocks(
    buffer: _Buffer, rings: Mapping[int, _Ring], limit: int | None, decode: Any, tally: Tally
) -> Iterator[Rows]:
    """The rows of one environment after the other."""
    width = sum(int(np.prod(a.shape[2:])) * a.itemsize for a in (*buffer.observation.values(), buffer.action))
    step = max(1, BLOCK // max(1, 2 * width))
    first = 0
    for env, ring in rings.items():
        terminated, truncated = ring.done & ~ring.timeout, ring.timeout.copy()
        if limit is not None:
            ends = np.flatnonzero(ring.done)
            cut = ends[_lengths(ring) >= limit]
            terminated[cut], truncated[cut] = False, True
        rows, after = ring.rows, ring.rows
        if buffer.next_observation is None:
            rows, after, terminated, truncated = _overlapping(buffer, ring, terminated, truncated, tally)
        source = buffer.next_observation or buffer.observation
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            now, then = rows[part], after[part]
            yield Rows(
                first=first + start,
                observation={name: array[now, env] for name, array in buffer.observation.items()},
                action=decode(buffer.action[now, env]),
                reward=rewarded(buffer.reward[now, env], f"{buffer.path}: rewards"),
                terminated=terminated[part],
                truncated=truncated[part],
                next_observation={name: source[name][then, env] for name in buffer.observation},
                episode=np.full(len(now), env),
            )
        first += len(rows)


def _overlapping(
    buffer: _Buffer, ring: _Ring, terminated: Array, truncated: Array, tally: Tally
) -> tuple[Array, Array, Array, Array]:
    """Rows that have a next observation in the buffer, and the row where that is found; and their flags.

    After a row that is done, the row behind it holds the next episode's first observation, unless it is the newest.
    """
    lost = ring.done.copy()
    lost[-1:] = False
    after = np.where(lost & terminated, ring.rows, (ring.rows + 1) % buffer.rows)
    dropped = lost & ~terminated
    tally.stood_in += int((lost & terminated).sum())
    tally.dropped += int(dropped.sum())
    ends = ring.done | ring.timeout
    alone = dropped & np.append([True], ends[:-1])
    tally.too_short += int(alone.sum())
    truncated = truncated.copy()
    truncated[:-1] |= (dropped & ~alone)[1:]  # the row before a dropped one is its episode's last
    keep = ~dropped
    return ring.rows[keep], after[keep], terminated[keep], truncated[keep]


def _space(value: Any, what: str) -> gym.Space[Any]:
    """A space, from the state that Gymnasium pickles."""
    state = value.state if isinstance(value, Call) and value.of.name in SPACES else None
    if not isinstance(state, dict):
        raise UsageError(f"{what} is no space that Stable-Baselines3 uses")
    try:
        match value.of.name:
            case "Box":
                low, high = (array_of(state[key], f"{what}: {key}") for key in ("low", "high"))
                if low.shape != high.shape or low.dtype != high.dtype or not (low <= high).all():
                    raise UsageError(f"{what}: its lower bounds are not below its upper ones")
                low, high = numbers(low, what), numbers(high, what)
                return gym.spaces.Box(low, high, low.shape, low.dtype.type)
            case "Discrete":
                n, start = (int(number_of(state.get(key, 0), f"{what}: {key}")) for key in ("n", "start"))
                return gym.spaces.Discrete(n, start=start)
            case "MultiDiscrete":
                choices = array_of(state["nvec"], f"{what}: nvec").astype(np.int64)
                first = array_of(state["start"], f"{what}: start").astype(np.int64) if "start" in state else None
                return gym.spaces.MultiDiscrete(choices, start=first)
            case "MultiBinary":
                n = int(number_of(state["n"], f"{what}: n"))
                return gym.spaces.MultiDiscrete(np.full(_few(n, what), 2))
            case _:
                spaces = state["spaces"]
                spaces = spaces.items if isinstance(spaces, Call) else spaces
                return gym.spaces.Dict({str(key): _space(entry, f"{what}, {key!r}") for key, entry in spaces.items()})
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{what} cannot be rebuilt ({type(error).__name__}: {error})") from None


def _few(n: int, what: str) -> int:
    if not 0 < n < 2**16:
        raise UsageError(f"{what} has {n} entries")
    return n


def _observation_space(buffer: _Buffer, value: Any, path: Path) -> gym.Space[Any]:
    """The pickled space, where it is of Boxes; what is discrete is kept as the numbers that the buffer holds."""
    space = _space(value, f"{path}: observation_space")
    entries = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"": space}
    if entries.keys() != buffer.observation.keys():
        raise UsageError(f"{path}: the entries of observation_space are not those of the observations")
    boxes: dict[str, gym.Space[Any]] = {}
    for name, entry in entries.items():
        array = buffer.observation[name]
        shape = array.shape[2:]
        if not isinstance(entry, gym.spaces.Box):
            boxes[name] = observation_box(np.empty((0, *shape), array.dtype))
        elif entry.shape != shape or entry.dtype != array.dtype:
            raise UsageError(
                f"{path}: observations{f' {name!r}' if name else ''} are {array.dtype} {shape}, and their space is of "
                f"{entry.dtype} {entry.shape}"
            )
        else:
            boxes[name] = entry
    return gym.spaces.Dict(boxes) if isinstance(space, gym.spaces.Dict) else boxes[""]


def _actions(buffer: _Buffer, value: Any, notes: list[str]) -> tuple[gym.Space[Any], Any]:
    """The action space, and what makes its actions of stored ones."""
    path = buffer.path
    space, stored = _space(value, f"{path}: action_space"), buffer.action
    if isinstance(space, gym.spaces.Dict):
        raise UsageError(f"{path}: the action space is a Dict, which no algorithm of Stable-Baselines3 has")
    wanted = int(np.prod(space.shape or (1,)))
    if stored.shape[2:] != (wanted,) or (stored.dtype.kind == "f") != (space.dtype.kind == "f"):  # type: ignore[union-attr]
        raise UsageError(f"{path}: actions are {stored.dtype} {stored.shape[2:]}, and their space is {space}")
    if not isinstance(space, gym.spaces.Box):
        _require_choices(buffer, space)
        return space, lambda part: acted(part, f"{path}: actions")
    low, high = space.low, space.high
    unit = bool((low == -1).all() and (high == 1).all())
    if not unit and space.dtype is not None and space.dtype.kind == "f":
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise UsageError(f"{path}: the action space has no bounds, so stored actions cannot be scaled back to it")
        if _within(buffer, -1 - 1e-5, 1 + 1e-5):
            notes.append(
                "actions were stored scaled to [-1, 1], as SB3 does: they were scaled back to the action space"
            )

            def unscaled(part: Array) -> Array:
                part = part.reshape(len(part), *space.shape)
                return np.asarray(low + 0.5 * (part + 1.0) * (high - low), stored.dtype)

            return gym.spaces.Box(low, high, space.shape, stored.dtype.type), unscaled
        if not _within(buffer, low.ravel() - 1e-5, high.ravel() + 1e-5):
            raise UsageError(f"{path}: actions lie neither within [-1, 1], as SB3 stores them, nor within {space}")
        notes.append("actions lie beyond [-1, 1], unlike those that SB3 stores: taken as in the environment's units")
    box = gym.spaces.Box(low.astype(stored.dtype), high.astype(stored.dtype), space.shape, stored.dtype.type)
    return box, lambda part: part.reshape(len(part), *space.shape)


def _within(buffer: _Buffer, low: Any, high: Any) -> bool:
    """Whether all written actions lie between the bounds."""
    return all(bool(((part >= low) & (part <= high)).all()) for part in _written(buffer))


def _written(buffer: _Buffer) -> Iterator[Array]:
    count = buffer.rows if buffer.full else buffer.pos
    step = max(1, BLOCK // max(1, buffer.action[0].nbytes))
    for start in range(0, count, step):
        part = buffer.action[start : min(start + step, count)]
        require_finite(part, f"{buffer.path}: the action", start)
        yield part


def _require_choices(buffer: _Buffer, space: gym.Space[Any]) -> None:
    """Raise UsageError unless every written action is one of the space."""
    start = np.asarray(getattr(space, "start", 0)).reshape(-1)
    count = np.asarray(space.n if isinstance(space, gym.spaces.Discrete) else getattr(space, "nvec", 0)).reshape(-1)
    for part in _written(buffer):
        if not ((part >= start) & (part < start + count)).all():
            raise UsageError(f"{buffer.path}: an action is none of {space}")


FORMAT = Format(
    name="sb3",
    title="Stable-Baselines3's replay buffer, a pickle (needs --allow-pickle)",
    detect=looks_like,
    read=read,
)
