"""Policies over frozen ones: ResFiT, Policy Decorator and EXPO, where bases come from, and what is stored of them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ctrlrl
from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.algorithms.expo import EXPO
from ctrlrl.algorithms.expo_config import EXPOConfig
from ctrlrl.algorithms.policy_decorator import PolicyDecorator
from ctrlrl.algorithms.policy_decorator_config import PolicyDecoratorConfig
from ctrlrl.algorithms.resfit import ResFiT
from ctrlrl.algorithms.resfit_config import ResFiTConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.cli.main import run as command
from ctrlrl.data.store import Dataset, DatasetWriter, Episode
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spec import Obs as ObsTerm
from ctrlrl.envs.spec import SimTask
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.errors import BadBaseAction, UsageError
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.nn.residual import BASE, PID, Base, CallablePolicy, LinearFeedback
from ctrlrl.replay.batch import Batch
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.base_fit import require_bundle_fits
from ctrlrl.training.base_policy import base_actions, open_base
from ctrlrl.tree import Obs
from tests.agents import assert_same_state
from tests.datasets import pendulum_data
from tests.runs import SMALL, assert_same
from tests.test_execution import needs_compiler
from tests.test_sac import ACT, OBS, Adam64, Reference, make_batch
from tests.test_td3_bc import BehaviourReference

A = ACT.shape[0]
TORQUE = gym.spaces.Box(-2, 2, (1,))


def no_base(obs: Obs) -> Tensor:
    assert isinstance(obs, Tensor)
    return torch.zeros(len(obs), *ACT.shape) + (torch.as_tensor(ACT.low) + torch.as_tensor(ACT.high)) / 2


def resfit(**changes: Any) -> ResFiT:
    numbers = {"hidden": (24, 16), "num_critics": 4, "policy_delay": 2, "critic_only": 3, "actor_lr": 3e-3} | changes
    return ResFiT(OBS, ACT, ResFiTConfig(**numbers), base=CallablePolicy(no_base), seed=3)


def batch_with_base(seed: int, groups: int = 1) -> Batch:
    batch, g = make_batch(seed, groups=groups), torch.Generator().manual_seed(100 + seed)
    bases = torch.rand(2, groups, 32, A, generator=g) * 2 - 1
    return replace(batch, extras={BASE: bases[0]}, next_extras={BASE: bases[1]})


def clipped(gradients: dict[str, Tensor], most: float) -> dict[str, Tensor]:
    norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))  # type: ignore[arg-type]
    return {name: g * min(1.0, float(most / (norm + 1e-6))) for name, g in gradients.items()}


def test_updates_of_resfit_equal_the_float64_reference() -> None:
    agent, twin = resfit(max_grad_norm=0.5, residual_penalty=0.3), resfit()
    c, layers = agent.config, BehaviourReference.layers
    actor = {k: v.detach().double() for k, v in agent.policy.trunk.state_dict().items()}
    critics = [Reference._member(agent.critics, k) for k in range(4)]
    targets, target_actor = copy.deepcopy(critics), dict(actor)
    actor_adam, critic_adam = Adam64(c.actor_lr), Adam64(c.critic_lr)
    low, high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()

    def residual(p: dict[str, Tensor], obs: Tensor, base: Tensor) -> Tensor:
        shaped = {k: v[None] if v.dim() == 1 and k.endswith("weight") else v for k, v in p.items()}
        return c.residual_scale * torch.tanh(layers(shaped, torch.cat([base, obs], 1), True))

    def value(p: dict[str, Tensor], obs: Tensor, action: Tensor) -> Tensor:
        return layers(p, torch.cat([obs, action], 1), False)[:, 0]

    for i in range(1, 9):
        batch = batch_with_base(i)
        noise, members, _ = twin.draw(1, 32)
        agent.update(batch)
        one = batch[0].map(lambda x: x.double())
        assert isinstance(one.obs, Tensor) and isinstance(one.next_obs, Tensor) and noise is not None
        base, next_base = one.extras[BASE], one.next_extras[BASE]
        smoothing = (c.target_noise * noise[0].double()).clamp(-c.noise_clip, c.noise_clip)
        action = (next_base + residual(target_actor, one.next_obs, next_base) + smoothing).clamp(-1, 1)
        two = [value(targets[k], one.next_obs, action) for k in members[0].tolist()]  # type: ignore[index]
        y = one.reward + one.discount * torch.minimum(*two)
        whole = {f"{k}/{n}": v.clone().requires_grad_() for k, p in enumerate(critics) for n, v in p.items()}
        stored = 2 * (one.action - low) / (high - low) - 1
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(4):
            p = {n.partition("/")[2]: v for n, v in whole.items() if n.startswith(f"{k}/")}
            loss = loss + ((value(p, one.obs, stored) - y) ** 2).mean()
        grads = clipped(dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True)), 0.5)
        stepped = critic_adam.step({n: v.detach() for n, v in whole.items()}, grads)
        critics = [{n.partition("/")[2]: v for n, v in stepped.items() if n.startswith(f"{k}/")} for k in range(4)]
        if i > 3 and i % 2 == 0:
            own = {n: v.clone().requires_grad_() for n, v in actor.items()}
            more = residual(own, one.obs, base)
            q = torch.stack([value(p, one.obs, (base + more).clamp(-1, 1)) for p in critics])
            loss = -q.mean() + 0.3 * ((more / c.residual_scale) ** 2).mean()
            grads = clipped(dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True)), 0.5)
            actor = actor_adam.step(actor, grads)
            target_actor = {n: v + c.tau * (actor[n] - v) for n, v in target_actor.items()}
        targets = [
            {n: v + c.tau * (critic[n] - v) for n, v in t.items()} for t, critic in zip(targets, critics, strict=True)
        ]
        for name, v in agent.policy.trunk.state_dict().items():
            assert torch.allclose(v.double(), actor[name], atol=3e-6), (i, name)
        for ours, theirs in ((agent.critics, critics), (agent.target_critics, targets)):
            for k in range(4):
                for name, v in Reference._member(ours, k).items():
                    assert torch.allclose(v, theirs[k][name], atol=3e-6), (i, k, name)


def test_it_begins_as_the_base_and_stays_so_while_only_critics_learn() -> None:
    agent = resfit(critic_only=6, policy_delay=2)
    obs = torch.randn(7, 5)
    for i in range(6):
        assert "actor_loss" not in agent.update(batch_with_base(i))
        assert torch.equal(agent.policy.act(obs)[0], no_base(obs))
    agent.update(batch_with_base(7))
    assert "actor_loss" in agent.update(batch_with_base(8))
    assert not torch.equal(agent.policy.act(obs)[0], no_base(obs))


class Frozen(nn.Module):
    """Features that somebody else learned."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        entries = space.spaces.values() if isinstance(space, gym.spaces.Dict) else [space]
        self.pretrained = nn.Linear(sum(int(np.prod(entry.shape or ())) for entry in entries), 6).requires_grad_(False)

    def forward(self, obs: Obs) -> Tensor:
        values = torch.cat(list(obs.values()), -1) if isinstance(obs, dict) else obs
        features: Tensor = self.pretrained(values)
        return features


@pytest.mark.parametrize("make", [ResFiT, EXPO, SAC, TD3])
def test_what_a_users_encoder_keeps_frozen_stays_so(make: type[Any]) -> None:
    config = make.config_class(hidden=(8,), normalize_obs=False)
    if make is ResFiT:
        config = replace(config, critic_only=0, policy_delay=1)
    more = {ResFiT: {"base": CallablePolicy(no_base)}, EXPO: {"base": flow_base()}}.get(make, {})
    agent = make(OBS, ACT, config, encoder=Frozen, seed=1, **more)
    before = copy.deepcopy({name: part.state_dict() for name, part in (("p", agent.policy), ("c", agent.critics))})
    for i in range(2):
        agent.update(batch_with_base(i))
    after = {"p": agent.policy.state_dict(), "c": agent.critics.state_dict()}
    changed = {name for k in before for name, v in before[k].items() if not torch.equal(v, after[k][name])}
    assert changed and not any("pretrained" in name for name in changed)


@needs_compiler
@pytest.mark.parametrize("make", [ResFiT, pytest.param(EXPO, marks=pytest.mark.slow)])
def test_compiled_updates_equal_eager_ones(make: Any) -> None:
    base = flow_base() if make is EXPO else CallablePolicy(no_base)
    more = {"critic_only": 0} if make is ResFiT else {}
    numbers = make.config_class(hidden=(16,), policy_delay=1, batch_size=32, **more)
    eager, compiled = (
        make(OBS, ACT, replace(numbers, execution=how), base=copy.deepcopy(base), seed=1)
        for how in ("eager", "compiled")
    )
    for i in range(2):
        ours, theirs = compiled.update(batch_with_base(i, 2)), eager.update(batch_with_base(i, 2))
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    assert_same_state(compiled, eager, atol=1e-5)


def test_a_decorator_explores_with_residuals_that_become_more_frequent() -> None:
    config = PolicyDecoratorConfig(hidden=(16,), ramp=1_000)
    agent = PolicyDecorator(OBS, ACT, config, base=CallablePolicy(no_base), seed=0)
    obs, shares = torch.randn(500, 5), []
    for _ in range(3):  # after 500, 1,000 and 1,500 steps
        action = agent.policy.act(obs, explore=True)[0]
        shares.append(float((action != no_base(obs)).any(-1).float().mean()))
    assert 0.4 < shares[0] < 0.6 and shares[1] == shares[2] == 1.0
    unit = agent.policy.scaling.to_unit(action)
    assert unit.abs().max() <= config.residual_scale + 1e-6 and unit.abs().max() > 0.05
    before = agent.policy.steps.clone()
    agent.policy.act(obs)
    assert torch.equal(agent.policy.steps, before)  # looking does not count


def test_what_a_decorators_critics_see_is_the_whole_action() -> None:
    agent = PolicyDecorator(OBS, ACT, PolicyDecoratorConfig(hidden=(16,)), base=CallablePolicy(no_base), seed=0)
    batch = batch_with_base(0)[0]
    assert isinstance(batch.obs, Tensor)
    obs, residual = {"obs": batch.obs, BASE: batch.extras[BASE]}, torch.rand(32, A) * 2 - 1
    whole = (batch.extras[BASE] + 0.1 * residual).clamp(-1, 1)
    assert torch.equal(agent.policy_value(obs, residual), agent.critics(obs, whole).amin(0))
    assert torch.equal(agent.next_value(obs, residual), agent.target_critics(obs, whole).amin(0))


def flow_base(**changes: Any) -> Policy:
    numbers = {"policy": "flow", "flow_steps": 3, "hidden": (16,)} | changes
    return BC(OBS, ACT, BCConfig(**numbers), seed=5).policy


def test_expo_acts_by_the_best_of_its_samples() -> None:
    agent = EXPO(OBS, ACT, EXPOConfig(hidden=(16,), samples=4, edit_scale=0.5), base=flow_base(), seed=0)
    policy, obs = agent.policy, torch.randn(3, 5)
    action = policy.act(obs)[0]
    assert torch.equal(action, policy.act(obs)[0])  # one function, though it samples
    unit = policy.scaling.to_unit(action)
    for i in range(3):
        best, value = None, -np.inf
        for n in range(4):
            own = policy.base.head.plan(policy.base.encoder(obs[i : i + 1]), policy.noise[n : n + 1])[:, 0]
            edited = (own + 0.5 * policy.edits.distribution(obs[i : i + 1], own).mode).clamp(-1, 1)
            for candidate in (own, edited):
                q = float(agent.target_critics(obs[i : i + 1], candidate).amin(0).detach())
                best, value = (candidate[0], q) if q > value else (best, value)
        assert best is not None and torch.allclose(unit[i], best, atol=1e-5)
    explored = [policy.act(obs, explore=True)[0] for _ in range(2)]
    assert not torch.equal(*explored)


def test_updates_of_expo_equal_the_float64_reference() -> None:
    """Of critics, their targets, edits and temperature; what the base samples is asked of a copy of it, in float64."""
    config = EXPOConfig(
        hidden=(16, 12), samples=3, num_critics=4, policy_delay=1, edit_scale=0.4, initial_alpha=0.3, critic_lr=3e-3,
        actor_lr=3e-3, alpha_lr=1e-2,
    )  # fmt: skip
    agent, twin = (EXPO(OBS, ACT, config, base=flow_base(), seed=3) for _ in range(2))
    low, high = torch.as_tensor(ACT.low).double(), torch.as_tensor(ACT.high).double()
    edits = {k: v.detach().double() for k, v in agent.policy.edits.trunk.state_dict().items()}
    critics = [Reference._member(agent.critics, k) for k in range(4)]
    targets, log_alpha = copy.deepcopy(critics), {"": agent.log_alpha.detach().double()}
    edit_adam, critic_adam, alpha_adam = Adam64(3e-3), Adam64(3e-3), Adam64(1e-2)
    layers = BehaviourReference.layers

    def value(p: dict[str, Tensor], obs: Tensor, action: Tensor) -> Tensor:
        return layers(p, torch.cat([obs, action], 1), False)[:, 0]

    def edit(p: dict[str, Tensor], obs: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        shaped = {k: v[None] if v.dim() == 1 and k.endswith("weight") else v for k, v in p.items()}
        mean, log_std = layers(shaped, torch.cat([obs, action], 1), True).chunk(2, 1)
        std = log_std.clamp(-20, 2).exp()
        u = mean + std * noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)
        return torch.tanh(u), log_prob.sum(1)

    for i in range(4):
        batch, base = make_batch(i), copy.deepcopy(agent.base).double()
        noise, edit_noise, members, _, *_ = (x if x is None else x[0] for x in twin.draw(1, 32))
        assert noise is not None and edit_noise is not None and members is not None
        agent.update(batch)
        one = batch[0].map(lambda x: x.double())
        assert isinstance(one.obs, Tensor) and isinstance(one.next_obs, Tensor)
        ahead = torch.zeros(32, A, dtype=torch.float64)
        for row in range(32):
            best, obs = -np.inf, one.next_obs[row : row + 1]
            for k in range(row * 3, row * 3 + 3):
                own = base.head.plan(base.encoder(obs), noise[k : k + 1].double())[:, 0].detach()
                moved = own + 0.4 * edit(edits, obs, own, edit_noise[k : k + 1].double())[0]
                for candidate in (own, moved.clamp(-1, 1)):
                    q = min(float(value(targets[m], obs, candidate)) for m in members[0].tolist())
                    if q > best:
                        best, ahead[row] = q, candidate[0]
        y = torch.stack([value(targets[m], one.next_obs, ahead) for m in members[1].tolist()]).min(0).values
        y = one.reward + one.discount * y
        stored = 2 * (one.action - low) / (high - low) - 1
        whole = {f"{k}/{n}": v.clone().requires_grad_() for k, p in enumerate(critics) for n, v in p.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(4):
            p = {n.partition("/")[2]: v for n, v in whole.items() if n.startswith(f"{k}/")}
            loss = loss + ((value(p, one.obs, stored) - y) ** 2).mean()
        grads = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
        stepped = critic_adam.step({n: v.detach() for n, v in whole.items()}, grads)
        critics = [{n.partition("/")[2]: v for n, v in stepped.items() if n.startswith(f"{k}/")} for k in range(4)]
        targets = [
            {n: v + config.tau * (critic[n] - v) for n, v in t.items()}
            for t, critic in zip(targets, critics, strict=True)
        ]
        own_edits = {n: v.clone().requires_grad_() for n, v in edits.items()}
        e, log_prob = edit(own_edits, one.obs, stored, edit_noise[32 * 3 :].double())
        log_prob = log_prob - A * np.log(0.4)
        q = torch.stack([value(p, one.obs, (stored + 0.4 * e).clamp(-1, 1)) for p in critics]).mean(0)
        loss = (log_alpha[""].exp() * log_prob - q).mean()
        grads = dict(zip(own_edits, torch.autograd.grad(loss, list(own_edits.values())), strict=True))
        edits = edit_adam.step(edits, grads)
        log_alpha = alpha_adam.step(log_alpha, {"": -(log_prob.detach().mean() + agent.target_entropy)})
        for name, v in agent.policy.edits.trunk.state_dict().items():
            assert torch.allclose(v.double(), edits[name], atol=1e-5), (i, name)
        for ours, theirs in ((agent.critics, critics), (agent.target_critics, targets)):
            for k in range(4):
                for name, v in Reference._member(ours, k).items():
                    assert torch.allclose(v, theirs[k][name], atol=1e-5), (i, k, name)
        assert float(agent.log_alpha) == pytest.approx(float(log_alpha[""]), abs=1e-5)


def test_expo_trains_its_base_by_imitation_and_moves_the_one_that_acts_behind_it() -> None:
    config = EXPOConfig(hidden=(16,), samples=2, policy_delay=2, base_tau=0.25, base_lr=1e-2)
    agent = EXPO(OBS, ACT, config, base=flow_base(), seed=0)
    before = [p.clone() for p in agent._learned]
    agent.update(batch_with_base(0))
    assert all(torch.equal(p, q) for p, q in zip(agent._learned, before, strict=True))
    metrics = agent.update(batch_with_base(1))
    assert {"base_loss", "actor_loss", "edit_size"} <= metrics.keys()
    for p, q, acting in zip(agent._learned, before, agent._acting, strict=True):
        assert torch.allclose(acting, q + 0.25 * (p - q), atol=1e-6)
    losses = []
    for _ in range(60):
        agent.update(batch_with_base(1))
        losses.append(float(agent.update(batch_with_base(1))["base_loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_copies_of_a_base_have_statistics_of_their_own() -> None:
    base = flow_base()
    assert base.normalizer is not None
    base.normalizer.update(torch.randn(50, 5) * 3 + 1, torch.ones(50, dtype=torch.bool))
    agent = EXPO(OBS, ACT, EXPOConfig(hidden=(16,), samples=2), base=base, seed=0)
    for copied in (agent.base, agent.policy.base):
        assert copied.normalizer is not base.normalizer
        assert copied.encoder._normalizer[0] is copied.normalizer  # which goes where its owner goes, and is saved
    obs = torch.randn(3, 5)
    torch.testing.assert_close(agent.base.encoder(obs), base.encoder(obs))


def test_the_entropy_that_edits_are_to_have_is_one_they_can_have() -> None:
    agent = EXPO(OBS, ACT, EXPOConfig(hidden=(16,), edit_scale=0.05), base=flow_base())
    assert agent.target_entropy == pytest.approx(A * (np.log(0.05) - 0.5)) and agent.target_entropy < A * np.log(0.1)
    with pytest.raises(
        UsageError, match=r"target_entropy must be below -4\.61, the most that 2 edits of at most 0\.05"
    ):
        EXPO(OBS, ACT, EXPOConfig(edit_scale=0.05, target_entropy=-1.0), base=flow_base())


def test_expo_needs_a_base_that_samples() -> None:
    with pytest.raises(UsageError, match="must sample single actions"):
        EXPO(OBS, ACT, base=flow_base(chunk=2))
    with pytest.raises(UsageError, match="must sample single actions"):
        EXPO(OBS, ACT, base=CallablePolicy(no_base))


def test_images_are_seen_by_critics_and_residual_alike() -> None:
    """One convolution in both, which the critics' loss trains, and of the targets one, too; shifted at random."""
    images = gym.spaces.Dict({"camera": gym.spaces.Box(0, 255, (3, 32, 32), np.uint8), "state": OBS})

    def base(obs: Obs) -> Tensor:
        assert isinstance(obs, dict)
        return no_base(obs["state"])

    config = ResFiTConfig(hidden=(16,), num_critics=3, policy_delay=1, critic_only=0)
    agent = ResFiT(images, ACT, config, base=CallablePolicy(base), seed=0)
    g = torch.Generator().manual_seed(0)
    plain = batch_with_base(0)
    cameras = torch.randint(0, 256, (2, 1, 32, 3, 32, 32), generator=g, dtype=torch.uint8)
    assert isinstance(plain.obs, Tensor) and isinstance(plain.next_obs, Tensor)
    batch = replace(
        plain,
        obs={"camera": cameras[0], "state": plain.obs},
        next_obs={"camera": cameras[1], "state": plain.next_obs},
    )
    own = {id(p) for p in agent.critics.parameters()}
    shared = [p for p in agent.policy.encoder.parameters() if id(p) in own]
    assert shared and not {id(p) for p in agent._actor} & own
    before = [p.clone() for p in shared]
    targets = [p.clone() for p in agent._target_critic]
    metrics = agent.update(batch)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert not any(torch.equal(p, q) for p, q in zip(shared, before, strict=True))
    online = dict(zip((id(p) for p in agent._target_critic), agent._critic, strict=True))
    for p, q in zip(agent._target_critic, targets, strict=True):  # once, though the target policy has some of them too
        torch.testing.assert_close(p, q + config.tau * (online[id(p)] - q), atol=1e-7, rtol=1e-5)
    action = agent.policy.act({name: value[0] for name, value in batch.obs.items()})[0]  # type: ignore[union-attr]
    assert action.shape == (32, A)


# --- what is stored ---------------------------------------------------------------------------------------------------


class Clock(Policy):
    """Acts by how many steps its episode has had, and plans two at once: the second is that of the plan's beginning."""

    def initial_state(self, n: int) -> PolicyState:
        return {"t": torch.zeros(n, dtype=torch.int64), "planned": torch.zeros(n)}

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        assert state is not None and isinstance(obs, Tensor)
        planned = torch.where(state["t"] % 2 == 0, 0.001 * state["t"] + 0.01 * obs[:, 0].clamp(-1, 1), state["planned"])
        return 2 * planned[:, None], {"t": state["t"] + 1, "planned": planned}, {}


class Short(gym.Wrapper[Any, Any, Any, Any]):
    """Pendulum-v1 whose episodes are cut after 4 steps, or end after 3."""

    def reset(self, **how: Any) -> Any:
        self.t = 0
        return self.env.reset(**how)

    def step(self, action: Any) -> Any:
        obs, reward, _, _, info = self.env.step(action)
        self.t += 1
        self.ends = getattr(self, "ends", False)
        terminated, truncated = self.t >= 3 and self.ends, self.t >= 4
        if terminated or truncated:
            self.ends = not self.ends
        return obs, reward, terminated, truncated, info


def test_the_bases_actions_are_stored_as_its_memory_was(tmp_path: Path) -> None:
    run = ctrlrl.train(
        "resfit",
        lambda: Short(gym.make("Pendulum-v1")),
        base=Clock(),
        preset=False,
        **SMALL | {"steps": 90, "num_envs": 3, "eval_every": 0, "learning_starts": 30, "out": str(tmp_path / "stored")},
    )
    folder = RunFolder.open(run.path)
    state = load_checkpoint(folder.find_checkpoint("last"))
    from ctrlrl.replay.buffer import ReplayBuffer

    observed = gym.make("Pendulum-v1").observation_space
    buffer = ReplayBuffer(observed, TORQUE, capacity=90, num_envs=3, extras={BASE: torch.zeros(3, 1)}, next_extras=True)
    folder.load_replay(buffer, state["replay"]["segments"], state["replay"]["total_rows"])
    batch = buffer.sample(1, 2000, gamma=0.9)[0]
    rows = buffer.export_rows(0, 30)
    ends = rows["terminated"] | rows["truncated"]
    clock = Clock()
    memory, checked = clock.initial_state(3), 0
    for t in range(30):
        expected, memory, _ = clock.act(rows["obs/"][t], memory)
        torch.testing.assert_close(rows[f"extras/{BASE}"][t], expected / 2)
        if t < 29 and not ends[t].any():  # what it will do next is what it was said to do next
            torch.testing.assert_close(rows[f"next_extras/{BASE}"][t], rows[f"extras/{BASE}"][t + 1])
            checked += 1
        memory = clock.reset(memory, ends[t])
    assert checked > 5 and rows["terminated"].any() and rows["truncated"].any()
    ends_of_three = batch.end & (batch.discount == 0)  # goes on with the plan of its third step
    torch.testing.assert_close(batch.next_extras[BASE][ends_of_three], batch.extras[BASE][ends_of_three])
    cut = (
        batch.end & (batch.discount > 0) & (batch.index < 87)
    )  # not the newest ones; it plans anew for its fifth step, which it does not have
    assert isinstance(batch.next_obs, Tensor)
    wanted = 0.004 + 0.01 * batch.next_obs[cut][:, :1].clamp(-1, 1)
    torch.testing.assert_close(batch.next_extras[BASE][cut], wanted)
    assert ends_of_three.any() and cut.any()


def test_what_the_base_would_have_done_in_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlrl.training.base_policy.ROWS", 3)  # episodes at a time, of five
    lengths, random = [3, 1, 5, 2, 5], np.random.default_rng(0)
    space = gym.spaces.Box(-1, 1, (3,))
    with DatasetWriter.create(tmp_path / "data", observation_space=space, action_space=TORQUE) as writer:
        for length in lengths:
            observation = random.uniform(-1, 1, (length + 1, 3)).astype(np.float32)
            action, reward = np.zeros((length, 1), np.float32), np.zeros(length)
            writer.add(Episode(observation=observation, action=action, reward=reward, terminated=False, truncated=True))
    data = Dataset.open(tmp_path / "data")
    got = base_actions(data, Base(Clock(), TORQUE), torch.device("cpu"))
    clock, expected = Clock(), []
    for episode, length in enumerate(lengths):
        state, start = clock.initial_state(1), int(data.starts[episode]) + episode
        for t in range(length + 1):
            obs = torch.from_numpy(np.array(data.observation[start + t : start + t + 1])).float()
            action, state, _ = clock.act(obs, state)
            expected.append(action[0] / 2)
    torch.testing.assert_close(got, torch.stack(expected))


def test_the_replays_memory_is_told_with_the_bases_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a transition 3 numbers are observed and 1 is the action, the base has 1 here and 1 next; 24 bytes besides."""
    how = SMALL | {"eval_every": 0, "preset": False, "out": str(tmp_path / "run"), "buffer": {"capacity": 1000}}
    monkeypatch.setattr("ctrlrl.training.off_policy.memory_of", lambda device: 47_999)
    with pytest.raises(UsageError, match="a replay of 1,000 transitions takes"):
        ctrlrl.train("resfit", "Pendulum-v1", base=lambda obs: torch.zeros(len(obs), 1), **how)
    monkeypatch.setattr("ctrlrl.training.off_policy.memory_of", lambda device: 48_000)
    run = ctrlrl.train("resfit", "Pendulum-v1", base=lambda obs: torch.zeros(len(obs), 1), **how | {"steps": 2})
    assert run.path.exists()


# --- where bases come from --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """A run of BC with chunks, and its data."""
    folder = tmp_path_factory.mktemp("base")
    data = pendulum_data(folder / "data")
    ctrlrl.train(
        "bc",
        data=str(data.path),
        updates=30,
        agent={"hidden": [16], "chunk": 4, "execute": 3},
        eval_every=30,
        eval_episodes=2,
        video=False,
        quiet=True,
        out=str(folder / "bc"),
    )
    return folder / "bc", data


def test_runs_over_a_run_resume_need_it_no_more_and_are_exported_as_one(
    base_run: tuple[Path, Dataset], tmp_path: Path
) -> None:
    source, data = base_run
    shutil.copytree(source, tmp_path / "bc")
    how = SMALL | {"eval_every": 60, "eval_episodes": 2, "checkpoint_every": 10_000, "data": str(data.path)}
    how |= {"base": str(tmp_path / "bc"), "learning_starts": 30}
    how["agent"] = how["agent"] | {"critic_only": 20, "num_critics": 3}
    ctrlrl.train("resfit", "Pendulum-v1", out=str(tmp_path / "whole"), **how | {"steps": 90})
    ctrlrl.train("resfit", "Pendulum-v1", out=str(tmp_path / "parts"), **how | {"steps": 60})
    first = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in first if record["kind"] == "eval"]
    assert evaluations[0]["step"] == 0  # the base itself
    assert evaluations[0]["returns"] == ctrlrl.evaluate(tmp_path / "bc", episodes=2).returns
    shutil.rmtree(tmp_path / "bc")
    ctrlrl.resume(tmp_path / "parts", steps=90, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    loaded = ctrlrl.load(tmp_path / "whole")
    state = loaded.policy.initial_state(2)
    assert state["plan"].shape == (2, 4, 1)
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from ctrlrl.training.export_run import export_run

    bundle = export_run(tmp_path / "whole", tmp_path / "bundle", checkpoint="last")
    assert bundle.manifest.network.runtimes == ("onnx", "numpy", "c")  # each of which gave the goldens
    assert set(bundle.manifest.network.state) == {"state.plan", "state.left"}


@pytest.mark.parametrize("algo", ["policy-decorator", "expo"])
def test_the_others_resume_and_are_exported_as_well(algo: str, base_run: tuple[Path, Dataset], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from ctrlrl.training.export_run import export_run

    source, data = base_run
    agent: dict[str, Any] = SMALL["agent"] | ({"ramp": 30} if algo == "policy-decorator" else {"samples": 2})
    if algo == "expo":
        how = {"updates": 20, "eval_every": 0, "quiet": True, "data": str(data.path)}
        numbers = {"policy": "flow", "flow_steps": 2, "hidden": [16]}
        source = ctrlrl.train("bc", out=str(tmp_path / "flow"), agent=numbers, **how).path
        agent |= {"utd": 1.0, "policy_delay": 2}
    how = SMALL | {"eval_every": 0, "checkpoint_every": 10_000, "data": str(data.path), "base": str(source)}
    how |= {"agent": agent, "learning_starts": 20, "preset": False}
    ctrlrl.train(algo, "Pendulum-v1", out=str(tmp_path / "whole"), **how | {"steps": 60})
    ctrlrl.train(algo, "Pendulum-v1", out=str(tmp_path / "parts"), **how | {"steps": 37})
    ctrlrl.resume(tmp_path / "parts", steps=60, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    if algo == "expo":
        with pytest.raises(UsageError, match=r"EXPO begins with what --base does.*leave it out.*resume"):
            ctrlrl.train(algo, "Pendulum-v1", out=str(tmp_path / "on"), init_from=str(tmp_path / "whole"), **how)
    assert "onnx" in export_run(tmp_path / "whole", tmp_path / "bundle", checkpoint="last").manifest.network.runtimes


def test_nothing_is_imported_because_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = SMALL | {"steps": 20, "learning_starts": 20, "eval_every": 0, "preset": False}
    run = ctrlrl.train("resfit", "Pendulum-v1", base="tests.test_residual:make_still", out=str(tmp_path / "r"), **how)
    with pytest.raises(UsageError, match="would be imported and called: if you trust it, say --base tests"):
        ctrlrl.load(run.path, checkpoint="last")
    arguments = ["eval", str(run.path), "--checkpoint", "last", "--episodes", "1"]
    assert command(arguments) == 2 and "if you trust it" in capsys.readouterr().err
    assert command([*arguments, "--base", "tests.test_residual:make_still"]) == 0
    with pytest.raises(UsageError, match=r"that run builds on tests.* itself.*ctrlrl export .* --base tests"):
        ctrlrl.train("policy-decorator", "Pendulum-v1", base=run.path, out=str(tmp_path / "over"), **how)
    assert not (tmp_path / "over").exists()


def test_a_run_whose_copy_of_the_base_is_gone_says_so(base_run: tuple[Path, Dataset], tmp_path: Path) -> None:
    how = SMALL | {"steps": 20, "learning_starts": 20, "eval_every": 0, "preset": False}
    run = ctrlrl.train("resfit", "Pendulum-v1", base=base_run[0], out=str(tmp_path / "r"), **how)
    shutil.rmtree(run.path / "base")
    with pytest.raises(UsageError, match="the copy of the policy that the run builds on, is missing"):
        ctrlrl.load(run.path, checkpoint="last")


def test_weights_are_not_taken_over_from_one_base_to_another(base_run: tuple[Path, Dataset], tmp_path: Path) -> None:
    how = SMALL | {"steps": 20, "learning_starts": 20, "eval_every": 0, "preset": False}
    run = ctrlrl.train("policy-decorator", "Pendulum-v1", base=base_run[0], out=str(tmp_path / "a"), **how)
    with pytest.raises(UsageError, match="its policy builds on another, and the other one does not"):
        ctrlrl.train("sac", "Pendulum-v1", init_from=str(run.path), out=str(tmp_path / "b"), **how)
    other = ctrlrl.train(
        "bc",
        data=str(base_run[1].path),
        updates=5,
        eval_every=0,
        quiet=True,
        out=str(tmp_path / "bc"),
        agent={"hidden": [16], "chunk": 4, "execute": 3},
    )
    with pytest.raises(UsageError, match="it builds on another base"):
        ctrlrl.train(
            "policy-decorator", "Pendulum-v1", base=other.path, init_from=str(run.path), out=str(tmp_path / "c"), **how
        )
    again = how | {"learning_starts": 10}
    ctrlrl.train(
        "policy-decorator", "Pendulum-v1", base=base_run[0], init_from=str(run.path), out=str(tmp_path / "d"), **again
    )


def test_a_bundle_is_the_base_that_its_run_is(base_run: tuple[Path, Dataset], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from ctrlrl.training.export_run import export_run

    env = gym.make("Pendulum-v1")
    export_run(base_run[0], tmp_path / "bundle")
    bases = [open_base(path, env.observation_space, TORQUE) for path in (base_run[0], tmp_path / "bundle")]
    shutil.copy(tmp_path / "bundle" / "policy.onnx", tmp_path / "policy.onnx")
    states = [base.initial_state(3) for base in bases]
    for t in range(8):
        obs, ended = torch.randn(3, 3), torch.tensor([False, t == 1, False])
        actions = []
        for i, base in enumerate(bases):
            action, after, _ = base.act(obs, states[i])
            states[i] = base.reset(after, ended)
            actions.append(action)
        torch.testing.assert_close(*actions, atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match=r"policy.onnx reads observation, state.plan, state.left"):
        open_base(tmp_path / "policy.onnx", env.observation_space, TORQUE)  # a memory that nobody told of


def test_an_onnx_file_and_a_function_are_bases(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Tanh())
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        layers, (torch.zeros(2, 3),), str(tmp_path / "a.onnx"), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    space, obs = gym.make("Pendulum-v1").observation_space, torch.randn(5, 3)
    base = open_base(str(tmp_path / "a.onnx"), space, TORQUE)
    torch.testing.assert_close(base.act(obs)[0], layers(obs).detach())
    with pytest.raises(UsageError, match=r"(?s)observes something else.*it reads \(3,\), the environment gives \(4,\)"):
        open_base(str(tmp_path / "a.onnx"), gym.spaces.Box(-1, 1, (4,)), TORQUE)
    with pytest.raises(UsageError, match=r"(?s)action: it gives .*\(1,\), the environment takes \(2,\)"):
        open_base(str(tmp_path / "a.onnx"), space, gym.spaces.Box(-1, 1, (2,)))
    assert torch.equal(open_base("tests.test_residual:make_still", space, TORQUE).act(obs)[0], torch.zeros(5, 1))


@pytest.mark.parametrize("kind", ["onnx", "onnx of doubles", "bundle", "controller"])
def test_what_builds_on_any_of_these_is_exported_as_one(
    kind: str, base_run: tuple[Path, Dataset], tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from ctrlrl.deploy.actor import Actor
    from ctrlrl.training.export_run import export_run

    base: Any = tmp_path / "bundle"
    if kind == "bundle":  # of a policy with a memory
        export_run(base_run[0], base)
    elif kind == "controller":
        base = PID(0.5, 0.4, 0.1, 0.05, TORQUE, columns=(2,))
    else:
        layers, base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Tanh()).eval(), tmp_path / "a.onnx"
        given, opset = torch.zeros(1, 3), 18  # not the one of bundles
        if kind == "onnx of doubles":
            layers, given, opset = layers.double(), given.double(), 20
        torch.onnx.export(layers, (given,), str(base), dynamo=True, verbose=False, opset_version=opset)
    agent = SMALL["agent"] | {"critic_only": 0, "actor_lr": 1e-2}
    how = SMALL | {"steps": 60, "eval_every": 0, "preset": False, "learning_starts": 20, "agent": agent}
    run = ctrlrl.train("resfit", "Pendulum-v1", base=base, out=str(tmp_path / "run"), **how)
    again = {"base": base} if isinstance(base, Policy) else {}
    if kind != "controller":  # the run has its own
        shutil.rmtree(base) if base.is_dir() else base.unlink()
    bundle = export_run(run.path, tmp_path / "whole", checkpoint="last", **again)
    assert bundle.manifest.network.runtimes == ("onnx", "numpy", "c")  # each of which gave the goldens
    policy = ctrlrl.load(run.path, checkpoint="last", **again).policy
    actor, state, corrected = Actor(bundle), policy.initial_state(1), False
    for _ in range(7):
        obs = torch.randn(1, 3)
        action, state, extras = policy.act(obs, state)
        corrected |= not torch.equal(action, 2 * extras[BASE])
        np.testing.assert_allclose(actor.act({"observation": obs[0].numpy()}), action[0].numpy(), atol=1e-4)
    assert corrected


def test_a_model_that_cannot_be_put_into_another_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from ctrlrl.deploy.graft import StoredModel, _converted

    node = onnx.helper.make_node("Odd", ["x"], ["y"], domain="elsewhere")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("elsewhere", 1)]
    odd = onnx.helper.make_model(onnx.helper.make_graph([node], "odd", [x], [y]), opset_imports=opsets)

    class Stored(StoredModel):
        source = "odd.onnx"

        def model(self) -> Any:
            return odd

        def act(self, *how: Any, **more: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(UsageError, match=r"odd.onnx has operations of elsewhere: it cannot be exported"):
        _converted(Stored(), {"": 20})


def make_still(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Any:
    return lambda obs: np.zeros((len(obs), 1))


@pytest.mark.parametrize(
    ("base", "what"),
    [
        ("nowhere", "no run"),
        ("tests.test_residual:nothing", "has no attribute 'nothing'"),
        ("no_such_module:base", "No module named 'no_such_module'"),
        ("tests.test_residual:A", "is no function"),
    ],
)
def test_bases_that_are_none(base: str, what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert command(["train", "resfit", "--env", "Pendulum-v1", "--base", base, "--out", out]) == 2
    assert what in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_base_of_another_environment_is_refused_by_name(
    base_run: tuple[Path, Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--base", str(base_run[0]), "--out", str(tmp_path / "run"), "--eval-every", "0"]
    assert command(["train", "resfit", "--env", "Hopper-v5", *arguments]) == 2
    said = capsys.readouterr().err
    assert "observes and does something else than this environment" in said and "(3,)" in said and "(11,)" in said
    assert command(["train", "sac", "--env", "Pendulum-v1", *arguments]) == 2
    assert "sac builds on no other policy: --base is for resfit, policy-decorator, expo" in capsys.readouterr().err
    assert command(["train", "resfit", "--env", "Pendulum-v1"]) == 2
    assert "resfit builds on a policy that is there: --base RUN" in capsys.readouterr().err


@pytest.fixture(scope="module")
def swing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a task of ours."""
    out = str(tmp_path_factory.mktemp("swing") / "run")
    return ctrlrl.train("sac", "CartPoleSwingUp-v0", **SMALL | {"steps": 60, "eval_every": 0, "out": out}).path


def swing_task(changes: dict[str, Any] | None = None) -> SimTask:
    """The task of `swing`, with other terms of the policy's observations."""
    task = make_robot_task("CartPoleSwingUp-v0", {})
    own = dict(task.policy_terms)
    for name, change in (changes or {}).items():
        if change is None:
            del own[name]
        else:
            own[name] = change(own.get(name))
    return replace(task, observations={**task.observations, task.policy_group: own}, mirror=None)


def measured(**changes: Any) -> Any:
    def change(term: ObsTerm) -> ObsTerm:
        assert term.measure is not None
        return replace(term, measure=replace(term.measure, **changes))

    return change


FIRST, SECOND, *_ = make_robot_task("CartPoleSwingUp-v0", {}).policy_terms
OTHERS: list[tuple[dict[str, Any], list[str]]] = [
    ({FIRST: None}, [f"{FIRST}: the environment has no such term"]),
    ({"more": lambda _: ObsTerm(lambda w: w.joint_pos)}, ["more: the base does not read it"]),
    ({FIRST: lambda term: replace(term, history=2)}, [f"{FIRST}: it reads", ", 2 in succession"]),
    ({FIRST: measured(unit="ft")}, [f"{FIRST}: it reads", " ft"]),
    ({FIRST: measured(frame="world")}, [f"{FIRST}: its frame is joint, the environment's world"]),
    ({SECOND: measured(joints=("elbow",))}, [f"{SECOND}: its joints is", "the environment's elbow"]),
    ({FIRST: measured(offset=(0.5,))}, [f"{FIRST}: its offset is", "[0.5]"]),
]


@pytest.mark.parametrize(("changes", "said"), OTHERS, ids=[said[0].replace(" ", "-") for _, said in OTHERS])
def test_terms_of_a_run_and_of_a_bundle_are_compared_one_by_one(
    changes: dict[str, Any], said: list[str], swing: Path, tmp_path: Path
) -> None:
    task = swing_task(changes)
    env = SimVector(task, BatchSim(physics(task), 1, 1))
    spaces = env.observation_space, env.action_space
    manifest = manifest_of(swing, tmp_path)
    for check in (
        lambda: open_base(swing, *spaces, task),
        lambda: require_bundle_fits("B", manifest, own_spaces=spaces, own_task=task, own_dt=None),
    ):
        with pytest.raises(UsageError, match="observes something else") as raised:
            check()
        assert all(text in str(raised.value) for text in said) and "Box(" not in str(raised.value)


def manifest_of(run: Path, folder: Path) -> Manifest:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from ctrlrl.training.export_run import export_run

    return export_run(run, folder / "bundle", checkpoint="last").manifest


def test_what_a_run_and_a_bundle_do_is_compared(swing: Path, tmp_path: Path) -> None:
    task = swing_task()
    env = SimVector(task, BatchSim(physics(task), 1, 1))
    spaces, manifest = (env.observation_space, env.action_space), manifest_of(swing, tmp_path)
    own_dt = task.timestep * task.substeps
    open_base(swing, *spaces, task, own_dt)
    assert task.action.effect is not None
    scaled = replace(task.action.effect, scale=[2 * x for x in task.action.effect.scale])
    others = [
        (replace(task.action, names=("elbow",)), "action: the base moves .*, the environment elbow"),
        (replace(task.action, effect=scaled), r"action: its scale is \[.*\], the environment's \["),
        (
            replace(task.action, effect=replace(scaled, kind="joint lead")),
            r"action: it is .*, the environment's joint lead",
        ),
    ]
    for action, said in others:
        with pytest.raises(UsageError, match=f"(?s)does something else.*{said}"):
            open_base(swing, *spaces, replace(task, action=action), own_dt)
        with pytest.raises(UsageError, match=f"(?s)does something else.*{said}"):
            own = {"own_spaces": spaces, "own_task": replace(task, action=action), "own_dt": own_dt}
            require_bundle_fits("B", manifest, **own)
    wider = (spaces[0], gym.spaces.Box(-1, 1, (3,)))
    three = replace(task, action=replace(task.action, names=("a", "b", "c"), apply=lambda world, action: None))
    with pytest.raises(UsageError, match=r"(?s)it gives \(1,\), the environment takes \(3,\).*the environment a, b, c"):
        require_bundle_fits("B", manifest, own_spaces=wider, own_task=three, own_dt=own_dt)
    with pytest.raises(UsageError, match=r"its bounds are \[-1.0\] to \[1.0\], the environment's \[-2.0\] to"):
        require_bundle_fits("B", manifest, own_spaces=(spaces[0], TORQUE), own_task=None, own_dt=own_dt)
    with pytest.raises(UsageError, match=r"it acts every .* s, in the environment every 1 s"):
        open_base(swing, *spaces, task, 1.0)
    with pytest.raises(UsageError, match="policy: the environment gives eyes"):
        eyes = gym.spaces.Dict({"eyes": spaces[0]})
        require_bundle_fits("B", manifest, own_spaces=(eyes, spaces[1]), own_task=None, own_dt=own_dt)


@pytest.mark.parametrize(("bad", "shown"), [(float("nan"), "nan"), (3.0, "3.0")])
def test_a_base_that_gives_no_action_stops_the_run_with_what_it_was_asked(
    bad: float, shown: str, tmp_path: Path
) -> None:
    calls = [0]

    def base(obs: Tensor) -> Tensor:
        calls[0] += 1
        action = torch.zeros(len(obs), 1)
        if calls[0] > 40:
            action[1] = bad
        return action

    with pytest.raises(BadBaseAction, match=rf"action \[{shown}\] in environment 1; .*\[-2.0\] and \[2.0\]") as raised:
        ctrlrl.train(
            "resfit",
            "Pendulum-v1",
            base=base,
            preset=False,
            **SMALL | {"num_envs": 2, "eval_every": 0, "out": str(tmp_path / "run")},
        )
    assert raised.value.exit_code == 3 and "Go on with: ctrlrl resume" in str(raised.value)
    (kept,) = (tmp_path / "run").glob("**/bad-base-action-*")
    evidence = load_checkpoint(kept)
    assert evidence["obs"].shape == (3,) and evidence["action"].shape == (1,)
    assert f"Step {int(kept.name.rpartition('-')[2]):,}" in str(raised.value)


def test_a_base_that_is_wrong_from_the_first_observation_on_leaves_what_it_was_asked(tmp_path: Path) -> None:
    how = SMALL | {"num_envs": 2, "eval_every": 0, "out": str(tmp_path / "run"), "preset": False}
    with pytest.raises(BadBaseAction, match=r"action \[3.0\] in environment 0") as raised:
        ctrlrl.train("resfit", "Pendulum-v1", base=lambda obs: torch.full((len(obs), 1), 3.0), **how)
    (kept,) = (tmp_path / "run").iterdir()
    assert f"Step 0; what it was asked: {kept}. The run has not begun" in str(raised.value)
    assert load_checkpoint(kept)["obs"].shape == (3,)


def test_a_run_that_stops_twice_at_one_step_keeps_what_was_asked_both_times(tmp_path: Path) -> None:
    bad = [False]

    def base(obs: Tensor) -> Tensor:
        return torch.full((len(obs), 1), float("nan") if bad[0] else 0.0)

    how = SMALL | {"steps": 20, "eval_every": 0, "out": str(tmp_path / "run"), "preset": False}
    ctrlrl.train("resfit", "Pendulum-v1", base=base, **how)
    bad[0] = True
    for name in ("bad-base-action-000000000020", "bad-base-action-000000000020-2"):
        with pytest.raises(BadBaseAction, match=f"Step 20; what it was asked: .*{name}") as raised:
            ctrlrl.resume(tmp_path / "run", steps=40, base=base, quiet=True)
        assert (tmp_path / "run" / name).is_dir() and "has not begun" not in str(raised.value)


def test_a_base_that_has_no_action_for_the_data_leaves_what_it_was_asked(tmp_path: Path) -> None:
    data = pendulum_data(tmp_path / "data", episodes=3, length=7)
    row = int(data.starts[1]) + 1 + 2  # one more observation than steps in each episode before
    culprit = torch.from_numpy(np.array(data.observation[row])).float()

    def base(obs: Tensor) -> Tensor:
        action = torch.zeros(len(obs), 1)
        action[(obs == culprit).all(-1)] = float("nan")
        return action

    with pytest.raises(BadBaseAction, match=rf"in step 2 of episode 1 of .*data \(row {row} of its obs") as raised:
        ctrlrl.train(
            "resfit",
            "Pendulum-v1",
            base=base,
            preset=False,
            **SMALL | {"eval_every": 0, "data": str(data.path), "out": str(tmp_path / "run")},
        )
    (kept,) = (tmp_path / "run").iterdir()
    assert f"What it was asked: {kept}. The run has not begun" in str(raised.value)
    evidence = load_checkpoint(kept)
    assert torch.equal(evidence["obs"], culprit) and evidence["action"].isnan() and "episode 1" in evidence["where"]


# --- scripted controllers ---------------------------------------------------------------------------------------------


def test_state_feedback_holds_a_pendulum_up() -> None:
    """LQR by Riccati iteration, on the linearized pendulum of Gymnasium: theta'' = 15 theta + 3 u, dt = 0.05."""
    a, b = np.array([[1.0, 0.05], [0.75, 1.0]]), np.array([[0.0], [0.15]])
    p = np.eye(2)
    for _ in range(500):
        k = np.linalg.solve(0.1 + b.T @ p @ b, b.T @ p @ a)
        p = np.eye(2) + a.T @ p @ (a - b @ k)
    policy = LinearFeedback(k, TORQUE, columns=(1, 2))  # sin theta, theta'
    env = gym.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    env.state = np.array([0.1, 0.0])  # type: ignore[attr-defined]
    for _ in range(100):
        theta, speed = env.state  # type: ignore[attr-defined]
        obs = torch.tensor([[np.cos(theta), np.sin(theta), speed]], dtype=torch.float32)
        env.step(policy.act(obs)[0][0].numpy())
    assert abs(env.state[0]) < 0.01 and abs(env.state[1]) < 0.01  # type: ignore[attr-defined]


def test_pid_against_its_sums() -> None:
    policy = PID(0.5, 0.4, 0.1, 0.1, gym.spaces.Box(-1, 1, (1,)), columns=(0,), target=[1.0])
    state, integral, last = policy.initial_state(1), 0.0, None
    for measured in (0.0, 0.2, 0.5, 0.4, 0.9):
        action, state, _ = policy.act(torch.tensor([[measured, 7.0]]), state)
        error = 1.0 - measured
        integral += error * 0.1
        speed = 0.0 if last is None else (measured - last) / 0.1
        assert action.item() == pytest.approx(0.5 * error + 0.4 * integral - 0.1 * speed, abs=1e-6)
        last = measured
    for _ in range(50):  # far away: it does not wind up
        _, state, _ = policy.act(torch.tensor([[-50.0, 0.0]]), state)
    assert state["integral"].item() == pytest.approx(integral, abs=1e-5)
    fresh = policy.reset(state, torch.tensor([True]))
    assert all(value.item() == 0 for value in fresh.values())


def test_controllers_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(UsageError, match="a PID measures as many numbers as it commands, 2; columns are"):
        PID(1, 0, 0, 0.1, gym.spaces.Box(-1, 1, (2,)), columns=(0,))
    wide = Base(CallablePolicy(lambda obs: torch.zeros(len(obs), 1)), ACT)
    with pytest.raises(UsageError, match=r"the base policy gave actions \(4, 1\); expected \(4, 2\)"):
        wide.act(torch.zeros(4, 5), {})
    square = LinearFeedback(torch.ones(4, 3), gym.spaces.Box(-1, 1, (2, 2)))
    assert square.act(torch.ones(5, 3))[0].shape == (5, 2, 2)
    with pytest.raises(UsageError, match="which of a, b is the state"):
        square.act({"a": torch.ones(5, 3), "b": torch.ones(5, 3)})


def test_what_hardly_moves_in_the_data_is_not_blown_up():
    obs = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    config = ResFiTConfig(hidden=(16,), min_obs_std=0.05)
    agent = ResFiT(obs, ACT, config, base=CallablePolicy(lambda o: torch.zeros(len(o), 2)))
    rows = torch.tensor([[0.0, 1.0, -2.0], [0.0, 1.001, 2.0]])
    agent.observe(rows, torch.ones(2, dtype=torch.bool))
    seen = agent.normalizer.entry("obs").forward(torch.tensor([[0.1, 1.1, 4.0]]))
    assert torch.allclose(seen, torch.tensor([[0.1 / 0.05, 0.0995 / 0.05, 2.0]]), atol=1e-4)
    with pytest.raises(UsageError, match=r"agent\.min_obs_std"):
        ResFiT(obs, ACT, ResFiTConfig(min_obs_std=-1.0), base=CallablePolicy(lambda o: torch.zeros(len(o), 2)))
