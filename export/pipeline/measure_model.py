"""Prove, score and time an exported model on the machine it is on; of exported models none of it needs torch."""

import json
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
from toolchain.filesystem import write_json
from toolchain.progress import Progress
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ProfileSpec
from toolchain.significance import paired_drop


def measure(model: Path, folder: Path, spec: EvaluateSpec, timing: ProfileSpec, progress: Progress) -> dict[str, Any]:
    """Write parity.json, evaluation.json, examples.json, samples.npz and profile.json; returns the headline numbers.

    Parity comes first: a wrong model is not worth timing.

    Raises:
        GateError: the model does not compute here what it computed in PyTorch.
    """
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    runtime, precision = manifest["summary"]["runtime"], manifest["summary"]["precision"]
    write_json(folder / "parity.json", prove(model, runtime=runtime, precision=precision)["parity"])
    encoders = open_exported(model)  # only now: a graph that would crash its runtime has crashed another process
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
    """The same files of a run's checkpoint in PyTorch fp32, `mode` being eager or compiled; needs torch.

    Returns what a manifest says of an exported model, and the headline numbers.  `exported` is its fp32 export, whose
    samples say whether this is the same model.

    Raises:
        GateError: PyTorch's features differ from those in parity.npz.
        MissingDependency: compiled, and there is no C++ compiler.
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
    summary = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))["summary"]
    about = {key: summary[key] for key in ("role", "precision", "params_image", "params_text")}
    return {**about, "runtime": "pytorch", "pytorch": mode, "top1": top1, "p50_ms": timed.document["image"]["p50_ms"]}


def score(
    encoders: Encoders, folder: Path, spec: EvaluateSpec, progress: Progress
) -> tuple[dict[str, NDArray[Any]], float]:
    """Write evaluation.json and examples.json; returns the ranks and answers behind them, and the headline's top-1."""
    sets = [open_set(entry) for entry in spec.sets]
    evaluation, samples = evaluate(encoders, sets, headline=spec.headline, progress=progress)
    write_json(folder / "evaluation.json", evaluation)
    (headline,) = (data for data in sets if data.name == spec.headline)
    write_examples(folder / "examples.json", headline, samples, spec.examples)
    return samples, evaluation["sets"][spec.headline]["top1"]


def evaluate_models(models: Sequence[Path], spec: EvaluateSpec, progress: Progress) -> ModelComparison:
    """Every model's scores on the sets of a recipe, and how each of the others differs from the first.

    A model is an exported directory, or a checkpoint's, which needs torch.

    Raises:
        UsageError: a directory is neither.
        ClipkdError: a set is missing or wrong, or too many pictures of it cannot be read.
    """
    for model in models:
        model_kind(model)  # before the first is evaluated
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
