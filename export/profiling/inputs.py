"""Write the inputs of a measurement (real images and captions), and return the runner's arguments that name them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.device_programs.runner import preprocess_image
from export.devices.run_runner import require_compiler
from export.model_folder import find_exported, is_checkpoint, name_models, runtime_words, tower_files
from toolchain.errors import ArtifactError, UsageError
from toolchain.filesystem import read_json

_NUM_INPUTS, _MIN_INPUTS, _MAX_INPUT_BYTES = 64, 8, 16 << 20  # the inputs add to the measured memory


@dataclass(frozen=True)
class RunnerOptions:
    """The runner's options for timing a graph."""

    seconds: float
    """Measured time of one process at batch 1, and the upper bound of its warm-up."""

    threads: int
    device: str = "cpu"
    compiled: bool = False
    """For a checkpoint: run it with torch.compile instead of eager."""

    batches: Sequence[int] = ()
    """Larger batches, for throughput."""


def write_inputs(
    folder: Path, scratch: Path, options: RunnerOptions, engines: Path | None = None
) -> dict[str, list[str]]:
    """Write the real images and captions of parity.npz into `scratch`; return the runner's arguments by tower.

    `engines` is the folder of the engines if `folder` is a TensorRT build kit.
    """
    exported = _source_of_inputs(folder, options)
    scratch.mkdir(exist_ok=True)
    image_spec = read_json(exported / "preprocess.json")["image"]
    with np.load(exported / "parity.npz") as samples:
        pixels_BHWC = samples["pixels_BHWC"][:_NUM_INPUTS]
        input_ids_BT = samples["input_ids_BT"][:_NUM_INPUTS].astype(np.int64)  # stored in fewer bytes
    values_CHW = _save_images(pixels_BHWC, image_spec, scratch)
    np.save(scratch / "text.npy", input_ids_BT)
    shared = ["--threads", str(options.threads)]
    shared += ["--min-seconds", f"{options.seconds:g}", "--max-warm-up", f"{options.seconds:g}"]
    if is_checkpoint(folder):
        shared += ["--runtime", "pytorch", *(["--compiled"] if options.compiled else [])]
    elif engines is None:
        shared += runtime_words(folder)
    shared += ["--device", options.device]
    shared += ["--batches", ",".join(map(str, options.batches))] if options.batches else []
    whole_path = ["--images", str(scratch / "images"), "--classes", str(exported / "classes.npz")]
    whole_path += ["--preprocess", str(exported / "preprocess.json")]
    with np.load(exported / "classes.npz") as classes:
        has_classes = len(classes["names"]) > 0  # a headline set of captions has no classes

    def arguments(tower: str, input_name: str, dtype: str, shape: tuple[int, ...]) -> list[str]:
        graph = ["--model", str(tower_files(folder, engines)[tower]), "--input", input_name, "--dtype", dtype]
        graph += ["--graph", str(folder / f"{tower}.onnx")] if engines is not None else []
        query = ["--shape", ",".join(map(str, (1, *shape))), *shared, "--inputs", str(scratch / f"{tower}.npy")]
        return graph + query

    return {
        "image": arguments("image", "pixel_values", "float32", values_CHW.shape) + (whole_path if has_classes else []),
        "text": arguments("text", "input_ids", "int64", input_ids_BT.shape[1:]),
    }


def _source_of_inputs(folder: Path, options: RunnerOptions) -> Path:
    """Return the exported model whose samples are the inputs: `folder` itself, or the export of a checkpoint.

    Raises:
        UsageError: a checkpoint cannot be timed with these options, or has no export.
        MissingDependency: it cannot be compiled here.
        ArtifactError: a file is missing.
    """
    is_reference = is_checkpoint(folder)
    if is_reference and options.device != "cpu":
        raise UsageError(
            f"{folder}: a checkpoint is timed in PyTorch on the CPU, not on {options.device}; "
            "pass an export of it instead"
        )
    if is_reference and options.compiled:
        require_compiler()
    exported = find_exported(folder) if is_reference else folder
    needed = ("image.onnx", "text.onnx", "preprocess.json", "classes.npz", "parity.npz")
    missing = [name for name in needed if not (exported / name).is_file()]
    if missing:
        is_export = len(missing) < len(needed)
        advice = "Export again: clipkd export RUN --onnx" if is_export else f"{exported}: {name_models(exported)}"
        raise ArtifactError(f"{exported / missing[0]}: missing; profiling needs it. {advice}")
    return exported


def _save_images(pixels_BHWC: NDArray[np.uint8], image_spec: dict[str, Any], scratch: Path) -> NDArray[np.float32]:
    """Write images as the tower's inputs and as JPEGs; return the first input."""
    images = [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
    values_CHW = preprocess_image(images[0], image_spec)
    count = max(_MIN_INPUTS, _MAX_INPUT_BYTES // values_CHW.nbytes)
    np.save(scratch / "image.npy", np.stack([preprocess_image(image, image_spec) for image in images[:count]]))
    (scratch / "images").mkdir()
    for index, image in enumerate(images):
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=95)
        (scratch / "images" / f"{index:03}.jpg").write_bytes(encoded.getvalue())
    return values_CHW
