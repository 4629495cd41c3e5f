"""Implicit Q-learning for discrete actions: `iql.py`, whose step this is, with a categorical policy.

Shapes: B batch, n actions, K critics. Q(s) is a vector of n numbers, of which the data's action picks one; log pi(a|s)
in the policy's loss is that of a categorical distribution. The policy acts by its likeliest action.

Actions can be masked row by row, or be candidates with features (`ctrlrl.nn.discrete`). No other action than the data's
is ever asked for its value, so a mask changes the policy alone, and V: where observations have a mask or candidates,
what a state is worth depends on them, and V is

    V(s) = sum_u w_u v(s, u),   w = softmax of v(s, .)                                over the actions u that exist

of a network v with a number for each action: their order and what does not exist have no part in it, and it can be that
of the best one. Elsewhere V(s) is a network's one output, as in the paper.

Deviations from the paper besides those of `iql.py`: it has continuous actions only. An action of the data that its
observation's mask excludes has no part in the policy's loss.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.iql import ImplicitQ
from ctrlrl.algorithms.iql_discrete_config import IQLDiscreteConfig
from ctrlrl.nn.discrete import CategoricalPolicy, Choices, make_choices, require_discrete
from ctrlrl.nn.distributions import Categorical
from ctrlrl.nn.encoder import Encoder, EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Critics, Networks
from ctrlrl.tree import Obs


class IQLDiscrete(ImplicitQ):
    """Implicit Q-learning agent for Box observations (or flat Dicts of them) and Discrete actions.

    Args:
        observation_space: of one environment; a mask and candidates in it are recognized by `make_choices`.
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

    config: IQLDiscreteConfig
    policy: CategoricalPolicy
    config_class = IQLDiscreteConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: IQLDiscreteConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or IQLDiscreteConfig()
        super().__init__(c, seed, device)
        choices = make_choices(observation_space, require_discrete(action_space, "Discrete IQL"), c.action_mask)
        inputs, outputs = choices.inputs, choices.outputs
        with self._weights_from(seed):
            networks = Networks(choices.observation_space, c, network, encoder)
            self.normalizer = networks.normalizer
            trunk = networks.trunk(outputs, actions=inputs)
            self.policy = CategoricalPolicy(networks.policy_encoder, trunk, choices, self.normalizer)
            self.critics = networks.critics(c.num_critics, actions=inputs, outputs=outputs, layer_norm=c.layer_norm)
            if choices.observation_space is observation_space:  # neither mask nor candidates
                self.value = networks.value(layer_norm=c.layer_norm)
            else:
                value = networks.value(actions=inputs, outputs=outputs, layer_norm=c.layer_norm)
                self.value = ValueOfChoices(value.encoder, value.trunk, choices)
        self._learn()

    def q(self, critics: Critics, obs: Obs, action: Tensor) -> Tensor:
        choices = self.policy.choices
        q = choices.score(critics.ensemble, critics.encoder(obs), obs)  # (K, B, n)
        return q.gather(-1, choices.to_choice(action).expand(len(q), -1, 1)).squeeze(-1)

    def actor_loss(self, obs: Obs, action: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        policy, choice = self.policy.distribution(obs), self.policy.choices.to_choice(action)  # (B, 1)
        exists = policy.logits.gather(-1, choice.unsqueeze(-1)).view(-1) > -math.inf
        log_prob = torch.where(exists, policy.log_prob(choice).squeeze(-1), 0.0)  # (B,)
        loss, metrics = self.weigh(advantage, log_prob)
        return loss, metrics | {"entropy": policy.entropy().detach().mean()}


class ValueOfChoices(nn.Module):
    """V(s) that depends on which actions there are: observations (B, ...) to (B,); 0 where there is none."""

    def __init__(self, encoder: Encoder, trunk: nn.Module, choices: Choices) -> None:
        super().__init__()
        self.encoder, self.trunk, self.choices = encoder, trunk, choices

    def forward(self, obs: Obs) -> Tensor:
        scores = self.choices.score(self.trunk, self.encoder(obs), obs).unsqueeze(1)  # (B, 1, n)
        mask = self.choices.mask(obs)
        weights = Categorical(scores) if mask is None else Categorical.masked(scores, mask)
        return (weights.probs * scores).sum((-2, -1))
