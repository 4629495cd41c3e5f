"""One policy of several specialists: data whose actions are what the specialist of the task would have done
(COMPASS, Liu et al. 2025, arXiv:2502.16372: residual specialists, one per embodiment, into a generalist)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrlrl.data.store import Column, Dataset, DatasetWriter
from ctrlrl.envs.multi_task import MultiTask
from ctrlrl.envs.text.registry import is_text_task
from ctrlrl.envs.vector import derive_seeds
from ctrlrl.errors import UsageError
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.runs.provenance import describe_source, now
from ctrlrl.training.base_policy import BaseLike
from ctrlrl.training.collect import RandomPolicy, played
from ctrlrl.training.evaluation import evaluate, evaluation_seeds
from ctrlrl.training.loading import load, own_environment
from ctrlrl.training.setup import make, on_cpu
from ctrlrl.tree import Obs


class Specialists(Policy):
    """Of several tasks each its own policy; memory (n, ...) of policy k is called `k/NAME`."""

    def __init__(self, env: MultiTask, policies: Sequence[Policy]) -> None:
        super().__init__()
        self._env, self.policies = env, torch.nn.ModuleList(policies)
        self._counts = [one.num_envs for one in env.envs]

    def _of(self, k: int, state: PolicyState) -> PolicyState:
        return {name.partition("/")[2]: value for name, value in state.items() if name.startswith(f"{k}/")}

    def _each(self) -> list[tuple[int, Policy]]:
        return [(k, policy) for k, policy in enumerate(self.policies) if isinstance(policy, Policy)]

    def initial_state(self, n: int) -> PolicyState:
        states = {k: policy.initial_state(self._counts[k]) for k, policy in self._each()}
        return {f"{k}/{name}": value for k, state in states.items() for name, value in state.items()}

    def reset(self, state: PolicyState, mask: Tensor) -> PolicyState:
        count = len(self.policies)
        resets = {k: policy.reset(self._of(k, state), mask[k::count]) for k, policy in self._each()}
        return {f"{k}/{name}": value for k, own in resets.items() for name, value in own.items()}

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        state, actions = state or self.initial_state(self._env.num_envs), []
        after: PolicyState = {}
        for k, policy in self._each():
            action, own, _ = policy.act(self._env.obs_of_task(k, obs), self._of(k, state), explore=explore)
            actions.append(action)
            after |= {f"{k}/{name}": value for name, value in own.items()}
        return self._env.actions_of_tasks(actions), after, {}


def distill(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    steps: int = 100_000,
    student: str | Path | None = None,
    deterministic: bool = False,
    seed: int = 0,
    num_envs: int = 10,
    reference_episodes: int = 20,
    bases: Sequence[BaseLike | None] | None = None,
) -> Dataset:
    """Make a dataset from which `bc` learns one policy of several runs' tasks.

    Observations are those of `ctrlrl.envs.multi_task`. The specialists act, and explore; what is stored as the action
    is what the specialist of the task does at each observation by its mode, and what was done is `executed`.

    Args:
        runs: the specialists, each by its best checkpoint, in the order of the tasks.
        out: the dataset's folder.
        steps: transitions at least; episodes are finished.
        student: a run that learned all these tasks, which acts in the specialists' place: they say what they would have
            done where it gets to (DAgger, Ross et al. 2011, arXiv:1011.0686).
        deterministic: whether who acts does so by its mode.
        seed: of environments and exploration.
        num_envs: stepped together, in turn one of each task.
        reference_episodes: of the evaluations that give the reference returns.
        bases: of each run, as `load` takes it.

    Raises:
        UsageError: fewer than two runs; they observe or act in ways that cannot be put together; the student is of
            other tasks, or a specialist that it calls on acts by what it remembers.
    """
    if len(runs) < 2:
        raise UsageError("one policy of several specialists takes two runs or more")
    if steps < 1 or reference_episodes < len(runs):
        raise UsageError(f"a dataset of {len(runs)} tasks takes a step, and an episode of each to refer to")
    given = bases or [None] * len(runs)
    loaded = [load(run, base=base) for run, base in zip(runs, given, strict=True)]
    sources = [own_environment(run, None) for run in loaded]
    for source, run in zip(sources, loaded, strict=True):
        if not isinstance(source, str) or "," in source or is_text_task(source):
            raise UsageError(f"{run.path} is of {source}; a specialist is of one task, and that no text")
    prepare_cpu()
    first = on_cpu(loaded[0].config)
    kwargs = [run.config.env_kwargs for run in loaded]
    alike = ("env_python", "pixels", "grayscale", "frame_stack")
    for run in loaded[1:]:
        if differing := [name for name in alike if getattr(run.config, name) != getattr(first, name)]:
            raise UsageError(f"{run.path} and {loaded[0].path} have another {differing[0]}; runs must share it")
    name = ",".join(str(source) for source in sources)
    arguments: dict[str, Any] = {"tasks": kwargs} if any(kwargs) else {}
    env = make(name, replace(first, env_kwargs=arguments), num_envs, "cpu")
    try:
        if not isinstance(env, MultiTask):
            raise UsageError("stacked images of several tasks cannot be collected")
        teacher = Specialists(env, [run.policy for run in loaded])
        acting: Policy = teacher
        if student is not None:
            learned = load(student)
            if (learned.config.env, learned.config.env_kwargs) != (name, arguments):
                told = f"{learned.config.env} {learned.config.env_kwargs or ''}".strip()
                raise UsageError(f"the student {student} learned {told}; the specialists {name} {arguments or ''}")
            if remember := [str(run.path) for run in loaded if run.policy.initial_state(1)]:
                raise UsageError(
                    f"{', '.join(remember)} acts by what it remembers (a queue of planned actions, say), which is of "
                    "no use where the student goes: leave --student out"
                )
            acting = learned.policy
        every = [*(run.policy for run in loaded), acting]
        for policy, own in zip(every, derive_seeds(seed, len(every)), strict=True):
            policy.generator = torch.Generator().manual_seed(own)
        seeds = evaluation_seeds(reference_episodes)
        reference = {
            "random": evaluate(env, RandomPolicy(env, seed), seeds).mean,
            "expert": evaluate(env, teacher, seeds).mean,
        }
        box = env.action_space
        executed = Column(dtype=str(box.dtype), shape=box.shape or ())
        writer = DatasetWriter.create(
            out,
            observation_space=env.observation_space,
            action_space=env.action_space,
            env=name,
            control_dt=env.control_dt,
            columns={"success": Column(dtype="bool"), "executed": executed},
            reference=reference,
            provenance={
                "collected": now(),
                "relabelled": True,
                "specialists": [str(run.path) for run in loaded],
                "student": None if student is None else str(student),
                "deterministic": deterministic,
                "seed": seed,
                "env_kwargs": arguments,
                "git": describe_source(),
            },
        )
        with writer:
            for episode in played(env, acting, seed=seed, explore=not deterministic, teacher=teacher):
                writer.add(episode)
                if writer.num_transitions >= steps:
                    break
    finally:
        env.close()
    return Dataset.open(out)
