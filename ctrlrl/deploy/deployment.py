"""A deployment: the controller's process, a simulated robot's where there is one, and what came of both."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ctrlrl.deploy import process, simulated
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.process import ProcessConfig
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.errors import EnvironmentFailure, UsageError
from ctrlrl.files import write_atomically

ENDING = 20.0
"""Seconds in which a process must end after it was told to."""


@dataclass(kw_only=True)
class Outcome:
    """What came of a deployment."""

    controller: dict[str, Any]
    """`Controller.summary`."""
    robot: dict[str, Any] | None = None
    """The simulated robot's own account; None for a real one."""
    episodes: list[dict[str, Any]] = field(default_factory=list)
    """Of the simulated robot."""
    trained: dict[str, Any] = field(default_factory=dict)
    """The evaluation that the bundle tells of."""

    @property
    def returns(self) -> list[float]:
        """Of the episodes that came to their end."""
        return [episode["return"] for episode in self.episodes if not episode["given up"]]

    @property
    def compared(self) -> tuple[list[float], list[float]]:
        """Returns of deployment and of training's evaluation, on the seeds that both have."""
        known = dict(zip(self.trained.get("seeds", []), self.trained.get("returns", []), strict=False))
        both = [e for e in self.episodes if not e["given up"] and e["seed"] in known]
        return [e["return"] for e in both], [float(known[e["seed"]]) for e in both]


def deploy(
    bundle: Bundle,
    controller: ProcessConfig,
    robot: SimulatedConfig | None,
    out: Path,
    told: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Outcome:
    """Run a controller against a robot until it ends, and keep what happened in `out/deployment.json`.

    Args:
        bundle: whose policy drives.
        controller: its process; with a simulated robot the address is filled in.
        robot: the simulated one; None: a real one is at `controller.address`.
        out: folder; logs are in it.
        told: is called with each episode of the simulated robot.

    Raises:
        UsageError: the two do not fit, or nobody answers.
        EnvironmentFailure: a process died.
    """
    children: list[_Child] = []
    episodes: list[dict[str, Any]] = []
    account: dict[str, Any] | None = None
    try:
        if robot is not None:
            body = _Child("simulated robot", "ctrlrl.deploy.simulated", simulated.to_options(robot))
            children.append(body)
            controller = replace(controller, address=body.line()["address"])
        mind = _Child("controller", "ctrlrl.deploy.process", process.to_options(controller))
        children.append(mind)
        mind.line()  # it has started, or says why not
        if robot is not None:
            while (line := body.line())["kind"] != "end":
                episodes.append(line)
                told(line)
                if len(episodes) == len(robot.seeds) or line["given up"]:
                    mind.stop()
            account = line
        summary = mind.line()
    except KeyboardInterrupt:  # the controller got it, too, and makes the robot safe
        summary = mind.line() if len(children) > (robot is not None) else {"kind": "end"}
        if summary["kind"] == "started":
            summary = mind.line()
    finally:
        for child in reversed(children):
            child.end()
    summary.pop("kind", None)
    outcome = Outcome(controller=summary, robot=account, episodes=episodes, trained=dict(bundle.manifest.evaluation))
    write_atomically(out / "deployment.json", json.dumps(asdict(outcome), indent=1).encode() + b"\n")
    return outcome


def start(module: str, options: bytes) -> subprocess.Popen[bytes]:
    """`ctrlrl.deploy.process` or `ctrlrl.deploy.simulated`, with options on standard input; it answers with lines of
    JSON on standard output."""
    child = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(options)
    child.stdin.close()
    child.stdin = None  # or `communicate` would flush it
    return child


class _Child:
    """A process that is told options on its standard input, and answers with lines of JSON."""

    def __init__(self, what: str, module: str, options: bytes) -> None:
        self._what = what
        self._process = start(module, options)

    def line(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            UsageError: it says that something is wrong.
            EnvironmentFailure: it died.
        """
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise EnvironmentFailure(f"the {self._what}'s process died with code {self._process.wait()}")
        line: dict[str, Any] = json.loads(text)
        if line["kind"] == "error":
            raise UsageError(line["message"])
        return line

    def stop(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def end(self) -> None:
        """Wait until it has ended, or make it."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_folder(name: str, root: Path = Path("deployments")) -> Path:
    """`deployments/NAME-TIME`, which is not there yet; the name is a bundle's, and no path."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100] or "policy"
    return root / f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"


def task_of(bundle: Bundle, task: str | None, env_kwargs: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The task, and its options, whose robot is simulated: the bundle's, unless the user names others.

    Raises:
        UsageError: the bundle names a module to import, or a file to read, which only the user may.
    """
    m = bundle.manifest
    if task is None and ":" in m.task:
        raise UsageError(
            f"{m.name} was trained on {m.task}: its module is not imported because a bundle says so; if you trust it, "
            f"say --task {m.task}"
        )
    kwargs = dict(m.provenance.get("env_kwargs") or {}) if env_kwargs is None else dict(env_kwargs)
    if env_kwargs is None and not all(
        value is None or isinstance(value, bool | int | float) for value in kwargs.values()
    ):
        raise UsageError(
            f"{m.name} was trained with --env-kwargs '{json.dumps(kwargs)}': texts may be files, which are not read "
            "because a bundle says so; if you trust it, say the same here"
        )
    return task or m.task, kwargs
