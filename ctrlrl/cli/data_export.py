"""`ctrlrl data export DATASET --format F --out PATH`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a dataset in a format that other libraries read."""

    dataset: Positional[str]
    """The dataset's folder."""
    format: Literal["minari", "lerobot"]
    """minari: HDF5, as Minari 0.5 has it. lerobot: LeRobotDataset v3.0."""
    out: str
    """lerobot: the folder to write. minari: the root of Minari's datasets (MINARI_DATASETS_PATH)."""
    id: str | None = None
    """minari: the dataset's ID there, such as hopper/medium-v0."""
    fps: float | None = None
    """lerobot: frames per second, by default what the control period says."""
    robot_type: str = "unknown"
    """lerobot: the robot's name."""


def run(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    options = parse(Export, arguments, "data export")
    from ctrlrl.data.store import Dataset

    data, out = Dataset.open(options.dataset), Path(options.out)
    if options.format == "minari":
        if options.id is None:
            raise UsageError("--format minari needs the dataset's ID: --id NAME-v0, or --id GROUP/NAME-v0")
        from ctrlrl.data.export_minari import export

        export(data, out, options.id)
    else:
        from ctrlrl.data.export_lerobot import export as export_lerobot

        export_lerobot(data, out, fps=options.fps, robot_type=options.robot_type)
    print(f"{out}: {data.num_transitions:,} transitions in {data.num_episodes:,} episodes")
    return 0
