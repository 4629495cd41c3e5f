"""Choices: what exists, how networks score it, and that nothing else is ever chosen."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlrl.envs.make import make_env
from ctrlrl.errors import UsageError
from ctrlrl.nn.discrete import CandidateChoices, CategoricalPolicy, make_choices, require_discrete
from ctrlrl.nn.encoder import make_encoder
from ctrlrl.nn.mlp import EnsembleMLP, mlp
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.training.collector import Collector

BOX = gym.spaces.Box(-1, 1, (2,))


def bits(*shape: int, dtype=np.int8) -> gym.spaces.Box:
    return gym.spaces.Box(0, 1, shape, dtype)


class MaskedEnv(gym.Env):
    """Of four actions, counted from 3, some exist (another set each step); others are refused. Episodes of 5 steps end
    with an empty mask. With `candidates` the actions have features."""

    def __init__(self, candidates: bool = False, key: str = "action_mask", dtype=np.int8) -> None:
        entries = {"state": BOX, key: bits(4, dtype=dtype)}
        if candidates:
            entries["candidates"] = gym.spaces.Box(-1, 1, (4, 3))
        self.observation_space, self.action_space = gym.spaces.Dict(entries), gym.spaces.Discrete(4, start=3)
        self.key, self.t = key, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        if not self.action_space.contains(action) or not self.mask[action - 3]:
            raise ValueError(f"there is no action {action} among {self.mask}")
        self.t += 1
        return self._obs(), 1.0, self.t == 5, False, {}

    def _obs(self):
        self.mask = (self.np_random.random(4) < 0.4).astype(self.observation_space[self.key].dtype)
        self.mask[self.np_random.integers(4)] = 1
        if self.t == 5:
            self.mask[:] = 0
        return {k: self.mask if k == self.key else s.sample() for k, s in self.observation_space.items()}


def policy_for(observation_space, action_space, mask=None) -> CategoricalPolicy:
    torch.manual_seed(0)
    choices = make_choices(observation_space, action_space, mask)
    encoder = make_encoder(choices.observation_space, None, None)
    policy = CategoricalPolicy(encoder, mlp((encoder.out_features + choices.inputs, 16, choices.outputs)), choices)
    policy.generator = torch.Generator().manual_seed(0)
    return policy


@pytest.mark.parametrize("random", [True, False], ids=["random", "policy"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"candidates": True}, {"key": "candidate_mask", "dtype": np.uint8}, {"dtype": np.float32}],
    ids=["mask", "candidates", "uint8", "float"],
)
def test_only_actions_that_exist_are_taken_and_stored_with_their_masks(settings, random):
    env = make_env(lambda: MaskedEnv(**settings), num_envs=3)
    policy = policy_for(env.observation_space, env.action_space)
    collector = Collector(env, policy, env.reset(0), seed=0)
    extras = policy.act(collector.obs)[2]
    buffer = ReplayBuffer(env.observation_space, env.action_space, capacity=500, num_envs=3, extras=extras)
    buffer.begin(collector.obs)
    for _ in range(100):
        step, extras, _ = collector.step(random=random)  # the environment refuses any other
        buffer.add(step, extras)
    batch = buffer.sample(1, 400, gamma=0.9)[0]
    key = settings.get("key", "action_mask")
    choice = policy.choices.to_choice(batch.action)
    assert choice.dtype == torch.int64 and batch.action.min() == 3 and batch.action.max() == 6
    assert batch.obs[key].gather(1, choice).all()
    ended = batch.discount == 0
    assert ended.any() and not batch.next_obs[key][ended].any() and batch.next_obs[key][~ended].any(-1).all()
    if not random:
        assert torch.allclose(batch.extras["entropy"], policy.distribution(batch.obs).entropy()[:, 0], atol=1e-6)
    env.close()


def test_the_mode_is_a_choice_that_exists():
    policy = policy_for(MaskedEnv().observation_space, gym.spaces.Discrete(4))
    state = torch.rand(64, 2)
    mask = torch.rand(64, 4) < 0.3
    mask[:, 2] = True
    action, state_after, extras = policy.act({"state": state, "action_mask": mask.to(torch.int8)})
    assert mask.gather(1, action[:, None]).all() and state_after == {}
    everything = policy.distribution({"state": state, "action_mask": torch.ones(64, 4)})
    logits = everything.logits[:, 0].masked_fill(~mask, -torch.inf)
    assert torch.equal(action, logits.argmax(-1))
    assert (extras["entropy"][mask.sum(1) == 1] == 0).all()


def test_an_observation_without_actions_is_refused_and_named():
    policy = policy_for(MaskedEnv().observation_space, gym.spaces.Discrete(4))
    mask = torch.ones(5, 4, dtype=torch.int8)
    mask[3] = 0
    with pytest.raises(UsageError, match="'action_mask' of environment 3 allows no action"):
        policy.act({"state": torch.zeros(5, 2), "action_mask": mask})
    assert policy.distribution({"state": torch.zeros(5, 2), "action_mask": mask}).entropy().isfinite().all()


def test_masks_and_candidates_are_no_features():
    choices = make_choices(MaskedEnv(candidates=True).observation_space, gym.spaces.Discrete(4))
    assert list(choices.observation_space) == ["state"] and isinstance(choices, CandidateChoices)
    assert (choices.inputs, choices.outputs, choices.shape) == (3, 1, (1, 4))
    fixed = make_choices(BOX, gym.spaces.Discrete(4))
    assert fixed.observation_space is BOX and (fixed.inputs, fixed.outputs) == (0, 4)
    policy = policy_for(MaskedEnv().observation_space, gym.spaces.Discrete(4))
    obs = {"state": torch.rand(6, 2), "action_mask": torch.ones(6, 4)}
    logits = policy.distribution(obs).logits
    obs["action_mask"][:, 1] = 0
    masked = policy.distribution(obs).logits
    assert torch.equal(masked[..., [0, 2, 3]], logits[..., [0, 2, 3]]) and masked[..., 1].isneginf().all()


def test_candidates_are_scored_one_by_one_whatever_their_order():
    space = MaskedEnv(candidates=True).observation_space
    policy = policy_for(space, gym.spaces.Discrete(4))
    obs = {"state": torch.rand(5, 2), "candidates": torch.rand(5, 4, 3), "action_mask": torch.ones(5, 4)}
    logits = policy.distribution(obs).logits
    for i in range(5):
        for j in range(4):
            alone = policy.trunk(torch.cat([obs["state"][i], obs["candidates"][i, j]])[None])
            assert torch.allclose(logits[i, 0, j], alone[0, 0], atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    permuted = policy.distribution(obs | {"candidates": obs["candidates"][:, order]}).logits
    assert torch.allclose(permuted, logits[..., order], atol=1e-6)

    critics = EnsembleMLP(3, (2 + 3, 8, 1))
    q = policy.choices.score(critics, obs["state"], obs)
    assert q.shape == (3, 5, 4)
    alone = critics(torch.cat([obs["state"], obs["candidates"][:, 2]], -1))[..., 0]
    assert torch.allclose(q[..., 2], alone, atol=1e-6)


def test_multi_discrete_actions_are_padded_to_the_largest():
    space = gym.spaces.MultiDiscrete([2, 4, 3], start=[5, 0, -1])
    policy = policy_for(BOX, space)
    assert policy.choices.shape == (3, 4) and policy.choices.outputs == 12
    obs = torch.rand(200, 2)
    exists = policy.distribution(obs).probs > 0
    assert torch.equal(exists, torch.arange(4).expand(200, 3, 4) < torch.tensor([2, 4, 3])[:, None])
    assert torch.equal(policy.mask(obs), exists)
    action, _, extras = policy.act(obs, explore=True)
    assert all(space.contains(a.numpy()) for a in action)
    choice = policy.choices.to_choice(action)
    assert choice.min() == 0 and choice.amax(0).tolist() == [1, 3, 2]
    assert torch.equal(policy.choices.to_environment(choice), action)
    assert torch.allclose(extras["entropy"], policy.distribution(obs).entropy().sum(-1))

    masked = policy_for(gym.spaces.Dict({"x": BOX, "action_mask": bits(3, 4)}), space)
    mask = torch.zeros(1, 3, 4)
    mask[0, [0, 1, 2], [1, 3, 0]] = 1
    assert masked.act({"x": torch.zeros(1, 2), "action_mask": mask}, explore=True)[0].tolist() == [[6, 3, -1]]
    assert policy_for(BOX, gym.spaces.MultiDiscrete([3, 3])).mask(obs) is None


def test_discrete_actions_count_from_their_start():
    policy = policy_for(BOX, gym.spaces.Discrete(3, start=-1))
    action = policy.act(torch.rand(100, 2), explore=True)[0]
    assert action.shape == (100,) and set(action.tolist()) == {-1, 0, 1}
    assert torch.equal(policy.choices.to_environment(policy.choices.to_choice(action)), action)


def test_exploring_needs_a_generator():
    policy = policy_for(BOX, gym.spaces.Discrete(3))
    policy.generator = None
    with pytest.raises(UsageError, match=r"set policy\.generator"):
        policy.act(torch.rand(1, 2), explore=True)


def test_a_network_under_autocast_gives_float32():
    choices = make_choices(BOX, gym.spaces.Discrete(3))
    with torch.autocast("cpu", torch.bfloat16):
        score: Tensor = choices.score(nn.Linear(2, 3), torch.rand(4, 2), torch.rand(4, 2))
    assert score.dtype == torch.float32


FOUR = gym.spaces.Discrete(4)


@pytest.mark.parametrize(
    ("observation", "action", "mask", "message"),
    [
        ({"x": BOX, "mask": bits(4)}, FOUR, "masks", "no mask 'masks' in the observation; Did you mean mask"),
        (BOX, FOUR, "mask", "no mask 'mask' in the observation; it is one Box"),
        ({"x": BOX, "action_mask": bits(3)}, FOUR, None, r"as a mask of Discrete\(4\) it must be \(4,\)"),
        ({"x": BOX, "action_mask": bits(8)}, gym.spaces.MultiDiscrete([4, 4]), None, r"it must be \(2, 4\)"),
        ({"x": BOX, "candidates": gym.spaces.Box(0, 1, (3, 5))}, FOUR, None, r"must be \(4, features\)"),
        ({"x": BOX, "candidates": gym.spaces.Box(0, 1, (4,))}, FOUR, None, r"must be \(4, features\)"),
        ({"action_mask": bits(4)}, FOUR, None, "nothing but actions"),
    ],
)
def test_unsuitable_masks_and_candidates(observation, action, mask, message):
    space = gym.spaces.Dict(observation) if isinstance(observation, dict) else observation
    with pytest.raises(UsageError, match=message):
        make_choices(space, action, mask)


def test_unsuitable_action_spaces():
    assert require_discrete(FOUR, "X") is FOUR
    for space, message in (
        (gym.spaces.Box(-1, 1, (2,)), "X needs Discrete actions.* there are sac and td3"),
        (gym.spaces.MultiDiscrete([2, 3]), "X needs Discrete actions.* there is ppo"),
        (gym.spaces.MultiBinary(3), r"X needs Discrete actions; the environment has MultiBinary\(3\)"),
    ):
        with pytest.raises(UsageError, match=message):
            require_discrete(space, "X")
