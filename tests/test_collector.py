"""Collection and evaluation: boundaries, policy state, extras, applied actions, rows that are no transition."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.envs.make import make_env
from ctrlrl.errors import NonFiniteError
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.training.collector import Collector, random_actions
from ctrlrl.training.evaluation import evaluate
from tests.standins import MODULE, native_vector


class RememberingPolicy(Policy):
    """Counts its own steps since the episode's start; the extras show the count and what was observed."""

    extras_at_next = True

    def __init__(self, action: float = 0.0) -> None:
        super().__init__()
        self.action = action

    def initial_state(self, n: int) -> PolicyState:
        return {"count": torch.zeros(n, dtype=torch.int64)}

    def act(self, obs, state=None, *, explore=False):
        assert state is not None
        seen = obs["policy"] if isinstance(obs, dict) else obs
        extras = {"count": state["count"].clone(), "seen": seen[:, 1].float().clone()}
        return torch.full((len(seen), 1), self.action), {"count": state["count"] + 1}, extras


def collect(env, policy, steps):
    collector = Collector(env, policy, env.reset(0), seed=0)
    extras = policy.act(collector.obs, policy.initial_state(env.num_envs))[2]
    buffer = ReplayBuffer(
        env.observation_space, env.action_space, capacity=1000, num_envs=env.num_envs, extras=extras, next_extras=True
    )
    buffer.begin(collector.obs)
    episodes = []
    for _ in range(steps):
        step, extras, next_extras = collector.step(random=False)
        buffer.add(step, extras, next_extras)
        episodes += collector.finished(step)[0]
    return collector, buffer, episodes


def test_policy_state_restarts_with_the_episode_and_extras_belong_to_their_row():
    env = make_env(MODULE + "ctrlrl-test/Counting-v0", num_envs=2)  # observation [episode, t], 4 steps an episode
    _, buffer, episodes = collect(env, RememberingPolicy(), 10)
    batch = buffer.sample(1, 300, gamma=0.9)[0]
    t = batch.obs[:, 1].long()
    assert set(t.tolist()) == {0, 1, 2, 3}
    assert torch.equal(batch.extras["count"], t)
    assert torch.equal(batch.extras["seen"].long(), t)
    # At the next observation: the count goes on there, also at the final one of an episode, before the state's reset.
    assert torch.equal(batch.next_extras["count"], t + 1)
    assert torch.equal(batch.next_extras["seen"].long(), batch.next_obs[:, 1].long())
    assert torch.equal(batch.next_obs[:, 0], batch.obs[:, 0])  # never the next episode's
    assert torch.equal(batch.discount == 0, t == 3)
    assert [(e.ret, e.length, e.success) for e in episodes[:2]] == [(10.0, 4, True), (10.0, 4, True)]
    assert [e.success for e in episodes[2:4]] == [False, False]


def test_n_step_extras_belong_to_the_last_row():
    env = make_env(MODULE + "ctrlrl-test/Counting-v0", num_envs=1)
    _, buffer, _ = collect(env, RememberingPolicy(), 12)
    batch = buffer.sample(1, 200, gamma=0.9, n_step=3)[0]
    t = batch.obs[:, 1].long()
    assert torch.equal(batch.next_extras["count"], (t + 3).clamp(max=4))
    assert torch.equal(batch.next_obs[:, 1].long(), (t + 3).clamp(max=4))


def test_groups_applied_actions_and_invalid_rows():
    env = native_vector(3, divergence=0.2)
    collector, buffer, _ = collect(env, RememberingPolicy(action=1.0), 60)
    batch = buffer.sample(1, 500, gamma=0.9)[0]
    assert 0 < len(buffer) < 180  # rows that diverged are held back
    assert torch.allclose(batch.action, torch.tensor(0.8))  # what was applied, not the 1.0 that was commanded
    assert set(batch.obs) == {"policy", "privileged"}
    following = batch.next_obs["privileged"][:, 3] - batch.obs["privileged"][:, 3]
    assert (following == 1).all()  # no transition crosses a divergence or a reset
    assert torch.equal(batch.extras["count"].float(), batch.obs["privileged"][:, 3])
    assert collector.policy_state["count"].max() <= 30


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_evaluation_depends_on_seeds_and_policy_alone(rows):
    env = make_env("Pendulum-v1", num_envs=rows)
    seeds = [10, 11, 12, 13, 14]
    result = evaluate(env, Constant(), seeds)
    again = evaluate(env, Constant(), seeds)
    assert result == again
    assert result.lengths == [200] * 5
    alone = [evaluate(make_env("Pendulum-v1"), Constant(), [seed]).returns[0] for seed in seeds]
    assert result.returns == pytest.approx(alone, abs=1e-9)
    assert len(set(result.returns)) == 5
    assert result.success is None


def test_evaluation_reports_success_where_the_task_knows_it():
    env = make_env(MODULE + "ctrlrl-test/Counting-v0", num_envs=2)
    result = evaluate(env, RememberingPolicy(), [1, 2, 3])
    assert result.success is not None
    assert len(result.success) == 3
    assert result.returns == [10.0] * 3
    assert result.lengths == [4] * 3


class Constant(Policy):
    """Always the same torque."""

    def act(self, obs, state=None, *, explore=False):
        return torch.full((len(obs), 1), 0.3), state or {}, {}


def test_nan_is_named_with_place_and_value():
    env = make_env(MODULE + "ctrlrl-test/Nan-v0", num_envs=2, env_kwargs={"at_step": 4})
    collector = Collector(env, Zero(), env.reset(0), seed=0)
    with pytest.raises(NonFiniteError) as error:
        for _ in range(10):
            step, _, _ = collector.step(random=False)
            collector.finished(step)
    message = str(error.value)
    assert "ctrlrl-test/Nan-v0 gave a non-finite reward in environment 0, step" in message
    assert message.endswith("nan. Fix the environment, or end the episode where this happens")


class Zero(Policy):
    """Does nothing, in two dimensions."""

    def act(self, obs, state=None, *, explore=False):
        return torch.zeros(len(obs), 2), state or {}, {}


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(np.float32([-2, 0]), np.float32([1, 5])),
        gym.spaces.Discrete(4, start=-1),
        gym.spaces.MultiDiscrete([2, 5], start=[3, 0]),
    ],
)
def test_random_actions_cover_the_space(space):
    drawn = random_actions(space, 2000, torch.Generator().manual_seed(0)).numpy()
    assert all(space.contains(a.astype(space.dtype)[()]) for a in drawn[:200])
    if isinstance(space, gym.spaces.Box):
        assert np.allclose(drawn.mean(0), (space.low + space.high) / 2, atol=0.1)
    else:
        assert len(np.unique(drawn, axis=0)) == (4 if isinstance(space, gym.spaces.Discrete) else 10)
