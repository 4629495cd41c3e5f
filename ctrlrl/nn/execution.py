"""How an agent's step runs: eagerly, compiled, or captured as a CUDA graph. One switch, the same step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ctrlrl.errors import UsageError

StepFunction: TypeAlias = Callable[..., dict[str, Tensor]]
"""`step(batch, *draws) -> metrics`: changes weights in place, and depends on nothing but them and its arguments."""

EXECUTIONS = ("eager", "compiled", "captured")


class Mappable(Protocol):
    """A batch: tensors that can be made into others one by one."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Any: ...


_EAGER_CALLS = 3
"""Steps run before a graph is captured, as CUDA asks for: libraries set themselves up in them."""


def executed(step: StepFunction, execution: str, device: torch.device) -> StepFunction:
    """`step`, as `execution` says: the same results within rounding.

    - `eager`: as it is written.
    - `compiled`: by `torch.compile`, the whole step as one graph; the first call takes up to minutes.
    - `captured`: replayed as one CUDA graph, which removes the time between its kernels.

    Raises:
        UsageError: if it cannot run so here; says why, and what to do.
    """
    if execution == "captured":
        if device.type != "cuda":
            raise UsageError(
                f"--agent.execution captured makes a CUDA graph, and the device is {device}: "
                "take --device cuda, or --agent.execution eager or compiled"
            )
        return Captured(step, lambda replayed: _capture(replayed, device))
    if execution == "compiled":
        _require_compiler(device)
        compiled: StepFunction | None = None

        def call(*arguments: Any) -> dict[str, Tensor]:
            nonlocal compiled
            with torch._dynamo.config.patch(trace_autograd_ops=True):  # the step takes gradients itself
                if compiled is None:
                    compiled = torch.compile(step, fullgraph=True, dynamic=False)
                return compiled(*arguments)

        return call
    return step


class Captured:
    """Runs a step on buffers of its own, which `capture` may record once and replay from then on.

    The first calls run the step as it is, so nothing is stepped twice.

    Args:
        step: what to run.
        capture: `capture(work)` records the calls that `work()` makes, without running them, and gives a function that
            runs them again.
    """

    def __init__(self, step: StepFunction, capture: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        self._step, self._capture = step, capture
        self._calls = 0
        self._arguments: list[Any] = []
        self._metrics: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, *arguments: Mappable | Tensor | None) -> dict[str, Tensor]:
        self._calls += 1
        if self._calls <= _EAGER_CALLS:
            return self._step(*arguments)
        if self._replay is None:
            self._arguments = [_map(torch.clone, a) for a in arguments]

            def work() -> None:
                self._metrics = self._step(*self._arguments)

            self._replay = self._capture(work)
        else:
            for ours, given in zip(self._arguments, arguments, strict=True):
                for buffer, value in zip(_tensors(ours), _tensors(given), strict=True):
                    buffer.copy_(value)
        self._replay()
        return {name: value.clone() for name, value in self._metrics.items()}  # the next replay overwrites them


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph.replay


def _map(fn: Callable[[Tensor], Tensor], argument: Mappable | Tensor | None) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return None if argument is None else fn(argument)
    return argument.map(fn)


def _tensors(argument: Mappable | Tensor | None) -> list[Tensor]:
    out: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        out.append(value)
        return value

    _map(keep, argument)
    return out


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UsageError(
                "--agent.execution compiled needs the package triton, which is not installed: "
                "install PyTorch's CUDA build, or take --agent.execution eager or captured"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "--agent.execution compiled needs a C++ compiler on a CPU, and none was found: "
            "install one (apt install g++), or take --agent.execution eager"
        ) from None
