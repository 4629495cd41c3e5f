"""Choosing among discrete actions: which ones there are, how networks score them, and the policy that draws one.

Shapes: B batch, D decisions, n choices of each, F features of a candidate.

An environment may say in its observations which actions exist (a mask), and what they are (candidates: features of
each). A network then scores either all actions at once, or one candidate after another; `Choices` is what differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError, nearest
from ctrlrl.nn.distributions import Categorical
from ctrlrl.nn.encoder import Encoder, ObservationNormalizer
from ctrlrl.nn.mlp import CandidateNetwork, Network, at_least_float32, knows_something
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.tree import Obs

MASKS = ("action_mask", "candidate_mask")
"""Observation entries that say which actions exist, unless another is named."""
CANDIDATES = "candidates"
"""The observation entry with the features of each action, (n, F)."""
DiscreteSpace: TypeAlias = gym.spaces.Discrete[Any] | gym.spaces.MultiDiscrete


class Choices(nn.Module, ABC):
    """The choices of a Discrete or MultiDiscrete action space, and how a network scores them.

    Attributes:
        observation_space: what encoders read: the environment's, without mask and candidates.
        shape: (D, n): decisions, and choices of each; a MultiDiscrete is padded to its largest dimension.
        inputs: how many numbers a network takes beside the observation's features.
        outputs: how many numbers it gives.
    """

    start: Tensor
    exists: Tensor
    inputs: int
    outputs: int

    def __init__(self, space: DiscreteSpace, observed: gym.Space[Any], mask: str | None) -> None:
        super().__init__()
        self.observation_space, self._mask, self._space_shape = observed, mask, space.shape or ()
        sizes = _sizes(space)
        self.shape = len(sizes), max(sizes)
        exists = torch.arange(self.shape[1]) < torch.tensor(sizes)[:, None]
        self.register_buffer("start", torch.as_tensor(np.atleast_1d(space.start)).flatten(), persistent=False)
        self.register_buffer("exists", exists, persistent=False)
        self._padded = not bool(exists.all())

    @abstractmethod
    def score(self, network: Network, features: Tensor, obs: Obs) -> Tensor:
        """What `network` makes of the features (B, ...) of `obs`: a number for every choice, (..., B, D * n).

        A policy's network gives (B, D * n), an ensemble of K critics (K, B, D * n).
        """

    def distribution(self, network: Network, features: Tensor, obs: Obs) -> Categorical:
        """Over the choices that exist, by a policy's network; logits (B, D, n)."""
        scores = self.score(network, features, obs)
        logits = scores.view(len(scores), *self.shape)
        mask = self.mask(obs)
        return Categorical(logits) if mask is None else Categorical.masked(logits, mask)

    def mask(self, obs: Obs) -> Tensor | None:
        """Which choices exist (B, D, n), bool; None: all of them, always."""
        if self._mask is None:
            if not self._padded:
                return None
            first = next(iter(obs.values())) if isinstance(obs, dict) else obs
            return self.exists.expand(len(first), *self.shape)
        assert isinstance(obs, dict)
        given = obs[self._mask]
        return (given != 0).view(len(given), *self.shape) & self.exists

    def require_any(self, obs: Obs) -> None:
        """Raise `UsageError` where an observation leaves nothing to choose from; waits for the device. An exported
        policy does not ask."""
        if self._mask is None or torch.compiler.is_exporting() or (mask := self.mask(obs)) is None:
            return
        empty = ~mask.any(-1).all(-1)  # (B,)
        if bool(empty.any()):
            raise UsageError(
                f"the observation's entry {self._mask!r} of environment {int(empty.nonzero()[0])} allows no action; an "
                "observation to act on must allow at least one. Only where an episode ends may a mask be empty (a "
                "vector environment that returns such observations to be acted on must be in SAME_STEP mode)"
            )

    def to_environment(self, choice: Tensor) -> Tensor:
        """Choices (B, D), counted from 0, to actions (B, *shape of the space)."""
        return (choice + self.start).view(len(choice), *self._space_shape)

    def to_choice(self, action: Tensor) -> Tensor:
        """Actions (B, *shape of the space) to choices (B, D), counted from 0."""
        return action.view(len(action), self.shape[0]) - self.start


class FixedChoices(Choices):
    """Actions that are always the same ones: a network scores all of them at once."""

    def __init__(self, space: DiscreteSpace, observed: gym.Space[Any], mask: str | None) -> None:
        super().__init__(space, observed, mask)
        self.inputs, self.outputs = 0, self.shape[0] * self.shape[1]

    def score(self, network: Network, features: Tensor, obs: Obs) -> Tensor:
        out: Tensor = network(features)
        return at_least_float32(out)


class CandidateChoices(Choices):
    """Candidates that differ from observation to observation: one network scores each of them by its features, or, a
    `CandidateNetwork`, all of an observation together.

    The order of the candidates carries no meaning: their scores are permuted as they are.
    """

    def __init__(self, space: DiscreteSpace, observed: gym.Space[Any], mask: str | None, *, features: int) -> None:
        super().__init__(space, observed, mask)
        self.inputs, self.outputs = features, 1

    def score(self, network: Network, features: Tensor, obs: Obs) -> Tensor:
        assert isinstance(obs, dict)
        if isinstance(network, CandidateNetwork):
            mask = self.mask(obs)
            together: Tensor = network(features, obs[CANDIDATES], None if mask is None else mask[:, 0])
            return at_least_float32(together)
        candidates = obs[CANDIDATES].to(torch.float32)  # (B, n, F)
        pairs = torch.cat([features.unsqueeze(1).expand(-1, candidates.shape[1], -1), candidates], -1)
        out: Tensor = network(pairs.flatten(0, 1))  # (..., B * n, 1)
        return at_least_float32(out).view(*out.shape[:-2], *candidates.shape[:2])


def make_choices(
    observation_space: gym.Space[Any],
    action_space: DiscreteSpace,
    mask: str | None = None,
) -> Choices:
    """The choices of `action_space`; which of them exist is in the observation's entry `mask`, where it has one.

    A mask is (n,), or (D, n) for MultiDiscrete; by default it is the entry `action_mask` or `candidate_mask`. An entry
    `candidates` (n, F) makes the actions candidates.

    Raises:
        UsageError: if there is no such entry, its shape is another, or nothing else is observed.
    """
    entries = dict(observation_space.spaces) if isinstance(observation_space, gym.spaces.Dict) else {}
    if mask is not None and mask not in entries:
        there = f"its entries are {', '.join(entries)}" if entries else f"it is one {observation_space}"
        raise UsageError(f"no mask {mask!r} in the observation;{nearest(mask, entries)} {there}")
    name = mask or next((name for name in MASKS if name in entries), None)
    discrete = isinstance(action_space, gym.spaces.Discrete)
    sizes = _sizes(action_space)
    n = max(sizes)
    if name is not None:
        entry, expected = entries.pop(name), (n,) if discrete else (len(sizes), n)
        if entry.shape != expected:
            raise UsageError(
                f"the observation's entry {name!r} is {entry}; as a mask of {action_space} it must be {expected}. Name "
                "the mask in agent.action_mask, or the entry otherwise if it is none"
            )
    candidates = entries.pop(CANDIDATES, None) if discrete else None
    observed = observation_space if name is None and candidates is None else gym.spaces.Dict(entries)
    if isinstance(observed, gym.spaces.Dict) and not observed.spaces:
        raise UsageError("the observation has nothing but actions in it; add an entry that says what state they are in")
    if candidates is None:
        return FixedChoices(action_space, observed, name)
    shape = candidates.shape or ()
    if len(shape) != 2 or shape[0] != n:
        raise UsageError(
            f"the observation's entry {CANDIDATES!r} is {candidates}; as the features of {n} actions it must be "
            f"({n}, features). Give it another name if it is none"
        )
    return CandidateChoices(action_space, observed, name, features=shape[1])


def _sizes(space: DiscreteSpace) -> list[int]:
    """How many choices each decision has."""
    return [int(space.n)] if isinstance(space, gym.spaces.Discrete) else [int(n) for n in space.nvec.flatten()]


def require_discrete(space: gym.Space[Any], algorithm: str) -> gym.spaces.Discrete[Any]:
    """`space` as a Discrete, or a `UsageError` that says what to use instead."""
    if isinstance(space, gym.spaces.Discrete):
        return space
    instead = {
        gym.spaces.Box: ", for which there are sac and td3",
        gym.spaces.MultiDiscrete: ", for which there is ppo",
    }
    raise UsageError(f"{algorithm} needs Discrete actions; the environment has {space}{instead.get(type(space), '')}")


class CategoricalPolicy(Policy):
    """One categorical distribution per decision over the choices that exist.

    Args:
        encoder: of `choices.observation_space`, or a part of it.
        trunk: from the encoder's features, with `choices.inputs` numbers besides, to `choices.outputs`.
        choices: of the environment.
        normalizer: what `encoder` refers to, if anything; here, so that it is saved with the policy.
    """

    def __init__(
        self, encoder: Encoder, trunk: nn.Module, choices: Choices, normalizer: ObservationNormalizer | None = None
    ) -> None:
        super().__init__()
        self.normalizer, self.encoder, self.trunk, self.choices = normalizer, encoder, trunk, choices

    def distribution(self, obs: Obs, state: PolicyState | None = None) -> Categorical:
        """Distribution over choices, logits (B, D, n)."""
        return self.choices.distribution(self.trunk, self.encoder(obs), obs)

    @property
    def pretrained(self) -> bool:
        return knows_something(self.trunk)

    def mask(self, obs: Obs) -> Tensor | None:
        return self.choices.mask(obs)

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """A sample if `explore`, else the likeliest action; of the extras, `entropy` (N,) is the policy's here.

        Raises:
            UsageError: if an observation's mask leaves nothing to choose from; names the environment.
        """
        self.choices.require_any(obs)
        distribution = self.distribution(obs, state)
        choice = distribution.sample(self.require_generator()) if explore else distribution.mode
        return self.choices.to_environment(choice), state or {}, {"entropy": distribution.entropy().sum(-1)}
