"""The off-policy loop: every `update_every` environment steps the gradient updates follow that are owed by then, each
on transitions of the replay memory. Updates stay owed at a checkpoint, too."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from ctrlrl.algorithms.agent import OffPolicyAgent
from ctrlrl.config import OffPolicyConfig
from ctrlrl.envs.vector import Step, VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.replay.dataset import DatasetSampler, MixedSampler, Source
from ctrlrl.replay.hindsight import Hindsight, hindsight_of
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.collecting import CollectingLoop
from ctrlrl.training.loop import memory_of, passed
from ctrlrl.tree import Obs, obs_to

MAX_GROUPS = 64
"""Gradient steps sampled at once."""
MAX_SAMPLED_BYTES = 16 * 2**20
"""Of the observations sampled at once: more is slower, since the memory of larger blocks is given back when freed."""
KEPT_BATCHES = 16
"""Indices of the latest batches kept for the post-mortem of a training that became non-finite."""


class OffPolicyLoop(CollectingLoop):
    """Trains an agent from replayed transitions; callbacks may read `buffer`, too."""

    config: OffPolicyConfig
    agent: OffPolicyAgent
    sizes = "--agent.batch-size or --buffer.capacity"
    advice = "Try a smaller --agent.critic-lr and --agent.actor-lr, --agent.layer-norm, or rewards of a smaller scale."

    def __init__(
        self, *, state: dict[str, Any] | None = None, data: DatasetSampler | None = None, **shared: Any
    ) -> None:
        super().__init__(state=state, **shared)
        self.buffer: ReplayBuffer = self.memory
        self._max_groups = groups_at_once(self.env.observation_space, self.agent.config.batch_size)
        self.data: DatasetSampler | None = data
        self.source: Source = self.buffer
        if self.data is not None:
            self.source = MixedSampler(self.buffer, self.data, self.config.data_share)
            if state is not None:
                self.data.load_state_dict(state["data"])
        began = self.data is not None or self.config.init_from is not None  # with statistics of what was seen there
        self._keeps_statistics = began and self.config.keep_statistics
        self._segments: list[dict[str, Any]] = (state or {}).get("replay", {}).get("segments", [])
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=KEPT_BATCHES)

    @staticmethod
    def make_memory(config: OffPolicyConfig, env: VectorEnv, agent: OffPolicyAgent, obs: Obs) -> ReplayBuffer:
        policy = agent.policy
        make = partial(
            ReplayBuffer,
            env.observation_space,
            env.action_space,
            num_envs=config.num_envs,
            device=agent.device,
            seed=config.seed,
            extras=policy.act(obs_to(obs, agent.device), policy.initial_state(config.num_envs), explore=False)[2],
            next_extras=policy.extras_at_next,
            frame_stack=config.frame_stack,
            reward_scale=config.sampling.reward_scale,
            reward_shift=config.sampling.reward_shift,
            hindsight=replay_hindsight(config, env, agent),
        )
        needed = make(capacity=config.num_envs).transition_bytes * config.buffer.capacity  # by the smallest one
        there = memory_of(agent.device)
        if needed > there:  # allocating may succeed all the same, and the process be killed once it is filled
            raise UsageError(
                f"a replay of {config.buffer.capacity:,} transitions takes {needed / 2**30:,.1f} GiB, "
                f"and {agent.device} has {there / 2**30:,.1f} GiB of memory: lower --buffer.capacity"
            )
        return make(capacity=config.buffer.capacity)

    @staticmethod
    def restore_memory(memory: ReplayBuffer, folder: RunFolder, state: dict[str, Any]) -> None:
        folder.load_replay(memory, state["replay"]["segments"], state["replay"]["total_rows"])
        memory.generator.set_state(state["replay"]["generator"])

    @staticmethod
    def begin_afresh(memory: ReplayBuffer, obs: Obs, rows: Sequence[bool]) -> None:
        if any(rows) or not memory.total_rows:  # of a checkpoint of step 0 no observation has been stored yet
            memory.begin(obs)

    @staticmethod
    def stored_bytes(config: OffPolicyConfig, env: VectorEnv, memory: ReplayBuffer) -> int:
        return memory.transition_bytes * min(config.steps, config.buffer.capacity)

    def start_remark(self) -> str:
        c = self.config
        if (last := c.steps // c.update_every * c.update_every) > c.learning_starts:
            critic_only, total = getattr(self.agent.config, "critic_only", 0), c.planned_updates()
            if total > critic_only:
                return self._slow_policy()
            return (
                f"the policy will stay as it is: its first update comes after agent.critic_only = {critic_only:,}, and "
                f"there are {int(total):,} in all"
            )
        return (
            f"no update will run: learning starts after step {c.learning_starts:,}, and the last turn of "
            f"updates (every {c.update_every:,} steps) is at step {last:,}"
        )

    def _slow_policy(self) -> str:
        """What to say where `utd` was lowered and `policy_delay`, by default as much, was not: entropy's temperature
        then falls as slowly as the policy learns."""
        c = self.agent.config
        if not 1 < type(c).policy_delay == type(c).utd or c.policy_delay <= c.utd:
            return ""
        return (
            f"the policy will move once in {c.policy_delay / c.utd:.3g} environment steps: critics have agent.utd = "
            f"{c.utd:g} updates a step, and each agent.policy_delay = {c.policy_delay}th of them moves it. "
            f"--agent.policy-delay {max(1, round(c.utd))} is once a step"
        )

    def _acts_at_random(self) -> bool:
        able = self.config.init_from is not None or self.agent.policy.pretrained  # and better data come of that
        return self.env_steps < self.config.learning_starts and not able

    def _store(self, step: Step, extras: dict[str, Tensor], next_extras: dict[str, Tensor]) -> None:
        self.buffer.add(step, extras, next_extras)
        if not self._keeps_statistics:
            self.agent.observe(obs_to(step.obs, self.buffer.device), step.valid.to(self.buffer.device))

    def _learn(self, before: int) -> None:
        """All updates owed: `utd` per environment step since learning started, whatever the number of environments."""
        if not passed(before, self.env_steps, self.config.update_every):
            return
        c = self.agent.config
        owed = int(c.utd * (self.env_steps - self.config.learning_starts)) - self.updates
        while owed > 0 and len(self.buffer):
            groups = min(owed, self._max_groups)
            batch = self.source.sample(groups, c.batch_size, gamma=c.gamma, n_step=self.config.buffer.n_step)
            metrics = self.agent.update(batch)
            self._recent.append((self.updates, batch.index))
            self._take(metrics, groups)
            owed -= groups

    def _memory(self) -> dict[str, Any]:
        self._segments = self.folder.append_replay(self.buffer, self._segments)
        generator = self.buffer.generator.get_state()
        rows = self.buffer.total_rows
        memory = {"replay": {"total_rows": rows, "segments": self._segments, "generator": generator}}
        return memory if self.data is None else memory | {"data": self.data.state_dict()}

    def _figures(self) -> dict[str, float]:
        shares = {} if self.data is None else {"data_share": self.config.data_share}
        return super()._figures() | shares

    def _suspects(self) -> dict[str, Any]:
        return {"batches": [{"update": update, "index": index} for update, index in self._recent]}


def groups_at_once(observation_space: gym.Space[Any], batch_size: int) -> int:
    """Of how many gradient steps the batches are sampled together."""
    group = 2 * batch_size * bytes_of(observation_space)  # obs and next_obs
    return max(1, min(MAX_GROUPS, MAX_SAMPLED_BYTES // group))


def replay_hindsight(config: OffPolicyConfig, env: VectorEnv, agent: OffPolicyAgent) -> Hindsight | None:
    """How goals of `env` are replaced in the replay of `agent`; None: not at all.

    Raises:
        UsageError: the environment has no goals, or the agent reads what was said for the former ones.
    """
    if not config.buffer.hindsight:
        return None
    texts = ", and text/FrozenLake, text/Maze and text/BabyAI-GoTo..."
    hindsight = hindsight_of(env, config.buffer.hindsight, option="--buffer.hindsight", more=texts)
    if agent.reads:
        raise UsageError(
            "--buffer.hindsight gives transitions other goals, and the agent learns from what its policy said of each "
            f"action for the former ones ({', '.join(sorted(agent.reads))}): leave it out. Of sac-discrete "
            "--agent.entropy-penalty 0 does without"
        )
    return hindsight


def bytes_of(space: gym.Space[Any]) -> int:
    """Bytes of one observation or action as it is sampled."""
    out = 0
    for entry in space.spaces.values() if isinstance(space, gym.spaces.Dict) else [space]:
        kind, count = np.dtype(entry.dtype), math.prod(entry.shape or ())
        out += count * (4 if kind.kind == "f" else kind.itemsize)
    return out
