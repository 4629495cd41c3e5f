"""Pickles read as data: nothing that they name is imported, called or built.

A pickle is a program for a small machine, and it may call whatever it can name. This machine has the same stack and
memory, but a name stays a `Name` and a call stays a `Call`: what would have been called with what. Arrays, the only
thing wanted here, are then taken from the calls that NumPy writes for them, and stay in the file until they are read.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.data.importers.rows import Array, numbers, size
from ctrlrl.errors import UsageError

_DTYPE = re.compile(r"f[248]|[iu][1248]|b1")
_LENGTH = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}
_MOST_DIMENSIONS = 32

# Opcodes that push a constant, and those that push so many bytes or characters: the width of the length before them.
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_BYTES = {b"C": 1, b"B": 4, b"\x8e": 8, b"\x96": 8}
_TEXTS = {b"\x8c": 1, b"X": 4, b"\x8d": 8}
_TUPLES = {b")": 0, b"\x85": 1, b"\x86": 2, b"\x87": 3}
_RECALLS = {b"h": 1, b"j": 4}
_MEMOIZES = {b"q": 1, b"r": 4}


@dataclass(frozen=True)
class Name:
    """Something in a module."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """What would have been made by calling `of` with `args`, and then given `state`, or filled with `items`."""

    __slots__ = ("args", "items", "of", "state")

    def __init__(self, of: Name, args: tuple[Any, ...]) -> None:
        self.of, self.args = of, args
        self.state: Any = None
        self.items: dict[Any, Any] = {}


class Damaged(Exception):
    """The pickle cannot be read; the message says why."""


def read_pickle(path: Path, allowed: frozenset[tuple[str, str]]) -> Any:
    """The content of a pickle: plain values, `Name` and `Call`; bytes are views of the file.

    Args:
        allowed: what the pickle may name, each by the top of its module and its name.

    Raises:
        UsageError: it names something else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return read_pickled(content, path, allowed)


def read_pickled(content: memoryview, path: Path, allowed: frozenset[tuple[str, str]]) -> Any:
    """As `read_pickle`, of content that is in memory; `path` names where it comes from.

    Raises:
        UsageError: as there.
    """
    try:
        return _Machine(content, path, allowed).run()
    except Damaged as error:
        raise UsageError(f"{path} is no pickle that can be read: {error}. Save it anew, or copy it again") from None
    except (IndexError, KeyError, struct.error, UnicodeError, MemoryError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}): it is no complete pickle") from None


class _Machine:
    def __init__(self, content: memoryview, path: Path, allowed: frozenset[tuple[str, str]]) -> None:
        self.content, self.path, self.allowed = content, path, allowed
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}

    def take(self, count: int) -> memoryview:
        if count > len(self.content) - self.at:
            left = len(self.content) - self.at
            raise Damaged(f"{size(count)} should follow byte {self.at:,}, and {size(left)} do: it is cut off")
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.at
        while end < min(len(self.content), self.at + 256) and self.content[end] != 10:
            end += 1
        text = bytes(self.take(end + 1 - self.at))
        return text[:-1].decode()

    def marked(self) -> list[Any]:
        """What lies above the last mark."""
        start = self.marks.pop()
        above = self.stack[start:]
        del self.stack[start:]
        return above

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise Damaged("it takes what is not there")
        return self.stack.pop()

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged("a name in it is no text")
        if (module.partition(".")[0], name) not in self.allowed:
            raise UsageError(
                f"{self.path} names {f'{module}.{name}'!r}, which is no part of what a file of this kind holds. "
                "Nothing in it was run. If it is of a class of your own, copy its arrays into a plain one and save that"
            )
        return Name(module, name)

    def call(self, of: Any, args: Any) -> Call:
        if not isinstance(of, Name) or not isinstance(args, tuple):
            raise Damaged("it calls what is no name")
        return Call(of, args)

    def put(self, target: Any, key: Any, value: Any) -> None:
        if not isinstance(target, dict | Call):
            raise Damaged("it puts an entry into what holds none")
        if not isinstance(key, str | int | float | None):  # others may take for ever to hash
            raise Damaged(f"an entry in it is called by a {type(key).__name__}")
        (target if isinstance(target, dict) else target.items)[key] = value

    def run(self) -> Any:
        while True:
            code = bytes(self.take(1))
            if code == b".":
                return self.pop()
            self.step(code)

    def step(self, code: bytes) -> None:
        stack = self.stack
        if code == b"\x94":
            self.memory[len(self.memory)] = stack[-1]
        elif code in _RECALLS:
            stack.append(self.memory[self.number(_LENGTH[_RECALLS[code]])])
        elif code in _TEXTS:
            stack.append(bytes(self.take(self.number(_LENGTH[_TEXTS[code]]))).decode())
        elif code in _NUMBERS:
            stack.append(self.number(_NUMBERS[code]))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _BYTES:
            stack.append(self.take(self.number(_LENGTH[_BYTES[code]])))
        elif code in _TUPLES:
            count = _TUPLES[code]
            stack.append(tuple([self.pop() for _ in range(count)][::-1]))
        elif code in _MEMOIZES:
            self.memory[self.number(_LENGTH[_MEMOIZES[code]])] = stack[-1]
        elif code == b"(":
            self.marks.append(len(stack))
        elif code == b"t":
            stack.append(tuple(self.marked()))
        elif code == b"}":
            stack.append({})
        elif code == b"]":
            stack.append([])
        elif code == b"R" or code == b"\x81":
            args = self.pop()
            stack.append(self.call(self.pop(), args))
        elif code == b"b":
            state, target = self.pop(), stack[-1]
            if not isinstance(target, Call):
                raise Damaged("it gives a state to what has none")
            target.state = state
        elif code == b"s":
            value, key = self.pop(), self.pop()
            self.put(stack[-1], key, value)
        elif code == b"u":
            entries = self.marked()
            if len(entries) % 2:
                raise Damaged("an entry in it has no value")
            for key, value in zip(entries[::2], entries[1::2], strict=True):
                self.put(stack[-1], key, value)
        elif code in (b"a", b"e"):
            more = [self.pop()] if code == b"a" else self.marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(more)
            elif not isinstance(stack[-1], Call):
                raise Damaged("it appends to what is no list")
        elif code == b"\x93":
            name = self.pop()
            stack.append(self.name(self.pop(), name))
        elif code == b"c":
            module = self.line()
            stack.append(self.name(module, self.line()))
        elif code == b"\x8a":
            stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))
        elif code == b"\x80":
            version = self.number("<B")
            if version > 5:
                raise Damaged(f"it is of pickle protocol {version}; protocols 2 to 5 can be read")
        elif code == b"\x95":
            self.number("<Q")  # the size of a frame, which only spares readings of the file
        elif code == b"0":
            self.pop()
        else:
            raise Damaged(
                f"byte {self.at - 1:,} is {code!r}, which pickles of protocols 2 to 5 with arrays do not hold"
            )


def array_of(value: Any, what: str) -> Array:
    """The array that a `Call` of NumPy's stands for.

    Raises:
        UsageError: it stands for none, or not for one of numbers.
    """
    if not isinstance(value, Call) or not value.of.module.startswith("numpy"):
        raise UsageError(f"{what} is no array")
    match value.of.name, value.args, value.state:
        case "_frombuffer", (content, dtype, shape, order), _:
            return _array(content, dtype, shape, order == "F", what)
        case "_reconstruct", _, (_, shape, dtype, fortran, content):
            return _array(content, dtype, shape, fortran is True, what)
        case "scalar", (dtype, content), _:
            return _array(content, dtype, (), False, what)
        case _:
            raise UsageError(f"{what} is no array")


def _array(content: Any, dtype: Any, shape: Any, fortran: bool, what: str) -> Array:
    if isinstance(content, Call) and content.of.name == "encode" and content.args[1:] == ("latin1",):  # protocol 2
        text = content.args[0]
        content = memoryview(text.encode("latin1", "replace")) if isinstance(text, str) else None
    kind, stored = _dtype(dtype), isinstance(content, memoryview)
    if kind is None or not stored:
        raise UsageError(f"{what} is no array of numbers")
    dims = shape if isinstance(shape, tuple) and len(shape) <= _MOST_DIMENSIONS else (None,)
    if not all(isinstance(n, int) and 0 <= n < 2**62 for n in dims):
        raise UsageError(f"{what} has a shape that no array has")
    declared = math.prod(dims) * kind.itemsize
    if declared != len(content):
        raise UsageError(f"{what} declares {dims} of {kind}, {size(declared)}, and {size(len(content))} are there")
    if not declared:
        return np.zeros(dims, kind)
    flat = np.frombuffer(content, kind)
    return flat.reshape(dims[::-1]).T if fortran else flat.reshape(dims)


def _dtype(value: Any) -> np.dtype[Any] | None:
    """The dtype that a call stands for, if it is of numbers."""
    if not isinstance(value, Call) or value.of.name != "dtype" or not value.args:
        return None
    name, state = value.args[0], value.state
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        return None
    swapped = isinstance(state, tuple) and len(state) > 1 and state[1] == ">"
    return np.dtype(f"{'>' if swapped else '<'}{name}")


def number_of(value: Any, what: str) -> int | float:
    """A number: Python's, or one of NumPy's."""
    if isinstance(value, Call):
        scalar = numbers(array_of(value, what), what)
        if scalar.ndim:
            raise UsageError(f"{what} is an array; expected a number")
        value = scalar.item()
    if not isinstance(value, int | float):
        raise UsageError(f"{what} is no number")
    return value
