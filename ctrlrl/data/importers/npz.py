"""Arrays in an .npz file, read row by row: a million rows take no more memory than a block of them.

An .npz is a zip of .npy files, each a header and then the numbers. Headers are read first, and must agree with the
sizes in the zip; nothing is unpickled, ever.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from ctrlrl.data.importers.rows import Array, numbers, size
from ctrlrl.errors import UsageError, nearest

RATIO = 100
"""How many times its size a compressed file may hold."""
FREE = 256 * 2**20
LARGEST_TURNED = 2 * 2**30
"""Bytes of an array in Fortran's order, which cannot be read row by row."""


def names(path: Path) -> set[str]:
    """The arrays in an .npz file; none if it is no such file."""
    try:
        if path.suffix != ".npz" or not path.is_file():
            return set()
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}
    except Exception:  # whatever a damaged file makes of it
        return set()


class Npz:
    """An .npz file, opened for reading.

    Raises:
        UsageError: it is none, or is damaged, or declares more than it holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            what = "it is a folder" if path.is_dir() else "there is no such file"
            raise UsageError(f"{path} is no .npz file: {what}")
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UsageError(
                f"{path} is no .npz file, or was not written to its end ({error}): fetch it anew"
            ) from None
        try:
            members = {info.filename: info for info in self._zip.infolist()}
            held, total = sum(info.file_size for info in members.values()), path.stat().st_size
            if held > FREE + RATIO * total:
                raise UsageError(
                    f"{path} declares {size(held)} in a file of {size(total)}: more than {RATIO} times as much. It is "
                    "damaged, or not what it says"
                )
            self.arrays = {
                name.removesuffix(".npy"): Member(self, name, info)
                for name, info in members.items()
                if name.endswith(".npy")
            }
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Member:
        if name not in self.arrays:
            there = ", ".join(self.arrays) or "nothing"
            raise UsageError(f"{self.path} has no array {name!r}.{nearest(name, self.arrays)} There: {there}")
        return self.arrays[name]

    def open(self, name: str) -> IO[bytes]:
        """A stream of a member's bytes."""
        return self._zip.open(name)

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


class Member:
    """An array of the file. What it is is read at once; its numbers, when asked for."""

    def __init__(self, file: Npz, name: str, info: zipfile.ZipInfo) -> None:
        self.where = f"{file.path}: {name.removesuffix('.npy')}"
        self._file, self._name = file, name
        with self._explained(), file.open(name) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise UsageError(f"{self.where} is of .npy version {version}; plain numbers are of version (1, 0)")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, self._fortran, self.dtype = read(stream)
            self._start = stream.tell()
        self.is_number = self.dtype.kind in "fiub" and self.dtype.itemsize <= 8
        declared = math.prod(self.shape) * self.dtype.itemsize
        if min(self.shape, default=0) < 0:
            raise UsageError(f"{self.where} declares the shape {self.shape}: the file is damaged")
        if self.is_number and info.file_size - self._start != declared:
            raise UsageError(
                f"{self.where} declares {self.shape} of {self.dtype}, {size(declared)}, and "
                f"{size(info.file_size - self._start)} are there: the file is damaged"
            )

    @property
    def rows(self) -> int:
        """Entries of the first dimension; 0 of a single number."""
        return int(self.shape[0]) if self.shape else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(math.prod(self.shape[1:]) * self.dtype.itemsize)

    def reader(self) -> Reader:
        """Rows from the first one on.

        Raises:
            UsageError: it holds no numbers.
        """
        if not self.is_number:
            what = "objects, which only a pickle could restore" if self.dtype.kind == "O" else str(self.dtype)
            raise UsageError(f"{self.where} is of {what}; expected numbers")
        return Reader(self)

    def _explained(self) -> Any:
        return _Explained(self.where)

    def _stream(self) -> IO[bytes]:
        stream = self._file.open(self._name)
        stream.read(self._start)
        return stream


class _Explained:
    """Turns what zip and NumPy make of damaged bytes into a UsageError."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        broken = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError, NotImplementedError)
        if isinstance(error, (*broken, SyntaxError, TypeError, MemoryError)):
            reason = str(error)[:300]
            raise UsageError(f"{self.where} cannot be read ({reason}): the file is damaged, fetch it anew") from None


class Reader:
    """The rows of an array, in order."""

    def __init__(self, member: Member) -> None:
        self._member, self._at = member, 0
        self._turned: Array | None = None
        with member._explained():
            self._stream = member._stream()
            if member._fortran and len(member.shape) > 1:
                declared = member.rows * member.row_bytes
                if declared > LARGEST_TURNED:
                    raise UsageError(
                        f"{member.where} is in Fortran's order and has {size(declared)}: save it with "
                        "np.ascontiguousarray"
                    )
                flat = np.frombuffer(self._take(declared), member.dtype)
                self._turned = numbers(flat.reshape(member.shape[::-1]).T, member.where)

    def read(self, count: int) -> Array:
        """The next `count` rows."""
        member, start = self._member, self._at
        count = min(count, member.rows - start)
        self._at += count
        if self._turned is not None:
            return self._turned[start : start + count]
        with member._explained():
            content = self._take(count * member.row_bytes)
        return numbers(np.frombuffer(content, member.dtype).reshape(count, *member.shape[1:]), member.where)

    def _take(self, wanted: int) -> bytes:
        content = self._stream.read(wanted)
        if len(content) != wanted:
            raise EOFError(f"{wanted - len(content)} bytes are missing")
        return content
