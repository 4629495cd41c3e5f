"""Gymnasium spaces from the JSON-able descriptions that `worker.py` makes of them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.envs.mirror import Reflection


class ReflectedBox(gym.spaces.Box):
    """A Box that says how its vectors look in a mirror: networks between two such spaces can be made symmetric."""

    def __init__(
        self, low: Any, high: Any, shape: tuple[int, ...], dtype: type[np.floating[Any]], reflection: Reflection
    ):
        super().__init__(low, high, shape, dtype)
        self.reflection = reflection

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.reflection == getattr(other, "reflection", None)

    def __hash__(self) -> int:
        return hash((str(self), self.reflection))


def build_space(description: dict[str, Any]) -> gym.Space[Any]:
    """The space that `describe_observation_space` or `describe_action_space` of `worker.py` described."""
    match description["type"]:
        case "Box":
            shape, dtype = tuple(description["shape"]), np.dtype(description["dtype"])
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
