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
from ctrlrl.nn.distributions import Categorical, DiagonalGaussian
from ctrlrl.nn.encoder import Encoder, ObservationNormalizer
from ctrlrl.nn.mlp import at_least_float32
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState
from ctrlrl.nn.recurrence import Recurrence
from ctrlrl.tree import Obs, map_obs


class Head(nn.Module, ABC):
    """What a network's outputs mean: a distribution over decisions, and how a decision becomes an action."""

    outputs: int
    """How many numbers the network gives."""

    @abstractmethod
    def distribution(self, out: Tensor) -> DiagonalGaussian | Categorical:
        """Of the network's outputs (..., outputs)."""

    @abstractmethod
    def to_environment(self, decision: Tensor) -> Tensor:
        """Decisions as they were drawn, (N, A) or (N, D), to actions (N, ...) in the environment's units."""


class GaussianHead(Head):
    """A diagonal Gaussian whose standard deviation does not depend on the observation.

    It lives in [-1, 1]^A where the action is bounded, and in the environment's units where it is not. What is drawn
    beyond the bounds is clipped for the environment only: log-probabilities are those of what was drawn.
    """

    def __init__(self, space: gym.spaces.Box, log_std: float) -> None:
        super().__init__()
        self.scaling = ActionScaling(space)
        self.outputs = math.prod(space.shape)
        self.log_std = nn.Parameter(torch.full((self.outputs,), log_std))

    def distribution(self, out: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(out, self.log_std.expand_as(out))

    def to_environment(self, decision: Tensor) -> Tensor:
        return self.scaling.to_environment(decision)


class CategoricalHead(Head):
    """One categorical distribution for each decision: one for Discrete, one per dimension for MultiDiscrete."""

    start: Tensor
    exists: Tensor

    def __init__(self, space: gym.spaces.Discrete | gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        if isinstance(space, gym.spaces.Discrete):
            counts, start = torch.tensor([int(space.n)]), torch.tensor([int(space.start)])
        else:
            counts = torch.as_tensor(space.nvec).flatten()
            start = torch.as_tensor(space.start).flatten()
        self.shape = space.shape or ()
        most = int(counts.max())
        self.outputs = len(counts) * most
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("exists", torch.arange(most) < counts[:, None], persistent=False)  # (D, n)

    def distribution(self, out: Tensor) -> Categorical:
        logits = out.view(*out.shape[:-1], *self.exists.shape)
        return Categorical.masked(logits, self.exists.expand_as(logits))

    def to_environment(self, decision: Tensor) -> Tensor:
        return (decision + self.start).reshape(len(decision), *self.shape)


def make_head(space: gym.Space[Any], algorithm: str, log_std: float) -> Head:
    """The head for actions of `space`.

    Raises:
        UsageError: if there is none.
    """
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return CategoricalHead(space)
    if isinstance(space, gym.spaces.Box) and space.shape and (space.low < space.high).all():
        return GaussianHead(space, log_std)
    raise UsageError(
        f"{algorithm} needs actions of a Box with low < high in every dimension, Discrete or MultiDiscrete; the "
        f"environment has {space}"
    )


class StochasticPolicy(Policy):
    """Encoder, recurrent layer if any, trunk and head. Extras: `decision`, what was drawn, (N, A) or (N, D)."""

    def __init__(
        self,
        encoder: Encoder,
        recurrence: Recurrence | None,
        trunk: nn.Module,
        head: Head,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer  # what `encoder` refers to; here, so that it is saved with the policy
        self.encoder, self.recurrence, self.trunk, self.head = encoder, recurrence, trunk, head

    def initial_state(self, n: int) -> PolicyState:
        return {} if self.recurrence is None else self.recurrence.initial(n)

    def distribution(self, obs: Obs, state: PolicyState | None = None) -> DiagonalGaussian | Categorical:
        """Over decisions at observations (N, ...)."""
        return self._step(obs, state or {})[0]

    def unroll(
        self, obs: Obs, state: PolicyState, start: Tensor
    ) -> tuple[DiagonalGaussian | Categorical, list[PolicyState], list[PolicyState]]:
        """Over decisions (L, N, ...) at observations (L, N, ...) in a row, and states, as `Recurrence.unroll`."""
        assert self.recurrence is not None
        features = self.encoder(map_obs(lambda x: x.flatten(0, 1), obs)).unflatten(0, start.shape)
        features, before, after = self.recurrence.unroll(features, state, start)
        return self.head.distribution(at_least_float32(self.trunk(features))), before, after

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """A sample if `explore`, else the mode."""
        if self.recurrence is not None and not state:
            state = self.initial_state(len(next(iter(obs.values())) if isinstance(obs, dict) else obs))
        distribution, state = self._step(obs, state or {})
        decision = distribution.sample(self.require_generator()) if explore else distribution.mode
        return self.head.to_environment(decision), state, {"decision": decision}

    def _step(self, obs: Obs, state: PolicyState) -> tuple[DiagonalGaussian | Categorical, PolicyState]:
        features = self.encoder(obs)
        if self.recurrence is not None:
            features, state = self.recurrence(features, state)
        return self.head.distribution(at_least_float32(self.trunk(features))), state
