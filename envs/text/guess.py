"""Guess a number by hints: the smallest task in which what was said before is needed.

Said are the hints so far, in their order: `3 is too low , 9 is too high`. Turns are part of the task: after the last
one it is lost, which is an end and no cut.
"""

from __future__ import annotations

import random

from ctrlrl.envs.text.base import TextState, TextStep, matched
from ctrlrl.envs.text.replayed import Replayed
from ctrlrl.errors import UsageError


class GuessNumber(Replayed):
    """Reward 1 for the number; what is no number of the range costs a turn."""

    def __init__(
        self,
        low: int = 1,
        high: int = 16,
        *,
        free: bool = False,
        consistent: float | None = None,
        invalid_penalty: float = 0.0,
        max_turns: int = 4,
    ) -> None:
        """Think of numbers.

        Args:
            low: the lowest.
            high: the highest.
            free: offer no commands; an answer is text such as `7`.
            consistent: the expert guesses a random number that the hints allow with this probability, and else any that
                it has not tried; None: it halves what is left.
            invalid_penalty: taken from the reward where the answer is no number of the range.
            max_turns: guesses.

        Raises:
            UsageError: there are no numbers, or `consistent` is no probability.
        """
        if not 0 <= low < high:
            raise UsageError(f"numbers go from low to a higher one, 0 or more: got low = {low}, high = {high}")
        if consistent is not None and not 0 <= consistent <= 1:
            raise UsageError(f"consistent is a probability, got {consistent}")
        super().__init__(max_turns)
        self.low, self.high, self.free, self.consistent = low, high, free, consistent
        self.invalid_penalty = invalid_penalty
        self._numbers = tuple(str(number) for number in range(low, high + 1))
        self._secret = self._episode = 0
        self._guesses: list[int] = []
        self._turn = 0

    def optimum(self) -> float:
        """The probability of success of who halves what is left: T guesses tell 2^T - 1 numbers apart."""
        return min(1.0, (2.0**self.max_turns - 1) / len(self._numbers))

    def uninformed(self) -> float:
        """The probability of success of who tries other numbers each time and heeds no hint."""
        return min(1.0, self.max_turns / len(self._numbers))

    def _begin(self) -> TextState:
        self._secret = int(self._generator.integers(self.low, self.high + 1))
        self._episode = int(self._generator.integers(2**31))  # for the expert, whose choices are no part of the game
        self._guesses, self._turn = [], 0
        return self._look()

    def _answer(self, answer: str) -> TextStep:
        self._turn += 1
        last = self._turn >= self.max_turns
        said = matched(answer, self._numbers)
        if said is None:
            return TextStep(self._look(), -self.invalid_penalty, last, valid=False, success=False if last else None)
        self._guesses.append(int(said))
        right = int(said) == self._secret
        return TextStep(self._look(), float(right), right or last, success=right if right or last else None)

    def expert(self) -> str:
        """A number by `consistent`: with one, drawn by the episode and the turn."""
        low = max((guess + 1 for guess in self._guesses if guess < self._secret), default=self.low)
        high = min((guess - 1 for guess in self._guesses if guess > self._secret), default=self.high)
        if self.consistent is None:
            return str((low + high) // 2)
        draw = random.Random(f"{self._episode} {self._turn}")
        untried = [number for number in range(self.low, self.high + 1) if number not in self._guesses]
        return str(draw.randint(low, high) if draw.random() < self.consistent else draw.choice(untried or [low]))

    def _look(self) -> TextState:
        hints = [
            f"{guess} is {'too low' if guess < self._secret else 'too high' if guess > self._secret else 'right'}"
            for guess in self._guesses
        ]
        return TextState(
            " , ".join(hints) or "no guesses yet",
            () if self.free else self._numbers,
            f"guess a number from {self.low} to {self.high} in {self.max_turns} turns",
        )
