"""Residual off-policy fine-tuning of behaviour cloning (Ankile et al. 2025, arXiv:2509.19301), on TD3.

Shapes: G gradient steps, B batch, A action dimensions, K critics, M of them.
The base is frozen and acts by its mode; its actions b at s and b' at s' come with each transition, as `extras` and
`next_extras`, in [-1, 1]^A like all actions of networks. The policy is clip(b + scale * tanh(f(s, b)), -1, 1), with
f = 0 at first: the training begins where the base is. Critics see s and the whole action, not b.

`batch.discount` is gamma^k * (1 - terminated) after k steps: time limits bootstrap. The loop mixes the batch (half of
it of demonstrations, whose b is what the base would have done there) and warms up with the base and uniform noise; the
first `critic_only` updates leave the policy as it is.

Deviations from the authors' code, which also differs from their paper in places:
- the critics' loss is the mean of the squared errors, summed over the critics, theirs the square of their mean size;
- b + f is clipped where it is executed and stored, and in targets, theirs only in targets;
- a time limit is no end, theirs is one; memory of the base is set back at every episode's end, in the data too;
- the residual's scale is a share of the environment's bounds, theirs of the data's range;
- noise is added inside the clip, with its own standard deviation everywhere, theirs is 0 in targets of the warm-up;
- Adam without weight decay; weights begin as `torch.nn.Linear`'s, theirs orthogonal in the policy.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws, OffPolicyAgent, with_base_actions
from ctrlrl.algorithms.resfit_config import ResFiTConfig
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Networks
from ctrlrl.nn.optim import Adam, polyak, trained, trained_beside
from ctrlrl.nn.policy import Policy, require_bounded_box
from ctrlrl.nn.residual import BASE, Base, ResidualPolicy, groups_of, with_base_space
from ctrlrl.replay.batch import Batch


class ResFiT(OffPolicyAgent):
    """A residual over a frozen policy for Box observations (or flat Dicts of them) and bounded Box actions.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        config: every number that changes the result.
        base: the frozen policy, which acts on the same observations in the same units.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptron of `config.hidden`.
        encoder: `factory(space)`, instead of the built-in one for vectors and images.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: ResFiTConfig
    policy: ResidualPolicy
    title = "ResFiT"
    config_class = ResFiTConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: ResFiTConfig | None = None,
        *,
        base: Policy,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or ResFiTConfig()
        super().__init__(c, seed, device)
        box = require_bounded_box(action_space, self.title)
        dim = math.prod(box.shape)
        space = with_base_space(observation_space, dim)
        policy_obs, critic_obs = groups_of(observation_space, c.policy_obs, c.critic_obs)
        groups = replace(c, policy_obs=(*policy_obs, BASE), critic_obs=critic_obs)
        with self._weights_from(seed):
            networks = Networks(space, groups, network, encoder)
            self.normalizer = networks.normalizer
            trunk = networks.trunk(dim, layer_norm=c.layer_norm)
            scales = (c.residual_scale, c.exploration_noise, c.noise_clip, c.warm_up_noise)
            features = networks.policy_encoder
            self.policy = ResidualPolicy(Base(base, box), features, trunk, box, *scales, self.normalizer)
            self.critics = networks.critics(c.num_critics, actions=dim, layer_norm=c.layer_norm)
        self.policy.to(self.device).generator = self.generator
        self.critics.to(self.device)
        # Copied together: what policy and critics share (convolutions), their targets share too.
        self.target_critics, target_encoder, target_trunk = copy.deepcopy(
            (self.critics, self.policy.encoder, self.policy.trunk)
        )
        self.target_policy = ResidualPolicy(self.policy.base, target_encoder, target_trunk, box, *scales)
        self.target_policy.to(self.device)
        for target in (self.target_critics, target_encoder, target_trunk):
            target.requires_grad_(False)

        self._critic, self._target_critic = trained(self.critics), trained_beside(self.critics, self.target_critics)
        own, beside = (
            nn.ModuleList([self.policy.encoder, self.policy.trunk]),
            nn.ModuleList([target_encoder, target_trunk]),
        )
        shared = set(self._target_critic)
        self._actor = self.actor_parameters()
        self._target_actor = [p for p in trained_beside(own, beside) if p not in shared]
        self.actor_optimizer = Adam(self._actor, c.actor_lr)
        self.critic_optimizer = Adam(self._critic, c.critic_lr)
        self._keep(policy=self.policy, critics=self.critics)
        self._keep(target_encoder=target_encoder, target_trunk=target_trunk, target_critics=self.target_critics)
        self._keep(actor_optimizer=self.actor_optimizer, critic_optimizer=self.critic_optimizer)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({BASE})

    def improves(self) -> bool:
        return super().improves() and self.updates > self.config.critic_only

    def draw(self, groups: int, rows: int) -> Draws:
        """Noise of the target policy's actions (G, B, A), the M critics of each target (G, M), the shift of images."""
        noise = self.normal(groups, rows, self.policy.scaling.low.numel())
        order = torch.rand(groups, self.config.num_critics, generator=self.generator, device=self.device).argsort(-1)
        return noise, order[:, : self.config.subset], self.draw_shift(groups, rows)

    def step(
        self, batch: Batch, noise: Tensor, members: Tensor, shift: Tensor | None = None, *, improve: bool = True
    ) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with standard normal noise (B, A), critics (M,) and, for images, a
        shift (2, B, 2)."""
        c = self.config
        batch = with_base_actions(batch)
        critic_obs, obs, next_obs, _ = self.see(batch, shift, target_policy=True)

        # y = r + gamma^n min_M Q'(s', clip(b' + f'(s', b') + eps)), section IV of the paper.
        with torch.no_grad():
            smoothing = (c.target_noise * noise).clamp(-c.noise_clip, c.noise_clip)
            residual = self.target_policy.residual(next_obs)
            next_action = (batch.next_extras[BASE] + residual + smoothing).clamp(-1, 1)
            next_q = self.target_critics(next_obs, next_action, members=members).amin(0)
            target = batch.reward + batch.discount * next_q  # (B,)
        q = self.critics(critic_obs, self.policy.scaling.to_unit(batch.action))  # (K, B)
        critic_loss = (q - target.expand_as(q)).square().mean(-1).sum()
        self.critic_optimizer.descend(critic_loss, max_norm=c.max_grad_norm)
        metrics = {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "target_mean": target.mean()}

        if improve:
            # Up the mean of all critics at clip(b + f(s, b)).
            residual = self.policy.residual(obs)
            action = (batch.extras[BASE] + residual).clamp(-1, 1)
            size = (residual / c.residual_scale).square().mean()
            actor_loss = -self.critics(obs, action).mean() + c.residual_penalty * size
            self.actor_optimizer.descend(actor_loss, max_norm=c.max_grad_norm)
            metrics |= {"actor_loss": actor_loss.detach(), "residual_size": residual.detach().abs().mean()}
            polyak(self._target_actor, self._actor, c.tau)
        polyak(self._target_critic, self._critic, c.tau)
        return metrics
