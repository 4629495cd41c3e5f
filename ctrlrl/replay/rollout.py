"""What N environments did in T control steps: what an on-policy agent learns from, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.vector import Step
from ctrlrl.errors import UsageError
from ctrlrl.tree import Obs


class Rollout:
    """T rows of N environments, preallocated on the learner's device.

    Observations are kept in float32 or their integer type, exactly as the policy saw them. `final_obs` is the true next
    observation of each row; it counts where `ended`.

    Args:
        observation_space: of one environment; a Box or a flat Dict of Boxes.
        horizon: T.
        num_envs: N.
        device: where everything lies.
        extras: what the policy says of its actions, as `name: example (N, ...)`.
        policy_state: the policy's memory when the rollout begins, (N, ...) each.
        groups: `VectorEnv.task_groups` of the environments.

    Attributes:
        length: rows so far.
        reward: (T, N) float32.
        terminated, truncated, valid: (T, N) bool.
        anchor: (T, N) int64, `Step.anchor`, where the environments are in groups.
        extras: (T, N, ...) each.
        policy_state: the policy's memory before row 0, for rows where `start[0]` is false.
        carried: what the agent carries from one rollout to the next, (N, ...) each: the state of a critic that
            remembers, say.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        *,
        horizon: int,
        num_envs: int,
        device: torch.device | str = "cpu",
        extras: Mapping[str, Tensor] | None = None,
        policy_state: Mapping[str, Tensor] | None = None,
        groups: tuple[int, int] | None = None,
    ) -> None:
        self.groups = groups
        self.horizon, self.num_envs, self.length = horizon, num_envs, 0
        self.device = torch.device(device)
        t, n = horizon, num_envs

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self._bare = not isinstance(observation_space, gym.spaces.Dict)
        spaces = {"": observation_space} if self._bare else observation_space.spaces  # type: ignore[attr-defined]
        self._obs = {k: zeros(t + 1, n, *(s.shape or ()), dtype=_dtype(s)) for k, s in spaces.items()}
        self._final = {k: torch.zeros_like(value[1:]) for k, value in self._obs.items()}
        self.reward = zeros(t, n)
        self.terminated, self.truncated, self.valid = (zeros(t, n, dtype=torch.bool) for _ in range(3))
        self.anchor = None if groups is None else zeros(t, n, dtype=torch.int64)
        self._fresh = zeros(t + 1, n, dtype=torch.bool)  # where `begin` says so
        self.extras = {k: zeros(t, n, *v.shape[1:], dtype=v.dtype) for k, v in (extras or {}).items()}
        self.policy_state = {k: v.clone() for k, v in (policy_state or {}).items()}
        self.carried: dict[str, Tensor] = {}

    @property
    def full(self) -> bool:
        """Whether there are T rows."""
        return self.length == self.horizon

    @property
    def obs(self) -> Obs:
        """Observations (T + 1, N, ...) acted on; the last one is to be acted on next."""
        return self._wrap(self._obs)

    @property
    def final_obs(self) -> Obs:
        """(T, N, ...) true next observations, where `ended`."""
        return self._wrap(self._final)

    @property
    def start(self) -> Tensor:
        """(T + 1, N) bool: the observation is an episode's first one."""
        start = self._fresh.clone()
        start[1:] |= self.ended | ~self.valid
        return start

    @property
    def ended(self) -> Tensor:
        """(T, N) bool: terminated or truncated."""
        return self.terminated | self.truncated

    def begin(self, obs: Obs, rows: Sequence[bool] | None = None) -> None:
        """Set the observations (N, ...) to act on next, the first ones of episodes in `rows` (by default, in all).

        Where an episode was left without an end in this rollout, its last row counts as truncated.
        """
        mask = torch.ones(self.num_envs, dtype=torch.bool) if rows is None else torch.tensor(list(rows))
        mask, t = mask.to(self.device), self.length
        if t:
            left = mask & self.valid[t - 1] & ~self.ended[t - 1]
            self.truncated[t - 1] |= left
            for key, value in self._final.items():
                value[t - 1][left] = self._obs[key][t][left]
        for key, value in self._entries(obs):
            self._obs[key][t][mask] = value.to(self.device, self._obs[key].dtype)[mask]
        self._fresh[t] |= mask

    def add(self, step: Step, extras: Mapping[str, Tensor]) -> None:
        """Store a row: from the latest observation, by the actions of which the policy said `extras`, to `step`.

        Raises:
            UsageError: the environments are in groups, and the step has no `anchor`.
        """
        t = self.length
        stored = [self.reward[t], self.terminated[t], self.truncated[t], self.valid[t]]
        given = [step.reward, step.terminated, step.truncated, step.valid]
        if self.anchor is not None:
            if step.anchor is None:
                raise UsageError("environments in groups say by numbers what was shown: Step.anchor is missing")
            stored.append(self.anchor[t])
            given.append(step.anchor)
        for name, value in extras.items():
            stored.append(self.extras[name][t])
            given.append(value)
        for key, value in self._entries(step.obs):
            stored.append(self._obs[key][t + 1])
            given.append(value)
        for key, value in self._entries(step.final_obs):
            stored.append(self._final[key][t])
            given.append(value)
        torch._foreach_copy_(stored, given)
        self.length += 1

    def clear(self, policy_state: Mapping[str, Tensor]) -> None:
        """Begin the next rollout where this one stopped."""
        for value in self._obs.values():
            value[0] = value[self.length]
        self._fresh[0] = self.start[self.length]
        self._fresh[1:] = False
        self.policy_state = {k: v.clone() for k, v in policy_state.items()}
        self.length = 0

    def carried_state(self, initial: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what is carried, the entries of `initial`, which stands for what is not there yet."""
        return {name: self.carried.get(name, value) for name, value in initial.items()}

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, for a checkpoint."""
        t = self.length
        columns = {name: value[:t] for name, value in self._columns().items()}
        return {
            "length": t,
            "obs": {_name(key): value[: t + 1] for key, value in self._obs.items()},
            "start": self.start[: t + 1],
            "columns": columns,
            "policy_state": self.policy_state,
            "carried": self.carried,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        t = self.length = state["length"]
        for key, value in self._obs.items():
            value[: t + 1] = state["obs"][_name(key)].to(self.device)
        self._fresh[: t + 1] = state["start"].to(self.device)
        for name, value in self._columns().items():
            if name == "anchor" and name not in state["columns"]:
                if t:
                    raise UsageError(
                        "the checkpoint is of a version that did not store what steps are compared by, amid a rollout: "
                        "resume from one at the end of a rollout"
                    )
                continue
            value[:t] = state["columns"][name].to(self.device)
        # Copied: what lies in memory as a file does may be misaligned, which changes last bits of MKL's products.
        self.policy_state = {k: v.to(self.device, copy=True) for k, v in state["policy_state"].items()}
        self.carried = {k: v.to(self.device, copy=True) for k, v in state["carried"].items()}

    def _columns(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ("reward", "terminated", "truncated", "valid")}
        own |= {} if self.anchor is None else {"anchor": self.anchor}
        own |= {f"extras/{name}": value for name, value in self.extras.items()}
        return own | {f"final/{_name(key)}": value for key, value in self._final.items()}

    def _wrap(self, parts: dict[str, Tensor]) -> Obs:
        return parts[""] if self._bare else parts

    def _entries(self, obs: Obs) -> list[tuple[str, Tensor]]:
        return list(obs.items()) if isinstance(obs, dict) else [("", obs)]


def _name(key: str) -> str:
    return key or "obs"


def _dtype(space: gym.Space[Any]) -> torch.dtype:
    dtype = np.dtype(space.dtype)
    return torch.float32 if dtype.kind == "f" else torch.from_numpy(np.zeros(0, dtype)).dtype
