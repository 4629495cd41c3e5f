"""Conservative Q-learning (Kumar et al. 2020, arXiv:2006.04779), CQL(H), on SAC; and Cal-QL (Nakamoto et al. 2023,
arXiv:2303.05479) by `calibrate`. It learns from a fixed set of data.

Shapes: G gradient steps, B batch, A action dimensions, K critics, N sampled actions. `batch.discount` is
gamma^k * (1 - terminated), made by the sampler. What differs from SAC (`sac.py`) is the critics' loss, for each of them

    1/2 E[ (Q(s, a) - y)^2 ]  +  alpha/2 E[ log sum_u exp Q(s, u) - Q(s, a) ]                    eq. 4

which pushes values down where the data has no actions and up where it has. The sum over all u in [-1, 1]^A is estimated
from 3 N samples over their densities, N from each of the uniform distribution, pi(s) and pi(s') (appendix F):

    log sum_i exp( Q(s, u_i) - log p(u_i) ),    log p = -A log 2, log pi(u_i|s), log pi(u_i|s')

Cal-QL takes max(Q(s, u_i), R) for the policies' samples there, where R is the return that followed in the data. With
`action_gap` tau, alpha is multiplied by a factor that grows while the term is above tau and falls while it is below (a
Lagrange multiplier, appendix F). The target y has no entropy in it, and can be of the best of N next actions.

All K (3 N + 1) values of a state are one evaluation of the ensemble.

Deviations from the papers besides those of `sac.py`:
- alpha is that of the authors' code and of CORL, which have no 1/2 before the squared error; so the whole loss is
  halved, and with alpha = 0 it is SAC's;
- as there, the sum is not divided by the number of samples: the term is larger by log 3 N, which `action_gap` and
  `lowest_gap` have to be seen against;
- the samples of pi(s') serve for `max_target_backup` too;
- the multiplier is stepped after the critics, whose loss has its value from before;
- networks are initialized as SAC's are, not orthogonally as in CORL, and the policy's standard deviation is not scaled;
- no cloning of behaviour at the start, which the authors have in mazes;
- where an episode was cut, R is a lower bound: nothing follows if no reward is negative, and else the lowest reward for
  ever, which in mazes that never came to the goal is what Cal-QL's code has (elsewhere it sums what was seen).
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws
from ctrlrl.algorithms.cql_config import CQLConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.mlp import Members, at_least_float32
from ctrlrl.nn.networks import Critics, Networks
from ctrlrl.nn.optim import Adam, polyak
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs

LARGEST_FACTOR = 1e6
"""Of the Lagrange multiplier (the authors' code)."""


class CQL(SAC):
    """Conservative Q-learning agent: what `SAC` takes, with a `CQLConfig`.

    Attributes:
        log_factor: of the conservative weight, where there is an `action_gap`; 0-d.
    """

    config: CQLConfig
    title = "CQL"
    config_class: type[SACConfig] = CQLConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: SACConfig | None = None,
        **others: Any,
    ) -> None:
        super().__init__(observation_space, action_space, config, **others)
        c = self.config
        self._samples = c.conservative_weight > 0 or c.max_target_backup
        self.log_factor = torch.zeros((), device=self.device)
        self.factor_optimizer = Adam([self.log_factor], c.critic_lr)
        if c.action_gap is not None:
            self._keep(log_factor=self.log_factor, factor_optimizer=self.factor_optimizer)

    def make_trunk(self, networks: Networks, outputs: int) -> nn.Module:
        return networks.trunk(outputs, layer_norm=self.config.policy_layer_norm)

    def draw(self, groups: int, rows: int) -> Draws:
        """What SAC draws; where they are needed, noise of the actions of pi(s) and pi(s') (G, 2, N, B, A) and uniform
        actions (G, N, B, A); and with a `subset` of M the critics of each update's target, (G, M)."""
        c, drawn = self.config, super().draw(groups, rows)
        if self._samples:
            shape = c.sampled_actions, rows, self.policy.scaling.low.numel()
            uniform = torch.rand(groups, *shape, generator=self.generator, device=self.device)
            drawn = *drawn, self.normal(groups, 2, *shape), 2 * uniform - 1
        if c.subset is not None:
            order = torch.rand(groups, c.num_critics, generator=self.generator, device=self.device).argsort(-1)
            drawn = *drawn, order[:, : c.subset]
        return drawn

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(("mc_return",)) if self.config.calibrate else frozenset()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        if self.config.calibrate and batch.mc_return is None:
            raise UsageError(
                "agent.calibrate needs the return that followed each transition (Batch.mc_return), which batches of a "
                "dataset have; for others take --agent.no-calibrate"
            )
        return super().update(batch)

    def step(
        self, batch: Batch, noise: Tensor, shift: Tensor | None = None, *rest: Tensor, improve: bool = True
    ) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with noise (2, B, A), for images a shift (2, B, 2), and the `rest` of
        what `draw` gives for a step."""
        c = self.config
        alpha = self.log_alpha.detach().exp()
        critic_obs, obs, next_obs, target_obs = self.see(batch, shift)
        metrics = {"alpha": alpha}
        policy = self.policy.distribution(obs)

        if improve:
            # Temperature, as in SAC.
            action, log_prob, _ = policy.rsample(noise[0])  # (B, A), (B, 1)
            log_prob = log_prob.sum(-1)  # (B,)
            if c.alpha_lr > 0:
                self.alpha_optimizer.step([-(log_prob.detach().mean() + self.target_entropy)])

        # Critics: the target.
        members = rest[-1] if c.subset is not None else None
        with torch.no_grad():
            next_policy = self.policy.distribution(next_obs)
            if self._samples:
                here, here_log_prob, _ = policy.rsample(rest[0][0])  # (N, B, A), (N, B, 1)
                ahead, ahead_log_prob, _ = next_policy.rsample(rest[0][1])
            if c.max_target_backup:
                next_q, best = self.values(self.target_critics, target_obs, ahead, members).amin(0).max(0)  # (B,)
                next_log_prob = ahead_log_prob.squeeze(-1).gather(0, best[None]).squeeze(0)
            else:
                next_action, next_log_prob, _ = next_policy.rsample(noise[1])
                next_q = self.target_critics(target_obs, next_action, members=members).amin(0)
                next_log_prob = next_log_prob.sum(-1)
            if c.backup_entropy:
                next_q = next_q - alpha * next_log_prob
            target = batch.reward + batch.discount * next_q  # (B,)

        # Critics: the squared error and the conservative term, eq. 4.
        stored = self.policy.scaling.to_unit(batch.action)
        if c.conservative_weight > 0:
            actions = torch.cat([stored[None], rest[1], here, ahead])  # (3 N + 1, B, A)
            all_q = self.values(self.critics, critic_obs, actions)  # (K, 3 N + 1, B)
            q, log_probs = all_q[:, 0], torch.cat([here_log_prob, ahead_log_prob]).squeeze(-1)  # (K, B), (2 N, B)
            gap, more = self.gap(q, all_q[:, 1:], log_probs, batch.mc_return)
            weight = c.conservative_weight * self.log_factor.exp()
            error = (q - target.expand_as(q)).square() + weight * gap
            metrics |= more
        else:
            q = self.value(critic_obs, stored)
            error = (q - target.expand_as(q)).square()
        critic_loss = 0.5 * error.mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)
        metrics |= {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "target_mean": target.mean()}
        if c.action_gap is not None:
            # Up E[factor alpha (gap - tau)], by the logarithm of the factor; dJ by hand.
            self.factor_optimizer.step([-(weight * (gap.detach().mean() - c.action_gap))])
            metrics["conservative_weight"] = weight.clone()
            with torch.no_grad():
                self.log_factor.clamp_(max=math.log(LARGEST_FACTOR))

        if improve:
            # Policy, as in SAC.
            actor_loss = (alpha * log_prob - self.policy_value(obs, action)).mean()
            self.actor_optimizer.descend(actor_loss)
            metrics |= {"actor_loss": actor_loss.detach(), "entropy": -log_prob.detach().mean()}

        polyak(self._target, self._critic, c.tau)
        return metrics

    def gap(
        self, q: Tensor, sampled_q: Tensor, log_prob: Tensor, mc_return: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The conservative term of each critic and transition, (K, B), and metrics of it.

        Args:
            q: of the data's actions, (K, B).
            sampled_q: of the uniform ones and then the policies', (K, 3 N, B).
            log_prob: of the policies', (2 N, B).
            mc_return: what followed in the data, (B,).
        """
        c = self.config
        uniform_q, policy_q = sampled_q[:, : c.sampled_actions], sampled_q[:, c.sampled_actions :]
        metrics = {"q_uniform_mean": uniform_q.detach().mean(), "q_policy_mean": policy_q.detach().mean()}
        if c.calibrate:
            assert mc_return is not None
            metrics["calibrated"] = (policy_q < mc_return).float().mean()
            policy_q = torch.maximum(policy_q, mc_return)
        log_volume = self.policy.scaling.low.numel() * math.log(2)
        gap = torch.cat([uniform_q + log_volume, policy_q - log_prob], 1).logsumexp(1) - q
        metrics["conservative_gap"] = gap.detach().mean()
        return gap if c.lowest_gap is None else gap.clamp(min=c.lowest_gap), metrics

    def values(self, critics: Critics, obs: Obs, actions: Tensor, members: Members = None) -> Tensor:
        """Q of M actions (M, B, A) for each observation (B, ...): (K, M, B), or of `members` alone."""
        features = critics.encoder(obs)
        pairs = torch.cat([features.expand(len(actions), *features.shape), actions], -1)
        out: Tensor = critics.ensemble(pairs.flatten(0, 1), members=members)
        return at_least_float32(out).view(len(out), *actions.shape[:2])
