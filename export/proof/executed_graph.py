"""Read from a runtime's optimized graph which operators it executes, and in which precision."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from export.device_programs.runner import onnxruntime_options
from export.documents import ExecutedGraph
from export.runtime.exported_model import open_tower

_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize")
_INTEGER = ("QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")  # and QLinear...
_FUSED_ATTENTION = ("Attention", "MultiHeadAttention", "QAttention")
_WORK = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")  # OpenVINO may run these in integers


def read_executed_graph(path: Path, input_name: str, *, runtime: str, precision: str | None) -> ExecutedGraph | None:
    """Return the operators that a runtime executes for a graph on the CPU, after its own optimization.

    Returns None if no reader exists for the runtime, or if the onnx package, which reads ONNX Runtime's optimized
    graph, is not installed. In OpenVINO, fused attention is one operator that absorbed a softmax. Open-coded attention
    appears as a Softmax, or in ONNX Runtime's fp16, which has no Softmax kernel, as the operators that make one up.
    """
    read = _READERS.get(runtime)
    return read(path, input_name, precision) if read is not None else None


def _read_openvino_graph(path: Path, input_name: str, precision: str | None) -> ExecutedGraph:
    graph = open_tower(path, input_name, runtime="openvino", precision=precision, device="cpu", threads=None)
    described = [op.get_rt_info() for op in graph.handle.get_runtime_model().get_ops()]
    executed = [(str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in described]
    precisions = dict(Counter(of for kind, of in executed if kind in _WORK).most_common())
    fused = sum(
        kind != "Softmax" and "softmax" in str(info["originalLayersNames"].value).lower()
        for (kind, _), info in zip(executed, described, strict=True)
    )
    integer = sum(count for of, count in precisions.items() if of in ("i8", "u8"))
    return _count_operators(Counter(kind for kind, _ in executed), precisions, integer, fused)


def _read_onnxruntime_graph(path: Path, _input_name: str, precision: str | None) -> ExecutedGraph | None:
    import onnxruntime as ort

    try:
        import onnx
    except ModuleNotFoundError:
        return None
    with tempfile.TemporaryDirectory(prefix="clipkd-nodes-") as scratch:
        options = onnxruntime_options(precision, None)
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        ops = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    integer = sum(count for kind, count in ops.items() if kind in _INTEGER or kind.startswith("QLinear"))
    return _count_operators(ops, {}, integer, sum(ops[kind] for kind in _FUSED_ATTENTION))


_READERS = {"onnxruntime": _read_onnxruntime_graph, "openvino": _read_openvino_graph}


def _count_operators(ops: Counter[str], precisions: dict[str, int], integer: int, fused: int) -> ExecutedGraph:
    return {
        "ops": dict(ops.most_common()),
        "precisions": precisions,
        "integer": integer,
        "rounding": {kind: ops[kind] for kind in _ROUNDING},
        "attention": {"fused": fused, "open": ops["Softmax"] + min(ops["ReduceMax"], ops["Exp"])},
    }
