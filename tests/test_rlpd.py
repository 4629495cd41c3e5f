"""RLPD and WSRL: updates against a float64 reference, the entropy in the target or not, defaults, learning."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from ctrlrl.algorithms.registry import ALGORITHMS
from ctrlrl.algorithms.rlpd import RLPD
from ctrlrl.algorithms.rlpd_config import RLPDConfig
from ctrlrl.algorithms.wsrl import WSRL
from ctrlrl.algorithms.wsrl_config import WSRLConfig
from ctrlrl.errors import UsageError
from tests.agents import assert_compiled_equals_eager, assert_same_state, assert_state_dict_continues
from tests.test_execution import needs_compiler
from tests.test_sac import ACT, OBS, Adam64, Reference, make_batch, probe, q_of
from tests.test_td3_bc import BehaviourReference, assert_bfloat16_is_near

BOTH = pytest.mark.parametrize("make", [RLPD, WSRL])


class PriorReference(Reference):
    """The same updates in float64: networks one by one; of policy and critics each with or without LayerNorm."""

    def __init__(self, agent: RLPD, target_entropy: float) -> None:
        super().__init__(agent)
        self.config, self.target_entropy = agent.config, target_entropy
        self.lowest = isinstance(agent, WSRL)
        members = range(agent.config.num_critics)
        self.critics = [self._member(agent.critics, k) for k in members]
        self.targets = [self._member(agent.target_critics, k) for k in members]
        c = agent.config
        self.actor_adam, self.alpha_adam = Adam64(c.actor_lr), Adam64(c.alpha_lr)
        self.critic_adams = [Adam64(c.critic_lr) for _ in members]

    def q(self, p, x):
        return BehaviourReference.layers(p, x, False)[:, 0]

    def sample(self, params, obs, noise):
        """LayerNorm's parameters are (F,) here, and (1, F) for `layers`."""
        shaped = {k: v[None] if v.dim() == 1 and k.endswith("weight") else v for k, v in params.items()}
        out = BehaviourReference.layers(shaped, obs, True)
        mean, log_std = out[:, :2], out[:, 2:].clamp(-20, 2)
        u = mean + log_std.exp() * noise
        normal = torch.distributions.Normal(mean, log_std.exp())
        return torch.tanh(u), (normal.log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(1)

    def update(self, batch, noise, members, improve):
        obs, next_obs, noise = batch.obs.double(), batch.next_obs.double(), noise.double()
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        alpha = self.log_alpha.exp()
        next_action, next_log_prob = self.sample(self.actor, next_obs, noise[1])
        x = torch.cat([next_obs, next_action], 1)
        value = torch.stack([self.q(self.targets[k], x) for k in members]).min(0).values
        y = batch.reward.double() + batch.discount.double() * value
        if self.config.backup_entropy:
            y = y - batch.discount.double() * alpha * next_log_prob
        for k, critic in enumerate(self.critics):
            p = {n: v.clone().requires_grad_() for n, v in critic.items()}
            loss = ((self.q(p, torch.cat([obs, stored], 1)) - y) ** 2).mean() / 2
            grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
            self.critics[k] = self.critic_adams[k].step(critic, grads)
        if improve:
            actor = {k: v.clone().requires_grad_() for k, v in self.actor.items()}
            action, log_prob = self.sample(actor, obs, noise[0])
            values = torch.stack([self.q(c, torch.cat([obs, action], 1)) for c in self.critics])
            value = values.min(0).values if self.lowest else values.mean(0)
            loss = (alpha * log_prob - value).mean()
            grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
            self.actor = self.actor_adam.step(self.actor, grads)
            gradient = -(log_prob.detach() + self.target_entropy).mean()
            self.log_alpha = self.alpha_adam.step({"a": self.log_alpha}, {"a": gradient})["a"]
        for t, c in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + self.config.tau * (c[n] - t[n])


SMALL = {"hidden": (32, 24), "num_critics": 4, "policy_delay": 3, "alpha_lr": 3e-3}
CASES = [
    (RLPD, RLPDConfig(**SMALL), -1.0),
    (RLPD, RLPDConfig(**SMALL, backup_entropy=False, target_entropy=0.3), 0.3),
    (RLPD, RLPDConfig(**SMALL, subset=1, layer_norm=False), -1.0),
    (WSRL, WSRLConfig(**SMALL), -2.0),
    (WSRL, WSRLConfig(**SMALL, policy_layer_norm=True, backup_entropy=True), -2.0),
]


@pytest.mark.parametrize(("make", "config", "target_entropy"), CASES)
def test_updates_equal_the_float64_reference(make, config, target_entropy):
    agent, twin = make(OBS, ACT, config, seed=3), make(OBS, ACT, config, seed=3)
    reference = PriorReference(agent, target_entropy)
    for i in range(7):
        batch = make_batch(i)
        noise, _, members = twin.draw(1, 32)  # what the agent is about to draw
        agent.update(batch)
        reference.update(batch[0], noise[0], members[0].tolist(), improve=i in (2, 5))
        for name, value in agent.policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), reference.actor[name], atol=3e-6), (i, name)
        for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
            for k, expected in enumerate(theirs):
                for name, value in Reference._member(ours, k).items():
                    assert torch.allclose(value, expected[name], atol=3e-6), (i, k, name)
        assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-6)


@BOTH
def test_the_target_holds_the_entropy_or_not(make):
    batch = make_batch()
    found = []
    for backup_entropy in (True, False):
        config = make.config_class(hidden=(16,), initial_alpha=5.0, backup_entropy=backup_entropy)
        agent = make(OBS, ACT, config, seed=1)
        noise = agent.draw(1, 32)[0]
        again = make(OBS, ACT, config, seed=1)
        log_prob = again.policy.distribution(batch.next_obs[0]).rsample(noise[0, 1])[1].sum(-1)
        found.append((again.update(batch)["target_mean"].item(), (batch.discount[0] * 5.0 * log_prob).mean().item()))
    (with_it, cost), (without, _) = found
    assert without - with_it == pytest.approx(cost, abs=1e-4)
    assert abs(cost) > 0.1


def test_defaults_are_the_authors():
    c = RLPDConfig()
    assert (c.num_critics, c.subset, c.layer_norm, c.utd, c.policy_delay) == (10, 2, True, 20, 20)
    assert (c.backup_entropy, c.actor_lr, c.critic_lr, c.alpha_lr, c.hidden) == (True, 3e-4, 3e-4, 3e-4, (256, 256))
    c = WSRLConfig()
    assert (c.num_critics, c.subset, c.layer_norm, c.utd, c.policy_delay) == (10, 2, True, 4, 4)
    assert (c.backup_entropy, c.actor_lr, c.critic_lr, c.alpha_lr, c.hidden) == (False, 1e-4, 3e-4, 1e-4, (256, 256))
    assert RLPD(OBS, ACT).target_entropy == -1.0 and WSRL(OBS, ACT).target_entropy == -2.0


def test_presets_of_sparse_rewards_are_the_authors():
    def values(env):
        return ALGORITHMS["rlpd"].preset_for(env).values["agent"]

    assert values("AntMaze_UMaze-v5") == {"hidden": [256, 256, 256], "subset": 1, "backup_entropy": False}
    assert values("AdroitHandDoor-v1") == {"hidden": [256, 256, 256], "backup_entropy": False}
    assert RLPDConfig.from_dict(values("AntMaze_UMaze-v5")).subset == 1


def test_the_policy_has_layer_norm_where_asked_and_weights_of_another_are_refused():
    plain, normed = (WSRL(OBS, ACT, WSRLConfig(hidden=(16,), policy_layer_norm=on)) for on in (False, True))
    counts = [sum(isinstance(m, nn.LayerNorm) for m in agent.policy.modules()) for agent in (plain, normed)]
    assert counts == [0, 1]
    obs = torch.randn(3, 5)
    assert torch.allclose(normed.policy.act(obs)[0], normed.policy.act(obs)[0])
    with pytest.raises(RuntimeError):
        normed.policy.load_state_dict(plain.policy.state_dict())


PROBE = {"policy_delay": 2, "hidden": (32, 32)}


@BOTH
def test_probe_a_delayed_reward_is_discounted_once(make):
    following = {"next_obs": torch.ones_like, "updates": 500}
    agent = probe(lambda o, a: (o > 0).float(), 0.5, make=make, **following, **PROBE)
    assert q_of(agent, 1.0) == pytest.approx(2, abs=0.3)
    assert q_of(agent, -1.0) == pytest.approx(1, abs=0.3)


@BOTH
def test_probe_the_policy_follows_the_action_that_pays(make):
    agent = probe(lambda o, a: o * a / 0.4, 0.0, make=make, **PROBE)
    action, _, _ = agent.policy.act(torch.tensor([[1.0], [-1.0]]))
    assert action[0].item() > 0.25
    assert action[1].item() < -0.25


@BOTH
def test_same_seed_same_bits_and_a_state_dict_continues(make):
    a, b = (make(OBS, ACT, make.config_class(hidden=(16,), policy_delay=2), seed=7) for _ in range(2))
    for agent in (a, b):
        agent.update(make_batch(groups=4))
    assert_same_state(a, b)
    assert_state_dict_continues(make, policy_delay=2)


@needs_compiler
@pytest.mark.parametrize(("make", "settings"), [(RLPD, {}), (WSRL, {"policy_layer_norm": True})])
def test_compiled_updates_equal_eager_ones(make, settings):
    assert_compiled_equals_eager(make, num_critics=3, **settings)


@pytest.mark.parametrize(("make", "settings"), [(RLPD, {}), (WSRL, {"policy_layer_norm": True})])
def test_bfloat16_gradients_are_float32s_within_its_rounding(make, settings):
    assert_bfloat16_is_near(make, lambda: make_batch(size=256), **settings)


@BOTH
def test_unsuitable_settings_and_spaces(make):
    with pytest.raises(UsageError, match=r"agent.subset must be between 1 and agent.num_critics = 2"):
        replace(make.config_class(), num_critics=2, subset=3)
    for space in (gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (2,))):
        with pytest.raises(UsageError, match=f"{make.title} needs"):
            make(OBS, space)
