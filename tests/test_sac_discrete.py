"""Discrete SAC: updates against a float64 reference and hand-computed numbers, masks, candidates, probes."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ctrlrl
from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.algorithms.sac_discrete import SACDiscrete
from ctrlrl.algorithms.sac_discrete_config import SACDiscreteConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import unavailable
from ctrlrl.replay.batch import Batch
from ctrlrl.runs.checkpoint import load_checkpoint, pack
from ctrlrl.runs.folder import RunFolder
from tests.runs import SMALL, assert_same
from tests.test_discrete import MaskedEnv, bits
from tests.test_sac import Adam64

VANILLA = {"double_q": "min", "entropy_penalty": 0.0, "q_clip": 0.0}
STABLE = {"double_q": "mean", "entropy_penalty": 0.5, "q_clip": 0.1}
OBS = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (5,)), "action_mask": bits(4)})
ACT = gym.spaces.Discrete(4, start=2)
cannot = unavailable("compiled", torch.device("cpu"))
needs_compiler = pytest.mark.skipif(cannot is not None, reason=str(cannot))


def config(**fields) -> SACDiscreteConfig:
    return SACDiscreteConfig(**{"hidden": (32, 32)} | fields)


def make_batch(seed: int = 0, size: int = 32, groups: int = 1, candidates: int = 0) -> Batch:
    """Rows whose stored action exists; where an episode ends, nothing exists."""
    g = torch.Generator().manual_seed(seed)
    shape = (groups, size)

    def observation() -> dict[str, Tensor]:
        mask = (torch.rand(*shape, 4, generator=g) < 0.6).to(torch.int8)
        obs = {"state": torch.randn(*shape, 5, generator=g), "action_mask": mask}
        return obs | ({"candidates": torch.randn(*shape, 4, candidates, generator=g)} if candidates else {})

    obs, next_obs = observation(), observation()
    choice = torch.randint(0, 4, shape, generator=g)
    obs["action_mask"].scatter_(-1, choice[..., None], 1)
    alive = torch.rand(shape, generator=g) > 0.2
    next_obs["action_mask"] *= alive[..., None].to(torch.int8)
    return Batch(
        obs=obs,
        action=choice + 2,
        reward=torch.randn(shape, generator=g),
        discount=0.99 * alive.float(),
        next_obs=next_obs,
        end=torch.zeros(shape, dtype=torch.bool),
        index=torch.zeros(shape, dtype=torch.int64),
        extras={"entropy": torch.rand(shape, generator=g)},
        next_extras={},
    )


class Reference:
    """The same update written out once more: row by row over the actions that exist, float64, no code of ours."""

    def __init__(self, agent: SACDiscrete) -> None:
        self.actor = {k: v.detach().double().clone() for k, v in agent.policy.trunk.state_dict().items()}
        self.critics = [self.member(agent.critics, k) for k in range(2)]
        self.targets = [self.member(agent.target_critics, k) for k in range(2)]
        self.log_alpha, self.config = agent.log_alpha.detach().double().clone(), agent.config
        self.first = self.actor
        self.optimizers = [Adam64(3e-4) for _ in range(4)]

    @staticmethod
    def member(critics, k):
        return {n: v.detach()[k].double().clone() for n, v in critics.ensemble.layers.state_dict().items()}

    @staticmethod
    def net(p, x, transposed):
        for i in (0, 2, 4):
            weight = p[f"{i}.weight"] if transposed else p[f"{i}.weight"].T
            x = x @ weight + p[f"{i}.bias"]
            x = torch.relu(x) if i < 4 else x
        return x

    def before(self, state, i, there):
        """log pi_0 of row i, or nothing."""
        if not self.config.reference:
            return 0.0
        return torch.log_softmax(self.net(self.first, state, False)[i][there[i]], 0)

    def combine(self, values):
        return sum(values) / 2 if self.config.double_q == "mean" else torch.minimum(*values)

    def update(self, batch: Batch) -> None:
        c, alpha = self.config, self.log_alpha.exp()
        rows = range(len(batch.reward))
        state, next_state = batch.obs["state"].double(), batch.next_obs["state"].double()
        there, next_there = batch.obs["action_mask"].bool(), batch.next_obs["action_mask"].bool()
        taken = batch.action - 2

        actor = {k: v.clone().requires_grad_() for k, v in self.actor.items()}
        logits = self.net(actor, state, False)
        log_pi = [torch.log_softmax(logits[i][there[i]], 0) for i in rows]
        away = [p - self.before(state, i, there) for i, p in enumerate(log_pi)]
        entropy = torch.stack([-(p.exp() * p).sum() for p in log_pi])
        gap = [entropy[i].detach() - c.target_entropy_ratio * math.log(there[i].sum()) for i in rows]
        log_alpha = (
            self.log_alpha
            if not c.alpha_lr
            else self.optimizers[3].step({"a": self.log_alpha}, {"a": torch.stack(gap).mean()})["a"]
        )

        y = []
        next_logits = self.net(self.actor, next_state, False)
        next_q = self.combine([self.net(t, next_state, True) for t in self.targets])
        for i in rows:
            target = batch.reward[i].double()
            if batch.discount[i] > 0 and next_there[i].any():
                p = torch.log_softmax(next_logits[i][next_there[i]], 0)
                v = (
                    p.exp()
                    * (
                        next_q[i][next_there[i]]
                        - alpha * (p - self.before(next_state, i, next_there)) * c.backup_entropy
                    )
                ).sum()
                target = target + batch.discount[i].double() * v
            y.append(target)
        y = torch.stack(y)
        for k in range(2):
            p = {n: v.clone().requires_grad_() for n, v in self.critics[k].items()}
            q = self.net(p, state, True).gather(1, taken[:, None])[:, 0]
            error = (q - y) ** 2
            if c.q_clip:
                old = self.net(self.targets[k], state, True).gather(1, taken[:, None])[:, 0]
                near = old + torch.clip(q - old, -c.q_clip, c.q_clip)
                error = torch.where((near - y) ** 2 > error, (near - y) ** 2, error)
            grads = dict(zip(p, torch.autograd.grad(error.mean() / 2, list(p.values())), strict=True))
            self.critics[k] = self.optimizers[k].step(self.critics[k], grads)

        q = self.combine([self.net(p, state, True) for p in self.critics])
        losses = [(log_pi[i].exp() * (alpha * away[i] - q[i][there[i]])).sum() for i in rows]
        loss = torch.stack(losses).mean()
        loss = loss + c.entropy_penalty * 0.5 * ((batch.extras["entropy"].double() - entropy) ** 2).mean()
        grads = dict(zip(actor, torch.autograd.grad(loss, list(actor.values())), strict=True))
        self.actor = self.optimizers[2].step(self.actor, grads)
        self.log_alpha = log_alpha
        for t, p in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + 0.005 * (p[n] - t[n])


@pytest.mark.parametrize(
    "variant",
    [VANILLA, STABLE, STABLE | {"backup_entropy": False}, VANILLA | {"reference": True, "alpha_lr": 0.0}],
    ids=["vanilla", "stabilized", "return alone", "reference"],
)
def test_one_update_and_five_equal_the_float64_reference(variant):
    agent = SACDiscrete(OBS, ACT, config(**variant), seed=3)
    with torch.no_grad():  # away from the critics, so that the clip has something to do
        for target in agent.target_critics.parameters():
            target.mul_(1.3)
    reference = Reference(agent)
    for i in range(5):
        metrics = agent.step(make_batch(i)[0])
        assert ("q_clipped" in metrics) == (agent.config.q_clip > 0)
        assert not agent.config.q_clip or 0.02 < metrics["q_clipped"] < 0.98
        reference.update(make_batch(i)[0])
        for name, value in agent.policy.trunk.state_dict().items():
            assert torch.allclose(value.double(), reference.actor[name], atol=2e-6), (i, name)
        for k in range(2):
            for ours, theirs in ((agent.critics, reference.critics), (agent.target_critics, reference.targets)):
                for name, value in Reference.member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=2e-6), (i, k, name)
        assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-7)


class Table(nn.Module):
    """A network that gives the same numbers for every observation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.numbers.expand(len(x), -1)


def table_agent(**fields) -> SACDiscrete:
    """pi = (1/2, 1/4, 1/4); Q = (1, 2, 3) and (2, 0, 5); Q' = (0, 4, 2) and (6, 2, 2)."""
    space = gym.spaces.Box(-1, 1, (1,))
    agent = SACDiscrete(space, gym.spaces.Discrete(3), config(initial_alpha=0.2, **fields), network=Table)
    with torch.no_grad():
        agent.policy.trunk.numbers.copy_(torch.tensor([2.0, 1.0, 1.0]).log())
        agent.critics.ensemble.numbers.copy_(torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 5.0]]))
        agent.target_critics.ensemble.numbers.copy_(torch.tensor([[0.0, 4.0, 2.0], [6.0, 2.0, 2.0]]))
    return agent


def table_batch() -> Batch:
    zero = torch.zeros(1, dtype=torch.int64)
    obs, one = torch.zeros(1, 1), torch.ones(1)
    return Batch(obs, zero + 1, one, one * 0.5, obs, zero.bool(), zero, {"entropy": one * 0.5}, {})


ENTROPY = 0.5 * math.log(2) + 0.5 * math.log(4)  # 1.0397


def test_vanilla_losses_by_hand():
    metrics = table_agent(**VANILLA, critic_lr=1e-12).step(table_batch())
    # V = 1/2 * 0 + 1/4 * 2 + 1/4 * 2 + 0.2 H = 1 + 0.2079; y = 1 + V / 2 = 1.6040
    y = 1 + 0.5 * (1 + 0.2 * ENTROPY)
    assert metrics["target_mean"].item() == pytest.approx(y, abs=1e-6)
    assert metrics["critic_loss"].item() == pytest.approx(0.5 * ((2 - y) ** 2 + y**2), abs=1e-5)  # of Q(1): 2 and 0
    # min Q = (1, 0, 3): J = -0.2 H - (1/2 * 1 + 1/4 * 0 + 1/4 * 3)
    assert metrics["actor_loss"].item() == pytest.approx(-0.2 * ENTROPY - 1.25, abs=1e-5)
    assert metrics["entropy"].item() == pytest.approx(ENTROPY, abs=1e-6)
    assert metrics["target_entropy"].item() == pytest.approx(0.2 * math.log(3), abs=1e-6)


def test_stabilized_losses_by_hand():
    agent = table_agent(double_q="mean", entropy_penalty=0.5, q_clip=0.75, critic_lr=1e-12)
    metrics = agent.step(table_batch())
    # mean Q' = (3, 3, 2): V = 2.75 + 0.2 H, y = 1 + V / 2 = 2.4790
    y = 1 + 0.5 * (2.75 + 0.2 * ENTROPY)
    assert metrics["target_mean"].item() == pytest.approx(y, abs=1e-6)
    # Q(1) = 2, Q' = 4: clipped to 3.25, whose error 0.594 is above 0.229. Q(1) = 0, Q' = 2: 1.25, 1.510 below 6.145.
    assert (3.25 - y) ** 2 > (2 - y) ** 2 and (1.25 - y) ** 2 < y**2
    assert metrics["critic_loss"].item() == pytest.approx(0.5 * ((3.25 - y) ** 2 + y**2), abs=1e-5)
    assert metrics["q_clipped"].item() == 0.5
    # Only the second critic gets a gradient: Adam's first moment is a tenth of Q - y = -2.479 for the action taken.
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, -y / 10, 0.0]])
    assert torch.allclose(agent.critic_optimizer.first[0], expected, atol=1e-5)
    # mean Q = (1.5, 1, 4): J = -0.2 H - 2, and the entropy-penalty 0.5 / 2 (0.5 - H)^2
    by_hand = -0.2 * ENTROPY - 2 + 0.25 * (0.5 - ENTROPY) ** 2
    assert metrics["actor_loss"].item() == pytest.approx(by_hand, abs=1e-5)


def test_the_gradient_of_the_temperature_by_hand():
    agent = table_agent(target_entropy_ratio=0.5)
    agent.step(table_batch())
    assert agent.alpha_optimizer.first[0].item() == pytest.approx(0.1 * (ENTROPY - 0.5 * math.log(3)), abs=1e-6)


def test_the_target_entropy_is_each_rows_own_and_single_actions_push_nothing():
    agent = SACDiscrete(OBS, ACT, config(target_entropy_ratio=0.9), seed=1)
    batch = make_batch()[0]
    single = nn.functional.one_hot(batch.action - 2, 4).to(torch.int8)
    before = copy.deepcopy(agent.log_alpha)
    metrics = agent.step(Batch(**parts(batch) | {"obs": batch.obs | {"action_mask": single}}))
    assert torch.equal(agent.log_alpha, before) and metrics["entropy"] == 0 and metrics["target_entropy"] == 0

    some = batch.obs["action_mask"].clone()
    some[:16] = single[:16]
    obs = batch.obs | {"action_mask": some}
    entropy = agent.policy.distribution(obs).entropy()[:, 0]
    expected = (entropy[16:] - 0.9 * some[16:].sum(1).log()).sum() / 32
    agent = copy.deepcopy(agent)
    agent.alpha_optimizer.first[0].zero_()
    agent.step(Batch(**parts(batch) | {"obs": obs}))
    assert agent.alpha_optimizer.first[0].item() == pytest.approx(0.1 * expected.item(), abs=1e-6)


def parts(batch: Batch) -> dict:
    return {name: getattr(batch, name) for name in Batch.__dataclass_fields__}


@pytest.mark.parametrize("variant", [VANILLA, STABLE], ids=["vanilla", "stabilized"])
def test_what_does_not_exist_changes_nothing(variant):
    """Critics' values of masked actions, however large, and the policy's logits of them."""
    batch = make_batch()[0]
    masked = 3  # nowhere there, and never taken
    for obs in (batch.obs, batch.next_obs):
        obs["action_mask"][:, masked] = 0
    batch = Batch(**parts(batch) | {"action": batch.action.clamp(max=4)})
    batch.obs["action_mask"].scatter_(1, batch.action[:, None] - 2, 1)
    a, b = (SACDiscrete(OBS, ACT, config(**variant), seed=5) for _ in range(2))
    with torch.no_grad():
        for critics in (b.critics, b.target_critics):
            critics.ensemble.layers[-1].bias[..., masked] += 1e6
        b.policy.trunk[-1].bias[masked] += 50
    left, right = a.step(batch), b.step(batch)
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-6), name
    rest = torch.arange(4) != masked
    assert torch.equal(a.policy.trunk[-1].weight[rest], b.policy.trunk[-1].weight[rest])
    assert torch.equal(a.policy.trunk[0].weight, b.policy.trunk[0].weight)
    assert torch.equal(a.critics.ensemble.layers[0].weight, b.critics.ensemble.layers[0].weight)


@pytest.mark.parametrize("variant", [VANILLA, STABLE], ids=["vanilla", "stabilized"])
def test_padding_candidates_changes_nothing(variant):
    def agent(n: int) -> SACDiscrete:
        entries = {"state": OBS["state"], "action_mask": bits(n), "candidates": gym.spaces.Box(-1, 1, (n, 3))}
        settings = config(**variant | {"hidden": (16,)})
        return SACDiscrete(gym.spaces.Dict(entries), gym.spaces.Discrete(n, start=2), settings, seed=4)

    batch = make_batch(groups=2, candidates=3)

    def padded(obs):
        rows = torch.full((2, 32, 2, 3), 9.0)
        return obs | {
            "candidates": torch.cat([obs["candidates"], rows], 2),
            "action_mask": torch.cat([obs["action_mask"], torch.zeros(2, 32, 2, dtype=torch.int8)], 2),
        }

    a, b = agent(4), agent(6)
    left = a.update(batch)
    right = b.update(Batch(**parts(batch) | {"obs": padded(batch.obs), "next_obs": padded(batch.next_obs)}))
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-5), name
    assert_close(a, b)


# What is added to the scores of all candidates alike changes no probability: this bias has a gradient of nothing but
# rounding errors, of which Adam makes steps of its usual size.
ARBITRARY = ("generator", "/policy/trunk.2.bias", "/actor_optimizer/first/3", "/actor_optimizer/second/3")


def assert_close(a: SACDiscrete, b: SACDiscrete) -> None:
    left, right = pack(a.state_dict())[0], pack(b.state_dict())[0]
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert name.endswith(ARBITRARY) or torch.allclose(value, right[name], atol=1e-5), name


def test_the_policy_loss_leaves_the_critics_alone_and_reads_those_just_stepped():
    agent = SACDiscrete(OBS, ACT, config(critic_lr=0.01))
    stepped = []
    descend = agent.actor_optimizer.descend

    def spy(loss: Tensor) -> None:
        stepped.append([p.detach().clone() for p in agent.critics.parameters()])
        descend(loss)

    agent.actor_optimizer.descend = spy
    before = [p.detach().clone() for p in agent.critics.parameters()]
    agent.step(make_batch()[0])
    assert all(torch.equal(a, b) for a, b in zip(stepped[0], agent.critics.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(stepped[0], before, strict=True))


# Probe environments, in the spirit of andyljones.com/posts/rl-debugging: each fails for one kind of mistake.


def probe(reward, discount: float, *, next_obs=None, updates: int = 300, candidates: bool = False, **settings):
    """Train on batches from a made-up environment: observation -1 or 1, actions 5, 6 and 7; with `candidates` the
    action that is worth x has the feature x."""
    entries = {"x": gym.spaces.Box(-1, 1, (1,))} | ({"candidates": gym.spaces.Box(-1, 1, (3, 1))} if candidates else {})
    fields = {"hidden": (64,), "actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05, "alpha_lr": 0.0, "q_clip": 1.0}
    fields |= {"initial_alpha": 1e-3}
    agent = SACDiscrete(
        gym.spaces.Dict(entries), gym.spaces.Discrete(3, start=5), SACDiscreteConfig(**fields | settings)
    )
    g = torch.Generator().manual_seed(0)
    for _ in range(updates):
        x = torch.randint(0, 2, (1, 64, 1), generator=g).float() * 2 - 1
        action = torch.randint(5, 8, (1, 64), generator=g)
        following = x if next_obs is None else next_obs(x)
        obs, after = {"x": x}, {"x": following}
        worth = (action - 6).float()
        if candidates:
            features = torch.rand(1, 64, 3, 1, generator=g) * 2 - 1
            obs["candidates"] = after["candidates"] = features
            worth = features[..., 0].gather(-1, action[..., None] - 5)[..., 0]
        flag = torch.zeros(1, 64, dtype=torch.bool)
        extras = {"entropy": torch.full((1, 64), math.log(3))}
        r = reward(x[..., 0], worth)
        agent.update(Batch(obs, action, r, torch.full((1, 64), discount), after, flag, flag.long(), extras, {}))
    return agent


def q_of(agent: SACDiscrete, x: float) -> list[float]:
    return agent.value(agent.critics, {"x": torch.tensor([[x]])}).mean((0, 1)).tolist()


@pytest.mark.parametrize("variant", [VANILLA, {}], ids=["vanilla", "stabilized"])
def test_probe_rewards_are_told_apart_by_observation_and_action(variant):
    agent = probe(lambda x, a: x * a + 1, 0.0, updates=500, **variant)
    assert q_of(agent, 1.0) == pytest.approx([0, 1, 2], abs=0.1)
    assert q_of(agent, -1.0) == pytest.approx([2, 1, 0], abs=0.1)
    assert agent.policy.act({"x": torch.tensor([[1.0], [-1.0]])})[0].tolist() == [7, 5]


def test_probe_a_delayed_reward_is_discounted_once():
    # From -1 one comes to 1 with reward 0; from 1 the episode would go on in 1 with reward 1: values 1/(1-g), g/(1-g).
    agent = probe(lambda x, a: (x > 0).float(), 0.5, next_obs=torch.ones_like, updates=500)
    assert q_of(agent, 1.0) == pytest.approx([2] * 3, abs=0.2)
    assert q_of(agent, -1.0) == pytest.approx([1] * 3, abs=0.2)


def test_probe_a_zero_discount_stops_the_bootstrap():
    alive, dead = (probe(lambda x, a: torch.ones_like(x), d) for d in (0.5, 0.0))
    assert q_of(dead, 1.0) == pytest.approx([1] * 3, abs=0.1)
    assert q_of(alive, 1.0)[0] > 1.5


def test_probe_candidates_are_chosen_by_their_features():
    agent = probe(lambda x, a: x * a, 0.0, updates=500, candidates=True)
    features = torch.tensor([[[0.9], [-0.8], [0.1]]]).expand(2, 3, 1)
    assert agent.policy.act({"x": torch.tensor([[1.0], [-1.0]]), "candidates": features})[0].tolist() == [5, 6]


def test_probe_the_temperature_reaches_the_target_entropy():
    settings = {"alpha_lr": 1e-2, "initial_alpha": 1.0, "target_entropy_ratio": 0.5, "entropy_penalty": 0.0}
    agent = probe(lambda x, a: a, 0.0, updates=800, **settings)
    entropy = agent.policy.distribution({"x": torch.ones(1, 1)}).entropy().item()
    assert entropy == pytest.approx(0.5 * math.log(3), abs=0.08)


def test_probe_the_entropy_penalty_holds_the_entropy():
    free, held = (probe(lambda x, a: a, 0.0, updates=200, entropy_penalty=b) for b in (0.0, 10.0))
    free, held = (a.policy.distribution({"x": torch.ones(1, 1)}).entropy().item() for a in (free, held))
    assert free < 0.1 and held > 0.7


def test_images_are_seen_by_the_targets_own_convolution():
    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (1, 48, 48), np.uint8), "action_mask": bits(4)})
    agent = SACDiscrete(space, ACT, config(hidden=(16,), q_clip=0.1))
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 8, 1, 48, 48), generator=g, dtype=torch.uint8)
    base = make_batch(size=8)
    obs, next_obs = ({"image": pixels, "action_mask": o["action_mask"]} for o in (base.obs, base.next_obs))
    batch = Batch(**parts(base) | {"obs": obs, "next_obs": next_obs})
    assert all(bool(torch.isfinite(v)) for v in agent.update(batch).values())
    with torch.no_grad():
        for parameter in agent.target_critics.parameters():
            parameter.mul_(1.1)
    shift = torch.full((2, 8, 2), agent.config.random_shift)  # the middle: as they were
    seen = agent.seen_by_target(batch[0], shift)
    assert torch.allclose(agent.value(agent.target_critics, seen), agent.value(agent.target_critics, batch[0].obs))
    assert not torch.allclose(seen["image"], agent.critics.encoder.see(batch[0].obs)["image"])


def test_the_policy_waits_for_the_critics():
    agent = SACDiscrete(OBS, ACT, config(critic_only=2, policy_delay=2))
    before, alpha = copy.deepcopy(agent.policy.trunk.state_dict()), agent.log_alpha.item()
    for i in range(5):
        critic = agent.critics.ensemble.layers.state_dict()["0.weight"].clone()
        agent.update(make_batch(i))
        assert not torch.equal(critic, agent.critics.ensemble.layers.state_dict()["0.weight"])
        same = all(torch.equal(value, before[name]) for name, value in agent.policy.trunk.state_dict().items())
        assert (same, agent.log_alpha.item() == alpha) == ((True, True) if i < 3 else (False, False))


def test_same_seed_same_bits_and_groups_equal_single_steps():
    a, b, c = (SACDiscrete(OBS, ACT, config(), seed=s) for s in (7, 7, 8))
    batch = make_batch(groups=4)
    a.update(batch)
    c.update(batch)
    for g in range(4):
        b.step(batch[g])
    assert all(torch.equal(x, y) for x, y in zip(a._changing(), b._changing(), strict=True))
    assert not torch.equal(next(a.policy.parameters()), next(c.policy.parameters()))


@pytest.mark.parametrize("more", [{}, {"reference": True, "alpha_lr": 0.0}], ids=["entropy", "reference"])
def test_state_dict_continues_bit_for_bit(more):
    settings = config(normalize_obs=True, layer_norm=True, policy_delay=2, **more)
    a = SACDiscrete(OBS, ACT, settings, seed=1)
    a.observe({"state": torch.randn(50, 5) * 3, "action_mask": torch.ones(50, 4)}, torch.ones(50, dtype=torch.bool))
    a.update(make_batch(groups=3))
    b = SACDiscrete(OBS, ACT, settings, seed=2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, b):
        agent.update(make_batch(9, groups=3))
    left, right = pack(a.state_dict())[0], pack(b.state_dict())[0]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    obs = {k: v[0] for k, v in make_batch().obs.items()}
    assert torch.equal(a.policy.act(obs, explore=True)[0], b.policy.act(obs, explore=True)[0])


def test_the_reference_is_what_learning_began_with():
    """Not what was drawn when it was made: weights of another run may have been read in between."""
    settings = config(reference=True, alpha_lr=0.0)
    other, agent = (SACDiscrete(OBS, ACT, settings, seed=s) for s in (1, 2))
    agent.policy.load_state_dict(other.policy.state_dict())
    assert agent.update(make_batch(0))["kl_reference"] == 0
    for i in range(3):
        metrics = agent.update(make_batch(i))
    assert metrics["kl_reference"] > 0
    begun = other.policy.state_dict()
    assert all(torch.equal(value, begun[name]) for name, value in agent.reference.state_dict().items())
    with pytest.raises(UsageError, match=r"agent\.alpha_lr must be 0 with agent\.reference"):
        config(reference=True)
    pictures = gym.spaces.Box(0, 255, (3, 36, 36), np.uint8)
    with pytest.raises(UsageError, match=r"agent\.reference is not for images"):
        SACDiscrete(pictures, ACT, settings)


class CandidateEnv(MaskedEnv):
    """A masked environment whose actions have features; it goes on from its own state."""

    ctrlrl_state = True

    def __init__(self) -> None:
        super().__init__(candidates=True)

    def _obs(self):
        obs = super()._obs()
        features = self.np_random.random((4, 3), np.float32)
        return obs | {"state": self.np_random.random(2, np.float32), "candidates": features}

    def get_state(self):
        return {"t": self.t, "mask": self.mask.tolist(), "generator": self.np_random.bit_generator.state}

    def set_state(self, state):
        self.t, self.mask = state["t"], np.array(state["mask"], np.int8)
        self.np_random.bit_generator.state = state["generator"]


@pytest.mark.parametrize("env", ["CartPole-v1", CandidateEnv], ids=["cartpole", "candidates"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, env):
    given = {} if isinstance(env, str) else {"env": env}
    settings = SMALL | {"num_envs": 2, "eval_every": 100, "checkpoint_every": 200, "eval_episodes": 1}
    settings |= {"buffer": {"capacity": 200, "n_step": 2}, "agent": {"hidden": [8], "batch_size": 8}}
    ctrlrl.train("sac-discrete", env, out=str(tmp_path / "whole"), **settings | {"steps": 160})
    ctrlrl.train("sac-discrete", env, out=str(tmp_path / "parts"), **settings | {"steps": 100})
    ctrlrl.resume(tmp_path / "parts", steps=160, quiet=True, **given)
    state = load_checkpoint(RunFolder(tmp_path / "whole").find_checkpoint("last"))
    assert state["loop"]["updates"] == 100
    assert_same(tmp_path / "whole", tmp_path / "parts")
    policy = ctrlrl.load(tmp_path / "parts", checkpoint="last").policy
    assert all(torch.equal(v, state["agent"]["policy"][k]) for k, v in policy.state_dict().items())


def test_a_policy_that_would_never_learn_is_told_of(tmp_path):
    settings = SMALL | {"steps": 90, "eval_every": 0, "out": str(tmp_path / "r")}
    run = ctrlrl.train("sac-discrete", "CartPole-v1", **settings | {"agent": {"hidden": [8], "critic_only": 40}})
    told = (run.path / "metrics.jsonl").read_text()
    wanted = "its first update comes after agent.critic_only = 40, and there are 30 in all"
    assert (wanted in told) and "actor_loss" not in told


@needs_compiler
def test_compiled_updates_equal_eager_ones():
    space = gym.spaces.Dict(dict(OBS.spaces) | {"candidates": gym.spaces.Box(-1, 1, (4, 3))})
    eager = SACDiscrete(space, ACT, config(hidden=(16,), **STABLE), seed=1)
    compiled = SACDiscrete(space, ACT, config(hidden=(16,), execution="compiled", **STABLE), seed=1)
    for i in range(2):
        batch = make_batch(i, groups=2, candidates=3)
        ours, theirs = compiled.update(batch), eager.update(batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (gym.spaces.Box(-1, 1, (2,)), "Discrete SAC needs Discrete actions.* there are sac and td3"),
        (gym.spaces.MultiDiscrete([3, 2]), "Discrete SAC needs Discrete actions.* there is ppo"),
    ],
)
def test_unsuitable_action_spaces(space, message):
    with pytest.raises(UsageError, match=message):
        SACDiscrete(OBS, space)


def test_a_mask_of_another_name_is_taken_by_name_only():
    space = gym.spaces.Dict({"state": OBS["state"], "legal": bits(4)})
    assert SACDiscrete(space, ACT).policy.encoder.out_features == 9
    agent = SACDiscrete(space, ACT, config(action_mask="legal"))
    assert agent.policy.encoder.out_features == agent.critics.encoder.out_features == 5
    with pytest.raises(UsageError, match="no observation group 'legal'"):
        SACDiscrete(space, ACT, config(action_mask="legal", critic_obs=("state", "legal")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_entropy_ratio", 1.5),
        ("entropy_penalty", -1.0),
        ("q_clip", -0.5),
        ("critic_only", -1),
        ("double_q", "median"),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UsageError, match=rf"agent\.{field} must be"):
        SACDiscreteConfig(**{field: value})


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "LunarLander-v3"])
def test_presets(env):
    algorithm = find_algorithm("sac-discrete")
    assert algorithm.preset_for(env) is not None
    assert algorithm.preset_for("LunarLanderContinuous-v3") is None
