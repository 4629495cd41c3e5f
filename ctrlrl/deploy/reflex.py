"""A reflex: a critic that tells at each tick how risky the policy's command is, and a recovery that then takes over.

After Bresa (Zhang, Solak and Ajoudani 2025, arXiv:2503.21989), with the critic of Recovery RL (Thananjeyan et al. 2021,
arXiv:2010.15920). Of states s and commands a, and c = 1 where a constraint is violated, it has learned

    Q_risk(s, a) = c + (1 - c) gamma_safe Q_risk(s', a')

a number from 0 to 1: how likely, and how soon. It is asked more often than the policy. Above `threshold` the recovery
commands instead of the policy, until the risk of what the policy commands is down to `release`.

A reflex is a folder, without anything in it that is run but arithmetic:

    reflex.json          `ReflexSpec`, with the checksum of every other file
    reflex.sha256        its own
    network.json         (state, command) to risk, as operations, whose arrays are in policy.safetensors
    policy.safetensors
    golden.safetensors   states, commands, and the risks and recoveries that follow

`scripts/train_reflex.py` makes one.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctrlrl.deploy.bundle import GOLDENS, LARGEST_FILE, NETWORK, WEIGHTS, file_entry
from ctrlrl.deploy.driver import EFFORT_TOLERANCE, LIMIT_TOLERANCE
from ctrlrl.deploy.features import Reading
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.network import Network
from ctrlrl.deploy.safety import Fault
from ctrlrl.deploy.strict_json import read_document, write_document
from ctrlrl.deploy.tensors import Array, read_tensors, write_tensors
from ctrlrl.errors import UsageError
from ctrlrl.files import building_site, put_in_place, write_durably, write_errors_explained

FORMAT = "ctrlrl.reflex/1"
SPEC, SEAL = "reflex.json", "reflex.sha256"
STATE, COMMAND, RISK, RECOVERY = "state", "command", "risk", "recovery"
TOLERANCE = 1e-5
"""By which risks may differ from the goldens; recoveries relative to 1 or to the number."""


@dataclass(frozen=True, kw_only=True)
class ReadJoint:
    """A joint whose position and velocity the critic reads."""

    name: str
    unit: Literal["rad", "m"]
    lower: float | None = None
    """None where it turns without end."""
    upper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What is commanded instead of the policy's command; numbers are for `ReflexSpec.commands`, in their order."""

    kind: Literal["feedback", "hold"]
    """feedback: effort = -(k_p * (position - centre) + k_d * velocity), for robots that take efforts; hold: the
    position that was measured on taking over, for robots that take positions."""
    centre: tuple[float, ...] = ()
    """rad or m."""
    k_p: tuple[float, ...] = ()
    """N m/rad or N/m."""
    k_d: tuple[float, ...] = ()
    """N m s/rad or N s/m."""
    max_effort: tuple[float, ...] = ()
    """N m or N, to which the effort is kept."""

    def __call__(self, position: Array, velocity: Array) -> Array:
        """Commands (..., C) for joints at `position` (..., C) with `velocity` (..., C)."""
        if self.kind == "hold":
            return np.array(position, np.float64)
        most = np.array(self.max_effort)
        effort = -(np.array(self.k_p) * (position - np.array(self.centre)) + np.array(self.k_d) * velocity)
        return np.asarray(np.clip(effort, -most, most))


@dataclass(frozen=True, kw_only=True)
class ReflexSpec:
    """A reflex's description.

    Raises:
        UsageError: on construction, where it contradicts itself.
    """

    format: str = FORMAT
    robot: str
    """What `ctrlrl robots` calls it."""
    control: Literal["effort", "position"]
    """What the robot takes."""
    rate: float
    """Hz, at which the critic was trained and is to be asked."""
    reads: tuple[ReadJoint, ...]
    """The state is their positions, then their velocities."""
    commands: tuple[str, ...]
    """Joints whose commands the critic reads and the recovery gives, in this order; others are left to the policy."""
    threshold: float
    """Risk above which the recovery takes over."""
    release: float
    """Risk at which the policy gets the robot back."""
    longest: float
    """Seconds without a break for which it may have the robot; longer is a fault."""
    recovery: Recovery
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and sha256 of every other file."""

    def __post_init__(self) -> None:
        self._require(self.format == FORMAT, "format", FORMAT, self.format)
        self._require(0 < self.rate <= 100_000, "rate", "above 0 and at most 100,000 Hz", self.rate)
        names = [joint.name for joint in self.reads]
        self._require(len(set(names)) == len(names) > 0, "reads", "joints of different names", names)
        known = set(self.commands) <= set(names) and len(set(self.commands)) == len(self.commands) > 0
        self._require(known, "commands", f"some of {', '.join(names)}, each once", list(self.commands))
        levels = 0 < self.release < self.threshold < 1
        self._require(levels, "release, threshold", "0 < release < threshold < 1", (self.release, self.threshold))
        self._require(0 < self.longest <= 3600, "longest", "s above 0 and at most 3600", self.longest)
        law, kind = self.recovery, {"effort": "feedback", "position": "hold"}[self.control]
        self._require(law.kind == kind, "recovery.kind", f"{kind} for a robot that takes {self.control}s", law.kind)
        count = len(self.commands) if law.kind == "feedback" else 0
        for name in ("centre", "k_p", "k_d", "max_effort"):
            values = getattr(law, name)
            self._require(len(values) == count, f"recovery.{name}", f"{count} numbers", values)
            least = -math.inf if name == "centre" else 0
            self._require(all(v >= least for v in values), f"recovery.{name}", "at least 0", values)

    def _require(self, ok: bool, what: str, rule: str, value: object) -> None:
        if not ok:
            raise UsageError(f"{what} must be {rule}, got {value}")

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        return write_document(self)

    @classmethod
    def from_json(cls, content: bytes, where: str) -> ReflexSpec:
        """Read it strictly; `where` names the file in errors.

        Raises:
            UsageError: it is none: names the field, what is expected and what came.
        """
        return read_document(content, cls, where, "reflex", FORMAT)


class RiskReflex:
    """A reflex for one bundle and one robot; a `Reflex` of the controller.

    Args:
        spec: what it is.
        network: (state, command) to risk.
        manifest: of the bundle whose policy drives.
        joints: the names of a reading's joints, in their order.
        seal: the checksum of what it was read from.

    Raises:
        UsageError: it is for another robot, another rate, or other joints; names both sides.

    Attributes:
        rate: Hz.
        active: whether it has the robot.
        risk: of the last command that it was asked about.
    """

    def __init__(
        self, spec: ReflexSpec, network: Network, manifest: Manifest, joints: Sequence[str], *, seal: str = ""
    ) -> None:
        _require_network(spec, network, "the reflex")
        _require_fits(spec, manifest, joints)
        self.spec, self.rate, self.seal = spec, spec.rate, seal
        self._network, self._joints = network, list(joints)
        self._reads = np.array([self._joints.index(joint.name) for joint in spec.reads], np.int64)
        self._own = np.array([self._joints.index(name) for name in spec.commands], np.int64)
        self._told = np.array([manifest.action.joints.index(name) for name in spec.commands], np.int64)
        self.reset()

    def reset(self) -> None:
        """An episode begins: the policy has the robot."""
        self.active, self.risk, self._ticks = False, 0.0, 0
        self._place = np.zeros(len(self._own))  # where its joints were when it took over

    def __call__(self, reading: Reading, command: Array) -> Array | None:
        """What to command (A,) instead of the policy's `command` (A,), in the action's order; None: the policy's.

        Raises:
            Fault: it has had the robot for longer than it may, or the risk is no number.
            UsageError: the reading is of other joints than it was made for.
        """
        if reading.joints is not self._joints and list(reading.joints) != self._joints:
            raise UsageError(
                f"a reading is of the joints {', '.join(reading.joints)}; the reflex was made for "
                f"{', '.join(self._joints)}"
            )
        state = np.concatenate([reading.position[self._reads], reading.velocity[self._reads]])
        asked = {STATE: state.astype(np.float32)[None], COMMAND: command[self._told].astype(np.float32)[None]}
        self.risk = float(self._network(asked)[RISK].item())
        if not math.isfinite(self.risk):
            raise Fault("reflex", f"the risk is {self.risk}")
        if self.risk <= (self.spec.release if self.active else self.spec.threshold):
            self.active, self._ticks = False, 0
            return None
        if not self.active:
            self.active, self._place = True, np.array(reading.position[self._own], np.float64)
        self._ticks += 1
        if self._ticks > self.spec.longest * self.rate:
            raise Fault("reflex", f"it has had the robot for {self.spec.longest:g} s, and the risk is {self.risk:.3g}")
        holds = self.spec.recovery.kind == "hold"
        instead = np.array(command, np.float64)
        instead[self._told] = self.spec.recovery(
            self._place if holds else reading.position[self._own], reading.velocity[self._own]
        )
        return instead


def read_reflex(folder: str | Path, manifest: Manifest, joints: Sequence[str]) -> RiskReflex:
    """The reflex in `folder`, for the bundle with this manifest and a robot whose readings have `joints`.

    Raises:
        UsageError: there is none, a file was altered, its network gives other numbers than when it was written, or it
            is for another robot, rate or other joints.
    """
    spec, network, seal = _load(Path(folder))
    try:
        return RiskReflex(spec, network, manifest, joints, seal=seal)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from None


def write_reflex(out: str | Path, spec: ReflexSpec, network: Network, goldens: Mapping[str, Array]) -> None:
    """Write a reflex to the new folder `out`, where it appears whole, after its goldens were replayed.

    Args:
        out: must not hold anything yet.
        spec: all but `files`.
        network: inputs `state` (1, 2J) and `command` (1, C), output `risk` (1, 1), all float32.
        goldens: `state` (N, 2J), `command` (N, C) and the `risk` (N, 1) that the trained critic gave.

    Raises:
        UsageError: `out` is taken or cannot be written, or network or goldens are not as they should be.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another folder; nothing was overwritten")
    kept = {name: np.asarray(goldens[name], np.float32) for name in (STATE, COMMAND, RISK)}
    position, velocity = _own_of(spec, kept[STATE].astype(np.float64))
    contents = {
        NETWORK: json.dumps(network.to_json(), indent=1).encode(),
        WEIGHTS: write_tensors(network.constants),
        GOLDENS: write_tensors(kept | {RECOVERY: spec.recovery(position, velocity)}),
    }
    contents[SPEC] = replace(spec, files={name: file_entry(content) for name, content in contents.items()}).to_json()
    contents[SEAL] = hashlib.sha256(contents[SPEC]).hexdigest().encode() + b"\n"
    building = building_site(out)
    try:
        with write_errors_explained(out):
            building.mkdir(parents=True)
        for name, content in contents.items():
            write_durably(building / name, content)
        _load(building)
        put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _load(folder: Path) -> tuple[ReflexSpec, Network, str]:
    if not (folder / SPEC).is_file():
        raise UsageError(f"{folder} is no reflex: it has no {SPEC}. scripts/train_reflex.py makes one")
    raw = _content(folder / SPEC)
    seal = hashlib.sha256(raw).hexdigest()
    if _content(folder / SEAL).strip() != seal.encode():
        raise UsageError(f"{folder / SPEC} was altered: {SEAL} has another checksum")
    spec = ReflexSpec.from_json(raw, str(folder / SPEC))
    expected, there = {NETWORK, WEIGHTS, GOLDENS}, {entry.name for entry in folder.iterdir()} - {SPEC, SEAL}
    if spec.files.keys() != expected or there - expected:
        raise UsageError(
            f"{folder} holds {', '.join(sorted(there))}, and {SPEC} lists {', '.join(sorted(spec.files))}; "
            f"a reflex has {', '.join(sorted(expected))}"
        )
    contents = {name: _content(folder / name) for name in expected}
    for name, content in contents.items():
        if file_entry(content) != spec.files[name]:
            raise UsageError(
                f"{folder / name} was altered: it is {file_entry(content)}, and {SPEC} says {spec.files[name]}"
            )
    weights = read_tensors(contents[WEIGHTS], str(folder / WEIGHTS))
    network = Network.from_json(contents[NETWORK], weights, str(folder / NETWORK))
    _require_network(spec, network, str(folder))
    _replay(spec, network, read_tensors(contents[GOLDENS], str(folder / GOLDENS)), str(folder / GOLDENS))
    return spec, network, seal


def _content(file: Path) -> bytes:
    if file.is_symlink() or not file.is_file():
        raise UsageError(f"{file} is missing, or no plain file")
    if file.stat().st_size > LARGEST_FILE:
        raise UsageError(f"{file} has {file.stat().st_size:,} bytes; {LARGEST_FILE:,} are read at most")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None


def _own_of(spec: ReflexSpec, state: Array) -> tuple[Array, Array]:
    """Positions and velocities (..., C) of the joints it commands, of states (..., 2J)."""
    names = [joint.name for joint in spec.reads]
    own = np.array([names.index(name) for name in spec.commands], np.int64)
    return state[..., own], state[..., len(names) + own]


def _require_network(spec: ReflexSpec, network: Network, where: str) -> None:
    said = {STATE: (1, 2 * len(spec.reads)), COMMAND: (1, len(spec.commands)), RISK: (1, 1)}
    outputs = {name: network.values[result] for name, result in network.outputs.items()}
    values = network.inputs | outputs
    if {name: value.shape for name, value in values.items()} != said or any(
        value.dtype != "float32" for value in values.values()
    ):
        found = {name: (value.dtype, *value.shape) for name, value in values.items()}
        raise UsageError(f"{where}: the network has {found}; {SPEC} asks for float32, {said}")


def _replay(spec: ReflexSpec, network: Network, goldens: Mapping[str, Array], where: str) -> None:
    own = len(spec.commands)
    sizes = {STATE: 2 * len(spec.reads), COMMAND: own, RISK: 1, RECOVERY: own}
    count = len(goldens[STATE]) if STATE in goldens and goldens[STATE].ndim else 0
    if not count or {name: value.shape for name, value in goldens.items()} != {n: (count, s) for n, s in sizes.items()}:
        raise UsageError(
            f"{where} has no goldens of {', '.join(f'{name} (N, {size})' for name, size in sizes.items())}"
        )
    state, command = goldens[STATE].astype(np.float32), goldens[COMMAND].astype(np.float32)
    risk = np.concatenate([network({STATE: state[i : i + 1], COMMAND: command[i : i + 1]})[RISK] for i in range(count)])
    pairs = {RISK: risk, RECOVERY: spec.recovery(*_own_of(spec, state.astype(np.float64)))}
    for name, made in pairs.items():
        wanted = goldens[name].astype(np.float64)
        off = np.abs(made - wanted) / np.maximum(1.0, np.abs(wanted))
        if not (off <= TOLERANCE).all():
            raise UsageError(
                f"{where}: the {name} of golden {int(np.argmax(off.max(1)))} is off by {off.max():.3g}, and "
                f"{TOLERANCE:g} is allowed: it is not what was written"
            )


def _require_fits(spec: ReflexSpec, manifest: Manifest, joints: Sequence[str]) -> None:
    """Raise UsageError unless a reflex is for this bundle and robot; names both sides."""
    if manifest.robot != spec.robot:
        whose = manifest.robot or "one without a name"
        raise UsageError(f"the reflex is for the robot {spec.robot}, and {manifest.name} for {whose}")
    control = "effort" if manifest.action.kind == "joint effort" else "position"
    if control != spec.control:
        raise UsageError(f"the reflex commands {spec.control}s, and {manifest.name} {control}s")
    if missing := [joint.name for joint in spec.reads if joint.name not in joints]:
        raise UsageError(
            f"the reflex reads {', '.join(missing)}, and the robot has no such joint. The reflex's: "
            f"{', '.join(joint.name for joint in spec.reads)}. The robot's: {', '.join(joints)}"
        )
    if unknown := [name for name in spec.commands if name not in manifest.action.joints]:
        raise UsageError(
            f"the reflex commands {', '.join(unknown)}, which {manifest.name} does not. The reflex's: "
            f"{', '.join(spec.commands)}. The policy's: {', '.join(manifest.action.joints)}"
        )
    known = {joint.name: joint for joint in manifest.joints}
    for joint in spec.reads:
        its = known.get(joint.name)
        if its is None:
            continue
        limits = zip((joint.lower, joint.upper), (its.lower, its.upper), strict=True)
        if joint.unit != its.unit or not all(_same(*pair) for pair in limits):
            raise UsageError(
                f"{joint.name}: the reflex was trained with limits {joint.lower} to {joint.upper} {joint.unit}, and "
                f"{manifest.name} says {its.lower} to {its.upper} {its.unit}; is it the joint that is meant?"
            )
    for name, most in zip(spec.commands, spec.recovery.max_effort, strict=False):
        allowed = known[name].max_effort or 0.0
        if most > allowed * (1 + EFFORT_TOLERANCE):
            raise UsageError(f"the reflex pushes {name} with up to {most:g}, and {manifest.name} allows {allowed:g}")
    times = spec.rate * (manifest.control_dt or 0.0)
    if round(times) < 1 or abs(times - round(times)) > 1e-3 * times:
        raise UsageError(
            f"the reflex is for {spec.rate:g} Hz, which is no whole multiple of the policy's "
            f"{1 / manifest.control_dt if manifest.control_dt else 0:g} Hz: train it at one that is"
        )


def _same(ours: float | None, its: float | None) -> bool:
    if ours is None or its is None:
        return ours is its
    return math.isclose(ours, its, abs_tol=LIMIT_TOLERANCE)
