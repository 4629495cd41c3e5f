"""Gymnasium's MuJoCo environments, version 5, as tasks over `Sim`: the same numbers, N at once.

Every number (weights, ranges, noise, the model, the time limit) is read from one environment that Gymnasium makes with
the user's arguments, so whatever those change is changed here. It also draws.

Observations and physics equal Gymnasium's to the bit, episode after episode, for the same seeds: starts are drawn from
generators seeded alike and in its order. Rewards equal its to the last bit of float32, up to a rounding in one of some
hundred million where float64 sums are added in another order.

Ant, Humanoid and HumanoidStandup observe contact forces (`cfrc_ext`), which Gymnasium computes after the last stage of
a Runge-Kutta step. `exact` does as it does, on `ThreadSim`. Without, they come from the first stage of the last
substep, on `BatchSim`: faster, physics and everything else as before, forces of the same kind but not the same.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch

from ctrlrl.envs.sim import BatchSim, Sim, ThreadSim
from ctrlrl.envs.tasks.task import Array, Outcome, RowRandom
from ctrlrl.envs.tasks.twin import GymnasiumTask, between


def sum_of_squares(x: Array) -> Array:
    """Over the last dimension, in x's own type."""
    total: Array = np.square(x).sum(-1)
    return total


class MujocoTask(GymnasiumTask):
    """What the tasks share: the model, the simulations, starts with noise."""

    may_diverge = True
    contact_forces = False
    """Whether `cfrc_ext` is read."""
    velocity_noise = "uniform"
    """Of starts: uniform, or normal."""

    def __init__(
        self, twin: gym.Env[Any, Any], name: str, num_envs: int, *, threads: int | None = None, exact: bool = True
    ) -> None:
        super().__init__(twin, name, num_envs, threads=threads, exact=exact)
        own = self.own
        self.dt = float(own.dt)
        self.sim = self._simulations(own, threads, exact)
        self.qpos, self.qvel, self.ctrl = (self.field(field) for field in ("qpos", "qvel", "ctrl"))
        self.frame_skip = int(own.frame_skip)
        self._noise = float(getattr(own, "_reset_noise_scale", 0.0))
        self._start = own.init_qpos.copy(), own.init_qvel.copy()
        self.bind(own)

    def bind(self, own: Any) -> None:
        """Ask for the derived fields and take the numbers of the Gymnasium environment `own`."""

    def field(self, name: str) -> Array:
        """The live (N, ...) array of a field of the simulations."""
        return self.sim.field(name).numpy()

    @abstractmethod
    def outcome(self, action: Array) -> Outcome:
        """What the step that was just simulated came to."""

    def before(self) -> None:
        """Remember what is needed of the state before a step."""

    def start(self, rows: Array, random: RowRandom) -> tuple[Array, Array]:
        """(N, nq), (N, nv): positions and velocities to start from, in the order in which Gymnasium draws them."""
        noise = self._noise
        qpos = self._start[0] + random.uniform(rows, -noise, noise, self.sim.model.nq)
        if self.velocity_noise == "normal":
            return qpos, self._start[1] + noise * random.normal(rows, self.sim.model.nv)
        return qpos, self._start[1] + random.uniform(rows, -noise, noise, self.sim.model.nv)

    def begin(self, rows: Array, random: RowRandom) -> None:
        qpos, qvel = self.start(rows, random)
        which = torch.from_numpy(rows)
        self.sim.reset(which)
        self.qpos[rows], self.qvel[rows] = qpos[rows], qvel[rows]
        self.sim.forward(which)
        if isinstance(self.sim, BatchSim) and self.contact_forces:
            self.forces[rows] = 0.0  # as after `mj_resetData`; a batch's are of the last step on the same thread

    def step(self, action: Array) -> Outcome:
        self.before()
        self.ctrl[:] = action
        self.sim.step(self.frame_skip)
        outcome = self.outcome(action)
        diverged = self.sim.diverged()
        outcome.diverged = None if diverged is None else diverged.numpy()
        return outcome

    def get_state(self) -> dict[str, Array]:
        return {name: value.numpy() for name, value in self.sim.get_state().items()}

    def set_state(self, rows: Array, state: dict[str, Array]) -> None:
        tensors = {name: torch.from_numpy(value) for name, value in state.items()}
        self.sim.set_state(torch.from_numpy(rows), tensors)

    def show(self, own: Any) -> None:
        self.scene(0)

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model, data = self.own.model, self.own.data
        data.qpos[:], data.qvel[:], data.ctrl[:] = self.qpos[row], self.qvel[row], self.ctrl[row]
        mujoco.mj_forward(model, data)
        return model, data

    def close(self) -> None:
        self.sim.close()
        super().close()

    def _simulations(self, own: Any, threads: int | None, exact: bool) -> Sim:
        if not self.contact_forces:
            return BatchSim(own.model, self.num_envs, threads)
        sim: Sim
        if exact:
            sim = ThreadSim(own.model, self.num_envs, threads, mujoco.mj_rnePostConstraint)
        else:
            sim = BatchSim(with_contact_forces(own.fullpath), self.num_envs, threads)
        self.forces = sim.field("cfrc_ext").numpy()
        return sim


def with_contact_forces(path: str) -> mujoco.MjModel:
    """The model with a sensor of acceleration, for which MuJoCo computes contact forces in every step."""
    spec = mujoco.MjSpec.from_file(path)
    spec.worldbody.first_body().add_site(name="ctrlrl_site")
    spec.add_sensor(type=mujoco.mjtSensor.mjSENS_ACCELEROMETER, objtype=mujoco.mjtObj.mjOBJ_SITE, objname="ctrlrl_site")
    return spec.compile()


# --- running ----------------------------------------------------------------------------------------------------------


class Runner(MujocoTask):
    """Forward velocity, minus a cost of control; healthy while upright, where that is asked for."""

    skipped = 1
    """Leading coordinates that are not observed."""
    clipped = False
    """Whether velocities are clipped to [-10, 10]."""

    def bind(self, own: Any) -> None:
        self._forward, self._control = own._forward_reward_weight, own._ctrl_cost_weight
        self._first = self.skipped if own._exclude_current_positions_from_observation else 0
        self._x = np.zeros(self.num_envs)

    def before(self) -> None:
        self._x[:] = self.qpos[:, 0]

    def observe(self) -> Array:
        velocity = self.qvel.clip(-10, 10) if self.clipped else self.qvel
        return np.concatenate((self.qpos[:, self._first :], velocity), 1)

    def outcome(self, action: Array) -> Outcome:
        forward = self._forward * ((self.qpos[:, 0] - self._x) / self.dt)
        control = self._control * sum_of_squares(action)
        log = {"reward/forward": forward, "reward/control": -control}
        return Outcome(forward - control, self.nowhere(), log)


class HalfCheetah(Runner):
    """Two legs in the plane, on a time limit alone."""

    velocity_noise = "normal"


class Swimmer(Runner):
    """Three links in a viscous fluid."""

    skipped = 2


class Hopper(Runner):
    """One leg in the plane; ends where it is bent too far or too low."""

    clipped = True

    def bind(self, own: Any) -> None:
        super().bind(own)
        self._survive, self._ends = own._healthy_reward, own._terminate_when_unhealthy
        self._height, self._angle = own._healthy_z_range, own._healthy_angle_range
        self._state = getattr(own, "_healthy_state_range", None)

    def healthy(self) -> Array:
        """(N,) bool."""
        z, angle = self.qpos[:, 1], self.qpos[:, 2]
        healthy = between(z, self._height) & between(angle, self._angle)
        if self._state is not None:
            healthy &= between(np.concatenate((self.qpos, self.qvel), 1)[:, 2:], self._state).all(1)
        return healthy

    def outcome(self, action: Array) -> Outcome:
        healthy = self.healthy()
        forward = self._forward * ((self.qpos[:, 0] - self._x) / self.dt)
        survive, control = healthy * self._survive, self._control * sum_of_squares(action)
        log = {"reward/forward": forward, "reward/survive": survive, "reward/control": -control}
        return Outcome(forward + survive - control, ~healthy if self._ends else self.nowhere(), log)


class Walker2d(Hopper):
    """Two legs in the plane; as Hopper, without bounds on the rest of the state."""


# --- contact forces ---------------------------------------------------------------------------------------------------


class Ant(MujocoTask):
    """Four legs; forces are clipped, and cost."""

    contact_forces = True
    velocity_noise = "normal"

    def bind(self, own: Any) -> None:
        self._forward, self._control = own._forward_reward_weight, own._ctrl_cost_weight
        self._survive, self._ends, self._height = (
            own._healthy_reward,
            own._terminate_when_unhealthy,
            own._healthy_z_range,
        )
        self._contact, self._range = own._contact_cost_weight, own._contact_force_range
        self._shows_forces = own._include_cfrc_ext_in_observation
        self._first = 2 if own._exclude_current_positions_from_observation else 0
        self._body = self.field("xpos")[:, own.data.body(own._main_body).id, 0]
        self._x = np.zeros(self.num_envs)

    def before(self) -> None:
        self._x[:] = self._body

    def observe(self) -> Array:
        parts = [self.qpos[:, self._first :], self.qvel]
        if self._shows_forces:
            parts.append(self.forces[:, 1:].clip(*self._range).reshape(self.num_envs, -1))
        return np.concatenate(parts, 1)

    def outcome(self, action: Array) -> Outcome:
        z = self.qpos[:, 2]
        healthy = (self._height[0] <= z) & (z <= self._height[1])
        healthy &= np.isfinite(self.qpos).all(1) & np.isfinite(self.qvel).all(1)
        forward, survive = (self._body - self._x) / self.dt * self._forward, healthy * self._survive
        control = self._control * sum_of_squares(action)
        contact = self._contact * sum_of_squares(self.forces.clip(*self._range).reshape(self.num_envs, -1))
        log = {"reward/forward": forward, "reward/survive": survive}
        log |= {"reward/control": -control, "reward/contact": -contact}
        reward = forward + survive - (control + contact)
        return Outcome(reward, ~healthy if self._ends else self.nowhere(), log)


class _Human(MujocoTask):
    """The observation of Humanoid and HumanoidStandup."""

    contact_forces = True

    def bind(self, own: Any) -> None:
        self._first = 2 if own._exclude_current_positions_from_observation else 0
        self._control = own._ctrl_cost_weight
        shown = []
        if own._include_cinert_in_observation:
            shown.append(self.field("cinert")[:, 1:])
        if own._include_cvel_in_observation:
            shown.append(self.field("cvel")[:, 1:])
        if own._include_qfrc_actuator_in_observation:
            shown.append(self.field("qfrc_actuator")[:, 6:])
        if own._include_cfrc_ext_in_observation:
            shown.append(self.forces[:, 1:])
        self._shown = shown

    def observe(self) -> Array:
        shown = [value.reshape(self.num_envs, -1) for value in self._shown]
        return np.concatenate([self.qpos[:, self._first :], self.qvel, *shown], 1)


class Humanoid(_Human):
    """Runs upright; the velocity is that of the center of mass."""

    def bind(self, own: Any) -> None:
        super().bind(own)
        self._forward, self._survive = own._forward_reward_weight, own._healthy_reward
        self._ends, self._height = own._terminate_when_unhealthy, own._healthy_z_range
        self._contact, self._range = own._contact_cost_weight, own._contact_cost_range
        self._mass = own.model.body_mass.copy()
        self._centers = self.field("xipos")[:, :, 0]
        self._x = np.zeros(self.num_envs)

    def center(self) -> Array:
        """(N,) x of the center of mass."""
        center: Array = (self._centers * self._mass).sum(1) / self._mass.sum()
        return center

    def before(self) -> None:
        self._x[:] = self.center()

    def outcome(self, action: Array) -> Outcome:
        healthy = between(self.qpos[:, 2], self._height)
        forward, survive = self._forward * ((self.center() - self._x) / self.dt), healthy * self._survive
        control = self._control * sum_of_squares(self.ctrl)
        contact = (self._contact * sum_of_squares(self.forces.reshape(self.num_envs, -1))).clip(*self._range)
        log = {"reward/forward": forward, "reward/survive": survive}
        log |= {"reward/control": -control, "reward/contact": -contact}
        reward = forward + survive - (control + contact)
        return Outcome(reward, ~healthy if self._ends else self.nowhere(), log)


class HumanoidStandup(_Human):
    """Rises from the ground; never terminates."""

    def bind(self, own: Any) -> None:
        super().bind(own)
        self._impact, self._range = own._impact_cost_weight, own._impact_cost_range
        self._timestep = own.model.opt.timestep

    def outcome(self, action: Array) -> Outcome:
        up = self.qpos[:, 2] / self._timestep
        control = self._control * sum_of_squares(self.ctrl)
        impact = (self._impact * sum_of_squares(self.forces.reshape(self.num_envs, -1))).clip(*self._range)
        log = {"reward/up": up, "reward/control": -control, "reward/impact": -impact}
        return Outcome(up - control - impact + 1, self.nowhere(), log)


# --- reaching and balancing -------------------------------------------------------------------------------------------


class Reacher(MujocoTask):
    """An arm of two links reaches for a target in the plane."""

    def bind(self, own: Any) -> None:
        self._near, self._control = own._reward_dist_weight, own._reward_control_weight
        positions = self.field("xpos")
        self._tip, self._target = (positions[:, own.data.body(body).id] for body in ("fingertip", "target"))

    def start(self, rows: Array, random: RowRandom) -> tuple[Array, Array]:
        nq, nv = self.sim.model.nq, self.sim.model.nv
        qpos = random.uniform(rows, -0.1, 0.1, nq) + self._start[0]
        qpos[:, -2:] = random.each(rows, 2, _within_the_circle)
        qvel = self._start[1] + random.uniform(rows, -0.005, 0.005, nv)
        qvel[:, -2:] = 0
        return qpos, qvel

    def observe(self) -> Array:
        angles = self.qpos[:, :2]
        away = (self._tip - self._target)[:, :2]
        return np.concatenate((np.cos(angles), np.sin(angles), self.qpos[:, 2:], self.qvel[:, :2], away), 1)

    def outcome(self, action: Array) -> Outcome:
        distance = -np.linalg.norm(self._tip - self._target, axis=1) * self._near
        control = -sum_of_squares(action) * self._control
        return Outcome(distance + control, self.nowhere(), {"reward/distance": distance, "reward/control": control})


def _within_the_circle(generator: np.random.Generator) -> Array:
    while True:
        goal = generator.uniform(-0.2, 0.2, 2)
        if np.linalg.norm(goal) < 0.2:
            return goal


class Pusher(MujocoTask):
    """An arm pushes a cylinder to a goal."""

    def bind(self, own: Any) -> None:
        self._near, self._far = own._reward_near_weight, own._reward_dist_weight
        self._control = own._reward_control_weight
        positions = self.field("xpos")
        self._tips, self._object, self._goal = (
            positions[:, own.data.body(body).id] for body in ("tips_arm", "object", "goal")
        )

    def start(self, rows: Array, random: RowRandom) -> tuple[Array, Array]:
        qpos = np.tile(self._start[0], (self.num_envs, 1))
        qpos[:, -4:-2] = random.each(rows, 2, _away_from_the_goal)
        qpos[:, -2:] = 0
        qvel = self._start[1] + random.uniform(rows, -0.005, 0.005, self.sim.model.nv)
        qvel[:, -4:] = 0
        return qpos, qvel

    def observe(self) -> Array:
        return np.concatenate((self.qpos[:, :7], self.qvel[:, :7], self._tips, self._object, self._goal), 1)

    def outcome(self, action: Array) -> Outcome:
        near = -np.linalg.norm(self._object - self._tips, axis=1) * self._near
        distance = -np.linalg.norm(self._object - self._goal, axis=1) * self._far
        control = -sum_of_squares(action) * self._control
        log = {"reward/distance": distance, "reward/control": control, "reward/near": near}
        return Outcome(distance + control + near, self.nowhere(), log)


def _away_from_the_goal(generator: np.random.Generator) -> Array:
    while True:
        position = np.concatenate([generator.uniform(-0.3, 0, 1), generator.uniform(-0.2, 0.2, 1)])
        if np.linalg.norm(position) > 0.17:
            return position


class InvertedPendulum(MujocoTask):
    """A pole on a cart."""

    def observe(self) -> Array:
        return np.concatenate((self.qpos, self.qvel), 1)

    def outcome(self, action: Array) -> Outcome:
        obs = self.observe()
        terminated = ~np.isfinite(obs).all(1) | (np.abs(obs[:, 1]) > 0.2)
        return Outcome((~terminated).astype(np.float64), terminated)


class InvertedDoublePendulum(MujocoTask):
    """Two poles on a cart."""

    velocity_noise = "normal"

    def bind(self, own: Any) -> None:
        self._survive = own._healthy_reward
        self._tip = self.field("site_xpos")[:, 0]
        self._constraint = self.field("qfrc_constraint")

    def observe(self) -> Array:
        angles = self.qpos[:, 1:]
        force = self._constraint[:, :1].clip(-10, 10)
        return np.concatenate((self.qpos[:, :1], np.sin(angles), np.cos(angles), self.qvel.clip(-10, 10), force), 1)

    def outcome(self, action: Array) -> Outcome:
        x, y = self._tip[:, 0], self._tip[:, 2]
        first, second = self.qvel[:, 1], self.qvel[:, 2]
        terminated = y <= 1
        survive = self._survive * ~terminated
        distance = 0.01 * x**2 + (y - 2) ** 2
        velocity = 1e-3 * first**2 + 5e-3 * second**2
        log = {"reward/survive": survive, "reward/distance": -distance, "reward/velocity": -velocity}
        return Outcome(survive - distance - velocity, terminated, log)
