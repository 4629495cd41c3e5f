"""Gymnasium environments stepped in this process: `GymnasiumVector`, and `GymnasiumVectorAdapter` for vector ones."""

from __future__ import annotations

import contextlib
import sys
import traceback
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ctrlrl.envs.actions import ActionBuffer
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.tasks.registry import ROBOT_TASKS
from ctrlrl.envs.vector import EnvState, RenderFailure, Step, VectorEnv, derive_seeds, require_as_many, seed_per_env
from ctrlrl.envs.worker import (
    EnvironmentRaised,
    Host,
    Refused,
    Slot,
    Undrawn,
    control_dt,
    describe,
    describe_action_space,
    describe_observation_space,
    draw,
    flatten_dict_space,
    layout,
    map_arrays,
    name_and_message,
    opengl_failure,
    place,
)
from ctrlrl.errors import CtrlrlError, EnvironmentFailure, UsageError, nearest
from ctrlrl.tree import Obs, map_obs, obs_to

if TYPE_CHECKING:
    import mujoco

Array = np.ndarray[Any, Any]
T = TypeVar("T")


def usage_error(refused: Refused) -> UsageError:
    """What the user is told of a `Refused`: its message, and the names that are near."""
    return UsageError(str(refused) + (nearest(refused.word, [*refused.known, *ROBOT_TASKS]) if refused.word else ""))


def made_without_opengl(name: str, text: str, cause: str) -> RenderFailure:
    """The failure to make environments `name` for want of OpenGL; `text` is the traceback, `cause` what was raised."""
    return RenderFailure(
        f"{name} cannot be made: it looks for OpenGL, and that failed with {cause}. MUJOCO_GL says what MuJoCo looks "
        "for: egl, glfw or osmesa, whichever is installed, or disable where nothing is drawn.\n" + text,
        cause,
    )


def raise_unmade(name: str, error: BaseException) -> NoReturn:
    """Raise what the user is told where making environments `name` raised `error`; to be called while it is handled."""
    if isinstance(error, Refused):
        raise usage_error(error) from error
    if isinstance(error, CtrlrlError) or not isinstance(error, Exception):
        raise error
    failed = opengl_failure(error)
    if failed is not None:
        raise made_without_opengl(name, traceback.format_exc(), name_and_message(failed)) from error
    raise EnvironmentFailure(f"{name} cannot be made:\n{traceback.format_exc()}") from error


def picture(
    name: str, renders: bool, render: Callable[[], np.ndarray[Any, np.dtype[np.uint8]]]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture (H, W, 3) of `render`, which raises as `draw` does; `renders`: whether made to give pictures."""
    if not renders:
        raise UsageError(f"{name} was made without pictures; make it with render=True")
    try:
        return render()
    except Refused as error:
        raise usage_error(error) from error
    except Undrawn as error:
        raise undrawable(name, str(error), error.cause) from error.__cause__


def undrawable(name: str, text: str, cause: str) -> RenderFailure:
    """The failure to draw environment 0; `text` is the traceback, `cause` what was raised."""
    return RenderFailure(f"{name}: environment 0 cannot be drawn:\n{text}", cause)


class HostedVector(VectorEnv):
    """What the backends share that step single environments through `worker.Host`: buffers, seeds, failures.

    The tensors are views of the arrays that the hosts write to, allocated once; on another device than the CPU, copies.
    """

    def __init__(
        self,
        name: str,
        description: dict[str, Any],
        arrays: dict[str, Array],
        num_envs: int,
        device: torch.device | str,
    ) -> None:
        self.name = name
        self.num_envs = num_envs
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self.observation_space = build_space(description["observation"])
        self.action_space = build_space(description["action"])
        self.control_dt = description["control_dt"]
        self._action = ActionBuffer(self.action_space, arrays["action"])
        self._tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        self._success = arrays["success"]
        self._knows_success = False
        self._valid = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self._failure: EnvironmentFailure | None = None

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        self._require_health()
        self._reset(seed_per_env(seed, self.num_envs))
        return self._observation("obs/")

    def step(self, action: Tensor) -> Step:
        self._require_health()
        self._action.write(action)
        self._step()
        self._knows_success = self._knows_success or not np.isnan(np.fmin.reduce(self._success))
        return Step(
            obs=self._observation("obs/"),
            action=self._on_device("action"),
            reward=self._on_device("reward"),
            terminated=self._on_device("terminated"),
            truncated=self._on_device("truncated"),
            final_obs=self._observation("final/"),
            valid=self._valid,
            log={"success": self._on_device("success")} if self._knows_success else {},
        )

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        self._require_health()
        require_as_many(self, state)
        reasons = self._set_state(state, derive_seeds(seed, self.num_envs))
        return self._observation("obs/"), reasons

    @abstractmethod
    def _reset(self, seeds: list[int | None]) -> None: ...

    @abstractmethod
    def _step(self) -> None: ...

    @abstractmethod
    def _set_state(self, state: EnvState, seeds: list[int]) -> list[str | None]: ...

    def _observation(self, kind: str) -> Obs:
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {name: self._on_device(kind + name) for name in self.observation_space.spaces}
        return self._on_device(kind)

    def _on_device(self, key: str) -> Tensor:
        return self._tensors[key] if self._on_cpu else self._tensors[key].to(self.device)

    def _fail(self, failure: EnvironmentFailure, cause: BaseException | None = None) -> NoReturn:
        """Raise `failure` now and at every further step: what the environments hold is no longer of one moment."""
        self._failure = failure
        raise failure from cause

    def _require_health(self) -> None:
        if self._failure is not None:
            raise EnvironmentFailure(f"{self.name} has failed before and must be made anew. {self._failure}")


class GymnasiumVector(HostedVector):
    """N Gymnasium environments, stepped one after the other in this process.

    Rewards are float32; observations and Box actions keep their dtype; `log["success"]` is float32. Observations and
    rewards are passed on as they are, finite or not.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], gym.Env[Any, Any]]],
        *,
        name: str | None = None,
        device: torch.device | str = "cpu",
        owned: bool = True,
    ) -> None:
        """Make the environments, one from each of `makers`.

        Args:
            owned: whether `close` closes the environments; those that the user made are the user's to close.

        Raises:
            UsageError: an environment cannot be made or has spaces that are not supported.
            RenderFailure: making an environment failed since OpenGL cannot be used.
            EnvironmentFailure: making an environment raised something else.
        """
        envs: list[gym.Env[Any, Any]] = []
        try:
            for maker in makers:
                envs.append(maker())
            name = name or (envs[0].spec.id if envs[0].spec is not None else type(envs[0].unwrapped).__name__)
            slots = [Slot(env, name) for env in envs]
            description = describe(slots, name)
        except BaseException as error:
            if owned:
                for env in envs:
                    with contextlib.suppress(Exception):  # `error` matters more
                        env.close()
            raise_unmade(name or "the environment", error)
        arrays = layout(description, len(slots))
        buffers = map_arrays(arrays, bytearray(place(arrays)[1]))
        super().__init__(name, description, buffers, len(slots), device)
        self._host = Host(slots, buffers)
        self._renders = slots[0].env.render_mode == "rgb_array"
        self._to_close = owned

    def get_state(self) -> EnvState:
        states = self._host.get_state()
        return EnvState([json for json, _ in states], [arrays for _, arrays in states])

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return picture(self.name, self._renders, self._host.render)

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        own = self._host.rows[row][1].env.unwrapped
        model, data = getattr(own, "model", None), getattr(own, "data", None)
        library = sys.modules.get("mujoco")  # where it was not imported, nothing is of it
        if library is None or not isinstance(model, library.MjModel) or not isinstance(data, library.MjData):
            return super().scene(row)
        return model, data

    def close(self) -> None:
        if self._to_close:
            self._to_close = False
            self._host.close()

    def _reset(self, seeds: list[int | None]) -> None:
        self._guarded(lambda: self._host.reset(seeds))

    def _step(self) -> None:
        self._guarded(self._host.step)

    def _set_state(self, state: EnvState, seeds: list[int]) -> list[str | None]:
        pairs = list(zip(state.json, state.arrays, strict=True))
        return self._guarded(lambda: self._host.set_state(pairs, seeds))

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Refused as error:
            raise usage_error(error) from error
        except EnvironmentRaised as error:
            self._fail(EnvironmentFailure(f"{self.name}: environment {error.row} raised:\n{error}"), error.__cause__)


class GymnasiumVectorAdapter(VectorEnv):
    """A `gymnasium.vector.VectorEnv` that the user made, with any of Gymnasium's three autoreset modes.

    - `NEXT_STEP`: after an end, `obs` is the terminal observation; whatever is done there is ignored, and the row of
      the next step, which only resets, has `valid` False, reward zero and no flags (`may_be_invalid` is True).
    - `SAME_STEP`: the true next observation is taken from `info["final_obs"]`.
    - `DISABLED`: rows that ended are reset here, with `options={"reset_mask": ...}`.

    Its state cannot be saved, and closing it is left to the user who made it.
    """

    def __init__(
        self, env: gym.vector.VectorEnv[Any, Any, Any], *, name: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Wrap `env`; raises UsageError for spaces that are not supported and where the autoreset mode is not said."""
        # EnvPool's specifications have no ID.
        self.name = name or getattr(env.spec, "id", None) or type(env.unwrapped).__name__
        self.num_envs = env.num_envs
        self.device = torch.device(device)
        self._env = env
        try:
            self._mode = AutoresetMode((env.metadata or {}).get("autoreset_mode"))
        except ValueError as error:
            raise UsageError(
                f"{self.name}: the vector environment does not say how it resets environments that end. Set its "
                'metadata["autoreset_mode"] to the member of gymnasium.vector.AutoresetMode that it keeps to.'
            ) from error
        self.may_be_invalid = self._mode is AutoresetMode.NEXT_STEP
        try:
            self.observation_space = build_space(describe_observation_space(env.single_observation_space, self.name))
            self.action_space = build_space(describe_action_space(env.single_action_space, self.name))
        except Refused as error:
            raise usage_error(error) from error
        self.control_dt = control_dt(env)
        self._paths = list(flatten_dict_space(env.single_observation_space))
        shape = (self.num_envs, *(self.action_space.shape or ()))
        self._action = ActionBuffer(self.action_space, np.zeros(shape, self.action_space.dtype))
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._knows_success = False

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        seeds: Any = None if seed is None else seed_per_env(seed, self.num_envs)
        if seed is not None and not isinstance(
            self._env.unwrapped, (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv)
        ):
            # Gymnasium's contract gives other vector environments one number, from which they seed their rows.
            if not isinstance(seed, (int, np.integer)):
                raise UsageError(f"{self.name}: this vector environment takes one seed, not one per environment")
            seeds = int(seed)
        self._ended[:] = False
        return obs_to(self._read(self._env.reset(seed=seeds)[0]), self.device)

    def step(self, action: Tensor) -> Step:
        self._action.write(action)
        raw, reward, terminated, truncated, info = self._env.step(self._action.array.copy())
        terminated, truncated = np.array(terminated, np.bool_), np.array(truncated, np.bool_)
        reward, obs = np.array(reward, np.float32), self._read(raw)
        valid = np.ones(self.num_envs, np.bool_)
        if self._mode is AutoresetMode.NEXT_STEP:
            valid &= ~self._ended
            reward[~valid] = 0.0
            terminated &= valid
            truncated &= valid
        success = self._read_success(info)
        success[~valid] = np.nan
        self._ended = terminated | truncated
        final_obs = map_obs(torch.clone, obs)
        if self._ended.any():
            if self._mode is AutoresetMode.SAME_STEP:
                self._write_final(final_obs, info["final_obs"])
            elif self._mode is AutoresetMode.DISABLED:
                obs = self._read(self._env.reset(options={"reset_mask": self._ended.copy()})[0])
        self._knows_success = self._knows_success or not np.isnan(success).all()
        return Step(
            obs=obs_to(obs, self.device),
            action=self._action.tensor.to(self.device, copy=True),
            reward=self._tensor(reward),
            terminated=self._tensor(terminated),
            truncated=self._tensor(truncated),
            final_obs=obs_to(final_obs, self.device),
            valid=self._tensor(valid),
            log={"success": self._tensor(success)} if self._knows_success else {},
        )

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._env.render_mode != "rgb_array":
            raise UsageError(f"{self.name} was made without pictures; make it with render_mode='rgb_array'")
        try:
            return draw(lambda: _first_picture(self._env.render()))
        except Refused as error:
            raise usage_error(error) from error
        except Undrawn as error:
            raise undrawable(self.name, str(error), error.cause) from error.__cause__

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _read(self, raw: Any) -> Obs:
        """A batch of observations as Gymnasium gives it, as our own copy (CPU)."""
        if not isinstance(self.observation_space, gym.spaces.Dict):
            return torch.from_numpy(np.array(raw, self.observation_space.dtype))
        return {
            ".".join(path): torch.from_numpy(np.array(at_path(raw, path), self.observation_space[".".join(path)].dtype))
            for path in self._paths
        }

    def _write_final(self, final_obs: Obs, finals: Any) -> None:
        """Put the rows that ended, from Gymnasium's array of objects, into `final_obs`."""
        for row in np.flatnonzero(self._ended):
            for path in self._paths:
                target = final_obs[".".join(path)] if isinstance(final_obs, dict) else final_obs
                target.numpy()[row] = at_path(finals[row], path)

    def _read_success(self, info: dict[str, Any]) -> Array:
        """(N,) float32: what each environment said of its success, NaN where it said nothing."""
        success = np.full(self.num_envs, np.nan, np.float32)
        # An environment that was reset within the step says what it has to say in `final_info`.
        for source in (info, info.get("final_info", {})):
            for key in ("success", "is_success"):
                if isinstance(source, dict) and key in source:
                    said = np.asarray(source.get(f"_{key}", np.ones(self.num_envs, np.bool_)))
                    success[said] = np.asarray(source[key], np.float32)[said]
        return success


def _first_picture(pictures: Any) -> Any:
    if pictures is None:
        raise ValueError("the vector environment gave no pictures")
    return pictures[0]


def at_path(value: Any, path: tuple[str, ...]) -> Any:
    """The entry of nested dicts that `path` leads to; `value` itself for `()`."""
    for key in path:
        value = value[key]
    return value
