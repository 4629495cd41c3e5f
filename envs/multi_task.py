"""Several tasks as one vector environment, for one policy of all of them.

Shapes: N rows, K tasks; row i plays task i % K throughout.
Vectors of observations are padded with zeros to the longest of any task, and followed by the task, one-hot (K,); images
must be of one shape. Actions are the tasks' own where they all take the same ones. Else they are in [-1, 1], as many as
the task that takes most has, and each task reads its first ones, mapped to its bounds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.vector import EnvState, Step, VectorEnv, require_as_many, seed_per_env
from ctrlrl.errors import UsageError
from ctrlrl.tree import Obs, is_image, obs_items

if TYPE_CHECKING:
    import mujoco


class MultiTask(VectorEnv):
    """K vector environments side by side. Figures of an episode come with the task's name, too:
    `episode/return/NAME`, and `episode/success/NAME` where it knows.

    Attributes:
        envs: one per task, of `len(range(k, N, K))` rows.
        names: of the tasks, each once.
    """

    def __init__(self, envs: Sequence[VectorEnv]) -> None:
        """Put `envs` together, and own them.

        Raises:
            UsageError: their numbers of rows, devices, observations or actions do not go together; says which.
        """
        self.envs, count = list(envs), len(envs)
        self.num_envs = sum(env.num_envs for env in envs)
        self._rows = [torch.arange(k, self.num_envs, count) for k in range(count)]
        if [env.num_envs for env in envs] != [len(rows) for rows in self._rows]:
            raise UsageError(f"{count} tasks share {self.num_envs} environments in turn; make as many of each")
        own = [env.name for env in envs]
        self.names = [name if own.count(name) == 1 else f"{name}[{k}]" for k, name in enumerate(own)]
        self.name = ",".join(own)
        self.device = envs[0].device
        if any(env.device != self.device for env in envs):
            raise UsageError(f"{self.name}: the tasks lie on different devices")
        self._rows = [rows.to(self.device) for rows in self._rows]
        periods = {env.control_dt for env in envs}
        self.control_dt = periods.pop() if len(periods) == 1 else None
        self.may_be_invalid = any(env.may_be_invalid for env in envs)
        spaces = [_entries(env.observation_space) for env in envs]
        joined = {name: self._joined(name, spaces) for name in dict.fromkeys(n for space in spaces for n in space)}
        if all(is_image(space) for space in joined.values()):
            if "task" in joined:
                raise UsageError(f"{self.name}: an entry of the observation is called 'task', as the one added here")
            joined["task"] = gym.spaces.Box(0, 1, (count,), np.float32)
        self._joined_spaces = joined
        bare = list(joined) == ["obs"] and not any(isinstance(e.observation_space, gym.spaces.Dict) for e in envs)
        self.observation_space = joined["obs"] if bare else gym.spaces.Dict(dict(joined))
        self._bare = bare
        self.action_space, self._mapped = self._actions()
        self._bounds = [self._bounds_of(env.action_space) for env in envs] if self._mapped else []
        self._returns = torch.zeros(self.num_envs, dtype=torch.float64, device=self.device)

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        seeds = seed_per_env(seed, self.num_envs)
        self._returns.zero_()
        parts = []
        for env, rows in zip(self.envs, self._rows, strict=True):
            given = [seeds[i] for i in rows.tolist()]
            parts.append(env.reset([s for s in given if s is not None] or None))
        return self._together(parts)

    def step(self, action: Tensor) -> Step:
        steps = [env.step(self.of_task(k, action)) for k, env in enumerate(self.envs)]

        def joined(parts: Sequence[Tensor]) -> Tensor:
            out = torch.zeros(self.num_envs, *parts[0].shape[1:], dtype=parts[0].dtype, device=self.device)
            for rows, part in zip(self._rows, parts, strict=True):
                out[rows] = part
            return out

        reward = joined([step.reward for step in steps])
        terminated, truncated = joined([s.terminated for s in steps]), joined([s.truncated for s in steps])
        valid = joined([s.valid for s in steps])
        self._returns += reward
        log: dict[str, Tensor] = {}
        unknown = torch.full((self.num_envs,), float("nan"), device=self.device)
        ended = terminated | truncated
        for name, rows, step in zip(self.names, self._rows, steps, strict=True):
            for figure, value in step.log.items():
                log.setdefault(figure, unknown.clone())[rows] = value.float()
                if figure == "success":
                    log[f"episode/success/{name}"] = unknown.clone().index_copy(0, rows, value.float())
            returns = torch.where(ended[rows], self._returns[rows].float(), unknown[rows])
            log[f"episode/return/{name}"] = unknown.clone().index_copy(0, rows, returns)
        self._returns[ended | ~valid] = 0
        return Step(
            obs=self._together([step.obs for step in steps]),
            action=joined([self._applied(k, step.action, action) for k, step in enumerate(steps)]),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            final_obs=self._together([step.final_obs for step in steps]),
            valid=valid,
            log=log,
        )

    def of_task(self, k: int, action: Tensor) -> Tensor:
        """Task k's rows (n, ...) of actions (N, ...), in its own units."""
        own = action[self._rows[k]]
        if not self._mapped:
            return own
        low, high = self._bounds[k]
        unit = own[:, : low.numel()].clamp(-1, 1)
        return (low.flatten() + (unit + 1) / 2 * (high - low).flatten()).view(len(own), *low.shape)

    def obs_of_task(self, k: int, obs: Obs) -> Obs:
        """Task k's rows (n, ...) of observations (N, ...), as the task itself gives them."""
        space, rows = self.envs[k].observation_space, self._rows[k]
        given = dict(obs_items(obs))
        parts = {}
        for name, entry in _entries(space).items():
            value = given[name][rows]
            parts[name] = value if is_image(entry) else value[:, : math.prod(entry.shape or ())]
        return parts if isinstance(space, gym.spaces.Dict) else parts["obs"]

    def actions_of_tasks(self, parts: Sequence[Tensor]) -> Tensor:
        """Actions (N, ...) of each task's own (n, ...)."""
        common = [self._to_common(k, part) for k, part in enumerate(parts)]
        out = torch.zeros(self.num_envs, *common[0].shape[1:], dtype=common[0].dtype, device=common[0].device)
        for rows, part in zip(self._rows, common, strict=True):
            out[rows.to(out.device)] = part
        return out

    def get_state(self) -> EnvState:
        states = [env.get_state() for env in self.envs]
        json: list[dict[str, Any] | None] = [None] * self.num_envs
        arrays: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in range(self.num_envs)]
        for rows, state in zip(self._rows, states, strict=True):
            for i, one, own in zip(rows.tolist(), state.json, state.arrays, strict=True):
                json[i], arrays[i] = one, own | {_RETURN: np.array(float(self._returns[i]))}
        return EnvState(json, arrays)

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        require_as_many(self, state)
        seeds, parts = seed_per_env(seed, len(self.envs)), []
        reasons: list[str | None] = [None] * self.num_envs
        for k, (env, rows) in enumerate(zip(self.envs, self._rows, strict=True)):
            own = [{n: a for n, a in state.arrays[i].items() if n != _RETURN} for i in rows.tolist()]
            saved = EnvState([state.json[i] for i in rows.tolist()], own)
            obs, said = env.set_state(saved, seed=int(seeds[k] or 0))
            parts.append(obs)
            for i, reason in zip(rows.tolist(), said, strict=True):
                reasons[i] = reason
                went_on = reason is None and _RETURN in state.arrays[i]
                self._returns[i] = float(state.arrays[i][_RETURN]) if went_on else 0.0
        return self._together(parts), reasons

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.envs[0].render()

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self.envs[row % len(self.envs)].scene(row // len(self.envs))

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for env in self.envs:
                stack.callback(env.close)

    def _joined(self, name: str, spaces: Sequence[dict[str, gym.spaces.Box]]) -> gym.spaces.Box:
        """The space of the entry `name` of all tasks."""
        there = [space[name] for space in spaces if name in space]
        if name in ("action_mask", "candidate_mask", "candidates"):
            raise UsageError(f"{self.name}: tasks that say which actions exist ({name}) cannot be joined yet")
        if any(is_image(space) for space in there):
            if len(there) < len(spaces) or any(space != there[0] for space in there):
                found = ", ".join(f"{n}: {s.get(name)}" for n, s in zip(self.names, spaces, strict=True))
                raise UsageError(f"{self.name}: the images {name!r} must be alike in all tasks ({found})")
            return there[0]
        for owner, space in zip(self.names, spaces, strict=True):
            if name in space and len(space[name].shape) != 1:
                raise UsageError(
                    f"{self.name}: {owner} observes {name!r} {space[name].shape}; tasks are joined where they observe "
                    "vectors, or images alike"
                )
        return gym.spaces.Box(-np.inf, np.inf, (max(space.shape[0] for space in there) + len(spaces),), np.float32)

    def _together(self, parts: Sequence[Obs]) -> Obs:
        given = [dict(obs_items(part)) for part in parts]
        out: dict[str, Tensor] = {}
        for name, space in self._joined_spaces.items():
            dtype = torch.uint8 if is_image(space) else torch.float32
            value = torch.zeros(self.num_envs, *space.shape, dtype=dtype, device=self.device)
            for k, (rows, part) in enumerate(zip(self._rows, given, strict=True)):
                if name in part and is_image(space):
                    value[rows] = part[name]
                elif name in part:
                    value[rows, : part[name].shape[1]] = part[name].to(dtype)
                if not is_image(space):
                    value[rows, space.shape[0] - len(parts) + k] = 1
            out[name] = value
        return out["obs"] if self._bare else out

    def _actions(self) -> tuple[gym.Space[Any], bool]:
        spaces = [env.action_space for env in self.envs]
        if all(space == spaces[0] for space in spaces):
            return spaces[0], False
        for name, space in zip(self.names, spaces, strict=True):
            if not isinstance(space, gym.spaces.Box) or not space.is_bounded() or not (space.low < space.high).all():
                raise UsageError(
                    f"{self.name}: {name} takes {space}, others something else; tasks that take different actions are "
                    "joined where all take bounded Boxes, with low < high"
                )
        return gym.spaces.Box(-1, 1, (max(math.prod(space.shape or ()) for space in spaces),), np.float32), True

    def _bounds_of(self, box: gym.Space[Any]) -> tuple[Tensor, Tensor]:
        assert isinstance(box, gym.spaces.Box)
        return tuple(torch.as_tensor(b, dtype=torch.float32, device=self.device) for b in (box.low, box.high))  # type: ignore[return-value]

    def _applied(self, k: int, own: Tensor, action: Tensor) -> Tensor:
        """What task k applied (n, ...), as an action of all; what it does not read stays as it was given, so that
        critics see it there as it was drawn."""
        common = self._to_common(k, own)
        if self._mapped:
            read = math.prod(own.shape[1:])
            common[:, read:] = action[self._rows[k], read:].clamp(-1, 1)
        return common

    def _to_common(self, k: int, action: Tensor) -> Tensor:
        """Task k's actions (n, ...) in the units of all."""
        if not self._mapped:
            return action
        assert isinstance(self.action_space, gym.spaces.Box)
        low, high = (bound.to(action.device) for bound in self._bounds[k])
        unit = ((action - low) / (high - low) * 2 - 1).flatten(1)
        return torch.nn.functional.pad(unit, (0, self.action_space.shape[0] - unit.shape[1]))


_RETURN = "multi_task/return"


def _entries(space: gym.Space[Any]) -> dict[str, gym.spaces.Box]:
    return dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"obs": space}  # type: ignore[arg-type, dict-item]
