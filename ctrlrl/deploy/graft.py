"""ONNX models inside a policy that is exported: torch traces around them, and they are put in place afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctrlrl.errors import UsageError
from ctrlrl.nn.policy import Policy

if TYPE_CHECKING:
    import onnx

_DOMAIN, _OPERATION = "ctrlrl.graft", "Model"


class StoredModel(Policy):
    """A policy that an ONNX model computes.

    Attributes:
        place: what a node of the exported model calls it; given by `to_onnx`.
    """

    place: str = ""

    @abstractmethod
    def model(self) -> onnx.ModelProto:
        """The model, with its weights."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where it is from, for errors."""

    def traced(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, tuple[Sequence[int], torch.dtype]]
    ) -> dict[str, Tensor]:
        """What stands for the model while it is exported: the values of its outputs, by name.

        Args:
            inputs: by the model's names.
            outputs: shapes and types, by the model's names.
        """
        shapes, dtypes = ([one[i] for one in outputs.values()] for i in (0, 1))
        values = torch.onnx.ops.symbolic_multi_out(
            f"{_DOMAIN}::{_OPERATION}",
            list(inputs.values()),
            {"place": self.place, "inputs": list(inputs), "outputs": list(outputs)},
            dtypes=dtypes,  # type: ignore[arg-type]
            shapes=shapes,  # type: ignore[arg-type]
            version=1,
        )
        return dict(zip(outputs, values, strict=True))


def graft(model: onnx.ModelProto, stored: Mapping[str, StoredModel]) -> None:
    """Put the models of `stored`, by their places, where `model` has nodes that stand for them.

    Raises:
        UsageError: one cannot be expressed in the operations of `model`.
    """
    import onnx

    nodes = list(model.graph.node)
    del model.graph.node[:]
    for i, node in enumerate(nodes):
        if node.domain != _DOMAIN:
            model.graph.node.append(node)
            continue
        told = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        source = stored[told["place"].decode()]
        own = _converted(source, {entry.domain: entry.version for entry in model.opset_import})
        prefix = f"base.{i}."
        own = onnx.compose.add_prefix(own, prefix)
        names = {prefix + name.decode(): to for name, to in zip(told["inputs"], node.input, strict=True)}
        _rename(own.graph.node, names)
        model.graph.initializer.extend(own.graph.initializer)
        model.graph.node.extend(own.graph.node)
        for name, to in zip(told["outputs"], node.output, strict=True):
            given = names.get(prefix + name.decode(), prefix + name.decode())
            model.graph.node.append(onnx.helper.make_node("Identity", [given], [to], name=f"{prefix}{to}"))
        model.ir_version = max(model.ir_version, own.ir_version)
    for entry in [entry for entry in model.opset_import if entry.domain == _DOMAIN]:
        model.opset_import.remove(entry)
    onnx.checker.check_model(model)


def _converted(source: StoredModel, opsets: Mapping[str, int]) -> onnx.ModelProto:
    """The model of `source` in these versions of operations, functions of its own inlined."""
    import onnx
    import onnx.inliner
    import onnx.version_converter

    own, version = source.model(), opsets.get("", opsets.get("ai.onnx", 0))
    if own.functions:
        own = onnx.inliner.inline_local_functions(own)
    if others := [e.domain for e in own.opset_import if e.domain not in ("", "ai.onnx") and e.domain in _used(own)]:
        raise UsageError(f"{source.source} has operations of {', '.join(others)}: it cannot be exported within another")
    if all(entry.version == version for entry in own.opset_import if entry.domain in ("", "ai.onnx")):
        return own
    try:
        return onnx.version_converter.convert_version(own, version)
    except Exception as error:  # of C++, without a type of its own
        raise UsageError(
            f"{source.source} cannot be converted to opset {version}, in which policies are exported: {error}. Export "
            "it in that opset"
        ) from None


def _used(model: onnx.ModelProto) -> set[str]:
    return {node.domain for node in model.graph.node}


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Have nodes, those of branches too, read other values."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _rename(graph.node, names)
