"""Datasets of known quality: collected by a run's policies, or taken from what it stored while it learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.config import OffPolicyConfig, OnlineConfig
from ctrlrl.data.store import Column, Dataset, DatasetWriter, Episode
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.nn.cpu import prepare_cpu, products_of
from ctrlrl.nn.discrete import make_choices
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.replay.episodes import episodes_of
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.provenance import describe_source, now
from ctrlrl.runs.record import load_run
from ctrlrl.training.base_policy import BaseLike
from ctrlrl.training.collector import random_actions
from ctrlrl.training.evaluation import evaluate, evaluation_seeds
from ctrlrl.training.loading import load, load_policy, own_environment
from ctrlrl.training.setup import EnvLike, make, on_cpu, read_config, read_provenance, step_of
from ctrlrl.tree import Obs, map_obs, obs_items, obs_to

TIERS = ("random", "medium", "expert", "medium-replay", "replay")
_FIRST_SEED = 1_000_000
"""Of the environments that data is collected in, apart from those of training and evaluation."""
MEDIUM = 0.5
"""Where a medium policy is on the way from the random one's return to the best one's."""


class RandomPolicy(Policy):
    """Uniformly random actions, of those that exist where observations say so."""

    def __init__(self, env: VectorEnv, seed: int) -> None:
        super().__init__()
        self._env, self.generator = env, torch.Generator().manual_seed(seed)
        discrete = isinstance(env.action_space, gym.spaces.Discrete | gym.spaces.MultiDiscrete)
        self._choices = make_choices(env.observation_space, env.action_space) if discrete else None  # type: ignore[arg-type]

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[torch.Tensor, PolicyState, dict[str, torch.Tensor]]:
        """Whether `explore` or not."""
        mask = None if self._choices is None else self._choices.mask(map_obs(torch.Tensor.cpu, obs))
        return random_actions(self._env.action_space, self._env.num_envs, self.require_generator(), mask), {}, {}


def collect(
    run: str | Path,
    out: str | Path,
    *,
    tier: str,
    steps: int = 100_000,
    deterministic: bool = False,
    seed: int = 0,
    num_envs: int = 10,
    reference_episodes: int = 20,
    env: EnvLike | None = None,
    base: BaseLike | None = None,
) -> Dataset:
    """Make a dataset of one quality from a run.

    Args:
        run: the run.
        out: the dataset's folder.
        tier: `random`: uniformly random actions. `expert`: the best checkpoint's policy. `medium`: that of the
            checkpoint whose evaluation was nearest to half way between the two (keep many: --keep-checkpoints).
            `replay`: everything that the run stored while it learned. `medium-replay`: what it had stored when it
            wrote the medium checkpoint.
        steps: transitions to collect at least; episodes are finished. The replay tiers have what there is.
        deterministic: whether policies act by their mode, without exploring.
        seed: of environments and exploration.
        num_envs: stepped together.
        reference_episodes: of the evaluations that give the reference returns.
        env: what the run was trained on, where that was an object.
        base: as `load`.

    Raises:
        UsageError: there is no such tier; the run has no checkpoint, or no replay, for it.
    """
    if tier not in TIERS:
        raise UsageError(f"no tier {tier!r}; there are {', '.join(TIERS)}")
    if steps < 1 or reference_episodes < 1 or num_envs < 1:
        raise UsageError("a dataset takes at least one step, one environment and one episode to refer to")
    folder = RunFolder.open(Path(run))
    config = read_config(folder)[1]
    if not isinstance(config, OnlineConfig):
        raise UsageError(f"{run} was trained on a dataset; collect from a run that was trained in its environment")
    loaded = load(run, base=base)
    source = own_environment(loaded, env)
    prepare_cpu()
    vector = make(source, on_cpu(config), num_envs, "cpu")
    try:
        seeds = evaluation_seeds(reference_episodes)
        reference = {
            "random": evaluate(vector, RandomPolicy(vector, seed), seeds).mean,
            "expert": evaluate(vector, loaded.policy, seeds).mean,
        }
        checkpoint = folder.find_checkpoint("best")
        if tier.startswith("medium"):
            checkpoint = medium_checkpoint(folder, reference)
        former = read_provenance(folder)
        spaces, language = former["environment"]["spaces"], former.get("language")
        writer = DatasetWriter.create(
            out,
            observation_space=build_space(spaces["observation"]),
            action_space=build_space(spaces["action"]),
            env=config.env,
            control_dt=vector.control_dt,
            columns={} if tier.endswith("replay") else {"success": Column(dtype="bool")},
            reference=reference,
            provenance={
                "collected": now(),
                "run": str(folder.path),
                "tier": tier,
                "checkpoint": None if tier in ("random", "replay") else checkpoint.name,
                "deterministic": deterministic,
                "seed": seed,
                "env_kwargs": config.env_kwargs,
                "git": describe_source(),
            }
            | ({"language": {"tokenizer": language["tokenizer"]}} if language else {}),
        )
        with writer:
            if tier.endswith("replay"):
                at = checkpoint if tier == "medium-replay" else folder.find_checkpoint("last")
                for episode in replayed(folder, config, at):
                    writer.add(episode)
                if not writer.num_transitions:
                    raise UsageError(f"{folder.path} had stored no transition at {at.name}")
            else:
                policy: Policy = RandomPolicy(vector, seed)
                if tier != "random":
                    policy = loaded.policy
                    load_policy(policy, checkpoint)
                    policy.generator = torch.Generator().manual_seed(seed)
                for episode in played(vector, policy, seed=seed, explore=not deterministic):
                    writer.add(episode)
                    if writer.num_transitions >= steps:
                        break
    finally:
        if vector is not source:
            vector.close()
    return Dataset.open(out)


def medium_checkpoint(folder: RunFolder, reference: dict[str, float]) -> Path:
    """The resumable checkpoint whose evaluation was nearest to half way from the random policy's to the best one's.

    Raises:
        UsageError: no checkpoint was evaluated at its step.
    """
    returns = {one.step: one.mean for one in load_run(folder.path).evaluations}
    there = {step_of(path): path for path in folder.step_checkpoints() if step_of(path) in returns}
    if not there:
        raise UsageError(
            f"{folder.path} keeps no checkpoint of a step at which it was evaluated: train with as large a "
            "--keep-checkpoints as there are evaluations, and --checkpoint-every equal to --eval-every"
        )
    wanted = reference["random"] + MEDIUM * (reference["expert"] - reference["random"])
    return there[min(there, key=lambda step: (abs(returns[step] - wanted), step))]


def played(
    env: VectorEnv, policy: Policy, *, seed: int, explore: bool, teacher: Policy | None = None
) -> Iterator[Episode]:
    """Episodes of a policy, without end, in the order in which they end.

    With a teacher their actions are what its mode would have done, and those that were done the column `executed`.
    """
    n = env.num_envs
    obs = env.reset([_FIRST_SEED + 10_000 * seed + row for row in range(n)])
    state = policy.initial_state(n)
    taught = {} if teacher is None else teacher.initial_state(n)
    past: list[list[tuple[Any, ...]]] = [[] for _ in range(n)]
    while True:
        seen = _to_numpy(obs)
        with products_of(n), torch.no_grad():
            action, state, _ = policy.act(obs_to(obs, policy.device), state, explore=explore)
            label: np.ndarray[Any, Any] | None = None
            if teacher is not None:
                said, taught, _ = teacher.act(obs_to(obs, teacher.device), taught, explore=False)
                label = said.cpu().numpy().copy()
        step = env.step(action.to(env.device))
        applied, final = step.action.cpu().numpy().copy(), _to_numpy(step.final_obs)
        labels = applied if label is None else label
        success = step.log.get("success")
        ends = (step.terminated | step.truncated | ~step.valid).cpu().numpy()
        for row in range(n):
            if bool(step.valid[row]):
                past[row].append((_row(seen, row), labels[row], float(step.reward[row]), applied[row]))
            if not ends[row]:
                continue
            if past[row] and bool(step.valid[row]):  # what diverged is no episode
                known = success is not None and not bool(torch.isnan(success[row].float()))
                reached = np.zeros(len(past[row]), np.bool_)
                reached[-1] = known and success is not None and bool(success[row] > 0)
                observations = [entry[0] for entry in past[row]] + [_row(final, row)]
                executed = {} if teacher is None else {"executed": np.stack([entry[3] for entry in past[row]])}
                yield Episode(
                    observation=_stacked(observations),
                    action=np.stack([entry[1] for entry in past[row]]),
                    reward=np.array([entry[2] for entry in past[row]], np.float32),
                    terminated=bool(step.terminated[row]),
                    truncated=bool(step.truncated[row]),
                    columns={"success": reached, **executed},
                )
            past[row] = []
        state = policy.reset(state, torch.from_numpy(ends).to(policy.device))
        if teacher is not None:
            taught = teacher.reset(taught, torch.from_numpy(ends).to(teacher.device))
        obs = step.obs


def replayed(folder: RunFolder, config: OnlineConfig, checkpoint: Path) -> Iterator[Episode]:
    """The episodes that a run had stored at a checkpoint, environment by environment; what is not finished is cut.

    Raises:
        UsageError: the run has no replay, or of stacked images.
    """
    state = load_checkpoint(checkpoint)
    if not isinstance(config, OffPolicyConfig) or "replay" not in state:
        raise UsageError(f"{folder.path} has no replay, only what learns off-policy has; take another tier")
    if config.frame_stack > 1:
        raise UsageError(f"{folder.path} stores stacks of images frame by frame, of which no dataset can be made yet")
    spaces = read_provenance(folder)["environment"]["spaces"]
    buffer = ReplayBuffer(
        build_space(spaces["observation"]),
        build_space(spaces["action"]),
        capacity=min(config.buffer.capacity, max(config.num_envs, state["replay"]["total_rows"] * config.num_envs)),
        num_envs=config.num_envs,
    )
    folder.load_replay(buffer, state["replay"]["segments"], state["replay"]["total_rows"])
    yield from episodes_of(buffer)


def _to_numpy(obs: Obs) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.cpu().numpy().copy() for name, value in obs_items(map_obs(torch.Tensor.detach, obs))}


def _row(obs: dict[str, np.ndarray[Any, Any]], row: int) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value[row] for name, value in obs.items()}


def _stacked(rows: list[dict[str, np.ndarray[Any, Any]]]) -> Any:
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return columns["obs"] if list(columns) == ["obs"] else columns
