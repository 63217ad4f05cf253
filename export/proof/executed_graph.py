"""Which operators a runtime really executes, and in which precision, read from its optimised graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from export.device_programs.runner import onnxruntime_options
from export.runtime.exported_model import open_tower

_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize")
_INTEGER = ("QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")  # and QLinear...
_FUSED_ATTENTION = ("Attention", "MultiHeadAttention", "QAttention")
_WORK = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")  # what OpenVINO may run in integers


def node_table(path: Path, input_name: str, *, runtime: str, precision: str | None) -> dict[str, Any] | None:
    """What the CPU runs after the runtime's own optimisation; None where ONNX, which reads it, is not installed.

    `ops` counts operators by type and `precisions`, for OpenVINO, the matrix products and convolutions by the precision
    they are executed in; `integer` counts those in integers, `rounding` what is left of quantization, `attention` the
    fused ones (in OpenVINO one operator that took in a softmax) and the open-coded, which show as a Softmax, or in
    ONNX Runtime's fp16, which has no kernel for it, as the operators that it is made of.
    """
    precisions: dict[str, int] = {}
    if runtime == "openvino":
        graph = open_tower(path, input_name, runtime=runtime, precision=precision, device="cpu", threads=None)
        described = [op.get_rt_info() for op in graph.handle.get_runtime_model().get_ops()]
        executed = [(str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in described]
        ops = Counter(kind for kind, _ in executed)
        precisions = dict(Counter(of for kind, of in executed if kind in _WORK).most_common())
        integer = sum(count for of, count in precisions.items() if of in ("i8", "u8"))
        fused = sum(
            kind != "Softmax" and "softmax" in str(info["originalLayersNames"].value).lower()
            for (kind, _), info in zip(executed, described, strict=True)
        )
    else:
        ops_or_none = _optimised_by_onnxruntime(path, precision)
        if ops_or_none is None:
            return None
        ops = ops_or_none
        fused = sum(ops[kind] for kind in _FUSED_ATTENTION)
        integer = sum(count for kind, count in ops.items() if kind in _INTEGER or kind.startswith("QLinear"))
    return {
        "ops": dict(ops.most_common()),
        "precisions": precisions,
        "integer": integer,
        "rounding": {kind: ops[kind] for kind in _ROUNDING},
        "attention": {"fused": fused, "open": ops["Softmax"] + min(ops["ReduceMax"], ops["Exp"])},
    }


def _optimised_by_onnxruntime(path: Path, precision: str | None) -> Counter[str] | None:
    import onnxruntime as ort

    try:
        import onnx
    except ModuleNotFoundError:
        return None
    with tempfile.TemporaryDirectory(prefix="clipkd-nodes-") as scratch:
        options = onnxruntime_options(precision, None)
        options.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
