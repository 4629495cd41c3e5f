"""Conservative Q-learning for discrete actions (Kumar et al. 2020, arXiv:2006.04779), CQL(H), on double DQN, as in
d3rlpy. It learns from a fixed set of data.

Shapes: G gradient steps, B batch, n actions, K critics. Q(s) is a vector of n numbers, so the sum in the conservative
term is exact, and nothing is drawn. `batch.discount` is gamma^k * (1 - terminated), made by the sampler. The loss of
each critic:

    1/2 E[ (Q(s, a) - y)^2 ]  +  alpha E[ log sum_u exp Q(s, u) - Q(s, a) ]                     eq. 4
    y = r + gamma min_k Q'_k(s', u'),   u' = argmax_u mean_k Q_k(s', u)                         double DQN

which pushes values down where the data has no actions and up where it has. There is no other network: the policy is the
categorical distribution whose logits are the critics' mean, the one for which that term is the worst (eq. 4's maximum
over mu). It acts by its likeliest action, the best by the critics, and explores by drawing from it.

Actions can be masked row by row, or be candidates with features (`ctrlrl.nn.discrete`): what does not exist is in no
sum and is never the best. The data's own action always exists.

Deviations from the paper and from d3rlpy:
- DQN with a moving average for target networks, where the paper has quantile regression and both copy now and then;
- two critics, d3rlpy's default is one; d3rlpy's error is Huber's;
- networks and step sizes are those of the other agents here; theirs are for Atari.

Images are treated as in `sac.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws, ReplayAgent
from ctrlrl.algorithms.cql_discrete_config import CQLDiscreteConfig
from ctrlrl.nn.discrete import CategoricalPolicy, make_choices, require_discrete
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import Ensemble, EnsembleMLP, NetworkFactory
from ctrlrl.nn.networks import Critics, Networks
from ctrlrl.nn.optim import Adam, polyak, trained, trained_beside
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class CQLDiscrete(ReplayAgent):
    """Discrete conservative Q-learning agent for Box observations (or flat Dicts of them) and Discrete actions.

    Args:
        observation_space: of one environment; a mask and candidates in it are recognized by `make_choices`.
        action_space: of one environment.
        config: every number that changes the result.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptrons of `config.hidden`; used
            K times, for the critics.
        encoder: `factory(space)`, instead of the built-in one for vectors and images.

    Attributes:
        critics: those that the policy acts by.
        target_critics: their moving average.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: CQLDiscreteConfig
    policy: CategoricalPolicy
    config_class = CQLDiscreteConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: CQLDiscreteConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or CQLDiscreteConfig()
        super().__init__(c, seed, device)
        choices = make_choices(observation_space, require_discrete(action_space, "Discrete CQL"), c.action_mask)
        with self._weights_from(seed):
            networks = Networks(choices.observation_space, c, network, encoder)
            self.normalizer = networks.normalizer
            self.critics = networks.critics(
                c.num_critics,
                actions=choices.inputs,
                outputs=choices.outputs,
                layer_norm=c.layer_norm,
                encoder=networks.policy_encoder,
            )
        trunk = Average(self.critics.ensemble)
        self.policy = CategoricalPolicy(self.critics.encoder, trunk, choices, self.normalizer)
        self.policy.to(self.device).generator = self.generator
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self._critic = trained(self.critics)
        self._target = trained_beside(self.critics, self.target_critics)
        self.critic_optimizer = Adam(self._critic, c.critic_lr)
        self._keep(policy=self.policy, critics=self.critics, target_critics=self.target_critics)
        self._keep(critic_optimizer=self.critic_optimizer)

    def draw(self, groups: int, rows: int) -> Draws:
        """How far images are shifted, (G, 2, B, 2): of obs and next_obs, down and to the right; None without images."""
        pad = self.config.random_shift
        if not pad or not self.critics.encoder.sees:
            return (None,)
        shape = (groups, 2, rows, 2)
        return (torch.randint(0, 2 * pad + 1, shape, generator=self.generator, device=self.device),)

    def step(self, batch: Batch, shift: Tensor | None = None, *, improve: bool = True) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with, for images, a shift (2, B, 2)."""
        c, choices, encoder = self.config, self.policy.choices, self.critics.encoder
        obs, next_obs = batch.obs, batch.next_obs
        if shift is not None:
            obs, next_obs = (
                encoder.shifted(x, by, c.random_shift) for x, by in ((obs, shift[0]), (next_obs, shift[1]))
            )

        # Double DQN: the best action by the critics, its value by the targets.
        with torch.no_grad():
            best = self.policy.distribution(encoder.see(next_obs))
            next_q = self.value(self.target_critics, self.target_critics.encoder.see(next_obs)).amin(0)  # (B, n)
            next_v = next_q.gather(-1, best.mode).squeeze(-1) * (best.counts > 0).squeeze(-1)
            target = batch.reward + batch.discount * next_v  # (B,)
        q = self.value(self.critics, encoder.see(obs))  # (K, B, n)
        choice = choices.to_choice(batch.action)  # (B, 1)
        taken = q.gather(-1, choice.expand(len(q), -1, 1)).squeeze(-1)  # (K, B)
        td_loss = 0.5 * (taken - target.expand_as(taken)).square().mean(-1).sum()

        # CQL(H), eq. 4: log sum_u exp Q(s, u) - Q(s, a), over the actions that exist.
        mask = choices.mask(obs)
        if mask is not None:
            exists = mask.squeeze(1).scatter(-1, choice, True)  # (B, n)
            q = q.masked_fill(~exists, -torch.inf)
        gap = q.logsumexp(-1) - taken  # (K, B)
        critic_loss = td_loss + c.conservative_weight * gap.mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)

        polyak(self._target, self._critic, c.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "td_loss": td_loss.detach(),
            "conservative_gap": gap.detach().mean(),
            "q_mean": taken.detach().mean(),
            "target_mean": target.mean(),
        }

    def value(self, critics: Critics, obs: Obs) -> Tensor:
        """Q(s) of each critic, (K, B, n)."""
        return self.policy.choices.score(critics.ensemble, critics.encoder(obs), obs)


class Average(nn.Module):
    """The mean of an ensemble's K networks; (B, in) to (B, out)."""

    def __init__(self, ensemble: EnsembleMLP | Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ensemble(x).mean(0)
        return out
