"""Safetensors files with nothing but NumPy: a header in JSON, and then the numbers.

Read are little-endian float32, float64, int64, int32, uint8 and bool, whole and in order, as this module and the
safetensors library write them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from ctrlrl.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
LARGEST_HEADER = 2**24
MOST_DIMENSIONS = 8


def write_tensors(arrays: Mapping[str, Array]) -> bytes:
    """The file's content.

    Raises:
        TypeError: an array is of a type that is not read.
    """
    codes = {np.dtype(name): code for code, name in DTYPES.items()}
    header, parts, at = {}, [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        if data.dtype.newbyteorder("<") not in codes:
            raise TypeError(f"{name} is of {data.dtype}; known are {', '.join(str(dtype) for dtype in codes)}")
        raw = data.astype(data.dtype.newbyteorder("<")).tobytes()
        code = codes[data.dtype.newbyteorder("<")]
        header[name] = {"dtype": code, "shape": list(np.shape(array)), "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def read_tensors(content: bytes, where: str) -> dict[str, Array]:
    """The arrays of a file's content, which `where` names in errors. They are read-only views of `content`.

    Raises:
        UsageError: it is no safetensors file, or one that is damaged.
    """
    try:
        return _read(content)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where} is no safetensors file that can be read: {error}") from None


def _read(content: bytes) -> dict[str, Array]:
    if len(content) < 8:
        raise ValueError("it ends before its header does")
    size = struct.unpack("<Q", content[:8])[0]
    if size > min(LARGEST_HEADER, len(content) - 8):
        raise ValueError(f"its header would have {size:,} bytes")
    header = json.loads(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    data, out, expected = memoryview(content)[8 + size :], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
        if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} has the shape {shape}")
        start, stop = entry["data_offsets"]
        if start != expected or stop - start != math.prod(shape) * dtype.itemsize or stop > len(data):
            raise ValueError(f"{name} of {shape} lies at {start} to {stop}")
        if entry["dtype"] == "BOOL" and (np.frombuffer(data[start:stop], np.uint8) > 1).any():
            raise ValueError(f"{name} is of bool, and has other bytes than 0 and 1")
        out[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
        expected = stop
    if expected != len(data):
        raise ValueError(f"{len(data) - expected:,} bytes belong to no tensor")
    return out
