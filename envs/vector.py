"""The vector-environment contract: what every backend gives and every collector relies on.

N environments are stepped together. Tensors in, tensors out, on `device`. An environment that ends is reset inside the
step (same-step autoreset), so `Step.obs` can always be acted on, while `Step.final_obs` is the true next observation of
every row: a row of an automatic reset is never a transition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.errors import EnvironmentFailure, UsageError
from ctrlrl.tree import Obs

if TYPE_CHECKING:
    import mujoco


@dataclass(slots=True)
class Step:
    """What one control step of N environments returned. The tensors are valid until the next step."""

    obs: Obs
    """(N, ...) observation to act on next: the first one of the new episode where the old one ended."""
    action: Tensor
    """(N, ...) action as applied, in the environment's units: after clamps, or a human's intervention. Its dtype is the
    action space's (int64 where the space counts)."""
    reward: Tensor
    """(N,) float32."""
    terminated: Tensor
    """(N,) bool: the task ended; there is no value beyond."""
    truncated: Tensor
    """(N,) bool: we stopped watching (a time limit, say); the value beyond `final_obs` counts."""
    final_obs: Obs
    """(N, ...) true next observation of each row; equals `obs` where nothing ended."""
    valid: Tensor
    """(N,) bool: False for rows that are no transition (a backend's filler row, a diverged simulation). Such a row has
    reward zero and no flags, and its `obs` is the first one of a new episode."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Per-row figures (N,), `success` among them where the task knows it: 1, 0, or NaN in a step that does not say."""
    achieved: Tensor | None = None
    """(N, A, g) goals that hold after the step, those of a row one after the other and then rows of -1; where
    `VectorEnv.goals` says that steps have them."""
    anchor: Tensor | None = None
    """(N,) int64: of what was acted on a number, the same where it was the same, whatever was told besides (earlier
    turns, say); of environments in groups."""


@dataclass(frozen=True, slots=True)
class EnvState:
    """What a backend needs to continue exactly: one JSON-able entry and one dict of arrays per environment.

    `json[i]` is None where environment i cannot be continued (it crashed, say) and is started afresh.
    """

    json: list[dict[str, Any] | None]
    arrays: list[dict[str, np.ndarray[Any, Any]]]


@dataclass(frozen=True, kw_only=True)
class VectorGoals:
    """That rewards are of goals, and where these are, so that transitions can be given others afterwards (hindsight).

    Nothing else that is observed may depend on the goal, and how episodes end only by its being reached.
    """

    achieved: str | slice | None = None
    """What was achieved, (N, g): an entry's name in observations, or a slice of the one vector. None: several goals may
    hold at once, or none, and `Step.achieved` has them."""
    desired: str | slice
    """The goal in observations, (N, g)."""
    reward: Callable[[Tensor, Tensor], Tensor]
    """The reward (M,) of a transition: of what was achieved after it (M, g), or the goals that hold then (M, A, g), and
    of the goal (M, g)."""
    reached: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of the same, whether the goal is reached (M,), bool, which ends the episode. None: goals end no episodes."""
    most: int = 1
    """A: goals that hold at once at most."""


class RenderFailure(EnvironmentFailure):
    """Drawing failed, or OpenGL could not be set up for it; environments that had been made can still be stepped.

    `cause` is the type and the message of what was raised, `FatalError: an OpenGL platform library has not been ...`.
    """

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class VectorEnv(ABC):
    """N environments behind one `reset` and one `step`.

    Attributes:
        name: what a user types to get it (`HalfCheetah-v5`), for messages and run folders.
        num_envs: N.
        device: where every tensor lies.
        observation_space: of one environment: a Box, or a flat Dict of Boxes.
        action_space: of one environment: Box, Discrete or MultiDiscrete.
        control_dt: seconds of simulated time per step; None where the environment has no clock.
        may_be_invalid: whether `Step.valid` can ever be False; lets loops skip counting where it cannot.
        task_groups: (G, H) where environments G * i to G * i + G - 1 are given the same tasks, and their episodes begin
            together every H steps, between which who has finished waits, in rows that are no transitions; else None.
        goals: what of it are goals, where rewards are of goals alone.
    """

    name: str
    num_envs: int
    device: torch.device
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    control_dt: float | None = None
    may_be_invalid: bool = False
    task_groups: tuple[int, int] | None = None
    goals: VectorGoals | None = None

    @property
    def batched_observation_space(self) -> gym.Space[Any]:
        """The space of N observations."""
        return gym.vector.utils.batch_space(self.observation_space, self.num_envs)

    @property
    def batched_action_space(self) -> gym.Space[Any]:
        """The space of N actions."""
        return gym.vector.utils.batch_space(self.action_space, self.num_envs)

    @abstractmethod
    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        """Start a new episode in every environment; returns the first observations (N, ...).

        `seed`: one number, from which each environment gets its own (see `derive_seeds`), or one number per
        environment, used as it is. None goes on with the random states the environments have. An automatic reset
        never reseeds.
        """

    @abstractmethod
    def step(self, action: Tensor) -> Step:
        """One control step with `action` (N, ...) in the environment's units; resets what ended."""

    def get_state(self) -> EnvState:
        """What `set_state` needs to go on from exactly here. By default: nothing, every environment starts afresh."""
        return EnvState([None] * self.num_envs, [{} for _ in range(self.num_envs)])

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        """Continue from `state`, in place of `reset`.

        Environment i, where it cannot continue, is reset with `derive_seeds(seed, num_envs)[i]`, so that going on from
        one state with one seed gives one trajectory. Returns the observations to act on (N, ...) and, per environment,
        None when it continues or else the reason why its episode was started afresh.
        """
        return self.reset(seed), [f"{self.name} cannot save its state"] * self.num_envs

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The picture (H, W, 3) of environment 0; only where it was made with `render=True`.

        Raises:
            UsageError: it was made without pictures, or lacks a package that draws.
            RenderFailure: drawing raised.
        """
        raise NotImplementedError(f"{type(self).__name__} does not render")

    def transcripts(self) -> list[str | None]:
        """Of each row, what was shown and answered in the first episode that ended since `reset`; None where none has,
        or nothing is said in words."""
        return [None] * self.num_envs

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """MuJoCo's model and data of environment `row` (0 to N - 1) as it is now: to look at, not to step or change.

        Both may be the environment's own, or be used for every row, so they show `row` only until the next call of a
        method. Positions of bodies may lag qpos by a substep, as they do after `mj_step`.

        Raises:
            UsageError: the environment has no MuJoCo scene, or none in this process.
        """
        raise UsageError(
            f"{self.name} has no MuJoCo scene to look at; `ctrlrl eval RUN --video` shows its own pictures"
        )

    def close(self) -> None:  # noqa: B027  (a backend that holds nothing has nothing to do)
        """Free processes, memory and windows. Safe to call twice."""


def derive_seeds(seed: int, count: int) -> list[int]:
    """`count` independent 32-bit seeds from one, the first ones the same whatever `count` is."""
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(count)]


def require_as_many(env: VectorEnv, state: EnvState) -> None:
    """Raise UsageError unless `state` is of as many environments as `env` has."""
    if len(state.json) != env.num_envs:
        raise UsageError(
            f"{env.name}: the state saved is of {len(state.json)} environments, these are {env.num_envs}; "
            "make as many as before to go on from it"
        )


def seed_per_env(seed: int | Sequence[int] | None, num_envs: int) -> list[int | None]:
    """What `VectorEnv.reset` takes, as one seed per environment; raises UsageError where the number is not theirs."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return list(derive_seeds(int(seed), num_envs))
    if len(seed) != num_envs:
        raise UsageError(f"reset takes one seed, or {num_envs}, one per environment; got {len(seed)}")
    return [int(value) for value in seed]
