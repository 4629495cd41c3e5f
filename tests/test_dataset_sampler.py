"""Batches of a dataset: each row is a transition of the data, whatever is asked for besides."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data.store import Column, Dataset, DatasetWriter, Episode
from ctrlrl.errors import UsageError
from ctrlrl.replay.dataset import DatasetSampler, MixedSampler, return_weights, returns_to_go
from ctrlrl.replay.hindsight import Hindsight

LENGTHS = [3, 1, 5, 2]
ENDED = [True, False, False, True]
"""Which episodes were terminated."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Dataset:
    """Observation t of episode e is [e, t]; its action e + t / 10, its reward 1 + t."""
    path = tmp_path_factory.mktemp("data") / "set"
    box = gym.spaces.Box(-100, 100, (2,), np.float64)
    with DatasetWriter.create(
        path,
        observation_space=box,
        action_space=gym.spaces.Box(-10, 10, (1,), np.float32),
        columns={"success": Column(dtype="bool"), "said": Column(dtype="text")},
    ) as writer:
        for e, (length, ended) in enumerate(zip(LENGTHS, ENDED, strict=True)):
            t = np.arange(length + 1.0)
            writer.add(
                Episode(
                    observation=np.stack([np.full(length + 1, float(e)), t], 1),
                    action=(e + t[:-1, None] / 10).astype(np.float32),
                    reward=1 + t[:-1],
                    terminated=ended,
                    truncated=not ended,
                    columns={"success": t[1:] == length, "said": [""] * length},
                )
            )
    return Dataset.open(path)


@given(n_step=st.integers(1, 6), gamma=st.floats(0.1, 1.0), resident=st.booleans(), chunk=st.sampled_from([0, 1, 3]))
@settings(max_examples=25, deadline=None)
def test_rows_are_transitions_of_the_data(data: Dataset, n_step: int, gamma: float, resident: bool, chunk: int) -> None:
    told = torch.tensor([e + 100.0 * t for e, length in enumerate(LENGTHS) for t in range(length + 1)])  # of each state
    sampler = DatasetSampler(
        data, resident=resident, next_action=True, mc_return=True, extras=["success"], observed={"told": told}
    )
    batch = sampler.sample(2, 40, gamma=gamma, n_step=n_step, chunk=chunk)
    assert batch.reward.shape == (2, 40) and batch.obs.dtype == torch.float32  # type: ignore[union-attr]
    flat = batch.map(lambda x: x.flatten(0, 1))
    for row in range(80):
        e, t = (int(v) for v in flat.obs[row])  # type: ignore[index]
        steps = min(n_step, LENGTHS[e] - t)
        assert flat.index[row] == sum(LENGTHS[:e]) + t
        assert flat.next_obs[row].tolist() == [e, t + steps]  # type: ignore[index]
        assert float(flat.reward[row]) == pytest.approx(sum(gamma**k * (1 + t + k) for k in range(steps)), rel=1e-5)
        assert bool(flat.end[row]) == (t + steps == LENGTHS[e])
        alive = 0 if flat.end[row] and ENDED[e] else 1
        assert float(flat.discount[row]) == pytest.approx(alive * gamma**steps, rel=1e-5)
        after = min(t + steps, LENGTHS[e] - 1)
        assert flat.next_action is not None and float(flat.next_action[row]) == pytest.approx(e + after / 10)
        left = LENGTHS[e] - t
        expected = sum(gamma**k * (1 + t + k) for k in range(left))
        assert flat.mc_return is not None and float(flat.mc_return[row]) == pytest.approx(expected, rel=1e-5)
        assert bool(flat.extras["success"][row]) == (t + 1 == LENGTHS[e])
        assert float(flat.extras["told"][row]) == e + 100 * t
        assert float(flat.next_extras["told"][row]) == e + 100 * (t + steps)
        if chunk:
            assert flat.mask is not None and flat.mask[row].tolist() == [k < left for k in range(chunk)]
            actions = [e + min(t + k, LENGTHS[e] - 1) / 10 for k in range(chunk)]
            assert flat.action[row, :, 0].tolist() == pytest.approx(actions)
        else:
            assert float(flat.action[row]) == pytest.approx(e + t / 10)


def test_uniform_over_transitions(data: Dataset) -> None:
    drawn = DatasetSampler(data).sample(1, 22_000, gamma=0.99).index.flatten()
    counts = torch.bincount(drawn, minlength=11)
    assert ((counts - 2000).square() / 2000).sum() < 29.6  # chi-squared, 10 degrees of freedom, p = 0.001


def test_episodes_are_weighted_by_their_return(data: Dataset) -> None:
    """Against the chances by hand: returns are 6, 1, 15 and 3."""
    scaled = (np.array([6, 1, 15, 3]) - 1) / 14
    expected = np.exp(scaled / 0.5) / np.exp(scaled / 0.5).sum()
    assert return_weights(data.returns, 0.5) == pytest.approx(expected)
    batch = DatasetSampler(data, temperature=0.5).sample(1, 40_000, gamma=0.99)
    episode, step = batch.obs[0].unbind(1)  # type: ignore[index, union-attr]
    counts = torch.bincount(episode.long(), minlength=4).numpy()
    assert ((counts - 40_000 * expected) ** 2 / (40_000 * expected)).sum() < 16.3  # 3 degrees of freedom
    within = torch.bincount(step[episode == 2].long(), minlength=5)
    assert ((within - counts[2] / 5).square() / (counts[2] / 5)).sum() < 18.5  # and its steps alike


def test_the_same_seed_draws_the_same_and_a_saved_state_goes_on(data: Dataset) -> None:
    one, other = DatasetSampler(data, seed=3), DatasetSampler(data, seed=3, resident=False)
    assert torch.equal(one.sample(3, 8, gamma=0.9).index, other.sample(3, 8, gamma=0.9).index)
    state = one.state_dict()
    following = one.sample(1, 8, gamma=0.9).index
    fresh = DatasetSampler(data, seed=0)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.sample(1, 8, gamma=0.9).index, following)


def test_rewards_are_shifted_and_scaled(data: Dataset) -> None:
    for resident, shift in product((True, False), (-1, -3)):
        sampler = DatasetSampler(data, reward_shift=shift, reward_scale=10, mc_return=True, resident=resident)
        batch = sampler.sample(1, 50, gamma=0.5, n_step=2)
        for obs, reward, mc in zip(batch.obs[0], batch.reward[0], batch.mc_return[0], strict=True):  # type: ignore[index]
            e, t = int(obs[0]), int(obs[1])
            rewards = [10.0 * (1 + shift + t + k) for k in range(LENGTHS[e] - t)]
            assert float(reward) == pytest.approx(sum(0.5**k * r for k, r in enumerate(rewards[:2])))
            rewards += [] if ENDED[e] else [10.0 * (1 + shift)] * 100  # behind a cut the lowest of all, if negative
            assert float(mc) == pytest.approx(sum(0.5**k * r for k, r in enumerate(rewards)))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_returns_to_go(lengths: list[int], gamma: float, seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(size=sum(lengths))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    behind = np.arange(len(lengths)) - 2.0
    found = returns_to_go(rewards, starts, np.array(lengths), gamma, behind)
    for start, end, total in zip(starts, ends, behind, strict=True):
        for i in reversed(range(start, end)):
            total = rewards[i] + gamma * total
            assert found[i] == pytest.approx(total, abs=1e-9)


def test_hindsight_goals_are_what_the_episode_came_to(tmp_path: Path) -> None:
    """One vector [achieved, desired, time]; achieved is the time, too, so that where a goal comes from can be seen."""
    box = gym.spaces.Box(-1000, 1000, (3,), np.float32)
    action = gym.spaces.Box(-1, 1, (1,), np.float32)
    with DatasetWriter.create(tmp_path / "set", observation_space=box, action_space=action) as writer:
        for e in range(3):
            t = np.arange(11, dtype=np.float32)
            seen = np.stack([100 * e + t, np.full(11, -7, np.float32), t], 1)
            rewards = np.full(10, -1.0)
            writer.add(
                Episode(observation=seen, action=np.zeros((10, 1)), reward=rewards, terminated=False, truncated=True)
            )
    data = Dataset.open(tmp_path / "set")
    hindsight = Hindsight(
        achieved=slice(0, 1),
        desired=slice(1, 2),
        reward=lambda a, d: ((a - d).abs()[:, 0] < 0.5).float() - 1,
        share=0.75,
    )
    batch = DatasetSampler(data, hindsight=hindsight).sample(1, 4000, gamma=0.9)
    obs, following = batch.obs[0], batch.next_obs[0]  # type: ignore[index]
    assert torch.equal(obs[:, 1], following[:, 1])
    changed = obs[:, 1] != -7
    assert abs(float(changed.float().mean()) - 0.75) < 0.03
    episode, goal_of = (obs[changed, 0] / 100).floor(), (obs[changed, 1] / 100).floor()
    assert torch.equal(episode, goal_of)
    ahead = obs[changed, 1] - following[changed, 0]
    assert ahead.min() == 0 and ahead.max() == 9
    assert torch.equal(batch.reward[0][changed], torch.where(ahead == 0, 0.0, -1.0))
    assert (batch.reward[0][~changed] == -1).all()
    original = DatasetSampler(data).sample(1, 100, gamma=0.9)
    assert (original.obs[0, :, 1] == -7).all()  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="hindsight goals go with"):
        DatasetSampler(data, hindsight=hindsight).sample(1, 4, gamma=0.9, n_step=2)


def test_a_mixture_has_exact_shares(data: Dataset) -> None:
    one, other = DatasetSampler(data, seed=1), DatasetSampler(data, seed=2, extras=["success"])
    for share, expected in ((0.5, 5), (0.3, 3), (0.0, 0), (1.0, 10), (0.26, 3)):
        batch = MixedSampler(one, other, share).sample(4, 10, gamma=0.9)
        assert batch.reward.shape == (4, 10)
        again = DatasetSampler(data, seed=2)
        again.load_state_dict(other.state_dict())
        assert (batch.extras == {}) == (share != 1.0) and expected == round(share * 10)
    mixed = MixedSampler(DatasetSampler(data, seed=1), DatasetSampler(data, seed=2), 0.3).sample(2, 10, gamma=0.9)
    first = DatasetSampler(data, seed=1).sample(2, 7, gamma=0.9)
    second = DatasetSampler(data, seed=2).sample(2, 3, gamma=0.9)
    assert torch.equal(mixed.index, torch.cat([first.index, second.index], 1))
    assert torch.equal(mixed.next_obs, torch.cat([first.next_obs, second.next_obs], 1))  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_floats_of_any_width_come_as_float32(resident: bool, dtype: str, tmp_path: Path) -> None:
    box = gym.spaces.Box(-1, 1, (2,), np.dtype(dtype).type)
    with DatasetWriter.create(
        tmp_path / "set", observation_space=box, action_space=box, columns={"more": Column(dtype=dtype)}
    ) as writer:
        four, three = (np.full((n, 2), 0.5, dtype) for n in (4, 3))
        more = {"more": np.full(3, 0.25, dtype)}
        writer.add(
            Episode(observation=four, action=three, reward=np.ones(3), terminated=True, truncated=False, columns=more)
        )
    sampler = DatasetSampler(Dataset.open(tmp_path / "set"), resident=resident, extras=["more"], next_action=True)
    batch = sampler.sample(1, 5, gamma=0.9)
    for value in (batch.obs, batch.next_obs, batch.action, batch.next_action, batch.reward, batch.extras["more"]):
        assert value.dtype == torch.float32  # type: ignore[union-attr]
    assert float(batch.extras["more"].mean()) == 0.25


def test_what_cannot_be_sampled_is_refused(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'said' differs in length from row to row"):
        DatasetSampler(data, extras=["said"])
    with pytest.raises(UsageError, match=r"has no column 'succes'\. Did you mean success"):
        DatasetSampler(data, extras=["succes"])
    with DatasetWriter.create(
        tmp_path / "empty", observation_space=data.observation_space, action_space=data.action_space
    ):
        pass
    with pytest.raises(UsageError, match="has no transition to learn from"):
        DatasetSampler(Dataset.open(tmp_path / "empty"))
    goals = Hindsight(achieved=slice(0, 1), desired=slice(1, 2), reward=lambda a, b: a.sum(-1))
    with pytest.raises(UsageError, match="return that followed in the data is of another goal"):
        DatasetSampler(data, hindsight=goals, mc_return=True)
