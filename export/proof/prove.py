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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.device_programs.runner import as_pair
from export.model_folder import IMAGE_GRAPH, IMAGE_INPUT, TEXT_GRAPH, TEXT_INPUT, UINT8_GRAPH, UINT8_INPUT
from export.proof.executed_graph import node_table
from export.proof.parity import check_parity, check_uint8_input
from export.runtime.exported_model import ExportedEncoders, open_exported, open_tower
from toolchain.errors import ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend

_CHILD = "from export.proof.prove import answer; answer()"
_TIMEOUT_S = 1800.0  # 256 samples of the largest towers take minutes on a small machine
_STDERR_LINES = 8
_ERRORS: dict[str, type[ClipkdError]] = {
    error.__name__: error for error in (ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend)
}


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
    ours = str(Path(__file__).resolve().parents[2])
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
