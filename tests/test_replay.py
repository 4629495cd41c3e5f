"""The replay ring against a plain list of transitions, for all shapes of episodes that hypothesis can think of."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.envs.vector import Step
from ctrlrl.replay.buffer import ReplayBuffer

BOX = gym.spaces.Box(-np.inf, np.inf, (2,))
ACTION = gym.spaces.Box(-1, 1, (1,))
GAMMA = 0.5

# Per row and environment: does the episode go on, terminate, get truncated, both, or is the row no transition?
OUTCOMES = st.sampled_from(["on", "on", "on", "terminated", "truncated", "both", "invalid"])
HISTORIES = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(OUTCOMES, min_size=n, max_size=n), min_size=1, max_size=25)
)


class Model:
    """What the buffer should hold: a list of dictionaries per environment, observations numbered uniquely."""

    def __init__(self, buffer: ReplayBuffer, n: int) -> None:
        self.buffer, self.n, self.next_id = buffer, n, 0
        self.rows: list[list[dict]] = [[] for _ in range(n)]
        self.obs = self.new()
        buffer.begin(self.obs)

    def new(self) -> torch.Tensor:
        ids = torch.arange(self.next_id, self.next_id + self.n, dtype=torch.float32)
        self.next_id += self.n
        return torch.stack([ids, -ids], 1)

    def add(self, outcomes: list[str]) -> None:
        final = self.new()
        ended = torch.tensor([o in ("terminated", "truncated", "both") for o in outcomes])
        invalid = torch.tensor([o == "invalid" for o in outcomes])
        obs = torch.where((ended | invalid)[:, None], self.new(), final)
        reward = torch.tensor([1.0 + len(self.rows[0]) * 7 % 5 + i for i in range(self.n)])
        action = torch.rand(self.n, 1)
        terminated = torch.tensor([o in ("terminated", "both") for o in outcomes])
        truncated = torch.tensor([o in ("truncated", "both") for o in outcomes])
        self.buffer.add(Step(obs, action, reward, terminated, truncated, final, ~invalid))
        for i in range(self.n):
            row = {"obs": self.obs[i], "action": action[i], "reward": float(reward[i]), "final": final[i]}
            row |= {"terminated": bool(terminated[i]), "ended": bool(ended[i]), "valid": not invalid[i]}
            self.rows[i].append(row)
        self.obs = obs

    def expected(self, index: int, n_step: int) -> dict:
        """The n-step transition that starts at stored transition `index`, by walking the list."""
        row, env = divmod(index, self.n)
        rows = self.rows[env]
        reward, k = 0.0, 0
        while True:
            current = rows[row + k]
            reward += GAMMA**k * current["reward"]
            k += 1
            followed = row + k < len(rows) and rows[row + k]["valid"]
            end = current["ended"] or not followed
            if end or k == n_step:
                break
        discount = 0.0 if current["terminated"] else GAMMA**k
        start = rows[row]
        assert start["valid"]
        return {**start, "reward": reward, "discount": discount, "next_obs": current["final"], "end": end}


def check_samples(model: Model, n_step: int) -> set[int]:
    batch = model.buffer.sample(3, 40, gamma=GAMMA, n_step=n_step)
    for g in range(3):
        part = batch[g]
        for b in range(40):
            want = model.expected(int(part.index[b]), n_step)
            assert torch.equal(part.obs[b], want["obs"])
            assert torch.equal(part.action[b], want["action"])
            assert float(part.reward[b]) == pytest.approx(want["reward"])
            assert float(part.discount[b]) == want["discount"]
            assert bool(part.end[b]) == want["end"]
            assert torch.equal(part.next_obs[b], want["next_obs"])
    return set(batch.index.flatten().tolist())


@settings(max_examples=150, deadline=None)
@given(history=HISTORIES, capacity=st.integers(1, 30), n_step=st.integers(1, 5), seed=st.integers(0, 1000))
def test_samples_are_what_happened(history, capacity, n_step, seed):
    n = len(history[0])
    model = Model(ReplayBuffer(BOX, ACTION, capacity=max(capacity, n), num_envs=n, seed=seed), n)
    for outcomes in history:
        model.add(outcomes)
        kept = range(max(0, len(model.rows[0]) - model.buffer.rows), len(model.rows[0]))
        valid = {r * n + i for r in kept for i in range(n) if model.rows[i][r]["valid"]}
        assert len(model.buffer) == len(valid)
        if valid:
            assert check_samples(model, n_step) <= valid


@settings(max_examples=60, deadline=None)
@given(
    history=HISTORIES,
    capacity=st.integers(1, 30),
    cuts=st.sets(st.integers(0, 25)),
    later=st.integers(1, 5),
)
def test_saved_in_segments_and_loaded_it_goes_on_the_same(history, capacity, cuts, later):
    n = len(history[0])

    def make() -> ReplayBuffer:
        return ReplayBuffer(BOX, ACTION, capacity=max(capacity, n), num_envs=n)

    model = Model(make(), n)
    segments, written = [], 0
    for i, outcomes in enumerate(history):
        model.add(outcomes)
        if i in cuts or i == len(history) - 1:
            start = max(written, model.buffer.oldest_row)
            written = model.buffer.total_rows
            segments.append((start, model.buffer.export_rows(start, written)))
    copy = make()
    for start, rows in segments:
        copy.load_rows(start, rows, total_rows=model.buffer.total_rows)
    copy.generator.set_state(model.buffer.generator.get_state())
    original = model.buffer
    for _ in range(later):
        assert (copy.total_rows, len(copy)) == (original.total_rows, len(original))
        if len(original):
            a, b = (x.sample(2, 16, gamma=GAMMA, n_step=3) for x in (original, copy))
            for name in ("obs", "action", "reward", "discount", "next_obs", "end", "index"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
        mirrored = Model.__new__(Model)
        mirrored.__dict__ |= model.__dict__ | {"buffer": copy, "rows": [list(r) for r in model.rows]}
        torch.manual_seed(0)
        mirrored.add(history[0])
        torch.manual_seed(0)
        model.add(history[0])


def test_a_missing_segment_is_noticed():
    model = Model(ReplayBuffer(BOX, ACTION, capacity=50, num_envs=1), 1)
    for _ in range(10):
        model.add(["on"])
    parts = [(a, model.buffer.export_rows(a, a + 5)) for a in (0, 5)]
    copy = ReplayBuffer(BOX, ACTION, capacity=50, num_envs=1)
    with pytest.raises(ValueError, match="continue at 5, but row 0 was expected"):
        copy.load_rows(*parts[1], total_rows=10)


def test_starting_afresh_keeps_the_last_transitions_true_next_observation():
    model = Model(ReplayBuffer(BOX, ACTION, capacity=50, num_envs=1), 1)
    for _ in range(3):
        model.add(["on"])
    last_next = model.obs.clone()
    model.buffer.begin(torch.tensor([[99.0, -99.0]]))
    batch = model.buffer.sample(1, 200, gamma=GAMMA, n_step=3)[0]
    assert len(model.buffer) == 3  # the filler is no transition
    newest = batch.index == 2
    assert newest.any()
    assert torch.equal(batch.next_obs[newest], last_next.expand(int(newest.sum()), 2))
    assert batch.end[newest].all()
    assert (batch.discount[newest] == GAMMA).all()


def test_uniform_over_valid_transitions():
    model = Model(ReplayBuffer(BOX, ACTION, capacity=8, num_envs=2), 2)
    for i in range(20):
        model.add(["invalid" if i % 3 == 0 else "on", "terminated"])
    counts = torch.bincount(model.buffer.sample(10, 4000, gamma=GAMMA).index.flatten())
    counts = counts[counts > 0].double()
    assert len(counts) == len(model.buffer)
    expected = 40_000 / len(counts)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 30  # 99.9 % quantile of chi-square with at most 7 degrees of freedom is 24.3; the seed is fixed


def test_rewards_are_shifted_and_scaled_in_batches_alone():
    plain = ReplayBuffer(BOX, ACTION, capacity=40, num_envs=2, seed=1)
    other = ReplayBuffer(BOX, ACTION, capacity=40, num_envs=2, seed=1, reward_scale=10.0, reward_shift=-2.0)
    torch.manual_seed(0)
    one, two = Model(plain, 2), Model(other, 2)
    for model in (one, two):
        for outcomes in (["on", "on"], ["on", "terminated"], ["truncated", "on"], ["on", "on"]):
            model.add(outcomes)
    for n_step in (1, 3):
        a, b = (buffer.sample(1, 64, gamma=0.5, n_step=n_step) for buffer in (plain, other))
        assert torch.equal(a.index, b.index)
        for row in range(64):
            start, steps = int(a.index[0, row]), 1
            want = one.expected(start, n_step)
            if n_step == 3:
                steps = next(k for k in (1, 2, 3) if k == 3 or one.expected(start, k)["end"])
            powers = sum(0.5**k for k in range(steps))
            assert float(b.reward[0, row]) == pytest.approx(10 * (float(a.reward[0, row]) - 2 * powers))
            assert bool(b.end[0, row]) == want["end"]
    assert torch.equal(plain.export_rows(0, 4)["reward"], other.export_rows(0, 4)["reward"])


def test_dict_observations_images_and_extras():
    space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (3, 8, 8), np.uint8), "state": gym.spaces.Box(-1, 1, (4,), np.float64)}
    )
    extras = {"base_action": torch.zeros(2, 3)}
    buffer = ReplayBuffer(
        space, gym.spaces.MultiDiscrete([3, 4]), capacity=10, num_envs=2, extras=extras, next_extras=True
    )

    def obs(value: int) -> dict[str, torch.Tensor]:
        return {
            "image": torch.full((2, 3, 8, 8), value, dtype=torch.uint8),
            "state": torch.full((2, 4), value / 10, dtype=torch.float64),
        }

    buffer.begin(obs(0))
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    for t in range(1, 5):
        end = no if t < 4 else yes
        step = Step(obs(t if t < 4 else 0), torch.full((2, 2), t), torch.ones(2), no, end, obs(t), yes)
        buffer.add(step, {"base_action": torch.full((2, 3), float(t))}, {"base_action": torch.full((2, 3), t + 0.5)})
    batch = buffer.sample(1, 64, gamma=GAMMA, n_step=2)[0]
    assert batch.obs["image"].dtype == torch.uint8
    assert batch.obs["state"].dtype == torch.float32
    assert batch.action.dtype == torch.int64
    for b in range(64):
        t = int(batch.action[b, 0])
        last = min(t + 1, 4)
        assert batch.next_obs["image"][b].float().mean() == last
        assert batch.extras["base_action"][b, 0] == t
        assert batch.next_extras["base_action"][b, 0] == last + 0.5
        assert batch.discount[b] == GAMMA ** (last - t + 1)  # the time limit bootstraps
    frames = buffer._obs["image"]
    assert frames.element_size() * frames[0].numel() == 2 * 3 * 8 * 8  # each frame once, one byte per pixel


def test_refusals():
    with pytest.raises(ValueError, match=r"buffer.capacity must be at least num_envs = 4, got 3"):
        ReplayBuffer(BOX, ACTION, capacity=3, num_envs=4)
    with pytest.raises(ValueError, match="empty replay buffer"):
        ReplayBuffer(BOX, ACTION, capacity=3, num_envs=1).sample(1, 1, gamma=GAMMA)
