"""What the tasks share that are environments of Gymnasium: numbers, spaces and pictures are those of one such
environment, made with the user's arguments."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.envs.tasks.task import Array, Task
from ctrlrl.envs.worker import control_dt


class GymnasiumTask(Task):
    """A task that is an environment of Gymnasium.

    Args:
        twin: the environment, with the wrappers that `gymnasium.make` puts around it.
        name: what the user asked for.
        num_envs: N.
        threads: that step, where that helps; by default as many as there are cores.
        exact: whether to give up speed for numbers that are Gymnasium's.
    """

    def __init__(
        self,
        twin: gym.Env[Any, Any],
        name: str,
        num_envs: int,
        *,
        threads: int | None = None,
        exact: bool = True,
    ) -> None:
        self.name, self.num_envs = name, num_envs
        self.observation_space, self.action_space = twin.observation_space, twin.action_space
        self.control_dt, self.max_episode_steps = control_dt(twin), _time_limit(twin)
        self.renders = twin.render_mode == "rgb_array"
        self._twin = twin

    def nowhere(self) -> Array:
        """(N,) bool, all False."""
        return np.zeros(self.num_envs, np.bool_)

    @property
    def own(self) -> Any:
        """The environment of Gymnasium, without its wrappers."""
        return self._twin.unwrapped

    @abstractmethod
    def show(self, own: Any) -> None:
        """Put the state of row 0 into the environment `own`, to be drawn."""

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        own = self.own
        self.show(own)
        return own.render()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._twin.close()


def _time_limit(env: gym.Env[Any, Any]) -> int | None:
    """The steps after which the wrapper `TimeLimit` ends an episode, or None."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.TimeLimit):
            return int(env._max_episode_steps)
        env = env.env
    return None


def between(value: Array, limits: tuple[float, float]) -> Array:
    """Whether strictly between the two limits."""
    within: Array = (limits[0] < value) & (value < limits[1])
    return within
