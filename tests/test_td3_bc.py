"""TD3+BC: updates against a float64 reference, its limits BC and TD3, and what it learns from a bandit's data."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.algorithms.registry import ALGORITHMS
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.algorithms.td3_bc import TD3BC
from ctrlrl.algorithms.td3_bc_config import TD3BCConfig
from ctrlrl.algorithms.td3_config import TD3Config
from ctrlrl.errors import UsageError
from ctrlrl.replay.batch import Batch
from tests.agents import assert_compiled_equals_eager, assert_same_state, assert_state_dict_continues
from tests.test_execution import needs_compiler
from tests.test_pixels import MIXED
from tests.test_pixels import make_batch as make_image_batch
from tests.test_sac import ACT, OBS, Adam64, Reference, make_batch


class BehaviourReference:
    """TD3 with something of the data in its losses, in float64: networks one by one, no code of ours."""

    def __init__(self, agent: TD3) -> None:
        self.config = c = agent.config
        self.actor = {k: v.detach().double() for k, v in agent.policy.trunk.state_dict().items()}
        self.target_actor = {k: v.clone() for k, v in self.actor.items()}
        self.critics = [Reference._member(agent.critics, k) for k in range(c.num_critics)]
        self.targets = [{n: v.clone() for n, v in critic.items()} for critic in self.critics]
        self.low, self.high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
        self.actor_adam, self.critic_adams = Adam64(c.actor_lr), [Adam64(c.critic_lr) for _ in self.critics]
        entry = agent.normalizer.entry("obs") if agent.normalizer else None
        self.mean, self.std = (entry.mean, entry.variance.sqrt()) if entry else (0.0, 1.0)
        self.count = 0

    @staticmethod
    def layers(p, x, transposed):
        """Linear layers, LayerNorm where `p` has it, ReLU."""
        names = [n.removesuffix(".weight") for n in p if n.endswith("weight")]
        linear = [n for n in names if len(p[f"{n}.weight"]) > 1 or n == names[-1]]
        for name in names:
            weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
            if name in linear:
                x = x @ (weight.T if transposed else weight) + bias
            else:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                x = x * weight + bias
            following = names[names.index(name) + 1] if name != names[-1] else None
            if following in linear:
                x = x.clamp(min=0)
        return x

    def q(self, p, obs, action):
        return self.layers(p, torch.cat([obs, action], 1), False)[:, 0]

    def pi(self, p, obs):
        return torch.tanh(self.layers(p, obs, True))

    def unit(self, action):
        return 2 * (action.double() - self.low) / (self.high - self.low) - 1

    def penalty(self, batch: Batch, action) -> Any:
        return 0.0

    def actor_loss(self, q, action, stored):
        """Of the critics' values (K, B)."""
        weight = self.config.alpha / q[0].detach().abs().mean()
        return -weight * q[0].mean() + ((action - stored) ** 2).sum(1).mean() / 2

    def update(self, batch: Batch, noise) -> None:
        c = self.config
        self.count += 1
        obs, next_obs = ((o.double() - self.mean) / self.std for o in (batch.obs, batch.next_obs))
        stored = self.unit(batch.action)
        with torch.no_grad():
            eps = torch.clip(c.target_noise * noise.double(), -c.target_noise_clip, c.target_noise_clip)
            action = torch.clip(self.pi(self.target_actor, next_obs) + eps, -1, 1)
            value = torch.stack([self.q(t, next_obs, action) for t in self.targets]).min(0).values
            y = batch.reward.double() + batch.discount.double() * (value - self.penalty(batch, action))
        for k, critic in enumerate(self.critics):
            p = {n: v.clone().requires_grad_() for n, v in critic.items()}
            loss = ((self.q(p, obs, stored) - y) ** 2).mean()
            grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
            self.critics[k] = self.critic_adams[k].step(critic, grads)
        if self.count % c.policy_delay:
            return
        actor = {n: v.clone().requires_grad_() for n, v in self.actor.items()}
        action = self.pi(actor, obs)
        loss = self.actor_loss(torch.stack([self.q(p, obs, action) for p in self.critics]), action, stored)
        grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
        self.actor = self.actor_adam.step(self.actor, grads)
        for target, source in zip([*self.targets, self.target_actor], [*self.critics, self.actor], strict=True):
            for n in target:
                target[n] = target[n] + c.tau * (source[n] - target[n])


def assert_equals_reference(agent: TD3, reference: BehaviourReference, batches: Batch, atol: float = 3e-6) -> None:
    """Raise unless all weights are those of the reference after as many updates as there are groups in `batches`."""
    groups, rows = batches.reward.shape
    noise = torch.randn(groups, rows, 2, generator=torch.Generator().manual_seed(3))  # what the agent draws by itself
    agent.update(batches)
    for i in range(groups):
        reference.update(batches[i], noise[i])
    for policy, theirs in ((agent.policy, reference.actor), (agent.target_policy, reference.target_actor)):
        for name, value in policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), theirs[name], atol=atol), name
    for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
        for k, expected in enumerate(theirs):
            for name, value in Reference._member(ours, k).items():
                assert torch.allclose(value, expected[name], atol=atol), (k, name)


def test_updates_equal_the_float64_reference():
    agent = TD3BC(OBS, ACT, TD3BCConfig(hidden=(32, 32)), seed=3)
    agent.observe(torch.randn(500, 5) * 2 + 1, torch.ones(500, dtype=torch.bool))
    assert_equals_reference(agent, BehaviourReference(agent), make_batch(0, groups=7))


def policy_weights(agent: TD3 | BC) -> list[torch.Tensor]:
    return list(agent.policy.trunk.parameters())


def test_without_the_critics_it_is_behaviour_cloning():
    agent = TD3BC(OBS, ACT, TD3BCConfig(hidden=(32,), alpha=0.0, policy_delay=1), seed=1)
    clone = BC(OBS, ACT, BCConfig(hidden=(32,)), seed=1)
    for i in range(5):
        imitation, loss = agent.update(make_batch(i))["imitation_loss"], clone.update(make_batch(i))["actor_loss"]
        assert imitation.item() == pytest.approx(loss.item(), rel=1e-5)
    pairs = zip(policy_weights(agent), policy_weights(clone), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in pairs)


def test_with_an_endless_weight_of_the_critics_it_is_td3():
    settings = {"hidden": (32,), "policy_delay": 1, "tau": 0.005, "normalize_obs": True}
    assert_first_step_is_td3s(
        TD3BC(OBS, ACT, TD3BCConfig(alpha=1e6, **settings), seed=1),
        TD3(OBS, ACT, TD3Config(**settings), seed=1),
        make_batch(),
    )


def assert_first_step_is_td3s(agent: TD3, td3: TD3, batch: Batch) -> None:
    """Raise unless the critics step alike, and the policies down the same gradient but for its weight."""
    weight = agent.update(batch)["q_weight"]
    td3.update(batch)
    for ours, theirs in zip(agent.actor_optimizer.first, td3.actor_optimizer.first, strict=True):
        assert torch.allclose(ours / weight, theirs, rtol=1e-3, atol=1e-7)
    pairs = zip(agent.critics.parameters(), td3.critics.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def bandit(reward, low: float, high: float, *, size: int = 256, discount: float = 0.0, seed: int = 0) -> Batch:
    """Rows [1, B] of one state, with actions drawn uniformly from [low, high]; the state after it is the same."""
    g = torch.Generator().manual_seed(seed)
    action, after = (low + (high - low) * torch.rand(1, size, 1, generator=g) for _ in range(2))
    obs, flag = torch.zeros(1, size, 1), torch.zeros(1, size, dtype=torch.bool)
    rewards, discounts = reward(action).squeeze(-1), torch.full((1, size), discount)
    return Batch(obs, action, rewards, discounts, obs, flag, flag.long(), {}, {}, next_action=after)


def learned(make, config, batch_of, act: gym.spaces.Box, updates: int = 800) -> float:
    """The action that an agent takes in the end."""
    agent = make(gym.spaces.Box(-1, 1, (1,)), act, config)
    for i in range(updates):
        agent.update(batch_of(i))
    return agent.policy.act(torch.zeros(1, 1))[0].item()


FAST = {"hidden": (32, 32), "actor_lr": 3e-3, "critic_lr": 3e-3, "normalize_obs": False}


def test_within_the_data_it_finds_the_better_action():
    """Actions of -2 to 2, of which 1.6 pays most: the mean is 0; the optimum between both losses 1.45."""
    act = gym.spaces.Box(-4.0, 4.0, (1,))

    def batch(seed: int) -> Batch:
        return bandit(lambda a: 1 - (a - 1.6).square() / 4, -2.0, 2.0, seed=seed)

    cloned = learned(BC, BCConfig(hidden=(32, 32), lr=3e-3, normalize_obs=False), batch, act)
    assert cloned == pytest.approx(0.0, abs=0.15)
    better = learned(TD3BC, TD3BCConfig(**FAST), batch, act)
    assert 1.2 < better < 1.8


def test_the_critics_weight_is_free_of_the_rewards_scale():
    agents = [TD3BC(OBS, ACT, TD3BCConfig(hidden=(16,), policy_delay=1), seed=1) for _ in range(2)]
    with torch.no_grad():  # values a thousand times as large
        for p in list(agents[1].critics.ensemble.layers[-1].parameters()):
            p.mul_(1000)
    batch, noise = make_batch()[0], torch.zeros(32, 2)
    weights = [agent.policy_loss(batch, batch.obs, agent.policy.action(batch.obs)) for agent in agents]
    assert weights[0][0].item() == pytest.approx(weights[1][0].item(), rel=1e-4)
    assert weights[0][1]["q_weight"].item() == pytest.approx(1000 * weights[1][1]["q_weight"].item(), rel=1e-4)
    metrics = agents[0].step(batch, noise)
    assert {"imitation_loss", "q_weight", "critic_loss", "actor_loss"} <= metrics.keys()


def test_images_and_vectors_together():
    agent = TD3BC(MIXED, ACT, TD3BCConfig(hidden=(16,), policy_delay=1))
    metrics = agent.update(make_image_batch(MIXED, groups=2))
    assert all(value.isfinite() for value in metrics.values())


def test_same_seed_same_bits_and_a_state_dict_continues():
    a, b = (TD3BC(OBS, ACT, TD3BCConfig(hidden=(16,)), seed=7) for _ in range(2))
    for agent in (a, b):
        agent.update(make_batch(groups=4))
    assert_same_state(a, b)
    assert_state_dict_continues(TD3BC)


@needs_compiler
def test_compiled_updates_equal_eager_ones():
    assert_compiled_equals_eager(TD3BC)


def assert_bfloat16_is_near(make, batch_of, **settings) -> None:
    """Raise unless the first gradients of an update in bfloat16 are those in float32 but for a few percent."""
    found = []
    for precision in ("float32", "bfloat16"):
        config = make.config_class(hidden=(64, 64), policy_delay=1, precision=precision, **settings)
        agent = make(OBS, ACT, config, seed=1)
        metrics = agent.update(batch_of())
        assert all(value.dtype == torch.float32 for value in metrics.values())
        parts = agent.actor_optimizer.first, agent.critic_optimizer.first
        found.append([torch.cat([value.flatten() for value in part]) for part in parts])
    for exact, rounded in zip(*found, strict=True):
        assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.05


def test_bfloat16_gradients_are_float32s_within_its_rounding():
    assert_bfloat16_is_near(TD3BC, lambda: make_batch(size=256))


def test_defaults_are_the_papers():
    c = TD3BCConfig()
    assert (c.alpha, c.tau, c.policy_delay, c.normalize_obs, c.hidden, c.batch_size) == (
        2.5, 0.005, 2, True, (256, 256), 256,
    )  # fmt: skip
    assert isinstance(ALGORITHMS["td3-bc"].load_config_class()(), TD3BCConfig)
    assert isinstance(TD3BC(OBS, ACT).config, TD3BCConfig)


def test_unsuitable_settings_and_spaces():
    with pytest.raises(UsageError, match=r"agent.alpha must be between 0 and 1,000,000, got -1"):
        TD3BCConfig(alpha=-1.0)
    for space in (gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (2,))):
        with pytest.raises(UsageError, match=r"TD3\+BC needs"):
            TD3BC(OBS, space)
