"""Where Minari keeps episodes: one HDF5 file, or a folder of Arrow or Parquet files for each."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.arrow import explained, parquet, to_numpy
from ctrlrl.data.importers.base import need
from ctrlrl.data.importers.hdf5 import Hdf5, Leaf
from ctrlrl.data.importers.minari_spaces import Entry
from ctrlrl.data.importers.rows import Array, inside, json_object, numbers
from ctrlrl.errors import UsageError

Entries: TypeAlias = "Array | list[str]"


class Store(Protocol):
    """Where episodes lie, in one of Minari's layouts."""

    decoded: bool
    """Whether any JPEG image was met."""

    def steps(self, number: int) -> int:
        """T, as the number of rewards has it."""

    def entry(self, number: int, part: str, entry: Entry) -> Entries:
        """An entry of `observations` or `actions`."""

    def plain(self, number: int, part: str) -> Array:
        """`rewards`, `terminations` or `truncations`."""

    def infos(self, number: int) -> Mapping[str, Any]:
        """The infos, by their names with dots; each is read by `info`."""

    def info(self, info: Any) -> Entries:
        """The rows of one of them."""

    def seed(self, number: int) -> Any:
        """The seed the episode was reset with."""

    def close(self) -> None:
        """Close the files."""


class Hdf5Store:
    """main_data.hdf5: a group for each episode."""

    def __init__(self, home: Path, count: int) -> None:
        self.decoded = False
        self._file = Hdf5(inside(home / "main_data.hdf5", home))
        try:
            there = self._file.names(self._file.root)
            expected = {f"episode_{i}" for i in range(min(count, len(there) + 1))}
            if len(there) != count or set(there) != expected:
                raise UsageError(
                    f"{home}: metadata.json counts {count:,} episodes, main_data.hdf5 holds {len(there):,} groups: "
                    "expected episode_0, episode_1 and so on. Writing it was cut off, or it is damaged: fetch it anew"
                )
        except BaseException:
            self._file.close()
            raise
        self._group: tuple[int, Any] = (-1, None)

    def _episode(self, number: int) -> Any:
        if self._group[0] != number:
            self._group = (number, self._file.group(self._file.root, f"episode_{number}"))
        return self._group[1]

    def steps(self, number: int) -> int:
        return self._file.leaf(self._episode(number), "rewards").rows

    def plain(self, number: int, part: str) -> Array:
        return self._file.leaf(self._episode(number), part)[:]

    def entry(self, number: int, part: str, entry: Entry) -> Entries:
        node, name = self._episode(number), part
        for key in entry.path:
            for step in [f"_index_{key}"] if isinstance(key, int) else key.split("/"):
                node, name = self._file.group(node, name), step
        leaf = self._file.leaf(node, name)
        if isinstance(entry.space, gym.spaces.Text):
            return _texts(leaf)
        if entry.may_be_jpeg and leaf.shape[1:] != entry.shape:
            self.decoded = True
            frames = leaf.strings() if leaf.is_bytes else (row.tobytes() for row in leaf[:])
            return _images(frames, leaf.rows, entry, leaf.where)
        return leaf[:]

    def infos(self, number: int) -> Mapping[str, Leaf]:
        group = self._episode(number)
        if "infos" not in self._file.names(group):
            return {}
        return {n: leaf for n, leaf in self._file.leaves(self._file.group(group, "infos")).items() if leaf.shape}

    def info(self, info: Leaf) -> Entries:
        return _texts(info) if info.is_text else info[:]

    def seed(self, number: int) -> Any:
        return self._file.attribute(self._episode(number), "seed")

    def close(self) -> None:
        self._file.close()


class ArrowStore:
    """A folder for each episode, with part-0 and perhaps more; the row after the last step is padding."""

    def __init__(self, home: Path, count: int, layout: str) -> None:
        self.decoded = False
        self._home, self._layout = home, layout
        self._pa = need("pyarrow")
        self._ipc = need("pyarrow.ipc")
        folders = [p.name for p in home.iterdir() if p.is_dir() and p.name.isdigit()]
        if len(folders) != count or {int(name) for name in folders} != set(range(len(folders))):
            raise UsageError(
                f"{home}: metadata.json counts {count:,} episodes, and there are {len(folders):,} folders: expected 0, "
                "1 and so on. Writing it was cut off, or it is damaged: fetch it anew"
            )
        self._table: tuple[int, Any] = (-1, None)

    def _episode(self, number: int) -> Any:
        """Its struct array of all columns, of T + 1 rows."""
        if self._table[0] != number:
            folder = inside(self._home / str(number), self._home)
            parts = [p for p in folder.iterdir() if re.fullmatch(rf"part-\d+\.{self._layout}", p.name)]
            if not parts:
                raise UsageError(f"{folder} holds no part-0.{self._layout}")
            parts.sort(key=lambda p: int(p.stem.removeprefix("part-")))
            tables = [self._read(inside(part, self._home)) for part in parts]
            with explained(str(folder)):
                table = self._pa.concat_tables(tables)
                table.validate(full=True)
                self._table = (number, table.combine_chunks().to_struct_array().combine_chunks())
        return self._table[1]

    def _read(self, part: Path) -> Any:
        if self._layout == "parquet":
            file, _ = parquet(part)
            with explained(str(part)):
                try:
                    return file.read()
                finally:
                    file.close()
        with explained(str(part)), self._pa.memory_map(str(part)) as content:
            return self._ipc.open_file(content).read_all()

    def _column(self, number: int, name: str) -> Any:
        table = self._episode(number)
        names = [table.type.field(i).name for i in range(table.type.num_fields)]
        if name not in names:
            raise UsageError(f"{self._home}: episode {number} has no {name}; there: {', '.join(names)}")
        return table.field(name)

    def steps(self, number: int) -> int:
        return len(self._column(number, "rewards")) - 1

    def plain(self, number: int, part: str) -> Array:
        return to_numpy(self._column(number, part)[:-1], f"{self._home}: episode {number}: {part}")

    def entry(self, number: int, part: str, entry: Entry) -> Entries:
        what = f"{self._home}: episode {number}: {part}"
        array = self._column(number, part)
        for key in entry.path:
            if not self._pa.types.is_struct(array.type) or array.type.get_field_index(str(key)) < 0:
                raise UsageError(f"{what} has no {key!r}; its type is {array.type}")
            array = array.field(str(key))
        if part == "actions":
            array = array[:-1]
        if isinstance(entry.space, gym.spaces.Text):
            texts = to_numpy(array, what)
            if texts.dtype.kind != "O":
                raise UsageError(f"{what} is of {array.type}; expected texts")
            return [str(text) for text in texts]
        if self._pa.types.is_binary(array.type):
            self.decoded = True
            return _images((frame.as_py() for frame in array), len(array), entry, what)
        rows = numbers(to_numpy(array, what), what)
        return rows.reshape(len(rows), *entry.shape) if math.prod(rows.shape[1:]) == math.prod(entry.shape) else rows

    def infos(self, number: int) -> Mapping[str, Any]:
        table = self._episode(number)
        if table.type.get_field_index("infos") < 0:
            return {}
        found: dict[str, Any] = {}

        def visit(array: Any, path: tuple[str, ...]) -> None:
            for i in range(array.type.num_fields):
                field = array.type.field(i)
                if self._pa.types.is_struct(field.type):
                    visit(array.field(i), (*path, field.name))
                elif not self._pa.types.is_null(field.type):
                    found[".".join((*path, field.name))] = (field, array.field(i), number)

        array = table.field("infos")
        if self._pa.types.is_struct(array.type):
            visit(array, ())
        return found

    def info(self, info: Any) -> Entries:
        field, array, number = info
        what = f"{self._home}: episode {number}: infos {field.name}"
        rows = to_numpy(array, what)
        if rows.dtype.kind == "O":
            return [str(text) for text in rows]
        shape = [
            part for part in (field.metadata or {}).get(b"shape", b"").decode("ascii", "replace").split(",") if part
        ]
        if field.metadata is not None and b"shape" in field.metadata and all(part.isdigit() for part in shape):
            shaped = tuple(map(int, shape))
            if math.prod(shaped) == math.prod(rows.shape[1:]):
                rows = rows.reshape(len(rows), *shaped)
        return numbers(rows, what)

    def seed(self, number: int) -> Any:
        file = self._home / str(number) / "metadata.json"
        return json_object(inside(file, self._home).read_bytes(), str(file)).get("seed") if file.is_file() else None

    def close(self) -> None:
        self._table = (-1, None)


def _texts(leaf: Leaf) -> list[str]:
    try:
        return [text.decode() for text in leaf.strings()]
    except UnicodeDecodeError:
        raise UsageError(f"{leaf.where} holds a text that is not UTF-8") from None


def _images(frames: Iterator[bytes], count: int, entry: Entry, what: str) -> Array:
    """JPEG images of the entry's shape, decoded."""
    image = need("PIL.Image")
    out = np.empty((count, *entry.shape), np.uint8)
    for i, frame in enumerate(frames):
        try:
            opened = image.open(io.BytesIO(frame), formats=["JPEG"])
            if (opened.height, opened.width) == entry.shape[:2]:  # looked at before it is decoded
                decoded = np.asarray(opened)
                if decoded.shape == entry.shape:
                    out[i] = decoded
                    continue
            shape: Any = (opened.height, opened.width, *([] if opened.mode == "L" else [len(opened.getbands())]))
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError):
            raise UsageError(f"{what}: image {i} is no JPEG, or is damaged") from None
        raise UsageError(f"{what}: image {i} has shape {shape}; its space says {entry.shape}")
    return out
