"""A simulation that runs in real time and is commanded over a line: the body of a simulated robot."""

from __future__ import annotations

import math
from typing import Any

import mujoco
import numpy as np
import torch

from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.sensors import Sensors, measured
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.transport import Endpoint
from ctrlrl.deploy.wire import DRIVE, DRIVEN, HELD, IDLE, State
from ctrlrl.envs.sim import BatchSim, Sim
from ctrlrl.envs.sim_vector import physics
from ctrlrl.envs.spec import SimTask

BEHIND = 0.1
"""Seconds by which the simulation may be behind before it gives up making up for it."""


class LiveSim(Sim):
    """One simulation that steps in real time and is commanded from outside: what its environment writes to motors that
    the robot takes commands for is overwritten.

    Args:
        task: of the robot.
        config: how it behaves.
        clock: real time, or another.
    """

    def __init__(self, task: SimTask, config: SimulatedConfig, clock: Time) -> None:
        self._clock = clock
        self._inner = BatchSim(physics(task), 1, 1)
        self.model, self.num_sims, self.device = self._inner.model, 1, self._inner.device
        assert task.robot is not None
        self.task, self.config, self.robot = task, config, task.robot
        self._names = list(task.joints)
        self._data = mujoco.MjData(self.model)
        self._qpos, self._qvel, self._ctrl = (self._inner.field(name) for name in ("qpos", "qvel", "ctrl"))
        driven = [name for name in task.joints if name in task.action.names]
        self._motors = [self.model.actuator(name).id for name in driven]
        self._places = [int(self.model.joint(name).qposadr[0]) for name in driven]
        self._order = [driven.index(name) for name in task.action.names]
        self.efforts = task.action.effect is not None and task.action.effect.kind == "joint effort"
        self.endpoint: Endpoint | None = None
        self.given: dict[str, Array] = {}
        self._sensors = Sensors(task, config)
        self.mode, self.episode = IDLE, 1
        self.target = np.zeros(len(driven))
        self._heard = -math.inf
        self._due = self._episode_began = 0.0
        self._skew = 1000.0  # the robot's clock has another zero
        self._greeted = 0
        self.safe_since: float | None = None
        self.stalls = 0
        self.told: list[tuple[Any, ...]] = []
        self.sent: list[tuple[Any, ...]] = []
        self.places: list[tuple[float, Array]] = []
        self.modes: list[tuple[float, int, int]] = []

    # --- what an environment asks of a simulation ---------------------------------------------------------------------

    def field(self, name: str) -> torch.Tensor:
        return self._inner.field(name)

    def reset(self, rows: torch.Tensor) -> None:
        self._inner.reset(rows)

    def forward(self, rows: torch.Tensor) -> None:
        self._inner.forward(rows)

    def diverged(self) -> torch.Tensor | None:
        return self._inner.diverged()

    def expand(self, name: str) -> torch.Tensor:
        return self._inner.expand(name)

    def set_const(self, rows: torch.Tensor) -> None:
        self._inner.set_const(rows)

    def get_state(self) -> dict[str, torch.Tensor]:
        return self._inner.get_state()

    def set_state(self, rows: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        self._inner.set_state(rows, state)

    def close(self) -> None:
        self._inner.close()

    def step(self, substeps: int) -> None:
        for _ in range(substeps):
            self._wait()
            self._listen()
            self._drive()
            self._inner.step(1)
            self._report()

    # --- real time ----------------------------------------------------------------------------------------------------

    def begin_episode(self) -> bool:
        """Stand still until a controller drives; False where none came within `patience`."""
        self._episode_began = math.inf
        self.safe_since = None
        self._sensors.begin_episode()
        self._due = self._clock.now()
        end = self._due + self.config.patience
        self.mode = IDLE if self.mode == DRIVEN else self.mode
        while self._clock.now() < end:
            self._wait()
            self._listen()
            if self.mode == DRIVEN:
                self._episode_began = self._due
                self._due -= self.task.timestep  # it moves at once
                return True
            self._report()
        return False

    def end_episode(self) -> None:
        """Stand still until the next one."""
        self.episode += 1
        self.mode = IDLE if self.mode == DRIVEN else self.mode

    def linger(self, seconds: float) -> None:
        """Send states a while longer, so that a controller can end before the robot does; it is not driven any more."""
        for _ in range(round(seconds / self.task.timestep)):
            self._wait()
            self._listen()
            self.mode = IDLE if self.mode == DRIVEN else self.mode
            self._report()

    def log(self) -> dict[str, Array]:
        """All commands that came and states that were sent, with the moments on this computer's clock."""
        kinds = ("time", "sequence", "mode", "episode", "origin", "target", "kp", "kd")
        log = {f"command {kind}": np.array([row[i] for row in self.told]) for i, kind in enumerate(kinds)}
        parts = ("time", "sequence", "finite", "position", "velocity")
        log |= {f"state {part}": np.array([row[i] for row in self.sent]) for i, part in enumerate(parts)}
        log |= {
            f"mode {kind}": np.array([row[i] for row in self.modes]) for i, kind in enumerate(("time", "mode", "of"))
        }
        log["place time"] = np.array([moment for moment, _ in self.places])
        return log | {"place": np.array([place for _, place in self.places])}

    def now(self) -> float:
        """s, of the robot's clock."""
        return self._clock.now() + self._skew

    def _wait(self) -> None:
        self._due += self.task.timestep
        behind = self._clock.now() - self._due
        if behind > BEHIND:
            self._due += behind
            self.stalls += 1
        else:
            self._clock.wait_until(self._due)

    def _listen(self) -> None:
        assert self.endpoint is not None
        self.endpoint.busy = self.mode == DRIVEN
        for command in self.endpoint.commands():
            now = self._clock.now()
            self.told.append(
                (
                    *(now, command.sequence, command.mode, command.episode, command.origin),
                    *(command.target, command.kp, command.kd),
                )
            )
            if self.endpoint.greeted != self._greeted:
                self._greeted, self.mode = self.endpoint.greeted, IDLE
            if self.mode == HELD or (command.mode == DRIVE and command.episode != self.episode):
                continue  # to be safe is for every episode
            self._heard = now
            if command.mode == DRIVE:
                self.mode, self.target, self.safe_since = DRIVEN, command.target, None
            else:
                if self.safe_since is None:
                    self.safe_since = now
                self.mode = IDLE
        if self.endpoint.greeted != self._greeted:
            self._greeted, self.mode = self.endpoint.greeted, IDLE
        if self.mode == DRIVEN and self._clock.now() - self._heard > self.config.watchdog:
            self.mode, self.safe_since = HELD, self._clock.now()
        if not self.modes or self.modes[-1][1:] != (self.mode, self.episode):
            self.modes.append((self._clock.now(), self.mode, self.episode))

    def _drive(self) -> None:
        """Write the controls of this step: what was commanded, or the safe action."""
        if self.mode == DRIVEN:
            values = self.target
        elif self.efforts:
            values = np.zeros(len(self._motors))
        else:  # a position controller whose target is where the joint is does nothing but damp
            values = self._qpos[0, self._places].double().numpy()
        self._ctrl[0, self._motors] = torch.from_numpy(np.array(values)).to(self._ctrl.dtype)

    def action(self, last: Array) -> Array:
        """What action (A,) in [-1, 1] the commands amount to, by the task's effect; `last` are the commands of the
        step before."""
        effect = self.task.action.effect
        assert effect is not None
        target, scale = self.target[self._order], np.array(effect.scale)
        if effect.kind == "joint position offset":
            return np.asarray((target - np.array(effect.offset)) / scale)
        if effect.kind == "joint position step":
            return np.asarray((target - last[self._order]) / scale)
        return np.asarray(target / scale)

    def _report(self) -> None:
        assert self.endpoint is not None
        data = self._data
        data.qpos[:], data.qvel[:] = self._qpos[0].numpy(), self._qvel[0].numpy()
        mujoco.mj_kinematics(self.model, data)
        mujoco.mj_comPos(self.model, data)
        mujoco.mj_comVel(self.model, data)
        reading = measured(self.model, data, self.robot, self._names)
        others = {**reading.others, **self.given}
        others = {name: np.asarray(others[name], np.float64) for name in self.endpoint.description.measures}
        state = State(0, self.now(), self.mode, self.episode, reading.position, reading.velocity, others)
        if not self._sensors.spoil(state, self._due - self._episode_began, self.episode == 1):
            return
        self.endpoint.state(state)
        everything = (state.position, state.velocity, *state.others.values())
        finite = all(np.isfinite(v).all() for v in everything)
        self.sent.append((self._clock.now(), state.sequence, finite, state.position, state.velocity))
        if self.mode == DRIVEN and self.config.out is not None:
            self.places.append((self._due, np.array(data.qpos)))
