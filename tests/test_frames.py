"""Stacked frames: as Gymnasium stacks them, stored once, and rebuilt by the replay as they were observed."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.envs.frame_stack import FrameStack
from ctrlrl.envs.make import make_env
from ctrlrl.envs.vector import EnvState, Step, VectorEnv
from ctrlrl.envs.worker import PixelObservation
from ctrlrl.errors import UsageError
from ctrlrl.replay.buffer import ReplayBuffer
from tests.conformance import check_vector_env
from tests.standins import MODULE

ACTION = gym.spaces.Box(-1, 1, (1,))
GAMMA = 0.5
OUTCOMES = st.sampled_from(["on", "on", "on", "terminated", "truncated", "both", "invalid"])
HISTORIES = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(OUTCOMES, min_size=n, max_size=n), min_size=1, max_size=25)
)


class Scripted(VectorEnv):
    """Images (N, 2, 2, 1) and vectors (N, 2) that are numbered uniquely; the outcomes of its steps are a list."""

    name, device, control_dt, may_be_invalid = "scripted", torch.device("cpu"), None, True
    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (2, 2, 1), np.uint8), "speed": gym.spaces.Box(-np.inf, np.inf, (2,))}
    )
    action_space = ACTION

    def __init__(self, history: list[list[str]]) -> None:
        self.num_envs, self.history, self.count, self.closed = len(history[0]), list(history), 0, False

    def observe(self) -> dict[str, torch.Tensor]:
        numbers = torch.arange(self.count, self.count + self.num_envs)
        self.count += self.num_envs
        image = (numbers * 4 % 256)[:, None] + torch.arange(4)
        speed = torch.stack([numbers.float(), -numbers.float()], 1)
        return {"image": image.to(torch.uint8).view(-1, 2, 2, 1), "speed": speed}

    def reset(self, seed=None):
        return self.observe()

    def step(self, action):
        outcomes = self.history.pop(0)

        def are(*which: str) -> torch.Tensor:
            return torch.tensor([outcome in which for outcome in outcomes])

        final, first = self.observe(), self.observe()
        fresh = are("terminated", "truncated", "both", "invalid")
        obs = {key: torch.where(fresh.view(-1, *[1] * (final[key].dim() - 1)), first[key], final[key]) for key in final}
        flags = are("terminated", "both"), are("truncated", "both")
        return Step(obs, action, torch.ones(self.num_envs), *flags, final, ~are("invalid"))

    def get_state(self):
        return EnvState([{"count": self.count}] * self.num_envs, [{} for _ in range(self.num_envs)])

    def set_state(self, state, *, seed):
        self.count = state.json[0]["count"] - self.num_envs
        return self.observe(), [None] * self.num_envs

    def close(self):
        self.closed = True


class Observed:
    """Steps a stacked environment and keeps what was observed, in a buffer and in a plain list."""

    def __init__(self, history: list[list[str]], count: int, capacity: int) -> None:
        self.env = FrameStack(Scripted(history), count)
        self.n = self.env.num_envs
        self.buffer = self.make(capacity)
        self.obs = self.env.reset()
        self.rows: list[tuple[dict, Step]] = []
        self.buffer.begin(self.obs)

    def make(self, capacity: int) -> ReplayBuffer:
        return ReplayBuffer(
            self.env.observation_space,
            ACTION,
            capacity=max(capacity, self.n),
            num_envs=self.n,
            frame_stack=self.env.observation_space["image"].shape[0],
        )

    def step(self) -> None:
        step = self.env.step(torch.zeros(self.n, 1))
        self.buffer.add(step)
        self.rows.append((self.obs, step))
        self.obs = step.obs

    def check(self, buffer: ReplayBuffer, n_step: int) -> None:
        if not len(buffer):
            return
        batch = buffer.sample(2, 30, gamma=GAMMA, n_step=n_step)
        for g, b in np.ndindex(2, 30):
            row, i = divmod(int(batch.index[g, b]), self.n)
            last = row
            while not self.ends(last, i) and last - row + 1 < n_step:
                last += 1
            for key in ("image", "speed"):
                assert torch.equal(batch.obs[key][g, b], self.rows[row][0][key][i]), (key, row)
                assert torch.equal(batch.next_obs[key][g, b], self.rows[last][1].final_obs[key][i]), (key, row, last)

    def ends(self, row: int, i: int) -> bool:
        step = self.rows[row][1]
        followed = row + 1 < len(self.rows) and bool(self.rows[row + 1][1].valid[i])
        return bool(step.terminated[i] | step.truncated[i]) or not followed


@settings(max_examples=100, deadline=None)
@given(history=HISTORIES, count=st.integers(2, 4), capacity=st.integers(1, 30), n_step=st.integers(1, 4))
def test_the_replay_gives_back_the_stacks_that_were_observed(history, count, capacity, n_step):
    seen = Observed(history, count, capacity)
    for _ in history:
        seen.step()
        seen.check(seen.buffer, n_step)
    frames = seen.buffer._obs["image"]
    assert frames.shape == (seen.buffer.rows + count, seen.n, 2, 2, 1)  # each frame once


@settings(max_examples=60, deadline=None)
@given(
    history=HISTORIES,
    count=st.integers(2, 4),
    capacity=st.integers(1, 30),
    cuts=st.sets(st.integers(0, 25)),
    later=st.integers(0, 8),
)
def test_saved_in_segments_and_loaded_the_stacks_are_the_same(history, count, capacity, cuts, later):
    seen = Observed(history + history, count, capacity)
    segments, written = [], 0
    for i in range(len(history)):
        seen.step()
        if i in cuts or i == len(history) - 1:
            start, written = max(written, seen.buffer.oldest_row), seen.buffer.total_rows
            segments.append((start, seen.buffer.export_rows(start, written)))
    copy = seen.make(capacity)
    for start, rows in segments:
        copy.load_rows(start, rows, total_rows=seen.buffer.total_rows)
    seen.check(copy, 3)
    original, seen.buffer = seen.buffer, copy
    for _ in range(min(later, len(history))):
        seen.step()
        seen.check(copy, 3)
        original.add(seen.rows[-1][1])
    copy.generator.set_state(original.generator.get_state())
    if len(original):
        left, right = (buffer.sample(1, 40, gamma=GAMMA, n_step=2) for buffer in (original, copy))
        assert torch.equal(left.obs["image"], right.obs["image"])
        assert torch.equal(left.next_obs["image"], right.next_obs["image"])


def test_an_episode_that_goes_on_after_another_was_lost_keeps_its_stack():
    seen = Observed([["on"]] * 6, 3, 50)
    for _ in range(3):
        seen.step()
    before = len(seen.buffer)
    seen.buffer.begin(seen.obs)  # of some environments one could not be continued, and this one could
    assert len(seen.buffer) == before  # what was written is no transition
    at = seen.buffer.total_rows
    step = seen.env.step(torch.zeros(1, 1))
    seen.buffer.add(step)
    batch = seen.buffer.sample(1, 100, gamma=GAMMA)[0]
    newest = batch.index == at
    assert newest.any()
    for b in newest.nonzero().flatten():
        assert torch.equal(batch.obs["image"][b], seen.obs["image"][0])
        assert torch.equal(batch.next_obs["image"][b], step.final_obs["image"][0])


@pytest.mark.parametrize("backend", ["gymnasium", "workers"])
def test_stacked_pictures_conform_and_are_stacked_as_gymnasium_does(backend):
    name = MODULE + "ctrlrl-test/Moving-v0"

    def reference() -> gym.Env:
        observed = PixelObservation(gym.make(name, render_mode="rgb_array"), 16, True)
        return gym.wrappers.FrameStackObservation(observed, 3, padding_type="reset")

    check_vector_env(
        lambda n: FrameStack(make_env(name, num_envs=n, pixels=16, grayscale=True, backend=backend), 3),
        ends_within=60,
        random_starts=False,  # so coarse a picture may be the same twice
        reference=reference,
    )


def test_a_saved_state_has_the_frames_before():
    name = MODULE + "ctrlrl-test/Moving-v0"
    make = lambda: FrameStack(make_env(name, num_envs=2, pixels=16), 3)  # noqa: E731
    env, other = make(), make()
    env.reset(4)
    for _ in range(2):
        obs = env.step(torch.ones(2, 2)).obs
    assert not torch.equal(obs[0, 0], obs[0, 2])
    restored, reasons = other.set_state(env.get_state(), seed=0)
    assert reasons == [None, None]
    assert torch.equal(restored, obs)
    lost = env.get_state()
    for _ in range(9):
        assert torch.equal(env.step(torch.ones(2, 2)).obs, other.step(torch.ones(2, 2)).obs)
    lost.json[1] = None
    restored, reasons = other.set_state(lost, seed=0)
    assert reasons[0] is None
    assert reasons[1] is not None
    assert not torch.equal(restored[0, 0], restored[0, 2])
    assert torch.equal(restored[1, 0], restored[1, 2])  # a new episode's first frame, repeated
    env.close()
    other.close()


def test_what_was_passed_is_left_open():
    for owned in (True, False):
        inner = Scripted([["on"]])
        FrameStack(inner, 2, owned=owned).close()
        assert inner.closed == owned


def test_stacking_needs_images():
    with pytest.raises(UsageError, match=r"frame_stack = 3 goes with images .*--pixels 48"):
        FrameStack(make_env("Pendulum-v1"), 3)


def test_a_space_that_is_not_stacked_is_refused():
    with pytest.raises(ValueError, match=r"is \(8, 8, 3\); expected stacks of 3 frames"):
        ReplayBuffer(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), ACTION, capacity=9, num_envs=1, frame_stack=3)


@pytest.mark.parametrize(("grayscale", "frame"), [(False, 16 * 16 * 3), (True, 16 * 16)])
def test_bytes_per_frame(grayscale, frame):
    env = FrameStack(make_env("Pendulum-v1", pixels=16, grayscale=grayscale), 3)
    buffer = ReplayBuffer(env.observation_space, env.action_space, capacity=1000, num_envs=1, frame_stack=3)
    env.close()
    held = [*buffer._obs.values(), *buffer._columns.values(), buffer._reach, buffer._order]
    held = sum(tensor.numel() * tensor.element_size() for tensor in held)
    # action 4, reward 4, flags 3, entry of the final observations 8, reach 1, index 8; and 3 slots more
    per_row = frame + 20
    assert held == per_row * 1003 + 8 * 1000
