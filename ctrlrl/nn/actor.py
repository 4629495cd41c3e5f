"""Stochastic policies for on-policy agents: Gaussian over Boxes, categorical over Discrete and MultiDiscrete actions.

Shapes: N rows, A action dimensions, D decisions, n choices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError
from ctrlrl.mirror import ReflectedBox
from ctrlrl.nn.discrete import Choices, make_choices
from ctrlrl.nn.distributions import Categorical, DiagonalGaussian, Distribution, TokenSequence
from ctrlrl.nn.encoder import Encoder, ObservationNormalizer
from ctrlrl.nn.mlp import MLP, Network, TokenNetwork, at_least_float32, knows_something
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState
from ctrlrl.nn.recurrence import Recurrence
from ctrlrl.tokens import TokenSpace
from ctrlrl.tree import Obs, map_obs


class Head(nn.Module, ABC):
    """What a network's outputs mean: a distribution over decisions, and how a decision becomes an action.

    Attributes:
        observation_space: what encoders read.
        inputs: how many numbers a network takes beside the observation's features.
        outputs: how many numbers it gives.
    """

    observation_space: gym.Space[Any]
    inputs: int
    outputs: int

    @abstractmethod
    def distribution(self, network: Network, features: Tensor, obs: Obs) -> Distribution:
        """Of what `network` makes of the features (B, F) of `obs`."""

    @abstractmethod
    def to_environment(self, decision: Tensor) -> Tensor:
        """Decisions as they were drawn, (B, A) or (B, D), to actions (B, ...) in the environment's units."""

    def mask(self, obs: Obs) -> Tensor | None:
        """Which choices exist (B, D, n), bool; None: all of them, or there are none to choose from."""
        return None

    def made(self, decision: Tensor) -> Tensor | None:
        """Which decisions (..., D) were made, bool; None: all of them."""
        return None

    def require_any(self, obs: Obs) -> None:
        """Raise `UsageError` where an observation leaves nothing to choose from."""


class GaussianHead(Head):
    """A diagonal Gaussian whose standard deviation does not depend on the observation.

    It lives in [-1, 1]^A where the action is bounded, and in the environment's units where it is not. What is drawn
    beyond the bounds is clipped for the environment only: log-probabilities are those of what was drawn.
    """

    _counterpart: Tensor | None

    def __init__(self, observation_space: gym.Space[Any], space: gym.spaces.Box, log_std: float) -> None:
        super().__init__()
        self.observation_space, self.scaling = observation_space, ActionScaling(space)
        self.inputs, self.outputs = 0, math.prod(space.shape)
        self.log_std = nn.Parameter(torch.full((self.outputs,), log_std))
        other_side = space.reflection.tensors()[0] if isinstance(space, ReflectedBox) else None  # explores alike
        self.register_buffer("_counterpart", other_side, persistent=False)

    def distribution(self, network: Network, features: Tensor, obs: Obs) -> DiagonalGaussian:
        mean, log_std = at_least_float32(network(features)), self.log_std
        if self._counterpart is None:
            return DiagonalGaussian(mean, log_std)
        return DiagonalGaussian(mean, (log_std + log_std[self._counterpart]) / 2)

    def to_environment(self, decision: Tensor) -> Tensor:
        return self.scaling.to_environment(decision)


class CategoricalHead(Head):
    """One categorical distribution for each decision, over the choices that exist (see `ctrlrl.nn.discrete`)."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        self.observation_space, self.inputs, self.outputs = choices.observation_space, choices.inputs, choices.outputs

    def distribution(self, network: Network, features: Tensor, obs: Obs) -> Categorical:
        return self.choices.distribution(network, features, obs)

    def to_environment(self, decision: Tensor) -> Tensor:
        return self.choices.to_environment(decision)

    def mask(self, obs: Obs) -> Tensor | None:
        return self.choices.mask(obs)

    def require_any(self, obs: Obs) -> None:
        self.choices.require_any(obs)


class TokenHead(Head):
    """Answers written token by token, by a `TokenNetwork`."""

    def __init__(self, observation_space: gym.Space[Any], space: TokenSpace) -> None:
        super().__init__()
        self.observation_space, self.inputs, self.outputs = observation_space, 0, space.length

    def distribution(self, network: Network, features: Tensor, obs: Obs) -> TokenSequence:
        assert isinstance(network, TokenNetwork)
        return TokenSequence(network, features)

    def to_environment(self, decision: Tensor) -> Tensor:
        return decision

    def made(self, decision: Tensor) -> Tensor:
        return decision >= 0


def make_head(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    algorithm: str,
    *,
    log_std: float,
    action_mask: str | None,
) -> Head:
    """The head for actions of `action_space`.

    Raises:
        UsageError: if there is none.
    """
    if isinstance(action_space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return CategoricalHead(make_choices(observation_space, action_space, action_mask))
    if action_mask is not None:
        raise UsageError(
            f"agent.action_mask names {action_mask!r}, but there is nothing to mask: the environment has {action_space}"
        )
    if isinstance(action_space, TokenSpace):
        return TokenHead(observation_space, action_space)
    if isinstance(action_space, gym.spaces.Box) and action_space.shape and (action_space.low < action_space.high).all():
        return GaussianHead(observation_space, action_space, log_std)
    raise UsageError(
        f"{algorithm} needs actions of a Box with low < high in every dimension, Discrete or MultiDiscrete; the "
        f"environment has {action_space}"
    )


class StochasticPolicy(Policy):
    """Encoder, recurrent layer if any, trunk and head. Extras: `decision`, what was drawn, (N, A) or (N, D).

    Raises:
        UsageError: answers of tokens are to be written by a network that does not write, or not as long ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        recurrence: Recurrence | None,
        trunk: nn.Module,
        head: Head,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__()
        if isinstance(head, TokenHead):
            if not isinstance(trunk, TokenNetwork):
                raise UsageError(
                    "answers of tokens need a language model: --language.model DIR; network=..., a Backbone that writes"
                )
            if trunk.length != head.outputs:
                raise UsageError(
                    f"answers have up to {head.outputs} tokens, and the language model writes up to {trunk.length}: "
                    f"--language.candidate-tokens {head.outputs}"
                )
        self.normalizer = normalizer  # what `encoder` refers to; here, so that it is saved with the policy
        self.encoder, self.recurrence, self.trunk, self.head = encoder, recurrence, trunk, head

    def initial_state(self, n: int) -> PolicyState:
        return {} if self.recurrence is None else self.recurrence.initial(n)

    def distribution(self, obs: Obs, state: PolicyState | None = None) -> Distribution:
        """Over decisions at observations (N, ...)."""
        return self._step(obs, state or {})[0]

    @property
    def pretrained(self) -> bool:
        return knows_something(self.trunk)

    def unroll(
        self, obs: Obs, state: PolicyState, start: Tensor
    ) -> tuple[Distribution, list[PolicyState], list[PolicyState]]:
        """Over decisions, (L * N, ...), at observations (L, N, ...) in a row, and states, as `Recurrence.unroll`."""
        assert self.recurrence is not None
        obs = map_obs(lambda x: x.flatten(0, 1), obs)
        features = self.encoder(obs)
        features, before, after = self.recurrence.unroll(features.view(*start.shape, -1), state, start)
        return self.head.distribution(self.trunk, features.flatten(0, 1), obs), before, after

    def mask(self, obs: Obs) -> Tensor | None:
        return self.head.mask(obs)

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """A sample if `explore`, else the mode.

        Raises:
            UsageError: if an observation's mask leaves nothing to choose from; names the environment.
        """
        self.head.require_any(obs)
        if self.recurrence is not None and not state:
            state = self.initial_state(len(next(iter(obs.values())) if isinstance(obs, dict) else obs))
        distribution, state = self._step(obs, state or {}, acting=True)
        decision = distribution.sample(self.require_generator()) if explore else distribution.mode
        return self.head.to_environment(decision), state, {"decision": decision}

    def _step(self, obs: Obs, state: PolicyState, *, acting: bool = False) -> tuple[Distribution, PolicyState]:
        features = self.encoder(obs)
        if self.recurrence is not None:
            features, state = self.recurrence(features, state)
        trunk = self.trunk.without_gradient if acting and isinstance(self.trunk, MLP) else self.trunk
        return self.head.distribution(trunk, features, obs), state
