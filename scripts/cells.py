"""Trainings as cells of a table, algorithm x environment x seed, and what runs them side by side."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peers import venv as peers
from peers.venv import python_of

from ctrlrl.algorithms.registry import Preset, find_algorithm
from ctrlrl.cli.train import resolve
from ctrlrl.config import TrainConfig
from ctrlrl.errors import UsageError
from ctrlrl.runs.page import duration
from ctrlrl.runs.record import RunRecord, flatten, load_run

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1")
ONE_THREAD["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
"""Trainings of two threads each, side by side on two cores, wait for each other's threads most of the time. The last
two are XLA's, for SBX."""
_OF_A_START = {"checkpoints", "replay", "videos", "tensorboard", "report.html", ".lock"}
_OF_A_START |= {"provenance.json", "config.json", "status.json", "metrics.jsonl"}
"""What a run may have written before its first checkpoint."""
_POLL_S, _LINE_S = 0.5, 300.0


@dataclass(frozen=True)
class Cell(ABC):
    """One training: an algorithm, an environment, a seed."""

    algo: str
    env: str
    seed: int
    steps: int
    out: Path
    """Folder of all cells."""

    @property
    def name(self) -> str:
        """ALGO-ENV-SEED, as a file name."""
        return f"{self.algo}-{re.sub(r'[^A-Za-z0-9._-]+', '-', self.env)}-{self.seed}"

    @abstractmethod
    def state(self) -> str:
        """`new`, `started` or `finished`."""

    @abstractmethod
    def command(self) -> list[str]:
        """Starts it, or goes on with it."""

    @abstractmethod
    def progress(self) -> tuple[int, float | None]:
        """(environment steps done, mean return of the latest evaluation)"""


@dataclass(frozen=True)
class OwnCell(Cell):
    """A `ctrlrl train`."""

    flags: tuple[str, ...]
    """Of `ctrlrl train`, beside environment, seed, steps and folder."""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.out / self.name

    @property
    def arguments(self) -> list[str]:
        """What follows `ctrlrl train`."""
        own = ["--env", self.env, "--seed", str(self.seed), "--steps", str(self.steps), "--threads", "1"]
        return [self.algo, *own, "--no-video", "--out", str(self.path), *self.flags]

    @cached_property
    def resolved(self) -> tuple[TrainConfig, Preset | None]:
        """The configuration that `ctrlrl train` makes of the arguments, and the preset in it."""
        return resolve(find_algorithm(self.algo), self.arguments[1:])[1:]

    @property
    def env_options(self) -> dict[str, Any]:
        """How `make_env` makes the same environment."""
        config = self.resolved[0]
        return {"env_kwargs": config.env_kwargs, "backend": config.backend, "env_python": config.env_python}

    def record(self) -> RunRecord | None:
        """The run so far; None where there is none yet."""
        return load_run(self.path) if (self.path / "config.json").exists() else None

    def state(self) -> str:
        record = self.record()
        return "new" if record is None else "finished" if record.state == "finished" else "started"

    def command(self) -> list[str]:
        record = self.record()
        if record is not None and (record.step or any((self.path / "checkpoints").glob("step-*"))):
            return [sys.executable, "-m", "ctrlrl", "resume", str(self.path)]
        if self.path.is_dir() and {file.name for file in self.path.iterdir()} <= _OF_A_START:
            shutil.rmtree(self.path)  # stopped before its first checkpoint: nothing to go on with
        return [sys.executable, "-m", "ctrlrl", "train", *self.arguments]

    def progress(self) -> tuple[int, float | None]:
        record = self.record()
        if record is None:
            return 0, None
        return record.step, record.final.mean if record.final else None

    def require_same_settings(self) -> None:
        """Raise `UsageError` where the folder holds a run with other settings than are asked for now."""
        record = self.record()
        if record is None:
            return
        config, preset = self.resolved
        asked = flatten({"algo": self.algo, "preset": preset.name if preset else None, **config.to_dict()})
        there = record.flat_config
        for settled in ("agent.execution", "agent.precision"):  # by the run
            if asked.get(settled) == "auto":
                asked[settled] = there.get(settled)
        differs = [
            f"{key} is {json.dumps(there[key]) if key in there else 'not recorded'} there, "
            f"{json.dumps(asked[key]) if key in asked else 'no setting'} asked for"
            for key in sorted(asked.keys() | there.keys())
            if key != "out" and (key not in asked or key not in there or asked[key] != there[key])
        ]
        if differs:
            raise UsageError(
                f"{self.path} holds a run with other settings: {'; '.join(differs)}. Choose another --out, or repeat "
                "the command it was made with"
            )


@dataclass(frozen=True)
class PeerCell(Cell):
    """A training of another library, by `peers/returns.py`."""

    peer: str
    eval_every: int
    eval_episodes: int

    @property
    def path(self) -> Path:
        """The file it writes."""
        return self.out / f"{self.name}.json"

    def record(self) -> dict[str, Any] | None:
        """What the run wrote so far."""
        return read_json(self.path) if self.path.exists() else None

    def state(self) -> str:
        record = self.record()
        return "new" if record is None else "finished" if record["complete"] else "started"

    def command(self) -> list[str]:
        algo = self.algo.removeprefix(f"{self.peer}-")
        options = {"library": self.peer, "algo": algo, "env": self.env, "seed": self.seed, "steps": self.steps}
        options |= {"eval-every": self.eval_every, "eval-episodes": self.eval_episodes, "out": self.path}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [str(python_of(self.peer)), str(peers.HERE / "returns.py"), *flags]

    def progress(self) -> tuple[int, float | None]:
        record = self.record()
        last = record["evals"][-1] if record and record["evals"] else None
        return (last["step"], last["mean"]) if last else (0, None)

    def require_same_settings(self) -> None:
        """Raise `UsageError` where the file holds a run with another protocol."""
        record = self.record() or {}
        for key in ("env", "seed", "steps", "eval_every", "eval_episodes"):
            asked = getattr(self, key)
            if record.get(key, asked) != asked:
                raise UsageError(
                    f"{self.path} holds a run with {key} {record[key]}, asked for is {asked}; choose another --out"
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of ours.

    Raises:
        UsageError: if it is none.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON ({error}); delete it, or restore it from a copy") from None
    return dict(value)


class Interrupted(Exception):
    """A signal ended the runs; they can be gone on with."""


class Scheduler:
    """Runs cells, at most `jobs` at once, each in a process group of its own with its output in a log.

    `failed` holds (cell, how it ended) afterwards: a failed cell does not stop the others.
    """

    def __init__(self, cells: Sequence[Cell], jobs: int, out: Path) -> None:
        self.cells, self.jobs, self.out = list(cells), jobs, out
        self.finished = [cell for cell in cells if cell.state() == "finished"]
        self.waiting = [cell for cell in cells if cell not in self.finished]
        self.running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}
        self.failed: list[tuple[Cell, str]] = []
        self._begun = self._shown = time.monotonic()
        self._first_steps = {cell: cell.progress()[0] for cell in self.waiting}

    def run(self) -> None:
        """Run until every cell has finished or failed.

        Raises:
            Interrupted: on SIGINT, SIGTERM or SIGHUP, once every child has written its checkpoint and ended.
        """
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        former = [signal.signal(number, _interrupt) for number in signals]
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs:
                    self._start(self.waiting.pop(0))
                time.sleep(_POLL_S)
                for cell in [cell for cell, (process, _) in self.running.items() if process.poll() is not None]:
                    self._end(cell)
                self._show()
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted from None
        finally:
            for process, _ in self.running.values():  # none, unless something else went wrong
                process.terminate()
            for number, handler in zip(signals, former, strict=True):
                signal.signal(number, handler)

    def log(self, cell: Cell) -> Path:
        """Where a cell's output goes."""
        return self.out / f"{cell.name}.log"

    def _start(self, cell: Cell) -> None:
        command = cell.command()
        with open(self.log(cell), "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ONE_THREAD,
                start_new_session=True,  # Ctrl-C reaches us alone: a second signal would abort a child at once
            )
        self.running[cell] = process, time.monotonic()

    def _end(self, cell: Cell) -> None:
        process, begun = self.running.pop(cell)
        if process.returncode == 0 and cell.state() == "finished":
            self.finished.append(cell)
            self._say(f"{_line(cell)}, finished in {duration(time.monotonic() - begun)}")
        else:
            self.failed.append((cell, f"exit code {process.returncode}"))
            self._say(f"{cell.name}: FAILED with exit code {process.returncode}, see {self.log(cell)}")

    def _stop(self) -> None:
        self._say(f"stopping {len(self.running)} trainings, each with a checkpoint; once more aborts them at once")
        for process, _ in self.running.values():
            process.terminate()
        try:
            for process, _ in self.running.values():
                process.wait()
        except KeyboardInterrupt:
            for process, _ in self.running.values():
                process.kill()
                process.wait()
        self.running.clear()

    def _show(self) -> None:
        terminal = sys.stdout.isatty()
        now = time.monotonic()
        if now - self._shown < (5.0 if terminal else _LINE_S):
            return
        self._shown = now
        going = [*self.running, *self.waiting]
        done = {cell: cell.progress()[0] for cell in going}
        left = sum(cell.steps - done[cell] for cell in going)
        gained = sum(done.get(cell, cell.steps) - step for cell, step in self._first_steps.items())
        parts = [f"{len(self.finished)} of {len(self.cells)} finished"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [_line(cell) for cell in self.running]
        parts += [f"about {duration(left * (now - self._begun) / gained)} left"] if gained > 0 else []
        line = " | ".join(parts)
        if terminal:
            print(f"\r\033[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def _say(self, text: str) -> None:
        print(f"\r\033[2K{text}" if sys.stdout.isatty() else text, flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _line(cell: Cell) -> str:
    step, mean = cell.progress()
    return f"{cell.name}: step {step:,} of {cell.steps:,}" + ("" if mean is None else f", return {mean:,.1f}")
