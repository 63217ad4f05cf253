"""Run the parity check of an exported model in a child process: a runtime crash becomes a failure with a reason.

The child also reports how the runtime executes each graph: which operators run, in integers or in which precision, how
many QuantizeLinear and DequantizeLinear remain, and whether attention became one fused operator.
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
from typing import Any, cast

from export.device_programs.runner import as_pair
from export.documents import Proof
from export.model_folder import IMAGE_GRAPH, IMAGE_INPUT, TEXT_GRAPH, TEXT_INPUT, UINT8_GRAPH, UINT8_INPUT
from export.proof.executed_graph import read_executed_graph
from export.proof.parity import check_parity, check_uint8_input
from export.runtime.exported_model import ExportedEncoders, open_exported, open_tower
from toolchain.errors import ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend

_CHILD = "from export.proof.prove import answer; answer()"
_TIMEOUT_S = 7200.0  # 10,000 prompts of the largest towers take an hour on a small machine
_STDERR_LINES = 8
_ERRORS: dict[str, type[ClipkdError]] = {
    error.__name__: error for error in (ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend)
}


def prove(folder: Path, *, runtime: str, precision: str, device: str = "cpu", uint8_input: bool = False) -> Proof:
    """Return the parity of both towers and, on the CPU, the operators that the runtime executes for each.

    With `uint8_input`, which needs the onnx package, also return how far preprocessing in the graph changes features.

    Raises:
        GateError: a tower does not compute what PyTorch did, or its runtime crashed or hung.
        UnavailableBackend, MissingDependency, ArtifactError: as `runtime.open_list_exported`.
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
        raise GateError(f"{what}: the parity check took longer than {_TIMEOUT_S:g} s") from None
    if done.returncode:
        ended = f"ended with status {done.returncode}"
        if done.returncode < 0:
            ended = f"was killed by {signal.Signals(-done.returncode).name}"
        last = "\n".join(done.stderr.strip().splitlines()[-_STDERR_LINES:]) or "(stderr is empty)"
        raise GateError(f"{what}: the process of the parity check {ended}. Last lines of stderr:\n{last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    return cast(Proof, answer)


def answer() -> None:
    """Read the question from stdin and write the answer, a JSON document, to stdout; this runs in the child."""
    question = json.load(sys.stdin)
    document = os.dup(1)
    os.dup2(2, 1)  # keep the output of native libraries out of the document
    folder, uint8_input = Path(question.pop("folder")), question.pop("uint8_input")
    try:
        encoders = open_exported(folder, **question)
        result: Proof | dict[str, str] = _proof(folder, encoders, question, uint8_input=uint8_input)
    except ClipkdError as error:
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _ERRORS)
        result = {"error": kind, "message": str(error)}
    with os.fdopen(document, "w", encoding="utf-8") as stdout:
        stdout.write(json.dumps(result))


def _proof(folder: Path, encoders: ExportedEncoders, question: dict[str, Any], *, uint8_input: bool) -> Proof:
    precision = question["precision"]
    proof: Proof = {"parity": check_parity(folder, precision=precision, encoders=encoders)}
    if uint8_input:
        features_of, pixel_values_of = _open_uint8(folder, encoders, question)
        proof["uint8_input"] = check_uint8_input(
            folder, precision=precision, encoders=encoders, features_of=features_of, pixel_values_of=pixel_values_of
        )
    if question["device"] == "cpu":
        how = {"runtime": question["runtime"], "precision": precision}
        proof["nodes"] = {
            "image": read_executed_graph(folder / IMAGE_GRAPH, IMAGE_INPUT, **how),
            "text": read_executed_graph(folder / TEXT_GRAPH, TEXT_INPUT, **how),
        }
    return proof


def _open_uint8(
    folder: Path, encoders: ExportedEncoders, settings: dict[str, Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return functions that run image_uint8.onnx on an image: to image_features and, from a copy, to pixel_values."""
    import onnx

    graph = onnx.load(folder / UINT8_GRAPH)
    shape = [1, 3, *as_pair(encoders.image_spec["size"])]
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(IMAGE_INPUT, onnx.TensorProto.FLOAT, shape))
    with tempfile.TemporaryDirectory(prefix="clipkd-uint8-") as scratch:
        onnx.save(graph, Path(scratch) / UINT8_GRAPH)
        paths = folder / UINT8_GRAPH, Path(scratch) / UINT8_GRAPH
        features, pixel_values = (open_tower(path, UINT8_INPUT, threads=None, **settings) for path in paths)
    return features.run, pixel_values.run
