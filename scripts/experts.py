#!/usr/bin/env python3
"""What the scripted experts reach: one episode in each of N environments, for several amounts of noise.

    python scripts/experts.py PandaLift-v0 --noise 0 0.5 1
    python scripts/experts.py PandaLift-v0 --noise 0.5 --episodes 50 --out data/lift     # demonstrations

with the interpreter of .venv. The table has the share of successes, and mean and least return. With --out the episodes,
as many for each amount of noise, become a dataset, whose scores are relative to random actions and to no noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np
import torch

from ctrlrl.data.store import Column, DatasetWriter
from ctrlrl.envs.make import make_env
from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.tasks.panda_expert import expert
from ctrlrl.envs.tasks.swing_up_expert import SwingUpExpert
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import CtrlrlError
from ctrlrl.nn.policy import Policy
from ctrlrl.training.collect import RandomPolicy, played
from ctrlrl.training.evaluation import evaluate, evaluation_seeds


class Scripted(Policy):
    """The expert of an environment, with uniform noise of half width `noise` on its actions in [-1, 1].

    Raises:
        UsageError: there is none for it.
    """

    def __init__(self, env: VectorEnv, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self._noise, self._generator = 0.0, torch.Generator().manual_seed(seed)
        self._expert: Callable[[torch.Tensor], torch.Tensor]
        if isinstance(env, SimVector) and "SwingUp-" in env.name:
            self._expert, self._noise = SwingUpExpert(env.task), noise
        else:
            self._expert = expert(env, noise=noise, seed=seed)

    def act(self, obs: Any, state: Any = None, *, explore: bool = False) -> Any:
        action = self._expert(obs["policy"] if isinstance(obs, dict) else obs)
        drawn = 2 * torch.rand(action.shape, generator=self._generator) - 1
        return (action + self._noise * drawn).clamp(-1, 1), {}, {}


def record(env_id: str, options: dict[str, Any], episodes: int, noises: list[float], seed: int, out: Path) -> str:
    """Write a dataset; returns a line that says what is in it."""
    env = make_env(env_id, num_envs=min(episodes, 50), env_kwargs=options)
    seeds = evaluation_seeds(20)
    reference = {
        "random": evaluate(env, RandomPolicy(env, seed), seeds).mean,
        "expert": evaluate(env, Scripted(env), seeds).mean,
    }
    writer = DatasetWriter.create(
        out,
        observation_space=env.observation_space,
        action_space=env.action_space,
        env=env_id,
        control_dt=env.control_dt,
        columns={"success": Column(dtype="bool")},
        reference=reference,
        provenance={"policy": "scripted expert", "noise": noises, "seed": seed, "env_kwargs": options},
    )
    with writer:
        for number, noise in enumerate(noises):
            policy = Scripted(env, noise, seed)
            for episode in itertools.islice(played(env, policy, seed=seed + number, explore=False), episodes):
                writer.add(episode)
    return f"{out}: {writer.num_transitions:,} transitions"


def play(env_id: str, options: dict[str, Any], episodes: int, noise: float, seed: int) -> str:
    """A line of the table."""
    env = make_env(env_id, num_envs=episodes, env_kwargs=options)
    result = evaluate(env, Scripted(env, noise, seed), evaluation_seeds(episodes))
    success = np.mean(result.success)
    return f"| {env_id} | {noise:g} | {success:.0%} | {result.mean:.1f} | {min(result.returns):.1f} |"


def main() -> int:
    """Play and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="PandaReach-v0, PandaLift-v0, CartPoleSwingUp-v0 or PendulumSwingUp-v0")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--env-kwargs", type=json.loads, default={}, help='{"reward": "sparse"}')
    parser.add_argument("--out", type=Path, help="a new folder, for a dataset of the episodes")
    options = parser.parse_args()
    try:
        if options.out is not None:
            given = options.env, options.env_kwargs, options.episodes, options.noise, options.seed
            print(record(*given, options.out))
            return 0
        print("| environment | noise | success | mean return | least |\n|---|---|---|---|---|")
        for noise in options.noise:
            print(play(options.env, options.env_kwargs, options.episodes, noise, options.seed), flush=True)
    except CtrlrlError as error:
        print(f"experts: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
