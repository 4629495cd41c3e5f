#!/usr/bin/env python3
"""REDQ's update with its critics stacked, against a loop over as many networks, side by side in one process.

    python scripts/bench_ensemble.py                       # 10 critics, batch 256, networks 2x256, HalfCheetah's sizes
    python scripts/bench_ensemble.py --critics 2 5 10 --threads 1

with the interpreter of .venv. The loop is plain PyTorch, as REDQ's authors and others write it: a list of networks,
each with an optimizer of its own, called one after the other; the same losses, the same random subset, the same number
of updates of the policy. Both sides take turns on the same batches; a ratio is the median over the rounds of the ratios
within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ctrlrl.algorithms.redq import REDQ  # noqa: E402
from ctrlrl.algorithms.redq_config import REDQConfig  # noqa: E402
from ctrlrl.nn.cpu import prepare_cpu  # noqa: E402
from ctrlrl.nn.execution import multiplies_bfloat16, unavailable  # noqa: E402
from ctrlrl.replay.batch import Batch  # noqa: E402

OBS, ACT, BATCH = 17, 6, 256


class Loop:
    """REDQ's update over lists of networks; in [-1, 1]^A throughout."""

    def __init__(self, config: REDQConfig) -> None:
        def network(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)
            )

        self.c, self.count = config, 0
        self.policy = network(OBS, 2 * ACT)
        self.critics = [network(OBS + ACT, 1) for _ in range(config.num_critics)]
        self.targets = [network(OBS + ACT, 1) for _ in range(config.num_critics)]
        for target, critic in zip(self.targets, self.critics, strict=True):
            target.load_state_dict(critic.state_dict())
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.policy_adam = torch.optim.Adam(self.policy.parameters(), config.actor_lr)
        self.critic_adams = [torch.optim.Adam(critic.parameters(), config.critic_lr) for critic in self.critics]
        self.alpha_adam = torch.optim.Adam([self.log_alpha], config.alpha_lr)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) and their log-densities (B, 1)."""
        mean, log_std = self.policy(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        raw = normal.rsample()
        squash = 2 * (np.log(2) - raw - nn.functional.softplus(-2 * raw))
        return torch.tanh(raw), (normal.log_prob(raw) - squash).sum(-1, keepdim=True)

    def update(self, batch: Batch) -> None:
        """One gradient step on `batch` [B, ...]."""
        self.count += 1
        obs, next_obs = batch.obs, batch.next_obs
        assert isinstance(obs, Tensor) and isinstance(next_obs, Tensor)
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            action, log_prob = self.sample(next_obs)
            subset = np.random.choice(len(self.targets), self.c.subset, replace=False)
            inputs = torch.cat([next_obs, action], -1)
            next_q = torch.cat([self.targets[i](inputs) for i in subset], -1).min(-1, keepdim=True).values
            target = batch.reward[:, None] + batch.discount[:, None] * (next_q - alpha * log_prob)
        inputs = torch.cat([obs, batch.action], -1)
        loss = sum(nn.functional.mse_loss(critic(inputs), target) for critic in self.critics)
        assert isinstance(loss, Tensor)
        for adam in self.critic_adams:
            adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.count % self.c.policy_delay == 0:
            action, log_prob = self.sample(obs)
            inputs = torch.cat([obs, action], -1)
            q = torch.cat([critic(inputs) for critic in self.critics], -1).mean(-1, keepdim=True)
            self.policy_adam.zero_grad()
            (alpha * log_prob - q).mean().backward(inputs=list(self.policy.parameters()))
            self.alpha_adam.zero_grad()
            (-self.log_alpha * (log_prob.detach() - ACT).mean()).backward()
            self.policy_adam.step()
            self.alpha_adam.step()
        for adam in self.critic_adams:
            adam.step()
        with torch.no_grad():
            for network, moving in zip(self.critics, self.targets, strict=True):
                for source, average in zip(network.parameters(), moving.parameters(), strict=True):
                    average.mul_(1 - self.c.tau).add_(source, alpha=self.c.tau)


def batches(groups: int) -> Batch:
    """Random transitions [G, B, ...]."""
    g, shape = torch.Generator().manual_seed(0), (groups, BATCH)
    flag = torch.zeros(shape, dtype=torch.bool)
    return Batch(
        torch.randn(*shape, OBS, generator=g),
        torch.rand(*shape, ACT, generator=g) * 2 - 1,
        torch.randn(shape, generator=g),
        torch.full(shape, 0.99),
        torch.randn(*shape, OBS, generator=g),
        flag,
        flag.long(),
        {},
        {},
    )


def main() -> None:
    """Time both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--critics", type=int, nargs="+", default=[10])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = ["eager/float32"]
    if unavailable("compiled", torch.device("cpu")) is None:
        ways += ["compiled/float32", *(["compiled/bfloat16"] if multiplies_bfloat16() else [])]
    box = gym.spaces.Box(-1.0, 1.0, (ACT,))
    data = batches(20)  # the policy is improved once in them
    print(f"REDQ, batch {BATCH}, networks 2x256, {options.threads} thread(s), updates per second\n")
    print(f"| critics | loop over networks | {' | '.join(ways)} |")
    print(f"|---|---|{'---|' * len(ways)}")
    for critics in options.critics:
        config = REDQConfig(num_critics=critics, subset=min(2, critics))
        loop = Loop(config)
        sides: dict[str, Callable[[], Any]] = {"loop": lambda loop=loop: [loop.update(data[g]) for g in range(20)]}  # type: ignore[misc]
        for way in ways:
            execution, precision = way.split("/")
            own = REDQConfig(**(config.to_dict() | {"execution": execution, "precision": precision}))
            agent = REDQ(gym.spaces.Box(-np.inf, np.inf, (OBS,)), box, own)
            sides[way] = lambda agent=agent: agent.update(data)  # type: ignore[misc]
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(options.rounds + 2):  # the first two warm up
            for name, run in sides.items():
                # the loop as a user of PyTorch finds it; ours as a training sets the process up
                if name == "loop":
                    torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
                else:
                    prepare_cpu(options.threads)
                begun = time.perf_counter()
                run()
                if i > 1:
                    rates[name].append(20 / (time.perf_counter() - begun))
        cells = [f"{statistics.median(rates['loop']):.0f}"]
        for way in ways:
            ratio = statistics.median(a / b for a, b in zip(rates[way], rates["loop"], strict=True))
            cells.append(f"{statistics.median(rates[way]):.0f} ({ratio:.2f}x)")
        print(f"| {critics} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
