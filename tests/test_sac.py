"""SAC: one update against a float64 reference and against Stable-Baselines3, and learning on probe environments."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.errors import UsageError
from ctrlrl.replay.batch import Batch

OBS = gym.spaces.Box(-np.inf, np.inf, (5,))
ACT = gym.spaces.Box(np.float32([-0.4, 0.0]), np.float32([0.4, 3.0]))


def make_batch(seed: int = 0, size: int = 32, groups: int = 1, obs: int = 5, act=ACT) -> Batch:
    g = torch.Generator().manual_seed(seed)
    shape = (groups, size)
    low, high = torch.as_tensor(act.low), torch.as_tensor(act.high)
    none: dict = {}
    return Batch(
        obs=torch.randn(*shape, obs, generator=g),
        action=low + torch.rand(*shape, *act.shape, generator=g) * (high - low),
        reward=torch.randn(shape, generator=g),
        discount=0.99 * (torch.rand(shape, generator=g) > 0.2).float(),
        next_obs=torch.randn(*shape, obs, generator=g),
        end=torch.zeros(shape, dtype=torch.bool),
        index=torch.zeros(shape, dtype=torch.int64),
        extras=none,
        next_extras=none,
    )


class Adam64:
    """Adam as in the paper, Algorithm 1 of Kingma and Ba, in float64."""

    def __init__(self, lr: float, eps: float = 1e-8) -> None:
        self.lr, self.eps, self.t, self.moments = lr, eps, 0, {}

    def step(self, params: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.t += 1
        out = {}
        for name, p in params.items():
            m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = 0.9 * m + 0.1 * grads[name], 0.999 * v + 0.001 * grads[name] ** 2
            self.moments[name] = (m, v)
            out[name] = p - self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + self.eps)
        return out


class Reference:
    """The same update written out once more: separate critics, explicit sums, float64, no code of ours."""

    def __init__(self, agent: SAC) -> None:
        double = {k: v.detach().double() for k, v in agent.policy.trunk.state_dict().items()}
        self.actor = {k: v.clone() for k, v in double.items()}
        self.critics = [self._member(agent.critics, k) for k in range(2)]
        self.targets = [self._member(agent.target_critics, k) for k in range(2)]
        self.log_alpha = agent.log_alpha.detach().double().clone()
        self.low, self.high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
        self.optimizers = [Adam64(3e-4) for _ in range(4)]

    @staticmethod
    def _member(critics, k):
        return {n: v.detach()[k].double().clone() for n, v in critics.ensemble.layers.state_dict().items()}

    @staticmethod
    def actor_net(p, x):
        h = torch.relu(x @ p["0.weight"].T + p["0.bias"])
        h = torch.relu(h @ p["2.weight"].T + p["2.bias"])
        out = h @ p["4.weight"].T + p["4.bias"]
        return out[:, :2], out[:, 2:].clamp(-20, 2)

    @staticmethod
    def critic_net(p, x):
        h = torch.relu(x @ p["0.weight"] + p["0.bias"])
        h = torch.relu(h @ p["2.weight"] + p["2.bias"])
        return (h @ p["4.weight"] + p["4.bias"])[:, 0]

    def sample(self, params, obs, noise):
        mean, log_std = self.actor_net(params, obs)
        u = mean + log_std.exp() * noise
        normal = torch.distributions.Normal(mean, log_std.exp())
        squash = torch.log(1 - torch.tanh(u) ** 2)
        return torch.tanh(u), (normal.log_prob(u) - squash).sum(1)

    def update(self, batch: Batch, noise: torch.Tensor) -> None:
        obs, next_obs, noise = batch.obs.double(), batch.next_obs.double(), noise.double()
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        alpha = self.log_alpha.exp()

        actor = {k: v.clone().requires_grad_() for k, v in self.actor.items()}
        action, log_prob = self.sample(actor, obs, noise[0])
        gradient = -(log_prob.detach() - 2.0).mean()
        new_log_alpha = self.optimizers[3].step({"a": self.log_alpha}, {"a": gradient})["a"]

        with torch.no_grad():
            next_action, next_log_prob = self.sample(self.actor, next_obs, noise[1])
            x = torch.cat([next_obs, next_action], 1)
            value = torch.minimum(*(self.critic_net(t, x) for t in self.targets)) - alpha * next_log_prob
            y = batch.reward.double() + batch.discount.double() * value
        for k in range(2):
            p = {n: v.clone().requires_grad_() for n, v in self.critics[k].items()}
            loss = ((self.critic_net(p, torch.cat([obs, stored], 1)) - y) ** 2).mean() / 2
            grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
            self.critics[k] = self.optimizers[k].step(self.critics[k], grads)

        x = torch.cat([obs, action], 1)
        loss = (alpha * log_prob - torch.minimum(*(self.critic_net(c, x) for c in self.critics))).mean()
        grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
        self.actor = self.optimizers[2].step(self.actor, grads)
        self.log_alpha = new_log_alpha
        for t, c in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + 0.005 * (c[n] - t[n])


def test_one_update_and_five_equal_the_float64_reference():
    agent = SAC(OBS, ACT, SACConfig(hidden=(32, 32)), seed=3)
    reference = Reference(agent)
    for i in range(5):
        batch = make_batch(i)[0]
        noise = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(100 + i))
        agent.step(batch, noise)
        reference.update(batch, noise)
        for name, value in agent.policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), reference.actor[name], atol=2e-6), (i, name)
        for k in range(2):
            for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
                for name, value in Reference._member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=2e-6), (i, k, name)
        assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-7)


def test_one_update_equals_stable_baselines3_on_the_same_weights_batch_and_noise(monkeypatch):
    import stable_baselines3 as sb3
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    env = gym.make("Pendulum-v1")
    theirs = sb3.SAC("MlpPolicy", env, policy_kwargs={"net_arch": [32, 32]}, batch_size=64, seed=0, device="cpu")
    agent = SAC(env.observation_space, env.action_space, SACConfig(hidden=(32, 32), batch_size=64))
    trunk, actor = agent.policy.trunk, theirs.actor
    with torch.no_grad():
        for ours, layer in ((trunk[0], actor.latent_pi[0]), (trunk[2], actor.latent_pi[2])):
            ours.weight.copy_(layer.weight)
            ours.bias.copy_(layer.bias)
        trunk[4].weight.copy_(torch.cat([actor.mu.weight, actor.log_std.weight]))
        trunk[4].bias.copy_(torch.cat([actor.mu.bias, actor.log_std.bias]))
        for ours, critic in ((agent.critics, theirs.critic), (agent.target_critics, theirs.critic_target)):
            for k, q in enumerate(critic.q_networks):
                for i in (0, 2, 4):
                    ours.ensemble.layers[i].weight[k].copy_(q[i].weight.T)
                    ours.ensemble.layers[i].bias[k].copy_(q[i].bias[None])

    batch = make_batch(size=64, obs=3, act=env.action_space)[0]
    noise = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(5))
    draws = iter(noise)
    monkeypatch.setattr(
        torch.distributions.Normal, "rsample", lambda self, shape=(): self.loc + self.scale * next(draws)
    )
    sample = ReplayBufferSamples(
        batch.obs, batch.action / 2, batch.next_obs, 1 - batch.discount[:, None] / 0.99, batch.reward[:, None]
    )
    monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *a, **k: sample)
    from stable_baselines3.common.logger import configure

    theirs.set_logger(configure(None, []))
    theirs.train(gradient_steps=1, batch_size=64)
    agent.step(batch, noise)

    close = {"atol": 3e-6, "rtol": 0}  # their log-density has +1e-6 inside the logarithm
    assert torch.allclose(trunk[2].weight, actor.latent_pi[2].weight, **close)
    assert torch.allclose(trunk[4].weight, torch.cat([actor.mu.weight, actor.log_std.weight]), **close)
    for ours, critic in ((agent.critics, theirs.critic), (agent.target_critics, theirs.critic_target)):
        for k, q in enumerate(critic.q_networks):
            for i in (0, 2, 4):
                assert torch.allclose(ours.ensemble.layers[i].weight[k], q[i].weight.T, **close)
    assert agent.log_alpha.item() == pytest.approx(theirs.log_ent_coef.item(), abs=1e-7)
    before = SAC(env.observation_space, env.action_space, SACConfig(hidden=(32, 32))).critics.ensemble.layers[2].weight
    assert not torch.allclose(agent.critics.ensemble.layers[2].weight, before)


# Probe environments, in the spirit of andyljones.com/posts/rl-debugging: each fails for one kind of mistake.


def probe(reward, discount: float, *, make=SAC, next_obs=None, updates: int = 400, **settings) -> SAC:
    """Train on batches from a made-up environment: observation -1 or 1, action in [-0.4, 0.4]."""
    act = gym.spaces.Box(-0.4, 0.4, (1,))
    fields = {
        "hidden": (64, 64),
        "actor_lr": 3e-3,
        "critic_lr": 3e-3,
        "tau": 0.05,
        "initial_alpha": 1e-3,
        "alpha_lr": 0.0,
    }
    agent = make(gym.spaces.Box(-1, 1, (1,)), act, make.config_class(**fields | settings))
    g = torch.Generator().manual_seed(0)
    for _ in range(updates):
        obs = torch.randint(0, 2, (1, 64, 1), generator=g).float() * 2 - 1
        action = torch.rand(1, 64, 1, generator=g) * 0.8 - 0.4
        following = obs if next_obs is None else next_obs(obs)
        flag = torch.zeros(1, 64, dtype=torch.bool)
        r = reward(obs, action).squeeze(-1)
        agent.update(Batch(obs, action, r, torch.full((1, 64), discount), following, flag, flag.long(), {}, {}))
    return agent


def q_of(agent: SAC, obs: float, action: float = 0.0) -> float:
    unit = agent.policy.scaling.to_unit(torch.tensor([[action]]))
    return agent.critics(torch.tensor([[obs]]), unit).mean().item()


def test_probe_a_constant_reward_is_valued_one():
    agent = probe(lambda o, a: torch.ones_like(o), 0.0)
    assert q_of(agent, 1.0) == pytest.approx(1, abs=0.05)


def test_probe_an_observation_dependent_reward_is_told_apart():
    agent = probe(lambda o, a: o, 0.0)
    assert q_of(agent, 1.0) == pytest.approx(1, abs=0.1)
    assert q_of(agent, -1.0) == pytest.approx(-1, abs=0.1)


def test_probe_a_delayed_reward_is_discounted_once():
    # From -1 one comes to 1 with reward 0; from 1 the episode would go on in 1 with reward 1: values 1/(1-g), g/(1-g).
    agent = probe(lambda o, a: (o > 0).float(), 0.5, next_obs=torch.ones_like, updates=600)
    assert q_of(agent, 1.0) == pytest.approx(2, abs=0.2)
    assert q_of(agent, -1.0) == pytest.approx(1, abs=0.2)


def test_probe_a_zero_discount_stops_the_bootstrap():
    alive, dead = (probe(lambda o, a: torch.ones_like(o), d, updates=200) for d in (0.5, 0.0))
    assert q_of(alive, 1.0) > q_of(dead, 1.0) + 0.4


def test_probe_the_policy_follows_the_action_that_pays_within_any_bounds():
    agent = probe(lambda o, a: o * a / 0.4, 0.0)
    action, _, _ = agent.policy.act(torch.tensor([[1.0], [-1.0]]))
    assert action[0].item() > 0.3
    assert action[1].item() < -0.3
    assert action.abs().max() <= 0.4


def test_probe_the_temperature_reaches_the_target_entropy():
    # No reward: the policy spreads out, the temperature falls until the entropy meets the target.
    agent = probe(
        lambda o, a: torch.zeros_like(o), 0.0, updates=1500, alpha_lr=1e-2, initial_alpha=1.0, target_entropy=-0.5
    )
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    entropy = -agent.policy.distribution(torch.ones(4000, 1)).rsample(noise)[1].mean().item()
    assert entropy > -0.6  # with nothing to gain the constraint E[-log pi] >= target holds
    assert agent.log_alpha.item() < math.log(0.5)


def test_same_seed_same_bits_and_groups_equal_single_steps():
    a, b, c = (SAC(OBS, ACT, SACConfig(hidden=(16,)), seed=s) for s in (7, 7, 8))
    batch = make_batch(groups=4)
    for agent in (a, b, c):
        agent.update(batch)
    assert all(torch.equal(x, y) for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True))
    assert not torch.equal(next(a.policy.parameters()), next(c.policy.parameters()))

    d = SAC(OBS, ACT, SACConfig(hidden=(16,)), seed=7)
    noise = torch.randn(4, 2, 32, 2, generator=torch.Generator().manual_seed(7))
    for g in range(4):
        d.step(batch[g], noise[g])
    assert all(torch.equal(x, y) for x, y in zip(a.critics.parameters(), d.critics.parameters(), strict=True))


def test_state_dict_continues_bit_for_bit():
    config = SACConfig(hidden=(16,), normalize_obs=True, layer_norm=True)
    a = SAC(OBS, ACT, config, seed=1)
    a.observe(torch.randn(50, 5) * 3 + 1, torch.ones(50, dtype=torch.bool))
    a.update(make_batch(groups=3))
    b = SAC(OBS, ACT, config, seed=2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, b):
        agent.update(make_batch(9, groups=3))
    from ctrlrl.runs.checkpoint import pack

    left, right = pack(a.state_dict())[0], pack(b.state_dict())[0]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_the_policy_loss_leaves_the_critics_alone():
    agent = SAC(OBS, ACT, SACConfig(hidden=(16,)))
    critics, actor = copy.deepcopy(agent._critic), copy.deepcopy(agent.actor_parameters())
    obs = torch.randn(8, 5)
    action, log_prob, _ = agent.policy.distribution(obs).rsample(torch.zeros(8, 2))
    agent.actor_optimizer.descend((log_prob.sum(-1) - agent.critics(obs, action).amin(0)).mean())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(critics, agent._critic, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(actor, agent.actor_parameters(), strict=True))


def test_privileged_observations_reach_the_critics_only():
    space = gym.spaces.Dict({"policy": gym.spaces.Box(-1, 1, (3,)), "privileged": gym.spaces.Box(-1, 1, (2,))})
    agent = SAC(space, ACT, SACConfig(hidden=(16,)))
    assert agent.policy.encoder.out_features == 3
    assert agent.critics.encoder.out_features == 5
    obs = {"policy": torch.rand(4, 3), "privileged": torch.rand(4, 2)}
    other = obs | {"privileged": torch.rand(4, 2)}
    assert torch.equal(agent.policy.act(obs)[0], agent.policy.act(other)[0])
    unit = torch.zeros(4, 2)
    assert not torch.equal(agent.critics(obs, unit), agent.critics(other, unit))


def test_custom_network_and_encoder():
    class Conv(nn.Module):
        def __init__(self, space):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(space.shape[0], 4, 3, 2), nn.ReLU(), nn.Flatten())

        def forward(self, obs):
            return self.net(obs.float() / 255)

    space = gym.spaces.Box(0, 255, (3, 12, 12), np.uint8)
    with pytest.raises(UsageError, match="an image of 12 x 12 pixels"):
        SAC(space, ACT)
    agent = SAC(
        space,
        ACT,
        encoder=Conv,
        network=lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, o)),
    )
    assert agent.policy.encoder.out_features == 100
    weights = {k: v.clone() for k, v in agent.critics.named_parameters()}
    pixels = torch.randint(0, 256, (1, 6, 3, 12, 12), dtype=torch.uint8)
    base = make_batch(size=6)
    agent.update(Batch(pixels, base.action, base.reward, base.discount, pixels, base.end, base.index, {}, {}))
    assert all(not torch.equal(v, weights[k]) for k, v in agent.critics.named_parameters())
    first = agent.critics(pixels[0], torch.zeros(6, 2))
    assert not torch.allclose(first[0], first[1])  # ensemble members are independent


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (gym.spaces.Discrete(3), "SAC needs continuous actions"),
        (gym.spaces.MultiDiscrete([3, 2]), "SAC needs continuous actions"),
        (gym.spaces.Box(-np.inf, np.inf, (2,)), "SAC needs finite action bounds"),
        (gym.spaces.Box(1.0, 1.0, (2,)), "SAC needs low < high"),
    ],
)
def test_unsuitable_action_spaces(space, message):
    with pytest.raises(UsageError, match=message):
        SAC(OBS, space)


def test_a_network_of_the_wrong_shape_is_named():
    with pytest.raises(UsageError, match=r"network\(5, 4\) must map \(B, 5\) to \(B, 4\)"):
        SAC(OBS, ACT, network=lambda i, o: nn.Linear(i, o + 1))
