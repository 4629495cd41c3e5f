"""What the Panda's tasks share: the arm over a floor, its action, what it observes, goals.

Collisions: of the robot only the fingertips, a box each, and the hand, a capsule, touch anything; links can pass
through the floor and each other, which policies that reach for what is in front of the arm do not come near. The
robot's own meshes are there to be looked at.

The robot's weight is compensated, as the controllers of the real arm do.
"""

from __future__ import annotations

import mujoco
import torch
from torch import Tensor

from ctrlrl.envs import events
from ctrlrl.envs.spec import Action, Effect, Event, Measure, Obs
from ctrlrl.envs.tasks.kinematics import Chain, joints_for, shorten, turn_down
from ctrlrl.envs.tasks.scenery import FLOOR, add_scenery
from ctrlrl.envs.world import World
from ctrlrl.errors import UsageError, nearest
from ctrlrl.robots.robot import Robot, get_robot

TIMESTEP = 0.005  # s
RATE = 25  # actions a second, unless another rate is asked for
RATES = (8, 10, 20, 25, 40, 50)
# What actions of 1 do, at 25 of them a second; at other rates the speeds are the same.
STEP = 0.05  # rad, added to a joint's target: 1.25 rad/s
LEAD = 0.2  # rad, by which a joint's target may be away from the joint
SMOOTHING = 0.04  # s, time constant with which the arm follows its targets' jumps, as controllers of real arms do
TOOL_STEP, TOOL_TURN = 0.02, 0.1  # m, rad, by which an action of 1 moves and turns the tool's target
FASTEST_TURN = 0.2  # rad, by which a tool that does not point down is turned back in one step, at 25 a second
GRIP_STEP = 0.01  # m, what an action of 1 adds to the gripper's target
TOLERANCE = 0.025  # m, within which a goal is reached (ManiSkill's)
POSE = {"joint2": -0.04, "joint4": -2.34, "joint6": 2.3}  # rad; the tool at (0.5, 0, 0.25), pointing down
PADS = ("left_pad", "right_pad")
PAD_Z = 0.0445  # m, of a fingertip's middle, in the finger's frame
REWARDS = ("dense", "sparse", "success")
ACTIONS = ("joints", "tool")

FLOOR_BIT, OBJECT_BIT = 1, 2  # of what the hand can touch


def sparse_reward(achieved: Tensor, desired: Tensor) -> Tensor:
    """0 where a goal is reached, to within `TOLERANCE`, else -1: (N, 3), (N, 3) in m to (N,) float32.

    The tasks' own sparse reward, and that of transitions that are given another goal afterwards.
    """
    return -(norm(achieved - desired) > TOLERANCE).to(torch.float32)


class Arm:
    """Action and terms of the arm.

    Args:
        gripper: whether actions move the gripper; else it stays open.
        action: what they move besides: `joints`, or the `tool`.
        rate: of actions, Hz.
    """

    def __init__(self, *, gripper: bool, action: str, rate: int) -> None:
        self.substeps = round(1 / (TIMESTEP * rate))
        self._longer = RATE / rate  # than an action of the usual rate lasts
        self.robot: Robot = get_robot("panda")
        self.joints = [joint.name for joint in self.robot.joints]  # the gripper's the last
        own = {joint.name: (POSE.get(joint.name, joint.default),) for joint in self.robot.joints}
        self.pose = own | {name: (value,) for name, value in self.robot.passive.items()}
        self._lower = tuple(joint.lower for joint in self.robot.joints)
        self._upper = tuple(joint.upper for joint in self.robot.joints)
        self._kind, self._gripper = action, gripper
        self._chain: Chain | None = None  # made with the first world that is acted in

    @property
    def action(self) -> Action:
        """Each entry moves a target on, from where it is: a joint's by STEP; or the tool's, which points down, by
        TOOL_STEP along x, y and z, and by TOOL_TURN about z. The gripper's by GRIP_STEP. At other rates than RATE by as
        much more or less as an action lasts."""
        gripper = self.joints[7:] if self._gripper else []
        if self._kind == "tool":
            return Action(["x", "y", "z", "turn", *gripper], self._control)
        steps = (*[STEP * self._longer] * 7, GRIP_STEP * self._longer)
        leads = (*[LEAD] * 7, 0.0)
        names = self.joints[:7] + gripper
        moves = Effect("joint position step", "rad, m", steps[: len(names)], lead=leads[: len(names)])
        return Action(names, self._control, effect=moves)

    def _control(self, w: World, action: Tensor) -> None:
        # Targets are kept as offsets from the pose in which episodes start, and taken over by `track`, so that asking
        # again, as happens where another row's episode begins, adds nothing.
        target = w.memory("target", 8) + w.default_joint_pos
        if self._kind == "tool":
            target[:, :7] += self._turns(w, target[:, :7], action[:, :4])
        else:
            target[:, :7] += action[:, :7] * (STEP * self._longer)
        if self._gripper:
            target[:, 7] += action[:, -1] * (GRIP_STEP * self._longer)
        now = w.live("qpos")[:, w.joint_qpos].to(torch.float32)
        # What is blocked, by the floor say, comes back at once. The gripper's target may be ahead: that is its force.
        target[:, :7] = target[:, :7].clamp(now[:, :7] - LEAD, now[:, :7] + LEAD)
        w.control(target.clamp(w.constant(*self._lower), w.constant(*self._upper)))

    def _turns(self, w: World, target: Tensor, action: Tensor) -> Tensor:
        """(N, 7) rad, for targets (N, 7): how an action (N, 4) of the tool, and pointing down, turns joints."""
        if self._chain is None:
            self._chain = Chain(w.model, self.joints[:7], "tool", w.device)
        _, axes, jacobian = self._chain(target)
        yaw = torch.atan2(-axes[:, 0, 0], axes[:, 1, 0]) + action[:, 3] * (TOOL_TURN * self._longer)
        turn = shorten(turn_down(axes, yaw.sin(), yaw.cos()), FASTEST_TURN * self._longer)
        return joints_for(jacobian, torch.cat([action[:, :3] * (TOOL_STEP * self._longer), turn], 1))

    def track(self, w: World) -> None:
        """Once a step: takes over targets, and puts the goal's mark where the goal is."""
        w.memory("target", 8).copy_(w.live("ctrl") - w.default_joint_pos)
        w.live("mocap_pos")[:, 0] = w.command[:, :3].to(w.live("mocap_pos").dtype)

    # What is measured.

    def observed(self, noise: float, lead: int) -> dict[str, Obs]:
        """What is observed of the arm itself, its joints with `noise`; and the leads of the first `lead` of them."""
        arm = self.joints[:7]
        home = [self.pose[name][0] for name in arm]
        measures = (
            Measure("joint position", "rad", "joint", arm, home),
            Measure("joint velocity", "rad/s", "joint", arm),
        )
        return {
            "joint positions": Obs(lambda w: self.joint_offsets(w)[:, :7], noise=noise, measure=measures[0]),
            "joint velocities": Obs(lambda w: w.joint_vel[:, :7], noise=noise, measure=measures[1]),
            "leads": Obs(
                lambda w: self.leads(w)[:, :lead], measure=Measure("joint lead", "rad", "joint", self.joints[:lead])
            ),
            "last action": Obs(lambda w: w.action, measure=Measure("last action")),
        }

    def joint_offsets(self, w: World) -> Tensor:
        """(N, 8) rad, of the gripper m, from the pose in which episodes start."""
        return w.joint_pos - w.default_joint_pos

    def leads(self, w: World) -> Tensor:
        """(N, 8) rad, of the gripper m, from the joints to their targets."""
        return w.memory("target", 8) - self.joint_offsets(w)

    def tool(self, w: World) -> Tensor:
        """(N, 3) m, the middle between the fingertips."""
        return w.sensor("tool")

    # What is rewarded.

    def action_rate(self, w: World) -> Tensor:
        """(N,) squared change of the action."""
        return (w.action - w.last_action).square().sum(1)

    def joint_speed(self, w: World) -> Tensor:
        """(N,) squared speed of the arm's joints, rad2/s2."""
        return w.joint_vel[:, :7].square().sum(1)

    # What happens to it.

    def posture(self, offset: events.Range) -> events.Do:
        """Positions of the arm's joints at an episode's start, rad from the pose; targets are there, too."""

        def do(world: World, rows: Tensor) -> None:
            drawn = torch.zeros(world.num_envs, 8, device=world.device)
            drawn[:, :7] = world.random.uniform(7, *offset)
            world.write("qpos", rows, world.default_joint_pos + drawn, world.joint_qpos)
            world.write("act", rows, world.default_joint_pos[:7] + drawn[:, :7])
            world.memory("target", 8).copy_(torch.where(rows[:, None], drawn, world.memory("target", 8)))

        return do

    def events(self, randomize: bool) -> dict[str, Event]:
        """How episodes start, and with `randomize` how one arm differs from another."""
        start = {"posture": Event("reset", self.posture((-0.1, 0.1)))}
        return start | ({"gains": Event("startup", events.gains((0.9, 1.1), (0.9, 1.1)))} if randomize else {})

    def scene(self, folder: str | None) -> mujoco.MjSpec:
        """The arm on a floor, with a mark for the goal and the sensors that the terms read."""
        spec = self.robot.spec(folder)
        option = spec.option
        option.timestep = TIMESTEP
        option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        # An elliptic cone and friction stiffer than the normal force: what is held does not creep out of the fingers.
        option.cone, option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10.0
        option.solver, option.iterations, option.ls_iterations = mujoco.mjtSolver.mjSOL_NEWTON, 10, 20
        spec.stat.center, spec.stat.extent = [0.3, 0, 0.3], 0.8  # what a camera looks at
        add_scenery(spec)
        # From in front and beside, towards where things are taken up.
        spec.worldbody.add_camera(name="tracking", pos=[1.6, -1.1, 0.95], quat=[0.759, 0.5042, 0.228, 0.3431], fovy=40)
        for geom in spec.geoms:
            geom.contype = geom.conaffinity = 0
        for body in spec.bodies[1:]:
            body.gravcomp = 1.0

        for joint in self.joints[:7]:
            # Else each action would be a blow that shakes things out of the fingers.
            actuator = spec.actuator(joint)
            actuator.dyntype, actuator.dynprm[0] = mujoco.mjtDyn.mjDYN_FILTEREXACT, SMOOTHING

        box, capsule, plane, ball = (
            mujoco.mjtGeom.mjGEOM_BOX,
            mujoco.mjtGeom.mjGEOM_CAPSULE,
            mujoco.mjtGeom.mjGEOM_PLANE,
            mujoco.mjtGeom.mjGEOM_SPHERE,
        )
        spec.worldbody.add_geom(
            name="floor", type=plane, size=[0, 0, 0.05], material=FLOOR, contype=FLOOR_BIT, conaffinity=0
        )
        touches = {"contype": 0, "conaffinity": FLOOR_BIT | OBJECT_BIT, "group": 3}
        for pad, finger in zip(PADS, ("left_finger", "right_finger"), strict=True):
            spec.body(finger).add_geom(
                name=pad,
                type=box,
                size=[0.0085, 0.004, 0.0085],
                pos=[0, 0.004, PAD_Z],
                condim=4,
                priority=1,
                friction=[1.0, 0.005, 0.0001],
                solref=[2 * TIMESTEP, 1],  # as stiff as the timestep allows: what is held sinks in, and creeps, less
                **touches,
            )
        hand = spec.body("hand")
        hand.add_geom(name="palm", type=capsule, size=[0.035, 0.06, 0], pos=[0, 0, 0.025], quat=[1, 1, 0, 0], **touches)
        goal = spec.worldbody.add_body(name="goal", mocap=True, pos=[0.5, 0, 0.3])
        goal.add_geom(type=ball, size=[0.02, 0, 0], rgba=[0.9, 0.2, 0.2, 0.5], contype=0, conaffinity=0)
        add_sensor(spec, "tool", mujoco.mjtSensor.mjSENS_FRAMEPOS, mujoco.mjtObj.mjOBJ_SITE, "tool")
        return spec


def add_sensor(spec: mujoco.MjSpec, name: str, sensor: mujoco.mjtSensor, kind: mujoco.mjtObj, of: str) -> None:
    """A sensor of the frame of what is called `of`."""
    spec.add_sensor(name=name, type=sensor, objtype=kind, objname=of)


def require_reward(name: str, reward: str) -> None:
    """Raise UsageError unless the option `reward` is one that there is."""
    if reward not in REWARDS:
        raise UsageError(
            f"{name}: reward must be one of {', '.join(REWARDS)}, got {reward!r}.{nearest(str(reward), REWARDS)}"
        )


def require_action(name: str, action: str) -> None:
    """Raise UsageError unless the option `action` is one that there is."""
    if action not in ACTIONS:
        raise UsageError(
            f"{name}: action must be one of {', '.join(ACTIONS)}, got {action!r}.{nearest(action, ACTIONS)}"
        )


def require_rate(name: str, rate: int) -> None:
    """Raise UsageError unless the option `rate` is one that there is."""
    if rate not in RATES:
        raise UsageError(
            f"{name}: rate, of actions a second, must be one of {', '.join(map(str, RATES))}, got {rate!r}"
        )


def draw_in(w: World, low: tuple[float, ...], high: tuple[float, ...]) -> Tensor:
    """(N, len(low)) uniform numbers between corners of a box."""
    return w.random.uniform(len(low), w.constant(*low), w.constant(*high))


def norm(vector: Tensor) -> Tensor:
    """(N, ...) lengths along the last dimension."""
    length: Tensor = torch.linalg.vector_norm(vector, dim=-1)
    return length
