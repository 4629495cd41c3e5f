"""Policies: the deployable modules. Raw observation in, environment action out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError
from ctrlrl.nn.distributions import TanhNormal
from ctrlrl.nn.encoder import Encoder, ObservationNormalizer
from ctrlrl.nn.mlp import at_least_float32
from ctrlrl.tokens import TokenSpace
from ctrlrl.tree import Obs

PolicyState = dict[str, Tensor]
"""What a policy remembers between steps (chunk queues, recurrent states): tensors (N, ...), one row per environment."""


class Policy(nn.Module, ABC):
    """Acts on a batch of observations. The same object acts in training, evaluation and export.

    A policy that remembers keeps everything in `PolicyState`, which the caller carries and the run saves; `act` never
    changes its arguments.
    """

    generator: torch.Generator | None = None
    """Source of exploration noise: the agent's own."""
    extras_at_next: bool = False
    """Whether the algorithm needs the extras at the next observation too (`Batch.next_extras`)."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def require_generator(self) -> torch.Generator:
        """The generator, or a `UsageError` where there is none."""
        if self.generator is None:
            raise UsageError("exploration needs a random generator: set policy.generator = torch.Generator()")
        return self.generator

    def initial_state(self, n: int) -> PolicyState:
        """The memory of `n` environments at the start of an episode; `{}` for a policy without memory."""
        return {}

    def reset(self, state: PolicyState, mask: Tensor) -> PolicyState:
        """`state` with the rows where `mask` (N,) is true set back to the start of an episode."""
        if not state:
            return state
        fresh = self.initial_state(len(mask))
        return {
            name: torch.where(mask.view(-1, *[1] * (value.dim() - 1)), fresh[name], value)
            for name, value in state.items()
        }

    @property
    def pretrained(self) -> bool:
        """Whether it can do something before it has learned, and acts by itself until learning starts."""
        return False

    def warm_up(self, extras: dict[str, Tensor], generator: torch.Generator) -> Tensor | None:
        """What to do before learning starts, (N, ...) in the environment's units, where `act` gave `extras`; None:
        uniformly random actions."""
        return None

    def mask(self, obs: Obs) -> Tensor | None:
        """Which choices of a discrete action exist in each of `obs` (N, ...): (N, D, n), bool; None: all of them."""
        return None

    @abstractmethod
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """Actions (N, ...) in the environment's units for observations (N, ...), the new state, and extras (N, ...)."""


class ActionScaling(nn.Module):
    """The affine map between a Box's units and [-1, 1]^A, for bounds that may differ per dimension.

    Dimensions without two finite bounds keep the environment's units.
    """

    low: Tensor
    high: Tensor
    center: Tensor
    half_range: Tensor

    def __init__(self, space: gym.spaces.Box) -> None:
        super().__init__()
        self.register_buffer("low", torch.as_tensor(space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(space.high, dtype=torch.float32))
        self.register_buffer("center", torch.empty_like(self.low), persistent=False)
        self.register_buffer("half_range", torch.empty_like(self.low), persistent=False)
        self._derive()
        self.register_load_state_dict_post_hook(ActionScaling._derive)  # type: ignore[no-untyped-call]

    def _derive(self, *loading: object) -> None:
        """Make the other two numbers of the bounds, which may just have been loaded."""
        low, high = self.low.double(), self.high.double()  # whose sum and difference may be beyond float32
        bounded = low.isfinite() & high.isfinite()
        self.center.copy_(torch.where(bounded, (low + high) / 2, 0.0))
        self.half_range.copy_(torch.where(bounded, (high - low) / 2, 1.0))

    def to_unit(self, action: Tensor) -> Tensor:
        """(..., *shape) in the environment's units to (..., A) in [-1, 1]."""
        return ((action - self.center) / self.half_range).flatten(-self.low.dim()).to(torch.float32)

    def to_environment(self, unit: Tensor) -> Tensor:
        """(..., A) in [-1, 1] to (..., *shape) within the bounds, which rounding alone could miss."""
        low = self.low
        if low.dim() != 1:
            unit = unit.reshape(*unit.shape[:-1], *low.shape)
        return torch.addcmul(self.center, unit, self.half_range).clamp_(low, self.high)


def require_bounded_box(space: gym.Space[Any], algorithm: str) -> gym.spaces.Box:
    """`space` as a Box with finite bounds, or a `UsageError` that says what to do instead."""
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        instead = "are sac-discrete and ppo" if isinstance(space, gym.spaces.Discrete) else "is ppo"
        raise UsageError(
            f"{algorithm} needs continuous actions (Box); the environment has {space}, for which there {instead}"
        )
    if isinstance(space, TokenSpace):
        raise UsageError(f"{algorithm} needs numbers for actions, and these are tokens: take bc, iql-tokens or ppo")
    if not isinstance(space, gym.spaces.Box) or not len(space.shape):
        raise UsageError(f"{algorithm} needs a Box of actions with at least one dimension; the environment has {space}")
    if not space.is_bounded("both"):
        raise UsageError(
            f"{algorithm} needs finite action bounds; the environment has low={space.low.tolist()}, "
            f"high={space.high.tolist()}. Wrap it in gymnasium.wrappers.RescaleAction or give its Box finite bounds"
        )
    if not (space.low < space.high).all():
        raise UsageError(f"{algorithm} needs low < high in every action dimension; the environment has {space}")
    return space


class SquashedGaussianPolicy(Policy):
    """tanh-Gaussian policy over a bounded Box: features to mean and log standard deviation (state-dependent)."""

    def __init__(
        self,
        encoder: Encoder,
        trunk: nn.Module,
        space: gym.spaces.Box,
        log_std_bounds: tuple[float, float],
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer  # what `encoder` refers to; here, so that it is saved with the policy
        self.encoder, self.trunk, self.scaling = encoder, trunk, ActionScaling(space)
        self.log_std_bounds = log_std_bounds

    def distribution(self, obs: Obs, state: PolicyState | None = None) -> TanhNormal:
        """Distribution over actions (B, A) in [-1, 1]."""
        mean, log_std = at_least_float32(self.trunk(self.encoder(obs))).chunk(2, dim=-1)
        return TanhNormal(mean, log_std.clamp(*self.log_std_bounds))

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """A sample if `explore`, else the mode; extras are empty, since SAC learns from the action alone."""
        distribution = self.distribution(obs, state)
        unit = distribution.sample(self.require_generator()) if explore else distribution.mode
        return self.scaling.to_environment(unit), state or {}, {}


class DeterministicPolicy(Policy):
    """tanh of a network's output over a bounded Box, with Gaussian noise of standard deviation `noise` to explore.

    The noise is of the action in [-1, 1]^A, whatever the actuators' range, and what leaves the bounds is clipped.
    """

    def __init__(
        self,
        encoder: Encoder,
        trunk: nn.Module,
        space: gym.spaces.Box,
        noise: float,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer  # what `encoder` refers to; here, so that it is saved with the policy
        self.encoder, self.trunk, self.scaling = encoder, trunk, ActionScaling(space)
        self.noise = noise

    def action(self, obs: Obs) -> Tensor:
        """The action (B, A) in [-1, 1], with its gradient."""
        return torch.tanh(at_least_float32(self.trunk(self.encoder(obs))))

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """The policy's action, with noise if `explore`; extras are empty."""
        unit = self.action(obs)
        if explore:
            noise = torch.randn(unit.shape, generator=self.require_generator(), device=unit.device)
            unit = torch.add(unit, noise, alpha=self.noise).clamp_(-1, 1)
        return self.scaling.to_environment(unit), state or {}, {}
