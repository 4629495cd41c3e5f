"""The C++ example drives the simulated pendulum as the Python pipeline does, and refuses or stops as it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ctrlrl
from ctrlrl.deploy import Actor, Bundle, wire
from ctrlrl.deploy.features import FeatureBuilder, Reading
from ctrlrl.deploy.simulated import to_options
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.strict_json import read_document
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import BadMessage, Command, RobotDescription, RobotJoint, State
from ctrlrl.envs.tasks.registry import is_robot_task
from tests.scripts import ROOT

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from ctrlrl.training.export_run import export_run

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")

SOURCE = ROOT / "examples/cpp/controller.cpp"
README = (ROOT / "examples/cpp/README.md").read_text()
COUNT = 2 * np.pi / 4096  # rad, of the simulated encoder
PATIENT = ("--max-age", "10")
"""A busy machine may be slow, and is right all the same."""
ENOUGH = 120.0  # s, after which whatever runs is stuck


# --- the bundle, the program, and two simulated robots ----------------------------------------------------------------


class Simulated:
    """A simulated pendulum in a process of its own, for one episode."""

    def __init__(self, out: Path, **options: Any) -> None:
        self.out = out
        command = [sys.executable, "-m", "ctrlrl.deploy.simulated"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        config = SimulatedConfig(
            task="PendulumSwingUp-v0", seeds=(3,), watchdog=2.0, patience=ENOUGH, out=str(out), **options
        )
        assert self.process.stdin is not None
        self.process.stdin.write(to_options(config))
        self.process.stdin.close()

    @property
    def address(self) -> str:
        """Where it listens; waits until it does."""
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        assert ready["kind"] == "ready", ready
        return str(ready["address"])

    def end(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """How the episode went, and what the robot was told; waits for its end."""
        assert self.process.stdout is not None
        episode, end = (json.loads(line) for line in self.process.stdout.read().splitlines())
        assert self.process.wait(ENOUGH) == 0 and end["dropped"] == {}
        with np.load(self.out / "robot.npz") as file:
            return episode, dict(file)


@pytest.fixture(scope="module")
def robots(tmp_path_factory: Any) -> Iterator[dict[str, Simulated]]:
    """They start while the bundle is made."""
    folder = tmp_path_factory.mktemp("robots")
    made = {
        "sound": Simulated(folder / "sound"),
        "broken": Simulated(folder / "broken", inject="not finite", inject_at=0.5),
    }
    yield made
    for robot in made.values():
        robot.process.kill()
        robot.process.wait()


@pytest.fixture(scope="module")
def bundle(robots: Any, tmp_path_factory: Any) -> Bundle:
    """A policy that has learned nothing, but is no longer at rest: steps were large."""
    folder = tmp_path_factory.mktemp("pendulum")
    agent = {"hidden": [16, 16], "lr": 0.03, "lr_schedule": "constant"}
    settings: dict[str, Any] = {"steps": 512, "num_envs": 8, "rollout_steps": 16, "eval_every": 0, "video": False}
    settings |= {"preset": False, "threads": 1, "quiet": True}
    ran = ctrlrl.train("ppo", "PendulumSwingUp-v0", out=str(folder / "run"), agent=agent, **settings)
    return export_run(ran.path, folder / "bundle", checkpoint="last")


def compiled(header: Path, folder: Path) -> Path:
    """The program, by the command in its README."""
    (folder / "bundles/pendulum").mkdir(parents=True)
    shutil.copy(header, folder / "bundles/pendulum/policy.h")
    (folder / "examples").symlink_to(ROOT / "examples")
    (line,) = re.findall(r"^c\+\+ .*", README, flags=re.MULTILINE)
    assert {"-Wall", "-Wextra", "-Werror", "-std=c++11"} <= set(shlex.split(line)) and line in SOURCE.read_text()
    done = subprocess.run(shlex.split(line), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "controller"


@pytest.fixture(scope="module")
def program(bundle: Bundle, tmp_path_factory: Any) -> Path:
    return compiled(bundle.path / "policy.h", tmp_path_factory.mktemp("program"))


def finished(process: subprocess.Popen[str]) -> dict[str, str]:
    """What it prints at its end, by what stands before the colon."""
    out, _ = process.communicate(timeout=ENOUGH)
    return dict(line.split(": ", 1) for line in out.splitlines())


@contextmanager
def started(program: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    (stuck := threading.Timer(ENOUGH, process.kill)).start()
    try:
        yield process
    finally:
        stuck.cancel()
        process.kill()
        process.communicate()


def by_python(bundle: Bundle, log: Array) -> tuple[Array, Array]:
    """Actions and efforts (T,) of the Python pipeline for the states of a log of one episode."""
    builder, actor, names = FeatureBuilder(bundle.manifest, ["hinge"]), Actor(bundle, "numpy"), ["hinge"]
    actions, efforts = [], []
    for t, (_, _, position, velocity, _, _) in enumerate(log):
        reading = Reading(names, np.array([position]), np.array([velocity]))
        if t == 0:
            builder.reset(reading)
        efforts.append(builder.act(actor.run(builder.observe(reading)), reading)[0])
        actions.append(builder.last_action[0])
    return np.array(actions), np.array(efforts)


# --- against the simulated robot --------------------------------------------------------------------------------------


def test_it_drives_and_commands_what_the_python_pipeline_does(
    robots: dict[str, Simulated], bundle: Bundle, program: Path, tmp_path: Path
) -> None:
    with started(program, robots["sound"].address, "--ticks", "100", "--log", str(tmp_path / "log"), *PATIENT) as it:
        said = finished(it)
    assert it.returncode == 0 and said["fault"] == "none" and said["driven"] == "100" and said["episodes"] == "1"
    for reason in ("size", "magic", "version", "description", "mode"):
        assert said[f"dropped for their {reason}"] == "0"
    log = np.loadtxt(tmp_path / "log")
    assert log.shape == (100, 6) and (np.diff(log[:, 0]) > 0).all()
    actions, efforts = by_python(bundle, log)
    assert np.ptp(actions) > 0.1
    np.testing.assert_allclose(log[:, 4], actions, atol=1e-4)
    np.testing.assert_allclose(log[:, 5], efforts, atol=1e-4)

    episode, robot = robots["sound"].end()
    assert not episode["nobody"] and episode["length"] > 0
    drives = robot["command mode"] == wire.DRIVE
    sent = dict(zip(log[:, 0], log[:, 5], strict=True))  # what the robot was told is what was computed, to the bit
    assert drives.sum() > 50 and (robot["command episode"][drives] == 1).all()
    for origin, target in zip(robot["command origin"][drives], robot["command target"][drives], strict=True):
        assert sent[origin] == target[0]
    assert (robot["command target"][~drives] == 0).all() and not drives[-1]
    driven = log[log[:, 0] > robot["command origin"][drives][0]]  # measured while the robot was driven: it was there
    places = np.round(robot["place"].ravel() / COUNT) * COUNT
    off = np.abs(driven[1:, 2:3] - places).min(1)
    assert len(driven) > 50 and off.max() < 1e-9


def test_it_commands_the_safe_action_after_a_measurement_that_is_not_finite(
    robots: dict[str, Simulated], program: Path
) -> None:
    with started(program, robots["broken"].address, *PATIENT) as it:
        assert it.stderr is not None and "not finite: hinge is at nan" in it.stderr.readline()
        episode, robot = robots["broken"].end()  # which gives up after a second of safe commands
        it.send_signal(signal.SIGINT)
        said = finished(it)
    assert it.returncode == 1 and said["fault"].startswith("not finite") and episode["given up"]
    drives = robot["command mode"] == wire.DRIVE
    last = int(np.flatnonzero(drives)[-1])
    assert (~drives[last + 1 :]).sum() > 5 and (robot["command target"][last + 1 :] == 0).all()
    broken = robot["state sequence"][~robot["state finite"]]
    assert (
        len(broken) and robot["command origin"][drives].max() < broken[0] <= robot["command origin"][last + 1 :].min()
    )


# --- against a robot of the test's own --------------------------------------------------------------------------------

PENDULUM = RobotDescription(
    name="pendulum",
    control="effort",
    joints=(RobotJoint(name="hinge", max_effort=0.25),),
    rate=200.0,
    watchdog=2.0,
)
Change = Callable[["Fake", State, bytes], list[bytes]]


class Fake:
    """A pendulum that measures what it likes, and says what it is told to: messages by `wire`, in a thread."""

    def __init__(
        self, description: bytes = PENDULUM.to_json(), change: Change = lambda fake, state, message: [message]
    ) -> None:
        self._json, self._change = description, change
        self.commands: list[Command] = []
        self.states: dict[int, State] = {}
        self.wrong: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.005)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Fake:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()
        assert not self.wrong

    @property
    def driven(self) -> int:
        return sum(command.mode == wire.DRIVE for command in self.commands)

    def _serve(self) -> None:
        random, peer, sequence = np.random.default_rng(0), None, 0
        while not self._over.is_set():
            try:
                message, sender = self._socket.recvfrom(100_000)
                if wire.kind_of(message) == wire.HELLO:
                    head = wire.pack_description(1, 0.0, wire.unpack_hello(message), PENDULUM)
                    self._socket.sendto(head.removesuffix(PENDULUM.to_json()) + self._json, sender)
                    peer = sender
                else:
                    self.commands.append(wire.unpack_command(message, PENDULUM, PENDULUM.digest))
            except (TimeoutError, ConnectionError):
                pass
            except BadMessage as bad:
                self.wrong.append(str(bad))
            if peer is None:
                continue
            sequence += 1
            position, velocity = random.normal(size=1), random.normal(size=1)
            state = State(sequence, time.monotonic() + 77, wire.DRIVEN, 7, position, velocity, {})
            message = wire.pack_state(state, PENDULUM, PENDULUM.digest)
            for one in self._change(self, state, message):
                self._socket.sendto(one, peer)
                self.states.setdefault(sequence, state)


def test_numbers_are_those_that_were_sent_and_what_is_no_state_is_dropped(
    bundle: Bundle, program: Path, tmp_path: Path
) -> None:
    def noisy(fake: Fake, state: State, message: bytes) -> list[bytes]:
        other, fast = bytearray(message), bytearray(message)
        other[24] ^= 1  # the digest
        fast[6] = 3  # the mode
        bad = [b"", b"CTRL", message[:-1], message + b"\0", b"X" + message[1:], b"CTRL\2" + message[5:]]
        command = Command(1, 0.0, 1, 7, 1, np.ones(1), np.ones(1), np.ones(1))
        bad += [bytes(other), bytes(fast), message, wire.pack_command(command, PENDULUM.digest)]
        return [message, *bad]

    # Members in any order, and those left out that have defaults: as `RobotDescription.from_json` reads them.
    joints = b'"joints":[{"max_effort":0.25,"name":"hinge"}]'
    other = b' {"watchdog":2,"rate":2e2,' + joints + b',"control":"effort","name":"pendulum"}\n'
    RobotDescription.from_json(other, "here")
    with Fake(other, noisy) as fake:
        with started(program, fake.address, "--ticks", "30", "--log", str(tmp_path / "log"), *PATIENT) as it:
            said = finished(it)
        assert it.returncode == 0, it
    for reason in ("size", "magic", "version", "kind", "description", "mode", "sequence"):
        assert int(said[f"dropped for their {reason}"]) > 0
    log = np.loadtxt(tmp_path / "log")
    assert len(log) == 30 and (log[:, 1] == 7).all()
    for row in log:
        state = fake.states[int(row[0])]
        assert (row[2], row[3]) == (state.position[0], state.velocity[0])
    actions, efforts = by_python(bundle, log)
    np.testing.assert_allclose(log[:, 4], actions, atol=1e-4)
    drives = [command for command in fake.commands if command.mode == wire.DRIVE]
    assert [command.origin for command in drives] == log[:, 0].tolist()
    np.testing.assert_allclose([command.target[0] for command in drives], efforts, atol=1e-4)
    assert all(command.episode == 7 for command in drives)
    assert all(command.kp == command.kd == 0 for command in fake.commands)
    assert all(command.target == 0 for command in fake.commands if command.mode == wire.SAFE)
    assert (np.diff([command.sequence for command in fake.commands]) > 0).all()
    assert (np.diff([command.time for command in fake.commands]) > 0).all()


def altered(**changes: Any) -> Change:
    """A robot that has something wrong with its states once it was driven for ten ticks."""

    def change(fake: Fake, state: State, message: bytes) -> list[bytes]:
        if fake.driven < 10:
            return [message]
        for name, by in changes.items():
            setattr(state, name, getattr(state, name) + by)
        return [wire.pack_state(state, PENDULUM, PENDULUM.digest)]

    return change


def late(*, digest: bytes | None) -> Change:
    """A robot that says nothing more, or speaks of another description."""
    return lambda fake, state, message: (
        [message] if fake.driven < 10 else [] if digest is None else [wire.pack_state(state, PENDULUM, digest)]
    )


FAULTS: dict[str, tuple[str, Change]] = {
    "position": ("not finite: hinge is at nan", altered(position=np.nan)),
    "velocity": ("not finite: hinge is at ", altered(velocity=np.inf)),
    "clock back": ("clock: the robot's went back by ", altered(time=-10.0)),
    "clock ahead": ("clock: the robot's jumped ahead by ", altered(time=10.0)),
    "held": ("robot: it holds itself safe", altered(mode=1)),
    "silence": ("age: the newest state is ", late(digest=None)),
    "other robot": ("age: the newest state is ", late(digest=b"another!")),
}


def test_after_a_fault_nothing_but_the_safe_action_is_commanded(program: Path) -> None:
    def fail(name: str) -> tuple[str, list[int], dict[str, str]]:
        max_age = "2" if FAULTS[name][0].startswith("age") else "8"
        with Fake(change=FAULTS[name][1]) as fake, started(program, fake.address, "--max-age", max_age) as it:
            assert it.stderr is not None
            fault = it.stderr.readline()
            until, seen = time.monotonic() + ENOUGH, len(fake.commands)
            while len(fake.commands) < seen + 20 and time.monotonic() < until:
                time.sleep(0.01)
            it.send_signal(signal.SIGINT)
            return fault, [command.mode for command in fake.commands], finished(it) | {"status": str(it.returncode)}

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        for name, (fault, modes, said) in zip(FAULTS, pool.map(fail, FAULTS), strict=True):
            wanted = FAULTS[name][0]
            assert fault.startswith(f"fault: {wanted}") and said["fault"].startswith(wanted), (name, fault)
            last = len(modes) - 1 - modes[::-1].index(wire.DRIVE)
            assert modes.count(wire.DRIVE) >= 10 and len(modes) - last > 10 and said["status"] == "1", name


def described(**changes: Any) -> bytes:
    tree = json.loads(PENDULUM.to_json())
    joint = {name.removeprefix("joint_"): v for name, v in changes.items() if name.startswith("joint_")}
    tree["joints"][0] |= joint
    return json.dumps(tree | {name: v for name, v in changes.items() if not name.startswith("joint_")}).encode()


STRANGE = "its description is not that of such a rig"
REFUSED: dict[str, tuple[bytes, str]] = {
    "joint": (described(joint_name="elbow"), "the joint is 'elbow', and the policy is for 'hinge'"),
    "robot": (described(name="cartpole"), "the robot is 'cartpole', and the policy is for 'pendulum'"),
    "control": (described(control="position"), "what it takes is 'position', and the policy is for 'effort'"),
    "unit": (described(joint_unit="m"), "the joint's unit is 'm', and the policy is for 'rad'"),
    "effort": (described(joint_max_effort=2.5), "the joint's largest effort is 2.5, and the policy is for 0.25"),
    "limit": (described(joint_upper=1.0), "the joint has an upper limit"),
    "joints": (described(joints=json.loads(described())["joints"] * 2), "it has more than one joint"),
    "measures": (described(measures={"orientation": 4}), "it measures what is not known here"),
    "watchdog": (described(watchdog=0.01), "watchdog, s: 0.01, and the policy needs 0.02 at least"),
    "undriven": (described(joint_max_effort=None), STRANGE),
    "none": (described(joints=[]), STRANGE),
    "unknown member": (described(legs=4), STRANGE),
    "twice": (described().replace(b'"rate"', b'"name": "pendulum", "rate"'), STRANGE),
    "escape": (described(name="pend\u00fclum"), STRANGE),
    "nothing": (b"", STRANGE),
    "half": (described()[:-1], STRANGE),
    "more": (described() + b"}", STRANGE),
    "NaN": (described().replace(b"200.0", b"NaN"), STRANGE),
    "deep": (b"[" * 30_000, STRANGE),
}


def test_another_robot_is_refused_before_anything_is_commanded(program: Path) -> None:
    for name, (description, message) in REFUSED.items():
        with Fake(description) as fake, started(program, fake.address) as it:
            _, said = it.communicate(timeout=ENOUGH)
        assert it.returncode == 2 and said.endswith(f": {message}\n") and not fake.commands, (name, said)


def test_what_is_not_asked_for_rightly_is_refused(program: Path) -> None:
    for arguments in ([], ["127.0.0.1:1", "--ticks"], ["127.0.0.1:1", "--max-age", "nan"], ["127.0.0.1:1", "--a", "1"]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("usage: "), arguments
    for address in ("localhost", "127.0.0.1:0", "127.0.0.1:70000", "127.0.0.1:1x", "1:2"):
        done = subprocess.run([program, address], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("an address is HOST:PORT in numbers"), address


# --- against the manifest ---------------------------------------------------------------------------------------------


def test_its_constants_are_those_of_the_manifest(bundle: Bundle) -> None:
    found = dict(re.findall(r"^constexpr \w+ (\w+)(?:\[\])? = (.*?);", SOURCE.read_text(), flags=re.MULTILINE))
    m = bundle.manifest
    (entry,), (joint,) = m.observation, m.joints
    texts = {name: json.loads(found[name]) for name in ("ROBOT", "JOINT", "UNIT")}
    assert texts == {"ROBOT": m.robot, "JOINT": joint.name, "UNIT": joint.unit}
    numbers = {"PERIOD": m.control_dt, "LOW": m.action.low[0], "HIGH": m.action.high[0], "SCALE": m.action.scale[0]}
    numbers |= {"MAX_EFFORT": joint.max_effort, "TOLERANCE": m.network.tolerance}
    assert {name: float(found[name].removesuffix("f")) for name in numbers} == numbers
    assert m.action.kind == "joint effort" and m.action.joints == ("hinge",) and m.action.offset == (0.0,)
    assert joint.lower is joint.upper is None and not m.network.state and not m.command
    # What `observe` computes, in its order.
    terms = [("joint direction", 2, ("hinge",)), ("joint velocity", 1, ("hinge",)), ("last action", 1, ())]
    assert [(term.measure, term.size, term.joints) for term in entry.terms] == terms and entry.name == "policy"
    assert all(term.history == 1 and not term.offset for term in entry.terms)


def test_the_robot_of_the_readme_is_one() -> None:
    (options,) = re.findall(r"^echo '(.*)' \| python -m ctrlrl\.deploy\.simulated &$", README, flags=re.MULTILINE)
    config = read_document(options.encode(), SimulatedConfig, "README.md", "options")
    assert f"./controller {config.address} " in README and is_robot_task(config.task)


def test_a_policy_that_computes_other_numbers_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def worse(found: re.Match[str]) -> str:
        return f"{found[1]}{float(found[2]) + 0.001:.9g}f"

    source = (bundle.path / "policy.h").read_text()
    source, count = re.subn(r"(policy_expected_0_action\[1\] = \{\n)([-.e\d]+)f", worse, source)
    assert count == 1
    (tmp_path / "policy.h").write_text(source)
    (tmp_path / "other").mkdir()
    done = subprocess.run([compiled(tmp_path / "policy.h", tmp_path / "other"), "127.0.0.1:1"], capture_output=True)
    assert done.returncode == 2 and b"other numbers than when it was exported: off by 0.00" in done.stderr
