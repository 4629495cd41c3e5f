"""Networks as operations: each beside onnxruntime, in NumPy and as compiled C; and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ctrlrl.deploy.c_source import c_header, identifier
from ctrlrl.deploy.lowering import Unsupported, lower
from ctrlrl.deploy.network import LARGEST, Network, Node, Value
from ctrlrl.deploy.runtimes import CRuntime
from ctrlrl.deploy.tensors import read_tensors, write_tensors
from ctrlrl.errors import UsageError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT, INT, BOOL, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT8
RANDOM = np.random.default_rng(0)


def model(
    nodes: list[Any], inputs: dict[str, Any], constants: dict[str, Any], outputs: dict[str, int], opset: int = 20
):
    """Inputs are shapes (of float32) or (type, shape); outputs are types."""
    described = {n: v if isinstance(v[0], int) and isinstance(v[1], tuple) else (FLOAT, v) for n, v in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in described.items()],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), n) for n, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return made


def agree(made: Any, rounds: int = 5, tolerance: float = 2e-6, draw: Any = None) -> Network:
    """The same outputs in onnxruntime, NumPy and C."""
    network = lower(made)
    again = Network.from_json(
        json.dumps(network.to_json()).encode(), read_tensors(write_tensors(network.constants), "weights"), "network"
    )
    c = CRuntime(SimpleNamespace(network=lambda: again, path=Path("bundle")))  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    for _ in range(rounds):
        given = {n: (draw or drawn)(v) for n, v in network.inputs.items()}
        wanted = session.run(None, given)
        for result in (again(given), c.run(given)):
            for (name, value), expected in zip(result.items(), wanted, strict=True):
                assert value.shape == expected.shape and value.dtype == expected.dtype, name
                np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    return network


def drawn(value: Value) -> Any:
    if value.dtype == "float32":
        return RANDOM.normal(scale=2, size=value.shape).astype(np.float32)
    return RANDOM.integers(0, 2 if value.dtype == "bool" else 200, value.shape).astype(value.dtype)


ALIKE = [
    ("Relu", {}),
    ("LeakyRelu", {}),
    ("LeakyRelu", {"alpha": 0.3}),
    ("Elu", {}),
    ("Elu", {"alpha": 0.5}),
    ("Selu", {}),
    ("Gelu", {}),
    ("Gelu", {"approximate": "tanh"}),
    ("Tanh", {}),
    ("Sigmoid", {}),
    ("HardSigmoid", {}),
    ("HardSwish", {}),
    ("Mish", {}),
    ("Softplus", {}),
    ("Softsign", {}),
    ("Erf", {}),
    ("Exp", {}),
    ("Sin", {}),
    ("Cos", {}),
    ("Neg", {}),
    ("Abs", {}),
    ("Floor", {}),
    ("Ceil", {}),
    ("Round", {}),
    ("Sign", {}),
    ("Reciprocal", {}),
]


def test_operations_on_each_number():
    nodes = [helper.make_node(op, ["x"], [f"y{i}"], **a) for i, (op, a) in enumerate(ALIKE)]
    nodes += [helper.make_node("Abs", ["x"], ["positive"])]
    nodes += [helper.make_node(op, ["positive"], [f"z{op}"]) for op in ("Sqrt", "Log")]
    outputs = {f"y{i}": FLOAT for i in range(len(ALIKE))} | {"zSqrt": FLOAT, "zLog": FLOAT}
    agree(model(nodes, {"x": (1, 37)}, {}, outputs), tolerance=1e-5)


def test_operations_on_two_are_broadcast():
    inputs = {"a": (1, 3, 4), "b": (1, 1, 4), "c": (1, 3, 1)}
    nodes, outputs = [], {}
    for op in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
        for i, (left, right) in enumerate((("a", "a"), ("a", "b"), ("b", "c"), ("a", "two"), ("half", "a"))):
            nodes.append(helper.make_node(op, [left, right], [f"{op}{i}"]))
            outputs[f"{op}{i}"] = FLOAT
    for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"):
        nodes.append(helper.make_node(op, ["a", "b"], [op]))
        outputs[op] = BOOL
    nodes += [
        helper.make_node("And", ["Greater", "Less"], ["and"]),
        helper.make_node("Or", ["Greater", "Less"], ["or"]),
        helper.make_node("Not", ["Greater"], ["not"]),
        helper.make_node("Where", ["Greater", "a", "c"], ["where"]),
        helper.make_node("Max", ["a", "b", "c"], ["most"]),
        helper.make_node("Min", ["a"], ["same"]),
        helper.make_node("Abs", ["a"], ["positive"]),
        helper.make_node("Pow", ["positive", "half"], ["power"]),
        helper.make_node("Expand", ["c", "wide"], ["expanded"]),
    ]
    outputs |= {"and": BOOL, "or": BOOL, "not": BOOL, "where": FLOAT, "most": FLOAT, "same": FLOAT, "power": FLOAT}
    outputs |= {"expanded": FLOAT}
    constants = {"two": np.float32(2), "half": np.full((1,), 0.5, np.float32), "wide": np.array([1, 3, 5])}
    agree(model(nodes, inputs, constants, outputs))


@pytest.mark.parametrize("opset", [11, 20])
def test_bounds(opset: int):
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["both"]),
        helper.make_node("Clip", ["x", "low"], ["below"]),
        helper.make_node("Clip", ["x", "", "high"], ["above"]),
        helper.make_node("Clip", ["x"], ["none"]),
    ]
    constants = {"low": np.float32(-0.5), "high": np.float32(0.7)}
    agree(model(nodes, {"x": (1, 9)}, constants, dict.fromkeys(("both", "below", "above", "none"), FLOAT), opset))


def test_bounds_as_attributes():
    nodes = [helper.make_node("Clip", ["x"], ["y"], min=-0.5, max=0.7)]
    agree(model(nodes, {"x": (1, 9)}, {}, {"y": FLOAT}, 9))


def test_matrices():
    weight, bias = RANDOM.normal(size=(7, 5)).astype(np.float32), RANDOM.normal(size=5).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["plain"]),
        helper.make_node("Gemm", ["x", "wt"], ["turned"], transB=1, alpha=0.5),
        helper.make_node("Gemm", ["x", "w", "one"], ["scaled"], beta=2.0),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("MatMul", ["m", "w"], ["of many"]),
        helper.make_node("MatMul", ["m", "mt"], ["of both"]),
    ]
    constants = {"w": weight, "wt": np.ascontiguousarray(weight.T), "b": bias, "one": np.ones((1,), np.float32)}
    outputs = dict.fromkeys(("plain", "turned", "scaled", "product", "of many", "of both"), FLOAT)
    agree(model(nodes, {"x": (1, 7), "m": (1, 3, 7), "mt": (1, 7, 4)}, constants, outputs), tolerance=1e-5)


def test_shapes_are_computed_beforehand():
    """What an exporter writes for a batch of unknown size: Shape, Gather, Concat, Reshape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], axis=0),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["batch1"]),
        helper.make_node("Concat", ["batch1", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
        helper.make_node(
            "ConstantOfShape", ["wanted2"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))
        ),
        helper.make_node("Add", ["y", "ones"], ["z"]),
        helper.make_node("Constant", [], ["c"], value_float=2.5),
        helper.make_node("Mul", ["z", "c"], ["out"]),
    ]
    constants = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([2, -1]), "wanted2": np.array([1, 2, 3])}
    network = agree(model(nodes, {"x": ("batch", 6)}, constants, {"out": FLOAT}), rounds=2)
    assert [node.op for node in network.nodes] == ["Reshape", "Add", "Mul"]


def test_parts_and_places():
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1),
        helper.make_node("Split", ["x"], ["c", "d", "e"], axis=2, num_outputs=3),
        helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["f"]),
        helper.make_node("Concat", ["b", "a"], ["g"], axis=1),
        helper.make_node("Transpose", ["x"], ["h"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["x"], ["i"]),
        helper.make_node("Flatten", ["x"], ["j"]),
        helper.make_node("Squeeze", ["x", "first"], ["k"]),
        helper.make_node("Gather", ["x", "index"], ["l"], axis=2),
        helper.make_node("Identity", ["d"], ["m"]),
        helper.make_node("Slice", ["x", "from", "to", "second"], ["n"]),
        helper.make_node("Reshape", ["n", "flat"], ["o"]),
    ]
    constants = {
        "sizes": np.array([1, 4]),
        "starts": np.array([1, 0]),
        "ends": np.array([9, -1]),
        "axes": np.array([1, 2]),
        "steps": np.array([2, 1]),
        "first": np.array([0]),
        "index": np.array([[2, -1], [0, 0]]),
        "from": np.array([2]),
        "to": np.array([4]),
        "second": np.array([1]),
        "flat": np.array([1, -1]),
    }
    outputs = dict.fromkeys("abcdefghijklmno", FLOAT)
    agree(model(nodes, {"x": (1, 5, 6)}, constants, outputs))


def test_sums_means_and_choices():
    nodes = [
        helper.make_node("ReduceSum", ["x", "last"], ["a"]),
        helper.make_node("ReduceMean", ["x", "both"], ["b"], keepdims=0),
        helper.make_node("ReduceMax", ["x", "last"], ["c"]),
        helper.make_node("ReduceMin", ["x"], ["d"]),
        helper.make_node("Softmax", ["x"], ["e"]),
        helper.make_node("Softmax", ["x"], ["f"], axis=1),
        helper.make_node("ArgMax", ["x"], ["g"], axis=-1, keepdims=0),
        helper.make_node("ArgMax", ["x"], ["h"], axis=1),
        helper.make_node("Cast", ["g"], ["i"], to=FLOAT),
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["j"], epsilon=1e-3),
        helper.make_node("LayerNormalization", ["x", "wide"], ["k"], axis=1),
        helper.make_node("BatchNormalization", ["x", "s", "t", "mean", "variance"], ["l"]),
    ]
    constants = {"last": np.array([2]), "both": np.array([1, -1])}
    constants |= {"scale": RANDOM.normal(size=6).astype(np.float32), "shift": RANDOM.normal(size=6).astype(np.float32)}
    constants |= {"wide": RANDOM.normal(size=(5, 6)).astype(np.float32)}
    constants |= {name: RANDOM.normal(size=5).astype(np.float32) for name in ("s", "t", "mean")}
    constants |= {"variance": np.full(5, 0.7, np.float32)}
    outputs = dict.fromkeys("abcdefijkl", FLOAT) | {"g": INT, "h": INT}
    ordered = {name: outputs[name] for name in "abcdefghijkl"}
    agree(model(nodes, {"x": (1, 5, 6)}, constants, ordered), tolerance=1e-5)


@pytest.mark.parametrize(("strides", "pads", "dilations", "group"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1)])
def test_convolutions_of_pictures(strides: int, pads: int, dilations: int, group: int):
    nodes = [
        helper.make_node("Cast", ["x"], ["numbers"], to=FLOAT),
        helper.make_node("Div", ["numbers", "most"], ["light"]),
        helper.make_node(
            "Conv",
            ["light", "w", "b"],
            ["y"],
            strides=[strides] * 2,
            pads=[pads, 0, pads, 1],
            dilations=[dilations, 1],
            group=group,
        ),
        helper.make_node("Flatten", ["y"], ["z"]),
    ]
    constants = {
        "most": np.float32(255),
        "w": RANDOM.normal(size=(6, 4 // group, 3, 2)).astype(np.float32),
        "b": RANDOM.normal(size=6).astype(np.float32),
    }
    agree(model(nodes, {"x": (UINT8, (1, 4, 9, 8))}, constants, {"z": FLOAT}), tolerance=1e-5)


def test_of_a_matrix_only_what_is_read_is_kept():
    """A policy's standard deviations are no part of what it does. Where both halves are read, nothing is changed."""
    weights = {"w": RANDOM.normal(size=(5, 8)).astype(np.float32), "b": RANDOM.normal(size=8).astype(np.float32)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Split", ["h"], ["mean", "log_std"], axis=1, num_outputs=2),
        helper.make_node("Tanh", ["mean"], ["y"]),
    ]
    network = agree(model(nodes, {"x": (1, 5)}, weights, {"y": FLOAT}))
    assert [node.op for node in network.nodes] == ["Gemm", "Tanh"]
    assert sorted(value.shape for value in network.constants.values()) == [(4,), (4, 5)]
    network = agree(model(nodes, {"x": (1, 5)}, weights, {"y": FLOAT, "log_std": FLOAT}))
    assert [node.op for node in network.nodes] == ["Gemm", "Slice", "Slice", "Tanh"]
    network = agree(model(nodes, {"x": (1, 5)}, weights, {"y": FLOAT, "h": FLOAT}))
    assert [node.op for node in network.nodes] == ["Gemm", "Slice", "Tanh"]


def test_what_is_not_finite_stays_so():
    """A NaN that a clip or a rectifier made a number of would be sent to motors."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Clip", ["x", "low", "high"], ["c"]),
        helper.make_node("Tanh", ["x"], ["t"]),
    ]
    made = model(
        nodes, {"x": (1, 2)}, {"low": np.float32(-1), "high": np.float32(1)}, dict.fromkeys(("r", "c", "t"), FLOAT)
    )
    network = lower(made)
    c = CRuntime(SimpleNamespace(network=lambda: network, path=Path("bundle")))  # type: ignore[arg-type]
    given = {"x": np.array([[np.nan, 0.5]], np.float32)}
    for result in (network(given), c.run(given)):
        assert all(np.isnan(value[0, 0]) and value[0, 1] > 0 for value in result.values())


@pytest.mark.parametrize("compiler", [["gcc", "-std=c99", "-pedantic"], ["g++", "-x", "c++", "-std=c++11"]])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_the_header_compiles_without_a_warning_and_checks_itself(compiler: list[str], level: str, tmp_path: Path):
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]}")
    weights = {"w": RANDOM.normal(size=(5, 8)).astype(np.float32), "v": RANDOM.normal(size=(8, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Gemm", ["my input", "w"], ["h"]),
        helper.make_node("Elu", ["h"], ["e"]),
        helper.make_node("Gemm", ["e", "v"], ["y"]),
        helper.make_node("Split", ["y"], ["1st", "rest"], axis=1, num_outputs=2),
    ]
    network = lower(model(nodes, {"my input": (1, 5)}, weights, {"1st": FLOAT, "rest": FLOAT}))
    goldens = [(given, network(given)) for given in ({"my input": drawn(Value((1, 5), "float32"))} for _ in range(3))]
    (tmp_path / "arm.h").write_text(c_header(network, "arm", title="*/ evil", goldens=goldens))
    (tmp_path / "main.c").write_text(
        '#define ARM_GOLDENS\n#include "arm.h"\n#include <stdio.h>\nstatic arm_memory memory;\n'
        'int main(void) { arm_input in; (void)in; printf("%g", arm_check(&memory)); return 0; }\n'
    )
    flags = [level, "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *flags, tmp_path / "main.c", "-o", tmp_path / "main", "-lm"], check=True)
    off = float(subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout)
    assert 0 <= off < 1e-5
    assert identifier("1st") == "v1st" and identifier("my input") == "my_input"


def test_memory_is_shared_by_results_that_live_at_different_times():
    weights = {f"w{i}": RANDOM.normal(size=(64, 64)).astype(np.float32) for i in range(6)}
    nodes, last = [], "x"
    for i in range(6):
        nodes += [helper.make_node("Gemm", [last, f"w{i}"], [f"h{i}"]), helper.make_node("Relu", [f"h{i}"], [f"r{i}"])]
        last = f"r{i}"
    header = c_header(lower(model(nodes, {"x": (1, 64)}, weights, {"r5": FLOAT})))
    assert "float floats[128];" in header  # two layers, of twelve


BAD = {
    "unknown": (lambda t: t["nodes"][0].update(op="System"), "no operation 'System'"),
    "missing": (lambda t: t["nodes"][0].update(inputs=["nobody", "w"]), "needs 'nobody', which is not there yet"),
    "twice": (lambda t: t["nodes"].append(t["nodes"][0]), "is made twice"),
    "attribute": (lambda t: t["nodes"][1].update(attributes={"alpha": 1}), r"has the attributes \['alpha'\]"),
    "kind": (lambda t: t["nodes"][2]["attributes"].update(shape="all"), "expected ints"),
    "huge": (lambda t: t["nodes"][2]["attributes"].update(shape=[LARGEST * 2]), "expected ints"),
    "misfit": (lambda t: t["nodes"][2]["attributes"].update(shape=[5]), r"3 numbers make no \[5\]"),
    "output": (lambda t: t["outputs"].update(y="nobody"), "an output is 'nobody'"),
    "input": (lambda t: t["inputs"]["x"].update(shape=[1, LARGEST, 4]), "is Value"),
    "negative": (lambda t: t["inputs"]["x"].update(shape=[1, -4]), "has the shape"),
    "dtype": (lambda t: t["inputs"]["x"].update(dtype="object"), "is Value"),
    "format": (lambda t: t.update(format="ctrlrl.network/9"), "its format is 'ctrlrl.network/9'"),
    "list": (lambda t: t.update(nodes=3), "is no network"),
    "empty": (lambda t: t.update(outputs={}), "it has no input or no output"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_network_that_cannot_be_run_is_refused(name: str):
    change, message = BAD[name]
    nodes = [
        Node("Gemm", ("x", "w"), "h", {}),
        Node("Relu", ("h",), "r", {}),
        Node("Reshape", ("r",), "y", {"shape": [1, 3]}),
    ]
    network = Network({"x": Value((1, 4), "float32")}, {"y": "y"}, nodes, {"w": np.ones((3, 4), np.float32)})
    tree = json.loads(json.dumps(network.to_json()))
    change(tree)
    with pytest.raises(UsageError, match=message):
        Network.from_json(json.dumps(tree).encode(), network.constants, "network.json")
    with pytest.raises(UsageError, match=r"the input x is float32 \(1, 3\)"):
        network({"x": np.zeros((1, 3), np.float32)})


ONES = {
    "w": np.ones((3, 4), np.float32),
    "one": np.ones(1, np.float32),
    "i": np.array([-1]),
    "k": np.ones((1, 1, 2, 2), np.float32),
}
OUTSIDE: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "axis": ("Softmax", ("x",), {"axis": 2}),
    "negative axis": ("Concat", ("x", "x"), {"axis": -1}),
    "negative start": ("Slice", ("x",), {"axis": 1, "start": -1, "stop": 4, "step": 1}),
    "past the end": ("Slice", ("x",), {"axis": 1, "start": 0, "stop": 9, "step": 1}),
    "no step": ("Slice", ("x",), {"axis": 1, "start": 0, "stop": 4, "step": 0}),
    "perm": ("Transpose", ("x",), {"perm": [0, 0]}),
    "index": ("Gather", ("x", "i"), {"axis": 1}),
    "computed index": ("Gather", ("x", "n"), {"axis": 1}),
    "short bias": ("Gemm", ("x", "w", "one"), {}),
    "computed weight": ("Gemm", ("x", "y"), {}),
    "short scale": ("LayerNormalization", ("x", "one"), {"axis": 1, "epsilon": 1e-5}),
    "shape": ("Reshape", ("x",), {"shape": [5]}),
    "axes": ("ReduceSum", ("x",), {"axes": [1, 0], "keepdims": 1}),
    "picture": ("Conv", ("x", "k"), {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}),
    "integers": ("Div", ("n", "n"), {}),
    "two types": ("Add", ("x", "n"), {}),
    "no condition": ("Where", ("x", "x", "x"), {}),
    "two inputs": ("Tanh", ("x", "y"), {}),
    "three inputs": ("Add", ("x", "x", "y"), {}),
    "widening": ("Expand", ("x",), {"shape": [1]}),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_is_taken_that_numpy_would_do_and_c_would_do_beside_its_arrays(name: str):
    op, inputs, attributes = OUTSIDE[name]
    given = {"x": Value((1, 4), "float32"), "y": Value((1, 4), "float32"), "n": Value((1, 2), "int64")}
    with pytest.raises(ValueError, match=op):
        Network(given, {"out": "out"}, [Node(op, inputs, "out", attributes)], ONES)


def test_names_that_are_alike_in_c_are_kept_apart(tmp_path: Path):
    nodes = [helper.make_node("Sub", ["x y", "x_y"], ["default"]), helper.make_node("Neg", ["default"], ["NAN"])]
    network = agree(model(nodes, {"x y": (1, 2), "x_y": (1, 2)}, {}, {"default": FLOAT, "NAN": FLOAT}))
    text = c_header(network)
    assert "float x_y[2]" in text and "float x_y_2[2]" in text and "float default_[2]" in text and "NAN_[2]" in text


@pytest.mark.parametrize(
    ("value", "wanted", "fine"), [(0.5, np.nan, False), (1e4, 1e4 + 0.05, True), (0.5, 0.6, False)]
)
def test_the_check_on_the_target_is_relative_and_forgets_no_nan(
    value: float, wanted: float, fine: bool, tmp_path: Path
):
    network = lower(model([helper.make_node("Neg", ["x"], ["y"])], {"x": (1, 2)}, {}, {"y": FLOAT}))
    given = {"x": np.array([[-value, 2]], np.float32)}
    goldens = [(given, {"y": np.array([[wanted, -2]], np.float32)})]
    (tmp_path / "policy.h").write_text(c_header(network, goldens=goldens))
    (tmp_path / "main.c").write_text(
        '#define POLICY_GOLDENS\n#include "policy.h"\nstatic policy_memory memory;\n'
        "int main(void) { return policy_check(&memory) < 1e-5f ? 0 : 1; }\n"
    )
    subprocess.run(["cc", "-std=c99", "-O2", tmp_path / "main.c", "-o", tmp_path / "main", "-lm"], check=True)
    assert (subprocess.run([tmp_path / "main"], check=False).returncode == 0) == fine


def test_biases_and_axes_as_onnx_has_them():
    constants = {
        "w": RANDOM.normal(size=(4, 4)).astype(np.float32),
        "column": np.array([[0.7]], np.float32),
        "whole": RANDOM.normal(size=(1, 4)).astype(np.float32),
        "none": np.zeros(0, np.int64),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w", "column"], ["a"]),
        helper.make_node("Gemm", ["x", "w", "whole"], ["b"]),
        helper.make_node("ReduceSum", ["x", "none"], ["c"]),
        helper.make_node("ReduceSum", ["x", "none"], ["d"], noop_with_empty_axes=1),
    ]
    agree(model(nodes, {"x": (1, 4)}, constants, dict.fromkeys("abcd", FLOAT)))
    made = model(nodes[:1], {"x": (1, 4)}, constants | {"column": np.ones((3, 4), np.float32)}, {"a": FLOAT})
    with pytest.raises(Unsupported, match="Gemm of"):
        lower(made)


def test_results_that_would_fill_the_memory_are_refused():
    nodes = [Node("Concat", ("x", "x"), "0", {"axis": 1})]
    nodes += [Node("Concat", (str(i), str(i)), str(i + 1), {"axis": 1}) for i in range(40)]
    with pytest.raises(ValueError, match=r"there are .* numbers"):
        Network({"x": Value((1, 4), "float32")}, {"y": "40"}, nodes, {})
    nodes = [Node("Conv", ("x", "w"), "y", {"strides": [1, 1], "pads": [9999] * 4, "dilations": [1, 1], "group": 1})]
    with pytest.raises(ValueError, match="pads go up to 4096"):
        Network({"x": Value((1, 1, 2, 2), "float32")}, {"y": "y"}, nodes, {"w": np.ones((1, 1, 1, 1), np.float32)})


UNSUPPORTED = [
    ([helper.make_node("LSTM", ["x", "w", "w"], ["y"], hidden_size=2)], "the operation LSTM"),
    ([helper.make_node("Gemm", ["x", "x"], ["y"], transB=1)], "Gemm with weights that depends on inputs"),
    ([helper.make_node("Slice", ["x", "a", "b", "c", "back"], ["y"])], "Slice backwards"),
]


@pytest.mark.parametrize(("nodes", "message"), UNSUPPORTED, ids=["recurrence", "weights", "backwards"])
def test_what_has_no_counterpart_is_named(nodes: list[Any], message: str):
    constants = {name: np.array([value]) for name, value in {"a": -1, "b": -9, "c": 1, "back": -1}.items()}
    constants["w"] = np.ones((1, 8, 4), np.float32)
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, (1, 4))],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [
            numpy_helper.from_array(value, name)
            for name, value in (constants | {"w": np.ones((1, 8, 4), np.float32)}).items()
        ],
    )
    with pytest.raises(Unsupported, match=message):
        lower(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_an_open_shape_and_a_strange_opset_are_named():
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    with pytest.raises(Unsupported, match="which is open but for the batch"):
        lower(model(nodes, {"x": (1, "length")}, {}, {"y": FLOAT}))
    made = model(nodes, {"x": (1, 3)}, {}, {"y": FLOAT})
    made.opset_import[0].version = 5
    with pytest.raises(Unsupported, match="opset 5; known are 7 to 23"):
        lower(made)


def test_the_reference_needs_nothing_but_numpy():
    code = (
        "import sys; from ctrlrl.deploy import features, manifest, network, tensors; "
        "print(sorted(m for m in ('torch', 'yaml', 'onnx', 'onnxruntime', 'gymnasium', 'mujoco', 'tyro', 'safetensors')"
        " if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- tensors ----------------------------------------------------------------------------------------------------------

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7, np.int64),
    "c": np.array([True, False]),
    "d": np.zeros((0, 4), np.float64),
    "e": np.array([1, 255], np.uint8),
    "f": np.array([-3], np.int32),
}


def test_tensors_are_read_as_the_library_writes_them():
    from safetensors.numpy import load, save

    for content in (write_tensors(ARRAYS), save(ARRAYS)):
        for found in (read_tensors(content, "x"), load(content)):
            assert found.keys() == ARRAYS.keys()
            for name, value in ARRAYS.items():
                assert found[name].dtype == value.dtype and np.array_equal(found[name], value)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGED = {
    "empty": b"",
    "short": write_tensors(ARRAYS)[:-1],
    "longer": write_tensors(ARRAYS) + b"\0",
    "length": (2**40).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "list": (2).to_bytes(8, "little") + b"[]",
    "dtype": header(a={"dtype": "O", "shape": [1], "data_offsets": [0, 1]}) + b"\0",
    "shape": header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"\0" * 4,
    "gap": header(a={"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}) + b"\0" * 2,
    "overlap": header(
        a={"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, b={"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}
    )
    + b"\0" * 2,
    "bool": header(a={"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}) + b"\7",
    "huge": header(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}) + b"\0" * 4,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensors_are_refused(name: str):
    with pytest.raises(UsageError, match="is no safetensors file that can be read"):
        read_tensors(DAMAGED[name], "weights.st")


def test_any_changed_byte_of_a_header_is_refused_or_read():
    whole = write_tensors(ARRAYS)
    for at, value in itertools.product(range(0, 420, 3), (0, 34, 57, 255)):
        with contextlib.suppress(UsageError):
            read_tensors(whole[:at] + bytes([value]) + whole[at + 1 :], "x")
