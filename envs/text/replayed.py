"""Text environments whose state is how the episode began and what was answered since."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np

from ctrlrl.envs.text.base import TextEnv, TextState, TextStep
from ctrlrl.errors import UsageError


class Replayed(TextEnv):
    """Goes on from a saved state by saying again what was said.

    This is exact where all that is random comes from `_generator`, and takes the time of the turns so far.
    """

    def __init__(self, max_turns: int) -> None:
        if max_turns < 1:
            raise UsageError(f"max_turns is 1 or more, got {max_turns}")
        self.max_turns = max_turns
        self._generator = np.random.default_rng()
        self._begun: dict[str, Any] = {}
        """The generator's state when the episode began: another dict for each episode."""
        self._answers: list[str] = []

    @abstractmethod
    def _begin(self) -> TextState:
        """Begin an episode with what `_generator` gives."""

    @abstractmethod
    def _answer(self, answer: str) -> TextStep:
        """One turn, as if there were no limit of them."""

    def reset(self, seed: int | None = None) -> TextState:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        self._begun, self._answers = dict(self._generator.bit_generator.state), []
        return self._begin()

    def step(self, answer: str) -> TextStep:
        self._answers.append(answer)
        step = self._answer(answer)
        if not step.terminated and len(self._answers) >= self.max_turns:
            return replace(step, truncated=True, success=False)
        return step

    def get_state(self) -> dict[str, Any]:
        return {"begun": self._begun, "answers": list(self._answers)}

    def set_state(self, state: dict[str, Any]) -> TextState:
        self._generator.bit_generator.state = state["begun"]
        shown = self.reset()
        for answer in state["answers"]:
            shown = self.step(answer).state
        return shown
