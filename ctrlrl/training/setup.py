"""What training, resuming and evaluating share: environments, devices and the files of a run, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from ctrlrl.algorithms.registry import ALGORITHMS, find_algorithm, train_config_class
from ctrlrl.config import Config, OffPolicyConfig, OnPolicyConfig, TrainConfig
from ctrlrl.data.store import Dataset
from ctrlrl.envs.frame_stack import FrameStack
from ctrlrl.envs.make import has_native, make_env
from ctrlrl.envs.tasks.registry import is_robot_task
from ctrlrl.envs.text.registry import is_text_task
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import multiplies_bfloat16, unavailable
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.policy import Policy
from ctrlrl.runs.folder import RunFolder
from ctrlrl.tokens import TokenSpace

EnvLike = str | gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any] | VectorEnv | Callable[[], gym.Env[Any, Any]]
"""An ID, an environment, a vector environment, or a function that makes one environment."""

_FORMER = {"update_every": 1}
_FORMER_AGENT = {"execution": "eager", "precision": "float32", "min_obs_std": 0.0}
"""What runs did that were written before there was such a setting: a run goes on as what it was."""
MAX_EVAL_ENVS = 16
"""Environments that evaluation steps together at most."""


def make(
    env: EnvLike,
    config: TrainConfig,
    num_envs: int,
    device: str,
    *,
    render: bool = False,
    share: int = 1,
    grouped: bool = False,
) -> VectorEnv:
    """`num_envs` environments as `config` wants them; to render, in this process where that is possible; `grouped`, in
    groups of one task where it asks for that.

    Where nothing else is asked for and `env` is an ID, `share` processes share them.
    """
    if is_text_task(env):
        from ctrlrl.language.adapter import text_environments  # imports transformers

        kwargs, plain = config.env_kwargs, {f.name: f.default for f in dataclasses.fields(config)}
        for name in ("backend", "env_python", "pixels", "grayscale", "frame_stack"):
            if getattr(config, name) != plain[name]:
                raise UsageError(f"{env} is stepped in this process and has no pictures: leave {name} out")
        if grouped and config.language.group_size > 1 and not isinstance(config, OnPolicyConfig):
            raise UsageError("language.group_size is for algorithms that learn from rollouts, ppo: leave it out")
        language = config.language if grouped else dataclasses.replace(config.language, group_size=1)
        achieved = isinstance(config, OffPolicyConfig) and config.buffer.hindsight > 0
        return text_environments(
            str(env), language, num_envs=num_envs, env_kwargs=kwargs, device=device, achieved=achieved
        )
    backend, cores = config.backend, config.threads
    if render and not config.env_python and not is_robot_task(env):
        backend = "gymnasium"
    elif backend == "auto" and share > 1 and num_envs > 1 and _spreads(env, config):
        backend, cores = "parallel", share
    made = make_env(
        env,
        num_envs=num_envs,
        backend=backend,
        cores=cores,
        env_kwargs=config.env_kwargs,
        env_python=config.env_python,
        device=device,
        render=render,
        worker_timeout=config.worker_timeout,
        pixels=config.pixels,
        grayscale=config.grayscale,
    )
    if config.frame_stack == 1:
        return made
    try:
        return FrameStack(made, config.frame_stack, owned=made is not env)
    except UsageError:
        if made is not env:
            made.close()
        raise


def _spreads(env: EnvLike, config: TrainConfig) -> bool:
    """Whether `env` can be made in worker processes of this interpreter, and is not better stepped natively."""
    foreign = isinstance(env, str) and "," not in env and not config.env_python and not is_robot_task(env)
    return foreign and not steps_natively(env, config)


def steps_natively(env: EnvLike, config: TrainConfig) -> bool:
    """Whether `config` leaves the backend open and `env` is stepped by a task of ours then."""
    return config.backend == "auto" and has_native(
        env, env_kwargs=config.env_kwargs, env_python=config.env_python, pixels=config.pixels
    )


def on_cpu(config: TrainConfig) -> TrainConfig:
    """`config` for environments beside those that are learned from, which are on the CPU."""
    return replace(config, backend="auto") if config.backend == "warp" else config


def visible(config: TrainConfig, backend: str | None = None) -> TrainConfig:
    """`config` with `backend`, by default its own, in place of worker processes, whose scenes cannot be looked at.

    What runs under another interpreter stays there.
    """
    backend = backend or on_cpu(config).backend
    if backend in ("workers", "parallel") and not config.env_python:
        backend = "auto"
    return replace(config, backend=backend)  # type: ignore[arg-type]  # checked when made


def pick_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        UsageError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch {torch.__version__} sees no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return device


def settle_execution(
    config: TrainConfig, device: torch.device, *, plain: bool, resumed: bool
) -> tuple[TrainConfig, str]:
    """`config` with the agent's `execution` and `precision` decided, and what to tell about it.

    Args:
        config: as asked for.
        device: the learner's.
        plain: whether observations are vectors and the networks are the built-in ones without memory, which can be
            compiled for sure, and soon.
        resumed: whether a run goes on, perhaps on another machine: then it goes on eagerly where it must.

    Raises:
        UsageError: if a new run asks for what cannot run here.
    """
    agent = config.agent  # type: ignore[attr-defined]
    asked, remark = agent.execution, ""
    if asked != "auto":
        reason = unavailable(asked, device)
        if asked != "eager" and config.language.model is not None:
            reason = "the shapes of a language model's step depend on its texts"
        if reason is not None and not resumed:
            raise UsageError(f"--agent.execution {asked}: {reason}. Or take --agent.execution eager")
        chosen = asked
        if reason is not None:
            chosen, remark = "eager", f"updates run eagerly and not {asked}, which changes last bits: {reason}"
    elif device.type != "cpu" or not plain or config.planned_updates() < config.compile_from:
        chosen = "eager"
    elif reason := unavailable("compiled", device):
        chosen, remark = "eager", f"updates run eagerly, at about half the speed: {reason}"
    else:
        chosen = "compiled"
    settled, products = {"execution": chosen}, ""
    if (precision := getattr(agent, "precision", None)) is not None:  # an agent that has none is of float32
        if precision == "auto":
            reduced = device.type == "cpu" and plain and chosen == "compiled" and multiplies_bfloat16()
            precision = "bfloat16" if reduced else "float32"
        settled["precision"] = precision
        products = " with products in bfloat16" if precision == "bfloat16" else ""
    if asked == "auto" and chosen == "compiled":
        remark = f"updates are compiled{products}; the first one takes up to a minute"
    return replace(config, agent=replace(agent, **settled)), remark  # type: ignore[call-arg]


def read_config(folder: RunFolder) -> tuple[str, TrainConfig]:
    """The algorithm's name and the configuration of a run.

    Raises:
        UsageError: if config.json is not what a run writes.
    """
    source = str(folder.path / "config.json")
    data = folder.read_json("config")
    algo = data.pop("algo", None)
    data.pop("preset", None)
    if not isinstance(algo, str) or algo not in ALGORITHMS:
        raise UsageError(f"{source} names the algorithm {algo!r}, which this version does not have")
    made, agent = train_config_class(algo), find_algorithm(algo).load_config_class()
    data = _of(made, _FORMER) | data
    if isinstance(data.get("agent"), dict):
        data["agent"] = _of(agent, _FORMER_AGENT) | data["agent"]
    return algo, made.from_dict(data, source=source)


def _of(config: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of `config`."""
    fields = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if name in fields}


def read_provenance(folder: RunFolder) -> dict[str, Any]:
    """The provenance of a run, with the entries that are relied on.

    Raises:
        UsageError: if provenance.json is not what a run writes.
    """
    value = folder.read_json("provenance")
    spaces = value["environment"].get("spaces") if isinstance(value.get("environment"), dict) else None
    whole = isinstance(value.get("sessions"), list) and isinstance(value.get("custom"), dict)
    if not whole or not isinstance(spaces, dict) or spaces.keys() != {"observation", "action"}:
        raise UsageError(f"{folder.path / 'provenance.json'} is not as a run writes it; restore it from a copy")
    return value


def require_objects(provenance: dict[str, Any], **given: object) -> None:
    """Raise unless what was an object in training, and is not saved with the run, is given again."""
    for key, name in provenance["custom"].items():
        if key in given and given[key] is None:
            raise UsageError(
                f"the run was trained from Python with an own {key} ({name}), which is not saved with it; "
                f"pass the same one: {key}=..."
            )


SPEAKS = ("bc", "iql-discrete", "iql-tokens", "ppo", "sac-discrete")
"""Algorithms that a language model takes part in."""


def networks_of(algo: str, config: TrainConfig, network: NetworkFactory | None) -> NetworkFactory | None:
    """`network`, or else those of the language model that `config` names, if any.

    Raises:
        UsageError: both are given, the algorithm has no use for it, or the model cannot be loaded.
    """
    if config.language.model is None:
        return network
    if algo not in SPEAKS:
        raise UsageError(f"a language model is for {', '.join(SPEAKS)} so far, not for {algo}")
    if config.language.critic == "shared" and getattr(config.agent, "learn", "both") == "policy":  # type: ignore[attr-defined]
        raise UsageError(
            "language.critic shared: critics read the policy's features, which move, and with agent.learn policy they"
            " do not follow: take separate, small or frozen for both trainings"
        )
    if network is not None:
        raise UsageError("network=... and language.model are two networks for one policy: leave one of them out")
    from ctrlrl.language.adapter import backbone  # imports transformers

    return backbone(config.language)


def manner_of(config: TrainConfig, action_space: gym.Space[Any]) -> str:
    """A remark where the language model that `config` names is told things otherwise than before."""
    if config.language.model is None:
        return ""
    from ctrlrl.language.prompts import other_manner

    return other_manner(config.language, tokens=isinstance(action_space, TokenSpace))


def language_of(config: TrainConfig, policy: Policy) -> dict[str, Any]:
    """What provenance says of a run's language model."""
    if config.language.model is None:
        return {}
    from ctrlrl.language.adapter import digests

    return {"language": digests(config.language, policy)}


def require_same_language(config: TrainConfig, policy: Policy, provenance: dict[str, Any]) -> None:
    """Raise UsageError where `policy`, before a checkpoint is read into it, has another language model than the one
    that `provenance` is of."""
    if differs := _other_language(config, policy, provenance):
        raise UsageError(
            f"the model {config.language.model} is no longer the one that the run was trained with "
            f"({', '.join(differs)}): put the former one there"
        )


def require_language_of(run: str, config: TrainConfig, policy: Policy, provenance: dict[str, Any]) -> None:
    """Raise UsageError where `policy`, which is to begin with the weights of `run`, has another language model below
    them than that run had."""
    if differs := _other_language(config, policy, provenance):
        raise UsageError(
            f"--init-from {run}: it was trained with another model than {config.language.model} "
            f"({', '.join(differs)}), and an adapter fits its own alone: --language.model as in its config.json"
        )


def require_words_of(dataset: Dataset, config: TrainConfig) -> None:
    """Raise UsageError where `dataset` has token ids of another tokenizer than that of the language model of `config`;
    of which datasets know since they are collected with it."""
    before = dataset.provenance.get("language")
    if config.language.model is None or not isinstance(before, dict):
        return
    from ctrlrl.language.adapter import words_digest

    if before.get("tokenizer") != words_digest(config.language):
        raise UsageError(
            f"the tokens of {dataset.path} are those of another tokenizer than that of {config.language.model} "
            "(language.model), to which they would mean other words: take the model that it was collected with"
        )


def _other_language(config: TrainConfig, policy: Policy, provenance: dict[str, Any]) -> list[str]:
    before = provenance.get("language")
    if config.language.model is None or not isinstance(before, dict):
        return []
    from ctrlrl.language.adapter import differing

    return differing(config.language, policy, before)


def eval_rows(source: EnvLike, episodes: int) -> int:
    """Environments to evaluate on together: those of a vector environment, else as many as there are episodes."""
    if isinstance(source, VectorEnv | gym.vector.VectorEnv):
        return source.num_envs
    return min(episodes, MAX_EVAL_ENVS)


def step_of(checkpoint: Path) -> int:
    """Environment steps at which a checkpoint was written, from its folder's name."""
    return int(checkpoint.name.split("-")[1])


def name_of(value: object) -> str:
    """What to call an environment, network or encoder that was passed as an object."""
    if isinstance(value, str):
        return value
    if isinstance(value, VectorEnv):
        return value.name
    env_id = getattr(getattr(value, "spec", None), "id", None)
    if env_id is not None:
        return str(env_id)
    named = value if hasattr(value, "__qualname__") else type(value)
    return str(named.__qualname__).replace("<", "").replace(">", "")


def given(**values: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in values.items() if value is not None}
