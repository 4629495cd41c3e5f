"""Gymnasium spaces from the JSON-able descriptions that `worker.py` makes of them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.mirror import ReflectedBox, Reflection
from ctrlrl.tokens import TokenSpace


def build_space(description: dict[str, Any]) -> gym.Space[Any]:
    """The space that `describe_observation_space` or `describe_action_space` of `worker.py` described."""
    match description["type"]:
        case "Box":
            shape, dtype = tuple(description["shape"]), np.dtype(description["dtype"])
            if "vocabulary" in description:
                return TokenSpace(description["vocabulary"], *shape)
            low, high = (np.broadcast_to(np.asarray(description[key], dtype), shape) for key in ("low", "high"))
            if "reflection" not in description:
                return gym.spaces.Box(low, high, shape, dtype.type)
            order, sign = (tuple(description["reflection"][key]) for key in ("order", "sign"))
            return ReflectedBox(low, high, shape, dtype.type, Reflection(order, sign))
        case "Discrete":
            return gym.spaces.Discrete(description["n"], start=description["start"])
        case "MultiDiscrete":
            return gym.spaces.MultiDiscrete(description["nvec"], start=description["start"])
        case "Dict":
            return gym.spaces.Dict({name: build_space(entry) for name, entry in description["entries"].items()})
        case kind:
            raise ValueError(f"unknown kind of space {kind!r}")
