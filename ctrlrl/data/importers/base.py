"""What importers share: what a format is, what reading one gives, and how its episodes come into a store."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym

from ctrlrl.data.store import Column, Episode
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user says of a file beside its place."""

    env: str | None = None
    """The environment's ID, instead of what the file names."""
    mapping: Path | None = None
    """A file that says which columns are what, of formats that leave that open."""
    unsafe_pickle: bool = False
    """Whether a pickle may be read (by an unpickler that rebuilds arrays and nothing else)."""
    max_episode_steps: int | None = None
    """After how many steps episodes were cut, where the data does not say."""
    columns: tuple[str, ...] | None = None
    """Which columns to keep beside observation, action and reward; by default all that hold numbers."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader found; `episodes` are read as they are asked for."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    episodes: Iterator[Episode]
    env: str | None = None
    control_dt: float | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """What was decided for the user, or left out."""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that can be imported."""

    name: str
    """What `--format` takes."""
    title: str
    detect: Callable[[Path], bool]
    """Whether a file or folder looks like it; looks at names and headers, and never raises."""
    read: Callable[[Path, ImportOptions], Source]
    """Raises UsageError on what is not as the format has it."""


def need(module: str) -> Any:
    """An optional package, imported.

    Raises:
        UsageError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this format needs {module}: pip install 'ctrlrl[data]' ({error})") from None
