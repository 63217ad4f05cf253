"""Compare every stage of a recipe, up to the measurements, with those that a run directory holds."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from export.documents import PlannedExport
from export.pipeline.cpu_measurement import Subject, scoring
from export.pipeline.export import export_spec
from export.pipeline.origin import describe_origin
from export.pipeline.plan import PlannedReference, plan_exports, plan_references, shipped_role, stage_paths
from toolchain.evaluation.open_sets import fingerprint
from toolchain.pipeline.plan import PlannedStage, examine_stage, find_state, plan_caches, plan_quantized
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.pipeline.student_start import describe_start
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, open_stage, read_manifest


def plan_run(recipe: Recipe, out: Path) -> list[PlannedStage]:
    """Return every stage that `clipkd run` makes but the report; reads no other file of a run than its manifests."""
    planned = plan_quantized(recipe, out)
    if recipe.evaluate is None:
        return planned
    by_name = {stage.name: stage for stage in planned}
    exported = _plan_exports(recipe, out, by_name)
    measured = _plan_measurements(recipe, out, by_name, exported)
    runtimes = recipe.export.runtimes if recipe.export.auto else ()
    timed = [_examine_timings(out, shipped_role(recipe), runtime, exported) for runtime in runtimes]
    return [*planned, *exported.values(), *measured, *timed]


def show_stages(recipe: Recipe, out: Path | None) -> list[dict[str, Any]]:
    """Return the stages of a recipe with their state in a run, after checking the files of those that are made.

    `starts` of a student has what it inherits from where.

    Raises:
        ArtifactError: a stage was made, but its files have changed.
    """
    starts = describe_start(recipe)
    if out is None:
        unmade = {"state": "not made", "text": "not made"}
        return [{"stage": name, **unmade, "starts": starts.get(name, [])} for name in stage_paths(recipe)]
    planned = {stage.name: stage for stage in [*plan_caches(recipe, out), *plan_run(recipe, out)]}
    stages = []
    for name in stage_paths(recipe):
        if (out / name).exists():
            open_stage(out / name)
        stage = planned.get(name)
        entry: dict[str, Any] = {"stage": name, "state": stage.state if stage else find_state(out / name)}
        entry["text"] = stage.describe() if stage else entry["state"]
        entry["differences"] = [text for each in stage.superseded for text in each.differences] if stage else []
        entry["starts"] = starts.get(name, [])
        stages.append(entry)
    return stages


def _plan_exports(recipe: Recipe, out: Path, checkpoints: Mapping[str, PlannedStage]) -> dict[str, PlannedStage]:
    headline = cache(lambda: fingerprint(require_evaluation(recipe).headline_set))  # reads the set, at its first use

    def examine(export: PlannedExport) -> PlannedStage:
        def make_spec(made: dict[str, Stage]) -> StageSpec:
            origin = describe_origin(recipe, out, made["checkpoint"], made.get("teacher"))
            return export_spec(export, recipe, out, made["checkpoint"], headline(), origin)

        earlier = {"checkpoint": checkpoints[export.checkpoint]}
        if "teacher" in checkpoints:
            earlier["teacher"] = checkpoints["teacher"]  # its hash is in the model card
        return examine_stage(out, f"exported/{export.name}", make_spec, earlier)

    return {export.name: examine(export) for export in plan_exports(recipe) if export.checkpoint in checkpoints}


def _plan_measurements(
    recipe: Recipe, out: Path, checkpoints: Mapping[str, PlannedStage], exported: Mapping[str, PlannedStage]
) -> list[PlannedStage]:
    scored = cache(lambda: scoring(require_evaluation(recipe)))  # reads the sets, at its first use

    def examine(name: str) -> PlannedStage:
        def make_spec(made: dict[str, Stage]) -> StageSpec:
            return Subject(out, made["model"]).specify_parts(scored(), recipe.profile)

        return examine_stage(out, f"measured/{name}/cpu", make_spec, {"model": exported[name]})

    def examine_reference(reference: PlannedReference) -> PlannedStage:
        def make_spec(made: dict[str, Stage]) -> StageSpec:
            subject = Subject(out, made["model"], made["checkpoint"], reference.mode)
            return subject.specify_parts(scored(), recipe.profile)

        earlier = {"checkpoint": checkpoints[reference.role], "model": exported[reference.beside]}
        return examine_stage(out, f"measured/{reference.name}/cpu", make_spec, earlier)

    kits = {export.name for export in plan_exports(recipe) if export.in_runtime.is_kit}
    return [
        *(examine(name) for name in exported if name not in kits),
        *map(examine_reference, plan_references(recipe)),
    ]


def _examine_timings(out: Path, role: str, runtime: str, exported: Mapping[str, PlannedStage]) -> PlannedStage:
    """Return the state of the timings for `export.auto`, which depend on the precisions that passed every check."""
    recorded = (read_manifest(out / "auto" / runtime) or {}).get("inputs") or {}
    names = {precision: f"{role}-{runtime}-{precision}" for precision in recorded}
    timed = {precision: exported[name] for precision, name in names.items() if name in exported}
    return examine_stage(out, f"auto/{runtime}", lambda _: None, timed)
