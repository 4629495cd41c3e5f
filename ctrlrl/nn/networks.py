"""The networks of an agent: what its policy and its critics read, made for the spaces of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

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
from ctrlrl.nn.mlp import (
    Backbone,
    Ensemble,
    EnsembleMLP,
    Members,
    NetworkFactory,
    TokenCritics,
    TokenValues,
    at_least_float32,
    mlp,
)
from ctrlrl.nn.recurrence import Recurrence, State
from ctrlrl.nn.symmetry import BothSides, SymmetricTrunk, Symmetry
from ctrlrl.tree import Obs, map_obs


class NetworkSettings(Protocol):
    """Of an agent's configuration, what its networks depend on."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def normalize_obs(self) -> bool: ...
    @property
    def min_obs_std(self) -> float: ...
    @property
    def policy_obs(self) -> tuple[str, ...] | None: ...
    @property
    def critic_obs(self) -> tuple[str, ...] | None: ...


class OnPolicySettings(NetworkSettings, Protocol):
    """The same of an agent that learns from rollouts."""

    @property
    def recurrent(self) -> str: ...
    @property
    def recurrent_size(self) -> int: ...
    @property
    def activation(self) -> str: ...


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

    def along(self, obs: Obs, tokens: Tensor) -> Tensor:
        """Q of each token of the answers (B, D) to observations (B, ...), to (K, B, D)."""
        network: nn.Module = self.ensemble
        assert isinstance(network, TokenCritics)
        return at_least_float32(network.along(self.encoder(obs), tokens))


class ValueFunction(nn.Module):
    """V(s): encoder, recurrent layer if any, and trunk; observations (B, ...) to (B,)."""

    def __init__(self, encoder: Encoder, recurrence: Recurrence | None, trunk: nn.Module) -> None:
        super().__init__()
        self.encoder, self.recurrence, self.trunk = encoder, recurrence, trunk

    def forward(self, obs: Obs) -> Tensor:
        """Without memory."""
        return self._value(self.encoder(obs))

    def along(self, obs: Obs, tokens: Tensor) -> Tensor:
        """V before each token of the answers (B, D) to observations (B, ...), to (B, D); without memory."""
        assert isinstance(self.trunk, TokenValues)
        return at_least_float32(self.trunk.along(self.encoder(obs), tokens))

    def step(self, obs: Obs, state: State) -> tuple[Tensor, State]:
        """V (N,) at observations (N, ...), and the state after it."""
        assert self.recurrence is not None
        features, state = self.recurrence(self.encoder(obs), state)
        return self._value(features), state

    def unroll(self, obs: Obs, state: State, start: Tensor) -> tuple[Tensor, list[State], list[State]]:
        """V (L, N) at observations (L, N, ...) in a row, and states, as `Recurrence.unroll`."""
        assert self.recurrence is not None
        features = self.encoder(map_obs(lambda x: x.flatten(0, 1), obs)).unflatten(0, start.shape)
        features, before, after = self.recurrence.unroll(features, state, start)
        return self._value(features), before, after

    def _value(self, features: Tensor) -> Tensor:
        return at_least_float32(self.trunk(features)).squeeze(-1)


class Networks:
    """Makes an agent's networks. Policy and critics get encoders of their own, for the groups that each reads.

    Args:
        observation_space: of one environment.
        settings: layers, groups, whether to normalize.
        network: `factory(in_features, out_features)`, instead of multilayer perceptrons.
        encoder: `factory(space)`, instead of the built-in one for vectors and images.
        action_space: of one environment; where it and what the policy observes are boxes that say how they look in a
            mirror (`ReflectedBox`), the policy is made symmetric.
        one_loss: whether policy and critics are trained by one loss; else that of the critics trains shared parts.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        settings: NetworkSettings,
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
        *,
        action_space: gym.Space[Any] | None = None,
        one_loss: bool = False,
    ) -> None:
        self._one_loss = one_loss
        self._space, self._settings, self._network, self._make_encoder = observation_space, settings, network, encoder
        self.normalizer = None
        if settings.normalize_obs and not isinstance(network, Backbone):
            self.normalizer = ObservationNormalizer(observation_space, settings.min_obs_std)
        space = group_space(observation_space, settings.policy_obs or policy_groups(observation_space))
        if isinstance(network, Backbone):
            self.policy_encoder = network.encoder(space)
        else:
            self.policy_encoder = make_encoder(space, encoder, self.normalizer)
        self._symmetry = Symmetry.of(space, action_space)
        if self._symmetry is not None:
            self.policy_encoder = BothSides(self.policy_encoder, self._symmetry)

    def trunk(self, outputs: int, *, actions: int = 0, layer_norm: bool = False) -> nn.Module:
        """The policy's network, from its encoder's features and `actions` numbers besides to (B, outputs)."""
        return self._policy_trunk(self.policy_encoder.out_features, outputs, actions=actions, layer_norm=layer_norm)

    def critic_encoder(self) -> Encoder:
        """The encoder of what critics read; images that the policy reads too are seen by the same convolution."""
        groups = self._settings.critic_obs or critic_groups(self._space)
        space = group_space(self._space, groups)
        if isinstance(self._network, Backbone):
            return self._network.encoder(space)
        return make_encoder(
            space,
            self._make_encoder,
            self.normalizer,
            shared=self.policy_encoder,
            trains_shared=not self._one_loss,
        )

    def critics(
        self,
        members: int,
        *,
        actions: int = 0,
        outputs: int = 1,
        layer_norm: bool = False,
        encoder: Encoder | None = None,
    ) -> Critics:
        """`members` critics of observations and of `actions` numbers besides, with `outputs` each; by default with an
        encoder of their own."""
        encoder = encoder or self.critic_encoder()
        if isinstance(self._network, Backbone):
            made = self._network.critics(members, outputs, candidates=actions > 0)
            return Critics(encoder, cast(Ensemble, made))
        inputs = encoder.out_features + actions
        if self._network is None:
            sizes = (inputs, *self._settings.hidden, outputs)
            return Critics(encoder, EnsembleMLP(members, sizes, layer_norm=layer_norm))
        return Critics(encoder, Ensemble(members, lambda: self._make(inputs, outputs)))

    def token_critics(self, members: int) -> Critics:
        """`members` critics of observations and the tokens of an answer."""
        assert isinstance(self._network, Backbone)
        return Critics(self.critic_encoder(), cast(Ensemble, self._network.token_critics(members)))

    def value(self, *, actions: int = 0, outputs: int = 1, layer_norm: bool = False) -> ValueFunction:
        """V(s) of what critics read; its trunk takes `actions` numbers besides and gives `outputs`."""
        encoder = self.critic_encoder()
        if isinstance(self._network, Backbone):
            return ValueFunction(encoder, None, self._network.value(outputs, candidates=actions > 0))
        return ValueFunction(encoder, None, self._make(encoder.out_features + actions, outputs, layer_norm=layer_norm))

    def _policy_trunk(self, inputs: int, outputs: int, *, actions: int, **how: Any) -> nn.Module:
        if self._symmetry is None:
            return self._make(inputs + actions, outputs, **how)
        return SymmetricTrunk(self._make(inputs // 2, outputs, **how), self._symmetry, outputs)

    def _make(self, inputs: int, outputs: int, **how: Any) -> nn.Module:
        if self._network is None:
            return mlp((inputs, *self._settings.hidden, outputs), **how)
        module = self._network(inputs, outputs)
        if isinstance(self._network, Backbone):
            return module
        was_training = module.training
        with torch.no_grad():
            out = module.eval()(torch.zeros(2, inputs))
        if not isinstance(out, Tensor) or out.shape != (2, outputs):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(
                f"network({inputs}, {outputs}) must map (B, {inputs}) to (B, {outputs}); for B = 2 it gave {got}"
            )
        return module.train(was_training)


class OnPolicyNetworks(Networks):
    """Those of agents that learn from rollouts: with a recurrent layer where asked, trained by one loss, initialized
    with a gain of the last layer (see `mlp`). Arguments as those of `Networks`."""

    def __init__(
        self,
        observation_space: gym.Space[Any],
        settings: OnPolicySettings,
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
        *,
        action_space: gym.Space[Any] | None = None,
    ) -> None:
        super().__init__(observation_space, settings, network, encoder, action_space=action_space, one_loss=True)
        if self._symmetry is not None and settings.recurrent != "none":
            raise UsageError(
                "agent.recurrent does not go with a task whose policy is to be symmetric: take --agent.recurrent none, "
                "or turn the task's mirror off (of ours by --env-kwargs '{\"symmetric\": false}')"
            )
        if isinstance(network, Backbone) and settings.recurrent != "none":
            raise UsageError("agent.recurrent is for the built-in networks, not for a language model: leave it out")
        self._recurrent, self._size, self._activation = settings.recurrent, settings.recurrent_size, settings.activation

    def policy_trunk(self, outputs: int, *, actions: int = 0, gain: float) -> tuple[Recurrence | None, nn.Module]:
        """The policy's recurrent layer, if any, and its network from there, with `actions` numbers besides, to
        (B, outputs)."""
        memory, inputs = self._memory(self.policy_encoder)
        how = {"activation": self._activation, "out_gain": gain}
        return memory, self._policy_trunk(inputs, outputs, actions=actions, **how)

    def value_function(self, *, gain: float) -> ValueFunction:
        """V(s)."""
        encoder = self.critic_encoder()
        if isinstance(self._network, Backbone):
            return ValueFunction(encoder, None, self._network.value(1, candidates=False))
        memory, inputs = self._memory(encoder)
        return ValueFunction(encoder, memory, self._make(inputs, 1, activation=self._activation, out_gain=gain))

    def _memory(self, encoder: Encoder) -> tuple[Recurrence | None, int]:
        """The recurrent layer after `encoder`, if any, and how many features there are then."""
        if self._recurrent == "none":
            return None, encoder.out_features
        return Recurrence(self._recurrent, encoder.out_features, self._size), self._size
