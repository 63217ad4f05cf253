"""Prove an exported folder in a process of its own, so that a runtime that crashes is a failed row with a reason.

The same process says what the runtime made of each graph: which operators run, in integers or in which precision, how
many QuantizeLinear and DequantizeLinear are left over, and whether attention became one fused operator.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.devices import Device
from export.parity import check_parity, check_uint8_input
from export.profile import require_compiler, runner_on, runtime_words, tower_files
from export.runner import Graph, as_pair, onnxruntime_options, open_checkpoint
from export.runtime import (
    IMAGE_GRAPH,
    IMAGE_INPUT,
    TEXT_GRAPH,
    TEXT_INPUT,
    UINT8_GRAPH,
    UINT8_INPUT,
    ExportedEncoders,
    open_exported,
    open_tower,
)
from toolchain.errors import ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend

_CHILD = "from export.proof import answer; answer()"
_TIMEOUT_S = 1800.0  # 256 samples of the largest towers take minutes on a small machine
_STDERR_LINES = 8
_ERRORS: dict[str, type[ClipkdError]] = {
    error.__name__: error for error in (ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend)
}
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize")
_INTEGER = ("QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")  # and QLinear...
_FUSED_ATTENTION = ("Attention", "MultiHeadAttention", "QAttention")
_WORK = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")  # what OpenVINO may run in integers


def prove(
    folder: Path, *, runtime: str, precision: str, device: str = "cpu", uint8_input: bool = False
) -> dict[str, Any]:
    """`parity`, as `parity.check_parity` returns it, and `nodes`, a `node_table` for each tower (CPU only).

    With `uint8_input`, which needs ONNX, also what `parity.check_uint8_input` returns, under that name.

    Raises:
        GateError: a tower does not compute what PyTorch did, or its runtime crashed or hung on it.
        UnavailableBackend, MissingDependency, ArtifactError: as `runtime.open_exported`.
    """
    question: dict[str, Any] = {"folder": str(folder), "runtime": runtime, "precision": precision, "device": device}
    question |= {"uint8_input": uint8_input}
    ours = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    what = f"{folder}: {runtime}, {precision}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(question),
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise GateError(f"{what}: the process that proves it took longer than {_TIMEOUT_S:g} s") from None
    if done.returncode:
        ended = f"ended with status {done.returncode}"
        if done.returncode < 0:
            ended = f"was killed by {signal.Signals(-done.returncode).name}"
        last = "\n".join(done.stderr.strip().splitlines()[-_STDERR_LINES:]) or "(nothing on stderr)"
        raise GateError(f"{what}: the process that proves it {ended}. Its last words:\n{last}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    return answer


def encoders_on(
    device: Device, folder: Path, *, precision: str | None = None, engines: Path | None = None
) -> ExportedEncoders:
    """An exported folder's encoders, whose graphs, or a kit's engines, run on a device reached by ssh.

    Pictures are preprocessed and texts tokenized here, and each call that encodes is a run of `runner.py` there.

    Raises:
        ClipkdError: when they encode: as `profile.runner_on`.
    """
    files = tower_files(folder, engines)

    def tower(name: str, input_name: str) -> Graph:
        def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
            with tempfile.TemporaryDirectory(prefix="clipkd-encode-") as scratch:
                path = Path(scratch) / "inputs.npy"
                np.save(path, inputs)
                shape = ",".join(map(str, (1, *inputs.shape[1:])))
                words = ["--model", str(files[name]), "--input", input_name, "--dtype", str(inputs.dtype)]
                words += ["--shape", shape, "--threads", "0", "--inputs", str(path), "--encode"]
                words += runtime_words(folder) if engines is None else ["--graph", str(folder / f"{name}.onnx")]
                document = runner_on(device, folder, name, words, once=[path])
                return np.array(document["features"], np.float32)

        # of any batch: the runner there feeds a graph of a fixed one row by row, in one run of its process
        return Graph({input_name: [None]}, run, None, "")

    towers = tower("image", IMAGE_INPUT), tower("text", TEXT_INPUT)
    return open_exported(folder, precision=precision, towers=towers)  # this machine may be unable to run its graphs


def reference_encoders(checkpoint: Path, exported: Path, *, compiled: bool) -> ExportedEncoders:
    """A checkpoint's towers in PyTorch, as they are timed, behind the preprocessing and tokenizer of its fp32 export.

    Raises:
        MissingDependency: `compiled`, and there is no C++ compiler.
        ArtifactError: as `runtime.open_exported`.
    """
    if compiled:
        require_compiler()
    image, text = (
        open_checkpoint(checkpoint, name, compiled=compiled, threads=None) for name in (IMAGE_INPUT, TEXT_INPUT)
    )
    return open_exported(exported, towers=(image, text))


def answer() -> None:
    """In the child: a question on stdin, its answer on stdout."""
    question = json.load(sys.stdin)
    document = os.dup(1)
    os.dup2(2, 1)  # whatever a native library prints must not land in the document
    folder, uint8_input = Path(question.pop("folder")), question.pop("uint8_input")
    try:
        encoders = open_exported(folder, **question)
        result: dict[str, Any] = {"parity": check_parity(folder, precision=question["precision"], encoders=encoders)}
        if uint8_input:
            features_of, pixel_values_of = _open_uint8(folder, encoders, question)
            result["uint8_input"] = check_uint8_input(
                folder,
                precision=question["precision"],
                encoders=encoders,
                features_of=features_of,
                pixel_values_of=pixel_values_of,
            )
        if question["device"] == "cpu":
            del question["device"]
            result["nodes"] = {
                "image": node_table(folder / IMAGE_GRAPH, IMAGE_INPUT, **question),
                "text": node_table(folder / TEXT_GRAPH, TEXT_INPUT, **question),
            }
    except ClipkdError as error:
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _ERRORS)
        result = {"error": kind, "message": str(error)}
    with os.fdopen(document, "w", encoding="utf-8") as stdout:
        stdout.write(json.dumps(result))


def _open_uint8(
    folder: Path, encoders: ExportedEncoders, settings: dict[str, Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What image_uint8.onnx computes of a picture: image_features and, by a copy that puts them out, pixel_values."""
    import onnx

    graph = onnx.load(folder / UINT8_GRAPH)
    shape = [1, 3, *as_pair(encoders.image_spec["size"])]
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(IMAGE_INPUT, onnx.TensorProto.FLOAT, shape))
    with tempfile.TemporaryDirectory(prefix="clipkd-uint8-") as scratch:
        onnx.save(graph, Path(scratch) / UINT8_GRAPH)
        places = folder / UINT8_GRAPH, Path(scratch) / UINT8_GRAPH
        features, pixel_values = (open_tower(path, UINT8_INPUT, threads=None, **settings) for path in places)
    return features.run, pixel_values.run


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
