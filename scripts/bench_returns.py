#!/usr/bin/env python3
"""Evaluation returns of one algorithm over environments x seeds, one single-threaded training per core.

    python scripts/bench_returns.py --algo sac --env HalfCheetah-v5 Hopper-v5 --seeds 0 1 2 --out runs/returns
    python scripts/bench_returns.py --algo sac --env Hopper-v5 --seeds 0 --out runs/returns-utd4 -- --agent.utd 4
    python scripts/bench_returns.py --peer sbx --env Walker2d-v5 --seeds 1 2 --out runs/returns

(with the interpreter of .venv)

Each cell is one `ctrlrl train` in OUT/ALGO-ENV-SEED, its output in OUT/ALGO-ENV-SEED.log; flags after `--` go to it.
The same command again goes on: cells that are finished are skipped, the others resumed. At the end, and with
--only-report at any time, OUT/returns.json gets every run's evaluations, and OUT/comparison.html, OUT/returns.svg and
OUT/returns.md the comparison, with --peers also with other libraries' returns (docs/data/peer_returns.json, say).

With --peer a cell is a training of another library in a virtual environment of its own, with its defaults; its file is
OUT/PEER-ALGO-ENV-SEED.json, and all of a peer go into OUT/returns-PEER.json. Peers start a cell that was cut off anew.

Exit codes: 0 all cells finished, 1 some failed, 2 bad input (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import argparse
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

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np
from peers import venv as peers
from peers.venv import PEERS, python_of

from ctrlrl.algorithms.registry import Preset, find_algorithm
from ctrlrl.cli.train import describe_preset, resolve
from ctrlrl.config import OffPolicyConfig
from ctrlrl.errors import CtrlrlError, UsageError
from ctrlrl.runs.comparison import compare, console_summary, write_comparison, write_picture, write_table
from ctrlrl.runs.files import write_json
from ctrlrl.runs.page import duration
from ctrlrl.runs.peers import load_peers
from ctrlrl.runs.record import RunRecord, flatten, load_run

RANDOM_EPISODES = 20
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1")
ONE_THREAD["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
"""Trainings of two threads each, side by side on two cores, wait for each other's threads most of the time. The last
two are XLA's, for SBX."""
_OURS = ("--env", "--seed", "--steps", "--out", "--threads", "--eval-every", "--eval-episodes", "--dry-run", "--help")
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
    def resolved(self) -> tuple[OffPolicyConfig, Preset | None]:
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
        if asked.get("agent.execution") == "auto":  # the run has settled it
            asked["agent.execution"] = there.get("agent.execution")
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
        options = {"library": self.peer, "env": self.env, "seed": self.seed, "steps": self.steps}
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


def random_returns(env: str, **how: Any) -> list[float]:
    """Returns of `RANDOM_EPISODES` episodes with uniformly random actions, on the seeds of evaluations.

    `how` goes to `make_env`.
    """
    import torch

    from ctrlrl.envs.make import make_env
    from ctrlrl.nn.policy import Policy
    from ctrlrl.training.collector import random_actions
    from ctrlrl.training.evaluation import evaluate, evaluation_seeds

    class Random(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.draws = torch.Generator().manual_seed(0)

        def act(self, obs: Any, state: Any = None, *, explore: bool = False) -> Any:
            return random_actions(vector.action_space, vector.num_envs, self.draws), {}, {}

    torch.set_num_threads(1)
    vector = make_env(env, **how)
    try:
        return evaluate(vector, Random(), evaluation_seeds(RANDOM_EPISODES)).returns
    finally:
        vector.close()


def own_results(out: Path) -> dict[str, Any]:
    """Every run in `out`, in the format of a peers file (see `ctrlrl.runs.peers`)."""
    runs = [load_run(file.parent) for file in sorted(out.glob("*/config.json"))]
    facts = [run.provenance for run in runs]
    versions = sorted({f"ctrlrl {one.get('ctrlrl')} at {one.get('git', {}).get('commit', '?')[:10]}" for one in facts})
    versions += sorted({f"{k} {v}" for one in facts for k, v in one.get("packages", {}).items() if k != "safetensors"})
    dates = sorted({one["started"][:10] for one in facts if "started" in one})
    return {
        "what": f"Deterministic evaluation returns of {', '.join(versions)}, measured {between(dates)}",
        "protocol": "each run's command; one thread each; evaluations are episodes with the policy's mode on an "
        "environment of their own, on fixed seeds; returns is the list of episode returns",
        "library": "ctrlrl",
        "runs": [
            {
                "algo": run.algo,
                "env": run.env,
                "seed": run.seed,
                "complete": run.state == "finished",
                "command": run.provenance.get("command"),
                "evals": [
                    {"step": one.step, "mean": one.mean, "returns": one.returns.round(4).tolist()}
                    for one in run.evaluations
                ],
            }
            for run in runs
        ],
    }


def peer_results(peer: str, out: Path) -> dict[str, Any]:
    """Every run of `peer` in `out`, in the format of a peers file."""
    runs = [read_json(file) for file in sorted(out.glob(f"{peer}-*.json"))]
    libraries = sorted({run["library"] for run in runs})
    versions = sorted({f"{name} {version}" for run in runs for name, version in run["packages"].items()})
    dates = sorted({run["started"][:10] for run in runs})
    return {
        "what": f"Deterministic evaluation returns of the SAC of {', '.join(libraries)} ({', '.join(versions)}), "
        f"measured {between(dates)}",
        "protocol": " ".join((peers.HERE / "returns.py").read_text().split('"""')[1].split("\n\n")[1].split()),
        "library": libraries[0] if libraries else peer,
        "runs": [{key: run[key] for key in ("algo", "env", "seed", "complete", "evals")} for run in runs],
    }


def between(dates: Sequence[str]) -> str:
    """The first and the last of sorted dates."""
    return " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "at an unknown time"


def write_results(path: Path, results: dict[str, Any], envs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write `results` and the random policy's returns in `envs` (environment: arguments of `make_env`) to `path`."""
    known = read_json(path).get("random", {}) if path.exists() else {}
    for env, how in envs.items():
        if env not in known:
            try:
                returns = random_returns(env, **how)
            except CtrlrlError as error:  # what was trained is worth its report all the same
                print(f"no returns of a random policy on {env}: {error}", file=sys.stderr)
                continue
            known[env] = {"mean": sum(returns) / len(returns), "returns": [round(one, 4) for one in returns]}
    results |= {"random": known}
    write_json(path, results)
    print(f"returns: {path}")
    return results


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the script, and the flags after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="sac", help="what to train: ctrlrl algos lists them (default: sac)")
    parser.add_argument("--peer", choices=PEERS, help="train this library's SAC instead of ours")
    parser.add_argument("--env", nargs="+", required=True, help="environments")
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps of each run (default: 100,000)")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at once (default: one per core)")
    parser.add_argument("--eval-every", type=int, default=10_000, help="default: 10,000 steps")
    parser.add_argument("--eval-episodes", type=int, default=10, help="default: 10")
    parser.add_argument("--peers", nargs="+", default=[], metavar="FILE", help="returns of peers to compare with")
    parser.add_argument("--only-report", action="store_true", help="train nothing, report what there is")
    options = parser.parse_args(words[:cut])
    options.env, options.seeds = list(dict.fromkeys(options.env)), list(dict.fromkeys(options.seeds))
    flags = list(words[cut + 1 :])
    if taken := [flag for flag in flags if flag.partition("=")[0].replace("_", "-") in _OURS]:
        parser.error(f"{taken[0]} is this script's to give, not for after --")
    if options.peer and (flags or options.algo != "sac"):
        parser.error("peers run SAC with their defaults: leave out --algo and what follows --")
    if options.peer and options.peers:
        parser.error("--peers compares runs of ours; with --peer there are none")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options, flags


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cells(options: argparse.Namespace, flags: Sequence[str]) -> list[OwnCell]:
    """One cell per environment and seed, all environments of a seed before the next seed.

    Raises:
        UsageError: on flags that `ctrlrl train` does not take, or a folder that holds a run with other settings.
    """
    every = ("--eval-every", str(options.eval_every), "--eval-episodes", str(options.eval_episodes))
    cells = [
        OwnCell(options.algo, env, seed, options.steps, options.out, (*every, *flags))
        for seed in options.seeds
        for env in options.env
    ]
    presets = {preset.name: preset for cell in cells if (preset := cell.resolved[1])}
    for preset in presets.values():
        print(describe_preset(preset).replace("; --no-preset", "; -- --no-preset"))
    for cell in cells:
        cell.require_same_settings()
    return cells


def peer_cells(options: argparse.Namespace) -> list[PeerCell]:
    """One cell per environment and seed, all environments of a seed before the next seed.

    Raises:
        UsageError: where a file holds a run with another protocol.
    """
    protocol = (options.peer, options.eval_every, options.eval_episodes)
    cells = [
        PeerCell(f"{options.peer}-sac", env, seed, options.steps, options.out, *protocol)
        for seed in options.seeds
        for env in options.env
    ]
    for cell in cells:
        cell.require_same_settings()
    return cells


def main(words: Sequence[str]) -> int:
    """Run; returns the exit code."""
    options, flags = parse_arguments(words)
    for file in options.peers:
        load_peers(file)  # refused now, and not after hours of training
    own = [] if options.peer else own_cells(options, flags)
    cells: Sequence[Cell] = peer_cells(options) if options.peer else own
    failed: list[tuple[Cell, str]] = []
    if not options.only_report:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.peer:
            python_of(options.peer)  # now, and not while others wait
        scheduler = Scheduler(cells, options.jobs, options.out)
        try:
            scheduler.run()
        except Interrupted:
            print(f"interrupted; go on with the same command: {shlex.join([sys.executable, *sys.argv])}")
            return 130
        failed = scheduler.failed
    if options.peer:
        results = peer_results(options.peer, options.out)
        write_results(options.out / f"returns-{options.peer}.json", results, {env: {} for env in options.env})
    else:
        envs = {own_cell.env: own_cell.env_options for own_cell in own}
        results = write_results(options.out / "returns.json", own_results(options.out), envs)
        folders = sorted(file.parent for file in options.out.glob("*/config.json"))
        if folders:
            random = {env: np.array(known["returns"]) for env, known in results["random"].items()}
            comparison = compare(folders, peers=options.peers, random=random)
            print(console_summary(comparison))
            print(f"comparison: {write_comparison(comparison, options.out / 'comparison.html')}")
            print(f"picture: {write_picture(comparison, options.out / 'returns.svg')}")
            if comparison.verdicts:
                print(f"table: {write_table(comparison, options.out / 'returns.md')}")
    for cell, how in failed:
        log = options.out / f"{cell.name}.log"
        tail = "".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-15:])
        print(f"{cell.name} failed with {how}; the end of {log}:\n{tail}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CtrlrlError as error:
        print(f"bench_returns: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
