"""The driver for LeRobot's robots, against a stand-in that keeps to what LeRobot documents of its `Robot`."""

from __future__ import annotations

import enum
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ctrlrl.deploy.bundle import GOLDENS, NETWORK, WEIGHTS, Bundle
from ctrlrl.deploy.controller import FAULT, RUN, Controller, ControllerConfig
from ctrlrl.deploy.driver import require_fits
from ctrlrl.deploy.lerobot import LeRobotDriver, Scale
from ctrlrl.deploy.manifest import Action, Entry, Joint, Manifest, Network, Term
from ctrlrl.deploy.network import Network as Operations
from ctrlrl.deploy.network import Node, Value
from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.tensors import write_tensors
from ctrlrl.deploy.wire import DRIVEN
from ctrlrl.errors import UsageError
from ctrlrl.robots.robot import get_robot

SO101 = get_robot("so101")
NAMES = [joint.name for joint in SO101.joints]
DT = 0.02
NOTHING = np.zeros(len(NAMES))


class Clock(Time):
    """Goes on by what is waited for, and what the robot takes."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    def wait_until(self, moment: float) -> None:
        self.seconds = max(self.seconds, moment)


# --- the stand-in -----------------------------------------------------------------------------------------------------


class DeviceNotConnectedError(ConnectionError):
    pass


class DeviceAlreadyConnectedError(ConnectionError):
    pass


class NormMode(enum.Enum):
    PERCENT = "range_0_100"
    AROUND = "range_m100_100"
    DEGREES = "degrees"


@dataclass
class Config:
    use_degrees: bool = True
    max_relative_target: float | None = None


@dataclass
class Motor:
    model: str
    norm_mode: NormMode


@dataclass
class Calibration:
    range_min: int
    range_max: int
    drive_mode: int = 0


@dataclass
class Arm:
    """An SO-101 follower with a camera. Its joints are in another order than the description's."""

    config: Config = field(default_factory=Config)
    clock: Clock = field(default_factory=Clock)
    calibrated: bool = True
    takes: float = 0.004
    """s, that a reading takes."""
    plugged: bool = True
    unplugged: tuple[float, float] = (math.inf, math.inf)
    """s of its clock, from and to."""

    def __post_init__(self) -> None:
        body = NormMode.DEGREES if self.config.use_degrees else NormMode.AROUND
        motors = {name: Motor("sts3215", body) for name in reversed(NAMES)}
        motors["gripper"].norm_mode = NormMode.PERCENT
        self.bus: Any = SimpleNamespace(motors=motors, model_resolution_table={"sts3215": 4096})
        self.calibration = {name: Calibration(900, 3200) for name in motors}
        self.calibration["gripper"] = Calibration(1500, 2751)  # 1251 steps of 2 pi / 4095: 1.9195 rad
        self.at = dict.fromkeys(motors, 0.0) | {"gripper": 50.0}
        self.goal = dict(self.at)
        self.answers: Any = None  # instead of what was sent
        self.said: list[dict[str, float]] = []
        self.asked: list[bool] = []
        self.disconnected = 0
        self._connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        return {"front": (48, 64, 3)} | {f"{name}.pos": float for name in self.bus.motors}

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"{name}.pos": float for name in self.bus.motors}

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        self._require()
        return self.calibrated

    def connect(self, calibrate: bool = True) -> None:
        if self._connected:
            raise DeviceAlreadyConnectedError("Arm is already connected.")
        if not self.plugged:
            raise ConnectionError("no such port")
        self._connected = True
        self.asked.append(calibrate)

    def calibrate(self) -> None:
        raise AssertionError("nobody may calibrate it but its user")

    def configure(self) -> None:
        raise AssertionError("connect does that")

    def get_observation(self) -> dict[str, Any]:
        self._require()
        self.clock.seconds += self.takes
        self._require_plugged()
        for name, goal in self.goal.items():
            self.at[name] += 0.5 * (goal - self.at[name])
        return {f"{name}.pos": value for name, value in self.at.items()} | {"front": np.zeros((48, 64, 3), np.uint8)}

    def send_action(self, action: dict[str, Any]) -> Any:
        self._require()
        self.said.append(dict(action))
        self._require_plugged()
        goals = {key.removesuffix(".pos"): value for key, value in action.items()}
        if (most := self.config.max_relative_target) is not None:
            goals = {name: self.at[name] + max(-most, min(most, v - self.at[name])) for name, v in goals.items()}
        self.goal |= goals
        return {f"{name}.pos": value for name, value in goals.items()} if self.answers is None else self.answers

    def disconnect(self) -> None:
        self._require()
        self._connected = False
        self.disconnected += 1

    def _require(self) -> None:
        if not self._connected:
            raise DeviceNotConnectedError("Arm is not connected. Run `.connect()` first.")

    def _require_plugged(self) -> None:
        if not self.plugged or self.unplugged[0] <= self.clock.now() < self.unplugged[1]:
            raise ConnectionError("Failed to sync read 'Present_Position'")


def manifest(**changes: Any) -> Manifest:
    """Of a policy that observes positions and velocities of the SO-101, and drives it by targets around its pose."""
    term = {"joints": tuple(NAMES), "size": len(NAMES)}
    terms = (
        Term(name="positions", measure="joint position", unit="rad", **term),
        Term(name="velocities", measure="joint velocity", unit="rad/s", **term),
    )
    count = len(NAMES)
    action = Action(
        kind="joint position offset",
        shape=(count,),
        joints=tuple(NAMES),
        unit="rad",
        low=(-1.0,) * count,
        high=(1.0,) * count,
        scale=(0.2,) * count,
        offset=tuple(joint.default for joint in SO101.joints),
    )
    joints = tuple(
        Joint(
            name=joint.name,
            unit=joint.unit,
            lower=joint.lower,
            upper=joint.upper,
            default=joint.default,
            kp=joint.kp,
            kd=joint.kd,
            max_effort=joint.max_effort,
        )
        for joint in SO101.joints
    )
    made = Manifest(
        name="reach",
        robot="so101",
        task="test",
        control_dt=DT,
        observation=(Entry(name="policy", shape=(2 * count,), terms=terms),),
        action=action,
        joints=joints,
        network=Network(opset=20, runtimes=("numpy",)),
    )
    return replace(made, **changes)


def driver_of(arm: Arm, scales: dict[str, Scale] | None = None, **changes: Any) -> LeRobotDriver:
    return LeRobotDriver(lambda: (arm, scales) if scales else arm, manifest(**changes), arm.clock)


def connected(arm: Arm, scales: dict[str, Scale] | None = None) -> LeRobotDriver:
    driver = driver_of(arm, scales)
    driver.connect(1.0)
    return driver


def refusal(arm: Arm, scales: dict[str, Scale] | None = None, **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        driver_of(arm, scales, **changes).connect(1.0)
    return str(caught.value)


# --- names and units --------------------------------------------------------------------------------------------------


def test_joints_are_found_by_name_with_what_the_robot_s_description_says() -> None:
    arm = Arm()
    driver = connected(arm)
    require_fits(manifest(), driver.description, operated=False)
    assert driver.description.name == "so101" and driver.description.rate == 50
    assert [(j.name, j.lower, j.max_effort) for j in driver.description.joints] == [
        (j.name, j.lower, j.max_effort) for j in SO101.joints
    ]
    assert arm.asked == [False]  # it was not to calibrate

    arm.at |= {"shoulder_pan": 90.0, "shoulder_lift": -30.0, "wrist_roll": 45.0, "gripper": 25.0}
    arm.goal |= arm.at
    state = driver.read()
    assert state is not None and state.mode == DRIVEN and state.episode == 1 and state.sequence == 1
    quarter = -0.17453 + 0.25 * (1.74533 + 0.17453)
    np.testing.assert_allclose(state.position, [math.pi / 2, -math.pi / 6, 0, 0, math.pi / 4, quarter], atol=1e-12)

    driver.drive(state, np.array([0.0, 0.1, 0.0, -math.pi / 3, 0.0, 1.74533]), NOTHING, NOTHING)
    wanted = {"shoulder_pan": 0, "shoulder_lift": 18 / math.pi, "wrist_flex": -60.0, "gripper": 100.0}
    for name in NAMES:
        assert arm.said[-1][f"{name}.pos"] == pytest.approx(wanted.get(name, 0.0), abs=1e-9), name
    assert arm.said[-1].keys() == arm.action_features.keys() and not driver.dropped


def test_a_state_is_stamped_before_it_is_read() -> None:
    arm = Arm(takes=0.015)
    driver, before = connected(arm), arm.clock.now()
    state = driver.read()
    assert state is not None and state.time == before and arm.clock.now() == before + 0.015


def test_what_lacks_a_joint_is_refused_with_both_lists() -> None:
    arm = Arm()
    arm.bus.motors["elbow"] = arm.bus.motors.pop("elbow_flex")
    text = refusal(arm)
    assert "the policy needs elbow_flex" in text
    assert "The policy's: shoulder_pan.pos, shoulder_lift.pos, elbow_flex.pos" in text
    assert "observation_features front, gripper.pos" in text and "elbow.pos" in text
    assert not arm.asked  # nothing was switched on


def test_a_picture_is_no_joint_and_what_nobody_commands_is_refused() -> None:
    class Pictured(Arm):
        observation_features = property(lambda self: Arm.observation_features.fget(self) | {"gripper.pos": (2, 2, 3)})

    class Rolling(Arm):
        action_features = property(lambda self: Arm.action_features.fget(self) | {"x.vel": float})

    assert "the policy needs gripper" in refusal(Pictured())
    assert "takes x.vel, which the policy does not command" in refusal(Rolling())


def test_other_policies_are_refused() -> None:
    box = Action(kind="box", shape=(1,))
    assert "LeRobot's robots take positions" in refusal(Arm(), action=box)
    effort = replace(manifest().action, kind="joint effort")
    assert "commands joint effort" in refusal(Arm(), action=effort)
    assert "does not say for which robot" in refusal(Arm(), robot=None)
    assert "no robot 'so102'" in refusal(Arm(), robot="so102")
    assert "has no motor shoulder_pan" in refusal(Arm(), robot="panda")


def test_units_that_would_be_guessed_are_refused() -> None:
    assert "shoulder_pan is told as -100 to 100" in refusal(Arm(Config(use_degrees=False)))
    assert "use_degrees=True" in refusal(Arm(Config(use_degrees=False)))

    arm = Arm(Config(use_degrees=False))  # a robot that shows no motors
    arm.bus = SimpleNamespace(motors=arm.bus.motors)
    for motor in arm.bus.motors.values():
        motor.norm_mode = None
    assert "shoulder_pan is told as -100 to 100" in refusal(arm)
    arm.config.use_degrees = True
    assert "gripper is told as 0 to 100 of its travel, which is not known here" in refusal(arm)
    arm.config = None  # type: ignore[assignment]
    assert "in which unit shoulder_pan is told" in refusal(arm)

    arm = Arm()
    arm.bus.motors["wrist_roll"].norm_mode = "turns"
    assert "says turns, which is unknown for rad" in refusal(arm)


def test_a_gripper_that_was_calibrated_through_another_travel_is_refused_with_the_numbers() -> None:
    arm = Arm()
    arm.calibration["gripper"] = Calibration(1899, 3363)  # of a real arm: 1464 steps, 2.246 rad
    text = refusal(arm)
    assert "was 2.246 rad" in text and "1.92 rad, from -0.1745 to 1.745" in text
    assert "ours=(-0.1745, 2.072)" in text and '{"gripper": Scale(' in text

    driver = connected(arm, {"gripper": Scale(theirs=(0, 100), ours=(-0.1745, 2.072))})
    state = driver.read()
    assert state is not None and state.position[-1] == pytest.approx((-0.1745 + 2.072) / 2)


def test_scales_say_what_lerobot_does_not() -> None:
    arm = Arm(Config(use_degrees=False))
    scales = {name: Scale(theirs=(-100, 100), ours=(2.0, -2.0)) for name in NAMES if name != "gripper"}
    driver = connected(arm, scales)  # turned round
    arm.at["elbow_flex"] = arm.goal["elbow_flex"] = 50.0
    state = driver.read()
    assert state is not None and state.position[2] == pytest.approx(-1.0)
    driver.drive(state, np.full(6, 0.5), NOTHING, NOTHING)
    assert arm.said[-1]["elbow_flex.pos"] == pytest.approx(-25.0)

    assert "Did you mean gripper?" in refusal(Arm(), {"griper": Scale(theirs=(0, 1), ours=(0, 1))})
    for pair in ((1.0, 1.0), (0.0, math.nan), (1.0,)):
        with pytest.raises(UsageError, match=r"Scale\.theirs must be two different finite numbers"):
            Scale(theirs=pair, ours=(0, 1))  # type: ignore[arg-type]


# --- connecting -------------------------------------------------------------------------------------------------------


def test_a_robot_that_is_not_calibrated_is_refused_and_not_calibrated() -> None:
    arm = Arm(calibrated=False)
    driver = driver_of(arm)
    with pytest.raises(UsageError, match=r"is not calibrated.*run lerobot-calibrate"):
        driver.connect(1.0)
    assert arm.asked == [False] and not arm.said
    driver.close()
    assert arm.disconnected == 1


def test_a_robot_that_cannot_be_reached_or_read_is_refused() -> None:
    assert "cannot connect" in refusal(Arm(plugged=False)) and "no such port" in refusal(Arm(plugged=False))

    arm = Arm(unplugged=(0.0, math.inf))
    assert "cannot be read within 1 s: ConnectionError" in refusal(arm)
    assert arm.clock.now() < 101.0

    driver = connected(Arm(unplugged=(0.0, 100.5)))  # which comes, within its time
    assert driver.read() is not None and not driver.dropped

    arm = Arm()
    arm.at["elbow_flex"] = math.nan
    assert "measures what is no number" in refusal(arm)


def test_a_robot_that_is_connected_already_is_taken_as_it_is() -> None:
    arm = Arm()
    arm.connect()
    connected(arm)
    assert arm.asked == [True]


def test_closing_disconnects_once_and_never_raises() -> None:
    arm = Arm()
    driver = connected(arm)
    driver.close()
    driver.close()
    assert arm.disconnected == 1
    assert driver.read() is None and driver.dropped == {"reading failed: DeviceNotConnectedError": 1}
    driver_of(arm).close()  # which never was

    def raises() -> None:
        raise ConnectionError("gone")

    arm = Arm()
    driver = connected(arm)
    arm.disconnect = raises  # type: ignore[method-assign]
    driver.close()


MODULE = """
from tests.test_lerobot_driver import Arm
from ctrlrl.deploy.lerobot import Scale
NUMBER = 5
class Half:
    observation_features = action_features = {}
    is_connected = True
    def connect(self): pass
def make_arm(): return Arm()
def make_both(): return Arm(), {"gripper": Scale(theirs=(0, 100), ours=(0, 1))}
def make_half(): return Half()
def make_nothing(): return None
def make_wrong(): return Arm(), {"gripper": 2}
def make_broken(): raise OSError("no port")
def make_of(port): return Arm()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "arm_of_mine.py").write_text(MODULE)
    (tmp_path / "arm_without.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "arm_written_wrong.py").write_text("def make(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "arm_of_mine"
    for name in ("arm_of_mine", "arm_without", "arm_written_wrong"):
        sys.modules.pop(name, None)


def test_a_function_is_found_by_its_module_and_name(module: str) -> None:
    for name in ("make_arm", "make_both"):
        driver = LeRobotDriver(f"{module}:{name}", manifest())
        assert [joint.name for joint in driver.connect(1.0).joints] == NAMES
        state = driver.read()
        assert state is not None
        assert state.position[-1] == pytest.approx(0.5 if name == "make_both" else 0.7854)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("arm_of_mine", "MODULE:FUNCTION"),
        ("arm_of_mine:", "MODULE:FUNCTION"),
        ("./arm.py:make", "MODULE:FUNCTION"),
        ("arm_of_yours:make", "there is no module 'arm_of_yours'"),
        ("arm_of_mine:make_arms", "has no function 'make_arms'. Did you mean make_arm"),
        ("arm_of_mine:NUMBER", "has no function 'NUMBER'"),
        ("arm_without:make", "cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("arm_written_wrong:make", "cannot be imported: SyntaxError"),
        ("arm_of_mine:make_broken", "failed to make a robot: OSError: no port"),
        ("arm_of_mine:make_of", "failed to make a robot: TypeError"),
        ("arm_of_mine:make_half", "a Half, which lacks is_calibrated, get_observation(), send_action(), disconnect()"),
        ("arm_of_mine:make_nothing", "a NoneType, which lacks observation_features"),
        ("arm_of_mine:make_wrong", "mapping of joint names to ctrlrl.deploy.lerobot.Scale"),
    ],
)
def test_what_makes_no_robot_is_refused(module: str, address: str, text: str) -> None:
    driver = LeRobotDriver(address, manifest())
    with pytest.raises(UsageError) as caught:
        driver.connect(1.0)
    assert text in str(caught.value)
    driver.close()


# --- driving ----------------------------------------------------------------------------------------------------------


def test_velocities_are_differences_of_what_was_read() -> None:
    arm = Arm()
    driver = connected(arm)
    first = driver.read()
    assert first is not None and (first.velocity == 0).all()
    arm.clock.seconds = first.time + 0.02
    arm.at["elbow_flex"] = arm.goal["elbow_flex"] = 9.0
    second = driver.read()
    assert second is not None and second.sequence == 2
    np.testing.assert_allclose(second.velocity, [0, 0, math.radians(9) / 0.02, 0, 0, 0], atol=1e-9)

    arm.plugged = False  # a reading that failed: the next one is of twice the time
    arm.clock.seconds = second.time + 0.02
    assert driver.read() is None
    arm.plugged, arm.clock.seconds = True, second.time + 0.04
    arm.at["elbow_flex"] = arm.goal["elbow_flex"] = 10.0
    third = driver.read()
    assert third is not None and third.velocity[2] == pytest.approx(math.radians(1) / 0.04)
    assert driver.dropped == {"reading failed: ConnectionError": 1}


def test_the_safe_action_holds_where_joints_were_when_driving_ended() -> None:
    arm = Arm()
    driver = connected(arm)
    driver.make_safe(None)
    assert not arm.said  # nothing was measured: servos keep what they have

    state = driver.read()
    assert state is not None
    driver.drive(state, np.full(6, 0.5), NOTHING, NOTHING)
    state = driver.read()  # half way there
    assert state is not None and state.position[0] == pytest.approx(0.25)
    for _ in range(3):
        driver.make_safe(state)
        assert arm.said[-1]["shoulder_pan.pos"] == pytest.approx(math.degrees(0.25))
        arm.at["shoulder_pan"] -= 5.0  # it sags, or somebody pushes
        state = driver.read()

    assert state is not None
    driver.drive(state, np.zeros(6), NOTHING, NOTHING)
    state = driver.read()
    driver.make_safe(state)
    assert state is not None and arm.said[-1]["shoulder_pan.pos"] == pytest.approx(math.degrees(state.position[0]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 400.0])
def test_what_cannot_be_is_not_gone_to(wrong: float) -> None:
    arm = Arm()
    driver = connected(arm)
    arm.at["elbow_flex"] = arm.goal["elbow_flex"] = 20.0
    state = driver.read()
    assert state is not None
    driver.drive(state, state.position, NOTHING, NOTHING)
    arm.at["elbow_flex"] = wrong
    state = driver.read()
    assert state is not None and not abs(state.position[2]) < 3  # the controller sees it
    driver.make_safe(state)
    assert arm.said[-1]["elbow_flex.pos"] == pytest.approx(20.0)


def test_a_joint_that_rests_outside_its_limits_is_held_there_and_the_others_where_they_are() -> None:
    arm = Arm()
    arm.at["shoulder_lift"] = arm.goal["shoulder_lift"] = -110.0  # limits are 100 degrees
    driver = connected(arm)
    for pan in (0.0, 30.0):
        arm.at["shoulder_pan"] = arm.goal["shoulder_pan"] = pan
        state = driver.read()
    driver.make_safe(state)
    assert arm.said[-1]["shoulder_lift.pos"] == pytest.approx(-110.0)
    assert arm.said[-1]["shoulder_pan.pos"] == pytest.approx(30.0)


def test_nothing_is_held_at_what_was_never_a_number() -> None:
    arm = Arm()
    driver = connected(arm)
    arm.at["elbow_flex"] = math.nan
    driver.make_safe(driver.read())
    assert not arm.said


def test_what_the_robot_holds_back_is_counted() -> None:
    arm = Arm(Config(max_relative_target=5.0))
    driver = connected(arm)
    state = driver.read()
    assert state is not None
    near, far = state.position + math.radians(4), state.position + math.radians(6)
    near[-1] = far[-1] = state.position[-1]
    driver.drive(state, near, NOTHING, NOTHING)
    assert not driver.dropped
    driver.drive(state, far, NOTHING, NOTHING)
    driver.drive(state, far, NOTHING, NOTHING)
    assert driver.dropped == {"target held back by the robot": 2}
    driver.drive(state, np.full(6, math.nan), NOTHING, NOTHING)
    assert driver.dropped["target that is not finite"] == 1 and len(arm.said) == 3
    arm.answers = {"shoulder_pan.pos": 0.0}
    driver.drive(state, near, NOTHING, NOTHING)
    assert driver.dropped["sent, but it does not say what: KeyError"] == 1


@pytest.mark.parametrize("kind", [ConnectionError, DeviceNotConnectedError, RuntimeError, OSError, KeyError, Exception])
def test_exceptions_of_the_robot_do_not_escape(kind: type[Exception]) -> None:
    arm = Arm()
    driver = connected(arm)
    state = driver.read()
    assert state is not None

    def raises(*_: Any) -> None:
        raise kind("bus")

    arm.get_observation = arm.send_action = arm.disconnect = raises  # type: ignore[method-assign, assignment]
    assert driver.read() is None
    driver.drive(state, state.position, NOTHING, NOTHING)
    driver.make_safe(state)
    driver.make_safe(None)
    driver.close()
    name = kind.__name__
    assert driver.dropped == {f"reading failed: {name}": 1, f"sending failed: {name}": 3}


@pytest.mark.parametrize("seen", [None, {}, {"shoulder_pan.pos": 1.0}, dict.fromkeys([f"{n}.pos" for n in NAMES], "x")])
def test_readings_that_are_none_are_counted(seen: Any) -> None:
    arm = Arm()
    driver = connected(arm)
    arm.get_observation = lambda: seen  # type: ignore[method-assign]
    assert driver.read() is None and sum(driver.dropped.values()) == 1


# --- with the controller ----------------------------------------------------------------------------------------------


def bundle() -> Bundle:
    """A policy that pulls joints back to zero: action = tanh(-positions / 2), run by NumPy."""
    count = len(NAMES)
    weights = {"w": np.hstack([-0.5 * np.eye(count), np.zeros((count, count))]).astype(np.float32)}
    nodes = [Node("Gemm", ("policy", "w"), "h", {}), Node("Tanh", ("h",), "a", {})]
    network = Operations({"policy": Value((1, 2 * count), "float32")}, {"action": "a"}, nodes, weights)
    seen = np.linspace(-1, 1, 2 * count, dtype=np.float32)[None]
    goldens = {
        "network/input/policy": seen,
        "network/output/action": np.tanh(seen @ weights["w"].T),
        "features/position": np.zeros((1, count)),
    }
    contents = {
        NETWORK: json.dumps(network.to_json()).encode(),
        WEIGHTS: write_tensors(weights),
        GOLDENS: write_tensors(goldens),
    }
    m = manifest()
    return Bundle(Path("reach"), m, m.to_json(), contents)


CONFIG = ControllerConfig(settle=0.1, ramp=1.0, seconds=1.0, hold=0.5, linger=0.1)


def controlled(arm: Arm, log: Path | None = None) -> tuple[Controller, LeRobotDriver]:
    driver = connected(arm)
    return Controller(bundle(), driver, CONFIG, arm.clock, log=log), driver


def test_a_policy_drives_the_arm_to_the_end(tmp_path: Path) -> None:
    arm = Arm()
    controller, driver = controlled(arm, tmp_path / "log")
    controller.run()
    controller.close()
    summary = controller.summary()
    assert summary["fault"] is None and summary["phase"] == "stop"
    assert summary["acted"] == 50 and summary["episodes"] == 1 and summary["dropped"] == {}
    assert arm.disconnected == 1
    # What it came to: target = default + 0.2 tanh(-q / 2), with q nearly the target itself.
    for joint in SO101.joints:
        if joint.name != "gripper":
            q = math.radians(arm.at[joint.name])
            assert q == pytest.approx(joint.default - 0.2 * math.tanh(q / 2), abs=0.01), joint.name
    held = arm.said[-1]
    assert [said == held for said in arm.said[-5:]] == [True] * 5
    assert driver.description.joints[0].name == "shoulder_pan"


def test_an_arm_that_is_unplugged_stops_the_policy_and_is_held() -> None:
    arm = Arm()
    controller, driver = controlled(arm)
    arm.unplugged = (arm.clock.now() + 1.6, arm.clock.now() + 1.9)  # it comes back, and nothing goes on
    before: list[tuple[int, dict[str, float]]] = []

    def stopped() -> bool:
        if controller.phase == RUN:
            before.append((len(arm.said), dict(arm.at)))
        return False

    controller.run(stopped)
    controller.close()
    summary = controller.summary()
    assert summary["fault"]["kind"] == "age" and controller.phase == FAULT
    assert 15 < summary["acted"] < 25
    assert driver.dropped["reading failed: ConnectionError"] == 15
    failed = driver.dropped["sending failed: ConnectionError"]
    assert 10 <= failed <= 15

    count, last = before[-1]  # of the tick in which it failed, and where it was seen last
    holding = arm.said[count:]
    assert len(holding) > 20 and all(said == holding[0] for said in holding)
    for name in NAMES:
        assert holding[0][f"{name}.pos"] == pytest.approx(last[name]) == pytest.approx(arm.goal[name])
    assert arm.said[count - 1] != holding[0]


def test_readings_that_take_longer_than_a_tick_are_a_fault() -> None:
    arm = Arm(takes=0.03)
    controller, _ = controlled(arm)
    controller.run()
    assert controller.fault is not None and controller.fault.kind == "late"
    assert len(arm.said) > 10 and all(said == arm.said[-1] for said in arm.said[-10:])
