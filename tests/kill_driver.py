"""Kills trainings, resumes them until they finish, and compares each with one that was left alone.

Usage: python -m tests.kill_driver FOLDER TRIALS ENV. Children are forked, so that torch is imported once. Every other
trial dies after a random time of its processor's (of a timer's signal that nothing handles, and so without a word, as
of SIGKILL), wherever that finds it and however busy the machine is; the rest die inside a file operation (fsync,
rename, delete), that is while a checkpoint, a replay segment or a report is being written. Prints one line per trial,
and exits with 1 if any run differs.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.session import resume, train
from tests.runs import SMALL, assert_same

# Each trial takes the next of these: checkpoints and evaluations fall together, or not, also at the end.
VARIANTS: list[dict[str, Any]] = [
    {"steps": 900, "num_envs": 2},
    {"steps": 900, "num_envs": 2, "eval_every": 200, "checkpoint_every": 50},
    {"steps": 600, "buffer": {"capacity": 150, "n_step": 3}, "eval_every": 70, "keep_checkpoints": 1},
    {"steps": 600, "num_envs": 3, "backend": "workers"},
]
FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def child(
    work: Callable[[], object], *, die_at: int | None = None, die_after: float = 0.0, told: int | None = None
) -> int:
    """Run `work` in a forked process that dies at its `die_at`-th file operation, or `die_after` seconds of processor
    time (0: never). It writes the time it took to the file `told`; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        if die_at is not None:
            count = 0

            def deadly(original: Callable[..., object]) -> Callable[..., object]:
                def operation(*args: object, **kwargs: object) -> object:
                    nonlocal count
                    count += 1
                    if count == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)

                return operation

            for name in FILE_OPERATIONS:
                setattr(os, name, deadly(getattr(os, name)))
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, die_after)
        work()
        if told is not None:
            os.write(told, str(time.process_time() - started).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(pid: int) -> int:
    """0 if the process finished, a signal, negated, if it was killed, 1 if it failed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_checkpoint(run: Path) -> bool:
    """Whether there is something to resume."""
    return (run / "config.json").exists() and bool(RunFolder(run).step_checkpoints())


def main(folder: Path, trials: int, env: str) -> int:
    """Run the trials; returns the exit code."""
    durations = []
    for number, variant in enumerate(VARIANTS):
        times = []
        for name in ("warm", "whole"):  # the shorter time counts: a run is to be killed before its end
            settings = SMALL | variant | {"out": str(folder / f"{name}-{number}")}
            readable, told = os.pipe()
            assert wait(child(functools.partial(train, "sac", env, **settings), told=told)) == 0
            times.append(float(os.read(readable, 100)))
        durations.append(min(times))
    draw = random.Random(0)
    bad = 0
    for trial in range(trials):
        run, variant = folder / f"trial-{trial}", trial // 2 % len(VARIANTS)
        settings = SMALL | VARIANTS[variant] | {"out": str(run)}
        deaths = []
        while True:

            def work(run: Path = run, settings: dict[str, Any] = settings) -> object:
                if has_checkpoint(run):
                    return resume(run, quiet=True)
                shutil.rmtree(run, ignore_errors=True)
                return train("sac", env, **settings)

            if len(deaths) == 3:  # three deaths are enough: let it finish
                pid, how = child(work), "nothing"
            elif trial % 2:
                at = draw.randint(1, 250)
                pid, how = child(work, die_at=at), f"file operation {at}"
            else:
                delay = draw.uniform(0.3, 0.9) * durations[variant]
                pid, how = child(work, die_after=delay), f"{delay:.2f} s"
            code = wait(pid)
            if code == 0:
                break
            if code not in (-signal.SIGKILL, -signal.SIGPROF):
                print(f"trial {trial}: failed with {code} after {deaths}")
                return 1
            deaths.append(how)
        try:
            assert_same(folder / f"whole-{variant}", run)
            print(f"trial {trial}: equal; died at {', '.join(deaths) or 'nothing'}", flush=True)
        except AssertionError as error:
            bad += 1
            print(f"trial {trial}: DIFFERS after {deaths}: {error}", flush=True)
    print(f"{trials - bad} of {trials} equal")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
