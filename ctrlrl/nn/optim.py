"""Adam, and how its state is saved without pickling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def adam(parameters: Sequence[Tensor], lr: float) -> torch.optim.Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with its default moments, as one fused kernel."""
    return torch.optim.Adam(parameters, lr, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """One step down the gradient of `loss` with respect to `parameters` alone.

    The gradients of whatever else the loss depends on (the critics, in a policy's loss) are never computed.
    """
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def polyak(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """targets += tau * (sources - targets), all in one call."""
    torch._foreach_lerp_(list(targets), list(sources), tau)


def adam_state(optimizer: torch.optim.Adam) -> list[dict[str, Tensor]]:
    """Step counts and moments, one dict per parameter; empty before the first step."""
    return [
        dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"] if p in optimizer.state
    ]


def load_adam_state(optimizer: torch.optim.Adam, state: Sequence[dict[str, Any]]) -> None:
    """Go back to what `adam_state` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not state:
        optimizer.state.clear()
        return
    for parameter, saved in zip(parameters, state, strict=True):
        optimizer.state[parameter] = {name: value.to(parameter.device).clone() for name, value in saved.items()}
