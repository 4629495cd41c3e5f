"""PPO: an update against a float64 reference and Stable-Baselines3, boundaries, memory, statistics, learning."""

from __future__ import annotations

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.envs.vector import Step
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured
from ctrlrl.replay.rollout import Rollout
from ctrlrl.runs.checkpoint import pack
from tests.test_execution import needs_compiler, rerun
from tests.test_pixels import MIXED
from tests.test_pixels import make_batch as make_image_batch
from tests.test_sac import Adam64

OBS = gym.spaces.Box(-np.inf, np.inf, (5,))
ACT = gym.spaces.Box(np.float32([-0.4, 0.0]), np.float32([0.4, 3.0]))
PLAIN = {"normalize_obs": False, "normalize_reward": False, "hidden": (16, 16)}


def collect(agent: PPO, horizon=12, n=4, seed=0, obs_space=OBS, ends=0.2, invalid=0.0) -> Rollout:
    """A rollout of random observations and rewards, with the agent's own decisions, ends and invalid rows."""
    g = torch.Generator().manual_seed(seed)

    def observe():
        spaces = obs_space.spaces.items() if isinstance(obs_space, gym.spaces.Dict) else [("", obs_space)]
        out = {name: torch.randn(n, *space.shape, generator=g) for name, space in spaces}
        return out if isinstance(obs_space, gym.spaces.Dict) else out[""]

    state, obs = agent.policy.initial_state(n), observe()
    extras = agent.policy.act(obs, state)[2]
    rollout = Rollout(obs_space, horizon=horizon, num_envs=n, extras=extras, policy_state=state)
    rollout.begin(obs)
    for _ in range(horizon):
        action, state, extras = agent.policy.act(obs, state, explore=True)
        valid = torch.rand(n, generator=g) >= invalid
        kind = torch.rand(n, generator=g)
        terminated, truncated = (kind < ends) & valid, (kind > 1 - ends) & valid
        fresh, final = observe(), observe()
        done = terminated | truncated
        obs = fresh
        if not isinstance(obs, dict):
            final = torch.where(done[:, None], final, fresh)
        rollout.add(Step(obs, action, torch.randn(n, generator=g), terminated, truncated, final, valid), extras)
        state = agent.policy.reset(state, done | ~valid)
    return rollout


class PPOReference:
    """Value targets, losses, clipped gradients and Adam written out once more in float64, with no code of ours."""

    def __init__(self, agent: PPO) -> None:
        self.c = agent.config
        self.policy = {k: v.detach().double().clone() for k, v in agent.policy.trunk.state_dict().items()}
        self.policy["log_std"] = agent.policy.head.log_std.detach().double().clone()
        self.critic = {k: v.detach().double().clone() for k, v in agent.critic.trunk.state_dict().items()}
        self.adam, self.updates = Adam64(self.c.lr, eps=1e-5), 0

    @staticmethod
    def net(p, x):
        h = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
        h = torch.tanh(h @ p["2.weight"].T + p["2.bias"])
        return h @ p["4.weight"].T + p["4.bias"]

    def log_prob(self, p, obs, raw):
        return torch.distributions.Normal(self.net(p, obs), p["log_std"].exp()).log_prob(raw).sum(-1)

    def prepare(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        c, horizon, n = self.c, *rollout.reward.shape
        obs, final = rollout.obs.double(), rollout.final_obs.double()
        value, last = self.net(self.critic, obs)[..., 0], self.net(self.critic, final)[..., 0]
        advantage = torch.zeros(horizon, n, dtype=torch.float64)
        for i in range(n):
            following = 0.0
            for t in reversed(range(horizon)):
                ends = bool(rollout.terminated[t, i] | rollout.truncated[t, i])
                after = last[t, i] if ends else value[t + 1, i]
                bootstrap = 0.0 if rollout.terminated[t, i] else c.gamma * after
                delta = rollout.reward[t, i].double() + bootstrap - value[t, i]
                following = delta + (0.0 if ends else c.gamma * c.gae_lambda * following)
                advantage[t, i] = following
        raw = rollout.extras["decision"].double()
        data = {"obs": obs[:-1], "raw": raw, "value": value[:-1], "advantage": advantage}
        data["log_prob"] = self.log_prob(self.policy, obs[:-1], raw)
        return {name: x.flatten(0, 1) for name, x in data.items()}

    def step(self, data: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
        c, b = self.c, {name: x[rows] for name, x in data.items()}
        both = {f"p/{k}": v for k, v in self.policy.items()} | {f"v/{k}": v for k, v in self.critic.items()}
        both = {k: v.clone().requires_grad_() for k, v in both.items()}
        policy, critic = ({k[2:]: v for k, v in both.items() if k.startswith(one)} for one in ("p/", "v/"))
        ratio = torch.exp(self.log_prob(policy, b["obs"], b["raw"]) - b["log_prob"])
        advantage = (b["advantage"] - b["advantage"].mean()) / (b["advantage"].std() + 1e-8)
        gain = torch.min(ratio * advantage, ratio.clip(1 - c.clip, 1 + (c.clip_high or c.clip)) * advantage).mean()
        target, value = b["advantage"] + b["value"], self.net(critic, b["obs"])[:, 0]
        error = (value - target) ** 2
        if c.value_clip is not None:
            near = b["value"] + (value - b["value"]).clip(-c.value_clip, c.value_clip)
            error = torch.max(error, (near - target) ** 2)
        entropy = (policy["log_std"] + 0.5 * np.log(2 * np.pi * np.e)).sum()
        loss = -gain + c.value_coef * error.mean() - c.entropy_coef * entropy
        grads = dict(zip(both, torch.autograd.grad(loss, list(both.values())), strict=True))
        norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, c.max_grad_norm / (norm.item() + 1e-6))
        old = {k: v.detach() for k, v in both.items()}
        new = self.adam.step(old, {k: g * scale for k, g in grads.items()})
        share = {"p/": float(self.updates >= c.critic_only), "v/": (c.critic_lr or c.lr) / c.lr}  # of Adam's steps
        new = {k: old[k] + share[k[:2]] * (v - old[k]) for k, v in new.items()}
        self.updates += 1
        self.policy, self.critic = ({k[2:]: v for k, v in new.items() if k.startswith(one)} for one in ("p/", "v/"))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"value_clip": 0.1, "entropy_coef": 0.01, "max_grad_norm": 0.1},
        {"critic_lr": 1e-2},
        {"clip": 0.02, "clip_high": 0.04},
        {"critic_only": 12, "critic_lr": 1e-3},
    ],
)
def test_three_rollouts_equal_the_float64_reference(more):
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, epochs=3, minibatch_size=16, lr=3e-3, **more), seed=1)
    reference = PPOReference(agent)
    for i in range(3):
        rollout = collect(agent, seed=i)
        orders = torch.Generator()
        orders.set_state(agent.generator.get_state())
        data = reference.prepare(rollout)
        for _ in range(3):
            for rows in torch.randperm(48, generator=orders).view(3, 16):
                reference.step(data, rows)
        _, updates = agent.update(rollout)
        assert updates == 9
        for ours, theirs in ((agent.policy.trunk, reference.policy), (agent.critic.trunk, reference.critic)):
            for name, value in ours.state_dict().items():
                assert torch.allclose(value.double(), theirs[name], atol=2e-5), (i, name)
        assert torch.allclose(agent.policy.head.log_std.double(), reference.policy["log_std"], atol=2e-5)


def test_one_update_equals_stable_baselines3_on_the_same_weights_and_rollout():
    import stable_baselines3 as sb3
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 4)
    theirs = sb3.PPO(
        "MlpPolicy", env, n_steps=12, batch_size=48, n_epochs=1, gamma=0.9, ent_coef=0.01, device="cpu",
        policy_kwargs={"net_arch": {"pi": [16, 16], "vf": [16, 16]}},
    )  # fmt: skip
    space = gym.spaces.Box(-1.0, 1.0, (1,))
    config = PPOConfig(**PLAIN, epochs=1, minibatch_size=48, gamma=0.9, entropy_coef=0.01)
    agent = PPO(gym.spaces.Box(-1, 1, (3,)), space, config)
    net, head = theirs.policy.mlp_extractor, theirs.policy
    pairs = [
        (agent.policy.trunk, [net.policy_net[0], net.policy_net[2], head.action_net]),
        (agent.critic.trunk, [net.value_net[0], net.value_net[2], head.value_net]),
    ]
    with torch.no_grad():
        head.action_net.weight.mul_(30)  # else the policy's gradient is that of a nearly constant mean
        for trunk, layers in pairs:
            for i, layer in zip((0, 2, 4), layers, strict=True):
                trunk[i].weight.copy_(layer.weight)
                trunk[i].bias.copy_(layer.bias)
    rollout = collect(agent, obs_space=gym.spaces.Box(-1, 1, (3,)), ends=0.0)
    rollout.terminated[4, 1] = rollout.terminated[7, 2] = True
    with torch.no_grad():
        values = agent.critic(rollout.obs.flatten(0, 1)).view(13, 4)
        flat = agent.policy.distribution(rollout.obs[:-1].flatten(0, 1))
        log_prob = flat.log_prob(rollout.extras["decision"].flatten(0, 1)).view(12, 4)
    starts = torch.zeros(4)
    for t in range(12):
        decision = rollout.extras["decision"][t].numpy()
        theirs.rollout_buffer.add(
            rollout.obs[t].numpy(), decision, rollout.reward[t].numpy(), starts.numpy(), values[t], log_prob[t]
        )
        starts = rollout.terminated[t].float()
    theirs.rollout_buffer.compute_returns_and_advantage(values[12], starts.numpy())
    theirs.set_logger(configure(None, []))
    before = agent.policy.trunk[2].weight.detach().clone()
    theirs.train()
    agent.update(rollout)
    for trunk, layers in pairs:
        for i, layer in zip((0, 2, 4), layers, strict=True):
            assert torch.allclose(trunk[i].weight, layer.weight, atol=2e-6)
            assert torch.allclose(trunk[i].bias, layer.bias, atol=2e-6)
    assert torch.allclose(agent.policy.head.log_std, head.log_std, atol=2e-6)
    assert (agent.policy.trunk[2].weight - before).abs().max() > 1e-4


@pytest.mark.parametrize("recurrent", ["none", "gru", "lstm"])
@pytest.mark.parametrize("space", [ACT, gym.spaces.Discrete(3, start=5), gym.spaces.MultiDiscrete([3, 2, 4])])
def test_the_first_minibatchs_ratio_is_one(space, recurrent):
    """Also in the second rollout: statistics moved in between, and the recurrent states went on."""
    config = PPOConfig(hidden=(16,), recurrent=recurrent, recurrent_size=8, sequence_length=5, epochs=2, lr=3e-3)
    agent = PPO(OBS, space, config)
    rollout = collect(agent)
    agent.update(rollout)
    count = float(agent.normalizer.entry("obs").count)
    rollout = collect(agent, seed=1)
    seen = []

    def step(batch):
        if not seen:
            if recurrent == "none":
                said = agent.policy.distribution(batch.obs).log_prob(batch.decision) - batch.log_prob
            else:
                said = agent.policy.unroll(batch.obs.transpose(0, 1), batch.policy_state, batch.start.t())[0]
                rows = batch.rows()
                said = torch.where(rows.mask, said.log_prob(rows.decision) - rows.log_prob, 0.0)
            assert (said.exp() - 1).abs().max() <= 1e-6
        seen.append(agent.step(batch))
        return seen[-1]

    agent._step = step
    agent.update(rollout)
    assert float(seen[0]["clipped"]) == 0
    assert float(agent.normalizer.entry("obs").count) == count + 48  # each frame once, after the update
    assert float(seen[-1]["kl"]) > 1e-6


def test_ratios_are_of_what_the_collecting_policy_said():
    """Log-probabilities of a rollout are those its decisions were drawn with, through all episodes' starts."""
    for recurrent in ("none", "lstm"):
        agent = PPO(OBS, ACT, PPOConfig(**PLAIN, recurrent=recurrent, recurrent_size=8, sequence_length=12))
        nn.init.normal_(agent.policy.trunk[-1].weight)
        n, said = 4, []
        act, head = agent.policy.act, agent.policy.head

        def spying(obs, state=None, *, explore=False, act=act, agent=agent, said=said):
            out = act(obs, state, explore=explore)
            said.append(agent.policy._step(obs, state or {})[0].log_prob(out[2]["decision"]).detach())
            return out

        agent.policy.act = spying
        rollout = collect(agent, n=n)
        batch, _ = agent.prepare(rollout)
        ours = batch.log_prob.view(n, 12, 1).transpose(0, 1) if recurrent == "lstm" else batch.log_prob.view(12, n, 1)
        assert torch.allclose(ours, torch.stack(said[1:]), atol=1e-5)
        assert head.log_std.requires_grad


def test_a_time_limit_is_bootstrapped_with_the_value_of_the_true_last_observation():
    for recurrent in ("none", "gru"):
        c = PPOConfig(**PLAIN, recurrent=recurrent, recurrent_size=8, sequence_length=3, gamma=0.9)
        agent = PPO(OBS, ACT, c)
        nn.init.normal_(agent.critic.trunk[-1].weight)
        rollout = collect(agent, horizon=3, n=1, ends=0.0)
        rollout.truncated[1] = True
        rollout.final_obs[1] = 2.0
        with torch.no_grad():
            if recurrent == "none":
                v, final = agent.critic(rollout.obs[1]), agent.critic(rollout.final_obs[1])
            else:
                state = agent.critic.recurrence.initial(1)
                _, state = agent.critic.step(rollout.obs[0], state)
                v, state = agent.critic.step(rollout.obs[1], state)
                final, _ = agent.critic.step(rollout.final_obs[1], state)  # before the state starts anew
        batch, _ = agent.prepare(rollout)
        expected = rollout.reward[1] + 0.9 * final - v
        assert torch.allclose(batch.advantage.flatten()[1], expected, atol=1e-5)
        rollout.truncated[1], rollout.terminated[1] = False, True
        batch, _ = agent.prepare(rollout)
        assert torch.allclose(batch.advantage.flatten()[1], rollout.reward[1] - v, atol=1e-5)


@pytest.mark.parametrize("recurrent", ["none", "gru"])
@pytest.mark.parametrize("worse", [1e3, float("nan")])
def test_rows_that_are_no_transition_have_no_weight(recurrent, worse):
    c = {"recurrent": recurrent, "recurrent_size": 8, "sequence_length": 5, "minibatch_size": 60, "epochs": 1}
    agents = [PPO(OBS, ACT, PPOConfig(hidden=(16,), **c), seed=2) for _ in range(2)]
    results = []
    for agent, junk in zip(agents, (0.0, worse), strict=True):
        rollout = collect(agent, horizon=12, n=5, invalid=0.3)
        assert 5 < int((~rollout.valid).sum()) < 40
        rollout.reward[~rollout.valid] = junk
        rollout.extras["decision"][~rollout.valid] += 0.0 if junk == 0 else 1.0
        rollout.final_obs[~rollout.valid] = junk
        agent.update(rollout)
        results.append(pack(agent.state_dict())[0])
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert all(value.isfinite().all() for value in results[0].values())
    assert float(agents[0].normalizer.entry("obs").count) == int(rollout.valid.sum())


def by_hand(horizon: int, agent: PPO, values: list[float]) -> Rollout:
    """One environment whose observation t has the value `values[t]`: the critic reads the first entry."""
    layers = agent.critic.trunk
    with torch.no_grad():
        for layer in layers.parameters():
            layer.zero_()
        layers[0].weight[0, 0] = layers[2].weight[0, 0] = layers[4].weight[0, 0] = 1.0
    rollout = Rollout(OBS, horizon=horizon, num_envs=1, extras={"decision": torch.zeros(1, 2)}, policy_state={})
    rollout.begin(torch.tensor([[values[0], 0, 0, 0, 0]]))
    no, yes = torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    for value in values[1:]:
        obs = torch.tensor([[value, 0, 0, 0, 0]])
        rollout.add(Step(obs, no, torch.ones(1), no, no, obs, yes), {"decision": torch.zeros(1, 2)})
    return rollout


def test_a_trace_stops_before_a_row_that_is_no_transition():
    settings = PLAIN | {"gamma": 0.5, "gae_lambda": 0.5, "activation": "relu"}
    agent = PPO(OBS, ACT, PPOConfig(**settings))
    rollout = by_hand(3, agent, [2.0, 8.0, 3.0, 4.0])
    rollout.valid[1] = False
    rollout.reward[1] = float("nan")
    batch, metrics = agent.prepare(rollout)
    # A_2 = 1 + .5*4 - 3 = 0; A_0 = 1 + .5*8 - 2 = 3, with nothing of what follows
    assert batch.advantage.flatten().tolist()[::2] == [3.0, 0.0]
    assert metrics["value_mean"] == 2.5
    rollout.valid[1], rollout.reward[1] = True, 1.0
    # A_1 = 1 + .5*3 - 8 = -5.5; A_0 = 3 + .25 * -5.5
    assert agent.prepare(rollout)[0].advantage.flatten().tolist() == [3 - 0.25 * 5.5, -5.5, 0.0]


@pytest.mark.parametrize("recurrent", ["none", "gru"])
@pytest.mark.parametrize("valid", [0, 1, 7])
def test_hardly_any_row_counts(recurrent, valid):
    """Minibatches without a single row that counts, or a whole rollout of them."""
    c = {"recurrent": recurrent, "recurrent_size": 8, "sequence_length": 4, "minibatch_size": 4, "epochs": 2}
    agent = PPO(OBS, ACT, PPOConfig(hidden=(8,), lr_schedule="adaptive", **c))
    rollout = collect(agent, horizon=10, n=4)
    rollout.valid.view(-1)[valid:] = False
    before = [p.detach().clone() for p in agent.optimizer.parameters]
    metrics, updates = agent.update(rollout)
    assert all(value.isfinite() for value in metrics.values())
    assert all(value.isfinite().all() for value in pack(agent.state_dict())[0].values())
    moved = [not torch.equal(a, b) for a, b in zip(before, agent.optimizer.parameters, strict=True)]
    assert (updates == 0 and not any(moved)) if valid == 0 else any(moved)


def test_rows_that_count_are_dealt_out_evenly():
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, minibatch_size=12, epochs=1))
    rollout = collect(agent, horizon=12, n=4)
    rollout.valid.view(-1)[8:] = False
    shares = []
    agent._step = lambda batch: shares.append(int(batch.mask.sum())) or agent.step(batch)
    agent.update(rollout)
    assert shares == [2, 2, 2, 2]


def test_sequences_are_no_longer_than_a_rollout_and_minibatches_as_large_as_asked_for():
    c = {"recurrent": "gru", "recurrent_size": 8, "sequence_length": 1000, "minibatch_size": 32, "epochs": 1}
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, **c))
    rollout = collect(agent, horizon=8, n=16)
    assert agent.prepare(rollout)[0].obs.shape == (16, 8, 5)
    assert agent.update(rollout)[1] == 4


def test_a_small_deviation_does_not_overflow_where_rows_do_not_count():
    space = gym.spaces.Box(-1, 1, (17,))
    c = {"recurrent": "gru", "recurrent_size": 8, "sequence_length": 8, "log_std": -7.0}
    agent = PPO(OBS, space, PPOConfig(**PLAIN, **c))
    metrics, _ = agent.update(collect(agent, horizon=9))
    assert all(value.isfinite() for value in metrics.values())


def test_a_recurrent_layer_starts_anew_with_each_episode_and_sequences_are_filled_up():
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, recurrent="gru", recurrent_size=8, sequence_length=5))
    rollout = collect(agent, horizon=11)
    batch, _ = agent.prepare(rollout)
    assert batch.obs.shape == (12, 4, 5)  # three stretches of 11 steps, as equal as they can be, four environments
    assert batch.mask.sum() == 44 and not batch.mask[8:, 3].any()
    # The start of each sequence, by hand: step by step from the rollout's start.
    state = agent.policy.initial_state(4)
    for t in range(9):
        if t % 4 == 0:
            here = {k: v * ~rollout.start[t][:, None] for k, v in state.items()}
            assert torch.allclose(batch.policy_state["h"][t : t + 4], here["h"], atol=1e-6)
        state = agent.policy.reset(state, rollout.start[t])
        _, state, _ = agent.policy.act(rollout.obs[t], state)
    # What came before an episode's start does not matter after it.
    row, env = (int(x[0]) for x in (rollout.start[1:11]).nonzero(as_tuple=True))
    rollout.obs[row, env] += 1.0  # the last observation before
    changed, _ = agent.prepare(rollout)
    ours, theirs = (b.log_prob.view(3, 4, 4).transpose(1, 2).flatten(0, 1)[:11, env] for b in (batch, changed))
    assert ours[row] != theirs[row] and torch.equal(ours[row + 1 :], theirs[row + 1 :])


def test_the_critics_memory_goes_on_from_rollout_to_rollout():
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, recurrent="gru", recurrent_size=8, sequence_length=6))
    whole = collect(agent, horizon=12, ends=0.0)
    halves = Rollout(OBS, horizon=6, num_envs=4, extras={"decision": torch.zeros(4, 2)}, policy_state={})
    state = agent.policy.initial_state(4)
    halves.begin(whole.obs[0])
    values = agent.prepare(whole)[0].value.view(2, 4, 6).transpose(1, 2).flatten(0, 1)
    for half in range(2):
        halves.policy_state = state
        for t in range(6 * half, 6 * half + 6):
            obs, no = whole.obs[t + 1], torch.zeros(4, dtype=torch.bool)
            halves.add(Step(obs, no, whole.reward[t], no, no, obs, ~no), {"decision": whole.extras["decision"][t]})
            state = agent.policy.act(whole.obs[t], state)[1]
        batch, _ = agent.prepare(halves)
        assert torch.allclose(batch.value[..., 0].T, values[6 * half : 6 * half + 6], atol=1e-6)
        halves.clear(state)


def test_joint_and_per_decision_ratios():
    """Two decisions of which one became twice as likely and the other half: jointly nothing happened."""
    space = gym.spaces.MultiDiscrete([2, 2])
    shares = {}
    for ratio in ("joint", "per-decision"):
        agent = PPO(OBS, space, PPOConfig(**PLAIN, ratio=ratio, normalize_advantage=False))
        batch, _ = agent.prepare(collect(agent))
        shift = torch.tensor([[np.log(2.0), -np.log(2.0)]], dtype=torch.float32)
        shares[ratio] = float(agent.step(replace(batch, log_prob=batch.log_prob + shift))["clipped"])
    assert shares == {"joint": 0.0, "per-decision": 1.0}


def test_earlier_rollouts_are_learned_from_again_by_a_decoupled_ratio():
    settings = PLAIN | {"lr": 0.05, "epochs": 2, "minibatch_size": 24, "normalize_advantage": False}
    agent, plain = (PPO(OBS, ACT, PPOConfig(**settings, stale_rollouts=n, stale_weight=1.5), seed=3) for n in (1, 0))
    first = collect(agent, seed=1, invalid=0.2)
    plain.load_state_dict(agent.state_dict())
    for one in (agent, plain):
        one.update(first)
    for a, b in zip(agent.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(a, b)  # there was no earlier one
    kept = agent._former[0]
    second = collect(agent, seed=2, invalid=0.2)
    assert torch.equal(kept.log_prob, kept.behaviour) and len(kept.mask) == 48
    data, _ = agent.prepare(second)
    saved = copy.deepcopy(agent.state_dict())
    batch = agent._with_former(data)
    assert len(batch.mask) == 96 and torch.equal(batch.obs[:48], kept.obs)
    now = agent.policy.distribution(batch.obs).log_prob(batch.decision).detach()
    torch.testing.assert_close(batch.log_prob, now)
    assert torch.equal(batch.log_prob[48:], batch.behaviour[48:])
    weight = (batch.log_prob - batch.behaviour).exp()
    assert bool((weight[:48] > 1.5).any()) and bool((weight[:48] < 1).any())
    with torch.no_grad():  # move, so that ratios are clipped
        agent.policy.head.log_std.add_(0.3)
    moved = agent.policy.distribution(batch.obs).log_prob(batch.decision).detach()
    ratio, advantage, mask = (moved - batch.log_prob).exp(), batch.advantage, batch.mask
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = -(weight.clamp(max=1.5) * surrogate)[mask].mean()
    torch.testing.assert_close(agent.step(batch)["policy_loss"], expected)

    agent.load_state_dict(saved)
    other = PPO(OBS, ACT, agent.config, seed=9)
    other.load_state_dict(saved)
    for one in (agent, other):
        one.update(second)
    for a, b in zip(agent.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(other._former) == 1 and torch.equal(other._former[0].obs, data.obs)
    with pytest.raises(UsageError, match="none, where groups tell or earlier rollouts"):
        PPOConfig(stale_rollouts=1, recurrent="gru")


def test_multidiscrete_and_discrete_actions_are_in_the_environments_units():
    space = gym.spaces.MultiDiscrete([[3, 2], [4, 2]], start=[[1, 0], [7, 0]])
    agent = PPO(OBS, space, PPOConfig(**PLAIN))
    action, _, extras = agent.policy.act(torch.randn(500, 5), explore=True)
    assert action.shape == (500, 2, 2) and extras["decision"].shape == (500, 4)
    assert all(space.contains(one.numpy()) for one in action)
    assert action.flatten(1).amax(0).tolist() == [3, 1, 10, 1]  # padded choices are never taken, existing ones are
    single = PPO(OBS, gym.spaces.Discrete(3, start=5), PPOConfig(**PLAIN)).policy.act(torch.randn(50, 5), explore=True)
    assert single[0].shape == (50,) and set(single[0].tolist()) == {5, 6, 7}


def test_box_actions_are_clipped_for_the_environment_and_not_in_what_is_learned():
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, log_std=1.0))
    action, _, extras = agent.policy.act(torch.randn(2000, 5), explore=True)
    assert (action >= torch.as_tensor(ACT.low)).all() and (action <= torch.as_tensor(ACT.high)).all()
    assert extras["decision"].std() > 2 and extras["decision"].abs().max() > 5
    free = gym.spaces.Box(np.float32([-np.inf, -1]), np.float32([np.inf, 3]))
    agent = PPO(OBS, free, PPOConfig(**PLAIN, log_std=1.0))
    action, _, extras = agent.policy.act(torch.randn(2000, 5), explore=True)
    assert torch.equal(action[:, 0], extras["decision"][:, 0])  # no bounds: the environment's own units
    assert action[:, 1].min() == -1 and action[:, 1].max() == 3


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    agent = PPO(OBS, ACT, PPOConfig(hidden=(16,), gamma=0.5, normalize_obs=False))
    rollout = collect(agent, horizon=4, n=1, ends=0.0)
    rollout.reward[:, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    rollout.truncated[1] = True
    returns = np.array([1.0, 2.5, 4.0, 10.0])  # the sum starts anew with the third row
    scaled = agent._normalized(rollout)
    assert torch.allclose(scaled[:, 0], torch.tensor([1.0, 2.0, 4.0, 8.0]) / returns.std(), atol=1e-6)
    assert rollout.carried["return"].item() == 10.0


def test_a_divergence_beyond_target_kl_ends_the_epochs():
    wild = {**PLAIN, "lr": 0.05, "epochs": 10, "minibatch_size": 48}
    _, free = PPO(OBS, ACT, PPOConfig(**wild)).update(collect(PPO(OBS, ACT, PPOConfig(**wild))))
    _, stopped = PPO(OBS, ACT, PPOConfig(**wild, target_kl=0.01)).update(collect(PPO(OBS, ACT, PPOConfig(**wild))))
    assert free == 10 and 2 <= stopped < 10  # one minibatch an epoch; the first one's divergence is 0


def test_the_adaptive_step_size_follows_the_divergence_and_is_saved():
    agent = PPO(OBS, ACT, PPOConfig(**PLAIN, lr=1e-3, lr_schedule="adaptive", epochs=1, minibatch_size=48))
    agent.update(collect(agent))
    assert agent.lr.item() == pytest.approx(1e-3)  # nothing had moved yet
    batch, _ = agent.prepare(collect(agent))
    agent.step(replace(batch, log_prob=batch.log_prob + 0.01))  # a ratio of 0.99
    assert agent.lr.item() == pytest.approx(1.5e-3)
    batch, _ = agent.prepare(collect(agent))
    noise = torch.randn(batch.log_prob.shape, generator=torch.Generator().manual_seed(0))
    agent.step(replace(batch, log_prob=batch.log_prob + noise))
    assert agent.lr.item() == pytest.approx(1e-3)
    other = PPO(OBS, ACT, PPOConfig(**PLAIN, lr_schedule="adaptive"))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert other.lr.item() == agent.lr.item() and all(lr is other.lr for lr in other.optimizer.lrs)


def test_the_step_size_is_what_adam_uses():
    moves = {}
    for schedule in ("constant", "adaptive"):
        agent = PPO(OBS, ACT, PPOConfig(**PLAIN, lr=1e-3, lr_schedule=schedule, epochs=1, minibatch_size=48), seed=3)
        before = agent.critic.trunk[0].weight.detach().clone()
        batch, _ = agent.prepare(collect(agent))
        agent.step(replace(batch, log_prob=batch.log_prob + 0.01))
        moves[schedule] = (agent.critic.trunk[0].weight.detach() - before).abs().max().item()
    assert moves["adaptive"] == pytest.approx(1.5 * moves["constant"], rel=1e-3)


def test_at_first_the_critic_alone_learns_where_asked():
    """The policy stays to the last bit until then, also where the training was interrupted."""
    c = PPOConfig(hidden=(16,), minibatch_size=24, epochs=2, critic_only=5, lr_schedule="adaptive")
    agent = PPO(OBS, ACT, c, seed=1)
    begun = copy.deepcopy(agent.policy.state_dict())
    critic = copy.deepcopy(agent.critic.trunk.state_dict())
    agent.update(collect(agent))  # 4 updates
    weights = [name for name, _ in agent.policy.named_parameters()]
    assert weights and all(torch.equal(agent.policy.state_dict()[name], begun[name]) for name in weights)
    assert not any(torch.equal(value, critic[name]) for name, value in agent.critic.trunk.state_dict().items())
    other = PPO(OBS, ACT, c, seed=2)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for one in (agent, other):
        one.update(collect(one, seed=5))
    left, right = pack(agent.state_dict())[0], pack(other.state_dict())[0]
    assert all(torch.equal(left[k], right[k]) for k in right)
    assert not any(torch.equal(agent.policy.state_dict()[name], begun[name]) for name in weights)
    with pytest.raises(UsageError, match=r"agent\.advantage must be gae with critic_lr or critic_only"):
        PPOConfig(advantage="rloo", critic_only=1)
    with pytest.raises(UsageError, match=r"agent\.critic_lr"):
        PPOConfig(critic_lr=0.0)


def test_privileged_observations_reach_the_critic_only():
    space = gym.spaces.Dict({"policy": gym.spaces.Box(-1, 1, (3,)), "privileged": gym.spaces.Box(-1, 1, (2,))})
    agent = PPO(space, ACT, PPOConfig(hidden=(16,)))
    assert (agent.policy.encoder.out_features, agent.critic.encoder.out_features) == (3, 5)
    agent.update(collect(agent, obs_space=space))
    obs = {"policy": torch.rand(4, 3), "privileged": torch.rand(4, 2)}
    other = obs | {"privileged": torch.rand(4, 2)}
    assert torch.equal(agent.policy.act(obs)[0], agent.policy.act(other)[0])
    assert not torch.equal(agent.critic(obs), agent.critic(other))


# Probe environments, in the spirit of andyljones.com/posts/rl-debugging.


@pytest.mark.parametrize("recurrent", ["none", "gru"])
def test_captured_minibatches_equal_eager_ones(recurrent):
    c = PPOConfig(
        hidden=(8,), recurrent=recurrent, recurrent_size=8, minibatch_size=12, epochs=2, lr_schedule="adaptive"
    )
    eager, captured = PPO(OBS, ACT, c, seed=1), PPO(OBS, ACT, c, seed=1)
    captured._step = Captured(captured.step, captured._changing, rerun)
    for i in range(2):
        ours, theirs = (agent.update(collect(agent, seed=i))[0] for agent in (captured, eager))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left, right = pack(captured.state_dict())[0], pack(eager.state_dict())[0]
    assert all(torch.equal(left[k], right[k]) for k in right)


def test_images_are_seen_by_one_convolution_that_both_losses_train():
    agent = PPO(MIXED, ACT, PPOConfig(hidden=(16,)))
    shared = {*agent.policy.parameters()} & {*agent.critic.parameters()}
    assert shared and len(agent.optimizer.parameters) == len({*agent.policy.parameters(), *agent.critic.parameters()})
    batch = make_image_batch(MIXED, groups=5, size=4)
    extras = agent.policy.act({k: v[0] for k, v in batch.obs.items()})[2]
    rollout = Rollout(MIXED, horizon=4, num_envs=4, extras=extras)
    rollout.begin({k: v[0] for k, v in batch.obs.items()})
    no = torch.zeros(4, dtype=torch.bool)
    for t in range(4):
        obs = {k: v[t + 1] for k, v in batch.obs.items()}
        action, _, extras = agent.policy.act({k: v[t] for k, v in batch.obs.items()}, explore=True)
        rollout.add(Step(obs, action, batch.reward[t], no, no, obs, ~no), extras)
    assert all(value.dtype == torch.uint8 for value in rollout.obs.values() if value.dim() > 3)
    blind = PPO(MIXED, ACT, PPOConfig(hidden=(16,), critic_obs=("speed",)))  # the policy's own loss trains what it sees
    assert not {*blind.policy.parameters()} & {*blind.critic.parameters()}
    before = {p: p.detach().clone() for p in shared}
    agent.update(rollout)
    assert all(not torch.equal(p, value) for p, value in before.items())


@needs_compiler
def test_compiled_updates_equal_eager_ones():
    more = {"lr_schedule": "adaptive", "critic_only": 3, "critic_lr": 1e-3}
    config = PPOConfig(hidden=(16,), minibatch_size=24, epochs=2, **more)
    eager = PPO(OBS, ACT, config, seed=1)
    compiled = PPO(OBS, ACT, PPOConfig(**(config.to_dict() | {"execution": "compiled"})), seed=1)
    for agent in (eager, compiled):
        agent.update(collect(agent))
    left, right = pack(compiled.state_dict())[0], pack(eager.state_dict())[0]
    assert all(torch.allclose(left[k].double(), right[k].double(), atol=1e-5) for k in right)


def test_unsuitable_action_spaces():
    for space in (gym.spaces.Box(1.0, 1.0, (2,)), gym.spaces.MultiBinary(3), gym.spaces.Box(-1, 1, ())):
        with pytest.raises(
            UsageError, match=r"PPO needs actions of a Box with low < high in every dimension, Discrete"
        ):
            PPO(OBS, space)


def test_what_to_stay_near_to_keeps_its_statistics():
    agent = PPO(OBS, ACT, PPOConfig(kl_coef=0.1, normalize_obs=True, hidden=(8,)), seed=0)
    obs = torch.randn(5, *OBS.shape)
    before = agent.reference.distribution(obs).mode
    agent.normalizer.update(torch.randn(100, *OBS.shape) * 3 + 2, torch.ones(100, dtype=torch.bool))
    assert torch.equal(agent.reference.distribution(obs).mode, before)
    assert not torch.equal(agent.policy.distribution(obs).mode, before)
