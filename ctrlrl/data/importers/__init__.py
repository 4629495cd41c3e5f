"""Formats that other libraries write, as episodes for the store. Nothing heavy is imported before one is picked."""

from __future__ import annotations

import importlib
from pathlib import Path

from ctrlrl.data.importers.base import Format
from ctrlrl.errors import UsageError, nearest

MODULES = {
    "minari": "minari",
    "d4rl": "d4rl",
    "robomimic": "robomimic",
    "ogbench": "ogbench",
    "lerobot": "lerobot",
    "sb3": "sb3",
    "imitation": "imitation",
    "npz": "table",
    "parquet": "table",
    "csv": "table",
}
"""The module of each format, in the order in which they are tried."""


def find_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        UsageError: there is none; suggests the nearest names.
    """
    if name not in MODULES:
        raise UsageError(f"no format {name!r}.{nearest(name, MODULES)} There are: {', '.join(MODULES)}")
    module = importlib.import_module(f"ctrlrl.data.importers.{MODULES[name]}")
    formats: dict[str, Format] = getattr(module, "FORMATS", None) or {module.FORMAT.name: module.FORMAT}
    return formats[name]


def detect(path: Path) -> Format:
    """The format of the file or folder at `path`.

    Raises:
        UsageError: there is nothing there, or it looks like none of them.
    """
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}")
    for name in MODULES:
        found = find_format(name)
        if found.detect(path):
            return found
    raise UsageError(f"{path} looks like none of the formats {', '.join(MODULES)}; say which it is with --format")
