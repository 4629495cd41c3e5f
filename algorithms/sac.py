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

from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.encoder import (
    Encoder,
    EncoderFactory,
    ObservationNormalizer,
    critic_groups,
    group_space,
    make_encoder,
    policy_groups,
)
from ctrlrl.nn.execution import executed
from ctrlrl.nn.mlp import Ensemble, EnsembleMLP, NetworkFactory, at_least_float32, mlp
from ctrlrl.nn.optim import Adam, polyak
from ctrlrl.nn.policy import SquashedGaussianPolicy, require_bounded_box
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs, map_obs


class Critics(nn.Module):
    """K action-value functions, stacked; (B, ...) observations and (B, A) actions in [-1, 1] to (K, B)."""

    def __init__(self, encoder: Encoder, ensemble: EnsembleMLP | Ensemble) -> None:
        super().__init__()
        self.encoder, self.ensemble = encoder, ensemble

    def forward(self, obs: Obs, action: Tensor) -> Tensor:
        out: Tensor = self.ensemble(torch.cat([self.encoder(obs), action], -1))
        return at_least_float32(out.squeeze(-1))


class SAC:
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
        UsageError: if the spaces do not suit SAC.
    """

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
        self.config = c = config or SACConfig()
        self.device = torch.device(device)
        box = require_bounded_box(action_space, "SAC", "No algorithm for discrete actions is available yet.")
        dim = math.prod(box.shape)
        self.target_entropy = -float(dim) if c.target_entropy is None else c.target_entropy
        self.generator = torch.Generator(self.device).manual_seed(seed)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: weights are made there
            self.normalizer = ObservationNormalizer(observation_space) if c.normalize_obs else None
            policy_space = group_space(observation_space, c.policy_obs or policy_groups(observation_space))
            critic_space = group_space(observation_space, c.critic_obs or critic_groups(observation_space))
            features = make_encoder(policy_space, encoder, self.normalizer)
            trunk = _network(network, features.out_features, 2 * dim, c.hidden)
            self.policy = SquashedGaussianPolicy(
                features, trunk, box, (c.log_std_bounds[0], c.log_std_bounds[1]), self.normalizer
            )
            features = make_encoder(critic_space, encoder, self.normalizer, shared=features)
            inputs = features.out_features + dim
            ensemble = (
                EnsembleMLP(c.num_critics, (inputs, *c.hidden, 1), layer_norm=c.layer_norm)
                if network is None
                else Ensemble(c.num_critics, lambda: _network(network, inputs, 1, c.hidden))
            )
            self.critics = Critics(features, ensemble)
        self.policy.to(self.device).generator = self.generator
        self.critics.to(self.device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.tensor(math.log(c.initial_alpha), device=self.device, requires_grad=True)

        self._critic = list(self.critics.parameters())
        shared = set(self._critic)  # the convolutions, which the critics' loss trains
        self._actor = [parameter for parameter in self.policy.parameters() if parameter not in shared]
        self._target = list(self.target_critics.parameters())
        self.actor_optimizer = Adam(self._actor, c.actor_lr)
        self.critic_optimizer = Adam(self._critic, c.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], c.alpha_lr)
        self._step = executed(self.step, c.execution, c.precision, self.device, self._changing)

    def observe(self, obs: Obs, valid: Tensor) -> None:
        """Take observations (N, ...) of valid rows into the running statistics, each once."""
        if self.normalizer is not None:
            self.normalizer.update(obs, valid)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step for each of the G groups of `batch` [G, B, ...]; returns the metrics' means (0-d)."""
        shape = (len(batch), 2, *batch.action.shape[1:2], self.policy.scaling.low.numel())
        noise = torch.randn(shape, generator=self.generator, device=self.device)  # (G, 2, B, A)
        pad, shift = self.config.random_shift, None
        if pad and self.critics.encoder.sees:
            draw = (*shape[:3], 2)  # (G, 2, B, 2): of obs and next_obs, down and to the right
            shift = torch.randint(0, 2 * pad + 1, draw, generator=self.generator, device=self.device)
        metrics = [self._step(batch[g], noise[g], None if shift is None else shift[g]) for g in range(len(batch))]
        if len(metrics) == 1:
            return metrics[0]
        return {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}

    def step(self, batch: Batch, noise: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...], a pure function of weights, batch, `noise` (2, B, A) and, for images,
        `shift` (2, B, 2)."""
        c = self.config
        alpha = self.log_alpha.detach().exp()
        critic_obs, obs, next_obs, target_obs = self._see(batch, shift)

        # Temperature: J(alpha) = E[-alpha log pi(a|s) - alpha H], eq. 18, with log alpha for alpha; dJ by hand.
        action, log_prob, _ = self.policy.distribution(obs).rsample(noise[0])  # (B, A), (B, 1)
        log_prob = log_prob.sum(-1)  # (B,)
        if c.alpha_lr > 0:
            self.alpha_optimizer.step([-(log_prob.detach().mean() + self.target_entropy)])

        # Critics: J_Q = E[1/2 (Q(s,a) - r - gamma V(s'))^2], eqs. 3, 5 and 6, summed over the ensemble.
        with torch.no_grad():
            next_action, next_log_prob, _ = self.policy.distribution(next_obs).rsample(noise[1])
            next_q = self.target_critics(target_obs, next_action).amin(0)
            target = batch.reward + batch.discount * (next_q - alpha * next_log_prob.sum(-1))  # (B,)
        q = self.critics(critic_obs, self.policy.scaling.to_unit(batch.action))  # (K, B)
        critic_loss = 0.5 * (q - target.expand_as(q)).square().mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)

        # Policy: J_pi = E[alpha log pi(f(eps; s)|s) - Q(s, f(eps; s))], eq. 9.
        actor_loss = (alpha * log_prob - self.critics(obs, action).amin(0)).mean()
        self.actor_optimizer.descend(actor_loss)

        polyak(self._target, self._critic, c.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "alpha": alpha,
            "entropy": -log_prob.detach().mean(),
            "q_mean": q.detach().mean(),
            "target_mean": target.mean(),
        }

    def _see(self, batch: Batch, shift: Tensor | None) -> tuple[Obs, Obs, Obs, Obs]:
        """The observations with images seen: for the critics' loss, without its gradient, the next ones for the policy,
        and for the target critics, which see through convolutions of their own."""
        obs, next_obs, encoder = batch.obs, batch.next_obs, self.critics.encoder
        if shift is not None:
            pad = self.config.random_shift
            obs, next_obs = encoder.shifted(obs, shift[0], pad), encoder.shifted(next_obs, shift[1], pad)
        seen = encoder.see(obs)
        with torch.no_grad():
            return seen, map_obs(Tensor.detach, seen), encoder.see(next_obs), self.target_critics.encoder.see(next_obs)

    def _changing(self) -> list[Tensor]:
        optimizers = (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer)
        moments = [value for optimizer in optimizers for part in optimizer.state_dict().values() for value in part]
        return [*self._actor, *self._critic, *self._target, self.log_alpha, *moments]

    def state_dict(self) -> dict[str, Any]:
        """Weights (the policy's hold the normalizer), optimizers, temperature and the generator."""
        return {
            "policy": self.policy.state_dict(),
            "critics": self.critics.state_dict(),
            "target_critics": self.target_critics.state_dict(),
            "log_alpha": self.log_alpha.detach(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.policy.load_state_dict(state["policy"])
        self.critics.load_state_dict(state["critics"])
        self.target_critics.load_state_dict(state["target_critics"])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.generator.set_state(state["generator"].cpu())


def _network(make: NetworkFactory | None, inputs: int, outputs: int, hidden: tuple[int, ...]) -> nn.Module:
    if make is None:
        return mlp((inputs, *hidden, outputs))
    module = make(inputs, outputs)
    was_training = module.training
    with torch.no_grad():
        out = module.eval()(torch.zeros(2, inputs))
    if not isinstance(out, Tensor) or out.shape != (2, outputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(
            f"network({inputs}, {outputs}) must map (B, {inputs}) to (B, {outputs}); for B = 2 it gave {got}"
        )
    return module.train(was_training)
