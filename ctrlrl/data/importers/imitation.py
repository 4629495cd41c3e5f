"""Trajectories of `imitation`: its .npz files, and the folders that it saves with Hugging Face's `datasets`.

A trajectory has an observation more than actions. `terminal` says that it was watched to its end, whether the task
ended or the time was up: what tells the two apart, `TimeLimit.truncated`, stands in `infos`. Folders keep them as JSON;
an .npz keeps them as pickled objects, which are not read: see `limits.py` for what is done instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.arrow import explained, to_numpy
from ctrlrl.data.importers.base import Format, ImportOptions, Source, need
from ctrlrl.data.importers.limits import time_limit
from ctrlrl.data.importers.npz import Npz, names
from ctrlrl.data.importers.rows import (
    BLOCK,
    ActionRange,
    Array,
    acted,
    chosen,
    flags,
    inside,
    json_object,
    observation_box,
    observed,
    refuse_unused,
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Episode
from ctrlrl.errors import UsageError

REQUIRED = ("obs", "acts", "terminal")
LARGEST_JSON = 16 * 2**20


def looks_like(path: Path) -> bool:
    """Whether it is an .npz with these arrays, or a folder of `datasets` with these columns."""
    if not path.is_dir():
        return names(path).issuperset((*REQUIRED, "indices"))
    try:
        if not (path / "state.json").is_file() or (path / "dataset_info.json").stat().st_size > LARGEST_JSON:
            return False
        features = json_object((path / "dataset_info.json").read_bytes(), "it").get("features")
    except (OSError, UsageError):
        return False
    return isinstance(features, dict) and features.keys() >= set(REQUIRED)


def read(path: Path, options: ImportOptions) -> Source:
    """Read trajectories from an .npz or a folder.

    Raises:
        UsageError: they are not as the format has them.
    """
    refuse_unused(options, "imitation", "max_episode_steps")
    chosen((), options, path)
    source: _Npz | _Folder = _Folder(path) if path.is_dir() else _Npz(path)
    try:
        return _read(source, path, options)
    except BaseException:
        source.close()
        raise


@dataclass(frozen=True, kw_only=True)
class _Trajectory:
    observation: Array
    """(T + 1, ...)."""
    action: Array
    reward: Array | None
    ended: bool
    timed_out: bool | None = None
    """Whether the time was up; None where that is not known."""


class _Npz:
    """Arrays of all trajectories one behind the other; `indices` are where acts are to be cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = Npz(path)
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise
        self.notes = []
        if "infos" in self._file.arrays:
            how = "" if self._file["infos"].is_number else ", which are pickled objects,"
            self.notes.append(f"infos{how} were left out")
        others = self._file.arrays.keys() - {*REQUIRED, "indices", "infos", "rews"}
        if others:
            self.notes.append(f"left out, as no trajectory has it: {', '.join(sorted(others))}")

    def _check(self) -> None:
        path, file = self.path, self._file
        steps, count = file["acts"].rows, file["terminal"].rows
        indices = file["indices"].reader().read(count + 1)
        if indices.dtype.kind not in "iu" or indices.ndim != 1:
            raise UsageError(f"{path}: indices are {indices.dtype} {indices.shape}; expected a row of integers")
        if file["indices"].rows != max(count - 1, 0) or not count:
            raise UsageError(
                f"{path}: terminal says that there are {count:,} trajectories, and indices cut acts into "
                f"{file['indices'].rows + 1:,}"
            )
        ends = [int(i) for i in indices] + [steps]
        self._lengths = np.diff(np.array([0, *ends], object))
        if min(self._lengths) < 1:
            i = int(np.argmax(self._lengths < 1))
            raise UsageError(f"{path}: trajectory {i} has {self._lengths[i]} steps; indices must ascend")
        if file["obs"].rows != steps + count:
            raise UsageError(
                f"{path}: {steps:,} acts in {count:,} trajectories need {steps + count:,} obs, one more each; there "
                f"are {file['obs'].rows:,}"
            )
        if "rews" in file.arrays and file["rews"].rows != steps:
            raise UsageError(f"{path}: there are {file['rews'].rows:,} rews and {steps:,} acts")
        self._terminal = flags(file["terminal"].reader().read(count), f"{path}: terminal")

    def ends(self) -> tuple[Array, list[bool | None]]:
        """Steps of each trajectory that was watched to its end, and whether the time was up."""
        ended = self._lengths[self._terminal].astype(np.int64)
        return ended, [None] * len(ended)

    def actions(self) -> Iterator[Array]:
        reader, step = self._file["acts"].reader(), max(1, BLOCK // max(1, self._file["acts"].row_bytes))
        while len(part := reader.read(step)):
            yield part

    def trajectories(self) -> Iterator[_Trajectory]:
        file = self._file
        readers = {name: file[name].reader() for name in ("obs", "acts", "rews") if name in file.arrays}
        for length, ended in zip(self._lengths, self._terminal, strict=True):
            yield _Trajectory(
                observation=readers["obs"].read(length + 1),
                action=readers["acts"].read(length),
                reward=readers["rews"].read(length) if "rews" in readers else None,
                ended=bool(ended),
            )

    def close(self) -> None:
        self._file.close()


class _Folder:
    """Arrow files with a row for each trajectory."""

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, ["infos were left out, except for TimeLimit.truncated"]
        state = _json(path / "state.json", path)
        files = state.get("_data_files")
        entries = files if isinstance(files, list) else []
        listed = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
        if not listed or not all(isinstance(name, str) and name for name in listed):
            raise UsageError(f"{path / 'state.json'} lists no files of data")
        self._files = [path / str(name) for name in listed]
        for name, file in zip(listed, self._files, strict=True):
            if Path(str(name)).name != name or not inside(file, path).is_file():
                raise UsageError(f"{path} has no file of data called {name!r}, which its state.json lists")

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Blocks of trajectories, and the number of the first one of each."""
        pa, first = need("pyarrow"), 0
        for file in self._files:
            with contextlib.ExitStack() as stack:
                with explained(str(file)):
                    reader = stack.enter_context(pa.ipc.open_stream(stack.enter_context(pa.memory_map(str(file)))))
                    there = set(reader.schema.names)
                missing = [name for name in REQUIRED if name not in there]
                if missing:
                    raise UsageError(f"{file} has no column {missing[0]!r}")
                while True:
                    with explained(str(file)):
                        batch = next(reader, None)
                        if batch is None:
                            break
                        batch.validate(full=True)
                    yield first, batch
                    first += batch.num_rows

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each trajectory is called, and its columns."""
        for first, batch in self._batches():
            columns = {name: batch.column(name) for name in (*REQUIRED, "rews", "infos") if name in batch.schema.names}
            for i in range(batch.num_rows):
                where = f"{self.path}: trajectory {first + i}"
                with explained(where):
                    row = {name: column[i] for name, column in columns.items()}
                    absent = [name for name, value in row.items() if not value.is_valid]
                if absent:
                    raise UsageError(f"{where} has no {absent[0]}")
                yield where, row

    def _array(self, value: Any, what: str) -> Array:
        pa = need("pyarrow")
        if not pa.types.is_list(value.type) and not pa.types.is_large_list(value.type):
            raise UsageError(f"{what} is {value.type}; expected a list, with an entry for each step")
        with explained(what):
            return to_numpy(value.values, what)

    def _ended(self, row: dict[str, Any], where: str) -> bool:
        ended = row["terminal"].as_py()
        if not isinstance(ended, bool):
            raise UsageError(f"{where}: terminal is of type {row['terminal'].type}; expected true or false")
        return ended

    def _timed_out(self, row: dict[str, Any]) -> bool | None:
        """What the last info says, if it says it."""
        pa = need("pyarrow")
        infos = row.get("infos")
        if infos is None or not (pa.types.is_list(infos.type) or pa.types.is_large_list(infos.type)):
            return None
        last = infos.values[-1].as_py() if len(infos.values) else None
        if not isinstance(last, str):
            return None
        try:
            said = json_object(last, "the last info").get("TimeLimit.truncated")
        except UsageError:
            return None
        return said if isinstance(said, bool) else None

    def ends(self) -> tuple[Array, list[bool | None]]:
        """Steps of each trajectory that was watched to its end, and whether the time was up."""
        lengths, timed_out = [], []
        for where, row in self._rows():
            if self._ended(row, where):
                lengths.append(len(self._array(row["acts"], f"{where}: acts")))
                timed_out.append(self._timed_out(row))
        return np.array(lengths, np.int64), timed_out

    def actions(self) -> Iterator[Array]:
        for where, row in self._rows():
            yield self._array(row["acts"], f"{where}: acts")

    def trajectories(self) -> Iterator[_Trajectory]:
        for where, row in self._rows():
            observation, action = (self._array(row[name], f"{where}: {name}") for name in ("obs", "acts"))
            reward = self._array(row["rews"], f"{where}: rews") if "rews" in row else None
            if len(action) < 1 or len(observation) != len(action) + 1:
                raise UsageError(
                    f"{where} has {len(observation)} obs and {len(action)} acts; expected at least one act, and one "
                    "more obs"
                )
            if reward is not None and len(reward) != len(action):
                raise UsageError(f"{where} has {len(reward)} rews and {len(action)} acts")
            yield _Trajectory(
                observation=observation,
                action=action,
                reward=reward,
                ended=self._ended(row, where),
                timed_out=self._timed_out(row),
            )

    def close(self) -> None:
        """Nothing is held open between two readings."""


def _json(file: Path, folder: Path) -> dict[str, Any]:
    if not inside(file, folder).is_file():
        raise UsageError(f"{folder} has no {file.name}: it was not saved by imitation, or not to its end")
    if file.stat().st_size > LARGEST_JSON:
        raise UsageError(f"{file} is too large to be what datasets writes")
    return json_object(file.read_bytes(), str(file))


def _read(source: _Npz | _Folder, path: Path, options: ImportOptions) -> Source:
    notes = list(source.notes)
    reach, at = ActionRange(path), 0
    for part in source.actions():
        actions = acted(part, f"{path}: acts")
        if reach.low is not None and actions.shape[1:] != reach.low.shape:
            raise UsageError(f"{path}: acts are {reach.low.shape} at first, and {actions.shape[1:]} at step {at:,}")
        reach.add(actions, at)
        at += len(actions)
    action_space = reach.space(notes)
    first = next(source.trajectories())
    space: gym.Space[Any] = observation_box(observed(first.observation[:0], f"{path}: obs"))
    if first.reward is None:
        notes.append("there are no rews: every reward is 0")
    lengths, timed_out = source.ends()
    unknown = np.array([said is None for said in timed_out], bool)
    limit = time_limit(lengths[unknown], options, "imitation", notes)

    def read_all() -> Iterator[Episode]:
        for i, trajectory in enumerate(source.trajectories()):
            yield _episode(trajectory, f"{path}: trajectory {i}", limit, action_space, space)

    return Source(
        observation_space=space,
        action_space=action_space,
        episodes=read_all(),
        env=options.env,
        provenance={"format": "imitation", "file": path.name},
        notes=notes,
        close=source.close,
    )


def _episode(
    trajectory: _Trajectory, where: str, limit: int | None, action_space: gym.Space[Any], space: gym.Space[Any]
) -> Episode:
    observation = observed(trajectory.observation, f"{where}: obs")
    action = acted(trajectory.action, f"{where}: acts")
    for name, array, expected in (("obs", observation, space), ("acts", action, action_space)):
        if array.shape[1:] != expected.shape or array.dtype != expected.dtype:
            raise UsageError(
                f"{where}: {name} are {array.dtype} {array.shape[1:]}, in the first trajectory {expected.dtype} "
                f"{expected.shape}"
            )
    length = len(action)
    reward = np.zeros(length, np.float32) if trajectory.reward is None else trajectory.reward
    reward = rewarded(reward, f"{where}: rews")
    for name, array in (("obs", observation), ("acts", action), ("rews", reward)):
        require_finite(array, f"{where}: {name}")
    cut = trajectory.timed_out if trajectory.timed_out is not None else limit is not None and length >= limit
    terminated = trajectory.ended and not cut
    return Episode(
        observation=observation, action=action, reward=reward, terminated=terminated, truncated=not terminated
    )


FORMAT = Format(
    name="imitation",
    title="Trajectories of imitation: an .npz, or a folder saved with Hugging Face's datasets",
    detect=looks_like,
    read=read,
)
