"""REDQ and DroQ: updates against a float64 reference, their random subsets and masks, the delayed policy, learning."""

import copy
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import ctrlrl
from ctrlrl.algorithms.droq import DroQ
from ctrlrl.algorithms.droq_config import DroQConfig
from ctrlrl.algorithms.redq import REDQ
from ctrlrl.algorithms.redq_config import REDQConfig
from ctrlrl.algorithms.registry import ALGORITHMS
from ctrlrl.errors import UsageError
from tests.agents import assert_compiled_equals_eager, assert_state_dict_continues, assert_training_resumes
from tests.test_execution import needs_compiler
from tests.test_sac import ACT, OBS, Adam64, Reference, make_batch, probe, q_of

BOTH = pytest.mark.parametrize("make", [REDQ, DroQ])


class DelayedReference(Reference):
    """Algorithm 1 of REDQ and Algorithm 2 of DroQ, in float64: networks one by one, `masks` for every evaluation."""

    def __init__(self, agent, members):
        super().__init__(agent)
        self.critics = [self._member(agent.critics, k) for k in range(members)]
        self.targets = [self._member(agent.target_critics, k) for k in range(members)]
        self.actor_optimizer, self.alpha_optimizer = Adam64(3e-4), Adam64(3e-4)
        self.critic_optimizers = [Adam64(3e-4) for _ in range(members)]

    @staticmethod
    def q(p, x, masks):
        """With `masks`, one (B, width) for each hidden layer: linear, dropout, LayerNorm, ReLU; else linear, ReLU."""
        linear = [n.split(".")[0] for n in p if n.endswith("weight") and p[n].shape[0] > 1]
        for i, (name, mask) in enumerate(zip(linear[:-1], masks or [None] * 9, strict=False)):
            x = x @ p[f"{name}.weight"] + p[f"{name}.bias"]
            if mask is not None:
                x = x * mask
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                norm = str(3 * i + 1)
                x = x * p[f"{norm}.weight"] + p[f"{norm}.bias"]
            x = x.clamp(min=0)
        return (x @ p[f"{linear[-1]}.weight"] + p[f"{linear[-1]}.bias"])[:, 0]

    def update(self, batch, noise, members, masks, improve):
        """`members`: whose minimum is the target. `masks[i][k]`: of critic k in the critics' loss, target, policy."""
        obs, next_obs, noise = batch.obs.double(), batch.next_obs.double(), noise.double()
        stored = 2 * (batch.action.double() - self.low) / (self.high - self.low) - 1
        alpha = self.log_alpha.exp()
        next_action, next_log_prob = self.sample(self.actor, next_obs, noise[1])
        x = torch.cat([next_obs, next_action], 1)
        values = torch.stack([self.q(self.targets[k], x, masks[1][k]) for k in members])
        soft = values.min(0).values - alpha * next_log_prob
        y = batch.reward.double() + batch.discount.double() * soft
        x = torch.cat([obs, stored], 1)
        for k, critic in enumerate(self.critics):
            p = {n: v.clone().requires_grad_() for n, v in critic.items()}
            loss = ((self.q(p, x, masks[0][k]) - y) ** 2).mean() / 2
            grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
            self.critics[k] = self.critic_optimizers[k].step(critic, grads)
        if improve:
            actor = {k: v.clone().requires_grad_() for k, v in self.actor.items()}
            action, log_prob = self.sample(actor, obs, noise[0])
            x = torch.cat([obs, action], 1)
            values = torch.stack([self.q(c, x, masks[2][k]) for k, c in enumerate(self.critics)])
            loss = (alpha * log_prob - values.mean(0)).mean()
            grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
            self.actor = self.actor_optimizer.step(self.actor, grads)
            gradient = -(log_prob.detach() - 2.0).mean()
            self.log_alpha = self.alpha_optimizer.step({"a": self.log_alpha}, {"a": gradient})["a"]
        for t, c in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + 0.005 * (c[n] - t[n])


def masks_of(agent, dropped, rows):
    """Factors [evaluation][critic][layer] (rows, width), marked place by place."""
    c = agent.config
    out = []
    for places in dropped:
        flat = np.full(c.num_critics * rows * sum(c.hidden), 1 / (1 - c.dropout))
        for place in places.tolist():
            if place < len(flat):
                flat[place] = 0
        layers, start = [], 0
        for width in c.hidden:
            size = c.num_critics * rows * width
            layers.append(torch.from_numpy(flat[start : start + size].reshape(c.num_critics, rows, width)))
            start += size
        out.append([[layer[k] for layer in layers] for k in range(c.num_critics)])
    return out


@BOTH
def test_updates_equal_the_float64_reference(make):
    if make is REDQ:
        config = REDQConfig(hidden=(32, 24), num_critics=4, policy_delay=3)
    else:
        config = DroQConfig(hidden=(32, 24), policy_delay=3, dropout=0.2)
    agent, twin = make(OBS, ACT, config, seed=3), make(OBS, ACT, config, seed=3)
    reference = DelayedReference(agent, config.num_critics)
    for i in range(7):
        batch = make_batch(i)
        noise, _, extra = twin.draw(1, 32)  # what the agent is about to draw
        agent.update(batch)
        none = [[None] * config.num_critics] * 3
        members, masks = (extra[0].tolist(), none) if make is REDQ else ([0, 1], masks_of(agent, extra[0], 32))
        reference.update(batch[0], noise[0], members, masks, improve=i in (2, 5))
        for name, value in agent.policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), reference.actor[name], atol=3e-6), (i, name)
        for k in range(config.num_critics):
            for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
                for name, value in Reference._member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=3e-6), (i, k, name)
        assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-7)


@BOTH
def test_one_policy_update_per_twenty_of_the_critics(make):
    agent = make(OBS, ACT, make.config_class(hidden=(8,)))
    assert (agent.config.utd, agent.config.policy_delay) == (20, 20)
    parts = {"policy": agent.policy.trunk, "critics": agent.critics, "targets": agent.target_critics}
    moved = dict.fromkeys([*parts, "alpha"], 0)
    for i in range(40):
        before = {name: copy.deepcopy(list(part.parameters())) for name, part in parts.items()}
        alpha = agent.log_alpha.item()
        metrics = agent.update(make_batch(i))
        for name, values in before.items():
            moved[name] += not all(torch.equal(a, b) for a, b in zip(values, parts[name].parameters(), strict=True))
        moved["alpha"] += agent.log_alpha.item() != alpha
        assert ("actor_loss" in metrics) == (i in (19, 39))
    assert moved == {"policy": 2, "critics": 40, "targets": 40, "alpha": 2}


def test_each_update_draws_two_distinct_critics_of_ten_all_pairs_alike():
    agent = REDQ(OBS, ACT, REDQConfig(hidden=(8,)))
    subset = agent.draw(9000, 1)[2]
    assert subset.shape == (9000, 2)
    pairs = torch.bincount(subset.sort(-1).values @ torch.tensor([10, 1]))
    counts = [pairs[10 * a + b].item() for a, b in itertools.combinations(range(10), 2)]
    assert sum(counts) == 9000  # none twice in a pair
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in counts)
    assert (subset[:-1] == subset[1:]).all(-1).float().mean() < 0.05


def test_only_the_drawn_target_critics_are_evaluated():
    agent = REDQ(OBS, ACT, REDQConfig(hidden=(8,), num_critics=5))
    obs, action, members = torch.randn(6, 5), torch.rand(6, 2), torch.tensor([3, 1])
    expected = agent.target_critics(obs, action)[[1, 3]].amin(0)
    with torch.no_grad():
        for p in agent.target_critics.parameters():
            p[[0, 2, 4]] = torch.nan
    assert torch.equal(agent.next_value(obs, action, members), expected)


@pytest.mark.parametrize("subset", [0, 3])
def test_a_subset_must_fit_the_critics(subset):
    with pytest.raises(UsageError, match=r"agent.subset must be between 1 and agent.num_critics = 2, got"):
        REDQConfig(num_critics=2, subset=subset)
    assert REDQConfig(num_critics=2, subset=2).subset == 2


@pytest.mark.parametrize("dropout", [0.01, 0.3])
def test_masks_drop_the_stated_share_independently(dropout):
    config = DroQConfig(hidden=(64, 48), dropout=dropout)
    agent, rows, groups = DroQ(OBS, ACT, config, seed=5), 256, 60
    dropped = agent.draw(groups, rows)[2]
    masks = [[agent.masks(places, rows) for places in update] for update in dropped]
    assert [m.shape for m in masks[0][0]] == [(2, rows, 64), (2, rows, 48)]
    flat = torch.stack([torch.stack([torch.cat([m.flatten() for m in each]) for each in update]) for update in masks])
    assert flat.unique().tolist() == pytest.approx([0, 1 / (1 - dropout)])
    gone = (flat == 0).double()  # (G, 3, N)
    n = gone.numel()
    assert n > 1e7
    error = math.sqrt(dropout * (1 - dropout) / n)
    assert abs(gone.mean().item() - dropout) < max(4 * error, 1e-5)  # 4 deviations: at most 6e-4, and 1.3e-4 at 0.01
    assert abs(flat.double().mean().item() - 1) < 5 * error / (1 - dropout)
    # Each place, layer, critic, evaluation and update for itself: no share of any of them differs, no pair agrees more.
    for dims in ((0, 1), (0, 2), (1, 2)):
        share = gone.mean(dims)
        assert (share - dropout).abs().max() < 6 * math.sqrt(dropout * (1 - dropout) * share.numel() / n)
    tail = gone[:, :, -rows:].mean().item()
    assert abs(tail - dropout) < 6 * math.sqrt(dropout * (1 - dropout) / (groups * 3 * rows))  # the gaps reach the end
    centred = gone - gone.mean()
    first = 2 * rows * 64
    pairs = {
        "evaluations": centred[:, 0] * centred[:, 1],
        "updates": centred[1:] * centred[:-1],
        "neighbours": centred[:, :, 1:] * centred[:, :, :-1],
        "rows": centred[:, :, 64:first] * centred[:, :, : first - 64],
        "critics": centred[:, :, first // 2 : first] * centred[:, :, : first // 2],
        "layers": centred[:, :, first:] * centred[:, :, : centred.shape[-1] - first],
    }
    for name, product in pairs.items():
        correlation = product.mean().item() / (dropout * (1 - dropout))
        assert abs(correlation) < 5 / math.sqrt(product.numel()), name


def test_a_network_of_ones_own_is_refused_by_droq_and_taken_by_redq():
    def network(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    with pytest.raises(
        UsageError, match=r"put nn.Dropout into it and train it by sac with --agent.utd 20 --agent.poli"
    ):
        DroQ(OBS, ACT, network=network)
    agent = REDQ(OBS, ACT, network=network)
    assert math.isfinite(agent.update(make_batch(groups=2))["critic_loss"])


@pytest.mark.parametrize("dropout", [0.0, 1.0, -0.1])
def test_a_dropout_that_is_none_is_refused(dropout):
    with pytest.raises(UsageError, match=r"agent.dropout must be in \(0, 1\)"):
        DroQConfig(dropout=dropout)


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
def test_a_zero_discount_stops_the_bootstrap(make):
    agent = make(OBS, ACT, make.config_class(hidden=(8,)))
    batch = make_batch()
    over = batch.map(lambda value: torch.zeros_like(value) if value is batch.discount else value)
    assert agent.update(over)["target_mean"].item() == pytest.approx(batch.reward.mean().item(), abs=1e-6)


@BOTH
def test_state_dict_continues_bit_for_bit(make):
    assert_state_dict_continues(make, policy_delay=2)


@pytest.mark.parametrize("algo", ["redq", "droq"])
def test_a_stopped_training_resumes_bit_for_bit(tmp_path, algo):
    assert_training_resumes(algo, tmp_path, utd=2, policy_delay=3)


@pytest.mark.parametrize(
    ("algo", "agent", "told"),
    [
        ("redq", {"utd": 4}, "the policy will move once in 5 environment steps"),
        ("redq", {"utd": 4, "policy_delay": 4}, None),
        ("redq", {}, None),
        ("sac", {"utd": 0.25}, None),
    ],
)
def test_a_policy_that_is_left_behind_by_a_lower_utd_is_told_of(tmp_path, algo, agent, told):
    agent = {"hidden": [8], "batch_size": 8} | agent
    settings = {"steps": 24, "learning_starts": 8, "eval_every": 0, "video": False, "quiet": True}
    run = ctrlrl.train(algo, "Pendulum-v1", agent=agent, out=str(tmp_path / "r"), **settings)
    text = (run.path / "metrics.jsonl").read_text()
    assert told in text if told else "the policy will move" not in text


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


@pytest.mark.parametrize("algo", ["redq", "droq", "dsac", "dsac-t"])
def test_sacs_presets_are_the_variants(algo):
    assert ALGORITHMS[algo].preset_for("Swimmer-v5").values == {"agent": {"gamma": 0.999}}
