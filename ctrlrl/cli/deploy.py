"""`ctrlrl deploy BUNDLE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.deploy.safety import FAULTS, SafetyConfig
from ctrlrl.deploy.simulated_config import Impairments, SimulatedConfig
from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    from ctrlrl.deploy.bundle import Bundle
    from ctrlrl.deploy.deployment import Outcome

FAULTED = 4
"""Exit code where a fault stopped the robot."""


@dataclass(frozen=True, kw_only=True)
class Sim(Impairments):
    """What the simulated robot has otherwise than training."""

    watchdog: float = 0.1
    """Seconds without a command after which the robot makes itself safe."""
    transport: Literal["udp", "zmq"] = "udp"
    """How it is reached."""


@dataclass(frozen=True, kw_only=True)
class Deploy:
    """Drive a robot with a bundle's policy, or a simulated one, to see what deployment takes away."""

    bundle: Positional[str]
    """Bundle folder."""
    robot: str | None = None
    """What it is for; by default what the bundle says, and anything else is refused."""
    driver: Literal["sim", "udp", "zmq", "lerobot"] = "sim"
    """How the robot is reached: sim starts a simulated one."""
    address: str | None = None
    """Of the robot: HOST:PORT for udp, such as ipc:///tmp/robot for zmq, MODULE:FUNCTION that makes one for lerobot."""
    episodes: int | None = None
    """Of the simulated robot, one for each seed of evaluation; by default as many as in training."""
    seconds: float | None = None
    """After which the controller stops; by default when the episodes are over, or with Ctrl-C."""
    command: tuple[float, ...] | None = None
    """What the policy is told to do (`ctrlrl check` says what the numbers are); by default what the robot's operator
    says."""
    runtime: Literal["onnx", "numpy", "c"] | None = None
    """What runs the network."""
    reflex: str | None = None
    """Folder of a reflex, which looks more often than the policy and may take over."""
    record: bool = False
    """Film the first episode of the simulated robot."""
    out: str | None = None
    """New folder for logs and report; by default deployments/NAME-TIME."""
    ramp: float | None = None
    """Seconds in which joints go to where the policy begins; by default 3, and 0 with a simulated robot, which begins
    there."""
    priority: int | None = None
    """Of real-time scheduling (SCHED_FIFO), 1 to 99; by default ordinary scheduling."""
    cpu: int | None = None
    """The processor that the controller stays on."""
    task: str | None = None
    """What the simulated robot does; by default what the bundle was trained on."""
    env_kwargs: str | None = None
    """Options of the task, as JSON; by default those of training."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    """Limits."""
    sim: Sim = field(default_factory=Sim)
    """What the simulated robot has otherwise."""


def run(arguments: Sequence[str]) -> int:
    """Deploy; returns the exit code: 4 where a fault stopped the robot."""
    options = parse(Deploy, arguments, "deploy")
    if options.record:
        import ctrlrl.envs  # noqa: F401  (before MuJoCo: it settles how that draws)
    from ctrlrl.deploy.bundle import Bundle
    from ctrlrl.deploy.controller import ControllerConfig
    from ctrlrl.deploy.deployment import deploy, free_folder
    from ctrlrl.deploy.deployment_page import write_page
    from ctrlrl.deploy.process import ProcessConfig

    _require(options)
    bundle = Bundle.open(options.bundle)
    if options.robot is not None and options.robot != bundle.manifest.robot:
        raise UsageError(
            f"{bundle.path} is for the robot {bundle.manifest.robot or 'nobody knows'}, not {options.robot}"
        )
    bundle.manifest.require_robot()  # before anything is started
    out = Path(options.out) if options.out is not None else free_folder(bundle.manifest.name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another --out; nothing was overwritten")
    simulates = options.driver == "sim"
    ramp = options.ramp if options.ramp is not None else 0.0 if simulates else ControllerConfig.ramp
    controller = ProcessConfig(
        bundle=str(bundle.path),
        seal=bundle.seal,
        driver=options.sim.transport if simulates else options.driver,
        address=options.address or "",
        runtime=options.runtime,
        reflex=options.reflex,
        log=str(out / "log"),
        priority=options.priority,
        cpu=options.cpu,
        controller=ControllerConfig(command=options.command, seconds=options.seconds, ramp=ramp, safety=options.safety),
    )
    robot = _simulated(options, bundle, out) if simulates else None
    out.mkdir(parents=True, exist_ok=True)
    outcome = deploy(bundle, controller, robot, out, _say)
    print("\n".join(_lines(outcome, bundle)))
    if not outcome.controller:  # it was interrupted before it began
        return 130
    page = write_page(bundle, outcome, out, None, robot)
    if options.record and robot is not None:  # after the numbers, which must not be lost where nothing can be drawn
        from ctrlrl.deploy.filming import film

        write_page(bundle, outcome, out, film(out, robot, outcome.episodes), robot)
    print(f"report: {page}")
    return FAULTED if outcome.controller.get("fault") else 0


def _require(options: Deploy) -> None:
    simulates = options.driver == "sim"
    own = {"episodes": None, "record": False, "task": None, "env_kwargs": None, "sim": Sim()}
    for name, default in own.items():
        if not simulates and getattr(options, name) != default:
            raise UsageError(f"--{name.replace('_', '-')} is for --driver sim, not for {options.driver}")
    if simulates and options.address is not None:
        raise UsageError("--address is of a real robot: --driver sim starts its own")
    if not simulates and options.address is None:
        raise UsageError(f"--driver {options.driver} needs --address: where is the robot?")
    if options.episodes is not None and options.episodes < 1:
        raise UsageError(f"--episodes must be at least 1, got {options.episodes}")


def _simulated(options: Deploy, bundle: Any, out: Path) -> Any:
    import json

    from ctrlrl.deploy.deployment import task_of
    from ctrlrl.training.evaluation import evaluation_seeds

    try:
        kwargs = None if options.env_kwargs is None else json.loads(options.env_kwargs)
    except ValueError as error:
        raise UsageError(f"--env-kwargs is no JSON: {error}") from None
    if kwargs is not None and not isinstance(kwargs, dict):
        raise UsageError(f"--env-kwargs must be a JSON object, got {options.env_kwargs}")
    task, kwargs = task_of(bundle, options.task, kwargs)
    episodes = options.episodes or int(bundle.manifest.evaluation.get("episodes", 10))
    sim = options.sim
    return SimulatedConfig(
        task=task,
        env_kwargs=kwargs,
        seeds=tuple(evaluation_seeds(episodes)),
        transport=sim.transport,
        address="127.0.0.1:0" if sim.transport == "udp" else f"ipc://{(out / 'robot').resolve()}",
        watchdog=sim.watchdog,
        out=str(out),
        priority=None if options.priority is None else max(1, options.priority - 1),
        impairments=Impairments(**{f.name: getattr(sim, f.name) for f in fields(Impairments)}),
    )


def _say(episode: dict[str, Any]) -> None:
    gone = "no controller came" if episode["nobody"] else "given up"
    how = f", {gone}" if episode["given up"] else ""
    print(f"seed {episode['seed']}: return {episode['return']:,.2f}, {episode['length']:,} steps{how}", flush=True)


def _lines(outcome: Outcome, bundle: Bundle) -> list[str]:
    from ctrlrl.deploy.report import saturation
    from ctrlrl.runs.statistics import mean_interval, told_share

    lines, c, ended = [], outcome.controller, [e for e in outcome.episodes if not e["given up"]]
    if returns := outcome.returns:
        low, high = mean_interval(returns)
        mean = sum(returns) / len(returns)
        lines.append(f"mean return {mean:,.2f}, 95 % interval [{low:,.2f}, {high:,.2f}], {len(returns)} episodes")
        if all(e["success"] is not None for e in ended):
            lines.append(f"success {told_share(sum(e['success'] > 0 for e in ended), len(ended))}")
        for name in ended[0]["figures"]:
            values = [e["figures"][name] for e in ended if name in e["figures"]]
            lines.append(f"{name} {sum(values) / len(values):,.4g}")
    deployed, trained = outcome.compared
    if trained:
        before, gap = sum(trained) / len(trained), (sum(deployed) - sum(trained)) / len(trained)
        share = f", {1 + gap / before:.1%} of it" if before > 0 else ""
        lines.append(f"training's evaluation of the same seeds: {before:,.2f}; deployment is {gap:+,.2f}{share}")
    if c:
        held = ", ".join(f"{name} {count}" for name, count in c["limits"].items() if count) or "none"
        late = c["lateness"]
        lines.append(f"limits that held back: {held}")
        worst, most = 1e3 * late["worst"], 1e3 * late["p99.9"]
        lines.append(f"ticks {c['ticks']:,}, late by at most {worst:.3g} ms, 99.9 % of them by less than {most:.3g}")
        if fault := c["fault"]:
            lines.append(f"FAULT {fault['kind']}: {fault['detail']}")
            lines.append(f"      {FAULTS[fault['kind']]} (docs/deploy.md)")
            if fault["kind"] == "effort" and (hint := saturation(bundle)) is not None:
                lines.append(f"      {hint}")
    return lines
