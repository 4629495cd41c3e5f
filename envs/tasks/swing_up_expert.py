"""A scripted controller of the swing-up rigs: it pumps energy into the pole, then catches and balances it.

Pumping follows Astrom and Furuta (2000, "Swinging up a pendulum by energy control"): the motor pushes the way that
raises the pole's energy until it is what the pole has upright. Balancing is a linear quadratic regulator. All that it
knows of the rig (inertias, the linear model, the regulator's gains) is computed from the task's model, as it is in the
file, without randomization.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctrlrl.envs.spec import SimTask
from ctrlrl.errors import UsageError

Array = NDArray[np.floating[Any]]

TARGET = 0.06  # of the pole's weight times its lever: energy over that at rest upright, against friction
PUSH = 6.0  # m/s2, of the cart while it pumps
SPRING, DAMPER = 12.0, 4.5  # 1/s2 and 1/s, that keep the cart near the middle meanwhile
FREE, AHEAD, BRAKE = 0.27, 0.12, 80.0  # m from the middle, beyond which the cart is heading in so many s, and 1/s2
COST = {1: (25.0, 1.0), 2: (100.0, 100.0, 1.0, 1.0)}  # of squared angles, rad, places, m, and their speeds
EFFORT_COST = 5.0  # of the squared action
REACH = {1: 0.8, 2: 0.3}  # of the deviation from which the motor could just return; the rail leaves less


class SwingUpExpert:
    """Actions from what the policy observes; without memory, so one object serves any number of rigs.

    Args:
        task: a swing-up task, with histories of 1.

    Raises:
        UsageError: the task observes something else.
    """

    def __init__(self, task: SimTask) -> None:
        if any(obs.history > 1 for obs in task.observations["policy"].values()):
            raise UsageError(f"the scripted controller of {task.name} reads single observations; leave out history")
        spec = task.model.copy()
        spec.option.timestep = task.timestep
        model = spec.compile()
        model.dof_frictionloss[:] = 0  # dry friction has no linear model
        self.n = model.nv  # 1: the pendulum; 2: the cart-pole
        self.effort = float(model.actuator_ctrlrange[0, 1])  # N m or N, of an action of 1
        data = mujoco.MjData(model)  # upright: all positions are 0
        a, b = linear_model(model, data, task.substeps)
        b = b * self.effort
        self.gain = regulator(a, b, np.diag(COST[self.n]), np.array([[EFFORT_COST]]))[0]  # (2n,)
        # The one unstable mode grows by `rate` a step; beyond `reach` no action stops it.
        values, left = np.linalg.eig(a.T)
        unstable = int(np.argmax(values.real))
        self.mode, rate = left[:, unstable].real, float(values[unstable].real)
        self.reach = REACH[self.n] * abs(float(self.mode @ b[:, 0])) / (rate - 1)
        self.a, self.b, self.late = a, b[:, 0], sum(task.action.delay) / 2  # steps, on average
        inertia = np.zeros((self.n, self.n))
        mujoco.mj_fullM(model, data, inertia)
        self.inertia, self.damping = inertia, model.dof_damping
        swinging = model.jnt_bodyid[-1]
        lever = data.xipos[swinging] - data.xanchor[-1]  # upright
        self.weight = float(model.body_mass[swinging] * -model.opt.gravity[2] * lever[2])  # N m, level

    def __call__(self, obs: Tensor) -> Tensor:
        """Actions (N, 1) from the policy's observations (N, 4) of the pendulum or (N, 6) of the cart-pole."""
        seen = obs.double()
        sine, cosine, speed, last = seen[:, -4], seen[:, -3], seen[:, -2], seen[:, -1]
        angle = torch.atan2(sine, cosine)
        if self.n == 1:
            state = torch.stack([angle, speed], 1)
        else:
            state = torch.stack([seen[:, 0], angle, seen[:, 1], speed], 1)
        action = torch.where(self._caught(state, cosine), self._balance(state, last), self._pump(state, cosine))
        return action.clamp(-1, 1).float()[:, None]

    def _balance(self, state: Tensor, last: Tensor) -> Tensor:
        """(N,) the regulator's action, for the state (N, 2n) in which it will take effect."""
        a, b, gain = (torch.from_numpy(array).to(state.device) for array in (self.a, self.b, self.gain))
        ahead = state @ a.T + last[:, None] * b
        action: Tensor = -((1 - self.late) * state + self.late * ahead) @ gain
        return action

    def _caught(self, state: Tensor, cosine: Tensor) -> Tensor:
        """(N,) bool: the regulator takes over."""
        deviation = (state @ torch.from_numpy(self.mode).to(state.device)).abs()
        return (deviation < self.reach) & (cosine > 0.9)

    def _pump(self, state: Tensor, cosine: Tensor) -> Tensor:
        """(N,) the action that brings the pole's energy to what it should be."""
        speed = state[:, -1]
        energy = self.inertia[-1, -1] * speed.square() / 2 + self.weight * (cosine - 1)  # 0 at rest upright
        lack = ((TARGET - energy / self.weight) * 5).clamp(-1, 1)
        if self.n == 1:
            action: Tensor = lack * speed.sign()
            return action
        place, cart_speed = state[:, 0], state[:, 2]
        # The pole gains what it turns against the cart's acceleration.
        wanted = -PUSH * lack * (speed * cosine * 5).clamp(-1, 1) - SPRING * place - DAMPER * cart_speed
        ahead = place + AHEAD * cart_speed
        wanted -= BRAKE * ahead.sign() * (ahead.abs() - FREE).clamp(min=0)
        sine = state[:, 1].sin()
        coupling = self.inertia[0, 1]
        turns = (self.weight * sine - coupling * cosine * wanted) / self.inertia[1, 1]  # rad/s2, of the pole
        force = (
            self.inertia[0, 0] * wanted
            + coupling * (cosine * turns - sine * speed.square())
            + self.damping[0] * cart_speed
        )
        action = force / self.effort
        return action


def linear_model(model: mujoco.MjModel, data: mujoco.MjData, substeps: int) -> tuple[Array, Array]:
    """A (2n, 2n) and B (2n, 1) of a control step near the state of `data`, an equilibrium: positions, then speeds."""
    a, b = np.zeros((2 * model.nv, 2 * model.nv)), np.zeros((2 * model.nv, model.nu))
    mujoco.mjd_transitionFD(model, data, 1e-6, True, a, b, None, None)
    whole_a, whole_b = np.eye(len(a)), np.zeros_like(b)
    for _ in range(substeps):
        whole_a, whole_b = a @ whole_a, a @ whole_b + b
    return whole_a, whole_b


def regulator(a: Array, b: Array, q: Array, r: Array) -> Array:
    """Gains (nu, 2n) of the discrete linear quadratic regulator, action = -gains @ state, by the Riccati recursion."""
    p = q
    for _ in range(2000):
        gain: Array = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
        p = q + a.T @ p @ (a - b @ gain)
    return gain
