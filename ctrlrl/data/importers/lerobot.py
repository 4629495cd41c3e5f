"""LeRobotDataset v3.0, v2.1 and v2.0: folders of Parquet files and videos, read without the `lerobot` package.

What becomes of a feature: `observation.NAME` is the observation entry NAME (a single one that is no image is the whole
observation), `action` the action, `next.reward` the reward, or `next.success` where there is none; `next.success` and
all other features of numbers are columns. The text of an episode's task is in its info.

The format has a row for each action, and none for the observation after the last one. It does not say either whether
the task ended or was cut off. So an episode is taken as terminated where `next.success` is true in its last row, and
then the observation of that row stands in for the one after it (nothing is bootstrapped from it, and the reward for the
success would be lost otherwise). Else it was cut off: the last row serves as the final observation, and its action and
reward are dropped. `next.done` ends an episode as well. Where there is no `next.success`, done episodes that are
shorter than --max-episode-steps are taken as terminated, if that is given.

Datasets that ctrlrl exported say more: see `ctrlrl/data/export_lerobot.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.arrow import explained, parquet, to_numpy
from ctrlrl.data.importers.base import Format, ImportOptions, Source
from ctrlrl.data.importers.frames import Video, decode_image, pixels
from ctrlrl.data.importers.lerobot_meta import LARGEST_JSON, Entry, Feature, Metadata
from ctrlrl.data.importers.rows import (
    BLOCK,
    ActionRange,
    Array,
    acted,
    chosen,
    column_name,
    flags,
    json_object,
    observation_box,
    observed,
    refuse_unused,
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Column, Episode
from ctrlrl.errors import UsageError

INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
FINAL = "ctrlrl.final"
"""A feature of exported datasets: true in the row that holds the final observation only."""
TOLERANCE = 0.25
"""By which part of a frame's time it may be early or late."""
LONGEST_TEXT = 2**16
_FLAGS = ("next.done", "next.success", "next.terminated", "next.truncated", FINAL)


def looks_like(path: Path) -> bool:
    """Whether it is a folder with a LeRobotDataset's meta/info.json."""
    try:
        file = path / "meta" / "info.json"
        if not file.is_file() or file.stat().st_size > LARGEST_JSON:
            return False
        return {"codebase_version", "features"} <= json_object(file.read_bytes(), "it").keys()
    except (OSError, UsageError):
        return False


def read(path: Path, options: ImportOptions) -> Source:
    """Read a LeRobotDataset.

    Raises:
        UsageError: it is none, of a version that is not known, or its files do not agree.
    """
    refuse_unused(options, "lerobot", "max_episode_steps")
    return _Reader(path, options).source()


class _Reader:
    def __init__(self, path: Path, options: ImportOptions) -> None:
        self.path, self.options = path, options
        self.notes: list[str] = []
        self.meta = Metadata(path)
        self.features, self.ours, self.fps = self.meta.features, self.meta.ours, self.meta.fps
        self._sort()
        self.tasks = self.meta.tasks()
        self.entries = self.meta.entries([feature.name for feature in self._videos()])
        self._check_files()
        self._check_images()

    def _sort(self) -> None:
        """Which feature is what."""
        path, features = self.path, self.features
        missing = [name for name in ("action", "timestamp", "frame_index", "episode_index") if name not in features]
        if missing:
            raise UsageError(f"{path} has no feature {missing[0]!r}. It has: {', '.join(features)}")
        if not features["action"].is_number:
            raise UsageError(f"{path}: action is of dtype {features['action'].dtype}; expected numbers")
        named = {name: f for name, f in features.items() if name == "observation" or name.startswith("observation.")}
        if not named:
            raise UsageError(f"{path} has no observations: no feature is called observation.NAME")
        self.whole = False
        if self.ours is not None:
            self.observed = {entry: features[name] for entry, name in self.ours.observation.items()}
            self.whole = "" in self.observed
        else:
            self.observed = {
                name.removeprefix("observation").lstrip(".") or "observation": f for name, f in named.items()
            }
            if len(self.observed) == 1 and named.keys() <= {"observation", "observation.state"}:
                self.observed, self.whole = {"": next(iter(named.values()))}, True
        for entry, feature in self.observed.items():
            if feature.dtype == "string" and self.whole:
                raise UsageError(f"{path}: the only observation is a text, {entry or feature.name}")
        self.flags = [name for name in _FLAGS if name in features]
        used = {"action", "next.reward", *INDICES, *self.flags, *(f.name for f in self.observed.values())}
        if self.ours is not None:
            self.columns = dict(self.ours.columns)
        else:
            others = {
                column_name(n): f for n, f in features.items() if n not in used and f.dtype not in ("image", "video")
            }
            if "next.success" in features:
                others["success"] = features["next.success"]
            self.columns = {name: (feature, _column(feature)) for name, feature in others.items()}
            left = [n for n, f in features.items() if n not in used and f.dtype in ("image", "video")]
            if left:
                self.notes.append(f"left out, as images are kept in observations only: {', '.join(left)}")
        kept = chosen(self.columns, self.options, path)
        if self.options.columns is None and self.ours is None:
            kept = [name for name in kept if self.columns[name][0].is_number]
            texts = self.columns.keys() - set(kept)
            if texts:
                self.notes.append(f"texts were left out: {', '.join(sorted(texts))} (--columns keeps those it names)")
        self.columns = {name: self.columns[name] for name in kept}
        for what, feature in self._stored().items():
            if not feature.is_number and what in ("next.reward", *INDICES, *self.flags):
                raise UsageError(f"{path}: {what} is of dtype {feature.dtype}; expected numbers")

    def _stored(self) -> dict[str, Feature]:
        """Features that are read from the rows of the Parquet files, by name."""
        names = ["action", "timestamp", "frame_index", "episode_index", *self.flags]
        names += [name for name in ("next.reward", "task_index") if name in self.features]
        names += [f.name for f, _ in self.columns.values()] + [f.name for f in self.observed.values()]
        return {name: self.features[name] for name in dict.fromkeys(names) if self.features[name].dtype != "video"}

    def _videos(self) -> list[Feature]:
        return [feature for feature in self.observed.values() if feature.dtype == "video"]

    def _check_files(self) -> None:
        """Compare the rows that files have with the episodes that should be in them, and look for their columns."""
        self.files: dict[Path, list[Entry]] = {}
        previous = None
        for entry in self.entries:
            if entry.file in self.files and entry.file != previous:
                raise UsageError(f"{self.path}: episode {entry.index} goes on in {entry.file}, after others elsewhere")
            self.files.setdefault(entry.file, []).append(entry)
            previous = entry.file
        for file, entries in self.files.items():
            opened, _ = parquet(file)
            with contextlib.closing(opened), explained(str(file)):
                there, rows = set(opened.schema_arrow.names), opened.metadata.num_rows
            expected = sum(entry.length for entry in entries)
            if rows != expected:
                raise UsageError(
                    f"{file} has {rows:,} rows, and the episodes in it are {expected:,} frames long: the dataset was "
                    "not written to its end, or not fetched in full"
                )
            for name in self._stored():
                if name not in there:
                    raise UsageError(f"{file} has no column {name!r}, which is among the features in meta/info.json")
        for entry in self.entries:
            for video, _ in entry.videos.values():
                if not video.is_file():
                    raise UsageError(f"there is no video {video}, of episode {entry.index}: fetch the videos, too")

    def _check_images(self) -> None:
        """Look at one of each kind: whether it is of the declared size, of which a space is made."""
        entry = self.entries[0]
        for feature in self._videos():
            Video(entry.videos[feature.name][0], pixels(feature.shape, feature.name)).close()
        images = {f.name: f for f in self.observed.values() if f.dtype == "image"}
        with contextlib.closing(self._blocks(entry.file, images)) as blocks:
            block = next(blocks, {}) if images else {}
        for name, column in block.items():
            self._images(images[name], [column[:1]], 1, f"{self.path}: {name}")

    def _blocks(self, file: Path, features: Mapping[str, Feature]) -> Generator[dict[str, Any]]:
        """Rows of a file, each column an array of NumPy's or, of images, of Arrow's."""
        width = sum(8 * math.prod(f.shape) for f in features.values() if f.dtype != "string") + 64
        opened, _ = parquet(file)
        with contextlib.closing(opened):
            with explained(str(file)):
                batches = opened.iter_batches(max(1, min(2**16, BLOCK // width)), columns=list(features))
            first = 0
            while True:
                with explained(str(file)):
                    batch = next(batches, None)
                if batch is None:
                    return
                block = {}
                for name, feature in features.items():
                    with explained(f"{file}: {name}"):
                        column = batch.column(name)
                    block[name] = column if feature.dtype == "image" else self._numbers(column, feature, file, first)
                yield block
                first += batch.num_rows

    def _numbers(self, column: Any, feature: Feature, file: Path, first: int) -> Array:
        """(n, *shape), or (n,) of a single value, in the declared dtype."""
        where = f"{file}: {feature.name}"
        with explained(where):
            array = to_numpy(column, where, first)
        if feature.dtype == "string":
            if array.dtype != object:
                raise UsageError(f"{where} holds {array.dtype}; meta/info.json declares texts")
            return array
        if feature.shape == (1,):
            array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        if array.shape[1:] != (() if feature.shape == (1,) else feature.shape):
            raise UsageError(f"{where} has entries of {array.shape[1:]}; meta/info.json declares {feature.shape}")
        wanted = np.dtype(feature.dtype)
        if array.dtype.kind != wanted.kind and not {array.dtype.kind, wanted.kind} <= set("iu"):
            raise UsageError(f"{where} is of {array.dtype}; meta/info.json declares {feature.dtype}")
        with np.errstate(over="ignore"):
            out = array.astype(wanted)
        if wanted.kind in "iu" and not np.array_equal(out, array):
            raise UsageError(f"{where} has numbers that {feature.dtype}, as meta/info.json declares it, cannot hold")
        return out

    def source(self) -> Source:
        """What the dataset holds."""
        notes, features = self.notes, self.features
        reach, at = ActionRange(self.path), 0
        for file in self.files:
            for block in self._blocks(file, {"action": features["action"]}):
                actions = acted(block["action"], f"{file}: action")
                reach.add(actions, at)
                at += len(actions)
        success = "next.success" in features
        if "next.reward" not in features:
            notes.append(f"there is no next.reward: {'next.success' if success else '0'} was taken as the reward")
        ends = [name for name in ("next.terminated", "next.success") if name in features]
        if self.options.max_episode_steps is not None and (ends or "next.done" not in features):
            what = f"has {ends[0]}, which says where the task ended" if ends else "has no next.done"
            raise UsageError(f"{self.path} {what}: leave --max-episode-steps out")
        if not ends:
            marked = "next.done" in features and self.options.max_episode_steps is None
            notes.append(
                "there is no next.success: every episode was taken as cut off"
                + (" (with --max-episode-steps, shorter ones that are done are taken as ended)" if marked else "")
            )
        if self.ours is None:
            observation_space: gym.Space[Any] = self._space()
            action_space = reach.space(notes)
        else:
            observation_space, action_space = self.ours.observation_space, self.ours.action_space
        known = self.ours.known if self.ours is not None else {}
        names = {
            n: f.get("names")
            for n, f in self.meta.info["features"].items()
            if n == "action" or n.startswith("observation")
        }
        return Source(
            observation_space=observation_space,
            action_space=action_space,
            episodes=self._read(),
            env=self.options.env or known.get("env"),
            control_dt=known.get("control_dt") or 1 / self.fps,
            columns={name: column for name, (_, column) in self.columns.items()},
            reference=known.get("reference", {}),
            provenance={
                "format": "lerobot",
                "version": self.meta.version,
                "file": self.path.name,
                "robot_type": self.meta.info.get("robot_type"),
                "fps": self.fps,
                "names": names,
                **({"before": known["provenance"]} if "provenance" in known else {}),
            },
            notes=notes,
        )

    def _space(self) -> gym.Space[Any]:
        boxes: dict[str, gym.Space[Any]] = {}
        for entry, feature in self.observed.items():
            if feature.dtype == "string":
                boxes[entry] = gym.spaces.Text(LONGEST_TEXT)
            elif feature.is_number:
                boxes[entry] = observation_box(observed(np.empty((0, *feature.shape), feature.dtype), feature.name))
            else:
                boxes[entry] = gym.spaces.Box(0, 255, feature.shape, np.uint8)
        return boxes[""] if self.whole else gym.spaces.Dict(boxes)

    def _read(self) -> Iterator[Episode]:
        tally, videos = _Tally(), {feature.name: _Player(feature, self) for feature in self._videos()}
        try:
            for file, entries in self.files.items():
                with contextlib.closing(self._blocks(file, self._stored())) as blocks:
                    held: list[dict[str, Any]] = []
                    for entry in entries:
                        rows = self._take(blocks, held, entry)
                        yield from self._episodes(entry, rows, videos, tally)
        finally:
            for video in videos.values():
                video.close()
        tally.report(self.path, self.notes)

    def _take(self, blocks: Iterator[dict[str, Any]], held: list[dict[str, Any]], entry: Entry) -> dict[str, Any]:
        """The rows of an episode; what is left of the last block stays in `held`."""
        parts: list[dict[str, Any]] = []
        missing = entry.length
        while missing:
            block = held.pop() if held else next(blocks, None)
            if block is None:
                raise UsageError(f"{entry.file} ends within episode {entry.index}: it is damaged")
            here = min(missing, len(block["action"]))
            parts.append({name: column[:here] for name, column in block.items()})
            if here < len(block["action"]):
                held.append({name: column[here:] for name, column in block.items()})
            missing -= here
        return {
            name: [part[name] for part in parts]
            if self.features[name].dtype == "image"
            else np.concatenate([part[name] for part in parts])
            for name in parts[0]
        }

    def _episodes(
        self, entry: Entry, rows: dict[str, Any], videos: Mapping[str, _Player], tally: _Tally
    ) -> Iterator[Episode]:
        where = f"{self.path}: episode {entry.index}"
        self._check_rows(entry, rows, where)
        seen = {name: self._observed(f, entry, rows, videos, where) for name, f in self.observed.items()}
        length, stored = entry.length, rows["action"]
        shape = self.ours.shapes.get("action") if self.ours is not None else None
        action = acted(stored, f"{where}: action") if shape is None else stored.reshape(length, *shape)
        said = {name: flags(rows[name], f"{where}: {name}") for name in self.flags}
        success = said.get("next.success", np.zeros(length, bool))
        reward = rewarded(rows["next.reward"], f"{where}: next.reward") if "next.reward" in rows else success
        reward = reward.astype(np.float64) if reward.dtype.kind in "iub" else reward
        named = [(self.observed[entry].name, array) for entry, array in seen.items()]
        for name, array in [("action", action), ("next.reward", reward), *named]:
            if isinstance(array, np.ndarray):
                require_finite(array, f"{where}: {name}")
        columns = {name: self._column(name, rows, where) for name in self.columns}
        info = dict(entry.info) if self.ours is not None else self._info(entry, rows, where)

        last = length - 1 if FINAL in said else length  # rows with an action
        if FINAL in said and (said[FINAL][:-1].any() or not said[FINAL][-1]):
            raise UsageError(f"{where}: {FINAL} must be true in its last row, and in no other")
        if not last:
            tally.too_short += 1
            return
        done = said.get("next.done", np.zeros(length, bool))
        done = done | said.get("next.terminated", done) | said.get("next.truncated", done)
        ends = np.flatnonzero(done[: last - 1])
        if len(ends) and FINAL in said:
            raise UsageError(f"{where} ends in row {ends[0]} already, and goes on")
        tally.split += bool(len(ends))
        start = 0
        for end in [*ends.tolist(), last - 1]:
            terminated = self._is_terminated(said, end, end + 1 - start)
            seen_until, steps = end + 1, end + 1 - start
            if FINAL in said:
                seen_until += 1
            elif terminated:
                tally.stood_in += 1
            else:
                tally.dropped += 1
                tally.lost += bool(reward[end])
                steps -= 1
            piece = slice(start, start + steps)
            if steps:
                observation = {name: _with_final(array[start:seen_until], steps + 1) for name, array in seen.items()}
                tally.episodes += 1
                yield Episode(
                    observation=observation[""] if self.whole else observation,
                    action=action[piece],
                    reward=reward[piece],
                    terminated=terminated,
                    truncated=bool(said["next.truncated"][end]) if "next.truncated" in said else not terminated,
                    columns={
                        name: column[start : start + steps + (self.columns[name][1].per == "observation")]
                        for name, column in columns.items()
                    },
                    info=info,
                )
            else:
                tally.too_short += 1
            start = end + 1

    def _is_terminated(self, said: Mapping[str, Array], end: int, steps: int) -> bool:
        if "next.terminated" in said:
            return bool(said["next.terminated"][end])
        if "next.success" in said:
            return bool(said["next.success"][end])
        limit = self.options.max_episode_steps
        return limit is not None and bool(said["next.done"][end]) and steps < limit

    def _check_rows(self, entry: Entry, rows: dict[str, Any], where: str) -> None:
        """Compare what rows say of themselves with the metadata."""
        if (rows["episode_index"] != entry.index).any():
            row = int(np.argmax(rows["episode_index"] != entry.index))
            raise UsageError(f"{where}: row {row} of it in {entry.file} is of episode {rows['episode_index'][row]}")
        if (rows["frame_index"] != np.arange(entry.length)).any():
            row = int(np.argmax(rows["frame_index"] != np.arange(entry.length)))
            raise UsageError(f"{where}: frame {row} in {entry.file} is called frame {rows['frame_index'][row]}")
        times = rows["timestamp"].astype(np.float64)
        if not np.isfinite(times).all():
            raise UsageError(f"{where}: a timestamp is NaN or infinite")
        steps = np.diff(times)
        allowed = TOLERANCE / self.fps + 2 * float(np.spacing(np.float32(np.abs(times).max())))
        off = np.flatnonzero(np.abs(steps - 1 / self.fps) > allowed)
        if len(off):
            raise UsageError(
                f"{where}: frame {off[0] + 1} comes {steps[off[0]]:.4f} s after the one before it; at {self.fps:g} "
                f"frames per second, as meta/info.json has it, that is {1 / self.fps:.4f} s. Frames were lost, or fps "
                "is wrong"
            )

    def _observed(
        self, feature: Feature, entry: Entry, rows: dict[str, Any], videos: Mapping[str, _Player], where: str
    ) -> Any:
        where = f"{where}: {feature.name}"
        shape = self.ours.shapes.get(feature.name) if self.ours is not None else None
        match feature.dtype:
            case "string":
                return [str(text) for text in rows[feature.name]]
            case "video":
                return videos[feature.name].frames(entry, rows["timestamp"].astype(np.float64))
            case "image":
                return self._images(feature, rows[feature.name], entry.length, where)
            case _:
                array = rows[feature.name]
                return observed(array, where) if shape is None else array.reshape(len(array), *shape)

    def _images(self, feature: Feature, parts: list[Any], length: int, where: str) -> Array:
        size, row = pixels(feature.shape, where), 0
        out: Array | None = None
        for part in parts:
            with explained(where):
                images = part.field("bytes") if str(part.type).startswith("struct") else part
            for value in images:
                with explained(where):
                    content = value.as_py()
                if not isinstance(content, bytes):
                    raise UsageError(f"{where}: frame {row} holds no image, but {type(content).__name__}")
                image = decode_image(content, size, f"{where}, frame {row}")
                with explained(where):
                    out = np.empty((length, *size), np.uint8) if out is None else out
                out[row] = image
                row += 1
        if out is None:
            raise UsageError(f"{where}: there is no image")
        return out

    def _column(self, name: str, rows: dict[str, Any], where: str) -> Any:
        feature, column = self.columns[name]
        where = f"{where}: {feature.name}"
        array = rows[feature.name]
        if feature.dtype == "string":
            return [_entry(text, column, where) for text in array]
        require_finite(array, where, remedy="Leave it out: name the others with --columns")
        return array.reshape(len(array), *column.shape)

    def _info(self, entry: Entry, rows: dict[str, Any], where: str) -> dict[str, Any]:
        tasks = [*entry.tasks]
        if "task_index" in rows:
            indices = list(dict.fromkeys(rows["task_index"].tolist()))
            unknown = [index for index in indices if index not in self.tasks]
            if unknown:
                raise UsageError(f"{where} has task {unknown[0]}, which is not among the {len(self.tasks)} in meta/")
            tasks = [self.tasks[index] for index in indices]
        if not tasks:
            return {}
        return {"task": tasks[0]} | ({"tasks": tasks} if len(tasks) > 1 else {})


def _with_final(array: Any, rows: int) -> Any:
    """The observations of an episode, the last one twice where none follows it."""
    if len(array) == rows:
        return array
    return [*array, array[-1]] if isinstance(array, list) else np.concatenate([array, array[-1:]])


@dataclass
class _Tally:
    """What was decided on the way."""

    episodes: int = 0
    stood_in: int = 0
    dropped: int = 0
    lost: int = 0
    """Rewards other than 0 that were dropped."""
    too_short: int = 0
    split: int = 0

    def report(self, path: Path, notes: list[str]) -> None:
        if not self.episodes:
            raise UsageError(f"{path} holds no transition: no episode has an observation after its first action")
        if self.stood_in:
            notes.append(
                f"LeRobot keeps no observation after the last action: in {self.stood_in:,} terminated episodes the "
                "last one that there is stands in for it (nothing is bootstrapped from it)"
            )
        if self.dropped:
            lost = f" ({self.lost:,} of these rewards were not 0)" if self.lost else ""
            notes.append(
                f"LeRobot keeps no observation after the last action: of {self.dropped:,} episodes that were cut off, "
                f"the last action and its reward were dropped{lost}"
            )
        if self.too_short:
            notes.append(f"{self.too_short:,} episodes held a single observation, and were left out")
        if self.split:
            notes.append(f"next.done is true within {self.split:,} episodes, before their ends: they were cut there")


class _Player:
    """The videos of a feature, one after the other."""

    def __init__(self, feature: Feature, reader: _Reader) -> None:
        self._feature, self._reader = feature, reader
        self._video: Video | None = None
        self._needed: Counter[Path] = Counter()
        for entry in reader.entries:
            self._needed[entry.videos[feature.name][0]] += entry.length

    def frames(self, entry: Entry, times: Array) -> Array:
        path, begins = entry.videos[self._feature.name]
        if self._video is None or self._video.path != path:
            self.close()
            self._video = Video(path, pixels(self._feature.shape, self._feature.name))
            needed, there = self._needed[path], self._video.count
            if there and (there < needed or (self._reader.meta.version != "v3.0" and there != needed)):
                raise UsageError(
                    f"{path} has {there:,} frames, and the episodes in it {needed:,}: it was not written to its end, "
                    "or not fetched in full"
                )
        with explained(str(path)):
            return self._video.frames(times + begins, TOLERANCE / self._reader.fps)

    def close(self) -> None:
        if self._video is not None:
            self._video.close()
        self._video = None


def _column(feature: Feature) -> Column:
    if feature.dtype == "string":
        return Column(dtype="text")
    return Column(dtype=feature.dtype, shape=() if feature.shape == (1,) else feature.shape)


def _entry(text: str, column: Column, where: str) -> Any:
    """A text, or the array that it lists."""
    if column.dtype == "text":
        return str(text)
    try:
        array = np.array(json.loads(text), column.dtype)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{where} is no list of numbers ({error})") from None
    return array.reshape(0, *column.shape) if not array.size else array


FORMAT = Format(
    name="lerobot",
    title="LeRobotDataset v3.0 and v2.1: a folder of Parquet files and videos",
    detect=looks_like,
    read=read,
)
