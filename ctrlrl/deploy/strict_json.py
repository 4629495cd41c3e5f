"""JSON that is read strictly, as dataclasses: what a bundle, a reflex or a robot says of itself.

Names that stand twice, NaN, infinities, unknown and missing fields and other types are errors that name the field.
Needs nothing but the standard library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar

from ctrlrl.errors import UsageError, nearest

T = TypeVar("T")


def write_document(document: Any, indent: int | None = 2) -> bytes:
    """A dataclass as JSON that `read_document` reads, in full precision."""
    return json.dumps(dataclasses.asdict(document), indent=indent, allow_nan=False).encode() + b"\n"


def read_document(content: bytes, kind: type[T], where: str, name: str, expected_format: str | None = None) -> T:
    """JSON as the dataclass `kind`.

    Args:
        content: UTF-8.
        kind: a dataclass.
        where: the file, in errors.
        name: what it is, in errors.
        expected_format: what its field `format` must say.

    Raises:
        UsageError: it is none: names the field, what is expected and what came.
    """
    tree = parse_json(content, where)
    if expected_format is not None and isinstance(tree, dict) and tree.get("format") != expected_format:
        raise UsageError(f"{where}: its format is {tree.get('format')!r}, and this version reads {expected_format!r}")
    try:
        document: T = read_strictly(tree, kind, name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return document


def parse_json(content: bytes, where: str) -> Any:
    """JSON without what it leaves open: names that stand twice, NaN, infinities; `where` names it in errors.

    Raises:
        UsageError: it is no such JSON.
    """
    try:
        return json.loads(content, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no valid JSON: {error}") from None


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that can be told")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return out


def read_strictly(value: Any, kind: Any, where: str) -> Any:
    """`value`, as JSON has it, as `kind`: a dataclass, a tuple, a dict, a literal, or a plain type.

    Raises:
        UsageError: it is none, or has a field that `kind` has not; `where` names what was read.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments and type(value) is str:
            return value
        raise UsageError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {_short(value)}")
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return read_strictly(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list, got {_short(value)}")
        if arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise UsageError(f"{where} must have {len(arguments)} entries, got {len(value)}")
            return tuple(
                read_strictly(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True))
            )
        return tuple(read_strictly(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} must be an object, got {_short(value)}")
        return {
            name: v if arguments[1] is Any else read_strictly(v, arguments[1], f"{where}.{name}")
            for name, v in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _read_record(value, kind, where)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UsageError(f"{where} must be a {kind.__name__}, got {_short(value)}")
    return value


def _read_record(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be an object, got {_short(value)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise UsageError(f"{where} has no field {name!r}.{nearest(name, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: read_strictly(v, hints[name], f"{where}.{name}") for name, v in value.items()})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
