"""Check parity, evaluate and time an exported model on this machine; exported models need no torch for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.model_folder import model_kind
from export.profiling.protocol import Effort, Target, profile
from export.proof.parity import check_parity
from export.proof.prove import prove
from export.runtime.exported_model import open_exported
from export.runtime.remote_model import reference_encoders
from toolchain.evaluation.documents import EvaluatedModel, ModelComparison
from toolchain.evaluation.examples import write_examples
from toolchain.evaluation.open_sets import open_set
from toolchain.evaluation.zero_shot import Encoders, evaluate
from toolchain.filesystem import read_json, write_json
from toolchain.progress import Progress
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ProfileSpec
from toolchain.significance import paired_drop


def measure(model: Path, folder: Path, spec: EvaluateSpec, timing: ProfileSpec, progress: Progress) -> dict[str, Any]:
    """Write parity.json, evaluation.json, examples.json, samples.npz and profile.json; return the headline numbers.

    The parity check comes first, because timing a wrong model is useless.

    Raises:
        GateError: the model's features here differ from those in PyTorch.
    """
    manifest = read_json(model / "manifest.json")
    runtime, precision = manifest["summary"]["runtime"], manifest["summary"]["precision"]
    write_json(folder / "parity.json", prove(model, runtime=runtime, precision=precision)["parity"])
    encoders = open_exported(model)  # after `prove`, where a graph that crashes its runtime fails in a child process
    samples, top1 = score(encoders, folder, spec, progress)
    timed = profile(model, Effort(timing.processes, timing.seconds), progress=progress)
    np.savez(folder / "samples.npz", **samples, **timed.samples)  # type: ignore[arg-type]  # numpy types keywords as one array
    write_json(folder / "profile.json", timed.document)
    return {"top1": top1, "p50_ms": timed.document["image"]["p50_ms"]}


def measure_reference(
    checkpoint: Path,
    exported: Path,
    folder: Path,
    spec: EvaluateSpec,
    timing: ProfileSpec,
    mode: str,
    progress: Progress,
) -> dict[str, Any]:
    """Write the same files for a run's checkpoint in PyTorch fp32, with `mode` eager or compiled; needs torch.

    Return the fields of an exported model's manifest and the headline numbers.  `exported` is the checkpoint's fp32
    export; its samples verify that this is the same model.

    Raises:
        GateError: PyTorch's features differ from those in parity.npz.
        MissingDependency: `mode` is compiled, and there is no C++ compiler.
    """
    compiled = mode == "compiled"
    encoders = reference_encoders(checkpoint, exported, compiled=compiled)
    progress("parity", 0, 1)
    write_json(folder / "parity.json", check_parity(exported, precision="fp32", encoders=encoders))
    samples, top1 = score(encoders, folder, spec, progress)
    effort = Effort(timing.processes, timing.seconds)
    timed = profile(checkpoint, effort, Target(compiled=compiled), progress=progress)
    np.savez(folder / "samples.npz", **samples, **timed.samples)  # type: ignore[arg-type]  # as above
    write_json(folder / "profile.json", timed.document)
    summary = read_json(exported / "manifest.json")["summary"]
    about = {key: summary[key] for key in ("role", "precision", "params_image", "params_text")}
    return {**about, "runtime": "pytorch", "pytorch": mode, "top1": top1, "p50_ms": timed.document["image"]["p50_ms"]}


def score(
    encoders: Encoders, folder: Path, spec: EvaluateSpec, progress: Progress
) -> tuple[dict[str, NDArray[Any]], float]:
    """Write evaluation.json and examples.json; return the ranks and answers behind them, and the headline's top-1."""
    sets = [open_set(entry) for entry in spec.sets]
    evaluation, samples = evaluate(encoders, sets, headline=spec.headline, progress=progress)
    write_json(folder / "evaluation.json", evaluation)
    (headline,) = (data for data in sets if data.name == spec.headline)
    write_examples(folder / "examples.json", headline, samples, spec.examples)
    return samples, evaluation["sets"][spec.headline]["top1"]


def evaluate_models(models: Sequence[Path], spec: EvaluateSpec, progress: Progress) -> ModelComparison:
    """Return every model's scores on a recipe's evaluation sets, and the difference of each from the first model.

    A model is an exported directory, or a checkpoint directory, which needs torch.

    Raises:
        UsageError: a directory is neither.
        ClipkdError: a set is missing or invalid, or too many of its images cannot be read.
    """
    for model in models:
        model_kind(model)  # raises for an invalid directory before the first evaluation
    sets = [open_set(entry) for entry in spec.sets]
    documents: list[EvaluatedModel] = []
    first_ranks: dict[str, NDArray[Any]] = {}
    for model in models:
        encoders = _encoders(model)
        evaluation, samples = evaluate(encoders, sets, headline=spec.headline, progress=progress, what=model.name)
        document: EvaluatedModel = {"model": str(model), "sets": evaluation["sets"]}
        if documents:
            document["against_first"] = {
                data.name: paired_drop(first_ranks[f"{data.name}_rank"] < 1, samples[f"{data.name}_rank"] < 1)._asdict()
                for data in sets
            }
        else:
            first_ranks = samples
        documents.append(document)
    return {"headline": spec.headline, "models": documents}


def _encoders(model: Path) -> Encoders:
    if model_kind(model) == "exported":
        return open_exported(model)
    from toolchain.distributed import join_processes
    from toolchain.evaluation.torch_encoders import TorchEncoders
    from toolchain.models.build import load_model

    device = join_processes().device
    loaded = load_model(model)
    loaded.net.to(device)
    return TorchEncoders(loaded, device)
