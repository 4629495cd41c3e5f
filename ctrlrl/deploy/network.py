"""A policy's network as a list of operations on arrays of fixed shapes, and what each of them does, in NumPy.

This is the reference that every other runtime is compared with, and needs nothing else. Operations have the names and
the meaning that ONNX gives them (https://onnx.ai/onnx/operators), in float32, int64 and bool, with one output each and
what is known beforehand as attributes: `ctrlrl.deploy.lowering` makes such a network of an ONNX model, and
`ctrlrl.deploy.c_source` a C header of it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrlrl.deploy.tensors import Array
from ctrlrl.errors import UsageError

FORMAT = "ctrlrl.network/1"
DTYPES = ("float32", "int64", "uint8", "bool")
LARGEST = 2**25
"""Numbers in all results together."""

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """What an input or a result is."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Node:
    """One operation."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes


# --- what operations do -----------------------------------------------------------------------------------------------


def _sigmoid(x: Array) -> Array:
    return np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1))


def _erf(x: Array) -> Array:
    return np.array([math.erf(float(value)) for value in x.ravel()], np.float32).reshape(x.shape)


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x > 0, x, np.float32(alpha) * np.expm1(np.minimum(x, 0)))


def _selu(x: Array, alpha: float, gamma: float) -> Array:
    return np.float32(gamma) * _elu(x, alpha)


def _gelu(x: Array, approximate: str) -> Array:
    if approximate == "tanh":
        inner = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))
    else:
        inner = _erf(x * np.float32(math.sqrt(0.5)))
    out: Array = np.float32(0.5) * x * (np.float32(1) + inner)
    return out


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


UNARY: dict[str, Callable[..., Array]] = {
    "Relu": lambda x: np.maximum(x, 0),
    "LeakyRelu": lambda x, alpha: np.where(x > 0, x, np.float32(alpha) * x),
    "Elu": _elu,
    "Selu": _selu,
    "Gelu": _gelu,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "HardSigmoid": lambda x, alpha, beta: np.clip(np.float32(alpha) * x + np.float32(beta), 0, 1),
    "HardSwish": lambda x: x * np.clip(x / np.float32(6) + np.float32(0.5), 0, 1),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Softplus": _softplus,
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Erf": _erf,
    "Exp": np.exp,
    "Log": np.log,
    "Sqrt": np.sqrt,
    "Reciprocal": lambda x: np.float32(1) / x,
    "Sin": np.sin,
    "Cos": np.cos,
    "Neg": np.negative,
    "Abs": np.abs,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.round,
    "Sign": np.sign,
    "Not": np.logical_not,
}
"""One array to another of its shape."""

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: np.divide(a, b) if a.dtype.kind == "f" else np.trunc(a / b).astype(a.dtype),
    "Pow": np.power,
    "Max": np.maximum,
    "Min": np.minimum,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
}
"""Two arrays that are broadcast."""


def _reduction(fn: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, axes, keepdims: fn(x, axis=tuple(axes), keepdims=bool(keepdims)).astype(x.dtype)


def _argmax(x: Array, axis: int, keepdims: int) -> Array:
    return np.asarray(np.argmax(x, axis=axis, keepdims=bool(keepdims)), np.int64)


def _softmax(x: Array, axis: int) -> Array:
    above = np.exp(x - x.max(axis=axis, keepdims=True))
    out: Array = above / above.sum(axis=axis, keepdims=True)
    return out


def _layer_norm(x: Array, scale: Array, shift: Array | None = None, *, axis: int, epsilon: float) -> Array:
    axes = tuple(range(axis, x.ndim))
    centered = x - x.mean(axis=axes, keepdims=True, dtype=np.float32)
    variance = np.square(centered).mean(axis=axes, keepdims=True, dtype=np.float32)
    out: Array = centered / np.sqrt(variance + np.float32(epsilon)) * scale
    return out if shift is None else out + shift


def _slice(x: Array, axis: int, start: int, stop: int, step: int) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _convolution(
    x: Array, weight: Array, bias: Array | None = None, *, strides: Any, pads: Any, dilations: Any, group: int
) -> Array:
    """x (1, C, H, W), weight (M, C / group, KH, KW), bias (M,) to (1, M, H', W')."""
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    size = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(weight.shape[2:], dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    parts = [
        np.tensordot(part, kernels, ([1, 4, 5], [1, 2, 3]))
        for part, kernels in zip(np.split(windows, group, 1), np.split(weight, group, 0), strict=True)
    ]
    out: Array = np.concatenate(parts, -1).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(out if bias is None else out + bias[:, None, None], np.float32)


def _clip(x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    return x if low is None and high is None else np.clip(x, low, high)


OTHERS: dict[str, Callable[..., Array]] = {
    "Gemm": lambda x, weight, bias=None: x @ weight.T if bias is None else x @ weight.T + bias,
    "MatMul": np.matmul,
    "Conv": _convolution,
    "LayerNormalization": _layer_norm,
    "Softmax": _softmax,
    "ArgMax": _argmax,
    "ReduceSum": _reduction(np.sum),
    "ReduceMean": _reduction(np.mean),
    "ReduceMax": _reduction(np.max),
    "ReduceMin": _reduction(np.min),
    "Where": np.where,
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Slice": _slice,
    "Reshape": lambda x, shape: x.reshape(shape),
    "Transpose": lambda x, perm: x.transpose(perm),
    "Expand": lambda x, shape: np.broadcast_to(x, shape),
    "Gather": lambda x, index, axis: np.take(x, index, axis),
    "Cast": lambda x, to: x.astype(to),
}
"""Gemm is x weight^T + bias; Slice is along one axis; shapes are given in full."""

OPERATIONS: dict[str, Callable[..., Array]] = UNARY | BINARY | OTHERS

ATTRIBUTES: dict[str, dict[str, str]] = {
    "LeakyRelu": {"alpha": "float"},
    "Elu": {"alpha": "float"},
    "Selu": {"alpha": "float", "gamma": "float"},
    "Gelu": {"approximate": "none tanh"},
    "HardSigmoid": {"alpha": "float", "beta": "float"},
    "Conv": {"strides": "ints", "pads": "ints", "dilations": "ints", "group": "int"},
    "LayerNormalization": {"axis": "int", "epsilon": "float"},
    "Softmax": {"axis": "int"},
    "ArgMax": {"axis": "int", "keepdims": "int"},
    "ReduceSum": {"axes": "ints", "keepdims": "int"},
    "ReduceMean": {"axes": "ints", "keepdims": "int"},
    "ReduceMax": {"axes": "ints", "keepdims": "int"},
    "ReduceMin": {"axes": "ints", "keepdims": "int"},
    "Concat": {"axis": "int"},
    "Slice": {"axis": "int", "start": "int", "stop": "int", "step": "int"},
    "Reshape": {"shape": "ints"},
    "Transpose": {"perm": "ints"},
    "Expand": {"shape": "ints"},
    "Gather": {"axis": "int"},
    "Cast": {"to": " ".join(DTYPES)},
}
"""What each operation has to be told, and of what kind that is: a number, numbers, or one of these words."""


ARITIES = {
    "Gemm": (2, 3),
    "MatMul": (2, 2),
    "Conv": (2, 3),
    "LayerNormalization": (2, 3),
    "Where": (3, 3),
    "Gather": (2, 2),
}
ARITIES |= dict.fromkeys(BINARY, (2, 2)) | {"Concat": (1, 10_000)}
"""How many inputs an operation takes, fewest and most; one where nothing is said."""

_FLOAT, _NUMBERS = ("float32",), ("float32", "int64")
TYPES: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("Relu", "Neg", "Abs", "Sign", "Add", "Sub", "Mul", "Max", "Min", "ArgMax"), _NUMBERS
)
TYPES |= dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _NUMBERS)
TYPES |= dict.fromkeys(("And", "Or", "Not"), ("bool",))
TYPES |= dict.fromkeys(("Where", "Concat", "Slice", "Reshape", "Transpose", "Expand", "Gather", "Cast"), DTYPES)
"""What an operation's inputs may be, all of one; float32 where nothing is said."""


def _check_attributes(node: Node) -> None:
    """Raise ValueError unless a node's inputs are as many, and its attributes those, that its operation takes."""
    fewest, most = ARITIES.get(node.op, (1, 1))
    if not fewest <= len(node.inputs) <= most:
        raise ValueError(f"{node.op} takes {fewest} to {most} inputs, got {len(node.inputs)}")
    expected, given = ATTRIBUTES.get(node.op, {}), dict(node.attributes)
    if given.keys() != expected.keys():
        raise ValueError(f"{node.op} has the attributes {sorted(given)}; expected {sorted(expected)}")
    for name, kind in expected.items():
        value = given[name]
        if kind == "float":
            right = type(value) in (int, float) and abs(value) < 1e30
        elif kind == "int":
            right = type(value) is int and 0 <= value <= LARGEST
        elif kind == "ints":
            right = type(value) in (list, tuple) and all(type(n) is int and 0 <= n <= LARGEST for n in value)
        else:
            right = value in kind.split()
        if not right:
            raise ValueError(f"the attribute {name} of {node.op} is {value!r}; expected {kind}, none below 0")


def _check_shapes(node: Node, inputs: list[Array], fixed: list[bool]) -> int:
    """How many numbers a node's result has, and what it needs on the way, at most; `fixed`: which inputs are constants.

    Shapes and attributes are held to one way of writing things, so that programs printed from them stay within their
    arrays whatever a file says.

    Raises:
        ValueError: a shape, an axis or a type is not as the operation has it.
    """
    a, x = node.attributes, inputs[0]

    def require(ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{node.op} of {[(v.dtype.name, v.shape) for v in inputs]} {dict(a)}: {rule}")

    kinds = {value.dtype.name for value in (inputs[1:] if node.op == "Where" else inputs)}
    if node.op == "Gather":
        kinds = {x.dtype.name}
        require(inputs[1].dtype == np.int64 and fixed[1], "the index must be a constant")
    allowed = TYPES.get(node.op, _FLOAT)
    require(len(kinds) == 1 and kinds <= set(allowed), f"inputs must be of one type of {', '.join(allowed)}")
    if node.op == "Where":
        require(x.dtype == np.bool_, "the condition must be of bool")
    if "axis" in a:
        require(0 <= a["axis"] < x.ndim, f"there is no axis {a['axis']}")
    if "axes" in a:
        require(sorted(set(a["axes"])) == list(a["axes"]) and all(n < x.ndim for n in a["axes"]), "axes must ascend")
    size: int = max(x.size, 1)
    if node.op in BINARY or node.op == "Where":
        size = math.prod(np.broadcast_shapes(*(value.shape for value in inputs)))
    elif node.op == "Concat":
        size = sum(value.size for value in inputs)
    elif node.op == "Slice":
        n = x.shape[a["axis"]]
        require(a["start"] <= a["stop"] <= n and a["step"] >= 1, f"a part of {n} must lie within it")
    elif node.op == "Reshape":
        require(math.prod(a["shape"]) == x.size, f"{x.size} numbers make no {a['shape']}")
    elif node.op == "Transpose":
        require(sorted(a["perm"]) == list(range(x.ndim)), "perm must name each axis once")
    elif node.op == "Expand":
        size = math.prod(np.broadcast_shapes(x.shape, tuple(a["shape"])))
        require(size == math.prod(a["shape"]), "the shape must be the whole one")
    elif node.op == "Gather":
        n = x.shape[a["axis"]]
        require(bool(((inputs[1] >= 0) & (inputs[1] < n)).all()), f"an index is not within {n}")
        size = int(x.size // max(n, 1) * inputs[1].size)
    elif node.op == "Gemm":
        weight = inputs[1]
        require(x.ndim == 2 and weight.ndim == 2 and all(fixed[1:]), "weight and bias must be constants, x a matrix")
        require(x.shape[1] == weight.shape[1], "x and weight do not fit")
        require(len(inputs) < 3 or inputs[2].shape == weight.shape[:1], "the bias must have a number for each row")
        size = int(x.shape[0] * weight.shape[0])
    elif node.op == "MatMul":
        y = inputs[1]
        whole = x.ndim >= 2 and y.ndim >= 2 and x.shape[-1] == y.shape[-2]
        require(whole, "matrices that fit must be multiplied")
        size = math.prod(np.broadcast_shapes(x.shape[:-2], y.shape[:-2])) * x.shape[-2] * y.shape[-1]
    elif node.op == "LayerNormalization":
        normal = x.shape[a["axis"] :]
        require(all(v.shape == normal for v in inputs[1:]), f"scale and shift must be {normal}")
    elif node.op == "Conv":
        size = _conv_size(a, x, inputs, fixed, require)
    return size


def _conv_size(
    a: Attributes, x: Array, inputs: list[Array], fixed: list[bool], require: Callable[[bool, str], None]
) -> int:
    weight = inputs[1]
    require(x.ndim == 4 and x.shape[0] == 1 and weight.ndim == 4 and all(fixed[1:]), "x must be (1, C, H, W)")
    sizes = (len(a["strides"]), len(a["dilations"]), len(a["pads"]))
    require(sizes == (2, 2, 4), "there must be two strides and dilations, and four pads")
    require(min(*a["strides"], *a["dilations"]) >= 1 and max(*a["strides"], *a["dilations"]) <= 4096, "up to 4096")
    require(max(a["pads"]) <= 4096, "pads go up to 4096")
    group, maps = a["group"], weight.shape[0]
    require(group >= 1 and maps % group == 0 and weight.shape[1] * group == x.shape[1], "groups do not fit")
    require(len(inputs) < 3 or inputs[2].shape == (maps,), "the bias must have a number for each map")
    places = 1
    for d in (0, 1):
        room = x.shape[2 + d] + a["pads"][d] + a["pads"][2 + d] - (weight.shape[2 + d] - 1) * a["dilations"][d] - 1
        require(room >= 0, "the kernel is larger than the picture")
        places *= room // a["strides"][d] + 1
    return int(places * max(maps, math.prod(weight.shape[1:]) * group))


def run_node(op: str, inputs: list[Array], attributes: Attributes) -> Array:
    """The result of one operation."""
    return np.asarray(OPERATIONS[op](*inputs, **attributes))


# --- the network ------------------------------------------------------------------------------------------------------


class Network:
    """Operations in the order in which they are done.

    Args:
        inputs: what goes in, by name. All are of one observation or state: the first dimension is 1.
        outputs: which result each output is, by name.
        nodes: the operations.
        constants: arrays that they refer to.

    Raises:
        ValueError: it refers to what is not there, or cannot be run; names the operation.

    Attributes:
        values: what each input, constant and result is.
    """

    def __init__(
        self,
        inputs: Mapping[str, Value],
        outputs: Mapping[str, str],
        nodes: list[Node],
        constants: Mapping[str, Array],
    ) -> None:
        self.inputs, self.outputs, self.nodes = dict(inputs), dict(outputs), list(nodes)
        self.constants = {name: np.asarray(value) for name, value in constants.items()}
        for name, value in (self.inputs | {name: _value(array) for name, array in self.constants.items()}).items():
            if value.dtype not in DTYPES or math.prod(value.shape) > LARGEST:
                raise ValueError(f"{name} is {value}; expected one of {', '.join(DTYPES)}, of {LARGEST:,} at most")
        known = {*self.inputs, *self.constants}
        for node in self.nodes:
            if node.op not in OPERATIONS:
                raise ValueError(f"no operation {node.op!r} is known")
            if missing := [name for name in node.inputs if name not in known]:
                raise ValueError(f"{node.op} that makes {node.output!r} needs {missing[0]!r}, which is not there yet")
            if node.output in known:
                raise ValueError(f"{node.output!r} is made twice")
            _check_attributes(node)
            known.add(node.output)
        if missing := [name for name in self.outputs.values() if name not in known]:
            raise ValueError(f"an output is {missing[0]!r}, which is not there")
        if not self.outputs or not self.inputs:
            raise ValueError("it has no input or no output")
        blank = {name: np.zeros(value.shape, value.dtype) for name, value in self.inputs.items()}
        self.values = {name: _value(array) for name, array in self._try(blank).items()}
        self._program = [
            (functools.partial(OPERATIONS[node.op], **node.attributes), node.inputs, node.output) for node in self.nodes
        ]
        self._expected = [(name, value.shape, np.dtype(value.dtype)) for name, value in self.inputs.items()]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for `inputs`, which must be of the shapes and types that `self.inputs` says."""
        for name, shape, dtype in self._expected:
            given = inputs[name]
            if given.shape != shape or given.dtype != dtype:
                raise UsageError(f"the input {name} is {given.dtype} {given.shape}; expected {dtype} {shape}")
        values: dict[str, Array] = {**inputs, **self.constants}
        with np.errstate(all="ignore"):  # what is not finite is seen by whoever reads the outputs
            for call, names, output in self._program:  # shapes are fixed, so that what was tried once can be done
                values[output] = call(*[values[name] for name in names])
        return {name: np.asarray(values[result]) for name, result in self.outputs.items()}

    def _try(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All results for `inputs`; raises ValueError where there is none, or too much of it."""
        values: dict[str, Array] = {**inputs, **self.constants}
        total = 0
        with np.errstate(all="ignore"):
            for node in self.nodes:
                given = [values[name] for name in node.inputs]
                total += _check_shapes(node, given, [name in self.constants for name in node.inputs])
                if total > LARGEST:
                    raise ValueError(f"with {node.op} that makes {node.output!r} there are {total:,} numbers")
                try:
                    result = run_node(node.op, given, node.attributes)
                except (ValueError, TypeError, IndexError, KeyError, ArithmeticError, MemoryError) as error:
                    raise ValueError(f"{node.op} that makes {node.output!r} cannot be done: {error}") from None
                if result.dtype.name not in DTYPES:
                    raise ValueError(f"{node.op} that makes {node.output!r} gives {result.dtype}")
                values[node.output] = result
        return values

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, but for the constants, which are kept as they are."""
        return {
            "format": FORMAT,
            "inputs": {name: {"shape": list(v.shape), "dtype": v.dtype} for name, v in self.inputs.items()},
            "outputs": self.outputs,
            "nodes": [
                {"op": n.op, "inputs": list(n.inputs), "output": n.output, "attributes": dict(n.attributes)}
                for n in self.nodes
            ],
        }

    @classmethod
    def from_json(cls, content: bytes, constants: Mapping[str, Array], where: str) -> Network:
        """The network that `to_json` described; `where` names the file in errors.

        Raises:
            UsageError: it is none, or cannot be run.
        """
        try:
            tree = json.loads(content)
            if tree["format"] != FORMAT:
                raise ValueError(f"its format is {tree['format']!r}; expected {FORMAT!r}")
            inputs = {str(name): Value(tuple(v["shape"]), str(v["dtype"])) for name, v in tree["inputs"].items()}
            for name, value in inputs.items():
                if not all(type(n) is int and 0 <= n <= LARGEST for n in value.shape):
                    raise ValueError(f"the input {name} has the shape {value.shape}")
            nodes = [
                Node(str(n["op"]), tuple(map(str, n["inputs"])), str(n["output"]), dict(n["attributes"]))
                for n in tree["nodes"]
            ]
            return cls(inputs, {str(k): str(v) for k, v in tree["outputs"].items()}, nodes, constants)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"{where} is no network that can be run: {error}") from None


def _value(array: Array) -> Value:
    return Value(array.shape, array.dtype.name)
