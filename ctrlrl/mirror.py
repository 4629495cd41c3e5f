"""What left-right reflection does to vectors: entries change places and signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from ctrlrl.errors import UsageError

if TYPE_CHECKING:  # importing it takes seconds, and what only describes a space needs none
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Reflection:
    """Of a vector of D numbers: entry i of the mirrored one is `sign[i]` times entry `order[i]`."""

    order: tuple[int, ...]
    sign: tuple[float, ...]

    def __post_init__(self) -> None:
        twice = [self.order[i] for i in self.order] if sorted(self.order) == list(range(len(self.order))) else []
        signs = len(self.sign) == len(self.order) and all(
            abs(s) == 1 and self.sign[i] == s for i, s in zip(self.order, self.sign, strict=True)
        )
        if twice != list(range(len(self.order))) or not signs:
            raise UsageError(
                f"reflected twice, a vector must be as it was: order {self.order}, signs {self.sign} are no reflection"
            )

    @staticmethod
    def of_names(names: Sequence[str], swap: Mapping[str, str], flipped: Sequence[str]) -> Reflection:
        """Entries that have names: each takes the place of the one named after replacing `swap`'s keys at the start of
        a name by their values, and those that contain one of `flipped` change sign."""
        place = {name: i for i, name in enumerate(names)}
        order = []
        for name in names:
            other = next((new + name[len(old) :] for old, new in swap.items() if name.startswith(old)), name)
            if other not in place:
                raise UsageError(f"{name} has no counterpart {other} among {', '.join(names)}")
            order.append(place[other])
        sign = tuple(-1.0 if any(part in name for part in flipped) else 1.0 for name in names)
        return Reflection(tuple(order), sign)

    @staticmethod
    def signs(*sign: float) -> Reflection:
        """Entries keep their places."""
        return Reflection(tuple(range(len(sign))), tuple(float(s) for s in sign))

    @staticmethod
    def join(*parts: Reflection) -> Reflection:
        """Of vectors one after the other."""
        order: list[int] = []
        for part in parts:
            start = len(order)
            order += [start + i for i in part.order]
        return Reflection(tuple(order), tuple(s for part in parts for s in part.sign))

    def __len__(self) -> int:
        return len(self.order)

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """`order` (D,) int64 and `sign` (D,) float32."""
        import torch

        return torch.tensor(self.order, device=device), torch.tensor(self.sign, device=device)


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


@dataclass(frozen=True)
class Mirror:
    """How observations and actions look in a mirror."""

    observations: Mapping[str, Reflection]
    """Of each group, by its name."""
    action: Reflection
