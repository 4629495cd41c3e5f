"""The controller against a simulated robot, in virtual time: every run is the same, however busy the machine is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.deploy.actor import Actor
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import RUN, Controller, ControllerConfig, replay
from ctrlrl.deploy.report import saturation
from ctrlrl.deploy.safety import SafetyConfig
from ctrlrl.deploy.simulated_config import INJECTIONS, Impairments, SimulatedConfig
from ctrlrl.deploy.ticks import PHASES, read_ticks
from ctrlrl.deploy.virtual import VirtualDeployment
from ctrlrl.deploy.wire import DRIVE, DRIVEN, HELD, SAFE
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.errors import UsageError
from tests.runs import SMALL

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from ctrlrl.training.export_run import export_run, quiet

RIG, WALKER, ARM = "PendulumSwingUp-v0", "Go1VelocityFlat-v0", "PandaReach-v0"
CALM = SafetyConfig(tilt=0.0, outside=3.0, persist=0.0)  # a policy that has learned nothing falls


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Of policies that have learned next to nothing."""
    folder, out = tmp_path_factory.mktemp("bundles"), {}
    for env in (RIG, WALKER, ARM):
        run = ctrlrl.train(
            "sac", env=env, preset=None, out=str(folder / env), **{**SMALL, "steps": 70, "eval_every": 70}
        )
        out[env] = export_run(run.path, folder / f"{env}-bundle")
    return out


def deployment(
    bundle: Bundle, log: Path | None = None, seconds: float | None = 1.0, safety: SafetyConfig = CALM, **options: Any
) -> VirtualDeployment:
    config = SimulatedConfig(task=bundle.manifest.task, seeds=(10_000,), patience=3.0, **options)
    controller = ControllerConfig(ramp=0.0, settle=0.1, seconds=seconds, safety=safety)
    return VirtualDeployment(bundle, config, controller, runtime="numpy", log=log)


def told(one: VirtualDeployment) -> list[tuple[float, int]]:
    return [(moment, mode) for moment, _, mode, *_ in one.robot.sim.told]


def test_policies_that_learned_with_motors_at_their_limits_say_so(bundles: dict[str, Bundle]) -> None:
    asked = bundles[ARM].asked_efforts()
    joint, share = max(asked.items(), key=lambda pair: pair[1])
    assert list(asked) == list(bundles[ARM].manifest.action.joints)
    goldens = bundles[ARM].goldens()
    place = [j.name for j in bundles[ARM].manifest.joints].index(joint)
    own = bundles[ARM].manifest.joints[place]
    lead = goldens["features/control"][:, list(asked).index(joint)] - goldens["features/position"][:, place]
    effort = own.kp * lead - own.kd * goldens["features/velocity"][:, place]
    assert own.max_effort is not None and share == pytest.approx(np.abs(effort).max() / own.max_effort)
    hint = saturation(bundles[ARM])
    assert share > 1 and hint is not None and joint in hint and f"--safety.effort {np.ceil(10 * share) / 10:g}" in hint
    assert not bundles[RIG].asked_efforts() and saturation(bundles[RIG]) is None  # it commands efforts


@pytest.mark.parametrize(("env", "steps", "tolerance"), [(RIG, 100, 2e-3), (WALKER, 10, 2e-2)])
def test_a_robot_that_is_as_in_training_does_what_it_did_in_training(
    env: str,
    steps: int,
    tolerance: float,
    bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without noise, delays and differences between robots, deployment is training: the same states, step for step.

    The rig's positions come in steps of its encoder; the walker's base is measured now, and not, as MuJoCo's sensors
    are, a step of physics ago.
    """
    task = quiet(make_robot_task(env, {}))
    monkeypatch.setattr("ctrlrl.deploy.simulated.make_robot_task", lambda *_: task)
    free = replace(CALM, slew=1e6, effort_slew=1e6, margin=0.0, effort=1e6)
    one = deployment(bundles[env], tmp_path / "log", seconds=0.02 * steps, safety=free)
    one.run()
    _, ticks = read_ticks(tmp_path / "log")
    acted = ticks[ticks["acted"] == 1][:steps]
    trained = SimVector(task, BatchSim(physics(task), 1, 1))
    seen, actor = trained.reset([10_000]), Actor(bundles[env], "numpy")
    for step, row in enumerate(acted):
        own = seen["policy"] if isinstance(seen, dict) else seen
        positions = trained.world.field("qpos")[0, trained.world.joint_qpos].numpy()
        assert np.abs(row["position"] - positions).max() < tolerance, step
        seen = trained.step(torch.from_numpy(actor.act(own[0].numpy()))[None]).obs
    assert len(acted) == steps
    trained.close()


def test_every_tick_is_logged_and_can_be_computed_again(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    for env in (RIG, WALKER):
        one = deployment(bundles[env], tmp_path / env)
        one.run()
        one.controller.close()
        head, ticks = read_ticks(tmp_path / env)
        assert len(ticks) == one.controller.summary()["ticks"] and head["runtime"] == "numpy"
        again = replay(bundles[env], tmp_path / env)
        assert again.ticks == one.controller.acted >= 40
        # The last bit of a product depends on where its factors lie in memory; the next observation has that action.
        assert max(again.observation, again.action, again.wanted) < 1e-6
        other = replay(bundles[env], tmp_path / env, runtime="onnx")
        assert other.observation < 1e-4 and other.action < 1e-4 and other.wanted < 1e-4
        assert (np.diff(ticks["due"]) > 0).all() and set(ticks["phase"]) <= set(range(len(PHASES)))
    with pytest.raises(UsageError, match="is the log of another bundle"):
        replay(bundles[RIG], tmp_path / WALKER)


def test_an_arm_goes_on_from_what_it_was_told(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Its targets are steps from the last ones, it knows where its tool is, and is told the goal."""
    one = deployment(bundles[ARM], tmp_path / "log", seconds=1.0)
    one.run()
    assert one.controller.fault is None and one.controller.acted == 25
    _, ticks = read_ticks(tmp_path / "log")
    acted = ticks[ticks["acted"] == 1]
    assert np.abs(np.diff(acted["command"], axis=0)).max() < 0.2 and (acted["told"] != 0).any()
    assert (np.abs(acted["command"] - acted["position"][:, :7]) < 0.5).all()
    assert replay(bundles[ARM], tmp_path / "log").wanted < 1e-6


def test_a_log_that_was_not_closed_or_is_none(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    one = deployment(bundles[RIG], tmp_path / "log", seconds=0.2)
    one.run()
    head, ticks = read_ticks(tmp_path / "log")  # as after a crash: the file has room that was not written
    assert len(ticks) == one.controller.summary()["ticks"] > 10
    with pytest.raises(UsageError, match=r"no log of a controller: there is no ticks.json"):
        read_ticks(tmp_path)
    for change in ({"format": "other"}, {"fields": [["a", "|O"]]}, {"fields": "x"}, {"fields": [["a", "<f8", [-1]]]}):
        (tmp_path / "log" / "ticks.json").write_text(json.dumps({**head, **change}))
        with pytest.raises(UsageError, match=r"ticks.json"):
            read_ticks(tmp_path / "log")


@pytest.mark.parametrize("env", [RIG, WALKER])
@pytest.mark.parametrize("inject", [name for name in INJECTIONS if name != "freeze joint"])
def test_after_a_fault_nothing_but_the_safe_action_is_commanded(
    env: str, inject: str, bundles: dict[str, Bundle]
) -> None:
    wanted = {
        "freeze": "frozen",
        "not finite": "not finite",
        "clock ahead": "clock",
        "clock back": "clock",
        "silence": "age",
        "swap": "outside",
        "tilt": "tilt",
    }[inject]
    if env == RIG and inject in ("swap", "tilt"):
        pytest.skip("it has one joint, and a base that stands")
    safety = replace(CALM, tilt=1.2 if inject == "tilt" else 0.0, outside=0.3 if inject == "swap" else 3.0)
    one = deployment(bundles[env], seconds=3.0, safety=safety, inject=inject, inject_at=0.3)
    episodes = one.run()
    fault = one.controller.fault
    assert fault is not None and fault.kind == wanted
    modes = [mode for _, mode in told(one)]
    assert DRIVE in modes and modes[-1] == SAFE
    begun = modes.index(DRIVE)
    stopped = begun + modes[begun:].index(SAFE)
    assert DRIVE not in modes[stopped:] and len(modes) - stopped > 20  # repeated, not sent once
    injected = next(t for t, mode, _ in one.robot.sim.modes if mode == DRIVEN) + 0.3
    assert told(one)[stopped][0] - injected < (0.3 if inject == "freeze" else 0.08)
    assert episodes[0]["given up"] or episodes[0]["length"] < 120  # where the robot fell before


def test_a_robot_that_hears_nothing_makes_itself_safe(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[WALKER], seconds=None)
    tick = one.controller.tick

    def dies(due: float) -> None:
        if one.controller.acted < 20:
            tick(due)

    one.controller.tick = dies  # type: ignore[method-assign]
    one.run()
    modes = one.robot.sim.modes
    held = next(t for t, mode, _ in modes if mode == HELD)
    assert held - told(one)[-1][0] == pytest.approx(0.1, abs=0.006) and modes[-1][1] == HELD
    sim = one.robot.sim
    targets, places = sim.field("ctrl")[0, sim._motors], sim.field("qpos")[0, sim._places]
    assert np.abs(targets.numpy() - places.numpy()).max() < 0.1  # damps: targets are where joints were a step ago


def test_a_robot_that_holds_itself_is_not_driven_on(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG], seconds=None)
    one.driver.drive = lambda *a: None  # type: ignore[method-assign]
    sim = one.robot.sim
    drive = type(one.driver).drive
    sent = []

    def loses(*arguments: Any) -> None:
        sent.append(1)
        if not 10 <= len(sent) < 20:
            drive(one.driver, *arguments)

    one.driver.drive = loses  # type: ignore[method-assign]
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "robot" and len(sent) < 20
    assert [mode for _, mode, _ in sim.modes][-1] == HELD


class Broken:
    """In the place of an actor."""

    def __init__(self, actor: Any, what: Any) -> None:
        self.runtime, self._actor, self._what, self._count = actor.runtime, actor, what, 0

    def reset(self) -> None:
        self._actor.reset()

    def run(self, inputs: Any) -> Any:
        self._count += 1
        action = self._actor.run(inputs)
        return action if self._count < 5 else self._what(action)


def test_actions_that_are_not_finite_are_not_sent(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG])
    one.controller.actor = Broken(one.controller.actor, lambda action: action * np.nan)  # type: ignore[assignment]
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "action" and one.controller.acted == 4


def test_a_mistake_in_the_program_makes_the_robot_safe(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG])

    def fails(action: Any) -> Any:
        raise ZeroDivisionError("oops")

    one.controller.actor = Broken(one.controller.actor, fails)  # type: ignore[assignment]
    one.run()
    fault = one.controller.fault
    assert fault is not None and str(fault) == "program: ZeroDivisionError: oops"
    modes = [mode for _, mode in told(one)]
    assert modes[-1] == SAFE and modes.count(DRIVE) == 4


def test_a_loop_that_is_late_is_a_fault(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG], safety=replace(CALM, max_age=1.0))

    def dawdles(action: Any) -> Any:
        one.clock.moment += 0.035
        return action

    one.controller.actor = Broken(one.controller.actor, dawdles)  # type: ignore[assignment]
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "late"


def test_a_state_that_grew_old_while_the_policy_computed_is_not_acted_on(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG])

    def dawdles(action: Any) -> Any:
        one.clock.moment += 0.06
        return action

    one.controller.actor = Broken(one.controller.actor, dawdles)  # type: ignore[assignment]
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "age"
    assert [mode for _, mode in told(one)].count(DRIVE) == 4


def test_messages_may_be_lost_and_late(bundles: dict[str, Bundle]) -> None:
    one = deployment(
        bundles[RIG], seconds=1.0, impairments=Impairments(latency=0.004, jitter=0.015, loss=0.05), watchdog=0.3
    )
    one.run()
    assert one.controller.fault is None and one.controller.acted >= 45
    assert one.controller.driver.dropped["sequence"] > 0  # overtaken on the way


def test_a_robot_that_never_sends_is_waited_for_so_long(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG])
    one.driver.read = lambda: None  # type: ignore[method-assign]
    one.controller.config = replace(one.controller.config, patience=1.0)
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "no state"
    assert DRIVE not in [mode for _, mode in told(one)]


def test_the_ramp_takes_joints_to_where_the_policy_begins(bundles: dict[str, Bundle]) -> None:
    bundle = bundles[WALKER]
    config = SimulatedConfig(task=WALKER, seeds=(10_000,), watchdog=1.0)
    controller = ControllerConfig(ramp=0.5, settle=0.2, seconds=0.2, arrive=0.2, safety=CALM)
    one = VirtualDeployment(bundle, config, controller, runtime="numpy")
    phases: list[int] = []
    targets: list[Any] = []
    drive = one.driver.drive

    def watch(state: Any, target: Any, *rest: Any) -> None:
        phases.append(one.controller.phase)
        targets.append(np.array(target))
        drive(state, target, *rest)

    one.driver.drive = watch  # type: ignore[method-assign]
    one.run()
    assert one.controller.fault is None and phases.count(RUN) == 11  # the last of the ramp among them
    ramp = np.array([t for t, phase in zip(targets, phases, strict=True) if phase != RUN])
    default = np.array([joint.default for joint in bundle.manifest.joints])
    assert len(ramp) == 34 and np.abs(ramp[-1] - default).max() < 1e-9
    assert np.abs(np.diff(ramp, axis=0)).max() < 0.1  # a step of less than what the limits allow
    one = VirtualDeployment(bundle, config, replace(controller, arrive=0.0), runtime="numpy")
    one.controller.limits.bend[:] = 0.0
    one.run()
    assert one.controller.fault is not None and "does it follow?" in one.controller.fault.detail


def test_what_a_controller_refuses(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[WALKER])
    driver, clock = one.driver, one.clock
    with pytest.raises(UsageError, match=r"--command takes 3 numbers \(forward, m/s; .*\), got \[1.0\]"):
        Controller(bundles[WALKER], driver, ControllerConfig(command=(1.0,)), clock)
    with pytest.raises(UsageError, match="was trained for the robot pendulum, and this is go1"):
        Controller(bundles[RIG], driver, ControllerConfig(), clock)
    with pytest.raises(UsageError, match="--ramp must be from 0 to 3600, got -1"):
        ControllerConfig(ramp=-1.0)


def test_the_command_is_the_operators_unless_one_is_given(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    one = deployment(bundles[WALKER], tmp_path / "log", seconds=0.2)
    one.run()
    _, ticks = read_ticks(tmp_path / "log")
    told = ticks[ticks["acted"] == 1]
    assert len(told) == 10 and (told["told"] == told["measure command"]).all() and np.abs(told["told"]).max() > 0
    config = ControllerConfig(ramp=0.0, settle=0.1, seconds=0.2, command=(0.5, 0.0, -0.25), safety=CALM)
    given = VirtualDeployment(bundles[WALKER], SimulatedConfig(task=WALKER, seeds=(1,)), config, runtime="numpy")
    given.run()
    assert given.controller._builder.command.tolist() == [0.5, 0.0, -0.25]


def test_a_reflex_looks_more_often_and_may_take_over(bundles: dict[str, Bundle]) -> None:
    class Brakes:
        rate = 200.0

        def __init__(self) -> None:
            self.asked = 0

        def reset(self) -> None:
            self.asked = 0

        def __call__(self, reading: Any, command: Any) -> Any:
            self.asked += 1
            return np.zeros(1) if self.asked % 2 else None

    reflex = Brakes()
    config = ControllerConfig(ramp=0.0, settle=0.1, seconds=0.5, safety=CALM)
    one = VirtualDeployment(bundles[RIG], SimulatedConfig(task=RIG, seeds=(1,)), config, runtime="numpy", reflex=reflex)
    one.run()
    assert one.controller.period == 0.005 and reflex.asked == 100
    assert one.controller.acted == 25 and one.controller.taken_over == 50


def test_a_reflex_whose_command_is_no_number_stops_the_robot(bundles: dict[str, Bundle]) -> None:
    class Broken:
        rate = 50.0

        def reset(self) -> None: ...

        def __call__(self, reading: Any, command: Any) -> Any:
            return command * np.nan

    config = ControllerConfig(ramp=0.0, settle=0.1, seconds=0.5, safety=CALM)
    one = VirtualDeployment(
        bundles[RIG], SimulatedConfig(task=RIG, seeds=(1,)), config, runtime="numpy", reflex=Broken()
    )
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "reflex"
    assert DRIVE not in [mode for _, mode in told(one)] and not one.robot.sim.endpoint.dropped  # type: ignore[union-attr]


def test_commands_that_never_arrive_are_a_fault(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG], seconds=3.0)
    one.driver.drive = lambda *a: None  # type: ignore[method-assign]
    one.run()
    assert one.controller.fault is not None and "commands do not arrive" in one.controller.fault.detail
    assert one.controller.acted <= 53


def test_a_robot_that_holds_itself_in_the_ramp_is_not_driven_on(bundles: dict[str, Bundle]) -> None:
    config = SimulatedConfig(task=WALKER, seeds=(10_000,))
    one = VirtualDeployment(
        bundles[WALKER], config, ControllerConfig(ramp=2.0, settle=0.1, safety=CALM), runtime="numpy"
    )
    drive, sent = one.driver.drive, []

    def loses(*arguments: Any) -> None:
        sent.append(1)
        if not 10 <= len(sent) < 20:
            drive(*arguments)

    one.driver.drive = loses  # type: ignore[method-assign]
    one.run()
    assert one.controller.fault is not None and one.controller.fault.kind == "robot" and len(sent) < 20


def test_a_robot_that_is_far_away_in_time_is_refused(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(
        UsageError, match=r"a message to the robot and its answer take 6\d ms, and states may be 40 ms old"
    ):
        deployment(bundles[RIG], impairments=Impairments(latency=0.03), safety=replace(CALM, max_age=None))


def test_the_first_target_is_near_where_joints_are(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[WALKER], seconds=0.1, safety=replace(CALM, slew=0.5, effort=100.0))
    one.run()
    sim = one.robot.sim
    first = next(row for row in sim.told if row[2] == DRIVE)
    begun = next(row for row in sim.sent if row[1] == first[4])
    width = np.array([joint.upper - joint.lower for joint in one.driver.description.driven])  # type: ignore[operator]
    assert (np.abs(first[5] - begun[3]) <= 0.5 * 0.02 * width + 0.03).all()  # and the noise of what was measured


def test_a_log_that_cannot_be_written_does_not_end_the_loop(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    one = deployment(bundles[RIG], tmp_path / "log")
    log = one.controller.log
    assert log is not None
    log.commit = lambda: (_ for _ in ()).throw(OSError(28, "no space left"))  # type: ignore[method-assign]
    one.run()
    fault = one.controller.fault
    assert fault is not None and "the log cannot be written" in fault.detail
    assert [mode for _, mode in told(one)].count(SAFE) > 20
    one.controller.close()


def test_what_ends_the_program_makes_the_robot_safe_first(bundles: dict[str, Bundle]) -> None:
    one = deployment(bundles[RIG])
    sent: list[int] = []
    one.driver.make_safe = lambda state: sent.append(1)  # type: ignore[method-assign]
    one.clock.between = lambda until: None

    def leaves(due: float) -> None:
        raise SystemExit(1)

    one.controller.tick = leaves  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        one.controller.run()
    assert len(sent) == 5


def test_weak_motors_and_slippery_floors() -> None:
    from ctrlrl.deploy.impaired import impaired

    task = impaired(make_robot_task(WALKER, {}), Impairments(strength=0.5, friction=0.5))
    env = SimVector(task, BatchSim(physics(task), 1, 1))
    env.reset(0)
    first = env.sim.model.actuator_forcerange[0, 1]
    assert env.sim.expand("actuator_forcerange")[0, 0, 1] == pytest.approx(0.5 * first)
    floor = env.sim.model.geom("floor").id
    assert env.sim.expand("geom_friction")[0, floor, 0] == pytest.approx(0.5 * env.sim.model.geom_friction[floor, 0])
    env.close()
    with pytest.raises(UsageError, match=r"--sim.friction: nothing of PendulumSwingUp-v0 touches a floor"):
        impaired(make_robot_task(RIG, {}), Impairments(friction=0.5))
    with pytest.raises(UsageError, match=r"--sim.loss must be from 0 to less than 1, got 1"):
        Impairments(loss=1.0)


def test_the_controllers_process_imports_nothing_of_training() -> None:
    program = (
        "import sys; import ctrlrl.deploy.process; "
        "print([m for m in ('torch', 'mujoco', 'gymnasium', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
