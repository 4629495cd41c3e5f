"""scripts/value_bias.py: returns by hand, and what it says of critics whose bias is known."""

from __future__ import annotations

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import ctrlrl
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.algorithms.td3 import TD3
from ctrlrl.algorithms.td3_config import TD3Config
from tests.runs import SMALL
from tests.scripts import SCRIPTS, loaded

SCRIPT = SCRIPTS / "value_bias.py"


@pytest.fixture(scope="module")
def script():
    with loaded("value_bias") as module:
        yield module


def test_returns_count_the_bonus_of_later_actions_only(script):
    reward, bonus = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([100.0, 8.0, 16.0])
    # 4; 2 + .5 * (16 + 4) = 12; 1 + .5 * (8 + 12) = 11
    assert script.discounted(reward, bonus, 0.5).tolist() == [11.0, 12.0, 4.0]


class One(gym.Env):
    """Reward 1 for eight steps; then the task ends, or a time limit comes."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, cut: bool = False) -> None:
        self.cut = cut

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 8
        return np.zeros(1, np.float32), 1.0, over and not self.cut, over and self.cut, {}


gym.register("ctrlrl-test/One-v0", One)


def constant(agent, *values: float) -> None:
    """Make the critics say `values`, whatever they are asked."""
    last = agent.critics.ensemble.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(values).view(-1, 1, 1))


def test_a_known_bias_is_found(script):
    agent = TD3(One.observation_space, One.action_space, TD3Config(hidden=(8,), gamma=0.5))
    constant(agent, 3.0, 5.0)
    true = np.array([2 - 0.5**k for k in range(7, -1, -1)])  # 1.99, ..., 1.5, 1
    bias = script.measure(agent, "ctrlrl-test/One-v0", {}, episodes=2, reach=5)
    assert (bias.states, bias.true) == (16, pytest.approx(true.mean(), rel=1e-6))
    assert bias.mean == pytest.approx(4 - true.mean(), rel=1e-6)
    assert bias.minimum == pytest.approx(3 - true.mean(), rel=1e-6)
    assert bias.deviation == pytest.approx(true.std(), rel=1e-4)
    cut = script.measure(agent, "ctrlrl-test/One-v0", {"cut": True}, episodes=1, reach=5)
    assert (cut.states, cut.true) == (3, pytest.approx(true[:3].mean(), rel=1e-6))


def test_the_entropy_bonus_is_part_of_a_soft_value(script):
    agent = SAC(One.observation_space, One.action_space, SACConfig(hidden=(8,), gamma=0.5, initial_alpha=2.0))
    constant(agent, 0.0, 0.0)
    nn.init.zeros_(agent.policy.trunk[-1].weight)
    with torch.no_grad():
        agent.policy.trunk[-1].bias.copy_(torch.tensor([0.0, -8.0]))  # an entropy of about -6.6
    bias = script.measure(agent, "ctrlrl-test/One-v0", {}, episodes=50, reach=5)
    entropy = 0.5 * np.log(2 * np.pi * np.e) - 8  # tanh does nothing this near to zero
    true = [1.0]
    for _ in range(7):
        true.append(1 + 0.5 * (2 * entropy + true[-1]))
    assert bias.true == pytest.approx(np.mean(true), abs=0.2)


def test_of_runs_from_the_command_line(tmp_path):
    for algo in ("dsac-t", "ppo"):
        agent = SMALL["agent"] if algo == "dsac-t" else {"hidden": [8]}
        off = {"learning_starts": 60} if algo == "dsac-t" else {}
        how = {k: v for k, v in SMALL.items() if k != "learning_starts"} | off | {"agent": agent, "steps": 100}
        ctrlrl.train(algo, "Pendulum-v1", out=str(tmp_path / algo), **how)
    here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *words]
        return subprocess.run(command, capture_output=True, text=True, env=here)

    done = run(str(tmp_path / "dsac-t"), "--episodes", "2", "--reach", "150")
    assert done.returncode == 0, done.stderr
    assert "| dsac-t, Pendulum-v1, seed 0 | -" in done.stdout and done.stdout.endswith("| 100 |\n")
    done = run(str(tmp_path / "ppo"))
    assert done.returncode == 2 and "is of ppo, which has no value of continuous actions" in done.stderr
    done = run(str(tmp_path / "dsac-t"), "--episodes", "1")
    assert done.returncode == 2 and "no episode has 500 steps: lower --reach" in done.stderr
