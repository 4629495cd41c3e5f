"""Gymnasium's classic control environments as tasks: the same dynamics for N rows at once, without a simulator.

States are float64, as Gymnasium's are, and every expression is evaluated in its order, so observations, rewards and
ends equal its for the same seeds, to the bit. One thing differs: Gymnasium squares Acrobot's speeds with `pow` of the C
library, whose last bit is off in one of a thousand, so after thousands of steps a state may differ by 1e-15.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from numpy import cos, sin

from ctrlrl.envs.tasks.task import Array, Outcome, RowRandom
from ctrlrl.envs.tasks.twin import GymnasiumTask


class ClassicTask(GymnasiumTask):
    """What they share: a state (N, S) float64, drawn from a box, and its observation in float32."""

    size = 4
    """S."""

    def __init__(self, twin: gym.Env[Any, Any], name: str, num_envs: int, **modes: Any) -> None:
        super().__init__(twin, name, num_envs, **modes)
        self.state = np.zeros((num_envs, self.size))
        self.numbers(self.own)

    @abstractmethod
    def numbers(self, own: Any) -> None:
        """Take the numbers of the Gymnasium environment `own`."""

    @abstractmethod
    def start(self, rows: Array, random: RowRandom) -> Array:
        """(N, S): states to start from."""

    def begin(self, rows: Array, random: RowRandom) -> None:
        self.state[rows] = self.start(rows, random)[rows]

    def observe(self) -> Array:
        return self.state.astype(np.float32)

    def get_state(self) -> dict[str, Array]:
        return {"state": self.state}

    def set_state(self, rows: Array, state: dict[str, Array]) -> None:
        self.state[rows] = state["state"][rows]

    def show(self, own: Any) -> None:
        own.state = self.state[0].copy()


class CartPole(ClassicTask):
    """Keep a pole upright by pushing its cart left or right."""

    def numbers(self, own: Any) -> None:
        self.n = own
        self._fallen, self._upright = (-1.0, 0.0) if own._sutton_barto_reward else (1.0, 1.0)

    def start(self, rows: Array, random: RowRandom) -> Array:
        return random.uniform(rows, -0.05, 0.05, 4)

    def step(self, action: Array) -> Outcome:
        n = self.n
        x, x_dot, theta, theta_dot = self.state.T
        force = np.where(action == 1, n.force_mag, -n.force_mag)
        cosine, sine = cos(theta), sin(theta)
        push = (force + n.polemass_length * theta_dot**2 * sine) / n.total_mass
        theta_acc = (n.gravity * sine - cosine * push) / (
            n.length * (4.0 / 3.0 - n.masspole * cosine**2 / n.total_mass)
        )
        x_acc = push - n.polemass_length * theta_acc * cosine / n.total_mass
        if n.kinematics_integrator == "euler":
            x, theta = x + n.tau * x_dot, theta + n.tau * theta_dot
            x_dot, theta_dot = x_dot + n.tau * x_acc, theta_dot + n.tau * theta_acc
        else:
            x_dot, theta_dot = x_dot + n.tau * x_acc, theta_dot + n.tau * theta_acc
            x, theta = x + n.tau * x_dot, theta + n.tau * theta_dot
        self.state[:] = np.stack((x, x_dot, theta, theta_dot), 1)
        terminated = (np.abs(x) > n.x_threshold) | (np.abs(theta) > n.theta_threshold_radians)
        return Outcome(np.where(terminated, self._fallen, self._upright), terminated)


class Pendulum(ClassicTask):
    """Swing up, and hold, with a bounded torque."""

    size = 2

    def numbers(self, own: Any) -> None:
        self.dt = own.dt
        self.n = own
        self._gravity, self._torque = 3 * own.g / (2 * own.l), 3.0 / (own.m * own.l**2)

    def start(self, rows: Array, random: RowRandom) -> Array:
        high = np.array([math.pi, 1.0])
        return random.each(rows, 2, lambda generator: generator.uniform(-high, high))

    def step(self, action: Array) -> Outcome:
        theta, speed = self.state.T
        torque = action[:, 0]
        angle = (theta + math.pi) % (2 * math.pi) - math.pi
        # Gymnasium's torque is a float32, and so are its products with Python's numbers
        cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = speed + (self._gravity * sin(theta) + self._torque * torque) * self.dt
        speed = speed.clip(-self.n.max_speed, self.n.max_speed)
        self.state[:] = np.stack((theta + speed * self.dt, speed), 1)
        return Outcome(-cost, self.nowhere())

    def observe(self) -> Array:
        theta, speed = self.state.T
        return np.stack((cos(theta), sin(theta), speed), 1, dtype=np.float32)

    def show(self, own: Any) -> None:
        super().show(own)
        own.last_u = None


class Acrobot(ClassicTask):
    """Swing the tip of two links above a line; fourth-order Runge-Kutta."""

    def numbers(self, own: Any) -> None:
        self.n = own
        self._torques = np.array(own.AVAIL_TORQUE, np.float64)

    def start(self, rows: Array, random: RowRandom) -> Array:
        return random.uniform(rows, -0.1, 0.1, 4).astype(np.float32).astype(np.float64)

    def step(self, action: Array) -> Outcome:
        n, dt, torque = self.n, self.n.dt, self._torques[action]
        state = self.state
        k1 = self._derivative(state, torque)
        k2 = self._derivative(state + dt / 2.0 * k1, torque)
        k3 = self._derivative(state + dt / 2.0 * k2, torque)
        k4 = self._derivative(state + dt * k3, torque)
        state = state + dt / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = _wrap(state[:, :2])
        speeds = np.stack((state[:, 2].clip(-n.MAX_VEL_1, n.MAX_VEL_1), state[:, 3].clip(-n.MAX_VEL_2, n.MAX_VEL_2)), 1)
        self.state[:] = np.concatenate((angles, speeds), 1)
        first, second = angles.T
        terminated = -cos(first) - cos(second + first) > 1.0
        return Outcome(np.where(terminated, 0.0, -1.0), terminated)

    def observe(self) -> Array:
        angles = self.state[:, :2]
        cosines, sines = cos(angles), sin(angles)
        shown = (cosines[:, 0], sines[:, 0], cosines[:, 1], sines[:, 1], self.state[:, 2], self.state[:, 3])
        return np.stack(shown, 1).astype(np.float32)

    def _derivative(self, state: Array, torque: Array) -> Array:
        """(N, 4): velocities and accelerations; Sutton and Barto 2018, or Sutton 1996 ("nips")."""
        n, g = self.n, 9.8
        m1, m2, l1 = n.LINK_MASS_1, n.LINK_MASS_2, n.LINK_LENGTH_1
        c1, c2, inertia = n.LINK_COM_POS_1, n.LINK_COM_POS_2, n.LINK_MOI
        theta1, theta2, speed1, speed2 = state.T
        cosine, sine = cos(theta2), sin(theta2)
        d1 = m1 * c1**2 + m2 * (l1**2 + c2**2 + 2 * l1 * c2 * cosine) + inertia + inertia
        d2 = m2 * (c2**2 + l1 * c2 * cosine) + inertia
        phi2 = m2 * c2 * g * cos(theta1 + theta2 - math.pi / 2.0)
        phi1 = (
            -m2 * l1 * c2 * speed2**2 * sine
            - 2 * m2 * l1 * c2 * speed2 * speed1 * sine
            + (m1 * c1 + m2 * l1) * g * cos(theta1 - math.pi / 2)
            + phi2
        )
        push = torque + d2 / d1 * phi1
        if n.book_or_nips != "nips":
            push = push - m2 * l1 * c2 * speed1**2 * sine
        acceleration2 = (push - phi2) / (m2 * c2**2 + inertia - d2**2 / d1)
        acceleration1 = -(d2 * acceleration2 + phi1) / d1
        return np.stack((speed1, speed2, acceleration1, acceleration2), 1)


def _wrap(angle: Array) -> Array:
    """Into [-pi, pi], by whole turns added one at a time as Gymnasium does; a step moves by a few turns at most."""
    while (over := angle > math.pi).any():
        angle = np.where(over, angle - 2 * math.pi, angle)
    while (under := angle < -math.pi).any():
        angle = np.where(under, angle + 2 * math.pi, angle)
    return angle


class MountainCar(ClassicTask):
    """Gather momentum in a valley."""

    size = 2

    def numbers(self, own: Any) -> None:
        self.n = own

    def start(self, rows: Array, random: RowRandom) -> Array:
        return np.concatenate((random.uniform(rows, -0.6, -0.4, 1), np.zeros((self.num_envs, 1))), 1)

    def step(self, action: Array) -> Outcome:
        n = self.n
        position, speed = self.state.T
        speed = speed + ((action - 1) * n.force + cos(3 * position) * -n.gravity)
        self.state[:] = _drive(n, position, speed)
        terminated = (self.state[:, 0] >= n.goal_position) & (self.state[:, 1] >= n.goal_velocity)
        return Outcome(np.full_like(position, -1.0), terminated)


class MountainCarContinuous(ClassicTask):
    """Gymnasium's state is float64 at the start of an episode and float32 from the first step on."""

    size = 3  # position, speed, and whether the episode has just begun

    def numbers(self, own: Any) -> None:
        self.n = own

    def start(self, rows: Array, random: RowRandom) -> Array:
        n = self.num_envs
        return np.concatenate((random.uniform(rows, -0.6, -0.4, 1), np.zeros((n, 1)), np.ones((n, 1))), 1)

    def step(self, action: Array) -> Outcome:
        n, force, fresh = self.n, action[:, 0], self.state[:, 2] > 0
        position, speed = self.state[:, 0].astype(np.float32), self.state[:, 1].astype(np.float32)
        slope = cos(np.where(fresh, 3 * self.state[:, 0], (3 * position).astype(np.float64)))
        speed = speed + (force * n.power - (0.0025 * slope).astype(np.float32))
        started = _drive(n, self.state[:, 0], speed.astype(np.float64)).astype(np.float32)
        moved = np.where(fresh[:, None], started, _drive(n, position, speed))
        self.state[:] = np.concatenate((moved, np.zeros((self.num_envs, 1))), 1)
        terminated = (moved[:, 0] >= n.goal_position) & (moved[:, 1] >= n.goal_velocity)
        return Outcome(np.where(terminated, 100.0, 0.0) - force.astype(np.float64) ** 2 * 0.1, terminated)

    def observe(self) -> Array:
        return self.state[:, :2].astype(np.float32)

    def show(self, own: Any) -> None:
        own.state = self.state[0, :2].copy()


def _drive(n: Any, position: Array, speed: Array) -> Array:
    """(N, 2) positions and speeds after a step; a car that reaches the left end stops."""
    speed = speed.clip(-n.max_speed, n.max_speed)
    position = (position + speed).clip(n.min_position, n.max_position)
    stopped = (position == n.min_position) & (speed < 0)
    return np.stack((position, np.where(stopped, 0.0, speed)), 1)
