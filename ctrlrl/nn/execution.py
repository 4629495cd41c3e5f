"""How an agent's step runs: eagerly, compiled, or captured as a CUDA graph. One switch, the same step."""

from __future__ import annotations

import importlib.util
import signal
import sysconfig
from collections.abc import Callable
from pathlib import Path
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

    - `eager` (or `auto`, which the training decides): as it is written.
    - `compiled`: by `torch.compile`, the whole step as one graph; the first call takes up to a minute.
    - `captured`: replayed as one CUDA graph, which removes the time between its kernels.

    The first call raises `UsageError` if it cannot run so here; `unavailable` says so before.
    """
    if execution == "captured":
        return Captured(step, lambda work: _capture(work, device))
    if execution == "compiled":
        return Compiled(step, device)
    return step


def unavailable(execution: str, device: torch.device) -> str | None:
    """Why a step cannot run so on `device`, and what would help; None if it can."""
    if execution == "captured" and device.type != "cuda":
        return f"a CUDA graph needs --device cuda, and the device is {device}"
    if execution == "compiled" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "compiling for a GPU needs the package triton, which comes with PyTorch's CUDA build"
    if execution == "compiled" and device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "compiling for a CPU needs a C++ compiler, and none was found (on Debian: apt install g++)"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return "compiling for a CPU needs Python's header files (on Debian: apt install python3-dev)"
    return None


class Compiled:
    """Runs a step as one graph by `torch.compile`, which is made at the first call.

    Everything is compiled in this process (PyTorch's default are helper processes, which would see a Ctrl-C too), and
    steps that make graphs of gradients are traced whole. Both are settings of the process.
    """

    def __init__(self, step: StepFunction, device: torch.device) -> None:
        self._step, self._device = step, device
        self._compiled: StepFunction | None = None

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        if self._compiled is not None:
            return self._compiled(*arguments)
        if reason := unavailable("compiled", self._device):
            raise UsageError(f"--agent.execution compiled: {reason}. Or take --agent.execution eager")
        import torch._dynamo.config as tracing
        import torch._inductor.config as compiling

        tracing.trace_autograd_ops = True
        tracing.recompile_limit = tracing.accumulated_recompile_limit = 100_000  # each agent is a new graph
        compiling.compile_threads = 1
        compiled = torch.compile(self._step, fullgraph=True, dynamic=False)
        # A Ctrl-C would reach the C++ compiler too, and end it: it is heard when the compiler is done.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            metrics: dict[str, Tensor] = compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            summary = " ".join(str(error).split())[:400]
            raise UsageError(
                f"torch.compile cannot compile the update here: {summary} ... Take --agent.execution eager"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._compiled = compiled
        return metrics


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
    if reason := unavailable("captured", device):
        raise UsageError(f"--agent.execution captured: {reason}. Or take --agent.execution eager or compiled")
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
