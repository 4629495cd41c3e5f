"""Policies of chunks: losses against their definitions, what is executed when, samples, and other runtimes."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.chunk import ChunkHead, ChunkPolicy, FlowHead, MixtureHead, RegressionHead
from ctrlrl.replay.batch import Batch

OBS, ACT = gym.spaces.Box(-np.inf, np.inf, (5,)), gym.spaces.Box(-2, 2, (3,))
B, H, A = 6, 4, 3


def agent(**changes: Any) -> BC:
    return BC(OBS, ACT, BCConfig(**{"chunk": H, "hidden": (32, 32), "normalize_obs": False} | changes))


def make_batch(groups: int = 1, rows: int = B, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(groups, rows, 5, generator=g)
    action = (torch.rand(groups, rows, H, A, generator=g) * 2 - 1) * 2
    there = torch.randint(1, H + 1, (groups, rows, 1), generator=g)
    none, flag = torch.zeros(groups, rows), torch.zeros(groups, rows, dtype=torch.bool)
    mask = torch.arange(H) < there
    return Batch(obs, action, none, none, obs, flag, flag.long(), {}, {}, mask=mask)


@pytest.mark.parametrize("policy", ["deterministic", "mixture", "flow"])
@pytest.mark.parametrize("trunk", ["mlp", "transformer"])
def test_plans_are_made_of_what_a_camera_shows(policy: str, trunk: str) -> None:
    """A bright picture asks for actions that rise, a dark one for such that fall; the numbers beside it say nothing."""
    space = gym.spaces.Dict({"camera": gym.spaces.Box(0, 255, (3, 24, 24), np.uint8), "joints": OBS})
    numbers: dict[str, Any] = {"chunk": H, "hidden": (32,), "policy": policy, "trunk": trunk, "lr": 3e-3}
    own = BC(space, ACT, BCConfig(**numbers, random_shift=2), seed=1)
    rows = 32
    bright = torch.arange(rows) % 2 == 0
    rising = torch.linspace(-1.5, 1.5, H)[None, :, None].expand(rows, H, A)
    obs = {
        "camera": torch.where(bright[:, None, None, None], 220, 30).to(torch.uint8).expand(rows, 3, 24, 24)[None],
        "joints": torch.zeros(1, rows, 5),
    }
    action = torch.where(bright[:, None, None], rising, -rising)[None]
    none, flag = torch.zeros(1, rows), torch.zeros(1, rows, dtype=torch.bool)
    mask = torch.ones(1, rows, H, dtype=torch.bool)
    for _ in range(300 if policy == "flow" else 100):
        own.update(Batch(obs, action, none, none, obs, flag, flag.long(), {}, {}, mask=mask))
    assert isinstance(own.policy, ChunkPolicy)
    here, state = {name: value[0] for name, value in obs.items()}, own.policy.initial_state(rows)
    for t in range(H):  # all of one plan
        done, state, _ = own.policy.act(here, state)
        assert float((done - action[0, :, t]).abs().mean()) < 0.35, t


@pytest.mark.parametrize("trunk", ["mlp", "transformer"])
def test_what_each_head_loses(trunk: str) -> None:
    batch = make_batch()[0]
    assert batch.mask is not None and not isinstance(batch.obs, dict)
    unit, mask = batch.action.double() / 2, batch.mask
    for policy in ("deterministic", "mixture", "flow"):
        own = agent(policy=policy, trunk=trunk)
        own.policy.double()
        head, obs = own.policy.head, batch.obs.double()  # type: ignore[union-attr]
        rows = []
        draws = head.draw(1, B, torch.Generator().manual_seed(1))
        draws = tuple(draw[0].double() for draw in draws)
        got = head.loss(obs, unit, mask, draws)
        for i in range(B):
            n, total = int(mask[i].sum()), 0.0
            if isinstance(head, RegressionHead):
                plan = torch.tanh(head.network(obs[i : i + 1])[0])[0]
                total = sum(float((plan[t] - unit[i, t]).abs().sum()) / A for t in range(n)) / n
            elif isinstance(head, MixtureHead):
                numbers, logits = head.network(obs[i : i + 1])
                numbers, chances = numbers.view(H, 2, 5, A), logits[0].softmax(-1)
                likelihood = 0.0
                for k in range(5):
                    mean, deviation = torch.tanh(numbers[:n, 0, k]), numbers[:n, 1, k].clamp(-5, 2).exp()
                    normal = torch.distributions.Normal(mean, deviation)
                    likelihood += float(chances[k] * normal.log_prob(unit[i, :n]).sum().exp())
                total = -math.log(likelihood) / n
            else:
                assert isinstance(head, FlowHead)
                noise, time = draws[0][i], draws[1][i]
                x = time * unit[i] + (1 - time) * noise
                velocity = head.network(obs[i : i + 1], x[None], time[None])[0][0]
                error = (velocity - (unit[i] - noise)).square()
                total = sum(float(error[t].sum()) / A for t in range(n)) / n
            rows.append(total)
        assert got.tolist() == pytest.approx(rows, rel=1e-9), policy


@pytest.mark.parametrize("policy", ["deterministic", "mixture", "flow"])
def test_metrics_say_how_far_from_the_data_plans_are(policy: str) -> None:
    own, batch = agent(policy=policy), make_batch(rows=20)
    assert isinstance(own.policy, ChunkPolicy) and isinstance(batch.obs, Tensor) and batch.mask is not None
    plan = own.policy.head.plan(own.policy.encoder(batch.obs[0]), None)
    gap = (plan - own.policy.scaling.to_unit(batch.action[0])).abs()[:8][batch.mask[0, :8]].mean()
    metrics = own.update(batch)
    assert metrics["action_error"].item() == pytest.approx(gap.item(), rel=1e-5) and not batch.mask.all()


class Counting(ChunkHead):
    """Plans 100 times how often it was asked, and the place in the chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def plan(self, features: Tensor, noise: Tensor | None) -> Tensor:
        self.asked += 1
        return (100.0 * self.asked + torch.arange(4.0))[None, :, None].expand(len(features), -1, 1)

    def loss(self, features: Tensor, target: Tensor, mask: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError


def counting(execute: int, ensemble: float | None = None) -> ChunkPolicy:
    policy = ChunkPolicy(nn.Identity(), Counting(), gym.spaces.Box(-1, 1, (1,)), 4, execute, ensemble)  # type: ignore[arg-type]
    policy.scaling = nn.Identity()  # type: ignore[assignment]
    policy.scaling.to_environment = lambda unit: unit  # type: ignore[method-assign, assignment]
    return policy


def test_executes_a_part_of_each_plan_and_replans_rows_that_begin() -> None:
    policy, obs = counting(execute=3), torch.zeros(2, 1)
    state, acted = policy.initial_state(2), []
    for t in range(7):
        before = {name: value.clone() for name, value in state.items()}
        action, after, extras = policy.act(obs, state)
        assert not extras and all(torch.equal(state[name], before[name]) for name in state)  # nothing is changed
        acted.append(action[:, 0].tolist())
        state = policy.reset(after, torch.tensor([False, t == 3]))  # the episode of row 1 ends after its step 3
    assert [a for a, _ in acted] == [100, 101, 102, 200, 201, 202, 400]
    assert [b for _, b in acted] == [100, 101, 102, 200, 300, 301, 302]


def test_ensembles_of_plans_are_weighted_as_in_act() -> None:
    policy, obs = counting(execute=4, ensemble=0.3), torch.zeros(1, 1)
    state = policy.initial_state(1)
    plans: list[list[float]] = []
    for t in range(7):
        action, state, _ = policy.act(obs, state)
        plans.append([100.0 * (t + 1) + j for j in range(4)])
        for_now = [plans[s][t - s] for s in range(t + 1) if t - s < 4]  # the oldest first
        weights = np.exp(-0.3 * np.arange(len(for_now)))
        assert action.item() == pytest.approx(float(np.average(for_now, weights=weights)), rel=1e-6)


@pytest.mark.parametrize("policy", ["mixture", "flow"])
def test_two_ways_are_kept_apart(policy: str) -> None:
    """Demonstrations that go left or right at random, in whole chunks: a mean would go straight on."""
    own, g = agent(policy=policy, hidden=(64, 64), lr=3e-3, modes=2), torch.Generator().manual_seed(0)
    for _ in range(300 if policy == "flow" else 150):
        side = torch.randint(0, 2, (4, 64, 1, 1), generator=g) * 2.0 - 1
        batch, there = make_batch(4, 64), torch.ones(4, 64, H, dtype=torch.bool)
        data = Batch(
            **{name: getattr(batch, name) for name in ("obs", "reward", "discount", "next_obs", "end", "index")},
            action=side.expand(4, 64, H, A) * 1.2,  # 0.6 of the range
            extras={},
            next_extras={},
            mask=there,
        )
        own.update(data)
    assert isinstance(own.policy, ChunkPolicy)
    noise = torch.randn(400, own.policy.head.noise, generator=g)
    plan = own.policy.head.plan(torch.randn(400, 5, generator=g), noise)  # (400, H, A)
    right = plan.mean((1, 2)) > 0
    assert 0.35 < right.float().mean() < 0.65  # as often as in the data
    assert (plan.abs() - 0.6).abs().mean() < 0.15  # and not between
    assert ((plan > 0) == right[:, None, None]).float().mean() > 0.97  # one side in the whole of a chunk


def test_samples_come_of_the_generator_and_modes_do_not() -> None:
    for policy in ("deterministic", "mixture", "flow"):
        own, obs = agent(policy=policy), torch.randn(2, 5)
        before = own.generator.get_state()
        modes = [own.policy.act(obs)[0] for _ in range(2)]
        assert torch.equal(*modes) and torch.equal(own.generator.get_state(), before)
        samples = [own.policy.act(obs, explore=True)[0] for _ in range(2)]
        assert torch.equal(*samples) == (policy == "deterministic")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"policy": "gaussian"}, "agent.policy must be deterministic, mixture or flow where chunk is above 1"),
        ({"execute": 5}, "agent.execute must be between 1 and chunk, got 5"),
        ({"ensemble": 0.1, "chunk": 1}, "agent.ensemble must be left alone where chunk is 1"),
        ({"ensemble": 0.1, "execute": 2}, "agent.execute must be left alone where plans are put together"),
        ({"trunk": "transformer", "hidden": (32, 64)}, "agent.hidden must be widths that are all alike"),
        ({"trunk": "transformer", "chunk": 1}, "agent.trunk must be mlp where"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        agent(**changes)


def test_chunks_are_for_boxes() -> None:
    with pytest.raises(UsageError, match="chunk is for Box actions"):
        BC(OBS, gym.spaces.Discrete(3), BCConfig(chunk=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "deterministic", "execute": 2},
        {"policy": "mixture", "ensemble": 0.01},
        {"policy": "flow", "flow_steps": 3, "trunk": "transformer"},
    ],
    ids=["regression", "mixture", "flow-transformer"],
)
def test_runs_without_torch(changes: dict[str, Any]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from ctrlrl.deploy.lowering import lower
    from ctrlrl.deploy.to_onnx import ACTION, to_onnx

    own = agent(**changes)
    network = lower(to_onnx(own.policy, torch.zeros(1, 5)).model)
    state, memory = own.policy.initial_state(1), own.policy.initial_state(1)
    for _ in range(6):
        obs = torch.randn(1, 5)
        action, state, _ = own.policy.act(obs, state)
        given = {f"state.{name}": value.numpy() for name, value in memory.items()}
        out = network({"observation": obs.numpy(), **given})
        memory = {name: torch.from_numpy(out[f"next.{name}"]) for name in memory}
        np.testing.assert_allclose(out[ACTION], action.numpy(), atol=2e-5)
