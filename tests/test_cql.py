"""CQL and Cal-QL: updates against a float64 reference, their limits, the multiplier, learning."""

import copy
import itertools
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.cql import CQL
from ctrlrl.algorithms.cql_config import CQLConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.algorithms.wsrl import WSRL
from ctrlrl.algorithms.wsrl_config import WSRLConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured
from ctrlrl.replay.batch import Batch
from tests.agents import assert_same_state, assert_state_dict_continues
from tests.test_execution import needs_compiler, rerun
from tests.test_redq import DelayedReference
from tests.test_sac import ACT, OBS, make_batch

SMALL = {"hidden": (32, 32), "sampled_actions": 4}
VARIANTS = {
    "plain": {},
    "lagrange": {"action_gap": 3.0, "conservative_weight": 5.0},
    "calibrated": {"calibrate": True, "lowest_gap": 2.9},
    "mazes": {"max_target_backup": True, "backup_entropy": True, "action_gap": 6.0, "calibrate": True},
    "ensemble": {"num_critics": 3, "subset": 2, "backup_entropy": True},
}


def with_returns(batch: Batch, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return replace(batch, mc_return=0.3 * torch.randn(batch.reward.shape, generator=g))


def draws(agent: CQL, seed: int) -> list:
    """What one step takes after the batch."""
    agent.generator.manual_seed(seed)
    return [None if value is None else value[0] for value in agent.draw(1, 32)]


class CQLReference(DelayedReference):
    """The same update written out once more: critic by critic, action by action, float64, no code of ours."""

    def __init__(self, agent: CQL) -> None:
        super().__init__(agent, agent.config.num_critics)
        self.c, self.log_factor = agent.config, 0.0
        self.actor_optimizer.lr = self.alpha_optimizer.lr = 3e-5
        self.moments = [0.0, 0.0, 0]

    def update(self, batch: Batch, drawn: list) -> dict[str, float]:
        c, count = self.c, self.c.sampled_actions
        noise, _, normal, uniform, *rest = drawn
        members = rest[0].tolist() if c.subset else range(c.num_critics)
        obs, next_obs, noise, normal = batch.obs.double(), batch.next_obs.double(), noise.double(), normal.double()
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        alpha = self.log_alpha.exp()

        with torch.no_grad():
            here = [self.sample(self.actor, obs, normal[0, i]) for i in range(count)]
            ahead = [self.sample(self.actor, next_obs, normal[1, i]) for i in range(count)]
            candidates = ahead if c.max_target_backup else [self.sample(self.actor, next_obs, noise[1])]
            values = []
            for action, _ in candidates:
                x = torch.cat([next_obs, action], 1)
                values.append(torch.stack([self.q(self.targets[k], x, None) for k in members]).min(0).values)
            rows = []
            for b in range(len(obs)):
                i = max(range(len(candidates)), key=lambda i: values[i][b].item())
                entropy = alpha * candidates[i][1][b] if c.backup_entropy else 0.0
                rows.append(batch.reward[b].double() + batch.discount[b].double() * (values[i][b] - entropy))
            y = torch.stack(rows)

        weight, gaps = c.conservative_weight * math.exp(self.log_factor), []
        for k, critic in enumerate(self.critics):
            p = {n: v.clone().requires_grad_() for n, v in critic.items()}
            q = self.q(p, torch.cat([obs, stored], 1), None)
            terms = [self.q(p, torch.cat([obs, u.double()], 1), None) + 2 * math.log(2) for u in uniform]
            for action, log_prob in (*here, *ahead):
                value = self.q(p, torch.cat([obs, action], 1), None)
                if c.calibrate:
                    value = torch.maximum(value, batch.mc_return.double())
                terms.append(value - log_prob)
            gap = torch.log(torch.exp(torch.stack(terms)).sum(0)) - q
            if c.lowest_gap is not None:
                gap = gap.clamp(min=c.lowest_gap)
            loss = ((q - y) ** 2).mean() / 2 + weight / 2 * gap.mean()
            gaps.append(gap.detach())
            grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
            self.critics[k] = self.critic_optimizers[k].step(critic, grads)
        if c.action_gap is not None:
            gradient = -(weight * (torch.stack(gaps).mean().item() - c.action_gap))
            first, second, t = self.moments
            self.moments = [0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2, t + 1]
            first, second, t = self.moments
            self.log_factor -= c.critic_lr * (first / (1 - 0.9**t)) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8)

        actor = {k: v.clone().requires_grad_() for k, v in self.actor.items()}
        action, log_prob = self.sample(actor, obs, noise[0])
        x = torch.cat([obs, action], 1)
        values = torch.stack([self.q(c, x, None) for c in self.critics]).min(0).values
        grads = torch.autograd.grad((alpha * log_prob - values).mean(), list(actor.values()))
        self.actor = self.actor_optimizer.step(self.actor, dict(zip(actor, grads, strict=True)))
        gradient = -(log_prob.detach() - 2.0).mean()
        self.log_alpha = self.alpha_optimizer.step({"a": self.log_alpha}, {"a": gradient})["a"]
        for t, p in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + 0.005 * (p[n] - t[n])
        return {"gap": torch.stack(gaps).mean().item(), "target": y.mean().item()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_update_and_five_equal_the_float64_reference(variant):
    agent = CQL(OBS, ACT, CQLConfig(**SMALL | VARIANTS[variant]), seed=3)
    with torch.no_grad():
        for target in agent.target_critics.parameters():
            target.mul_(1.5)
    reference = CQLReference(agent)
    for i in range(5):
        batch, drawn = with_returns(make_batch(i)[0], i), draws(agent, 100 + i)
        metrics = agent.step(batch, *drawn)
        by_hand = reference.update(batch, drawn)
        assert metrics["target_mean"].item() == pytest.approx(by_hand["target"], abs=1e-5)
        if agent.config.lowest_gap is None:
            assert metrics["conservative_gap"].item() == pytest.approx(by_hand["gap"], abs=1e-5)
        assert not agent.config.calibrate or 0 < metrics["calibrated"] < 1
        for name, value in agent.policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), reference.actor[name], atol=2e-6), (i, name)
        for k in range(agent.config.num_critics):
            for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
                for name, value in reference._member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=3e-6), (i, k, name)
        assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-7)
        assert agent.log_factor.item() == pytest.approx(reference.log_factor, abs=1e-6)


def test_without_weight_it_is_sac_bit_for_bit():
    numbers = {"hidden": (16, 16), "actor_lr": 3e-4, "alpha_lr": 3e-4}
    settings = CQLConfig(**numbers, conservative_weight=0.0, backup_entropy=True)
    ours, theirs = CQL(OBS, ACT, settings, seed=4), SAC(OBS, ACT, SACConfig(**numbers), seed=4)
    for i in range(3):
        left, right = ours.update(make_batch(i, groups=2)), theirs.update(make_batch(i, groups=2))
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert_same_state(ours, theirs)


def test_returns_that_bound_nothing_leave_plain_cql():
    plain, calibrated = (CQL(OBS, ACT, CQLConfig(**SMALL, calibrate=c), seed=4) for c in (False, True))
    for i in range(3):
        batch = make_batch(i, groups=2)
        plain.update(batch)
        calibrated.update(replace(batch, mc_return=torch.full_like(batch.reward, -math.inf)))
    assert_same_state(plain, calibrated)


def test_calibration_by_hand_bounds_the_policies_actions_alone():
    agent = CQL(OBS, ACT, CQLConfig(sampled_actions=1, calibrate=True))
    q = torch.tensor([[5.0, 5.0]], requires_grad=True)  # one critic, two states
    sampled = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]], requires_grad=True)  # uniform, pi(s), pi(s')
    log_prob = torch.tensor([[0.5, 0.5], [-0.5, -0.5]])
    gap, metrics = agent.gap(q, sampled, log_prob, torch.tensor([-9.0, 2.5]))
    first = math.log(4 * math.exp(1) + math.exp(2 - 0.5) + math.exp(3 + 0.5)) - 5
    second = math.log(4 * math.exp(1) + math.exp(2.5 - 0.5) + math.exp(3 + 0.5)) - 5
    assert gap[0].tolist() == pytest.approx([first, second], abs=1e-6)
    assert metrics["calibrated"] == 0.25
    gap[0, 1].backward()
    assert sampled.grad[0, 1].tolist() == [0, 0]  # below the data's return: not pushed down
    assert (sampled.grad[0, [0, 2], 1] > 0).all()


def test_the_samples_estimate_the_integral():
    """Of exp Q over [-1, 1]^2 for Q(s, u) = u_1 + 2 u_2: the product of 2 sinh(c) / c."""
    agent = CQL(OBS, ACT, CQLConfig(sampled_actions=1000), seed=1)
    normal, uniform = agent.draw(1, 4)[2:]
    policy = agent.policy.distribution(torch.randn(4, 5))
    with torch.no_grad():
        (here, log_here, _), (ahead, log_ahead, _) = policy.rsample(normal[0, 0]), policy.rsample(normal[0, 1])
    actions = torch.cat([uniform[0], here, ahead])
    q = (actions * torch.tensor([1.0, 2.0])).sum(-1)[None]
    gap, _ = agent.gap(torch.zeros(1, 4), q, torch.cat([log_here, log_ahead]).squeeze(-1), None)
    integral = math.log(2 * math.sinh(1)) + math.log(math.sinh(2))
    assert gap[0].tolist() == pytest.approx([integral + math.log(3000)] * 4, abs=0.1)


def test_all_actions_of_all_critics_are_one_evaluation():
    agent = CQL(OBS, ACT, CQLConfig(**SMALL, num_critics=5))
    rows = []
    for critics in (agent.critics, agent.target_critics):
        critics.ensemble.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    agent.step(make_batch()[0], *draws(agent, 0))
    assert rows == [32, 32 * (3 * 4 + 1), 32]  # target, data and samples, policy


def test_the_multiplier_grows_above_the_gap_and_falls_below():
    for gap, sign in ((-50.0, 1), (50.0, -1)):
        agent = CQL(OBS, ACT, CQLConfig(**SMALL, action_gap=gap, critic_lr=0.01))
        weights = [agent.update(make_batch(i))["conservative_weight"].item() for i in range(5)]
        assert weights[0] == 10 and all((b - a) * sign > 0 for a, b in itertools.pairwise(weights))
    agent = CQL(OBS, ACT, CQLConfig(**SMALL, action_gap=-50.0, critic_lr=0.5))
    for i in range(40):
        agent.update(make_batch(i))
    assert agent.log_factor.exp().item() == pytest.approx(1e6, rel=1e-5)


def test_the_best_of_the_next_actions_is_the_target():
    one, best = (CQL(OBS, ACT, CQLConfig(**SMALL, max_target_backup=m), seed=1) for m in (False, True))
    batch = make_batch()[0]
    batch = replace(batch, discount=torch.ones_like(batch.discount))
    assert best.step(batch, *draws(best, 5))["target_mean"] > one.step(batch, *draws(one, 5))["target_mean"]


def test_an_ensemble_with_layer_norm_goes_on_by_wsrl():
    shape = {"hidden": (16, 16), "num_critics": 10, "layer_norm": True, "policy_layer_norm": True}
    offline = CQL(OBS, ACT, CQLConfig(**shape, calibrate=True, subset=2), seed=1)
    assert all(bool(v.isfinite()) for v in offline.update(with_returns(make_batch(groups=2))).values())
    pairs = {tuple(sorted(pair.tolist())) for pair in offline.draw(500, 1)[-1]}
    assert len(pairs) == 45  # of ten critics, each pair
    online = WSRL(OBS, ACT, WSRLConfig(**shape), seed=2)
    for name in ("policy", "critics", "target_critics"):
        getattr(online, name).load_state_dict(getattr(offline, name).state_dict())
    obs, action = torch.randn(8, 5), torch.zeros(8, 2)
    assert torch.equal(online.critics(obs, action), offline.critics(obs, action))
    assert torch.equal(online.policy.act(obs)[0], offline.policy.act(obs)[0])
    online.update(make_batch(groups=4))


def test_same_seed_same_bits_and_groups_equal_single_steps():
    settings = CQLConfig(**SMALL, action_gap=1.0)
    a, b = CQL(OBS, ACT, settings, seed=7), CQL(OBS, ACT, settings, seed=7)
    batch, drawn = make_batch(groups=3), b.draw(3, 32)
    a.update(batch)
    for g in range(3):
        b.step(batch[g], *(None if value is None else value[g] for value in drawn))
    assert_same_state(a, b)


def test_state_dict_continues_bit_for_bit():
    assert_state_dict_continues(CQL, sampled_actions=3, action_gap=1.0, policy_delay=2)


def test_captured_steps_equal_eager_ones():
    settings = CQLConfig(**SMALL, action_gap=1.0, num_critics=3, subset=2)
    eager, captured = CQL(OBS, ACT, settings, seed=1), CQL(OBS, ACT, settings, seed=1)
    step = Captured(captured.step, captured._changing, rerun)
    for i in range(3):
        drawn = draws(eager, i)
        theirs, ours = eager.step(make_batch(i)[0], *drawn), step(make_batch(i)[0], *drawn)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    captured.generator.set_state(eager.generator.get_state())
    assert_same_state(captured, eager)


@needs_compiler
def test_compiled_updates_equal_eager_ones():
    settings = CQLConfig(**SMALL | VARIANTS["mazes"] | {"layer_norm": True, "hidden": (16,)})
    eager, compiled = CQL(OBS, ACT, settings, seed=1), CQL(OBS, ACT, replace(settings, execution="compiled"), seed=1)
    for i in range(2):
        batch = with_returns(make_batch(i, groups=2))
        ours, theirs = compiled.update(batch), eager.update(batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    assert_same_state(compiled, eager, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_in_bfloat16(variant):
    agent = CQL(OBS, ACT, CQLConfig(**SMALL | VARIANTS[variant] | {"precision": "bfloat16"}))
    metrics = agent.update(with_returns(make_batch(groups=2)))
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in metrics.values())


def test_images_are_seen_once_for_all_actions():
    space = gym.spaces.Dict({"eye": gym.spaces.Box(0, 255, (48, 48, 3), np.uint8), "x": gym.spaces.Box(-1, 1, (2,))})
    agent = CQL(space, ACT, CQLConfig(**SMALL))
    seen = []
    agent.critics.encoder.convolutions["eye"].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    obs = {"eye": torch.randint(0, 256, (1, 8, 48, 48, 3), dtype=torch.uint8), "x": torch.randn(1, 8, 2)}
    base = make_batch(size=8)
    agent.update(Batch(obs, base.action, base.reward, base.discount, obs, base.end, base.index, {}, {}))
    assert seen == [8, 8]  # here and there


# Learning.


def bandit(updates: int = 300, **settings) -> CQL:
    """One state whose data has actions in [0.1, 0.5] that earn what they are: further on it looks better still."""
    fields = {
        "hidden": (32, 32),
        "sampled_actions": 5,
        "actor_lr": 1e-3,
        "critic_lr": 1e-3,
        "tau": 0.05,
        "initial_alpha": 0.01,
        "alpha_lr": 0.0,
    }
    agent = CQL(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,)), CQLConfig(**fields | settings), seed=1)
    g = torch.Generator().manual_seed(0)
    for _ in range(updates):
        action = 0.1 + 0.4 * torch.rand(1, 32, 1, generator=g)
        flag, obs, reward = torch.zeros(1, 32, dtype=torch.bool), torch.ones(1, 32, 1), 5 * action.squeeze(-1)
        agent.update(Batch(obs, action, reward, torch.zeros(1, 32), obs, flag, flag.long(), {}, {}, mc_return=reward))
    return agent


def q_at(agent: CQL, *actions: float) -> list[float]:
    unit = torch.tensor(actions)[:, None]
    return agent.critics(torch.ones(len(actions), 1), unit).amin(0).tolist()


def test_actions_that_the_data_has_not_are_worth_less_than_those_it_has():
    plain = bandit(conservative_weight=0.0)
    assert q_at(plain, 0.95)[0] > q_at(plain, 0.45)[0]  # SAC believes what it never saw
    assert plain.policy.act(torch.ones(1, 1))[0].item() > 0.55
    for settings in ({}, {"num_critics": 4, "layer_norm": True}, {"action_gap": 3.5}):
        agent = bandit(**settings)
        unseen = q_at(agent, -0.95, -0.5, 0.95)
        assert max(unseen) < min(q_at(agent, 0.25, 0.45)), settings
        assert 0.05 < agent.policy.act(torch.ones(1, 1))[0].item() < 0.55, settings


def test_calibration_keeps_the_scale_of_the_returns():
    """At the edge of the data, which the policy reaches, plain CQL goes far below the return of 2.5 that is there."""
    plain, calibrated = (bandit(calibrate=c, initial_alpha=1.0) for c in (False, True))
    actions = (-0.95, -0.5, 0.1, 0.3, 0.5, 0.7, 0.95)
    assert all(b > a + 0.2 for a, b in zip(q_at(plain, *actions), q_at(calibrated, *actions), strict=True))
    assert q_at(plain, 0.5)[0] < 1.5 and q_at(calibrated, 0.5)[0] > 1.7
    assert max(q_at(calibrated, -0.95, -0.5, 0.95)) < min(q_at(calibrated, 0.25, 0.45))


def test_calibration_needs_returns():
    agent = CQL(OBS, ACT, CQLConfig(**SMALL, calibrate=True))
    with pytest.raises(UsageError, match=r"agent\.calibrate needs the return that followed .*--agent\.no-calibrate"):
        agent.update(make_batch())
    CQL(OBS, ACT, CQLConfig(**SMALL)).update(make_batch())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conservative_weight": -1.0}, "conservative_weight must be"),
        ({"sampled_actions": 0}, "sampled_actions must be"),
        ({"subset": 3}, r"subset must be none, or between 1 and agent\.num_critics = 2"),
        ({"conservative_weight": 0.0, "action_gap": 1.0}, "action_gap must be"),
        ({"conservative_weight": 0.0, "calibrate": True}, "calibrate must be"),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(UsageError, match=rf"agent\.{message}"):
        CQLConfig(**fields)


def test_unsuitable_action_spaces():
    with pytest.raises(UsageError, match="CQL needs continuous actions"):
        CQL(OBS, gym.spaces.Discrete(3))


def test_a_copy_is_independent():
    agent = CQL(OBS, ACT, CQLConfig(**SMALL))
    state = copy.deepcopy(agent.state_dict())
    agent.update(make_batch())
    assert not torch.equal(state["critics"]["ensemble.layers.0.weight"], agent.critics.ensemble.layers[0].weight)
