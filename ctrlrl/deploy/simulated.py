"""A simulated robot in a process of its own, which a controller reaches as it would reach a real one.

It runs in real time, at the rate of the physics: takes the newest command, steps, sends what it measures. It knows
nothing of policies. What it is of is a task (`ctrlrl.envs`), whose rewards, ends and figures it keeps as training does,
so that deployment can be compared with training. An episode begins with the first command for it; until then the
simulation stands still. Without commands for `watchdog` seconds it damps its joints, until a controller says hello.

    python -m ctrlrl.deploy.simulated < options.json     # SimulatedConfig; prints a line of JSON for each episode
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch

from ctrlrl.deploy.features import READINGS, Reading
from ctrlrl.deploy.manifest import parse_json, read_strictly
from ctrlrl.deploy.realtime import Time, enter_realtime
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.transport import Endpoint, Line, UdpServer, ZmqLine, parse_udp, require_loopback
from ctrlrl.deploy.wire import DRIVE, DRIVEN, HELD, IDLE, RobotDescription, RobotJoint, State
from ctrlrl.envs import events
from ctrlrl.envs.sim import BatchSim, Sim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spec import Event, SimTask
from ctrlrl.envs.tasks.registry import ROBOT_TASKS, is_robot_task, make_robot_task
from ctrlrl.errors import CtrlrlError, UsageError, nearest
from ctrlrl.robots.robot import Robot

BEHIND = 0.1
"""Seconds by which the simulation may be behind before it gives up making up for it."""
GIVE_UP = 1.0
"""Seconds of safe commands, or of its own watchdog, after which an episode is given up."""
LINGER = 1.0
INJECTIONS = ("freeze", "freeze joint", "not finite", "clock ahead", "clock back", "swap", "silence", "tilt")
"""What can be made to go wrong: measurements stay as they are, or those of one joint; one becomes NaN; the robot's
clock jumps by 10 s; two joints' measurements are exchanged; nothing is sent any more; the base is said to lie."""


@dataclass(frozen=True, kw_only=True)
class Impairments:
    """What stands between training and this robot.

    Raises:
        UsageError: on construction, where a number is out of range.
    """

    latency: float = 0.0
    """Seconds that a message takes, either way."""
    jitter: float = 0.0
    """Seconds that it may take longer, uniform."""
    loss: float = 0.0
    """Share of messages that are lost, either way."""
    noise: float = 1.0
    """Noise of measurements, as a multiple of that of training."""
    freeze: float | None = None
    """Seconds of an episode after which measurements stay as they are."""
    strength: float = 1.0
    """Largest effort of all motors, as a share of what they are said to give."""
    friction: float = 1.0
    """Friction with the ground, as a multiple."""

    def __post_init__(self) -> None:
        for name in ("latency", "jitter", "noise"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("loss", 0 <= self.loss < 1, "from 0 to less than 1")
        self._require("freeze", self.freeze is None or self.freeze >= 0, "at least 0")
        for name in ("strength", "friction"):
            self._require(name, 0 < getattr(self, name) <= 10, "above 0 and at most 10")

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise UsageError(f"--sim.{name} must be {rule}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SimulatedConfig:
    """A simulated robot, and what happens to it."""

    task: str
    """What `ctrlrl envs` calls it."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...]
    """Of the episodes, one after the other."""
    transport: str = "udp"
    """udp or zmq."""
    address: str = "127.0.0.1:0"
    """Where to serve: HOST:PORT, or for zmq an address such as ipc:///tmp/robot."""
    allow_remote: bool = False
    """Whether others than this machine may reach it."""
    watchdog: float = 0.1
    """Seconds without a command after which it makes itself safe."""
    patience: float = 30.0
    """Seconds for which it waits for a controller."""
    again: bool = False
    """Whether it goes on with the next episode where a controller has given one up."""
    random: int = 0
    """Seed of noise, losses and delays."""
    out: str | None = None
    """Folder for what it measured and was told."""
    impairments: Impairments = field(default_factory=Impairments)
    priority: int | None = None
    """Of SCHED_FIFO: a real robot has a computer of its own."""
    inject: str | None = None
    """One of `INJECTIONS`."""
    inject_at: float = 1.0
    """Seconds of the first episode."""


class ImpairedLine(Line):
    """A line on which messages are late, or lost."""

    def __init__(self, line: Line, impairments: Impairments, seed: int, clock: Time) -> None:
        self.line, self._clock = line, clock
        self._latency, self._jitter, self._loss = impairments.latency, impairments.jitter, impairments.loss
        self._random, self._count = random.Random(seed), itertools.count()
        self._in: list[tuple[float, int, bytes, bool]] = []
        self._out: list[tuple[float, int, bytes, bool]] = []
        self._accepted = True

    def send(self, message: bytes) -> None:
        self._late(self._out, message, True)
        self.flush()

    def flush(self) -> None:
        """Send what is due."""
        now = self._clock.now()
        while self._out and self._out[0][0] <= now:
            self.line.send(heapq.heappop(self._out)[2])

    def receive(self) -> Iterator[bytes]:
        self.flush()
        for message in self.line.receive():
            self._late(self._in, message, self.line.accepted)
        now = self._clock.now()
        while self._in and self._in[0][0] <= now:
            _, _, message, self._accepted = heapq.heappop(self._in)
            yield message

    def _late(self, queue: list[tuple[float, int, bytes, bool]], message: bytes, accepted: bool) -> None:
        if self._random.random() >= self._loss:
            due = self._clock.now() + self._latency + self._jitter * self._random.random()
            heapq.heappush(queue, (due, next(self._count), message, accepted))

    def accept(self) -> None:
        self.line.accept()
        self._accepted = True

    @property
    def accepted(self) -> bool:
        return self._accepted

    def close(self) -> None:
        self.line.close()


def describe(task: SimTask, watchdog: float, given: Mapping[str, int]) -> RobotDescription:
    """What the robot of a task says of itself; `given` are measurements that only the task knows, and their sizes.

    Raises:
        UsageError: the task has no robot, or does not say what its action does.
    """
    robot, effect = task.robot, task.action.effect
    if robot is None or effect is None:
        raise UsageError(f"{task.name} does not say what its action does on which robot: there is nothing to deploy on")
    own = {joint.name: joint for joint in robot.joints}
    joints = []
    for name in task.joints:
        joint = own.get(name)
        if joint is None:
            joints.append(RobotJoint(name=name))
            continue
        joints.append(
            RobotJoint(
                name=name,
                unit=joint.unit,
                lower=joint.lower if math.isfinite(joint.lower) else None,
                upper=joint.upper if math.isfinite(joint.upper) else None,
                max_effort=joint.max_effort if name in task.action.names else None,
            )
        )
    measures = {"angular velocity": 3, "linear velocity": 3, "orientation": 4}
    if robot.frames.get("tool", "").startswith("site:"):
        measures["tool position"] = 3
    if robot.base_height is None:  # a base that stands still measures nothing of itself
        measures = {name: size for name, size in measures.items() if name == "tool position"}
    if task.command is not None:
        measures["command"] = task.command.size
    return RobotDescription(
        name=robot.name,
        control="effort" if effect.kind == "joint effort" else "position",
        joints=tuple(joints),
        measures=measures | dict(given),
        rate=1 / task.timestep,
        watchdog=watchdog,
    )


def _given(task: SimTask) -> list[str]:
    """Terms that the robot's own program knows, and nobody measures."""
    group = task.observations["policy" if "policy" in task.observations else next(iter(task.observations))]
    return [name for name, term in group.items() if term.measure is not None and term.measure.what == "given"]


def measured(model: mujoco.MjModel, data: mujoco.MjData, robot: Robot, names: Sequence[str]) -> Reading:
    """What a robot in this state measures, by MuJoCo's own functions and none of the task's."""
    joints = [model.joint(name) for name in names]
    base = model.body(robot.base).id
    moves = np.zeros(6)
    mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, base, moves, 1)
    others = {"angular velocity": moves[:3], "linear velocity": moves[3:], "orientation": data.xquat[base].copy()}
    kind, _, name = robot.frames.get("tool", "").partition(":")
    if kind == "site":
        others["tool position"] = data.xmat[base].reshape(3, 3).T @ (data.site(name).xpos - data.xpos[base])
    position = np.array([data.qpos[joint.qposadr[0]] for joint in joints])
    return Reading(list(names), position, np.array([data.qvel[joint.dofadr[0]] for joint in joints]), others)


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
        self._noise = _noise_of(task, config.impairments.noise)
        self._random = np.random.default_rng(config.random)
        self.mode, self.episode = IDLE, 1
        self.target = np.zeros(len(driven))
        self._heard = -math.inf
        self._due = self._episode_began = 0.0
        self._skew = 1000.0  # the robot's clock has another zero
        self._frozen: State | None = None
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
        self._frozen, self.safe_since = None, None
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
        self._noisy(state)
        if not self._spoil(state):
            return
        self.endpoint.state(state)
        everything = (state.position, state.velocity, *state.others.values())
        finite = all(np.isfinite(v).all() for v in everything)
        self.sent.append((self._clock.now(), state.sequence, finite, state.position, state.velocity))
        if self.mode == DRIVEN and self.config.out is not None:
            self.places.append((self._due, np.array(data.qpos)))

    def _noisy(self, state: State) -> None:
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

    def _spoil(self, state: State) -> bool:
        """What is injected; False: nothing is to be sent."""
        passed = self._due - self._episode_began
        freeze, inject = self.config.impairments.freeze, self.config.inject
        if freeze is not None and passed >= freeze:
            self._freeze(state, slice(None))
        if inject is None or passed < self.config.inject_at or self.episode != 1:
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
    group = task.observations["policy" if "policy" in task.observations else next(iter(task.observations))]
    names = list(task.joints)
    out: dict[str, tuple[Array, Array]] = {}
    for term in group.values():
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


def impaired(task: SimTask, impairments: Impairments) -> SimTask:
    """The task on a robot with weaker motors and another floor."""
    more: dict[str, Event] = {}
    if impairments.strength != 1.0:
        effect = task.action.effect
        efforts = effect is not None and effect.kind == "joint effort"
        weaken = events.motor_constant if efforts else events.motor_strength
        more["deployed strength"] = Event("startup", weaken((impairments.strength,) * 2))
    if impairments.friction != 1.0:
        model = physics(task)
        if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "floor") < 0:
            raise UsageError(f"--sim.friction: nothing of {task.name} touches a floor")
        first = float(model.geom("floor").friction[0])
        more["deployed friction"] = Event("startup", events.friction(["floor"], (first * impairments.friction,) * 2))
    kept = {name: event for name, event in task.events.items() if f"deployed {name}" not in more}
    return replace(task, events=kept | more)


def serve(config: SimulatedConfig) -> Iterator[dict[str, Any]]:
    """Run the robot in real time; yields where it listens, then each episode as it ends, and what was counted.

    Raises:
        UsageError: there is no such task, or it cannot be deployed; the address cannot be served.
    """
    if config.transport == "udp":
        host, port = parse_udp(config.address)
        require_loopback(host, config.allow_remote)
        line: Line = (server := UdpServer((host, port)))
        address = f"{host}:{server.port}"
    else:
        scheme, _, rest = config.address.partition("://")
        if scheme == "tcp":
            require_loopback("0.0.0.0" if rest.startswith("*") else parse_udp(rest)[0], config.allow_remote)
        elif scheme != "ipc":
            raise UsageError(f"a ZeroMQ address begins with ipc:// or tcp://, got {config.address!r}")
        line, address = ZmqLine(config.address, serve=True), config.address
    try:
        robot = SimulatedRobot(config, line, Time())
        yield {"kind": "ready", "address": address}
        enter_realtime(config.priority, None)
        yield from robot.episodes()
    finally:
        line.close()


class SimulatedRobot:
    """A robot that is simulated, at one end of a line.

    Args:
        config: what it is, and how it behaves.
        line: to controllers.
        clock: real time, or another.

    Raises:
        UsageError: there is no such task, or it cannot be deployed.
    """

    def __init__(self, config: SimulatedConfig, line: Line, clock: Time) -> None:
        if config.inject is not None and config.inject not in INJECTIONS:
            raise UsageError(f"no injection {config.inject!r}; there are {', '.join(INJECTIONS)}")
        if not is_robot_task(config.task):
            raise UsageError(f"{config.task} is no task with a robot.{nearest(config.task, ROBOT_TASKS)}")
        task = impaired(make_robot_task(config.task, config.env_kwargs), config.impairments)
        i = config.impairments
        if i.latency or i.jitter or i.loss:
            line = ImpairedLine(line, i, config.random, clock)
        self.config, self._clock = config, clock
        self.sim = LiveSim(task, config, clock)
        self.env = SimVector(task, self.sim)
        self.env.reset(0)
        group = task.observations["policy" if "policy" in task.observations else next(iter(task.observations))]
        self._given = {name: group[name] for name in _given(task)}
        self._give()
        sizes = {name: self.sim.given[name].size for name in self._given}
        self.sim.endpoint = Endpoint(line, describe(task, config.watchdog, sizes), clock)

    def episodes(self) -> Iterator[dict[str, Any]]:
        """Each as it ends, and at last what was counted. Ends early where no controller comes, and where an episode is
        given up, unless `again`."""
        try:
            for seed in self.config.seeds:
                yield (episode := self._episode(seed))
                if episode["nobody"] or (episode["given up"] and not self.config.again):
                    break
            self.sim.linger(LINGER)
            yield self._end()
        finally:
            self.env.close()

    def _episode(self, seed: int) -> dict[str, Any]:
        env, sim = self.env, self.sim
        env.reset([seed])
        self._give()
        total, length, log, ended = 0.0, 0, {}, False
        came = sim.begin_episode()
        last, given_up = sim.target, not came
        while came and not ended:
            action = np.clip(sim.action(last), -1, 1) if sim.mode == DRIVEN else np.zeros(len(sim.target))
            last = sim.target
            self._give()
            step = env.step(torch.from_numpy(action[None]).float())
            total, length = total + float(step.reward[0]), length + 1
            ended = bool(step.terminated[0] | step.truncated[0] | ~step.valid[0])
            if ended:
                log = {name: float(value[0]) for name, value in step.log.items() if not torch.isnan(value[0])}
            elif sim.safe_since is not None and self._clock.now() - sim.safe_since > GIVE_UP:
                given_up = ended = True
        sim.end_episode()
        return {
            "kind": "episode",
            "seed": seed,
            "return": total,
            "length": length,
            "given up": given_up,
            "nobody": not came,
            "success": log.pop("success", None),
            "figures": {name.removeprefix("episode/"): value for name, value in log.items()},
        }

    def _give(self) -> None:
        """What the robot's own program knows: goals, and what its operator tells the policy."""
        w = self.env.world
        self.sim.given = {name: term.of(w)[0].double().numpy() for name, term in self._given.items()}
        if self.env.task.command is not None:
            self.sim.given["command"] = w.command[0].double().numpy()

    def _end(self) -> dict[str, Any]:
        sim, endpoint = self.sim, self.sim.endpoint
        assert endpoint is not None
        if self.config.out is not None:
            out = Path(self.config.out)
            out.mkdir(parents=True, exist_ok=True)
            np.savez(out / "robot.npz", **sim.log())  # type: ignore[arg-type]
        return {
            "kind": "end",
            "mode": sim.mode,
            "commands": len(sim.told),
            "dropped": dict(endpoint.dropped),
            "stalls": sim.stalls,
        }


def main() -> int:
    """Serve what standard input asks for."""
    torch.set_num_threads(1)
    try:
        config = read_strictly(parse_json(sys.stdin.buffer.read(), "options"), SimulatedConfig, "options")
        for line in serve(config):
            print(json.dumps(line), flush=True)
    except CtrlrlError as error:
        print(json.dumps({"kind": "error", "message": str(error)}), flush=True)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


def to_options(config: SimulatedConfig) -> bytes:
    """What `main` reads."""
    return json.dumps(asdict(config)).encode()


if __name__ == "__main__":
    sys.exit(main())
