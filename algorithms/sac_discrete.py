"""Soft actor-critic for discrete actions (Christodoulou 2019, arXiv:1910.07207), and its stabilized form, SD-SAC (Zhou
et al. 2022, arXiv:2209.10081), which is the default.

Shapes: G gradient steps, B batch, n actions, K critics. pi(s) and Q(s) are vectors of n numbers, so expectations over
actions are sums, and nothing is drawn. `batch.discount` is gamma^k * (1 - terminated), made by the sampler.

    V(s') = pi(s')^T [Q(s') - alpha log pi(s')]                                        eq. 10 of arXiv:1910.07207
    J(alpha) = pi(s)^T [-alpha (log pi(s) + H)]                                        eq. 11
    J_pi = E[ pi(s)^T [alpha log pi(s) - Q(s)] ]                                       eq. 12

Here Q is the minimum of the critics. SD-SAC takes their mean (double average Q-learning), and adds

    to the policy's loss   beta/2 E[ (H_old(s) - H(s))^2 ]                             entropy-penalty
    for each critic        E[ max( (Q - y)^2, (Q' + clip(Q - Q', -c, c) - y)^2 ) ]     Q-clip

with H the policy's entropy, H_old what it was when the action was taken (stored with it), Q' the target network's value
of the same state and action, and y = r + gamma V(s').

`backup_entropy=False` leaves alpha out of V(s'), as RLPD does (arXiv:2302.02948): where rewards are of success alone,
and rare, soft values else hold mostly what acting at random for ever is worth. During the first `critic_only` updates
the policy stays as it is. With `reference` log pi becomes log pi - log pi_0 in V(s') and J_pi, pi_0 the policy that
learning began with (KL-control; Jaques et al. 2019, arXiv:1907.00456): where actions are worth the same it stays what
it was, instead of becoming uniform.

Actions can be masked row by row, or be candidates with features (`ctrlrl.nn.discrete`): what does not exist has
probability 0 in every sum above, and n is the row's number of actions.

Deviations from the papers:
- the target entropy is `target_entropy_ratio` * log(n) of each row instead of 0.98 log(n), which keeps a policy of few
  actions near chance; a row with a single action has no entropy, a target of 0, and does not move the temperature;
- the temperature's loss is linear in log alpha instead of alpha; it is stepped first, but this update's losses use its
  value from before (as in `sac.py`);
- c is 10 instead of 0.5, which is for rewards in [-1, 1] and millions of updates: a critic that is held near its target
  network moves by about c * tau per update at most;
- the maximum of Q-clip is taken for each transition, and the entropy-penalty has the factor 1/2; the authors' code has
  the maximum of the batch's means, and no 1/2;
- H_old of the uniformly random actions before learning starts is the untrained policy's, not log(n);
- the papers' networks are convolutions for Atari, and their target networks are copied now and then in the first paper;
  here they are those of `sac.py`, with a moving average.

Images are treated as in `sac.py`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.agent import Draws, OffPolicyAgent
from ctrlrl.algorithms.sac_discrete_config import SACDiscreteConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.discrete import CategoricalPolicy, make_choices, require_discrete
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Critics, Networks
from ctrlrl.nn.optim import Adam, polyak, trained, trained_beside
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class SACDiscrete(OffPolicyAgent):
    """Discrete soft actor-critic agent for Box observations (or flat Dicts of them) and Discrete actions.

    Args:
        observation_space: of one environment; a mask and candidates in it are recognized by `make_choices`.
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

    config: SACDiscreteConfig
    policy: CategoricalPolicy
    title = "Discrete SAC"

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: SACDiscreteConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or SACDiscreteConfig()
        super().__init__(c, seed, device)
        choices = make_choices(observation_space, require_discrete(action_space, self.title), c.action_mask)
        with self._weights_from(seed):
            networks = Networks(choices.observation_space, c, network, encoder)
            self.normalizer = networks.normalizer
            trunk = networks.trunk(choices.outputs, actions=choices.inputs)
            self.policy = CategoricalPolicy(networks.policy_encoder, trunk, choices, self.normalizer)
            self.critics = networks.critics(
                c.num_critics, actions=choices.inputs, outputs=choices.outputs, layer_norm=c.layer_norm
            )
        self.policy.to(self.device).generator = self.generator
        self.critics.to(self.device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.tensor(math.log(c.initial_alpha), device=self.device, requires_grad=True)

        self.reference = copy.deepcopy(self.policy).requires_grad_(False) if c.reference else None  # pi_0
        if self.reference is not None:
            if self.critics.encoder.sees:
                raise UsageError("agent.reference is not for images, whose convolutions change with the critics")
            self.reference.encoder.refer_to(self.reference.normalizer)  # which stays as it was, as the weights do
            self._keep(reference=self.reference)
        self._critic = trained(self.critics)
        self._target = trained_beside(self.critics, self.target_critics)
        self.actor_optimizer = Adam(self.actor_parameters(), c.actor_lr)
        self.critic_optimizer = Adam(self._critic, c.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], c.alpha_lr)
        self._keep(policy=self.policy, critics=self.critics, target_critics=self.target_critics)
        self._keep(log_alpha=self.log_alpha, actor_optimizer=self.actor_optimizer)
        self._keep(critic_optimizer=self.critic_optimizer, alpha_optimizer=self.alpha_optimizer)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(("entropy",)) if self.config.entropy_penalty > 0 else frozenset()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        if self.reference is not None and not self.updates:  # now, after what it starts from was read
            self.reference.load_state_dict(self.policy.state_dict())
        return super().update(batch)

    def improves(self) -> bool:
        return super().improves() and self.updates > self.config.critic_only

    def draw(self, groups: int, rows: int) -> Draws:
        """The shift of images; expectations over actions are exact."""
        return (self.draw_shift(groups, rows),)

    def step(self, batch: Batch, shift: Tensor | None = None, *, improve: bool = True) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with, for images, a shift (2, B, 2)."""
        c = self.config
        alpha = self.log_alpha.detach().exp()
        critic_obs, obs, next_obs, target_obs = self.see(batch, shift)
        metrics = {"alpha": alpha}

        if improve:
            # Temperature: J(alpha), eq. 11, with log alpha for alpha; dJ by hand.
            distribution = self.policy.distribution(obs)
            log_pi, entropy = distribution.log_probs.squeeze(1), distribution.entropy().squeeze(1)  # (B, n), (B,)
            target_entropy = c.target_entropy_ratio * distribution.counts.squeeze(1).clamp(min=1).log()  # (B,)
            if c.alpha_lr > 0:
                self.alpha_optimizer.step([(entropy.detach() - target_entropy).mean()])

        # Critics: the target r + gamma V(s') with V of eq. 10, and the squared error, eq. 5, summed over the ensemble.
        with torch.no_grad():
            next_log_pi = self.policy.distribution(next_obs).log_probs.squeeze(1)  # (B, n)
            next_q = self.together(self.value(self.target_critics, target_obs))  # (B, n)
            cost = alpha * self.away(next_log_pi, next_obs) if c.backup_entropy else 0.0
            next_v = (next_log_pi.exp() * (next_q - cost)).sum(-1)
            target = batch.reward + batch.discount * next_v  # (B,)
        choice = self.policy.choices.to_choice(batch.action).expand(c.num_critics, -1, 1)  # (K, B, 1)
        q = self.value(self.critics, critic_obs).gather(-1, choice).squeeze(-1)  # (K, B)
        error = (q - target).square()
        if c.q_clip > 0:
            with torch.no_grad():
                old_q = (
                    self.value(self.target_critics, self.seen_by_target(batch, shift)).gather(-1, choice).squeeze(-1)
                )
            clipped = (old_q + (q - old_q).clamp(-c.q_clip, c.q_clip) - target).square()
            metrics["q_clipped"] = ((clipped > error) & ((q - old_q).abs() > c.q_clip)).float().mean()
            error = torch.maximum(error, clipped)
        critic_loss = 0.5 * error.mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)
        metrics |= {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "target_mean": target.mean()}

        if improve:
            # Policy: J_pi, eq. 12, and the entropy-penalty.
            with torch.no_grad():
                q = self.together(self.value(self.critics, obs))  # (B, n)
            away = self.away(log_pi, obs)
            actor_loss = (log_pi.exp() * (alpha * away - q)).sum(-1).mean()
            if c.entropy_penalty > 0:
                actor_loss = actor_loss + c.entropy_penalty / 2 * (batch.extras["entropy"] - entropy).square().mean()
            self.actor_optimizer.descend(actor_loss)
            metrics |= {"actor_loss": actor_loss.detach(), "entropy": entropy.detach().mean()}
            metrics["target_entropy"] = target_entropy.mean()
            if self.reference is not None:
                metrics["kl_reference"] = (log_pi.exp() * away).sum(-1).mean().detach()

        polyak(self._target, self._critic, c.tau)
        return metrics

    def away(self, log_pi: Tensor, obs: Obs) -> Tensor:
        """What the temperature weighs, (B, n): log pi, or how far it is above the reference's."""
        if self.reference is None:
            return log_pi
        with torch.no_grad():
            before = self.reference.distribution(obs).log_probs.squeeze(1)
        return log_pi - before

    def value(self, critics: Critics, obs: Obs) -> Tensor:
        """Q(s) of each critic, (K, B, n)."""
        return self.policy.choices.score(critics.ensemble, critics.encoder(obs), obs)

    def together(self, q: Tensor) -> Tensor:
        """One value of the K critics', (K, B, n) to (B, n)."""
        return q.mean(0) if self.config.double_q == "mean" else q.amin(0)

    def seen_by_target(self, batch: Batch, shift: Tensor | None) -> Obs:
        """The observations (not the next ones), with images shifted as for the critics, as the target critics see
        them."""
        encoder, pad = self.target_critics.encoder, self.config.random_shift
        return encoder.see(batch.obs if shift is None else encoder.shifted(batch.obs, shift[0], pad))
