"""ReBRAC: updates against a float64 reference, its limits, what an episode's end means, and staying in support."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.rebrac import ReBRAC
from ctrlrl.algorithms.rebrac_config import ReBRACConfig
from ctrlrl.algorithms.registry import ALGORITHMS
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.algorithms.td3_config import TD3Config
from ctrlrl.errors import UsageError
from ctrlrl.replay.batch import Batch
from tests import test_sac
from tests.agents import assert_same_state
from tests.test_execution import needs_compiler
from tests.test_sac import ACT, OBS
from tests.test_td3_bc import (
    FAST,
    BehaviourReference,
    assert_bfloat16_is_near,
    assert_equals_reference,
    assert_first_step_is_td3s,
    bandit,
    learned,
)


def make_batch(seed: int = 0, size: int = 32, groups: int = 1) -> Batch:
    """Some rows end an episode: half of them by termination, where the discount is 0."""
    batch = test_sac.make_batch(seed, size=size, groups=groups)
    g = torch.Generator().manual_seed(100 + seed)
    cut = torch.rand(groups, size, generator=g) < 0.2
    after = test_sac.make_batch(50 + seed, size=size, groups=groups).action
    return replace(batch, next_action=after, end=cut | (batch.discount == 0))


class ReBRACReference(BehaviourReference):
    def penalty(self, batch, action):
        distance = ((action - self.unit(batch.next_action)) ** 2).sum(1)
        return self.config.critic_bc * distance * (1 - batch.end.double())

    def actor_loss(self, q, action, stored):
        lowest = q.min(0).values
        weight = 1 / lowest.detach().abs().mean()
        return (self.config.actor_bc * ((action - stored) ** 2).sum(1) - weight * lowest).mean()


@pytest.mark.parametrize("layer_norm", [True, False])
def test_updates_equal_the_float64_reference(layer_norm):
    config = ReBRACConfig(hidden=(24, 32, 24), layer_norm=layer_norm, actor_bc=0.7, critic_bc=0.3, actor_lr=3e-4)
    agent = ReBRAC(OBS, ACT, config, seed=3)
    batches = make_batch(0, groups=7)
    assert (batches.end & (batches.discount > 0)).any() and (~batches.end).any()
    assert_equals_reference(agent, ReBRACReference(agent), batches)


def test_without_both_penalties_and_with_one_critic_it_is_td3():
    settings = {"hidden": (32,), "layer_norm": True, "policy_delay": 1, "num_critics": 1, "tau": 0.005}
    agent = ReBRAC(OBS, ACT, ReBRACConfig(actor_bc=0, critic_bc=0, actor_lr=3e-4, critic_lr=3e-4, **settings), seed=1)
    td3 = TD3(OBS, ACT, TD3Config(**settings), seed=1)
    assert_first_step_is_td3s(agent, td3, make_batch())


def test_the_target_falls_with_the_distance_from_the_next_action_but_not_where_an_episode_ended():
    agent = ReBRAC(OBS, ACT, ReBRACConfig(hidden=(16,), critic_bc=2.0))
    batch = make_batch()[0]
    near = agent.policy.scaling.to_environment(torch.zeros(32, 2))
    action = torch.tensor([0.5, -1.0]).expand(32, 2)
    value = agent.next_value(replace(batch, next_action=near), batch.next_obs, action)
    free = agent.target_critics(batch.next_obs, action).amin(0)
    expected = torch.where(batch.end, 0.0, 2.0 * (0.25 + 1.0))
    assert torch.allclose(free - value, expected, atol=1e-5)


def test_actions_of_the_data_beyond_any_number_at_an_episodes_end_do_no_harm():
    a, b = (ReBRAC(OBS, ACT, ReBRACConfig(hidden=(16,)), seed=1) for _ in range(2))
    batch = make_batch(groups=2)
    gone = torch.where(batch.end[..., None], torch.nan, batch.next_action)
    a.update(batch)
    b.update(replace(batch, next_action=gone))
    assert_same_state(a, b)


def test_it_stays_in_the_support_of_the_data():
    """Actions of -0.2 to 0.2, of which larger ones pay more: beyond them there are no data."""
    act = gym.spaces.Box(-1.0, 1.0, (1,))

    def batch(seed: int) -> Batch:
        return bandit(lambda a: 1 + a, -0.2, 0.2, seed=seed)

    free = learned(ReBRAC, ReBRACConfig(**FAST, actor_bc=0.0), batch, act)
    held = learned(ReBRAC, ReBRACConfig(**FAST, actor_bc=3.0), batch, act)
    assert free > 0.35
    assert 0.05 < held < 0.25  # the optimum between both losses: 1 / (2 * 3)


def test_the_critics_penalty_lowers_the_value_of_what_follows():
    """One state for ever, rewards of 1, a discount of 0.5; the policy is held at 1 and the data's actions at -1."""
    act = gym.spaces.Box(-1.0, 1.0, (1,))

    def value(critic_bc: float) -> float:
        config = ReBRACConfig(**FAST | {"actor_lr": 1e-9}, critic_bc=critic_bc, target_noise=0.0, tau=0.05)
        agent = ReBRAC(gym.spaces.Box(-1, 1, (1,)), act, config)
        with torch.no_grad():
            for policy in (agent.policy, agent.target_policy):
                policy.trunk[-1].bias.fill_(50.0)
        for i in range(600):
            agent.update(bandit(torch.ones_like, -1.0, -1.0, discount=0.5, seed=i))
        return agent.critics(torch.zeros(1, 1), torch.tensor([[-1.0]])).mean().item()

    # Only actions of -1 are seen, so the value at 1 is what the critic makes of it: the difference is what counts.
    without, with_it = value(0.0), value(0.1)
    assert without - with_it > 0.5 * 0.1 * 4 * 0.9  # a step's penalty at least


def test_a_batch_without_next_actions_is_refused():
    with pytest.raises(UsageError, match=r"ReBRAC needs the data's action after each transition .*take td3-bc"):
        ReBRAC(OBS, ACT, ReBRACConfig(hidden=(16,))).update(test_sac.make_batch())


def test_same_seed_same_bits_and_a_state_dict_continues():
    config = ReBRACConfig(hidden=(16,), normalize_obs=True)
    a, b, c = (ReBRAC(OBS, ACT, config, seed=seed) for seed in (7, 7, 8))
    for agent in (a, b):
        agent.observe(test_sac.make_batch(5)[0].obs, torch.ones(32, dtype=torch.bool))
        agent.update(make_batch(groups=3))
    assert_same_state(a, b)
    c.load_state_dict(a.state_dict())
    for agent in (a, c):
        agent.update(make_batch(9, groups=3))
    assert_same_state(a, c)


@needs_compiler
def test_compiled_updates_equal_eager_ones():
    config = ReBRACConfig(hidden=(16, 16), policy_delay=1)
    eager, compiled = (ReBRAC(OBS, ACT, replace(config, execution=how), seed=1) for how in ("eager", "compiled"))
    for i in range(2):
        ours, theirs = compiled.update(make_batch(i, groups=2)), eager.update(make_batch(i, groups=2))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    assert_same_state(compiled, eager, atol=1e-5)


def test_bfloat16_gradients_are_float32s_within_its_rounding():
    assert_bfloat16_is_near(ReBRAC, lambda: make_batch(size=256))


def test_defaults_and_presets_are_the_authors():
    c = ReBRACConfig()
    assert (c.batch_size, c.actor_lr, c.critic_lr, c.hidden) == (1024, 1e-3, 1e-3, (256, 256, 256))
    assert (c.tau, c.policy_delay, c.layer_norm, c.normalize_obs) == (0.005, 2, True, False)
    tuned = {"HalfCheetah-v5": (0.001, 0.01), "Hopper-v5": (0.01, 0.01), "Walker2d-v5": (0.05, 0.1)}
    for env, (actor_bc, critic_bc) in tuned.items():
        preset = ALGORITHMS["rebrac"].preset_for(env)
        assert preset.values == {"agent": {"actor_bc": actor_bc, "critic_bc": critic_bc}}
    assert ALGORITHMS["rebrac"].preset_for("Ant-v5") is None


def test_unsuitable_settings_and_spaces():
    for name in ("actor_bc", "critic_bc"):
        with pytest.raises(UsageError, match=rf"agent.{name} must be between 0 and 1,000,000, got -1"):
            ReBRACConfig(**{name: -1.0})
    for space in (gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (2,))):
        with pytest.raises(UsageError, match="ReBRAC needs"):
            ReBRAC(OBS, space)
