"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv:1802.09477), and DDPG as its preset.

Shapes: G gradient steps, B batch, A action dimensions, K critics.
Actions of the networks, and all noise on them, live in [-1, 1]^A; batches hold actions in the environment's units,
which `policy.scaling` maps there, for bounds of any size. `batch.discount` is gamma^k * (1 - terminated).

Delay (algorithm 1): gradient steps are counted over the whole training, 1, 2, ...; each that is a multiple of
`policy_delay` improves the policy after the critics, and moves the target critics and the target policy. In between,
nothing but the critics changes. The policy goes up the first critic alone.

Deviations from the paper: networks, batch and step size are those of the authors' later code (2x256, 256, 3e-4), and
the targets take steps of 0.01, twice as large.
DDPG (Lillicrap et al. 2016, arXiv:1509.02971) is the same step with one critic, `policy_delay` 1 and no smoothing. Its
deviations: Gaussian exploration noise instead of an Ornstein-Uhlenbeck process, no batch normalization, TD3's numbers.

Images are shifted and seen as in `sac.py`; the targets of policy and critics share the target convolutions.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws, OffPolicyAgent
from ctrlrl.algorithms.td3_config import TD3Config
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Networks
from ctrlrl.nn.optim import Adam, polyak, trained
from ctrlrl.nn.policy import DeterministicPolicy, require_bounded_box
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class TD3(OffPolicyAgent):
    """TD3 agent for Box observations (or flat Dicts of them) and bounded Box actions; arguments as those of `SAC`.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: TD3Config
    policy: DeterministicPolicy
    config_class: type[TD3Config] = TD3Config

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: TD3Config | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or self.config_class()
        super().__init__(c, seed, device)
        box = require_bounded_box(action_space, c.title)
        dim = math.prod(box.shape)
        with self._weights_from(seed):
            networks = Networks(observation_space, c, network, encoder, action_space=action_space)
            self.normalizer = networks.normalizer
            trunk, noise = networks.trunk(dim), c.exploration_noise
            self.policy = DeterministicPolicy(networks.policy_encoder, trunk, box, noise, self.normalizer)
            self.critics = networks.critics(c.num_critics, actions=dim, layer_norm=c.layer_norm)
        self.policy.to(self.device).generator = self.generator
        self.critics.to(self.device)
        # Copied together: what policy and critics share (convolutions), their targets share too.
        critics, target_encoder, trunk = copy.deepcopy((self.critics, self.policy.encoder, self.policy.trunk))
        self.target_critics = critics.requires_grad_(False)
        self.target_policy = DeterministicPolicy(target_encoder, trunk, box, 0.0).to(self.device).requires_grad_(False)

        self._online = list(nn.ModuleList([self.critics, self.policy]).parameters())
        self._target = list(nn.ModuleList([self.target_critics, self.target_policy]).parameters())
        self.actor_optimizer = Adam(self.actor_parameters(), c.actor_lr)
        self.critic_optimizer = Adam(trained(self.critics), c.critic_lr)
        self._keep(policy=self.policy, critics=self.critics)
        self._keep(target_policy=self.target_policy, target_critics=self.target_critics)
        self._keep(actor_optimizer=self.actor_optimizer, critic_optimizer=self.critic_optimizer)

    def draw(self, groups: int, rows: int) -> Draws:
        """Noise of the target policy's actions (G, B, A), and the shift of images."""
        return self.normal(groups, rows, self.policy.scaling.low.numel()), self.draw_shift(groups, rows)

    def step(
        self, batch: Batch, noise: Tensor, shift: Tensor | None = None, *, improve: bool = True
    ) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with standard normal noise (B, A) and, for images, shift (2, B, 2)."""
        c = self.config
        critic_obs, obs, next_obs, _ = self.see(batch, shift, target_policy=True)

        # Target policy smoothing, eq. 14: a' = pi'(s') + clip(eps, -c, c); clipped double Q, eq. 10.
        with torch.no_grad():
            smoothing = (c.target_noise * noise).clamp(-c.target_noise_clip, c.target_noise_clip)
            next_action = (self.target_policy.action(next_obs) + smoothing).clamp(-1, 1)
            next_q = self.next_value(batch, next_obs, next_action)
            target = batch.reward + batch.discount * next_q  # (B,)
        q = self.critics(critic_obs, self.policy.scaling.to_unit(batch.action))  # (K, B)
        critic_loss = (q - target.expand_as(q)).square().mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)
        metrics = {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "target_mean": target.mean()}

        if improve:
            # Deterministic policy gradient, algorithm 1: up Q_1(s, pi(s)), by the critics as they are now.
            action = self.policy.action(obs)
            actor_loss, more = self.policy_loss(batch, obs, action)
            self.actor_optimizer.descend(actor_loss)
            polyak(self._target, self._online, c.tau)
            metrics |= {"actor_loss": actor_loss.detach(), "action_size": action.detach().abs().mean()} | more
        return metrics

    # What variants of the algorithm change; `action` (B, A) is the one that the critics are asked for.

    def next_value(self, batch: Batch, obs: Obs, action: Tensor) -> Tensor:
        """Q(s', a') in the critics' target, (B,), clipped double Q."""
        out: Tensor = self.target_critics(obs, action).amin(0)
        return out

    def policy_loss(self, batch: Batch, obs: Obs, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the policy goes down, and metrics of it."""
        return -self.critics(obs, action, members=slice(0, 1)).mean(), {}
