"""Write a measurement of a model on this machine's CPU: parity, accuracy, latency.  Exported models need no torch."""

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.documents import Parity
from export.pipeline.cpu_measurement import Earlier, Subject
from export.profiling.protocol import Effort, Profile, Target, profile
from export.proof.parity import check_parity
from export.proof.prove import prove
from export.runtime.exported_model import ExportedEncoders, open_exported
from export.runtime.remote_model import reference_encoders
from toolchain.evaluation.examples import write_examples
from toolchain.evaluation.open_sets import open_set
from toolchain.evaluation.zero_shot import Encoders, evaluate
from toolchain.filesystem import read_json, write_json
from toolchain.progress import Progress
from toolchain.provenance import machine, versions
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ProfileSpec

_OF_LATENCY = ("_ms", "_process")  # the ends of the names of latencies in samples.npz; the other arrays are of accuracy


def measure(
    subject: Subject,
    folder: Path,
    spec: EvaluateSpec | None,
    time: Callable[[], Profile] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write parity.json, evaluation.json, examples.json, samples.npz and profile.json; return the headline numbers.

    Without `spec` or `time`, copy that part from the earlier measurement, if it has it.  The parity check comes first,
    because timing a wrong model is useless; that of the export holds if neither machine nor packages have changed.  For
    a checkpoint, also return the fields of an exported model's manifest.

    Raises:
        GateError: the model's features here differ from those in PyTorch.
        MissingDependency: the checkpoint is to be compiled, and there is no C++ compiler.
    """

    @cache
    def encoders() -> ExportedEncoders:
        return _open_encoders(subject)

    earlier = subject.earlier
    if earlier.is_proven:
        shutil.copyfile(earlier.path / "parity.json", folder / "parity.json")
    elif (parity := _parity_of_export(subject)) is not None:
        write_json(folder / "parity.json", parity)
    else:
        progress("parity", 0, 1)
        write_json(folder / "parity.json", _check_parity(subject, encoders))
    samples, numbers = _keep(earlier, folder, accuracy=spec is None, latency=time is None)
    if spec is not None:
        ranks, numbers["top1"] = score(encoders(), folder, spec, progress)
        samples |= ranks
    if time is not None:
        timed = time()
        samples |= timed.samples
        write_json(folder / "profile.json", timed.document)
        numbers["p50_ms"] = timed.document["image"]["p50_ms"]
    np.savez(folder / "samples.npz", **samples)  # type: ignore[arg-type]  # numpy types keywords as one array
    if subject.checkpoint is None:
        return numbers
    summary = subject.model.manifest["summary"]
    about = {key: summary[key] for key in ("role", "precision", "params_image", "params_text")}
    return {**about, "runtime": "pytorch", "pytorch": subject.mode, **numbers}


def time_alone(subject: Subject, timing: ProfileSpec | None, progress: Progress) -> Profile:
    """Return the latency of one model, timed by itself."""
    assert timing is not None
    compiled = subject.checkpoint is not None and subject.mode == "compiled"
    effort = Effort(timing.processes, timing.seconds)
    return profile(subject.timed, effort, Target(compiled=compiled), progress=progress)


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


def _open_encoders(subject: Subject) -> ExportedEncoders:
    if subject.checkpoint is None:
        return open_exported(subject.model.path)
    return reference_encoders(subject.checkpoint.path, subject.model.path, compiled=subject.mode == "compiled")


def _parity_of_export(subject: Subject) -> Parity | None:
    """Return the parity found by the export if it was on this machine with today's packages; None for a checkpoint."""
    manifest = subject.model.manifest
    same = (manifest.get("machine"), manifest.get("versions")) == (machine(), versions())
    parity: Parity | None = manifest["summary"].get("parity") if same and subject.checkpoint is None else None
    return parity


def _check_parity(subject: Subject, encoders: Callable[[], ExportedEncoders]) -> Parity:
    """Return the parity check: of an exported model in a child process, because its graph may crash the runtime."""
    if subject.checkpoint is not None:
        return check_parity(subject.model.path, precision="fp32", encoders=encoders())
    summary = subject.model.manifest["summary"]
    return prove(subject.model.path, runtime=summary["runtime"], precision=summary["precision"])["parity"]


def _keep(
    earlier: Earlier, folder: Path, *, accuracy: bool, latency: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Copy parts of an earlier measurement that it has; return their arrays and headline numbers."""
    names: list[str] = []
    numbers: dict[str, Any] = {}
    if accuracy := accuracy and earlier.evaluate is not None:
        names += ["evaluation.json", "examples.json"]
        evaluation = read_json(earlier.path / "evaluation.json")
        numbers["top1"] = evaluation["sets"][evaluation["headline"]]["top1"]
    if latency := latency and earlier.profile is not None:
        names.append("profile.json")
        numbers["p50_ms"] = read_json(earlier.path / "profile.json")["image"]["p50_ms"]
    for name in names:
        shutil.copyfile(earlier.path / name, folder / name)
    if not names:
        return {}, numbers
    with np.load(earlier.path / "samples.npz") as stored:
        kept: Mapping[bool, bool] = {True: latency, False: accuracy}
        return {name: stored[name] for name in stored.files if kept[name.endswith(_OF_LATENCY)]}, numbers
