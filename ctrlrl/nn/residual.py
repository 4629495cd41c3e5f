"""Policies on top of a frozen one, the base: what it does, and a correction that is learned.

Shapes: B batch, N environments, A action dimensions.
Actions of both live in [-1, 1]^A, where the base's are mapped by the environment's bounds. A base is any policy, with
whatever memory (chunk queues, recurrent states); it acts by its mode, and its memory is the whole policy's.

What the base does at an observation is `extras["base_action"]` of a transition, and at the next one
`next_extras["base_action"]`: by its memory there, before the row's is set back at an episode's end.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.errors import BadBaseAction, UsageError
from ctrlrl.nn.distributions import TanhNormal
from ctrlrl.nn.encoder import Encoder, ObservationNormalizer, critic_groups, policy_groups
from ctrlrl.nn.mlp import at_least_float32
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState
from ctrlrl.tree import Obs, obs_items

BASE = "base_action"
"""What the base's action (N, A) in [-1, 1] is called, in extras and among what networks read."""
BEYOND = 1e-4
"""By which a base's action may be beyond the bounds, in [-1, 1]: by rounding."""


def with_base(obs: Obs, base: Tensor) -> Obs:
    """Observations with the base's action among them."""
    return {**dict(obs_items(obs)), BASE: base}


def with_base_space(space: gym.Space[Any], dim: int) -> gym.spaces.Dict:
    """The space of what `with_base` makes."""
    spaces = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"obs": space}
    if BASE in spaces:
        raise UsageError(f"the environment has an observation {BASE!r}, which is what the base's action is called here")
    return gym.spaces.Dict({**spaces, BASE: gym.spaces.Box(-1, 1, (dim,))})


def groups_of(
    observation_space: gym.Space[Any], policy_obs: tuple[str, ...] | None, critic_obs: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Entries of `with_base`'s observations that a policy and critics read, without the base's action: those that are
    named, else by group, else all."""
    own = tuple(observation_space.spaces) if isinstance(observation_space, gym.spaces.Dict) else ("obs",)
    policy = policy_obs or policy_groups(observation_space) or own
    return policy, critic_obs or critic_groups(observation_space) or own


class Base(nn.Module):
    """A frozen policy under another.

    Args:
        policy: it.
        space: of the actions.
    """

    def __init__(self, policy: Policy, space: gym.spaces.Box) -> None:
        super().__init__()
        self.policy, self.scaling = policy.requires_grad_(False).eval(), ActionScaling(space)

    def train(self, mode: bool = True) -> Base:
        """It stays as it is."""
        return super().train(False)

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState, where: Callable[[int], str] = "environment {}".format
    ) -> tuple[Tensor, PolicyState]:
        """Its actions (N, A) in [-1, 1], and its memory; `where` says what a row is, in errors.

        Raises:
            BadBaseAction: one is not finite, or beyond the bounds.
        """
        action, state, _ = self.policy.act(obs, state, explore=False)
        wanted = (len(obs_items(obs)[0][1]), *self.scaling.low.shape)
        if action.shape != wanted:
            raise UsageError(f"the base policy gave actions {tuple(action.shape)}; expected {wanted}")
        unit = self.scaling.to_unit(action)
        if not torch.compiler.is_compiling() and not bool(unit.abs().max() <= 1 + BEYOND):
            row = int((~(unit.abs().amax(-1) <= 1 + BEYOND)).nonzero()[0])
            raise BadBaseAction(
                f"the base policy gave the action {action[row].tolist()} in {where(row)}; actions must be finite "
                f"and within {self.scaling.low.tolist()} and {self.scaling.high.tolist()}",
                {name: value[row] for name, value in obs_items(obs)} | {"action": action[row], "where": where(row)},
            )
        return unit.clamp(-1, 1), state


class OverBase(Policy):
    """A policy over a base, whose memory is its own.

    Attributes:
        base: the base.
        scaling: of the environment's actions.
    """

    extras_at_next = True

    def __init__(self, base: Base, space: gym.spaces.Box, warm_up_noise: float) -> None:
        super().__init__()
        self.base, self.scaling, self.warm_up_noise = base, ActionScaling(space), warm_up_noise

    def initial_state(self, n: int) -> PolicyState:
        return self.base.policy.initial_state(n)

    def reset(self, state: PolicyState, mask: Tensor) -> PolicyState:
        return self.base.policy.reset(state, mask)

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """What the two do together, to explore with noise; extras are the base's action."""
        if not state:
            state = self.initial_state(len(obs_items(obs)[0][1]))
        base, state = self.base.act(obs, state)
        unit = self.together(with_base(obs, base), explore)
        return self.scaling.to_environment(unit), state, {BASE: base}

    @abstractmethod
    def together(self, obs: Obs, explore: bool) -> Tensor:
        """The actions (N, A) in [-1, 1] at observations with the base's."""

    def warm_up(self, extras: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Before learning starts: the base's action with uniform noise (N, ...), in the environment's units."""
        base = extras[BASE]
        noise = torch.rand(base.shape, generator=generator).to(base.device) * 2 - 1
        return self.scaling.to_environment((base + self.warm_up_noise * noise).clamp(-1, 1))


class ResidualPolicy(OverBase):
    """clip(b + scale * tanh(network(s, b)), -1, 1), to explore with clipped Gaussian noise inside the clip.

    Args:
        base: b.
        encoder: of observations with the base's action.
        trunk: features to (B, A); its last layer begins at zero, so that the whole begins as the base.
        space: of the environment's actions.
        scale: of the residual, as a share of half the range.
        noise: standard deviation.
        noise_clip: where the noise is clipped.
        warm_up_noise: half width of the uniform noise before learning starts.
        normalizer: what `encoder` refers to.
    """

    def __init__(
        self,
        base: Base,
        encoder: Encoder,
        trunk: nn.Module,
        space: gym.spaces.Box,
        scale: float,
        noise: float,
        noise_clip: float,
        warm_up_noise: float,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__(base, space, warm_up_noise)
        self.normalizer = normalizer  # what `encoder` refers to; here, so that it is saved with the policy
        self.encoder, self.trunk = encoder, zero_last_layer(trunk)
        with torch.no_grad():
            device = next(trunk.parameters(), torch.empty(0)).device
            if bool(trunk(torch.ones(2, encoder.out_features, device=device)).any()):
                raise UsageError("network=... must end in a linear layer, so that the residual can begin at zero")
        self.scale, self.noise, self.noise_clip = scale, noise, noise_clip

    def residual(self, obs: Obs) -> Tensor:
        """The correction (B, A), within +-scale, at observations with the base's action."""
        return self.scale * torch.tanh(at_least_float32(self.trunk(self.encoder(obs))))

    def together(self, obs: Obs, explore: bool) -> Tensor:
        assert isinstance(obs, dict)
        unit = obs[BASE] + self.residual(obs)
        if explore:
            noise = torch.randn(unit.shape, generator=self.require_generator(), device=unit.device)
            unit = unit + (self.noise * noise).clamp(-self.noise_clip, self.noise_clip)
        return unit.clamp(-1, 1)


class GaussianResidualPolicy(OverBase):
    """clip(b + scale * e, -1, 1) with e of a tanh-Gaussian in [-1, 1]^A, of the observation alone (Policy Decorator,
    Yuan et al. 2024, arXiv:2412.13630).

    To explore, each action has the residual with a chance that rises from 0 to 1 over `ramp` environment steps; without
    exploration it always has.

    Args:
        base: b.
        encoder: of observations.
        trunk: features to (B, 2 A); its last layer begins at a hundredth.
        space: of the environment's actions.
        scale: of the residual, as a share of half the range.
        log_std_bounds: of the Gaussian.
        ramp: environment steps.
        warm_up_noise: half width of the uniform noise before learning starts.
        normalizer: what `encoder` refers to.
    """

    steps: Tensor
    """Environment steps so far, 0-d."""

    def __init__(
        self,
        base: Base,
        encoder: Encoder,
        trunk: nn.Module,
        space: gym.spaces.Box,
        scale: float,
        log_std_bounds: tuple[float, float],
        ramp: int,
        warm_up_noise: float,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__(base, space, warm_up_noise)
        self.normalizer = normalizer
        self.encoder, self.trunk = encoder, zero_last_layer(trunk, 0.01)
        self.scale, self.log_std_bounds, self.ramp = scale, log_std_bounds, ramp
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def distribution(self, obs: Obs, state: PolicyState | None = None) -> TanhNormal:
        """Of the residual (B, A) in [-1, 1], before it is scaled."""
        mean, log_std = at_least_float32(self.trunk(self.encoder(obs))).chunk(2, dim=-1)
        return TanhNormal(mean, log_std.clamp(*self.log_std_bounds))

    def add(self, obs: Obs, residual: Tensor) -> Tensor:
        """The actions (B, A) in [-1, 1] of a residual (B, A) in [-1, 1]."""
        assert isinstance(obs, dict)
        return (obs[BASE] + self.scale * residual).clamp(-1, 1)

    def together(self, obs: Obs, explore: bool) -> Tensor:
        residuals = self.distribution(obs)
        if not explore:
            return self.add(obs, residuals.mode)
        self.steps += len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        residual = residuals.sample(self.require_generator())
        chance = torch.rand(len(residual), 1, generator=self.require_generator(), device=residual.device)
        return self.add(obs, torch.where(chance * self.ramp < self.steps, residual, 0.0))


def zero_last_layer(trunk: nn.Module, share: float = 0.0) -> nn.Module:
    """Multiply the weights of a network's last linear layer by `share`, and set its offsets to zero."""
    last = [layer for layer in trunk.modules() if isinstance(layer, nn.Linear)][-1:]
    for layer in last:
        with torch.no_grad():
            layer.weight.mul_(share)
            if layer.bias is not None:
                layer.bias.zero_()
    return trunk


class CallablePolicy(Policy):
    """A function of the user's as a policy: `function(obs)` gives actions (N, ...) in the environment's units for
    observations (N, ...), tensors or a dict of them. It must remember nothing: it is asked more than once in a step."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        action = torch.as_tensor(self.function(obs), dtype=torch.float32)
        return action.to(obs_items(obs)[0][1].device), state or {}, {}


class LinearFeedback(Policy):
    """u = clip(offset - (s - target) K^T, low, high): a state feedback, of LQR say.

    Args:
        gain: K (A, S).
        space: of the actions, in whose bounds u is kept.
        target: (S,) of the state; zeros by default.
        offset: (A,) u at the target; zeros by default.
        group: the entry of the observation that is the state, where it is a dict.
        columns: which S numbers of it; all by default.
    """

    def __init__(
        self,
        gain: Any,
        space: gym.spaces.Box,
        *,
        target: Any = 0.0,
        offset: Any = 0.0,
        group: str | None = None,
        columns: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.group, self.scaling = group, ActionScaling(space)
        self.columns: Tensor | None  # a tensor: runtimes of bundles know index_select, and no other indexing
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)
        self.gain = nn.Parameter(torch.as_tensor(gain, dtype=torch.float32), requires_grad=False)
        self.target = nn.Parameter(torch.as_tensor(target, dtype=torch.float32), requires_grad=False)
        self.offset = nn.Parameter(torch.as_tensor(offset, dtype=torch.float32), requires_grad=False)

    def state_of(self, obs: Obs) -> Tensor:
        """(N, S) of observations (N, ...)."""
        if isinstance(obs, dict):
            if self.group is None and len(obs) > 1:
                raise UsageError(f"which of {', '.join(obs)} is the state? group=... says it")
            obs = obs[self.group] if self.group is not None else next(iter(obs.values()))
        return obs.float() if self.columns is None else obs.index_select(1, self.columns).float()

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        action = self.offset - (self.state_of(obs) - self.target) @ self.gain.T
        low, high = self.scaling.low, self.scaling.high
        return action.view(-1, *low.shape).clamp(low, high), state or {}, {}


class PID(LinearFeedback):
    """u = clip(offset + K_p e + K_i int e dt - K_d de/dt, low, high) for errors e = target - s of A measured numbers.

    The derivative is of the measurement, so that a target that jumps gives no kick, and the integral stands still where
    u is at a bound and the error would push it further (conditional integration, Astrom and Hagglund 2006, 3.5). Its
    memory, zeros at first, is the integral, the last measurement and the number of steps, per environment.

    Args:
        kp: (A,) gains.
        ki: per s.
        kd: s.
        dt: s between two actions.
        space: of the actions.
        columns: the A numbers of the observation that are measured.
        target: (A,).
        offset: (A,).
        group: the entry of the observation that has them, where it is a dict.
    """

    def __init__(
        self,
        kp: Any,
        ki: Any,
        kd: Any,
        dt: float,
        space: gym.spaces.Box,
        *,
        columns: tuple[int, ...],
        target: Any = 0.0,
        offset: Any = 0.0,
        group: str | None = None,
    ) -> None:
        super().__init__(torch.zeros(1, 1), space, target=target, offset=offset, group=group, columns=columns)
        self.dt, self._dim = dt, math.prod(space.shape)
        if len(columns) != self._dim:
            raise UsageError(f"a PID measures as many numbers as it commands, {self._dim}; columns are {columns}")
        gains = [torch.as_tensor(k, dtype=torch.float32).expand(self._dim) for k in (kp, ki, kd)]
        self.gains = nn.Parameter(torch.stack(gains), requires_grad=False)

    def initial_state(self, n: int) -> PolicyState:
        zeros = torch.zeros(n, self._dim, device=self.device)
        return {"integral": zeros, "last": zeros, "steps": torch.zeros(n, dtype=torch.int64, device=self.device)}

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        measured = self.state_of(obs)
        state = state or self.initial_state(len(measured))
        kp, ki, kd = self.gains
        error, integral = self.target - measured, state["integral"]
        moved = (measured - state["last"]) / self.dt
        speed = torch.where((state["steps"] > 0)[:, None], moved, 0.0)
        further = integral + error * self.dt
        wanted = self.offset + kp * error + ki * further - kd * speed
        action = wanted.clamp(self.scaling.low.flatten(), self.scaling.high.flatten())
        winds_up = (wanted != action) & ((wanted - action) * ki * error > 0)
        integral = torch.where(winds_up, integral, further)
        return (
            action.view(-1, *self.scaling.low.shape),
            {"integral": integral, "last": measured, "steps": state["steps"] + 1},
            {},
        )
