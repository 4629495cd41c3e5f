"""HDF5 files of which nothing is trusted: what they hold is looked at before it is read.

A file may name more than it holds: links into other files, arrays put together from other files or stored outside,
shapes of any size that no byte was ever written for, groups that contain themselves, texts and arrays of varying length
that share their bytes. Data is therefore reached one link at a time, hard links only; arrays are of numbers, with as
many bytes stored as they declare, or compressed, and then all that is looked at in a file may be at most `RATIO` times
the file. Rows are read in blocks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ctrlrl.data.importers.base import need
from ctrlrl.data.importers.rows import BLOCK, Array, numbers, size
from ctrlrl.errors import UsageError, nearest

MAGIC = b"\x89HDF\r\n\x1a\n"
RATIO = 100
"""How many times its size a compressed file may hold; data of robots takes 1 to 20."""
FREE = 256 * 2**20
"""Bytes that any file may hold."""
LARGEST_CHUNK = 2**30
DEEPEST = 16
_HEAP = b"GCOL\x01\0\0\0"
"""How a heap of values of varying length begins."""
MOST_ENTRIES = 10_000


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 files do."""
    try:
        with open(path, "rb") as file:
            return path.is_file() and file.read(8) == MAGIC
    except OSError:
        return False


def looks_like(path: Path, *names: str) -> bool:
    """Whether the file is HDF5 with all these names at its top; without h5py, whether it is HDF5."""
    if not path.is_file() or not is_hdf5(path):
        return False
    try:
        h5py = need("h5py")
    except UsageError:
        return True
    try:
        with h5py.File(path, "r") as file:
            return all(file.get(name, getclass=True, getlink=True) is h5py.HardLink for name in names)
    except Exception:  # whatever a damaged file makes of it
        return False


class Hdf5:
    """An HDF5 file, opened for reading.

    Raises:
        UsageError: it is none, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.h5py = need("h5py")
        if not path.is_file():
            what = "it is a folder" if path.is_dir() else "there is no such file"
            raise UsageError(f"{path} is no HDF5 file: {what}")
        self.bytes = path.stat().st_size
        if not is_hdf5(path):
            raise UsageError(f"{path} is no HDF5 file: it begins otherwise ({size(self.bytes)})")
        with self.explained("the file"):
            self._file = self.h5py.File(path, "r")
        try:
            with self.explained("the file"):
                self.root = self._file["/"]
        except UsageError:
            self._file.close()
            raise
        self._counted: set[str] = set()
        self._declared = 0
        self._heaps_checked = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn whatever h5py makes of damaged bytes into a UsageError."""
        try:
            yield
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"{self.path}: {what.strip('/')} cannot be read ({reason}). The file is damaged, or was not written to "
                "its end: fetch it anew"
            ) from None

    def where(self, node: Any) -> str:
        """The place of a group or array, for messages."""
        return f"{self.path}: {str(node.name).strip('/') or 'the file'}"

    def names(self, group: Any) -> list[str]:
        """What a group contains."""
        with self.explained(str(group.name)):
            names = list(group)
            if not all(isinstance(name, str) for name in names):
                raise ValueError("a name in it is no text")
        return names

    def child(self, group: Any, name: str) -> Any:
        """A group's member: another group, or an array.

        Raises:
            UsageError: there is none, or it is a link.
        """
        place = f"{str(group.name).strip('/')}/{name}".strip("/")
        with self.explained(place):
            link = group.get(name, getclass=True, getlink=True)
        if link is None:
            there = self.names(group)
            shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
            raise UsageError(f"{self.path} has no {place!r}.{nearest(name, there)} There: {shown or 'nothing'}")
        if link is not self.h5py.HardLink:
            with self.explained(place):
                target = group.get(name, getlink=True)
            to = f"{target.filename}:" if isinstance(target, self.h5py.ExternalLink) else ""
            raise UsageError(
                f"{self.path}: {place} is a link to {to}{target.path}, which is not followed. Copy what it points to "
                "into the file (h5copy, h5repack), and import that"
            )
        with self.explained(place):
            return group[name]

    def group(self, parent: Any, name: str) -> Any:
        """A member that must be a group."""
        node = self.child(parent, name)
        if not isinstance(node, self.h5py.Group):
            raise UsageError(f"{self.where(node)} is an array; expected a group")
        return node

    def leaf(self, parent: Any, name: str) -> Leaf:
        """A member that must be an array."""
        node = self.child(parent, name)
        if not isinstance(node, self.h5py.Dataset):
            raise UsageError(f"{self.where(node)} is a group; expected an array")
        return Leaf(self, node)

    def leaves(self, group: Any, *, skip: tuple[str, ...] = ()) -> dict[str, Leaf]:
        """Every array below a group, by its path with dots; `skip` names members of the group itself."""
        found: dict[str, Leaf] = {}
        met: set[int] = set()

        def visit(node: Any, path: tuple[str, ...]) -> None:
            with self.explained(str(node.name)):
                address = int(self.h5py.h5o.get_info(node.id).addr)
            if address in met:
                raise UsageError(
                    f"{self.where(node)} is contained in itself, or twice; every group must have one place"
                )
            met.add(address)
            if len(path) > DEEPEST:
                raise UsageError(f"{self.where(node)} lies more than {DEEPEST} groups deep")
            for name in self.names(node):
                if not path and name in skip:
                    continue
                member = self.child(node, name)
                if isinstance(member, self.h5py.Group):
                    visit(member, (*path, name))
                elif isinstance(member, self.h5py.Dataset):
                    if len(found) == MOST_ENTRIES:
                        raise UsageError(f"{self.where(group)} holds more than {MOST_ENTRIES:,} arrays")
                    found[".".join((*path, name))] = Leaf(self, member)

        visit(group, ())
        return found

    def attribute(self, node: Any, name: str) -> Any:
        """An attribute of a group: a number or a text; None where there is none."""
        with self.explained(f"the attribute {name} of {node.name}"):
            if name not in node.attrs:
                return None
            if node.attrs.get_id(name).dtype.kind == "O":
                self.check_heaps()
            value = node.attrs[name]
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.reshape(())[()]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        return value.item() if isinstance(value, np.generic) else value

    def check_heaps(self) -> None:
        """Look at where values of varying length lie, before the first is read: a damaged heap makes HDF5 loop forever.

        A heap is a row of objects, each with its size; HDF5 goes from one to the next without looking whether it gets
        on. Heaps are found by their signature, so this reads the file once.
        """
        if self._heaps_checked:
            return
        with open(self.path, "rb") as file:
            for start in _occurrences(file, _HEAP):
                file.seek(start + len(_HEAP))
                end = start + min(int.from_bytes(file.read(8), "little"), self.bytes - start)
                at = start + len(_HEAP) + 8
                while end - at >= 16:
                    file.seek(at)
                    head = file.read(16)
                    number, content = int.from_bytes(head[:2], "little"), int.from_bytes(head[8:], "little")
                    step = 16 + (content + 7) // 8 * 8 if number else content
                    if not 0 < step <= end - at:
                        raise UsageError(
                            f"{self.path}: texts or other values of varying length cannot be read: the heap at byte "
                            f"{start:,} is damaged. Fetch the file anew, or, if it was edited, rewrite it with h5repack"
                        )
                    at += step
        self._heaps_checked = True

    def count(self, place: str, declared: int) -> None:
        """Take note that `place` holds so many bytes; raise when a file holds more than it can."""
        if place not in self._counted:
            self._counted.add(place)
            self.count_more(place, declared)

    def count_more(self, place: str, declared: int) -> None:
        """As `count`, of bytes that turn up while reading."""
        self._declared += declared
        if self._declared > FREE + RATIO * self.bytes:
            raise UsageError(
                f"{self.path} declares {size(self._declared)} up to {place.strip('/')}, in a file of "
                f"{size(self.bytes)}: more than {RATIO} times as much. It is damaged, or not what it says"
            )


class Leaf:
    """An array in a file: numbers, texts, or byte strings of varying length; of anything else no row is read.

    Raises:
        UsageError: it does not lie in the file.
    """

    def __init__(self, file: Hdf5, node: Any) -> None:
        self.file, self._node = file, node
        self.where = file.where(node)
        h5py = file.h5py
        with file.explained(str(node.name)):
            self.shape: Any = node.shape
            self.dtype: np.dtype[Any] = node.dtype
            plan = node.id.get_create_plist()
            layout, outside = plan.get_layout(), plan.get_external_count()
            filters, stored = plan.get_nfilters(), node.id.get_storage_size()
            self._chunks = node.chunks
        if layout == h5py.h5d.VIRTUAL:
            raise UsageError(f"{self.where} is put together from other files; write it into one (h5repack)")
        if outside:
            raise UsageError(f"{self.where} is stored in another file; write it into this one (h5repack)")
        if self.shape is None:
            raise UsageError(f"{self.where} is empty: it has no shape")
        varying = h5py.check_vlen_dtype(self.dtype)
        self.is_text = h5py.check_string_dtype(self.dtype) is not None
        self.is_bytes = varying is not None and varying == np.uint8
        self.is_number = self.dtype.kind in "fiub" and self.dtype.itemsize <= 8
        declared = math.prod(self.shape) * self.dtype.itemsize
        if not filters and stored < declared:
            raise UsageError(
                f"{self.where} declares {self.shape} of {self.dtype}, {size(declared)}, of which {size(stored)} are in "
                "the file: it was not written to its end, or is damaged"
            )
        if self._chunks and math.prod(self._chunks) * self.dtype.itemsize > LARGEST_CHUNK:
            raise UsageError(f"{self.where} is stored in chunks of {self._chunks}; rewrite it in chunks below 1 GiB")
        file.count(str(node.name), declared)

    @property
    def rows(self) -> int:
        """Entries of the first dimension; 0 of a single number."""
        return int(self.shape[0]) if self.shape else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(math.prod(self.shape[1:]) * self.dtype.itemsize)

    @property
    def chunk_rows(self) -> int:
        """Rows that are stored, and can only be read, together."""
        return int(self._chunks[0]) if self._chunks else 1

    def __getitem__(self, rows: slice) -> Array:
        if not self.is_number:
            raise UsageError(f"{self.where} is of {self.holds}; expected numbers")
        with self.file.explained(f"{self._node.name}"):
            return numbers(np.asarray(self._node[rows]), self.where)

    @property
    def holds(self) -> str:
        """What it is of, for messages."""
        if self.is_text:
            return "texts"
        return "objects" if self.dtype.kind == "O" else str(self.dtype)

    def scalar(self) -> Any:
        """The number or text that a leaf without dimensions holds."""
        if self.dtype.kind == "O":
            self.file.check_heaps()
        with self.file.explained(f"{self._node.name}"):
            value = self._node[()]
        value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return value.item() if isinstance(value, np.generic) else value

    def strings(self) -> Iterator[bytes]:
        """The texts (in UTF-8) or byte strings, one after the other."""
        if not (self.is_text or self.is_bytes) or len(self.shape) != 1:
            raise UsageError(f"{self.where} is {self.shape} of {self.holds}; expected a row of texts")
        if self.dtype.kind == "O":
            self.file.check_heaps()
        # Entries may share their bytes, of which there are at most as many as the file has.
        step = max(1, min(1024, FREE // max(self.file.bytes, 1)))
        for start in range(0, self.rows, step):
            with self.file.explained(f"{self._node.name}"):
                part = self._node[start : start + step]
            for entry in part:
                content = entry if isinstance(entry, bytes) else bytes(entry)
                self.file.count_more(str(self._node.name), len(content))
                yield content


def _occurrences(file: IO[bytes], signature: bytes) -> Iterator[int]:
    """Where in the file these bytes are; it may be read elsewhere between two of them."""
    start, tail = 0, b""
    while True:
        file.seek(start)
        block = file.read(BLOCK)
        if not block:
            return
        searched, at = tail + block, 0
        while (at := searched.find(signature, at)) >= 0:
            yield start - len(tail) + at
            at += 1
        start, tail = start + len(block), searched[-(len(signature) - 1) :]


def block_rows(leaves: list[Leaf]) -> int:
    """How many rows of all these to read at a time: about a block, and whole chunks where that is affordable."""
    row_bytes = max(1, sum(leaf.row_bytes for leaf in leaves))
    widest = max(leaves, key=lambda leaf: leaf.row_bytes)
    if widest.chunk_rows > 1 and widest.chunk_rows * row_bytes > 2 * LARGEST_CHUNK:
        raise UsageError(f"{widest.where} is stored in chunks of {widest.chunk_rows:,} rows, too many to read at once")
    affordable = [leaf.chunk_rows for leaf in leaves if leaf.chunk_rows * row_bytes <= 8 * BLOCK]
    rows: int = max(1, BLOCK // row_bytes)
    chunk = max([widest.chunk_rows, *affordable])
    return rows // chunk * chunk if rows >= chunk else chunk
