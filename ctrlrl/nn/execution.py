"""How an agent's step runs: eagerly, compiled, or captured as a CUDA graph. One switch, the same step."""

from __future__ import annotations

import functools
import importlib.util
import signal
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ctrlrl.errors import UsageError

StepFunction: TypeAlias = Callable[..., dict[str, Tensor]]
"""`step(batch, *draws) -> metrics`: changes weights in place, and depends on nothing but them and its arguments."""

EXECUTIONS = ("eager", "compiled", "captured")
PRECISIONS = ("float32", "bfloat16")


class Mappable(Protocol):
    """A batch: tensors that can be made into others one by one."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Any: ...


_WARM_UPS = 3


def executed(
    step: StepFunction,
    execution: str,
    precision: str,
    device: torch.device,
    changes: Callable[[], Sequence[Tensor]],
) -> StepFunction:
    """`step`, as `execution` and `precision` say: the same results within the precision's rounding.

    - `eager` (or `auto`, which the training decides): as it is written.
    - `compiled`: by `torch.compile`, the whole step as one graph; the first call takes up to a minute.
    - `captured`: replayed as one CUDA graph, which removes the time between its kernels.

    With the precision `bfloat16`, matrix products round their factors to 8 bits and sum in float32 (`torch.autocast`);
    built-in networks compute their outputs in float32 (`ctrlrl.nn.mlp`), and everything after a network is float32.
    `float32` and `auto` change nothing.
    `changes` gives all tensors that the step changes in place.
    The first call raises `UsageError` if it cannot run so here; `unavailable` says so before.
    """
    if precision == "bfloat16":
        step = _in_bfloat16(step, device)
    if execution == "captured":
        return Captured(step, changes, lambda work: _capture(work, device))
    if execution == "compiled":
        return Compiled(step, device)
    return step


def _in_bfloat16(step: StepFunction, device: torch.device) -> StepFunction:
    def reduced(*arguments: Any) -> dict[str, Tensor]:
        # Without the cache of rounded weights: one update changes them and uses them again.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return step(*arguments)

    return reduced


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16; without them these are slower than float32's."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


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
        return _trial()
    return None


@functools.cache
def _trial() -> str | None:
    """Why the smallest compilation for a CPU fails here, if it does."""
    try:
        _compile(torch.neg, torch.ones(8))
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"the C++ compiler fails here: {' '.join(str(error).split())[:300]} ..."
    return None


class Compiled:
    """Runs a step as one graph by `torch.compile`, which is made at the first call."""

    def __init__(self, step: StepFunction, device: torch.device) -> None:
        self._step, self._device = step, device
        self._compiled: StepFunction | None = None

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        if self._compiled is not None:
            return self._compiled(*arguments)
        if reason := unavailable("compiled", self._device):
            raise UsageError(f"--agent.execution compiled: {reason}. Or take --agent.execution eager")
        try:
            self._compiled, metrics = _compile(self._step, *arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            summary = " ".join(str(error).split())[:400]
            raise UsageError(
                f"torch.compile cannot compile the update here: {summary} ... Take --agent.execution eager"
            ) from error
        return dict(metrics)


def _compile(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], Any]:
    """`function` compiled, and what it gives for `arguments`."""
    import torch._dynamo.config as tracing
    import torch._inductor.config as compiling

    # Settings of the process. Steps take gradients themselves; each agent is a graph of its own; and PyTorch's helper
    # processes for compiling would hear a Ctrl-C.
    tracing.trace_autograd_ops = True
    tracing.recompile_limit = tracing.accumulated_recompile_limit = 100_000
    compiling.compile_threads = 1
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    # So would the C++ compiler, and end: a Ctrl-C is heard when it is done.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return compiled, compiled(*arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Captured:
    """Runs a step on buffers of its own, recorded once by `capture` and replayed from then on.

    Args:
        step: what to run.
        changes: gives all tensors that the step changes in place.
        capture: `capture(work)` runs `work()` a few times to warm up, then records it, and gives a function that runs
            it again. What the runs changed is taken back: every step is a replay, and a resumed run has its bits.
    """

    def __init__(
        self,
        step: StepFunction,
        changes: Callable[[], Sequence[Tensor]],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self._step, self._changes, self._capture = step, changes, capture
        self._arguments: list[Any] = []
        self._metrics: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, *arguments: Mappable | Tensor | None) -> dict[str, Tensor]:
        if self._replay is None:
            self._arguments = [_map(torch.clone, a) for a in arguments]
            changing = list(self._changes())
            before = [value.detach().clone() for value in changing]

            def work() -> None:
                self._metrics = self._step(*self._arguments)

            self._replay = self._capture(work)
            with torch.no_grad():
                for value, saved in zip(changing, before, strict=True):
                    value.copy_(saved)
        for ours, given in zip(self._arguments, arguments, strict=True):
            for buffer, value in zip(_tensors(ours), _tensors(given), strict=True):
                if buffer.shape != value.shape:
                    raise ValueError(f"captured with {tuple(buffer.shape)}, called with {tuple(value.shape)}")
                buffer.copy_(value)
        self._replay()
        return {name: value.clone() for name, value in self._metrics.items()}  # the next replay overwrites them


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    if reason := unavailable("captured", device):
        raise UsageError(f"--agent.execution captured: {reason}. Or take --agent.execution eager or compiled")
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in the first runs, which cannot be recorded
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            raise UsageError(
                f"the update cannot be captured as a CUDA graph: {' '.join(str(error).split())[:400]} ... A network of "
                "yours may read values on the host (.item()). Take --agent.execution eager"
            ) from error
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
