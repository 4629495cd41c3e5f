"""IQL: updates against a float64 reference, its limits, its two ways to make a policy, the schedule, stitching."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from ctrlrl.algorithms.iql import IQL, expectile_loss
from ctrlrl.algorithms.iql_config import IQLConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured
from ctrlrl.replay.batch import Batch
from tests.agents import assert_compiled_equals_eager, assert_same_state, assert_state_dict_continues
from tests.test_execution import needs_compiler, rerun
from tests.test_sac import ACT, OBS, Adam64, make_batch
from tests.test_symmetry import ACTION, OBSERVATION, boxes, reflect

BOTH = pytest.mark.parametrize("extraction", ["awr", "ddpg+bc"])


def double(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().clone() for name, value in module.state_dict().items()}


class Reference:
    """The same update written out once more: networks one by one, row by row, float64, no code of ours."""

    def __init__(self, agent: IQL) -> None:
        self.c = agent.config
        self.actor = double(agent.policy.trunk) | {"log_std": agent.policy.log_std.detach().double().clone()}
        self.v = double(agent.value.trunk)
        self.critics, self.targets = (
            [self.member(c, k) for k in range(2)] for c in (agent.critics, agent.target_critics)
        )
        self.low, self.high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
        self.value_optimizer, self.actor_optimizer = Adam64(3e-4), Adam64(3e-4)
        self.critic_optimizers = [Adam64(3e-4), Adam64(3e-4)]
        self.improved = 0

    @staticmethod
    def member(critics, k):
        """The k-th critic, with weights as those of `nn.Linear`."""
        state = critics.ensemble.layers.state_dict().items()
        return {
            n: v.detach()[k].double().T.clone() if n.endswith("weight") else v.detach()[k, 0].double() for n, v in state
        }

    @staticmethod
    def net(p, x):
        for i in (0, 2, 4):
            x = x @ p[f"{i}.weight"].T + p[f"{i}.bias"]
            x = torch.relu(x) if i < 4 else x
        return x

    def descend(self, optimizer, params, loss):
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        filled = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}
        return optimizer.step({n: p.detach() for n, p in params.items()}, filled)

    def update(self, batch: Batch) -> None:
        c = self.c
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        x = torch.cat([obs, stored], 1)
        best = torch.minimum(*(self.net(t, x)[:, 0] for t in self.targets))
        y = batch.reward.double() + batch.discount.double() * self.net(self.v, next_obs)[:, 0]
        advantage = best - self.net(self.v, obs)[:, 0]

        v = {n: p.clone().requires_grad_() for n, p in self.v.items()}
        u = best - self.net(v, obs)[:, 0]
        loss = torch.stack([(c.expectile if one > 0 else 1 - c.expectile) * one**2 for one in u]).mean()
        self.v = self.descend(self.value_optimizer, v, loss)
        for k in range(2):
            p = {n: w.clone().requires_grad_() for n, w in self.critics[k].items()}
            loss = ((self.net(p, x)[:, 0] - y) ** 2).mean()
            self.critics[k] = self.descend(self.critic_optimizers[k], p, loss)

        actor = {n: p.clone().requires_grad_() for n, p in self.actor.items()}
        mean, std = torch.tanh(self.net(actor, obs)), actor["log_std"].exp()
        if c.extraction == "awr":
            log_prob = torch.distributions.Normal(mean, std).log_prob(stored).sum(1)
            loss = -(torch.exp(c.beta * advantage).clamp(max=c.max_weight) * log_prob).mean()
        else:
            q = torch.minimum(*(self.net(p, torch.cat([obs, mean], 1))[:, 0] for p in self.critics))
            unit = torch.distributions.Normal(mean, 1.0).log_prob(stored).sum(1)
            spread = torch.distributions.Normal(mean.detach(), std).log_prob(stored).sum(1)
            loss = -q.mean() / q.detach().abs().mean() - c.bc_weight * unit.mean() - spread.mean()
        progress = min(self.improved / c.actor_lr_steps, 1)
        self.actor_optimizer.lr = c.actor_lr * (1 + math.cos(math.pi * progress)) / 2
        self.actor = self.descend(self.actor_optimizer, actor, loss)
        self.actor["log_std"] = self.actor["log_std"].clamp(*c.log_std_bounds)
        self.improved += 1
        for t, p in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + 0.005 * (p[n] - t[n])


@BOTH
def test_one_update_and_six_equal_the_float64_reference(extraction):
    settings = IQLConfig(hidden=(32, 32), extraction=extraction, actor_lr_steps=4, expectile=0.8, max_weight=1.2)
    agent = IQL(OBS, ACT, settings, seed=3)
    with torch.no_grad():  # away from the critics, so that advantages are large and some weights at their bound
        for target in agent.target_critics.parameters():
            target.mul_(2)
    reference = Reference(agent)
    for i in range(6):
        metrics = agent.step(make_batch(i)[0])
        reference.update(make_batch(i)[0])
        assert extraction == "ddpg+bc" or 0 < metrics["weight_clipped"] < 1
        ours = double(agent.policy.trunk) | {"log_std": agent.policy.log_std.detach().double()}
        for name, value in ours.items():
            assert torch.allclose(value, reference.actor[name], atol=2e-6), (i, name)
        for name, value in double(agent.value.trunk).items():
            assert torch.allclose(value, reference.v[name], atol=2e-6), (i, name)
        for k in range(2):
            for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
                for name, value in Reference.member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=2e-6), (i, k, name)
    assert metrics["actor_lr"] == 0  # after four of six


def test_the_expectile_loss_by_hand_and_at_one_half():
    error = torch.tensor([2.0, -2.0, 0.0])
    assert expectile_loss(error, 0.9).tolist() == pytest.approx([3.6, 0.4, 0.0])
    assert torch.allclose(expectile_loss(error, 0.5), error.square() / 2)


@pytest.mark.parametrize(("expectile", "expected"), [(0.5, 1.0), (0.9, 15 / 7), (0.999, 3 / 1.004), (0.1, 0.2)])
def test_its_minimum_by_hand(expectile, expected):
    """Of Q = 0, 0, 0, 1, 2, 3: where tau E[(Q - V)+] = (1 - tau) E[(V - Q)+]; at 1/2 that is the mean."""
    v = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    expectile_loss(q - v, expectile).sum().backward()
    assert v.grad.item() == pytest.approx(0, abs=1e-6)


def learned_v(expectile: float) -> float:
    """V of the one state whose data's actions -0.8, 0, 0.8 earn 0, 1 and 2."""
    settings = IQLConfig(hidden=(32,), critic_lr=3e-3, tau=0.1, expectile=expectile)
    agent = IQL(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,)), settings)
    kind, flag = torch.arange(96).reshape(1, 96) % 3, torch.zeros(1, 96, dtype=torch.bool)
    obs, action = torch.ones(1, 96, 1), (kind[..., None] - 1) * 0.8
    batch = Batch(obs, action, kind.float(), torch.zeros(1, 96), obs, flag, flag.long(), {}, {})
    for _ in range(500):
        agent.update(batch)
    return agent.value(obs[0])[0].item()


def test_v_is_the_mean_at_one_half_and_near_the_best_at_one():
    assert learned_v(0.5) == pytest.approx(1.0, abs=0.05)
    assert learned_v(0.99) == pytest.approx(2.0, abs=0.1)
    assert learned_v(0.01) == pytest.approx(0.0, abs=0.1)


def test_without_beta_it_clones():
    agent = IQL(OBS, ACT, IQLConfig(hidden=(16,), beta=0.0), seed=1)
    batch = make_batch()[0]
    unit = agent.policy.scaling.to_unit(batch.action)
    mean = agent.policy.distribution(batch.obs).mean
    expected = (0.5 * (unit - mean) ** 2 + 0.5 * math.log(2 * math.pi)).sum(1).mean()  # a standard deviation of 1
    metrics = agent.step(batch)
    assert metrics["actor_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["weight_mean"] == 1 and metrics["weight_clipped"] == 0


def test_weights_by_hand_are_at_most_their_bound():
    agent = IQL(OBS, ACT, IQLConfig(beta=2.0))
    advantage, log_prob = torch.tensor([-1.0, 0.5, 1e4]), torch.tensor([-3.0, 2.0, 1.0])
    loss, metrics = agent.weigh(advantage, log_prob)
    assert loss.item() == pytest.approx(-(math.exp(-2) * -3 + math.exp(1) * 2 + 100) / 3, rel=1e-6)
    assert metrics["weight_clipped"].item() == pytest.approx(1 / 3)


PARTS = {
    "value": ("value", "critics", "target_critics", "value_optimizer", "critic_optimizer"),
    "policy": ("policy", "actor_optimizer", "actor_lr"),
}


@pytest.mark.parametrize("learn", ["value", "policy"])
@BOTH
def test_one_half_alone_moves_as_it_does_with_the_other(learn, extraction):
    """And leaves the other one alone, bit for bit."""
    settings = IQLConfig(hidden=(16,), extraction=extraction)
    both, alone = (IQL(OBS, ACT, replace(settings, learn=which), seed=1) for which in ("both", learn))
    before = {name: copy.deepcopy(part) for name, part in alone.state_dict().items()}
    metrics = alone.update(make_batch(groups=2))
    both.update(make_batch(groups=2))
    assert ("value_loss" in metrics, "actor_loss" in metrics) == (learn == "value", learn == "policy")

    def flat(part):
        values = part.values() if isinstance(part, dict) else [part]
        return [x for value in values for x in (value if isinstance(value, list) else [value])]

    for half, names in PARTS.items():
        for name in names:
            then, now, other = (flat(s[name]) for s in (before, alone.state_dict(), both.state_dict()))
            pairs = zip(now, other if half == learn == "value" else then, strict=True)
            if half == learn == "policy":
                assert name == "actor_lr" or not all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
            else:
                assert all(torch.equal(a, b) for a, b in pairs), name


def test_the_step_size_goes_on_where_a_run_was_stopped():
    settings = IQLConfig(hidden=(16,), actor_lr=1e-2, actor_lr_steps=8, policy_delay=2)
    whole, parts = (IQL(OBS, ACT, settings, seed=1) for _ in range(2))
    seen = [whole.update(make_batch(i, groups=2))["actor_lr"].item() for i in range(10)]
    # Improved once in two updates: by 0, 1, ... 9 steps before; at 8 and later it stands.
    expected = [1e-2 * (1 + math.cos(math.pi * min(i, 8) / 8)) / 2 for i in range(10)]
    assert seen == pytest.approx(expected, abs=1e-8)
    for i in range(3):
        parts.update(make_batch(i, groups=2))
    resumed = IQL(OBS, ACT, settings, seed=5)
    resumed.load_state_dict(copy.deepcopy(parts.state_dict()))
    for i in range(3, 10):
        resumed.update(make_batch(i, groups=2))
    assert_same_state(resumed, whole)


def test_a_constant_step_size():
    agent = IQL(OBS, ACT, IQLConfig(hidden=(16,), actor_lr_steps=0))
    assert agent.update(make_batch(groups=3))["actor_lr"].item() == pytest.approx(3e-4)


def test_captured_steps_equal_eager_ones_with_the_schedule():
    settings = IQLConfig(hidden=(16,), actor_lr_steps=4)
    eager, captured = IQL(OBS, ACT, settings, seed=1), IQL(OBS, ACT, settings, seed=1)
    step = Captured(captured.step, captured._changing, rerun)
    for i in range(5):
        theirs, ours = eager.step(make_batch(i)[0]), step(make_batch(i)[0], None)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_same_state(captured, eager)


@needs_compiler
@BOTH
def test_compiled_updates_equal_eager_ones(extraction):
    assert_compiled_equals_eager(IQL, extraction=extraction, actor_lr_steps=3, layer_norm=True)


@BOTH
@pytest.mark.parametrize("learn", ["both", "value", "policy"])
def test_updates_in_bfloat16(extraction, learn):
    agent = IQL(OBS, ACT, IQLConfig(hidden=(32, 32), extraction=extraction, learn=learn, precision="bfloat16"))
    metrics = agent.update(make_batch(groups=2))
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in metrics.values())


@BOTH
def test_same_seed_same_bits_and_groups_equal_single_steps(extraction):
    settings = IQLConfig(hidden=(16,), extraction=extraction)
    a, b, c = (IQL(OBS, ACT, settings, seed=s) for s in (7, 7, 8))
    batch = make_batch(groups=4)
    a.update(batch)
    for g in range(4):
        b.step(batch[g])
    assert all(torch.equal(x, y) for x, y in zip(a._changing(), b._changing(), strict=True))
    assert not torch.equal(a.policy.trunk[0].weight, c.policy.trunk[0].weight)


def test_state_dict_continues_bit_for_bit():
    assert_state_dict_continues(IQL, actor_lr_steps=4)


# Learning.


def chain(settings: IQLConfig, updates: int) -> tuple[IQL, float]:
    """Train on a chain of which no episode of the data has seen the whole; returns what the policy earns.

    From the start (0) an action above 0 leads to the middle (1), one below ends with 0.3; in the middle one above 0
    ends with 1, one below with 0. In the data no episode that began at 0 earned 1, and most actions are below 0.
    """
    agent = IQL(gym.spaces.Box(0, 1, (2,)), gym.spaces.Box(-2.0, 2.0, (1,)), settings, seed=1)
    g = torch.Generator().manual_seed(0)
    for _ in range(updates):
        middle = torch.rand(1, 128, generator=g) < 0.5
        up = torch.rand(1, 128, generator=g) < 0.25
        action = torch.where(up, 1.2, -1.2) + 0.3 * torch.randn(1, 128, generator=g)
        reward = torch.where(middle, up.float(), torch.where(up, 0.0, 0.3))
        goes_on = ~middle & up
        obs = nn.functional.one_hot(middle.long(), 2).float()
        next_obs = nn.functional.one_hot(torch.ones_like(middle).long(), 2).float()
        discount = 0.9 * goes_on.float()
        agent.update(Batch(obs, action[..., None], reward, discount, next_obs, ~goes_on, middle.long(), {}, {}))
    first, second = agent.policy.act(torch.eye(2))[0][:, 0].tolist()
    if first < 0:
        return agent, 0.3
    return agent, 1.0 if second > 0 else 0.0


FAST = IQLConfig(hidden=(64, 64), actor_lr=2e-3, critic_lr=2e-3, tau=0.05, expectile=0.9, beta=10.0, actor_lr_steps=600)


@BOTH
def test_it_stitches_what_no_episode_shows_where_cloning_fails(extraction):
    agent, earned = chain(replace(FAST, extraction=extraction), 600)
    assert earned == 1.0
    assert agent.value(torch.eye(2))[1].item() == pytest.approx(0.75, abs=0.08)  # 0.9 / 4 (1 - V) = 0.1 * 3 / 4 V
    _, cloned = chain(replace(FAST, beta=0.0), 600)
    assert cloned == 0.3


def test_a_policy_is_made_of_values_that_were_learned_before():
    values, _ = chain(replace(FAST, learn="value"), 400)
    for extraction in ("awr", "ddpg+bc"):
        settings = replace(FAST, learn="policy", extraction=extraction)
        later = IQL(gym.spaces.Box(0, 1, (2,)), gym.spaces.Box(-2.0, 2.0, (1,)), settings, seed=2)
        for name in ("critics", "target_critics", "value"):
            getattr(later, name).load_state_dict(getattr(values, name).state_dict())
        g = torch.Generator().manual_seed(0)
        for _ in range(300):
            middle, up = torch.rand(1, 128, generator=g) < 0.5, torch.rand(1, 128, generator=g) < 0.25
            obs = nn.functional.one_hot(middle.long(), 2).float()
            action = torch.where(up, 1.2, -1.2)[..., None] + 0.3 * torch.randn(1, 128, 1, generator=g)
            nothing = torch.zeros(1, 128)
            later.update(Batch(obs, action, nothing, nothing, obs, middle, middle.long(), {}, {}))
        assert (later.policy.act(torch.eye(2))[0] > 0).all()


def test_the_deviation_is_fitted_to_the_data_and_bounded():
    obs, act = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (2,))
    for extraction in ("awr", "ddpg+bc"):
        settings = IQLConfig(hidden=(16,), beta=0.0, actor_lr=2e-2, extraction=extraction, bc_weight=100.0)
        agent = IQL(obs, act, replace(settings, actor_lr_steps=400, log_std_bounds=(-2.0, 2.0)))
        g = torch.Generator().manual_seed(0)
        for _ in range(400):
            seen, nothing = torch.ones(1, 256, 1), torch.zeros(1, 256)
            action = torch.stack([0.3 + 0.2 * torch.randn(1, 256, generator=g), torch.full((1, 256), 0.5)], -1)
            agent.update(Batch(seen, action, nothing, nothing, seen, nothing.bool(), nothing.long(), {}, {}))
        assert agent.policy.log_std[0].exp().item() == pytest.approx(0.2, abs=0.02)
        assert agent.policy.log_std[1].item() == -2  # of an action without noise it would go on falling
        if extraction == "awr":
            assert agent.policy.act(torch.ones(1, 1))[0][0].tolist() == pytest.approx([0.3, 0.5], abs=0.05)
    grad = torch.autograd.grad(
        agent.policy.distribution(torch.ones(1, 1)).log_prob(torch.ones(1, 2)).sum(), agent.policy.log_std
    )
    assert (grad[0] != 0).all()  # at the bound it can leave


# The policy and the networks.


def test_the_policy_acts_by_its_mean_and_explores_within_the_bounds():
    agent = IQL(OBS, ACT, IQLConfig(hidden=(16,)))
    obs = torch.randn(500, 5)
    action, state, extras = agent.policy.act(obs)
    assert torch.equal(action, agent.policy.scaling.to_environment(agent.policy.distribution(obs).mean))
    assert state == {} and extras == {}
    explored = agent.policy.act(obs, explore=True)[0]
    assert (explored >= torch.as_tensor(ACT.low)).all() and (explored <= torch.as_tensor(ACT.high)).all()
    assert (explored == torch.as_tensor(ACT.high)).any() and not torch.equal(explored, action)


def test_mirrored_observations_lead_to_mirrored_actions_and_deviations():
    agent = IQL(*boxes(), seed=1)
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([-1.0, 0.5, 0.2]))
    obs = torch.randn(50, 4)
    one, other = agent.policy.distribution(obs), agent.policy.distribution(reflect(obs, OBSERVATION))
    torch.testing.assert_close(other.mean, reflect(one.mean, ACTION), atol=1e-5, rtol=1e-5)
    assert one.log_std.tolist() == pytest.approx([-0.25, -0.25, 0.2])


def test_only_the_critics_loss_trains_convolutions():
    space = gym.spaces.Dict({"eye": gym.spaces.Box(0, 255, (48, 48, 3), np.uint8), "x": gym.spaces.Box(-1, 1, (2,))})
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 1, 8, 48, 48, 3), generator=g, dtype=torch.uint8)
    base = make_batch(size=8)
    obs, next_obs = ({"eye": eye, "x": torch.randn(1, 8, 2, generator=g)} for eye in pixels)
    batch = Batch(obs, base.action, base.reward, base.discount, next_obs, base.end, base.index, {}, {})
    for learn, moves in (("both", True), ("policy", False)):
        agent = IQL(space, ACT, IQLConfig(hidden=(16,), learn=learn))
        convolution = agent.critics.encoder.convolutions
        assert agent.policy.encoder.convolutions["eye"] is agent.value.encoder.convolutions["eye"] is convolution["eye"]
        own = {id(p) for part in (agent.actor_optimizer, agent.value_optimizer) for p in part.parameters}
        assert own.isdisjoint(id(p) for p in convolution.parameters())
        before = [p.detach().clone() for p in convolution.parameters()]
        assert all(bool(value.isfinite()) for value in agent.update(batch).values())
        assert all(torch.equal(a, b) for a, b in zip(before, convolution.parameters(), strict=True)) != moves
    # The target critics look at the observations themselves, by their own convolutions.
    with torch.no_grad():
        for parameter in agent.target_critics.parameters():
            parameter.mul_(1.1)
    shift = torch.full((2, 8, 2), agent.config.random_shift)  # the middle: as they were
    *_, target_obs = agent.look(batch[0], shift)
    direct = agent.q(agent.target_critics, batch[0].obs, batch[0].action)
    torch.testing.assert_close(agent.q(agent.target_critics, target_obs, batch[0].action), direct)


def test_privileged_observations_reach_the_values_only():
    space = gym.spaces.Dict({"policy": gym.spaces.Box(-1, 1, (3,)), "privileged": gym.spaces.Box(-1, 1, (2,))})
    agent = IQL(space, ACT, IQLConfig(hidden=(16,)))
    assert agent.policy.encoder.out_features == 3
    assert agent.critics.encoder.out_features == agent.value.encoder.out_features == 5


def test_custom_networks():
    def network(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    agent = IQL(OBS, ACT, network=network)
    before = [p.detach().clone() for p in agent._changing()]
    agent.update(make_batch())
    changed = [not torch.equal(a, b) for a, b in zip(before, agent._changing(), strict=True)]
    assert all(changed[: len(list(agent.policy.parameters()))])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expectile", 1.0),
        ("beta", -1.0),
        ("max_weight", 0.0),
        ("actor_lr_steps", -1),
        ("actor_lr_steps", 2**24),
        ("learn", "neither"),
        ("extraction", "sac"),
        ("bc_weight", -0.1),
        ("log_std_bounds", (1.0, 0.0)),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UsageError, match=rf"agent\.{field} must be"):
        IQLConfig(**{field: value})


def test_unsuitable_action_spaces():
    with pytest.raises(UsageError, match="IQL needs continuous actions"):
        IQL(OBS, gym.spaces.Discrete(3))
    with pytest.raises(UsageError, match="IQL needs finite action bounds"):
        IQL(OBS, gym.spaces.Box(-np.inf, np.inf, (2,)))
