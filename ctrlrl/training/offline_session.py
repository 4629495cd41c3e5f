"""Sessions that learn from a dataset alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctrlrl.algorithms.agent import ReplayAgent
from ctrlrl.config import OfflineConfig, SamplingConfig, TrainConfig
from ctrlrl.data.store import Dataset
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.replay.hindsight import hindsight_of
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.base_session import Session
from ctrlrl.training.offline import (
    OfflineLoop,
    make_sampler,
    require_same_spaces,
    reward_scale,
    take_statistics,
)
from ctrlrl.training.setup import EnvLike, make, require_words_of
from ctrlrl.training.warm_start import CRITICS_KEPT, VALUE_KEPT


class OfflineSession(Session):
    """A dataset and a learner; environments are there to evaluate on."""

    config: OfflineConfig
    loop_class = OfflineLoop
    agent: ReplayAgent
    collects = False

    def _open(self) -> None:
        learns = getattr(self.config.agent, "learn", "both")  # type: ignore[attr-defined]
        if learns == "policy" and self.config.init_from is None:
            raise UsageError(
                "--agent.learn policy extracts a policy from values that are there: --init-from RUN, which learned them"
            )
        self.dataset = dataset = open_dataset(self.config.data, imitates=self.algo == "bc")
        if self.eval_source is None:
            self.eval_source = self.config.env or dataset.env
        if self.eval_source is None and self.config.eval_every:
            self.remark = f"nothing is evaluated: {dataset.path} names no environment; --env ID does"
            self.config = replace(self.config, eval_every=0)
        arguments = dataset.provenance.get("env_kwargs")
        same = isinstance(self.eval_source, str) and self.eval_source == dataset.env
        if same and isinstance(arguments, dict) and arguments and not self.config.env_kwargs:
            self.remark = f"{dataset.env} is made as for the data: --env-kwargs '{json.dumps(arguments)}'"
            self.config = replace(self.config, env_kwargs=arguments)
        if isinstance(self.eval_source, str):
            self.config = replace(self.config, env=self.eval_source)
        require_words_of(dataset, self.config)
        self.name = self.config.env or str(dataset.path)
        self.control_dt = dataset.control_dt
        self.observation_space, self.action_space = dataset.observation_space, dataset.action_space

    def _make(self, env: EnvLike, config: TrainConfig, rows: int, device: str) -> VectorEnv:
        try:
            made = make(env, config, rows, device)
        except UsageError as error:
            if self.source is not None or env != self.dataset.env:
                raise
            raise UsageError(
                f"{error} The dataset {self.dataset.path} names it, to evaluate on: --env ID names another, and "
                "--eval-every 0 evaluates nothing"
            ) from None
        try:
            require_same_spaces(self.dataset, made)
        except UsageError:
            if made is not env:
                made.close()
            raise
        return made

    def described(self) -> dict[str, Any]:
        return {"data": provenance_of(self.dataset, self.config.sampling)}

    def _begin(self) -> None:
        self._draw_from_the_start()
        if self.config.init_from is not None:
            self._start_from(self.config.init_from, self.dataset)
            learns = getattr(self.config.agent, "learn", "both")  # type: ignore[attr-defined]
            notes = (self.history or {}).get("notes", [])
            if learns == "policy" and not {CRITICS_KEPT, VALUE_KEPT} <= set(notes):
                raise UsageError(
                    f"--agent.learn policy needs the values of {self.config.init_from}, and they do not fit: "
                    f"{'; '.join(notes)}. Take its --data, --sampling and --agent settings"
                )
        else:
            take_statistics(self.agent, self.memory)

    def _restore(self, folder: RunFolder, state: dict[str, Any], fresh_seed: int) -> list[str]:
        self._draw_from_the_start()
        return ["continues exactly"]

    def _draw_from_the_start(self) -> None:
        config, hindsight = self.config, None
        if config.sampling.hindsight:
            if self.eval_env is None:
                raise UsageError(
                    "--sampling.hindsight asks the environment what its goals are: --env ID, and --eval-every"
                )
            share, option = config.sampling.hindsight, "--sampling.hindsight"
            hindsight = hindsight_of(self.eval_env, share, option=option)
        self.memory = make_sampler(self.dataset, self.agent, config.sampling, seed=config.seed, hindsight=hindsight)

    def _parts(self) -> dict[str, Any]:
        return {"memory": self.memory}


def open_dataset(path: str, *, imitates: bool = False) -> Dataset:
    """The dataset at `path`, which must hold a transition, for a learner that imitates its actions and no more, or not.

    Raises:
        UsageError: there is none, it is damaged, or empty, or its actions are not what was done.
    """
    dataset = Dataset.open(Path(path))
    if dataset.provenance.get("relabelled") and not imitates:
        raise UsageError(
            f"the actions of {path} are what specialists would have done there (ctrlrl data distill), not what led to "
            "the rewards: only bc learns from it"
        )
    if not dataset.num_transitions:
        raise UsageError(f"{path} has no transition to learn from")
    return dataset


def provenance_of(dataset: Dataset, sampling: SamplingConfig) -> dict[str, Any]:
    """What a run says of the data that it learns from; `rewards` are how they are changed before."""
    return {
        "path": str(dataset.path),
        "content_hash": dataset.content_hash,
        "transitions": dataset.num_transitions,
        "episodes": dataset.num_episodes,
        "mean_return": float(dataset.returns.mean()),
        "reference": dataset.reference,
        "rewards": {"shift": sampling.reward_shift, "scale": reward_scale(dataset, sampling)},
    }
