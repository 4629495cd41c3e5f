"""What a bundle says of itself: everything that a controller must know beside the network.

Names and never indices: joints and observation terms are found by what they are called. Numbers are JSON numbers in
full precision, positions rad or m, efforts N m or N, times s. Needs nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ctrlrl.deploy.strict_json import read_document, write_document
from ctrlrl.errors import UsageError, nearest

FORMAT = "ctrlrl.bundle/1"

MEASURES = {
    "joint position": "position of each of `joints`, less `offset`",
    "joint velocity": "velocity of each of `joints`",
    "joint direction": "sine and cosine of the position of each of `joints`",
    "joint lead": "from the position of each of `joints` to its target",
    "base linear velocity": "of the base, at its IMU where it has one, in its own frame",
    "base angular velocity": "of the base, in its own frame",
    "base up": "where up is, in the base's frame",
    "tool position": "of the tool, in the base's frame",
    "last action": "the policy's last action, zeros at first",
    "command": "what the policy is told to do",
    "gait clock": "sine and cosine of a phase that turns `frequency` times a second; zeros without a command",
    "given": "whatever the user's program measures",
}
"""What an observation term is computed from, and how."""

_VECTORS = ("base linear velocity", "base angular velocity", "base up", "tool position")

ACTIONS = {
    "joint position offset": "target = offset + scale * action",
    "joint position step": "target = target + scale * action, at most `lead` from the joint",
    "joint effort": "effort = scale * action",
    "box": "the action itself, in the environment's units",
    "choice": "a whole number, or one for each decision",
}
"""What a policy's numbers do."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of an observation vector."""

    name: str
    size: int
    """Numbers of one value."""
    measure: str
    """What it is computed from; one of `MEASURES`."""
    unit: str
    frame: Literal["", "base", "world", "joint"] = ""
    joints: tuple[str, ...] = ()
    offset: tuple[float, ...] = ()
    frequency: float = 0.0
    """Hz, of a clock."""
    resolution: float = 0.0
    """In what steps it was measured in training."""
    select: tuple[int, ...] = ()
    """Which numbers of a command it has; all, where none are named."""
    history: int = 1
    """Successive values, the oldest first. At first all are the first one."""
    delay: tuple[int, int] = (0, 0)
    """Control steps by which it came late in training, from and to."""
    noise: float = 0.0
    """Half width of the uniform noise in training, in the unit."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One input of the network that is observed."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64", "uint8", "bool"] = "float32"
    terms: tuple[Term, ...] = ()
    """One after the other; none where nothing is known of what is in it."""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """A joint that the policy drives or reads."""

    name: str
    unit: Literal["rad", "m"]
    lower: float | None
    """None where it turns without end."""
    upper: float | None
    default: float
    kp: float = 0.0
    """Of the position controller that it was trained with, N m/rad or N/m; 0: none."""
    kd: float = 0.0
    max_effort: float | None = None
    max_speed: float | None = None
    driven: bool = True


@dataclass(frozen=True, kw_only=True)
class Action:
    """What the network's action does."""

    kind: str
    """One of `ACTIONS`."""
    shape: tuple[int, ...]
    joints: tuple[str, ...] = ()
    """Of each number."""
    unit: str = ""
    low: tuple[float | None, ...] = ()
    """Bounds of the action; None: none."""
    high: tuple[float | None, ...] = ()
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    lead: tuple[float, ...] = ()
    """How far a target may be from its joint; 0: as far as it likes."""
    delay: tuple[int, int] = (0, 0)
    """Control steps by which it took effect late in training, from and to."""
    smoothing: tuple[float, ...] = ()
    """Seconds, time constants with which each motor followed its target in training; 0, or none: at once."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """How the network is stored, and which programs run it."""

    dtype: Literal["float32"] = "float32"
    opset: int
    tolerance: float = 1e-5
    """By which a runtime's numbers may differ from the goldens, relative to 1 or to the number."""
    runtimes: tuple[str, ...]
    why_not: str = ""
    """Why only onnxruntime runs it, where that is so."""
    state: dict[str, str] = field(default_factory=dict)
    """Inputs that are the policy's memory, zeros at first, and the outputs that they become."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A bundle's description.

    Raises:
        UsageError: on construction, where it contradicts itself.
    """

    format: str = FORMAT
    name: str
    robot: str | None = None
    """What `ctrlrl robots` calls it."""
    task: str
    """The environment it was trained on."""
    control_dt: float | None
    """Seconds between two actions."""
    timestep: float | None = None
    """Seconds of a step of the physics in training."""
    observation: tuple[Entry, ...]
    command: tuple[str, ...] = ()
    """What the numbers of the command are."""
    action: Action
    joints: tuple[Joint, ...] = ()
    gravity_compensated: bool = False
    """Whether the robot's weight was carried by its own controller in training, so that gains are for the rest."""
    network: Network
    provenance: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Of training: mean return and what else there was."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and sha256 of every other file."""

    def __post_init__(self) -> None:
        self._require(self.format == FORMAT, "format", f"{FORMAT}", self.format)
        known = {joint.name: joint for joint in self.joints}
        self._require(len(known) == len(self.joints), "joints", "of different names", [j.name for j in self.joints])
        for joint in self.joints:
            what = f"joints[{joint.name}]"
            low, high = (-math.inf if joint.lower is None else joint.lower), joint.upper
            self._require(low < (math.inf if high is None else high), what, "lower < upper", (joint.lower, joint.upper))
            self._require(joint.kp >= 0 and joint.kd >= 0, what, "kp and kd at least 0", (joint.kp, joint.kd))
            within = low <= joint.default <= (math.inf if high is None else high)
            self._require(within, what, "a default within its limits", joint.default)
        self._require(self.control_dt is None or 0 < self.control_dt <= 60, "control_dt", "s above 0", self.control_dt)
        names = [entry.name for entry in self.observation]
        self._require(len(set(names)) == len(names) > 0, "observation", "of entries of different names", names)
        for entry in self.observation:
            self._check_entry(entry, known)
        self._check_action(known)
        n = self.network
        self._require(0 < n.tolerance <= 1e-2, "network.tolerance", "above 0 and at most 0.01", n.tolerance)
        runs = n.runtimes and set(n.runtimes) <= {"onnx", "numpy", "c"}
        self._require(bool(runs), "network.runtimes", "some of onnx, numpy and c", n.runtimes)

    @property
    def is_robot(self) -> bool:
        """Whether it says how to make observations of a robot's measurements, and commands of actions."""
        return not self.unknown

    @property
    def unknown(self) -> str:
        """What a controller would have to know besides, to drive a robot; empty where there is nothing."""
        if not all(entry.terms for entry in self.observation):
            return f"it was trained on {self.task}, of whose observation nothing is known but its shape"
        if not self.action.kind.startswith("joint"):
            return f"how {self.task} makes commands to joints of its actions (inverse kinematics, say) is in no bundle"
        return ""

    def require_robot(self) -> None:
        """Raise UsageError where it does not say how to drive a robot; says what is missing, and what to do."""
        if not self.unknown:
            return
        remedy = "call the policy with observations of your own (ctrlrl.deploy.Actor)"
        if all(entry.terms for entry in self.observation):
            remedy = (
                'train with actions of joints (on the Panda\'s tasks without --env-kwargs \'{"action": "tool"}\'), or '
                "make commands of the actions in a program of your own (ctrlrl.deploy.Actor)"
            )
        raise UsageError(f"{self.name} does not say how to drive a robot: {self.unknown}. To use it, {remedy}")

    def _check_entry(self, entry: Entry, known: Mapping[str, Joint]) -> None:
        size = 0
        self._require(all(n >= 0 for n in entry.shape), f"observation {entry.name}", "of a shape", entry.shape)
        for term in entry.terms:
            what = f"observation {entry.name}/{term.name}"
            if term.measure not in MEASURES:
                raise UsageError(f"{what}: no measure {term.measure!r}.{nearest(term.measure, MEASURES)}")
            self._joints(what, term.joints, known)
            commands = len(term.select) or len(self.command)
            sizes = dict.fromkeys(_VECTORS, 3) | {"joint direction": 2 * len(term.joints), "gait clock": 2}
            sizes |= {"last action": math.prod(self.action.shape), "command": commands}
            width = sizes.get(term.measure, len(term.joints) if term.measure.startswith("joint") else term.size)
            self._require(term.size == width > 0, what, f"of {width} numbers", term.size)
            picked = all(0 <= n < len(self.command) for n in term.select)
            self._require(picked, what, f"a choice of {len(self.command)} numbers of the command", term.select)
            self._require(len(term.offset) in (0, term.size), what, "an offset for each number", len(term.offset))
            self._require(1 <= term.history <= 10_000, what, "a history from 1 to 10,000", term.history)
            timed = term.measure != "gait clock" or (self.control_dt is not None and term.frequency > 0)
            self._require(timed, what, "a clock with a frequency, and control_dt", term.frequency)
            self._require(
                term.delay[0] <= term.delay[1] and term.delay[0] >= 0, what, "a delay from and to", term.delay
            )
            size += term.size * term.history
        whole = not entry.terms or (entry.dtype == "float32" and entry.shape == (size,))
        self._require(whole, f"observation {entry.name}", f"float32 ({size},), as its terms are", entry.shape)

    def _check_action(self, known: Mapping[str, Joint]) -> None:
        action = self.action
        if action.kind not in ACTIONS:
            raise UsageError(f"action: no kind {action.kind!r}.{nearest(action.kind, ACTIONS)}")
        self._joints("action", action.joints, known)
        for low, high in zip(action.low, action.high, strict=False):
            self._require(low is None or high is None or low <= high, "action.low", "at most action.high", (low, high))
        if not action.kind.startswith("joint"):
            return
        for name in ("joints", "low", "high", "scale", "offset", "lead", "smoothing"):
            values, optional = getattr(action, name), name in ("lead", "smoothing")
            right = action.shape == (len(values),) or (optional and not values)
            self._require(right, f"action.{name}", f"{action.shape} of them", len(values))
            self._require(not optional or all(v >= 0 for v in values), f"action.{name}", "at least 0", values)
        self._require(len(set(action.joints)) == len(action.joints), "action.joints", "different", action.joints)
        for joint in (known[name] for name in action.joints):
            if "position" in action.kind:
                ok = joint.kp > 0 and joint.lower is not None and joint.upper is not None
                self._require(ok, f"joints[{joint.name}]", "kp above 0 and limits, for positions", joint)
            self._require((joint.max_effort or 0) > 0, f"joints[{joint.name}]", "an effort above 0", joint.max_effort)

    def _joints(self, what: str, names: tuple[str, ...], known: Mapping[str, Joint]) -> None:
        for name in names:
            if name not in known:
                raise UsageError(f"{what} names the joint {name!r}; the manifest has {', '.join(known) or 'none'}")

    def _require(self, ok: bool, what: str, rule: str, value: object) -> None:
        if not ok:
            raise UsageError(f"{what} must be {rule}, got {value}")

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        return write_document(self)

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Manifest:
        """Read it strictly; `where` names the file in errors.

        Raises:
            UsageError: it is no manifest: names the field, what is expected and what came.
        """
        return read_document(content, cls, where, "manifest", FORMAT)
