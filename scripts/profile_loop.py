#!/usr/bin/env python3
"""Where the time of a training goes: environments (of our own tasks: physics and task terms), acting, storing, updates.

    python scripts/profile_loop.py --algo ppo --env HalfCheetah-v5 --steps 200000
    python scripts/profile_loop.py --algo ppo --env Go1VelocityFlat-v0 --steps 1500000
    python scripts/profile_loop.py --algo ppo --env HalfCheetah-v5 --steps 200000 --threads 1 -- --agent.execution eager

with the interpreter of .venv; flags after `--` are those of `ctrlrl train`. The first tenth of the steps is left out,
and so are evaluations and checkpoints. What is measured is the wall clock inside each part, without a profiler.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

from ctrlrl.algorithms.registry import find_algorithm  # noqa: E402
from ctrlrl.cli.train import resolve  # noqa: E402
from ctrlrl.envs.sim_vector import SimVector  # noqa: E402
from ctrlrl.errors import CtrlrlError  # noqa: E402
from ctrlrl.training.callbacks import Callback  # noqa: E402
from ctrlrl.training.loop import Loop  # noqa: E402
from ctrlrl.training.session import train  # noqa: E402


class Clock(Callback):
    """Sums up the seconds in methods of a training's parts, in the iterations from step `after` on."""

    def __init__(self, after: int) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps = 0
        self._after = after
        self._counts = False

    def on_start(self, loop: Loop) -> None:
        """Wrap what the parts do."""
        iterate = loop._iterate

        def iteration() -> None:
            before, begun = loop.env_steps, time.perf_counter()
            self._counts = before >= self._after
            iterate()
            if self._counts:
                self.seconds["all"] += time.perf_counter() - begun
                self.steps += loop.env_steps - before
            self._counts = False

        object.__setattr__(loop, "_iterate", iteration)
        self._watch(loop, "_learn", "updates")
        self._watch(loop, "_store", "storing")
        self._watch(loop, "_evaluate", "apart")
        self._watch(loop, "checkpoint", "apart")
        self._watch(loop.env, "step", "environments")
        if isinstance(loop.env, SimVector):
            self._watch(loop.env.sim, "step", "physics")
        self._watch(loop.agent.policy, "act", "acting")

    def _watch(self, owner: Any, name: str, part: str) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if self._counts:
                    self.seconds[part] += time.perf_counter() - begun

        object.__setattr__(owner, name, timed)


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--threads", type=int, help="CPU cores to use")
    parser.add_argument("flags", nargs="*", help="of ctrlrl train")
    options = parser.parse_args()
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env", options.env, "--steps", str(options.steps), *threads, "--eval-every", "0", "--no-video"]
        try:
            algorithm = find_algorithm(options.algo)
            _, config, preset = resolve(algorithm, [*flags, "--out", f"{folder}/run", *options.flags])
            clock = Clock(options.steps // 10)
            train(options.algo, config.env, config=config, preset=preset and preset.name, callbacks=[clock], quiet=True)
        except CtrlrlError as error:
            parser.error(str(error))
    if not clock.steps:
        parser.error(f"nothing is left of {options.steps} steps after the first tenth: take more")
    shares = clock.seconds
    whole = shares.pop("all") - shares.pop("apart", 0.0)
    if physics := shares["physics"]:
        shares["task terms"] = shares.pop("environments") - physics
    shares["the rest"] = whole - sum(shares.values())
    print(f"{options.algo}, {options.env}, {config.num_envs} environment(s): {clock.steps / whole:,.0f} steps/s")
    print("| part | us a step | share |\n|---|---|---|")
    for part, seconds in shares.most_common():
        print(f"| {part} | {seconds / clock.steps * 1e6:.1f} | {seconds / whole:.0%} |")


if __name__ == "__main__":
    main()
