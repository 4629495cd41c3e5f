"""An ONNX model as a `Network`: opsets 7 to 23, of one observation at a time, without control flow.

Whatever an exporter wrote down for shapes it did not know is computed: shapes, and all that follows from constants.
What is left are operations of `ctrlrl.deploy.network`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrlrl.deploy.network import ATTRIBUTES, BINARY, DTYPES, OPERATIONS, UNARY, Network, Node, Value, run_node
from ctrlrl.deploy.tensors import Array

if TYPE_CHECKING:
    import onnx

DEFAULTS: dict[str, dict[str, Any]] = {
    "LeakyRelu": {"alpha": 0.01},
    "Elu": {"alpha": 1.0},
    "Selu": {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805},
    "Gelu": {"approximate": "none"},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "ArgMax": {"axis": 0, "keepdims": 1},
}
"""ONNX's own, where an attribute is left out."""


class Unsupported(Exception):
    """What the model has is no operation of a `Network`; says what."""


def lower(model: onnx.ModelProto) -> Network:
    """The network of `model`, whose weights must be in it.

    Raises:
        Unsupported: an operation, a type or a shape has no counterpart.
    """
    return _Lowering(model).network()


class _Lowering:
    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self._numpy = onnx.numpy_helper.to_array
        self._type_names = {
            code: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code)).name
            for code in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.UINT8, onnx.TensorProto.BOOL)
        }
        self._attribute = onnx.helper.get_attribute_value
        self._graph = model.graph
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if not 7 <= self.opset <= 23:
            raise Unsupported(f"opset {self.opset}; known are 7 to 23")
        self.samples: dict[str, Array] = {}  # what each value is where inputs are zero: for shapes
        self.fixed: set[str] = set()  # values that do not depend on inputs
        self.nodes: list[Node] = []
        self.alias: dict[str, str] = {}

    def network(self) -> Network:
        for tensor in self._graph.initializer:
            self._constant(tensor.name, self._numpy(tensor))
        inputs: dict[str, Value] = {}
        for entry in self._graph.input:
            if entry.name in self.samples:
                continue  # before IR 4 initializers were listed as inputs, too
            inputs[entry.name] = value = self._input(entry)
            self.samples[entry.name] = np.zeros(value.shape, value.dtype)
        for node in self._graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise Unsupported(f"the operation {node.domain}.{node.op_type}")
            self._lower(node)
        outputs = {entry.name: self._name(entry.name) for entry in self._graph.output}
        self._keep(set(outputs.values()))
        self._narrow(set(outputs.values()))
        needed = self._keep(set(outputs.values()))
        constants = {name: self.samples[name] for name in self.fixed if name in needed}
        try:
            return Network(inputs, outputs, self.nodes, dict(sorted(constants.items())))
        except ValueError as error:
            raise Unsupported(str(error)) from None

    def _keep(self, needed: set[str]) -> set[str]:
        """Leave out what is not `needed`, nor by what is; returns all that is."""
        needed, kept = set(needed), []
        for node in reversed(self.nodes):  # from the outputs back
            if node.output in needed:
                kept.append(node)
                needed |= set(node.inputs)
        self.nodes = kept[::-1]
        return needed

    def _narrow(self, outputs: set[str]) -> None:
        """Leave out of a matrix what nobody reads: the standard deviations of a Gaussian policy, say."""
        made = {node.output: node for node in self.nodes}
        readers = Counter(name for node in self.nodes for name in node.inputs)
        for index, node in enumerate(self.nodes):
            source = made.get(node.inputs[0]) if node.op == "Slice" else None
            if source is None or source.op != "Gemm" or readers[source.output] != 1 or source.output in outputs:
                continue
            a, whole = node.attributes, self.samples[source.output]
            if a["axis"] != whole.ndim - 1 or a["step"] != 1:
                continue
            names = [source.inputs[0]]
            for name in source.inputs[1:]:
                names.append(f"{node.output}/{name}")
                self._constant(names[-1], np.ascontiguousarray(self.samples[name][a["start"] : a["stop"]]))
            self.nodes[index] = Node("Gemm", tuple(names), node.output, {})

    def _input(self, entry: Any) -> Value:
        tensor = entry.type.tensor_type
        if tensor.elem_type not in self._type_names:
            raise Unsupported(f"the input {entry.name} of another type than {', '.join(DTYPES)}")
        shape = [dimension.dim_value if dimension.HasField("dim_value") else 0 for dimension in tensor.shape.dim]
        if shape and shape[0] in (0, 1):
            shape[0] = 1
        if any(n < 1 for n in shape):
            raise Unsupported(f"the input {entry.name} of the shape {shape}, which is open but for the batch")
        return Value(tuple(shape), self._type_names[tensor.elem_type])

    # What lowerings are made of.

    def _name(self, name: str) -> str:
        if name not in self.alias and name not in self.samples:
            raise Unsupported(f"the value {name!r}, which nothing makes")
        return self.alias.get(name, name)

    def _constant(self, name: str, value: Array) -> None:
        value = np.asarray(value)
        if value.dtype == np.int32:
            value = value.astype(np.int64)
        if value.dtype in (np.float64, np.float16):
            value = value.astype(np.float32)
        self.samples[name] = value
        self.fixed.add(name)

    def _known(self, name: str, what: str) -> Array:
        name = self._name(name)
        if name not in self.fixed:
            raise Unsupported(f"{what} that depends on inputs")
        return self.samples[name]

    def _do(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Append an operation; it is done at once where all is known."""
        inputs = [self._name(name) for name in inputs]
        try:
            with np.errstate(all="ignore"):
                result = run_node(op, [self.samples[name] for name in inputs], attributes)
        except (ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise Unsupported(f"{op}, which cannot be done here: {error}") from None
        if all(name in self.fixed for name in inputs):
            self._constant(output, result)
            return
        self.samples[output] = result
        self.nodes.append(Node(op, tuple(inputs), output, attributes))

    def _same(self, source: str, output: str) -> None:
        self.alias[output] = self._name(source)

    def _reshaped(self, source: str, output: str, shape: tuple[int, ...]) -> None:
        self._do("Reshape", [source], output, shape=list(shape))

    # One ONNX node.

    def _lower(self, node: onnx.NodeProto) -> None:
        given = {attribute.name: self._attribute(attribute) for attribute in node.attribute}
        given = {name: value.decode() if isinstance(value, bytes) else value for name, value in given.items()}
        inputs, outputs = list(node.input), list(node.output)
        special: Callable[..., None] | None = getattr(self, f"_lower_{node.op_type.lower()}", None)
        if special is not None:
            special(inputs, outputs, given)
            return
        if node.op_type not in OPERATIONS:
            raise Unsupported(f"the operation {node.op_type}")
        if node.op_type in BINARY and len(inputs) != 2:  # Max and Min take any number
            self._chain(node.op_type, inputs, outputs[0])
            return
        expected = ATTRIBUTES.get(node.op_type, {})
        attributes = DEFAULTS.get(node.op_type, {}) | {name: given[name] for name in given if name in expected}
        if node.op_type in UNARY or attributes.keys() == expected.keys():
            self._do(node.op_type, inputs, outputs[0], **attributes)
            return
        raise Unsupported(f"{node.op_type} without {', '.join(sorted(expected.keys() - attributes.keys()))}")

    def _chain(self, op: str, inputs: list[str], output: str) -> None:
        if len(inputs) == 1:
            self._same(inputs[0], output)
            return
        so_far = inputs[0]
        for i, following in enumerate(inputs[1:], 1):
            name = output if i == len(inputs) - 1 else f"{output}/{i}"
            self._do(op, [so_far, following], name)
            so_far = name

    def _lower_constant(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        if "value" in given:
            value = self._numpy(given["value"])
        else:
            kind = next((k for k in ("value_float", "value_floats", "value_int", "value_ints") if k in given), None)
            if kind is None:
                raise Unsupported(f"a Constant of {', '.join(given)}")
            value = np.array(given[kind], np.float32 if "float" in kind else np.int64)
        self._constant(outputs[0], value)

    def _lower_identity(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        self._same(inputs[0], outputs[0])

    def _lower_dropout(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        if len(inputs) > 2 and inputs[2] and bool(self._known(inputs[2], "Dropout").any()):
            raise Unsupported("Dropout as in training")
        self._same(inputs[0], outputs[0])

    def _lower_shape(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        shape = self.samples[self._name(inputs[0])].shape
        self._constant(outputs[0], np.array(shape[given.get("start", 0) : given.get("end", len(shape))], np.int64))

    def _lower_constantofshape(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value = self._numpy(given["value"]) if "value" in given else np.zeros(1, np.float32)
        shape = self._known(inputs[0], "a ConstantOfShape")
        if math.prod(shape.tolist()) > 2**22:
            raise Unsupported(f"a ConstantOfShape of {shape.tolist()}")
        self._constant(outputs[0], np.full(tuple(shape), value[0]))

    def _lower_gemm(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        if given.get("transA", 0):
            raise Unsupported("Gemm with transA")
        weight = self._known(inputs[1], "Gemm with weights")
        weight = (weight if given.get("transB", 0) else weight.T) * np.float32(given.get("alpha", 1.0))
        names = [inputs[0], f"{outputs[0]}/weight"]
        self._constant(names[1], np.ascontiguousarray(weight, np.float32))
        if len(inputs) > 2 and inputs[2]:
            bias = self._known(inputs[2], "Gemm with a bias") * np.float32(given.get("beta", 1.0))
            names.append(f"{outputs[0]}/bias")
            rows = self.samples[self._name(inputs[0])].shape[0]
            try:
                whole = np.broadcast_to(bias, (rows, len(weight)))
            except ValueError:
                raise Unsupported(f"Gemm of {(rows, len(weight))} with a bias of {bias.shape}") from None
            if not (whole == whole[:1]).all():
                raise Unsupported("Gemm with a bias that differs from row to row")
            self._constant(names[2], np.ascontiguousarray(whole[0], np.float32))
        self._do("Gemm", names, outputs[0])

    def _lower_matmul(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        right = self._name(inputs[1])
        left = self.samples[self._name(inputs[0])]
        if right in self.fixed and self.samples[right].ndim == 2 and left.ndim == 2:
            self._lower_gemm(inputs, outputs, {})
        else:
            self._do("MatMul", inputs, outputs[0])

    def _lower_clip(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        bounds = [*inputs[1:], "", ""][:2]
        for i, word in enumerate(("min", "max")):
            if word in given:  # before opset 11
                bounds[i] = f"{outputs[0]}/{word}"
                self._constant(bounds[i], np.array(given[word], np.float32))
        kept = [(op, bound) for op, bound in zip(("Max", "Min"), bounds, strict=True) if bound]
        source = inputs[0]
        for i, (op, bound) in enumerate(kept):
            name = outputs[0] if i == len(kept) - 1 else f"{outputs[0]}/above"
            self._do(op, [source, bound], name)
            source = name
        if not kept:
            self._same(inputs[0], outputs[0])

    def _lower_split(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        axis, value = given.get("axis", 0), self.samples[self._name(inputs[0])]
        axis %= value.ndim
        if len(inputs) > 1 and inputs[1]:
            sizes = [int(n) for n in self._known(inputs[1], "Split by sizes")]
        elif "split" in given:
            sizes = list(given["split"])
        else:
            each = -(-value.shape[axis] // len(outputs))
            sizes = [min(each, value.shape[axis] - i * each) for i in range(len(outputs))]
        if min(sizes) < 0 or sum(sizes) != value.shape[axis] or len(sizes) != len(outputs):
            raise Unsupported(f"Split of {value.shape[axis]} into {sizes}")
        start = 0
        for output, size in zip(outputs, sizes, strict=True):
            if output:
                self._do("Slice", [inputs[0]], output, axis=axis, start=start, stop=start + size, step=1)
            start += size

    def _lower_slice(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value = self.samples[self._name(inputs[0])]
        if "starts" in given:  # before opset 10
            starts, stops = list(given["starts"]), list(given["ends"])
            axes, steps = list(given.get("axes", range(len(starts)))), [1] * len(starts)
        else:
            parts = [self._known(name, "Slice") if name else None for name in inputs[1:]]
            starts, stops = ([int(n) for n in part] for part in parts[:2] if part is not None)
            axes = list(range(len(starts))) if len(parts) < 3 or parts[2] is None else [int(n) for n in parts[2]]
            steps = [1] * len(starts) if len(parts) < 4 or parts[3] is None else [int(n) for n in parts[3]]
        source = inputs[0]
        for i, (axis, start, stop, step) in enumerate(zip(axes, starts, stops, steps, strict=True)):
            if step < 1:
                raise Unsupported("Slice backwards")
            axis %= value.ndim
            first, last, _ = slice(start, stop, step).indices(value.shape[axis])
            name = outputs[0] if i == len(axes) - 1 else f"{outputs[0]}/{i}"
            self._do("Slice", [source], name, axis=axis, start=first, stop=max(first, last), step=step)
            source = name

    def _lower_reshape(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value = self.samples[self._name(inputs[0])]
        wanted = [int(n) for n in self._known(inputs[1], "Reshape to a shape")]
        if not given.get("allowzero", 0):
            wanted = [value.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        self._reshaped(inputs[0], outputs[0], value.reshape(wanted).shape)

    def _lower_flatten(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value = self.samples[self._name(inputs[0])]
        axis = given.get("axis", 1)
        axis = axis + value.ndim if axis < 0 else axis
        self._reshaped(inputs[0], outputs[0], value.reshape(int(np.prod(value.shape[:axis])), -1).shape)

    def _axes(self, inputs: list[str], given: dict[str, Any]) -> list[int] | None:
        """Axes of an attribute, or since opset 13 of an input; None: none are given."""
        if len(inputs) > 1 and inputs[1]:
            return [int(n) for n in self._known(inputs[1], "axes")]
        return list(given["axes"]) if "axes" in given else None

    def _lower_squeeze(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value, axes = self.samples[self._name(inputs[0])], self._axes(inputs, given)
        self._reshaped(inputs[0], outputs[0], value.squeeze(None if axes is None else tuple(axes)).shape)

    def _lower_unsqueeze(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value, axes = self.samples[self._name(inputs[0])], self._axes(inputs, given)
        self._reshaped(inputs[0], outputs[0], np.expand_dims(value, tuple(axes or ())).shape)

    def _lower_expand(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value = self.samples[self._name(inputs[0])]
        wanted = tuple(int(n) for n in self._known(inputs[1], "Expand to a shape"))
        self._do("Expand", [inputs[0]], outputs[0], shape=list(np.broadcast_shapes(value.shape, wanted)))

    def _lower_transpose(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        count = self.samples[self._name(inputs[0])].ndim
        self._do("Transpose", [inputs[0]], outputs[0], perm=list(given.get("perm", range(count)[::-1])))

    def _lower_concat(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        axis = given["axis"] % self.samples[self._name(inputs[0])].ndim
        self._do("Concat", inputs, outputs[0], axis=axis)

    def _lower_gather(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        value = self.samples[self._name(inputs[0])]
        axis = given.get("axis", 0) % value.ndim
        index = self._known(inputs[1], "Gather by an index") % value.shape[axis]
        self._constant(f"{outputs[0]}/index", index)
        self._do("Gather", [inputs[0], f"{outputs[0]}/index"], outputs[0], axis=axis)

    def _lower_cast(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        import onnx

        name = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(given["to"])).name
        name = {"float64": "float32", "float16": "float32", "int32": "int64"}.get(name, name)
        if name not in DTYPES:
            raise Unsupported(f"Cast to {name}")
        if self.samples[self._name(inputs[0])].dtype.name == name:
            self._same(inputs[0], outputs[0])
        else:
            self._do("Cast", [inputs[0]], outputs[0], to=name)

    def _lower_argmax(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        if given.get("select_last_index", 0):
            raise Unsupported("ArgMax that takes the last")
        axis = given.get("axis", 0) % self.samples[self._name(inputs[0])].ndim
        self._do("ArgMax", [inputs[0]], outputs[0], axis=axis, keepdims=given.get("keepdims", 1))

    def _lower_softmax(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        count = self.samples[self._name(inputs[0])].ndim
        axis = given.get("axis", -1 if self.opset >= 13 else 1) % count
        if self.opset < 13 and axis != count - 1:
            raise Unsupported("Softmax over several axes (opset below 13)")
        self._do("Softmax", [inputs[0]], outputs[0], axis=axis)

    def _lower_layernormalization(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        if len([name for name in outputs if name]) > 1:
            raise Unsupported("LayerNormalization with its mean and deviation")
        axis = given.get("axis", -1) % self.samples[self._name(inputs[0])].ndim
        normal, names = self.samples[self._name(inputs[0])].shape[axis:], [inputs[0]]
        for name in filter(None, inputs[1:]):
            names.append(f"{outputs[0]}/{name}")
            self._constant(names[-1], np.ascontiguousarray(np.broadcast_to(self._known(name, "a scale"), normal)))
        self._do("LayerNormalization", names, outputs[0], axis=axis, epsilon=given.get("epsilon", 1e-5))

    def _reduce(self, op: str, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        count, axes = self.samples[self._name(inputs[0])].ndim, self._axes(inputs, given)
        if not axes and given.get("noop_with_empty_axes", 0):
            self._same(inputs[0], outputs[0])
            return
        over = sorted(axis % count for axis in (axes or range(count)))
        self._do(op, [inputs[0]], outputs[0], axes=over, keepdims=given.get("keepdims", 1))

    def _lower_reducesum(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        self._reduce("ReduceSum", inputs, outputs, given)

    def _lower_reducemean(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        self._reduce("ReduceMean", inputs, outputs, given)

    def _lower_reducemax(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        self._reduce("ReduceMax", inputs, outputs, given)

    def _lower_reducemin(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        self._reduce("ReduceMin", inputs, outputs, given)

    def _lower_conv(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        weight = self._known(inputs[1], "Conv with weights")
        if weight.ndim != 4 or given.get("auto_pad", "NOTSET") != "NOTSET":
            raise Unsupported("Conv of other than two dimensions, or with auto_pad")
        self._do(
            "Conv",
            [name for name in inputs if name],
            outputs[0],
            strides=list(given.get("strides", (1, 1))),
            pads=list(given.get("pads", (0, 0, 0, 0))),
            dilations=list(given.get("dilations", (1, 1))),
            group=given.get("group", 1),
        )

    def _lower_batchnormalization(self, inputs: list[str], outputs: list[str], given: dict[str, Any]) -> None:
        x, *rest = inputs
        scale, shift, mean, variance = (self._known(name, "BatchNormalization") for name in rest)
        factor = scale / np.sqrt(variance + np.float32(given.get("epsilon", 1e-5)))
        shape = (1, -1, *[1] * (self.samples[self._name(x)].ndim - 2))
        self._constant(f"{outputs[0]}/factor", factor.reshape(shape).astype(np.float32))
        self._constant(f"{outputs[0]}/shift", (shift - mean * factor).reshape(shape).astype(np.float32))
        self._do("Mul", [x, f"{outputs[0]}/factor"], f"{outputs[0]}/scaled")
        self._do("Add", [f"{outputs[0]}/scaled", f"{outputs[0]}/shift"], outputs[0])
