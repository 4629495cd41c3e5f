"""What a robot is to a controller: joints, limits, gains, frames, and the model file they must agree with.

A description is data, one file per robot (`go1.py`, ...). Its numbers decide, not those of the model file: `Robot.spec`
loads the file, refuses it where it is another robot, and puts actuators, gains and inertias of the description into it,
so that the same robot moves the same way wherever its file came from. MuJoCo is imported when a model is loaded.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctrlrl.errors import UsageError, nearest
from ctrlrl.robots.resolver import ModelSource, find_model, locate_model

if TYPE_CHECKING:
    import mujoco
    import numpy as np

LIMIT_TOLERANCE = 1e-3
"""rad or m by which a model file's joint limits may differ from the description's."""
MASS_TOLERANCE = 0.02
"""Share of the mass by which a model file's robot may differ."""

ROBOTS = {
    "go1": "ctrlrl.robots.go1",
    "go2": "ctrlrl.robots.go2",
    "panda": "ctrlrl.robots.panda",
    "so101": "ctrlrl.robots.so101",
    "cartpole": "ctrlrl.robots.cartpole",
    "pendulum": "ctrlrl.robots.pendulum",
}
"""The module whose ROBOT each name stands for."""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """One actuated joint. Units: rad, N m, kg m^2 for hinges; m, N, kg for slides."""

    name: str
    """As in the model file."""
    lower: float
    """-inf where it turns without end."""
    upper: float
    default: float
    """Position in the default pose."""
    kp: float = 0.0
    """Stiffness of the position controller, N m/rad (N/m); 0 where the robot takes efforts."""
    kd: float = 0.0
    """Damping of the position controller, N m s/rad (N s/m)."""
    max_effort: float
    """What the motor can give at the joint, either way, N m (N)."""
    armature: float
    """Inertia of the rotor as the joint feels it: rotor inertia times gear ratio squared, kg m^2 (kg)."""
    max_speed: float | None = None
    """No-load speed, rad/s (m/s), where a source gives it. For those who write rewards or drivers; the simulated motor
    does not know it."""
    damping: float = 0.0
    """Passive viscous friction, N m s/rad (N s/m), that does not count against `max_effort`."""
    friction: float = 0.0
    """Passive dry friction, N m (N)."""
    unit: Literal["rad", "m"] = "rad"
    tendon: str | None = None
    """The tendon of the model file by which the motor pulls, instead of at the joint itself; it must have the joint's
    position for a length."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A frame that the model file lacks: `Robot.spec` adds it."""

    name: str
    body: str
    pos: tuple[float, float, float]
    """In the body's frame, m; axes are the body's."""


@dataclass(frozen=True, kw_only=True)
class Robot:
    """A robot's description.

    Raises:
        UsageError: on construction, where it contradicts itself.
    """

    name: str
    """What a user types."""
    title: str
    kind: Literal["quadruped", "arm", "rig"]
    joints: tuple[Joint, ...]
    """In the order of actions."""
    passive: Mapping[str, float] = field(default_factory=dict)
    """The robot's other joints, which no motor drives by itself, and their positions in the default pose."""
    control: Literal["position", "effort"] = "position"
    """What the motors take: joint positions (rad, m), or efforts (N m, N)."""
    base: str
    """The body that carries all others."""
    base_height: float | None = None
    """Height of `base` over the floor, in m, on which the default pose stands; None for a base that is fixed."""
    mass: float
    """Of the whole robot, kg."""
    frames: Mapping[str, str]
    """Our names of what rewards and observations refer to, and what they are in the model: `site:imu`, `geom:FR`."""
    sites: tuple[Site, ...] = ()
    """Frames to be added to the model file."""
    licence: str
    """SPDX identifier of the model files."""
    model: ModelSource

    def __post_init__(self) -> None:
        names = [*(joint.name for joint in self.joints), *self.passive]
        if len(set(names)) != len(names):
            raise UsageError(f"{self.name}: joint names must differ, got {', '.join(names)}")
        for frame, where in self.frames.items():
            if where.partition(":")[0] not in ("body", "geom", "site"):
                raise UsageError(f"{self.name}: frame {frame} must be body:NAME, geom:NAME or site:NAME, got {where!r}")
        for joint in self.joints:
            what = f"{self.name}: {joint.name}"
            if not joint.lower <= joint.default <= joint.upper:
                raise UsageError(f"{what}: default {joint.default} is not within {joint.lower} to {joint.upper}")
            if (joint.kp > 0) != (self.control == "position"):
                raise UsageError(f"{what}: kp must be positive with position control and 0 else, got {joint.kp}")
            if math.isinf(joint.upper - joint.lower) and self.control == "position":
                raise UsageError(f"{what}: a position controller needs limits, got {joint.lower} to {joint.upper}")
            if joint.max_effort <= 0:
                raise UsageError(f"{what}: max_effort must be positive, got {joint.max_effort}")

    def find(self, folder: str | Path | None = None) -> Path:
        """The model file; downloaded where it is nowhere on this machine.

        Args:
            folder: look there and nowhere else: a folder laid out as MuJoCo Menagerie or holding the file, or a file.

        Raises:
            UsageError: as `resolver.find_model`.
        """
        return find_model(self.name, self.model, self.licence, folder)

    def locate(self) -> Path | None:
        """The model file, or None where `find` would download it."""
        return locate_model(self.name, self.model)[0]

    def spec(self, folder: str | Path | None = None) -> mujoco.MjSpec:
        """The model file as an editable specification, checked, with the motors of this description.

        Actuators of the file are replaced: one for each of `joints`, in that order and under its name. With position
        control the target's range is lower to upper, and the effort is kp (target - position) - kd speed, cut at
        max_effort; with effort control it is the effort itself. Armature, damping and friction loss of these joints
        are the description's; damping by the controller (kd) is best integrated by `implicitfast`. Keyframes are
        dropped, since their controls belong to the file's actuators (`default_qpos` has the default pose). Bodies,
        collision geometry, sensors and solver options are the file's: a task sets what it needs.

        Raises:
            UsageError: as `find`; the file is not MJCF that MuJoCo reads, or it is not of this robot (`check`).
        """
        import mujoco

        path = self.find(folder)
        try:
            spec = mujoco.MjSpec.from_file(str(path))
            for site in self.sites:
                body = spec.body(site.body)
                if body is not None and spec.site(site.name) is None:
                    body.add_site(name=site.name, pos=site.pos)
            for element in (*spec.actuators, *spec.keys):
                spec.delete(element)
            self._check(spec.compile(), f"{path}: ")
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{self.name}: MuJoCo cannot load {path}: {error}") from error
        for joint in self.joints:
            self._drive(spec, joint)
        return spec

    def check(self, spec_or_model: mujoco.MjSpec | mujoco.MjModel) -> None:
        """Refuse a model that is not of this robot; what else is in the scene does not matter.

        Compared are the joints below `base` (their names, kinds and limits), whether the base is free, the mass, the
        frames, and the tendons by which motors pull. Actuators are not: `spec` brings them.

        Raises:
            UsageError: naming all that differs, what the model has and what the description says.
        """
        import mujoco

        model = spec_or_model.compile() if isinstance(spec_or_model, mujoco.MjSpec) else spec_or_model
        self._check(model, "")

    def default_qpos(self, model: mujoco.MjModel) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Positions (nq,) of a model with this robot in it: the default pose, standing upright at the origin.

        Everything else in the model is where `model.qpos0` has it.
        """
        qpos: np.ndarray[Any, np.dtype[np.float64]] = model.qpos0.copy()
        pose = {joint.name: joint.default for joint in self.joints} | dict(self.passive)
        for name, position in pose.items():
            qpos[model.jnt_qposadr[model.joint(name).id]] = position
        if self.base_height is not None:
            start = model.jnt_qposadr[model.body_jntadr[model.body(self.base).id]]
            qpos[start : start + 7] = [0, 0, self.base_height, 1, 0, 0, 0]
        return qpos

    def _drive(self, spec: mujoco.MjSpec, joint: Joint) -> None:
        import mujoco

        driven = spec.joint(joint.name)
        driven.armature, driven.frictionloss = joint.armature, joint.friction
        driven.damping = [joint.damping, 0, 0]
        actuator = spec.add_actuator(name=joint.name, target=joint.tendon or joint.name)
        on_tendon = joint.tendon is not None
        actuator.trntype = mujoco.mjtTrn.mjTRN_TENDON if on_tendon else mujoco.mjtTrn.mjTRN_JOINT
        # All that matters is set here, since the file's own defaults for actuators reach new ones, too.
        actuator.dyntype = mujoco.mjtDyn.mjDYN_NONE
        actuator.gear = [1, 0, 0, 0, 0, 0]
        actuator.gaintype = mujoco.mjtGain.mjGAIN_FIXED
        actuator.gainprm, actuator.biasprm = [0.0] * 10, [0.0] * 10
        if self.control == "position":
            actuator.gainprm[0] = joint.kp
            actuator.biastype = mujoco.mjtBias.mjBIAS_AFFINE
            actuator.biasprm[1:3] = [-joint.kp, -joint.kd]
            actuator.ctrlrange = [joint.lower, joint.upper]
        else:
            actuator.gainprm[0] = 1
            actuator.biastype = mujoco.mjtBias.mjBIAS_NONE
            actuator.ctrlrange = [-joint.max_effort, joint.max_effort]
        actuator.forcerange = [-joint.max_effort, joint.max_effort]
        actuator.ctrllimited = actuator.forcelimited = mujoco.mjtLimited.mjLIMITED_TRUE

    def _check(self, model: mujoco.MjModel, source: str) -> None:
        wrong = list(self._differences(model))
        if wrong:
            raise UsageError(f"{source}this is not the {self.name} that is described: {'; '.join(wrong)}")

    def _differences(self, model: mujoco.MjModel) -> list[str]:
        bodies = _names(model, "body")
        if self.base not in bodies:
            return [f"no body {self.base}, it has {', '.join(bodies[1:])}"]
        base = bodies.index(self.base)
        wrong = self._joint_differences(model, base)
        mass = float(model.body_subtreemass[base])
        if abs(mass - self.mass) > MASS_TOLERANCE * self.mass:
            wrong.append(f"its mass is {mass:.4g} kg, not {self.mass:g} kg")

        # A file need not have the sites that `spec` adds, only their bodies.
        added = {f"site:{site.name}": f"body:{site.body}" for site in self.sites}
        needed = {frame: added.get(where, where) for frame, where in self.frames.items()}
        needed |= {f"motor of {joint.name}": f"tendon:{joint.tendon}" for joint in self.joints if joint.tendon}
        for what, where in needed.items():
            kind, _, name = where.partition(":")
            known = [known for known in _names(model, kind) if known]
            if name not in known:
                wrong.append(f"no {kind} {name} ({what}), its {kind}s: {', '.join(known) or 'none with a name'}")
        return wrong

    def _joint_differences(self, model: mujoco.MjModel, base: int) -> list[str]:
        import mujoco

        inside = {base}
        for body in range(base + 1, model.nbody):  # parents come first
            if model.body_parentid[body] in inside:
                inside.add(body)
        free, hinge = mujoco.mjtJoint.mjJNT_FREE, mujoco.mjtJoint.mjJNT_HINGE
        joints = {model.joint(j).name: j for j in range(model.njnt) if model.jnt_bodyid[j] in inside}
        floating = [name for name, j in joints.items() if model.jnt_type[j] == free and model.jnt_bodyid[j] == base]
        for name in floating:
            del joints[name]
        described = [*(joint.name for joint in self.joints), *self.passive]
        wrong = []
        if missing := [name for name in described if name not in joints]:
            wrong.append(f"no joint {', '.join(missing)}, it has {', '.join(joints) or 'none'}")
        if unknown := [name or "one without a name" for name in joints if name not in described]:
            wrong.append(f"joints that are not described: {', '.join(unknown)}")
        if bool(floating) != (self.base_height is not None):
            wrong.append(f"its base {self.base} is {'free, not fixed' if floating else 'fixed, not free'}")
        for joint in self.joints:
            if joint.name not in joints:
                continue
            j = joints[joint.name]
            unit = "rad" if model.jnt_type[j] == hinge else "m"
            lower, upper = model.jnt_range[j].tolist() if model.jnt_limited[j] else (-math.inf, math.inf)
            if unit != joint.unit or not (_close(lower, joint.lower) and _close(upper, joint.upper)):
                is_so, should = f"{lower:g} to {upper:g} {unit}", f"{joint.lower:g} to {joint.upper:g} {joint.unit}"
                wrong.append(f"{joint.name} moves from {is_so}, not {should}")
        return wrong


def get_robot(name: str) -> Robot:
    """The description of the robot called `name`.

    Raises:
        UsageError: if there is none; suggests the nearest names.
    """
    if name not in ROBOTS:
        raise UsageError(f"no robot {name!r}.{nearest(name, ROBOTS)} There is: {', '.join(ROBOTS)} (ctrlrl robots)")
    robot: Robot = importlib.import_module(ROBOTS[name]).ROBOT
    return robot


def _names(model: mujoco.MjModel, kind: str) -> list[str]:
    """Names of all bodies, geoms, sites or tendons, in the model's order."""
    count = {"body": model.nbody, "geom": model.ngeom, "site": model.nsite, "tendon": model.ntendon}[kind]
    return [getattr(model, kind)(i).name for i in range(count)]


def _close(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= LIMIT_TOLERANCE
