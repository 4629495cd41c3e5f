"""What stands between a policy and a robot: checks of measurements, limits of commands, and when to stop.

The order within a tick is: age, finite, (observe, infer), finite, clip, scale, slew, position, effort. A fault is for
good: after it nothing but the safe action is commanded, until the controller is started again. Limits do not stop the
robot, they hold commands back and are counted; where one holds the same joint back for long, something is wrong, and
that is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctrlrl.deploy.features import up_in_base
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import DRIVEN, RobotDescription, State
from ctrlrl.errors import UsageError

FAULTS = {
    "no state": "no state came in time after the start",
    "age": "the newest state is too old: the robot, its driver or the way between are gone or slow",
    "clock": "the robot's clock jumped, or goes backward",
    "not finite": "a measurement is not a finite number",
    "frozen": "a measurement does not change, though the robot moves or was told to",
    "outside": "a joint is far outside its limits, or faster than can be: a sensor or a name is wrong",
    "tilt": "the base is tilted by more than allowed",
    "action": "the policy gave an action that is not finite",
    "clip": "actions were beyond their bounds for too long",
    "slew": "commands were held back for changing too fast for too long",
    "position": "commands were held back at a joint's limit for too long",
    "effort": "commands were held back for asking more than a motor gives for too long",
    "late": "the control loop was late too often: the computer is overloaded",
    "reflex": "the reflex took over",
    "robot": "the robot made itself safe: commands did not reach it in time",
    "program": "the controller's own program failed",
    "stopped": "stopped from outside",
}
"""What each fault means."""
LIMITS = ("clip", "slew", "position", "effort")


class Fault(Exception):
    """Something that stops the robot.

    Args:
        kind: one of `FAULTS`.
        detail: what exactly.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        assert kind in FAULTS
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Limits of a controller.

    Raises:
        UsageError: on construction, where a number is out of range.
    """

    max_age: float | None = None
    """Seconds after which a state is too old; by default two periods of the policy."""
    freeze: float = 0.2
    """Seconds for which a measurement may be the same to the bit while the robot moves, or is told to; 0: for ever."""
    slew: float = 10.0
    """Ranges of its joint (limit to limit) that a target may go through in a second."""
    effort_slew: float = 100.0
    """The same for efforts, from one largest to the other: motors may push the other way at once."""
    margin: float = 0.005
    """Share of a joint's range that commands stay away from its limits."""
    effort: float = 1.0
    """Share of its motor's largest effort that a command may ask for at the moment it is sent."""
    outside: float = 0.1
    """rad or m that a joint may be measured outside its limits."""
    tilt: float = 1.2
    """rad that the base may be tilted from where up is, if it is measured; 0: any."""
    persist: float = 2.0
    """Seconds for which a limit may hold one joint back without a break; 0: for ever."""
    clip_persist: float = 0.0
    """The same for actions beyond their bounds, as policies give them that were trained so."""
    late: int = 5
    """Ticks, of the last 50, that may begin later than half a period."""
    late_share: float = 0.5
    """Of a period, after which a tick is late."""

    def __post_init__(self) -> None:
        for name in ("freeze", "outside", "tilt", "persist", "clip_persist"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("slew", "effort_slew", "effort", "late_share"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("margin", 0 <= self.margin < 0.5, "from 0 to less than 0.5")
        self._require("late", self.late >= 0, "at least 0")
        self._require("max_age", self.max_age is None or self.max_age > 0, "above 0")

    def _require(self, name: str, ok: bool, rule: str) -> None:
        value = getattr(self, name)
        if not ok or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"--safety.{name.replace('_', '-')} must be {rule}, got {value}")


class Clock:
    """How old a robot's states are, though its clock has another zero and goes a little differently.

    The difference of both clocks at the state that came quickest is what they differ by; what another one is later
    than that is its age, and what even the quickest may have taken: at most `unseen` s, a message and its answer. A
    drift of 200 millionths is followed.
    """

    DRIFT = 2e-4

    def __init__(self, allowed: float, unseen: float = 0.0) -> None:
        self._allowed, self._unseen = allowed, unseen
        self._offset, self._last, self._seen = math.inf, -math.inf, -math.inf

    def take(self, robot: float, now: float) -> None:
        """A state with the robot's time was read at `now`, both in s.

        Raises:
            Fault: the robot's clock jumped.
        """
        passed = 0.0 if self._seen == -math.inf else now - self._seen
        if robot <= self._last:
            raise Fault("clock", f"the robot's clock went back by {self._last - robot:.6f} s")
        offset = now - robot
        if self._offset < math.inf and offset < self._offset - self._allowed:
            raise Fault("clock", f"the robot's clock jumped ahead by {self._offset - offset:.3f} s")
        self._offset = min(offset, self._offset + self.DRIFT * passed)
        self._last, self._seen = robot, now

    def age(self, now: float) -> float:
        """s, of the state that was taken last; infinite before the first."""
        return now - self._last - self._offset + self._unseen if self._seen > -math.inf else math.inf


class Checks:
    """Whether measurements are to be believed.

    Args:
        manifest: of the policy.
        robot: what the robot says.
        config: limits.
    """

    MOVED = 1e-3
    """rad or m by which a joint has moved if it has."""
    TOLD, PUSHED = 0.01, 0.1
    """Share of its range by which a joint's target has changed if it has been told to move; of efforts, from one end to
    the other, that friction no longer holds."""

    def __init__(self, manifest: Manifest, robot: RobotDescription, config: SafetyConfig) -> None:
        self._config, self._names = config, [joint.name for joint in robot.joints]
        limits = [(joint.lower, joint.upper) for joint in robot.joints]
        low = np.array([-math.inf if lower is None else lower for lower, _ in limits])
        high = np.array([math.inf if upper is None else upper for _, upper in limits])
        self._low, self._high = low - config.outside, high + config.outside
        known = {joint.name: joint for joint in manifest.joints}
        fastest = [known[n].max_speed if n in known else None for n in self._names]
        self._fastest = np.array([math.inf if speed is None else 2 * speed for speed in fastest])
        self._driven = [self._names.index(name) for name in manifest.action.joints]
        self._told = np.full(len(self._names), math.inf)
        for name, place in zip(manifest.action.joints, self._driven, strict=True):
            joint = known[name]
            if manifest.action.kind == "joint effort":
                self._told[place] = self.PUSHED * 2 * (joint.max_effort or math.inf)
            elif joint.lower is not None and joint.upper is not None:
                self._told[place] = self.TOLD * (joint.upper - joint.lower)
        self._watched = [name for name in robot.measures if name in _SENSED]
        self._tilts = config.tilt > 0 and "orientation" in robot.measures
        self.reset()

    def reset(self) -> None:
        """Forget what was measured before."""
        count = len(self._names)
        self._position, self._velocity = np.full(count, np.nan), np.full(count, np.nan)
        self._since = np.full(count, np.nan)
        self._target = np.full(count, np.nan)
        self._swing = np.zeros(count)  # by which the target has changed since the joint was last seen to move
        self._others: dict[str, tuple[Array, float, Array]] = {}

    def take(self, state: State) -> None:
        """
        Raises:
            Fault: a measurement is not to be believed.
        """
        for name, value in (("position", state.position), ("velocity", state.velocity), *state.others.items()):
            if not np.isfinite(value).all():
                raise Fault("not finite", f"{name} is {value.tolist()}")
        out = (state.position < self._low) | (state.position > self._high) | (np.abs(state.velocity) > self._fastest)
        if out.any():
            i = int(np.argmax(out))
            raise Fault(
                "outside", f"{self._names[i]} is said to be at {state.position[i]:.4g}, moving {state.velocity[i]:.4g}"
            )
        if self._tilts:
            try:
                up = up_in_base(state.others["orientation"])[2]
            except UsageError as error:
                raise Fault("outside", str(error)) from None
            if up < math.cos(self._config.tilt):
                raise Fault("tilt", f"{math.acos(max(-1.0, min(1.0, up))):.2f} rad, allowed are {self._config.tilt:g}")
        if self._config.freeze:
            self._frozen(state)

    def told(self, target: Array) -> None:
        """What was commanded, (A,): by it joints should move."""
        for place, value in zip(self._driven, target, strict=True):
            if not math.isnan(self._target[place]):
                self._swing[place] += abs(value - self._target[place])
            self._target[place] = value

    def _frozen(self, state: State) -> None:
        if state.mode != DRIVEN:  # nothing moves it
            self.reset()
            return
        same = (state.position == self._position) & (state.velocity == self._velocity)
        self._position, self._velocity = state.position.copy(), state.velocity.copy()
        self._since = np.where(same, self._since, state.time)
        self._swing[~same] = 0.0
        long = state.time - self._since > self._config.freeze
        # A joint at rest stays the same; one that is said to move, or was told to, does not.
        stuck = long & ((np.abs(state.velocity) > 1e-9) | (self._swing > self._told))
        if stuck.any():
            i = int(np.argmax(stuck))
            raise Fault(
                "frozen", f"{self._names[i]} is at {state.position[i]:.6g} for {state.time - self._since[i]:.3f} s"
            )
        for name in self._watched:
            value = state.others[name]
            last = self._others.get(name)
            if last is None or not np.array_equal(value, last[0]):
                self._others[name] = value.copy(), state.time, state.position.copy()
            elif state.time - last[1] > self._config.freeze and np.abs(state.position - last[2]).max() > self.MOVED:
                raise Fault("frozen", f"{name} is {value.tolist()} for {state.time - last[1]:.3f} s, while joints move")


_SENSED = ("angular velocity", "linear velocity", "orientation", "tool position")


class Limits:
    """Holds commands back, and counts it.

    Args:
        manifest: of the policy.
        config: limits.
        period: s, between two commands.
        control_dt: s, between two actions.

    Attributes:
        counts: of ticks and joints at which each limit held back, by `LIMITS`.
        bend: rad or m by which half of each motor's largest effort keeps a joint from its target, (A,).
    """

    def __init__(self, manifest: Manifest, config: SafetyConfig, period: float, control_dt: float) -> None:
        action = manifest.action
        self._config, self._period, self._control_dt = config, period, control_dt
        self.names = action.joints
        known = {joint.name: joint for joint in manifest.joints}
        joints = [known[name] for name in action.joints]
        self._efforts = action.kind == "joint effort"
        low = np.array([-math.inf if j.lower is None else j.lower for j in joints])
        high = np.array([math.inf if j.upper is None else j.upper for j in joints])
        width = np.where(np.isfinite(high - low), high - low, 0.0)
        self.low, self.high = low + config.margin * width, high - config.margin * width
        self._largest = config.effort * np.array([j.max_effort for j in joints], np.float64)
        self._kp, self._kd = np.array([j.kp for j in joints]), np.array([j.kd for j in joints])
        with np.errstate(divide="ignore"):
            self.bend = np.where(self._kp > 0, self._largest / 2 / self._kp, 0.0)
        self._step = period * (config.effort_slew * 2 * self._largest if self._efforts else config.slew * width)
        bounds = ((action.low, -math.inf), (action.high, math.inf))
        self._bounds = [np.array([rest if b is None else b for b in given], np.float32) for given, rest in bounds]
        self.counts = dict.fromkeys(LIMITS, 0)
        self._row = {name: np.zeros(len(joints)) for name in LIMITS}  # s in a row
        self.last: Array | None = None

    def reset(self, last: Array | None) -> None:
        """Start where the last command is `last`, (A,); None: any first command is as good."""
        self.last = last
        for row in self._row.values():
            row[:] = 0.0

    def clips(self, action: Array) -> None:
        """Count what an action (A,) is beyond its bounds; `FeatureBuilder.act` clips it.

        Raises:
            Fault: it is so for too long.
        """
        beyond = (action < self._bounds[0]) | (action > self._bounds[1])
        self._held("clip", beyond, self._config.clip_persist, self._control_dt)

    def __call__(self, command: Array, position: Array, velocity: Array) -> Array:
        """The command that may be sent, (A,), for driven joints at `position` with `velocity`.

        Raises:
            Fault: a limit holds back one joint for too long.
        """
        if self.last is not None:
            slow = np.clip(command, self.last - self._step, self.last + self._step)
            # What is beyond a joint's limits is not slow to come there.
            there = command if self._efforts else np.clip(command, self.low, self.high)
            self._held("slew", np.abs(there - self.last) > self._step * (1 + 1e-9))
            command = slow
        if self._efforts:
            # Where there is no target to hold back, it is the push further out that is.
            out = ((position <= self.low) & (command < 0)) | ((position >= self.high) & (command > 0))
            self._held("position", out)
            command = np.where(out, 0.0, command)
            within = np.clip(command, -self._largest, self._largest)
        else:
            inside = np.clip(command, self.low, self.high)
            self._held("position", inside != command)
            brake = self._kd * velocity
            within = np.clip(
                inside, position + (brake - self._largest) / self._kp, position + (brake + self._largest) / self._kp
            )
            command = inside
            # A joint that is far outside, or fast, may leave no command that is within both: the limits then decide.
            within = np.clip(within, self.low, self.high)
        self._held("effort", np.abs(within - command) > 1e-12)
        self.last = within
        return within

    def _held(self, name: str, joints: Array, persist: float | None = None, period: float | None = None) -> None:
        self.counts[name] += int(joints.sum())
        row = self._row[name]
        row[joints] += self._period if period is None else period
        row[~joints] = 0.0
        allowed = self._config.persist if persist is None else persist
        if allowed and row.max(initial=0.0) > allowed:
            i = int(np.argmax(row))
            raise Fault(name, f"{self.names[i]} is held back for {row[i]:.2f} s")


class Lateness:
    """When ticks began, against when they should have.

    Attributes:
        counts: of ticks, by powers of two of microseconds: below 1, 2, 4, ...
        worst: s.
        late: ticks that were late.
    """

    WINDOW = 50
    BUCKETS = 24

    def __init__(self, period: float, config: SafetyConfig) -> None:
        self._period, self._allowed, self._most = period, config.late_share * period, config.late
        self.counts = [0] * self.BUCKETS
        self.worst, self.late = 0.0, 0
        self._recent = [False] * self.WINDOW
        self._at, self._sum = 0, 0

    def take(self, lateness: float, missed: int = 0) -> None:
        """A tick began `lateness` s late, after as many that were `missed`.

        Raises:
            Fault: too many have.
        """
        for _ in range(min(missed, self.WINDOW)):
            self._count(True)
        self.late += max(0, missed - self.WINDOW)
        hole = lateness + missed * self._period  # by which the first of those that were missed is late, at least
        self.counts[_bucket(hole)] += missed
        self.counts[_bucket(lateness)] += 1
        self.worst = max(self.worst, hole)
        self._count(lateness > self._allowed)
        if self._sum > self._most:
            raise Fault("late", f"{self._sum} of the last {self.WINDOW} ticks, this one by {lateness * 1e3:.2f} ms")

    def _count(self, late: bool) -> None:
        self.late += late
        self._sum += late - self._recent[self._at]
        self._recent[self._at] = late
        self._at = (self._at + 1) % self.WINDOW

    def percentile(self, share: float) -> float:
        """s, within a factor of two: above which `1 - share` of the ticks were."""
        total, seen = sum(self.counts), 0
        for i, count in enumerate(self.counts):
            seen += count
            if total and seen >= share * total:
                return float(2**i) / 1e6
        return 0.0


def _bucket(lateness: float) -> int:
    return min(Lateness.BUCKETS - 1, max(0, int(lateness * 1e6)).bit_length())


def driven_of(robot: RobotDescription, joints: Sequence[str]) -> tuple[Array, Array]:
    """Where `joints` are in a robot's states, and where in its commands, (A,) int64 each."""
    names = [joint.name for joint in robot.joints]
    commanded = [joint.name for joint in robot.driven]
    return (
        np.array([names.index(name) for name in joints], np.int64),
        np.array([commanded.index(name) for name in joints], np.int64),
    )
