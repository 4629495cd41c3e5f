"""Environments of other libraries, stepped when told: `bench_envs.py` starts and gates it, in their own interpreters.

Standard library, NumPy and the library itself; in ours too, for Gymnasium's own vector environments.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import serve


def make_stepper(kind: str, env_id: str, n: int, threads: int) -> tuple[Callable[[Any], object], Any]:
    """What steps all environments once with actions (n, ...), and the action space of one."""
    if kind.startswith("gymnasium-"):
        import gymnasium as gym

        env = gym.make_vec(env_id, n, vectorization_mode=kind.removeprefix("gymnasium-"))
        env.reset(seed=0)
        return env.step, env.single_action_space
    if kind.startswith("sb3-"):
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

        made = make_vec_env(env_id, n, seed=0, vec_env_cls=SubprocVecEnv if kind == "sb3-subproc" else DummyVecEnv)
        made.reset()
        return made.step, made.action_space
    import envpool

    pool = envpool.make_gymnasium(env_id, num_envs=n, num_threads=threads, seed=0)
    pool.reset()
    return pool.step, pool.action_space


def main() -> None:
    """Step until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--num-envs", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    step, space = make_stepper(options.kind, options.env, options.num_envs, options.threads)
    random = np.random.default_rng(0)
    shape = (8, options.num_envs, *(space.shape or ()))
    if space.shape:
        actions = random.uniform(space.low, space.high, shape).astype(space.dtype)
    else:
        actions = random.integers(0, space.n, shape)

    def run(seconds: float) -> int:
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            for action in actions:
                step(action)
            steps += 8 * options.num_envs
        return steps

    serve(run)


if __name__ == "__main__":
    main()
