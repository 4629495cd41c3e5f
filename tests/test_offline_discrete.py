"""IQL and CQL for discrete actions: updates against float64 references, masks, candidates, learning."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.cql_discrete import CQLDiscrete
from ctrlrl.algorithms.cql_discrete_config import CQLDiscreteConfig
from ctrlrl.algorithms.iql_discrete import IQLDiscrete
from ctrlrl.algorithms.iql_discrete_config import IQLDiscreteConfig
from ctrlrl.algorithms.sac_discrete import SACDiscrete
from ctrlrl.algorithms.sac_discrete_config import SACDiscreteConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured
from ctrlrl.replay.batch import Batch
from tests.agents import assert_same_state
from tests.test_discrete import bits
from tests.test_execution import needs_compiler, rerun
from tests.test_sac import Adam64
from tests.test_sac_discrete import ACT, OBS, make_batch

BOTH = pytest.mark.parametrize("make", [IQLDiscrete, CQLDiscrete], ids=["iql", "cql"])
PLAIN = gym.spaces.Box(-np.inf, np.inf, (5,))


def made(make, space=OBS, act=ACT, seed: int = 3, **fields):
    return make(space, act, make.config_class(**{"hidden": (32, 32)} | fields), seed=seed)


def double(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double().clone() for name, value in module.state_dict().items()}


def bare(batch: Batch) -> Batch:
    """Of a space without mask."""
    return replace(batch, obs=batch.obs["state"], next_obs=batch.next_obs["state"])


class Reference:
    """What both share: networks one by one in float64, no code of ours."""

    def __init__(self, agent) -> None:
        self.c = agent.config
        self.critics, self.targets = (
            [self.member(c, k) for k in range(2)] for c in (agent.critics, agent.target_critics)
        )
        self.critic_optimizers = [Adam64(3e-4), Adam64(3e-4)]

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

    @staticmethod
    def parts(batch: Batch):
        """States, next states and, of each row, the choices that exist there; without a mask all."""
        if not isinstance(batch.obs, dict):
            every = [list(range(4)) for _ in batch.reward]
            return batch.obs.double(), batch.next_obs.double(), every, every
        there = [[row.nonzero()[:, 0].tolist() for row in o["action_mask"]] for o in (batch.obs, batch.next_obs)]
        return batch.obs["state"].double(), batch.next_obs["state"].double(), *there

    @staticmethod
    def descend(optimizer, params, loss):
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        return optimizer.step({n: p.detach() for n, p in params.items()}, grads)

    def move_targets(self) -> None:
        for t, p in zip(self.targets, self.critics, strict=True):
            for n in t:
                t[n] = t[n] + 0.005 * (p[n] - t[n])

    def assert_critics(self, agent) -> None:
        for k in range(2):
            for ours, theirs in ((agent.critics, self.critics), (agent.target_critics, self.targets)):
                for name, value in self.member(ours, k).items():
                    assert torch.allclose(value, theirs[k][name], atol=2e-6), (k, name)


class IQLReference(Reference):
    def __init__(self, agent: IQLDiscrete) -> None:
        super().__init__(agent)
        self.actor, self.v = double(agent.policy.trunk), double(agent.value.trunk)
        self.value_optimizer, self.actor_optimizer = Adam64(3e-4), Adam64(3e-4)

    def value(self, p, state, there):
        out = self.net(p, state)
        if out.shape[1] == 1:
            return out[:, 0]
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack(
            [(torch.softmax(q[e], 0) * q[e]).sum() if e else zero for q, e in zip(out, there, strict=True)]
        )

    def update(self, batch: Batch) -> None:
        c, taken = self.c, batch.action - 2
        state, next_state, there, next_there = self.parts(batch)
        best = torch.minimum(*(self.net(t, state).gather(1, taken[:, None])[:, 0] for t in self.targets))
        y = batch.reward.double() + batch.discount.double() * self.value(self.v, next_state, next_there)
        advantage = best - self.value(self.v, state, there)
        v = {n: p.clone().requires_grad_() for n, p in self.v.items()}
        u = best - self.value(v, state, there)
        self.v = self.descend(self.value_optimizer, v, (torch.abs(c.expectile - (u < 0).double()) * u**2).mean())
        for k in range(2):
            p = {n: w.clone().requires_grad_() for n, w in self.critics[k].items()}
            loss = ((self.net(p, state).gather(1, taken[:, None])[:, 0] - y) ** 2).mean()
            self.critics[k] = self.descend(self.critic_optimizers[k], p, loss)
        actor = {n: p.clone().requires_grad_() for n, p in self.actor.items()}
        logits, losses = self.net(actor, state), []
        for i, exists in enumerate(there):
            log_pi = torch.log_softmax(logits[i][exists], 0)[exists.index(int(taken[i]))]
            losses.append(-min(math.exp(c.beta * advantage[i]), 100.0) * log_pi)
        self.actor = self.descend(self.actor_optimizer, actor, torch.stack(losses).mean())
        self.move_targets()


@pytest.mark.parametrize("masked", [True, False])
def test_five_updates_of_iql_equal_the_float64_reference(masked):
    agent = made(IQLDiscrete, OBS if masked else PLAIN, expectile=0.8, actor_lr_steps=0)
    assert agent.value.trunk[-1].out_features == (4 if masked else 1)
    reference = IQLReference(agent)
    for i in range(5):
        batch = make_batch(i)[0] if masked else bare(make_batch(i)[0])
        agent.step(batch)
        reference.update(batch)
        reference.assert_critics(agent)
        for module, theirs in ((agent.policy.trunk, reference.actor), (agent.value.trunk, reference.v)):
            for name, value in double(module).items():
                assert torch.allclose(value, theirs[name], atol=2e-6), (i, name)


class CQLReference(Reference):
    def update(self, batch: Batch) -> None:
        c, taken = self.c, batch.action - 2
        state, next_state, there, next_there = self.parts(batch)
        online = sum(self.net(p, next_state) for p in self.critics) / 2
        target = torch.minimum(*(self.net(t, next_state) for t in self.targets))
        y = batch.reward.double().clone()
        for i, exists in enumerate(next_there):
            if exists:
                best = max(exists, key=lambda j: online[i, j].item())
                y[i] += batch.discount[i].double() * target[i, best]
        for k in range(2):
            p = {n: w.clone().requires_grad_() for n, w in self.critics[k].items()}
            q, losses = self.net(p, state), []
            for i, exists in enumerate(there):
                mine = q[i, taken[i]]
                gap = torch.log(sum(torch.exp(q[i, j]) for j in exists)) - mine
                losses.append((mine - y[i]) ** 2 / 2 + c.conservative_weight * gap)
            self.critics[k] = self.descend(self.critic_optimizers[k], p, torch.stack(losses).mean())
        self.move_targets()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_five_updates_of_cql_equal_the_float64_reference(masked, weight):
    agent = made(CQLDiscrete, OBS if masked else PLAIN, conservative_weight=weight)
    with torch.no_grad():  # away from the critics, whose best action it is that counts
        for target in agent.target_critics.parameters():
            target.mul_(-1.5)
    reference = CQLReference(agent)
    for i in range(5):
        batch = make_batch(i)[0] if masked else bare(make_batch(i)[0])
        agent.step(batch)
        reference.update(batch)
        reference.assert_critics(agent)


def test_the_policy_of_cql_is_its_critics():
    agent = made(CQLDiscrete)
    obs = make_batch().obs
    obs = {name: value[0] for name, value in obs.items()}
    q = agent.value(agent.critics, obs).mean(0).masked_fill(obs["action_mask"] == 0, -math.inf)
    assert torch.equal(agent.policy.act(obs)[0], q.argmax(-1) + 2)
    torch.testing.assert_close(agent.policy.distribution(obs).probs[:, 0], torch.softmax(q, -1))
    assert {id(p) for p in agent.policy.parameters()} == {id(p) for p in agent.critics.parameters()}
    before = agent.policy.distribution(obs).logits.clone()
    agent.update(make_batch())
    assert not torch.equal(agent.policy.distribution(obs).logits, before)


@BOTH
def test_a_policy_acts_and_explores_among_what_exists(make):
    agent = made(make)
    obs = {name: value[0] for name, value in make_batch(size=400).obs.items()}
    for explore in (False, True):
        action, _, extras = agent.policy.act(obs, explore=explore)
        assert obs["action_mask"].gather(1, action[:, None] - 2).all() and extras["entropy"].shape == (400,)


@BOTH
def test_what_does_not_exist_changes_nothing(make):
    """Critics' values of masked actions, however large, V's numbers for them, and the policy's logits."""
    batch = make_batch()[0]
    masked = 3  # nowhere there, and never taken
    for obs in (batch.obs, batch.next_obs):
        obs["action_mask"][:, masked] = 0
    batch = replace(batch, action=batch.action.clamp(max=4))
    batch.obs["action_mask"].scatter_(1, batch.action[:, None] - 2, 1)
    a, b = made(make), made(make)
    with torch.no_grad():
        for critics in (b.critics, b.target_critics):
            critics.ensemble.layers[-1].bias[..., masked] += 1e6
        if make is IQLDiscrete:
            b.policy.trunk[-1].bias[masked] += 50
            b.value.trunk[-1].bias[masked] += 50
    left, right = a.step(batch), b.step(batch)
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-6), name
    assert torch.equal(a.critics.ensemble.layers[0].weight, b.critics.ensemble.layers[0].weight)
    if make is IQLDiscrete:
        assert torch.equal(a.policy.trunk[0].weight, b.policy.trunk[0].weight)
        assert torch.equal(a.value.trunk[0].weight, b.value.trunk[0].weight)


@BOTH
def test_padding_and_the_order_of_candidates_change_nothing(make):
    def agent(n: int):
        entries = {"state": OBS["state"], "action_mask": bits(n), "candidates": gym.spaces.Box(-1, 1, (n, 3))}
        return made(make, gym.spaces.Dict(entries), gym.spaces.Discrete(n, start=2), hidden=(16,))

    batch = make_batch(groups=2, candidates=3)
    order = torch.tensor([4, 2, 0, 5, 1, 3])

    def padded(obs):
        rows = torch.full((2, 32, 2, 3), 9.0)
        mask = torch.cat([obs["action_mask"], torch.zeros(2, 32, 2, dtype=torch.int8)], 2)
        return obs | {
            "candidates": torch.cat([obs["candidates"], rows], 2)[:, :, order],
            "action_mask": mask[:, :, order],
        }

    action = order.argsort()[batch.action - 2] + 2
    a, b = agent(4), agent(6)
    left = a.update(batch)
    right = b.update(replace(batch, action=action, obs=padded(batch.obs), next_obs=padded(batch.next_obs)))
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-5), name
    for ours, theirs in zip(a.critics.parameters(), b.critics.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_v_sees_which_actions_there_are():
    agent = made(IQLDiscrete)
    state = torch.randn(1, 5).expand(3, -1)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.int8)
    v = agent.value({"state": state, "action_mask": mask})
    scores = agent.value.trunk(state[0])
    expected = [(torch.softmax(scores, 0) * scores).sum().item(), scores[1].item(), 0.0]
    assert v.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_action_of_the_data_that_its_mask_excludes():
    batch = make_batch()[0]
    excluded = batch.obs["action_mask"].scatter(1, batch.action[:, None] - 2, 0)
    batch = replace(batch, obs=batch.obs | {"action_mask": excluded})
    policy = made(IQLDiscrete)
    before = copy.deepcopy(policy.policy.state_dict())
    assert all(bool(value.isfinite()) for value in policy.step(batch).values())  # some rows have no action left
    assert all(torch.equal(before[name], value) for name, value in policy.policy.state_dict().items())
    metrics = made(CQLDiscrete).step(batch)
    assert all(bool(value.isfinite()) for value in metrics.values()) and metrics["conservative_gap"] >= 0


# Learning.


def chain(make, updates: int = 400, **fields):
    """Train on a chain of which no episode of the data has seen the whole; returns the agent and what it earns.

    From the start (0) action 1 leads to the middle, 0 ends with 0.3; in the middle 1 ends with 1, and 0 with 0. Action
    2 is in no data: in the start it is masked, in the middle it exists. Most actions in the data are 0.
    """
    space = gym.spaces.Dict({"x": gym.spaces.Box(0, 1, (2,)), "action_mask": bits(3)})
    numbers = {"hidden": (64, 64), "critic_lr": 2e-3, "tau": 0.05} | fields
    agent = make(space, gym.spaces.Discrete(3), make.config_class(**numbers), seed=1)
    g = torch.Generator().manual_seed(0)

    def seen(middle: Tensor) -> dict[str, Tensor]:
        mask = torch.stack([torch.ones_like(middle), torch.ones_like(middle), middle], -1).to(torch.int8)
        return {"x": nn.functional.one_hot(middle.long(), 2).float(), "action_mask": mask}

    for _ in range(updates):
        middle = torch.rand(1, 128, generator=g) < 0.5
        action = (torch.rand(1, 128, generator=g) < 0.25).long()
        reward = torch.where(middle, action.float(), torch.where(action == 1, 0.0, 0.3))
        goes_on = ~middle & (action == 1)
        discount, following = 0.9 * goes_on.float(), seen(torch.ones_like(middle))
        agent.update(Batch(seen(middle), action, reward, discount, following, ~goes_on, middle.long(), {}, {}))
    both = {name: value[0] for name, value in seen(torch.tensor([[False, True]])).items()}
    first, second = agent.policy.act(both)[0].tolist()
    return agent, both, 0.3 if first == 0 else float(second == 1)


def test_iql_stitches_what_no_episode_shows_where_cloning_fails():
    numbers = {"actor_lr": 2e-3, "expectile": 0.9, "actor_lr_steps": 0}
    agent, both, earned = chain(IQLDiscrete, beta=10.0, **numbers)
    assert earned == 1.0
    assert agent.policy.distribution(both).probs[:, 0, 1].min() > 0.9
    _, _, cloned = chain(IQLDiscrete, beta=0.0, **numbers)
    assert cloned == 0.3


def test_cql_stitches_and_keeps_what_the_data_has_not_below_what_it_has():
    agent, both, earned = chain(CQLDiscrete, conservative_weight=0.1)
    assert earned == 1.0
    q = agent.value(agent.critics, both).mean(0)[1]
    assert q[2] < q[0] - 0.5 and q[0] < q[1]
    assert q[1].item() == pytest.approx(1.0, abs=0.2)
    _, _, cautious = chain(CQLDiscrete, conservative_weight=10.0)  # the data's likeliest actions
    assert cautious == 0.3


def test_a_policy_is_made_of_values_that_were_learned_before():
    numbers = {"actor_lr": 2e-3, "expectile": 0.9, "actor_lr_steps": 0, "beta": 10.0}
    values, _, _ = chain(IQLDiscrete, learn="value", **numbers)
    settings = IQLDiscreteConfig(**numbers, hidden=(64, 64), learn="policy")
    space = gym.spaces.Dict({"x": gym.spaces.Box(0, 1, (2,)), "action_mask": bits(3)})
    agent = IQLDiscrete(space, gym.spaces.Discrete(3), settings, seed=2)
    for name in ("critics", "target_critics", "value"):
        getattr(agent, name).load_state_dict(getattr(values, name).state_dict())
    frozen = [p.detach().clone() for p in [*agent.critics.parameters(), *agent.value.parameters()]]
    x, mask = torch.eye(2).repeat(32, 1), torch.ones(64, 3, dtype=torch.int8)
    action, nothing = torch.tensor([0, 0, 1, 1] * 16), torch.zeros(64)
    obs = {"x": x, "action_mask": mask}
    batch = Batch(obs, action, nothing, nothing, obs, nothing.bool(), nothing.long(), {}, {})
    for _ in range(200):
        agent.update(batch.map(lambda value: value[None]))
    assert agent.policy.act({"x": torch.eye(2), "action_mask": mask[:2]})[0].tolist() == [1, 1]
    assert all(
        torch.equal(a, b) for a, b in zip(frozen, [*agent.critics.parameters(), *agent.value.parameters()], strict=True)
    )


def test_discrete_sac_goes_on_from_iql():
    offline, online = made(IQLDiscrete), SACDiscrete(OBS, ACT, SACDiscreteConfig(hidden=(32, 32)))
    for name in ("policy", "critics", "target_critics"):
        getattr(online, name).load_state_dict(getattr(offline, name).state_dict())
    online.update(make_batch())


# Repeating, resuming, compiling.


@BOTH
def test_same_seed_same_bits_and_groups_equal_single_steps(make):
    a, b, c = (made(make, seed=s) for s in (7, 7, 8))
    batch = make_batch(groups=4)
    a.update(batch)
    c.update(batch)
    for g in range(4):
        b.step(batch[g])
    assert all(torch.equal(x, y) for x, y in zip(a._changing(), b._changing(), strict=True))
    assert not torch.equal(next(a.policy.parameters()), next(c.policy.parameters()))


@BOTH
def test_state_dict_continues_bit_for_bit(make):
    fields = {"normalize_obs": True, "layer_norm": True} | ({"actor_lr_steps": 4} if make is IQLDiscrete else {})
    a, b = made(make, seed=1, **fields), made(make, seed=2, **fields)
    seen = {"state": torch.randn(50, 5) * 3 + 1, "action_mask": torch.ones(50, 4)}
    a.observe(seen, torch.ones(50, dtype=torch.bool))
    a.update(make_batch(groups=3))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, b):
        agent.update(make_batch(9, groups=3))
    assert a.updates == b.updates == 6
    assert_same_state(a, b)
    obs = {k: v[0] for k, v in make_batch().obs.items()}
    assert torch.equal(a.policy.act(obs, explore=True)[0], b.policy.act(obs, explore=True)[0])


@BOTH
def test_captured_steps_equal_eager_ones(make):
    eager, captured = made(make), made(make)
    step = Captured(captured.step, captured._changing, rerun)
    for i in range(3):
        theirs, ours = eager.step(make_batch(i)[0]), step(make_batch(i)[0], None)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_same_state(captured, eager)


@needs_compiler
@BOTH
def test_compiled_updates_equal_eager_ones(make):
    space = gym.spaces.Dict(dict(OBS.spaces) | {"candidates": gym.spaces.Box(-1, 1, (4, 3))})
    eager, compiled = (made(make, space, hidden=(16,), execution=e, seed=1) for e in ("eager", "compiled"))
    for i in range(2):
        batch = make_batch(i, groups=2, candidates=3)
        ours, theirs = compiled.update(batch), eager.update(batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    for a, b in zip(compiled.critics.parameters(), eager.critics.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@BOTH
def test_updates_in_bfloat16(make):
    metrics = made(make, precision="bfloat16").update(make_batch(groups=2))
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in metrics.values())


@BOTH
def test_images(make):
    space = gym.spaces.Dict({"eye": gym.spaces.Box(0, 255, (48, 48, 3), np.uint8), "action_mask": bits(4)})
    agent = made(make, space, hidden=(16,))
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 1, 8, 48, 48, 3), generator=g, dtype=torch.uint8)
    base = make_batch(size=8)
    obs, next_obs = (
        {"eye": eye, "action_mask": o["action_mask"]} for eye, o in zip(pixels, (base.obs, base.next_obs), strict=True)
    )
    before = [p.detach().clone() for p in agent.critics.encoder.parameters()]
    assert agent.draw(3, 8)[0].shape == (3, 2, 8, 2)
    metrics = agent.update(replace(base, obs=obs, next_obs=next_obs))
    assert all(bool(value.isfinite()) for value in metrics.values())
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.critics.encoder.parameters(), strict=True))
    assert agent.policy.encoder.convolutions["eye"] is agent.critics.encoder.convolutions["eye"]


@BOTH
def test_custom_networks(make):
    def network(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    agent = make(OBS, ACT, network=network)
    before = [p.detach().clone() for p in agent.critics.parameters()]
    assert all(bool(value.isfinite()) for value in agent.update(make_batch()).values())
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.critics.parameters(), strict=True))


def test_cql_reads_what_the_policy_reads():
    space = gym.spaces.Dict({"policy": gym.spaces.Box(-1, 1, (3,)), "privileged": gym.spaces.Box(-1, 1, (2,))})
    assert made(CQLDiscrete, space).critics.encoder.out_features == 3
    agent = made(IQLDiscrete, space)
    assert agent.policy.encoder.out_features == 3
    assert agent.critics.encoder.out_features == agent.value.encoder.out_features == 5


@BOTH
@pytest.mark.parametrize("space", [gym.spaces.Box(-1, 1, (2,)), gym.spaces.MultiDiscrete([3, 2])])
def test_unsuitable_action_spaces(make, space):
    with pytest.raises(UsageError, match=r"Discrete (IQL|CQL) needs Discrete actions"):
        make(OBS, space)


@pytest.mark.parametrize(
    ("field", "value"),
    [("conservative_weight", -1.0), ("gamma", 0.0), ("tau", 2.0), ("critic_lr", 0.0), ("num_critics", 0)],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UsageError, match=rf"agent\.{field} must be"):
        CQLDiscreteConfig(**{field: value})
