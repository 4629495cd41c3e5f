"""Actions on their way into environments: one array, clipped to the bounds."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.errors import UsageError


class ActionBuffer:
    """The (N, ...) array that environments read their actions from; what is written is clipped to the bounds.

    A Box keeps its dtype, Discrete and MultiDiscrete are int64 and carry values as the environment counts them.
    """

    def __init__(self, space: gym.Space[Any], array: np.ndarray[Any, np.dtype[Any]]) -> None:
        self.array = array
        self.tensor = torch.from_numpy(array)
        self._bounds: tuple[Tensor, Tensor] | None = None
        if isinstance(space, gym.spaces.Box):
            self._bounds = torch.from_numpy(space.low.copy()), torch.from_numpy(space.high.copy())

    def write(self, action: Tensor) -> None:
        """Take `action` (N, ...); raises UsageError on another shape, or fractions where the space counts."""
        if action.shape != self.tensor.shape:
            raise UsageError(f"step takes actions of shape {tuple(self.tensor.shape)}, got {tuple(action.shape)}")
        if action.is_floating_point() and not self.tensor.is_floating_point():
            raise UsageError(f"step takes actions of dtype {self.tensor.dtype}, got {action.dtype}")
        action = action.detach()
        if self._bounds is None:
            self.tensor.copy_(action)
        else:
            torch.clamp(action.to(self.tensor.device, self.tensor.dtype), *self._bounds, out=self.tensor)
