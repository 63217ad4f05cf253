"""Implement `clipkd profile`: time models on one device, and store each result in the run that owns the model.

The processes of a call's models are interleaved.  A model that fails becomes a row with the reason.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from export.devices.describe import describe_device
from export.devices.doctor import local_device
from export.devices.registry import Device, find_device, is_local
from export.devices.ssh import build_engines_on
from export.documents import Parity
from export.model_folder import find_run, is_checkpoint
from export.pipeline.cpu_measurement import STORED_MODELS, Scoring, Subject, find_subject, scoring
from export.pipeline.engines import open_or_build_engines
from export.pipeline.measure import measure_on_cpu
from export.pipeline.measure_model import score
from export.profiling.documents import FailedRow, ProfileRow
from export.profiling.protocol import Effort, Profile, Target, profile_together
from export.proof.parity import check_parity
from export.proof.prove import prove
from export.runtime.exported_model import ExportedEncoders, open_exported
from export.runtime.remote_model import encoders_on
from export.runtime.tensorrt_engines import can_build, open_tensorrt
from toolchain.errors import ClipkdError, UnavailableBackend, UsageError
from toolchain.evaluation.open_sets import fingerprints
from toolchain.filesystem import read_json, write_json
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.progress import Screen
from toolchain.provenance import machine
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ProfileSpec
from toolchain.recipe.load import load_recipe
from toolchain.stage import Stage, StageSpec, is_made, open_stage, run_lock, run_stage


@dataclass(frozen=True)
class _Where:
    """The device that models are measured on."""

    name: str
    on: Device | None
    """The device reached by ssh; None: a device of this machine."""

    what: str
    """Description of a device of this machine; empty for a remote device."""

    fingerprint: str


@dataclass(frozen=True)
class _Place:
    """The location of a model's measurement on a device other than the CPU: measured/MODEL/DEVICE of its run."""

    run: Path
    stage: StageSpec
    model: Stage
    engines: Stage | None
    """The engines, if the model is a TensorRT build kit."""

    spec: EvaluateSpec | None
    """The evaluation sets, if the model is evaluated."""


@dataclass(frozen=True)
class _CpuPlace:
    """A model whose measurement on this machine's CPU is stored in its run."""

    subject: Subject
    scored: Scoring | None
    """The evaluation sets, if the model is evaluated."""


_Places = dict[int, _Place | _CpuPlace | None]
"""Places by the index of the model; None if its measurement is not stored."""


def profile_models(
    models: Sequence[Path],
    device: str,
    effort: Effort,
    *,
    scored: bool = False,
    out: Path | None = None,
    screen: Screen,
) -> tuple[list[ProfileRow | FailedRow], list[ClipkdError]]:
    """Return a row for each model, in order, and the errors of those that could not be measured.

    The profile of a run's model is stored in measured/MODEL/DEVICE of the run, with its parity check against PyTorch
    and, if `scored`, its accuracy there on the sets of the run's recipe.  On the CPU it replaces a stored one, unless
    that was measured for longer; on another device the stored one is reused.  The engines of a TensorRT build kit are
    built for the device first, and stored in the run's engines/.  `out` is a folder for the rows and all latencies.

    Raises:
        UnavailableBackend: the device does not exist or cannot be reached.
        UsageError: unknown device, or `out` is a file.
    """
    where = _find(device)
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; --out expects a folder")
    places, failures = _places(models, where, effort, scored, screen)

    @cache
    def time_all() -> dict[int, Profile | ClipkdError]:
        """Time all models that have not failed, together, on the first call; on a device, those without a result."""
        to_do = {
            index: place
            for index, place in places.items()
            if index not in failures and not (isinstance(place, _Place) and is_made(place.stage))
        }
        found = _time([models[index] for index in to_do], list(to_do.values()), where, effort, screen)
        return dict(zip(to_do, found, strict=True))

    def time_one(index: int) -> Profile:
        found = time_all()[index]
        if isinstance(found, ClipkdError):
            raise found
        return found

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    measured: dict[int, ProfileRow] = {}
    for index, place in places.items():
        own = None if out is None else out / f"samples-{index + 1}.npz"
        try:
            time = partial(time_one, index)
            if isinstance(place, _CpuPlace):
                measured[index] = _cpu_row(models[index], place, effort, own, time, screen)
            else:
                measured[index] = _row(models[index], place, where, own, time, screen)
        except ClipkdError as error:
            failures[index] = error
    rows = [
        measured[index] if index in measured else _failed_row(model, where, failures[index])
        for index, model in enumerate(models)
    ]
    if out is not None:
        write_json(out / "profile.json", rows)
    return rows, [failures[index] for index in sorted(failures)]


def _time(
    models: Sequence[Path], places: Sequence[_Place | _CpuPlace | None], where: _Where, effort: Effort, screen: Screen
) -> list[Profile | ClipkdError]:
    screen.starts(models[0].name if len(models) == 1 else f"{len(models)} models")
    engines = {
        model: place.engines.path
        for model, place in zip(models, places, strict=True)
        if isinstance(place, _Place) and place.engines
    }
    timed_on = Target(where.name if where.on is None else "cpu", where.on, engines)
    found = profile_together(models, effort, timed_on, progress=screen.progress)
    for one in found:
        if isinstance(one, Profile) and where.on is None and where.name != "cpu":
            described = one.document["machine"]
            described["name"] = f"{where.what}, {described['name']}"
    return found


def _row(
    model: Path,
    place: _Place | None,
    where: _Where,
    own: Path | None,
    time_all: Callable[[], Profile],
    screen: Screen,
) -> ProfileRow:
    """Return a model's row, stored in its run or measured now; `own` is the caller's file for its latencies."""
    if place is None:
        return _unstored_row(model, where.name, own, time_all())
    name = f"measured/{model.name}/{where.name}"
    with run_lock(place.run):
        stage = run_stage(place.stage, partial(_measure, name, place, where, time_all, screen))
    screen.done(name, stage)
    return _stored_row(model, where.name, own, stage)


def _cpu_row(
    model: Path, place: _CpuPlace, effort: Effort, own: Path | None, time: Callable[[], Profile], screen: Screen
) -> ProfileRow:
    """Return the row of a run's model on this CPU, measured now, and store it unless the run has a longer one."""
    subject, timing = place.subject, ProfileSpec(processes=effort.processes, seconds=effort.seconds)
    with run_lock(subject.run):
        if not subject.earlier.is_longer(timing):
            return _stored_row(
                model, "cpu", own, measure_on_cpu(subject, screen, scored=place.scored, timing=timing, time=time)
            )
        row = _unstored_row(model, "cpu", own, time())
        if place.scored is not None:
            measure_on_cpu(subject, screen, scored=place.scored)
        stored = subject.earlier.profile or {}
    screen.say(
        f"{model}: only printed, because its run has a longer measurement, of {stored['processes']} processes and "
        f"{stored['seconds']:g} s; delete {subject.path} to replace it"
    )
    return row


def _unstored_row(model: Path, device: str, own: Path | None, found: Profile) -> ProfileRow:
    if own is not None:
        np.savez(own, **found.samples)  # type: ignore[arg-type]  # numpy types keywords as one array
    return _measured_row(model, device, found.document, own)


def _stored_row(model: Path, device: str, own: Path | None, stage: Stage) -> ProfileRow:
    samples = stage.path / "samples.npz"
    if own is not None:
        samples = Path(shutil.copyfile(samples, own))
    return _measured_row(model, device, read_json(stage.path / "profile.json"), samples)


def _measured_row(model: Path, device: str, document: Mapping[str, Any], samples: Path | None) -> ProfileRow:
    about = {"model": str(model), "device": device, "status": "ok"}
    return cast(ProfileRow, {**about, **document, "samples": None if samples is None else str(samples)})


def _failed_row(model: Path, where: _Where, failure: ClipkdError) -> FailedRow:
    return {"model": str(model), "device": where.name, "status": str(failure), "exit_code": failure.exit_code}


def _measure(
    name: str, place: _Place, where: _Where, time_all: Callable[[], Profile], screen: Screen, folder: Path
) -> dict[str, Any]:
    """Write parity.json, evaluation.json if it is evaluated, profile.json and samples.npz; return the headline."""
    screen.starts(name)
    screen.progress("parity", 0, 1)
    write_json(folder / "parity.json", _check_parity(place, where))  # first, because timing a wrong model is useless
    samples: dict[str, Any] = {}
    if place.spec is not None:
        samples, _ = score(_encoders(place, where), folder, place.spec, screen.progress)
    found = time_all()
    write_json(folder / "profile.json", found.document)
    np.savez(folder / "samples.npz", **samples, **found.samples)  # type: ignore[arg-type]  # as above
    return {"p50_ms": found.document["image"]["p50_ms"]}


def _find(device: str) -> _Where:
    if not is_local(device):
        on = find_device(device)
        return _Where(on.name, on, "", json.dumps(describe_device(on), sort_keys=True))
    found = local_device(device)
    return _Where(found["name"], None, found["what"], json.dumps(machine() | {"device": found["what"]}, sort_keys=True))


def _places(
    models: Sequence[Path], where: _Where, effort: Effort, scored: bool, screen: Screen
) -> tuple[_Places, dict[int, ClipkdError]]:
    """Return the location of each model's measurement, and the errors of those that cannot be measured."""
    places: _Places = {}
    failures: dict[int, ClipkdError] = {}
    for index, model in enumerate(models):
        try:
            places[index] = _place(model, where, effort, scored, screen)
        except ClipkdError as error:
            failures[index] = error
    return places, failures


def _place(model: Path, where: _Where, effort: Effort, scored: bool, screen: Screen) -> _Place | _CpuPlace | None:
    """Return the location of a model's measurement, None if it is not stored; build a kit's engines if needed."""
    if is_checkpoint(model) and where.name != "cpu":
        raise UsageError(
            f"{model}: a checkpoint is timed in PyTorch on this machine's CPU; pass an export of it instead"
        )
    run, is_kit = find_run(model), (model / "build_engine.py").is_file()
    if is_kit and where.on is None and where.name != "cuda:0":
        raise UnavailableBackend(
            f"{model}: a TensorRT build kit, which the {where.name} of this machine cannot run; its engines run on the "
            "first NVIDIA GPU (--device cuda:0) or on a device of `clipkd devices`"
        )
    if run is None and is_kit:
        raise UsageError(f"{model}: a TensorRT build kit; its engines are stored in its run, so pass RUN/exported/...")
    if run is None and scored:
        raise UsageError(
            f"{model}: not inside a run, so no recipe lists the sets to evaluate it on; pass RUN/exported/..."
        )
    if run is None:
        return None
    if where.name == "cpu":
        return _place_on_cpu(model, run, scored, screen)
    with run_lock(run):
        stage = open_stage(model)
        engines = _engines(stage, run, where, screen) if is_kit else None
    path = run / "measured" / model.name / where.name
    scored = scored or (path / "evaluation.json").is_file()  # an earlier evaluation is repeated, not dropped
    spec = require_evaluation(load_recipe(run / "recipe.yaml")) if scored else None
    made = StageSpec(
        path,
        kind="profile",
        version=2,
        fields={**effort._asdict(), "evaluate": spec and spec.model_dump(mode="json")},
        fingerprints={"machine": where.fingerprint} | ({"sets": fingerprints(spec.sets)} if spec else {}),
        inputs={"model": stage} | ({"engines": engines} if engines else {}),
    )
    return _Place(run, made, stage, engines, spec)


def _place_on_cpu(model: Path, run: Path, scored: bool, screen: Screen) -> _CpuPlace | None:
    subject = find_subject(model)
    if subject is None and scored:
        raise UsageError(f"{model}: cannot be evaluated here, because {STORED_MODELS}; use clipkd evaluate")
    if subject is None:
        screen.say(f"{model}: only printed; {STORED_MODELS}")
        return None
    return _CpuPlace(subject, scoring(require_evaluation(load_recipe(run / "recipe.yaml"))) if scored else None)


def _engines(kit: Stage, run: Path, where: _Where, screen: Screen) -> Stage:
    """Return a kit's engines for this machine's GPU, or build them on a device reached by ssh for its GPU."""
    if where.on is None:
        return open_or_build_engines(kit, run, can_build(), screen)
    device, name = where.on, f"engines/{kit.path.name}@{where.name}"

    def build(folder: Path) -> dict[str, Any]:
        made = build_engines_on(device, kit.path, folder, on_line=lambda line: screen.progress(line.strip(), 0, 1))
        return {"runtime": "tensorrt"} | made

    screen.starts(name)
    there = {"machine": where.fingerprint}
    stage = run_stage(
        StageSpec(run / name, kind="engines", version=1, fingerprints=there, inputs={"model": kit}), build
    )
    screen.done(name, stage)
    return stage


def _check_parity(place: _Place, where: _Where) -> Parity:
    """Return the parity check on the device, run in a process that may crash.

    Raises:
        GateError: the model's features on the device differ from those in PyTorch.
    """
    summary = place.model.manifest["summary"]
    if where.on is None and place.engines is None:
        how = {"runtime": summary["runtime"], "precision": summary["precision"]}
        return prove(place.model.path, **how, device=where.name)["parity"]
    return check_parity(place.model.path, precision=summary["precision"], encoders=_encoders(place, where))


def _encoders(place: _Place, where: _Where) -> ExportedEncoders:
    model, engines = place.model.path, place.engines.path if place.engines else None
    if where.on is not None:
        precision = place.model.manifest["summary"]["precision"]
        return encoders_on(where.on, model, precision=precision, engines=engines)
    return open_exported(model, device=where.name) if engines is None else open_tensorrt(model, engines)
