"""A simulated robot in a process of its own, which a controller reaches as it would reach a real one.

It runs in real time, at the rate of the physics: takes the newest command, steps, sends what it measures. It knows
nothing of policies. What it is of is a task (`ctrlrl.envs`), whose rewards, ends and figures it keeps as training does,
so that deployment can be compared with training. An episode begins with the first command for it; until then the
simulation stands still. Without commands for `watchdog` seconds it damps its joints, until a controller says hello.

    python -m ctrlrl.deploy.simulated < options.json     # SimulatedConfig; prints a line of JSON for each episode
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrlrl.deploy.impaired import ImpairedLine, impaired
from ctrlrl.deploy.live_sim import LiveSim
from ctrlrl.deploy.realtime import Time, enter_realtime
from ctrlrl.deploy.simulated_config import INJECTIONS, SimulatedConfig
from ctrlrl.deploy.strict_json import read_document
from ctrlrl.deploy.transport import Endpoint, Line, UdpServer, ZmqLine, parse_udp, require_loopback
from ctrlrl.deploy.wire import DRIVEN, RobotDescription, RobotJoint
from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.spec import SimTask
from ctrlrl.envs.tasks.registry import ROBOT_TASKS, is_robot_task, make_robot_task
from ctrlrl.errors import CtrlrlError, UsageError, nearest

GIVE_UP = 1.0
"""Seconds of safe commands, or of its own watchdog, after which an episode is given up."""
LINGER = 1.0


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
        terms = task.policy_terms.items()
        self._given = {name: term for name, term in terms if term.measure and term.measure.what == "given"}
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
        config = read_document(sys.stdin.buffer.read(), SimulatedConfig, "standard input", "options")
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
