"""A deployment in virtual time: robot, line and controller in one thread, as fast as they are computed, and always the
same. The code is that of a deployment in real time; what it leaves out is the operating system."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import FAULT, Controller, ControllerConfig, Reflex
from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.simulated import SimulatedRobot
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.transport import Line, WireDriver


class VirtualTime(Time):
    """Goes on when somebody waits; meanwhile `between` is called with the moment up to which things may happen."""

    def __init__(self) -> None:
        self.moment = 100.0
        self.between: Callable[[float], None] = lambda until: None

    def now(self) -> float:
        return self.moment

    def wait_until(self, moment: float) -> None:
        self.between(moment)
        self.moment = max(self.moment, moment)


class MemoryLine(Line):
    """One end of a line within a program; `pair` makes two."""

    def __init__(self, incoming: deque[bytes], outgoing: deque[bytes]) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    @classmethod
    def pair(cls) -> tuple[MemoryLine, MemoryLine]:
        """Two ends."""
        there: deque[bytes] = deque()
        back: deque[bytes] = deque()
        return cls(there, back), cls(back, there)

    def send(self, message: bytes) -> None:
        self._outgoing.append(message)

    def receive(self) -> Iterator[bytes]:
        while self._incoming:
            yield self._incoming.popleft()

    def close(self) -> None:
        self._incoming.clear()


class VirtualDeployment:
    """A controller and a simulated robot in virtual time.

    Args:
        bundle: whose policy drives.
        robot: the robot.
        config: of the controller.
        runtime: of the policy.
        reflex: of the controller.
        log: a new folder for the controller's log.

    Attributes:
        controller: the controller.
        robot: the robot.
        clock: virtual time.
        driver: of the controller.
    """

    def __init__(
        self,
        bundle: Bundle,
        robot: SimulatedConfig,
        config: ControllerConfig,
        *,
        runtime: str | None = None,
        reflex: Reflex | None = None,
        log: Path | None = None,
    ) -> None:
        self.clock = VirtualTime()
        ours, theirs = MemoryLine.pair()
        self.robot = SimulatedRobot(robot, theirs, self.clock)
        self.driver = WireDriver(ours, "virtual", self.clock)
        endpoint = self.robot.sim.endpoint
        assert endpoint is not None
        self.clock.between = lambda until: [None for _ in endpoint.commands()].clear()  # it answers
        self.driver.connect(60.0)
        self.controller = Controller(bundle, self.driver, config, self.clock, runtime=runtime, reflex=reflex, log=log)
        self._due = self.clock.moment + self.controller.period
        self.clock.between = self._tick

    def _tick(self, until: float) -> None:
        while self._due <= until:
            self.clock.moment = max(self.clock.moment, self._due)
            self.controller.tick(self._due)
            self._due += self.controller.period

    def run(self) -> list[dict[str, Any]]:
        """The robot's episodes, and last what it counted; ends with them, or a second after a fault."""
        return list(self.robot.episodes())

    @property
    def faulted(self) -> bool:
        """Whether a fault stopped the robot."""
        return self.controller.phase == FAULT
