"""Starting with the weights of another run: which of them fit, and what is to be remembered of where they come from.

A policy is taken over whole where both are of one kind. Between policies that squash one network's output by tanh
(those of SAC and its variants, TD3 and its, IQL, and BC but for its `gaussian`) the network is taken over: from one
that gives means alone to one that gives standard deviations besides, these start as constants, the former policy's own
where it has any.
Of rewards that are shifted and scaled alike, critics, and V where both have one, are taken over where they are of the
same shape and number, and temperatures where both have one. Optimizers start afresh: it is another loss that they step
down.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import ReplayAgent
from ctrlrl.config import OfflineConfig, SamplingConfig, TrainConfig
from ctrlrl.data.store import Dataset
from ctrlrl.envs.spaces import build_space
from ctrlrl.errors import UsageError
from ctrlrl.nn.policy import DeterministicPolicy, Policy, SquashedGaussianPolicy
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.record import load_run
from ctrlrl.training.offline import reward_scale
from ctrlrl.training.setup import read_config, read_provenance, require_language_of, step_of
from ctrlrl.training.spaces import alike

CRITICS_KEPT, VALUE_KEPT = "critics: as they were", "V: as it was"
LARGE_ALPHA = 0.01
STANDARD_DEVIATION = 0.1
"""Of the actions in [-1, 1] of a policy that had none, before tanh."""


def warm_start(
    agent: ReplayAgent,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    run: str,
    dataset: Dataset | None,
    own_config: TrainConfig,
) -> dict[str, Any]:
    """Put the weights of a run's best checkpoint (its last, where it learned values alone) into `agent`; returns what
    the new run, of `own_config`, remembers of it, as JSON.

    Raises:
        UsageError: there is no such run, or its policy does not fit.
    """
    if agent.trains_base:
        raise UsageError(
            f"--init-from {run}: {type(agent).__name__} begins with what --base does, and learns that: leave it out. "
            "(ctrlrl resume goes on with a run)"
        )
    folder = RunFolder.open(Path(run))
    algo, config = read_config(folder)
    there = sorted(p.name for p in folder.checkpoints.glob("best-*"))
    values_alone = getattr(config.agent, "learn", "both") == "value"  # type: ignore[attr-defined]
    path = folder.find_checkpoint("best" if there and not values_alone else "last")
    state = load_checkpoint(path)["agent"]
    provenance = read_provenance(folder)
    spaces = provenance["environment"]["spaces"]
    for what, own in (("observation", observation_space), ("action", action_space)):
        theirs = build_space(spaces[what])
        if not alike(own, theirs, bounds=what == "action"):
            raise UsageError(
                f"{run} was trained with the {what} space {theirs}, and this is {own}; they must be the same"
            )
    require_language_of(run, own_config, agent.policy, provenance)
    notes = _policy(agent.policy, state["policy"], run)
    former_data: dict[str, Any] = provenance.get("data") or {}
    notes += _values(agent, state, _meaning(config, former_data), _meaning(own_config, dataset))
    record = load_run(folder.path)
    return {
        "run": str(folder.path),
        "algo": algo,
        "checkpoint": path.name,
        "step": step_of(path),
        "unit": "updates" if isinstance(config, OfflineConfig) else "steps",
        "evaluations": [[one.step, one.mean] for one in record.evaluations],
        "notes": notes,
        "data": _compared_with(dataset, former_data),
    }


def _compared_with(dataset: Dataset | None, former: dict[str, Any]) -> dict[str, Any] | None:
    """The data that returns are compared with: the new run's, else the `former` one's."""
    if dataset is None:
        return {name: former[name] for name in ("path", "mean_return", "reference")} if former else None
    return {"path": str(dataset.path), "mean_return": float(dataset.returns.mean()), "reference": dataset.reference}


class _Meaning(NamedTuple):
    """What values are of: discounted sums of (r + shift) * scale."""

    gamma: float | None
    entropy: bool | None
    """Whether they count it; None where there is no choice."""
    shift: float
    scale: float


def _meaning(config: TrainConfig, data: Dataset | dict[str, Any] | None) -> _Meaning:
    """Of the values that a run of `config` learns from `data`, or from what its provenance says of that."""
    sampling: SamplingConfig = getattr(config, "sampling", SamplingConfig())
    if isinstance(data, Dataset):
        scale = reward_scale(data, sampling)
    else:
        by_range = getattr(sampling, "return_range", None) is not None  # a scale that older runs did not write down
        scale = (data or {}).get("rewards", {}).get("scale", math.nan if by_range else sampling.reward_scale)
    gamma = getattr(config.agent, "gamma", None)  # type: ignore[attr-defined]
    entropy = getattr(config.agent, "backup_entropy", None)  # type: ignore[attr-defined]
    return _Meaning(gamma, entropy, sampling.reward_shift, scale)


def _policy(policy: Policy, saved: dict[str, Tensor], run: str) -> list[str]:
    """Take over a policy's weights; returns what is to be said of it."""
    own = policy.state_dict()
    theirs, ours = ({n: v for n, v in state.items() if n.startswith("base.")} for state in (saved, own))
    if bool(theirs) != bool(ours):
        raise _misfit(run, f"{'its' if theirs else 'this'} policy builds on another, and the other one does not")
    if theirs and not (_same(theirs, ours) and all(torch.equal(theirs[n], ours[n].cpu()) for n in ours)):
        raise _misfit(run, "it builds on another base")
    if own.keys() == saved.keys() and all(own[name].shape == saved[name].shape for name in own):
        policy.load_state_dict(saved)
        return ["policy: as it was"]
    if not isinstance(policy, SquashedGaussianPolicy | DeterministicPolicy) or not any(
        n.startswith("trunk.") for n in own
    ):
        raise _misfit(run, "its policy is of another kind")
    if "head.log_std" in saved:  # the mean of bc --agent.policy gaussian and of PPO: other actions after a tanh
        raise _misfit(run, "the mean of its policy is not squashed by tanh (--agent.policy tanh-gaussian of bc is)")
    log_std = next((value for name, value in saved.items() if name.endswith("log_std")), None)
    deviation = math.log(STANDARD_DEVIATION) if log_std is None else log_std
    layers = [name for name in own if name.startswith("trunk.")]
    last = {name for name in layers if name.rpartition(".")[0] == layers[-1].rpartition(".")[0]}
    for name, value in own.items():
        if name.endswith("log_std") or name.startswith("scaling."):
            continue
        if name not in saved:
            raise _misfit(run, f"it has no {name}")
        there = saved[name]
        if name in last and there.shape[1:] == value.shape[1:] and len(value) == 2 * len(there):
            rest = torch.zeros_like(there)
            if name.endswith("bias"):
                rest = rest + deviation
            value.copy_(torch.cat([there, rest]))
        elif name in last and there.shape[1:] == value.shape[1:] and len(there) == 2 * len(value):
            value.copy_(there[: len(value)])
        elif there.shape == value.shape:
            value.copy_(there)
        else:
            raise _misfit(run, f"its {name} is {tuple(there.shape)}, and here it is {tuple(value.shape)}")
    extra = [name for name in saved if name.startswith("normalizer") and name not in own]
    if extra:
        raise _misfit(run, "it standardizes observations: --agent.normalize-obs")
    policy.load_state_dict(own)
    return ["policy: its network, with standard deviations of its own" if log_std is None else "policy: its network"]


def _values(agent: ReplayAgent, state: dict[str, Any], former: _Meaning, own: _Meaning) -> list[str]:
    """Take over critics and temperature where they fit; returns what is to be said of them."""
    critics = getattr(agent, "critics", None)
    notes = []
    scaled = (former.shift, former.scale) != (own.shift, own.scale)
    if critics is not None:
        saved = state.get("critics")
        if saved is None:
            notes.append("critics: new, since the run has none")
        elif scaled:
            notes.append(
                f"critics: new, since those of the run are of rewards (r + {former.shift}) * {former.scale}, and here "
                f"they are of (r + {own.shift}) * {own.scale}; --sampling.reward-shift {former.shift} "
                f"--sampling.reward-scale {former.scale} keeps them"
            )
        elif _same(critics.state_dict(), saved):
            critics.load_state_dict(saved)
            agent.target_critics.load_state_dict(state.get("target_critics", saved))  # type: ignore[attr-defined]
            notes.append(CRITICS_KEPT)
            if former.gamma != own.gamma:
                notes.append(f"their gamma was {former.gamma} and is {own.gamma} here, so they have to change first")
            if None not in (former.entropy, own.entropy) and former.entropy != own.entropy:
                counted = (
                    "counted entropy, and here they do not" if former.entropy else "did not count entropy, and do here"
                )
                notes.append(f"they {counted} (agent.backup_entropy), so they have to change first")
        else:
            shapes = {name: tuple(value.shape) for name, value in saved.items() if name.endswith("weight")}
            notes.append(f"critics: new, since those of the run are of other shapes: {shapes}")
    value = getattr(agent, "value", None)
    if isinstance(value, nn.Module) and not scaled and _same(value.state_dict(), state.get("value", {})):
        value.load_state_dict(state["value"])
        notes.append(VALUE_KEPT)
    if (
        "target_policy" in state
        and hasattr(agent, "target_policy")
        and _same(agent.target_policy.state_dict(), state["target_policy"])
    ):
        agent.target_policy.load_state_dict(state["target_policy"])
    elif hasattr(agent, "target_policy"):
        new = agent.policy.state_dict()
        agent.target_policy.load_state_dict({name: new[name] for name in agent.target_policy.state_dict()})
    if hasattr(agent, "log_alpha"):
        notes += _temperature(agent, None if scaled else state.get("log_alpha"))
    return notes


def _temperature(agent: Any, saved: Tensor | None) -> list[str]:
    """Take over the temperature, unless the user gives another; returns what is to be said of it."""
    config = agent.config
    given = config.initial_alpha != type(config)().initial_alpha
    if given:
        return [f"temperature: {config.initial_alpha:g}, as --agent.initial-alpha says"]
    if saved is not None:
        with torch.no_grad():
            agent.log_alpha.copy_(saved)
    alpha = math.exp(agent.log_alpha.item())
    said = f"temperature: {'new' if saved is None else 'as it was'}, {alpha:.3g}"
    if alpha > LARGE_ALPHA:
        said += (
            f", which may make the policy random before it falls; --agent.initial-alpha {LARGE_ALPHA} is what a policy "
            "that is good already needs"
        )
    return [said]


def _same(own: dict[str, Tensor], saved: dict[str, Tensor]) -> bool:
    return own.keys() == saved.keys() and all(own[name].shape == saved[name].shape for name in own)


def _misfit(run: str, why: str) -> UsageError:
    return UsageError(
        f"the policy of {run} does not fit this agent: {why}. Both must have the same --agent.hidden, observation "
        "entries and --agent.normalize-obs; see its config.json"
    )
