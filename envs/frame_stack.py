"""Successive images observed together, for any vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.vector import EnvState, Step, VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.tree import Obs, is_image, obs_items

if TYPE_CHECKING:
    import mujoco

_SAVED = "frame_stack/"


class FrameStack(VectorEnv):
    """Gives the latest `count` images in place of each one, (N, count, ...), the oldest first.

    Where an episode begins, its first image stands for those before it, as in Gymnasium's `FrameStackObservation` with
    `padding_type="reset"`. Entries of a Dict that are no images are left as they are.
    """

    def __init__(self, env: VectorEnv, count: int, *, owned: bool = True) -> None:
        """Wrap `env`; raises UsageError where it gives no images. `owned`: whether `close` closes it."""
        space = env.observation_space
        entries = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
        self._images = [name for name, entry in entries.items() if is_image(entry)]
        if not self._images:
            raise UsageError(
                f"frame_stack = {count} goes with images (uint8, two or more dimensions); {env.name} gives {space}. "
                "Observe its picture with pixels (--pixels 48), or leave the frame_stack at 1"
            )
        stacked = {name: gym.vector.utils.batch_space(entries[name], count) for name in self._images}
        self.name, self.num_envs, self.device = env.name, env.num_envs, env.device
        self.observation_space = (
            gym.spaces.Dict({**entries, **stacked}) if isinstance(space, gym.spaces.Dict) else stacked["obs"]
        )
        self.action_space, self.control_dt, self.may_be_invalid = env.action_space, env.control_dt, env.may_be_invalid
        self._env, self._count, self._owned = env, count, owned
        self._stacks: dict[str, Tensor] = {}  # (N, count, ...)

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        obs = self._env.reset(seed)
        self._stacks = {name: self._repeated(value) for name, value in obs_items(obs) if name in self._images}
        return self._with_stacks(obs, self._stacks)

    def step(self, action: Tensor) -> Step:
        step = self._env.step(action)
        fresh = step.terminated | step.truncated | ~step.valid
        images, true_next, final = dict(obs_items(step.obs)), dict(obs_items(step.final_obs)), {}
        for name, stack in self._stacks.items():
            flags = (-1, *[1] * (stack.dim() - 1))
            followed = torch.cat([stack[:, 1:], true_next[name][:, None]], 1)
            started = self._repeated(images[name])
            self._stacks[name] = torch.where(fresh.view(flags), started, followed)
            final[name] = torch.where(step.valid.view(flags), followed, started)
        return Step(
            obs=self._with_stacks(step.obs, self._stacks),
            action=step.action,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            final_obs=self._with_stacks(step.final_obs, final),
            valid=step.valid,
            log=step.log,
        )

    def get_state(self) -> EnvState:
        state = self._env.get_state()
        stacks = {_SAVED + name: value.cpu().numpy() for name, value in self._stacks.items()}
        arrays = [own | {key: value[i].copy() for key, value in stacks.items()} for i, own in enumerate(state.arrays)]
        return EnvState(state.json, arrays)

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        own = [{key: value for key, value in row.items() if not key.startswith(_SAVED)} for row in state.arrays]
        obs, reasons = self._env.set_state(EnvState(state.json, own), seed=seed)
        self._stacks = {name: self._repeated(value) for name, value in obs_items(obs) if name in self._images}
        for i, reason in enumerate(reasons):
            if reason is None:
                for name, stack in self._stacks.items():
                    stack[i] = torch.from_numpy(state.arrays[i][_SAVED + name])
        return self._with_stacks(obs, self._stacks), reasons

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._env.render()

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self._env.scene(row)

    def close(self) -> None:
        if self._owned:
            self._env.close()

    def _repeated(self, images: Tensor) -> Tensor:
        """(N, ...) to (N, count, ...), a copy."""
        return images[:, None].repeat(1, self._count, *[1] * (images.dim() - 1))

    def _with_stacks(self, obs: Obs, stacks: dict[str, Tensor]) -> Obs:
        return {**obs, **stacks} if isinstance(obs, dict) else stacks["obs"]
