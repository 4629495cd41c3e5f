"""Deterministic evaluation: one episode per seed of a fixed list, on an environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ctrlrl.envs.vector import VectorEnv
from ctrlrl.nn.cpu import products_of
from ctrlrl.nn.policy import Policy
from ctrlrl.nn.recall import Recall
from ctrlrl.training.collector import EPISODE, require_finite
from ctrlrl.tree import obs_to

FIRST_SEED = 10_000
MAX_STEPS = 100_000
"""An episode that does not end by then is cut, so that a policy that balances forever does not stop the training."""

TOLD = 2
"""Episodes whose words are kept."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One entry per episode, in the order of the seeds. An episode whose simulation diverged ends there."""

    seeds: list[int]
    returns: list[float]
    lengths: list[int]
    success: list[bool] | None
    """None where the task does not say."""
    figures: dict[str, float] = field(default_factory=dict)
    """Means over the episodes of what the task says of each at its end."""
    transcripts: list[str] = field(default_factory=list)
    """What was said in the first `TOLD` episodes, where they are told in words."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))


def evaluation_seeds(episodes: int) -> list[int]:
    """The fixed list: the same for every run, and apart from the seeds that training derives from its own."""
    return list(range(FIRST_SEED, FIRST_SEED + episodes))


def evaluate(
    env: VectorEnv,
    policy: Policy,
    seeds: Sequence[int],
    *,
    before_step: Callable[[], None] | None = None,
    explore: bool = False,
) -> Evaluation:
    """One episode with the policy's mode for each of `seeds`, `env.num_envs` at a time.

    The environment starts each episode from its seed, so the result depends on nothing but policy and seeds; with
    `explore`, where actions are sampled, on the policy's generator.
    `before_step` is called before every step of the first episode of environment 0, to take pictures, say.

    Raises:
        NonFiniteError: if the environment gave NaN or infinity.
    """
    was_training = policy.training
    policy.eval()
    try:
        return _evaluate(env, policy, seeds, before_step, explore)
    finally:
        policy.train(was_training)


def _evaluate(
    env: VectorEnv, policy: Policy, seeds: Sequence[int], before_step: Callable[[], None] | None, explore: bool
) -> Evaluation:
    n = env.num_envs
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), np.int64)
    said: dict[str, list[float]] = {}  # by the task at the end of each episode
    transcripts: list[str] = []
    for first in range(0, len(seeds), n):
        chunk = list(seeds[first : first + n])
        running = torch.arange(n, device=env.device) < len(chunk)
        obs = env.reset([*chunk, *chunk[:1] * (n - len(chunk))])  # rows beyond the list run along unseen
        recall = Recall(policy)
        state = policy.initial_state(n)
        total = torch.zeros(n, dtype=torch.float64, device=env.device)
        count = torch.zeros(n, dtype=torch.int64, device=env.device)
        outcomes: dict[str, torch.Tensor] = {}
        unstable = torch.zeros_like(running)
        for _ in range(MAX_STEPS):
            if before_step is not None and first == 0 and bool(running[0]):
                before_step()
            with products_of(n), recall:
                action, state, _ = policy.act(obs_to(obs, policy.device), state, explore=explore)
            step = env.step(action.to(env.device))
            counted = running & step.valid
            require_finite(env, step, counted, count)
            total += torch.where(counted, step.reward, 0.0)
            count += counted
            ended = counted & (step.terminated | step.truncated)
            for name, value in step.log.items():
                if name == "success" or name.startswith(EPISODE):
                    known = outcomes.setdefault(name, torch.full((n,), float("nan"), device=env.device))
                    known.copy_(torch.where(ended, value.float(), known))
            unstable |= running & ~step.valid
            running &= ~ended & step.valid  # an episode whose simulation diverged is over, too
            if not running.any():
                break
            fresh = step.terminated | step.truncated | ~step.valid
            state, obs = policy.reset(state, fresh.to(policy.device)), step.obs
        transcripts += [text for text in env.transcripts()[: len(chunk)] if text is not None]
        rows = slice(first, first + len(chunk))
        returns[rows], lengths[rows] = total[: len(chunk)].cpu(), count[: len(chunk)].cpu()
        if "success" in outcomes:  # a simulation that became unstable has not done its task
            outcomes["success"].masked_fill_(unstable, 0.0)
        for name, outcome in outcomes.items():
            said.setdefault(name, [float("nan")] * len(seeds))[rows] = outcome[: len(chunk)].tolist()
    success = said.pop("success", [float("nan")])
    figures = {name: float(np.nanmean(values)) for name, values in said.items() if not np.isnan(values).all()}
    whole = not any(np.isnan(success))
    succeeded = [s > 0 for s in success] if whole else None
    return Evaluation(list(seeds), returns.tolist(), lengths.tolist(), succeeded, figures, transcripts[:TOLD])
