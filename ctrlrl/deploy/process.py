"""The controller's process: `python -m ctrlrl.deploy.process < options.json` (`ProcessConfig`).

It imports nothing of training. At its end it prints a line of JSON: what happened.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import Controller, ControllerConfig
from ctrlrl.deploy.driver import Driver
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.realtime import Time, enter_realtime
from ctrlrl.deploy.reflex import read_reflex
from ctrlrl.deploy.strict_json import read_document
from ctrlrl.deploy.transport import UdpLine, WireDriver, ZmqLine, parse_udp
from ctrlrl.errors import CtrlrlError, UsageError


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """A controller's process."""

    bundle: str
    seal: str
    """The checksum that the bundle's manifest must have: what was checked is what drives."""
    driver: str
    """udp, zmq, or lerobot."""
    address: str
    """Of the robot: HOST:PORT, a ZeroMQ address, or MODULE:FUNCTION that makes a LeRobot robot."""
    connect: float = 10.0
    """Seconds in which it must answer."""
    runtime: str | None = None
    reflex: str | None = None
    """Folder of a reflex."""
    log: str | None = None
    priority: int | None = None
    """Of SCHED_FIFO."""
    cpu: int | None = None
    controller: ControllerConfig = field(default_factory=ControllerConfig)


def make_driver(kind: str, address: str, manifest: Manifest) -> Driver:
    """The driver to a robot; not connected yet.

    Raises:
        UsageError: there is no such driver, or no such address.
    """
    if kind == "udp":
        return WireDriver(UdpLine(parse_udp(address)), address, Time())
    if kind == "zmq":
        return WireDriver(ZmqLine(address, serve=False), address, Time())
    if kind == "lerobot":
        from ctrlrl.deploy.lerobot import LeRobotDriver

        return LeRobotDriver(address, manifest, Time())
    raise UsageError(f"no driver {kind!r}; there are udp, zmq and lerobot")


def control(config: ProcessConfig, started: Callable[[], None] = lambda: None) -> dict[str, object]:
    """Drive a robot until the time is over, a signal comes, or after a fault; returns what happened.

    `started` is called when all that could be refused was not.

    Raises:
        UsageError: the bundle, the robot, or both together are not fit for it. Nothing was commanded then.
    """
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    bundle = Bundle.open(config.bundle)
    if bundle.seal != config.seal:
        raise UsageError(f"{config.bundle} is not the bundle any more that was checked")
    driver = make_driver(config.driver, config.address, bundle.manifest)
    try:
        robot = driver.connect(config.connect)
        joints = [joint.name for joint in robot.joints]
        reflex = None if config.reflex is None else read_reflex(config.reflex, bundle.manifest, joints)
        log = None if config.log is None else Path(config.log)
        controller = Controller(
            bundle, driver, config.controller, Time(), runtime=config.runtime, reflex=reflex, log=log, told=_shout
        )
    except BaseException:
        driver.close()
        raise
    try:
        enter_realtime(config.priority, config.cpu)
        started()
        controller.run(lambda: bool(asked) or os.getppid() != parent)  # whoever started it may have gone
        return controller.summary()
    finally:
        controller.close()


def _shout(text: str) -> None:
    """Say it without waiting for a terminal that is stopped."""
    threading.Thread(target=print, args=(text,), kwargs={"file": sys.stderr, "flush": True}, daemon=True).start()


def to_options(config: ProcessConfig) -> bytes:
    """What `main` reads."""
    return json.dumps(asdict(config)).encode()


def main() -> int:
    """Control what standard input asks for."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a driver's own code prints is no line of ours

    def say(line: dict[str, object]) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        config = read_document(sys.stdin.buffer.read(), ProcessConfig, "standard input", "options")
        say({"kind": "end", **control(config, lambda: say({"kind": "started"}))})
    except CtrlrlError as error:
        say({"kind": "error", "message": str(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
