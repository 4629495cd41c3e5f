"""From a configuration to a run: `train` starts one, `resume` goes on with one."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.algorithms.agent import Agent
from ctrlrl.algorithms.registry import find_algorithm, train_config_class
from ctrlrl.config import TrainConfig, changed_fields
from ctrlrl.cores import usable_cores
from ctrlrl.envs.foreign import framework_of
from ctrlrl.envs.vector import EnvState, VectorEnv, derive_seeds
from ctrlrl.envs.workers import RegisteredHereOnly
from ctrlrl.errors import CtrlrlError, Interrupted, UsageError
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.runs.checkpoint import load_checkpoint, pack
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
from ctrlrl.training.callbacks import Callback
from ctrlrl.training.collector import Collector
from ctrlrl.training.evaluation import evaluation_seeds
from ctrlrl.training.loading import Run, load_policy, record_video
from ctrlrl.training.loop import Loop, restore_global_generators
from ctrlrl.training.off_policy import OffPolicyLoop
from ctrlrl.training.on_policy import OnPolicyLoop
from ctrlrl.training.setup import (
    EnvLike,
    eval_rows,
    given,
    make,
    name_of,
    on_cpu,
    pick_device,
    read_config,
    read_provenance,
    require_objects,
    settle_execution,
    step_of,
    steps_natively,
)
from ctrlrl.tree import Obs, is_image

_LOOPS: dict[str, type[Loop]] = {"off-policy": OffPolicyLoop, "on-policy": OnPolicyLoop}


def train(
    algo: str,
    env: EnvLike,
    *,
    eval_env: EnvLike | None = None,
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[Writer] = (),
    config: TrainConfig | None = None,
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
        encoder: `factory(observation_space)`, from observations (B, ...) to features (B, F), as a network of yours.
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
    name = name_of(env)
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
        asked, config = config, session.config
        session.begin(callbacks)
        require_space(out, session.disk_needed())
        folder = RunFolder.create(out)
        with folder.locked():
            custom = {"env": env, "eval_env": eval_env, "network": network, "encoder": encoder}
            folder.write_json(
                "provenance",
                {"command": command_line(), "started": now()}
                | describe_machine(session.device, session.threads)
                | {"git": describe_source(), "environment": describe_environment(session.env)}
                | {"changed": changed_fields(asked, cls(env=config.env, out=config.out))}
                | {
                    "custom": {
                        k: name_of(v)
                        for k, v in custom.items()
                        if v is not None and not (k == "env" and isinstance(v, str))
                    }
                }
                | {"sessions": [{"started": now(), "from_step": 0, "command": command_line(), "notes": []}]},
            )
            folder.write_json("config", {"algo": algo, "preset": preset or None, **config.to_dict()})
            return session.run(folder, callbacks, writers)
    finally:
        session.close()


def resume(
    run: str | Path,
    *,
    steps: int | None = None,
    checkpoint: str = "last",
    device: str | None = None,
    env: EnvLike | None = None,
    eval_env: EnvLike | None = None,
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[Writer] = (),
    quiet: bool = False,
) -> Run:
    """Go on with a run exactly where its checkpoint left it; a larger `steps` extends it.

    `env`, `eval_env`, `network`, `encoder` and `callbacks` must be given again where `train` got objects; they are not
    saved. What was written after the checkpoint is deleted, once everything has been read back. A run that is
    extended keeps the evaluation at its former end.

    Raises:
        UsageError: if there is no such run or checkpoint, it is damaged, or another process trains it; nothing was
            changed then.
    """
    folder = RunFolder.open(Path(run))
    with folder.locked():
        algo, config = read_config(folder)
        path = folder.find_checkpoint(checkpoint)
        if not path.name.startswith("step-"):
            raise UsageError(f"{path.name} holds weights only; resume from one of the step-... checkpoints")
        state = load_checkpoint(path)
        done = state["loop"]["env_steps"]
        if steps is not None and steps < done:
            raise UsageError(
                f"{folder.path} has done {done:,} steps already; --steps must be at least that, got {steps}"
            )
        config = replace(config, **given(steps=steps, device=device))
        provenance = read_provenance(folder)
        require_objects(provenance, env=env, eval_env=eval_env, network=network, encoder=encoder)
        if len(state["callbacks"]) != len(callbacks):
            raise UsageError(
                f"the run was trained with {len(state['callbacks'])} callbacks, now there are {len(callbacks)}; "
                "pass the same ones, in the same order"
            )

        source = env if env is not None else config.env
        session = _Session(algo, config, source, eval_env, network, encoder, quiet=quiet, resumed=True)
        try:
            config = session.config
            machine = describe_machine(session.device, session.threads) | {"git": describe_source()}
            changed = differences(provenance, machine)
            notes = [f"the last bits may differ from an uninterrupted run: {', '.join(changed)}"] if changed else []
            notes += session.restore(folder, state, callbacks)
            # Everything has been read back: only now is anything changed.
            folder.forget_after(path, state["best"]["checkpoint"] if state["best"] else None)
            entry = {"started": now(), "from_step": done, "command": command_line(), "notes": notes}
            provenance["sessions"].append(entry)
            folder.write_json("provenance", provenance)
            folder.write_json("config", {**folder.read_json("config"), **config.to_dict()})
            return session.run(folder, callbacks, writers, state=state, notes=notes)
        finally:
            session.close()


class _Session:
    """What a training session holds: environments and learner, made from a configuration."""

    def __init__(
        self,
        algo: str,
        config: TrainConfig,
        env: EnvLike,
        eval_env: EnvLike | None,
        network: NetworkFactory | None,
        encoder: EncoderFactory | None,
        *,
        quiet: bool,
        resumed: bool = False,
    ) -> None:
        algorithm = find_algorithm(algo)
        self.loop_class, self.quiet = _LOOPS[algorithm.loop], quiet
        self.device = pick_device(config.device)
        cores = config.threads or min(usable_cores(), 8)
        shares = self.loop_class.shares_environments(config) and os.name == "posix"  # which worker processes need
        self._share = cores if shares else 1
        self.remark = ""
        prepare_cpu(cores)
        torch.backends.cudnn.deterministic = True  # else convolutions on a GPU would not resume bit for bit
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.source = env
        self.eval_source: EnvLike = eval_env if eval_env is not None else env
        self.eval_env: VectorEnv | None = None
        self.env = self._make(env, config, config.num_envs, str(self.device))
        if steps_natively(env, config) and not resumed:
            self.remark = f"{self.env.name} is stepped natively; --backend gymnasium steps Gymnasium's own"
        try:
            spaces = self.env.observation_space
            entries = list(spaces.spaces.values()) if isinstance(spaces, gym.spaces.Dict) else [spaces]
            plain = network is None and encoder is None and not any(map(is_image, entries))
            agent = config.agent  # type: ignore[attr-defined]
            if getattr(agent, "recurrent", "none") != "none":  # unrolled, that takes minutes to compile
                plain = False
            config, remark = settle_execution(config, self.device, plain=plain, resumed=resumed)
            self.remark = "; ".join(filter(None, (self.remark, remark)))
            self.config = config
            self.agent: Agent = algorithm.load_agent_class()(
                self.env.observation_space,
                self.env.action_space,
                config.agent,  # type: ignore[attr-defined]
                seed=config.seed,
                device=self.device,
                **given(network=network, encoder=encoder),
            )
            self.threads = cores if not plain else self.loop_class.learner_threads(config, self.agent, cores)
            prepare_cpu(self.threads)
            if config.eval_every:
                single = isinstance(env, gym.Env | gym.vector.VectorEnv | VectorEnv) or framework_of(env) is not None
                if eval_env is None and single:
                    raise UsageError(
                        "evaluation needs an environment of its own, and an environment object cannot be made twice: "
                        "pass a function that makes one (env=lambda: MyEnv()), or eval_env=..., or eval_every=0"
                    )
                rows = eval_rows(self.eval_source, config.eval_episodes)
                self.eval_env = self._make(self.eval_source, on_cpu(config), rows, "cpu")
                self.eval_env.reset(evaluation_seeds(self.eval_env.num_envs))  # what cannot be seeded fails now
        except BaseException:
            self.close()
            raise

    def _make(self, env: EnvLike, config: TrainConfig, rows: int, device: str) -> VectorEnv:
        """The environments, shared by processes where that is quicker and possible."""
        try:
            return make(env, config, rows, device, share=self._share)
        except RegisteredHereOnly:
            if config.backend != "auto":
                raise
            self._share = 1
            self.remark = f"the environments stay in this process, which alone knows {env}: module:ID would spread them"
            return make(env, config, rows, device)

    def close(self) -> None:
        """Close the environments, but not a vector environment that the caller made."""
        for env, source in ((self.env, self.source), (self.eval_env, self.eval_source)):
            if env is not None and env is not source:
                env.close()

    def disk_needed(self) -> int:
        """Bytes the run may write: what is collected, once, and some room for checkpoints and records."""
        return self.loop_class.stored_bytes(self.config, self.env) + 64 * 2**20

    def begin(self, callbacks: Sequence[Callback]) -> None:
        """Reset the environments and make an empty memory."""
        try:
            pack([callback.state_dict() for callback in callbacks])
        except TypeError as error:
            raise UsageError(f"a callback's state_dict cannot be saved: {error}") from None
        obs = self.env.reset(self.config.seed)
        self._make_memory(obs)
        self.memory.begin(obs)

    def restore(self, folder: RunFolder, state: dict[str, Any], callbacks: Sequence[Callback]) -> list[str]:
        """Go back to the checkpoint `state`; returns what is to be said about it. Changes nothing on disk."""
        config, step = self.config, state["loop"]["env_steps"]
        notes = []
        fresh_seed = derive_seeds(config.seed, 2)[1] + step  # for what cannot go on where it was
        saved = EnvState(state["env"]["json"], state["env"]["arrays"])
        obs, reasons = self.env.set_state(saved, seed=fresh_seed)
        self._make_memory(obs)
        if state["device"] != self.device.type:
            generator = torch.Generator(self.device).manual_seed(fresh_seed)
            state["agent"]["generator"] = generator.get_state()
            if "replay" in state:
                state["replay"]["generator"] = generator.get_state()
            notes.append(f"device {state['device']} -> {self.device.type}: random numbers start from a new seed")
        try:
            self.agent.load_state_dict(state["agent"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UsageError(
                "the checkpoint does not fit the agent (another network or encoder, or a run of an older ctrlrl, which "
                f"can be evaluated but not resumed?): {text}"
            ) from None
        self.collector.load_state_dict(state["collector"])
        self.loop_class.restore_memory(self.memory, folder, state)
        for callback, saved_state in zip(callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved_state)
        afresh = [reason is not None for reason in reasons]
        if any(afresh):
            self.collector.restart(obs, afresh)
        self.loop_class.begin_afresh(self.memory, obs, afresh)
        restore_global_generators(state["global_generators"], self.device)
        return [*notes, _continuation(reasons)]

    def run(
        self,
        folder: RunFolder,
        callbacks: Sequence[Callback],
        writers: Sequence[Writer],
        *,
        state: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> Run:
        """Train from `state` (or from the start) to the end, and write video and report."""
        config = self.config
        step = state["loop"]["env_steps"] if state else 0
        loop = self.loop_class(
            config=config,
            folder=folder,
            env=self.env,
            eval_env=self.eval_env,
            agent=self.agent,
            memory=self.memory,
            collector=self.collector,
            writers=[TensorBoard(folder.tensorboard, resumed_at=step if state else None), *writers],
            callbacks=callbacks,
            progress=Progress(config.steps, start=step, quiet=self.quiet),
            state=state,
        )

        def status(word: str, message: str = "") -> None:
            folder.write_json("status", {"state": word, "step": loop.env_steps, "message": message})

        try:
            if state is not None:
                loop.note(f"resumed at step {step:,}; {'; '.join(notes)}")
            elif remark := loop.start_remark():
                loop.note(remark)
            if self.remark:
                loop.note(self.remark)
            status("running")
            loop.run()
            self._video(folder, loop)
            status("finished")
        except BaseException as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = UsageError(f"{self.device} is out of memory: lower {self.loop_class.sizes} ({error})")
            word = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            message = str(error) if isinstance(error, CtrlrlError) else repr(error)
            _regardless(lambda: status(word, message))
            _regardless(loop.close)
            _regardless(lambda: write_report(folder.path))
            raise error from error.__cause__
        loop.close()
        report = write_report(folder.path)
        if not self.quiet:
            print(f"report: {report}")
        return Run(folder.path, config, self.agent.policy)

    def _make_memory(self, obs: Obs) -> None:
        """Make collector and memory for environments that are at `obs`."""
        self.memory = self.loop_class.make_memory(self.config, self.env, self.agent, obs)
        self.collector = Collector(self.env, self.agent.policy, obs, seed=self.config.seed)

    def _video(self, folder: RunFolder, loop: Loop) -> None:
        """Record the best policy; that this fails is worth a note, not the loss of a training."""
        if not self.config.video:
            return
        name, policy = "best" if loop.best else "last", self.agent.policy
        weights = {key: value.clone() for key, value in policy.state_dict().items()}
        try:
            checkpoint = folder.find_checkpoint(loop.best["checkpoint"] if loop.best else name)
            load_policy(policy, checkpoint)
            record_video(folder, policy, self.eval_source, self.config, step=step_of(checkpoint), checkpoint=name)
        except (CtrlrlError, OSError) as error:
            loop.note(f"no video: {error}")
        finally:
            policy.load_state_dict(weights)


def _regardless(work: Callable[[], object]) -> None:
    """Do what is left to do after a failure; should that fail as well, say so and keep to the first failure."""
    try:
        work()
    except (CtrlrlError, OSError) as error:
        print(f"ctrlrl: besides: {error}", file=sys.stderr)


def _continuation(reasons: Sequence[str | None]) -> str:
    afresh = [f"environment {i} started a new episode ({reason})" for i, reason in enumerate(reasons) if reason]
    exact = len(reasons) - len(afresh)
    if not afresh:
        return "continues exactly"
    more = f" and {len(afresh) - 4} more" if len(afresh) > 4 else ""
    return "; ".join(afresh[:4]) + more + (f"; the other {exact} continue exactly" if exact else "")
