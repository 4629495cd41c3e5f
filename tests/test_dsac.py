"""DSAC and DSAC-T: the critics' loss and gradient by hand, updates against a float64 reference, learning."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.dsac import DSAC
from ctrlrl.algorithms.dsac_config import DSACConfig
from ctrlrl.algorithms.dsac_t import DSACT
from ctrlrl.algorithms.dsac_t_config import DSACTConfig
from ctrlrl.errors import UsageError
from tests.agents import assert_compiled_equals_eager, assert_state_dict_continues, assert_training_resumes
from tests.test_execution import needs_compiler
from tests.test_sac import ACT, OBS, Adam64, Reference, make_batch, probe

BOTH = pytest.mark.parametrize("make", [DSAC, DSACT])


def small(make, **settings):
    return make(OBS, ACT, make.config_class(**{"hidden": (16,)} | settings), seed=3)


def gradients(agent, q, std, target, sample):
    """The critics' loss, and its gradients with respect to means and deviations (K, B)."""
    q, std = (torch.tensor(values, requires_grad=True) for values in (q, std))
    loss = agent.critic_loss(q, std, torch.tensor(target), torch.tensor(sample))
    return loss.item(), *(g.tolist() for g in torch.autograd.grad(loss, (q, std)))


def close(rows, expected):
    return all(row == pytest.approx(want, rel=1e-5, abs=1e-6) for row, want in zip(rows, expected, strict=True))


def test_dsacs_loss_by_hand_its_bound_is_the_deviations_alone():
    # b = 3 * mean(0.5, 1.5) = 3; y - Q is 5, bounded to 3, and -0.5. Loss: 25/0.5 + 9/0.5 + log 0.5 = 67.306853,
    # and 0.25/4.5 twice + log 1.5 = 0.516576. dQ = (Q-y)/sigma^2 / 2, dsigma = (1/sigma - d^2/sigma^3) / 2.
    y = [6.0, 1.5]
    loss, to_mean, to_std = gradients(small(DSAC), [[1.0, 2.0]], [[0.5, 1.5]], y, y)
    assert loss == pytest.approx((67.306853 + 0.516576) / 2, abs=1e-4)
    assert close(to_mean, [[-10.0, 0.111111]])
    assert close(to_std, [[-35.0, 0.296296]])


def test_dsac_ts_loss_by_hand_and_its_bound_is_the_deviations_alone():
    # m = (1, 1), the batch means. First critic: dQ = -1.1 * (1/0.35, 0) / 2; sample - Q = (5, -2), bounded to (3, -2):
    # dsigma = -1.1 * ((9 - 0.25)/0.225, (4 - 2.25)/3.475) / 2. Second: dQ = -1.1 * (2, 1)/1.1 / 2; (6, -1) to (3, -1):
    # dsigma = -1.1 * (8/1.1, 0) / 2.
    agent = small(DSACT)
    q, std, target, sample = [[1.0, 2.0], [0.0, 1.0]], [[0.5, 1.5], [1.0, 1.0]], [2.0, 2.0], [6.0, 0.0]
    loss, to_mean, to_std = gradients(agent, q, std, target, sample)
    assert loss == pytest.approx(-12.681341 - 4.5, abs=1e-4)
    assert close(to_mean, [[-1.571429, 0.0], [-1.0, -0.5]])
    assert close(to_std, [[-21.388889, -0.276978], [-4.0, 0.0]])
    # A sample farther away changes nothing, one within the bound the deviation's gradient alone.
    again = gradients(agent, q, std, target, [60.0, 0.0])
    assert close(again[1], to_mean) and close(again[2], to_std)
    nearer = gradients(agent, q, std, target, [2.0, 0.0])
    assert close(nearer[1], to_mean) and nearer[2][0][0] != pytest.approx(to_std[0][0])


def test_the_average_deviation_starts_with_the_first_batchs_and_moves_by_its_rate():
    agent = small(DSACT, std_tau=0.1)
    assert agent.std_average.tolist() == [0, 0]
    q, y = [[0.0, 0.0]] * 2, [0.0, 0.0]
    gradients(agent, q, [[1.0, 3.0], [4.0, 4.0]], y, y)
    assert agent.std_average.tolist() == [2, 4]
    gradients(agent, q, [[1.0, 1.0], [14.0, 14.0]], y, y)
    assert agent.std_average.tolist() == pytest.approx([1.9, 5.0])


def test_the_means_gradient_is_weighted_by_the_variance_against_the_averages():
    # Where sigma is m it is that of half a squared error, elsewhere (m^2 + eps) / (sigma^2 + eps) times as large.
    agent = small(DSACT)
    q, target = [[0.0, 0.0]] * 2, [2.0, 2.0]
    _, same, _ = gradients(agent, q, [[3.0, 3.0], [0.5, 0.5]], target, target)
    assert close(same, [[-1.0, -1.0]] * 2)
    agent.std_average.copy_(torch.tensor([3.0, 3.0]))
    agent.config = DSACTConfig(std_tau=1e-9)
    _, other, _ = gradients(agent, q, [[1.0, 6.0], [3.0, 3.0]], target, target)
    assert close(other, [[-9.1 / 1.1, -9.1 / 36.1], [-1.0, -1.0]])


class DistributionalReference(Reference):
    """Both algorithms in float64, networks one by one, gradients of the critics as the papers write them."""

    def __init__(self, agent):
        members = agent.config.num_critics
        self.twin = isinstance(agent, DSACT)
        self.actor = {k: v.detach().double().clone() for k, v in agent.policy.trunk.state_dict().items()}
        self.target_actor = {k: v.clone() for k, v in self.actor.items()}
        self.critics = [self._member(agent.critics, k) for k in range(members)]
        self.targets = [self._member(agent.target_critics, k) for k in range(members)]
        self.log_alpha = agent.log_alpha.detach().double().clone()
        self.low, self.high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
        self.m = [None] * members
        self.actor_optimizer, self.alpha_optimizer = Adam64(3e-4), Adam64(3e-4)
        self.critic_optimizers = [Adam64(3e-4) for _ in range(members)]
        self.tau = 0.01 if self.twin else 0.005

    def sample(self, params, obs, noise):
        h = torch.relu(obs @ params["0.weight"].T + params["0.bias"])
        h = torch.relu(h @ params["2.weight"].T + params["2.bias"])
        out = h @ params["4.weight"].T + params["4.bias"]
        mean, log_std = out[:, :2], out[:, 2:].clamp(-20, 0.5)
        u = mean + log_std.exp() * noise
        squash = torch.log(1 - torch.tanh(u) ** 2)
        return torch.tanh(u), (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - squash).sum(1)

    @staticmethod
    def moments(p, x):
        h = torch.relu(x @ p["0.weight"] + p["0.bias"])
        h = torch.relu(h @ p["2.weight"] + p["2.bias"])
        out = h @ p["4.weight"] + p["4.bias"]
        return out[:, 0], torch.log1p(out[:, 1].exp())

    def update(self, batch, noise, z, improve):
        obs, next_obs, noise, z = (v.double() for v in (batch.obs, batch.next_obs, noise, z))
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        alpha = self.log_alpha.exp()
        next_action, next_log_prob = self.sample(self.target_actor, next_obs, noise[1])
        means, stds = zip(*(self.moments(t, torch.cat([next_obs, next_action], 1)) for t in self.targets), strict=True)
        if self.twin:
            mean = torch.minimum(*means)
            z_value = torch.where(means[0] < means[1], means[0] + z * stds[0], means[1] + z * stds[1])
        else:
            mean = z_value = means[0] + z * stds[0]
        r, discount = batch.reward.double(), batch.discount.double()
        y, y_z = (r + discount * (value - alpha * next_log_prob) for value in (mean, z_value))
        x, n = torch.cat([obs, stored], 1), len(obs)
        for k, critic in enumerate(self.critics):
            p = {name: v.clone().requires_grad_() for name, v in critic.items()}
            q, std = self.moments(p, x)
            d, s = q.detach(), std.detach()
            if self.twin:
                self.m[k] = s.mean() if self.m[k] is None else 0.995 * self.m[k] + 0.005 * s.mean()
                delta = torch.clip(y_z - d, -3 * self.m[k], 3 * self.m[k])
                weight = self.m[k] ** 2 + 0.1
                to_q = weight * (d - y) / (s**2 + 0.1) / n
                to_std = -weight * (delta**2 - s**2) / (s**3 + 0.1) / n
            else:
                delta = torch.clip(y - d, -3 * s.mean(), 3 * s.mean())
                to_q = (d - y) / s**2 / n
                to_std = (1 / s - delta**2 / s**3) / n
            grads = torch.autograd.grad([q, std], list(p.values()), [to_q, to_std])
            self.critics[k] = self.critic_optimizers[k].step(critic, dict(zip(p, grads, strict=True)))
        if not improve:
            return
        actor = {k: v.clone().requires_grad_() for k, v in self.actor.items()}
        action, log_prob = self.sample(actor, obs, noise[0])
        values = torch.stack([self.moments(c, torch.cat([obs, action], 1))[0] for c in self.critics])
        loss = (alpha * log_prob - values.min(0).values).mean()
        grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
        self.actor = self.actor_optimizer.step(self.actor, grads)
        gradient = -(log_prob.detach() - 2.0).mean()
        self.log_alpha = self.alpha_optimizer.step({"a": self.log_alpha}, {"a": gradient})["a"]
        pairs = [(self.target_actor, self.actor), *zip(self.targets, self.critics, strict=True)]
        for target, source in pairs:
            for name in target:
                target[name] = target[name] + self.tau * (source[name] - target[name])


@BOTH
def test_updates_equal_the_float64_reference(make):
    agent, twin = small(make, hidden=(32, 32)), small(make, hidden=(32, 32))
    reference = DistributionalReference(agent)
    for i in range(6):
        noise, _, z = twin.draw(1, 32)  # what the agent is about to draw
        metrics = agent.update(make_batch(i))
        reference.update(make_batch(i)[0], noise[0], z[0], improve=i % 2 == 1)
        for ours, theirs in ((agent.policy, reference.actor), (agent.target_policy, reference.target_actor)):
            for name, value in ours.trunk.state_dict().items():
                assert torch.allclose(value.double(), theirs[name], atol=2e-6), (i, name)
        for k in range(agent.config.num_critics):
            for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
                for name, value in Reference._member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=2e-6), (i, k, name)
        assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-7)
        if make is DSACT:
            assert agent.std_average.tolist() == pytest.approx([m.item() for m in reference.m], rel=1e-6)
            assert metrics["q_std_average"].item() == pytest.approx(sum(m.item() for m in reference.m) / 2, rel=1e-6)


@BOTH
def test_policy_temperature_and_all_targets_move_every_second_update(make):
    agent = small(make)
    delayed = [agent.policy.trunk, agent.target_policy, agent.target_critics]
    for i in range(4):
        before = [copy.deepcopy(list(part.parameters())) for part in (agent.critics, *delayed)]
        alpha = agent.log_alpha.item()
        metrics = agent.update(make_batch(i))
        assert {"q_std", "q_mean", "alpha", "critic_loss", "target_mean"} <= metrics.keys()
        same = [
            all(torch.equal(a, b) for a, b in zip(values, part.parameters(), strict=True))
            for values, part in zip(before, (agent.critics, *delayed), strict=True)
        ]
        assert same == ([False] * 4 if i % 2 else [False, True, True, True])
        assert (agent.log_alpha.item() == alpha) == (i % 2 == 0) == ("actor_loss" not in metrics)


@BOTH
def test_next_actions_are_the_target_policys(make):
    def target_mean(change):
        agent = small(make)
        change(agent)
        return agent.update(make_batch())["target_mean"].item()

    def shift(policy):
        with torch.no_grad():
            policy.trunk[-1].bias += 1

    unchanged = target_mean(lambda agent: None)
    assert target_mean(lambda agent: shift(agent.policy)) == unchanged
    assert target_mean(lambda agent: shift(agent.target_policy)) != unchanged


def test_the_smaller_mean_gives_both_targets(monkeypatch):
    agent, obs, action = small(DSACT), torch.zeros(2, 5), torch.zeros(2, 2)
    # Means (1, 5) and (3, 4); deviations softplus(raw): the first critic's 1 and 2, the second's 3 and 4.
    raw = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expm1().log()
    outputs = torch.stack([torch.tensor([[1.0, 5.0], [3.0, 4.0]]), raw], -1)
    monkeypatch.setattr(agent.target_critics, "forward", lambda *_: outputs)
    mean, sample = agent.next_value(obs, action, torch.tensor([0.5, -2.0]))
    assert mean.tolist() == [1, 4]
    assert sample.tolist() == pytest.approx([1 + 0.5 * 1, 4 - 2 * 4])


@BOTH
def test_z_is_normal_and_clipped(make):
    z = small(make).draw(100, 1000)[2]
    assert z.shape == (100, 1000)
    assert z.max() == 3 and z.min() == -3
    assert z.mean().item() == pytest.approx(0, abs=0.02) and z.std().item() == pytest.approx(0.995, abs=0.02)


@BOTH
def test_time_limits_bootstrap_and_terminations_do_not(make):
    batch = make_batch()
    over = batch.map(lambda value: torch.zeros_like(value) if value is batch.discount else value)
    reward = batch.reward.mean().item()
    assert small(make).update(over)["target_mean"].item() == pytest.approx(reward, abs=1e-6)
    going_on = batch.map(lambda value: torch.full_like(value, 0.99) if value is batch.discount else value)
    agent = small(make)
    with torch.no_grad():  # a next value of 100 for sure
        agent.target_critics.ensemble.layers[-1].bias.copy_(torch.tensor([100.0, -50.0]))
        agent.target_critics.ensemble.layers[-1].weight.zero_()
        agent.log_alpha.fill_(-50)
    assert agent.update(going_on)["target_mean"].item() == pytest.approx(reward + 99, abs=1e-3)


@BOTH
def test_two_outputs_are_computed_in_float32_too(make):
    critics, obs, action = small(make).critics, torch.randn(4, 5), torch.rand(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = critics(obs, action)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())


def test_targets_see_images_through_one_convolution_of_their_own():
    space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    agent = DSACT(space, ACT, DSACTConfig(hidden=(8,), policy_delay=1))
    (online,), (target,) = (set(p.encoder.convolutions.values()) for p in (agent.policy, agent.target_policy))
    assert target is not online and set(agent.target_critics.encoder.convolutions.values()) == {target}
    pixels = torch.randint(0, 256, (1, 6, 16, 16, 3), dtype=torch.uint8)
    batch = make_batch(size=6).map(lambda value: pixels if value.shape == (1, 6, 5) else value)
    start = [p.detach().clone() for p in target.parameters()]
    agent.update(batch)
    for before, ours, theirs in zip(start, target.parameters(), online.parameters(), strict=True):
        assert torch.allclose(ours, before + 0.01 * (theirs - before), atol=1e-7)  # once, not twice
        assert not torch.equal(ours, before)


PROBE = {"policy_delay": 2, "hidden": (32, 32)}


def moments_of(agent, obs):
    with torch.no_grad():
        out = agent.critics(torch.tensor([[obs]]), torch.zeros(1, 1))[:, 0]
    return out[:, 0].mean().item(), torch.nn.functional.softplus(out[:, 1]).mean().item()


@BOTH
def test_probe_a_delayed_reward_is_discounted_once(make):
    agent = probe(lambda o, a: (o > 0).float(), 0.5, make=make, next_obs=torch.ones_like, updates=600, **PROBE)
    assert moments_of(agent, 1.0)[0] == pytest.approx(2, abs=0.3)
    assert moments_of(agent, -1.0)[0] == pytest.approx(1, abs=0.3)


@BOTH
def test_probe_the_deviation_is_that_of_the_return(make):
    g = torch.Generator().manual_seed(1)

    def reward(obs, action):  # mean 1, deviation 0.5 where the observation is 1, 2 where it is -1
        return 1 + torch.randn(obs.shape, generator=g) * torch.where(obs > 0, 0.5, 2.0)

    agent = probe(reward, 0.0, make=make, updates=1500, **PROBE | {"critic_lr": 1e-3})
    for obs, std in ((1.0, 0.5), (-1.0, 2.0)):
        ours = moments_of(agent, obs)
        assert ours[0] == pytest.approx(1, abs=0.35)
        assert ours[1] == pytest.approx(std, rel=0.25)


@BOTH
def test_probe_the_policy_follows_the_action_that_pays(make):
    agent = probe(lambda o, a: o * a / 0.4, 0.0, make=make, **PROBE)
    action, _, _ = agent.policy.act(torch.tensor([[1.0], [-1.0]]))
    assert action[0].item() > 0.25
    assert action[1].item() < -0.25


@BOTH
def test_state_dict_continues_bit_for_bit(make):
    assert_state_dict_continues(make)


@pytest.mark.parametrize("algo", ["dsac", "dsac-t"])
def test_a_stopped_training_resumes_bit_for_bit(tmp_path, algo):
    assert_training_resumes(algo, tmp_path)


@needs_compiler
@BOTH
def test_compiled_updates_equal_eager_ones(make):
    assert_compiled_equals_eager(make)


@BOTH
def test_unsuitable_action_spaces(make):
    for space in (gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([3, 2])):
        with pytest.raises(UsageError, match=f"{make.title} needs continuous actions"):
            make(OBS, space)
    with pytest.raises(UsageError, match=f"{make.title} needs finite action bounds"):
        make(OBS, gym.spaces.Box(-np.inf, np.inf, (2,)))


def test_settings_out_of_range():
    with pytest.raises(UsageError, match=r"agent.num_critics must be 1, which is what DSAC has"):
        DSACConfig(num_critics=2)
    with pytest.raises(UsageError, match=r"agent.std_tau must be in \(0, 1\]"):
        DSACTConfig(std_tau=0)
    with pytest.raises(UsageError, match=r"agent.gradient_bias must be 0 or more"):
        DSACTConfig(gradient_bias=-0.1)
