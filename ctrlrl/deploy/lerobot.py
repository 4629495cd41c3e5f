"""A robot that has LeRobot's `Robot` interface (https://github.com/huggingface/lerobot), which is not imported here: a
function of the user's makes the robot.

    # arm.py, for `ctrlrl deploy BUNDLE --driver lerobot --address arm:make`
    from ctrlrl.deploy.lerobot import Scale
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    def make():
        config = SO101FollowerConfig(port="/dev/ttyACM0", id="arm", disable_torque_on_disconnect=False)
        return SO101Follower(config), {"gripper": Scale(theirs=(0, 100), ours=(-0.1745, 2.07))}

It returns the robot, or the robot and a `Scale` for each joint whose unit LeRobot does not settle. Joints are found by
name: NAME.pos is measured and commanded. What LeRobot does not state (limits, efforts, and that units are rad) is of
the robot's description (`ctrlrl robots`). Different from a robot that speaks `ctrlrl.deploy.wire`:

- Reading and sending wait for the robot's bus, within the tick. A call that never returns stops the loop; servos keep
  their last target then, and so they do when the controller dies: there is no watchdog.
- A state's time is from before its reading began. What all readings take at least is not seen as age.
- Degrees are LeRobot's, from the middle of the range that was found when a joint was calibrated. A `Scale` says else.
- Velocities are differences of successive positions, 0 at first: of those that robots measure LeRobot states no unit.
- Gains of training are not sent: a servo has its own.
- The safe action is to hold: servos that take positions cannot be damped. A grip may loosen by it.
- `close` disconnects. LeRobot switches the motors off then, unless `disable_torque_on_disconnect=False`: the arm falls.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrlrl.deploy.driver import Driver
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import DRIVEN, RobotDescription, RobotJoint, State
from ctrlrl.errors import UsageError, nearest
from ctrlrl.robots.robot import Joint, get_robot

POSITION = ".pos"
PROPERTIES = ("observation_features", "action_features", "is_connected", "is_calibrated")
METHODS = ("connect", "get_observation", "send_action", "disconnect")
WATCHDOG = 10.0
"""s, the longest that a description may say: LeRobot has none."""
RETRY = 0.1  # s, between readings that fail at the start
SPAN_TOLERANCE = 0.1
"""rad by which the travel that calibration recorded may differ from the description's."""
HELD_BACK = 2e-3
"""rad or m by which what was sent may differ from what was asked for: a step of an encoder is 1.5e-3."""
BELIEVABLE = 0.1
"""rad or m outside its limits up to which a joint is held where it is measured."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A joint's positions at LeRobot and here: a straight line through two points.

    Raises:
        UsageError: on construction, where they are no line.
    """

    theirs: tuple[float, float]
    """Two positions, as LeRobot tells them."""
    ours: tuple[float, float]
    """The same in rad or m."""

    def __post_init__(self) -> None:
        for name in ("theirs", "ours"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(map(math.isfinite, pair)) or pair[0] == pair[1]:
                raise UsageError(f"Scale.{name} must be two different finite numbers, got {pair}")

    @property
    def slope(self) -> float:
        """rad or m for 1 of LeRobot's."""
        return (self.ours[1] - self.ours[0]) / (self.theirs[1] - self.theirs[0])

    @property
    def start(self) -> float:
        """rad or m at LeRobot's 0."""
        return self.ours[0] - self.slope * self.theirs[0]


DEGREES = Scale(theirs=(0.0, 180.0), ours=(0.0, math.pi))


class LeRobotDriver(Driver):
    """Drives a robot that has LeRobot's interface, by position targets.

    Args:
        make: MODULE:FUNCTION, or the function itself. It takes nothing, and returns the robot, or the robot and a
            mapping of joint names to `Scale`. It is run: name only what you trust.
        manifest: of the bundle that is to drive.
        clock: seconds, by which states are stamped.

    Attributes:
        dropped: what failed, by the reason: readings, sendings, and targets that the robot held back.
    """

    def __init__(self, make: str | Callable[[], Any], manifest: Manifest, clock: Time | None = None) -> None:
        super().__init__()
        self._make, self._manifest = make, manifest
        self._where = make if isinstance(make, str) else getattr(make, "__qualname__", repr(make))
        self._clock = Time() if clock is None else clock
        self._robot: Any = None
        self._closed = False
        self._sequence, self._then = 0, 0.0
        self._last: Array | None = None
        self._believed: Array | None = None  # of each joint, the newest position that can be
        self._held: Array | None = None

    def connect(self, timeout: float) -> RobotDescription:
        """Make the robot, compare it with the policy, and only then connect to it; it is never calibrated here.

        Args:
            timeout: s, in which it must be read once. LeRobot's own connecting cannot be cut short.

        Raises:
            UsageError: there is no such function, or it makes no robot; a joint is missing, of an unknown unit, or not
                commanded by the policy; the robot is not calibrated, or cannot be read.
        """
        joints, scales = self._matched()
        self._slope = np.array([scale.slope for scale in scales])
        self._start = np.array([scale.start for scale in scales])
        self._lower = np.array([joint.lower for joint in joints])
        self._upper = np.array([joint.upper for joint in joints])
        self._keys = [joint.name + POSITION for joint in joints]
        assert self._manifest.robot is not None and self._manifest.control_dt is not None
        self.description = RobotDescription(
            name=self._manifest.robot,
            control="position",
            joints=tuple(_described(joint) for joint in joints),
            rate=1 / self._manifest.control_dt,
            watchdog=WATCHDOG,
        )
        self._open(timeout)
        return self.description

    def read(self) -> State | None:
        """What the robot measures now; None where it cannot be read."""
        now = self._clock.now()
        try:
            position = self._positions()
        except Exception as error:  # a robot that was unplugged raises what its bus raises: age stops the policy
            self._failed("reading failed", error)
            return None
        if self._last is None:
            velocity = np.zeros(len(position))
        else:
            velocity = (position - self._last) / max(now - self._then, 1e-6)
        self._last, self._then = position, now
        can_be = (position >= self._lower - BELIEVABLE) & (position <= self._upper + BELIEVABLE)  # NaN cannot
        self._believed = np.where(can_be, position, position if self._believed is None else self._believed)
        self._sequence += 1
        return State(self._sequence, now, DRIVEN, 1, position, velocity, {})

    def drive(self, state: State, target: Array, kp: Array, kd: Array) -> None:
        """Command position targets (A,), rad or m; gains are the servos' own, and not sent."""
        self._held = None
        self._send(target)

    def make_safe(self, state: State | None) -> None:
        """Hold the joints where they were measured last when this was first called after driving.

        A measurement that is not finite, or far outside the limits, is not gone to: that joint is held where it was
        seen last within them, or at first. Where there is no such place, nothing is sent, and servos keep their target.
        """
        if self._held is None and self._believed is not None and np.isfinite(self._believed).all():
            self._held = self._believed
        if self._held is not None:
            self._send(self._held)

    def close(self) -> None:
        """Disconnect from the robot, if there is one."""
        if self._robot is not None and not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):  # it may be unplugged, or never have been connected
                self._robot.disconnect()

    # --- the robot's bus ----------------------------------------------------------------------------------------------

    def _positions(self) -> Array:
        """(J,) rad or m. Raises whatever the robot does, and what comes of numbers that are none."""
        seen = self._robot.get_observation()  # pictures of cameras are in it, too
        told = np.array([float(seen[key]) for key in self._keys])
        position: Array = self._start + self._slope * told
        return position

    def _send(self, target: Array) -> None:
        told = (target - self._start) / self._slope
        if not np.isfinite(told).all():
            self.dropped["target that is not finite"] += 1
            return
        try:
            sent = self._robot.send_action(dict(zip(self._keys, told.tolist(), strict=True)))
        except Exception as error:
            self._failed("sending failed", error)
            return
        try:
            off = np.abs(self._slope * (np.array([float(sent[key]) for key in self._keys]) - told))
        except Exception as error:
            self._failed("sent, but it does not say what", error)
            return
        if not (off <= HELD_BACK).all():
            self.dropped["target held back by the robot"] += 1

    def _failed(self, what: str, error: Exception) -> None:
        self.dropped[f"{what}: {type(error).__name__}"] += 1

    def _open(self, timeout: float) -> None:
        robot, end = self._robot, self._clock.now() + timeout
        try:
            if not robot.is_connected:
                robot.connect(calibrate=False)
            calibrated = bool(robot.is_calibrated)
        except Exception as error:
            raise UsageError(
                f"cannot connect to the robot of {self._where}: {_told(error)}. Is it on, and is its port right?"
            ) from error
        if not calibrated:
            raise UsageError(
                f"the robot of {self._where} is not calibrated, or by another file than its motors: run "
                "lerobot-calibrate with its type, port and id, and see that these are the same here"
            )
        while True:
            try:
                position = self._positions()
                break
            except Exception as error:
                if self._clock.now() + RETRY >= end:
                    raise UsageError(
                        f"the robot of {self._where} cannot be read within {timeout:g} s: {_told(error)}"
                    ) from error
            self._clock.wait_until(self._clock.now() + RETRY)
        if not np.isfinite(position).all():
            raise UsageError(f"the robot of {self._where} measures what is no number: {position.tolist()}")

    # --- whether it is the robot that is meant ------------------------------------------------------------------------

    def _matched(self) -> tuple[list[Joint], list[Scale]]:
        """The joints that are driven, as they are described, and how LeRobot tells their positions.

        Raises:
            UsageError: as `connect`, of all that is known before it is connected to.
        """
        m = self._manifest
        if not m.is_robot or not m.action.kind.startswith("joint position"):
            raise UsageError(
                f"{m.name} commands {m.action.kind}: LeRobot's robots take positions of joints, so that the action "
                "must be a joint position offset or step"
            )
        if m.robot is None or m.control_dt is None:
            raise UsageError(
                f"{m.name} does not say for which robot it is, or how often it acts: limits and efforts, which LeRobot "
                "does not state, would be unknown. Name `robot` and `control_dt` where the bundle is exported"
            )
        described = get_robot(m.robot)
        self._robot, scales = _made(self._make, self._where)
        names = self._named()
        own = {joint.name: joint for joint in described.joints}
        if unknown := [name for name in names if name not in own]:
            raise UsageError(
                f"the robot {m.robot} has no motor {', '.join(unknown)}, of which limits are known; it has: "
                f"{', '.join(own)}"
            )
        for name in scales:
            if name not in names:
                raise UsageError(f"{self._where} gives a Scale of {name!r}, which is no joint.{nearest(name, names)}")
        joints = [own[name] for name in names]
        return joints, [scales.get(joint.name) or _scale(self._robot, joint, self._where) for joint in joints]

    def _named(self) -> list[str]:
        """The names of the joints that the policy drives, all of which the robot has.

        Raises:
            UsageError: one is missing, or there is something that nobody commands; shows both lists.
        """
        m = self._manifest
        try:
            seen, told = dict(self._robot.observation_features), dict(self._robot.action_features)
        except Exception as error:
            raise UsageError(f"the robot of {self._where} does not say what it measures: {_told(error)}") from error
        needed = list(m.action.joints)
        needed += sorted({n for entry in m.observation for term in entry.terms for n in term.joints} - set(needed))
        lists = (
            f"The policy's: {', '.join(name + POSITION for name in needed)}. The robot's: observation_features "
            f"{', '.join(map(str, seen)) or 'none'}; action_features {', '.join(map(str, told)) or 'none'}"
        )
        there = [
            name
            for name in needed
            if all(key in has and not _is_array(has[key]) for key in [name + POSITION] for has in (seen, told))
        ]
        if missing := [name for name in needed if name not in there]:
            raise UsageError(
                f"the policy needs {', '.join(missing)}, and the robot of {self._where} does not both measure and take "
                f"it by that name. {lists}"
            )
        if extra := [str(key) for key in told if key not in [name + POSITION for name in m.action.joints]]:
            raise UsageError(
                f"the robot of {self._where} takes {', '.join(extra)}, which the policy does not command. {lists}"
            )
        return needed


def _described(joint: Joint) -> RobotJoint:
    return RobotJoint(
        name=joint.name,
        unit=joint.unit,
        lower=joint.lower if math.isfinite(joint.lower) else None,
        upper=joint.upper if math.isfinite(joint.upper) else None,
        max_effort=joint.max_effort,
    )


def _scale(robot: Any, joint: Joint, where: str) -> Scale:
    """How LeRobot tells a joint's positions, where the robot settles it.

    Raises:
        UsageError: it would be a guess; says what to do.
    """
    unit, low, high = _unit_of(robot, joint.name), joint.lower, joint.upper
    wanted = f'return robot, {{"{joint.name}": Scale(theirs=(A, B), ours=(A in {joint.unit}, B in {joint.unit}))}}'
    remedy = f"Measure {joint.name} in two positions A and B, and let {where} say so: {wanted}"
    if unit == "degrees" and joint.unit == "rad":
        return DEGREES
    if unit == "range_m100_100":
        raise UsageError(
            f"{joint.name} is told as -100 to 100 of the range that was found when it was calibrated, and what that is "
            f"in {joint.unit} would be a guess. Make the robot with use_degrees=True. Or: {remedy}"
        )
    if unit == "range_0_100" and joint.unit == "rad":
        span = _calibrated(robot, joint.name)
        if span is not None and abs(span - (high - low)) <= SPAN_TOLERANCE:
            return Scale(theirs=(0.0, 100.0), ours=(low, high))
        found = "is not known here" if span is None else f"was {span:.4g} rad"
        closed = "" if span is None else f" If 0 is its lower limit, that is ours=({low:.4g}, {low + span:.4g})."
        raise UsageError(
            f"{joint.name} is told as 0 to 100 of its travel, which {found} when it was calibrated, and the "
            f"description goes through {high - low:.4g} rad, from {low:.4g} to {high:.4g}: what 0 and 100 are would be "
            f"a guess.{closed} {remedy}"
        )
    said = "does not say" if unit is None else f"says {unit}, which is unknown for {joint.unit}"
    raise UsageError(f"in which unit {joint.name} is told, the robot of {where} {said}. {remedy}")


def _unit_of(robot: Any, name: str) -> str | None:
    """degrees, range_0_100 or range_m100_100, as LeRobot calls them; None where nothing is said."""
    mode = _attribute(_entry(_attribute(robot, "bus", "motors"), name), "norm_mode")
    if mode is not None:
        return str(getattr(mode, "value", mode))
    degrees = _attribute(robot, "config", "use_degrees")
    if not isinstance(degrees, bool):
        return None
    if name == "gripper":  # in all of LeRobot's arms that have this option
        return "range_0_100"
    return "degrees" if degrees else "range_m100_100"


def _calibrated(robot: Any, name: str) -> float | None:
    """rad that a motor went through when it was calibrated, as LeRobot makes degrees of it; None: not known."""
    found = _entry(_attribute(robot, "calibration"), name)
    model = _attribute(_entry(_attribute(robot, "bus", "motors"), name), "model")
    steps = _entry(_attribute(robot, "bus", "model_resolution_table"), model)
    try:
        return float((found.range_max - found.range_min) * 2 * math.pi / (steps - 1))
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def _attribute(thing: Any, *names: str) -> Any:
    """What is found by these names, one in the other; None where one is not there, or cannot be had."""
    for name in names:
        try:
            thing = getattr(thing, name, None)
        except Exception:
            return None
    return thing


def _entry(mapping: Any, key: Any) -> Any:
    return mapping.get(key) if isinstance(mapping, Mapping) else None


def _is_array(feature: Any) -> bool:
    return isinstance(feature, (tuple, list))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _made(make: str | Callable[[], Any], where: str) -> tuple[Any, dict[str, Scale]]:
    """The robot, and the scales that come with it.

    Raises:
        UsageError: there is no such function, it fails, or what it returns is no robot.
    """
    function = _imported(make) if isinstance(make, str) else make
    try:
        made = function()
    except Exception as error:
        raise UsageError(f"{where} failed to make a robot: {_told(error)}") from error
    robot, scales = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(scales, Mapping) or not all(isinstance(scale, Scale) for scale in scales.values()):
        raise UsageError(
            f"{where} must return a robot, or a robot and a mapping of joint names to "
            f"ctrlrl.deploy.lerobot.Scale; the second was {scales!r}"
        )
    lacking = [name for name in PROPERTIES if not _has(robot, name)]
    lacking += [f"{name}()" for name in METHODS if not callable(_attribute(robot, name))]
    if lacking:
        raise UsageError(
            f"{where} returned a {type(robot).__name__}, which lacks {', '.join(lacking)} of LeRobot's Robot interface"
        )
    return robot, {str(name): scale for name, scale in scales.items()}


def _has(robot: Any, name: str) -> bool:
    try:
        return hasattr(robot, name)
    except Exception:  # a property that is there, and fails
        return True


def _imported(address: str) -> Callable[[], Any]:
    module, colon, name = address.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UsageError(f"a LeRobot robot is given as MODULE:FUNCTION, such as arm:make; got {address!r}")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UsageError(
                f"{address}: there is no module {error.name!r} in {sys.executable}. Start from the folder that "
                f"contains it (now {os.getcwd()}), or install it"
            ) from error
        raise UsageError(f"{address}: {module} cannot be imported: {_told(error)}") from error
    except Exception as error:
        raise UsageError(f"{address}: {module} cannot be imported: {_told(error)}") from error
    if not callable(function):
        known = [n for n, value in vars(sys.modules[module]).items() if callable(value) and not n.startswith("_")]
        raise UsageError(f"{address}: {module} has no function {name!r}.{nearest(name, known)}")
    made: Callable[[], Any] = function
    return made
