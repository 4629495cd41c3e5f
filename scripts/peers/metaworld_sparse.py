"""Tasks of Meta-World (metaworld==3.1.1) whose only reward is 1 for success, which ends the episode, for Gymnasium.

It needs MuJoCo 3.3.0, and so an interpreter of its own, which `--env-python` names:

    python3.11 -m venv .venv-metaworld && .venv-metaworld/bin/pip install metaworld==3.1.1 packaging
    PYTHONPATH=scripts/peers ctrlrl train sac --env metaworld_sparse:MetaWorldSparse-PickPlace-v0 \\
        --env-python .venv-metaworld/bin/python

Meta-World's own environment (`Meta-World/MT1`) draws one of 50 starts by a generator that `reset(seed)` does not
reach, and goes on after success. Here every start is drawn anew from the task's whole range, by the generator that
`reset(seed)` seeds. What is observed is the same, as float32: hand, gripper and object, now and a step before, and the
goal in the last three numbers. Success is what Meta-World takes for it: the object within 7 cm of the goal, the peg's
head within 7 cm of its place in the hole (sideways and upward counted twice). The time limit is changed by
`--env-kwargs '{"max_episode_steps": 500}'`.

NumPy, Gymnasium and Meta-World; nothing of ctrlrl.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

TASKS = {
    "MetaWorldSparse-PickPlace-v0": ("pick-place-v3", 200),
    "MetaWorldSparse-PegInsertSide-v0": ("peg-insert-side-v3", 250),
}
"""Of each ID Meta-World's name of the task, and the steps after which an episode is cut off."""


class SparseSuccess(gym.Wrapper[Any, Any, Any, Any]):
    """A Meta-World task with its goal in sight, drawn anew in every episode, that rewards success and ends there."""

    def __init__(self, env: Any) -> None:
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)  # cached when the goal was hidden: clips the goal to zeros
        env._set_task_called = True  # else it waits for one of its 50 starts
        env.seeded_rand_vec = True  # draw by the environment's generator instead of NumPy's global one
        env.max_path_length = sys.maxsize  # the time limit is Gymnasium's wrapper's
        super().__init__(env)
        self._task = env
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        task = self._task
        if seed is not None:
            task.seed(seed)  # its reset ignores the seed
        # Its reset places everything twice. Drawn before, both times it is the same place, as with Meta-World's starts.
        task._freeze_rand_vec = False
        task.reset_model()
        task._freeze_rand_vec = True
        obs, info = task.reset()
        return obs.astype(np.float32), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, _, _, _, info = self._task.step(action)
        success = bool(info["success"])
        return obs.astype(np.float32), float(success), success, False, {**info, "success": success}


def make(task: str, **kwargs: Any) -> SparseSuccess:
    """The task that Meta-World calls so; `kwargs` go to its class."""
    return SparseSuccess(ALL_V3_ENVIRONMENTS[task](**kwargs))


for _id, (_task, _limit) in TASKS.items():
    gym.register(_id, f"{__name__}:make", max_episode_steps=_limit, kwargs={"task": _task})
