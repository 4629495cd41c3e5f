"""The contract of text environments: what is said, what may be answered, and when it is over.

An environment here is one; it speaks plain text and knows nothing of tokens, which `ctrlrl.language` makes for N of
them under the contract of `ctrlrl.envs.vector`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ctrlrl.errors import UsageError


@dataclass(frozen=True, slots=True)
class TextState:
    """What an agent is shown.

    Attributes:
        observation: what is seen or said now, without the goal and without what was before.
        commands: the answers that mean something here, each once, in an order that carries no meaning; empty where any
            text may be answered.
        goal: what is to be done; the same throughout an episode.
        achieved: goals, as texts that `goal` could have been, that hold now; for hindsight.
    """

    observation: str
    commands: tuple[str, ...] = ()
    goal: str = ""
    achieved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextStep:
    """What an answer led to.

    Attributes:
        state: what is shown next; the true last one where the episode ended.
        reward: of the answer.
        terminated: the task ended; there is no value beyond.
        truncated: we stopped watching (a limit of turns, say); the value beyond counts.
        valid: whether the answer meant anything. What does not is counted and, by most tasks, penalized.
        success: whether the task is done, where the episode ended and the task knows; else None.
    """

    state: TextState
    reward: float
    terminated: bool = False
    truncated: bool = False
    valid: bool = True
    success: bool | None = None


class TextEnv(ABC):
    """One text environment. Its constructor's keyword arguments are what `--env-kwargs` takes.

    Attributes:
        max_turns: turns after which an episode is cut off.
        max_achieved: goals that hold in a state at most; 0 where the task has none that could be others.
    """

    max_turns: int
    max_achieved: int = 0

    @abstractmethod
    def reset(self, seed: int | None = None) -> TextState:
        """Begin an episode: a function of `seed` alone; None goes on with the generator's own state."""

    @abstractmethod
    def step(self, answer: str) -> TextStep:
        """One turn. `answer` is any text; where there are commands, one of them or something that is invalid."""

    @abstractmethod
    def get_state(self) -> dict[str, Any]:
        """All that is needed to go on from here, JSON-able."""

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> TextState:
        """Go on from what `get_state` gave, in an environment made with the same arguments; what is shown there."""

    def expert(self) -> str | None:
        """What a scripted demonstrator answers here; None where there is none. It does not change the state."""
        return None

    def reward_of(self, goal: str, state: TextState) -> tuple[float, bool]:
        """Reward and termination that reaching `state` would have had with another `goal`; for hindsight.

        The reward is one number where `goal` is among `state.achieved` and one where it is not, whatever the state.

        Raises:
            NotImplementedError: the task has no goals in text.
        """
        raise NotImplementedError(f"{type(self).__name__} has no goals that could be others")

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Free what is held."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """An entry of the registry: how to make one, and what the tokenizer of a tiny model must know."""

    make: Any
    """`make(**kwargs)` gives a `TextEnv`."""
    package: str = ""
    """The package that it needs, and that is not among ours: `minigrid`."""
    summary: str = ""
    """One line, for `ctrlrl envs`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its default arguments."""


def matched(answer: str, commands: Sequence[str]) -> str | None:
    """The command that `answer` is, up to case and blanks around it; None where it is none."""
    plain = " ".join(answer.split()).lower()
    return next((command for command in commands if command.lower() == plain), None)


def imported(module: str, package: str) -> Any:
    """A module of a package that not everyone has.

    Args:
        module: such as `minigrid.utils.baby_ai_bot`.
        package: what pip installs.

    Raises:
        UsageError: it is not installed, or something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this environment needs {package}: pip install {package} ({error})") from None
