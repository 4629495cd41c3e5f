"""What a simulated robot measures: the state by MuJoCo's own functions, the noise of the task, and what is made to go
wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mujoco
import numpy as np

from ctrlrl.deploy.features import READINGS, Reading
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import State
from ctrlrl.envs.spec import SimTask
from ctrlrl.robots.robot import Robot


def measured(model: mujoco.MjModel, data: mujoco.MjData, robot: Robot, names: Sequence[str]) -> Reading:
    """What a robot in this state measures, by MuJoCo's own functions and none of the task's."""
    joints = [model.joint(name) for name in names]
    base, moves, turn = model.body(robot.base).id, np.zeros(6), np.zeros(4)
    kind, _, name = robot.frames.get("imu", "").partition(":")
    if kind == "site":  # which need not be where the base's frame is
        imu = model.site(name).id
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_SITE, imu, moves, 1)
        mujoco.mju_mat2Quat(turn, data.site_xmat[imu])
    else:
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, base, moves, 1)
        turn = data.xquat[base].copy()
    others = {"angular velocity": moves[:3], "linear velocity": moves[3:], "orientation": turn}
    kind, _, name = robot.frames.get("tool", "").partition(":")
    if kind == "site":
        others["tool position"] = data.xmat[base].reshape(3, 3).T @ (data.site(name).xpos - data.xpos[base])
    position = np.array([data.qpos[joint.qposadr[0]] for joint in joints])
    return Reading(list(names), position, np.array([data.qvel[joint.dofadr[0]] for joint in joints]), others)


class Sensors:
    """Noise and faults of a robot's measurements.

    Args:
        task: whose noise it is.
        config: how much of it, and what goes wrong.
    """

    def __init__(self, task: SimTask, config: SimulatedConfig) -> None:
        self._config = config
        self._noise = _noise_of(task, config.impairments.noise)
        self._random = np.random.default_rng(config.random)
        self._frozen: State | None = None

    def begin_episode(self) -> None:
        """What was frozen moves again."""
        self._frozen = None

    def spoil(self, state: State, seconds: float, first: bool) -> bool:
        """Write noise and faults into a state; False: nothing is to be sent.

        Args:
            state: as it is.
            seconds: of the episode; negative before it has begun.
            first: whether it is the first episode, the only one in which something is injected.
        """
        self._add_noise(state)
        return self._inject(state, seconds, first)

    def _add_noise(self, state: State) -> None:
        for name, width in self._noise.items():
            if name == "joint position":
                state.position = _rounded(state.position + self._draw(width[0], state.position.shape), width[1])
            elif name == "joint velocity":
                state.velocity = state.velocity + self._draw(width[0], state.velocity.shape)
            elif name == "orientation":
                if width[0].any():
                    turn, result = np.array([1.0, *self._draw(width[0] / 2, (3,))]), np.zeros(4)
                    mujoco.mju_mulQuat(result, state.others[name], turn / np.linalg.norm(turn))
                    state.others[name] = result
            elif name in state.others:
                state.others[name] = state.others[name] + self._draw(width[0], state.others[name].shape)

    def _draw(self, width: Array, shape: tuple[int, ...]) -> Array:
        return width * self._random.uniform(-1, 1, shape)

    def _inject(self, state: State, passed: float, first: bool) -> bool:
        freeze, inject = self._config.impairments.freeze, self._config.inject
        if freeze is not None and passed >= freeze:
            self._freeze(state, slice(None))
        if inject is None or passed < self._config.inject_at or not first:
            return True
        if inject == "silence":
            return False
        if inject == "freeze":
            self._freeze(state, slice(None))
        elif inject == "freeze joint":
            self._freeze(state, slice(0, 1))
        elif inject == "not finite":
            state.position = state.position.copy()
            state.position[self._random.integers(len(state.position))] = math.nan
        elif inject in ("clock ahead", "clock back"):
            state.time += 10.0 if inject == "clock ahead" else -10.0
        elif inject == "swap":
            state.position, state.velocity = state.position[::-1].copy(), state.velocity[::-1].copy()
        elif inject == "tilt" and "orientation" in state.others:
            state.others["orientation"] = np.array([math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0])
        return True

    def _freeze(self, state: State, joints: slice) -> None:
        if self._frozen is None:
            self._frozen = replace(state, others=dict(state.others))
        state.position, state.velocity = state.position.copy(), state.velocity.copy()
        state.position[joints] = self._frozen.position[joints]
        state.velocity[joints] = self._frozen.velocity[joints]
        if joints == slice(None):
            state.others = dict(self._frozen.others)


def _rounded(value: Array, step: Array) -> Array:
    """In steps, where there are any."""
    return np.where(step > 0, np.round(value / np.where(step > 0, step, 1.0)) * step, value)


def _noise_of(task: SimTask, scale: float) -> dict[str, tuple[Array, Array]]:
    """Half widths of the noise, and resolutions, by what is measured; for joints one for each."""
    names = list(task.joints)
    out: dict[str, tuple[Array, Array]] = {}
    for term in task.policy_terms.values():
        m = term.measure
        if m is None:
            continue
        if m.what in ("joint position", "joint velocity", "joint direction"):
            what = "joint velocity" if m.what == "joint velocity" else "joint position"
            width, step = out.setdefault(what, (np.zeros(len(names)), np.zeros(len(names))))
            for name in m.joints:
                width[names.index(name)] = scale * term.noise
                step[names.index(name)] = m.resolution if what == "joint position" else 0.0
        elif m.what in READINGS:
            out[READINGS[m.what]] = np.array([scale * term.noise]), np.zeros(1)
    return out
