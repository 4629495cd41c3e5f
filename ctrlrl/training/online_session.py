"""Sessions that step environments, and learn from what happens there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from ctrlrl.algorithms.agent import OffPolicyAgent
from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.config import OffPolicyConfig, OnlineConfig, TrainConfig
from ctrlrl.envs.vector import EnvState, VectorEnv
from ctrlrl.envs.workers import RegisteredHereOnly
from ctrlrl.errors import UsageError
from ctrlrl.replay.dataset import DatasetSampler
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.base_policy import open_base, task_of
from ctrlrl.training.base_session import Session
from ctrlrl.training.collecting import CollectingLoop
from ctrlrl.training.collector import Collector
from ctrlrl.training.off_policy import OffPolicyLoop, replay_hindsight
from ctrlrl.training.offline import make_sampler, require_same_spaces, take_statistics
from ctrlrl.training.offline_session import open_dataset, provenance_of
from ctrlrl.training.on_policy import OnPolicyLoop
from ctrlrl.training.setup import EnvLike, make, require_words_of, steps_natively
from ctrlrl.tree import Obs

_LOOPS: dict[str, type[CollectingLoop]] = {"off-policy": OffPolicyLoop, "on-policy": OnPolicyLoop}

_NEEDED = {
    "data": "learns from a dataset besides: --data DIR",
    "init_from": "goes on from a run that was trained on data: --init-from RUN (of ctrlrl train cql, say)",
}


class OnlineSession(Session):
    """Environments and a learner; from a dataset, too, where the configuration names one."""

    config: OnlineConfig
    loop_class: type[CollectingLoop]
    source: EnvLike
    data: DatasetSampler | None = None

    def _open(self) -> None:
        config = self.config
        self.loop_class = _LOOPS[find_algorithm(self.algo).loop]
        shares = self.loop_class.shares_environments(config) and os.name == "posix"  # which worker processes need
        self._share = self.cores if shares else 1
        dataset = open_dataset(config.data) if isinstance(config, OffPolicyConfig) and config.data else None
        needs = find_algorithm(self.algo).needs
        if needs and needs != "base" and getattr(config, needs) is None:
            raise UsageError(f"{self.algo} {_NEEDED[needs]}")
        self.env = self._make(self.source, config, config.num_envs, str(self.device))
        if steps_natively(self.source, config) and not self.resumed:
            self.remark = f"{self.env.name} is stepped natively; --backend gymnasium steps Gymnasium's own"
        if dataset is not None:
            try:
                require_same_spaces(dataset, self.env)
                require_words_of(dataset, config)
            except UsageError:
                self.close()
                raise
            there = dataset.provenance.get("env_kwargs")
            if (
                dataset.env == self.source
                and isinstance(there, dict)
                and there != config.env_kwargs
                and not self.resumed
            ):
                made = f"--env-kwargs '{json.dumps(there)}'" if there else "no --env-kwargs"
                differs = f"{dataset.path} was collected with {made}, and these environments are made otherwise"
                self.remark = "; ".join(filter(None, (self.remark, differs)))
        self._dataset = dataset
        self.name, self.control_dt = self.env.name, self.env.control_dt
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        if self.base_source is not None:
            try:
                self.base = open_base(
                    self.base_source, self.observation_space, self.action_space, task_of(self.env), self.control_dt
                )
            except BaseException:
                self.close()
                raise

    def _prepare(self) -> None:
        config = self.config
        if isinstance(config, OffPolicyConfig) and isinstance(self.agent, OffPolicyAgent):
            replay_hindsight(config, self.env, self.agent)  # refused before data is read
        if self._dataset is None or not isinstance(config, OffPolicyConfig):
            return
        assert isinstance(self.agent, OffPolicyAgent)
        self.data = make_sampler(self._dataset, self.agent, config.sampling, seed=config.seed)

    def _make(self, env: EnvLike, config: TrainConfig, rows: int, device: str) -> VectorEnv:
        """The environments, shared by processes where that is quicker and possible."""
        try:
            return make(env, config, rows, device, share=self._share, grouped=True)
        except RegisteredHereOnly:
            if config.backend != "auto":
                raise
            self._share = 1
            self.remark = f"the environments stay in this process, which alone knows {env}: module:ID would spread them"
            return make(env, config, rows, device)

    def close(self) -> None:
        super().close()
        if self.env is not self.source:
            self.env.close()

    def disk_needed(self) -> int:
        collected = self.loop_class.stored_bytes(self.config, self.env, self.memory)  # once
        return super().disk_needed() + collected

    def described(self) -> dict[str, Any]:
        if self._dataset is None or not isinstance(self.config, OffPolicyConfig):
            return {}
        return {"data": provenance_of(self._dataset, self.config.sampling)}

    def _begin(self) -> None:
        if isinstance(self.config, OffPolicyConfig) and isinstance(self.agent, OffPolicyAgent):
            if self.config.init_from is not None:
                self._start_from(self.config.init_from, self._dataset)
            elif self.data is not None:
                take_statistics(self.agent, self.data)
        obs = self.env.reset(self.config.seed)
        self._make_memory(obs)
        self.memory.begin(obs)

    def _restore(self, folder: RunFolder, state: dict[str, Any], fresh_seed: int) -> list[str]:
        saved = EnvState(state["env"]["json"], state["env"]["arrays"])
        obs, reasons = self.env.set_state(saved, seed=fresh_seed)
        self._make_memory(obs)
        self.collector.load_state_dict(state["collector"])
        self.loop_class.restore_memory(self.memory, folder, state)
        afresh = [reason is not None for reason in reasons]
        if any(afresh):
            self.collector.restart(obs, afresh)
        self.loop_class.begin_afresh(self.memory, obs, afresh)
        return [_continuation(reasons)]

    def _make_memory(self, obs: Obs) -> None:
        """Make collector and memory for environments that are at `obs`."""
        self.memory = self.loop_class.make_memory(self.config, self.env, self.agent, obs)
        self.collector = Collector(self.env, self.agent.policy, obs, seed=self.config.seed)

    def _parts(self) -> dict[str, Any]:
        parts = {"env": self.env, "collector": self.collector, "memory": self.memory}
        return parts if self.data is None else parts | {"data": self.data}


def _continuation(reasons: Sequence[str | None]) -> str:
    afresh = [f"environment {i} started a new episode ({reason})" for i, reason in enumerate(reasons) if reason]
    exact = len(reasons) - len(afresh)
    if not afresh:
        return "continues exactly"
    more = f" and {len(afresh) - 4} more" if len(afresh) > 4 else ""
    return "; ".join(afresh[:4]) + more + (f"; the other {exact} continue exactly" if exact else "")
