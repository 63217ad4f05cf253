"""Prove, score and time an exported model on the machine it is on; of exported models none of it needs torch."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.parity import check_parity
from export.profile import is_checkpoint, profile
from export.proof import prove, reference_encoders
from export.runtime import open_exported
from toolchain.errors import UsageError
from toolchain.eval_sets import open_set
from toolchain.evaluate import Encoders, evaluate
from toolchain.examples import write_examples
from toolchain.paired import paired_drop
from toolchain.recipe import EvaluateSpec, ProfileSpec


def measure(model: Path, folder: Path, spec: EvaluateSpec, timing: ProfileSpec, progress: Any) -> dict[str, Any]:
    """Write parity.json, evaluation.json, examples.json, samples.npz and profile.json; returns the headline numbers.

    Parity comes first: a wrong model is not worth timing.

    Raises:
        GateError: the model does not compute here what it computed in PyTorch.
    """
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    runtime, precision = manifest["summary"]["runtime"], manifest["summary"]["precision"]
    _write(folder / "parity.json", prove(model, runtime=runtime, precision=precision)["parity"])
    encoders = open_exported(model)  # only now: a graph that would crash its runtime has crashed another process
    samples, top1 = score(encoders, folder, spec, progress)
    timed = profile(model, processes=timing.processes, seconds=timing.seconds, on_progress=progress)
    np.savez(folder / "samples.npz", **samples, **timed.samples)  # type: ignore[arg-type]  # numpy types keywords as one array
    _write(folder / "profile.json", timed.document)
    return {"top1": top1, "p50_ms": timed.document["image"]["p50_ms"]}


def measure_reference(
    checkpoint: Path, exported: Path, folder: Path, spec: EvaluateSpec, timing: ProfileSpec, mode: str, progress: Any
) -> dict[str, Any]:
    """The same files of a run's checkpoint in PyTorch fp32, `mode` being eager or compiled; needs torch.

    Returns what a manifest says of an exported model, and the headline numbers.  `exported` is its fp32 export, whose
    samples say whether this is the same model.

    Raises:
        GateError: PyTorch does not compute so what its export was held against.
        MissingDependency: compiled, and there is no C++ compiler.
    """
    compiled = mode == "compiled"
    encoders = reference_encoders(checkpoint, exported, compiled=compiled)
    progress("parity", 0, 1)
    _write(folder / "parity.json", check_parity(exported, precision="fp32", encoders=encoders))
    samples, top1 = score(encoders, folder, spec, progress)
    timed = profile(
        checkpoint, processes=timing.processes, seconds=timing.seconds, compiled=compiled, on_progress=progress
    )
    np.savez(folder / "samples.npz", **samples, **timed.samples)  # type: ignore[arg-type]  # as above
    _write(folder / "profile.json", timed.document)
    summary = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))["summary"]
    about = {key: summary[key] for key in ("role", "precision", "params_image", "params_text")}
    return {**about, "runtime": "pytorch", "pytorch": mode, "top1": top1, "p50_ms": timed.document["image"]["p50_ms"]}


def score(encoders: Encoders, folder: Path, spec: EvaluateSpec, progress: Any) -> tuple[dict[str, NDArray[Any]], float]:
    """Write evaluation.json and examples.json; returns the ranks and answers behind them, and the headline's top-1."""
    sets = [open_set(entry) for entry in spec.sets]
    evaluation, samples = evaluate(encoders, sets, headline=spec.headline, on_progress=partial(progress, "scoring"))
    _write(folder / "evaluation.json", evaluation)
    (headline,) = (data for data in sets if data.name == spec.headline)
    write_examples(folder / "examples.json", headline, samples, spec.examples)
    return samples, evaluation["sets"][spec.headline]["top1"]


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def evaluate_models(models: Sequence[Path], spec: EvaluateSpec, progress: Any) -> dict[str, Any]:
    """Every model's scores on the sets of a recipe, and how each of the others differs from the first.

    A model is an exported directory, or a checkpoint's, which needs torch.

    Raises:
        UsageError: a directory is neither.
        ClipkdError: a set is missing or wrong, or too many pictures of it cannot be read.
    """
    for model in models:
        _kind(model)  # before the first is evaluated
    sets = [open_set(entry) for entry in spec.sets]
    documents: list[dict[str, Any]] = []
    first_ranks: dict[str, NDArray[Any]] = {}
    for model in models:
        encoders = _encoders(model)
        evaluation, samples = evaluate(
            encoders, sets, headline=spec.headline, on_progress=partial(progress, model.name)
        )
        document: dict[str, Any] = {"model": str(model), "sets": evaluation["sets"]}
        if documents:
            document["against_first"] = {
                data.name: paired_drop(first_ranks[f"{data.name}_rank"] < 1, samples[f"{data.name}_rank"] < 1)._asdict()
                for data in sets
            }
        else:
            first_ranks = samples
        documents.append(document)
    return {"headline": spec.headline, "models": documents}


def run_of(model: Path) -> Path | None:
    """The run that a model's directory belongs to, if it lies in one."""
    return next((folder for folder in model.absolute().parents[:2] if (folder / "recipe.yaml").is_file()), None)


def _kind(model: Path) -> str:
    if (model / "image.onnx").is_file():
        return "exported"
    if is_checkpoint(model):
        return "checkpoint"
    raise UsageError(
        f"{model}: neither an exported model (image.onnx) nor a checkpoint (open_clip_config.json); "
        "name a directory such as RUN/exported/NAME or RUN/student"
    )


def _encoders(model: Path) -> Encoders:
    if _kind(model) == "exported":
        return open_exported(model)
    from toolchain.models import load_model
    from toolchain.processes import join_processes
    from toolchain.validate import TorchEncoders

    device = join_processes().device
    loaded = load_model(model)
    loaded.net.to(device)
    return TorchEncoders(loaded, device)
