"""Observations are one tensor or a flat dict of tensors; these helpers treat both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

Obs: TypeAlias = Tensor | dict[str, Tensor]
"""One tensor, or a flat dict of tensors that share their leading dimensions."""


def map_obs(fn: Callable[[Tensor], Tensor], obs: Obs) -> Obs:
    """Apply `fn` to each tensor of `obs`."""
    return {key: fn(value) for key, value in obs.items()} if isinstance(obs, dict) else fn(obs)


def obs_items(obs: Obs) -> list[tuple[str, Tensor]]:
    """`(name, tensor)` pairs; a bare tensor is named `obs`."""
    return list(obs.items()) if isinstance(obs, dict) else [("obs", obs)]


def obs_to(obs: Obs, device: torch.device) -> Obs:
    """`obs` on `device` (the same object where it already lies there)."""
    return map_obs(lambda value: value.to(device), obs)


def is_image(space: gym.Space[Any]) -> bool:
    """Whether `space` is one of images: a uint8 Box of two or more dimensions."""
    return space.dtype == np.uint8 and len(space.shape or ()) >= 2
