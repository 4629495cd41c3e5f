"""What is between a controller and a robot."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter

from ctrlrl.deploy.features import require_readable
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import RobotDescription, State
from ctrlrl.errors import UsageError

LIMIT_TOLERANCE = 1e-3
"""rad or m by which a robot's limits may differ from those of training."""
EFFORT_TOLERANCE = 1e-6
"""Share by which its largest efforts may."""


class Driver(ABC):
    """Reads a robot's measurements and sends it commands, without waiting for either.

    Attributes:
        description: what the robot says of itself; there after `connect`.
        dropped: messages that were not looked at, by the reason.
        trip: s, that a message to the robot and its answer take, as far as it is known.
    """

    trip = 0.0
    description: RobotDescription

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()

    @abstractmethod
    def connect(self, timeout: float) -> RobotDescription:
        """Ask the robot what it is.

        Args:
            timeout: s.

        Raises:
            UsageError: nobody answers within that time, or not a robot.
        """

    @abstractmethod
    def read(self) -> State | None:
        """The newest state, if one has come since the last call."""

    @abstractmethod
    def drive(self, state: State, target: Array, kp: Array, kd: Array) -> None:
        """Command targets or efforts (A,) for the driven joints in the description's order, computed from `state`,
        with gains (A,), N m/rad and N m s/rad, where it takes positions."""

    @abstractmethod
    def make_safe(self, state: State | None) -> None:
        """Command the safe action: to damp joints that take positions, or hold them where motors cannot damp, and no
        effort for those that take efforts.

        Called at each tick as long as the robot is to be safe. `state` is the last there was.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. Safe to call twice."""


def require_fits(manifest: Manifest, robot: RobotDescription, *, operated: bool = True) -> None:
    """Raise unless a policy is for this robot: its name, what it takes, joints with units, limits and efforts, and
    what it measures.

    Args:
        manifest: of the bundle.
        robot: what the robot says.
        operated: whether somebody tells the policy what to do, so that the robot does not have to.

    Raises:
        UsageError: something differs; names it, and both sides.
    """
    if manifest.robot is not None and robot.name != manifest.robot:
        raise UsageError(f"{manifest.name} was trained for the robot {manifest.robot}, and this is {robot.name}")
    wanted = "effort" if manifest.action.kind == "joint effort" else "position"
    if robot.control != wanted:
        raise UsageError(f"{manifest.name} commands {wanted}s, and the robot {robot.name} takes {robot.control}s")
    require_readable(manifest, [joint.name for joint in robot.joints], list(robot.measures))
    there = {joint.name: joint for joint in robot.joints}
    used = {name for entry in manifest.observation for term in entry.terms for name in term.joints}
    for joint in manifest.joints:
        driven = joint.name in manifest.action.joints
        if not driven and joint.name not in used:
            continue
        found = there[joint.name]
        if driven and found.max_effort is None:
            raise UsageError(f"the policy drives {joint.name}, and the robot {robot.name} has no motor there")
        if found.unit != joint.unit:
            raise UsageError(
                f"{joint.name}: the policy takes {joint.unit}, and the robot {robot.name} has {found.unit}"
            )
        pairs = [
            ("lower limit", joint.lower, found.lower, LIMIT_TOLERANCE),
            ("upper limit", joint.upper, found.upper, LIMIT_TOLERANCE),
        ]
        if driven:
            pairs.append(("largest effort", joint.max_effort, found.max_effort, 0.0))
        for what, ours, its, allowed in pairs:
            if not _same(ours, its, allowed):
                raise UsageError(
                    f"{joint.name}: the policy was trained with the {what} {ours}, and the robot {robot.name} says "
                    f"{its}; is it the joint that is meant?"
                )
    undriven = [joint.name for joint in robot.driven if joint.name not in manifest.action.joints]
    if undriven:
        raise UsageError(
            f"the robot {robot.name} has motors that the policy does not command: {', '.join(undriven)}. The policy's: "
            f"{', '.join(manifest.action.joints)}"
        )
    for name, size in (("orientation", 4), ("angular velocity", 3), ("linear velocity", 3), ("tool position", 3)):
        if robot.measures.get(name, size) != size:
            raise UsageError(f"the robot {robot.name} measures {name} in {robot.measures[name]} numbers, not {size}")
    rate = 1 / (manifest.control_dt or math.inf)
    if robot.rate < rate * (1 - EFFORT_TOLERANCE):
        raise UsageError(
            f"{manifest.name} acts {rate:g} times a second, and {robot.name} measures {robot.rate:g} times"
        )
    if robot.watchdog * rate < 1:
        raise UsageError(
            f"{manifest.name} acts {rate:g} times a second, and {robot.name} makes itself safe after "
            f"{robot.watchdog:g} s without a command"
        )
    if not operated and manifest.command and robot.measures.get("command") != len(manifest.command):
        raise UsageError(f"{manifest.name} is told what to do ({'; '.join(manifest.command)}): give it with --command")


def _same(ours: float | None, its: float | None, allowed: float) -> bool:
    if ours is None or its is None:
        return ours is None and its is None
    return math.isclose(ours, its, rel_tol=EFFORT_TOLERANCE, abs_tol=allowed)
