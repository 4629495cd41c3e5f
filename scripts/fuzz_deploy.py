#!/usr/bin/env python3
"""Packets and manifests that are damaged at random, or made to do harm: nothing may crash, hang, or get through.

    python scripts/fuzz_deploy.py --count 100000 --seed 1

with the interpreter of .venv. Half of them are messages, given to a controller's driver and to a robot's end of the
line; half are manifests, each sealed and put into a bundle's folder as an attacker would who can write checksums, and
opened. What is taken is looked at: a state must have the sizes that were agreed on, a command finite numbers, and a
manifest must be written as it was read and name no file that a bundle has not. Exit code 1 where anything failed; what
failed is written to --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np

from ctrlrl.deploy import wire
from ctrlrl.deploy.bundle import MANIFEST, SEAL, Bundle
from ctrlrl.deploy.manifest import Action, Entry, Joint, Manifest, Network, Term
from ctrlrl.deploy.transport import Endpoint, WireDriver
from ctrlrl.deploy.virtual import MemoryLine, VirtualTime
from ctrlrl.deploy.wire import Command, RobotDescription, RobotJoint, State
from ctrlrl.errors import CtrlrlError

SLOW = 2.0  # s, after which something hangs
ROBOT = RobotDescription(
    name="robot",
    control="position",
    joints=(RobotJoint(name="a", lower=-1.0, upper=1.0, max_effort=5.0), RobotJoint(name="b")),
    measures={"orientation": 4},
    rate=200.0,
    watchdog=0.1,
)
MANIFESTS = Manifest(
    name="policy",
    robot="robot",
    task="Task-v0",
    control_dt=0.02,
    observation=(
        Entry(
            name="observation",
            shape=(6,),
            terms=(
                Term(name="q", size=2, measure="joint position", unit="rad", joints=("a", "b"), history=1),
                Term(name="up", size=3, measure="base up", unit=""),
                Term(name="last", size=1, measure="last action", unit=""),
            ),
        ),
    ),
    action=Action(
        kind="joint position offset", shape=(1,), joints=("a",), low=(-1.0,), high=(1.0,), scale=(0.5,), offset=(0.0,)
    ),
    joints=(
        Joint(name="a", unit="rad", lower=-1.0, upper=1.0, default=0.0, kp=20.0, kd=0.5, max_effort=5.0),
        Joint(name="b", unit="rad", lower=None, upper=None, default=0.0, driven=False),
    ),
    network=Network(opset=20, runtimes=("onnx",)),
    files={"policy.onnx": {"bytes": 3, "sha256": "0" * 64}, "golden.safetensors": {"bytes": 3, "sha256": "0" * 64}},
)
HARMFUL: list[Any] = [
    *("../../../etc/passwd", "/etc/passwd", "a/../../b", "policy.onnx\0.txt", "", "\ud800", "{{7*7}}", "__class__"),
    *(-1, 0, 1, 2**63, 10**400, 1e308, -1e308, 1e-320, True, None, [], {}, [[]], {"a": {}}, [1] * 1000),
]


class Packets:
    """Messages, whole and damaged, and both ends that get them."""

    def __init__(self, draw: random.Random) -> None:
        self._draw, clock = draw, VirtualTime()
        self._ours, self._theirs = MemoryLine.pair()
        self._endpoint, self._driver = Endpoint(self._theirs, ROBOT, clock), WireDriver(self._ours, "here", clock)
        clock.between = lambda until: deque(self._endpoint.commands(), maxlen=0).clear()
        self._driver.connect(1.0)
        self._number = 10

    def whole(self) -> bytes:
        """A message as it should be, and newer than all before."""
        draw, n = self._draw, self._number
        self._number += 1
        kind = draw.randrange(4)
        if kind == 0:
            where = np.array([draw.uniform(-1, 1), draw.choice([0.0, np.nan, np.inf, 1e300])])
            state = State(n, n / 200, draw.randrange(3), 1, where, where, {"orientation": np.array([1.0, 0, 0, 0])})
            return wire.pack_state(state, ROBOT, ROBOT.digest)
        if kind == 1:
            value = np.array([draw.choice([0.5, -0.5, np.nan, -np.inf])])
            return wire.pack_command(Command(n, n / 50, draw.randrange(2), 1, n, value, value, value), ROBOT.digest)
        if kind == 2:
            return wire.pack_hello(n, 0.0, bytes(draw.randrange(256) for _ in range(32)))
        return wire.pack_description(n, 0.0, bytes(32), ROBOT)

    def damaged(self) -> bytes:
        """A message with bytes changed, cut, grown, or of nothing but chance."""
        draw, message = self._draw, bytearray(self.whole())
        how = draw.randrange(5)
        if how == 0:
            for _ in range(draw.randrange(1, 9)):
                message[draw.randrange(len(message))] = draw.randrange(256)
        elif how == 1:
            del message[draw.randrange(len(message)) :]
        elif how == 2:
            message += bytes(draw.randrange(256) for _ in range(draw.choice([1, 8, 100, 50_000])))
        elif how == 3:
            message[:] = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        return bytes(message)

    def __call__(self) -> str:
        """One more; what became of it."""
        message = self.damaged()
        self._theirs.send(message)
        self._ours.send(message)
        taken = []
        state = self._driver.read()
        if state is not None:
            assert state.position.shape == state.velocity.shape == (2,) and state.mode <= wire.HELD
            assert {name: value.shape for name, value in state.others.items()} == {"orientation": (4,)}
            taken.append("state taken")
        for command in self._endpoint.commands():
            assert command.target.shape == (1,) and command.mode <= wire.DRIVE
            assert all(np.isfinite(v).all() for v in (command.target, command.kp, command.kd))
            taken.append("command taken")
        self._driver._newest = min(self._driver._newest, self._number)  # what claims to be far ahead is the newest
        self._endpoint._newest = min(self._endpoint._newest, self._number)
        deque(self._ours.receive(), maxlen=0)
        return taken[0] if taken else "dropped"


class Manifests:
    """Manifests, damaged, in a bundle."""

    def __init__(self, draw: random.Random, folder: Path) -> None:
        self._draw, self._folder = draw, folder
        for name in MANIFESTS.files:
            (folder / name).write_bytes(b"abc")

    def __call__(self) -> str:
        """One more; what became of it."""
        draw, folder = self._draw, self._folder
        content = MANIFESTS.to_json()
        if draw.random() < 0.3:
            raw = bytearray(content)
            for _ in range(draw.randrange(1, 5)):
                at = draw.randrange(len(raw))
                raw[at : at + draw.randrange(3)] = bytes(draw.randrange(256) for _ in range(draw.randrange(3)))
            content = bytes(raw)
        else:
            tree = json.loads(content)
            for _ in range(draw.randrange(1, 4)):
                self._change(tree)
            content = json.dumps(tree).encode("utf-8", "surrogatepass")
        with contextlib.suppress(CtrlrlError):
            read = Manifest.from_json(content, "here")
            assert Manifest.from_json(read.to_json(), "again") == read
        (folder / MANIFEST).write_bytes(content)
        (folder / SEAL).write_text(hashlib.sha256(content).hexdigest())
        try:
            Bundle.open(folder)
        except CtrlrlError as error:
            str(error).encode()
            assert len(str(error)) < 20_000
            return "refused"
        raise AssertionError("a bundle without a network was opened")

    def _change(self, tree: Any) -> None:
        """One value anywhere becomes another, goes, or gets another name."""
        draw, places = self._draw, []

        def walk(node: Any) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, value in list(items):
                places.append((node, key))
                walk(value)

        walk(tree)
        if not places:
            return
        node, key = draw.choice(places)
        how = draw.randrange(4)
        if how == 0 and isinstance(node, dict):
            node[str(draw.choice(HARMFUL))] = node.pop(key)
        elif how == 1:
            del node[key]
        elif how == 2:
            node[key] = copy.deepcopy(draw.choice(places)[0])
        else:
            node[key] = copy.deepcopy(draw.choice(HARMFUL))


def main() -> int:
    """Fuzz, and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_deploy.txt"))
    options = parser.parse_args()
    draw, ends, failures = random.Random(options.seed), Counter[str](), 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Callable[[], str]] = {"packet": Packets(draw), "manifest": Manifests(draw, Path(folder))}
        for number in range(options.count):
            kind = "packet" if number % 2 else "manifest"
            before = time.monotonic()
            try:
                end = kinds[kind]()
                if time.monotonic() - before > SLOW:
                    raise AssertionError(f"took {time.monotonic() - before:.1f} s")
            except Exception as error:  # whatever it is, it is what is looked for
                failures += 1
                end = "FAILED"
                with open(options.keep, "a") as file:
                    file.write(f"seed {options.seed}, number {number}, {kind}: {type(error).__name__}: {error}\n")
            ends[f"{kind}: {end}"] += 1
    print(f"{options.count:,} in {time.monotonic() - began:.0f} s, seed {options.seed}, {failures} failed")
    for end, count in sorted(ends.items()):
        print(f"{count:>8,} {end}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
