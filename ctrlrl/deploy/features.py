"""From a robot's measurements to what the network observes, and from its action to commands: by name, in NumPy.

History, the last action, targets and clocks are kept here, and not in the network. Vectors are float32, as in training;
everything else is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ctrlrl.deploy.manifest import Manifest, Term
from ctrlrl.deploy.tensors import Array
from ctrlrl.errors import UsageError

READINGS = {
    "base linear velocity": "linear velocity",
    "base angular velocity": "angular velocity",
    "base up": "orientation",
    "tool position": "tool position",
}
"""What of a reading a measure needs. An orientation is a quaternion, w first."""


@dataclass
class Reading:
    """What a robot measured at one moment.

    Attributes:
        joints: the names of `position` and `velocity`.
        position: rad or m, (J,).
        velocity: rad/s or m/s, (J,).
        others: `linear velocity` (3,) m/s and `angular velocity` (3,) rad/s of the base, at its IMU where it has one
            and in its frame, `orientation` (4,) of that in the world, `tool position` (3,) m; and what is `given`, by
            its term's name.
    """

    joints: Sequence[str]
    position: Array
    velocity: Array
    others: Mapping[str, Array] = field(default_factory=dict)


def require_joints(manifest: Manifest, joints: Sequence[str]) -> None:
    """Raise unless a robot has the joints that the policy observes and drives, each once.

    Raises:
        UsageError: a joint is missing, or there twice; shows both lists.
    """
    needed = {name for entry in manifest.observation for term in entry.terms for name in term.joints}
    needed |= set(manifest.action.joints)
    if missing := sorted(needed - set(joints)):
        raise UsageError(
            f"the policy needs {', '.join(missing)}, and the robot has no such joint. "
            f"The policy's: {', '.join(sorted(needed))}. The robot's: {', '.join(joints)}"
        )
    if len(set(joints)) != len(joints):
        raise UsageError(f"the robot names a joint twice: {', '.join(joints)}")


def require_readable(manifest: Manifest, joints: Sequence[str], others: Sequence[str]) -> None:
    """Raise unless a robot that measures this gives all that the policy observes, and has the joints it drives.

    Raises:
        UsageError: a joint or a measurement is missing, or a joint is there twice; shows both lists.
    """
    require_joints(manifest, joints)
    wanted = [
        READINGS.get(term.measure, term.name)
        for entry in manifest.observation
        for term in entry.terms
        if term.measure in READINGS or term.measure == "given"
    ]
    if lacking := [name for name in wanted if name not in others]:
        raise UsageError(
            f"the policy observes {', '.join(lacking)}, which the robot does not measure. "
            f"The policy's: {', '.join(wanted)}. The robot's: {', '.join(others) or 'none'}"
        )


class FeatureBuilder:
    """Makes observations of readings, for one bundle and one robot.

    Args:
        manifest: of the bundle.
        joints: the names of a reading's joints, in their order.

    Raises:
        UsageError: the policy needs joints that are not there, or its terms cannot be computed.

    Attributes:
        command: what the policy is told to do, (C,); set it at any time.
        target: of each joint that the action drives, where it drives positions, (A,).
    """

    def __init__(self, manifest: Manifest, joints: Sequence[str]) -> None:
        manifest.require_robot()
        require_joints(manifest, joints)
        self.manifest = manifest
        self._joints = list(joints)
        place = {name: i for i, name in enumerate(joints)}
        self._driven = np.array([place[name] for name in manifest.action.joints], np.int64)
        self._terms = [(entry, [_TermBuilder(term, place) for term in entry.terms]) for entry in manifest.observation]
        self.command = np.zeros(len(manifest.command))
        known = {joint.name: joint for joint in manifest.joints}
        driven = [known[name] for name in manifest.action.joints]
        self._low = np.array([-math.inf if j.lower is None else j.lower for j in driven])
        self._high = np.array([math.inf if j.upper is None else j.upper for j in driven])
        self._effort = np.array([j.max_effort for j in driven], np.float64)
        a = manifest.action
        self._scale, self._offset = np.array(a.scale), np.array(a.offset)
        # Bounds come of training as float32, and numbers are to be the same.
        self._bounds = tuple(
            np.array([default if bound is None else bound for bound in bounds], np.float32)
            for bounds, default in ((a.low, -math.inf), (a.high, math.inf))
        )
        self._lead = np.array([lead or math.inf for lead in a.lead or [0.0] * len(a.joints)])
        self.target = self._offset.copy()
        self.last_action = np.zeros(a.shape, np.float32)
        self._seconds = 0.0
        self._fresh, self._begun = True, False

    def reset(self, reading: Reading) -> None:
        """Start an episode: histories are of this reading alone, targets where the joints are.

        Raises:
            UsageError: the reading is of other joints, lacks a measurement that is observed, or is not finite.
        """
        require_readable(self.manifest, reading.joints, list(reading.others))
        self._check(reading)
        self._seconds, self._begun = 0.0, True
        self._fresh = True
        self.last_action[:] = 0
        self.target = self._offset.copy() if self.manifest.action.kind == "joint position offset" else self._at(reading)

    def observe(self, reading: Reading) -> dict[str, Array]:
        """Observations (1, ...) by the network's input names, of a reading and what was done before.

        Raises:
            UsageError: no episode was started, or the reading is not as `reset` asks for.
        """
        self._check(reading)
        self._require_begun()
        out = {}
        for entry, builders in self._terms:
            parts = [builder(reading, self, fresh=self._fresh) for builder in builders]
            out[entry.name] = np.concatenate(parts).astype(np.float32)[None]
        self._fresh = False
        return out

    def act(self, action: Array, reading: Reading) -> Array:
        """What an action (A,) commands: position targets rad or m, or efforts N m or N, (A,) in the action's order.

        Within the action's bounds, the joints' limits and the largest effort; further limits are the controller's.

        Raises:
            UsageError: the action is of another shape or not finite, or the reading not as `reset` asks for. Nothing
                has changed then.
        """
        m = self.manifest.action
        self._check(reading)
        self._require_begun()
        if action.shape != m.shape or not np.isfinite(action).all():
            raise UsageError(f"an action must be {m.shape} finite numbers, got {action}")
        action = np.clip(action.astype(np.float32), *self._bounds)
        self.last_action = action
        self._seconds += self.manifest.control_dt or 0.0
        if m.kind == "joint effort":
            effort: Array = np.clip(self._scale * action, -self._effort, self._effort)
            return effort
        if m.kind == "joint position offset":
            self.target = np.clip(self._offset + self._scale * action, self._low, self._high)
        else:
            at = self._at(reading)
            target = np.clip(self.target + self._scale * action, at - self._lead, at + self._lead)
            self.target = np.clip(target, self._low, self._high)
        return self.target.copy()

    def _check(self, reading: Reading) -> None:
        if reading.joints is not self._joints and list(reading.joints) != self._joints:
            raise UsageError(
                f"a reading is of the joints {', '.join(reading.joints)}; it began with {', '.join(self._joints)}"
            )
        for name, value in (("positions", reading.position), ("velocities", reading.velocity)):
            if value.shape != (len(self._joints),) or not np.isfinite(value).all():
                raise UsageError(f"{name} must be {len(self._joints)} finite numbers, got {value}")

    def _require_begun(self) -> None:
        if not self._begun:
            raise UsageError("no episode was started: call reset with the first reading")

    def _at(self, reading: Reading) -> Array:
        return np.asarray(reading.position, np.float64)[self._driven].copy()

    @property
    def seconds(self) -> float:
        """Of the episode, in control steps."""
        return self._seconds


class _TermBuilder:
    def __init__(self, term: Term, place: Mapping[str, int]) -> None:
        self.term = term
        self._at = np.array([place[name] for name in term.joints], np.int64)
        self._offset = np.array(term.offset or [0.0] * term.size)
        self._past = np.zeros((term.history, term.size))

    def __call__(self, reading: Reading, builder: FeatureBuilder, *, fresh: bool) -> Array:
        value = self._value(reading, builder)
        if value.shape != (self.term.size,) or not np.isfinite(value).all():
            raise UsageError(f"{self.term.name} must be {self.term.size} finite numbers, got {value}")
        value = value - self._offset
        if self.term.history == 1:
            return np.asarray(value)
        if fresh:
            self._past[:] = value
        else:
            self._past[:-1] = self._past[1:]
            self._past[-1] = value
        return self._past.ravel()

    def _value(self, reading: Reading, builder: FeatureBuilder) -> Array:
        term = self.term
        if term.measure == "joint position":
            return np.asarray(reading.position, np.float64)[self._at]
        if term.measure == "joint velocity":
            return np.asarray(reading.velocity, np.float64)[self._at]
        if term.measure == "joint direction":
            angles = np.asarray(reading.position, np.float64)[self._at]
            return np.concatenate([np.sin(angles), np.cos(angles)])
        if term.measure == "joint lead":
            targets = dict(zip(builder.manifest.action.joints, builder.target, strict=True))
            at = np.asarray(reading.position, np.float64)[self._at]
            return np.array([targets.get(name, q) - q for name, q in zip(term.joints, at, strict=True)])
        if term.measure == "base up":
            return up_in_base(np.asarray(reading.others["orientation"], np.float64))
        if term.measure in READINGS:
            return np.asarray(reading.others[READINGS[term.measure]], np.float64)
        if term.measure == "given":
            return np.asarray(reading.others[term.name], np.float64)
        if term.measure == "last action":
            return builder.last_action.astype(np.float64)
        if term.measure == "command":
            return builder.command[list(term.select)] if term.select else builder.command.copy()
        assert term.measure == "gait clock"
        angle = 2 * math.pi * (builder.seconds * term.frequency % 1.0)
        moving = float(np.abs(builder.command).max(initial=0.0) > 0.01)
        return np.array([math.sin(angle), math.cos(angle)]) * moving


def up_in_base(quaternion: Array) -> Array:
    """(3,) where up is in the frame of a base with this orientation in the world, (w, x, y, z).

    The same for a quaternion and its negative. What is not of length 1 is made so.
    """
    length = float(np.linalg.norm(quaternion))
    if quaternion.shape != (4,) or not 0.5 < length < 2:
        raise UsageError(f"an orientation must be a quaternion of length 1, got {quaternion}")
    w, x, y, z = quaternion / length
    # The third row of its rotation matrix.
    return np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])
