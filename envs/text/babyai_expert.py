"""What minigrid's bot would do in a level of BabyAI, whatever has been done before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ctrlrl.envs.text.base import imported

_LEFT, _DROP = 0, 4


class BabyAIExpert:
    """The bot in a level of its own, which catches up with what was done when it is asked.

    Its answer is so a function of the episode's beginning and of the actions since, not of when it was asked, and
    neither the bot nor its plans touch the level that is played.

    The bot remembers what it has seen and has plans, of which actions that are not its own can make nonsense: it then
    fails an assertion or tries an impossible thing. It is replaced by a new one with the same memory then; where that
    one fails too, what is carried is put down, which it does not think of.
    """

    def __init__(self, env: Any) -> None:
        """With another environment of the level that is played."""
        self._env = env
        self._make_bot = imported("minigrid.utils.baby_ai_bot", "minigrid").BabyAIBot
        self._begun: dict[str, Any] | None = None
        self._bot: Any = None
        self._advice: int | None = None
        self._done = 0

    def advise(self, begun: dict[str, Any], actions: Sequence[int]) -> int | None:
        """The next action; None where the bot knows none.

        Args:
            begun: the generator's state from which the level was reset; the same dict throughout an episode.
            actions: all since then.
        """
        if begun is not self._begun:
            generator = np.random.default_rng()
            generator.bit_generator.state = begun
            self._env.np_random = generator
            self._env.reset()
            self._begun, self._bot, self._done = begun, self._make_bot(self._env), 0
            self._advice = self._ask(None)
        for action in actions[self._done :]:
            self._env.step(action)
            self._done += 1
            self._advice = self._ask(action)
        return self._advice

    def _ask(self, action: int | None) -> int | None:
        """What the bot advises after an action, None for the first time."""
        try:
            return int(self._bot.replan(action))
        except Exception:  # the bot's assertions, and what follows where there is none
            seen = self._bot.vis_mask
        self._bot = self._make_bot(self._env)
        self._bot.vis_mask = seen
        try:
            return int(self._bot.replan())
        except Exception:
            if self._env.carrying is None:
                return None
            return _DROP if self._env.grid.get(*self._env.front_pos) is None else _LEFT
