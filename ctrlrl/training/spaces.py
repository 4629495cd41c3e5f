"""Whether what one space describes is what another does."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


def alike(one: gym.Space[Any], other: gym.Space[Any], *, bounds: bool) -> bool:
    """Whether values of one space are values of the other, up to rounding; with `bounds` within the same ones."""
    if isinstance(one, gym.spaces.Dict) and isinstance(other, gym.spaces.Dict):
        names = one.spaces.keys()
        same = names == other.spaces.keys()
        return same and all(alike(one[name], other[name], bounds=bounds) for name in names)
    if isinstance(one, gym.spaces.Box) and isinstance(other, gym.spaces.Box):
        if one.shape != other.shape or (one.dtype.kind == "f") != (other.dtype.kind == "f"):
            return False
        return not bounds or (np.allclose(one.low, other.low, 1e-4) and np.allclose(one.high, other.high, 1e-4))
    return bool(one == other)
