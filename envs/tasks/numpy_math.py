"""Functions as NumPy computes them, on the CPU, where torch's differ in the last bit; for tasks that must agree with an
environment written in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def sum_of_squares(x: Tensor) -> Tensor:
    """Over the last dimension: in float32 the order of the summands shows."""
    total: np.ndarray[Any, np.dtype[Any]] = np.square(x.numpy()).sum(-1)
    return torch.from_numpy(total)


def sin(x: Tensor) -> Tensor:
    """Sine of each entry."""
    return torch.from_numpy(np.sin(x.numpy()))


def cos(x: Tensor) -> Tensor:
    """Cosine of each entry."""
    return torch.from_numpy(np.cos(x.numpy()))
