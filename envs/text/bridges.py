"""Games of two packages: TextArena's for one player (Guertler et al. 2025) and those of GEM (Liu et al. 2025).

    TextArena("GuessTheNumber-v0")           pip install textarena; made for 0.7.4
    Gem("game:GuessTheNumber-v0-easy")       pip install gem-llm; made for 0.1.0

Both speak the rules first, which are the goal here. Both draw from Python's and NumPy's global generators: these are
lent to a game while it is asked, and given back as they were. Games that fetch words or questions from the internet
(Wordle, Hangman, GEM's math) cannot be made without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from ctrlrl.envs.text.base import TextState, TextStep, imported
from ctrlrl.envs.text.replayed import Replayed
from ctrlrl.errors import UsageError, nearest

_NOTHING = "begin"
"""What is said where a game says nothing."""


class _Game(Replayed):
    """What the two have in common: random numbers of their own, and how a game that cannot be made is refused."""

    def __init__(self, game: str, known: Any, invalid_penalty: float, max_turns: int) -> None:
        super().__init__(max_turns)
        if invalid_penalty < 0:
            raise UsageError(f"invalid_penalty is taken from a reward: 0 or more, got {invalid_penalty}")
        self.game, self.invalid_penalty = game, invalid_penalty
        self._random: Any = None
        self._goal = ""
        if game not in known:
            raise UsageError(f"{type(self).__name__} has no game {game!r}.{nearest(game, known)}")
        try:
            with self._lent(0):
                self._make()
        except Exception as error:
            raise UsageError(f"{type(self).__name__} cannot play {game!r} here: {error}") from error

    @abstractmethod
    def _make(self) -> None:
        """Make the game and reset it once, which shows whether it can be played."""

    @abstractmethod
    def _start(self, seed: int) -> str:
        """Reset the game and set the goal; what is said then."""

    @abstractmethod
    def _say(self, answer: str) -> TextStep:
        """One turn of the game."""

    def _begin(self) -> TextState:
        seed = int(self._generator.integers(2**31))
        with self._lent(seed):
            said = self._start(seed)
        return self._state(said)

    def _answer(self, answer: str) -> TextStep:
        with self._lent():
            step = self._say(answer)
        return step if step.valid else dataclasses.replace(step, reward=step.reward - self.invalid_penalty)

    def _state(self, said: str) -> TextState:
        return TextState(said.strip() or _NOTHING, (), self._goal)

    @contextlib.contextmanager
    def _lent(self, seed: int | None = None) -> Iterator[None]:
        """The global generators in this game's state, or in a new one from `seed`."""
        kept = random.getstate(), np.random.get_state()
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
            else:
                random.setstate(self._random[0])
                np.random.set_state(self._random[1])
            yield
        finally:
            self._random = random.getstate(), np.random.get_state()
            random.setstate(kept[0])
            np.random.set_state(kept[1])


class TextArena(_Game):
    """A game of TextArena for one player.

    Rewards come at the end: 1 for a game that is won, which is a success, and often a part of it for what was achieved.
    A second invalid answer in a row ends most games. A game's own limit of turns is an end, `max_turns` a cut.
    """

    def __init__(
        self,
        game: str = "GuessTheNumber-v0",
        *,
        brackets: bool = True,
        invalid_penalty: float = 0.0,
        max_turns: int = 100,
    ) -> None:
        """Make the game.

        Args:
            game: its ID.
            brackets: put answers without any into the brackets that the games look for: `5` becomes `[5]`.
            invalid_penalty: taken, besides, where the game says that an answer was invalid.
            max_turns: of an episode.

        Raises:
            UsageError: TextArena is not installed, or has no such game, or one player cannot play it here.
        """
        self._package = imported("textarena", "textarena")
        self.brackets = brackets
        super().__init__(
            game, imported("textarena.envs.registration", "textarena").ENV_REGISTRY, invalid_penalty, max_turns
        )

    def _make(self) -> None:
        env = self._package.make(self.game)
        while isinstance(env, self._package.Wrapper):  # which repeat all that was said, of earlier episodes too
            env = env.env
        self._env = env
        self._env.reset(num_players=1, seed=0)

    def _start(self, seed: int) -> str:
        self._env.reset(num_players=1, seed=seed)
        messages = self._env.get_observation()[1]
        prompt = self._package.ObservationType.PROMPT
        self._goal = "\n".join(text.strip() for _, text, kind in messages if kind == prompt)
        return "\n".join(text.strip() for _, text, kind in messages if kind != prompt)

    def _say(self, answer: str) -> TextStep:
        bare = self.brackets and "[" not in answer and "]" not in answer
        over, _ = self._env.step(f"[{answer}]" if bare else answer)
        own = self._package.ObservationType.PLAYER_ACTION
        said = "\n".join(text.strip() for _, text, kind in self._env.get_observation()[1] if kind != own)
        if not over:
            return TextStep(self._state(said), 0.0, valid=not getattr(self._env.state, "error_count", 0))
        rewards, info = self._env.close()
        reward, outcome = float(rewards[0]), info[0]
        return TextStep(
            self._state(f"{said}\n{outcome.get('reason') or ''}"),
            reward,
            terminated=True,
            valid=not outcome["invalid_move"],
            success=reward >= 1 and not outcome["invalid_move"],
        )


class Gem(_Game):
    """A game of GEM. Success is a return of 1, which is what its games give to who wins.

    An answer is invalid where the game cannot read it, which ends most of them; moves that are against the rules count
    as valid, GEM does not tell them apart.
    """

    def __init__(
        self,
        game: str = "game:GuessTheNumber-v0-easy",
        *,
        boxed: bool = True,
        invalid_penalty: float = 0.0,
        max_turns: int = 100,
    ) -> None:
        r"""Make the game.

        Args:
            game: its ID.
            boxed: put answers without one into the box that the games look for: `5` becomes `\boxed{5}`.
            invalid_penalty: taken, besides, where the game could not read an answer.
            max_turns: of an episode.

        Raises:
            UsageError: GEM is not installed, or has no such game, or it cannot be played here.
        """
        self._package = imported("gem", "gem-llm")
        self._unread = float(imported("gem.utils.constants", "gem-llm").LanguageGameReward.format_error_reward)
        self.boxed, self._return = boxed, 0.0
        super().__init__(game, imported("gem.envs.registration", "gem-llm").ENV_REGISTRY, invalid_penalty, max_turns)

    def _make(self) -> None:
        self._env = self._package.make(self.game)
        self._env.reset(seed=0)

    def _start(self, seed: int) -> str:
        rules, info = self._env.reset(seed=seed)
        self._goal, self._return = rules.strip(), 0.0
        return str(info.get("suffix") or "")

    def _say(self, answer: str) -> TextStep:
        bare = self.boxed and "\\boxed" not in answer
        said, reward, terminated, truncated, info = self._env.step(f"\\boxed{{{answer}}}" if bare else answer)
        self._return += float(reward)
        over = terminated or truncated
        return TextStep(
            self._state(said if over else f"{said.strip()}\n{info.get('suffix') or ''}"),
            float(reward),
            terminated=bool(terminated),  # GEM sets both where a game's turns are used up, which is its end
            truncated=bool(truncated and not terminated),
            valid=reward != self._unread,
            success=self._return > 1 - 1e-6 if over else None,
        )
