#!/usr/bin/env python3
"""Environment steps per second: ours, Gymnasium's, Stable-Baselines3's and EnvPool's, beside the limit of the machine.

    python scripts/bench_envs.py                                       # HalfCheetah, Ant, Humanoid, 64 environments
    python scripts/bench_envs.py --env HalfCheetah-v5 --num-envs 8 64 512 --kinds native envpool
    python scripts/bench_envs.py --env Pendulum-v1 CartPole-v1 --num-envs 64 4096 --kinds native gymnasium-sync
    python scripts/bench_envs.py --env Go1VelocityFlat-v0 --num-envs 512 4096

with the interpreter of .venv. For the first three there is a limit, MuJoCo alone: a loop of `mj_step` over one
simulation in each of as many processes as there are cores, with the environment's rule of when an episode ends and
nothing else. For tasks of our own the limit is their physics: the same environments with the same actions, of which
only the time inside `Sim.step` counts.
Every kind has its own process (peers in virtual environments of their own, made at the first run), random actions drawn
beforehand, and all the cores. Round by round each steps for --seconds while the others wait; a ratio is the median over
the rounds of the ratios to the limit, or to the first kind, of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
from peers.turns import serve  # noqa: E402
from peers.venv import python_of  # noqa: E402

from ctrlrl.cores import usable_cores  # noqa: E402
from ctrlrl.envs.tasks.registry import ROBOT_TASKS  # noqa: E402
from ctrlrl.envs.vector import VectorEnv  # noqa: E402
from ctrlrl.errors import CtrlrlError  # noqa: E402

OURS = ("native", "native-fast", "gymnasium")
THEIRS = ("gymnasium-sync", "gymnasium-async", "sb3-dummy", "sb3-subproc", "envpool")
HEALTHY = {"HalfCheetah-v5": (-np.inf, np.inf), "Ant-v5": (0.2, 1.0), "Humanoid-v5": (1.0, 2.0)}
"""The environments that there is a limit for: where an episode goes on, as heights of the root."""


class Stepper:
    """Processes of one kind that step together when told."""

    def __init__(self, kind: str, env_id: str, num_envs: int, threads: int) -> None:
        self.kind = kind
        shared = ["--kind", kind, "--env", env_id, "--num-envs", str(num_envs), "--threads", str(threads)]
        if kind in (*OURS, "limit", "physics"):
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", *shared]
        else:
            library = kind.partition("-")[0]
            python = sys.executable if library == "gymnasium" else str(python_of(library))
            command = [python, str(HERE / "peers" / "envs.py"), *shared]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when a process fails
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for _ in range(threads if kind == "limit" else 1)
        ]
        self.peak_mib = 0.0
        self._read()  # that they are warm

    def go(self, seconds: float) -> float:
        """Step for `seconds`; returns environment steps per second."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        records = self._read()
        self.peak_mib = sum(record["peak_mib"] for record in records)
        return sum(record["steps"] / record["seconds"] for record in records)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _read(self) -> list[dict[str, float]]:
        lines = [process.stdout.readline() for process in self._processes if process.stdout is not None]
        if not all(lines):
            self._log.seek(0)
            raise SystemExit(f"{self.kind} failed:\n{self._log.read()[-3000:]}")
        return [json.loads(line) for line in lines]


def raw_steps(env_id: str) -> Callable[[float], int]:
    """The limit: `mj_step` on one simulation, started anew where the environment would."""
    import mujoco

    own: Any = gym.make(env_id).unwrapped
    model, data, substeps = own.model, own.data, own.frame_skip
    low, high = HEALTHY[env_id]
    actions = np.random.default_rng(0).uniform(*model.actuator_ctrlrange.T, (1024, model.nu))
    control, qpos, step = data.ctrl, data.qpos, mujoco.mj_step
    own.reset(seed=0)

    def run(seconds: float) -> int:
        begun, steps, since = time.perf_counter(), 0, 0
        while time.perf_counter() - begun < seconds:
            for action in actions:
                control[:] = action
                step(model, data, substeps)
                since += 1
                if since == 1000 or not low <= qpos[2] <= high:
                    own.reset()
                    since = 0
            steps += len(actions)
        return steps

    return run


def physics_steps(env_id: str, num_envs: int, threads: int) -> Callable[[float], int]:
    """The limit of a task of ours: as many steps as there would have been, had it only simulated."""
    import torch

    from ctrlrl.envs.sim_vector import make_sim_env

    torch.set_num_threads(1)
    env = make_sim_env(env_id, num_envs=num_envs, threads=threads)
    inside, step = [0.0], env.sim.step

    def timed(substeps: int) -> None:
        begun = time.perf_counter()
        step(substeps)
        inside[0] += time.perf_counter() - begun

    env.sim.step = timed  # type: ignore[method-assign]
    stepped = stepping(env, num_envs)

    def run(seconds: float) -> int:
        inside[0], begun = 0.0, time.perf_counter()
        return round(stepped(seconds) * (time.perf_counter() - begun) / inside[0])

    return run


def our_steps(kind: str, env_id: str, num_envs: int, threads: int) -> Callable[[float], int]:
    """A backend of ours."""
    import torch

    from ctrlrl.envs.make import make_env

    torch.set_num_threads(1)
    return stepping(make_env(env_id, num_envs=num_envs, backend=kind, cores=threads), num_envs)


def stepping(env: VectorEnv, num_envs: int) -> Callable[[float], int]:
    """What steps `env` with random actions."""
    import torch

    env.reset(0)
    space, random = env.action_space, np.random.default_rng(0)
    shape = (8, num_envs, *(space.shape or ()))
    if isinstance(space, gym.spaces.Box):
        actions = torch.from_numpy(random.uniform(space.low, space.high, shape).astype(np.float32))
    else:
        actions = torch.from_numpy(random.integers(0, space.n, shape))  # type: ignore[attr-defined]

    def run(seconds: float) -> int:
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            for action in actions:
                env.step(action)
            steps += 8 * num_envs
        return steps

    return run


def compare(env_id: str, num_envs: int, kinds: Sequence[str], options: argparse.Namespace) -> str:
    """The table of one environment."""
    threads = usable_cores()
    limits = ["limit"] if env_id in HEALTHY else ["physics"] if env_id in ROBOT_TASKS else []
    steppers = [Stepper(kind, env_id, num_envs, threads) for kind in limits + list(kinds)]
    rates: dict[str, list[float]] = {stepper.kind: [] for stepper in steppers}
    for _ in range(options.rounds):
        for stepper in steppers:
            rates[stepper.kind].append(stepper.go(options.seconds))
    against = (limits or kinds)[0]
    lines = [
        f"{env_id}, {num_envs} environments, {threads} cores",
        "",
        f"| | environment steps/s (range) | of the {against} (range) | memory |",
        "|---|---|---|---|",
    ]
    for stepper in steppers:
        own = rates[stepper.kind]
        ratios = [a / b for a, b in zip(own, rates[against], strict=True)]
        lines.append(
            f"| {stepper.kind} | {statistics.median(own):,.0f} ({min(own):,.0f} to {max(own):,.0f}) | "
            f"{statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%}) | {stepper.peak_mib:,.0f} MiB |"
        )
        stepper.close()
    return "\n".join(lines)


def main() -> int:
    """Compare, and print a table for each environment and number of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["HalfCheetah-v5", "Ant-v5", "Humanoid-v5"])
    parser.add_argument("--num-envs", nargs="+", type=int, default=[64])
    parser.add_argument("--kinds", nargs="+", choices=(*OURS, *THEIRS), help="default: all that there are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        env_id, num_envs = options.env[0], options.num_envs[0]
        if options.kind == "limit":
            serve(raw_steps(env_id))
        elif options.kind == "physics":
            serve(physics_steps(env_id, num_envs, options.threads))
        else:
            serve(our_steps(options.kind, env_id, num_envs, options.threads))
        return 0
    try:
        for env_id in options.env:
            for num_envs in options.num_envs:
                forces = env_id.startswith(("Ant-", "Humanoid"))
                kinds = options.kinds or [k for k in (*OURS, *THEIRS) if forces or k != "native-fast"]
                if env_id in ROBOT_TASKS:
                    kinds = ["native"]
                print(compare(env_id, num_envs, kinds, options) + "\n", flush=True)
    except CtrlrlError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
