"""The space of answers that are written token by token."""

from __future__ import annotations

import gymnasium as gym
import numpy as np


class TokenSpace(gym.spaces.Box):
    """Answers of up to `length` tokens: ids (length,), int32, -1 after the last one.

    Each token is a decision of its own, made knowing those before it.

    Args:
        vocabulary: how many tokens there are.
        length: the longest answer.
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__(-1, vocabulary - 1, (length,), np.int32)
        self.vocabulary, self.length = vocabulary, length
