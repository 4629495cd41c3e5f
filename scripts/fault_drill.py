#!/usr/bin/env python3
"""What a deployment does when something breaks: each fault many times, and whether an unsafe command was ever sent.

    python scripts/fault_drill.py BUNDLE --times 100
    python scripts/fault_drill.py BUNDLE --times 100 --only "controller killed" "driver killed" "busy computer"

with the interpreter of .venv, and a bundle of one of our robot tasks. What breaks in a message or in a measurement is
drilled in virtual time (`ctrlrl.deploy.virtual`), what breaks in the operating system with real processes over UDP.

The judge is this script: it reads the log of the robot, and no code of the controller. A command is unsafe that is
outside a limit which the robot declares, was computed from a state that was not finite or older than allowed, asks for
more than a motor gives by the gains that came with it (unless a joint's limit is in the way), or drives after the first
safe command that the same controller has sent once it drove. Exit code 1 where one was, or where a fault that must be
found was not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np

from ctrlrl.deploy import process, simulated
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import ControllerConfig
from ctrlrl.deploy.deployment import start
from ctrlrl.deploy.driver import require_fits
from ctrlrl.deploy.live_sim import LiveSim
from ctrlrl.deploy.process import ProcessConfig
from ctrlrl.deploy.simulated_config import Impairments, SimulatedConfig
from ctrlrl.deploy.ticks import read_ticks
from ctrlrl.deploy.virtual import VirtualDeployment
from ctrlrl.deploy.wire import RobotDescription
from ctrlrl.errors import CtrlrlError

SAFE, DRIVE, HELD = 0, 1, 2
MUST_FAULT = (
    "sensors frozen",
    "NaN measured",
    "clock 10 s ahead",
    "clock 10 s back",
    "states stop",
    "30 ms later, either way",
)
SECONDS = 3.0  # of an episode after which a drill is over
RELAY = """
import select, socket, sys
robot = ("127.0.0.1", int(sys.argv[1]))
a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
a.bind(("127.0.0.1", 0))
print(a.getsockname()[1], flush=True)
who = None
while True:
    for ready in select.select([a, b], [], [])[0]:
        message, sender = ready.recvfrom(65536)
        if ready is a:
            who = sender
            b.sendto(message, robot)
        elif who:
            a.sendto(message, who)
"""


@dataclass
class Drill:
    """What came of one fault, injected many times."""

    injected: int = 0
    detected: list[float] = field(default_factory=list)
    """s, from the fault to the first safe command, or to the robot's own watchdog."""
    ends: Counter[str] = field(default_factory=Counter)
    unsafe: Counter[str] = field(default_factory=Counter)
    commands: int = 0


def judge(log: dict[str, Any], robot: RobotDescription, max_age: float, tick: float) -> Iterator[str]:
    """Each unsafe command of a robot's log, by what is wrong with it. `tick` is s between two looks of the robot."""
    joints = [joint for joint in robot.joints if joint.max_effort is not None]
    sent = {
        int(n): (float(t), bool(f))
        for t, n, f in zip(log["state time"], log["state sequence"], log["state finite"], strict=True)
    }
    places = [i for i, joint in enumerate(robot.joints) if joint.max_effort is not None]
    measured = {
        int(n): (q[places], v[places])
        for n, q, v in zip(log["state sequence"], log["state position"], log["state velocity"], strict=True)
    }
    drove, stopped, last = False, False, -1
    names = ("time", "sequence", "mode", "origin", "target", "kp", "kd")
    rows = zip(*(log[f"command {name}"] for name in names), strict=True)
    for moment, sequence, mode, origin, target, kp, kd in rows:
        if sequence < last:  # another controller
            drove = stopped = False
        last = sequence
        if mode == SAFE:
            stopped |= drove
            continue
        drove = True
        if stopped:
            yield "drives after it was safe"
        for joint, value in zip(joints, target, strict=True):
            low, high = (joint.lower, joint.upper) if robot.control == "position" else (None, None)
            if robot.control == "effort":
                low, high = -float(joint.max_effort or 0), float(joint.max_effort or 0)
            if not (-np.inf if low is None else low) <= value <= (np.inf if high is None else high):
                yield f"outside the limits of {joint.name}"
        born, finite = sent.get(int(origin), (-np.inf, False))
        if not finite:
            yield "of a state that was not finite, or none"
        elif moment - born > max_age + tick:
            yield f"of a state {moment - born:.3f} s old"
        if finite and robot.control == "position":
            q, v = measured[int(origin)]
            asked = np.abs(kp * (target - q) - kd * v)
            most = np.array([float(joint.max_effort or 0) for joint in joints])
            ends = [[-np.inf if j.lower is None else j.lower, np.inf if j.upper is None else j.upper] for j in joints]
            width = np.array([high - low for low, high in ends])
            at_limit = np.abs(target[:, None] - np.array(ends)).min(1) < 0.006 * width  # there the limits decide
            if ((asked > most * (1 + 1e-6)) & ~at_limit).any():
                yield "asks more than a motor gives"


class Drills:
    """The drills of a bundle.

    Args:
        bundle: whose policy drives.
        times: how often each fault is injected.
    """

    def __init__(self, bundle: Bundle, times: int) -> None:
        self.bundle, self.times = bundle, times
        self.dt = float(bundle.manifest.control_dt or 0)
        self.max_age = 2 * self.dt
        self.task = bundle.manifest.task

    def all(self) -> dict[str, Callable[[], Drill]]:
        """By name."""
        inject = {
            "sensors frozen": "freeze",
            "one joint's sensor frozen": "freeze joint",
            "NaN measured": "not finite",
            "clock 10 s ahead": "clock ahead",
            "clock 10 s back": "clock back",
            "measurements exchanged on the way": "swap",
            "states stop": "silence",
        }
        latency = {"10 ms later, either way": 0.01, "15 ms later, either way": 0.015, "30 ms later, either way": 0.03}
        losses = {f"{low} to {high} % of messages lost": (low, high) for low, high in ((1, 5), (5, 20), (20, 50))}
        return {
            **{name: (lambda pair=pair: self.loss(*pair)) for name, pair in losses.items()},
            **{name: (lambda ms=ms: self.later(ms)) for name, ms in latency.items()},
            **{name: (lambda what=what: self.injected(what)) for name, what in inject.items()},
            "joint names exchanged": self.names,
            "wrong robot": self.robots,
            "bundle altered by one byte": self.bytes,
            "driver killed": self.driver_killed,
            "controller killed": self.controller_killed,
            "busy computer": self.busy,
        }

    # --- in virtual time ----------------------------------------------------------------------------------------------

    def injected(self, what: str) -> Drill:
        """A fault of measurements or of the clock, at another moment each time."""
        drill = Drill()
        for number in range(self.times):
            at = 0.3 + 1.5 * random.Random(number).random()
            config = self._robot(number, inject=what, inject_at=at)
            self._virtual(drill, config, at)
        return drill

    def loss(self, low: int, high: int) -> Drill:
        """Messages are lost either way."""
        drill = Drill()
        for number in range(self.times):
            share = (low + (high - low) * (number + 0.5) / self.times) / 100
            config = self._robot(number, impairments=Impairments(loss=share), patience=2.0)
            self._virtual(drill, config, None)
        return drill

    def later(self, seconds: float) -> Drill:
        """Every message takes longer, which no clock shows."""
        drill = Drill()
        for number in range(self.times):
            config = self._robot(number, impairments=Impairments(latency=seconds), patience=2.0)
            try:
                self._virtual(drill, config, None)
            except CtrlrlError:
                drill.injected += 1
                drill.ends["refused before anything moved"] += 1
        return drill

    def _robot(self, number: int, **changes: Any) -> SimulatedConfig:
        kwargs = dict(self.bundle.manifest.provenance.get("env_kwargs") or {})
        return SimulatedConfig(task=self.task, env_kwargs=kwargs, seeds=(10_000 + number,), random=number, **changes)

    def _virtual(self, drill: Drill, config: SimulatedConfig, at: float | None) -> None:
        controller = ControllerConfig(ramp=0.0, settle=0.1, seconds=SECONDS)
        deployment = VirtualDeployment(self.bundle, config, controller)
        deployment.run()
        sim = deployment.robot.sim
        fault = deployment.controller.fault
        self._count(drill, sim.log(), sim, at, fault is not None)
        drill.ends[f"fault: {fault.kind}" if fault else "none: went on"] += 1

    def _count(self, drill: Drill, log: dict[str, Any], sim: LiveSim, at: float | None, faulted: bool) -> None:
        assert sim.endpoint is not None
        drill.injected += 1
        drill.commands += len(log["command time"])
        path = sim.config.impairments.latency  # that the command took
        drill.unsafe.update(judge(log, sim.endpoint.description, self.max_age, sim.task.timestep + path))
        if bad := sim.endpoint.dropped["numbers that are not finite"]:
            drill.unsafe["not finite"] += bad
        began = [t for t, mode, _ in sim.modes if mode == DRIVE]
        if at is not None and began:
            injected = began[0] + at
            safe = log["command time"][(log["command mode"] == SAFE) & (log["command time"] >= injected)]
            held = [t for t, mode, _ in sim.modes if mode == HELD and t >= injected]
            first = min([*safe[:1], *held[:1]], default=None)
            if first is not None and faulted:
                drill.detected.append(float(first) - injected)

    # --- before anything moves ----------------------------------------------------------------------------------------

    def _described(self) -> RobotDescription:
        robot = VirtualDeployment(self.bundle, self._robot(0), ControllerConfig()).robot
        assert robot.sim.endpoint is not None
        robot.env.close()
        return robot.sim.endpoint.description

    def _refusal(self, drill: Drill, act: Callable[[], Any]) -> None:
        drill.injected += 1
        began = time.monotonic()
        try:
            act()
        except CtrlrlError:
            drill.detected.append(time.monotonic() - began)
            drill.ends["refused before anything moved"] += 1
        else:
            drill.ends["accepted"] += 1

    def names(self) -> Drill:
        """Two joints of the robot are called by each other's names, or one by a wrong one."""
        drill, robot = Drill(), self._described()
        for number in range(self.times):
            draw, joints = random.Random(number), list(robot.joints)
            i = draw.randrange(len(joints))
            others = [j for j in range(len(joints)) if j != i]
            if others and number % 2:
                j = draw.choice(others)
                joints[i], joints[j] = (
                    replace(joints[i], name=joints[j].name),
                    replace(joints[j], name=joints[i].name),
                )
                alike = replace(joints[i], name="") == replace(joints[j], name="")
                if alike:  # nothing that the robot says of itself tells them apart
                    drill.injected += 1
                    drill.ends["cannot be told: the joints are alike"] += 1
                    continue
            else:
                joints[i] = replace(joints[i], name=joints[i].name + draw.choice("_abcx"))
            wrong = replace(robot, joints=tuple(joints))
            self._refusal(drill, lambda wrong=wrong: require_fits(self.bundle.manifest, wrong))
        return drill

    def robots(self) -> Drill:
        """Another robot, or one of the same name with another limit, effort, unit, control or measurement."""
        drill, robot = Drill(), self._described()
        for number in range(self.times):
            draw = random.Random(number)
            i = draw.randrange(len(robot.joints))
            driven = [k for k, joint in enumerate(robot.joints) if joint.max_effort is not None]
            joint = robot.joints[i]
            changes = {
                "name": replace(robot, name=draw.choice(["go2", "panda", "so101", "somebody"])),
                "limit": self._with(robot, i, lower=(joint.lower or 0.0) - draw.uniform(0.01, 1)),
                "effort": self._with(
                    robot, k := draw.choice(driven), max_effort=(robot.joints[k].max_effort or 0) * 1.5
                ),
                "unit": self._with(robot, i, unit="m" if joint.unit == "rad" else "rad"),
                "control": replace(robot, control="effort" if robot.control == "position" else "position"),
            }
            if self.bundle.manifest.command or robot.measures:
                changes["measures"] = replace(robot, measures={})
            wrong = changes[list(changes)[number % len(changes)]]
            self._refusal(drill, lambda wrong=wrong: require_fits(self.bundle.manifest, wrong))
        return drill

    def _with(self, robot: RobotDescription, i: int, **changes: Any) -> RobotDescription:
        joints = list(robot.joints)
        joints[i] = replace(joints[i], **changes)
        return replace(robot, joints=tuple(joints))

    def bytes(self) -> Drill:
        """One byte of one file of the bundle is another."""
        drill = Drill()
        with tempfile.TemporaryDirectory() as folder:
            for number in range(self.times):
                draw, copy = random.Random(number), Path(folder) / str(number)
                shutil.copytree(self.bundle.path, copy)
                file = draw.choice(sorted(copy.iterdir()))
                content = bytearray(file.read_bytes())
                content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
                file.write_bytes(content)
                self._refusal(drill, lambda copy=copy: Bundle.open(copy))
                shutil.rmtree(copy)
        return drill

    # --- with processes -----------------------------------------------------------------------------------------------

    def driver_killed(self) -> Drill:
        """What passes messages between controller and robot is killed."""
        return self._processes("driver")

    def controller_killed(self) -> Drill:
        """The controller is killed; what makes the robot safe is its own watchdog."""
        return self._processes("controller")

    def busy(self) -> Drill:
        """Twelve programs begin to compute."""
        return self._processes("busy")

    def _processes(self, what: str) -> Drill:
        drill = Drill()
        with tempfile.TemporaryDirectory() as folder:
            config = replace(
                self._robot(0), seeds=tuple(range(10_000, 10_000 + self.times)), out=folder, again=True, patience=12.0
            )
            config = replace(config, priority=40 if os.geteuid() == 0 else None)  # a robot has a computer of its own
            robot = start("ctrlrl.deploy.simulated", simulated.to_options(config))
            assert robot.stdout is not None
            port = json.loads(robot.stdout.readline())["address"].rpartition(":")[2]
            moments = [self._one(what, port, Path(folder) / f"log{i}", drill) for i in range(self.times)]
            counted = json.loads(robot.communicate(timeout=120)[0].splitlines()[-1])
            if bad := counted["dropped"].get("numbers that are not finite", 0):
                drill.unsafe["not finite"] += bad
            log = dict(np.load(Path(folder) / "robot.npz", allow_pickle=False))
        described = self._described()
        drill.injected, drill.commands = len(moments), len(log["command time"])
        # The log has the moments at which the robot looked, that is up to its period later.
        drill.unsafe.update(judge(log, described, self.max_age, 2 / described.rate))
        safe = log["command time"][log["command mode"] == SAFE]
        held = log["mode time"][log["mode mode"] == HELD]
        for moment in moments:
            after = [*safe[safe >= moment][:1], *held[held >= moment][:1]]
            if after and what != "busy":
                drill.detected.append(min(after) - moment)
        if what == "controller":
            drill.ends[f"{len(held)} times held by the robot's watchdog"] = len(held)
        return drill

    def _one(self, what: str, port: str, log: Path, drill: Drill) -> float:
        """One controller; returns when something was done to it, on the clock of this computer."""
        relay = None
        if what == "driver":
            relay = subprocess.Popen([sys.executable, "-c", RELAY, port], stdout=subprocess.PIPE)
            assert relay.stdout is not None
            port = relay.stdout.readline().decode().strip()
        config = ProcessConfig(
            bundle=str(self.bundle.path),
            seal=self.bundle.seal,
            driver="udp",
            address=f"127.0.0.1:{port}",
            log=str(log),
            runtime="numpy",
            priority=50 if os.geteuid() == 0 and what != "busy" else None,
            controller=ControllerConfig(ramp=0.0, settle=0.1, hold=0.2, seconds=SECONDS - 1),
        )
        mind = start("ctrlrl.deploy.process", process.to_options(config))
        _wait_until_driven(log, mind)
        moment = time.monotonic()
        burners = []
        if relay is not None:
            relay.kill()
        elif what == "controller":
            mind.kill()
        else:
            burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(12)]
        try:
            said, _ = mind.communicate(timeout=60)
        finally:
            for burner in burners:
                burner.send_signal(signal.SIGKILL)
                burner.wait()
        if relay is not None:
            relay.wait()
        summary = json.loads(said.splitlines()[-1]) if said else {"kind": "nothing"}
        if summary["kind"] in ("end", "error"):  # not of one that was killed
            fault = summary.get("fault")
            drill.ends[f"fault: {fault['kind']}" if fault else summary.get("message", "none: went on")] += 1
        return moment


def _wait_until_driven(log: Path, mind: subprocess.Popen[bytes]) -> None:
    """Until the policy has acted 20 times, or the controller has ended."""
    while mind.poll() is None:
        with contextlib.suppress(CtrlrlError, ValueError):
            if read_ticks(log)[1]["acted"].sum() >= 20:
                return
        time.sleep(0.02)


def row(name: str, drill: Drill) -> str:
    """A line of the table."""
    ms = 1e3 * np.array(drill.detected) if drill.detected else None
    took = "–" if ms is None else f"{len(ms)}: {np.median(ms):.3g} ({ms.max():.3g})"
    ends = ", ".join(f"{end} {count}" for end, count in drill.ends.most_common())
    unsafe = ", ".join(f"{what} {count}" for what, count in drill.unsafe.most_common()) or "0"
    return f"| {name} | {drill.injected} | {took} | {ends} | {unsafe} of {drill.commands:,} |"


def main() -> int:
    """Drill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="names of the table's rows")
    options = parser.parse_args()
    try:
        drills = Drills(Bundle.open(options.bundle), options.times).all()
        if unknown := set(options.only or ()) - set(drills):
            print(f"fault_drill: no {', '.join(unknown)}; there are {', '.join(drills)}", file=sys.stderr)
            return 2
        print("| fault | injected | safe after, times: median (most) ms | what happened | unsafe commands |")
        print("|---|---|---|---|---|", flush=True)
        unsafe = missed = 0
        for name in options.only or drills:
            drill = drills[name]()
            unsafe += sum(drill.unsafe.values())
            missed += drill.ends["accepted"] + (drill.ends["none: went on"] if name in MUST_FAULT else 0)
            print(row(name, drill), flush=True)
    except CtrlrlError as error:
        print(f"fault_drill: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if unsafe or missed else 0


if __name__ == "__main__":
    sys.exit(main())
