"""Running normalization of observations, kept by the agent and referred to by its policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNormalizer(nn.Module):
    """Standardizes (..., *shape) by the mean and population variance of all rows seen so far.

    Statistics are float64 and combined batch by batch (Chan et al. 1979), so that 1e9 rows lose no precision.
    A standard deviation counts as `floor` at least, so that what hardly moved so far is not blown up once it does.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self, shape: tuple[int, ...], *, floor: float = 0.0, clip: float = 10.0, epsilon: float = 1e-8
    ) -> None:
        super().__init__()
        self.floor, self.clip, self.epsilon = floor, clip, epsilon
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        # What `forward` uses: mean and 1 / std in float32, which is what observations come in.
        self.register_buffer("shift", torch.zeros(shape), persistent=False)
        self.register_buffer("scale", torch.ones(shape), persistent=False)
        self._derive()
        self.register_load_state_dict_post_hook(RunningNormalizer._derive)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _derive(self, *loading: object) -> None:
        self.shift.copy_(self.mean)
        self.scale.copy_((self.variance + self.epsilon).clamp(min=self.floor**2).rsqrt())

    @torch.no_grad()
    def update(self, rows: Tensor, valid: Tensor) -> None:
        """Take in `rows` (N, *shape) where `valid` (N,) is true, each once."""
        rows = rows.to(torch.float64)
        rows = torch.where(valid.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)  # what is left out may be NaN
        weight = valid.to(torch.float64).view(-1, *[1] * (rows.dim() - 1))
        count = weight.sum()
        mean = (rows * weight).sum(0) / count.clamp(min=1)
        variance = ((rows - mean).square() * weight).sum(0) / count.clamp(min=1)
        total = (self.count + count).clamp(min=1)
        delta = mean - self.mean
        old = torch.where(self.count > 0, self.variance * self.count, torch.zeros_like(self.variance))
        spread = old + variance * count + delta.square() * self.count * count / total
        self.variance.copy_(torch.where(self.count + count > 0, spread / total, self.variance))
        self.mean += delta * count / total
        self.count += count
        self._derive()

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / std in float32, clipped to +-`clip` standard deviations."""
        return (x.to(torch.float32) - self.shift).mul_(self.scale).clamp_(-self.clip, self.clip)
