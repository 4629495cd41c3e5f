"""The Panda brings its tool to a point in front of it, and if asked turns it.

Command: where the tool's frame, between the fingertips, is to be, drawn for each episode. Action: seven numbers, each
of which moves the target of a joint on by up to 0.05 rad; the gripper stays open. Workspace, terms and weights are
those of Isaac Lab's reach task, but that the penalties do not grow and the goal stays for the episode.
"""

from __future__ import annotations

import math

import mujoco
import torch
from torch import Tensor

from ctrlrl.envs.spec import Command, Goals, Measure, Obs, Reward, SimTask
from ctrlrl.envs.tasks.panda import (
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
from ctrlrl.errors import UsageError

GOAL = ("x, m", "y, m", "z, m")
LOW, HIGH = (0.35, -0.2, 0.15), (0.65, 0.2, 0.5)  # m, corners of the box in which goals lie
TURN = math.pi / 2  # rad, largest; a gripper with two equal fingers needs no more
ANGLE = 0.2  # rad, within which an orientation is reached
AXES = {
    "tool x": mujoco.mjtSensor.mjSENS_FRAMEXAXIS,
    "tool y": mujoco.mjtSensor.mjSENS_FRAMEYAXIS,
    "tool z": mujoco.mjtSensor.mjSENS_FRAMEZAXIS,
}


def panda_reach(
    name: str,
    *,
    reward: str = "dense",
    action: str = "joints",
    rate: int = RATE,
    orientation: bool = False,
    randomize: bool = True,
    folder: str | None = None,
) -> SimTask:
    """The task.

    Args:
        name: what a user types to get it.
        reward: `dense`; `sparse`: `panda.sparse_reward`, 0 at the goal and -1 elsewhere; or `success`: 1 where the goal
            is reached, which ends the episode, 0 before.
        orientation: the tool is to point down and be turned, too.
        action: `joints`, or `tool`: it points down, and entries move its target by up to 2 cm along x, y and z and turn
            it by up to 0.1 rad about z.
        rate: of actions a second, one of `panda.RATES`. At other rates than 25 they last longer or shorter, and move
            things as fast: at 10, the tool by up to 5 cm.
        randomize: gains differ from robot to robot, and measurements are noisy.
        folder: of the robot's model; see `Robot.find`.

    Raises:
        UsageError: there is no such reward, action or rate, or the sparse one is asked to know of orientations.
    """
    require_reward(name, reward)
    require_action(name, action)
    require_rate(name, rate)
    if orientation and reward == "sparse":
        raise UsageError(f"{name}: the sparse reward is of positions alone; leave out orientation, or take dense")
    arm, terms = Arm(gripper=False, action=action, rate=rate), Terms()
    noise = 0.01 if randomize else 0.0
    rewards = {
        "distance": Reward(terms.distance, -0.2),
        "near": Reward(lambda w: 1 - torch.tanh(terms.distance(w) / 0.1), 0.1),
        "action rate": Reward(arm.action_rate, -1e-4),
        "joint speed": Reward(arm.joint_speed, -1e-4),
    }
    if orientation:
        rewards["angle"] = Reward(terms.angle, -0.1)
    if reward == "sparse":
        rewards = {"reached": Reward(lambda w: sparse_reward(arm.tool(w), w.command), 1.0)}
    there = terms.turned if orientation else terms.reached
    if reward == "success":
        rewards = {"success": Reward(there, 1.0)}
    observations = {
        "achieved goal": Obs(arm.tool, measure=Measure("tool position", "m", "base")),
        "desired goal": Obs(lambda w: w.command[:, :3], measure=Measure("command", select=(0, 1, 2))),
    } | arm.observed(noise, 7)
    if orientation:
        turn = Obs(lambda w: w.command[:, 3:], measure=Measure("command", select=(3, 4)))
        observations |= {"turn": turn, "tool axes": Obs(terms.axes, measure=Measure("given"))}
    return SimTask(
        name=name,
        model=model_of(arm, folder, orientation),
        timestep=TIMESTEP,
        substeps=arm.substeps,
        episode_seconds=4.0,
        joints=arm.joints,
        pose=arm.pose,
        robot=arm.robot,
        action=arm.action,
        goals=Goals("achieved goal", "desired goal", sparse_reward) if reward == "sparse" else None,
        observations={"policy": observations},
        rewards=rewards,
        terminations={"at the goal": lambda w: there(w) > 0} if reward == "success" else {},
        track=arm.track,
        metrics={"distance": terms.distance},
        outcomes={
            "success": there,
            "final distance": terms.distance,
        },
        command=Command(5, terms.draw_pose, names=(*GOAL, "sine of the turn", "cosine of the turn"))
        if orientation
        else Command(3, lambda w: draw_in(w, LOW, HIGH), names=GOAL),
        events=arm.events(randomize),
    )


class Terms:
    """What is special to this task."""

    def distance(self, w: World) -> Tensor:
        """(N,) m, from the tool to the goal."""
        return norm(w.sensor("tool") - w.command[:, :3])

    def axes(self, w: World) -> Tensor:
        """(N, 6) directions of the tool's x axis and, to where it points, z axis."""
        return torch.cat([w.sensor("tool x"), w.sensor("tool z")], 1)

    def angle(self, w: World) -> Tensor:
        """(N,) rad, of the rotation from the tool's orientation to the goal's."""
        sine, cosine = w.command[:, 3], w.command[:, 4]
        along_x = w.sensor("tool x")[:, 1] * cosine - w.sensor("tool x")[:, 0] * sine
        along_y = w.sensor("tool y")[:, 0] * cosine + w.sensor("tool y")[:, 1] * sine
        trace = along_x + along_y - w.sensor("tool z")[:, 2]
        return torch.acos(((trace - 1) / 2).clamp(-1.0, 1.0))

    def reached(self, w: World) -> Tensor:
        """(N,) 1 where the tool is at the goal."""
        return (self.distance(w) <= TOLERANCE).float()

    def turned(self, w: World) -> Tensor:
        """(N,) 1 where it is at the goal, and turned as it should be."""
        return self.reached(w) * (self.angle(w) <= ANGLE)

    def draw_pose(self, w: World) -> Tensor:
        """(N, 5) a position, and sine and cosine of the tool's turn about the vertical, counterclockwise from above.

        Unturned, its x axis points along the world's y and its fingers close along the world's x.
        """
        turn = w.random.uniform(1, -TURN, TURN)
        return torch.cat([draw_in(w, LOW, HIGH), turn.sin(), turn.cos()], 1)


def model_of(arm: Arm, folder: str | None, orientation: bool) -> mujoco.MjSpec:
    """The arm on a floor, with the tool's axes if they are asked for."""
    spec = arm.scene(folder)
    for name, axis in AXES.items() if orientation else ():
        add_sensor(spec, name, axis, mujoco.mjtObj.mjOBJ_SITE, "tool")
    return spec
