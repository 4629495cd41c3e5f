"""From observations as the environment gives them to the features a network reads."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError
from ctrlrl.nn.normalizer import RunningNormalizer
from ctrlrl.nn.vision import FEATURES, Convolution, projection, random_shift
from ctrlrl.tree import Obs, is_image, obs_items

EncoderFactory = Callable[[gym.Space[Any]], nn.Module]
"""`factory(space)` gives a module that maps an observation of `space`, batched (B, ...), to features (B, F)."""


def group_space(space: gym.Space[Any], groups: Sequence[str] | None) -> gym.Space[Any]:
    """The part of `space` that `groups` names; None is all of it."""
    if groups is None:
        return space
    if not isinstance(space, gym.spaces.Dict):
        raise UsageError(f"observation groups {list(groups)} were asked for, but the observation is one {space}")
    if missing := [name for name in groups if name not in space.spaces]:
        raise UsageError(f"no observation group {missing[0]!r}; the environment gives {', '.join(space.spaces)}")
    return gym.spaces.Dict({name: space.spaces[name] for name in groups})


def policy_groups(space: gym.Space[Any]) -> tuple[str, ...] | None:
    """What a policy reads by default: the group `policy` where there is one, else everything."""
    return ("policy",) if isinstance(space, gym.spaces.Dict) and "policy" in space.spaces else None


def critic_groups(space: gym.Space[Any]) -> tuple[str, ...] | None:
    """What a critic reads by default: `policy` and `privileged` where there are such groups, else everything."""
    if policy_groups(space) is None:
        return None
    assert isinstance(space, gym.spaces.Dict)
    return tuple(name for name in ("policy", "privileged") if name in space.spaces)


class ObservationNormalizer(nn.Module):
    """One `RunningNormalizer` per entry that is no image; the agent holds it, its encoders refer to it."""

    def __init__(self, space: gym.Space[Any], floor: float = 0.0) -> None:
        super().__init__()
        spaces = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
        self.entries = nn.ModuleDict(
            {_key(name): RunningNormalizer(s.shape or (), floor=floor) for name, s in spaces.items() if not is_image(s)}
        )

    def entry(self, name: str) -> RunningNormalizer:
        """The normalizer of the entry `name`; a bare observation is called `obs`."""
        module = self.entries[_key(name)]
        assert isinstance(module, RunningNormalizer)
        return module

    def update(self, obs: Obs, valid: Tensor) -> None:
        """Take in each valid row (N, ...) once."""
        for name, value in obs_items(obs):
            if _key(name) in self.entries:
                self.entry(name).update(value, valid)


class Encoder(nn.Module, ABC):
    """Observations as the environment gives them to features (B, F).

    Of images two steps can be taken apart, so that a learner takes them once for all its networks: `shifted` and `see`.
    What `see` gives is taken in the observation's place. Both leave alone what is no image, or is read by a user's own
    module.
    """

    out_features: int

    @abstractmethod
    def forward(self, obs: Obs) -> Tensor:
        """Observations (B, ...), or what `see` made of them, to features (B, F)."""

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        return False

    def shifted(self, obs: Obs, shift: Tensor, pad: int) -> Obs:
        """`obs` with its images shifted, see `random_shift`."""
        return obs

    def see(self, obs: Obs) -> Obs:
        """`obs` with what the convolutions make of its images in their place."""
        return obs

    def refer_to(self, normalizer: ObservationNormalizer | None) -> None:
        """Normalize by another normalizer of the same space."""


class FlatEncoder(Encoder):
    """Concatenates the (normalized) vectors of the groups it reads, and what it makes of images, to float32 (B, F).

    Of an image each encoder has a projection of its own. The convolution before it is the one of `shared`, where that
    reads the image too.
    """

    def __init__(
        self,
        space: gym.Space[Any],
        normalizer: ObservationNormalizer | None,
        shared: Encoder | None = None,
        *,
        trains_shared: bool = True,
    ) -> None:
        super().__init__()
        spaces = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
        self.names = list(spaces)
        self.convolutions, self.projections = nn.ModuleDict(), nn.ModuleDict()
        former = shared.convolutions if isinstance(shared, FlatEncoder) else nn.ModuleDict()
        self.out_features = 0
        for name, entry in spaces.items():
            shape, key = entry.shape or (), _key(name)
            if is_image(entry):
                self.convolutions[key] = former[key] if key in former else Convolution(shape, name)
                self.projections[key] = projection(self._convolution(name).out_features)
            self.out_features += FEATURES if is_image(entry) else math.prod(shape)
        if trains_shared and (unseen := former.keys() - self.convolutions.keys()):
            raise UsageError(
                f"the policy reads the image {min(unseen)!r} (agent.policy_obs) and the critics do not: their loss "
                "trains the convolution. Name it in agent.critic_obs too, or pass a network of your own as encoder=..."
            )
        self._normalizer = [normalizer]  # in a list: it belongs to the agent, and is saved with it once

    def refer_to(self, normalizer: ObservationNormalizer | None) -> None:
        self._normalizer[0] = normalizer

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatEncoder:
        normalizer = self._normalizer[0]
        memo[id(normalizer)] = normalizer  # a copy must keep seeing the agent's
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @property
    def sees(self) -> bool:
        return len(self.convolutions) > 0

    def shifted(self, obs: Obs, shift: Tensor, pad: int) -> Obs:
        return self._each_image(lambda convolution, x: random_shift(x, shift, pad, convolution.layout), obs)

    def see(self, obs: Obs) -> Obs:
        return self._each_image(lambda convolution, x: convolution(x), obs)

    def forward(self, obs: Obs) -> Tensor:
        parts, normalizer = [], self._normalizer[0]
        for name in self.names:
            value = obs[name] if isinstance(obs, dict) else obs
            if self.sees and _key(name) in self.convolutions:
                seen = value.is_floating_point()  # by `see`: images are of integers
                value = self.projections[_key(name)](value if seen else self._convolution(name)(value))
            else:
                value = value.to(torch.float32) if normalizer is None else normalizer.entry(name).forward(value)
            parts.append(value if value.dim() == 2 else value.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _each_image(self, fn: Callable[[Convolution, Tensor], Tensor], obs: Obs) -> Obs:
        if not isinstance(obs, dict):
            return fn(self._convolution("obs"), obs) if self.sees else obs
        images = [name for name in self.names if _key(name) in self.convolutions]
        return obs | {name: fn(self._convolution(name), obs[name]) for name in images}

    def _convolution(self, name: str) -> Convolution:
        module = self.convolutions[_key(name)]
        assert isinstance(module, Convolution)
        return module


class CustomEncoder(Encoder):
    """A user's module in the place of `FlatEncoder`; its number of features is found by trying it once."""

    def __init__(self, space: gym.Space[Any], make: EncoderFactory) -> None:
        super().__init__()
        self.names = list(space.spaces) if isinstance(space, gym.spaces.Dict) else None
        self.module = make(space)

        def zeros(entry: gym.Space[Any]) -> Tensor:
            return torch.from_numpy(np.zeros((2, *(entry.shape or ())), entry.dtype))

        blank = {k: zeros(s) for k, s in space.spaces.items()} if isinstance(space, gym.spaces.Dict) else zeros(space)
        was_training = self.module.training
        with torch.no_grad():
            features = self.module.eval()(blank)
        self.module.train(was_training)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
            raise UsageError(
                f"the encoder must map a batch of observations (B, ...) to features (B, F); for B = 2 it gave "
                f"{tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__}"
            )
        self.out_features = features.shape[1]

    def forward(self, obs: Obs) -> Tensor:
        if self.names is not None and isinstance(obs, dict):
            obs = {name: obs[name] for name in self.names}
        out: Tensor = self.module(obs)
        return out


def make_encoder(
    space: gym.Space[Any],
    make: EncoderFactory | None,
    normalizer: ObservationNormalizer | None,
    shared: Encoder | None = None,
    *,
    trains_shared: bool = True,
) -> Encoder:
    """The encoder of one network, for the part of the observation (`space`) that it reads.

    Images that the encoder `shared` reads too are seen through the same convolution, of which there is only one then.
    Where the loss of this network alone trains them (`trains_shared`), it must read all that `shared` reads.
    """
    if make is not None and normalizer is not None:
        raise UsageError(
            "agent.normalize_obs goes with the built-in networks; turn it off (agent={'normalize_obs': False}) and "
            "normalize inside your encoder instead"
        )
    return (
        FlatEncoder(space, normalizer, shared, trains_shared=trains_shared)
        if make is None
        else CustomEncoder(space, make)
    )


def _key(name: str) -> str:
    """The name of a module for the entry `name`: torch allows no dots there."""
    return name.replace(".", "/")
