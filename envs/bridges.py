"""Our vector environments for code that expects Gymnasium's or Stable-Baselines3's.

    env = to_gymnasium(make_env("Ant-v5", num_envs=64))
    env = to_sb3(make_env("Ant-v5", num_envs=64))  # for stable_baselines3.PPO("MlpPolicy", env)

Both copy what they give out into NumPy arrays. Neither knows rows that are no transition (`Step.valid`): these come out
as truncated, with reward 0 and the first observation of the new episode, and `info["invalid"]` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from ctrlrl.envs.vector import Step, VectorEnv
from ctrlrl.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]


class GymnasiumBridge(gym.vector.VectorEnv[Any, Any, Any]):
    """A `gymnasium.vector.VectorEnv` in the autoreset mode SAME_STEP; rewards are float64, as Gymnasium's.

    `info` has `final_obs` (objects, None where nothing ended) with its mask `_final_obs`, and what the environment logs
    for each row (`success`, the reward's terms).
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env = env
        self.num_envs = env.num_envs
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space, self.action_space = env.batched_observation_space, env.batched_action_space
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}
        if env.control_dt:
            self.metadata["render_fps"] = round(1 / env.control_dt)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start all episodes; `seed` is one number, one per environment, or None."""
        if options:
            raise UsageError(f"{self.env.name} takes no reset options, got {options}")
        if isinstance(seed, Sequence) and None in seed:
            raise UsageError(f"{self.env.name} takes one seed or one for each environment, got {list(seed)}")
        return _array(self.env.reset(seed)), {}  # type: ignore[arg-type]

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """One step; environments that end are reset within it."""
        step = self.env.step(_action(self.env, actions))
        terminated, truncated, over = _ends(step)
        info: dict[str, Any] = {}
        if over.any():
            final = np.full(self.num_envs, None, dtype=object)
            finals = _array(step.final_obs)
            for row in np.flatnonzero(over):
                final[row] = _row(finals, int(row))
            info |= {"final_obs": final, "_final_obs": over}
        for name, value in step.log.items():
            info |= {name: _array(value), "_" + name: np.ones(self.num_envs, np.bool_)}
        if self.env.may_be_invalid:
            info |= {"invalid": ~_array(step.valid), "_invalid": np.ones(self.num_envs, np.bool_)}
        return _array(step.obs), _array(step.reward).astype(np.float64), terminated, truncated, info

    def render(self) -> tuple[Any, ...]:
        """The picture of environment 0, for environments made with `render=True`."""
        return (self.env.render(),)

    def close_extras(self, **_: Any) -> None:
        """Close the environment."""
        self.env.close()


def to_gymnasium(env: VectorEnv) -> GymnasiumBridge:
    """`env` as a `gymnasium.vector.VectorEnv`; closing it closes `env`."""
    return GymnasiumBridge(env)


def to_sb3(env: VectorEnv) -> Any:
    """`env` as a `stable_baselines3.common.vec_env.VecEnv`; closing it closes `env`.

    `infos` has `terminal_observation`, `TimeLimit.truncated`, and per row what the environment logs. Episode returns
    come from Stable-Baselines3's `VecMonitor`, around it.

    Raises:
        UsageError: if Stable-Baselines3 is not installed.
    """
    try:
        from stable_baselines3.common.vec_env import VecEnv
    except ImportError as error:
        raise UsageError(
            f"to_sb3 needs a package that is not installed: pip install stable-baselines3 ({error})"
        ) from None

    class SB3Bridge(VecEnv):
        render_mode = "rgb_array"

        def __init__(self) -> None:
            self.env = env
            self._action: Any = None
            super().__init__(env.num_envs, env.observation_space, env.action_space)

        def reset(self) -> Any:
            seeds = [seed for seed in self._seeds if seed is not None]
            self._reset_seeds()
            return _array(env.reset(seeds if len(seeds) == self.num_envs else None))

        def step_async(self, actions: Any) -> None:
            self._action = _action(env, actions)

        def step_wait(self) -> tuple[Any, Array, Array, list[dict[str, Any]]]:
            step = env.step(self._action)
            terminated, _, over = _ends(step)
            logged = {name: _array(value) for name, value in step.log.items()}
            infos: list[dict[str, Any]] = [
                {name: value[row] for name, value in logged.items()} for row in range(self.num_envs)
            ]
            if over.any():
                finals, valid = _array(step.final_obs), _array(step.valid)
                for row in np.flatnonzero(over).tolist():
                    infos[row]["terminal_observation"] = _row(finals, row)
                    infos[row]["TimeLimit.truncated"] = not terminated[row]
                    infos[row]["invalid"] = not valid[row]
            return _array(step.obs), _array(step.reward), over, infos

        def close(self) -> None:
            env.close()

        def get_images(self) -> list[Any]:
            return [env.render()]

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self if attr_name == "render_mode" else env, attr_name)] * len(self._rows(indices))

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise UsageError(f"{env.name}: its environments have no attributes of their own to set ({attr_name})")

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise UsageError(f"{env.name}: its environments have no methods of their own to call ({method_name})")

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * len(self._rows(indices))

        def _rows(self, indices: Any) -> list[int]:
            return list(self._get_indices(indices))

    return SB3Bridge()


def _action(env: VectorEnv, actions: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(actions), device=env.device)


def _ends(step: Step) -> tuple[Array, Array, Array]:
    """(N,) terminated, truncated, and whether either; rows that are no transition are truncated."""
    terminated = _array(step.terminated)
    truncated = _array(step.truncated | ~step.valid)
    return terminated, truncated, terminated | truncated


def _array(value: Any) -> Any:
    """A copy, as NumPy."""
    if isinstance(value, dict):
        return {name: _array(entry) for name, entry in value.items()}
    return value.detach().cpu().numpy().copy()


def _row(obs: Any, row: int) -> Any:
    return {name: value[row] for name, value in obs.items()} if isinstance(obs, dict) else obs[row]
