"""Arrow's arrays as NumPy's: numbers, lists of equally many numbers, texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.data.importers.base import need
from ctrlrl.data.importers.rows import Array, size
from ctrlrl.errors import UsageError

RATIO = 100
"""How many times its size a file may hold."""
FREE = 256 * 2**20


@contextlib.contextmanager
def explained(
    what: str, remedy: str = "The file is damaged, or was not written to its end: fetch it anew"
) -> Iterator[None]:
    """Turn whatever pyarrow makes of damaged bytes into a UsageError."""
    try:
        yield
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UsageError(f"{what} cannot be read ({reason}). {remedy}") from None


def to_numpy(array: Any, what: str, first: int = 0) -> Array:
    """(n, ...) from an Arrow array without missing values; texts as objects.

    Raises:
        UsageError: a value is missing, lists differ in length, or it holds neither numbers nor texts.
    """
    pa = need("pyarrow")
    types = pa.types
    kind = array.type
    if types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise UsageError(f"{what} has no value in row {first + row}. Fill it in, or leave that episode out")
    if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
        lengths = np.diff(array.offsets.to_numpy()) if not types.is_fixed_size_list(kind) else None
        length = kind.list_size if lengths is None else int(lengths[0]) if len(lengths) else 0
        if lengths is not None and (lengths != length).any():
            row = int(np.flatnonzero(lengths != length)[0])
            raise UsageError(
                f"{what} has {length} numbers in row {first} and {lengths[row]} in row {first + row}; every row must "
                "have equally many"
            )
        inner = to_numpy(array.flatten(), what, first)
        return inner.reshape(len(array), length, *inner.shape[1:])
    if types.is_string(kind) or types.is_large_string(kind):
        return np.array(array.to_pylist(), object)
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise UsageError(f"{what} is of {kind}; expected numbers")
    out: Array = array.to_numpy(zero_copy_only=False)
    return out


def parquet(path: Path) -> tuple[Any, int]:
    """A Parquet file, opened, and about how many bytes a row of it takes.

    Raises:
        UsageError: it is none, or is damaged, or declares more than it can hold.
    """
    pq = need("pyarrow.parquet")
    if not path.is_file():
        raise UsageError(f"{path} is no Parquet file: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    there = path.stat().st_size
    with explained(str(path)):
        declared = 8 * _values(path, there)
    if declared > FREE + RATIO * there:
        raise UsageError(
            f"{path} declares {size(declared)} in a file of {size(there)}: more than {RATIO} times as much. It is "
            "damaged, or not what it says"
        )
    with explained(str(path)):
        file = pq.ParquetFile(path)
    return file, max(1, declared // max(1, file.metadata.num_rows))


def _values(path: Path, there: int) -> int:
    """How many values a Parquet file counts in its footer, over all columns and row groups.

    Asking pyarrow for it ends the process where the footer is damaged.
    """
    with open(path, "rb") as file:
        file.seek(max(0, there - 8))
        length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
        if magic != b"PAR1" or length > there - 12:
            raise ValueError("it does not end as Parquet files do")
        file.seek(there - 8 - length)
        footer = _Thrift(file.read(length))
    # FileMetaData.row_groups -> RowGroup.columns -> ColumnChunk.meta_data -> ColumnMetaData.num_values
    values = list(footer.numbers((4, 1, 3, 5)))
    if min(values, default=0) < 0:
        raise ValueError("it counts fewer than no values")
    return sum(values)


class _Thrift:
    """A structure in Thrift's compact protocol."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def numbers(self, path: tuple[int, ...]) -> Iterator[int]:
        """The integers at a path of field numbers, through every list on the way."""
        yield from self._struct(path, 0)

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number in its footer has no end")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _struct(self, path: tuple[int, ...] | None, depth: int) -> Iterator[int]:
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._integer()
            inner = path[1:] if path and field == path[0] else None
            yield from self._value(head & 15, inner, depth)

    def _value(self, kind: int, path: tuple[int, ...] | None, depth: int) -> Iterator[int]:
        """Pass over a value, and give the integers in it that `path` leads on to."""
        if depth > 32:
            raise ValueError("its footer is nested too deeply")
        if kind in (4, 5, 6):
            value = self._integer()
            if path == ():
                yield value
        elif kind == 3:
            self._byte()
        elif kind == 7:
            self._at += 8
        elif kind == 8:
            length = self._varint()  # before it is added: reading it moves on, too
            self._at += length
        elif kind in (9, 10):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            for _ in range(count):
                if head & 15 in (1, 2):
                    self._byte()
                else:
                    yield from self._value(head & 15, path, depth + 1)
        elif kind == 12:
            yield from self._struct(path, depth + 1)
        elif kind not in (1, 2):
            raise ValueError("its footer holds what Parquet has no use for")
