"""A policy as an ONNX model: raw observation and memory to action and next memory, normalization and squashing inside.

Uses torch's own exporter. What it notes of where code lies is taken out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctrlrl.deploy.graft import StoredModel, graft
from ctrlrl.errors import UsageError
from ctrlrl.nn.policy import Policy
from ctrlrl.tree import Obs, map_obs

if TYPE_CHECKING:
    import onnx

OPSET = 20
ACTION = "action"


@dataclass(frozen=True)
class Exported:
    """A model, and which of its inputs are what.

    Attributes:
        model: with inputs (1, ...) named as the observation's entries (`observation` where it is a bare one) and as the
            policy's memory, and outputs `action` and, for each part of the memory, what it becomes.
        observed: the observation's entries among the inputs, by name: what the policy reads of them.
        state: inputs that are memory, and the outputs that they become.
    """

    model: onnx.ModelProto
    observed: tuple[str, ...]
    state: dict[str, str]


BARE = "observation"
"""What an observation that is no dict is called."""


def as_inputs(obs: Obs) -> Obs:
    """Observations in the types that bundles have: floats in single precision, small integers but bytes as int64."""

    def one(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return value.float()
        return value if value.dtype in (torch.uint8, torch.bool) else value.long()

    return map_obs(one, obs)


class _Acts(nn.Module):
    """A policy's mode as a function of tensors alone."""

    def __init__(self, policy: Policy, blank: Obs, observed: tuple[str, ...], state: tuple[str, ...]) -> None:
        super().__init__()
        self.policy, self._observed, self._state = policy, observed, state
        self._blank = blank

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        seen, memory = inputs[: len(self._observed)], inputs[len(self._observed) :]
        if isinstance(self._blank, dict):
            obs: Obs = self._blank | dict(zip(self._observed, seen, strict=True))
        else:
            obs = seen[0]
        action, state, _ = self.policy.act(obs, dict(zip(self._state, memory, strict=True)), explore=False)
        return action, *(state[name] for name in self._state)


def to_onnx(policy: Policy, obs: Obs) -> Exported:
    """Export the mode of `policy`, which acts on observations like `obs` (1, ...).

    Raises:
        UsageError: torch cannot export it, or what exports is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'ctrlrl[deploy]'") from None
    observed = tuple(obs) if isinstance(obs, dict) else (BARE,)
    state = policy.initial_state(1)
    if odd := [name for name, value in state.items() if bool((value != 0).any())]:
        raise UsageError(
            f"the policy's memory must be zeros at first, and {', '.join(odd)} is not: nothing else is told"
        )
    exported = _export(policy, obs, observed, state)
    read = tuple(name for name in observed if name in _read_by(exported))
    if not read:
        raise UsageError("the policy reads nothing of its observation, so there is nothing to deploy")
    if read != observed:  # critics' groups, say, which no controller has
        exported = _export(policy, obs, read, state)
    return Exported(exported, read, {f"state.{name}": f"next.{name}" for name in state})


def _export(policy: Policy, obs: Obs, observed: tuple[str, ...], state: Mapping[str, Tensor]) -> onnx.ModelProto:
    acts = _Acts(policy, obs, observed, tuple(state)).eval()
    stored = {str(i): module for i, module in enumerate(policy.modules()) if isinstance(module, StoredModel)}
    for place, module in stored.items():
        module.place = place
    given = [obs[name] if isinstance(obs, dict) else obs for name in observed]
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                acts,
                (*given, *(value.clone() for value in state.values())),  # one tensor twice would be one input
                input_names=[*observed, *(f"state.{name}" for name in state)],
                output_names=[ACTION, *(f"next.{name}" for name in state)],
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # torch has many, without a base of their own
        why = str(error.__cause__ or error).strip().splitlines()
        raise UsageError(f"torch cannot export this policy: {why[0] if why else type(error).__name__}") from error
    model: onnx.ModelProto = program.model_proto
    if stored:
        graft(model, stored)
    return _stripped(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter says of its progress and of packages that are not there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_by(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.input}


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what tells of the machine it was made on."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    return model
