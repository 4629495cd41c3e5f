"""Our environments for Gymnasium's and Stable-Baselines3's code."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from ctrlrl.envs.bridges import to_gymnasium, to_sb3
from ctrlrl.envs.make import make_env
from ctrlrl.errors import UsageError
from tests.conformance import actions_for
from tests.standins import native_vector

LIMIT = {"max_episode_steps": 20}


def test_gymnasium_steps_ours_as_its_own() -> None:
    ours = to_gymnasium(make_env("Hopper-v5", num_envs=3, env_kwargs=LIMIT, backend="native"))
    theirs = gym.make_vec(
        "Hopper-v5", 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}, **LIMIT
    )
    assert ours.single_action_space == theirs.single_action_space and ours.action_space == theirs.action_space
    assert ours.single_observation_space == theirs.single_observation_space
    seeds = [3, 4, 5]
    first, info = ours.reset(seed=seeds)
    assert info == {} and np.array_equal(first, theirs.reset(seed=seeds)[0])
    theirs.action_space.seed(0)
    ended = 0
    for _ in range(50):
        action = theirs.action_space.sample()
        obs, reward, terminated, truncated, info = ours.step(action)
        expected = theirs.step(action)
        assert all(map(np.array_equal, (obs, terminated, truncated), (expected[0], expected[2], expected[3])))
        assert reward.dtype == np.float64 and np.allclose(reward, expected[1], rtol=1e-6)
        assert np.array_equal(info.get("_final_obs", []), expected[4].get("_final_obs", []))
        for row in np.flatnonzero(info.get("_final_obs", [])):
            assert np.array_equal(info["final_obs"][row], expected[4]["final_obs"][row])
            ended += 1
    assert ended >= 6
    ours.close()
    theirs.close()


def test_there_and_back_is_the_same_environment() -> None:
    raw = make_env("CartPole-v1", num_envs=3, backend="native")
    back = make_env(to_gymnasium(make_env("CartPole-v1", num_envs=3, backend="native")), num_envs=3)
    assert torch.equal(raw.reset(1), back.reset(1))  # type: ignore[arg-type]
    for action in actions_for(raw, 60):
        a, b = raw.step(action), back.step(action)
        for field in ("obs", "final_obs", "reward", "terminated", "truncated", "valid"):
            assert torch.equal(getattr(a, field), getattr(b, field))


def test_rows_that_are_no_transition_come_out_truncated() -> None:
    env, raw = to_gymnasium(native_vector(4, divergence=0.2)), native_vector(4, divergence=0.2)
    env.reset(seed=0)
    raw.reset(0)
    seen = 0
    for _ in range(40):
        obs, reward, _, truncated, info = env.step(np.zeros((4, 1), np.float32))
        step = raw.step(torch.zeros(4, 1))
        invalid = ~step.valid.numpy()
        assert np.array_equal(info["invalid"], invalid) and truncated[invalid].all() and not reward[invalid].any()
        assert set(obs) == {"policy", "privileged"}
        seen += int(invalid.sum())
    assert seen > 5


def test_bad_resets_are_refused() -> None:
    env = to_gymnasium(make_env("CartPole-v1", num_envs=2))
    with pytest.raises(UsageError, match="takes no reset options"):
        env.reset(options={"low": 0.0})
    with pytest.raises(UsageError, match="one seed or one for each environment"):
        env.reset(seed=[1, None])
    env.close()


def test_stable_baselines3_trains_on_ours_as_on_its_own() -> None:
    """The same weights, since the environments are the same to the bit."""
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

    weights, lengths = [], []
    for env in (
        VecMonitor(to_sb3(make_env("CartPole-v1", num_envs=8, backend="native"))),
        VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 8)),
    ):
        model = sb3.PPO("MlpPolicy", env, n_steps=64, batch_size=128, learning_rate=1e-3, seed=0, device="cpu")
        model.learn(12_288)
        weights.append(torch.cat([p.flatten() for p in model.policy.parameters()]).detach())
        lengths.append(np.mean([episode["l"] for episode in model.ep_info_buffer]))
        env.close()
    assert torch.equal(*weights)
    assert lengths[0] == lengths[1] > 60  # 22 without learning


def test_stable_baselines3_sees_what_ended_and_why() -> None:
    pytest.importorskip("stable_baselines3")
    env = to_sb3(make_env("Pendulum-v1", num_envs=2, env_kwargs={"max_episode_steps": 3}, backend="native"))
    env.seed(5)
    reference = make_env("Pendulum-v1", num_envs=2, env_kwargs={"max_episode_steps": 3})
    assert np.array_equal(env.reset(), np.asarray(reference.reset([5, 6])))
    for t in range(3):
        obs, reward, done, infos = env.step(np.full((2, 1), 0.5, np.float32))
        step = reference.step(torch.full((2, 1), 0.5))
        assert np.array_equal(obs, step.obs) and np.array_equal(reward, step.reward)
        assert done.tolist() == [t == 2] * 2
    assert [info["TimeLimit.truncated"] for info in infos] == [True, True]
    assert np.array_equal(infos[1]["terminal_observation"], step.final_obs[1])
    assert env.env_is_wrapped(gym.Wrapper) == [False, False]
    assert env.get_attr("control_dt", [0]) == [0.05]
    with pytest.raises(UsageError, match="no methods of their own"):
        env.env_method("kick")
    env.close()


def test_without_stable_baselines3_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env", None)
    with pytest.raises(UsageError, match="pip install stable-baselines3"):
        to_sb3(make_env("CartPole-v1"))
