"""Learning from a dataset: what is drawn from it, and the loop that has nothing else."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ctrlrl.algorithms.agent import ReplayAgent
from ctrlrl.config import OfflineConfig, OfflineSamplingConfig, SamplingConfig
from ctrlrl.data.store import Dataset
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.nn.residual import BASE
from ctrlrl.replay.dataset import DatasetSampler
from ctrlrl.replay.hindsight import Hindsight
from ctrlrl.training.base_policy import base_actions
from ctrlrl.training.loop import Loop, memory_of
from ctrlrl.training.off_policy import KEPT_BATCHES, bytes_of, groups_at_once
from ctrlrl.training.spaces import alike

_BLOCK, _BLOCK_BYTES = 2**16, 2**26
"""Observations whose statistics are taken at once, and how many bytes of them."""


class OfflineLoop(Loop):
    """Trains an agent from the transitions of a dataset; callbacks may read `memory`, its sampler, too.

    One iteration is as many updates as are sampled at once, and never crosses a multiple of the intervals at which
    something is due: so a resumed training draws what an uninterrupted one does.
    """

    config: OfflineConfig
    agent: ReplayAgent
    memory: DatasetSampler
    sizes = "--agent.batch-size"
    advice = "Try a smaller step size, or rewards of a smaller scale (--sampling.reward-scale)."

    def __init__(self, *, state: dict[str, Any] | None = None, **shared: Any) -> None:
        super().__init__(state=state, **shared)
        if state is not None:
            self.memory.load_state_dict(state["data"])
        self._max_groups = groups_at_once(self.memory.dataset.observation_space, self.config.agent.batch_size)  # type: ignore[attr-defined]
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=KEPT_BATCHES)

    def _iterate(self) -> None:
        before, c = self.env_steps, self.config
        every = [n for n in (c.log_every, c.eval_every, c.checkpoint_every) if n]
        left = min([c.budget - before, *(n - before % n for n in every)])
        groups = min(self._max_groups, left)
        agent = c.agent  # type: ignore[attr-defined]
        batch = self.memory.sample(
            groups,
            agent.batch_size,
            gamma=getattr(agent, "gamma", 1.0),
            n_step=c.sampling.n_step,
            chunk=self.agent.chunk,
        )
        metrics = self.agent.update(batch)
        self._recent.append((self.updates, batch.index))
        self.env_steps += groups
        self._take(metrics, groups)
        self._after(before)

    def _where(self, continue_episodes: bool) -> dict[str, Any]:
        return {}

    def _memory(self) -> dict[str, Any]:
        return {"data": self.memory.state_dict()}

    def _suspects(self) -> dict[str, Any]:
        return {"batches": [{"update": update, "index": index} for update, index in self._recent]}


def make_sampler(
    dataset: Dataset,
    agent: ReplayAgent,
    sampling: SamplingConfig,
    *,
    seed: int,
    hindsight: Hindsight | None = None,
) -> DatasetSampler:
    """What `agent` draws its batches of `dataset` from.

    Raises:
        UsageError: the dataset cannot be drawn from.
    """
    extras = sorted(agent.reads - {"next_action", "mc_return", BASE})
    observed = {BASE: base_actions(dataset, agent.policy.base, agent.device)} if BASE in agent.reads else {}  # type: ignore[arg-type]
    if missing := [name for name in extras if name not in dataset.columns]:
        raise UsageError(
            f"the agent learns from what its policy said of each action ({', '.join(missing)}), which {dataset.path} "
            "does not have. Of sac-discrete --agent.entropy-penalty 0 does without"
        )
    return DatasetSampler(
        dataset,
        device=agent.device,
        seed=seed,
        memory=memory_of(agent.device),
        extras=extras,
        observed=observed,
        next_action="next_action" in agent.reads,
        mc_return="mc_return" in agent.reads,
        temperature=sampling.temperature,
        reward_scale=reward_scale(dataset, sampling),
        reward_shift=sampling.reward_shift,
        hindsight=hindsight,
    )


def reward_scale(dataset: Dataset, sampling: SamplingConfig) -> float:
    """The factor of each reward of `dataset`.

    Raises:
        UsageError: a range of returns is asked for where there is none.
    """
    wanted = sampling.return_range if isinstance(sampling, OfflineSamplingConfig) else None
    if wanted is None:
        return sampling.reward_scale
    spread = float(dataset.returns.max() - dataset.returns.min())
    if not spread:
        raise UsageError(
            f"all episodes of {dataset.path} have the same return, so that no --sampling.return-range can be "
            "given to them; take --sampling.reward-scale"
        )
    return sampling.reward_scale * wanted / spread


def take_statistics(agent: ReplayAgent, sampler: DatasetSampler) -> None:
    """Standardize the agent's observations by those of the dataset, each of which counts once."""
    if agent.normalizer is None:
        return
    total = len(sampler) + sampler.dataset.num_episodes
    block = max(1, min(_BLOCK, _BLOCK_BYTES // bytes_of(sampler.dataset.observation_space)))
    for start in range(0, total, block):
        stop = min(start + block, total)
        everything = torch.ones(stop - start, dtype=torch.bool, device=agent.device)
        agent.observe(sampler.observations(start, stop), everything)


def require_same_spaces(dataset: Dataset, env: VectorEnv) -> None:
    """Raise UsageError unless what the dataset holds is what `env` shows and takes."""
    for what in ("observation", "action"):
        own, theirs = getattr(dataset, f"{what}_space"), getattr(env, f"{what}_space")
        if not alike(own, theirs, bounds=what == "action"):
            raise UsageError(
                f"the dataset {dataset.path} has the {what} space {own}, and {env.name} has {theirs}; they must be the "
                "same. Name the environment that the data is of, or none: --eval-every 0"
            )
