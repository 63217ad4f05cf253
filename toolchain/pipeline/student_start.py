"""Describe, before anything is built, what the students of a recipe start from; needs no torch."""

from toolchain.models.tower_sizes import TOWERS, plan_space, plan_tower
from toolchain.recipe.load import teacher_recipe
from toolchain.recipe.model import ModelSpec, StudentSpec
from toolchain.recipe.model_config import read_model_cfg
from toolchain.recipe.recipe import Recipe


def describe_start(recipe: Recipe) -> dict[str, list[str]]:
    """Return by stage what a student inherits from where, and what its vocabulary is cut to; none if neither."""
    if recipe.distill is None:
        return {"adopted": _describe(recipe.student, recipe)}
    found = {"student": _describe(recipe.student, recipe)}
    if recipe.baseline:
        found["baseline"] = _describe(recipe.student.without_teacher(), recipe)
    return found


def _describe(spec: StudentSpec, recipe: Recipe) -> list[str]:
    lines = []
    if spec.inherit is not None:
        source, name = _find_source(spec, recipe)
        lines = _describe_inheritance(spec, source, name)
    if spec.vocabulary:
        lines.append(f"vocabulary cut to the tokens of {', '.join(spec.vocabulary)}")
    return lines


def _find_source(spec: StudentSpec, recipe: Recipe) -> tuple[ModelSpec, str]:
    """Return the model that a student inherits from, and what to call it."""
    assert spec.inherit is not None
    if not spec.inherits_from_teacher:
        return spec.inherit, spec.inherit.model
    assert recipe.teacher is not None
    if recipe.teacher.recipe is not None:
        return teacher_recipe(recipe.teacher).student, "the teacher"
    return recipe.teacher, "the teacher"


def _describe_inheritance(spec: StudentSpec, source: ModelSpec, name: str) -> list[str]:
    own, given = read_model_cfg(spec), read_model_cfg(source)
    if own is None or given is None:
        return [f"inherits from {name}; its configuration is not on this machine"]
    plans = [f"{tower} tower inherits from {name}: {plan_tower(own, given, tower).text}" for tower in TOWERS]
    space = plan_space(own, given)
    return plans + ([f"features inherit from {name}: {space}"] if space else [])
