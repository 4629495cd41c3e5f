"""TD3 and DDPG: updates against a float64 reference, the delay's meaning, smoothing, bounds, and probe environments."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.algorithms.td3_config import DDPGConfig, TD3Config
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured
from ctrlrl.nn.vision import Convolution
from ctrlrl.replay.batch import Batch
from ctrlrl.runs.checkpoint import load_checkpoint, pack
from ctrlrl.runs.folder import RunFolder
from tests.runs import SMALL
from tests.test_execution import needs_compiler, rerun
from tests.test_pixels import IMAGE, MIXED
from tests.test_pixels import make_batch as make_image_batch
from tests.test_sac import ACT, OBS, Adam64, Reference, make_batch


class TD3Reference:
    """The same updates written out once more: separate critics, explicit sums, float64, no code of ours."""

    def __init__(self, agent: TD3) -> None:
        self.config = agent.config
        members = range(agent.config.num_critics)
        self.actor = {k: v.detach().double() for k, v in agent.policy.trunk.state_dict().items()}
        self.target_actor = {k: v.clone() for k, v in self.actor.items()}
        self.critics = [Reference._member(agent.critics, k) for k in members]
        self.targets = [{n: v.clone() for n, v in critic.items()} for critic in self.critics]
        self.low, self.high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
        self.actor_adam, self.critic_adams = Adam64(3e-4), [Adam64(3e-4) for _ in members]
        self.count = 0

    @staticmethod
    def pi(p, x):
        h = torch.relu(x @ p["0.weight"].T + p["0.bias"])
        h = torch.relu(h @ p["2.weight"].T + p["2.bias"])
        return torch.tanh(h @ p["4.weight"].T + p["4.bias"])

    def update(self, batch: Batch, noise: torch.Tensor) -> None:
        c, q_of = self.config, Reference.critic_net
        self.count += 1
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        with torch.no_grad():
            eps = torch.clip(c.target_noise * noise.double(), -c.target_noise_clip, c.target_noise_clip)
            next_action = torch.clip(self.pi(self.target_actor, next_obs) + eps, -1, 1)
            x = torch.cat([next_obs, next_action], 1)
            value = torch.stack([q_of(t, x) for t in self.targets]).min(0).values
            y = batch.reward.double() + batch.discount.double() * value
        for k, critic in enumerate(self.critics):
            p = {n: v.clone().requires_grad_() for n, v in critic.items()}
            loss = ((q_of(p, torch.cat([obs, stored], 1)) - y) ** 2).mean()
            grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
            self.critics[k] = self.critic_adams[k].step(critic, grads)
        if self.count % c.policy_delay:
            return
        actor = {n: v.clone().requires_grad_() for n, v in self.actor.items()}
        loss = -q_of(self.critics[0], torch.cat([obs, self.pi(actor, obs)], 1)).mean()
        grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
        self.actor = self.actor_adam.step(self.actor, grads)
        for target, source in zip([*self.targets, self.target_actor], [*self.critics, self.actor], strict=True):
            for n in target:
                target[n] = target[n] + c.tau * (source[n] - target[n])


@pytest.mark.parametrize("config", [TD3Config(hidden=(32, 32)), DDPGConfig(hidden=(32, 32))])
def test_updates_equal_the_float64_reference(config):
    agent = TD3(OBS, ACT, config, seed=3)
    reference = TD3Reference(agent)
    noise = torch.randn(7, 32, 2, generator=torch.Generator().manual_seed(3))  # what the agent draws by itself
    batches = make_batch(0, groups=7)
    agent.update(batches)  # seven steps of one call, of which the policy is improved in three
    for i in range(7):
        reference.update(batches[i], noise[i])
    pairs = [(agent.policy, reference.actor), (agent.target_policy, reference.target_actor)]
    for policy, theirs in pairs:
        for name, value in policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), theirs[name], atol=3e-6), name
    for k in range(config.num_critics):
        for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
            for name, value in Reference._member(ours, k).items():
                assert torch.allclose(value, theirs[k][name], atol=3e-6), (k, name)


def weights(agent: TD3) -> dict[str, torch.Tensor]:
    parts = {"policy": agent.policy, "target_policy": agent.target_policy}
    parts |= {"critics": agent.critics, "target_critics": agent.target_critics}
    return {name: torch.cat([p.detach().flatten() for p in part.parameters()]) for name, part in parts.items()}


def test_between_two_delayed_steps_only_the_critics_change_however_updates_are_grouped():
    a, b = (TD3(OBS, ACT, TD3Config(hidden=(16,), policy_delay=3), seed=1) for _ in range(2))
    batches = make_batch(groups=7)
    before = weights(a)
    for i in range(7):  # one at a time: the count goes on from call to call
        metrics = a.update(batches.map(lambda x, i=i: x[i : i + 1]))
        after = weights(a)
        improves = i in (2, 5)
        assert ("actor_loss" in metrics) == improves
        for name, value in after.items():
            assert torch.equal(value, before[name]) == (not improves and name != "critics"), (i, name)
        before = after
    b.update(batches.map(lambda x: x[:4]))
    metrics = b.update(batches.map(lambda x: x[4:]))
    assert "actor_loss" in metrics
    assert all(torch.equal(value, before[name]) for name, value in weights(b).items())


def test_smoothing_is_clipped_twice():
    """Noise far beyond its clip, on a target policy at the bound: the action stays within [-1, 1]."""
    agent = TD3(OBS, ACT, TD3Config(hidden=(16,), target_noise=10.0))
    seen = []
    forward = agent.target_critics.forward
    agent.target_critics.forward = lambda obs, action: seen.append(action) or forward(obs, action)
    noise = torch.tensor([1.0, -1.0]).expand(32, 2)
    batch = make_batch()[0]
    with torch.no_grad():
        unclipped = agent.target_policy.action(batch.next_obs) + torch.tensor([0.5, -0.5])
        agent.target_policy.trunk[-1].bias[0] = 50.0
    agent.step(batch, noise, improve=False)
    assert torch.equal(seen[0][:, 0], torch.ones(32))  # the bound holds after the noise
    assert torch.allclose(seen[0][:, 1], unclipped[:, 1].clamp(-1, 1))  # 0.5 and not 10


def test_exploration_noise_is_in_half_ranges_and_within_bounds():
    agent = TD3(OBS, ACT, TD3Config(hidden=(16,), exploration_noise=0.1))
    obs = torch.zeros(20_000, 5)
    calm, _, _ = agent.policy.act(obs)
    noisy, _, _ = agent.policy.act(obs, explore=True)
    assert torch.equal(calm[0], calm[1])
    half = torch.as_tensor((ACT.high - ACT.low) / 2)
    assert torch.allclose((noisy - calm).std(0), 0.1 * half, rtol=0.03)
    assert (noisy >= torch.as_tensor(ACT.low)).all() and (noisy <= torch.as_tensor(ACT.high)).all()
    loud = TD3(OBS, ACT, TD3Config(hidden=(16,), exploration_noise=5.0)).policy.act(obs, explore=True)[0]
    assert loud.min() >= 0 - 0.4 and loud.max() <= 3 and torch.isclose(loud.amax(0), torch.as_tensor(ACT.high)).all()


def probe(reward, discount: float, **settings) -> TD3:
    """Train on batches from a made-up environment: observation -1 or 1, action in [-0.4, 0.4]; the next one is 1."""
    fields = {"hidden": (64, 64), "actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}
    agent = TD3(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-0.4, 0.4, (1,)), TD3Config(**fields | settings))
    g = torch.Generator().manual_seed(0)
    flag = torch.zeros(10, 64, dtype=torch.bool)
    for _ in range(50):
        obs = torch.randint(0, 2, (10, 64, 1), generator=g).float() * 2 - 1
        action = torch.rand(10, 64, 1, generator=g) * 0.8 - 0.4
        r = reward(obs, action).squeeze(-1)
        discounts = torch.full((10, 64), discount)
        agent.update(Batch(obs, action, r, discounts, torch.ones_like(obs), flag, flag.long(), {}, {}))
    return agent


def test_probe_values_are_discounted_and_stop_at_a_termination():
    agent = probe(lambda o, a: (o > 0).float(), 0.5)  # 1 for ever from 1, and once later from -1
    q = agent.critics(torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)).mean(0)
    assert torch.allclose(q, torch.tensor([2.0, 1.0]), atol=0.25)
    over = probe(lambda o, a: (o > 0).float(), 0.0)
    q = over.critics(torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)).mean(0)
    assert torch.allclose(q, torch.tensor([1.0, 0.0]), atol=0.1)


def test_probe_the_policy_follows_the_action_that_pays_within_any_bounds():
    agent = probe(lambda o, a: o * a / 0.4, 0.0)
    action, _, _ = agent.policy.act(torch.tensor([[1.0], [-1.0]]))
    assert action[0].item() > 0.3 and action[1].item() < -0.3
    assert action.abs().max() <= 0.4


def test_bounds_of_any_size_learn_the_same():
    """The authors' code once gave constant actions where bounds were not 1 (issue sfujim/TD3#19)."""
    wide = gym.spaces.Box(-3.0, 17.0, (2,))
    narrow = gym.spaces.Box(-1.0, 1.0, (2,))
    a, b = TD3(OBS, narrow, TD3Config(hidden=(16,)), seed=2), TD3(OBS, wide, TD3Config(hidden=(16,)), seed=2)
    batch = make_batch(groups=6, act=narrow)
    scaled = batch.map(lambda x: x)
    scaled = Batch(
        batch.obs, batch.action * 10 + 7, *(getattr(batch, n) for n in ("reward", "discount", "next_obs")),
        batch.end, batch.index, {}, {},
    )  # fmt: skip
    a.update(batch)
    b.update(scaled)
    left, right = weights(a), weights(b)
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)
    obs = torch.randn(8, 5)
    assert torch.allclose(a.policy.act(obs)[0] * 10 + 7, b.policy.act(obs)[0], atol=1e-3)


@pytest.mark.parametrize("space", [IMAGE, MIXED])
def test_targets_share_the_target_convolutions_and_the_agents_normalizer(space):
    agent = TD3(space, ACT, TD3Config(hidden=(16,), policy_delay=1, normalize_obs=space is MIXED))
    ours, theirs = (
        [m for m in policy.encoder.modules() if isinstance(m, Convolution)]
        for policy in (agent.policy, agent.target_policy)
    )
    assert ours and all(m in list(agent.critics.modules()) for m in ours)
    assert theirs and all(m in list(agent.target_critics.modules()) for m in theirs) and not {*ours} & {*theirs}
    assert agent.target_policy.encoder._normalizer[0] is agent.policy.normalizer
    before = weights(agent)
    agent.update(make_image_batch(space, groups=2))
    after = weights(agent)
    assert not any(torch.equal(after[name], before[name]) for name in after)


def test_state_dict_continues_bit_for_bit():
    config = TD3Config(hidden=(16,), normalize_obs=True, layer_norm=True)
    a, b = (TD3(OBS, ACT, config, seed=seed) for seed in (1, 2))
    a.observe(torch.randn(50, 5) * 3 + 1, torch.ones(50, dtype=torch.bool))
    a.update(make_batch(groups=3))  # an odd number: the next step improves the policy
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, b):
        assert "actor_loss" in agent.update(make_batch(9, groups=1))
    left, right = pack(a.state_dict())[0], pack(b.state_dict())[0]
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("algo", ["td3", "ddpg"])
def test_a_training_stopped_and_resumed_equals_an_uninterrupted_one(tmp_path, algo):
    settings = SMALL | {"update_every": 3, "eval_every": 0, "checkpoint_every": 10_000}
    ctrlrl.train(algo, "Pendulum-v1", out=str(tmp_path / "whole"), **settings | {"steps": 150})
    ctrlrl.train(algo, "Pendulum-v1", out=str(tmp_path / "parts"), **settings | {"steps": 97})
    ctrlrl.resume(tmp_path / "parts", steps=150, quiet=True)
    left, right = (load_checkpoint(RunFolder(tmp_path / name).find_checkpoint("last")) for name in ("whole", "parts"))
    assert left["agent"]["updates"] == right["agent"]["updates"] == left["loop"]["updates"] == 90
    left, right = pack(left["agent"])[0], pack(right["agent"])[0]
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@needs_compiler
def test_compiled_updates_equal_eager_ones():
    config = TD3Config(hidden=(32,))
    eager = TD3(OBS, ACT, config, seed=1)
    compiled = TD3(OBS, ACT, TD3Config(**(config.to_dict() | {"execution": "compiled"})), seed=1)
    for i in range(2):
        ours, theirs = compiled.update(make_batch(i, groups=3)), eager.update(make_batch(i, groups=3))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    left, right = pack(compiled.state_dict())[0], pack(eager.state_dict())[0]
    assert all(torch.allclose(left[name].double(), right[name].double(), atol=1e-5) for name in right)


def test_captured_steps_of_both_kinds_equal_eager_ones():
    eager, captured = (TD3(OBS, ACT, TD3Config(hidden=(16,)), seed=1) for _ in range(2))
    captured._steps = {k: Captured(step, captured._changing, rerun) for k, step in captured._steps.items()}
    for i in range(3):
        ours, theirs = captured.update(make_batch(i, groups=3)), eager.update(make_batch(i, groups=3))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left, right = pack(captured.state_dict())[0], pack(eager.state_dict())[0]
    assert all(torch.equal(left[k], right[k]) for k in right)


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        (TD3Config(), gym.spaces.Discrete(3), "TD3 needs continuous actions .* there are sac-discrete and ppo"),
        (DDPGConfig(), gym.spaces.MultiDiscrete([3, 2]), "DDPG needs continuous actions .* for which there is ppo"),
        (TD3Config(), gym.spaces.Box(-np.inf, np.inf, (2,)), "TD3 needs finite action bounds"),
    ],
)
def test_unsuitable_action_spaces(config, space, message):
    with pytest.raises(UsageError, match=message):
        TD3(OBS, space, config)


def test_ddpg_is_td3_with_one_critic_and_nothing_to_smooth_or_delay():
    c = DDPGConfig()
    assert (c.num_critics, c.policy_delay, c.target_noise) == (1, 1, 0.0)
    changed = {k for k, v in c.to_dict().items() if v != TD3Config().to_dict()[k]}
    assert changed == {"num_critics", "policy_delay", "target_noise", "tau"}
