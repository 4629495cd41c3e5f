"""Options of a simulated robot, and of what stands between it and training. Imports nothing heavy: the command line has
them too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ctrlrl.errors import UsageError

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
