"""Define the layout of an exported model's directory: its graphs, inputs and files, and the run it belongs to."""

from __future__ import annotations

from pathlib import Path

from toolchain.errors import UsageError, name_some
from toolchain.filesystem import read_json
from toolchain.recipe.model_names import CONFIG, INT8_CONFIG, WEIGHTS

IMAGE_GRAPH, TEXT_GRAPH = "image.onnx", "text.onnx"
IMAGE_INPUT, TEXT_INPUT = "pixel_values", "input_ids"
UINT8_GRAPH, UINT8_INPUT = "image_uint8.onnx", "pixels"
"""The optional graph of the image tower with its preprocessing; its input is RGB, uint8 [H, W, 3]."""


def tower_files(folder: Path, engines: Path | None) -> dict[str, Path]:
    """Return the file to open for each tower; a checkpoint is one file."""
    if is_checkpoint(folder):
        return dict.fromkeys(("image", "text"), folder / WEIGHTS)
    where, suffix = (folder, "onnx") if engines is None else (engines, "engine")
    return {tower: where / f"{tower}.{suffix}" for tower in ("image", "text")}


def is_checkpoint(model: Path) -> bool:
    """Return True for a checkpoint's directory, which runs in PyTorch, and False for an exported model's.

    Raises:
        UsageError: it is an int8 checkpoint, which PyTorch cannot run in integers.
    """
    if (model / INT8_CONFIG).is_file():
        raise UsageError(f"{model}: an int8 checkpoint runs in int8 only after export; name RUN/exported/...-int8")
    return (model / CONFIG).is_file() and not (model / IMAGE_GRAPH).is_file()


def find_exported(checkpoint: Path) -> Path:
    """Return an exported model of a run's checkpoint, fp32 if there is one; all have the same samples.

    Raises:
        UsageError: the checkpoint has no exported model.
    """
    made = [path.parent for path in checkpoint.parent.glob(f"exported/{checkpoint.name}-*/parity.npz")]
    if not made:
        raise UsageError(
            f"{checkpoint}: a checkpoint is timed with the samples of its exported model, and there is no "
            f"{checkpoint.parent / 'exported' / checkpoint.name}-*. "
            f"Export it first: clipkd export {checkpoint.parent} --onnx --precision fp32"
        )
    return min(made, key=lambda path: (not path.name.endswith("-fp32"), path.name))


def runtime_words(folder: Path) -> list[str]:
    """Return the runner's arguments that open the graphs with the runtime and precision in the manifest."""
    manifest = folder / "manifest.json"
    summary = read_json(manifest)["summary"] if manifest.is_file() else {}
    named = {name: summary[name] for name in ("runtime", "precision") if name in summary}
    return [part for name, value in named.items() for part in (f"--{name}", value)]


def find_run(model: Path) -> Path | None:
    """Return the run directory that contains a model's directory, or None."""
    return next((folder for folder in model.absolute().parents[:2] if (folder / "recipe.yaml").is_file()), None)


def model_kind(model: Path) -> str:
    """Return `exported` or `checkpoint`.

    Raises:
        UsageError: the directory is neither, or an int8 checkpoint.
    """
    if (model / IMAGE_GRAPH).is_file():
        return "exported"
    if is_checkpoint(model):
        return "checkpoint"
    raise UsageError(
        f"{model}: neither an exported model (image.onnx) nor a checkpoint (open_clip_config.json); "
        f"{name_models(model)}"
    )


def name_models(path: Path) -> str:
    """Return what to name instead of a path that is no exported model: those inside it, or how to make one."""
    if not path.is_dir():
        return (
            "it is a file; name a directory such as RUN/exported/NAME"
            if path.exists()
            else "no such directory; make one with: clipkd export RUN"
        )
    inside = sorted(
        found.parent for found in path.rglob(IMAGE_GRAPH) if not any(part.startswith(".") for part in found.parts)
    )
    if inside:
        return f"it contains: {name_some(inside)}"
    if (path / "recipe.yaml").is_file():
        return f"it is a run without exported models; make them with: clipkd export {path}"
    return "name a directory such as RUN/exported/NAME, or RUN/student; make one with: clipkd export RUN"
