"""BC: updates of each kind of policy against a float64 reference, weights, masks and candidates, and what it copies."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.discrete import CategoricalPolicy
from ctrlrl.nn.execution import Captured
from ctrlrl.nn.vision import Convolution
from ctrlrl.replay.batch import Batch
from tests.agents import assert_same_state
from tests.test_execution import needs_compiler, rerun
from tests.test_pixels import MIXED
from tests.test_pixels import make_batch as make_image_batch
from tests.test_sac import ACT, OBS, Adam64, make_batch
from tests.test_symmetry import ACTION, OBSERVATION, boxes, reflect

KINDS = ["deterministic", "gaussian", "tanh-gaussian"]
MASKED = gym.spaces.Dict(
    {"obs": gym.spaces.Box(-1, 1, (3,)), "action_mask": gym.spaces.MultiBinary(4)},
)
CANDIDATES = gym.spaces.Dict(
    {
        "obs": gym.spaces.Box(-1, 1, (1,)),
        "candidates": gym.spaces.Box(-1, 1, (5, 2)),
        "candidate_mask": gym.spaces.MultiBinary(5),
    }
)
SPACES = {
    "discrete": (gym.spaces.Box(-np.inf, np.inf, (5,)), gym.spaces.Discrete(4, start=2)),
    "multi-discrete": (gym.spaces.Box(-np.inf, np.inf, (5,)), gym.spaces.MultiDiscrete([3, 2])),
    "masked": (MASKED, gym.spaces.Discrete(4)),
    "candidates": (CANDIDATES, gym.spaces.Discrete(5)),
}


def batch_of(obs, action, **fields) -> Batch:
    """A batch [G, B, ...] of observations and actions alone."""
    shape = action.shape[:2]
    none, flag = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    return Batch(obs, action, none, none, obs, flag, flag.long(), {}, {}, **fields)


def make_discrete_batch(name: str, seed: int = 0, size: int = 32, groups: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    space, actions = SPACES[name]
    if isinstance(actions, gym.spaces.MultiDiscrete):
        action = torch.stack([torch.randint(0, int(n), (groups, size), generator=g) for n in actions.nvec], -1)
        return batch_of(torch.randn(groups, size, 5, generator=g), action)
    action = torch.randint(0, int(actions.n), (groups, size), generator=g)
    if not isinstance(space, gym.spaces.Dict):
        return batch_of(torch.randn(groups, size, 5, generator=g), action + int(actions.start))
    mask = torch.rand(groups, size, int(actions.n), generator=g) < 0.6
    mask.scatter_(-1, action.unsqueeze(-1), True)  # what was done existed
    obs = {"obs": torch.randn(groups, size, *space["obs"].shape, generator=g)}
    if name == "candidates":
        obs["candidates"] = torch.rand(groups, size, 5, 2, generator=g) * 2 - 1
    return batch_of(obs | {("candidate_mask" if name == "candidates" else "action_mask"): mask}, action)


def network(p, x):
    h = torch.relu(x @ p["0.weight"].T + p["0.bias"])
    h = torch.relu(h @ p["2.weight"].T + p["2.bias"])
    return h @ p["4.weight"].T + p["4.bias"]


class BCReference:
    """The same updates written out once more: explicit sums, float64, no code of ours."""

    def __init__(self, agent: BC) -> None:
        self.kind, self.adam = agent.config.policy, Adam64(agent.config.lr)
        self.params = {k: v.detach().double().clone() for k, v in agent.policy.trunk.state_dict().items()}
        if self.kind == "gaussian":
            self.params["log_std"] = agent.policy.head.log_std.detach().double().clone()
        self.bounds = agent.config.log_std_bounds
        entry = agent.normalizer.entry("obs") if agent.normalizer else None
        self.mean, self.std = (entry.mean, entry.variance.sqrt()) if entry else (0.0, 1.0)

    def box(self, p, obs, unit):
        out = network(p, obs)
        if self.kind == "deterministic":
            return ((torch.tanh(out) - unit) ** 2).sum(1) / 2
        if self.kind == "gaussian":
            return -torch.distributions.Normal(out, p["log_std"].exp()).log_prob(unit).sum(1)
        mean, log_std = out[:, :2], out[:, 2:].clamp(*self.bounds)
        raw = torch.atanh(unit.clamp(-0.999, 0.999))
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(raw) - torch.log(1 - torch.tanh(raw) ** 2)
        return -density.sum(1)

    def discrete(self, p, obs, action, sizes):
        """The cross-entropies of decisions, one after the other; each over the first so many of the padded logits."""
        logits = network(p, obs).view(len(obs), len(sizes), max(sizes))
        losses = [
            torch.nn.functional.cross_entropy(logits[:, d, :n], action[:, d], reduction="none")
            for d, n in enumerate(sizes)
        ]
        return sum(losses)

    def masked(self, p, obs, action, mask, candidates):
        rows = []
        for i in range(len(action)):
            if candidates is None:
                scores = network(p, obs[i : i + 1])[0]
            else:
                scores = torch.cat([network(p, torch.cat([obs[i], c])[None])[0] for c in candidates[i]])
            there = scores[mask[i]]
            rows.append(-(scores[action[i]] - torch.logsumexp(there, 0)))
        return torch.stack(rows)

    def step(self, loss_of, weight) -> None:
        p = {k: v.clone().requires_grad_() for k, v in self.params.items()}
        loss = (weight * loss_of(p)).sum() / len(weight)
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
        self.params = self.adam.step(self.params, grads)
        if "log_std" in self.params:
            self.params["log_std"] = self.params["log_std"].clamp(*self.bounds)

    def standardized(self, obs):
        return (obs.double() - self.mean) / self.std


def assert_reference(agent: BC, reference: BCReference) -> None:
    for name, value in agent.policy.trunk.state_dict().items():
        assert torch.allclose(value.double(), reference.params[name], atol=3e-6), name
    if reference.kind == "gaussian":
        assert torch.allclose(agent.policy.head.log_std.double(), reference.params["log_std"], atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_box_policies_equal_the_float64_reference(kind, weighted):
    config = BCConfig(hidden=(32, 32), policy=kind, log_std_bounds=(-2.0, 0.0004), lr=1e-3)
    agent = BC(OBS, ACT, config, seed=3)
    agent.observe(torch.randn(500, 5) * 2 + 1, torch.ones(500, dtype=torch.bool))
    reference = BCReference(agent)
    low, high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
    for i in range(5):
        batch = make_batch(i)
        batch.action[:, :4] = torch.as_tensor(ACT.high)  # the bounds are in the data, too
        weight = torch.rand(1, 32, generator=torch.Generator().manual_seed(i))
        agent.update(replace(batch, weight=weight) if weighted else batch)
        obs, unit = reference.standardized(batch.obs[0]), 2 * (batch.action[0].double() - low) / (high - low) - 1
        ones = weight[0].double() if weighted else torch.ones(32).double()
        reference.step(lambda p, obs=obs, unit=unit: reference.box(p, obs, unit), ones)
        assert_reference(agent, reference)


@pytest.mark.parametrize("name", SPACES)
def test_updates_of_categorical_policies_equal_the_float64_reference(name):
    agent = BC(*SPACES[name], BCConfig(hidden=(32, 32)), seed=3)
    assert isinstance(agent.policy, CategoricalPolicy)
    reference = BCReference(agent)
    for i in range(4):
        batch = make_discrete_batch(name, i)
        agent.update(batch)
        one, ones = batch[0], torch.ones(32).double()
        if name in ("masked", "candidates"):
            candidates = one.obs["candidates"].double() if name == "candidates" else None
            mask = one.obs["candidate_mask" if name == "candidates" else "action_mask"]
            arguments = one.obs["obs"].double(), one.action, mask, candidates
            reference.step(lambda p, a=arguments: reference.masked(p, *a), ones)
        else:
            sizes = [4] if name == "discrete" else [3, 2]
            action = one.action[:, None] - 2 if name == "discrete" else one.action
            arguments = one.obs.double(), action, sizes
            reference.step(lambda p, a=arguments: reference.discrete(p, *a), ones)
        if name != "candidates":
            assert_reference(agent, reference)
    if name == "candidates":
        # What moves all candidates' scores alike has a gradient of 0, which rounding gives a sign, and Adam a size.
        exact = reference.masked(reference.params, *arguments)
        ours = -agent.policy.distribution(one.obs).log_prob(one.action[:, None])[:, 0]
        assert torch.allclose(ours.double(), exact, atol=1e-5)


def clone(obs, action, updates: int = 400, weight=None, observation_space=None, action_space=None, **settings) -> BC:
    """Train on all of (B, ...) at each update."""
    space = observation_space or gym.spaces.Box(-1, 1, (1,))
    config = BCConfig(**{"hidden": (32, 32), "lr": 3e-3} | settings)
    agent = BC(space, action_space or gym.spaces.Box(-0.4, 1.6, (1,)), config)
    fields = {} if weight is None else {"weight": weight[None]}
    batch = batch_of({k: v[None] for k, v in obs.items()} if isinstance(obs, dict) else obs[None], action[None])
    for _ in range(updates):
        agent.update(replace(batch, **fields))
    return agent


def bandit(size: int = 512):
    """Actions around 0 in the state 1 and around 1.2 in the state -1, with a standard deviation of 0.1."""
    g = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 2, (size, 1), generator=g).float() * 2 - 1
    return obs, 0.6 - 0.6 * obs + 0.1 * torch.randn(size, 1, generator=g)


STATES = torch.tensor([[1.0], [-1.0]])


@pytest.mark.parametrize("kind", KINDS)
def test_it_copies_the_mean_and_a_gaussian_the_spread(kind):
    agent = clone(*bandit(), policy=kind, updates=800, log_std_bounds=(-4.0, 1.0))
    mode, _, _ = agent.policy.act(STATES)
    assert mode.flatten().tolist() == pytest.approx([0.0, 1.2], abs=0.06)
    drawn, _, _ = agent.policy.act(STATES.repeat(2000, 1), explore=True)
    spread = drawn.view(2000, 2).std(0).tolist()
    assert spread == pytest.approx([0.0, 0.0] if kind == "deterministic" else [0.1, 0.1], abs=0.03)


def test_rows_without_weight_are_left_out():
    obs, action = bandit()
    bad = torch.rand(len(obs), generator=torch.Generator().manual_seed(1)) < 0.5
    action[bad] = -0.4
    agent = clone(obs, action, weight=(~bad).float())
    assert agent.policy.act(STATES)[0].flatten().tolist() == pytest.approx([0.0, 1.2], abs=0.06)
    all_alike = clone(obs, action)
    assert (all_alike.policy.act(STATES)[0].flatten() < torch.tensor([-0.1, 0.7])).all()


def test_the_standard_deviation_ends_at_its_bound_where_the_data_have_none():
    obs, _ = bandit(64)
    for kind in ("gaussian", "tanh-gaussian"):
        agent = clone(obs, 0.6 - 0.3 * obs, updates=600, policy=kind, lr=1e-2, log_std_bounds=(-2.0, 1.0))
        drawn, _, _ = agent.policy.act(STATES.repeat(500, 1), explore=True)
        assert drawn.isfinite().all()
        metrics = agent.update(batch_of(obs[None], (0.6 - 0.3 * obs)[None]))
        assert metrics["log_std"].item() == pytest.approx(-2.0, abs=0.05)


@pytest.mark.parametrize("name", ["masked", "candidates"])
def test_choices_that_do_not_exist_have_probability_0(name):
    agent = BC(*SPACES[name], BCConfig(hidden=(16,)))
    for i in range(20):
        agent.update(make_discrete_batch(name, i))
    obs = make_discrete_batch(name, 99, size=400)[0].obs
    mask = obs["candidate_mask" if name == "candidates" else "action_mask"]
    probs = agent.policy.distribution(obs).probs[:, 0]
    assert torch.equal(probs > 0, mask)
    assert torch.allclose(probs.sum(-1), torch.ones(400))
    for explore in (False, True):
        action, _, _ = agent.policy.act(obs, explore=explore)
        assert mask.gather(1, action[:, None]).all()


def test_it_learns_which_candidate_is_taken_wherever_it_stands():
    """The data's action is the candidate with the largest first feature, of those that exist."""
    batch = make_discrete_batch("candidates", size=256)[0]
    feature = batch.obs["candidates"][..., 0].masked_fill(~batch.obs["candidate_mask"], -9)
    agent = clone(
        batch.obs, feature.argmax(-1), updates=300, observation_space=CANDIDATES, action_space=SPACES["candidates"][1]
    )
    fresh = make_discrete_batch("candidates", 7, size=256)[0].obs
    best = fresh["candidates"][..., 0].masked_fill(~fresh["candidate_mask"], -9).argmax(-1)
    assert (agent.policy.act(fresh)[0] == best).float().mean() > 0.9


def test_rows_whose_action_the_mask_rules_out_teach_nothing_and_are_counted():
    batch = make_discrete_batch("masked")
    wrong = batch.obs["action_mask"].clone().scatter_(-1, batch.action.unsqueeze(-1), False)
    wrong[..., 3] |= ~wrong.any(-1)  # something is left to choose
    wrong.scatter_(-1, batch.action.unsqueeze(-1), False)
    a, b = BC(*SPACES["masked"], BCConfig(hidden=(16,))), BC(*SPACES["masked"], BCConfig(hidden=(16,)))
    metrics = a.update(replace(batch, obs=batch.obs | {"action_mask": wrong}))
    assert metrics["impossible_actions"] == 1 and metrics["actor_loss"] == 0
    assert all(torch.equal(x, y) for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True))
    half = batch.obs["action_mask"].clone()
    half[:, 16:] = wrong[:, 16:]
    metrics = a.update(replace(batch, obs=batch.obs | {"action_mask": half}))
    assert metrics["impossible_actions"] == 0.5
    only = b.update(batch.map(lambda x: x[:, :16]))
    assert metrics["actor_loss"].item() == pytest.approx(only["actor_loss"].item() / 2, rel=1e-5)


def test_metrics_say_how_far_from_the_data_the_policy_is():
    agent = BC(OBS, ACT, BCConfig(hidden=(16,), normalize_obs=False))
    batch = make_batch()
    theirs = agent.policy.act(batch.obs[0])[0]
    metrics = agent.update(replace(batch, action=theirs[None]))
    assert metrics["actor_loss"] < 1e-12 and metrics["action_error"] < 1e-6
    discrete = BC(*SPACES["discrete"], BCConfig(hidden=(16,)))
    batch = make_discrete_batch("discrete")
    share = (discrete.policy.act(batch.obs[0])[0] == batch.action[0]).float().mean()
    assert discrete.update(batch)["accuracy"] == share


AGENTS = [(OBS, ACT, {"policy": kind}) for kind in KINDS] + [(*SPACES["candidates"], {})]


def some(action_space, seed: int, groups: int) -> Batch:
    discrete = isinstance(action_space, gym.spaces.Discrete)
    return make_discrete_batch("candidates", seed, groups=groups) if discrete else make_batch(seed, groups=groups)


@pytest.mark.parametrize(("observed", "acts", "settings"), AGENTS)
def test_the_same_bits_again_and_from_a_state_dict(observed, acts, settings):
    config = BCConfig(hidden=(16,), **settings)
    a, b, c = (BC(observed, acts, config, seed=seed) for seed in (1, 1, 2))
    for agent in (a, b):
        agent.observe(some(acts, 5, 1)[0].obs, torch.ones(32, dtype=torch.bool))
        agent.update(some(acts, 0, 3))
    assert_same_state(a, b)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, c):
        agent.update(some(acts, 9, 3))
    assert a.updates == c.updates == 6
    assert_same_state(a, c)


@pytest.mark.parametrize(("observed", "acts", "settings"), AGENTS)
def test_captured_steps_equal_eager_ones(observed, acts, settings):
    eager, captured = (BC(observed, acts, BCConfig(hidden=(16,), **settings), seed=1) for _ in range(2))
    captured._steps = {k: Captured(step, captured._changing, rerun) for k, step in captured._steps.items()}
    for i in range(2):
        ours, theirs = captured.update(some(acts, i, 2)), eager.update(some(acts, i, 2))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_same_state(captured, eager)


@needs_compiler
@pytest.mark.parametrize(("observed", "acts", "settings"), AGENTS)
def test_compiled_updates_equal_eager_ones(observed, acts, settings):
    config = BCConfig(hidden=(16,), **settings)
    eager, compiled = (BC(observed, acts, replace(config, execution=how), seed=1) for how in ("eager", "compiled"))
    for i in range(3):
        ours, theirs = compiled.update(some(acts, i, 2)), eager.update(some(acts, i, 2))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    if acts is ACT:  # of candidates some gradients are 0 but for rounding
        assert_same_state(compiled, eager, atol=1e-5)


@pytest.mark.parametrize(("observed", "acts", "settings"), AGENTS)
def test_bfloat16_gradients_are_float32s_within_its_rounding(observed, acts, settings):
    moments = []
    for precision in ("float32", "bfloat16"):
        agent = BC(observed, acts, BCConfig(hidden=(64, 64), precision=precision, **settings), seed=1)
        metrics = agent.update(some(acts, 0, 1))
        assert all(value.dtype == torch.float32 for value in metrics.values())
        moments.append(torch.cat([m.flatten() for m in agent.optimizer.first]))
    exact, rounded = moments
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.03


def test_images_are_shifted_and_their_convolutions_learn():
    agent = BC(MIXED, ACT, BCConfig(hidden=(16,)), seed=1)
    convolution = next(m for m in agent.policy.encoder.modules() if isinstance(m, Convolution))
    before = copy.deepcopy(list(convolution.parameters()))
    shift = agent.draw(3, 8)[0]
    assert shift.shape == (3, 8, 2) and shift.min() >= 0 and shift.max() <= 8
    batch = make_image_batch(MIXED, groups=2)
    assert math.isfinite(agent.update(batch)["actor_loss"])
    assert not any(torch.equal(x, y) for x, y in zip(before, convolution.parameters(), strict=True))
    still = BC(MIXED, ACT, BCConfig(hidden=(16,), random_shift=0), seed=1)
    assert still.draw(3, 8) == (None,)


def test_a_gaussian_needs_no_bounds():
    free = gym.spaces.Box(-np.inf, np.inf, (1,))
    obs, action = bandit()
    agent = clone(obs, 5 * action, action_space=free, policy="gaussian", updates=1500, lr=1e-2)
    assert agent.policy.act(STATES)[0].flatten().tolist() == pytest.approx([0.0, 6.0], abs=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_symmetric_where_the_task_is(kind):
    observed, acts = boxes()
    agent = BC(observed, acts, BCConfig(hidden=(16,), policy=kind))
    for i in range(5):
        agent.update(make_batch(i, obs=4, act=acts))
    obs = torch.randn(7, 4)
    mirrored = reflect(agent.policy.act(obs)[0], ACTION)
    torch.testing.assert_close(agent.policy.act(reflect(obs, OBSERVATION))[0], mirrored)


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({}, gym.spaces.Box(-np.inf, np.inf, (2,)), "BC needs finite action bounds"),
        ({"policy": "tanh-gaussian"}, gym.spaces.Box(-np.inf, np.inf, (2,)), "BC needs finite action bounds"),
        ({}, gym.spaces.Box(1.0, 1.0, (2,)), "BC needs actions of a Box with low < high"),
        (
            {"policy": "gaussian"},
            gym.spaces.Discrete(3),
            "agent.policy gaussian is for Box actions; .*leave agent.poli",
        ),
        ({"action_mask": "mask"}, ACT, "agent.action_mask names 'mask', but there is nothing to mask"),
    ],
)
def test_unsuitable_action_spaces(settings, space, message):
    with pytest.raises(UsageError, match=message):
        BC(OBS, space, BCConfig(**settings))


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0,), (-30.0, 0.0)])
def test_bounds_must_be_two_and_in_order(bounds):
    with pytest.raises(UsageError, match=r"agent.log_std_bounds must be two numbers between -20 and 5"):
        BCConfig(log_std_bounds=bounds)
