"""Stepping a vector environment with a policy, and keeping count of its episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.vector import Step, VectorEnv
from ctrlrl.errors import NonFiniteError, UsageError
from ctrlrl.nn.cpu import products_of
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.nn.recall import Recall
from ctrlrl.tokens import TokenSpace
from ctrlrl.tree import Obs, obs_items, obs_to

Array = np.ndarray[Any, Any]

EPISODE = "episode/"
"""What begins the names of `Step.log` that say something of a whole episode, when it ends."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished episode of environment `env`."""

    env: int
    ret: float
    length: int
    success: bool | None


class Collector:
    """Acts, steps, and carries what lies between two steps: observations, policy state, sums of rewards.

    Args:
        env: where to act; already reset, with `obs` its observations (N, ...).
        policy: what acts.
        obs: the first observations.
        seed: of the uniformly random actions before learning starts.

    Attributes:
        recall: what the networks keep from step to step, where anything is to be kept: by who knows when weights
            change, and clears it then.
    """

    recall: Recall | None = None

    def __init__(self, env: VectorEnv, policy: Policy, obs: Obs, *, seed: int) -> None:
        n = env.num_envs
        self.env, self.policy, self.obs = env, policy, obs
        self._device = policy.device  # looked up once: that takes as long as a small network
        self.generator = torch.Generator().manual_seed(seed)
        self.policy_state: PolicyState = policy.initial_state(n)
        self.returns = np.zeros(n)
        self.lengths = np.zeros(n, np.int64)
        self._figures: dict[str, tuple[float, int]] = {}
        self._invalid = 0

    def step(self, *, random: bool) -> tuple[Step, dict[str, Tensor], dict[str, Tensor]]:
        """One control step in every environment; returns it with the policy's extras, here and at `final_obs`.

        Raises:
            NonFiniteError: if the environment gave NaN or infinity; names what and where.
        """
        # Before learning starts the policy acts too, so that its state and extras exist from the first step on.
        device = self._device
        with products_of(self.env.num_envs), self.recall or nullcontext():
            action, state, extras = self.policy.act(obs_to(self.obs, device), self.policy_state, explore=True)
        if random:
            own = self.policy.warm_up(extras, self.generator)
            if own is None:
                mask = self.policy.mask(obs_to(self.obs, device))
                own = random_actions(self.env.action_space, self.env.num_envs, self.generator, mask)
            action = own
        step = self.env.step(action.to(self.env.device))
        require_finite(self.env, step, step.valid, self.lengths)
        next_extras: dict[str, Tensor] = {}
        if self.policy.extras_at_next:
            with products_of(self.env.num_envs):
                next_extras = self.policy.act(obs_to(step.final_obs, device), state, explore=False)[2]
        if state:
            state = self.policy.reset(state, (step.terminated | step.truncated | ~step.valid).to(device))
        self.policy_state = state
        self.obs = step.obs
        return step, extras, next_extras

    def recollect(self, past: Sequence[Obs]) -> None:
        """Have the networks keep what they would if the policy had just acted on `past`, observations (N, ...) each;
        nothing is drawn."""
        assert self.recall is not None
        for obs in past if self.recall else ():
            with products_of(self.env.num_envs), self.recall:
                self.policy.act(obs_to(obs, self._device), self.policy_state, explore=False)

    def finished(self, step: Step) -> tuple[list[Episode], int]:
        """The episodes that ended with `step`, and how many of its rows are transitions."""
        reward, terminated, truncated, valid = (
            x.cpu().numpy() for x in (step.reward, step.terminated, step.truncated, step.valid)
        )
        done = terminated | truncated
        if self.env.may_be_invalid and not valid.all():
            self.returns += np.where(valid, reward, 0.0)
            self.lengths += valid
            done |= ~valid
            transitions = int(valid.sum())
            if not self.env.task_groups:  # where they wait for each other, which is no fault
                self._invalid += len(valid) - transitions
        else:
            self.returns += reward
            self.lengths += 1
            transitions = len(valid)
        if not done.any():
            return [], transitions
        said = step.log.get("success")
        success = None if said is None else said.float().cpu().numpy()
        rows = (done & (self.lengths > 0) & valid).nonzero()[0].tolist()
        self._note(step.log)
        episodes = [
            Episode(
                i,
                float(self.returns[i]),
                int(self.lengths[i]),
                None if success is None or np.isnan(success[i]) else bool(success[i]),
            )
            for i in rows
        ]
        self.returns[done] = 0
        self.lengths[done] = 0
        return episodes, transitions

    def figures(self) -> dict[str, float]:
        """Means of what the environment has logged of the episodes that ended since the last call (`episode/...`), and
        where there were any, how many rows were no transition: of simulations that diverged, say; not those in which
        who has finished waits for its group."""
        means = {name: total / count for name, (total, count) in self._figures.items() if count}
        if self._invalid:
            means["invalid_rows"] = float(self._invalid)
        self._figures, self._invalid = {}, 0
        return means

    def _note(self, log: dict[str, Tensor]) -> None:
        """Take in what is said of episodes that ended: NaN where none did."""
        names = [name for name in log if name.startswith(EPISODE)]
        if not names:
            return
        values = torch.stack([log[name] for name in names]).cpu().numpy()
        known = ~np.isnan(values)
        for name, total, count in zip(names, np.where(known, values, 0.0).sum(1), known.sum(1), strict=True):
            before = self._figures.get(name, (0.0, 0))
            self._figures[name] = before[0] + float(total), before[1] + int(count)

    def restart(self, obs: Obs, rows: list[bool]) -> None:
        """Go on from `obs`, where the episodes of `rows` were started afresh."""
        self.obs = obs
        self.policy_state = self.policy.reset(self.policy_state, torch.tensor(rows, device=self._device))
        self.returns[rows] = 0
        self.lengths[rows] = 0

    def state_dict(self) -> dict[str, Any]:
        """Generator, policy state and sums."""
        return {
            "generator": self.generator.get_state(),
            "policy_state": self.policy_state,
            "returns": torch.from_numpy(self.returns),
            "lengths": torch.from_numpy(self.lengths),
            "invalid": self._invalid,
            "figures": {name: list(entry) for name, entry in self._figures.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.generator.set_state(state["generator"])
        # Copied: what lies in memory as a file does may be misaligned, which changes last bits of MKL's products.
        self.policy_state = {k: v.to(self._device, copy=True) for k, v in state["policy_state"].items()}
        self.returns[:] = state["returns"].cpu()
        self.lengths[:] = state["lengths"].cpu()
        self._invalid = state.get("invalid", 0)  # runs of before there were such figures have none
        self._figures = {name: (total, count) for name, (total, count) in state.get("figures", {}).items()}


def require_finite(env: VectorEnv, step: Step, rows: Tensor, lengths: Sequence[int] | Array | Tensor) -> None:
    """Raise `NonFiniteError` if one of `rows` (N,) got NaN or infinity; `lengths` (N,) counts its steps before."""
    final = step.final_obs
    values = final.values() if isinstance(final, dict) else (final,)
    # The usual case, quickly: where a sum is finite, so is every entry.
    if math.isfinite(_sum(step.reward) + sum(_sum(value) for value in values if value.is_floating_point())):
        return
    for name, value in (("reward", step.reward), *obs_items(final)):
        if not value.is_floating_point():
            continue
        bad = rows & ~torch.isfinite(value).flatten(1).all(1) if value.dim() > 1 else rows & ~torch.isfinite(value)
        if not bool(bad.any()):
            continue
        row = int(bad.nonzero()[0])
        what = "reward" if name == "reward" else "observation" + ("" if name == "obs" else f" {name!r}")
        raise NonFiniteError(
            f"{env.name} gave a non-finite {what} in environment {row}, step {int(lengths[row]) + 1} of its episode: "
            f"{_excerpt(value[row])}. Fix the environment, or end the episode where this happens"
        )


def random_actions(space: gym.Space[Any], n: int, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """`n` uniformly random actions (n, ...) of a bounded space, in the environment's units; of a discrete one only what
    exists by `mask` (n, decisions, choices)."""
    if mask is not None:
        choice = torch.multinomial(mask.flatten(0, 1).float().cpu(), 1, generator=generator).view(
            n, *(space.shape or ())
        )
        return choice + torch.as_tensor(space.start)  # type: ignore[attr-defined]
    if isinstance(space, TokenSpace):
        return torch.randint(space.vocabulary, (n, space.length), generator=generator)
    if isinstance(space, gym.spaces.Box):
        low, high = torch.as_tensor(space.low, dtype=torch.float32), torch.as_tensor(space.high, dtype=torch.float32)
        return low + torch.rand(n, *space.shape, generator=generator) * (high - low)
    if isinstance(space, gym.spaces.Discrete):
        return torch.randint(int(space.n), (n,), generator=generator) + int(space.start)
    if isinstance(space, gym.spaces.MultiDiscrete):
        unit = torch.rand(n, *space.shape, generator=generator, dtype=torch.float64)
        return (unit * torch.as_tensor(space.nvec)).long() + torch.as_tensor(space.start)
    raise UsageError(f"cannot draw random actions from {space}")


def _sum(value: Tensor) -> float:
    """Of all entries; on a CPU by NumPy, which is called in a third of the time."""
    quick = value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)
    return float(value.numpy().sum() if quick else value.sum())


def _excerpt(value: Tensor) -> str:
    flat = value.flatten().tolist()
    return str(flat[0]) if len(flat) == 1 else f"[{', '.join(f'{x:.4g}' for x in flat[:8])}{', ...' * (len(flat) > 8)}]"
