"""A rig swings its pole up from hanging and balances it: the cart-pole on its rail, the pendulum on its motor.

Action: the motor's effort, as a share of the largest. Observed is what the rig's encoders tell: angles and places in
whole counts, and speeds with the error that differences of counts over a control step have. The privileged group is
exact.

The reward of a step is the product of factors in [0, 1], those of dm_control's cart-pole swing-up (Tassa et al. 2018,
arXiv:1801.00690), so that a perfect episode sums to 500:

    upright   (1 + cos angle) / 2
    centered  (1 + tolerance(place / 0.4 m)) / 2      cart-pole only; half the travel where dm_control has 2 of 1.8 m
    slow      (1 + tolerance(speed / 5 rad/s)) / 2    of the cart-pole's pole; the pendulum's is the tolerance itself,
                                                      since half of it paid PPO for turning round and round
    gentle    (4 + max(0, 1 - action^2)) / 5

with tolerance(x) = 0.1 ** x^2: a tenth at 1. The sparse reward is 1 where the pole is upright, within 8 degrees (as in
dm_control's pendulum), and the cart within 0.1 m of the middle, else 0. An episode is a success if that was so
throughout its last second.

The rail has limit switches 2 cm before its ends, which cut the motor's power as on a real rig: there the episode is
terminated. No reward is negative, so that to end an episode early is never worth it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctrlrl.envs import events
from ctrlrl.envs.spec import Action, Effect, Event, Measure, Obs, Reward, SimTask
from ctrlrl.envs.tasks.scenery import add_scenery
from ctrlrl.envs.world import World
from ctrlrl.mirror import Mirror, Reflection
from ctrlrl.robots.robot import Robot, get_robot

TIMESTEP, SUBSTEPS = 0.005, 4  # s; 50 Hz
COUNT = 2 * math.pi / 4096  # rad, of the encoders at pole and arm
RAIL_COUNT = 4e-5  # m: 1,024 counts a turn of the pulley's 4 cm
BIAS = 0.01  # rad, by which the encoder's zero is off
UPRIGHT = math.cos(math.radians(8))
MIDDLE = 0.1  # m
SWITCH = 0.02  # m before the rail's ends


def cartpole(
    name: str,
    *,
    sparse: bool = False,
    randomize: bool = True,
    symmetric: bool = True,
    observation_delay: int = 0,
    history: int = 1,
) -> SimTask:
    """The task of the cart-pole.

    Args:
        name: what a user types to get it.
        sparse: reward only what counts as success.
        randomize: masses, lengths, friction, motor and encoder differ from rig to rig, and actions take effect up to
            two control steps late.
        symmetric: what policies learn of the left side, they know of the right.
        observation_delay: control steps by which measurements come late.
        history: successive measurements and actions that are observed together.

    Raises:
        UsageError: on making the environment, where a number is out of range.
    """
    return _swing_up(name, get_robot("cartpole"), sparse, randomize, symmetric, observation_delay, history)


def pendulum(
    name: str,
    *,
    sparse: bool = False,
    randomize: bool = True,
    symmetric: bool = True,
    observation_delay: int = 0,
    history: int = 1,
) -> SimTask:
    """The task of the pendulum; arguments as of `cartpole`."""
    return _swing_up(name, get_robot("pendulum"), sparse, randomize, symmetric, observation_delay, history)


def _swing_up(
    name: str, robot: Robot, sparse: bool, randomize: bool, symmetric: bool, observation_delay: int, history: int
) -> SimTask:
    model = robot.spec()
    add_scenery(model)
    driven, has_rail = robot.joints[0], bool(robot.passive)
    pose = {driven.name: driven.default} | dict(robot.passive)
    hinge = list(pose)[-1]
    terms = Terms(driven.max_effort, has_rail, driven.upper - SWITCH)
    late: dict[str, Any] = {"delay": (observation_delay, observation_delay), "history": history}
    policy = {
        "angle": (
            Obs(
                terms.measured_angle, measure=Measure("joint direction", "", "joint", [hinge], resolution=COUNT), **late
            ),
            (-1, 1),
        ),
        "speed": (
            Obs(
                terms.speed,
                noise=COUNT / (TIMESTEP * SUBSTEPS),
                measure=Measure("joint velocity", "rad/s", "joint", [hinge]),
                **late,
            ),
            (-1,),
        ),
        "last action": (Obs(lambda w: w.action, history=history, measure=Measure("last action")), (-1,)),
    }
    privileged = {"angle": (Obs(terms.angle), (-1, 1)), "speed": (Obs(terms.speed), (-1,))}
    factors = {"upright": terms.upright, "slow": terms.slow, "gentle": terms.gentle}
    if has_rail:
        rail = {
            "place": (
                Obs(
                    terms.measured_place,
                    measure=Measure("joint position", "m", "joint", [driven.name], resolution=RAIL_COUNT),
                    **late,
                ),
                (-1,),
            ),
            "cart speed": (
                Obs(
                    terms.cart_speed,
                    noise=RAIL_COUNT / (TIMESTEP * SUBSTEPS),
                    measure=Measure("joint velocity", "m/s", "joint", [driven.name]),
                    **late,
                ),
                (-1,),
            ),
        }
        policy = rail | policy
        privileged = {"place": (Obs(terms.place), (-1,)), "cart speed": (Obs(terms.cart_speed), (-1,))} | privileged
        factors["centered"] = terms.centered
    return SimTask(
        name=name,
        model=model,
        timestep=TIMESTEP,
        substeps=SUBSTEPS,
        episode_seconds=10.0,
        joints=list(pose),
        pose={joint: (at,) for joint, at in pose.items()},
        robot=robot,
        action=Action(
            [driven.name],
            terms.push,
            delay=(0, 2) if randomize else (0, 0),
            effect=Effect("joint effort", "N m" if driven.unit == "rad" else "N", [driven.max_effort]),
        ),
        observations={
            "policy": {label: obs for label, (obs, _) in policy.items()},
            "privileged": {label: obs for label, (obs, _) in privileged.items()},
        },
        rewards={"balance": Reward(terms.balanced if sparse else terms.product, 1.0)},
        terminations={"end of the rail": terms.at_switch} if has_rail else {},
        track=terms.track,
        metrics=factors,
        outcomes={"success": terms.success},
        events={"start": Event("reset", events.joint_offsets((-0.1, 0.1)))}
        | (_randomized(robot, hinge) if randomize else {}),
        mirror=Mirror(
            {
                group: Reflection.join(*(Reflection.signs(*signs * obs.history) for obs, signs in terms_of.values()))
                for group, terms_of in (("policy", policy), ("privileged", privileged))
            },
            Reflection.signs(-1),
        )
        if symmetric
        else None,
    )


def _randomized(robot: Robot, hinge: str) -> dict[str, Event]:
    driven, swings = robot.joints[0], "pole" if robot.passive else "arm"
    joints = [driven.name, *robot.passive]
    changes = {
        "mass": events.mass(swings, (0.8, 1.2)),
        "length": events.center_of_mass(swings, (-0.02, 0.02), along="z"),
        "damping": events.joint_damping(joints, (0.75, 1.25)),
        "friction": events.joint_friction([driven.name], (0.5 * driven.friction, 1.5 * driven.friction)),
        "inertia": events.armature([driven.name], (0.8, 1.2)),
        "motor": events.motor_constant((0.9, 1.1)),
        "encoder": events.bias("encoder bias", (-BIAS, BIAS)),
    }
    if robot.passive:
        changes["cart"] = events.mass("cart", (0.9, 1.1))
        changes["bearing"] = events.joint_friction([hinge], (0.0, 1e-3))
    return {label: Event("startup", change) for label, change in changes.items()}


class Terms:
    """The terms, for one rig. The last joint is what swings, 0 upright; the first of two is the rail's.

    Args:
        effort: of an action of 1, N m or N.
        has_rail: whether there is a cart.
        switch: m from the middle, where the rail's limit switches are.
    """

    def __init__(self, effort: float, has_rail: bool, switch: float) -> None:
        self._effort, self._has_rail, self._switch = effort, has_rail, switch

    # What is measured.

    def measured_angle(self, w: World) -> Tensor:
        """(N, 2) sine and cosine of the angle, in whole counts from a zero that may be off."""
        counts = ((w.joint_pos[:, -1:] + w.memory("encoder bias", 1, keep=True)) / COUNT).round()
        return _direction(counts * COUNT)

    def measured_place(self, w: World) -> Tensor:
        """(N, 1) m, in whole counts; the switches at both ends tell where the middle is."""
        return (w.joint_pos[:, :1] / RAIL_COUNT).round() * RAIL_COUNT

    def angle(self, w: World) -> Tensor:
        """(N, 2) sine and cosine."""
        return _direction(w.joint_pos[:, -1:])

    def speed(self, w: World) -> Tensor:
        """(N, 1) rad/s."""
        return w.joint_vel[:, -1:]

    def place(self, w: World) -> Tensor:
        """(N, 1) m from the rail's middle."""
        return w.joint_pos[:, :1]

    def cart_speed(self, w: World) -> Tensor:
        """(N, 1) m/s."""
        return w.joint_vel[:, :1]

    # What is rewarded.

    def upright(self, w: World) -> Tensor:
        """(N,) 1 upright, 0 hanging."""
        return (1 + w.joint_pos[:, -1].cos()) / 2

    def slow(self, w: World) -> Tensor:
        """(N,) 1 where the pole does not turn, down to a half; 0 for the pendulum."""
        slow = _tolerance(w.joint_vel[:, -1], 5.0)
        return (1 + slow) / 2 if self._has_rail else slow

    def gentle(self, w: World) -> Tensor:
        """(N,) 1 without effort, 0.8 with the largest."""
        return (4 + (1 - w.action[:, 0].square())) / 5

    def centered(self, w: World) -> Tensor:
        """(N,) 1 in the rail's middle, 0.55 at its ends."""
        return (1 + _tolerance(w.joint_pos[:, 0], 0.4)) / 2

    def product(self, w: World) -> Tensor:
        """(N,) the dense reward."""
        product = self.upright(w) * self.slow(w) * self.gentle(w)
        return product * self.centered(w) if self._has_rail else product

    def balances(self, w: World) -> Tensor:
        """(N,) bool: upright, and the cart near the middle."""
        upright = w.joint_pos[:, -1].cos() > UPRIGHT
        return upright & (w.joint_pos[:, 0].abs() < MIDDLE) if self._has_rail else upright

    def balanced(self, w: World) -> Tensor:
        """(N,) the sparse reward."""
        return self.balances(w).float()

    # How it goes on, and ends.

    def push(self, w: World, action: Tensor) -> None:
        """Efforts from actions (N, 1)."""
        w.control(self._effort * action)

    def track(self, w: World) -> None:
        """Once a step: for how long it has balanced, in seconds."""
        time = w.memory("balance", 1)
        time.add_(w.dt).mul_(self.balances(w)[:, None])

    def success(self, w: World) -> Tensor:
        """(N,) 1 where it has balanced for a second when the episode is over."""
        return (w.memory("balance", 1)[:, 0] > 1 - w.dt / 2).float()

    def at_switch(self, w: World) -> Tensor:
        """(N,) bool."""
        return w.joint_pos[:, 0].abs() > self._switch


def _direction(angle: Tensor) -> Tensor:
    """(N, 2) sine and cosine of angles (N, 1)."""
    return torch.cat([angle.sin(), angle.cos()], 1)


def _tolerance(value: Tensor, margin: float) -> Tensor:
    """1 at 0, a tenth at `margin`: dm_control's Gaussian."""
    return torch.exp(math.log(0.1) * (value / margin).square())
