"""Making vector environments from what a user names or passes, and listing those there are.

Importing this file does not import torch, so that the command line answers at once; the backends are imported when an
environment is made.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym

from ctrlrl.envs.tasks.registry import ROBOT_TASKS, is_robot_task, task_of
from ctrlrl.envs.text.registry import TEXT_TASKS, is_text_task
from ctrlrl.envs.worker import EXTRAS, PixelObservation, build_env, family_of, newest_versions
from ctrlrl.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

    from ctrlrl.envs.vector import VectorEnv

BACKENDS = ("auto", "native", "native-fast", "warp", "gymnasium", "workers", "parallel")

_LONGEST_TIMEOUT = 1e9  # seconds; the operating system's clocks do not count far beyond


@dataclass(frozen=True, slots=True)
class EnvInfo:
    """One environment that `make_env` knows by name."""

    id: str
    """What to pass to `make_env`."""
    family: str
    """`mujoco`, `classic_control`, ... for Gymnasium's own, else the namespace or package that registered it."""
    installed: bool
    """Whether the package that its family needs is there."""
    native: bool = False
    """Whether there is a task of ours, which the backend `native` steps as a batch."""


def make_env(
    env: str | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]] | gym.vector.VectorEnv[Any, Any, Any] | VectorEnv,
    *,
    num_envs: int = 1,
    backend: str = "auto",
    env_kwargs: dict[str, Any] | None = None,
    env_python: str | os.PathLike[str] | None = None,
    cores: int | None = None,
    device: torch.device | str = "cpu",
    render: bool = False,
    worker_timeout: float = 60.0,
    pixels: int = 0,
    grayscale: bool = False,
) -> VectorEnv:
    """`num_envs` environments behind the vector contract.

    Args:
        env: an id (`HalfCheetah-v5`; or `module:ID`, where the module registers it, with Gymnasium or by
            `tasks.registry.register_task`), several with commas between them, which the environments play in turn (see
            `multi_task`; to render, the first alone), an environment (one only), a function that makes one, a
            `gymnasium.vector.VectorEnv`, a batch of EnvPool, ManiSkill, Isaac Lab or mjlab (see `foreign`), or a
            `VectorEnv` of ours, which is returned as it is.
        backend: `native` steps ids of which there is a task of ours (`has_native`) as one batch, on threads, with the
            same results; `native-fast` too, with contact forces that differ (see `tasks.gymnasium_mujoco`). Tasks
            of our own robots are stepped by `native` on the CPU, or by `warp` on a GPU, which auto takes where `device`
            is one.
            `gymnasium` steps one after the other in this process, `workers` in worker processes (ids only), `parallel`
            in this process and workers, a share each. `auto` takes workers where `env_python` is given, native where
            there is that, else gymnasium.
        cores: that step environments: threads of `native`, processes of `workers` and `parallel`; by default those
            there are.
        env_kwargs: arguments of `gymnasium.make`; for ids only. Of several tasks `{"tasks": [...]}`, those of each.
        env_python: interpreter that runs the environments in worker processes; it needs numpy and Gymnasium only.
        device: where the tensors lie. A `VectorEnv` of ours keeps its own.
        render: give pictures of environment 0 through `render()`; for ids (others are made with a render mode).
        worker_timeout: seconds that a step may take in a worker process; a finite number above 0.
        pixels: observe the environment's picture, scaled to so many pixels a side, in place of its state: uint8
            (pixels, pixels, 3). 0: its own observation. Objects that are passed must have `render_mode="rgb_array"`.
        grayscale: the picture without colour, (pixels, pixels).

    Closing what is returned closes the environments made here, from an id or by a function. What was passed as an
    object is left open, for the caller to close.

    Raises:
        UsageError: says what was expected, what came and what to do.
        RenderFailure: the environment could not be made since OpenGL, with which MuJoCo draws, cannot be used.
        EnvironmentFailure: the environment raised while being made.
    """
    from ctrlrl.envs.foreign import adopt
    from ctrlrl.envs.gymnasium_backend import GymnasiumVector, GymnasiumVectorAdapter
    from ctrlrl.envs.vector import VectorEnv

    if num_envs < 1:
        raise UsageError(f"num_envs must be at least 1, got {num_envs}")
    if not 0 < worker_timeout < _LONGEST_TIMEOUT:
        raise UsageError(
            f"worker_timeout must be a finite number of seconds above 0 (and below {_LONGEST_TIMEOUT:g}), "
            f"got {worker_timeout}"
        )
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.{nearest(backend, BACKENDS)}")
    if env_python is not None and backend not in ("auto", "workers"):
        raise UsageError(f"backend {backend!r} steps in this process and cannot use env_python; use 'workers'")
    if is_text_task(env):
        raise UsageError(
            f"{env} speaks text, of which a language model's tokenizer makes tensors: name the model (--language.model "
            "DIR), or call ctrlrl.language.adapter.text_environments"
        )
    if isinstance(env, str) and "," in env:
        return _make_tasks(
            env.split(","),
            num_envs,
            dict(env_kwargs or {}),
            render=render,
            backend=backend,
            env_python=env_python,
            cores=cores,
            device=device,
            worker_timeout=worker_timeout,
            pixels=pixels,
            grayscale=grayscale,
        )
    workers = backend in ("workers", "parallel") or env_python is not None
    if pixels < 0:
        raise UsageError(f"pixels must be 0 (the environment's own observation) or more, got {pixels}")
    if grayscale and not pixels:
        raise UsageError("grayscale goes with pixels: pictures of how many pixels a side?")

    if backend == "warp" and not is_robot_task(env):
        raise UsageError(f"backend 'warp' simulates tasks of ours ({', '.join(ROBOT_TASKS)}), and got {env!r}")
    native = backend in ("native", "native-fast")
    if native and not isinstance(env, str):
        raise UsageError(f"backend {backend!r} makes environments from an id, and got a {type(env).__name__}")
    if native and pixels:
        raise UsageError(f"backend {backend!r} does not observe pictures; use 'gymnasium' or 'workers' with pixels")
    if isinstance(env, str) and (env in ROBOT_TASKS or (env_python is None and is_robot_task(env))):
        from ctrlrl.envs.sim_vector import make_sim_env

        if env_python is not None or pixels:
            raise UsageError(f"{env} runs in this process and gives no pictures: leave out env_python and pixels")
        return make_sim_env(
            env,
            num_envs=num_envs,
            options=env_kwargs,
            backend=backend,
            threads=cores,
            render=render,
            device=device,
        )
    if native or (backend == "auto" and has_native(env, env_kwargs=env_kwargs, env_python=env_python, pixels=pixels)):
        from ctrlrl.envs.native import make_native

        return make_native(
            cast(str, env),
            num_envs=num_envs,
            env_kwargs=env_kwargs,
            render=render,
            threads=cores,
            exact=backend != "native-fast",
            device=device,
        )
    if isinstance(env, str):
        if workers:
            from ctrlrl.envs.workers import WorkerVector

            return WorkerVector(
                env,
                num_envs=num_envs,
                env_kwargs=env_kwargs,
                env_python=env_python,
                num_workers=cores,
                takes_part=backend == "parallel",
                device=device,
                render=render,
                pixels=pixels,
                grayscale=grayscale,
                timeout=worker_timeout,
            )
        makers = [
            functools.partial(build_env, env, env_kwargs or {}, render and row == 0, pixels, grayscale)
            for row in range(num_envs)
        ]
        return GymnasiumVector(makers, name=env, device=device)

    if workers:
        raise UsageError(
            f"worker processes make environments from an id, and got a {type(env).__name__}: register the environment "
            "in a module with gymnasium.register and pass 'module:ID', or use backend='gymnasium'"
        )
    if env_kwargs:
        raise UsageError(f"env_kwargs go with an id; make the {type(env).__name__} with these arguments instead")
    env = adopt(env, device=device) or env
    if isinstance(env, (VectorEnv, gym.vector.VectorEnv)):
        if pixels:
            raise UsageError(
                f"pixels go with an id, an environment or a function that makes one; the {type(env).__name__} passed "
                "has to give images by itself"
            )
        if env.num_envs != num_envs:
            raise UsageError(f"the vector environment passed has {env.num_envs} environments, num_envs is {num_envs}")
        return env if isinstance(env, VectorEnv) else GymnasiumVectorAdapter(env, device=device)
    if isinstance(env, gym.Env):
        if num_envs != 1:
            raise UsageError(
                f"one environment was passed and num_envs is {num_envs}: pass a function that makes one, or an id"
            )
        return GymnasiumVector([_checked(lambda: env, pixels, grayscale)], device=device, owned=False)
    if callable(env):
        return GymnasiumVector([_checked(env, pixels, grayscale)] * num_envs, device=device)
    raise UsageError(
        f"env must be an id, a gymnasium.Env, a function that makes one, or a vector environment; got {env!r}"
    )


def _make_tasks(
    ids: list[str], num_envs: int, env_kwargs: dict[str, Any], *, render: bool, backend: str, **shared: Any
) -> VectorEnv:
    """Environments that play the tasks `ids` in turn."""
    from ctrlrl.envs.multi_task import MultiTask

    arguments = env_kwargs.pop("tasks", [{}] * len(ids))
    if env_kwargs or not isinstance(arguments, list) or len(arguments) != len(ids):
        raise UsageError(
            f"{','.join(ids)} are {len(ids)} tasks: env_kwargs are {{'tasks': [...]}}, with the arguments of each, or "
            "none"
        )
    if num_envs < len(ids):
        if not render:
            raise UsageError(
                f"{','.join(ids)} are {len(ids)} tasks, which environments play in turn: make at least as many "
                f"(num_envs, eval_episodes), not {num_envs}"
            )
        num_envs = len(ids)
    made: list[VectorEnv] = []
    try:
        for k, (task, kwargs) in enumerate(zip(ids, arguments, strict=True)):
            rows = len(range(k, num_envs, len(ids)))
            how = "auto" if is_robot_task(task) and backend == "gymnasium" else backend
            filmed = render and k == 0
            made.append(make_env(task, num_envs=rows, env_kwargs=kwargs, render=filmed, backend=how, **shared))
        return MultiTask(made)
    except BaseException:
        for env in made:
            env.close()
        raise


def has_native(
    env: object, *, env_kwargs: dict[str, Any] | None = None, env_python: object = None, pixels: int = 0
) -> bool:
    """Whether `make_env` steps `env` natively where the backend is `auto`."""
    if env_python is not None or pixels or (env_kwargs or {}).get("render_mode") == "human":
        return False
    return isinstance(env, str) and not is_robot_task(env) and task_of(env) is not None


def _checked(maker: Callable[[], gym.Env[Any, Any]], pixels: int, grayscale: bool) -> Callable[[], gym.Env[Any, Any]]:
    def make() -> gym.Env[Any, Any]:
        env = cast(Any, maker())
        if not isinstance(env, gym.Env):
            raise UsageError(f"the function passed as env must return a gymnasium.Env, it returned {env!r}")
        return PixelObservation(env, pixels, grayscale) if pixels else env

    return make


def list_envs() -> list[EnvInfo]:
    """The environments that are registered, each in its newest version, by family and name; makes none of them."""
    infos = [EnvInfo(env_id, "ctrlrl", True, True) for env_id in ROBOT_TASKS]
    for env_id, task in TEXT_TASKS.items():
        infos.append(EnvInfo(env_id, "text", not task.package or _is_installed(task.package)))
    for env_id in newest_versions().values():
        spec = gym.registry[env_id]
        if not isinstance(spec.entry_point, str):
            continue  # what Gymnasium has given up raises when called; a user's own class is known to the user
        family = family_of(spec.entry_point)
        if family is None:
            package = spec.entry_point.partition(":")[0].partition(".")[0]
            infos.append(EnvInfo(env_id, spec.namespace or package, _is_installed(package)))
        else:
            installed = _is_installed(EXTRAS[family][0]) if family in EXTRAS else True
            infos.append(EnvInfo(env_id, family, installed, has_native(env_id)))
    return sorted(infos, key=lambda info: (info.family, info.id))


@functools.cache
def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
