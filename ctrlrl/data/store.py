"""The dataset store: episodes in columns on the disk, mapped into memory, appended to while others read.

```
dataset.json            what there is: spaces, columns, committed rows, checksums, provenance
columns/NAME.bin        the rows of a column one after the other, little-endian; `observation` or `observation.ENTRY`
columns/NAME.ends.bin   of a ragged column: where each entry ends, int64
episodes.bin            one record an episode: length, flags, return
episodes.jsonl          what else is known of each: seed, task
```

An episode of T transitions has T rows in most columns and T + 1 in observations, the last of which is what followed its
last action. Transition i of episode e, counted from the first of all, has its observation in row i + e and the next one
in row i + e + 1. `terminated` and `truncated` belong to an episode's last transition and to no other.

Files only grow. A commit writes rows behind those that are there, waits for the disk, and then replaces dataset.json in
one step: a reader holds the rows that its dataset.json counts, whatever a writer does meanwhile, and what a crash left
behind them is overwritten by the next commit. Each commit keeps a checksum of the bytes that it added to each file; the
content hash is the chain of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np

from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.worker import Refused, describe_action_space, describe_observation_space, flatten_dict_space
from ctrlrl.errors import UsageError, nearest
from ctrlrl.files import building_site, fsync_folder, write_errors_explained, write_json

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Entries: TypeAlias = "Array | Sequence[Any]"
"""Rows of a column: an array, or, of a ragged one, a list of arrays or texts."""
Observations: TypeAlias = "Array | Mapping[str, Entries]"

FORMAT = 1
_EPISODE = np.dtype([("length", "<i8"), ("terminated", "?"), ("truncated", "?"), ("pad", "V6"), ("return", "<f8")])
_BLOCK = 64 * 2**20
"""Bytes that are held before they are written, and read at a time."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a column holds, beside observation, action and reward."""

    dtype: str
    """NumPy's name, or `text`."""
    shape: tuple[int, ...] = ()
    """Of one entry; of a ragged one without its first dimension."""
    ragged: bool = False
    """Whether entries (L, *shape) differ in length."""
    per: Literal["step", "observation"] = "step"
    """Whether an episode has T entries, or T + 1."""

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype on the disk."""
        return np.dtype("uint8" if self.dtype == "text" else self.dtype).newbyteorder("<")

    @property
    def is_ragged(self) -> bool:
        """Whether entries have ends of their own; texts do."""
        return self.ragged or self.dtype == "text"


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode of T >= 1 transitions."""

    observation: Observations
    """(T + 1, ...), or a flat dict of them: the last one follows the last action."""
    action: Array
    """(T, ...), as applied, in the environment's units."""
    reward: Array
    """(T,)."""
    terminated: bool
    """Whether the task ended with the last transition."""
    truncated: bool
    """Whether we stopped watching there; an episode that has neither flag is taken as truncated."""
    columns: Mapping[str, Entries] = field(default_factory=dict)
    """Whatever else there is, by name."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Of the whole episode, as JSON: its seed, its task."""


class Ragged:
    """Entries of varying length, (n,); `column[i]` is an array (L, *shape), or a text."""

    def __init__(self, data: Array, ends: Array, *, text: bool) -> None:
        self._data, self._ends, self._text = data, ends, text

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        entry = self._data[self._ends[i - 1] if i else 0 : self._ends[i]]
        return entry.tobytes().decode() if self._text else entry

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class Dataset:
    """A dataset on the disk, read-only, as it was when it was opened.

    Attributes:
        path: its folder.
        env: the environment's ID, where there is one.
        control_dt: seconds between two actions, where that is known.
        observation_space: of one observation; `Text` entries are ragged.
        action_space: of one action.
        columns: what there is beside observation, action and reward.
        reference: returns that scores are normalized by, `random` and `expert`, where known.
        provenance: where the data comes from.
        content_hash: of everything in it.
        num_transitions: N.
        num_episodes: E.
        lengths: (E,) int64, transitions of each episode.
        starts: (E,) int64, the first transition of each.
        terminated: (E,) bool, whether the last transition ended the task.
        truncated: (E,) bool, whether it was the last one watched.
        returns: (E,) float64, sums of rewards.
        observation: (N + E, ...), or a flat dict of them.
        action: (N, ...).
        reward: (N,).
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._manifest = manifest
        self.env: str | None = manifest["env"]
        self.control_dt: float | None = manifest["control_dt"]
        self.reference: dict[str, float] = manifest["reference"]
        self.provenance: dict[str, Any] = manifest["provenance"]
        self.content_hash: str = manifest["content_hash"]
        self.observation_space = _build(manifest["observation_space"])
        self.action_space = _build(manifest["action_space"])
        self.num_transitions: int = manifest["transitions"]
        self.num_episodes: int = manifest["episodes"]
        every = {name: Column(**spec | {"shape": tuple(spec["shape"])}) for name, spec in manifest["columns"].items()}
        own = _own_columns(self.observation_space, self.action_space)
        self._every = own | every
        self.columns = {name: column for name, column in every.items() if name not in own}
        table = self._map("episodes.bin", _EPISODE, (self.num_episodes,))
        self.lengths = table["length"].astype(np.int64)
        ends = np.cumsum(self.lengths)
        self.starts: Array = ends - self.lengths
        self.terminated, self.truncated = table["terminated"].copy(), table["truncated"].copy()
        self.returns: Array = table["return"].copy()
        if (ends[-1] if len(ends) else 0) != self.num_transitions or (self.lengths < 1).any():
            raise _damaged(path, "the lengths of its episodes do not add up to its transitions")
        parts = {name: self.column(name) for name in own if name.startswith("observation")}
        self.observation: Any = (
            parts["observation"]
            if "observation" in parts
            else {name.removeprefix("observation."): part for name, part in parts.items()}
        )
        self.action: Array = self.column("action")
        self.reward: Array = self.column("reward")

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """The dataset at `path`; reads no rows.

        Raises:
            UsageError: there is none, or its files are not what dataset.json says.
        """
        path = Path(path)
        return cls(path, _read_manifest(path))

    def column(self, name: str) -> Any:
        """The rows of a column, mapped into memory; a `Ragged` where they differ in length.

        Raises:
            UsageError: there is no such column.
        """
        if name not in self._every:
            raise UsageError(
                f"{self.path} has no column {name!r}.{nearest(name, self._every)} It has: {', '.join(self._every)}"
            )
        column = self._every[name]
        rows = self.num_transitions + (self.num_episodes if column.per == "observation" else 0)
        if not column.is_ragged:
            return self._map(f"columns/{name}.bin", column.stored, (rows, *column.shape))
        ends = self._map(f"columns/{name}.ends.bin", np.dtype("<i8"), (rows,))
        entries = int(ends[-1]) if rows else 0
        data = self._map(f"columns/{name}.bin", column.stored, (entries, *column.shape))
        return Ragged(data, ends, text=column.dtype == "text")

    def episode(self, i: int) -> Episode:
        """The i-th episode; its arrays are views."""
        if not 0 <= i < self.num_episodes:
            raise IndexError(f"episode {i} of {self.num_episodes}")
        steps = slice(int(self.starts[i]), int(self.starts[i] + self.lengths[i]))
        seen = slice(steps.start + i, steps.stop + i + 1)

        def rows(column: Any, where: slice) -> Any:
            return [column[k] for k in range(where.start, where.stop)] if isinstance(column, Ragged) else column[where]

        observation = self.observation
        return Episode(
            observation={name: rows(part, seen) for name, part in observation.items()}
            if isinstance(observation, dict)
            else rows(observation, seen),
            action=self.action[steps],
            reward=self.reward[steps],
            terminated=bool(self.terminated[i]),
            truncated=bool(self.truncated[i]),
            columns={
                name: rows(self.column(name), seen if column.per == "observation" else steps)
                for name, column in self.columns.items()
            },
            info=self.infos[i],
        )

    @property
    def infos(self) -> list[dict[str, Any]]:
        """What is known of each episode besides, (E,)."""
        if not hasattr(self, "_infos"):
            if not (self.path / "episodes.jsonl").is_file():
                raise _damaged(self.path, "episodes.jsonl is missing")
            with open(self.path / "episodes.jsonl", encoding="utf-8") as file:
                try:
                    infos = [json.loads(line) for _, line in zip(range(self.num_episodes), file, strict=False)]
                except ValueError as error:
                    raise _damaged(self.path, f"episodes.jsonl cannot be read ({error})") from None
            if len(infos) < self.num_episodes or not all(isinstance(info, dict) for info in infos):
                raise _damaged(self.path, "episodes.jsonl does not have a line for each episode")
            self._infos = infos
        return self._infos

    def normalized_score(self, ret: float) -> float:
        """100 (ret - random) / (expert - random), as D4RL has it.

        Raises:
            UsageError: the dataset has no reference returns, or they are the same.
        """
        if not {"random", "expert"} <= self.reference.keys():
            raise UsageError(
                f"{self.path} has no reference returns, by which a score is normalized: give them when it is made "
                "(ctrlrl data collect does), or import it with --env"
            )
        low, high = self.reference["random"], self.reference["expert"]
        if low == high:
            raise UsageError(f"the reference returns of {self.path} are the same, {low:g}: they give no score")
        return 100 * (ret - low) / (high - low)

    def verify(self) -> None:
        """Compare every byte with its checksum.

        Raises:
            UsageError: a file was altered; names it.
        """
        content, at = "", dict.fromkeys(_files(self._every), 0)
        for block in self._manifest["commits"]:
            for name, (size, digest) in block.items():
                if name not in at or not (self.path / name).is_file():
                    raise _damaged(self.path, f"{name} is missing")
                if _digest(self.path / name, at[name], size) != digest:
                    raise _damaged(self.path, f"{name} was altered")
                at[name] += size
            content = _chained(content, block)
        if content != self.content_hash or at != self._manifest["sizes"]:
            raise _damaged(self.path, "dataset.json was altered")

    def _map(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        expected = self._manifest["sizes"].get(name)
        there = (self.path / name).stat().st_size if (self.path / name).is_file() else -1
        if there < size or expected != size:
            raise _damaged(self.path, f"{name} has {max(there, 0):,} bytes, and {size:,} are needed")
        if not size:
            return np.zeros(shape, dtype)
        return np.memmap(self.path / name, dtype, "r", shape=shape)


def environment_of(path: str | Path | None) -> str:
    """The environment that the dataset at `path` names; "" where it names none, or there is no dataset."""
    try:
        return "" if path is None else str(_read_manifest(Path(path))["env"] or "")
    except UsageError:  # whoever opens it says so
        return ""


class DatasetWriter:
    """Writes a new dataset, or appends to one; `with` commits at its end.

    A new one appears at its path with the first commit and not before: what fails until then leaves nothing behind.
    """

    def __init__(self, path: Path, home: Path, manifest: dict[str, Any], lock: Any) -> None:
        self.path, self._home, self._manifest, self._lock = path, home, manifest, lock
        observation, action = _build(manifest["observation_space"]), _build(manifest["action_space"])
        self.observation_space, self.action_space = observation, action
        listed = {name: Column(**spec | {"shape": tuple(spec["shape"])}) for name, spec in manifest["columns"].items()}
        self._columns = _own_columns(observation, action) | listed
        self._pending: dict[str, list[bytes]] = {name: [] for name in _files(self._columns)}
        self._sizes: dict[str, int] = dict(manifest["sizes"])
        self._entries: dict[str, int] = dict(manifest["entries"])
        self._hashes = {name: hashlib.sha256() for name in self._pending}
        self._held = self._transitions = self._episodes = 0
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        env: str | None = None,
        control_dt: float | None = None,
        columns: Mapping[str, Column] | None = None,
        reference: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> DatasetWriter:
        """A new dataset at `path`; arguments are the attributes of `Dataset`.

        Raises:
            UsageError: something is there already, or a space or column cannot be stored.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is not empty: choose another --out; nothing was overwritten")
        own = _own_columns(observation_space, action_space)
        for name, column in (columns or {}).items():
            _require_column(name, column, own)
        _require_own_files(own | dict(columns or {}))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "env": env,
            "control_dt": control_dt,
            "observation_space": _describe_observation(observation_space),
            "action_space": _describe(lambda: describe_action_space(action_space, "the dataset")),
            "columns": {name: dataclasses.asdict(column) for name, column in (columns or {}).items()},
            "reference": {name: float(value) for name, value in (reference or {}).items()},
            "provenance": dict(provenance or {}),
            "transitions": 0,
            "episodes": 0,
            "sizes": dict.fromkeys(_files(own | dict(columns or {})), 0),
            "entries": {name: 0 for name, column in (own | dict(columns or {})).items() if column.is_ragged},
            "commits": [],
            "content_hash": "",
        }
        home = building_site(path)
        with write_errors_explained(path):
            (home / "columns").mkdir(parents=True)
        return cls(path, home, manifest, None)

    @classmethod
    def append(cls, path: str | Path) -> DatasetWriter:
        """Go on writing the dataset at `path`; readers keep what they have opened.

        Raises:
            UsageError: there is none, or another process appends to it.
        """
        path = Path(path)
        _read_manifest(path)
        lock = _locked(path)
        return cls(path, path, _read_manifest(path), lock)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

    @property
    def num_transitions(self) -> int:
        """Transitions so far, those that are not committed yet included."""
        return int(self._manifest["transitions"]) + self._transitions

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the data comes from; changes are written by the next commit."""
        provenance: dict[str, Any] = self._manifest["provenance"]
        return provenance

    def add(self, episode: Episode) -> None:
        """Take in an episode.

        Raises:
            UsageError: a column is missing, or of another shape or type than declared, or not finite; names it.
        """
        where = f"episode {self._manifest['episodes'] + self._episodes}"
        length = len(episode.reward)
        rows = self._rows(episode, where, length)
        ret = float(np.sum(episode.reward, dtype=np.float64))
        truncated = episode.truncated or not episode.terminated
        record = np.array([(length, episode.terminated, truncated, b"", ret)], _EPISODE)
        parts = {"episodes.bin": record.tobytes(), "episodes.jsonl": _json(episode.info, where)}
        ends = dict(self._entries)
        for name, column in self._columns.items():
            parts |= self._encoded(name, column, rows[name], where, ends)
        for name, content in parts.items():  # all of it fits: nothing has been taken before
            self._pending[name].append(content)
            self._held += len(content)
        self._entries = ends
        self._transitions += length
        self._episodes += 1
        if self._held > _BLOCK:
            self._write()

    def set_reference(self, **returns: float) -> None:
        """Set reference returns, `random` and `expert`; the next commit writes them."""
        self._manifest["reference"] |= {name: float(value) for name, value in returns.items()}

    def commit(self) -> None:
        """Make everything that was added part of the dataset, in one step."""
        self._write()
        for name in self._pending:
            with write_errors_explained(self.path), open(self._home / name, "ab") as file:
                os.fsync(file.fileno())
        fsync_folder(self._home / "columns")
        manifest = self._manifest
        if self._episodes or not manifest["commits"]:
            block = {
                name: [self._sizes[name] - manifest["sizes"][name], self._hashes[name].hexdigest()]
                for name in self._pending
            }
            manifest["commits"].append(block)
            manifest["content_hash"] = _chained(manifest["content_hash"], block)
        manifest["transitions"] += self._transitions
        manifest["episodes"] += self._episodes
        manifest["sizes"], manifest["entries"] = dict(self._sizes), dict(self._entries)
        self._transitions = self._episodes = 0
        self._hashes = {name: hashlib.sha256() for name in self._pending}
        write_json(self._home / "dataset.json", manifest)
        if self._home != self.path:
            with write_errors_explained(self.path):
                if self.path.exists():
                    self.path.rmdir()
                os.rename(self._home, self.path)
                fsync_folder(self.path.parent)
            self._home = self.path
            self._lock = _locked(self.path)

    def close(self) -> None:
        """Leave without committing what is left."""
        if self._closed:
            return
        self._closed = True
        if self._home != self.path:
            shutil.rmtree(self._home, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _rows(self, episode: Episode, where: str, length: int) -> dict[str, Entries]:
        """The rows of each column, of which there must be as many as the episode's length says."""
        observation = episode.observation
        named = (
            {f"observation.{name}": rows for name, rows in observation.items()}
            if isinstance(observation, Mapping)
            else {"observation": observation}
        )
        rows: dict[str, Entries] = {
            **named,
            "action": episode.action,
            "reward": episode.reward,
            **episode.columns,
        }
        if length < 1:
            raise UsageError(f"{where} has no transition; leave it out")
        if rows.keys() != self._columns.keys():
            missing, more = self._columns.keys() - rows.keys(), rows.keys() - self._columns.keys()
            what = f"lacks {', '.join(sorted(missing))}" if missing else f"has also {', '.join(sorted(more))}"
            raise UsageError(f"{where} {what}; the dataset's columns are {', '.join(self._columns)}")
        for name, column in self._columns.items():
            expected = length + (column.per == "observation")
            if len(rows[name]) != expected:
                raise UsageError(
                    f"{where}: {name} has {len(rows[name])} rows; with {length} rewards it must have {expected}"
                )
        return rows

    def _encoded(self, name: str, column: Column, rows: Entries, where: str, ends: dict[str, int]) -> dict[str, bytes]:
        """What goes to each of the column's files; moves the end of the column in `ends`, if it is ragged."""
        if not column.is_ragged:
            array = _exactly(np.asarray(rows), column, f"{where}: {name}")
            if array.shape[1:] != column.shape:
                raise UsageError(f"{where}: entries of {name} are {array.shape[1:]}, declared {column.shape}")
            return {f"columns/{name}.bin": array.tobytes()}
        parts: list[bytes] = []
        marks = np.empty(len(rows), "<i8")
        for i, row in enumerate(rows):
            if column.dtype == "text":
                if not isinstance(row, str):
                    raise UsageError(f"{where}: {name} is of texts, entry {i} is a {type(row).__name__}")
                parts.append(row.encode())
                ends[name] += len(parts[-1])
            else:
                array = _exactly(np.asarray(row), column, f"{where}: {name}, entry {i}")
                if array.shape[1:] != column.shape or not array.ndim:
                    raise UsageError(f"{where}: entry {i} of {name} is {array.shape}, declared (L, *{column.shape})")
                parts.append(array.tobytes())
                ends[name] += len(array)
            marks[i] = ends[name]
        return {f"columns/{name}.bin": b"".join(parts), f"columns/{name}.ends.bin": marks.tobytes()}

    def _write(self) -> None:
        """Append what is held to the files, behind the rows that count."""
        for name, parts in self._pending.items():
            with write_errors_explained(self.path), open(self._home / name, "r+b" if self._there(name) else "wb") as f:
                f.truncate(self._sizes[name])  # what a crash left
                f.seek(self._sizes[name])
                for part in parts:
                    f.write(part)
            for part in parts:  # only now: what failed half-way is written again by the next commit
                self._hashes[name].update(part)
            self._sizes[name] += sum(map(len, parts))
            parts.clear()
        self._held = 0

    def _there(self, name: str) -> bool:
        return (self._home / name).exists()


def _json(info: Mapping[str, Any], where: str) -> bytes:
    try:
        return json.dumps(dict(info), allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: its info cannot be written as JSON: {error}") from None


def _exactly(array: Array, column: Column, what: str) -> Array:
    """`array` in the column's dtype, if that loses nothing but digits, and every number is finite."""
    kind, wanted = array.dtype.kind, column.stored
    if kind not in "fiub" or ((kind == "f") != (wanted.kind == "f") and not (kind in "iub" and wanted.kind == "f")):
        raise UsageError(f"{what} is of dtype {array.dtype}, declared {column.dtype}")
    if kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise UsageError(f"{what} has NaN or infinity, first in row {row}")
    if array.dtype == wanted:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        out = array.astype(wanted)
    lossless = np.isfinite(out).all() if wanted.kind == "f" else np.array_equal(out, array)
    if not lossless:
        raise UsageError(f"{what} has numbers that {column.dtype} cannot hold")
    return out


def _own_columns(observation: gym.Space[Any], action: gym.Space[Any]) -> dict[str, Column]:
    """The columns that every dataset of these spaces has."""
    entries = {".".join(path): entry for path, entry in flatten_dict_space(observation).items()}
    columns = {}
    for name, entry in entries.items():
        dtype = "text" if isinstance(entry, gym.spaces.Text) else _stored_name(entry.dtype)
        shape = () if isinstance(entry, gym.spaces.Text) else tuple(entry.shape or ())
        columns[f"observation.{name}" if name else "observation"] = Column(dtype=dtype, shape=shape, per="observation")
    return columns | {
        "action": Column(dtype=_stored_name(action.dtype), shape=tuple(action.shape or ())),
        "reward": Column(dtype="float32"),
    }


def _stored_name(dtype: Any) -> str:
    """The name of the dtype in which numbers of a space are kept."""
    return str(np.dtype(dtype).name)


def _files(columns: Mapping[str, Column]) -> list[str]:
    names = ["episodes.bin", "episodes.jsonl"]
    for name, column in columns.items():
        names += [f"columns/{name}.bin"] + ([f"columns/{name}.ends.bin"] if column.is_ragged else [])
    return names


def _require_own_files(columns: Mapping[str, Column]) -> None:
    """Raise UsageError if two columns would be kept in one file."""
    for name, column in columns.items():
        if column.is_ragged and f"{name}.ends" in columns:
            raise UsageError(f"a column cannot be called {name}.ends beside {name}, whose ends are in that file")


def _require_column(name: str, column: Column, own: Mapping[str, Column]) -> None:
    simple = name and all(part and not part.startswith(".") for part in name.split("/")) and "\\" not in name
    if not simple or "/" in name or "\0" in name:
        raise UsageError(f"a column cannot be called {name!r}: a name holds no slash, and begins with no dot")
    if name in own:
        raise UsageError(f"a column cannot be called {name!r}: every dataset has its own {name}")
    if column.dtype != "text":
        try:
            numbers = np.dtype(column.dtype).kind in "fiub"
        except TypeError:
            numbers = False
        if not numbers:
            raise UsageError(f"the column {name} is of dtype {column.dtype!r}; numbers, bool and text can be stored")


def _describe(description: Any) -> dict[str, Any]:
    try:
        out: dict[str, Any] = description()
    except Refused as error:
        raise UsageError(str(error)) from None
    return out


def _describe_observation(space: gym.Space[Any]) -> dict[str, Any]:
    """A Box or a Dict of them, flattened; entries may be texts."""
    entries = {".".join(path): entry for path, entry in flatten_dict_space(space).items()}
    if any("/" in name or "\0" in name for name in entries):
        raise UsageError(f"observation entries are called {', '.join(entries)}; names must hold no slash")
    texts = {name: entry for name, entry in entries.items() if isinstance(entry, gym.spaces.Text)}
    if not texts:
        return _describe(lambda: describe_observation_space(space, "the dataset"))
    if "" in texts:
        raise UsageError("an observation that is one text must be an entry of a Dict: {'text': Text(...)}")
    others = gym.spaces.Dict({name: entry for name, entry in entries.items() if name not in texts})
    plain = _describe(lambda: describe_observation_space(others, "the dataset"))["entries"] if others.spaces else {}
    return {
        "type": "Dict",
        "entries": plain | {n: {"type": "Text", "max_length": entry.max_length} for n, entry in texts.items()},
    }


def _build(description: dict[str, Any]) -> gym.Space[Any]:
    if description["type"] == "Dict":
        return gym.spaces.Dict({name: _build(entry) for name, entry in description["entries"].items()})
    if description["type"] == "Text":
        return gym.spaces.Text(description["max_length"])
    return build_space(description)


_KEYS = {
    "env": (str, type(None)),
    "control_dt": (float, int, type(None)),
    "observation_space": (dict,),
    "action_space": (dict,),
    "columns": (dict,),
    "reference": (dict,),
    "provenance": (dict,),
    "transitions": (int,),
    "episodes": (int,),
    "sizes": (dict,),
    "entries": (dict,),
    "commits": (list,),
    "content_hash": (str,),
}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "dataset.json"
    if not file.is_file():
        what = "no such folder" if not path.exists() else "it has no dataset.json"
        raise UsageError(f"{path} is no dataset: {what}. ctrlrl data import makes one of files in other formats")
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise _damaged(path, "dataset.json is not as it was written")
    if manifest["format"] != FORMAT:
        raise UsageError(f"{path} has format {manifest['format']!r}; this version of ctrlrl reads format {FORMAT}")
    for key, kinds in _KEYS.items():
        if not isinstance(manifest.get(key), kinds) or isinstance(manifest.get(key), bool):
            raise _damaged(path, f"dataset.json has no proper {key!r}")
    try:
        own = _own_columns(_build(manifest["observation_space"]), _build(manifest["action_space"]))
        for name, spec in manifest["columns"].items():
            column = Column(**spec | {"shape": tuple(spec["shape"])})
            if not all(type(n) is int and n >= 0 for n in column.shape) or column.per not in ("step", "observation"):
                raise ValueError(f"{name} is declared as {spec}")
            _require_column(name, column, own)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise _damaged(path, f"its spaces or columns cannot be read ({error})") from None
    if not all(isinstance(value, int | float) for value in manifest["reference"].values()):
        raise _damaged(path, "its reference returns are no numbers")
    if manifest["transitions"] < 0 or manifest["episodes"] < 0:
        raise _damaged(path, "it counts fewer than no rows")
    return manifest


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"the dataset {path} is damaged: {what}. Restore it from a copy, or import it anew")


def _digest(path: Path, start: int, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while size > 0:
            part = file.read(min(size, _BLOCK))
            if not part:
                break
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


def _chained(before: str, block: Mapping[str, Any]) -> str:
    return hashlib.sha256((before + json.dumps(block, sort_keys=True)).encode()).hexdigest()


def _locked(path: Path) -> Any:
    """A file whose lock says that this process appends; it goes with the process, however it ends."""
    import fcntl

    with write_errors_explained(path):
        file = open(path / ".lock", "a+")  # noqa: SIM115  (closed with the writer)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"another process appends to {path}; wait for it, or stop it") from None
    except OSError:  # some network file systems have no locks
        pass
    return file
