#!/usr/bin/env python3
"""What the scripted experts reach: one episode in each of N environments, for several amounts of noise.

    python scripts/experts.py PandaLift-v0 --noise 0 0.5 1
    python scripts/experts.py PandaLift-v0 --noise 0.5 --episodes 50 --out data/lift     # demonstrations
    python scripts/experts.py PandaLift-v0 --correct runs/base --limit 0 0.2 0.5         # what a residual could reach

with the interpreter of .venv. The table has the share of successes, and mean and least return. With --out the episodes,
as many for each amount of noise, become a dataset, whose scores are relative to random actions and to no noise.

With --correct another policy acts, and the expert corrects each entry of its action by no more than a limit: a residual
with that `--agent.residual-scale` can do as well, but whether it can do better nobody knows. With --at only one action
of each episode is corrected, and the table says how returns change: what a residual can notice when it begins to learn.

    python scripts/experts.py PandaLift-v0 --correct runs/base --limit 0.3 --at 10 20 30
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np
import torch

from ctrlrl.data.store import Column, DatasetWriter
from ctrlrl.envs.make import make_env
from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.tasks.panda_expert import expert
from ctrlrl.envs.tasks.swing_up_expert import SwingUpExpert
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import CtrlrlError, UsageError
from ctrlrl.nn.policy import Policy, require_bounded_box
from ctrlrl.nn.residual import Base
from ctrlrl.training.base_policy import open_base
from ctrlrl.training.collect import RandomPolicy, played
from ctrlrl.training.evaluation import evaluate, evaluation_seeds

LIMITS = [0.0, 0.1, 0.2, 0.3, 0.5, 1.0]
"""Of corrections, in [-1, 1]."""


class Scripted(Policy):
    """The expert of an environment, with uniform noise of half width `noise` on its actions in [-1, 1].

    Raises:
        UsageError: there is none for it.
    """

    def __init__(self, env: VectorEnv, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self._noise, self._generator = 0.0, torch.Generator().manual_seed(seed)
        self._expert: Callable[[torch.Tensor], torch.Tensor]
        if isinstance(env, SimVector) and "SwingUp-" in env.name:
            self._expert, self._noise = SwingUpExpert(env.task), noise
        else:
            self._expert = expert(env, noise=noise, seed=seed)

    def act(self, obs: Any, state: Any = None, *, explore: bool = False) -> Any:
        action = self._expert(obs["policy"] if isinstance(obs, dict) else obs)
        drawn = 2 * torch.rand(action.shape, generator=self._generator) - 1
        return (action + self._noise * drawn).clamp(-1, 1), {}, {}


class Corrected(Scripted):
    """The policy of `run`, each entry of whose action in [-1, 1] the expert corrects by at most `limit`, in the step
    `at` alone (from 0) of episodes that begin together, or in all.

    Raises:
        UsageError: there is no expert, or the policy does not suit the environment.
    """

    def __init__(self, env: VectorEnv, run: str, limit: float, at: int | None = None) -> None:
        super().__init__(env)
        self._at, self._step = at, -1
        task = env.task if isinstance(env, SimVector) else None
        policy = open_base(run, env.observation_space, env.action_space, task, env.control_dt)
        self._base, self._limit = Base(policy, require_bounded_box(env.action_space, "a correction")), limit
        self.initial_state, self.reset = policy.initial_state, policy.reset  # type: ignore[method-assign]

    def act(self, obs: Any, state: Any = None, *, explore: bool = False) -> Any:
        self._step += 1
        action, state = self._base.act(obs, state)
        if self._at not in (None, self._step):
            return action, state, {}
        wanted, _, extras = super().act(obs)
        return action + (wanted - action).clamp(-self._limit, self._limit), state, extras


def record(env_id: str, options: dict[str, Any], episodes: int, noises: list[float], seed: int, out: Path) -> str:
    """Write a dataset; returns a line that says what is in it."""
    env = make_env(env_id, num_envs=min(episodes, 50), env_kwargs=options)
    seeds = evaluation_seeds(20)
    reference = {
        "random": evaluate(env, RandomPolicy(env, seed), seeds).mean,
        "expert": evaluate(env, Scripted(env), seeds).mean,
    }
    writer = DatasetWriter.create(
        out,
        observation_space=env.observation_space,
        action_space=env.action_space,
        env=env_id,
        control_dt=env.control_dt,
        columns={"success": Column(dtype="bool")},
        reference=reference,
        provenance={"policy": "scripted expert", "noise": noises, "seed": seed, "env_kwargs": options},
    )
    with writer:
        for number, noise in enumerate(noises):
            policy = Scripted(env, noise, seed)
            for episode in itertools.islice(played(env, policy, seed=seed + number, explore=False), episodes):
                writer.add(episode)
    return f"{out}: {writer.num_transitions:,} transitions"


def play(
    env_id: str, options: dict[str, Any], episodes: int, amount: float, make: Callable[[VectorEnv], Policy]
) -> str:
    """A line of the table."""
    env = make_env(env_id, num_envs=episodes, env_kwargs=options)
    result = evaluate(env, make(env), evaluation_seeds(episodes))
    success = np.mean(result.success)
    return f"| {env_id} | {amount:g} | {success:.0%} | {result.mean:.1f} | {min(result.returns):.1f} |"


def changes(
    env_id: str, options: dict[str, Any], episodes: int, run: str, limits: list[float], steps: list[int]
) -> None:
    """Print how returns change with a single correction, of the same episodes each."""
    env, seeds = make_env(env_id, num_envs=episodes, env_kwargs=options), evaluation_seeds(episodes)

    def returns(limit: float, at: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array(evaluate(env, Corrected(env, run, limit, at), seeds).returns)

    result = evaluate(env, Corrected(env, run, 0.0), seeds)
    before, lengths = np.array(result.returns), np.array(result.lengths)
    print(f"| environment | limit | step | reached by | change of the return of {before.mean():.2f} | standard error |")
    print("|---|---|---|---|---|---|")
    for limit, step in itertools.product(limits, steps):
        change = returns(limit, step) - before
        error = change.std(ddof=1) / math.sqrt(episodes)
        reached = np.mean(lengths > step)
        print(f"| {env_id} | {limit:g} | {step} | {reached:.0%} | {change.mean():+.3f} | {error:.3f} |", flush=True)


def main() -> int:
    """Play and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="PandaReach-v0, PandaLift-v0, CartPoleSwingUp-v0 or PendulumSwingUp-v0")
    parser.add_argument("--noise", type=float, nargs="+", help="half widths, of actions in [-1, 1]; by default 0")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--env-kwargs", type=json.loads, default={}, help='{"reward": "sparse"}')
    parser.add_argument("--out", type=Path, help="a new folder, for a dataset of the episodes")
    parser.add_argument("--correct", metavar="RUN", help="of another policy: a run, a bundle or an ONNX file")
    parser.add_argument("--limit", type=float, nargs="+", help="of corrections; by default several from 0 to 1")
    parser.add_argument(
        "--at", type=int, nargs="+", metavar="STEP", help="correct one action of each episode alone, counted from 0"
    )
    options = parser.parse_args()
    if options.correct is None and options.at is not None:
        parser.error("--at says which action is corrected, and nothing is: give --correct RUN, or leave out --at")
    if options.at is not None and options.episodes < 2:
        parser.error("--at compares episodes: give --episodes 2 or more")
    if options.at is not None and min(options.at) < 0:
        parser.error("--at counts actions from 0")
    if options.correct is not None and options.noise is not None:
        parser.error("--correct RUN acts by the run's policy, without noise: leave out --noise")
    if options.correct is None and options.limit is not None:
        parser.error("--limit is of corrections, and nothing is corrected: give --correct RUN, or leave out --limit")
    noises, limits = options.noise or [0.0], options.limit or LIMITS
    try:
        if options.correct is not None and options.out is not None:
            raise UsageError("--correct prints a table; leave out --out")
        if options.out is not None:
            given = options.env, options.env_kwargs, options.episodes, noises, options.seed
            print(record(*given, options.out))
            return 0
        corrects, given = options.correct, (options.env, options.env_kwargs, options.episodes)
        if options.at is not None:
            changes(*given, corrects, limits, options.at)
            return 0
        print(f"| environment | {'limit' if corrects else 'noise'} | success | mean return | least |")
        print("|---|---|---|---|---|")
        for amount in limits if corrects else noises:
            make = (
                partial(Corrected, run=corrects, limit=amount)
                if corrects
                else partial(Scripted, noise=amount, seed=options.seed)
            )
            print(play(*given, amount, make), flush=True)
    except CtrlrlError as error:
        print(f"experts: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
