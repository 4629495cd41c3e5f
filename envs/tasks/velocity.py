"""A quadruped follows a commanded velocity on flat ground.

Command: forward and sideways speed and turning rate in the robot's frame. Action: targets of the joint positions, as
offsets from the standing pose. Terms and weights are those of mjbatch's Go1 example and of MuJoCo Playground's Go1
joystick task (arXiv:2502.08844), with a gait clock; numbers of the robot come from its description.

Only the feet touch the ground. A robot that tilts by more than 70 degrees, or whose body sinks to the ground, has
fallen.
"""

from __future__ import annotations

import mujoco
import torch
from torch import Tensor

from ctrlrl.envs import events
from ctrlrl.envs.spec import Action, Command, Effect, Event, Measure, Obs, Reward, SimTask
from ctrlrl.envs.tasks.scenery import FLOOR, add_scenery
from ctrlrl.envs.world import World
from ctrlrl.mirror import Mirror, Reflection
from ctrlrl.robots.robot import Robot, get_robot

BASE = "base"  # the floating joint
FEET = ("FR", "FL", "RR", "RL")
COMMAND = ("forward, m/s", "to the left, m/s", "turning left, rad/s")
SPEED = (1.5, 0.8, 1.2)  # m/s forward, m/s sideways, rad/s: largest commands
SHARE = (0.9, 0.25, 0.5)  # of commands in which each is not zero
GAIT = 2.0  # steps per second of each foot
PHASE = (0.0, 0.5, 0.5, 0.0)  # of each foot, in cycles: a trot
SWING = 0.06  # m, how high a foot is lifted
SCALE = 0.5  # rad, of an action of 1
TILT = 0.34  # the cosine of 70 degrees


def velocity(
    name: str, robot: str, *, folder: str | None = None, randomize: bool = True, symmetric: bool = True
) -> SimTask:
    """The task.

    Args:
        name: what a user types to get it.
        robot: a quadruped, whose joints are named like `FR_hip_joint`; its frames are `imu` and the feet.
        folder: of the robot's model; see `Robot.find`.
        randomize: masses, motors and friction differ from robot to robot, and it is pushed.
        symmetric: what policies learn of the left side, they know of the right.
    """
    return _velocity(name, get_robot(robot), folder, randomize, symmetric)


def _velocity(name: str, robot: Robot, folder: str | None, randomize: bool, symmetric: bool) -> SimTask:
    joints = [joint.name for joint in robot.joints]
    standing = [joint.default for joint in robot.joints]
    model = model_of(robot, folder)
    terms = Terms(robot, model.geom(_part(robot, FEET[0])).size[0])
    disturbances = {
        "friction": Event("startup", events.friction(["floor"], (0.4, 1.0))),
        "mass": Event("startup", events.mass(robot.base, (0.9, 1.1), (-1.0, 1.0))),
        "center of mass": Event("startup", events.center_of_mass(robot.base, (-0.05, 0.05))),
        "gains": Event("startup", events.gains((0.9, 1.1), (0.9, 1.1))),
        "strength": Event("startup", events.motor_strength((0.9, 1.0))),
        "push": Event("interval", events.push((0.1, 1.0)), every=(3.0, 6.0)),
    }
    return SimTask(
        name=name,
        model=model,
        timestep=0.005,
        substeps=4,
        episode_seconds=10.0,
        joints=joints,
        pose={BASE: (0, 0, robot.base_height or 0, 1, 0, 0, 0)} | {j.name: (j.default,) for j in robot.joints},
        robot=robot,
        action=Action(joints, terms.targets, effect=Effect("joint position offset", "rad", [SCALE] * 12, standing)),
        observations={
            "policy": {
                "velocity": Obs(terms.velocity, noise=0.1, measure=Measure("base linear velocity", "m/s", "base")),
                "rotation": Obs(terms.rotation, noise=0.2, measure=Measure("base angular velocity", "rad/s", "base")),
                "up": Obs(terms.up, noise=0.05, measure=Measure("base up", "", "base")),
                "joint positions": Obs(
                    terms.joint_offsets, noise=0.03, measure=Measure("joint position", "rad", "joint", joints, standing)
                ),
                "joint velocities": Obs(
                    lambda w: w.joint_vel, noise=1.5, measure=Measure("joint velocity", "rad/s", "joint", joints)
                ),
                "last action": Obs(lambda w: w.action, measure=Measure("last action")),
                "command": Obs(lambda w: w.command, measure=Measure("command")),
                "clock": Obs(terms.clock, measure=Measure("gait clock", frequency=GAIT)),
            },
            "privileged": {
                "velocity": Obs(terms.velocity),
                "rotation": Obs(terms.rotation),
                "up": Obs(terms.up),
                "height": Obs(lambda w: w.field("qpos")[:, 2:3]),
                "joint positions": Obs(terms.joint_offsets),
                "joint velocities": Obs(lambda w: w.joint_vel),
                "feet": Obs(terms.feet),
            },
        },
        rewards={
            "track": Reward(terms.tracks_speed, 2.0),
            "turn": Reward(terms.tracks_turn, 1.0),
            "gait": Reward(terms.keeps_gait, 1.0),
            "pose": Reward(terms.keeps_pose, 0.5),
            "orientation": Reward(lambda w: terms.up(w)[:, :2].square().sum(1), -5.0),
            "bounce": Reward(lambda w: terms.velocity(w)[:, 2].square(), -0.5),
            "roll and pitch": Reward(lambda w: terms.rotation(w)[:, :2].square().sum(1), -0.05),
            "joint limits": Reward(terms.beyond_limits, -1.0),
            "action rate": Reward(lambda w: (w.action - w.last_action).square().sum(1), -0.01),
            "landing": Reward(terms.lands_hard, -1.0),
        },
        reward_scale=0.02,
        reward_floor=0.0,
        terminations={"fallen": terms.fallen},
        track=terms.track,
        metrics={"speed error": terms.speed_error},
        outcomes={"success": terms.success, "fell": lambda w: w.terminated.float(), "speed share": terms.speed_share},
        command=Command(3, terms.draw_command, every=(3.0, 7.0), names=COMMAND),
        events={"posture": Event("reset", events.joint_offsets((-0.1, 0.1)))} | (disturbances if randomize else {}),
        mirror=mirror_of(joints) if symmetric else None,
    )


class Terms:
    """The terms, for one robot."""

    def __init__(self, robot: Robot, foot_radius: float) -> None:
        self._radius = foot_radius  # m
        middles = [(joint.lower + joint.upper) / 2 for joint in robot.joints]
        halves = [(joint.upper - joint.lower) / 2 for joint in robot.joints]
        self._middle, self._reach = tuple(middles), tuple(0.9 * half for half in halves)
        # Calves bend freely; hips and thighs stay near the standing pose.
        self._stiff = tuple(0.1 if "calf" in joint.name else 1.0 for joint in robot.joints)
        self._low = 0.5 * (robot.base_height or 0.0)

    # What is measured.

    def velocity(self, w: World) -> Tensor:
        """(N, 3) m/s, of the body in its own frame."""
        return w.sensor("velocity")

    def rotation(self, w: World) -> Tensor:
        """(N, 3) rad/s, of the body in its own frame."""
        return w.sensor("rotation")

    def up(self, w: World) -> Tensor:
        """(N, 3) where up is, in the body's frame; the direction of gravity, reversed."""
        return w.sensor("up")

    def joint_offsets(self, w: World) -> Tensor:
        """(N, 12) rad, from the standing pose."""
        return w.joint_pos - w.default_joint_pos

    def clock(self, w: World) -> Tensor:
        """(N, 2) sine and cosine of the gait's phase; zero at rest."""
        angle = w.memory("clock", 1) * (2 * torch.pi)
        return torch.cat([angle.sin(), angle.cos()], 1) * self.moving(w)

    def moving(self, w: World) -> Tensor:
        """(N, 1) 1 where there is a command, else 0."""
        return (w.command.abs().amax(1, keepdim=True) > 0.01).to(torch.float32)

    def feet(self, w: World) -> Tensor:
        """(N, 16) heights over the ground, m, and velocities, m/s, of the feet."""
        return torch.cat([self.heights(w), self.speeds(w).flatten(1)], 1)

    def heights(self, w: World) -> Tensor:
        """(N, 4) m, of the feet over the ground."""
        return w.sensors([f"{foot} position" for foot in FEET])[:, :, 2] - self._radius

    def speeds(self, w: World) -> Tensor:
        """(N, 4, 3) m/s, of the feet."""
        return w.sensors([f"{foot} velocity" for foot in FEET])

    def track(self, w: World) -> None:
        """Once a step: the clock, and what its episode has come to."""
        clock = w.memory("clock", 1)
        clock.add_(w.dt * GAIT).frac_()
        asked = w.command[:, :2].norm(dim=1)
        went = (self.velocity(w)[:, :2] * w.command[:, :2]).sum(1) / asked.clamp(min=0.1)
        sums = w.memory("distance", 2)  # asked for, and gone that way
        sums[:, 0] += asked
        sums[:, 1] += went
        heights, was = self.heights(w), w.memory("height", 4)
        w.memory("landed", 4).copy_((heights < 0.005) & (was >= 0.005))
        was.copy_(heights)

    # What is rewarded.

    def tracks_speed(self, w: World) -> Tensor:
        """(N,) 1 at the commanded speed."""
        return torch.exp((self.velocity(w)[:, :2] - w.command[:, :2]).square().sum(1) / -0.25)

    def tracks_turn(self, w: World) -> Tensor:
        """(N,) 1 at the commanded turning rate."""
        return torch.exp((self.rotation(w)[:, 2] - w.command[:, 2]).square() / -0.25)

    def keeps_gait(self, w: World) -> Tensor:
        """(N,) 1 where feet are as high as the clock says, and those on the ground do not slide."""
        lift = torch.sin((w.memory("clock", 1) + w.constant(*PHASE)) * (2 * torch.pi)).clamp(min=0.0)
        target = lift * (SWING * self.moving(w))  # (N, 4), above the ground
        slides = self.speeds(w)[:, :, :2].square().sum(2) * (target <= 0)
        return torch.exp(((self.heights(w) - target) / 0.03).square().neg() - slides / 0.1).mean(1)

    def keeps_pose(self, w: World) -> Tensor:
        """(N,) 1 in the standing pose."""
        return torch.exp(-(self.joint_offsets(w).square() * w.constant(*self._stiff)).sum(1))

    def beyond_limits(self, w: World) -> Tensor:
        """(N,) rad beyond nine tenths of the joints' ranges."""
        away = (w.joint_pos - w.constant(*self._middle)).abs()
        return (away - w.constant(*self._reach)).clamp(min=0).sum(1)

    def lands_hard(self, w: World) -> Tensor:
        """(N,) squared vertical speed, m2/s2, of feet that come down to the ground."""
        return (self.speeds(w)[:, :, 2].clamp(max=0.0).square() * w.memory("landed", 4)).sum(1)

    # How it ends.

    def fallen(self, w: World) -> Tensor:
        """(N,) bool."""
        return (self.up(w)[:, 2] < TILT) | (w.field("qpos")[:, 2] < self._low)

    def speed_error(self, w: World) -> Tensor:
        """(N,) m/s, between the horizontal velocity and the commanded one."""
        error: Tensor = (self.velocity(w)[:, :2] - w.command[:, :2]).norm(dim=1)
        return error

    def speed_share(self, w: World) -> Tensor:
        """(N,) distance gone as commanded over distance commanded; 1 where none was."""
        sums = w.memory("distance", 2) * w.dt
        return torch.where(sums[:, 0] > 0.1, sums[:, 1] / sums[:, 0].clamp(min=0.1), 1.0)

    def success(self, w: World) -> Tensor:
        """(N,) 1 where it has not fallen, and gone at least four fifths of the way commanded."""
        return (~w.terminated & (self.speed_share(w) >= 0.8)).float()

    # What it is told, and does.

    def draw_command(self, w: World) -> Tensor:
        """(N, 3), each entry zero in some commands."""
        drawn = w.random.uniform(6)
        return (drawn[:, :3] * 2 - 1) * w.constant(*SPEED) * (drawn[:, 3:] < w.constant(*SHARE))

    def targets(self, w: World, action: Tensor) -> None:
        """Joint targets from actions (N, 12); MuJoCo keeps them within the joints' ranges."""
        w.control(w.default_joint_pos + SCALE * action)


def model_of(robot: Robot, folder: str | None) -> mujoco.MjSpec:
    """The robot on a floor that only its feet touch, with the sensors that the terms read."""
    spec = robot.spec(folder)
    option = spec.option
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone, option.impratio = mujoco.mjtCone.mjCONE_PYRAMIDAL, 1.0
    option.solver, option.iterations = mujoco.mjtSolver.mjSOL_PGS, 10
    add_scenery(spec)
    spec.worldbody.add_geom(
        name="floor",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[0, 0, 0.05],
        material=FLOOR,
        condim=3,
        priority=2,  # its friction counts, not the feet's
        friction=[0.8, 0.02, 0.01],
        contype=1,
        conaffinity=0,
    )
    next(joint for joint in spec.joints if joint.type == mujoco.mjtJoint.mjJNT_FREE).name = BASE
    feet = [_part(robot, foot) for foot in FEET]
    for geom in spec.geoms:
        if geom.name != "floor":
            geom.contype, geom.conaffinity = 0, int(geom.name in feet)
            geom.margin = 0.0

    imu = _part(robot, "imu")
    site = mujoco.mjtObj.mjOBJ_SITE
    spec.add_sensor(name="velocity", type=mujoco.mjtSensor.mjSENS_VELOCIMETER, objtype=site, objname=imu)
    spec.add_sensor(name="rotation", type=mujoco.mjtSensor.mjSENS_GYRO, objtype=site, objname=imu)
    body = mujoco.mjtObj.mjOBJ_XBODY
    up = mujoco.mjtSensor.mjSENS_FRAMEZAXIS
    spec.add_sensor(name="up", type=up, objtype=body, objname="world", reftype=site, refname=imu)
    geom_type = mujoco.mjtObj.mjOBJ_GEOM
    for what, kind in (
        ("position", mujoco.mjtSensor.mjSENS_FRAMEPOS),
        ("velocity", mujoco.mjtSensor.mjSENS_FRAMELINVEL),
    ):
        for name, foot in zip(FEET, feet, strict=True):
            spec.add_sensor(name=f"{name} {what}", type=kind, objtype=geom_type, objname=foot)
    return spec


def _part(robot: Robot, frame: str) -> str:
    """What a frame of the robot is called in its model."""
    return robot.frames[frame].partition(":")[2]


def mirror_of(joints: list[str]) -> Mirror:
    """Left and right legs change places; what points or turns sideways changes sign."""
    legs = Reflection.of_names(joints, {"FR": "FL", "FL": "FR", "RR": "RL", "RL": "RR"}, flipped=["hip"])
    along, turn = Reflection.signs(1, -1, 1), Reflection.signs(-1, 1, -1)
    # In the mirror the other pair of a trot's legs swings: half a cycle, which turns the clock's signs around.
    clock = Reflection.signs(-1, -1)
    command = Reflection.signs(1, -1, -1)
    feet = Reflection((1, 0, 3, 2), (1.0,) * 4)
    speeds = Reflection((3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8), (1.0, -1.0, 1.0) * 4)
    policy = Reflection.join(along, turn, along, legs, legs, legs, command, clock)
    privileged = Reflection.join(along, turn, along, Reflection.signs(1), legs, legs, feet, speeds)
    return Mirror({"policy": policy, "privileged": privileged}, legs)
