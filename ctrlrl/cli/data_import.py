"""`ctrlrl data import SRC --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from ctrlrl.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a dataset of files in another format: minari, d4rl, robomimic, ogbench, lerobot, sb3, imitation, npz,
    parquet, csv."""

    src: Positional[str]
    """File or folder to read."""
    out: str
    """Folder of the dataset; must not hold anything yet."""
    format: str | None = None
    """One of the formats; by default it is told from the file."""
    env: str | None = None
    """The environment's ID, instead of what the file names."""
    mapping: str | None = None
    """YAML or JSON file that says which columns are what, for npz, parquet and csv."""
    allow_pickle: Annotated[bool, tyro.conf.arg(name="allow-pickle")] = False
    """Read a pickle, by an unpickler that rebuilds arrays and nothing else."""
    max_episode_steps: int | None = None
    """After how many steps episodes were cut, where the data does not say."""
    columns: tuple[str, ...] | None = None
    """Columns to keep beside observation, action and reward; by default all that hold numbers."""


def run(arguments: Sequence[str]) -> int:
    """Import; returns the exit code."""
    options = parse(Import, arguments, "data import")
    from ctrlrl.data.importers import import_dataset
    from ctrlrl.data.importers.base import ImportOptions

    data, notes = import_dataset(
        Path(options.src),
        Path(options.out),
        options.format,
        ImportOptions(
            env=options.env,
            mapping=None if options.mapping is None else Path(options.mapping),
            unsafe_pickle=options.allow_pickle,
            max_episode_steps=options.max_episode_steps,
            columns=options.columns,
        ),
    )
    for note in notes:
        print(f"note: {note}")
    print(f"{data.path}: {data.num_transitions:,} transitions in {data.num_episodes:,} episodes")
    return 0
