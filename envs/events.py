"""Events that tasks share: randomization of what a robot is made of, and disturbances.

Each function returns what an `Event` does. Ranges are uniform, from and to. Model fields go back to the file's values
before they are changed, so that changes do not add up over episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mujoco
import torch
from torch import Tensor

from ctrlrl.envs.world import World, index_of

Do = Callable[[World, Tensor], None]
Range = tuple[float, float]


def friction(geoms: Sequence[str], sliding: Range) -> Do:
    """Sliding friction of the geoms, one number for all of them.

    Of two geoms that touch, the one with the higher `priority` says what friction there is; with equal ones it is the
    larger of both. So give the geoms priority over what they touch.
    """

    def do(world: World, rows: Tensor) -> None:
        own, _ = world.model_field("geom_friction")  # (N, ngeom, 3)
        index = world.indices(mujoco.mjtObj.mjOBJ_GEOM, geoms)
        _put(own, rows, (slice(None), index, 0), world.random.uniform(1, *sliding))

    return do


def mass(body: str, scale: Range, added: Range = (0.0, 0.0)) -> Do:
    """Mass of a body times a factor, and kilograms added; its inertia follows the mass."""

    def do(world: World, rows: Tensor) -> None:
        index = index_of(world.model, mujoco.mjtObj.mjOBJ_BODY, body)
        own, first = world.model_field("body_mass")
        inertia, first_inertia = world.model_field("body_inertia")
        new = first[index] * world.random.uniform(1, *scale) + world.random.uniform(1, *added)  # (N, 1)
        _put(own, rows, (slice(None), index), new[:, 0])
        _put(inertia, rows, (slice(None), index), new / first[index] * first_inertia[index])

    return do


def center_of_mass(body: str, offset: Range, along: str = "xyz") -> Do:
    """Center of mass of a body, moved in meters, by an offset of its own along each of these axes of the body."""
    axes = ["xyz".index(axis) for axis in along]

    def do(world: World, rows: Tensor) -> None:
        index = index_of(world.model, mujoco.mjtObj.mjOBJ_BODY, body)
        own, first = world.model_field("body_ipos")
        drawn = world.random.uniform(len(axes), *offset)
        for axis, moved in zip(axes, drawn.unbind(1), strict=True):
            _put(own, rows, (slice(None), index, axis), first[index, axis] + moved)

    return do


def gains(stiffness: Range, damping: Range) -> Do:
    """Stiffness and damping of position actuators, each times a factor of its own."""

    def do(world: World, rows: Tensor) -> None:
        gain, first_gain = world.model_field("actuator_gainprm")
        bias, first_bias = world.model_field("actuator_biasprm")
        count = world.model.nu
        kp, kd = world.random.uniform(count, *stiffness), world.random.uniform(count, *damping)
        _put(gain, rows, (slice(None), slice(None), 0), first_gain[:, 0] * kp)
        _put(bias, rows, (slice(None), slice(None), 1), first_bias[:, 1] * kp)
        _put(bias, rows, (slice(None), slice(None), 2), first_bias[:, 2] * kd)

    return do


def motor_strength(scale: Range) -> Do:
    """Largest force of each actuator, times a factor of its own: smaller forces are as before."""

    def do(world: World, rows: Tensor) -> None:
        own, first = world.model_field("actuator_forcerange")
        factor = world.random.uniform(world.model.nu, *scale)
        _put(own, rows, (slice(None), slice(None), slice(None)), first * factor[:, :, None])

    return do


def motor_constant(scale: Range) -> Do:
    """All forces of each actuator that takes efforts, times a factor of its own, after it has cut them to its range.

    Not for actuators that take positions, whose idea of where the joint is would change, too: `gains` is for those.
    """

    def do(world: World, rows: Tensor) -> None:
        own, first = world.model_field("actuator_gear")
        factor = world.random.uniform(world.model.nu, *scale)
        _put(own, rows, (slice(None), slice(None), 0), first[:, 0] * factor)

    return do


def joint_friction(joints: Sequence[str], loss: Range) -> Do:
    """Dry friction of hinges and slides, in N m and N, each with its own."""

    def do(world: World, rows: Tensor) -> None:
        own, _ = world.model_field("dof_frictionloss")
        index = world.dofs(joints)
        _put(own, rows, (slice(None), index), world.random.uniform(len(index), *loss))

    return do


def joint_damping(joints: Sequence[str], scale: Range) -> Do:
    """Damping of hinges and slides, each times a factor of its own."""
    return _scaled_dofs("dof_damping", joints, scale)


def armature(joints: Sequence[str], scale: Range) -> Do:
    """Inertia of the rotors that drive hinges and slides, each times a factor of its own."""
    return _scaled_dofs("dof_armature", joints, scale)


def bias(name: str, offset: Range, size: int = 1) -> Do:
    """What a sensor is off by: numbers in `world.memory(name, size, keep=True)`, for the sensor's term to add."""

    def do(world: World, rows: Tensor) -> None:
        own = world.memory(name, size, keep=True)
        own.copy_(torch.where(rows[:, None], world.random.uniform(size, *offset), own))

    return do


def push(speed: Range) -> Do:
    """A kick: adds to the horizontal velocity of the first, floating joint, m/s in a random direction."""

    def do(world: World, rows: Tensor) -> None:
        drawn = world.random.uniform(2)
        size, angle = speed[0] + drawn[:, :1] * (speed[1] - speed[0]), drawn[:, 1:] * (2 * torch.pi)
        kick = torch.cat([size * angle.cos(), size * angle.sin()], 1)
        world.write("qvel", rows, world.live("qvel")[:, :2] + kick, slice(0, 2))

    return do


def joint_offsets(offset: Range) -> Do:
    """Positions of the task's joints at an episode's start, from the pose, rad or m."""

    def do(world: World, rows: Tensor) -> None:
        drawn = world.random.uniform(len(world.default_joint_pos), *offset)
        world.write("qpos", rows, world.default_joint_pos + drawn, world.joint_qpos)

    return do


def _put(own: Tensor, rows: Tensor, at: tuple[object, ...], value: Tensor) -> None:
    """Set entries of a live model field where `rows`."""
    part = own[at]  # type: ignore[index]
    where = rows.view(-1, *[1] * (part.dim() - 1))
    own[at] = torch.where(where, value.to(own.dtype), part)  # type: ignore[index]


def _scaled_dofs(field: str, joints: Sequence[str], scale: Range) -> Do:
    def do(world: World, rows: Tensor) -> None:
        own, first = world.model_field(field)
        index = world.dofs(joints)
        _put(own, rows, (slice(None), index), first[index] * world.random.uniform(len(index), *scale))

    return do
