"""Which tasks there are: our own, and those of IDs of Gymnasium. Importing this file does not import torch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from ctrlrl.errors import UsageError, nearest

if TYPE_CHECKING:
    from ctrlrl.envs.spec import SimTask
    from ctrlrl.envs.tasks.twin import GymnasiumTask

_MUJOCO = "gymnasium.envs.mujoco."
_CLASSIC = "gymnasium.envs.classic_control."
_TASKS = {
    _MUJOCO + "ant_v5:AntEnv": "gymnasium_mujoco:Ant",
    _MUJOCO + "half_cheetah_v5:HalfCheetahEnv": "gymnasium_mujoco:HalfCheetah",
    _MUJOCO + "hopper_v5:HopperEnv": "gymnasium_mujoco:Hopper",
    _MUJOCO + "humanoid_v5:HumanoidEnv": "gymnasium_mujoco:Humanoid",
    _MUJOCO + "humanoidstandup_v5:HumanoidStandupEnv": "gymnasium_mujoco:HumanoidStandup",
    _MUJOCO + "inverted_double_pendulum_v5:InvertedDoublePendulumEnv": "gymnasium_mujoco:InvertedDoublePendulum",
    _MUJOCO + "inverted_pendulum_v5:InvertedPendulumEnv": "gymnasium_mujoco:InvertedPendulum",
    _MUJOCO + "pusher_v5:PusherEnv": "gymnasium_mujoco:Pusher",
    _MUJOCO + "reacher_v5:ReacherEnv": "gymnasium_mujoco:Reacher",
    _MUJOCO + "swimmer_v5:SwimmerEnv": "gymnasium_mujoco:Swimmer",
    _MUJOCO + "walker2d_v5:Walker2dEnv": "gymnasium_mujoco:Walker2d",
    _CLASSIC + "acrobot:AcrobotEnv": "classic_control:Acrobot",
    _CLASSIC + "cartpole:CartPoleEnv": "classic_control:CartPole",
    _CLASSIC + "continuous_mountain_car:Continuous_MountainCarEnv": "classic_control:MountainCarContinuous",
    _CLASSIC + "mountain_car:MountainCarEnv": "classic_control:MountainCar",
    _CLASSIC + "pendulum:PendulumEnv": "classic_control:Pendulum",
}
"""By the entry point under which Gymnasium registers the environment: the file of this folder, and the class in it."""
ROBOT_TASKS = {
    "Go1VelocityFlat-v0": ("velocity:velocity", {"robot": "go1"}),
    "Go2VelocityFlat-v0": ("velocity:velocity", {"robot": "go2"}),
    "PandaReach-v0": ("panda_reach:panda_reach", {}),
    "PandaLift-v0": ("panda_lift:panda_lift", {}),
}
"""Our own, by ID: the file of this folder, the function in it that makes the `SimTask`, and its arguments."""


def task_of(env_id: str) -> str | None:
    """What `load_task` loads for an ID (`ID` or `module:ID`), or None where there is nothing."""
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception:  # whoever makes the environment says what is wrong
            return None
    spec = gym.registry.get(name)
    if spec is None or spec.additional_wrappers or not isinstance(spec.entry_point, str):
        return None
    return _TASKS.get(spec.entry_point)


def make_robot_task(env_id: str, options: Mapping[str, Any]) -> SimTask:
    """The task `env_id` of `ROBOT_TASKS`.

    Args:
        env_id: its ID.
        options: further arguments of its function, from the user.

    Raises:
        UsageError: there is no such option.
    """
    place, own = ROBOT_TASKS[env_id]
    module, _, name = place.partition(":")
    make = getattr(importlib.import_module(f"ctrlrl.envs.tasks.{module}"), name)
    known = [key for key in inspect.signature(make).parameters if key not in ("name", *own)]
    for key in options:
        if key not in known:
            raise UsageError(f"{env_id} has no option {key!r}.{nearest(key, known)} It has: {', '.join(known)}")
    task: SimTask = make(name=env_id, **own, **options)
    return task


def load_task(place: str) -> type[GymnasiumTask]:
    """The task that `task_of` named."""
    module, _, name = place.partition(":")
    task: Any = getattr(importlib.import_module(f"ctrlrl.envs.tasks.{module}"), name)
    return task  # type: ignore[no-any-return]
