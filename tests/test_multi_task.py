"""Several tasks as one environment, and one policy of several specialists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.cli.main import run as command
from ctrlrl.data.store import Dataset
from ctrlrl.envs.make import make_env
from ctrlrl.envs.multi_task import MultiTask
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.training.collect import RandomPolicy
from ctrlrl.training.distill import distill
from ctrlrl.training.evaluation import evaluate
from ctrlrl.training.loading import load
from tests.runs import SMALL, assert_same

BOTH = "Pendulum-v1,MountainCarContinuous-v0"


def both(n: int = 5, **kwargs: Any) -> MultiTask:
    env = make_env(BOTH, num_envs=n, **kwargs)
    assert isinstance(env, MultiTask)
    return env


def test_rows_play_the_tasks_in_turn_each_as_it_would_alone() -> None:
    env, g = both(), torch.Generator().manual_seed(0)
    alone = [make_env(name, num_envs=n) for name, n in zip(BOTH.split(","), (3, 2), strict=True)]
    seeds = [10, 11, 12, 13, 14]
    obs = env.reset(seeds)
    theirs = [alone[0].reset(seeds[::2]), alone[1].reset(seeds[1::2])]
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
    assert env.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    for _ in range(210):  # past Pendulum's time limit
        assert isinstance(obs, torch.Tensor)
        assert torch.equal(obs[::2, :3], theirs[0]) and torch.equal(obs[1::2, :2], theirs[1])
        assert torch.equal(obs[::2, 3:], torch.tensor([[1.0, 0.0]] * 3))
        assert torch.equal(obs[1::2, 2:], torch.tensor([[0.0, 0.0, 1.0]] * 2))
        assert torch.equal(env.obs_of_task(1, obs), theirs[1])
        action = torch.rand(5, 1, generator=g) * 2 - 1
        step = env.step(action)
        parts = [alone[0].step(2 * action[::2]), alone[1].step(action[1::2])]
        for name in ("reward", "terminated", "truncated", "valid"):
            ours = getattr(step, name)
            assert torch.equal(ours[::2], getattr(parts[0], name)) and torch.equal(ours[1::2], getattr(parts[1], name))
        assert torch.equal(env.obs_of_task(0, step.final_obs), parts[0].final_obs)
        assert torch.allclose(step.action, action, atol=1e-6)
        assert torch.allclose(env.actions_of_tasks([p.action for p in parts]), action, atol=1e-6)
        obs, theirs = step.obs, [part.obs for part in parts]


def test_figures_are_told_by_task() -> None:
    env = both(4)
    env.reset(0)
    total = torch.zeros(4, dtype=torch.float64)
    for t in range(200):
        step = env.step(torch.zeros(4, 1))
        total += step.reward
        assert torch.isnan(step.log["episode/return/MountainCarContinuous-v0"]).all()
        told = step.log["episode/return/Pendulum-v1"]
        assert torch.isnan(told[1::2]).all() and bool(torch.isnan(told[::2]).all()) == (t < 199)
    assert torch.allclose(told[::2].double(), total[::2], rtol=1e-5)
    seen = evaluate(env, RandomPolicy(env, 0), list(range(8)))
    by_task = [seen.figures[f"episode/return/{name}"] for name in BOTH.split(",")]
    assert by_task == pytest.approx([np.mean(seen.returns[::2]), np.mean(seen.returns[1::2])], rel=1e-5)
    twice = make_env("Pendulum-v1,Pendulum-v1", num_envs=2, env_kwargs={"tasks": [{"g": 10.0}, {"g": 5.0}]})
    assert isinstance(twice, MultiTask) and twice.names == ["Pendulum-v1[0]", "Pendulum-v1[1]"]
    assert twice.action_space == gym.spaces.Box(-2, 2, (1,), np.float32)  # the same of both: as it is
    twice.reset([3, 3])
    obs = twice.step(torch.zeros(2, 1)).obs
    assert isinstance(obs, torch.Tensor) and not torch.equal(obs[0, :3], obs[1, :3])


def test_it_goes_on_exactly() -> None:
    env, other, g = both(), both(), torch.Generator().manual_seed(1)
    env.reset(3)
    for _ in range(150):
        env.step(torch.rand(5, 1, generator=g) * 2 - 1)
    _, reasons = other.set_state(env.get_state(), seed=0)
    assert reasons == [None] * 5
    for _ in range(100):
        action = torch.rand(5, 1, generator=g) * 2 - 1
        one, two = env.step(action), other.step(action)
        assert torch.equal(one.obs, two.obs) and torch.equal(one.reward, two.reward)
        for name, value in one.log.items():
            assert torch.equal(value.nan_to_num(9e9), two.log[name].nan_to_num(9e9)), name


def test_what_a_task_does_not_read_is_stored_as_it_was_given() -> None:
    env = make_env("HalfCheetah-v5,Hopper-v5", num_envs=4)
    env.reset(0)
    action = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(env.step(action).action, action, atol=1e-6)


def test_dicts_are_joined_entry_by_entry() -> None:
    env = make_env("CartPoleSwingUp-v0,PendulumSwingUp-v0", num_envs=4)
    assert isinstance(env, MultiTask) and isinstance(env.observation_space, gym.spaces.Dict)
    obs = env.reset(0)
    assert isinstance(obs, dict)
    for k, one in enumerate(env.envs):
        alone = one.observation_space
        assert isinstance(alone, gym.spaces.Dict)
        own = env.obs_of_task(k, obs)
        assert isinstance(own, dict) and {n: tuple(v.shape[1:]) for n, v in own.items()} == {
            n: s.shape for n, s in alone.spaces.items()
        }
    for name, value in obs.items():
        assert torch.equal(value[:, -2:], torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2)), name
    assert evaluate(env, RandomPolicy(env, 0), [1, 2]).success is not None


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UsageError, match=r"play in turn: make at least as many .* not 1"):
        make_env(BOTH)
    with pytest.raises(UsageError, match="tasks that take different actions are joined where all take bounded Boxes"):
        make_env("Pendulum-v1,CartPole-v1", num_envs=2)
    with pytest.raises(UsageError, match=r"env_kwargs are {'tasks'"):
        make_env(BOTH, num_envs=2, env_kwargs={"g": 5.0})
    with pytest.raises(UsageError, match="the images 'obs' must be alike in all tasks"):
        MultiTask([make_env("CartPole-v1", pixels=24), make_env("CartPole-v1", pixels=32)])
    envs: list[VectorEnv] = [make_env("Pendulum-v1", num_envs=1), make_env("Pendulum-v1", num_envs=2)]
    with pytest.raises(UsageError, match="make as many of each"):
        MultiTask(envs)


@pytest.fixture(scope="module")
def specialists(tmp_path_factory: Any) -> list[Path]:
    folder: Path = tmp_path_factory.mktemp("specialists")
    runs = []
    for name, env, kwargs in (("a", "Pendulum-v1", {"g": 5.0}), ("b", "MountainCarContinuous-v0", {})):
        ctrlrl.train("sac", env, env_kwargs=kwargs, out=str(folder / name), **SMALL | {"eval_episodes": 1})
        runs.append(folder / name)
    return runs


def test_what_specialists_would_have_done_is_stored(specialists: list[Path], tmp_path: Path) -> None:
    data = distill(specialists, tmp_path / "set", steps=900, num_envs=2, reference_episodes=2)
    data.verify()
    assert data.env == BOTH and data.provenance["env_kwargs"] == {"tasks": [{"g": 5.0}, {}]}
    policies = [load(run).policy for run in specialists]
    tasks = set()
    for i in range(data.num_episodes):
        one = data.episode(i)
        obs = torch.from_numpy(np.array(one.observation))
        k = int(obs[0, 3:].argmax())
        tasks.add(k)
        with torch.no_grad():
            action = policies[k].act(obs[:-1, : 3 - k], explore=False)[0] / (2 - k)
        assert np.allclose(one.action, action.numpy(), atol=1e-5)
        assert np.abs(one.columns["executed"] - one.action).max() > 0.05  # who acts explores
    assert tasks == {0, 1}
    with pytest.raises(UsageError, match="only bc learns from it"):
        ctrlrl.train("iql", data=str(data.path), updates=10, out=str(tmp_path / "iql"))
    with pytest.raises(UsageError, match="only bc learns from it"):
        ctrlrl.train("rlpd", BOTH, data=str(data.path), steps=10, num_envs=2, out=str(tmp_path / "rlpd"))


def leaning(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Any:
    """A base that is a function."""
    return lambda obs: 0.5 * obs[:, :1].clamp(-1, 1)


def test_specialists_that_are_residuals_are_distilled(tmp_path: Path, capsys: Any) -> None:
    """As COMPASS: one residual for each task over what was there; the whole action is what is stored."""
    base, runs = f"{__name__}:leaning", []
    for algo, env in (("resfit", "Pendulum-v1"), ("policy-decorator", "MountainCarContinuous-v0")):
        how = SMALL | {"steps": 90, "eval_every": 90, "preset": False, "learning_starts": 20, "base": base}
        how["agent"] = how["agent"] | {"actor_lr": 1e-2} | ({"critic_only": 0} if algo == "resfit" else {"ramp": 10})
        runs.append(str(ctrlrl.train(algo, env, out=str(tmp_path / algo), **how).path))
    out = str(tmp_path / "set")
    distilling = ["data", "distill", *runs, "--out", out, "--steps", "900", "--num-envs", "2", "--reference-episodes"]
    assert command([*distilling, "2"]) == 2
    assert f"if you trust it, say --base {base}" in capsys.readouterr().err
    assert command([*distilling, "2", "--base", "mine:other"]) == 2
    assert f"--base mine:other: none of the runs builds on that, but on {base}" in capsys.readouterr().err
    assert command([*distilling, "2", "--base", base]) == 0
    data, seen = Dataset.open(Path(out)), set()
    policies = [load(run, base=base).policy for run in runs]
    for i in range(data.num_episodes):
        one = data.episode(i)
        obs = torch.from_numpy(np.array(one.observation))
        k = int(obs[0, 3:].argmax())
        with torch.no_grad():
            action = policies[k].act(obs[:-1, : 3 - k], explore=False)[0].numpy() / (2 - k)
        assert np.abs(action).max() > 0.1 and np.allclose(one.action, action, atol=1e-5)
        seen.add(k)
    assert seen == {0, 1}


def test_one_policy_learns_of_specialists_and_is_taught_on(
    specialists: list[Path], tmp_path: Path, capsys: Any
) -> None:
    out, student = str(tmp_path / "set"), str(tmp_path / "one")
    shared = ["--num-envs", "2", "--reference-episodes", "2"]
    runs = [str(run) for run in specialists]
    assert command(["data", "distill", *runs, "--out", out, "--steps", "1500", *shared]) == 0
    said = capsys.readouterr().out
    assert f"episodes of {BOTH}" in said and f"ctrlrl train bc --data {out}" in said
    settings = ["--eval-every", "1000", "--eval-episodes", "2", "--no-video", "--agent.hidden", "32", "32"]
    assert command(["train", "bc", "--data", out, "--updates", "1000", *settings, "--out", student]) == 0
    one = load(student).policy
    data = Dataset.open(Path(out))
    obs, action = torch.from_numpy(np.array(data.episode(0).observation[:-1])), data.episode(0).action
    with torch.no_grad():
        error = float((one.act(obs, explore=False)[0].numpy() - action).std())
    assert error < 0.5 * float(np.std(action)) + 0.02
    again = distill(specialists, tmp_path / "more", steps=900, student=student, num_envs=2, reference_episodes=2)
    assert again.provenance["student"] == student
    with pytest.raises(UsageError, match=r"the student .* learned Pendulum-v1"):
        distill(specialists, tmp_path / "odd", steps=9, student=runs[0], num_envs=2, reference_episodes=2)
    other = load(student).config.env_kwargs["tasks"][::-1]
    folder = tmp_path / "swapped"
    shutil.copytree(student, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"env_kwargs": {"tasks": other}}))
    with pytest.raises(UsageError, match=r"the student .* learned .*tasks.*; the specialists"):
        distill(specialists, tmp_path / "odd", steps=9, student=folder, num_envs=2, reference_episodes=2)
    with pytest.raises(UsageError, match="a specialist is of one task"):
        distill([student, runs[0]], tmp_path / "odd", num_envs=3, reference_episodes=3)
    with pytest.raises(UsageError, match="two runs or more"):
        distill(specialists[:1], tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_a_training_on_several_tasks_resumes_exactly(tmp_path: Path) -> None:
    settings = SMALL | {"num_envs": 2, "eval_every": 200, "agent": SMALL["agent"] | {"normalize_obs": True}}
    whole = ctrlrl.train("sac", BOTH, out=str(tmp_path / "whole"), **settings)
    ctrlrl.train("sac", BOTH, out=str(tmp_path / "half"), **settings | {"steps": 200})
    assert command(["resume", str(tmp_path / "half"), "--steps", "400"]) == 0
    assert_same(whole.path, tmp_path / "half")
