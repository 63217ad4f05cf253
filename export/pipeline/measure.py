"""Measure every exported model, and the PyTorch references, as stages."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.documents import export_summary
from export.pipeline.plan import PlannedReference, plan_references
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.progress import Screen
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import RUNTIMES
from toolchain.stage import REFERENCE_KIND, Stage, StageSpec, run_stage


def measure_models(recipe: Recipe, out: Path, exported: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """Return parity, accuracy and latency of each exported model, in its own runtime on this machine."""
    measured = {}
    accuracy, depends = require_evaluation(recipe), read_measurement_inputs(recipe)
    for name, model in exported.items():
        if RUNTIMES[export_summary(model)["runtime"]].is_kit:
            continue  # the engines of a build kit run on their device

        def work(folder: Path, model: Stage = model) -> dict[str, Any]:
            from export.pipeline.measure_model import measure

            return measure(model.path, folder, accuracy, recipe.profile, screen.progress)

        screen.starts(f"measured/{name}")
        measured[name] = run_stage(measure_spec(out, name, model, depends), work)
        screen.done(f"measured/{name}", measured[name])
    return measured


def require_references(recipe: Recipe) -> None:
    """Check, before hours of training, that the PyTorch references in the recipe can be measured.

    Raises:
        MissingDependency: the recipe asks for a compiled reference, and there is no C++ compiler.
    """
    from export.devices.run_runner import require_compiler

    if "compiled" in recipe.profile.pytorch:
        require_compiler()


def measure_references(
    recipe: Recipe, out: Path, made: dict[str, Stage], exported: dict[str, Stage], screen: Screen
) -> dict[str, Stage]:
    """Measure the checkpoint of the shipped model in PyTorch, once for each mode in `profile.pytorch`.

    Raises:
        MissingDependency: a compiled reference needs a C++ compiler, and there is none.
    """
    measured: dict[str, Stage] = {}
    planned_references = plan_references(recipe)
    if not planned_references:
        return measured
    accuracy, depends = require_evaluation(recipe), read_measurement_inputs(recipe)
    for planned in planned_references:
        if planned.beside not in exported:
            continue  # its export failed and reported why
        checkpoint, beside = made[planned.role], exported[planned.beside]

        def work(
            folder: Path, mode: str = planned.mode, checkpoint: Stage = checkpoint, beside: Stage = beside
        ) -> dict[str, Any]:
            from export.pipeline.measure_model import measure_reference

            paths = checkpoint.path, beside.path, folder
            return measure_reference(*paths, accuracy, recipe.profile, mode, screen.progress)

        screen.starts(f"measured/{planned.name}")
        measured[planned.name] = run_stage(reference_spec(out, planned, checkpoint, beside, depends), work)
        screen.done(f"measured/{planned.name}", measured[planned.name])
    return measured


@dataclass(frozen=True)
class MeasurementInputs:
    """The recipe fields that every measurement reads, and the fingerprints of its data and machine."""

    fields: dict[str, Any]
    fingerprints: dict[str, str]


def read_measurement_inputs(recipe: Recipe) -> MeasurementInputs:
    """Return what every measurement depends on but the model; reads names and sizes of the sets' files."""
    from toolchain.evaluation.open_sets import fingerprints
    from toolchain.provenance import machine

    scoring = require_evaluation(recipe)
    fields = {
        "evaluate": scoring.model_dump(mode="json"),
        "profile": recipe.profile.model_dump(exclude={"pytorch"}),
    }
    data = {"sets": fingerprints(scoring.sets), "machine": json.dumps(machine(), sort_keys=True)}
    return MeasurementInputs(fields, data)


def measure_spec(out: Path, name: str, model: Stage, depends: MeasurementInputs) -> StageSpec:
    """Return the stage that measures an exported model in its own runtime."""
    return StageSpec(
        out / "measured" / name / "cpu",
        kind="measure",
        version=2,
        fields=depends.fields,
        fingerprints=depends.fingerprints,
        inputs={"model": model},
    )


def reference_spec(
    out: Path, planned: PlannedReference, checkpoint: Stage, beside: Stage, depends: MeasurementInputs
) -> StageSpec:
    """Return the stage that measures a checkpoint in PyTorch, with the samples of its export `beside`."""
    return StageSpec(
        out / "measured" / planned.name / "cpu",
        kind=REFERENCE_KIND,
        version=1,
        fields={**depends.fields, "pytorch": planned.mode},
        fingerprints=depends.fingerprints,
        inputs={"checkpoint": checkpoint, "model": beside},
    )
