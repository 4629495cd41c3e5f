"""Datasets made from runs: what was acted, what was stored, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.cli.main import run as command
from ctrlrl.data.store import Dataset
from ctrlrl.envs.vector import Step
from ctrlrl.errors import UsageError
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.replay.episodes import episodes_of
from ctrlrl.training.collect import collect
from tests.runs import SMALL


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("runs") / "sac"
    settings = SMALL | {"steps": 600, "eval_every": 150, "checkpoint_every": 150, "keep_checkpoints": 9, "num_envs": 2}
    ctrlrl.train("sac", "Pendulum-v1", out=str(path), **settings)
    return path


def steps_as_the_environment_does(data: Dataset, episode: int) -> None:
    """Raise unless each transition of the episode is what Pendulum-v1 does there with its action."""
    env = gym.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    one = data.episode(episode)
    obs = np.asarray(one.observation)
    for t, action in enumerate(one.action):
        env.state = np.array([np.arctan2(obs[t, 1], obs[t, 0]), obs[t, 2]])  # type: ignore[attr-defined]
        after, reward, *_ = env.step(action)
        assert np.allclose(after, obs[t + 1], atol=1e-4) and abs(float(reward) - one.reward[t]) < 1e-4


@pytest.mark.parametrize("tier", ["random", "medium", "expert"])
def test_policies_are_collected(run: Path, tier: str, tmp_path: Path) -> None:
    data = collect(run, tmp_path / "set", tier=tier, steps=900, num_envs=3, reference_episodes=2)
    data.verify()
    assert data.num_transitions >= 900 and (data.lengths == 200).all() and data.truncated.all()
    assert not data.terminated.any() and data.env == "Pendulum-v1" and data.control_dt == pytest.approx(0.05)
    assert data.reference.keys() == {"random", "expert"} and data.provenance["tier"] == tier
    for episode in range(data.num_episodes):
        steps_as_the_environment_does(data, episode)
    if tier == "random":
        assert abs(float(np.std(data.action)) - 4 / 12**0.5) < 0.05
    again = collect(run, tmp_path / "again", tier=tier, steps=900, num_envs=3, reference_episodes=2)
    assert again.content_hash == data.content_hash


@pytest.mark.parametrize("tier", ["replay", "medium-replay"])
def test_what_was_stored_is_collected(run: Path, tier: str, tmp_path: Path) -> None:
    data = collect(run, tmp_path / "set", tier=tier, reference_episodes=2)
    assert data.num_transitions == 600 if tier == "replay" else 0 < data.num_transitions <= 600
    assert (data.lengths[:1] == 200).all() or tier != "replay"
    for episode in range(data.num_episodes):
        steps_as_the_environment_does(data, episode)


def test_what_cannot_be_collected_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UsageError, match="no tier 'best'"):
        collect(run, tmp_path / "set", tier="best")
    settings = {"steps": 64, "num_envs": 2, "rollout_steps": 32, "agent": {"hidden": [8]}}
    settings |= {"eval_every": 32, "eval_episodes": 1, "video": False, "quiet": True}
    ctrlrl.train("ppo", "Pendulum-v1", out=str(tmp_path / "ppo"), **settings)
    with pytest.raises(UsageError, match="has no replay"):
        collect(tmp_path / "ppo", tmp_path / "set", tier="replay", reference_episodes=1)
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".tmp-*"))
    words = ["data", "collect", str(run), "--tier", "random", "--steps", "200", "--reference-episodes", "1"]
    assert command([*words, "--out", str(tmp_path / "set")]) == 0
    assert "mean return" in capsys.readouterr().out
    assert command([*words, "--out", str(tmp_path / "set")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_replay_with_ends_of_all_kinds_as_episodes() -> None:
    """Two environments: observations count up; some rows end, are cut, or are no transitions."""
    space, action = gym.spaces.Box(-1000, 1000, (1,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
    buffer = ReplayBuffer(space, action, capacity=40, num_envs=2)
    now = torch.tensor([[0.0], [500.0]])
    buffer.begin(now)
    expected: list[list[list[float]]] = [[[0.0]], [[500.0]]]
    random = torch.Generator().manual_seed(0)
    finished: list[tuple[list[float], str]] = []
    for _ in range(15):
        kind = torch.randint(0, 6, (2,), generator=random)
        terminated, truncated, invalid = kind == 0, kind == 1, kind == 2
        final = now + 1
        fresh = (now / 100).ceil() * 100 + 100
        over = terminated | truncated | invalid
        obs = torch.where(over[:, None], fresh, final)
        buffer.add(Step(obs, torch.zeros(2, 1), torch.ones(2), terminated, truncated, final, ~invalid, {}))
        for row in range(2):
            seen = expected[row][-1]
            if invalid[row]:
                if len(seen) > 1:
                    finished.append((seen, "cut"))
            else:
                seen.append(float(final[row]))
                if terminated[row] or truncated[row]:
                    finished.append((seen, "terminated" if terminated[row] else "truncated"))
            if over[row]:
                expected[row].append([float(obs[row])])
        now = obs
    finished += [(parts[-1], "cut") for parts in expected if len(parts[-1]) > 1]
    got = [
        (np.asarray(e.observation)[:, 0].tolist(), "terminated" if e.terminated else "truncated")
        for e in episodes_of(buffer)
    ]
    assert sorted(got) == sorted((seen, "truncated" if how == "cut" else how) for seen, how in finished)
