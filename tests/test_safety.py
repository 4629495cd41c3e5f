"""What stands between a policy and a robot, piece by piece."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ctrlrl.deploy.driver import require_fits
from ctrlrl.deploy.manifest import Action, Entry, Joint, Manifest, Network, Term
from ctrlrl.deploy.safety import FAULTS, Checks, Clock, Fault, Lateness, Limits, SafetyConfig
from ctrlrl.deploy.wire import DRIVEN, IDLE, RobotDescription, RobotJoint, State
from ctrlrl.errors import UsageError

JOINTS = (
    Joint(name="a", unit="rad", lower=-1.0, upper=1.0, default=0.0, kp=20.0, kd=0.5, max_effort=5.0, max_speed=10.0),
    Joint(name="b", unit="rad", lower=-2.0, upper=2.0, default=0.5, kp=30.0, kd=0.6, max_effort=7.0),
)
ARM = Manifest(
    name="arm",
    robot="two",
    task="test",
    control_dt=0.02,
    observation=(
        Entry(
            name="observation",
            shape=(5,),
            terms=(
                Term(name="q", size=2, measure="joint position", unit="rad", frame="joint", joints=("a", "b")),
                Term(name="w", size=3, measure="base up", unit="", frame="base"),
            ),
        ),
    ),
    action=Action(
        kind="joint position offset",
        shape=(2,),
        joints=("a", "b"),
        unit="rad",
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        scale=(0.5, 0.5),
        offset=(0.0, 0.5),
    ),
    joints=JOINTS,
    network=Network(opset=20, runtimes=("onnx",)),
)
RIG = replace(
    ARM,
    name="rig",
    action=replace(ARM.action, kind="joint effort", scale=(5.0, 7.0), offset=(0.0, 0.0), unit="N m"),
    joints=tuple(replace(joint, kp=0.0, kd=0.0) for joint in JOINTS),
)
ROBOT = RobotDescription(
    name="two",
    control="position",
    joints=(
        RobotJoint(name="b", lower=-2.0, upper=2.0, max_effort=7.0),
        RobotJoint(name="a", lower=-1.0, upper=1.0, max_effort=5.0),
    ),
    measures={"orientation": 4, "angular velocity": 3},
    rate=200.0,
    watchdog=0.1,
)
UP = np.array([1.0, 0.0, 0.0, 0.0])


def state(
    time: float,
    position: tuple[float, float] = (0.0, 0.0),
    velocity: tuple[float, float] = (0.0, 0.0),
    orientation: np.ndarray = UP,
    turning: tuple[float, float, float] = (0.0, 0.0, 0.0),
    mode: int = DRIVEN,
) -> State:
    if orientation is UP:  # no unit's noise is ever the same
        orientation, turning = np.array([1.0, 1e-4 * math.sin(time), 0, 0]), (1e-3 * math.cos(time), *turning[1:])
    others = {"orientation": orientation, "angular velocity": np.array(turning)}
    return State(round(1000 * time), time, mode, 1, np.array(position), np.array(velocity), others)


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_age_does_not_depend_on_where_clocks_begin() -> None:
    clock = Clock(0.04)
    assert clock.age(5.0) == math.inf
    clock.take(1000.0, 5.002)
    clock.take(1000.01, 5.0101)  # the quickest: 0.1 ms, of which nobody knows
    assert clock.age(5.0101) == pytest.approx(0.0, abs=1e-9)
    clock.take(1000.02, 5.035)  # 15 ms late
    assert clock.age(5.035) == pytest.approx(0.0149, abs=1e-4)
    assert clock.age(5.085) == pytest.approx(0.0649, abs=1e-4)


def test_a_delay_that_is_always_there_counts_too() -> None:
    clock = Clock(0.04, unseen=0.02)
    clock.take(1000.0, 5.0)
    assert clock.age(5.0) == pytest.approx(0.02) and clock.age(5.03) == pytest.approx(0.05)


def test_a_clock_may_go_a_little_slower_but_not_jump() -> None:
    clock = Clock(0.04)
    for i in range(100_000):  # 500 s, 100 millionths slower
        clock.take(7.0 + 0.005 * i * (1 - 1e-4), 0.005 * i)
    assert clock.age(0.005 * 99_999) < 1e-3
    with pytest.raises(Fault, match=r"clock: the robot's clock jumped ahead by"):
        clock.take(7.0 + 510, 500.01)


def test_a_clock_that_goes_back_is_a_fault() -> None:
    clock = Clock(0.04)
    clock.take(7.0, 1.0)
    with pytest.raises(Fault, match=r"clock: the robot's clock went back by 0.5"):
        clock.take(6.5, 1.01)
    clock = Clock(0.04)
    clock.take(7.0, 1.0)
    with pytest.raises(Fault, match="clock"):
        clock.take(7.0, 1.01)  # it stands still


# --- measurements -----------------------------------------------------------------------------------------------------


def checks(**changes: float) -> Checks:
    return Checks(ARM, ROBOT, SafetyConfig(**changes))


@pytest.mark.parametrize(
    "spoilt",
    [
        state(0.0, position=(math.nan, 0)),
        state(0.0, velocity=(0, math.inf)),
        state(0.0, turning=(0, -math.inf, 0), orientation=np.array([1.0, 0, 0, 0])),
        state(0.0, orientation=np.array([math.nan, 0, 0, 0])),
    ],
)
def test_what_is_not_finite_is_a_fault(spoilt: State) -> None:
    with pytest.raises(Fault) as fault:
        checks().take(spoilt)
    assert fault.value.kind == "not finite"


def test_joints_far_outside_or_too_fast_are_not_believed() -> None:
    one = checks()
    one.take(state(0.0, position=(2.05, 1.05)))
    with pytest.raises(Fault, match=r"outside: a is said to be at 1.2"):
        one.take(state(0.1, position=(0.0, 1.2)))
    with pytest.raises(Fault, match=r"outside: a is said to be at 0, moving 30"):
        one.take(state(0.2, velocity=(0.0, 30.0)))
    one.take(state(0.3, velocity=(30.0, 0.0)))  # nobody says how fast b can be
    with pytest.raises(Fault, match="outside: an orientation must be a quaternion"):
        one.take(state(0.4, orientation=np.array([0.1, 0, 0, 0])))


def test_a_base_that_lies_is_a_fault() -> None:
    def leaning(angle: float) -> State:
        return state(0.0, orientation=np.array([math.cos(angle / 2), math.sin(angle / 2), 0, 0]))

    checks().take(leaning(1.1))
    with pytest.raises(Fault, match=r"tilt: 1.30 rad, allowed are 1.2"):
        checks().take(leaning(1.3))
    checks(tilt=0.0).take(leaning(3.1))


def test_a_sensor_that_does_not_change_though_the_joint_moves_is_frozen() -> None:
    one = checks(freeze=0.1)
    for i in range(15):
        one.take(state(0.01 * i, position=(0.01 * i, 0.3), velocity=(1.0, 0.0)))  # a rests, and may
    one = checks(freeze=0.1)
    with pytest.raises(Fault, match=r"frozen: a is at 0.3 for 0.1"):
        for i in range(15):
            one.take(state(0.01 * i, position=(0.01 * i, 0.3), velocity=(1.0, 0.2)))


def test_a_sensor_that_does_not_change_though_the_joint_was_told_to_is_frozen() -> None:
    one = checks(freeze=0.1)
    for i in range(30):  # told to stay where it is
        one.take(state(0.01 * i, position=(0.01 * i, 0.3)))
        one.told(np.array([0.3, 0.01 * i]))
    with pytest.raises(Fault, match="frozen: a"):
        for i in range(30, 60):
            one.take(state(0.01 * i, position=(0.01 * i, 0.3)))
            one.told(np.array([0.3 + 0.01 * (i - 30), 0.0]))


def test_an_inertial_unit_that_does_not_change_though_joints_move_is_frozen() -> None:
    one = checks(freeze=0.1)
    with pytest.raises(Fault, match="frozen: angular velocity"):
        for i in range(30):
            turn = np.array([1.0, 1e-3 * i, 0, 0])
            one.take(state(0.01 * i, position=(0.01 * i, 0.0), orientation=turn, turning=(0.1, 0, 0)))


def test_a_robot_that_nobody_drives_may_stand_still() -> None:
    one = checks(freeze=0.1)
    for i in range(60):
        one.take(state(0.01 * i, velocity=(0.5, 0.5), mode=IDLE))
    never = checks(freeze=0.0)
    for i in range(60):
        never.take(state(0.01 * i, velocity=(0.5, 0.5)))


# --- commands ---------------------------------------------------------------------------------------------------------


def limits(manifest: Manifest = ARM, **changes: float) -> Limits:
    return Limits(manifest, SafetyConfig(**changes), 0.02, 0.02)


REST = np.zeros(2)


def test_targets_change_at_most_so_fast() -> None:
    one = limits(slew=1.0, effort=100.0)
    one.reset(np.zeros(2))
    assert one(np.array([0.5, 0.01]), REST, REST) == pytest.approx([0.04, 0.01])  # ranges are 2 and 4 rad
    assert one(np.array([0.5, 0.01]), REST, REST) == pytest.approx([0.08, 0.01])
    assert one.counts == {"clip": 0, "slew": 2, "position": 0, "effort": 0}
    free = limits(slew=1.0, effort=100.0)
    assert free(np.array([0.5, 0.01]), REST, REST) == pytest.approx([0.5, 0.01])  # there was none before


def test_targets_stay_away_from_limits() -> None:
    one = limits(margin=0.05, effort=100.0)
    assert one(np.array([3.0, -3.0]), REST, REST) == pytest.approx([0.9, -1.8])
    assert one.counts["position"] == 2


def test_targets_ask_for_no_more_than_the_motor_gives() -> None:
    one = limits(margin=0.0)
    position, velocity = np.array([0.0, 0.0]), np.array([2.0, -2.0])
    command = one(np.array([1.0, -1.0]), position, velocity)
    torque = np.array([20.0, 30.0]) * (command - position) - np.array([0.5, 0.6]) * velocity
    assert torque == pytest.approx([5.0, -7.0]) and one.counts["effort"] == 2
    assert limits(margin=0.0)(np.array([0.2, 0.1]), position, velocity) == pytest.approx([0.2, 0.1])
    # A joint that is thrown out of its range: the limits decide, not the motor.
    assert limits(margin=0.0)(np.array([1.0, 1.0]), np.array([3.0, 0.0]), REST)[0] == 1.0


def test_efforts_are_within_the_motors_and_do_not_push_further_out() -> None:
    one = limits(RIG, margin=0.05, effort=0.8)
    assert one(np.array([9.0, -9.0]), REST, REST) == pytest.approx([4.0, -5.6])
    assert one.counts["effort"] == 2 and one.counts["position"] == 0
    at = np.array([0.95, -1.9])
    assert limits(RIG, margin=0.05)(np.array([3.0, -3.0]), at, REST) == pytest.approx([0.0, 0.0])
    assert limits(RIG, margin=0.05)(np.array([-3.0, 3.0]), at, REST) == pytest.approx([-3.0, 3.0])


def test_a_limit_that_holds_back_for_long_is_a_fault() -> None:
    one = limits(persist=0.5, effort=100.0)
    for _ in range(24):
        one(np.array([3.0, 0.0]), REST, REST)
    one(np.array([0.0, 0.0]), REST, REST)  # a break
    for _ in range(24):
        one(np.array([3.0, 0.0]), REST, REST)
    with pytest.raises(Fault, match=r"position: a is held back for 0.5"):
        one(np.array([3.0, 0.0]), REST, REST)
        one(np.array([3.0, 0.0]), REST, REST)
    never = limits(persist=0.0, effort=100.0)
    for _ in range(1000):
        never(np.array([3.0, 0.0]), REST, REST)
    assert never.counts["position"] == 1000


def test_actions_beyond_their_bounds_are_counted() -> None:
    one = limits()
    for _ in range(1000):
        one.clips(np.array([1.5, 1.0], np.float32))
    assert one.counts["clip"] == 1000
    strict = limits(clip_persist=0.1)
    with pytest.raises(Fault, match="clip: a is held back"):
        for _ in range(10):
            strict.clips(np.array([1.5, 1.0], np.float32))


# --- time -------------------------------------------------------------------------------------------------------------


def test_late_ticks_are_counted_and_too_many_are_a_fault() -> None:
    one = Lateness(0.02, SafetyConfig(late=3))
    for _ in range(100):
        one.take(30e-6)
    for _ in range(3):
        one.take(0.011)
    assert one.late == 3 and one.worst == 0.011 and one.counts[5] == 100
    assert one.percentile(0.5) == 32e-6 and one.percentile(1.0) == pytest.approx(0.016384)
    with pytest.raises(Fault, match=r"late: 4 of the last 50 ticks, this one by 12.00 ms"):
        one.take(0.012)


def test_ticks_that_were_missed_count_as_late() -> None:
    one = Lateness(0.02, SafetyConfig(late=3))
    with pytest.raises(Fault, match="late"):
        one.take(0.0, missed=4)
    few = Lateness(0.02, SafetyConfig(late=3))
    for _ in range(10):
        few.take(0.0, missed=3)
        for _ in range(50):
            few.take(0.0)
    assert few.late == 30
    assert few.worst == pytest.approx(0.06) and few.counts[16] == 30  # the work of one tick took the place of three


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"max_age": 0.0}, "--safety.max-age must be above 0, got 0"),
        ({"slew": -1.0}, "--safety.slew must be above 0"),
        ({"effort_slew": math.nan}, "--safety.effort-slew"),
        ({"margin": 0.5}, "--safety.margin must be from 0 to less than 0.5"),
        ({"persist": math.inf}, "--safety.persist"),
        ({"late": -1}, "--safety.late"),
    ],
)
def test_limits_that_are_none(changes: dict[str, float], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        SafetyConfig(**changes)  # type: ignore[arg-type]


def test_every_fault_has_a_meaning() -> None:
    assert all(FAULTS.values()) and str(Fault("age", "50 ms")) == "age: 50 ms"
    with pytest.raises(AssertionError):
        Fault("unheard of", "")


# --- whether a policy is for a robot ----------------------------------------------------------------------------------


def with_joint(place: int, **changes: object) -> RobotDescription:
    joints = list(ROBOT.joints)
    joints[place] = replace(joints[place], **changes)  # type: ignore[arg-type]
    return replace(ROBOT, joints=tuple(joints))


def test_the_order_of_joints_does_not_matter_and_names_do() -> None:
    require_fits(ARM, ROBOT)
    require_fits(ARM, replace(ROBOT, joints=ROBOT.joints[::-1]))


@pytest.mark.parametrize(
    ("robot", "what"),
    [
        (replace(ROBOT, name="three"), "arm was trained for the robot two, and this is three"),
        (replace(ROBOT, control="effort"), "arm commands positions, and the robot two takes efforts"),
        (with_joint(1, name="c"), r"the policy needs a, .* The policy's: a, b. The robot's: b, c"),
        (with_joint(1, lower=-1.2), r"a: the policy was trained with the lower limit -1.0, and .* says -1.2"),
        (with_joint(1, upper=None), r"a: the policy was trained with the upper limit 1.0, and .* says None"),
        (with_joint(0, max_effort=9.0), r"b: .* largest effort 7.0, and .* says 9.0"),
        (with_joint(0, max_effort=None), "the policy drives b, and the robot two has no motor there"),
        (with_joint(0, unit="m"), "b: the policy takes rad, and the robot two has m"),
        (with_joint(0, max_effort=7.0009), r"b: .* largest effort 7.0, and .* says 7.0009"),
        (replace(ROBOT, measures={"orientation": 3}), "measures orientation in 3 numbers, not 4"),
        (replace(ROBOT, rate=49.0), "arm acts 50 times a second, and two measures 49 times"),
        (replace(ROBOT, watchdog=0.01), "and two makes itself safe after 0.01 s without a command"),
        (replace(ROBOT, measures={}), "observes orientation, which the robot does not measure"),
        (
            replace(ROBOT, joints=(*ROBOT.joints, RobotJoint(name="c", max_effort=1.0))),
            "motors that the policy does not command: c",
        ),
    ],
)
def test_another_robot_is_refused(robot: RobotDescription, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        require_fits(ARM, robot)


def test_a_policy_that_is_told_what_to_do_needs_somebody_who_tells() -> None:
    told = replace(ARM, command=("forward, m/s",))
    require_fits(told, ROBOT, operated=True)
    require_fits(told, replace(ROBOT, measures={**ROBOT.measures, "command": 1}), operated=False)
    with pytest.raises(UsageError, match=r"arm is told what to do \(forward, m/s\): give it with --command"):
        require_fits(told, ROBOT, operated=False)
