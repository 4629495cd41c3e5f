"""Observation groups: terms one after the other, with noise, delay and history."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ctrlrl.envs.spec import Obs
from ctrlrl.envs.world import World
from ctrlrl.errors import UsageError


class Delay:
    """Values of the last control steps, of which each row gets the one that is its lag old.

    Attributes:
        past: (N, longest + 1, size), the newest first.
        lag: (N, 1) int64, of this episode.
    """

    def __init__(self, world: World, size: int, steps: tuple[int, int]) -> None:
        self._shortest, longest = steps
        if not 0 <= self._shortest <= longest:
            raise UsageError(f"a delay takes control steps from 0 on, the fewest first, got {steps}")
        self._choices = longest - self._shortest + 1
        self.past = torch.zeros(world.num_envs, longest + 1, size, device=world.device)
        self.lag = torch.zeros(world.num_envs, 1, dtype=torch.int64, device=world.device)
        self._rows = torch.arange(world.num_envs, device=world.device)

    def push(self, value: Tensor) -> Tensor:
        """Take in the (N, size) of now; returns those that arrive."""
        self.past.copy_(torch.cat([value[:, None], self.past[:, :-1]], 1))
        return self.past[self._rows, self.lag[:, 0]]

    def begin(self, world: World, rows: Tensor, value: Tensor) -> None:
        """Draw the lag of a new episode where `rows` (N,) bool, before which `value` (N, size) was all there was."""
        lag = self._shortest + (world.random.uniform(1) * self._choices).to(torch.int64)
        self.lag.copy_(torch.where(rows[:, None], lag, self.lag))
        self.past.copy_(torch.where(rows[:, None, None], value[:, None], self.past))


class Group:
    """One observation group.

    Attributes:
        size: of the whole vector.
        names: of the terms, with their places in it.
    """

    def __init__(self, name: str, terms: Mapping[str, Obs], world: World) -> None:
        self._terms = list(terms.values())
        self._delays: list[Delay | None] = []
        self._history: list[Tensor | None] = []
        self._sizes: list[int] = []
        noise: list[float] = []
        self.names: dict[str, slice] = {}
        self.size = 0
        for label, term in terms.items():
            value = require(f"observation {name}/{label}", term.of(world), world)
            if value.dim() != 2:
                raise UsageError(_wrong(f"observation {name}/{label}", f"({world.num_envs}, size)", value))
            if term.history < 1:
                raise UsageError(f"observation {name}/{label} has a history of {term.history}; 1 is without one")
            size = value.shape[1]
            self._sizes.append(size)
            noise += [term.noise] * size
            self._delays.append(Delay(world, size, term.delay) if term.delay != (0, 0) else None)
            past = torch.zeros(world.num_envs, term.history, size, device=world.device)
            self._history.append(past if term.history > 1 else None)
            self.names[label] = slice(self.size, self.size + size * term.history)
            self.size += size * term.history
        self._noise = torch.tensor(noise, device=world.device) if any(noise) else None
        self._plain = all(past is None for past in self._history)

    def observe(self, world: World) -> Tensor:
        """(N, size) after a control step."""
        values = [term.of(world) for term in self._terms]
        for i, delay in enumerate(self._delays):
            if delay is not None:
                values[i] = delay.push(values[i])
        return self._with_history(world, values, lambda past, now: torch.cat([past[:, 1:], now[:, None]], 1))

    def first(self, world: World, rows: Tensor) -> Tensor:
        """(N, size) at an episode's start, where `rows` (N,) bool; anything elsewhere."""
        values = [term.of(world) for term in self._terms]
        for value, delay in zip(values, self._delays, strict=True):
            if delay is not None:
                delay.begin(world, rows, value)
        return self._with_history(world, values, lambda past, now: torch.where(rows[:, None, None], now[:, None], past))

    def state(self) -> dict[str, Tensor]:
        """(N, ...) each, live."""
        delays = {f"delay/{i}": d.past for i, d in enumerate(self._delays) if d is not None}
        lags = {f"lag/{i}": d.lag for i, d in enumerate(self._delays) if d is not None}
        return delays | lags | {f"history/{i}": past for i, past in enumerate(self._history) if past is not None}

    def _with_history(
        self, world: World, values: list[Tensor], following: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """(N, size) of terms' `values`; `following` gives a history (N, H, size) from itself and the value of now."""
        now = self._noisy(world, values)
        if self._plain:
            return now
        parts = list(torch.split(now, self._sizes, 1))
        for i, past in enumerate(self._history):
            if past is not None:
                past.copy_(following(past, parts[i]))
                parts[i] = past.flatten(1)
        return torch.cat(parts, 1)

    def _noisy(self, world: World, values: list[Tensor]) -> Tensor:
        now = torch.cat(values, 1)
        if self._noise is None:
            return now
        return torch.addcmul(now, world.random.uniform(now.shape[1]).mul(2).sub_(1), self._noise)


def require(what: str, value: object, world: World, dtype: torch.dtype = torch.float32) -> Tensor:
    """`value`, if it is a tensor whose rows are environments, of `dtype`, on the world's device.

    Raises:
        UsageError: it is not; says what was expected and what came.
    """
    expected = f"({world.num_envs}, ...)"
    if not isinstance(value, Tensor):
        raise UsageError(f"the task's {what} must give a tensor {expected}, it gave a {type(value).__name__}")
    if not value.dim() or value.shape[0] != world.num_envs:
        raise UsageError(_wrong(what, expected, value))
    if value.dtype != dtype or value.device.type != world.device.type:
        raise UsageError(
            f"the task's {what} must give {dtype} on {world.device}, it gave {value.dtype} on {value.device}"
        )
    return value


def require_figure(what: str, value: object, world: World, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `require`, of one number (N,) for each environment."""
    tensor = require(what, value, world, dtype)
    if tensor.dim() != 1:
        raise UsageError(_wrong(what, f"({world.num_envs},)", tensor))
    return tensor


def _wrong(what: str, expected: str, value: Tensor) -> str:
    return f"the task's {what} must give a tensor of shape {expected}, it gave {tuple(value.shape)}"
