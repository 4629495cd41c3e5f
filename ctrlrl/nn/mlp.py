"""Multilayer perceptrons: one network, or an ensemble of them evaluated as one batched matrix product per layer."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    from ctrlrl.nn.encoder import Encoder

Array = np.ndarray[Any, Any]
Members: TypeAlias = slice | Tensor | None
"""Which of an ensemble's K members to evaluate: a slice, int64 indices (M,), or None for all of them."""
Network: TypeAlias = Callable[[Tensor], Tensor]
"""A module, or what else computes the same: (B, in) to (B, out)."""
NetworkFactory = Callable[[int, int], nn.Module]
"""`factory(in_features, out_features)` gives a module that maps (B, in_features) to (B, out_features)."""


class Backbone(ABC):
    """Networks of one's own in every role, passed to an agent as `network=...`: those of a language model, say.

    What it reads it reads as it is: nothing is standardized. Features are whatever its encoders give, (B, ...).
    """

    @abstractmethod
    def encoder(self, space: gym.Space[Any]) -> Encoder:
        """From observations of `space` to what the networks read."""

    @abstractmethod
    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        """The policy's network, to (B, outputs); where an observation has candidates, a `CandidateNetwork`."""

    @abstractmethod
    def critics(self, members: int, outputs: int, *, candidates: bool) -> nn.Module:
        """`members` critics, to (K, B, outputs); of candidates, to (K, B, n)."""

    def token_critics(self, members: int) -> TokenCritics:
        """`members` critics of each token of an answer, to (K, B, D).

        Raises:
            UsageError: there are none.
        """
        raise UsageError(f"{type(self).__name__} has no critics of tokens (token_critics)")

    @abstractmethod
    def value(self, outputs: int, *, candidates: bool) -> nn.Module:
        """V(s), to (B, outputs); of candidates, to (B, n)."""


class CandidateNetwork(nn.Module, ABC):
    """A network that scores all candidates of an observation together.

    Attributes:
        pretrained: whether its scores mean something before it has learned.
    """

    pretrained = False

    @abstractmethod
    def forward(self, features: Tensor, candidates: Tensor, exists: Tensor | None) -> Tensor:
        """Scores (..., B, n) of `candidates` (B, n, F), finite also of those of which `exists` (B, n) is false."""


class TokenNetwork(nn.Module, ABC):
    """A network that writes answers token by token, each knowing those before it. Ids are -1 after the last one.

    Attributes:
        length: tokens of an answer at most, D.
        pretrained: whether its answers mean something before it has learned.
    """

    length: int
    pretrained = False

    @abstractmethod
    def generate(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """Answers (B, D) int64, drawn from `generator`, or without one the likeliest token each time."""

    @abstractmethod
    def log_prob(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of answers (B, D): each token's log-probability after those before it, and the entropy there; (B, D) each, 0
        where there is no token."""


def knows_something(trunk: nn.Module) -> bool:
    """Whether a policy's `trunk` is of use before it has learned."""
    return isinstance(trunk, CandidateNetwork | TokenNetwork) and trunk.pretrained


class TokenValues(nn.Module, ABC):
    """A network of values that knows what each token of an answer changes."""

    @abstractmethod
    def along(self, features: Tensor, tokens: Tensor) -> Tensor:
        """V before each token of answers (B, D), to (B, D)."""


class TokenCritics(nn.Module, ABC):
    """K networks of values of what is written."""

    @abstractmethod
    def along(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Q of each token of answers (B, D) after those before it, to (K, B, D)."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it is of fewer bits: what a network of the user gives under `torch.autocast`."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 also where `torch.autocast` has others compute in less: for outputs."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(at_least_float32(x))


FEW = 2**16
"""Multiplications of a layer up to which calling PyTorch takes longer than computing."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "elu": lambda: nn.ELU(inplace=True),
}
"""By the names that `agent.activation` takes."""


def _elu(h: Array) -> None:
    np.copyto(h, np.expm1(np.minimum(h, 0)), where=h < 0)


_BY_NUMPY: dict[type[nn.Module], Callable[[Array], Any]] = {
    nn.ReLU: lambda h: np.maximum(h, 0, out=h),
    nn.Tanh: lambda h: np.tanh(h, out=h),
    nn.ELU: _elu,
}
"""What `ACTIVATIONS` do, in place."""


class MLP(nn.Sequential):
    """Linear layers and what is between them, one after the other."""

    _arrays: list[tuple[dict[str, Any], int, Array, int, Array]] | None = None
    """Of each linear layer its parameters, and of weights and bias the address and a view."""

    def without_gradient(self, x: Tensor) -> Tensor:
        """What `forward` gives, the quickest way: for a few rows and units NumPy takes a fifth of the time, most of
        which is calling PyTorch."""
        small = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) * self._largest <= FEW
        by_numpy = small and self._activation is not None and not torch.compiler.is_compiling()
        return self.by_numpy(x) if by_numpy else self(x)

    def by_numpy(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out), both float32 on the CPU, without gradient."""
        assert self._activation is not None
        arrays = self._arrays
        if arrays is None or any(
            p["weight"].data_ptr() != at or p["bias"].data_ptr() != bias_at for p, at, _, bias_at, _ in arrays
        ):
            arrays = []
            for layer in self._linear:
                weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
                addresses = layer.weight.data_ptr(), layer.bias.data_ptr()
                arrays.append((layer._parameters, addresses[0], weight.T, addresses[1], bias))
            self._arrays = arrays
        h = x.numpy()
        last = arrays[-1]
        for entry in arrays:
            _, _, weight, _, bias = entry
            h = h @ weight
            h += bias
            if entry is not last:
                self._activation(h)
        return torch.from_numpy(h)

    @functools.cached_property
    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    @functools.cached_property
    def _activation(self) -> Callable[[Array], Any] | None:
        """Between the layers, by NumPy; None where something else is, too."""
        kinds = {type(layer) for layer in self if not isinstance(layer, nn.Linear)} or {nn.Tanh}
        return _BY_NUMPY.get(min(kinds, key=str)) if len(kinds) == 1 else None

    @functools.cached_property
    def _largest(self) -> int:
        return max(layer.weight.numel() for layer in self._linear)

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_arrays", "_linear", "_activation", "_largest")  # a copy has weights of its own
        return {name: value for name, value in self.__dict__.items() if name not in derived}


def mlp(
    sizes: Sequence[int], *, layer_norm: bool = False, activation: str = "relu", out_gain: float | None = None
) -> MLP:
    """Linear layers of the given sizes with an activation between them, and LayerNorm before each if asked.

    Initialized as `torch.nn.Linear` is: uniform within 1/sqrt(inputs), weights and biases alike. With `out_gain` as
    agents that learn on-policy are (Andrychowicz et al. 2021, arXiv:2006.05990): orthogonal weights, with gain sqrt(2)
    in hidden layers and `out_gain` in the last, and biases of zero.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        if i == len(sizes) - 2:
            layers.append(Float32Linear(inputs, outputs))
        else:
            layers.append(nn.Linear(inputs, outputs))
            layers += [nn.LayerNorm(outputs)] if layer_norm else []
            layers.append(ACTIVATIONS[activation]())
    if out_gain is not None:
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for layer in linear:
            nn.init.orthogonal_(layer.weight, out_gain if layer is linear[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return MLP(*layers)


class EnsembleLinear(nn.Module):
    """K linear layers in one batched product; (B, in) or (K, B, in) to (K, B, out)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: Members = None) -> Tensor:
        weight, bias = _pick(self.weight, members), _pick(self.bias, members)
        if x.dim() == 2:
            x = x.expand(len(weight), *x.shape)
        if weight.shape[-1] == 1:  # a third of the time of a matrix product with one column
            return (x * weight.transpose(1, 2)).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class Float32EnsembleLinear(EnsembleLinear):
    """`EnsembleLinear` that computes in float32 also under `torch.autocast`: for outputs."""

    def forward(self, x: Tensor, members: Members = None) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x, members)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(at_least_float32(x), members)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm over the last dimension with an own gain and offset for each member; (K, B, F) to (K, B, F)."""

    def __init__(self, members: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(members, 1, features))
        self.bias = nn.Parameter(torch.zeros(members, 1, features))

    def forward(self, x: Tensor, members: Members = None) -> Tensor:
        weight, bias = _pick(self.weight, members), _pick(self.bias, members)
        return torch.addcmul(bias, nn.functional.layer_norm(x, (self.features,)), weight)


class EnsembleMLP(nn.Module):
    """K multilayer perceptrons with the layers of `mlp`; (B, in) to (K, B, out)."""

    def __init__(self, members: int, sizes: Sequence[int], *, layer_norm: bool = False) -> None:
        super().__init__()
        self.members = members
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            if i == len(sizes) - 2:
                layers.append(Float32EnsembleLinear(members, inputs, outputs))
            else:
                layers.append(EnsembleLinear(members, inputs, outputs))
                layers += [EnsembleLayerNorm(members, outputs)] if layer_norm else []
                layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, *, members: Members = None, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Of `members` alone where given. `masks`, one (K, B, width) for each hidden layer, multiply what the layer
        gives before LayerNorm and ReLU: dropout, drawn by the caller."""
        hidden = iter(masks or ())
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                x = layer(x)
                continue
            x = layer(x, members)
            if isinstance(layer, EnsembleLinear) and (mask := next(hidden, None)) is not None:
                x = x * mask
        return x


class Ensemble(nn.Module):
    """K networks of any kind, each with its own weights, evaluated by `torch.vmap`; (B, in) to (K, B, out).

    For a user's own critic network; `EnsembleMLP` is the faster equivalent for multilayer perceptrons.
    """

    def __init__(self, members: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.members = members
        networks = [make() for _ in range(members)]
        parameters, buffers = stack_module_state(networks)
        self._names = {name.replace(".", "/"): name for name in [*parameters, *buffers]}  # a module's names hold no "."
        for name, value in parameters.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value.detach()))
        for name, value in buffers.items():
            self.register_buffer(name.replace(".", "/"), value)
        self._skeleton = [networks[0].to("meta")]  # in a list, so that its parameters are not ours

    def forward(self, x: Tensor, *, members: Members = None) -> Tensor:
        """Of `members` alone where given."""
        values = [*self.named_parameters(), *self.named_buffers()]
        state = {self._names[name]: _pick(value, members) for name, value in values}
        out: Tensor = torch.vmap(lambda s: functional_call(self._skeleton[0], s, (x,)), randomness="different")(state)
        return out


def _pick(value: Tensor, members: Members) -> Tensor:
    return value if members is None else value[members]
