#!/usr/bin/env python3
"""How late a controller's ticks begin: with and without real-time scheduling, alone and beside two busy programs.

    python scripts/bench_loop.py BUNDLE --seconds 20

with the interpreter of .venv, and a bundle of one of our robot tasks. The controller's own process drives a simulated
robot over UDP; of each case the log of ticks is read. Cases take turns, `--rounds` times, since machines are noisy;
shown are all ticks of a case. Real-time scheduling needs the permission (docs/deploy.md). The loop that most programs
have, which works and then sleeps for a period, is measured beside: how far it has drifted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np

from ctrlrl.deploy import process, simulated
from ctrlrl.deploy.actor import Actor
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import ControllerConfig
from ctrlrl.deploy.deployment import start
from ctrlrl.deploy.process import ProcessConfig
from ctrlrl.deploy.safety import SafetyConfig
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.ticks import read_ticks
from ctrlrl.errors import CtrlrlError

PATIENT = SafetyConfig(max_age=5.0, late=10**6, freeze=0.0, tilt=0.0, outside=100.0, persist=0.0)
"""Nothing stops the loop, however late it is."""


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many programs compute meanwhile."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def lateness(
    bundle: Bundle, seconds: float, priority: int | None, busy: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(T,) s, of every tick in which the policy drove, and of those that were missed."""
    kwargs = dict(bundle.manifest.provenance.get("env_kwargs") or {})
    with tempfile.TemporaryDirectory() as folder:
        robot = SimulatedConfig(
            task=bundle.manifest.task,
            env_kwargs=kwargs,
            seeds=tuple(range(10_000, 10_100)),
            watchdog=5.0,
            again=True,
            priority=None if priority is None else priority - 1,
        )
        body = start("ctrlrl.deploy.simulated", simulated.to_options(robot))
        assert body.stdout is not None
        address = json.loads(body.stdout.readline())["address"]
        config = ProcessConfig(
            bundle=str(bundle.path),
            seal=bundle.seal,
            driver="udp",
            address=address,
            log=folder + "/log",
            priority=priority,
            controller=ControllerConfig(ramp=0.0, settle=0.1, hold=0.0, safety=PATIENT),
        )
        try:
            mind = start("ctrlrl.deploy.process", process.to_options(config))
            time.sleep(3.0)  # until all is imported
            with neighbours(busy):
                began = time.monotonic()
                time.sleep(seconds)
                over = time.monotonic()
            mind.terminate()
            mind.wait()
        finally:
            body.kill()
            body.wait()
        _, ticks = read_ticks(folder + "/log")
    during = ticks[(ticks["due"] >= began) & (ticks["due"] <= over) & (ticks["phase"] == 2)]
    late: np.ndarray[tuple[int], np.dtype[np.float64]] = during["began"] - during["due"]
    period = float(bundle.manifest.control_dt or 0)
    missed = np.round(np.diff(during["due"]) / period).astype(int) - 1  # while the tick before was still at work
    holes = [late[i + 1] + (k + 1) * period for i, count in enumerate(missed) for k in range(count)]
    return np.concatenate([late, holes])


def naive(bundle: Bundle, seconds: float, busy: int) -> float:
    """s, by which a loop that sleeps for a period after its work is behind after `seconds`."""
    actor, period = Actor(bundle), float(bundle.manifest.control_dt or 0)
    goldens = bundle.goldens()
    given = {entry.name: goldens[f"network/input/{entry.name}"][:1] for entry in bundle.manifest.observation}
    with neighbours(busy):
        began = time.monotonic()
        for _ in range(round(seconds / period)):
            actor.run(given)
            time.sleep(period)
        return time.monotonic() - began - seconds


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--priority", type=int, default=50)
    options = parser.parse_args()
    try:
        bundle = Bundle.open(options.bundle)
    except CtrlrlError as error:
        print(f"bench_loop: {error}", file=sys.stderr)
        return error.exit_code
    cases = [(priority, busy) for busy in (0, 2) for priority in (None, options.priority)]
    found: dict[tuple[int | None, int], list[np.ndarray[tuple[int], np.dtype[np.float64]]]] = {
        case: [] for case in cases
    }
    drift: dict[int, list[float]] = {0: [], 2: []}
    for _ in range(options.rounds):
        for case in cases:
            found[case].append(lateness(bundle, options.seconds, *case))
        for busy, values in drift.items():
            values.append(naive(bundle, options.seconds, busy))
    print("| scheduling | busy neighbours | ticks | late by, us: p50 | p99 | p99.9 | most | in time (half a period) |")
    print("|---|---|---|---|---|---|---|---|")
    half = float(bundle.manifest.control_dt or 0) / 2
    for (priority, busy), parts in found.items():
        late = np.concatenate(parts)
        p50, p99, p999 = (f"{1e6 * np.quantile(late, share):,.0f}" for share in (0.5, 0.99, 0.999))
        how = "ordinary" if priority is None else f"SCHED_FIFO {priority}"
        most, share = f"{1e6 * late.max():,.0f}", f"{(late < half).mean():.3%}"
        print(f"| {how} | {busy} | {len(late):,} | {p50} | {p99} | {p999} | {most} | {share} |")
    for busy, values in drift.items():
        times = ", ".join(f"{1e3 * value:,.0f}" for value in values)
        print(
            f"\nA loop that works, then sleeps, {busy} busy neighbours: {times} ms behind after {options.seconds:g} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
