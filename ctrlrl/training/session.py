"""From a configuration to a run: `train` starts one, `resume` goes on with one, `load` and `evaluate_run` use one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.algorithms.agent import OffPolicyAgent
from ctrlrl.algorithms.registry import ALGORITHMS, find_algorithm, train_config_class
from ctrlrl.config import OffPolicyConfig, changed_fields
from ctrlrl.envs.make import make_env
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.vector import EnvState, VectorEnv
from ctrlrl.errors import CtrlrlError, Interrupted, UsageError
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.policy import Policy
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.files import write_json
from ctrlrl.runs.folder import RunFolder, default_path, require_space, require_vacant
from ctrlrl.runs.metrics import TensorBoard, Writer
from ctrlrl.runs.progress import Progress
from ctrlrl.runs.provenance import (
    command_line,
    describe_environment,
    describe_machine,
    describe_source,
    differences,
    now,
)
from ctrlrl.runs.report import write_report
from ctrlrl.runs.video import rendering_error, write_video
from ctrlrl.training.callbacks import Callback
from ctrlrl.training.collector import Collector
from ctrlrl.training.evaluation import Evaluation, evaluate, evaluation_seeds
from ctrlrl.training.off_policy import OffPolicyLoop, restore_global_generators
from ctrlrl.tree import obs_to

EnvLike = str | gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any] | VectorEnv | Callable[[], gym.Env[Any, Any]]
MAX_EVAL_ENVS = 16
VIDEO_STEPS = 500
"""Steps of an episode that a video shows at most; rendering without a GPU takes tens of milliseconds each."""


@dataclass(frozen=True)
class Run:
    """A run on disk, with its policy in memory.

    Attributes:
        path: the run folder.
        config: the resolved configuration.
        policy: the policy of the checkpoint that was asked for.
    """

    path: Path
    config: OffPolicyConfig
    policy: Policy

    @property
    def report(self) -> Path:
        """The report of this run."""
        return self.path / "report.html"


def train(
    algo: str,
    env: EnvLike,
    *,
    eval_env: EnvLike | None = None,
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[Writer] = (),
    config: OffPolicyConfig | None = None,
    preset: str | bool | None = True,
    quiet: bool = False,
    **fields: Any,
) -> Run:
    """Train a policy and return the finished run; the same as `ctrlrl train ALGO --env ENV`.

    Args:
        algo: `sac`, ... (see `ctrlrl algos`).
        env: an ID; or an environment object, a vector environment, or a function that makes one environment.
        eval_env: what to evaluate on, where `env` is an object that cannot be made a second time.
        network: `factory(in_features, out_features)`, in place of the multilayer perceptrons.
        encoder: `factory(observation_space)`, from observations (B, ...) to features (B, F): images, say.
        callbacks: called between steps.
        writers: take every record, beside `metrics.jsonl` and TensorBoard.
        config: the whole configuration, instead of `fields`.
        preset: whether to start from the settings for this family of environments, where there are any; together
            with `config`, the name of the preset that is in it already.
        quiet: print nothing.
        fields: of the configuration: `steps=20_000, seed=1, agent={"gamma": 0.98}, buffer={"n_step": 3}`.

    Raises:
        UsageError: on bad input, before anything is written.
        EnvironmentFailure, NonFiniteError, Interrupted: as they happen; the run is saved and can be resumed.
    """
    algorithm = find_algorithm(algo)
    name = env if isinstance(env, str) else _name_of(env)
    cls = train_config_class(algo)
    if config is None:
        used = algorithm.preset_for(name) if preset else None
        config = cls.from_dict(fields, base=cls.from_dict({"env": name} | (used.values if used else {})))
        preset = used.name if used else None
        if used and not quiet:
            print(f"preset {used.name}: {used.values} ({used.reason})")
    out = Path(config.out) if config.out else default_path(algo, name, config.seed)
    config = replace(config, out=str(out))
    require_vacant(out)

    session = _Session(algo, config, env, eval_env, network, encoder, quiet=quiet)
    try:
        require_space(out, session.disk_needed())
        folder = RunFolder.create(out)
        custom = {
            key: _name_of(value)
            for key, value in {"env": env, "network": network, "encoder": encoder}.items()
            if value is not None and not isinstance(value, str)
        }
        machine = describe_machine(session.device, session.threads)
        folder.write_json(
            "provenance",
            {"command": command_line(), "started": now(), **machine}
            | {"git": describe_source(), "environment": describe_environment(session.env)}
            | {"changed": changed_fields(config, cls(env=config.env, out=config.out)), "custom": custom}
            | {"sessions": [{"started": now(), "from_step": 0, "command": command_line(), "notes": []}]},
        )
        folder.write_json("config", {"algo": algo, "preset": preset or None, **config.to_dict()})
        return session.run(folder, callbacks, writers, state=None)
    finally:
        session.close()


def resume(
    run: str | Path,
    *,
    steps: int | None = None,
    checkpoint: str = "last",
    env: EnvLike | None = None,
    eval_env: EnvLike | None = None,
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[Writer] = (),
    quiet: bool = False,
) -> Run:
    """Go on with a run exactly where its checkpoint left it; a larger `steps` extends it.

    `env`, `network`, `encoder` and `callbacks` must be given again where `train` got objects; they are not saved.

    Raises:
        UsageError: if there is no such run or checkpoint, or it is damaged.
    """
    folder = RunFolder.open(Path(run))
    algo, config = _read_config(folder)
    state_path = folder.find_checkpoint(checkpoint)
    if not state_path.name.startswith("step-"):
        raise UsageError(f"{state_path.name} holds weights only; resume from one of the step-... checkpoints")
    state = load_checkpoint(state_path)
    done = state["loop"]["env_steps"]
    if steps is not None:
        if steps < done:
            raise UsageError(
                f"{folder.path} has done {done:,} steps already; --steps must be at least that, got {steps}"
            )
        config = replace(config, steps=steps)
    provenance = folder.read_json("provenance")
    _require_objects(provenance, env=env, network=network, encoder=encoder)
    if len(state["callbacks"]) != len(callbacks):
        raise UsageError(
            f"the run was trained with {len(state['callbacks'])} callbacks, now there are {len(callbacks)}; "
            "pass the same ones, in the same order"
        )

    session = _Session(algo, config, env if env is not None else config.env, eval_env, network, encoder, quiet=quiet)
    try:
        folder.forget_after(done)
        notes = differences(provenance, describe_machine(session.device, session.threads))
        notes = [f"the last bits may differ from an uninterrupted run: {', '.join(notes)}"] if notes else []
        entry = {"started": now(), "from_step": done, "command": command_line(), "notes": notes}
        provenance["sessions"].append(entry)
        folder.write_json("provenance", provenance)
        folder.write_json("config", {**folder.read_json("config"), **config.to_dict()})
        return session.run(folder, callbacks, writers, state=state, notes=notes, provenance=provenance)
    finally:
        session.close()


def load(
    run: str | Path | Run,
    *,
    checkpoint: str = "best",
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
) -> Run:
    """Read a run and its policy back: `ctrlrl.load("runs/x").policy.act(obs)`.

    Args:
        run: the run folder.
        checkpoint: `best`, `last`, or a checkpoint folder's name; a run without evaluations has no `best`.
        device: where the policy's weights lie.
        network: as given to `train`.
        encoder: as given to `train`.

    Raises:
        UsageError: if there is no such run or checkpoint, it is damaged, or `network`/`encoder` are missing.
    """
    folder = RunFolder.open(run.path if isinstance(run, Run) else Path(run))
    algo, config = _read_config(folder)
    provenance = folder.read_json("provenance")
    _require_objects(provenance, network=network, encoder=encoder)
    state = load_checkpoint(folder.find_checkpoint(checkpoint))
    spaces = provenance["environment"]["spaces"]
    agent = find_algorithm(algo).load_agent_class()(
        build_space(spaces["observation"]),
        build_space(spaces["action"]),
        config.agent,  # type: ignore[attr-defined]
        device=device,
        **_given(network=network, encoder=encoder),
    )
    agent.policy.load_state_dict(state["agent"]["policy"])
    return Run(folder.path, config, agent.policy)


def evaluate_run(
    run: str | Path | Run,
    *,
    checkpoint: str = "best",
    episodes: int | None = None,
    video: bool = False,
    env: EnvLike | None = None,
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
) -> Evaluation:
    """Deterministic returns of a checkpoint on the fixed list of seeds; the record goes into `evaluations.jsonl`.

    With `video`, the first of the episodes is recorded under `videos/`.

    Raises:
        UsageError: as `load`; or if a video was asked for and the environment cannot be rendered here.
    """
    loaded = load(run, checkpoint=checkpoint, device=device, network=network, encoder=encoder)
    config, folder = loaded.config, RunFolder(loaded.path)
    seeds = evaluation_seeds(episodes or config.eval_episodes)
    source = env if env is not None else config.env
    step = int(folder.find_checkpoint(checkpoint).name.rpartition("-")[2])
    vector = _make(source, config, min(len(seeds), MAX_EVAL_ENVS), "cpu")
    try:
        result = evaluate(vector, loaded.policy, seeds)
    finally:
        vector.close()
    record = {"kind": "eval", "step": step, "checkpoint": checkpoint, "seeds": result.seeds, "returns": result.returns}
    record |= {"lengths": result.lengths, "success": result.success, "mean": result.mean}
    with open(folder.path / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"date": now(), **record}) + "\n")
    if video:
        record_video(folder, loaded.policy, source, config, step=step, checkpoint=checkpoint)
        write_report(folder.path)
    return result


def record_video(
    folder: RunFolder, policy: Policy, source: EnvLike, config: OffPolicyConfig, *, step: int, checkpoint: str
) -> Path:
    """Record the episode of the first evaluation seed, at most `VIDEO_STEPS` of it.

    Raises:
        UsageError: if the environment cannot be rendered here; names the packages that are missing.
    """
    try:
        env = _make(source, config, 1, "cpu", render=True)
    except CtrlrlError:
        raise
    except Exception as error:
        raise rendering_error(error) from error
    frames: list[np.ndarray[Any, Any]] = []

    def film() -> None:
        if len(frames) < VIDEO_STEPS:
            frames.append(env.render())

    seed, fps = evaluation_seeds(1)[0], 1 / (env.control_dt or 1 / 30)
    try:
        result = evaluate(env, policy, [seed], before_step=film)
    except CtrlrlError:
        raise
    except Exception as error:
        raise rendering_error(error) from error
    finally:
        env.close()
    path = folder.videos / f"{checkpoint}-{step:012d}.mp4"
    write_video(frames, path, fps)
    about = {"step": step, "checkpoint": checkpoint, "seed": seed, "return": result.mean, "fps": fps}
    write_json(path.with_suffix(".json"), {**about, "length": result.lengths[0], "frames": len(frames)})
    return path


class _Session:
    """What a training session holds: environments and learner, made from a configuration."""

    def __init__(
        self,
        algo: str,
        config: OffPolicyConfig,
        env: EnvLike,
        eval_env: EnvLike | None,
        network: NetworkFactory | None,
        encoder: EncoderFactory | None,
        *,
        quiet: bool,
    ) -> None:
        self.algo, self.config, self.quiet = algo, config, quiet
        self.device = _pick_device(config.device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = config.threads or min(cores, 8)
        torch.set_num_threads(self.threads)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.eval_source: EnvLike = eval_env if eval_env is not None else env
        self.eval_env: VectorEnv | None = None
        self.env = _make(env, config, config.num_envs, str(self.device))
        try:
            self.agent: OffPolicyAgent = find_algorithm(algo).load_agent_class()(
                self.env.observation_space,
                self.env.action_space,
                config.agent,  # type: ignore[attr-defined]
                seed=config.seed,
                device=self.device,
                **_given(network=network, encoder=encoder),
            )
            if config.eval_every:
                if eval_env is None and isinstance(env, gym.Env | gym.vector.VectorEnv | VectorEnv):
                    raise UsageError(
                        "evaluation needs an environment of its own, and an environment object cannot be made twice: "
                        "pass a function that makes one (env=lambda: MyEnv()), or eval_env=..., or eval_every=0"
                    )
                self.eval_env = _make(self.eval_source, config, min(config.eval_episodes, MAX_EVAL_ENVS), "cpu")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.env.close()
        if self.eval_env is not None:
            self.eval_env.close()

    def disk_needed(self) -> int:
        """Bytes the run may write: the replay once, and some room for checkpoints and records."""
        env, per_row = self.env, 16
        for space in [env.observation_space, env.action_space]:
            entries = space.spaces.values() if isinstance(space, gym.spaces.Dict) else [space]
            for entry in entries:
                kind = np.dtype(entry.dtype)
                per_row += int(np.prod(entry.shape or ())) * (4 if kind.kind == "f" else kind.itemsize)
        return per_row * min(self.config.steps, self.config.buffer.capacity) + 64 * 2**20

    def run(
        self,
        folder: RunFolder,
        callbacks: Sequence[Callback],
        writers: Sequence[Writer],
        *,
        state: dict[str, Any] | None,
        notes: Sequence[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> Run:
        """Train from `state` (or from the start) to the end, and write video and report."""
        config, env = self.config, self.env
        reasons: list[str | None] = []
        if state is None:
            obs = env.reset(config.seed)
        else:
            saved = EnvState(state["env"]["json"], state["env"]["arrays"])
            obs, reasons = env.set_state(saved)
        collector = Collector(env, self.agent.policy, obs, seed=config.seed)
        action, policy_state, extras = self.agent.policy.act(
            obs_to(obs, self.device), self.agent.policy.initial_state(env.num_envs), explore=False
        )
        del action, policy_state
        buffer = ReplayBuffer(
            env.observation_space,
            env.action_space,
            capacity=config.buffer.capacity,
            num_envs=config.num_envs,
            device=self.device,
            seed=config.seed,
            extras=extras,
            next_extras=self.agent.policy.extras_at_next,
        )
        notes = list(notes)
        if state is None:
            buffer.begin(obs)
        else:
            self.agent.load_state_dict(state["agent"])
            collector.load_state_dict(state["collector"])
            folder.load_replay(buffer, state["replay"]["segments"], state["replay"]["total_rows"])
            buffer.generator.set_state(state["replay"]["generator"])
            restore_global_generators(state["global_generators"])
            for callback, saved_state in zip(callbacks, state["callbacks"], strict=True):
                callback.load_state_dict(saved_state)
            if any(reasons):
                collector.restart(obs, [reason is not None for reason in reasons])
                buffer.begin(obs)
            notes.append(_continuation(reasons))
            if provenance is not None:
                provenance["sessions"][-1]["notes"] = notes
                folder.write_json("provenance", provenance)

        step = state["loop"]["env_steps"] if state else 0
        loop = OffPolicyLoop(
            config=config,
            folder=folder,
            env=env,
            eval_env=self.eval_env,
            agent=self.agent,
            buffer=buffer,
            collector=collector,
            writers=[TensorBoard(folder.tensorboard, step=step), *writers],
            callbacks=callbacks,
            progress=Progress(config.steps, start=step, quiet=self.quiet),
            state=state,
        )
        if state is not None:
            loop.note(f"resumed at step {step:,}; {'; '.join(notes)}")
        elif config.steps <= config.learning_starts:
            loop.note(f"no update will run: learning starts at step {config.learning_starts:,}, after the last one")
        self._status(folder, "running", loop, f"at least step {step:,}")
        try:
            loop.run()
            self._video(folder, loop)
            self._status(folder, "finished", loop, "")
        except Interrupted as error:
            self._status(folder, "interrupted", loop, str(error))
            raise
        except BaseException as error:
            self._status(folder, "failed", loop, str(error) if isinstance(error, CtrlrlError) else repr(error))
            raise
        finally:
            loop.close()
            write_report(folder.path)
        if not self.quiet:
            print(f"report: {folder.path / 'report.html'}")
        return Run(folder.path, config, self.agent.policy)

    def _status(self, folder: RunFolder, state: str, loop: OffPolicyLoop, message: str) -> None:
        folder.write_json("status", {"state": state, "step": loop.env_steps, "message": message})

    def _video(self, folder: RunFolder, loop: OffPolicyLoop) -> None:
        """Record the best policy; that a machine cannot render is worth a note, not the loss of a training."""
        if not self.config.video:
            return
        name = "best" if loop.best else "last"
        try:
            policy = self.agent.policy
            weights = {key: value.clone() for key, value in policy.state_dict().items()}
            checkpoint = folder.find_checkpoint(name)
            policy.load_state_dict(load_checkpoint(checkpoint)["agent"]["policy"])
            source = self.eval_source
            record_video(folder, policy, source, self.config, step=int(checkpoint.name.split("-")[1]), checkpoint=name)
            policy.load_state_dict(weights)
        except UsageError as error:
            loop.note(f"no video: {error}")


def _make(env: EnvLike, config: OffPolicyConfig, num_envs: int, device: str, *, render: bool = False) -> VectorEnv:
    return make_env(
        env,
        num_envs=num_envs,
        backend="gymnasium" if render and not config.env_python else config.backend,
        env_kwargs=config.env_kwargs,
        env_python=config.env_python,
        device=device,
        render=render,
        worker_timeout=config.worker_timeout,
    )


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch {torch.__version__} sees no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def _read_config(folder: RunFolder) -> tuple[str, OffPolicyConfig]:
    data = folder.read_json("config")
    algo = data.pop("algo", None)
    data.pop("preset", None)
    if algo not in ALGORITHMS:
        raise UsageError(
            f"{folder.path / 'config.json'} names the algorithm {algo!r}, which this version does not have"
        )
    return algo, train_config_class(algo).from_dict(data, source=str(folder.path / "config.json"))


def _require_objects(provenance: dict[str, Any], **given: object) -> None:
    for key, name in provenance.get("custom", {}).items():
        if key in given and given[key] is None:
            raise UsageError(
                f"the run was trained from Python with an own {key} ({name}), which is not saved with it; "
                f"pass the same one: {key}=..."
            )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _continuation(reasons: Sequence[str | None]) -> str:
    afresh = [f"environment {i} started a new episode ({reason})" for i, reason in enumerate(reasons) if reason]
    exact = len(reasons) - len(afresh)
    if not afresh:
        return "continues exactly"
    more = f" and {len(afresh) - 4} more" if len(afresh) > 4 else ""
    return "; ".join(afresh[:4]) + more + (f"; the other {exact} continue exactly" if exact else "")


def _name_of(value: object) -> str:
    if isinstance(value, VectorEnv):
        return value.name
    spec = getattr(value, "spec", None)
    if spec is not None:
        return str(spec.id)
    named = value if hasattr(value, "__qualname__") else type(value)
    return str(named.__qualname__).replace("<", "").replace(">", "")
