#!/usr/bin/env python3
"""What the Panda's scripted experts reach: one episode in each of N environments, for several amounts of noise.

    python scripts/panda_expert.py PandaLift-v0 --noise 0 0.5 1
    python scripts/panda_expert.py PandaLift-v0 --noise 0.5 --episodes 50 --out data/lift     # demonstrations

with the interpreter of .venv. The table has the share of successes, and mean and least return. With --out the episodes,
as many for each amount of noise, become a dataset, whose scores are relative to random actions and to no noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import torch

from ctrlrl.data.store import Column, DatasetWriter
from ctrlrl.envs.make import make_env
from ctrlrl.envs.tasks.panda_expert import PandaExpert, expert
from ctrlrl.errors import CtrlrlError
from ctrlrl.nn.policy import Policy
from ctrlrl.training.collect import RandomPolicy, played
from ctrlrl.training.evaluation import evaluate, evaluation_seeds


class Scripted(Policy):
    """The expert where a policy is expected."""

    def __init__(self, expert: PandaExpert) -> None:
        super().__init__()
        self._expert = expert

    def act(self, obs: Any, state: Any = None, *, explore: bool = False) -> Any:
        return self._expert(obs), {}, {}


def record(env_id: str, options: dict[str, Any], episodes: int, noises: list[float], seed: int, out: Path) -> str:
    """Write a dataset; returns a line that says what is in it."""
    env = make_env(env_id, num_envs=min(episodes, 50), env_kwargs=options)
    seeds = evaluation_seeds(20)
    reference = {
        "random": evaluate(env, RandomPolicy(env, seed), seeds).mean,
        "expert": evaluate(env, Scripted(expert(env)), seeds).mean,
    }
    writer = DatasetWriter.create(
        out,
        observation_space=env.observation_space,
        action_space=env.action_space,
        env=env_id,
        control_dt=env.control_dt,
        columns={"success": Column(dtype="bool")},
        reference=reference,
        provenance={"policy": "panda_expert", "noise": noises, "seed": seed, "env_kwargs": options},
    )
    with writer:
        for number, noise in enumerate(noises):
            policy = Scripted(expert(env, noise=noise, seed=seed))
            for episode in itertools.islice(played(env, policy, seed=seed + number, explore=False), episodes):
                writer.add(episode)
    return f"{out}: {writer.num_transitions:,} transitions"


def play(env_id: str, options: dict[str, Any], episodes: int, noise: float, seed: int) -> str:
    """A line of the table."""
    env = make_env(env_id, num_envs=episodes, env_kwargs=options)
    policy = expert(env, noise=noise, seed=seed)
    obs = env.reset(seed)
    returns, over = torch.zeros(episodes), False
    while not over:  # all episodes are of one length
        step = env.step(policy(obs))
        obs, over = step.obs, bool(step.truncated.all())
        returns += step.reward
    success = step.log["success"].mean()
    return f"| {env_id} | {noise:g} | {success:.0%} | {returns.mean():.1f} | {returns.min():.1f} |"


def main() -> int:
    """Play and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="PandaReach-v0 or PandaLift-v0")
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
        print(f"panda_expert: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
