"""Policies that are symmetric: mirrored observations lead to mirrored actions, exactly."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.worker import describe_action_space, describe_observation_space
from ctrlrl.errors import UsageError
from ctrlrl.mirror import ReflectedBox, Reflection
from tests.simulations import cart_mirror, make_cart

OBSERVATION = Reflection((1, 0, 2, 3), (1.0, 1.0, -1.0, 1.0))
ACTION = Reflection((1, 0, 2), (-1.0, -1.0, -1.0))


def boxes() -> tuple[ReflectedBox, ReflectedBox]:
    return (
        ReflectedBox(-np.inf, np.inf, (4,), np.float32, OBSERVATION),
        ReflectedBox(-1.0, 1.0, (3,), np.float32, ACTION),
    )


def reflect(value: torch.Tensor, reflection: Reflection) -> torch.Tensor:
    order, sign = reflection.tensors()
    return value[:, order] * sign


@pytest.mark.parametrize("agent", [PPO, SAC, TD3])
def test_mirrored_observations_lead_to_mirrored_actions(agent: type) -> None:
    made = agent(*boxes(), seed=1)
    obs = torch.randn(50, 4)
    if made.normalizer is not None:  # statistics of one side only do not break the symmetry
        made.normalizer.update(obs + torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.ones(50, dtype=torch.bool))
    with torch.no_grad():
        for parameter in made.policy.parameters():  # PPO's last layer starts small
            parameter.add_(torch.randn_like(parameter) * 0.3)
    action = made.policy.act(obs)[0]
    other = made.policy.act(reflect(obs, OBSERVATION))[0]
    torch.testing.assert_close(other, reflect(action, ACTION), atol=1e-5, rtol=1e-5)
    assert action.std() > 0.05 and not torch.allclose(other, action, atol=1e-2)


def test_deviations_change_places_only() -> None:
    """SAC's network gives a mean and a deviation for each entry of the action."""
    made = SAC(*boxes(), seed=1)
    obs = torch.randn(20, 4)
    one, other = made.policy.distribution(obs), made.policy.distribution(reflect(obs, OBSERVATION))
    order, sign = ACTION.tensors()
    torch.testing.assert_close(other.mean, one.mean[:, order] * sign, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other.log_std, one.log_std[:, order], atol=1e-6, rtol=1e-5)


def test_both_sides_explore_alike() -> None:
    """PPO's deviations are parameters of their own."""
    made = PPO(*boxes(), seed=1)
    with torch.no_grad():
        made.policy.head.log_std.copy_(torch.tensor([0.1, 0.5, 0.2]))
    deviation = made.policy.distribution(torch.randn(5, 4)).log_std
    torch.testing.assert_close(deviation.broadcast_to(5, 3)[0], torch.tensor([0.3, 0.3, 0.2]))


def test_is_the_average_of_both_sides() -> None:
    """Against the same weights without symmetry."""
    observation, action = boxes()
    plain = PPO(
        gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Box(-1, 1, (3,)), PPOConfig(normalize_obs=False), seed=3
    )
    made = PPO(observation, action, PPOConfig(normalize_obs=False), seed=3)
    made.policy.trunk.trunk.load_state_dict(plain.policy.trunk.state_dict())
    obs = torch.randn(10, 4)
    sides = plain.policy.distribution(obs).mean, plain.policy.distribution(reflect(obs, OBSERVATION)).mean
    torch.testing.assert_close(made.policy.distribution(obs).mean, (sides[0] + reflect(sides[1], ACTION)) / 2)


def test_spaces_are_described_and_built_again() -> None:
    observation, action = boxes()
    spaces = gym.spaces.Dict({"policy": observation, "privileged": gym.spaces.Box(-1, 1, (2,))})
    again = build_space(json.loads(json.dumps(describe_observation_space(spaces, "it"))))
    assert again == spaces and again["policy"].reflection == OBSERVATION
    assert build_space(json.loads(json.dumps(describe_action_space(action, "it")))) == action
    assert action != gym.spaces.Box(-1.0, 1.0, (3,), np.float32)


def test_refused() -> None:
    observation, action = boxes()
    with pytest.raises(UsageError, match="does not say how the observation 'obs' is mirrored"):
        PPO(gym.spaces.Box(-1, 1, (4,)), action)
    with pytest.raises(UsageError, match=r"recurrent does not go with .*symmetric"):
        PPO(observation, action, PPOConfig(recurrent="gru"))


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_run_keeps_it(algo: str, tmp_path) -> None:
    """Trained, saved, loaded; the critics read the privileged group, the policy does not."""
    rest = {"learning_starts": 64, "agent": {"batch_size": 16}} if algo == "sac" else {"rollout_steps": 64}
    run = ctrlrl.train(
        algo,
        env=make_cart(4, mirror=cart_mirror()),
        num_envs=4,
        steps=256,
        eval_every=0,
        video=False,
        out=str(tmp_path / "run"),
        quiet=True,
        **rest,
    )
    policy = ctrlrl.load(run.path, checkpoint="last").policy
    obs = {"policy": torch.randn(30, 5)}
    mirrored = {"policy": -obs["policy"]}
    torch.testing.assert_close(policy.act(mirrored)[0], -policy.act(obs)[0], atol=1e-5, rtol=1e-5)
    assert policy.act(obs)[0].std() > 0
    inputs = 8  # policy 5, privileged 3
    agent = find_algorithm(algo).load_agent_class()(make_cart(1).observation_space, make_cart(1).action_space)
    critic = agent.critic if algo == "ppo" else agent.critics
    assert critic.encoder.out_features == inputs and agent.policy.encoder.out_features == 5
