"""Action distributions. Log-probabilities are (..., D): one entry per decision, and a whole action vector is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctrlrl.nn.mlp import TokenNetwork, at_least_float32


@dataclass(frozen=True, slots=True)
class TanhNormal:
    """tanh of a diagonal Gaussian: the density of actions in (-1, 1)^A, before they are scaled to the environment.

    The one space for log-probability, its Jacobian and SAC's target entropy is this one, so the same settings serve
    actuators of any range (Haarnoja et al. 2018, arXiv:1801.01290, appendix C).
    """

    mean: Tensor  # (..., A) of the Gaussian
    log_std: Tensor  # (..., A)

    @property
    def mode(self) -> Tensor:
        """tanh of the mean (..., A): the action a deterministic policy takes."""
        return torch.tanh(self.mean)

    def rsample(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reparameterized sample from standard normal `noise` (..., A): action, log-density (..., 1), raw u.

        The raw sample u = atanh(action) is returned because atanh cannot recover it from a saturated action.
        """
        out: tuple[Tensor, Tensor, Tensor] = _Squashed.apply(self.mean, self.log_std, noise)  # type: ignore[no-untyped-call]
        return out

    def sample(self, generator: torch.Generator) -> Tensor:
        """An action (..., A), with noise from `generator` and no gradient."""
        with torch.no_grad():
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
            return torch.addcmul(self.mean, noise, self.log_std.exp()).tanh_()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (..., 1) of `action` (..., A) in [-1, 1]; actions on the bound count as just inside it."""
        bound = 1 - torch.finfo(action.dtype).eps
        raw = torch.atanh(action.clamp(-bound, bound))
        noise = (raw - self.mean) * torch.exp(-self.log_std)
        gaussian = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (gaussian - log_tanh_jacobian(raw)).sum(-1, keepdim=True)

    def entropy(self, noise: Tensor) -> Tensor:
        """One-sample estimate (..., 1) from standard normal `noise` (..., A); it has no closed form."""
        return -self.rsample(noise)[1]


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """Independent normal numbers that make up one decision."""

    mean: Tensor  # (..., A)
    log_std: Tensor  # (..., A), or (A,) where it is the same everywhere

    @property
    def mode(self) -> Tensor:
        """The mean (..., A)."""
        return self.mean

    def sample(self, generator: torch.Generator) -> Tensor:
        """A value (..., A), with noise from `generator` and no gradient."""
        with torch.no_grad():
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
            return torch.addcmul(self.mean, noise, self.log_std.exp())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (..., 1) of `value` (..., A)."""
        noise = (value - self.mean) * torch.exp(-self.log_std)
        terms = 0.5 * noise.square() + self.log_std
        return -terms.sum(-1, keepdim=True) - 0.5 * math.log(2 * math.pi) * value.shape[-1]

    def entropy(self) -> Tensor:
        """Entropy (..., 1) in nats, exact."""
        each = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        return each.expand_as(self.mean).sum(-1, keepdim=True)

    def score(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density and entropy, (..., 1) each."""
        return self.log_prob(value), self.entropy()


@dataclass(frozen=True, slots=True)
class Categorical:
    """One categorical distribution for each of D decisions, each over the same n choices, some of which may not exist.

    D is 1 for Discrete actions and for sets of candidates, and the number of dimensions for MultiDiscrete ones, padded
    to the largest. A choice that does not exist has the logit -inf: its probability is exactly 0, it is never drawn,
    and no gradient reaches it. What is computed of it stays finite, so that a sum weighted by probabilities can run
    over all n.

    A decision without any choice has probabilities and an entropy of 0, not NaN: so is the observation that ends an
    episode in many environments with masks, and nothing there counts.
    """

    logits: Tensor  # (..., D, n); -inf: there is no such choice

    @classmethod
    def masked(cls, logits: Tensor, mask: Tensor) -> Categorical:
        """Of the choices where `mask` is true: (..., D, n) like `logits`, or (..., n), the same for every decision."""
        if mask.dim() < logits.dim():
            mask = mask.unsqueeze(-2)
        return cls(logits.masked_fill(mask.logical_not(), -math.inf))

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities (..., D, n), float32 or better; -1e9, which is finite, of what does not exist."""
        missing = self._missing
        lowest = torch.finfo(self._logits.dtype).min  # -inf would be NaN where nothing exists
        return self._logits.masked_fill(missing, lowest).log_softmax(-1).masked_fill(missing, -1e9)

    @property
    def probs(self) -> Tensor:
        """Probabilities (..., D, n)."""
        return self.log_probs.exp()

    @property
    def mode(self) -> Tensor:
        """The likeliest choices (..., D), int64; of equal ones the first."""
        return self.logits.argmax(-1)

    @property
    def counts(self) -> Tensor:
        """How many choices there are (..., D), int64; the entropy is at most log of it."""
        return self._missing.logical_not().sum(-1)

    def log_prob(self, choice: Tensor) -> Tensor:
        """Log-probabilities (..., D) of `choice` (..., D), int64."""
        return self.log_probs.gather(-1, choice.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropies (..., D), exact, in nats."""
        log_probs = self.log_probs
        return -(log_probs.exp() * log_probs).sum(-1)

    def score(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `choice` (..., D), and entropies, (..., D) each."""
        return self.log_prob(choice), self.entropy()

    def sample(self, generator: torch.Generator) -> Tensor:
        """Choices (..., D), int64, drawn from `generator`: the largest of the logits plus Gumbel noise."""
        with torch.no_grad():
            wait = torch.empty_like(self._logits).exponential_(generator=generator)  # -log of it is Gumbel noise
            return (self._logits - wait.clamp_(min=torch.finfo(wait.dtype).tiny).log_()).argmax(-1)

    @property
    def _logits(self) -> Tensor:
        return at_least_float32(self.logits)

    @property
    def _missing(self) -> Tensor:
        return self.logits == -math.inf  # a NaN is none of these, and comes out as what it is


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Answers (B, D) written token by token by `network`; -1 after the last token."""

    network: TokenNetwork
    features: Tensor  # (B, ...), what it reads

    @property
    def mode(self) -> Tensor:
        """The answers of the likeliest token each time (B, D), int64."""
        with torch.no_grad():
            return self.network.generate(self.features, None)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Answers (B, D), int64, drawn from `generator`."""
        with torch.no_grad():
            return self.network.generate(self.features, generator)

    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of answers (B, D), and the entropy where it was drawn; (B, D) each."""
        return self.network.log_prob(self.features, tokens)


Distribution: TypeAlias = DiagonalGaussian | Categorical | TokenSequence
"""What a stochastic policy draws decisions from, and `score`s them by."""


class _Squashed(torch.autograd.Function):
    """`TanhNormal.rsample` with its gradient written out: a third of the operations that autograd would record.

    With u = mean + noise * std, a = tanh(u) and l the log-density: da/du = 1 - a^2 and dl/du = 2 a (from the Jacobian;
    the Gaussian's own part does not depend on u for given noise), and l has -log_std besides.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spread = noise * log_std.exp()
        raw = mean + spread
        action = torch.tanh(raw)
        terms = torch.addcmul(log_std + log_tanh_jacobian(raw), noise, noise, value=0.5)
        log_prob = -terms.sum(-1, keepdim=True) - 0.5 * math.log(2 * math.pi) * mean.shape[-1]
        ctx.save_for_backward(action, spread)
        return action, log_prob, raw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_action: Tensor, to_log_prob: Tensor, to_raw: Tensor) -> tuple[Tensor, Tensor, None]:
        action, spread = ctx.saved_tensors
        to_mean = torch.addcmul(to_raw + to_action, action, 2 * to_log_prob - to_action * action)
        return to_mean, torch.addcmul(-to_log_prob.expand_as(spread), to_mean, spread), None


def log_tanh_jacobian(raw: Tensor) -> Tensor:
    """log |d tanh(u) / du| = log(1 - tanh(u)^2), in the form that stays exact where tanh saturates.

    The common log(1 - tanh^2 + 1e-6) is bounded below by -13.8 and biases saturated actions.
    """
    return 2 * (math.log(2) - raw - F.softplus(-2 * raw))
