"""Soft actor-critic with a learned temperature (Haarnoja et al. 2018, arXiv:1812.05905; arXiv:1801.01290).

Shapes: G gradient steps, B batch, A action dimensions, K critics.
The policy's tanh-Gaussian, its log-probability and the target entropy live in [-1, 1]^A; batches hold actions in the
environment's units, which `policy.scaling` maps there. `batch.discount` is gamma^k * (1 - terminated), made by the
sampler: a time limit still bootstraps, and gamma appears nowhere below.

Deviations from the paper, each also in the authors' code or in Stable-Baselines3:
- no state-value network: targets use the minimum over K target critics (second version of the paper);
- the temperature's loss is linear in log alpha instead of alpha: same fixed point, other steps;
- the temperature is stepped first, but this update's losses use its value from before, as does the log-probability.

Images are shifted at random and seen through convolutions that policy and critics share (DrQ, arXiv:2004.13649). Only
the critics' loss trains them, and, as in DrQ-v2 (arXiv:2107.09645), the policy's loss uses what they saw before that.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws, OffPolicyAgent
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Networks
from ctrlrl.nn.optim import Adam, polyak, trained, trained_beside
from ctrlrl.nn.policy import SquashedGaussianPolicy, require_bounded_box
from ctrlrl.nn.residual import GaussianResidualPolicy
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class SAC(OffPolicyAgent):
    """Soft actor-critic agent for Box observations (or flat Dicts of them) and bounded Box actions.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        config: every number that changes the result.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptrons of `config.hidden`; used
            for the policy and, K times, for the critics.
        encoder: `factory(space)`, instead of the built-in one for vectors and images; policy and critics get one each.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: SACConfig
    policy: SquashedGaussianPolicy | GaussianResidualPolicy
    title = "SAC"
    config_class: type[SACConfig] = SACConfig
    critic_outputs = 1

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: SACConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or self.config_class()
        super().__init__(c, seed, device)
        box = require_bounded_box(action_space, self.title)
        dim = math.prod(box.shape)
        self.target_entropy = -float(dim) if c.target_entropy is None else c.target_entropy
        with self._weights_from(seed):
            networks = Networks(observation_space, c, network, encoder, action_space=action_space)
            self.normalizer = networks.normalizer
            self.policy = self.make_policy(networks, self.make_trunk(networks, 2 * dim), box)
            outputs = self.critic_outputs
            self.critics = networks.critics(c.num_critics, actions=dim, outputs=outputs, layer_norm=c.layer_norm)
        self.policy.to(self.device).generator = self.generator
        self.critics.to(self.device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.tensor(math.log(c.initial_alpha), device=self.device, requires_grad=True)

        self._critic = trained(self.critics)
        self._target = trained_beside(self.critics, self.target_critics)
        self.actor_optimizer = Adam(self.actor_parameters(), c.actor_lr)
        self.critic_optimizer = Adam(self._critic, c.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], c.alpha_lr)
        self._keep(policy=self.policy, critics=self.critics, target_critics=self.target_critics)
        self._keep(log_alpha=self.log_alpha, actor_optimizer=self.actor_optimizer)
        self._keep(critic_optimizer=self.critic_optimizer, alpha_optimizer=self.alpha_optimizer)

    def draw(self, groups: int, rows: int) -> Draws:
        """Noise of the actions at obs and next_obs (G, 2, B, A), and the shift of images."""
        noise = self.normal(groups, 2, rows, self.policy.scaling.low.numel())
        return noise, self.draw_shift(groups, rows)

    def step(
        self, batch: Batch, noise: Tensor, shift: Tensor | None = None, *rest: Tensor, improve: bool = True
    ) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with noise (2, B, A) and, for images, a shift (2, B, 2); the `rest` is
        what a variant draws besides."""
        alpha = self.log_alpha.detach().exp()
        critic_obs, obs, next_obs, target_obs = self.see(batch, shift)
        metrics = {"alpha": alpha}

        if improve:
            # Temperature: J(alpha) = E[-alpha log pi(a|s) - alpha H], eq. 18, with log alpha for alpha; dJ by hand.
            action, log_prob, _ = self.policy.distribution(obs).rsample(noise[0])  # (B, A), (B, 1)
            log_prob = log_prob.sum(-1)  # (B,)
            if self.config.alpha_lr > 0:
                self.alpha_optimizer.step([-(log_prob.detach().mean() + self.target_entropy)])

        # Critics: J_Q = E[1/2 (Q(s,a) - r - gamma V(s'))^2], eqs. 3, 5 and 6, summed over the ensemble.
        with torch.no_grad():
            next_action, next_log_prob, _ = self.policy.distribution(next_obs).rsample(noise[1])
            next_q = self.next_value(target_obs, next_action, *rest)
            next_v = self.soft_value(next_q, alpha * next_log_prob.sum(-1))
            target = batch.reward + batch.discount * next_v  # (B,)
        q = self.value(critic_obs, self.policy.scaling.to_unit(batch.action), *rest)  # (K, B)
        critic_loss = 0.5 * (q - target.expand_as(q)).square().mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)
        metrics |= {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "target_mean": target.mean()}

        if improve:
            # Policy: J_pi = E[alpha log pi(f(eps; s)|s) - Q(s, f(eps; s))], eq. 9.
            actor_loss = (alpha * log_prob - self.policy_value(obs, action, *rest)).mean()
            self.actor_optimizer.descend(actor_loss)
            metrics |= {"actor_loss": actor_loss.detach(), "entropy": -log_prob.detach().mean()}

        polyak(self._target, self._critic, self.config.tau)
        return metrics

    # What variants of the algorithm change: which critics are asked, and how they are put together. The `rest` is what
    # a variant draws besides.

    def make_trunk(self, networks: Networks, outputs: int) -> nn.Module:
        """The policy's network, from its features to (B, outputs)."""
        return networks.trunk(outputs)

    def make_policy(
        self, networks: Networks, trunk: nn.Module, box: gym.spaces.Box
    ) -> SquashedGaussianPolicy | GaussianResidualPolicy:
        """The policy, of that network."""
        low, high = self.config.log_std_bounds
        return SquashedGaussianPolicy(networks.policy_encoder, trunk, box, (low, high), self.normalizer)

    def value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """Q(s, a) of each critic, (K, B), for their loss."""
        out: Tensor = self.critics(obs, action)
        return out

    def next_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """Q(s', a') in the critics' target, (B,)."""
        out: Tensor = self.target_critics(obs, action).amin(0)
        return out

    def soft_value(self, q: Tensor, cost: Tensor) -> Tensor:
        """V(s') in that target, eq. 3, of Q(s', a') and of alpha log pi(a'|s'), (B,) each."""
        return q - cost

    def policy_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """Q(s, a) that the policy goes up, (B,)."""
        return self.value(obs, action).amin(0)
