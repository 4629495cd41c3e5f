"""A network as one C header: C99 (and C++11), no allocation, nothing but math.h, string.h and stdint.h.

    #include "policy.h"
    static policy_memory memory;              // scratch space
    policy_input in; policy_output out;       // fields are named as the network's inputs and outputs
    policy_run(&in, &out, &memory);

Weights are constants, so that they can stay in flash. Matrices are kept transposed and gone through four rows at a
time: compilers make vector instructions of the inner loop by themselves. Results that live at different times share
memory. With the goldens in it (`POLICY_GOLDENS` defined) `policy_check` runs the network on a few inputs and returns
the largest difference to the outputs that they had when it was exported, which a microcontroller can do before it is
armed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrlrl.deploy.network import BINARY, UNARY, Network, Node, Value
from ctrlrl.deploy.tensors import Array

TYPES = {"float32": "float", "int64": "int64_t", "uint8": "uint8_t", "bool": "uint8_t"}
FLOATS_PER_LINE = 12
LARGEST = 2**22
"""Weights, which a compiler takes about half a minute for."""

_UNARY = {
    "Relu": "x < 0 ? 0 : x",  # what is NaN stays so
    "LeakyRelu": "x < 0 ? {alpha} * x : x",
    "Elu": "x < 0 ? {alpha} * expm1f(x) : x",
    "Selu": "{gamma} * (x < 0 ? {alpha} * expm1f(x) : x)",
    "Tanh": "tanhf(x)",
    "Sigmoid": "0.5f * (tanhf(0.5f * x) + 1)",
    "HardSigmoid": "clamp01({alpha} * x + {beta})",
    "HardSwish": "x * clamp01(x / 6 + 0.5f)",
    "Mish": "x * tanhf(softplus(x))",
    "Softplus": "softplus(x)",
    "Softsign": "x / (1 + fabsf(x))",
    "Erf": "erff(x)",
    "Exp": "expf(x)",
    "Log": "logf(x)",
    "Sqrt": "sqrtf(x)",
    "Reciprocal": "1 / x",
    "Sin": "sinf(x)",
    "Cos": "cosf(x)",
    "Neg": "-x",
    "Abs": "x < 0 ? -x : x",
    "Floor": "floorf(x)",
    "Ceil": "ceilf(x)",
    "Round": "rintf(x)",
    "Sign": "(float)((x > 0) - (x < 0))",
    "Not": "!x",
}
_GELU = {
    "none": "0.5f * x * (1 + erff(x * 0.707106781f))",
    "tanh": "0.5f * x * (1 + tanhf(0.797884561f * (x + 0.044715f * x * x * x)))",
}
_BINARY = {
    "Add": "a + b",
    "Sub": "a - b",
    "Mul": "a * b",
    "Div": "a / b",
    "Pow": "powf(a, b)",
    "Max": "a < b || b != b ? b : a",  # NaN stays so
    "Min": "a > b || b != b ? b : a",
    "Equal": "a == b",
    "Greater": "a > b",
    "GreaterOrEqual": "a >= b",
    "Less": "a < b",
    "LessOrEqual": "a <= b",
    "And": "a && b",
    "Or": "a || b",
}
assert _BINARY.keys() == BINARY.keys() and _UNARY.keys() | {"Gelu"} == UNARY.keys()


_WORDS = """
auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while alignas alignof and
asm bitand bitor bool catch class compl constexpr decltype delete explicit export false friend mutable namespace new
noexcept not nullptr operator or private protected public static_assert template this thread_local throw true try typeid
typename using virtual wchar_t xor NAN INFINITY NULL memory in out main
"""
RESERVED = frozenset(_WORDS.split())
"""Words of C and C++, and of the header itself."""


def identifier(name: str) -> str:
    """A name in C for any text."""
    clean = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    return f"{clean}_" if clean in RESERVED else f"v{clean}" if clean[0].isdigit() else clean


def _distinct(names: Sequence[str]) -> dict[str, str]:
    """Names in C, no two of which are the same."""
    out: dict[str, str] = {}
    for name in dict.fromkeys(names):
        own, number = identifier(name), 1
        while own in out.values():
            number += 1
            own = f"{identifier(name)}_{number}"
        out[name] = own
    return out


def c_header(
    network: Network,
    name: str = "policy",
    *,
    title: str = "",
    goldens: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]] = (),
) -> str:
    """The header.

    Args:
        network: what it does.
        name: what its functions and types begin with.
        title: a line of comment.
        goldens: inputs and outputs for `NAME_check`.

    Raises:
        NotImplementedError: there is no C for one of its operations, or it is too large.
    """
    if sum(value.size for value in network.constants.values()) > LARGEST:
        raise NotImplementedError(f"a network of more than {LARGEST:,} weights")
    return _Source(network, identifier(name), title).header(goldens)


class _Source:
    def __init__(self, network: Network, name: str, title: str) -> None:
        self.network, self.name, self.title = network, name, title
        self.lines: list[str] = []
        self.tables: list[str] = []
        self._table_of: dict[tuple[str, bool], str] = {}
        self.fields = _distinct((*network.inputs, *network.outputs))
        # Where a value lies: a place in an arena, a field, a table, or a part of another value's place.
        self._place: dict[str, str] = {n: f"in->{self.fields[n]}" for n in network.inputs}
        self._view_of: dict[str, str] = {}
        self._arena = _Arena()

    def header(self, goldens: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> str:
        self._plan()
        for index, node in enumerate(self.network.nodes):
            self._emit(index, node)
        copies = [
            f"memcpy(out->{self.fields[n]}, {self._at(result)}, sizeof out->{self.fields[n]});"
            for n, result in self.network.outputs.items()
        ]
        name, guard = self.name, f"{self.name.upper()}_H"
        body = "\n".join(f"    {line}" for line in (*self.lines, *copies))
        comment = self.title.replace("*/", "* /").replace("\n", " ")
        values = self.network.values
        parts = [
            f"/* {comment}. Generated by ctrlrl; do not edit. */" if comment else "/* Generated by ctrlrl. */",
            f"#ifndef {guard}\n#define {guard}\n\n#include <math.h>\n#include <stdint.h>\n#include <string.h>\n",
            _struct(f"{name}_input", {self.fields[n]: value for n, value in self.network.inputs.items()}),
            _struct(f"{name}_output", {self.fields[n]: values[r] for n, r in self.network.outputs.items()}),
            self._arena.struct(f"{name}_memory"),
            *self.tables,
            f"static inline float {name}_softplus(float x) "
            "{ return (x > 0 ? x : 0) + log1pf(expf(x < 0 ? x : -x)); }",
            f"static inline float {name}_clamp01(float x) {{ return x < 0 ? 0 : x > 1 ? 1 : x; }}\n",
            f"/* Runs the network once: about {self._operations():,} multiplications. */",
            f"static inline void {name}_run(const {name}_input *in, {name}_output *out, {name}_memory *memory) {{\n"
            f"    (void)memory;\n    (void){name}_softplus;\n    (void){name}_clamp01;\n{body}\n}}\n",
            self._check(goldens),
            f"#endif /* {guard} */\n",
        ]
        return "\n".join(part for part in parts if part)

    # Where things lie.

    def _plan(self) -> None:
        """Give every result a place; views have that of what they are views of."""
        last: dict[str, int] = {}
        nodes = self.network.nodes
        for index, node in enumerate(nodes):
            source = self._viewed(node)
            if source is not None:
                self._view_of[node.output] = source
            for name in node.inputs:
                last[self._root(name)] = index
        for result in self.network.outputs.values():
            last[self._root(result)] = len(nodes)
        ending: dict[int, list[str]] = {}
        for name, index in last.items():
            ending.setdefault(index, []).append(name)
        for index, node in enumerate(nodes):
            if node.output not in self._view_of:
                value = self.network.values[node.output]
                self._place[node.output] = self._arena.take(node.output, TYPES[value.dtype], math.prod(value.shape))
                if node.output not in last:  # nobody reads it
                    self._arena.free(node.output)
            for name in ending.get(index, []):
                self._arena.free(name)

    def _viewed(self, node: Node) -> str | None:
        """What `node` is a part of as it lies there, if it is."""
        if node.op == "Reshape":
            return node.inputs[0]
        if node.op == "Slice":
            shape, a = self.network.values[node.inputs[0]].shape, node.attributes
            if a["step"] == 1 and math.prod(shape[: a["axis"]]) == 1:
                return node.inputs[0]
        return None

    def _root(self, name: str) -> str:
        while name in self._view_of:
            name = self._view_of[name]
        return name

    def _at(self, name: str) -> str:
        """An expression for where the value begins."""
        offset = 0
        while name in self._view_of:
            node = next(n for n in self.network.nodes if n.output == name)
            if node.op == "Slice":
                inner = self.network.values[node.inputs[0]].shape[node.attributes["axis"] + 1 :]
                offset += node.attributes["start"] * math.prod(inner)
            name = self._view_of[name]
        place = self._table(name) if name in self.network.constants else self._place[name]
        return f"{place} + {offset}" if offset else place

    def _table(self, name: str, *, transposed: bool = False) -> str:
        """The name of a constant's table."""
        key = (name, transposed)
        if key not in self._table_of:
            value = self.network.constants[name]
            table = f"{self.name}_constant_{len(self._table_of)}"
            self._table_of[key] = table
            self.tables.append(_table(table, value.T if transposed else value))
        return self._table_of[key]

    # What is done.

    def _emit(self, index: int, node: Node) -> None:
        if node.output in self._view_of:
            return
        out = self.network.values[node.output]
        if node.op in UNARY:
            template = _GELU[node.attributes["approximate"]] if node.op == "Gelu" else _UNARY[node.op]
            numbers = {k: _number(v) for k, v in node.attributes.items() if k != "approximate"}
            helped = re.sub(r"\b(softplus|clamp01)\(", rf"{self.name}_\1(", template)
            self._each(
                node, out, f"{TYPES[self.network.values[node.inputs[0]].dtype]} x = {{0}};", helped.format(**numbers)
            )
        elif node.op in BINARY:
            kind = TYPES[self.network.values[node.inputs[0]].dtype]
            self._each(node, out, f"{kind} a = {{0}}, b = {{1}};", _BINARY[node.op])
        elif node.op == "Where":
            self._each(node, out, "", "{0} ? {1} : {2}")
        elif node.op in ("Expand", "Cast"):
            to_bool = node.op == "Cast" and out.dtype == "bool"
            self._each(node, out, "", "{0} != 0" if to_bool else f"({TYPES[out.dtype]}){{0}}")
        else:
            getattr(self, f"_emit_{node.op.lower()}")(node, out)

    def _each(self, node: Node, out: Value, before: str, expression: str) -> None:
        """out[...] = expression of the inputs at the same place, broadcast."""
        values = [self.network.values[name] for name in node.inputs]
        target = self._at(node.output)
        size = math.prod(out.shape)
        flat = all(math.prod(v.shape) in (1, size) for v in values)
        if flat:
            indices = ["0" if math.prod(v.shape) == 1 and size != 1 else "i" for v in values]
            loops, place = [f"for (int i = 0; i < {size}; ++i)"], "i"
        else:
            loops = [f"for (int i{d} = 0; i{d} < {n}; ++i{d})" for d, n in enumerate(out.shape)]
            place = _index(out.shape, out.shape)
            indices = [_index(v.shape, out.shape) for v in values]
        operands = [f"({self._at(n)})[{i}]" for n, i in zip(node.inputs, indices, strict=True)]
        text = " ".join(filter(None, (before, f"({target})[{place}] = {expression};")))
        self.lines.append(" ".join(loops) + " { " + re.sub(r"\{(\d)\}", lambda m: operands[int(m[1])], text) + " }")

    def _emit_gemm(self, node: Node, out: Value) -> None:
        outputs, inputs = self.network.constants[node.inputs[1]].shape
        weight, x, y = self._table(node.inputs[1], transposed=True), self._at(node.inputs[0]), self._at(node.output)
        rows = math.prod(out.shape) // outputs
        bias = self._at(node.inputs[2]) if len(node.inputs) > 2 else None
        start = f"memcpy(y, {bias}," if bias else "memset(y, 0,"
        blocks = inputs // 4 * 4
        lines = [
            f"for (int r = 0; r < {rows}; ++r) {{",
            f"    const float *x = {x} + r * {inputs}; float *y = {y} + r * {outputs};",
            f"    {start} sizeof(float) * {outputs});",
        ]
        if blocks:
            lines += [
                f"    for (int k = 0; k < {blocks}; k += 4) {{",
                f"        const float *w = {weight} + k * {outputs};",
                "        const float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];",
                f"        for (int j = 0; j < {outputs}; ++j)",
                f"            y[j] += (x0 * w[j] + x1 * w[j + {outputs}]) "
                f"+ (x2 * w[j + {2 * outputs}] + x3 * w[j + {3 * outputs}]);",
                "    }",
            ]
        if blocks < inputs:
            lines += [
                f"    for (int k = {blocks}; k < {inputs}; ++k)",
                f"        for (int j = 0; j < {outputs}; ++j) y[j] += x[k] * {weight}[k * {outputs} + j];",
            ]
        self.lines += [*lines, "}"]

    def _emit_matmul(self, node: Node, out: Value) -> None:
        left, right = (self.network.values[name].shape for name in node.inputs)
        if len(left) < 2 or len(right) < 2 or math.prod(right[:-2]) != 1:
            raise NotImplementedError("MatMul of other than matrices")
        inner, columns, rows = left[-1], right[-1], math.prod(left[:-1])
        a, b, y = self._at(node.inputs[0]), self._at(node.inputs[1]), self._at(node.output)
        self.lines += [
            f"for (int r = 0; r < {rows}; ++r) for (int j = 0; j < {columns}; ++j) {{",
            f"    float sum = 0; for (int k = 0; k < {inner}; ++k)"
            f" sum += ({a})[r * {inner} + k] * ({b})[k * {columns} + j];",
            f"    ({y})[r * {columns} + j] = sum;",
            "}",
        ]

    def _emit_conv(self, node: Node, out: Value) -> None:
        a = node.attributes
        _, channels, height, width = self.network.values[node.inputs[0]].shape
        maps, per_group, kernel_h, kernel_w = self.network.constants[node.inputs[1]].shape
        _, _, rows, columns = out.shape
        x, weight, y = self._at(node.inputs[0]), self._table(node.inputs[1]), self._at(node.output)
        bias = f"({self._at(node.inputs[2])})[m]" if len(node.inputs) > 2 else "0"
        assert channels == per_group * a["group"]
        self.lines += [
            f"for (int m = 0; m < {maps}; ++m) for (int r = 0; r < {rows}; ++r) for (int s = 0; s < {columns}; ++s) {{",
            f"    float sum = {bias};",
            f"    for (int c = 0; c < {per_group}; ++c) for (int u = 0; u < {kernel_h}; ++u) {{",
            f"        const int v = r * {a['strides'][0]} - {a['pads'][0]} + u * {a['dilations'][0]};",
            f"        if (v < 0 || v >= {height}) continue;",
            f"        const int from = m / {maps // a['group']} * {per_group} + c;",
            f"        for (int t = 0; t < {kernel_w}; ++t) {{",
            f"            const int h = s * {a['strides'][1]} - {a['pads'][1]} + t * {a['dilations'][1]};",
            f"            if (h >= 0 && h < {width}) sum += ({x})[(from * {height} + v) * {width} + h]"
            f" * {weight}[((m * {per_group} + c) * {kernel_h} + u) * {kernel_w} + t];",
            "        }",
            "    }",
            f"    ({y})[(m * {rows} + r) * {columns} + s] = sum;",
            "}",
        ]

    def _emit_layernormalization(self, node: Node, out: Value) -> None:
        size = math.prod(out.shape[node.attributes["axis"] :])
        rows = math.prod(out.shape) // size
        x, scale, y = (self._at(name) for name in (*node.inputs[:2], node.output))
        shift = f" + ({self._at(node.inputs[2])})[j]" if len(node.inputs) > 2 else ""
        self.lines += [
            f"for (int r = 0; r < {rows}; ++r) {{",
            f"    const float *x = {x} + r * {size}; float mean = 0, variance = 0;",
            f"    for (int j = 0; j < {size}; ++j) mean += x[j];",
            f"    mean /= {size};",
            f"    for (int j = 0; j < {size}; ++j) variance += (x[j] - mean) * (x[j] - mean);",
            f"    const float deviation = sqrtf(variance / {size} + {_number(node.attributes['epsilon'])});",
            f"    for (int j = 0; j < {size}; ++j)"
            f" ({y})[r * {size} + j] = (x[j] - mean) / deviation * ({scale})[j]{shift};",
            "}",
        ]

    def _along(self, node: Node, axis: int) -> tuple[int, int, int]:
        """How many rows there are before an axis, along it and behind it."""
        shape = self.network.values[node.inputs[0]].shape
        return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])

    def _emit_softmax(self, node: Node, out: Value) -> None:
        before, size, behind = self._along(node, node.attributes["axis"])
        x, y = self._at(node.inputs[0]), self._at(node.output)
        self.lines += [
            f"for (int r = 0; r < {before}; ++r) for (int s = 0; s < {behind}; ++s) {{",
            f"    const float *x = {x} + r * {size * behind} + s; float *y = {y} + r * {size * behind} + s;",
            "    float top = x[0], sum = 0;",
            f"    for (int j = 1; j < {size}; ++j) top = x[j * {behind}] > top ? x[j * {behind}] : top;",
            f"    for (int j = 0; j < {size}; ++j) sum += y[j * {behind}] = expf(x[j * {behind}] - top);",
            f"    for (int j = 0; j < {size}; ++j) y[j * {behind}] /= sum;",
            "}",
        ]

    def _emit_argmax(self, node: Node, out: Value) -> None:
        before, size, behind = self._along(node, node.attributes["axis"])
        kind = TYPES[self.network.values[node.inputs[0]].dtype]
        x, y = self._at(node.inputs[0]), self._at(node.output)
        self.lines += [
            f"for (int r = 0; r < {before}; ++r) for (int s = 0; s < {behind}; ++s) {{",
            f"    const {kind} *x = {x} + r * {size * behind} + s; int best = 0;",
            f"    for (int j = 1; j < {size}; ++j) if (x[j * {behind}] > x[best * {behind}]) best = j;",
            f"    ({y})[r * {behind} + s] = best;",
            "}",
        ]

    def _reduce(self, node: Node, step: str, start: str, finish: str) -> None:
        shape = self.network.values[node.inputs[0]].shape
        axes = {axis % len(shape) for axis in node.attributes["axes"]}
        kept = tuple(1 if d in axes else n for d, n in enumerate(shape))
        x, y = self._at(node.inputs[0]), self._at(node.output)
        size = math.prod(kept)
        kind = TYPES[self.network.values[node.inputs[0]].dtype]
        loops = " ".join(f"for (int i{d} = 0; i{d} < {n}; ++i{d})" for d, n in enumerate(shape))
        self.lines += [
            f"{{ const {kind} *x = {x}; {kind} *y = {y};",
            f"    for (int j = 0; j < {size}; ++j) y[j] = {start};",
            f"    {loops} {{",
            f"        const {kind} a = x[{_index(shape, shape)}]; {kind} *b = y + {_index(kept, shape)};",
            f"        {step}",
            "    }",
            f"    for (int j = 0; j < {size}; ++j) y[j] = {finish};" if finish else "",
            "}",
        ]

    def _emit_reducesum(self, node: Node, out: Value) -> None:
        self._reduce(node, "*b += a;", "0", "")

    def _emit_reducemean(self, node: Node, out: Value) -> None:
        count = math.prod(self.network.values[node.inputs[0]].shape) // max(1, math.prod(out.shape))
        self._reduce(node, "*b += a;", "0", f"y[j] / {count}")

    def _emit_reducemax(self, node: Node, out: Value) -> None:
        self._reduce(node, "if (a > *b) *b = a;", "-INFINITY", "")

    def _emit_reducemin(self, node: Node, out: Value) -> None:
        self._reduce(node, "if (a < *b) *b = a;", "INFINITY", "")

    def _emit_concat(self, node: Node, out: Value) -> None:
        axis = node.attributes["axis"]
        before, behind = math.prod(out.shape[:axis]), math.prod(out.shape[axis + 1 :])
        total, start, y = out.shape[axis] * behind, 0, self._at(node.output)
        kind = TYPES[out.dtype]
        for name in node.inputs:
            size = self.network.values[name].shape[axis] * behind
            self.lines.append(
                f"for (int r = 0; r < {before}; ++r)"
                f" memcpy({y} + r * {total} + {start}, {self._at(name)} + r * {size}, sizeof({kind}) * {size});"
            )
            start += size

    def _emit_slice(self, node: Node, out: Value) -> None:
        a = node.attributes
        before, size, behind = self._along(node, a["axis"])
        count, x, y = out.shape[a["axis"]], self._at(node.inputs[0]), self._at(node.output)
        self.lines.append(
            f"for (int r = 0; r < {before}; ++r) for (int j = 0; j < {count}; ++j)"
            f" memcpy({y} + (r * {count} + j) * {behind},"
            f" {x} + (r * {size} + {a['start']} + j * {a['step']}) * {behind}, sizeof({TYPES[out.dtype]}) * {behind});"
        )

    def _emit_gather(self, node: Node, out: Value) -> None:
        before, size, behind = self._along(node, node.attributes["axis"])
        count = math.prod(self.network.values[node.inputs[1]].shape)
        x, index, y = self._at(node.inputs[0]), self._at(node.inputs[1]), self._at(node.output)
        self.lines.append(
            f"for (int r = 0; r < {before}; ++r) for (int j = 0; j < {count}; ++j)"
            f" memcpy({y} + (r * {count} + j) * {behind},"
            f" {x} + (r * {size} + ({index})[j]) * {behind}, sizeof({TYPES[out.dtype]}) * {behind});"
        )

    def _emit_transpose(self, node: Node, out: Value) -> None:
        shape, perm = self.network.values[node.inputs[0]].shape, node.attributes["perm"]
        strides = [math.prod(shape[d + 1 :]) for d in perm]
        loops = " ".join(f"for (int i{d} = 0; i{d} < {n}; ++i{d})" for d, n in enumerate(out.shape))
        source = " + ".join(f"i{d} * {stride}" for d, stride in enumerate(strides)) or "0"
        target = f"({self._at(node.output)})[{_index(out.shape, out.shape)}]"
        self.lines.append(f"{loops} {target} = ({self._at(node.inputs[0])})[{source}];")

    def _operations(self) -> int:
        total, values = 0, self.network.values
        for node in self.network.nodes:
            if node.op in ("Gemm", "MatMul", "Conv"):
                weight = values[node.inputs[1]].shape
                inner = math.prod(weight[1:]) if node.op != "MatMul" else weight[-2]
                total += math.prod(values[node.output].shape) * inner
        return total

    def _check(self, goldens: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> str:
        if not goldens:
            return ""
        name, lines = self.name, []
        for i, (given, expected) in enumerate(goldens):
            for n in self.network.inputs:
                lines.append(_table(f"{name}_golden_{i}_{self.fields[n]}", given[n]))
            for n in self.network.outputs:
                lines.append(_table(f"{name}_expected_{i}_{self.fields[n]}", expected[n]))
        steps = []
        for i in range(len(goldens)):
            steps += [
                f"memcpy(in.{self.fields[n]}, {name}_golden_{i}_{self.fields[n]}, sizeof in.{self.fields[n]});"
                for n in self.network.inputs
            ]
            steps.append(f"{name}_run(&in, &out, memory);")
            for n, result in self.network.outputs.items():
                size = math.prod(self.network.values[result].shape)
                field = self.fields[n]
                steps += [
                    f"for (int i = 0; i < {size}; ++i) {{",
                    f"    const float wanted = (float){name}_expected_{i}_{field}[i];",
                    f"    const float off = fabsf((float)out.{field}[i] - wanted) / fmaxf(1, fabsf(wanted));",
                    "    if (!(off < INFINITY)) return NAN;",
                    "    if (off > worst) worst = off;",
                    "}",
                ]
        return "\n".join(
            [
                f"#ifdef {name.upper()}_GOLDENS",
                *lines,
                "/* The largest difference to the outputs at export, relative to 1 or to them; NaN if not finite. */",
                f"static inline float {name}_check({name}_memory *memory) {{",
                f"    {name}_input in; {name}_output out; float worst = 0;",
                *(f"    {step}" for step in steps),
                "    return worst;",
                "}",
                "#endif",
                "",
            ]
        )


class _Arena:
    """Places in one array for each type, which are given again when they are free."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, int, int]] = {}
        self._length: dict[str, int] = {}

    def take(self, name: str, kind: str, size: int) -> str:
        taken = sorted((start, start + n) for k, start, n in self._held.values() if k == kind)
        at = 0
        for start, stop in taken:
            if start - at >= size:
                break
            at = max(at, stop)
        self._held[name] = (kind, at, size)
        self._length[kind] = max(self._length.get(kind, 0), at + size)
        return f"memory->{kind.removesuffix('_t')}s + {at}"

    def free(self, name: str) -> None:
        self._held.pop(name, None)

    def struct(self, name: str) -> str:
        fields = [f"    {kind} {kind.removesuffix('_t')}s[{size}];" for kind, size in self._length.items()]
        return "typedef struct {\n" + "\n".join(fields or ["    char nothing;"]) + f"\n}} {name};\n"


def _index(shape: Sequence[int], loops: Sequence[int]) -> str:
    """The place in an array of `shape` of the loops i0, i1, ... over `loops`, to which it is broadcast."""
    ahead, terms = len(loops) - len(shape), []
    for d, n in enumerate(shape):
        stride = math.prod(shape[d + 1 :])
        if n != 1:
            terms.append(f"i{d + ahead}" + (f" * {stride}" if stride != 1 else ""))
    return " + ".join(terms) or "0"


def _struct(name: str, fields: Mapping[str, Value]) -> str:
    lines = [
        f"    {TYPES[v.dtype]} {field}[{max(1, math.prod(v.shape))}]; /* {' x '.join(map(str, v.shape)) or '1'} */"
        for field, v in fields.items()
    ]
    return "typedef struct {\n" + "\n".join(lines) + f"\n}} {name};\n"


def _table(name: str, array: Array) -> str:
    numbers = [_number(value) for value in np.ravel(array).tolist()]
    if array.dtype.kind != "f":
        numbers = [str(int(value)) for value in np.ravel(array).tolist()]
    lines = [", ".join(numbers[i : i + FLOATS_PER_LINE]) for i in range(0, len(numbers), FLOATS_PER_LINE)]
    return f"static const {TYPES[array.dtype.name]} {name}[{max(1, len(numbers))}] = {{\n" + ",\n".join(lines) + "};\n"


def _number(value: Any) -> str:
    """A float32 as a literal that gives the same bits."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{np.float32(value):.9g}"
    return f"{text}f" if any(c in text for c in ".e") else f"{text}.0f"
