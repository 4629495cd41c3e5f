"""What deployment does to a simulated robot: messages that are late or lost, weaker motors, another floor."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import mujoco

from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.simulated_config import Impairments
from ctrlrl.deploy.transport import Line
from ctrlrl.envs import events
from ctrlrl.envs.sim_vector import physics
from ctrlrl.envs.spec import Event, SimTask
from ctrlrl.errors import UsageError


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
