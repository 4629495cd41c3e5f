"""What commands share: typed flags from a dataclass, with tyro's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(cls: type[T], arguments: Sequence[str], command: str) -> T:
    """An instance of the dataclass `cls` from flags; prints help (exit 0) or what is wrong (exit 2)."""
    return tyro.cli(cls, args=list(arguments), prog=f"ctrlrl {command}")


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, where the defaults of other flags depend on it."""
    for i, word in enumerate(arguments):
        if word == f"--{name}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None
