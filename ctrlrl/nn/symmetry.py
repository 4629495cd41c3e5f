"""Policies that are exactly left-right symmetric: in the mirror they do what the mirrored robot would do.

pi(o) = (f(o) + M f(M o)) / 2, where M reflects observations and actions. Half of what an asymmetric policy would have
to learn follows from the other half (Mittal et al. 2024, arXiv:2403.04359, compare ways to use this).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError
from ctrlrl.mirror import ReflectedBox, Reflection
from ctrlrl.nn.encoder import Encoder, ObservationNormalizer
from ctrlrl.tree import Obs


@dataclass(frozen=True)
class Symmetry:
    """How what a policy observes, and what it does, look in a mirror."""

    observations: dict[str, Reflection]
    """Of each entry; a bare observation is called `obs`."""
    action: Reflection

    @staticmethod
    def of(observation_space: gym.Space[Any], action_space: gym.Space[Any] | None) -> Symmetry | None:
        """What the spaces say of it; None where the action space says nothing.

        Raises:
            UsageError: an entry of the observation does not say it.
        """
        if not isinstance(action_space, ReflectedBox):
            return None
        bare = not isinstance(observation_space, gym.spaces.Dict)
        spaces = {"obs": observation_space} if bare else observation_space.spaces  # type: ignore[attr-defined]
        reflections = {}
        for name, space in spaces.items():
            if not isinstance(space, ReflectedBox):
                raise UsageError(f"the task is symmetric, but does not say how the observation {name!r} is mirrored")
            reflections[name] = space.reflection
        return Symmetry(reflections, action_space.reflection)


class BothSides(Encoder):
    """Features of the observation as it is and as it looks in a mirror, side by side: (B, 2 F)."""

    def __init__(self, encoder: Encoder, symmetry: Symmetry) -> None:
        super().__init__()
        self.encoder, self.out_features = encoder, 2 * encoder.out_features
        self._names = list(symmetry.observations)
        for i, reflection in enumerate(symmetry.observations.values()):
            order, sign = reflection.tensors()
            self.register_buffer(f"order{i}", order, persistent=False)
            self.register_buffer(f"sign{i}", sign, persistent=False)

    def refer_to(self, normalizer: ObservationNormalizer | None) -> None:
        self.encoder.refer_to(normalizer)

    def forward(self, obs: Obs) -> Tensor:
        if isinstance(obs, Tensor):
            mirrored: Obs = self._reflect(0, obs)
        else:
            mirrored = {name: self._reflect(i, obs[name]) for i, name in enumerate(self._names)}
        return torch.cat([self.encoder(obs), self.encoder(mirrored)], 1)

    def _reflect(self, i: int, value: Tensor) -> Tensor:
        reflected: Tensor = value.index_select(1, getattr(self, f"order{i}")) * getattr(self, f"sign{i}")
        return reflected


class SymmetricTrunk(nn.Module):
    """(B, 2 F) features of `BothSides` to (B, outputs), by one network for both sides.

    Of the outputs the first are one for each entry of the action, and are reflected as it is. Further ones, such as
    standard deviations, change places only.
    """

    def __init__(self, trunk: nn.Module, symmetry: Symmetry, outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        order, sign = symmetry.action.tensors()
        size = len(order)
        self.register_buffer("order", torch.cat([order + start for start in range(0, outputs, size)]), persistent=False)
        self.register_buffer("sign", torch.cat([sign, torch.ones(outputs - size)]), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        rows = len(features)
        both = self.trunk(features.view(rows, 2, -1).transpose(0, 1).flatten(0, 1))  # (2 B, outputs)
        out: Tensor = both[:rows] + both[rows:].index_select(1, self.order) * self.sign
        return out / 2
