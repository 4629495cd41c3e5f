"""What a training session holds: the learner, made from a configuration, and what it is evaluated on."""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.algorithms.agent import Agent, ReplayAgent
from ctrlrl.algorithms.registry import ALGORITHMS, find_algorithm
from ctrlrl.config import TrainConfig
from ctrlrl.cores import usable_cores
from ctrlrl.data.store import Dataset
from ctrlrl.envs.foreign import framework_of
from ctrlrl.envs.vector import VectorEnv, derive_seeds
from ctrlrl.errors import CtrlrlError, Interrupted, UsageError
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.policy import Policy
from ctrlrl.runs.checkpoint import pack
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.metrics import TensorBoard, Writer
from ctrlrl.runs.progress import Progress
from ctrlrl.runs.report import write_report
from ctrlrl.training.base_policy import BaseLike
from ctrlrl.training.callbacks import Callback
from ctrlrl.training.evaluation import evaluation_seeds
from ctrlrl.training.loading import Run, load_policy, record_video
from ctrlrl.training.loop import Loop, restore_global_generators
from ctrlrl.training.setup import (
    EnvLike,
    eval_rows,
    given,
    manner_of,
    networks_of,
    on_cpu,
    pick_device,
    settle_execution,
    step_of,
)
from ctrlrl.training.warm_start import warm_start
from ctrlrl.tree import is_image


class Session(ABC):
    """The parts of a training, which `run` puts to work.

    Attributes:
        config: with everything decided.
        device: where the agent learns.
        threads: of the learner.
        agent: the learner.
        name: what the policy is for.
        observation_space: of one environment.
        action_space: of one environment.
        control_dt: seconds of a control step, where known.
        eval_env: to evaluate on, if at all.
        base: the frozen policy under the agent's, if any.
        remark: what was decided for the user.
    """

    loop_class: type[Loop]
    history: dict[str, Any] | None = None
    """Where the first weights come from, if not from the seed."""
    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    control_dt: float | None
    base: Policy | None

    def __init__(
        self,
        algo: str,
        config: TrainConfig,
        env: EnvLike | None,
        eval_env: EnvLike | None,
        network: NetworkFactory | None,
        encoder: EncoderFactory | None,
        *,
        base: BaseLike | None = None,
        quiet: bool,
        resumed: bool = False,
    ) -> None:
        algorithm = find_algorithm(algo)
        self.base_source = base if base is not None else getattr(config, "base", None)
        self.base = None
        if (self.base_source is None) == (algorithm.needs == "base"):
            fitting = ", ".join(a.name for a in ALGORITHMS.values() if a.needs == "base")
            raise UsageError(
                f"{algo} builds on a policy that is there: --base RUN (of ctrlrl train bc, say), a bundle, an ONNX file"
                if self.base_source is None
                else f"{algo} builds on no other policy: --base is for {fitting}"
            )
        self.algo, self.config, self.quiet, self.resumed = algo, config, quiet, resumed
        self.device = pick_device(config.device)
        self.cores = config.threads or min(usable_cores(), 8)
        self.remark = ""
        prepare_cpu(self.cores)
        torch.backends.cudnn.deterministic = True  # else convolutions on a GPU would not resume bit for bit
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.source = env
        self.eval_source: EnvLike | None = eval_env if eval_env is not None else env
        self.eval_env: VectorEnv | None = None
        self._open()
        try:
            spaces = self.observation_space
            entries = list(spaces.spaces.values()) if isinstance(spaces, gym.spaces.Dict) else [spaces]
            network = networks_of(algo, config, network)
            if config.language.model is not None and Path(config.language.model).is_dir():  # from wherever it goes on
                model = str(Path(config.language.model).resolve())
                self.config = replace(self.config, language=replace(config.language, model=model))
            plain = network is None and encoder is None and not any(map(is_image, entries))
            agent = config.agent  # type: ignore[attr-defined]
            if getattr(agent, "recurrent", "none") != "none":  # unrolled, that takes minutes to compile
                plain = False
            self.config, remark = settle_execution(self.config, self.device, plain=plain, resumed=resumed)
            self.remark = "; ".join(filter(None, (self.remark, remark, manner_of(config, self.action_space))))
            self.agent: Agent = algorithm.load_agent_class()(
                self.observation_space,
                self.action_space,
                self.config.agent,  # type: ignore[attr-defined]
                seed=config.seed,
                device=self.device,
                **given(network=network, encoder=encoder, base=self.base),
            )
            self.threads = self.cores
            if plain:
                self.threads = self.loop_class.learner_threads(self.config, self.agent, self.cores)
            prepare_cpu(self.threads)
            self._prepare()
            if config.eval_every and self.eval_source is not None:
                single = isinstance(env, gym.Env | gym.vector.VectorEnv | VectorEnv) or framework_of(env) is not None
                if eval_env is None and single and self.collects:
                    raise UsageError(
                        "evaluation needs an environment of its own, and an environment object cannot be made twice: "
                        "pass a function that makes one (env=lambda: MyEnv()), or eval_env=..., or eval_every=0"
                    )
                rows = eval_rows(self.eval_source, config.eval_episodes)
                self.eval_env = self._make(self.eval_source, on_cpu(self.config), rows, "cpu")
                self.eval_env.reset(evaluation_seeds(self.eval_env.num_envs))  # what cannot be seeded fails now
        except BaseException:
            self.close()
            raise

    collects = True
    """Whether it steps the environments that it learns in."""

    @abstractmethod
    def _open(self) -> None:
        """Open what is learned from, and set name, spaces and control period; on failure leave nothing open."""

    def _prepare(self) -> None:  # noqa: B027  (most have nothing to do)
        """Called when there is an agent."""

    @abstractmethod
    def _make(self, env: EnvLike, config: TrainConfig, rows: int, device: str) -> VectorEnv:
        """Environments."""

    def _start_from(self, run: str, dataset: Dataset | None) -> None:
        """Take over the weights of another run."""
        assert isinstance(self.agent, ReplayAgent)
        self.history = warm_start(self.agent, self.observation_space, self.action_space, run, dataset, self.config)

    @abstractmethod
    def _begin(self) -> None:
        """Start collecting, or drawing."""

    @abstractmethod
    def _restore(self, folder: RunFolder, state: dict[str, Any], fresh_seed: int) -> list[str]:
        """Go back to where the checkpoint `state` was, with the agent; returns what is to be said about it.
        `fresh_seed` is for what cannot go on."""

    @abstractmethod
    def _parts(self) -> dict[str, Any]:
        """What the loop takes besides."""

    def close(self) -> None:
        """Close the environments, but not a vector environment that the caller made."""
        if self.eval_env is not None and self.eval_env is not self.eval_source:
            self.eval_env.close()

    def disk_needed(self) -> int:
        """Bytes the run may write."""
        return 64 * 2**20  # for checkpoints and records

    def described(self) -> dict[str, Any]:
        """What else the provenance says."""
        return {}

    def begin(self, callbacks: Sequence[Callback]) -> None:
        """Make everything ready for the first step."""
        try:
            pack([callback.state_dict() for callback in callbacks])
        except TypeError as error:
            raise UsageError(f"a callback's state_dict cannot be saved: {error}") from None
        self._begin()

    def restore(self, folder: RunFolder, state: dict[str, Any], callbacks: Sequence[Callback]) -> list[str]:
        """Go back to the checkpoint `state`; returns what is to be said about it. Changes nothing on disk."""
        fresh_seed = derive_seeds(self.config.seed, 2)[1] + state["loop"]["env_steps"]
        notes = []
        if state["device"] != self.device.type:
            generator = torch.Generator(self.device).manual_seed(fresh_seed)
            for part in ("agent", "replay", "data"):
                if part in state:
                    state[part]["generator"] = generator.get_state()
            notes.append(f"device {state['device']} -> {self.device.type}: random numbers start from a new seed")
        try:
            self.agent.load_state_dict(state["agent"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UsageError(
                "the checkpoint does not fit the agent (another network or encoder, or a run of an older ctrlrl, which "
                f"can be evaluated but not resumed?): {text}"
            ) from None
        notes += self._restore(folder, state, fresh_seed)
        for callback, saved_state in zip(callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved_state)
        restore_global_generators(state["global_generators"], self.device)
        return notes

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
            eval_env=self.eval_env,
            agent=self.agent,
            writers=[TensorBoard(folder.tensorboard, resumed_at=step if state else None), *writers],
            callbacks=callbacks,
            progress=Progress(config.budget, start=step, collects=self.collects, quiet=self.quiet),
            state=state,
            history=self.history,
            **self._parts(),
        )

        def status(word: str, message: str = "") -> None:
            folder.write_json("status", {"state": word, "step": loop.env_steps, "message": message})

        try:
            if state is not None:
                loop.note(f"resumed at step {step:,}; {'; '.join(notes)}")
            elif remark := loop.start_remark():
                loop.note(remark)
            if state is None and self.history is not None:
                notes = "; ".join(self.history["notes"])
                from_where = f"{self.history['run']}, {self.history['checkpoint']}"
                if self.history["step"] == 0:  # of a policy that knew something, nothing learned was better
                    from_where += ", as it was before it learned"
                loop.note(f"starts from {from_where}; {notes}")
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

    def _video(self, folder: RunFolder, loop: Loop) -> None:
        """Record the best policy; that this fails is worth a note, not the loss of a training."""
        if not self.config.video or self.eval_source is None:
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
