"""Tasks as a vector environment: N rows stepped together in this process, without an object for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.actions import ActionBuffer
from ctrlrl.envs.gymnasium_backend import picture, raise_unmade
from ctrlrl.envs.tasks.registry import load_task, task_of
from ctrlrl.envs.tasks.task import Array, RowRandom, Task
from ctrlrl.envs.vector import EnvState, Step, VectorEnv, derive_seeds, require_as_many, seed_per_env
from ctrlrl.envs.worker import build_env, draw
from ctrlrl.errors import EnvironmentFailure, UsageError
from ctrlrl.tree import Obs

if TYPE_CHECKING:
    import mujoco

T = TypeVar("T")

_METHOD = "native"


class NativeVector(VectorEnv):
    """A task behind the vector contract.

    An episode ends where the task terminates it, or after `max_episode_steps`. A row whose simulation diverged is no
    transition (`valid` is False) and starts a new episode.
    """

    def __init__(self, task: Task, device: torch.device | str = "cpu") -> None:
        """`device`: where the tensors given lie; those of the task are moved there."""
        self.task = task
        self.name, self.num_envs, self.device = task.name, task.num_envs, torch.device(device)
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self.control_dt, self.may_be_invalid = task.control_dt, task.may_diverge
        shape = (self.num_envs, *(self.action_space.shape or ()))
        self._action = ActionBuffer(self.action_space, np.zeros(shape, self.action_space.dtype))
        self._random = RowRandom(self.num_envs)
        self._on_cpu = self.device.type == "cpu"
        self._elapsed = np.zeros(self.num_envs, np.int64)
        self._limit = task.max_episode_steps
        self._begun = False
        self._failure: EnvironmentFailure | None = None

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        for row, own in enumerate(seed_per_env(seed, self.num_envs)):
            if own is not None:
                self._random.seed(row, own)
        self._begin(np.ones(self.num_envs, np.bool_))
        return self._tensor(self.task.observe())

    def step(self, action: Tensor) -> Step:
        if not self._begun:
            raise UsageError(f"{self.name}: call reset before step")
        self._action.write(action)
        self._require_choices(self._action.array)
        outcome = self._guarded(lambda: self.task.step(self._action.array))
        self._elapsed += 1
        reward, terminated, log = outcome.reward.astype(np.float32), outcome.terminated, outcome.log
        truncated = np.zeros_like(terminated) if self._limit is None else self._elapsed >= self._limit
        valid, over = np.ones_like(terminated), terminated | truncated
        if outcome.diverged is not None:
            valid = ~outcome.diverged
            reward, terminated, truncated = (
                np.where(valid, reward, np.float32(0)),
                terminated & valid,
                truncated & valid,
            )
            log = {name: np.where(valid, value, np.nan) for name, value in log.items()}
            over |= outcome.diverged
        obs = final_obs = self.task.observe()
        if over.any():
            self._begin(over)
            obs = self.task.observe()
            if outcome.diverged is not None:  # nothing that was seen of it is to be relied on
                final_obs[outcome.diverged] = obs[outcome.diverged]
        seen = self._tensor(obs)
        return Step(
            obs=seen,
            action=self._tensor(self._action.array),
            reward=self._tensor(reward),
            terminated=self._tensor(terminated),
            truncated=self._tensor(truncated),
            final_obs=seen if final_obs is obs else self._tensor(final_obs),
            valid=self._tensor(valid),
            log={name: self._tensor(value) for name, value in log.items()},
        )

    def get_state(self) -> EnvState:
        if not self._begun:
            return super().get_state()
        state = self.task.get_state()
        json: list[dict[str, Any] | None] = [
            {"method": _METHOD, "elapsed": int(elapsed), "generator": generator.bit_generator.state}
            for elapsed, generator in zip(self._elapsed, self._random.generators, strict=True)
        ]
        arrays = [{name: value[row].copy() for name, value in state.items()} for row in range(self.num_envs)]
        return EnvState(json, arrays)

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        require_as_many(self, state)
        self.reset(derive_seeds(seed, self.num_envs))
        now = {name: value.copy() for name, value in self.task.get_state().items()}
        reasons = [self._why_not(*row, now) for row in zip(state.json, state.arrays, strict=True)]
        goes_on = np.array([reason is None for reason in reasons])
        for row in np.flatnonzero(goes_on).tolist():
            json, arrays = state.json[row], state.arrays[row]
            assert json is not None
            for name, value in now.items():
                value[row] = arrays[name]
            self._elapsed[row] = json["elapsed"]
            self._random.generators[row].bit_generator.state = json["generator"]
        self.task.set_state(goes_on, now)
        return self._tensor(self.task.observe()), reasons

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return picture(self.name, self.task.renders, lambda: draw(self.task.render))

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self.task.scene(row) or super().scene(row)

    def close(self) -> None:
        self.task.close()

    def _tensor(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._on_cpu else tensor.to(self.device)

    def _require_choices(self, action: Array) -> None:
        """Raise UsageError for a choice that a discrete space does not have; a task relies on that."""
        space = self.action_space
        if isinstance(space, gym.spaces.Discrete) and not ((action >= 0) & (action < space.n)).all():
            raise UsageError(f"{self.name} takes actions from 0 to {space.n - 1}, got {action.tolist()}")

    def _begin(self, rows: Array) -> None:
        self._begun = True
        self._guarded(lambda: self.task.begin(rows, self._random))
        self._elapsed[rows] = 0

    def _guarded(self, call: Callable[[], T]) -> T:
        """What `call` gives; once MuJoCo has failed, what the simulations hold is no longer of one moment."""
        if self._failure is not None:
            raise EnvironmentFailure(f"{self.name} has failed before and must be made anew. {self._failure}")
        try:
            return call()
        except EnvironmentFailure as error:
            self._failure = error
            raise EnvironmentFailure(f"{self.name}: {error}") from error

    def _why_not(self, json: dict[str, Any] | None, arrays: dict[str, Array], now: dict[str, Array]) -> str | None:
        if json is None:
            return "no state was saved"
        if json.get("method") != _METHOD:
            return "its state was saved by another backend"
        shapes = {name: tuple(value.shape[1:]) for name, value in now.items()}
        if {name: array.shape for name, array in arrays.items()} != shapes:
            return "the state saved is of another model, or of native-fast where this is native"
        return None


def make_native(
    env_id: str,
    *,
    num_envs: int,
    env_kwargs: dict[str, Any] | None = None,
    render: bool = False,
    threads: int | None = None,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> NativeVector:
    """The environments that Gymnasium registers as `env_id`, as a task of ours.

    Args:
        env_id: one of which `task_of` knows a task.
        num_envs: N.
        env_kwargs: arguments of `gymnasium.make`.
        render: give pictures of environment 0.
        threads: that step; by default as many as there are cores.
        exact: contact forces as Gymnasium's, which takes longer.
        device: where the tensors given lie.

    Raises:
        UsageError: there is no task of ours, or Gymnasium refuses the arguments.
        RenderFailure, EnvironmentFailure: as `make_env`.
    """
    if (env_kwargs or {}).get("render_mode") == "human":
        raise UsageError(f"{env_id}: no window is opened (render_mode 'human'); take backend='gymnasium'")
    twin: Any = None
    try:
        twin = build_env(env_id, env_kwargs or {}, render)
        place = task_of(env_id)
        if place is None:
            raise UsageError(
                f"{env_id} has no native backend; `ctrlrl envs` marks those that have. Take --backend auto or gymnasium"
            )
        return NativeVector(load_task(place)(twin, env_id, num_envs, threads=threads, exact=exact), device)
    except BaseException as error:
        with contextlib.suppress(Exception):  # `error` matters more
            if twin is not None:
                twin.close()
        raise_unmade(env_id, error)
