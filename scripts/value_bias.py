#!/usr/bin/env python3
"""How far a run's critics are from the returns that its policy really gets: their bias, by Monte-Carlo.

    python scripts/value_bias.py runs/sac-HalfCheetah-v5-0 runs/dsac-t-HalfCheetah-v5-0 --episodes 20

with the interpreter of .venv. Episodes are played with the policy as it explores (TD3: without noise), from the fixed
list of evaluation seeds. The return of a state and action is the discounted sum of rewards from there, and of the
entropy bonus after it where the critics count one (SAC and its kin, with the temperature of the checkpoint). Where an
episode was cut by a time limit, only states count from which at least --reach further steps were seen; what lies beyond
weighs gamma^reach.

Bias is the mean of Q - return over all those states, also as a share of the mean |return|. Q is the mean of the
critics, and besides their minimum, which the policy goes up and the targets are made of.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ctrlrl.algorithms.registry import find_algorithm  # noqa: E402
from ctrlrl.algorithms.sac import SAC  # noqa: E402
from ctrlrl.algorithms.td3 import TD3  # noqa: E402
from ctrlrl.envs.make import make_env  # noqa: E402
from ctrlrl.envs.spaces import build_space  # noqa: E402
from ctrlrl.errors import CtrlrlError, UsageError  # noqa: E402
from ctrlrl.runs.checkpoint import load_checkpoint  # noqa: E402
from ctrlrl.runs.folder import RunFolder  # noqa: E402
from ctrlrl.training.evaluation import evaluation_seeds  # noqa: E402
from ctrlrl.training.setup import read_config, read_provenance  # noqa: E402


@dataclass(frozen=True, slots=True)
class Bias:
    """Of one run, over `states` states."""

    states: int
    true: float
    mean: float
    minimum: float
    deviation: float
    """Standard deviation of Q - return, with the critics' mean."""
    scale: float
    """Mean |return|."""


def load_agent(run: Path) -> tuple[str, Any, Any]:
    """The algorithm's name, the agent of the last checkpoint, and the run's configuration."""
    folder = RunFolder.open(run)
    algo, config = read_config(folder)
    spaces = read_provenance(folder)["environment"]["spaces"]
    settings = config.agent  # type: ignore[attr-defined]
    make = find_algorithm(algo).load_agent_class()
    agent = make(build_space(spaces["observation"]), build_space(spaces["action"]), settings)
    if not isinstance(agent, SAC | TD3):
        raise UsageError(f"{run} is of {algo}, which has no value of continuous actions")
    agent.load_state_dict(load_checkpoint(folder.find_checkpoint("last"))["agent"])
    agent.policy.eval()
    return algo, agent, config


def discounted(reward: Tensor, bonus: Tensor, gamma: float) -> Tensor:
    """Returns (T,) of an episode: G_t = r_t + gamma (bonus_t+1 + G_t+1), nothing after the last step."""
    out, following = torch.empty_like(reward), torch.zeros(())
    for t in reversed(range(len(reward))):
        out[t] = reward[t] + gamma * following
        following = bonus[t] + out[t]
    return out


@torch.no_grad()
def measure(agent: Any, env_id: str, env_kwargs: dict[str, Any], episodes: int, reach: int) -> Bias:
    """Play `episodes` and compare."""
    soft = isinstance(agent, SAC)
    alpha = agent.log_alpha.exp() if soft else torch.zeros(())
    gamma, generator = agent.config.gamma, torch.Generator().manual_seed(0)
    env = make_env(env_id, env_kwargs=env_kwargs)
    outputs = agent.critic_outputs if soft else 1
    true, values = [], []
    for seed in evaluation_seeds(episodes):
        obs, over = env.reset([seed]), False
        rewards, bonuses, q = [], [], []
        terminated = False
        while not over:
            if soft:
                distribution = agent.policy.distribution(obs)
                noise = torch.randn(distribution.mean.shape, generator=generator)
                unit, log_prob, _ = distribution.rsample(noise)
                bonuses.append(-alpha * log_prob.sum())
            else:
                unit = agent.policy.action(obs)
                bonuses.append(torch.zeros(()))
            out = agent.critics(obs, unit)
            q.append(out[..., 0] if outputs > 1 else out)
            step = env.step(agent.policy.scaling.to_environment(unit))
            rewards.append(step.reward[0].clone())
            terminated = bool(step.terminated[0])
            over = terminated or bool(step.truncated[0])
            obs = step.obs
        returns = discounted(torch.stack(rewards), torch.stack(bonuses), gamma)
        counted = len(returns) if terminated else max(0, len(returns) - reach)
        true.append(returns[:counted])
        values.append(torch.cat(q, -1)[:, :counted])
    env.close()
    returns, q = torch.cat(true).numpy(), torch.cat(values, -1).numpy()
    if not len(returns):
        raise UsageError(f"no episode has {reach} steps: lower --reach")
    difference = q.mean(0) - returns
    return Bias(
        len(returns),
        float(returns.mean()),
        float(difference.mean()),
        float((q.min(0) - returns).mean()),
        float(difference.std()),
        float(np.abs(returns).mean()),
    )


def main() -> int:
    """Measure each run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--reach", type=int, default=500, help="0.99^500 is 0.7 %% (default: 500)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | return from a state | bias, mean of critics | of their minimum | deviation | states |")
    print("|---|---|---|---|---|---|")
    try:
        for run in options.runs:
            algo, agent, config = load_agent(run)
            b = measure(agent, config.env, config.env_kwargs, options.episodes, options.reach)
            shares = [f"{value:+.1f} ({value / b.scale:+.1%})" for value in (b.mean, b.minimum)]
            name = f"{algo}, {config.env}, seed {config.seed}"
            print(
                f"| {name} | {b.true:.1f} | {shares[0]} | {shares[1]} | {b.deviation:.1f} | {b.states:,} |", flush=True
            )
    except CtrlrlError as error:
        print(f"value_bias: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
