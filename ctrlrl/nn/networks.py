"""The networks of an agent: what its policy and its critics read, made for the spaces of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError
from ctrlrl.nn.encoder import (
    Encoder,
    EncoderFactory,
    ObservationNormalizer,
    critic_groups,
    group_space,
    make_encoder,
    policy_groups,
)
from ctrlrl.nn.mlp import Ensemble, EnsembleMLP, Members, NetworkFactory, at_least_float32, mlp
from ctrlrl.tree import Obs


class NetworkSettings(Protocol):
    """Of an agent's configuration, what its networks depend on."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def normalize_obs(self) -> bool: ...
    @property
    def policy_obs(self) -> tuple[str, ...] | None: ...
    @property
    def critic_obs(self) -> tuple[str, ...] | None: ...


class Critics(nn.Module):
    """K value functions, stacked. (B, ...) observations, and (B, A) actions in [-1, 1] where they take any, to (K, B),
    or (K, B, outputs) where there is more than one output."""

    def __init__(self, encoder: Encoder, ensemble: EnsembleMLP | Ensemble) -> None:
        super().__init__()
        self.encoder, self.ensemble = encoder, ensemble

    def forward(
        self,
        obs: Obs,
        action: Tensor | None = None,
        *,
        members: Members = None,
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`members` picks some of the K, `masks` scale the outputs of each hidden layer; see `EnsembleMLP`."""
        features = self.encoder(obs)
        if action is not None:
            features = torch.cat([features, action], -1)
        ensemble = self.ensemble
        if isinstance(ensemble, EnsembleMLP):
            out = ensemble(features, members=members, masks=masks)
        else:
            out = ensemble(features, members=members)
        return at_least_float32(out.squeeze(-1) if out.shape[-1] == 1 else out)


class Networks:
    """Makes an agent's networks. Policy and critics get encoders of their own, for the groups that each reads.

    Args:
        observation_space: of one environment.
        settings: layers, groups, whether to normalize.
        network: `factory(in_features, out_features)`, instead of multilayer perceptrons.
        encoder: `factory(space)`, instead of the built-in one for vectors and images.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        settings: NetworkSettings,
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        self._space, self._settings, self._network, self._make_encoder = observation_space, settings, network, encoder
        self.normalizer = ObservationNormalizer(observation_space) if settings.normalize_obs else None
        space = group_space(observation_space, settings.policy_obs or policy_groups(observation_space))
        self.policy_encoder = make_encoder(space, encoder, self.normalizer)

    def trunk(self, outputs: int, *, actions: int = 0) -> nn.Module:
        """The policy's network, from its encoder's features and `actions` numbers besides to (B, outputs)."""
        return self._make(self.policy_encoder.out_features + actions, outputs)

    def critics(self, members: int, *, actions: int = 0, outputs: int = 1, layer_norm: bool = False) -> Critics:
        """`members` critics of observations and of `actions` numbers besides, with `outputs` each."""
        groups = self._settings.critic_obs or critic_groups(self._space)
        space = group_space(self._space, groups)
        encoder = make_encoder(space, self._make_encoder, self.normalizer, shared=self.policy_encoder)
        inputs = encoder.out_features + actions
        if self._network is None:
            sizes = (inputs, *self._settings.hidden, outputs)
            return Critics(encoder, EnsembleMLP(members, sizes, layer_norm=layer_norm))
        return Critics(encoder, Ensemble(members, lambda: self._make(inputs, outputs)))

    def _make(self, inputs: int, outputs: int) -> nn.Module:
        if self._network is None:
            return mlp((inputs, *self._settings.hidden, outputs))
        module = self._network(inputs, outputs)
        was_training = module.training
        with torch.no_grad():
            out = module.eval()(torch.zeros(2, inputs))
        if not isinstance(out, Tensor) or out.shape != (2, outputs):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(
                f"network({inputs}, {outputs}) must map (B, {inputs}) to (B, {outputs}); for B = 2 it gave {got}"
            )
        return module.train(was_training)
