"""Configurations: frozen dataclasses that check themselves, read strictly from files, without importing torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from ctrlrl.errors import UsageError, nearest

C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: on construction each field's type and range are checked.

    Raises:
        UsageError: naming the field, what is allowed and the value.
    """

    section: ClassVar[str] = ""
    """Where the fields stand in the whole configuration: `agent`, `buffer`, or "" at the top."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for f in dataclasses.fields(self):
            path = f"{self.section}.{f.name}" if self.section else f.name
            object.__setattr__(self, f.name, _coerce(getattr(self, f.name), hints[f.name], path))
        self.check()

    def check(self) -> None:
        """Raise `UsageError` where a value is out of range; subclasses say what that is."""

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Raise unless `ok`: the field `name` must be `allowed`."""
        if not ok:
            path = f"{self.section}.{name}" if self.section else name
            raise UsageError(f"{path} must be {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, base: typing.Self | None = None, source: str = "") -> typing.Self:
        """Build from nested plain values; fields that `data` leaves out come from `base`, else from the defaults.

        Raises:
            UsageError: on an unknown field (with the nearest names) or a value of the wrong type or range.
        """
        return _build(cls, data, base, cls.section, source)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (tuples as lists), ready for JSON."""
        out: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return out


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object such as '{\"healthy_reward\": 0.5}'")
    return value


JsonObject = Annotated[
    dict[str, Any],
    arg(metavar="JSON"),
    PrimitiveConstructorSpec[dict[str, Any]](
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: _json_object(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
"""A field that takes a JSON object on the command line."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Config):
    """The replay memory."""

    section: ClassVar[str] = "buffer"
    capacity: int = 1_000_000
    """Transitions kept; the oldest are overwritten."""
    n_step: int = 1
    """Rewards summed before the bootstrap; 1 is the papers' SAC."""
    hindsight: float = 0.0
    """Share of the transitions drawn that get another goal, one which their episode came to later on (arXiv:1707.01495,
    where it is 0.8); for tasks of ours whose reward is one of goals, PandaReach-v0 with '{"reward": "sparse"}' say, and
    text environments that know goals."""

    def check(self) -> None:
        self.require("capacity", 1 <= self.capacity <= 10**11, "between 1 and 100,000,000,000")
        self.require("n_step", 1 <= self.n_step <= 1000, "between 1 and 1000")
        self.require("hindsight", 0 <= self.hindsight <= 1, "between 0 and 1")
        self.require("n_step", self.n_step == 1 or not self.hindsight, "1 where goals are replaced (hindsight)")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How transitions are drawn."""

    section: ClassVar[str] = "sampling"
    reward_shift: float = 0.0
    """Added to each reward that is learned from, before it is scaled; what is reported stays as it is."""
    reward_scale: float = 1.0
    """Factor of each reward that is learned from."""
    temperature: float | None = None
    """Of a dataset, draw episodes in proportion to exp(return / temperature), with returns scaled to [0, 1], and then
    one of their transitions (arXiv:2306.13085; there 0.1). By default all transitions are drawn alike."""

    def check(self) -> None:
        self.require("temperature", self.temperature is None or self.temperature > 0, "above 0")
        self.require("reward_scale", self.reward_scale > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class OfflineSamplingConfig(SamplingConfig):
    """How transitions of a dataset are drawn where there is no other source."""

    n_step: int = 1
    """Rewards summed before the bootstrap."""
    hindsight: float = 0.0
    """Share of the transitions that get another goal, which their episode came to later on (arXiv:1707.01495, where it
    is 0.8); for tasks of ours whose reward is one of goals, PandaReach-v0 with '{"reward": "sparse"}' say."""
    return_range: float | None = None
    """Scale rewards besides, so that the best episode's return lies so far above the worst one's; IQL's paper has 1000
    on locomotion."""

    def check(self) -> None:
        super().check()
        self.require("n_step", 1 <= self.n_step <= 1000, "between 1 and 1000")
        self.require("hindsight", 0 <= self.hindsight <= 1, "between 0 and 1")
        self.require("n_step", self.n_step == 1 or not self.hindsight, "1 where goals are replaced (hindsight)")
        self.require("return_range", self.return_range is None or self.return_range > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(Config):
    """The language model of a training in a text environment, and how it answers; nothing elsewhere."""

    section: ClassVar[str] = "language"
    model: str | None = None
    """Folder, or name, of a causal model of transformers, with its tokenizer."""
    normalize: Literal["sum", "token", "word"] = "sum"
    """Logit of a candidate: the sum of its tokens' log-probabilities, or their mean over tokens or words (TWOSOME,
    arXiv:2401.14151)."""
    temperature: float = 1.0
    """By which the model's logits are divided, where it acts and where it learns."""
    critic: Literal["separate", "small", "shared", "joint", "frozen"] = "separate"
    """What critics read: a copy of the model, trained by their loss; a small encoder of their own, of two layers of
    critic_hidden units; the policy's own features, of which they train nothing, or, of PPO alone, which train the
    policy's model too (joint); or those without the adapter."""
    critic_hidden: int = 128
    """Units of the hidden layer between these features and a value."""
    lora_rank: int = 0
    """Rank of a LoRA adapter, which is trained alone (arXiv:2106.09685); 0 trains all weights."""
    lora_alpha: int = 16
    """Its scale, times the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get one; by default peft's for the model."""
    history: int = 0
    """Earlier turns of the episode that the prompt tells."""
    chat: bool = False
    """Tell it as a conversation, by the chat template of an instructed model: the goal is what the system says."""
    prompt_tokens: int = 64
    """Tokens of the prompt, the goal's not counted; of longer ones the oldest are left out, and counted."""
    goal_tokens: int = 32
    """Tokens of the goal at most."""
    candidate_tokens: int = 16
    """Tokens of a candidate, or of a free answer with its end, at most."""
    max_candidates: int = 16
    """Candidates at most."""
    form: Literal["auto", "candidates", "tokens"] = "auto"
    """Whether one of the environment's commands is chosen, or an answer is written token by token; auto: the former
    where it offers commands."""
    group_size: int = 1
    """Environments that are given the same tasks, begin together and wait for each other: for agent.advantage grpo,
    rloo and gigpo. Evaluations have no groups."""
    generation_gib: float = 2.0
    """Memory that answers may take while they are written, GiB; where there are too many, some after the others."""

    def check(self) -> None:
        self.require("temperature", self.temperature > 0, "above 0")
        self.require("critic_hidden", 1 <= self.critic_hidden <= 100_000, "between 1 and 100,000")
        self.require("lora_rank", 0 <= self.lora_rank <= 4096, "between 0 (off) and 4,096")
        self.require("lora_alpha", self.lora_alpha > 0, "above 0")
        self.require("lora_targets", bool(self.lora_rank) or not self.lora_targets, "left out without lora_rank")
        self.require("group_size", 1 <= self.group_size <= 10_000, "between 1 and 10,000")
        self.require("generation_gib", self.generation_gib > 0, "above 0")
        self.require("history", 0 <= self.history <= 1000, "between 0 and 1,000")
        for name in ("prompt_tokens", "goal_tokens", "candidate_tokens", "max_candidates"):
            self.require(name, 1 <= getattr(self, name) <= 100_000, "between 1 and 100,000")
        fits = self.critic != "frozen" or self.lora_rank > 0 or self.model is None
        self.require("critic", fits, "another one without an adapter (lora_rank), which frozen goes without")
        whole = self.critic != "small" or self.critic_hidden % 8 == 0
        self.require("critic_hidden", whole, "a multiple of 8 with critic small: units of its encoder's 4 heads")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config, ABC):
    """What every algorithm's training run takes."""

    compile_from: ClassVar[int] = 50_000
    """Updates from which on compiling them on a CPU pays for itself: it takes up to a minute, and saves one to three
    milliseconds each."""
    env: str
    """Environment to train on: an ID such as HalfCheetah-v5, or module:ID. `ctrlrl envs` lists them."""
    seed: int = 0
    """Seed of everything random."""
    backend: Literal["auto", "native", "native-fast", "warp", "gymnasium", "workers", "parallel"] = "auto"
    """Where environments run: native as one batch on threads, where there is a task of ours (ctrlrl envs says);
    native-fast too, with contact forces that differ from Gymnasium's; warp on a GPU, tasks of our own;
    gymnasium one after the other in this process,
    workers in processes of their own, parallel in both, a share each. auto is workers with env_python, else native
    where there is that, else parallel where an ID is trained from rollouts for 50,000 steps or more on several cores,
    else gymnasium. All but native-fast give the same trajectories of environments that share nothing and draw from no
    global generator."""
    env_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the environment, as JSON: '{"forward_reward_weight": 2.0}'."""
    pixels: int = 0
    """Observe the environment's picture, scaled to so many pixels a side, instead of its state; 0 is the state."""
    grayscale: bool = False
    """With pixels: pictures without colour, a third of the memory."""
    frame_stack: int = 1
    """Successive images that are observed together, so that motion can be seen; the replay stores each once."""
    env_python: str | None = None
    """Python interpreter for the workers, for environments whose packages conflict with ours."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """The language model that acts in a text environment."""
    worker_timeout: float = 60.0
    """Seconds after which a worker that does not answer counts as hanging."""
    device: str = "auto"
    """Where to learn: cpu, cuda, cuda:1; auto takes the GPU where there is one."""
    threads: int | None = None
    """CPU cores to use, by default those there are, at most 8: by threads of the learner, where its networks are large
    enough, whose number changes last bits, and by processes that step environments."""
    out: str | None = None
    """Run folder; must not hold a run yet. By default runs/ALGO-ENV-seedN."""
    log_every: int = 1_000
    """Environment steps between two lines of training metrics."""
    eval_every: int = 10_000
    """Environment steps between two evaluations; 0 turns them off."""
    eval_episodes: int = 10
    """Episodes of an evaluation, with the same fixed list of seeds each time."""
    checkpoint_every: int = 10_000
    """Environment steps between two checkpoints: what a crash can cost at most."""
    keep_checkpoints: int = 2
    """Resumable checkpoints kept, the newest ones; the best one for evaluation is kept besides."""
    video: bool = True
    """Record one episode of the best policy at the end."""

    def check(self) -> None:
        self.require("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295")
        self.require("pixels", self.pixels == 0 or 8 <= self.pixels <= 1024, "0 (off), or between 8 and 1,024")
        self.require("grayscale", bool(self.pixels) or not self.grayscale, "false unless pixels are observed")
        self.require("frame_stack", 1 <= self.frame_stack <= 64, "between 1 and 64")
        self.require("worker_timeout", self.worker_timeout > 0, "above 0")
        self.require("threads", self.threads is None or 1 <= self.threads <= 1024, "between 1 and 1,024")
        self.require("log_every", self.log_every >= 1, "at least 1")
        self.require("eval_every", self.eval_every >= 0, "0 (off) or more")
        self.require("eval_episodes", 1 <= self.eval_episodes <= 100_000, "between 1 and 100,000")
        self.require("checkpoint_every", self.checkpoint_every >= 1, "at least 1")
        self.require("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1")

    @property
    @abstractmethod
    def budget(self) -> int:
        """Length of the training: environment steps, or updates where there is no environment to step."""

    @abstractmethod
    def planned_updates(self) -> float:
        """Gradient updates of the whole training."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainConfig):
    """What training in an environment takes besides. Budgets count environment steps, summed over environments."""

    steps: int = 1_000_000
    """Environment steps in all."""
    num_envs: int = 1
    """Environments stepped together."""

    def check(self) -> None:
        super().check()
        self.require("env", bool(self.env), "an environment ID")
        self.require("steps", self.steps >= 1, "at least 1")
        self.require("num_envs", 1 <= self.num_envs <= 1_000_000, "between 1 and 1,000,000")

    @property
    def budget(self) -> int:
        return self.steps


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(TrainConfig):
    """What training on a dataset takes besides. Budgets, and all that is counted in steps elsewhere, are updates."""

    env: str = ""
    """Environment to evaluate on, by default the one that the dataset names. It is not learned from."""
    data: str
    """Dataset to learn from: a folder that `ctrlrl data import` or `ctrlrl data collect` made."""
    updates: int = 500_000
    """Gradient updates in all."""
    init_from: str | None = None
    """Run whose weights to start with."""
    sampling: OfflineSamplingConfig = field(default_factory=OfflineSamplingConfig)
    """How transitions are drawn."""
    log_every: int = 1_000
    """Updates between two lines of training metrics."""
    eval_every: int = 10_000
    """Updates between two evaluations; 0 turns them off."""
    checkpoint_every: int = 50_000
    """Updates between two checkpoints: what a crash can cost at most."""

    def check(self) -> None:
        super().check()
        self.require("data", bool(self.data), "a dataset's folder")
        self.require("updates", self.updates >= 1, "at least 1")
        agent = getattr(self, "agent", None)
        if agent is not None and getattr(agent, "utd", None) != getattr(type(agent), "utd", None):
            raise UsageError(
                "agent.utd is of training in an environment; of a dataset --updates says how many there are"
            )

    @property
    def budget(self) -> int:
        return self.updates

    def planned_updates(self) -> float:
        return float(self.updates)


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(OnlineConfig):
    """What off-policy algorithms take besides."""

    learning_starts: int = 5_000
    """Environment steps before the first update: with uniformly random actions, or, where there is a policy that can do
    something (init_from, a language model, a base), with that one's (the warm-up of WSRL, arXiv:2412.07762)."""
    data: str | None = None
    """Dataset to learn from besides: a folder that `ctrlrl data import` or `ctrlrl data collect` made."""
    data_share: float = 0.5
    """Of each batch that comes from the dataset, exactly."""
    init_from: str | None = None
    """Run whose weights to start with, trained offline or online."""
    base: str | None = None
    """Frozen policy under the one that is learned: a run, a bundle, an ONNX file, or MODULE:FUNCTION, called with the
    observation and action spaces, which gives a function of observations or a ctrlrl policy."""
    keep_statistics: bool = True
    """Where observations are standardized: keep the statistics that came with data or init_from as they are."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How transitions of the replay memory and the dataset are drawn."""
    update_every: int = 8
    """Environment steps between two turns of updates, each of which makes all that are owed (agent.utd). Several in a
    row find code and data in the processor's caches; the policy acts with weights that are so many steps old at most.
    A training that ends between two turns leaves the updates to whoever resumes it."""
    buffer: ReplayConfig = field(default_factory=ReplayConfig)
    """The replay memory."""

    def planned_updates(self) -> float:
        return float(self.agent.utd * (self.steps - self.learning_starts))  # type: ignore[attr-defined]

    def check(self) -> None:
        super().check()
        self.require("data_share", 0 < self.data_share <= 1, "in (0, 1]")
        if self.data is None:
            self.require("data_share", self.data_share == 0.5, "left alone where there is no data")
            self.sampling.require("temperature", self.sampling.temperature is None, "left alone where there is no data")
            own = self.init_from is not None or self.keep_statistics
            self.require("keep_statistics", own, "left alone where there is neither data nor init_from")
        self.require("learning_starts", self.learning_starts >= 0, "0 or more")
        self.require("update_every", self.update_every >= 1, "1 or more")
        capacity = self.buffer.capacity
        if capacity < self.num_envs:
            raise UsageError(f"buffer.capacity must be at least num_envs = {self.num_envs}, got {capacity}")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(OnlineConfig):
    """What on-policy algorithms take besides."""

    compile_from: ClassVar[int] = 15_000
    """Their networks are smaller: compiling takes some ten seconds, and saves most of a millisecond each."""
    num_envs: int = 8
    """Environments stepped together."""
    rollout_steps: int = 2_048
    """Environment steps between two updates, summed over environments, and rounded up to whole steps of all of them. A
    training that ends within a rollout leaves it to whoever resumes it."""
    log_every: int = 2_048
    """Environment steps between two lines of training metrics."""

    def check(self) -> None:
        super().check()
        self.require("rollout_steps", 2 <= self.rollout_steps <= 10**9, "between 2 and 1,000,000,000")

    @property
    def horizon(self) -> int:
        """T: control steps of a rollout."""
        return -(-self.rollout_steps // self.num_envs)

    def planned_updates(self) -> float:
        agent = self.agent  # type: ignore[attr-defined]
        return float(self.steps * agent.epochs / agent.minibatch_size)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as text, for want of a dot; people write it as a number."""


_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file as nested plain values.

    Raises:
        UsageError: if it cannot be read or is no mapping.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise UsageError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no valid YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold fields and their values, such as 'agent: {{gamma: 0.98}}'; got {data!r}")
    return data


def changed_fields(config: Config, reference: Config) -> list[str]:
    """Dotted names of the fields in which `config` differs from `reference`."""
    out = []
    for f in dataclasses.fields(config):
        mine, theirs = getattr(config, f.name), getattr(reference, f.name, None)
        if isinstance(mine, Config) and isinstance(theirs, Config):
            out += [f"{f.name}.{name}" for name in changed_fields(mine, theirs)]
        elif mine != theirs:
            out.append(f.name)
    return out


def _build(cls: type[C], data: Mapping[str, Any], base: C | None, path: str, source: str) -> C:
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in names:
            place = f" in {source}" if source else ""
            raise UsageError(f"unknown field {where!r}{place}.{nearest(str(key), names)} Fields: {', '.join(names)}")
        hint = hints[key]
        if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
            value = _build(hint, value, getattr(base, key, None), where, source)
        values[key] = value
    if base is not None:
        return dataclasses.replace(base, **values)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if required:
        raise UsageError(f"missing field {required[0]!r}" + (f" in {source}" if source else ""))
    return cls(**values)


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, where that loses nothing (an int for a float, a list for a tuple)."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _coerce(value, typing.get_args(hint)[0], path)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            try:
                return _coerce(value, option, path)
            except UsageError:
                continue
    elif origin is Literal:
        options = typing.get_args(hint)
        if value in options:
            return value
        raise UsageError(f"{path} must be one of {', '.join(map(str, options))}, got {value!r}")
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(item, typing.get_args(hint)[0], path) for item in value)
    elif (
        (origin is dict and isinstance(value, dict) and _is_json(value))
        or (hint is float and isinstance(value, float) and math.isfinite(value))
        or (
            isinstance(hint, type)
            and hint is not float
            and isinstance(value, hint)
            and not _is_bool_for_int(value, hint)
        )
    ):
        return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise UsageError(f"{path} must be {_type_name(hint)}, got {value!r}")


def _is_bool_for_int(value: Any, hint: type) -> bool:
    return hint is int and isinstance(value, bool)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in args)
    if origin is tuple:
        return f"a list of {_type_name(args[0])} values"
    if origin is dict:
        return "a JSON object"
    names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
