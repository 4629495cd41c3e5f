"""Advantages against numbers worked out by hand: terminations, time limits, rows that are no transition, decisions."""

from __future__ import annotations

import pytest
import torch

from ctrlrl.replay.advantages import Decisions, gae, next_values

GAMMA, TRACE = 0.5, 0.5


def decisions(rows: list[tuple], last_value: float) -> Decisions:
    """One environment; a row is (reward, value, what happened, V of the final observation)."""
    reward, value = (torch.tensor([row[i] for row in rows], dtype=torch.float32).view(-1, 1, 1) for i in (0, 1))
    what = [row[2] for row in rows]
    mask = torch.tensor([w != "invalid" for w in what]).view(-1, 1, 1)
    terminated = torch.tensor([w == "terminated" for w in what]).view(-1, 1)
    cut = torch.tensor([w in ("terminated", "truncated") for w in what]).view(-1, 1)
    final = torch.tensor([row[3] for row in rows], dtype=torch.float32).view(-1, 1)
    following = torch.cat([mask[1:, :, 0], torch.ones(1, 1, dtype=torch.bool)])
    return Decisions(
        reward=reward,
        discount=(GAMMA * ~terminated)[..., None],
        value=value,
        next_value=next_values(value, torch.tensor([last_value]), final, cut, mask),
        end=(cut | ~following)[..., None],
        mask=mask,
    )


def test_an_episode_that_goes_on():
    # delta_1 = 2 + .5*4 - 3 = 1; delta_0 = 1 + .5*3 - 2 = .5; A_1 = 1, A_0 = .5 + .25*1
    out = gae(decisions([(1, 2, "", 0), (2, 3, "", 0)], last_value=4), TRACE)
    assert out.flatten().tolist() == [0.75, 1.0]


def test_a_termination_ends_bootstrap_and_trace():
    # A_0 = 1 + 0 - 2 = -1, whatever follows and whatever the final observation is worth
    out = gae(decisions([(1, 2, "terminated", 100), (2, 3, "", 0)], last_value=4), TRACE)
    assert out.flatten().tolist() == [-1.0, 1.0]


def test_a_time_limit_ends_the_trace_and_bootstraps_from_the_final_observation():
    # delta_0 = 1 + .5*10 - 2 = 4: V(final_obs) = 10 counts, and neither V(s_0) = 2 nor V(reset obs) = 3
    out = gae(decisions([(1, 2, "truncated", 10), (2, 3, "", 0)], last_value=4), TRACE)
    assert out.flatten().tolist() == [4.0, 1.0]


def test_a_row_that_is_no_transition_is_left_out():
    # A_2 = 2 + .5*4 - 3 = 1; row 1 counts nothing; A_0 = 1 + .5*8 - 2 = 3 bootstraps from the observation it came to
    rows = [(1, 2, "", 0), (50, 8, "invalid", 70), (2, 3, "", 0)]
    assert gae(decisions(rows, last_value=4), TRACE).flatten().tolist() == [3.0, 0.0, 1.0]


def test_a_mixture():
    rows = [(1, 0, "", 0), (1, 1, "truncated", 2), (0, 2, "", 0), (4, 4, "terminated", 9), (1, 1, "", 0)]
    # A_4 = 1 + .5*6 - 1 = 3; A_3 = 4 - 4 = 0; A_2 = (0 + .5*4 - 2) + .25*0 = 0; A_1 = 1 + .5*2 - 1 = 1;
    # A_0 = (1 + .5*1 - 0) + .25*1 = 1.75
    assert gae(decisions(rows, last_value=6), TRACE).flatten().tolist() == [1.75, 1.0, 0.0, 0.0, 3.0]


def test_environments_do_not_mix():
    one = decisions([(1, 2, "", 0), (2, 3, "", 0)], 4)
    other = decisions([(1, 2, "truncated", 10), (2, 3, "", 0)], 4)
    both = Decisions(*(torch.cat([getattr(d, n) for d in (one, other)], 1) for n in Decisions.__slots__))
    assert gae(both, TRACE)[..., 0].T.tolist() == [[0.75, 1.0], [4.0, 1.0]]


def test_lambda_one_is_the_return_and_lambda_zero_the_error_of_one_step():
    d = decisions([(1, 2, "", 0), (2, 3, "", 0), (4, 1, "", 0)], last_value=8)
    assert gae(d, 1.0).flatten().tolist() == [1 + 1 + 1 + 1 - 2, 2 + 2 + 2 - 3, 4 + 4 - 1]
    assert gae(d, 0.0).flatten().tolist() == [1 + 1.5 - 2, 2 + 0.5 - 3, 4 + 4 - 1]


def test_decisions_of_a_row_follow_each_other_with_discount_one():
    """Two rows of a language agent: two tokens, then one (the second place is padding)."""
    mask = torch.tensor([[[True, True]], [[True, False]]])
    value = torch.tensor([[[1.0, 2.0]], [[4.0, 77.0]]])
    reward = torch.tensor([[[0.0, 1.0]], [[2.0, 55.0]]])
    discount = torch.tensor([[[1.0, GAMMA]], [[GAMMA, 33.0]]])
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    following = next_values(value, torch.tensor([6.0]), torch.zeros(2, 1), nothing, mask)
    assert following[:, 0].tolist() == [[2.0, 4.0], [6.0, 6.0]]
    out = gae(Decisions(reward, discount, value, following, torch.zeros_like(mask), mask), TRACE)
    # A_10 = 2 + .5*6 - 4 = 1; A_01 = 1 + .5*4 - 2 + .5*.5*1 = 1.25; A_00 = 0 + 2 - 1 + .5*1*1.25 = 1.625
    assert out[:, 0].tolist() == [[1.625, 1.25], [1.0, 0.0]]


@pytest.mark.parametrize("masked", [False, True])
def test_against_stable_baselines3(masked):
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    steps, n = 12, 3
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(steps, n, generator=g) for _ in range(2))
    last, ended = torch.randn(n, generator=g), torch.rand(steps, n, generator=g) < 0.2
    buffer = RolloutBuffer(steps, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), "cpu", TRACE, GAMMA, n)
    buffer.rewards, buffer.values = reward.numpy(), value.numpy()
    buffer.episode_starts[1:] = ended[:-1].numpy()
    buffer.compute_returns_and_advantage(last, ended[-1].numpy())
    mask = torch.ones(steps, n, 1, dtype=torch.bool)
    if masked:  # the general way: a row beside it, which is no transition, has no influence
        mask = torch.cat([mask, torch.zeros(steps, 1, 1, dtype=torch.bool)], 1)
        reward, value = (torch.cat([x, torch.full((steps, 1), 1e6)], 1) for x in (reward, value))
        ended = torch.cat([ended, torch.zeros(steps, 1, dtype=torch.bool)], 1)
        last = torch.cat([last, torch.ones(1)])
    following = next_values(value[..., None], last, torch.zeros_like(reward), ended, mask)
    discount = (GAMMA * ~ended)[..., None]
    out = gae(Decisions(reward[..., None], discount, value[..., None], following, ended[..., None], mask), TRACE)
    assert torch.allclose(out[:, :n, 0], torch.as_tensor(buffer.advantages), atol=1e-6)
    assert not out[:, n:].any()
