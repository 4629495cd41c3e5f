"""Policies that plan a chunk of H actions at once and execute some of them before they plan again.

Shapes: B batch, N environments, H actions of a chunk, A action dimensions, F features, K modes.
Chunks live in [-1, 1]^A; which of their actions an episode still had is a mask (B, H).

Heads: what a network's outputs mean.

    regression   the chunk itself; mean absolute error, as ACT (Zhao et al. 2023, arXiv:2304.13705), which found it more
                 precise than squared error
    mixture      K Gaussians over the whole chunk, so that one plan is of one mode; -log likelihood, as the GMM policies
                 of robomimic (Mandlekar et al. 2021, arXiv:2108.03298), whose mixtures are over single actions
    flow         a velocity field that carries noise to chunks; conditional flow matching on straight lines (Lipman et
                 al. 2023, arXiv:2210.02747, eq. 23 with sigma_min 0), Euler steps, as pi0 (Black et al. 2024,
                 arXiv:2410.24164)

The mode of a flow policy begins at zero noise, that of a mixture is its likeliest mean.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.nn.encoder import Encoder, ObservationNormalizer
from ctrlrl.nn.mlp import Float32Linear, at_least_float32
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState
from ctrlrl.tree import Obs

TIME_FEATURES = 16
"""Sines and cosines of the time of a flow, which its network reads."""
HEADS_OF_ATTENTION = 4


class ChunkNetwork(nn.Module, ABC):
    """Features, and of a flow a noisy chunk and its time, to numbers for each action of a chunk and for the whole."""

    @abstractmethod
    def forward(
        self, features: Tensor, noisy: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (B, F), noisy (B, H, A) and time (B,) to (B, H, per_action) and (B, whole)."""


class MLPChunkNetwork(ChunkNetwork):
    """A multilayer perceptron over everything at once.

    Args:
        trunk: (B, F + `inputs`) to (B, chunk * per_action + whole).
        chunk: H.
        per_action: numbers for each action.
    """

    def __init__(self, trunk: nn.Module, chunk: int, per_action: int) -> None:
        super().__init__()
        self.trunk, self.chunk, self.per_action = trunk, chunk, per_action

    @staticmethod
    def inputs(chunk: int, dim: int, flow: bool) -> int:
        """Numbers that the trunk reads beside the features."""
        return chunk * dim + TIME_FEATURES if flow else 0

    def forward(
        self, features: Tensor, noisy: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if noisy is not None and time is not None:
            features = torch.cat([features, noisy.flatten(1), time_features(time)], -1)
        out = at_least_float32(self.trunk(features))
        split = self.chunk * self.per_action
        return out[:, :split].reshape(-1, self.chunk, self.per_action), out[:, split:]


class TransformerChunkNetwork(ChunkNetwork):
    """A transformer over one token for the observation and one for each action of the chunk.

    Args:
        features: F.
        chunk: H.
        dim: A, where noisy chunks are read; else 0.
        widths: of each layer, all alike and a multiple of `HEADS_OF_ATTENTION`.
        per_action: numbers for each action.
        whole: numbers for the whole chunk.
    """

    def __init__(
        self, features: int, chunk: int, dim: int, widths: tuple[int, ...], per_action: int, whole: int
    ) -> None:
        super().__init__()
        width = widths[0]
        self.observation = nn.Linear(features, width)
        self.places = nn.Parameter(torch.randn(1, chunk + 1, width) * 0.02)
        self.noisy = nn.Linear(dim, width) if dim else None
        self.time = nn.Linear(TIME_FEATURES, width) if dim else None
        self.layers = nn.ModuleList(_Block(width) for _ in widths)
        self.norm = nn.LayerNorm(width)
        self.per_action = Float32Linear(width, per_action)
        self.whole = Float32Linear(width, whole) if whole else None

    def forward(
        self, features: Tensor, noisy: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        tokens = self.places.expand(len(features), -1, -1)
        first = self.observation(features)
        if self.noisy is not None and self.time is not None and noisy is not None and time is not None:
            first = first + self.time(time_features(time))
            actions = tokens[:, 1:] + self.noisy(noisy)
        else:
            actions = tokens[:, 1:]
        x = torch.cat([(tokens[:, 0] + first)[:, None], actions], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        per_action = self.per_action(x[:, 1:])
        return per_action, x.new_zeros(len(x), 0) if self.whole is None else self.whole(x[:, 0])


class _Block(nn.Module):
    """Self-attention and two linear layers, with LayerNorm before each (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS_OF_ATTENTION, -1)).transpose(1, 2)  # (B, heads, T, width / heads)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        out: Tensor = x + self.layers(self.before_layers(x))
        return out


def time_features(time: Tensor) -> Tensor:
    """(B,) in [0, 1] to (B, TIME_FEATURES)."""
    frequencies = math.pi * 2.0 ** torch.arange(TIME_FEATURES // 2, device=time.device)
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class ChunkHead(nn.Module, ABC):
    """What a `ChunkNetwork`'s outputs mean.

    Attributes:
        noise: how many numbers of noise a sample takes, (B, noise); none for a head that has one answer.
    """

    noise: int = 0
    network: ChunkNetwork

    @abstractmethod
    def plan(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """A chunk (B, H, A) in [-1, 1]: a sample, of standard normal noise (B, noise), or without noise the mode."""

    @abstractmethod
    def loss(self, features: Tensor, target: Tensor, mask: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        """Of each row, (B,), for chunks `target` (B, H, A) of which `mask` (B, H) are there."""

    def draw(self, groups: int, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The random numbers of that loss, (G, B, ...)."""
        return ()


class RegressionHead(ChunkHead):
    """The chunk itself."""

    def __init__(self, network: ChunkNetwork) -> None:
        super().__init__()
        self.network = network

    def plan(self, features: Tensor, noise: Tensor | None) -> Tensor:
        return torch.tanh(self.network(features)[0])

    def loss(self, features: Tensor, target: Tensor, mask: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        return masked_mean((self.plan(features, None) - target).abs().mean(-1), mask)


class MixtureHead(ChunkHead):
    """K diagonal Gaussians over whole chunks; `network` gives for each action K means and K log standard deviations of
    each dimension, and for the whole K logits.

    Args:
        network: with per_action 2 K A and whole K.
        modes: K.
        dim: A.
        chunk: H.
        log_std_bounds: of the log standard deviations.
    """

    def __init__(
        self, network: ChunkNetwork, modes: int, dim: int, chunk: int, log_std_bounds: tuple[float, float]
    ) -> None:
        super().__init__()
        self.network, self.modes, self.dim, self.chunk = network, modes, dim, chunk
        self.log_std_bounds = log_std_bounds
        self.noise = modes + chunk * dim

    def _mixture(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), means and log standard deviations (B, H, K, A)."""
        per_action, logits = self.network(features)
        parts = per_action.reshape(-1, self.chunk, 2, self.modes, self.dim)
        mean, log_std = parts[:, :, 0], parts[:, :, 1]
        return logits, torch.tanh(mean), log_std.clamp(*self.log_std_bounds)

    def plan(self, features: Tensor, noise: Tensor | None) -> Tensor:
        logits, mean, log_std = self._mixture(features)
        if noise is None:
            return _pick(mean, logits.argmax(-1))
        chance, rest = noise[:, : self.modes], noise[:, self.modes :]
        # Gumbel's maximum of the logits is a draw of their softmax; the noise's distribution function is uniform.
        uniform = (0.5 * (1 + torch.erf(chance / math.sqrt(2)))).clamp(1e-6, 1 - 1e-6)
        mode = (logits - torch.log(-torch.log(uniform))).argmax(-1)
        deviation = _pick(log_std, mode).exp() * rest.reshape(-1, self.chunk, self.dim)
        return (_pick(mean, mode) + deviation).clamp(-1, 1)

    def loss(self, features: Tensor, target: Tensor, mask: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        logits, mean, log_std = self._mixture(features)
        z = (target.unsqueeze(-2) - mean) * torch.exp(-log_std)  # (B, H, K, A)
        log_prob = (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # (B, H, K)
        log_prob = (log_prob * mask.unsqueeze(-1)).sum(1)  # of whole chunks, (B, K)
        joint = torch.logsumexp(logits.log_softmax(-1) + log_prob, -1)
        return -joint / mask.sum(-1).clamp(min=1)


class FlowHead(ChunkHead):
    """A velocity field from standard normal noise at time 0 to chunks at time 1.

    Args:
        network: that reads noisy chunks and times, with per_action A.
        steps: Euler steps of a sample.
        dim: A.
        chunk: H.
    """

    def __init__(self, network: ChunkNetwork, steps: int, dim: int, chunk: int) -> None:
        super().__init__()
        self.network, self.steps, self.dim, self.chunk = network, steps, dim, chunk
        self.noise = chunk * dim

    def plan(self, features: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            x = torch.zeros(len(features), self.chunk, self.dim, device=features.device)
        else:
            x = noise.reshape(-1, self.chunk, self.dim)
        for i in range(self.steps):
            time = torch.full((len(features),), i / self.steps, device=features.device)
            x = x + self.network(features, x, time)[0] / self.steps
        return x.clamp(-1, 1)

    def loss(self, features: Tensor, target: Tensor, mask: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        noise, time = draws
        along = time[:, None, None]
        noisy = (1 - along) * noise + along * target
        velocity = self.network(features, noisy, time)[0]
        return masked_mean((velocity - (target - noise)).square().mean(-1), mask)

    def draw(self, groups: int, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        device = generator.device
        noise = torch.randn(groups, rows, self.chunk, self.dim, generator=generator, device=device)
        return noise, torch.rand(groups, rows, generator=generator, device=device)


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Means (B,) of `value` (B, H) where `mask` (B, H) is true."""
    return (value * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _pick(value: Tensor, mode: Tensor) -> Tensor:
    """Of `value` (B, H, K, A) the entries (B, H, A) of the modes (B,)."""
    chosen = torch.arange(value.shape[2], device=mode.device) == mode[:, None]  # (B, K)
    return (value * chosen[:, None, :, None].float()).sum(2)


class ChunkPolicy(Policy):
    """Plans chunks of H actions over a bounded Box, and executes them in a receding horizon.

    Without `ensemble`, the first `execute` actions of a plan are executed, then it plans again. With it, it plans at
    each step, and acts by the mean of all plans for this step, weighted by exp(-ensemble * i), i = 0 the oldest one
    (temporal ensembling, ACT's section IV.A).

    Its memory, zeros at first, is `plan` (N, H, A), from this step on, and `left` (N,), how many of its actions are to
    be executed; or with `ensemble` the last H plans (N, H, H, A), newest first, and `count` (N,), how many there are.

    Args:
        encoder: of the observations.
        head: of the chunks.
        space: of one action.
        chunk: H.
        execute: actions that are executed of one plan, 1 to H.
        ensemble: None, or the rate of the weights.
        normalizer: what `encoder` refers to.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ChunkHead,
        space: gym.spaces.Box,
        chunk: int,
        execute: int,
        ensemble: float | None,
        normalizer: ObservationNormalizer | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer  # here, so that it is saved with the policy
        self.encoder, self.head, self.scaling = encoder, head, ActionScaling(space)
        self.chunk, self.execute, self.ensemble = chunk, execute, ensemble
        self._dim = math.prod(space.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChunkPolicy:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied.encoder.refer_to(copied.normalizer)  # and not to that of the one it is a copy of
        return copied

    def initial_state(self, n: int) -> PolicyState:
        plans = () if self.ensemble is None else (self.chunk,)
        return {
            "plan": torch.zeros(n, *plans, self.chunk, self._dim, device=self.device),
            "left" if self.ensemble is None else "count": torch.zeros(n, dtype=torch.int64, device=self.device),
        }

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """The next action of each row's plan, which is made anew where it is due: a sample if `explore`, else the mode;
        extras are empty."""
        n = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        state = state or self.initial_state(n)
        plan = state["plan"]
        if self.ensemble is not None:
            former = torch.cat([plan[:, :-1, 1:], torch.zeros_like(plan[:, :-1, :1])], 2)
            plan = torch.cat([self._planned(obs, n, explore)[:, None], former], 1)
            count = (state["count"] + 1).clamp(max=self.chunk)
            oldest_first = count[:, None] - 1 - torch.arange(self.chunk, device=count.device)  # (N, H)
            weights = torch.exp(-self.ensemble * oldest_first.float()) * (oldest_first >= 0).float()
            unit = (plan[:, :, 0] * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)
            return self.scaling.to_environment(unit), {"plan": plan, "count": count}, {}
        due, left = state["left"] <= 0, state["left"]
        if torch.compiler.is_compiling() or bool(due.any()):  # what is exported plans at each step
            plan = torch.where(due[:, None, None], self._planned(obs, n, explore), plan)
            left = torch.where(due, self.execute, left)
        following = torch.cat([plan[:, 1:], plan[:, -1:]], 1)
        return self.scaling.to_environment(plan[:, 0]), {"plan": following, "left": left - 1}, {}

    def _planned(self, obs: Obs, n: int, explore: bool) -> Tensor:
        noise = None
        if explore and self.head.noise:
            noise = torch.randn(n, self.head.noise, generator=self.require_generator(), device=self.device)
        return self.head.plan(self.encoder(obs), noise)
