"""The metadata of LeRobotDatasets: features, tasks, and which episode is where."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.arrow import explained, parquet
from ctrlrl.data.importers.frames import pixels
from ctrlrl.data.importers.rows import inside, json_object
from ctrlrl.data.store import Column
from ctrlrl.envs.spaces import build_space
from ctrlrl.errors import UsageError

VERSIONS = ("v3.0", "v2.1", "v2.0")
OURS = "meta/ctrlrl.json"
"""What an exported dataset was before."""
INFO = "ctrlrl/info"
"""A column of meta/episodes of exported datasets: the episode's info as JSON."""
LARGEST_JSON = 64 * 2**20
LARGEST_ROW = 2**27
_FIELD = re.compile(r"\{(\w+)(?::0?([1-9]))?d?\}")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What a feature holds in each row."""

    name: str
    dtype: str
    """NumPy's name, `string`, `image` or `video`."""
    shape: tuple[int, ...]
    """(1,) where it is a single value; of images (height, width, channels)."""

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers in the rows."""
        return self.dtype not in ("string", "image", "video")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An episode, as the metadata has it."""

    index: int
    length: int
    tasks: tuple[str, ...]
    file: Path
    videos: Mapping[str, tuple[Path, float]]
    """By feature: the file, and when the episode begins in it."""
    info: Mapping[str, Any] = field(default_factory=dict)


class Metadata:
    """What the files in meta/ say.

    Raises:
        UsageError: they are not there, of a version that is not known, or do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = _json(path, "meta/info.json")
        self.version = self.info.get("codebase_version")
        if self.version not in VERSIONS:
            raise UsageError(
                f"{path} is a LeRobotDataset of version {str(self.version)[:20]!r}; ctrlrl reads "
                f"{', '.join(VERSIONS)}. Older ones can be converted with the scripts of the lerobot package"
            )
        self.fps = self._number("fps", low=1e-6, high=1e6)
        self.features = _features(path, self.info.get("features"))
        self.ours = Ours(path, self.features) if (path / OURS).is_file() else None

    def _number(self, name: str, *, low: float, high: float) -> float:
        value = self.info.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise UsageError(f"{self.path}: {name} in meta/info.json is {str(value)[:40]!r}; expected a number")
        return value

    def tasks(self) -> dict[int, str]:
        """The text of each task by its index."""
        rows: list[tuple[Any, Any]]
        if self.version != "v3.0":
            rows = [(row.get("task_index"), row.get("task")) for row in self._lines("meta/tasks.jsonl")]
        else:
            table = self._table("meta/tasks.parquet")
            names = [name for name in table.column_names if name != "task_index"]
            if "task_index" not in table.column_names or not names:
                raise UsageError(f"{self.path / 'meta/tasks.parquet'} has no task_index, or no text of a task")
            text = "task" if "task" in names else names[0]
            rows = list(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
        if not all(isinstance(index, int) and isinstance(task, str) for index, task in rows):
            raise UsageError(f"{self.path}: the tasks in meta/ are not numbered texts")
        return dict(rows)

    def entries(self, videos: list[str]) -> list[Entry]:
        """The episodes.

        Args:
            videos: the features whose videos are wanted.
        """
        total = int(self._number("total_episodes", low=0, high=1e9))
        entries = self._entries_v3(videos) if self.version == "v3.0" else self._entries_v2(videos)
        if len(entries) != total:
            raise UsageError(
                f"{self.path}: meta/info.json counts {total:,} episodes, and {len(entries):,} are described in meta/. "
                "It was not written to its end, or not fetched in full"
            )
        if not entries:
            raise UsageError(f"{self.path} holds no episode")
        frames, counted = int(self._number("total_frames", low=0, high=1e15)), sum(entry.length for entry in entries)
        if counted != frames:
            raise UsageError(
                f"{self.path}: meta/info.json counts {frames:,} frames, and the lengths of its episodes add up to "
                f"{counted:,}"
            )
        return entries

    def _entries_v3(self, videos: list[str]) -> list[Entry]:
        needed = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index", "tasks"]
        needed += [INFO] if self.ours is not None else []
        needed += [f"videos/{key}/{what}" for key in videos for what in ("chunk_index", "file_index", "from_timestamp")]
        rows: list[dict[str, Any]] = []
        folder = self.path / "meta" / "episodes"
        files = sorted(folder.glob("chunk-*/file-*.parquet"))
        if not files:
            raise UsageError(f"{folder} holds no chunk-NNN/file-NNN.parquet: the dataset was not written to its end")
        for file in files:
            table = self._table(str(file.relative_to(self.path)), needed)
            with explained(str(file)):
                rows += table.to_pylist()
        entries, first = [], 0
        for i, row in enumerate(rows):
            where = f"{self.path}: episode {i} in meta/episodes"
            index, length, start = (_count(row[name], where, name) for name in needed[:3])
            if index != i or start != first or not length:
                raise UsageError(
                    f"{where} is number {index} and has {length:,} frames from {start:,} on; expected number {i}, at "
                    f"least one frame, from {first:,} on"
                )
            first += length
            found = {}
            for key in videos:
                begins = row[f"videos/{key}/from_timestamp"]
                if not isinstance(begins, float | int) or not 0 <= begins < 1e9:
                    raise UsageError(f"{where}: videos/{key}/from_timestamp is {begins}; expected seconds")
                fields = _numbered(row, f"videos/{key}", where)
                found[key] = (self._place("video_path", fields | {"video_key": key}), float(begins))
            entries.append(
                Entry(
                    index=i,
                    length=length,
                    tasks=_texts(row["tasks"], where),
                    file=self._place("data_path", _numbered(row, "data", where)),
                    videos=found,
                    info=json_object(row[INFO] or "{}", f"{where}: {INFO}") if self.ours is not None else {},
                )
            )
        return entries

    def _entries_v2(self, videos: list[str]) -> list[Entry]:
        size = int(self._number("chunks_size", low=1, high=1e9))
        entries = []
        for i, row in enumerate(self._lines("meta/episodes.jsonl")):
            where = f"{self.path / 'meta/episodes.jsonl'}, line {i + 1}"
            index, length = (_count(row.get(name), where, name) for name in ("episode_index", "length"))
            if index != i or not length:
                raise UsageError(
                    f"{where} is episode {index} of {length:,} frames; expected {i}, and at least one frame"
                )
            fields: dict[str, int | str] = {"episode_chunk": index // size, "episode_index": index}
            entries.append(
                Entry(
                    index=i,
                    length=length,
                    tasks=_texts(row.get("tasks"), where),
                    file=self._place("data_path", fields),
                    videos={key: (self._place("video_path", fields | {"video_key": key}), 0.0) for key in videos},
                )
            )
        return entries

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = _file(self.path, name)
        with explained(str(file)), open(file, encoding="utf-8") as lines:
            return [json_object(line, f"{file}, line {i + 1}") for i, line in enumerate(lines) if line.strip()]

    def _table(self, name: str, columns: list[str] | None = None) -> Any:
        file = _file(self.path, name)
        opened, _ = parquet(file)
        with contextlib.closing(opened), explained(str(file)):
            there = set(opened.schema_arrow.names)
            for column in columns or ():
                if column not in there:
                    raise UsageError(
                        f"{file} has no column {column!r}: it is not as LeRobotDataset {self.version} has it"
                    )
            table = opened.read(columns=columns, use_threads=False)
            table.validate(full=True)
            return table

    def _place(self, name: str, fields: Mapping[str, int | str]) -> Path:
        """A file, by a template of meta/info.json; none outside the folder."""
        template = self.info.get(name)
        if not isinstance(template, str) or len(template) > 500:
            raise UsageError(f"{self.path}: {name} in meta/info.json is no template of a path")

        def filled(match: re.Match[str]) -> str:
            if match[1] not in fields:
                raise UsageError(
                    f"{self.path}: {name} in meta/info.json has a field {match[1]!r}; known are {', '.join(fields)}"
                )
            value = fields[match[1]]
            return f"{value:0{match[2] or 1}d}" if isinstance(value, int) else value

        place = _FIELD.sub(filled, template)
        if "{" in place or "}" in place:
            raise UsageError(f"{self.path}: {name} in meta/info.json is {template!r}, which is no template of a path")
        return _file(self.path, place, must_exist=False)


class Ours:
    """What ctrlrl wrote beside a dataset that it exported.

    Raises:
        UsageError: it is not as ctrlrl wrote it.
    """

    def __init__(self, path: Path, features: Mapping[str, Feature]) -> None:
        self.where = f"{path / OURS}"
        value = _json(path, OURS)
        if value.get("format") != 1:
            raise UsageError(f"{self.where} is of format {str(value.get('format'))[:20]!r}; this version reads 1")
        try:
            self._read(value, features)
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError, OverflowError, MemoryError) as error:
            raise self._wrong(f"{type(error).__name__}: {error}") from None

    def _wrong(self, why: str) -> UsageError:
        return UsageError(
            f"{self.where} is not as ctrlrl wrote it ({why[:200]}). Export the dataset anew; or remove the file, and "
            "everything is taken as in any LeRobotDataset"
        )

    def _read(self, value: dict[str, Any], features: Mapping[str, Feature]) -> None:
        self.observation: dict[str, str] = dict(value["observation"])
        """The feature of each observation entry."""
        columns: dict[str, dict[str, Any]] = dict(value["columns"])
        for feature in (*self.observation.values(), *(spec["feature"] for spec in columns.values())):
            if feature not in features:
                raise self._wrong(f"there is no feature {feature!r}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of observation features of numbers, as the dataset has them."""
        described = value["observation_space"]
        entries = described["entries"] if described["type"] == "Dict" else {"": described}
        if entries.keys() != self.observation.keys():
            raise self._wrong("its observation space has other entries")
        spaces = {name: self._space(entry, features[self.observation[name]]) for name, entry in entries.items()}
        self.observation_space = gym.spaces.Dict(spaces) if described["type"] == "Dict" else spaces[""]
        self.action_space = self._space(value["action_space"], features["action"])
        self.columns: dict[str, tuple[Feature, Column]] = {}
        for name, spec in columns.items():
            feature, ragged = features[spec["feature"]], spec["ragged"] is True
            column = Column(dtype=spec["dtype"], shape=tuple(spec["shape"]), ragged=ragged, per=spec["per"])
            same = math.prod(column.shape) == math.prod(feature.shape) and column.dtype == feature.dtype
            if column.per not in ("step", "observation") or not (same or feature.dtype == "string"):
                raise self._wrong(f"the column {name} is not of its feature's shape")
            self.columns[name] = (feature, column)
        kinds = {"env": str, "control_dt": float | int, "reference": dict, "provenance": dict}
        self.known: dict[str, Any] = {k: value[k] for k, kind in kinds.items() if isinstance(value.get(k), kind)}
        returns = self.known.get("reference", {}).values()
        if not 0 < self.known.get("control_dt", 1.0) < 1e9 or not all(math.isfinite(ret) for ret in returns):
            raise self._wrong("control_dt or a reference return is no number")

    def _space(self, described: dict[str, Any], feature: Feature) -> gym.Space[Any]:
        kind = described["type"]
        if kind == "Text":
            fits = feature.dtype == "string"
        elif kind == "Box":
            shape, image = tuple(described["shape"]), not feature.is_number
            fits = described["dtype"] == ("uint8" if image else feature.dtype)
            fits &= shape == feature.shape if image else math.prod(shape) == math.prod(feature.shape)
            self.shapes[feature.name] = shape
        else:
            fits = kind in ("Discrete", "MultiDiscrete") and feature.dtype == "int64"
        if not fits:
            raise self._wrong(f"{feature.name} is not as its space")
        return gym.spaces.Text(int(described["max_length"])) if kind == "Text" else build_space(described)


def _features(path: Path, value: Any) -> dict[str, Feature]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: meta/info.json has no features")
    features = {}
    for name, spec in value.items():
        where = f"{path}: the feature {name[:80]!r} in meta/info.json"
        spec = spec if isinstance(spec, dict) else {}
        dtype, shape = spec.get("dtype"), spec.get("shape")
        if not name or len(name) > 200 or any(part in name for part in ("/", "\\", "\0", "..")):
            raise UsageError(f"{where} cannot be called that")
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise UsageError(f"{where} has the shape {str(shape)[:40]}; expected a list of numbers above 0")
        shape = shape or [1]
        if len(shape) > 8 or math.prod(shape) > LARGEST_ROW:
            raise UsageError(f"{where} has the shape {str(shape)[:40]}, which is too large to be a row")
        if dtype in ("image", "video"):
            names = spec.get("names")
            first = str(names[0]) if isinstance(names, list) and names else ""
            if first.startswith("channel") or (not first and shape[0] in (1, 3) and shape[-1] > 4):
                shape = [*shape[1:], shape[0]]
            pixels(tuple(shape), where)
        elif dtype != "string" and not _is_number(dtype):
            raise UsageError(f"{where} is of dtype {str(dtype)[:40]!r}; expected numbers, string, image or video")
        features[name] = Feature(name=name, dtype=str(dtype), shape=tuple(shape))
    return features


def _is_number(dtype: Any) -> bool:
    """Whether it is NumPy's name of numbers of up to 64 bits, or of bool."""
    try:
        found = np.dtype(dtype) if isinstance(dtype, str) else np.dtype(object)
    except (TypeError, ValueError, SyntaxError):
        return False
    return found.kind in "fiub" and found.itemsize <= 8 and found.name == dtype


def _json(path: Path, name: str) -> dict[str, Any]:
    file = _file(path, name)
    if file.stat().st_size > LARGEST_JSON:
        raise UsageError(f"{file} is too large to be what LeRobot writes")
    return json_object(file.read_bytes(), str(file))


def _file(folder: Path, name: str, *, must_exist: bool = True) -> Path:
    """A file in the folder, and not outside of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or len(name) > 1000:
        raise UsageError(f"{folder}: {name[:200]!r} in its metadata leads out of the folder")
    file = inside(folder / name, folder)
    if must_exist and not file.is_file():
        raise UsageError(f"{folder} has no {name}: it is no LeRobotDataset, or was not fetched in full")
    return file


def _numbered(row: Mapping[str, Any], what: str, where: str) -> dict[str, int | str]:
    return {name: _count(row[f"{what}/{name}"], where, f"{what}/{name}") for name in ("chunk_index", "file_index")}


def _count(value: Any, where: str, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise UsageError(f"{where}: {name} is {str(value)[:40]!r}; expected a number from 0 on")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"{where}: tasks are {str(value)[:40]!r}; expected texts")
    return tuple(value)
