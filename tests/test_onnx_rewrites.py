"""Rewritten graphs: the same values in nodes that a runtime computes faster."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graphs.onnx_rewrites import separate_products, unsign_shared_activations
from export.proof.executed_graph import read_executed_graph

WIDTH, PARTS = 4, 3


def graph_of(weight_nodes: list[onnx.NodeProto], tensors: dict[str, NDArray[np.generic]]) -> onnx.ModelProto:
    """y = the last, less the first, of the parts of x W + b."""
    nodes = [
        *weight_nodes,
        helper.make_node("MatMul", ["x", "w"], ["product"], "product"),
        helper.make_node("Add", ["product", "b"], ["sum"], "sum"),
        helper.make_node("Split", ["sum"], ["q", "k", "v"], "split", axis=-1, num_outputs=PARTS),
        helper.make_node("Mul", ["q", "k"], ["qk"], "mul"),
        helper.make_node("Sub", ["v", "qk"], ["y"], "sub"),
    ]
    stored = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def in_floats() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weight = random.standard_normal((WIDTH, PARTS * WIDTH)).astype(np.float32)
    return graph_of([], {"w": weight, "b": random.standard_normal(PARTS * WIDTH).astype(np.float32)})


def in_int8() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    wide = PARTS * WIDTH
    tensors = {
        "w8": random.integers(-127, 128, (wide, WIDTH), np.int8),
        "s": random.random(wide).astype(np.float32),
        "z": np.zeros(wide, np.int8),
        "b": random.standard_normal(wide).astype(np.float32),
    }
    dequantize = helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["wide"], "dequantize", axis=0)
    return graph_of([dequantize, helper.make_node("Transpose", ["wide"], ["w"], "transpose", perm=[1, 0])], tensors)


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("build", [in_floats, in_int8])
def test_separate_products_compute_the_same(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    model = build()
    x = np.random.default_rng(1).standard_normal((3, 2, WIDTH)).astype(np.float32)
    expected = run(model, x)
    separate_products(model.graph)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert "Split" not in kinds
    assert kinds.count("MatMul") == PARTS
    names = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= names, "nothing is stored that nothing reads"
    assert np.abs(run(model, x) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_is_split_otherwise_stays(tmp_path: Path) -> None:
    model = in_floats()
    (total,) = [node for node in model.graph.node if node.op_type == "Add"]
    total.input[1] = "product"  # not a stored bias
    before = [node.name for node in model.graph.node]
    separate_products(model.graph)
    assert [node.name for node in model.graph.node] == before


def rounded_and_read(times: int) -> onnx.ModelProto:
    """y = the sum of `times` products of int8 weights and the same x, rounded to int8."""
    random = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.generic]] = {
        "xs": np.array(0.05, np.float32),
        "xz": np.array(0, np.int8),
        "ws": np.full(WIDTH, 0.01, np.float32),
        "wz": np.zeros(WIDTH, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["x8"], "quantize"),
        helper.make_node("DequantizeLinear", ["x8", "xs", "xz"], ["rounded"], "dequantize"),
    ]
    for place in range(times):
        tensors[f"w8.{place}"] = random.integers(-60, 61, (WIDTH, WIDTH), np.int8)  # no kernel's sums saturate
        nodes += [
            helper.make_node("DequantizeLinear", [f"w8.{place}", "ws", "wz"], [f"w.{place}"], f"w.{place}", axis=1),
            helper.make_node("MatMul", ["rounded", f"w.{place}"], [f"y.{place}"], f"product.{place}"),
        ]
    nodes.append(helper.make_node("Sum", [f"y.{place}" for place in range(times)], ["y"], "sum"))
    stored = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, WIDTH]) for name in ("x", "y")]
    known = [helper.make_tensor_value_info("x8", TensorProto.INT8, ["batch", 2, WIDTH])]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], stored, value_info=known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_shared_int8_activations_are_multiplied_in_integers(tmp_path: Path) -> None:
    model = rounded_and_read(times=3)
    x = np.random.default_rng(1).uniform(-8, 8, (3, 2, WIDTH)).astype(np.float32)  # some of it beyond the range
    expected = run(model, x)
    unsign_shared_activations(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert np.abs(run(model, x) - expected).max() <= 1e-5 * np.abs(expected).max()
    onnx.save(model, tmp_path / "x.onnx")
    executed = read_executed_graph(tmp_path / "x.onnx", "x", runtime="onnxruntime", precision="int8")
    assert executed is not None
    assert executed["ops"]["MatMulIntegerToFloat"] == 3
    unsign_shared_activations(model.graph)
    onnx.checker.check_model(model, full_check=True)


def test_what_one_operator_reads_stays_signed() -> None:
    model = rounded_and_read(times=1)
    before = model.SerializeToString()
    unsign_shared_activations(model.graph)
    assert model.SerializeToString() == before
