"""A small task over a simulation: a cart on a rail is told where to go. Every kind of term occurs."""

from __future__ import annotations

from typing import Any

import mujoco
import torch
from torch import Tensor

from ctrlrl.envs import events
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.spec import Action, Command, Event, Obs, Reward, SimTask
from ctrlrl.envs.world import World
from ctrlrl.mirror import Mirror, Reflection

CART = """
<mujoco>
  <option timestep="0.01" integrator="implicitfast"/>
  <worldbody>
    <body name="cart">
      <joint name="rail" type="slide" axis="1 0 0" range="-2 2"/>
      <geom name="box" type="box" size=".1 .1 .1" mass="1"/>
      <body name="pole" pos="0 0 .1">
        <joint name="hinge" axis="0 1 0" damping=".01"/>
        <geom name="rod" type="capsule" fromto="0 0 0 0 0 .4" size=".02" mass=".1"/>
      </body>
    </body>
  </worldbody>
  <actuator><position name="rail" joint="rail" kp="20" kv="4" ctrlrange="-2 2" forcerange="-50 50"/></actuator>
  <sensor><jointpos name="place" joint="rail"/><jointvel name="speed" joint="rail"/></sensor>
</mujoco>
"""


def place(w: World) -> Tensor:
    return w.sensor("place")


def distance(w: World) -> Tensor:
    return (place(w)[:, 0] - w.command[:, 0]).abs()


def track(w: World) -> None:
    w.memory("travelled", 1).add_(w.sensor("speed").abs() * w.dt)
    w.memory("lifetime", 1, keep=True).add_(1)


def cart_task(**changes: Any) -> SimTask:
    """The task, with what `changes` say."""
    standard: dict[str, Any] = {
        "name": "Cart-v0",
        "model": mujoco.MjSpec.from_string(CART),
        "timestep": 0.01,
        "substeps": 2,
        "episode_seconds": 0.6,
        "joints": ["rail"],
        "pose": {"hinge": (0.2,)},
        "action": Action(["rail"], lambda w, action: w.control(action), delay=(0, 2)),
        "observations": {
            "policy": {
                "place": Obs(place, noise=0.01, history=3),
                "speed": Obs(lambda w: w.sensor("speed"), noise=0.1, delay=(0, 2)),
                "goal": Obs(lambda w: w.command),
            },
            "privileged": {"joints": Obs(lambda w: w.field("qpos")), "mass": Obs(masses)},
        },
        "rewards": {
            "near": Reward(lambda w: torch.exp(-distance(w)), 1.0),
            "effort": Reward(lambda w: w.action.square().sum(1), -0.1, ramp=(-0.5, 40)),
        },
        "terminations": {"far": lambda w: place(w)[:, 0].abs() > 0.9},
        "track": track,
        "metrics": {"distance": distance},
        "outcomes": {
            "success": lambda w: (distance(w) < 0.2).float(),
            "travelled": lambda w: w.memory("travelled", 1)[:, 0],
        },
        "command": Command(1, lambda w: w.random.uniform(1, -1.0, 1.0), every=(0.1, 0.3)),
        "events": {
            "mass": Event("startup", events.mass("cart", (0.5, 2.0))),
            "start": Event("reset", events.joint_offsets((-0.1, 0.1))),
            "push": Event("interval", push, every=(0.05, 0.2)),
        },
    }
    return SimTask(**(standard | changes))


def masses(w: World) -> Tensor:
    return w.model_field("body_mass")[0][:, 1:2].float()


def push(w: World, rows: Tensor) -> None:
    w.write("qvel", rows, w.live("qvel") + w.random.uniform(2, -1.0, 1.0))


def make_cart(num_envs: int, **changes: Any) -> SimVector:
    """N of them on the CPU."""
    task = cart_task(**changes)
    return SimVector(task, BatchSim(task.model.compile(), num_envs))


def cart_mirror() -> Mirror:
    """Of the task above: everything points along the rail."""
    return Mirror(
        {"policy": Reflection.signs(*[-1] * 5), "privileged": Reflection.signs(-1, -1, 1)}, Reflection.signs(-1)
    )
