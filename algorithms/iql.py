"""Implicit Q-learning (Kostrikov et al. 2021, arXiv:2110.06169), which learns from a fixed set of data.

Shapes: G gradient steps, B batch, M decisions (M = B, but where a row has several: `iql_tokens.py`), A action
dimensions, K critics. No action but the data's is ever asked for its value:

    L_V = E[ |tau - 1(u < 0)| u^2 ],   u = min_k Q'_k(s, a) - V(s)                     eq. 5; Q' are the target critics
    L_Q = E[ (r + gamma V(s') - Q(s, a))^2 ]                                           eq. 6
    L_pi = E[ -exp(beta (min_k Q'_k(s, a) - V(s))) log pi(a|s) ]                       eq. 7, the weight at most 100

With tau near 1, V is what the best of the data's actions is worth. `batch.discount` is gamma^k * (1 - terminated),
made by the sampler. Actions of the networks live in [-1, 1]^A, to which `policy.scaling` maps the batch's.

The policy is a Gaussian that is not squashed: its mean is a tanh, its standard deviation the same for all observations.
It acts by its mean; samples are clipped to the bounds. Its step size follows a cosine, as a function of its optimizer's
count of steps, so that resumed, compiled and captured runs go on exactly.

`learn="value"` learns V and Q alone; `learn="policy"` a policy from values that stay as they are.
`extraction="ddpg+bc"` makes the policy's loss that of Park et al. 2024 (arXiv:2406.09329), and changes nothing else:

    L_pi = E[ -min_k Q_k(s, mu(s)) ] / E|min_k Q_k(s, mu(s))| - alpha E[ log pi(a|s) ]

where mu is the policy's mean, and log pi has a standard deviation of 1 as in the authors' code (OGBench), so alpha
weighs squared distances. The deviation with which the policy explores is fitted to the data's actions around mu, and
does not move mu.

Deviations from the paper:
- V in the targets and in the advantage is what it was before its own step, as in CORL (d3rlpy: in the targets); the
  authors' code takes V after it. Q' is what it was before the update in all of them;
- all three losses are taken on the same batch, in the order above, as in the code of all of them;
- the policy's log standard deviation is put back into its bounds after each step, so that its gradient never vanishes
  there; the authors bound it inside the network. There is no dropout in the policy, which they have on Adroit.

Images are treated as in `sac.py`: policy and V share the critics' convolutions, which only the critics' loss trains.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws, OffPolicyAgent
from ctrlrl.algorithms.iql_config import ImplicitQConfig, IQLConfig
from ctrlrl.mirror import ReflectedBox
from ctrlrl.nn.distributions import DiagonalGaussian
from ctrlrl.nn.encoder import Encoder, EncoderFactory, ObservationNormalizer
from ctrlrl.nn.mlp import NetworkFactory, at_least_float32
from ctrlrl.nn.networks import Critics, Networks
from ctrlrl.nn.optim import Adam, polyak, trained, trained_beside
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState, require_bounded_box
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs, map_obs


class ImplicitQ(OffPolicyAgent):
    """Implicit Q-learning for actions of any kind: the step. A subclass makes the networks, and says what Q(s, a) and
    the policy's loss are; where rows have several decisions also what V is at each, and what follows it.

    Attributes:
        value: V(s), observations (B, ...) to (B,).
        actor_lr: the policy's step size in its last step, 0-d.
    """

    config: ImplicitQConfig
    value: nn.Module

    def _learn(self) -> None:
        """Make the optimizers of policy, critics and V, which are there, and name what changes."""
        c = self.config
        self.policy.to(self.device).generator = self.generator
        self.critics.to(self.device)
        self.value.to(self.device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self._critic = trained(self.critics)
        self._target = trained_beside(self.critics, self.target_critics)
        self.actor_lr = torch.tensor(c.actor_lr, device=self.device)
        self.actor_optimizer = Adam(self.actor_parameters(), self.actor_lr if c.actor_lr_steps else c.actor_lr)
        self.critic_optimizer = Adam(self._critic, c.critic_lr)
        shared = set(self._critic)
        own = [parameter for parameter in trained(self.value) if parameter not in shared]
        self.value_optimizer = Adam(own, c.critic_lr)
        self._keep(policy=self.policy, critics=self.critics, target_critics=self.target_critics, value=self.value)
        self._keep(actor_optimizer=self.actor_optimizer, critic_optimizer=self.critic_optimizer)
        self._keep(value_optimizer=self.value_optimizer, actor_lr=self.actor_lr)

    def draw(self, groups: int, rows: int) -> Draws:
        """The shift of images; nothing else is drawn."""
        return (self.draw_shift(groups, rows),)

    def step(self, batch: Batch, shift: Tensor | None = None, *, improve: bool = True) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with, for images, a shift (2, B, 2)."""
        c = self.config
        critic_obs, obs, next_obs, target_obs = self.look(batch, shift)
        metrics: dict[str, Tensor] = {}

        v = self.v(obs, batch.action)  # (M,)
        with torch.no_grad():
            target_q = self.q(self.target_critics, target_obs, batch.action).amin(0)  # (M,)
            advantage = target_q - v

        if c.learn != "policy":
            # V: the expectile of Q', eq. 5. Q: towards r + gamma V(s'), eq. 6, summed over the ensemble.
            with torch.no_grad():
                target = self.target(batch, v, next_obs)  # (M,)
            value_loss = expectile_loss(target_q - v, c.expectile).mean()
            self.value_optimizer.descend(value_loss)
            q = self.q(self.critics, critic_obs, batch.action)  # (K, M)
            critic_loss = (q - target).square().mean(-1).sum()
            self.critic_optimizer.descend(critic_loss)
            metrics |= {"value_loss": value_loss.detach(), "critic_loss": critic_loss.detach()}
            metrics |= {"q_mean": q.detach().mean(), "target_mean": target.mean()}
        metrics |= {"v_mean": v.detach().mean(), "advantage_mean": advantage.mean()}

        if improve and c.learn != "value":
            if c.actor_lr_steps:
                progress = (self.actor_optimizer.steps / c.actor_lr_steps).clamp(max=1)
                self.actor_lr.copy_(0.5 * c.actor_lr * (1 + torch.cos(math.pi * progress)))
            actor_loss, told = self.actor_loss(obs, batch.action, advantage)
            self.actor_optimizer.descend(actor_loss)
            metrics |= {"actor_loss": actor_loss.detach(), "actor_lr": self.actor_lr.clone()} | told

        if c.learn != "policy":
            polyak(self._target, self._critic, c.tau)
        return metrics

    def v(self, obs: Obs, action: Tensor) -> Tensor:
        """V(s), (M,), where the data's actions (B, ...) were chosen."""
        out: Tensor = self.value(obs)
        return out

    def target(self, batch: Batch, v: Tensor, next_obs: Obs) -> Tensor:
        """What Q is to be, (M,): r + gamma V(s'), eq. 6. `v` (M,) is V where the data's actions were chosen."""
        out: Tensor = batch.reward + batch.discount * self.value(next_obs)
        return out

    @abstractmethod
    def q(self, critics: Critics, obs: Obs, action: Tensor) -> Tensor:
        """Q(s, a) of each critic, (K, M), of actions (B, ...) in the environment's units."""

    @abstractmethod
    def actor_loss(self, obs: Obs, action: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss, 0-d, and further metrics; `action` (B, ...) is the data's, `advantage` (M,)."""

    def weigh(self, advantage: Tensor, log_prob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 7, advantage-weighted regression, of (M,) each."""
        c = self.config
        weight = (c.beta * advantage).exp().clamp(max=c.max_weight)
        metrics = {"weight_mean": weight.mean(), "weight_clipped": (weight >= c.max_weight).float().mean()}
        return -(weight * log_prob).mean(), metrics

    def look(self, batch: Batch, shift: Tensor | None) -> tuple[Obs, Obs, Obs, Obs]:
        """The observations with images shifted and seen, once for all networks.

        Returns those for the critics' loss, the same without its gradient, the next ones for V, and what the target
        critics see of the first. (`see` has the target critics look at the next ones.)
        """
        obs, next_obs, encoder = batch.obs, batch.next_obs, self.critics.encoder
        if shift is not None:
            pad = self.config.random_shift
            obs, next_obs = encoder.shifted(obs, shift[0], pad), encoder.shifted(next_obs, shift[1], pad)
        seen = encoder.see(obs)
        with torch.no_grad():
            return seen, map_obs(Tensor.detach, seen), encoder.see(next_obs), self.target_critics.encoder.see(obs)


class IQL(ImplicitQ):
    """Implicit Q-learning agent for Box observations (or flat Dicts of them) and bounded Box actions.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        config: every number that changes the result.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptrons of `config.hidden`; used
            for the policy, for V and, K times, for the critics.
        encoder: `factory(space)`, instead of the built-in one for vectors and images; each network gets one.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: IQLConfig
    policy: GaussianPolicy
    config_class = IQLConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: IQLConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or IQLConfig()
        super().__init__(c, seed, device)
        box = require_bounded_box(action_space, "IQL")
        dim = math.prod(box.shape)
        with self._weights_from(seed):
            networks = Networks(observation_space, c, network, encoder, action_space=action_space)
            self.normalizer = networks.normalizer
            self.policy = GaussianPolicy(networks.policy_encoder, networks.trunk(dim), box, self.normalizer)
            self.critics = networks.critics(c.num_critics, actions=dim, layer_norm=c.layer_norm)
            self.value = networks.value(layer_norm=c.layer_norm)
        self._learn()

    def step(self, batch: Batch, shift: Tensor | None = None, *, improve: bool = True) -> dict[str, Tensor]:
        metrics = super().step(batch, shift, improve=improve)
        with torch.no_grad():
            self.policy.log_std.clamp_(*self.config.log_std_bounds)
        return metrics

    def q(self, critics: Critics, obs: Obs, action: Tensor) -> Tensor:
        out: Tensor = critics(obs, self.policy.scaling.to_unit(action))
        return out

    def actor_loss(self, obs: Obs, action: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        unit, policy = self.policy.scaling.to_unit(action), self.policy.distribution(obs)
        told = {"std_mean": policy.log_std.detach().exp().mean()}
        if self.config.extraction == "awr":
            loss, more = self.weigh(advantage, policy.log_prob(unit).squeeze(-1))
            return loss, told | more
        q = self.critics(obs, policy.mean).amin(0)  # (B,)
        distance = (policy.mean - unit).square().sum(-1)
        loss = -q.mean() / q.detach().abs().mean().clamp(min=1e-6) + self.config.bc_weight * 0.5 * distance.mean()
        spread = DiagonalGaussian(policy.mean.detach(), policy.log_std).log_prob(unit)
        return loss - spread.mean(), told | {
            "policy_q_mean": q.detach().mean(),
            "distance_mean": distance.detach().mean(),
        }


class GaussianPolicy(Policy):
    """A Gaussian over [-1, 1]^A that is not squashed: its mean is the tanh of a network's output, its standard
    deviation the same for every observation. Samples beyond the bounds are clipped."""

    _counterpart: Tensor | None

    def __init__(
        self,
        encoder: Encoder,
        trunk: nn.Module,
        space: gym.spaces.Box,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer  # what `encoder` refers to; here, so that it is saved with the policy
        self.encoder, self.trunk, self.scaling = encoder, trunk, ActionScaling(space)
        self.log_std = nn.Parameter(torch.zeros(math.prod(space.shape)))
        other_side = space.reflection.tensors()[0] if isinstance(space, ReflectedBox) else None  # explores alike
        self.register_buffer("_counterpart", other_side, persistent=False)

    def distribution(self, obs: Obs, state: PolicyState | None = None) -> DiagonalGaussian:
        """Distribution over actions (B, A), of which those beyond [-1, 1] are clipped."""
        mean, log_std = torch.tanh(at_least_float32(self.trunk(self.encoder(obs)))), self.log_std
        if self._counterpart is None:
            return DiagonalGaussian(mean, log_std)
        return DiagonalGaussian(mean, (log_std + log_std[self._counterpart]) / 2)

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """A sample if `explore`, else the mean; extras are empty."""
        distribution = self.distribution(obs, state)
        unit = distribution.sample(self.require_generator()) if explore else distribution.mode
        return self.scaling.to_environment(unit), state or {}, {}


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(error < 0)| error^2, elementwise: its mean is least where `error` is that of the expectile."""
    return torch.where(error < 0, 1 - expectile, expectile) * error.square()
