"""A dataset as a LeRobotDataset v3.0, written without the `lerobot` package.

LeRobot has a row for each action, and no observation after the last one. So that none is lost, every episode has one
row more: the final observation, with the last action repeated, reward 0, and `ctrlrl.final` true. LeRobot reads such
rows as any others; who trains from them should leave that row out. Where the task ended is in `next.terminated`, where
it was cut off in `next.truncated`, and `next.done` is true in the last row with an action and in the one behind it.

Observations become `observation.state`, or `observation.NAME`; images of three channels are PNGs in the rows, which
lose nothing, where videos would. A column keeps its name, but `success` is `next.success`, and names that LeRobot uses
itself get `column.` before them. Texts are strings; entries of varying length are strings, too, each a list as JSON.

What LeRobot has no place for stands beside it, and the importer takes it from there: meta/ctrlrl.json has the spaces,
the columns, the control period, reference returns and where the data comes from, and each episode's info is JSON in a
column of meta/episodes. So what is imported again is the same dataset, but for its content hash and provenance.
Statistics in meta/stats.json are of all rows, and there are none of single episodes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import need
from ctrlrl.data.importers.lerobot import FINAL, INDICES
from ctrlrl.data.importers.lerobot_meta import INFO, OURS
from ctrlrl.data.store import Column, Dataset, Episode
from ctrlrl.envs.worker import describe_action_space, describe_observation_space
from ctrlrl.errors import UsageError
from ctrlrl.files import building_site, put_in_place, write_durably, write_errors_explained

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LARGEST_FILE = 100 * 2**20
"""Bytes after which another file of rows is begun."""
FILES_A_CHUNK = 1000
_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_FLAGS = ("next.done", "next.terminated", "next.truncated", FINAL)
_OWN = ("action", "next.reward", *_FLAGS, *INDICES)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A feature, and what of an episode it holds."""

    name: str
    dtype: str
    """As info.json has it."""
    shape: tuple[int, ...]
    """Of an entry here; LeRobot has (1,) for single numbers."""
    encoding: str = "number"
    """`number`, `text`, `list` (as JSON) or `image`."""

    @property
    def declared(self) -> list[int]:
        return list(self.shape) if self.encoding in ("number", "image") and self.shape else [1]

    def spec(self) -> dict[str, Any]:
        """Its entry in info.json."""
        names = ["height", "width", "channels"] if self.encoding == "image" else None
        return {"dtype": self.dtype, "shape": self.declared, "names": names}


@dataclass
class _Statistics:
    """Of the numbers of a feature, per entry; of images, per channel and of 1."""

    count: int = 0
    low: Any = None
    high: Any = None
    mean: Any = 0.0
    spread: Any = 0.0
    """Sum of squared distances from the mean."""

    def add(self, rows: Array) -> None:
        rows = rows.astype(np.float64)
        count, mean = len(rows), rows.mean(0)
        spread = np.square(rows - mean).sum(0)
        total = self.count + count
        self.spread = self.spread + spread + np.square(mean - self.mean) * (self.count * count / total)
        self.mean = self.mean + (mean - self.mean) * (count / total)
        low, high = rows.min(0), rows.max(0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.count = total

    def json(self, image: bool, count: int) -> dict[str, Any]:
        values = {"min": self.low, "max": self.high, "mean": self.mean, "std": np.sqrt(self.spread / self.count)}
        shaped = {k: v.reshape(-1, 1, 1) / 255 if image else v.reshape(v.shape or (1,)) for k, v in values.items()}
        return {k: v.tolist() for k, v in shaped.items()} | {"count": [count]}


@dataclass
class _Written:
    """What the rows and the metadata of episodes were so far."""

    tasks: dict[str, int] = field(default_factory=dict)
    episodes: dict[str, list[Any]] = field(default_factory=dict)
    frames: int = 0
    statistics: dict[str, _Statistics] = field(default_factory=dict)


def export(dataset: Dataset, out: Path, *, fps: float | None = None, robot_type: str = "unknown") -> None:
    """Write the dataset to the folder `out`, which must not hold anything yet.

    Args:
        fps: frames per second; by default what the dataset's control period says.
        robot_type: the robot's name in the metadata.

    Raises:
        UsageError: something is at `out`, there is no fps, or LeRobot has no place for an entry of the dataset.
    """
    need("pyarrow")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another --out; nothing was overwritten")
    if not dataset.num_episodes:
        raise UsageError(f"{dataset.path} holds no episode: there is nothing to export")
    rate = _rate(dataset, fps)
    observed, columns = _observations(dataset), _columns(dataset)
    building = building_site(out)
    try:
        with write_errors_explained(out):
            (building / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        written = _Written()
        _write_rows(dataset, building, rate, observed, columns, written)
        _write_meta(dataset, building, rate, robot_type, observed, columns, written, keep_period=fps is None)
        put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _rate(dataset: Dataset, fps: float | None) -> float:
    """Frames per second, an integer if it is one but for rounding: LeRobot expects integers."""
    if fps is None:
        if dataset.control_dt is None:
            raise UsageError(f"{dataset.path} does not know its control period: say --fps")
        fps = 1 / dataset.control_dt
    if not math.isfinite(fps) or not 1e-6 <= fps <= 1e6:
        raise UsageError(f"--fps must be a positive number, got {fps}")
    return round(fps) if round(fps) and abs(fps / round(fps) - 1) < 1e-9 else fps


def _observations(dataset: Dataset) -> dict[str, _Part]:
    """The feature of each observation entry; "" is an observation that is one array."""
    space = dataset.observation_space
    entries = space.spaces if isinstance(space, gym.spaces.Dict) else {"": space}
    parts: dict[str, _Part] = {}
    for entry, box in entries.items():
        shape = tuple(box.shape or ())
        image = box.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and max(shape) <= 2**14
        name = f"observation.{entry}" if entry else "observation.image" if image else "observation.state"
        if ".." in name or name.endswith("."):
            raise UsageError(f"{dataset.path}: LeRobot has no place for an observation entry called {entry!r}")
        if isinstance(box, gym.spaces.Text):
            parts[entry] = _Part(name=name, dtype="string", shape=(), encoding="text")
        elif image:
            parts[entry] = _Part(name=name, dtype="image", shape=shape, encoding="image")
        else:
            parts[entry] = _Part(name=name, dtype=str(np.dtype(box.dtype).name), shape=_few(shape, name))
    return parts


def _columns(dataset: Dataset) -> dict[str, _Part]:
    """The feature of each column."""
    parts: dict[str, _Part] = {}
    for name, column in dataset.columns.items():
        feature = name
        if name == "success" and column == Column(dtype="bool"):
            feature = "next.success"
        elif name in _OWN or name.split(".")[0] in ("observation", "action", "next", "column") or ".." in name:
            feature = f"column.{name.replace('..', '_')}"
        if any(part.name == feature for part in parts.values()):
            raise UsageError(f"{dataset.path}: two columns would both be called {feature!r}")
        if column.dtype == "text" or column.ragged:
            encoding = "text" if column.dtype == "text" else "list"
            parts[name] = _Part(name=feature, dtype="string", shape=(), encoding=encoding)
        else:
            parts[name] = _Part(name=feature, dtype=column.dtype, shape=_few(column.shape, name))
    return parts


def _few(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if len(shape) > 5:
        raise UsageError(f"LeRobot has no place for entries of more than five dimensions, as {name!r} has")
    return shape


# --- rows -------------------------------------------------------------------------------------------------------------


def _write_rows(
    dataset: Dataset,
    out: Path,
    rate: float,
    observed: Mapping[str, _Part],
    columns: Mapping[str, _Part],
    written: _Written,
) -> None:
    pq = need("pyarrow.parquet")
    writer, held, number = None, 0, -1
    try:
        for i in range(dataset.num_episodes):
            episode = dataset.episode(i)
            table = _table(dataset, episode, i, rate, observed, columns, written)
            if writer is None or held >= LARGEST_FILE:
                if writer is not None:
                    writer.close()
                number, held = number + 1, 0
                chunk, file = divmod(number, FILES_A_CHUNK)
                place = out / "data" / _PLACE.format(chunk_index=chunk, file_index=file)
                with write_errors_explained(place):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    writer = pq.ParquetWriter(place, table.schema, compression="snappy")
            with write_errors_explained(out):
                writer.write_table(table)
            held += table.nbytes
            _note_episode(episode, i, len(table), number, written)
    finally:
        if writer is not None:
            with write_errors_explained(out):
                writer.close()


def _note_episode(episode: Episode, i: int, rows: int, number: int, written: _Written) -> None:
    """Describe an episode in meta/episodes."""
    chunk, file = divmod(number, FILES_A_CHUNK)
    known = {
        "episode_index": i,
        "tasks": [_task(episode)],
        "length": rows,
        "data/chunk_index": chunk,
        "data/file_index": file,
        "dataset_from_index": written.frames,
        "dataset_to_index": written.frames + rows,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
        INFO: json.dumps(dict(episode.info)),
    }
    for name, value in known.items():
        written.episodes.setdefault(name, []).append(value)
    written.frames += rows


def _task(episode: Episode) -> str:
    task = episode.info.get("task")
    return task if isinstance(task, str) else ""


def _table(
    dataset: Dataset,
    episode: Episode,
    i: int,
    rate: float,
    observed: Mapping[str, _Part],
    columns: Mapping[str, _Part],
    written: _Written,
) -> Any:
    """The rows of an episode, one more than it has actions."""
    pa = need("pyarrow")
    steps = len(episode.reward)
    rows = steps + 1
    observation = episode.observation if isinstance(episode.observation, Mapping) else {"": episode.observation}
    last = np.arange(rows) == steps
    end = np.arange(rows) >= steps - 1
    frames = np.arange(rows)
    numbers: dict[str, Array] = {
        "action": _repeated(episode.action),
        "next.reward": np.append(np.asarray(episode.reward, np.float32), np.float32(0)),
        "next.done": end,
        "next.terminated": end & episode.terminated,
        "next.truncated": end & episode.truncated,
        FINAL: last,
        "timestamp": (frames / rate).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(rows, i),
        "index": written.frames + frames,
        "task_index": np.full(rows, written.tasks.setdefault(_task(episode), len(written.tasks))),
    }
    arrays = {name: _arrow(array, pa) for name, array in numbers.items()}
    found = [(part, observation[entry]) for entry, part in observed.items()]
    found += [
        (
            part,
            episode.columns[name] if dataset.columns[name].per == "observation" else _repeated(episode.columns[name]),
        )
        for name, part in columns.items()
    ]
    for part, values in found:
        if part.encoding == "number":
            numbers[part.name] = np.asarray(values)
            arrays[part.name] = _arrow(numbers[part.name], pa)
        elif part.encoding == "image":
            images = [{"bytes": content, "path": f"frame-{k:06d}.png"} for k, content in enumerate(_pngs(values))]
            arrays[part.name] = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            statistics = written.statistics.setdefault(part.name, _Statistics())
            for image in values:
                statistics.add(np.asarray(image).reshape(-1, image.shape[-1]))
        else:
            texts = [value if part.encoding == "text" else json.dumps(np.asarray(value).tolist()) for value in values]
            arrays[part.name] = pa.array(texts, pa.string())
    for name, array in numbers.items():
        written.statistics.setdefault(name, _Statistics()).add(array)
    return pa.table(arrays)


def _repeated(rows: Any) -> Any:
    """Rows of actions, the last one twice."""
    if isinstance(rows, list):
        return [*rows, rows[-1]]
    return np.concatenate([rows, rows[-1:]])


def _arrow(array: Array, pa: Any) -> Any:
    """Rows of numbers as LeRobot stores them: a value, a list of fixed length, or lists in lists."""
    array = np.asarray(array).astype(array.dtype.newbyteorder("="), copy=False)
    shape = array.shape[1:]
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    if shape in ((), (1,)):
        return flat
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(flat, shape[0])
    for length in shape[::-1]:
        flat = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, length), pa.int32()), flat)
    return flat


def _pngs(images: Any) -> Iterator[bytes]:
    import av

    height, width = images.shape[1:3]
    codec: Any = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "rgb24", Fraction(1, 1)
    for image in images:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        yield b"".join(bytes(packet) for packet in codec.encode(frame))


# --- metadata ---------------------------------------------------------------------------------------------------------


def _write_meta(
    dataset: Dataset,
    out: Path,
    rate: float,
    robot_type: str,
    observed: Mapping[str, _Part],
    columns: Mapping[str, _Part],
    written: _Written,
    *,
    keep_period: bool,
) -> None:
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    space = dataset.action_space
    action = _Part(name="action", dtype=str(np.dtype(space.dtype).name), shape=_few(tuple(space.shape or ()), "action"))
    features = {part.name: part.spec() for part in (*observed.values(), action)}
    features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    features |= {name: {"dtype": "bool", "shape": [1], "names": None} for name in _FLAGS}
    features |= {part.name: part.spec() for part in columns.values()}
    kinds = {name: "float32" if name == "timestamp" else "int64" for name in INDICES}
    features |= {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in kinds.items()}
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": dataset.num_episodes,
        "total_frames": written.frames,
        "total_tasks": len(written.tasks),
        "chunks_size": FILES_A_CHUNK,
        "data_files_size_in_mb": LARGEST_FILE // 2**20,
        "video_files_size_in_mb": 200,
        "fps": rate,
        "splits": {"train": f"0:{dataset.num_episodes}"},
        "data_path": f"data/{_PLACE}",
        "video_path": None,
        "features": features,
    }
    image = {part.name for part in observed.values() if part.encoding == "image"}
    statistics = {n: found.json(n in image, written.frames) for n, found in written.statistics.items()}
    ours = {
        "format": 1,
        "env": dataset.env,
        "control_dt": dataset.control_dt if keep_period else 1 / rate,
        "reference": dataset.reference,
        "provenance": dataset.provenance,
        "observation_space": _described(dataset.observation_space),
        "action_space": describe_action_space(dataset.action_space, str(dataset.path)),
        "observation": {entry: part.name for entry, part in observed.items()},
        "columns": {
            name: {
                "feature": part.name,
                "dtype": dataset.columns[name].dtype,
                "shape": list(dataset.columns[name].shape),
                "ragged": dataset.columns[name].ragged,
                "per": dataset.columns[name].per,
            }
            for name, part in columns.items()
        },
    }
    for name, value in (("info.json", info), ("stats.json", statistics), (Path(OURS).name, ours)):
        write_durably(out / "meta" / name, json.dumps(value, indent=2).encode())
    with write_errors_explained(out):
        episodes = pa.table(
            {
                n: pa.array(values, pa.list_(pa.string()) if n == "tasks" else None)
                for n, values in written.episodes.items()
            }
        )
        pq.write_table(episodes, out / "meta" / "episodes" / _PLACE.format(chunk_index=0, file_index=0))
        pq.write_table(_tasks(written.tasks), out / "meta" / "tasks.parquet")


def _described(space: gym.Space[Any]) -> dict[str, Any]:
    """The space as `Ours` of the importer reads it."""
    if not isinstance(space, gym.spaces.Dict):
        return describe_observation_space(space, "the dataset")
    entries = {
        name: {"type": "Text", "max_length": entry.max_length}
        if isinstance(entry, gym.spaces.Text)
        else describe_observation_space(entry, "the dataset")
        for name, entry in space.spaces.items()
    }
    return {"type": "Dict", "entries": entries}


def _tasks(tasks: Mapping[str, int]) -> Any:
    """Numbers by text; LeRobot looks texts up in the index of a table of pandas', which these words declare."""
    pa = need("pyarrow")
    index = "__index_level_0__"

    def described(name: Any, field_name: str, kind: str, stored: str) -> dict[str, Any]:
        return {"name": name, "field_name": field_name, "pandas_type": kind, "numpy_type": stored, "metadata": None}

    words = {
        "index_columns": [index],
        "column_indexes": [described(None, "None", "unicode", "object") | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [
            described("task_index", "task_index", "int64", "int64"),
            described(None, index, "unicode", "object"),
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table(
        {"task_index": pa.array(list(tasks.values()), pa.int64()), index: pa.array(list(tasks), pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(words)})
