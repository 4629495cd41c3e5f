#!/usr/bin/env python3
"""What the Panda's scripted experts reach: one episode in each of N environments, for several amounts of noise.

    python scripts/panda_expert.py PandaLift-v0 --noise 0 0.5 1

with the interpreter of .venv. The table has the share of successes, and mean and least return.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import torch

from ctrlrl.envs.make import make_env
from ctrlrl.envs.tasks.panda_expert import expert
from ctrlrl.errors import CtrlrlError


def play(env_id: str, options: dict[str, object], episodes: int, noise: float, seed: int) -> str:
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
    options = parser.parse_args()
    print("| environment | noise | success | mean return | least |\n|---|---|---|---|---|")
    try:
        for noise in options.noise:
            print(play(options.env, options.env_kwargs, options.episodes, noise, options.seed), flush=True)
    except CtrlrlError as error:
        print(f"panda_expert: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
