"""From observations as the environment gives them to the features a network reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError
from ctrlrl.nn.normalizer import RunningNormalizer
from ctrlrl.tree import Obs, obs_items

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
    """One `RunningNormalizer` per observation entry; the agent holds it, its encoders refer to it."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        spaces = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
        self.entries = nn.ModuleDict(
            {name.replace(".", "/"): RunningNormalizer(s.shape or ()) for name, s in spaces.items()}
        )

    def entry(self, name: str) -> RunningNormalizer:
        """The normalizer of the entry `name`; a bare observation is called `obs`."""
        module = self.entries[name.replace(".", "/")]
        assert isinstance(module, RunningNormalizer)
        return module

    def update(self, obs: Obs, valid: Tensor) -> None:
        """Take in each valid row (N, ...) once."""
        for name, value in obs_items(obs):
            self.entry(name).update(value, valid)


class FlatEncoder(nn.Module):
    """Concatenates the (normalized) vectors of the groups it reads into float32 features (B, F)."""

    def __init__(self, space: gym.Space[Any], normalizer: ObservationNormalizer | None) -> None:
        super().__init__()
        spaces = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
        for name, entry in spaces.items():
            if entry.dtype == np.uint8 and len(entry.shape or ()) >= 2:
                raise UsageError(
                    f"observation {name!r} is an image {entry.shape}; the built-in networks read vectors. "
                    "Pass a convolutional network: ctrlrl.train(..., encoder=lambda space: MyConvNet(space))"
                )
        self.names = list(spaces)
        self.out_features = sum(int(np.prod(s.shape or ())) for s in spaces.values())
        self._normalizer = [normalizer]  # in a list: it belongs to the agent, and is saved with it once

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatEncoder:
        return self  # no weights of its own, and a copy must keep seeing the agent's normalizer

    def forward(self, obs: Obs) -> Tensor:
        parts = []
        for name in self.names:
            value = obs[name] if isinstance(obs, dict) else obs
            normalizer = self._normalizer[0]
            value = value.to(torch.float32) if normalizer is None else normalizer.entry(name)(value)
            parts.append(value.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class CustomEncoder(nn.Module):
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
    space: gym.Space[Any], make: EncoderFactory | None, normalizer: ObservationNormalizer | None
) -> FlatEncoder | CustomEncoder:
    """The encoder of one network, for the part of the observation (`space`) that it reads."""
    if make is not None and normalizer is not None:
        raise UsageError("agent.normalize_obs goes with the built-in networks; normalize inside your encoder instead")
    return FlatEncoder(space, normalizer) if make is None else CustomEncoder(space, make)
