"""Encoders that run an exported model on a device over ssh, and a checkpoint's encoders in PyTorch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.device_programs.runner import Graph, open_checkpoint
from export.devices.registry import Device
from export.devices.run_runner import encode_on, require_compiler
from export.model_folder import IMAGE_INPUT, TEXT_INPUT, runtime_words, tower_files
from export.runtime.exported_model import ExportedEncoders, open_exported


def encoders_on(
    device: Device, folder: Path, *, precision: str | None = None, engines: Path | None = None
) -> ExportedEncoders:
    """Return encoders whose graphs, or TensorRT engines, run on a device reached by ssh.

    Images are preprocessed and texts tokenized on this machine. Each call that encodes runs `runner.py` on the device.

    Raises:
        ClipkdError: on encoding, as `run_runner.encode_on`.
    """
    files = tower_files(folder, engines)

    def tower(name: str, input_name: str) -> Graph:
        def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
            with tempfile.TemporaryDirectory(prefix="clipkd-encode-") as scratch:
                path = Path(scratch) / "inputs.npy"
                np.save(path, inputs)
                shape = ",".join(map(str, (1, *inputs.shape[1:])))
                words = ["--model", str(files[name]), "--input", input_name, "--dtype", str(inputs.dtype)]
                words += ["--shape", shape, "--threads", "0", "--inputs", str(path)]
                words += runtime_words(folder) if engines is None else ["--graph", str(folder / f"{name}.onnx")]
                document = encode_on(device, folder, name, words, once=[path])
                return np.array(document["features"], np.float32)

        # any batch size: the runner on the device feeds a graph with a fixed batch row by row, in one process
        return Graph({input_name: [None]}, run, None, "")

    towers = tower("image", IMAGE_INPUT), tower("text", TEXT_INPUT)
    return open_exported(folder, precision=precision, towers=towers)  # this machine may be unable to run the graphs


def reference_encoders(checkpoint: Path, exported: Path, *, compiled: bool) -> ExportedEncoders:
    """Return a checkpoint's PyTorch towers, as they are timed, with preprocessing and tokenizer of its fp32 export.

    Raises:
        MissingDependency: `compiled` is set, and there is no C++ compiler.
        ArtifactError: as `runtime.open_list_exported`.
    """
    if compiled:
        require_compiler()
    image, text = (
        open_checkpoint(checkpoint, name, compiled=compiled, threads=None) for name in (IMAGE_INPUT, TEXT_INPUT)
    )
    return open_exported(exported, towers=(image, text))
