"""Distributional soft actor-critic (Duan et al. 2021, arXiv:2001.02811), on SAC.

Shapes: G gradient steps, B batch, A action dimensions, K critics (1). `batch.discount` is gamma^k * (1 - terminated),
made by the sampler: a time limit still bootstraps.

A critic gives the return's distribution, a Gaussian of mean Q(s,a) and standard deviation sigma(s,a), the softplus of
the network's second output. What differs from SAC (`sac.py`):
- the target is a sample of the return, y = r + gamma (Z(s',a') - alpha log pi(a'|s')), where Z = Q' + z sigma' of the
  target critic, z is standard normal clipped to [-3, 3], and a' is the *target policy's*;
- the loss is the negative log-likelihood of y, whose two gradients take two targets, with [x] for x without gradient:
  (Q - y)^2 / 2[sigma]^2 moves the mean, ([Q] - y_b)^2 / 2 sigma^2 + log sigma moves the deviation, where
  y_b = Q + clip(y - Q, -b, b) keeps the gradient of the latter from exploding;
- policy, temperature and all targets move once in `policy_delay` updates of the critic.

Deviations from the paper:
- b is three times the batch's mean of sigma, as in the authors' later code, instead of a constant of the task (10);
- sigma is a softplus without a lower bound, as there, instead of an exponential with one;
- hidden layers have ReLU instead of GELU, and the policy's mean and deviation come from one network;
- step sizes are constant, as in the authors' code, and three times theirs (1e-4); the temperature starts at 1, not e:
  both as SAC has them, since with the authors' HalfCheetah stands still for 50,000 steps (docs/benchmarks.md);
- one update per environment step as in SAC; the authors' scripts collect 20 steps per update;
- the policy's and the temperature's losses are SAC's, with its deviations; the policy's follows the critics' step, as
  in the paper, where the authors' code takes all gradients before any step.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws
from ctrlrl.algorithms.dsac_config import DSACConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.nn.optim import polyak
from ctrlrl.nn.policy import SquashedGaussianPolicy, require_bounded_box
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs

Z_BOUND = 3.0
"""Largest z of a sampled return, and deviations by which a sampled target may differ from the mean."""


class DSAC(SAC):
    """Distributional soft actor-critic agent: what `SAC` takes, with a `DSACConfig`.

    Attributes:
        target_policy: the policy's moving average, of which next actions are.
    """

    title = "DSAC"
    config_class: type[SACConfig] = DSACConfig
    critic_outputs = 2

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: SACConfig | None = None,
        **others: Any,
    ) -> None:
        super().__init__(observation_space, action_space, config, **others)
        policy, box = self.policy, require_bounded_box(action_space, self.title)
        # Copied together: what policy and critics share (convolutions), their targets share too.
        critics, encoder, trunk = copy.deepcopy((self.critics, policy.encoder, policy.trunk))
        self.target_critics = critics.requires_grad_(False)
        self.target_policy = SquashedGaussianPolicy(encoder, trunk, box, policy.log_std_bounds).requires_grad_(False)
        self.target_policy.to(self.device)
        self._online = list(nn.ModuleList([self.critics, policy]).parameters())
        self._target = list(nn.ModuleList([self.target_critics, self.target_policy]).parameters())
        self._keep(target_critics=self.target_critics, target_policy=self.target_policy)

    def draw(self, groups: int, rows: int) -> Draws:
        """What SAC draws, and z of the sampled returns, (G, B)."""
        return *super().draw(groups, rows), self.normal(groups, rows).clamp_(-Z_BOUND, Z_BOUND)

    def step(
        self, batch: Batch, noise: Tensor, shift: Tensor | None = None, *rest: Tensor, improve: bool = True
    ) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with noise (2, B, A), for images a shift (2, B, 2), and z (B,)."""
        (z,) = rest
        alpha = self.log_alpha.detach().exp()
        critic_obs, obs, next_obs, _ = self.see(batch, shift, target_policy=True)

        # Critics: minus the log-likelihood of the sampled target.
        with torch.no_grad():
            next_action, next_log_prob, _ = self.target_policy.distribution(next_obs).rsample(noise[1])
            soft = self.next_value(next_obs, next_action, z) - alpha * next_log_prob.sum(-1)  # (2, B)
            target, sample = batch.reward + batch.discount * soft
        q, std = _moments(self.critics(critic_obs, self.policy.scaling.to_unit(batch.action)))  # (K, B)
        critic_loss = self.critic_loss(q, std, target, sample)
        self.critic_optimizer.descend(critic_loss)
        metrics = {"alpha": alpha, "critic_loss": critic_loss.detach(), "q_mean": q.detach().mean()}
        metrics |= {"q_std": std.detach().mean(), "target_mean": target.mean()}

        if improve:
            # Policy: J_pi = E[alpha log pi(f(eps; s)|s) - Q(s, f(eps; s))].
            action, log_prob, _ = self.policy.distribution(obs).rsample(noise[0])  # (B, A), (B, 1)
            log_prob = log_prob.sum(-1)  # (B,)
            actor_loss = (alpha * log_prob - self.policy_value(obs, action)).mean()
            self.actor_optimizer.descend(actor_loss)
            metrics |= {"actor_loss": actor_loss.detach(), "entropy": -log_prob.detach().mean()}

            # Temperature: J(alpha) = E[-log alpha (log pi(a|s) + H)]; dJ by hand.
            if self.config.alpha_lr > 0:
                self.alpha_optimizer.step([-(log_prob.detach().mean() + self.target_entropy)])

            polyak(self._target, self._online, self.config.tau)
        return metrics

    def critic_loss(self, q: Tensor, std: Tensor, target: Tensor, sample: Tensor) -> Tensor:
        """The critics' loss, 0-d, of their means and deviations (K, B).

        Args:
            q: means, (K, B).
            std: standard deviations, (K, B).
            target: of the means, (B,).
            sample: of the return, for the deviations, (B,).
        """
        fixed_q, fixed_std = q.detach(), std.detach()
        bounded = _bounded(sample, fixed_q, fixed_std.mean(-1))  # y_b
        mean_part = (q - target).square() / (2 * fixed_std.square())
        std_part = (fixed_q - bounded).square() / (2 * std.square()) + std.log()
        return (mean_part + std_part).mean(-1).sum()

    def value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """Q(s, a), the mean of each critic, (K, B)."""
        mean, _ = _moments(self.critics(obs, action))
        return mean

    def next_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """The return at (s', a') in the targets of mean and deviation, (2, B): here the sample Z(s', a') in both."""
        (z,) = rest
        q, std = _moments(self.target_critics(obs, action))  # (1, B)
        return (q + z * std).expand(2, -1)


def _moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (K, B) of critics' `outputs` (K, B, 2)."""
    mean, raw = outputs.unbind(-1)
    return mean, nn.functional.softplus(raw)


def _bounded(sample: Tensor, q: Tensor, std: Tensor) -> Tensor:
    """`sample` (B,) not farther than three `std` (K,) from each `q` (K, B)."""
    bound = (Z_BOUND * std).unsqueeze(-1)
    return q + (sample - q).clamp(-bound, bound)
