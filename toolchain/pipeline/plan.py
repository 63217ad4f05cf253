"""Compare the stages of a recipe with those that a run directory holds, before any of them is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from toolchain.differences import MADE_AGAIN, abridge, describe_duration
from toolchain.errors import ClipkdError
from toolchain.filesystem import partial_path
from toolchain.pipeline.corpus import Corpus
from toolchain.pipeline.quantize import quantize_spec
from toolchain.pipeline.stage_inputs import TrainingInputs, training_inputs
from toolchain.pipeline.teacher_cache import CacheInputs, cache_spec
from toolchain.pipeline.train import adopt_spec, train_spec
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import (
    SCRATCH,
    Stage,
    StageSpec,
    Superseded,
    find_kept,
    find_superseded,
    list_kept,
    read_attempt,
    read_manifest,
)

State = Literal["made", "failed", "interrupted", "not made"]
UNKNOWN = "unknown"
"""Placeholder for the digest of an input stage that does not exist now; it will probably get the bytes that it had."""

SpecMaker = Callable[[dict[str, Stage]], StageSpec | None]
"""Makes a stage's specification from its input stages, by role; None if they do not suffice."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a recipe, and what a run directory has of it: finished, interrupted, or of another recipe."""

    name: str
    path: Path
    found: State
    """State of its directory, whichever recipe it is of."""

    manifest: Mapping[str, Any] | None = None
    """The manifest of a finished stage that is of this recipe, or may be (see `unknown`)."""

    superseded: tuple[Superseded, ...] = ()
    """Work of other recipes that making this stage would replace."""

    unknown: str | None = None
    """Reason why the finished stage cannot be compared with the recipe; None if it was compared."""

    keeps_bytes: bool = False
    """True if making it again should give the same files, so that later stages stay valid."""

    kept: tuple[Path, ...] = ()
    """Earlier stages in `.replaced`: kept until this one is complete."""

    @property
    def is_made(self) -> bool:
        """Return True if the finished stage is of this recipe, so it is reused."""
        return self.manifest is not None and self.unknown is None

    @property
    def state(self) -> str:
        """Return made, of another recipe, failed, interrupted or not made."""
        return "of another recipe" if any(each.finished for each in self.superseded) else self.found

    def as_input(self, recorded: str | None) -> Stage:
        """Return the stage as an input of a later one, whose manifest has recorded this digest of it."""
        if self.manifest is not None:
            return Stage(self.path, dict(self.manifest), cached=True)
        return Stage(self.path, {"digest": (recorded or UNKNOWN) if self.keeps_bytes else MADE_AGAIN}, cached=False)

    def describe(self) -> str:
        """Return the state in one line: what differs, how long it took, and what `clipkd run` would do with it."""
        if self.is_made and not self.path.exists():
            return f"made; kept in {self.kept[0]}, would be put back"
        step = _find_step(partial_path(self.path))
        attempt = "interrupted" if step is None else f"interrupted at step {step}"
        parts = [_describe_superseded(each, "" if each.finished else f"{attempt}, ") for each in self.superseded]
        if not parts:
            resumable = self.found == "interrupted" and step is not None
            parts = [f"{attempt}; would be resumed" if resumable else self.found]
        parts += [] if self.unknown is None else [f"not known whether it is of this recipe: {self.unknown}"]
        parts += [f"the earlier one is kept in {path} until this one is complete" for path in self.kept]
        return "; ".join(parts)


def _describe_superseded(superseded: Superseded, attempt: str) -> str:
    consequence = "would be replaced only with --replace" if superseded.is_costly else "would be replaced"
    took = describe_duration(superseded.took_s)
    return f"{attempt}of another recipe: {abridge(superseded.differences)}; took {took}; {consequence}"


def examine_stage(
    out: Path, name: str, make_spec: SpecMaker, earlier: Mapping[str, PlannedStage] | None = None
) -> PlannedStage:
    """Return a stage's state in a run.

    Files are not checked against their hashes, except those of a kept stage that would be put back.  `earlier` has the
    stages that this one reads, by role.  If `make_spec` returns None, only these are compared with what was recorded.
    """
    path, earlier = out / name, earlier or {}
    manifest, attempt, kept = read_manifest(path), read_attempt(partial_path(path)), tuple(list_kept(path))
    state = find_state(path)
    recorded = manifest or (attempt.recorded if attempt else None) or {}
    inputs = {role: stage.as_input((recorded.get("inputs") or {}).get(role)) for role, stage in earlier.items()}
    if state == "not made" and not kept:
        return PlannedStage(name, path, state)
    try:
        spec = make_spec(inputs) or _assume_unchanged(path, recorded, inputs)
    except (ClipkdError, ImportError) as error:
        return PlannedStage(name, path, state, manifest, unknown=str(error), kept=kept)
    if spec is None:
        return PlannedStage(name, path, state, kept=kept)
    if manifest is not None and manifest["key"] == spec.key:
        return PlannedStage(name, path, "made", manifest, kept=kept)
    if not path.exists() and (restored := find_kept(spec)):
        return PlannedStage(name, path, "made", restored.manifest, kept=kept)
    return PlannedStage(name, path, state, superseded=tuple(find_superseded(spec)), kept=kept)


def find_state(path: Path) -> State:
    """Return the state of a stage's directory, whichever recipe it is of."""
    partial = partial_path(path)
    if path.exists():
        return "made"
    if (partial / "failed.json").exists():
        return "failed"
    return "interrupted" if partial.exists() else "not made"


def _assume_unchanged(path: Path, recorded: Mapping[str, Any], inputs: Mapping[str, Stage]) -> StageSpec | None:
    """Return a stage with the fields that were recorded and the current inputs; None if no fields were recorded."""
    if "fields" not in recorded:
        return None
    known = {role: stage for role, stage in inputs.items() if stage.digest != UNKNOWN}
    fields, fingerprints = recorded["fields"], recorded["fingerprints"]
    return StageSpec(path, recorded["kind"], recorded["version"], fields, fingerprints, known, resumes=True)


def _find_step(partial: Path) -> int | None:
    """Return the step of the newest checkpoint of an attempt; None if it has none."""
    steps = [int(path.name.split("-")[1]) for path in partial.glob(f"{SCRATCH}/checkpoints/step-*-*.pt")]
    return max(steps, default=None)


# The stages of a recipe -----------------------------------------------------------------------------------------------


def plan_checkpoints(recipe: Recipe, out: Path) -> list[PlannedStage]:
    """Return a recipe's stages up to the student; the teacher cache is one of them only if the student is not made.

    A stage whose inputs cannot be read raises no ClipkdError: it has the reason in `unknown`.
    """
    if recipe.distill is None:
        corpus = Corpus(recipe.student.vocabulary, recipe.data, recipe.evaluate, recipe.seed)
        return [_examine_adopted(recipe.student, recipe.seed, out, "adopted", corpus)]
    inputs = training_inputs(recipe)
    planned, earlier = [], {}
    if recipe.teacher is not None:
        planned = _examine_teachers(recipe, out)
        earlier = {stage.name: stage for stage in planned}
    if recipe.baseline:
        planned.append(_examine_student(inputs.without_teacher(), out, "baseline", {}))
    student = _examine_student(inputs, out, "student", earlier)
    cache = inputs.distill.teacher_cache
    if cache is not None and cache.path is None and not student.is_made:
        planned += [_examine_cache(inputs, out, name, teacher) for name, teacher in earlier.items()]
    return [*planned, student]


def plan_quantized(recipe: Recipe, out: Path) -> list[PlannedStage]:
    """Return the stages up to the int8 student."""
    planned = plan_checkpoints(recipe, out)
    if recipe.quantize is None or recipe.data is None or not recipe.export.is_quantized:
        return planned
    shipped = planned[-1]
    earlier = {"student": shipped} | {stage.name: stage for stage in planned if stage.name == "teacher"}

    def make_spec(made: dict[str, Stage]) -> StageSpec | None:
        return quantize_spec(recipe, out, {**made, shipped.name: made["student"]})

    return [*planned, examine_stage(out, f"{shipped.name}-int8", make_spec, earlier)]


def plan_caches(recipe: Recipe, out: Path) -> list[PlannedStage]:
    """Return the stages of `clipkd cache`: the teachers, then the cache of each."""
    if recipe.distill is None or recipe.distill.teacher_cache is None or recipe.teacher is None:
        return []
    inputs = training_inputs(recipe)
    teachers = _examine_teachers(recipe, out)
    for number, model in enumerate(recipe.distill.teacher_cache.also, len(teachers) + 1):
        teachers.append(_examine_adopted(model, recipe.seed, out, f"teacher-{number}"))
    return teachers + [_examine_cache(inputs, out, teacher.name, teacher) for teacher in teachers]


def _examine_teachers(recipe: Recipe, out: Path) -> list[PlannedStage]:
    from toolchain.recipe.load import teacher_recipe

    return [
        _examine_student(training_inputs(teacher_recipe(spec)), out, name, {})
        if spec.recipe is not None
        else _examine_adopted(spec, recipe.seed, out, name)
        for name, spec in recipe.teachers.items()
    ]


def _examine_adopted(model: ModelSpec, seed: int, out: Path, name: str, corpus: Corpus | None = None) -> PlannedStage:
    """Return the state of an adopted model.

    Saving the same weights again gives the same bytes, so a stage that differs at most in its version keeps them.
    """
    found = examine_stage(out, name, lambda _: adopt_spec(model, seed, out / name, corpus))
    differences = [text for each in found.superseded for text in each.differences]
    return replace(found, keeps_bytes=all(text.startswith("version ") for text in differences))


def _examine_student(inputs: TrainingInputs, out: Path, name: str, earlier: Mapping[str, PlannedStage]) -> PlannedStage:
    return examine_stage(out, name, lambda made: train_spec(inputs, out / name, made), earlier)


def _examine_cache(inputs: TrainingInputs, out: Path, name: str, teacher: PlannedStage) -> PlannedStage:
    """Return the state of a teacher cache; its key depends on the finished teacher's files."""
    spec = inputs.distill.teacher_cache
    assert spec is not None

    def make_spec(made: dict[str, Stage]) -> StageSpec | None:
        return cache_spec(CacheInputs(inputs, spec, made["teacher"], out, name)) if teacher.is_made else None

    return examine_stage(out, f"teacher-cache/{name}", make_spec, {"teacher": teacher})
