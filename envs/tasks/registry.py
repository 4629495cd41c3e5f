"""Which IDs of Gymnasium have a task of ours. Importing this file does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
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


def load_task(place: str) -> type[GymnasiumTask]:
    """The task that `task_of` named."""
    module, _, name = place.partition(":")
    task: Any = getattr(importlib.import_module(f"ctrlrl.envs.tasks.{module}"), name)
    return task  # type: ignore[no-any-return]
