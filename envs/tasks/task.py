"""What a task is: N environments as batched arrays, behind `begin`, `step` and `observe`.

`ctrlrl.envs.native.NativeVector` makes a vector environment of it: it keeps seeds, time limits, automatic resets, the
true last observation, and saved state, so a task says only what is its own.

Arrays are NumPy's: these tasks must agree with environments written in NumPy to the last bit, and between two steps of
a simulation, when the caches are cold, NumPy's calls take a fraction of torch's time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    import mujoco

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True)
class Outcome:
    """What one control step of N environments came to; arrays of its own."""

    reward: Array
    """(N,) of any float type; the vector environment makes it float32."""
    terminated: Array
    """(N,) bool."""
    log: dict[str, Array] = field(default_factory=dict)
    """Per-row figures (N,): the reward's terms, `success`."""
    diverged: Array | None = None
    """(N,) bool: rows that are no transition since their simulation became unstable; None where there are none."""


class Task(ABC):
    """N environments; a row of every array is one.

    Attributes:
        name: what a user types to get it.
        num_envs: N.
        observation_space: of one environment, a Box.
        action_space: of one environment.
        control_dt: seconds of simulated time per step; None where there is no clock.
        max_episode_steps: after which an episode is truncated; None never.
        may_diverge: whether `Outcome.diverged` can ever be set.
        renders: whether `render` gives pictures.
    """

    name: str
    num_envs: int
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    control_dt: float | None = None
    max_episode_steps: int | None = None
    may_diverge: bool = False
    renders: bool = False

    @abstractmethod
    def begin(self, rows: Array, random: RowRandom) -> None:
        """Start a new episode where `rows` (N,) bool; the others must not change."""

    @abstractmethod
    def step(self, action: Array) -> Outcome:
        """One control step of all rows with `action` (N, ...), which lies within the action space."""

    @abstractmethod
    def observe(self) -> Array:
        """The observations (N, ...) of now, in a new array."""

    @abstractmethod
    def get_state(self) -> dict[str, Array]:
        """Everything that later steps and observations depend on, (N, ...) each; may be live."""

    @abstractmethod
    def set_state(self, rows: Array, state: dict[str, Array]) -> None:
        """Go on from what `get_state` gave, where `rows` (N,) bool."""

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The picture (H, W, 3) of environment 0; only where it was made with pictures."""
        raise NotImplementedError(f"{type(self).__name__} does not render")

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData] | None:
        """MuJoCo's model and data that show `row` until the next call (`VectorEnv.scene`); None without MuJoCo."""
        return None

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Free threads and windows. Safe to call twice."""


class RowRandom:
    """One NumPy generator for each row, seeded as Gymnasium seeds an environment's `np_random`.

    So rows are independent of each other and of N, and a task that draws in the order of a Gymnasium environment
    starts its episodes with the same numbers.
    """

    def __init__(self, num_rows: int) -> None:
        self.generators = [np.random.default_rng() for _ in range(num_rows)]

    def seed(self, row: int, seed: int) -> None:
        """Start row's generator anew."""
        self.generators[row] = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def uniform(self, rows: Array, low: float, high: float, size: int) -> Array:
        """(N, size) float64, drawn where `rows`, zero elsewhere."""
        return self.each(rows, size, lambda generator: generator.uniform(low, high, size))

    def normal(self, rows: Array, size: int) -> Array:
        """(N, size) float64, standard normal where `rows`, zero elsewhere."""
        return self.each(rows, size, lambda generator: generator.standard_normal(size))

    def each(self, rows: Array, size: int, draw: Callable[[np.random.Generator], Array]) -> Array:
        """(N, size) float64: `draw(generator)` of each row where `rows`, zero elsewhere."""
        values = np.zeros((len(self.generators), size))
        for row in np.flatnonzero(rows):
            values[row] = draw(self.generators[row])
        return values
