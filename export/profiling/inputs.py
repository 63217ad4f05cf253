"""Write the inputs of a measurement, real images and captions, and the runner's arguments that name them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from export.device_programs.runner import preprocess_image
from export.devices.run_runner import require_compiler
from export.model_folder import exported_of, is_checkpoint, runtime_words, tower_files
from toolchain.errors import ArtifactError, UsageError

_NUM_INPUTS, _MIN_INPUTS, _MAX_INPUT_BYTES = 64, 8, 16 << 20  # inputs lie in the memory that is being measured


def write_inputs(
    folder: Path,
    scratch: Path,
    seconds: float,
    threads: int,
    device: str,
    engines: Path | None,
    compiled: bool,
    sweep: Sequence[int],
) -> dict[str, list[str]]:
    """The runner's arguments per tower, its inputs (real images and captions of parity.npz) written to `scratch`."""
    is_reference = is_checkpoint(folder)
    if is_reference and device != "cpu":
        raise UsageError(
            f"{folder}: a checkpoint is timed in PyTorch on the CPU, not on {device}; name an export of it"
        )
    if is_reference and compiled:
        require_compiler()
    exported = exported_of(folder) if is_reference else folder
    for name in ("image.onnx", "text.onnx", "preprocess.json", "classes.npz", "parity.npz"):
        if not (exported / name).is_file():
            raise ArtifactError(
                f"{exported / name}: missing; profiling needs it. Export again: clipkd export RUN --onnx"
            )
    scratch.mkdir(exist_ok=True)
    image_spec = json.loads((exported / "preprocess.json").read_text(encoding="utf-8"))["image"]
    with np.load(exported / "parity.npz") as samples:
        pixels_BHWC, input_ids_BT = samples["pixels_BHWC"][:_NUM_INPUTS], samples["input_ids_BT"][:_NUM_INPUTS]
    pictures = [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
    values_CHW = preprocess_image(pictures[0], image_spec)
    count = max(_MIN_INPUTS, _MAX_INPUT_BYTES // values_CHW.nbytes)
    np.save(scratch / "image.npy", np.stack([preprocess_image(picture, image_spec) for picture in pictures[:count]]))
    np.save(scratch / "text.npy", input_ids_BT)
    (scratch / "images").mkdir()
    for index, picture in enumerate(pictures):
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=95)
        (scratch / "images" / f"{index:03}.jpg").write_bytes(encoded.getvalue())
    shared = ["--threads", str(threads), "--min-seconds", f"{seconds:g}", "--max-warm-up", f"{seconds:g}"]
    shared += [
        *(_reference_words(compiled) if is_reference else runtime_words(folder) if engines is None else ()),
        "--device",
        device,
        *(("--batches", ",".join(map(str, sweep))) if sweep else ()),
    ]
    whole_path = ["--images", str(scratch / "images"), "--classes", str(exported / "classes.npz")]
    whole_path += ["--preprocess", str(exported / "preprocess.json")]
    with np.load(exported / "classes.npz") as classes:
        has_classes = len(classes["names"]) > 0  # a headline set of captions has none

    def arguments(tower: str, input_name: str, dtype: str, shape: tuple[int, ...]) -> list[str]:
        graph = ["--model", str(tower_files(folder, engines)[tower]), "--input", input_name, "--dtype", dtype]
        graph += ["--graph", str(folder / f"{tower}.onnx")] if engines is not None else []
        query = ["--shape", ",".join(map(str, (1, *shape))), *shared, "--inputs", str(scratch / f"{tower}.npy")]
        return graph + query

    return {
        "image": arguments("image", "pixel_values", "float32", values_CHW.shape) + (whole_path if has_classes else []),
        "text": arguments("text", "input_ids", "int64", input_ids_BT.shape[1:]),
    }


def _reference_words(compiled: bool) -> list[str]:
    return ["--runtime", "pytorch", *(["--compiled"] if compiled else [])]
