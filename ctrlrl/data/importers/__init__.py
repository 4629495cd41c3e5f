"""Formats that other libraries write, as episodes for the store. Nothing heavy is imported before one is picked."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import Format, ImportOptions
from ctrlrl.data.store import Dataset, DatasetWriter
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


def actions_of(env_id: str | None, found: gym.Space[Any], src: Path) -> gym.Space[Any]:
    """The action space of the environment that the user names, where Gymnasium knows it: data alone does not tell the
    bounds. Else what was found in the data.

    Raises:
        UsageError: the data's actions are not the environment's.
    """
    if env_id is None or env_id not in gym.registry:
        return found
    try:
        env = gym.make(env_id)
    except Exception as error:  # whatever the environment lacks
        raise UsageError(f"--env {env_id} cannot be made here, to ask for its actions: {error}") from None
    own = env.action_space
    env.close()
    if isinstance(own, gym.spaces.Box) and isinstance(found, gym.spaces.Box) and own.shape == found.shape:
        # What lies in [-1, 1] is given these bounds, which may be wider than the environment's.
        data_low = np.where(found.low == -1, np.maximum(found.low, own.low), found.low)
        data_high = np.where(found.high == 1, np.minimum(found.high, own.high), found.high)
        if (data_low >= own.low - 1e-4).all() and (data_high <= own.high + 1e-4).all():
            return own
    elif isinstance(own, gym.spaces.Discrete) and isinstance(found, gym.spaces.Discrete):
        if found.n <= own.n:
            return own
    elif own == found:
        return own
    raise UsageError(f"{src} has actions in {found}, and {env_id} takes {own}: is it another environment's?")


def import_dataset(
    src: Path, out: Path, name: str | None = None, options: ImportOptions | None = None
) -> tuple[Dataset, list[str]]:
    """Read the file or folder `src` into a new dataset at `out`; returns it, and what the user should know of it.

    Args:
        src: what to read.
        out: the dataset's folder; must not hold anything yet.
        name: of the format, told from the file by default.
        options: what is to be known beside the file.

    Raises:
        UsageError: it is not as the format has it, holds no transition, or `out` is taken. Nothing is left behind then.
    """
    options = options or ImportOptions()
    if not src.exists():
        raise UsageError(f"no such file or folder: {src}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another --out; nothing was overwritten")
    found = detect(src) if name is None else find_format(name)
    source = found.read(src, options)
    notes = [] if name is not None else [f"read as {found.name}: {found.title}"]
    try:
        provenance = {
            "imported": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": str(src),
            "format": found.name,
            "notes": list(source.notes),
            **source.provenance,
        }
        with DatasetWriter.create(
            out,
            observation_space=source.observation_space,
            action_space=actions_of(options.env, source.action_space, src),
            env=options.env or source.env,
            control_dt=source.control_dt,
            columns=source.columns,
            reference=source.reference,
            provenance=provenance,
        ) as writer:
            for episode in source.episodes:
                try:
                    writer.add(episode)
                except UsageError as error:
                    raise UsageError(f"{src}: {error}") from None
            if not writer.num_transitions:
                raise UsageError(f"{src} holds no transition")
            writer.provenance["notes"] = list(source.notes)  # some are known only when all was read
    finally:
        source.close()
    return Dataset.open(out), notes + list(source.notes)
