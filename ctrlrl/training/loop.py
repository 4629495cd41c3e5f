"""What all loops share: evaluate, record, checkpoint, stop.

Everything between two iterations is consistent and can be saved, what is still owed included: a run that goes on from
there does what it would have done.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrlrl.algorithms.agent import Agent
from ctrlrl.config import TrainConfig
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import BadBaseAction, CtrlrlError, Interrupted, NonFiniteError
from ctrlrl.runs.checkpoint import pack, save_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.metrics import JsonLines, Record, Writer
from ctrlrl.runs.progress import Progress
from ctrlrl.runs.stages import better_of
from ctrlrl.training.base_policy import keep_evidence
from ctrlrl.training.callbacks import Callback
from ctrlrl.training.collector import Episode
from ctrlrl.training.evaluation import evaluate, evaluation_seeds
from ctrlrl.training.interrupt import Interrupt

CHECK_EVERY = 100
"""Updates between two looks at whether the losses are still finite: each look waits for the device."""


class Loop(ABC):
    """Trains `agent` for `config.budget` steps, into `folder`: of environments or, where there are none, updates.

    A loop says what an iteration is (`_iterate`), and what a checkpoint needs of it.

    Attributes that callbacks may read: `env_steps` (of an offline training its updates), `updates`, `agent`, `config`,
    `folder`.
    """

    advice = "Try a smaller step size, or rewards of a smaller scale."
    """What may help where a training became non-finite."""
    sizes = "--num-envs"
    """What needs memory."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        folder: RunFolder,
        eval_env: VectorEnv | None,
        agent: Agent,
        memory: Any,
        writers: Sequence[Writer],
        callbacks: Sequence[Callback],
        progress: Progress,
        state: dict[str, Any] | None = None,
        history: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.folder, self.eval_env = config, folder, eval_env
        self.agent, self.memory = agent, memory
        self.callbacks, self.progress, self._history = list(callbacks), progress, history
        counters = (state or {}).get("loop", {})
        self.env_steps: int = counters.get("env_steps", 0)
        self.updates: int = counters.get("updates", 0)
        self._looked_at = self.updates
        """Update at which all was finite."""
        self.seconds: float = counters.get("seconds", 0.0)
        self.best: dict[str, Any] | None = (state or {}).get("best")
        self._evaluated_at: int = counters.get("evaluated_at", 0)
        self._evaluation_due: bool = counters.get("evaluation_due", self._starts_trained() and bool(config.eval_every))
        # Sums of metrics since the last training record, and of how many updates each. Older runs have one number for
        # all of them: their next record covers what follows.
        summed = counters.get("summed")
        self._summed: Counter[str] = Counter(summed if isinstance(summed, dict) else {})
        self._sums: dict[str, Tensor] = {k: counters["sums"][k].to(agent.device) for k in self._summed}
        self._saved: tuple[Any, ...] = tuple(counters.get("moment", ()))
        self._stop: str | None = None
        self._log = JsonLines(folder.metrics, offset=(state or {}).get("metrics_offset", 0))
        self._writers: list[Writer] = [self._log, *writers]
        self._seeds = evaluation_seeds(config.eval_episodes)
        self._window = _Window(self.env_steps, self.updates)  # started anew by `run`
        self._clock = time.perf_counter()
        # What is infinite from the start (a mask in a user's network) is no sign of a training gone wrong.
        self._infinite = set(_non_finite(pack(agent.state_dict())[0]))

    def run(self) -> None:
        """Train until `config.budget`, or until a callback stops it.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, with a checkpoint written.
            NonFiniteError: if an environment or a loss became NaN or infinite.
            EnvironmentFailure: if an environment failed; the run is saved.
        """
        self._window = _Window(self.env_steps, self.updates)
        self._clock = time.perf_counter()
        with Interrupt() as interrupt, self.progress:
            for callback in self.callbacks:
                callback.on_start(self)
            self.checkpoint()  # of step 0, so that a run can be resumed from its first moment on
            if self._log.missing:
                self.note(f"{self.folder.metrics.name} lacks {self._log.missing} bytes of what was recorded before")
            if self._evaluation_due:  # the one that failed before this resume
                self._evaluate()
            while not self._finished():
                if interrupt.requested:
                    self.checkpoint()
                    raise Interrupted(f"interrupted at step {self.env_steps:,}. {self._go_on()}")
                self._iterate()
            if self.config.eval_every and self._evaluated_at != self.env_steps:
                self._evaluation_due = True
                self._evaluate()
            for callback in self.callbacks:
                callback.on_end(self)
            self.checkpoint()

    def stop(self, reason: str) -> None:
        """End the run after this step, as finished; resuming it goes on to the budget. Later calls do nothing."""
        if self._stop is not None:
            return
        self._stop = reason
        self.note(f"stopped: {reason}")

    def note(self, text: str) -> None:
        """Write a remark into the record and to the terminal."""
        self.record({"kind": "note", "step": self.env_steps, "time": self._time(), "text": text})
        self.progress.message(text)

    def record(self, record: Record) -> None:
        """Hand a record to every writer and callback."""
        for writer in self._writers:
            writer.write(record)
        for callback in self.callbacks:
            callback.on_record(self, record)

    def close(self) -> None:
        """Close the writers."""
        for writer in self._writers:
            writer.close()

    @abstractmethod
    def _iterate(self) -> None:
        """Go on by the least that can be done, between two states that can be saved."""

    @staticmethod
    def learner_threads(config: Any, agent: Any, cores: int) -> int:
        """Of the learner, where `cores` may be used and networks are the built-in ones for vectors."""
        return cores

    def _after(self, before: int, episodes: Sequence[Episode] = ()) -> None:
        """What is due since step `before`: records, an evaluation, a checkpoint."""
        for episode in episodes:
            record = {"kind": "episode", "step": self.env_steps, "time": self._time(), "env": episode.env}
            self.record(record | {"return": episode.ret, "length": episode.length, "success": episode.success})
        if passed(before, self.env_steps, self.config.log_every):
            self._log_training()
        if self.config.eval_every and passed(before, self.env_steps, self.config.eval_every):
            self._evaluation_due = True
            self._evaluate()
        for callback in self.callbacks:
            callback.on_step(self)
        if passed(before, self.env_steps, self.config.checkpoint_every) and not self._finished():
            self.checkpoint()
        self.progress.update(self.env_steps, episodes)

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What was stored and is still needed, for a checkpoint."""

    def _figures(self) -> dict[str, float]:
        """What a training record says besides, since the last one."""
        return {}

    @abstractmethod
    def _where(self, continue_episodes: bool) -> dict[str, Any]:
        """What is not of the agent and changes, for a checkpoint: episodes, which go on or start afresh from there."""

    def _starts_trained(self) -> bool:
        """Whether the policy is one that has learned before, so that it is evaluated before anything else."""
        began = any(getattr(self.config, name, None) is not None for name in ("init_from", "base"))
        return began or self.agent.policy.pretrained

    def _suspects(self) -> dict[str, Any]:
        """What is kept besides the weights for the post-mortem of a training that became non-finite."""
        return {}

    def start_remark(self) -> str:
        """What is to be said about a new run before it starts, or nothing."""
        return ""

    def _take(self, metrics: Mapping[str, Tensor], updates: int) -> None:
        """Count `updates` more, of which `metrics` are the means; look now and then whether all is finite."""
        for name in [name for name in metrics if name not in self._sums]:
            self._sums[name] = torch.zeros_like(metrics[name])
        torch._foreach_add_([self._sums[name] for name in metrics], list(metrics.values()), alpha=updates)
        self._summed.update(dict.fromkeys(metrics, updates))
        self.updates += updates
        if self.updates - self._looked_at >= CHECK_EVERY:
            self._require_finite()

    def _require_finite(self, agent: dict[str, Any] | None = None) -> None:
        """Raise unless all losses since the last record (and the weights of `agent`) are finite."""
        suspects = self._sums if agent is None else self._sums | pack(agent)[0]
        bad = [name.strip("/") for name in _non_finite(suspects) if name not in self._infinite]
        if not bad:
            self._looked_at = self.updates
            return
        post_mortem = save_checkpoint(
            self.folder.path,
            f"non-finite-{self.updates:012d}",
            {**self._suspects(), "agent": self.agent.state_dict()},
        )
        last = self.folder.step_checkpoints()
        go_on = f"The last good checkpoint is {last[-1]}. " if last else "No checkpoint had been written yet. "
        raise NonFiniteError(
            f"training became non-finite between update {self._looked_at:,} and update {self.updates:,} "
            f"(step {self.env_steps:,}): {', '.join(bad[:4])}. {go_on}"
            f"{self.advice} Weights, and what they were last trained on: {post_mortem}"
        )

    def _log_training(self) -> None:
        self._require_finite()
        metrics = {name: float(value) / self._summed[name] for name, value in self._sums.items()}
        metrics |= self._figures()
        self._sums, self._summed = {}, Counter()
        steps_per_s, updates_per_s = self._window.rates(self.env_steps, self.updates)
        record = {"kind": "train", "step": self.env_steps, "time": self._time(), "updates": self.updates}
        self.record(record | {"steps_per_s": steps_per_s, "updates_per_s": updates_per_s, "metrics": metrics})
        self.progress.training(steps_per_s, updates_per_s)

    def _evaluate(self) -> None:
        assert self.eval_env is not None
        with self._window.paused():
            with self._saved_on_failure(continue_episodes=True):
                result = evaluate(self.eval_env, self.agent.policy, self._seeds)
            self._evaluated_at, self._evaluation_due = self.env_steps, False
            best = self.best is None or result.mean > self.best["mean"]
            if best:
                path = self.folder.save_best(self.env_steps, {"agent": self.agent.state_dict(), "step": self.env_steps})
                self.best = {"mean": result.mean, "step": self.env_steps, "checkpoint": path.name}
        record = {"kind": "eval", "step": self.env_steps, "time": self._time(), "checkpoint": "current"}
        figures = {"seeds": result.seeds, "returns": result.returns, "lengths": result.lengths}
        figures |= {"success": result.success, "figures": result.figures}
        if result.transcripts:
            figures["transcripts"] = result.transcripts
        self.record(record | figures | {"mean": result.mean, "best": best})
        self.progress.evaluated(self.env_steps, result.mean, best)
        if (
            self._history is not None
            and self.env_steps == 0
            and (text := better_of(result.mean, self._history["data"]))
        ):
            self.note(text)

    def checkpoint(self, *, continue_episodes: bool = True) -> None:
        """Write a resumable checkpoint of this moment, if there is none yet.

        Without `continue_episodes` the environments start afresh from there.
        """
        moment = (self.env_steps, self._evaluated_at, self._evaluation_due, continue_episodes)
        if moment == self._saved:
            return
        with self._window.paused():
            agent = self.agent.state_dict()
            self._require_finite(agent)
            memory = self._memory()
            state = {
                "loop": {
                    "env_steps": self.env_steps,
                    "updates": self.updates,
                    "evaluated_at": self._evaluated_at,
                    "evaluation_due": self._evaluation_due,
                    "moment": list(moment),
                    "seconds": self._time(),
                    "sums": self._sums,
                    "summed": dict(self._summed),
                },
                "agent": agent,
                **self._where(continue_episodes),
                **memory,
                "best": self.best,
                "metrics_offset": self._log.offset(),
                "device": self.agent.device.type,
                "global_generators": global_generators(self.agent.device),
                "callbacks": [callback.state_dict() for callback in self.callbacks],
            }
            self.folder.save_step(self.env_steps, state, keep=self.config.keep_checkpoints)
            self._saved = moment

    @contextlib.contextmanager
    def _saved_on_failure(self, *, continue_episodes: bool) -> Iterator[None]:
        """Write a checkpoint before a failure goes on its way, and say how to go on."""
        try:
            yield
        except Exception as error:
            try:
                self.checkpoint(continue_episodes=continue_episodes)
                ending = self._go_on()
                if isinstance(error, BadBaseAction):
                    kept = keep_evidence(error, self.folder.path, f"{self.env_steps:012d}")
                    ending = f"Step {self.env_steps:,}; what it was asked: {kept}. {ending}"
            except (CtrlrlError, OSError) as another:
                ending = f"Besides, no checkpoint could be written: {another}"
            if isinstance(error, CtrlrlError):
                error.args = (f"{error}\n{ending}",)
            else:  # a user's own environment or network: its traceback says what the matter is
                error.add_note(ending)
            raise

    def _finished(self) -> bool:
        return self.env_steps >= self.config.budget or self._stop is not None

    def _time(self) -> float:
        """Seconds of training so far, over all sessions."""
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return round(self.seconds, 3)

    def _go_on(self) -> str:
        return f"Go on with: ctrlrl resume {self.folder.path}"


def _non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]


class _Window:
    """Rates since the last training record, without the time that evaluations and checkpoints took."""

    def __init__(self, steps: int, updates: int) -> None:
        self._steps, self._updates, self._start = steps, updates, time.perf_counter()

    def rates(self, steps: int, updates: int) -> tuple[float, float]:
        """Environment steps and updates per second since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        rates = (round((steps - self._steps) / elapsed, 1), round((updates - self._updates) / elapsed, 1))
        self._steps, self._updates, self._start = steps, updates, now
        return rates

    def paused(self) -> _Pause:
        """Leave out the time inside a `with` block."""
        return _Pause(self)

    def shift(self, seconds: float) -> None:
        """Leave out `seconds`."""
        self._start += seconds


class _Pause:
    def __init__(self, window: _Window) -> None:
        self._window = window

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._window.shift(time.perf_counter() - self._entered)


def memory_of(device: torch.device) -> int:
    """Bytes of memory: what a GPU has free, what the machine has in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def global_generators(device: torch.device) -> dict[str, Any]:
    """States of torch's, NumPy's and Python's global generators, for what users' own code draws from them."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {"kind": kind, "keys": keys, "rest": [position, has_gauss, cached]},
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
    }


def restore_global_generators(state: dict[str, Any], device: torch.device) -> None:
    """Go back to what `global_generators` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    numpy = state["numpy"]
    np.random.set_state((numpy["kind"], numpy["keys"], *numpy["rest"]))
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))


def passed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every
