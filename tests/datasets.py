"""Small datasets for tests: pendulums that swing at random."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np

from ctrlrl.data.store import Dataset, DatasetWriter, Episode


def pendulum_data(path: Path, episodes: int = 4, length: int = 50, *, env: str | None = "Pendulum-v1") -> Dataset:
    """Random actions on Pendulum-v1, cut after `length` steps; reference returns are made up."""
    made = gym.make("Pendulum-v1")
    with DatasetWriter.create(
        path,
        observation_space=made.observation_space,
        action_space=made.action_space,
        env=env,
        control_dt=0.05,
        reference={"random": -1200.0, "expert": -150.0},
    ) as writer:
        for seed in range(episodes):
            random = np.random.default_rng(seed)
            seen = [made.reset(seed=seed)[0]]
            actions = random.uniform(-2, 2, (length, 1)).astype(np.float32)
            rewards = []
            for action in actions:
                obs, reward, *_ = made.step(action)
                seen.append(obs)
                rewards.append(reward)
            writer.add(
                Episode(
                    observation=np.stack(seen),
                    action=actions,
                    reward=np.array(rewards),
                    terminated=False,
                    truncated=True,
                    info={"seed": seed},
                )
            )
    made.close()
    return Dataset.open(path)
