#!/usr/bin/env python3
"""Demonstrations of a sparse Meta-World task by its scripted expert with noise, as a file for `ctrlrl data import`.

    .venv-metaworld/bin/python scripts/metaworld_demos.py MetaWorldSparse-PickPlace-v0 --noise 0.5 --out demos/pick.npz
    ctrlrl data import demos/pick.npz --mapping demos/pick.json --out data/pick

with Meta-World's interpreter (`scripts/peers/metaworld_sparse.py` says how to make it). Actions are the expert's plus
Gaussian noise, clipped to [-1, 1], and stored as executed. The expert asks for more than 1 while it is far from where
it wants to be, so noise matters most where it is near. Episodes end with success or at the time limit. All that are
played are kept; with `--keep successful` those that fail are not, and it goes on until there are enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "peers"))

import gymnasium as gym
import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from metaworld_sparse import TASKS

Rows = dict[str, list[Any]]

MOST_PLAYED = 100
"""How many episodes are played for each that is asked for, before it gives up."""


def play(env: gym.Env[Any, Any], expert: Any, noise: float, random: np.random.Generator) -> Rows:
    """One episode, a row for each step."""
    rows: Rows = {}
    obs, _ = env.reset()
    done = False
    while not done:
        action = expert.get_action(obs) + noise * random.standard_normal(4)
        action = np.clip(action, -1, 1).astype(np.float32)
        following, reward, terminated, truncated, info = env.step(action)
        row = {
            "observation": obs,
            "action": action,
            "reward": reward,
            "next_observation": following,
            "terminated": terminated,
            "truncated": truncated,
            "success": info["success"],
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
        obs, done = following, terminated or truncated
    return rows


def main() -> int:
    """Play and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", choices=sorted(TASKS))
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the noise on actions")
    parser.add_argument("--episodes", type=int, default=50, help="how many to keep")
    parser.add_argument("--keep", choices=["all", "successful"], default="all")
    parser.add_argument("--max-episode-steps", type=int, help="the time limit, instead of the task's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new .npz file; its mapping comes beside it, as .json"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")  # for actions that are clipped here

    limit = {} if options.max_episode_steps is None else {"max_episode_steps": options.max_episode_steps}
    env = gym.make(options.env, disable_env_checker=True, **limit)
    env.reset(seed=options.seed)
    expert, random = ENV_POLICY_MAP[TASKS[options.env][0]](), np.random.default_rng(options.seed)
    kept: list[Rows] = []
    lengths: list[int] = []
    successes: list[bool] = []
    while len(kept) < options.episodes:
        if len(lengths) == MOST_PLAYED * options.episodes:
            print(f"metaworld_demos: {sum(successes)} of {len(successes)} succeeded, gave up", file=sys.stderr)
            return 1
        rows = play(env, expert, options.noise, random)
        lengths.append(len(rows["reward"]))
        successes.append(bool(rows["success"][-1]))
        if successes[-1] or options.keep == "all":
            kept.append({**rows, "episode": [len(kept)] * lengths[-1]})

    options.out.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: np.array([value for rows in kept for value in rows[name]]) for name in kept[0]}
    np.savez_compressed(options.out, **arrays)
    mapping = {name: name for name in arrays if name != "success"} | {
        "columns": ["success"],
        "action_low": -1,
        "action_high": 1,
        "env": f"metaworld_sparse:{options.env}",
        "control_dt": env.unwrapped.dt,  # type: ignore[attr-defined]
    }
    options.out.with_suffix(".json").write_text(json.dumps(mapping, indent=1) + "\n")
    steps = [len(rows["reward"]) for rows in kept]
    print(f"{options.out}: {len(kept)} episodes, {sum(steps):,} steps, {min(steps)} to {max(steps)} each")
    print(
        f"{sum(successes)} of {len(successes)} played succeeded ({np.mean(successes):.0%}), "
        f"{np.mean(lengths):.1f} steps on average, {np.mean(steps):.1f} of those kept"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
