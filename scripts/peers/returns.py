"""One training of a peer, in the peer's own virtual environment: `bench_returns.py --peer` starts it.

What learns from a replay: one environment, one update per step (DroQ: 20), batch 256, networks 2x256, 5,000 random
steps first, exploration noise 0.1 (TD3, DDPG), the library's defaults otherwise; PPO: eight environments, the library's
defaults. Evaluations are episodes with the mean (or likeliest) action on an environment of their own, with the seeds
that ctrlrl evaluates on; one thread.

Writes the run as JSON to --out, whole after each evaluation; a run that is cut off starts anew. The variables of
`bench_returns.ONE_THREAD` must be set before, since XLA and BLAS read them when they are loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recipes import ALGORITHMS, LIBRARIES, make_model

LEARNING_STARTS = 5_000
FIRST_EVALUATION_SEED = 10_000


class Evaluations(BaseCallback):
    """Evaluates every `every` steps and keeps the file up to date."""

    def __init__(self, run: dict[str, Any], out: Path) -> None:
        super().__init__()
        self.run, self.out = run, out
        self.env = gym.make(run["env"])

    def _on_step(self) -> bool:
        before = self.num_timesteps - self.training_env.num_envs
        if self.num_timesteps // self.run["eval_every"] > before // self.run["eval_every"]:
            returns = [self._episode(FIRST_EVALUATION_SEED + i) for i in range(self.run["eval_episodes"])]
            entry = {
                "step": self.num_timesteps,
                "mean": float(np.mean(returns)),
                "returns": np.round(returns, 4).tolist(),
            }
            self.run["evals"].append(entry)
            print(f"step {self.num_timesteps:,}: evaluation return {entry['mean']:,.1f}", flush=True)
            self.write()
        return True

    def _episode(self, seed: int) -> float:
        obs, _ = self.env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = self.env.step(self.model.predict(obs, deterministic=True)[0])
            total, over = total + float(reward), terminated or truncated
        return total

    def write(self) -> None:
        """Replace the file in one step."""
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.run, indent=1) + "\n")
        os.replace(temporary, self.out)


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=tuple(LIBRARIES), required=True)
    parser.add_argument("--algo", required=True)
    parser.add_argument("--env", required=True)
    for name in ("seed", "steps", "eval-every", "eval-episodes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.algo not in ALGORITHMS[options.library]:
        parser.error(f"{options.library} trains {', '.join(ALGORITHMS[options.library])}, not {options.algo}")
    torch.set_num_threads(1)
    _, package, title = LIBRARIES[options.library]
    packages = (package, "gymnasium", "mujoco", "numpy", "torch", *(("jax",) if options.library == "sbx" else ()))
    versions = {name: importlib.metadata.version(name) for name in packages}
    run = {
        "library": f"{title} {versions[package]}",
        "algo": options.algo.upper(),
        "env": options.env,
        "seed": options.seed,
        "steps": options.steps,
        "eval_every": options.eval_every,
        "eval_episodes": options.eval_episodes,
        "complete": False,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": versions,
        "evals": [],
    }
    evaluations = Evaluations(run, options.out)
    evaluations.write()
    num_envs = 8 if options.algo == "ppo" else 1
    model = make_model(
        options.library,
        options.algo,
        make_vec_env(options.env, num_envs),  # which the model seeds
        num_envs=num_envs,
        seed=options.seed,
        learning_starts=LEARNING_STARTS,
    )
    model.learn(options.steps, callback=evaluations)
    run["complete"] = True
    evaluations.write()


if __name__ == "__main__":
    main()
