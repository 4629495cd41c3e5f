"""The on-policy loop: collect a rollout with one policy, learn from it, forget it. A rollout that is not full yet is
part of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ctrlrl.algorithms.agent import OnPolicyAgent
from ctrlrl.config import OnPolicyConfig
from ctrlrl.envs.vector import Step, VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.nn.cpu import SMALL
from ctrlrl.nn.recall import Recall
from ctrlrl.replay.rollout import Rollout
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.collecting import CollectingLoop
from ctrlrl.training.loop import memory_of
from ctrlrl.training.off_policy import bytes_of
from ctrlrl.tree import Obs, map_obs, obs_to

_SHARED_FROM = 50_000
"""Environment steps of a training from which on its environments are worth several processes."""


class OnPolicyLoop(CollectingLoop):
    """Trains an agent from rollouts; callbacks may read `rollout`, too."""

    config: OnPolicyConfig
    agent: OnPolicyAgent
    sizes = "--rollout-steps, --agent.minibatch-size or --num-envs"
    advice = "Try a smaller --agent.lr, a smaller --agent.max-grad-norm, or rewards of a smaller scale."

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        self.rollout: Rollout = self.memory
        # What is kept begins with each rollout: after a resumption it is made again from the rollout so far, in the
        # same steps, since products of other shapes are rounded otherwise and may draw another action.
        self.collector.recall = Recall(self.agent.policy)
        self.collector.recollect([map_obs(lambda x, t=t: x[t], self.rollout.obs) for t in range(self.rollout.length)])  # type: ignore[misc]

    @staticmethod
    def make_memory(config: OnPolicyConfig, env: VectorEnv, agent: OnPolicyAgent, obs: Obs) -> Rollout:
        # It, and twice its shuffled copies; and so of each earlier one that is kept.
        needed, there = 3 * kept(config) * rollout_bytes(config, env), memory_of(agent.device)
        if needed > there:
            raise UsageError(
                f"a rollout of {config.horizon * config.num_envs:,} steps takes {needed / 2**30:,.1f} GiB to learn "
                f"from, and {agent.device} has {there / 2**30:,.1f} GiB of memory: lower --rollout-steps"
            )
        policy = agent.policy
        state = policy.initial_state(config.num_envs)
        rollout = Rollout(
            env.observation_space,
            horizon=config.horizon,
            num_envs=config.num_envs,
            device=agent.device,
            extras=policy.act(obs_to(obs, agent.device), state, explore=False)[2],
            policy_state=state,
            groups=env.task_groups,
        )
        agent.require(rollout)
        return rollout

    @staticmethod
    def restore_memory(memory: Rollout, folder: RunFolder, state: dict[str, Any]) -> None:
        memory.load_state_dict(state["rollout"])

    @staticmethod
    def begin_afresh(memory: Rollout, obs: Obs, rows: Sequence[bool]) -> None:
        if any(rows):
            if memory.groups is not None:  # a rollout of groups has whole episodes alone
                memory.clear(memory.policy_state)
            memory.begin(obs, rows)

    @staticmethod
    def stored_bytes(config: OnPolicyConfig, env: VectorEnv, memory: Rollout) -> int:
        return (config.keep_checkpoints + 1) * kept(config) * rollout_bytes(config, env)  # rollouts are part of each

    @staticmethod
    def shares_environments(config: OnPolicyConfig) -> bool:
        """Half of a training's time goes into them. A short one is over before processes have started."""
        return config.steps >= _SHARED_FROM

    @staticmethod
    def learner_threads(config: OnPolicyConfig, agent: OnPolicyAgent, cores: int) -> int:
        """One, where products are too small to be shared: it would take longer together."""
        largest = max((p.numel() for p in agent.policy.parameters()), default=0)
        rows: int = config.agent.minibatch_size  # type: ignore[attr-defined]
        return cores if rows * largest > SMALL else 1

    def start_remark(self) -> str:
        needed = self.config.horizon * self.config.num_envs
        if self.config.steps >= needed:
            return ""
        return f"no update will run: a rollout takes {needed:,} steps, and the training {self.config.steps:,}"

    def _store(self, step: Step, extras: dict[str, Tensor], next_extras: dict[str, Tensor]) -> None:
        self.rollout.add(step, extras)

    def _learn(self, before: int) -> None:
        if self.rollout.full:
            assert self.collector.recall is not None
            self.collector.recall.clear()  # of weights that will have changed; the update may need its memory
            metrics, updates = self.agent.update(self.rollout)
            self.rollout.clear(self.collector.policy_state)
            if updates:  # none, where no row was a transition
                self._take(metrics, updates)

    def _memory(self) -> dict[str, Any]:
        return {"rollout": self.rollout.state_dict()}


def kept(config: OnPolicyConfig) -> int:
    """Rollouts that there are at a time: the one that is collected, and earlier ones that are learned from again."""
    return 1 + int(getattr(config.agent, "stale_rollouts", 0))  # type: ignore[attr-defined]


def rollout_bytes(config: OnPolicyConfig, env: VectorEnv) -> int:
    """Bytes of a full rollout: observations before and after each step, decisions, rewards and flags."""
    row = 2 * bytes_of(env.observation_space) + bytes_of(env.action_space) + 12
    return config.horizon * config.num_envs * row
