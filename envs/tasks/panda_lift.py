"""The Panda grasps a cube of 4 cm on the floor and carries it to a point in the air.

Command: where the cube's center is to be, drawn for each episode. Action: eight numbers, of which seven move the target
of a joint on by up to 0.05 rad and the last that of the gripper by up to 1 cm; positive opens it.

The dense reward has the stages of ManiSkill's PickCube: reach, grasp, carry (of what is grasped), hold still (at the
goal), each from 0 to 1, and a bonus of 1 for success; a fifth of their sum is the reward.
"""

from __future__ import annotations

import mujoco
import torch
from torch import Tensor

from ctrlrl.envs import events
from ctrlrl.envs.spec import Command, Event, Goals, Measure, Obs, Reward, SimTask
from ctrlrl.envs.tasks.panda import (
    FLOOR_BIT,
    OBJECT_BIT,
    PADS,
    RATE,
    TIMESTEP,
    TOLERANCE,
    Arm,
    add_sensor,
    draw_in,
    norm,
    require_action,
    require_rate,
    require_reward,
    sparse_reward,
)
from ctrlrl.envs.world import World

CUBE = "cube"
HALF = 0.02  # m, half the cube's side
MASS = 0.05  # kg
START_LOW, START_HIGH = (0.4, -0.2, -torch.pi), (0.6, 0.2, torch.pi)  # m, m, rad: where the cube lies, and its yaw
GOAL_LOW, GOAL_HIGH = (0.4, -0.2, 0.15), (0.6, 0.2, 0.4)  # m, corners of the box in which goals lie
BETWEEN = 0.025  # m, from the tool to the cube's center, within which it is between the fingertips
STILL = 0.2  # rad/s, of the fastest joint, below which the arm is still


def panda_lift(
    name: str,
    *,
    reward: str = "dense",
    action: str = "joints",
    rate: int = RATE,
    randomize: bool = True,
    folder: str | None = None,
) -> SimTask:
    """The task.

    Args:
        name: what a user types to get it.
        reward: `dense`; `sparse`: `panda.sparse_reward`, 0 where the cube is at the goal and -1 elsewhere; or
            `success`: 1 where the cube comes to the goal, which ends the episode, 0 before.
        action: `joints`, or `tool`: it points down, and entries move its target by up to 2 cm along x, y and z and turn
            it by up to 0.1 rad about z. The tool's x axis, and the ways from tool to cube and from cube to goal, are
            then observed, too.
        rate: of actions a second, one of `panda.RATES`. At other rates than 25 they last longer or shorter, and move
            things as fast: at 10, the tool by up to 5 cm.
        randomize: gains, friction and the cube's mass differ from robot to robot, and measurements are noisy.
        folder: of the robot's model; see `Robot.find`.

    Raises:
        UsageError: there is no such reward, action or rate.
    """
    require_reward(name, reward)
    require_action(name, action)
    require_rate(name, rate)
    arm = Arm(gripper=True, action=action, rate=rate)
    terms = Terms(arm)
    own = arm.observed(0.01 if randomize else 0.0, 8)
    rewards = {
        "reach": Reward(terms.reaches, 1.0),
        "grasp": Reward(terms.grasps, 1.0),
        "carry": Reward(lambda w: terms.grasps(w) * (1 - torch.tanh(5 * terms.distance(w))), 1.0),
        "still": Reward(lambda w: terms.at_goal(w) * (1 - torch.tanh(5 * norm(w.joint_vel[:, :7]))), 1.0),
        "success": Reward(terms.succeeds, 1.0),
        "action rate": Reward(arm.action_rate, -0.005),
    }
    if reward == "sparse":
        rewards = {"carried": Reward(lambda w: sparse_reward(terms.cube(w), w.command), 1.0)}
    if reward == "success":
        rewards = {"success": Reward(terms.at_goal, 1.0)}
    differences = {
        "friction": Event("startup", events.friction(PADS, (0.5, 1.2))),
        "mass": Event("startup", events.mass(CUBE, (0.5, 2.0))),
    }
    from_tool = {
        "tool axis": Obs(terms.tool_axis, measure=Measure("given", "", "base")),
        "to cube": Obs(lambda w: terms.cube(w) - arm.tool(w), measure=Measure("given", "m", "base")),
        "to goal": Obs(lambda w: w.command - terms.cube(w), measure=Measure("given", "m", "base")),
    }
    if reward == "sparse":  # goals may be replaced afterwards, and nothing else may depend on them
        del from_tool["to goal"]
    return SimTask(
        name=name,
        model=model_of(arm, folder),
        timestep=TIMESTEP,
        substeps=arm.substeps,
        episode_seconds=4.0,
        joints=arm.joints,
        pose=arm.pose | {CUBE: (0.5, 0, HALF, 1, 0, 0, 0)},
        robot=arm.robot,
        action=arm.action,
        goals=Goals("achieved goal", "desired goal", sparse_reward) if reward == "sparse" else None,
        observations={
            "policy": {
                "achieved goal": Obs(terms.cube, measure=Measure("given", "m", "base")),
                "desired goal": Obs(lambda w: w.command, measure=Measure("command")),
                "tool": Obs(arm.tool, measure=Measure("tool position", "m", "base")),
                "cube axes": Obs(terms.axes, measure=Measure("given", "", "base")),
                "joint positions": own["joint positions"],
                "gripper": Obs(
                    lambda w: w.joint_pos[:, 7:], measure=Measure("joint position", "m", "joint", arm.joints[7:])
                ),
                "joint velocities": own["joint velocities"],
                "leads": own["leads"],
                "last action": own["last action"],
            }
            | (from_tool if action == "tool" else {})
        },
        rewards=rewards,
        terminations={"at the goal": lambda w: terms.at_goal(w) > 0} if reward == "success" else {},
        reward_scale=0.2 if reward == "dense" else 1.0,
        track=arm.track,
        metrics={"distance": terms.distance, "grasped": terms.grasps},
        outcomes={
            "success": terms.at_goal,
            "final distance": terms.distance,
            "height": lambda w: terms.cube(w)[:, 2],
        },
        command=Command(3, lambda w: draw_in(w, GOAL_LOW, GOAL_HIGH), names=("x, m", "y, m", "z, m")),
        events=arm.events(randomize) | {"cube": Event("reset", terms.place)} | (differences if randomize else {}),
    )


class Terms:
    """What is special to this task."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    # What is measured.

    def cube(self, w: World) -> Tensor:
        """(N, 3) m, the cube's center."""
        return w.sensor("cube")

    def axes(self, w: World) -> Tensor:
        """(N, 6) directions of the cube's x and y axes."""
        return torch.cat([w.sensor("cube x"), w.sensor("cube y")], 1)

    def tool_axis(self, w: World) -> Tensor:
        """(N, 3) direction of the tool's x axis, across which the fingers close."""
        return w.sensor("tool x")

    def distance(self, w: World) -> Tensor:
        """(N,) m, from the cube to the goal."""
        return norm(self.cube(w) - w.command)

    # What is rewarded.

    def reaches(self, w: World) -> Tensor:
        """(N,) 1 with the cube between the fingertips."""
        return 1 - torch.tanh(5 * norm(self.cube(w) - self._arm.tool(w)))

    def grasps(self, w: World) -> Tensor:
        """(N,) 1 where both fingertips touch the cube, and it is between them and not below."""
        between = norm(self.cube(w) - self._arm.tool(w)) < BETWEEN
        return (between & (w.sensor(PADS[0])[:, 0] > 0) & (w.sensor(PADS[1])[:, 0] > 0)).float()

    def at_goal(self, w: World) -> Tensor:
        """(N,) 1 where the cube is at the goal."""
        return (self.distance(w) <= TOLERANCE).float()

    def succeeds(self, w: World) -> Tensor:
        """(N,) 1 where the cube is at the goal and the arm does not move."""
        return self.at_goal(w) * (w.joint_vel[:, :7].abs().amax(1) <= STILL)

    # What happens to it.

    def place(self, w: World, rows: Tensor) -> None:
        """Put the cube on the floor, somewhere in front of the arm."""
        x, y, yaw = torch.split(draw_in(w, START_LOW, START_HIGH), 1, 1)
        flat = torch.zeros_like(yaw)
        lies = torch.cat([x, y, flat + HALF, (yaw / 2).cos(), flat, flat, (yaw / 2).sin()], 1)
        begin = int(w.model.joint(CUBE).qposadr[0])
        w.write("qpos", rows, lies, slice(begin, begin + 7))


def model_of(arm: Arm, folder: str | None) -> mujoco.MjSpec:
    """The arm, the cube before it, and sensors of where that is and what touches it."""
    spec = arm.scene(folder)
    body = spec.worldbody.add_body(name=CUBE, pos=[0.5, 0, HALF])
    body.add_freejoint(name=CUBE)
    body.add_geom(
        name=CUBE,
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[HALF] * 3,
        mass=MASS,
        rgba=[0.2, 0.6, 0.3, 1],
        friction=[0.8, 0.005, 0.0001],
        contype=OBJECT_BIT,
        conaffinity=FLOOR_BIT,
    )
    kind, sensor = mujoco.mjtObj.mjOBJ_BODY, mujoco.mjtSensor
    add_sensor(spec, "tool x", sensor.mjSENS_FRAMEXAXIS, mujoco.mjtObj.mjOBJ_SITE, "tool")
    add_sensor(spec, "cube", sensor.mjSENS_FRAMEPOS, kind, CUBE)
    add_sensor(spec, "cube x", sensor.mjSENS_FRAMEXAXIS, kind, CUBE)
    add_sensor(spec, "cube y", sensor.mjSENS_FRAMEYAXIS, kind, CUBE)
    for pad in PADS:
        # intprm: what is reported ("found", the number of contacts), no reduction, of one contact.
        added = spec.add_sensor(name=pad, type=sensor.mjSENS_CONTACT, objtype=mujoco.mjtObj.mjOBJ_GEOM, objname=pad)
        added.reftype, added.refname, added.intprm = mujoco.mjtObj.mjOBJ_GEOM, CUBE, [1, 0, 1]
    return spec
