"""Adam and the target networks' moving average, as few kernels over whole networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters of `modules` that are learned, each once: what is frozen, beside an adapter say, is left out."""
    found = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    return [parameter for parameter in found if parameter.requires_grad]


def trained_beside(module: nn.Module, copied: nn.Module) -> list[nn.Parameter]:
    """The parameters of `copied`, a copy of `module`, in the places of those that `trained` gives of that."""
    pairs = zip(module.parameters(), copied.parameters(), strict=True)
    return [theirs for own, theirs in pairs if own.requires_grad]


class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with its default moments, one fused kernel per step.

    As `torch.optim.Adam(parameters, lr, eps=eps, fused=True)`, bit for bit. Its step costs a tenth: gradients are
    handed over instead of being looked up, all parameters count their steps in one tensor, and nothing is created at
    the first step, so the step can be compiled or captured in a CUDA graph.

    Args:
        parameters: what is stepped, on one device.
        lr: step size, or one for each parameter; 0-d tensors where they change.
        eps: added to the root of the second moment.

    Raises:
        UsageError: if a parameter has gaps in memory (a part of a larger tensor), which the kernel would step too.
    """

    def __init__(
        self, parameters: Sequence[Tensor], lr: float | Tensor | Sequence[float | Tensor], *, eps: float = 1e-8
    ) -> None:
        self.parameters = list(parameters)
        self.lrs = list(lr) if isinstance(lr, Sequence) else [lr] * len(self.parameters)
        self.eps = eps
        by_lr = itertools.groupby(range(len(self.lrs)), lambda i: id(self.lrs[i]))
        self._groups = [list(places) for _, places in by_lr]  # one kernel each
        self.first = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.second = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.steps = torch.zeros((), device=self.parameters[0].device)
        for p, moment in zip(self.parameters, self.first, strict=True):
            if p.stride() != moment.stride():
                raise UsageError(
                    f"a parameter {tuple(p.shape)} with strides {p.stride()} is part of a larger tensor; "
                    "make it one of its own: nn.Parameter(value.clone())"
                )

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Step down `gradients`, one for each parameter and of its shape."""
        self.steps += 1
        if torch.compiler.is_compiling():  # which cannot trace the fused kernel, and fuses this
            # Both moments' bias corrections as two numbers, which leaves one root and one quotient for each weight.
            root = (1 - 0.999**self.steps).sqrt()
            bias, eps = 1 - 0.9**self.steps, self.eps * root
            each = zip(self.parameters, gradients, self.first, self.second, self.lrs, strict=True)
            for p, gradient, first, second, lr in each:
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient * gradient, 0.001)
                p.sub_(lr * root / bias * first / (second.sqrt() + eps))
            return
        # The fused kernel walks through memory: it takes a gradient of another layout for one of the parameter's own.
        same = [
            g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(self.parameters, gradients, strict=True)
        ]
        for which in self._groups:
            torch._fused_adam_(
                [self.parameters[i] for i in which],
                [same[i] for i in which],
                [self.first[i] for i in which],
                [self.second[i] for i in which],
                [],
                [self.steps] * len(which),
                lr=self.lrs[which[0]],
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def descend(self, loss: Tensor, *, max_norm: float = math.inf) -> None:
        """Step down the gradient of `loss` with respect to the parameters alone, shortened to `max_norm` in all.

        The gradients of whatever else the loss depends on (the critics, in a policy's loss) are never computed. A
        parameter that no loss ever depends on (an unused layer in a network of the user) stays as it is.
        """
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(p) if gradient is None else gradient
            for p, gradient in zip(self.parameters, found, strict=True)
        ]
        if max_norm < math.inf:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            gradients = list(torch._foreach_mul(gradients, (max_norm / (norm + 1e-6)).clamp(max=1)))
        self.step(gradients)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Both moments of each parameter, and the number of steps."""
        return {"first": self.first, "second": self.second, "steps": [self.steps]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Go back to what `state_dict` returned."""
        for name, values in self.state_dict().items():
            for value, saved in zip(values, state[name], strict=True):
                value.copy_(saved)


@torch.no_grad()
def polyak(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """targets += tau * (sources - targets), all in one call."""
    torch._foreach_lerp_(list(targets), list(sources), tau)
