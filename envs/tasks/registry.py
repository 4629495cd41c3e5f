"""Which tasks there are: our own, and those of IDs of Gymnasium. Importing this file does not import torch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from ctrlrl.errors import UsageError, nearest

if TYPE_CHECKING:
    from ctrlrl.envs.spec import SimTask
    from ctrlrl.envs.tasks.twin import GymnasiumTask

_MUJOCO = "gymnasium.envs.mujoco."
_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
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
ROBOT_TASKS: dict[str, tuple[str | Callable[..., SimTask], dict[str, Any]]] = {
    "Go1VelocityFlat-v0": ("velocity:velocity", {"robot": "go1"}),
    "Go2VelocityFlat-v0": ("velocity:velocity", {"robot": "go2"}),
    "PandaReach-v0": ("panda_reach:panda_reach", {}),
    "PandaLift-v0": ("panda_lift:panda_lift", {}),
    "CartPoleSwingUp-v0": ("swing_up:cartpole", {}),
    "PendulumSwingUp-v0": ("swing_up:pendulum", {}),
}
"""Our own, by ID: the file of this folder and the function in it that makes the `SimTask`, and arguments for it. What
`register_task` adds has the function itself."""


def register_task(env_id: str, function: Callable[..., SimTask]) -> None:
    """Make a task known by an ID: `make_env("module:ID")` imports the module that calls this, and finds it.

    Args:
        env_id: such as `Lever-v0`.
        function: makes the task, from its `name` and options of the user, which have default values.

    Raises:
        UsageError: the ID is taken, or is none; the function takes no `name`, or needs more.
    """
    if not env_id or ":" in env_id:
        raise UsageError(f"a task's ID has no colon, the module comes before one: got {env_id!r}")
    parameters = inspect.signature(function).parameters
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if needed != ["name"]:
        raise UsageError(
            f"the function that makes {env_id} must take name, and options with default values; without one are: "
            f"{', '.join(needed) or 'none'}"
        )
    known, _ = ROBOT_TASKS.get(env_id, (None, None))
    # A module that is loaded anew registers what it has registered.
    again = callable(known) and (known.__module__, known.__qualname__) == (function.__module__, function.__qualname__)
    if env_id in gym.registry or (known is not None and not again):
        raise UsageError(f"there is an environment {env_id} already; give the task another ID")
    ROBOT_TASKS[env_id] = function, {}


def is_robot_task(env: object) -> bool:
    """Whether `env` is the ID of a task of `ROBOT_TASKS`: `ID`, or `module:ID`, whose module is imported."""
    if not isinstance(env, str):
        return False
    module, _, name = env.rpartition(":")
    return _imports(module) and name in ROBOT_TASKS


def _imports(module: str) -> bool:
    """Import what comes before the colon of an ID; where that fails, whoever makes the environment says what is
    wrong."""
    try:
        return not module or bool(importlib.import_module(module))
    except Exception:
        return False


def task_of(env_id: str) -> str | None:
    """What `load_task` loads for an ID (`ID` or `module:ID`), or None where there is nothing."""
    module, _, name = env_id.rpartition(":")
    spec = gym.registry.get(name) if _imports(module) else None
    if spec is None or spec.additional_wrappers or not isinstance(spec.entry_point, str):
        return None
    return _TASKS.get(spec.entry_point)


def make_robot_task(env_id: str, options: Mapping[str, Any]) -> SimTask:
    """The task that `is_robot_task` knows.

    Args:
        env_id: its ID, or `module:ID`.
        options: further arguments of its function, from the user.

    Raises:
        UsageError: there is no such option, or its value is of another kind than the default one.
    """
    make, own = ROBOT_TASKS[env_id.rpartition(":")[2]]
    if isinstance(make, str):
        module, _, function = make.partition(":")
        make = getattr(importlib.import_module(f"ctrlrl.envs.tasks.{module}"), function)
    parameters = inspect.signature(make).parameters
    known = {key: p.default for key, p in parameters.items() if key not in ("name", *own)}
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"{env_id} has no option {key!r}.{nearest(key, known)} It has: {', '.join(known)}")
        kind = type(known[key])
        fits = type(value) is kind or (kind is float and type(value) is int)
        if known[key] is not None and not fits:
            raise UsageError(f"{env_id}: option {key} takes {_KINDS.get(kind, kind.__name__)}, got {value!r}")
    task: SimTask = make(name=env_id, **own, **options)
    return task


def load_task(place: str) -> type[GymnasiumTask]:
    """The task that `task_of` named."""
    module, _, name = place.partition(":")
    task: Any = getattr(importlib.import_module(f"ctrlrl.envs.tasks.{module}"), name)
    return task  # type: ignore[no-any-return]
