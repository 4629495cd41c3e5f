"""One endless training of a peer, in the peer's own virtual environment: `bench_learner.py` starts and gates it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gate import Gate
from recipes import LIBRARIES, make_model


class Gated(BaseCallback):
    """Hands the counts to the gate after every control step."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def _on_step(self) -> bool:
        self.gate(self.num_timesteps, self.model._n_updates)
        return True


def main() -> None:
    """Train until the gate ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=tuple(LIBRARIES), required=True)
    parser.add_argument("--algo", required=True)
    parser.add_argument("--env", required=True)
    for name in ("num-envs", "threads", "segment", "learning-starts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(
        options.library,
        options.algo,
        make_vec_env(options.env, options.num_envs, seed=0),
        num_envs=options.num_envs,
        seed=0,
        learning_starts=options.learning_starts,
    )
    # PPO counts epochs: one rollout and its ten are warm enough.
    model.learn(10**9, callback=Gated(Gate(options.segment, warm_updates=10 if options.algo == "ppo" else 100)))


if __name__ == "__main__":
    main()
