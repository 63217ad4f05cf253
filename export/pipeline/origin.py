"""Describe the origin of an exported model, for its stage key and its card."""

from pathlib import Path
from typing import Any

import yaml

from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import model_folder
from toolchain.recipe.recipe import Recipe
from toolchain.recipe.section import Section
from toolchain.stage import Stage

_OF_A_MACHINE = ("cache_gb", "cache_dir")
"""Fields of `data` that change no result."""


def describe_origin(recipe: Recipe, run: Path, checkpoint: Stage, teacher: Stage | None) -> dict[str, Any]:
    """Return names and settings of the recipe's models and data, and the hashes of checkpoint and teacher.

    Paths are relative to the run. So the card, which is passed on to others, does not name the home directory of the
    person who made the model, and a run in a moved directory keeps its stages.
    """
    described: dict[str, Any] = {
        "checkpoint": f"sha256 {checkpoint.digest}",
        "teacher": _describe(recipe.teacher, run),
        "student": {key: value for key, value in _describe(recipe.student, run).items() if value != []},
        "data": _describe(recipe.data, run),
    }
    if recipe.more_teachers:
        described["more teachers"] = [_describe(spec, run) for spec in recipe.more_teachers]
    if recipe.teacher is not None and teacher is not None:
        described["teacher"]["sha256"] = teacher.digest
    sources: list[tuple[Any, ModelSpec | None]] = [
        (described["teacher"], recipe.teacher),
        (described["student"], recipe.student),
        (described["student"].get("inherit"), recipe.student.inherit),
        *zip(described.get("more teachers", ()), recipe.more_teachers, strict=True),
    ]
    for description, spec in sources:
        folder = model_folder(spec) if spec is not None and spec.model else None
        if folder is not None and (made_by := _read_maker(folder, run)):
            description["made_by"] = made_by
    return described | ({"licence of the data": recipe.data.licence} if recipe.data and recipe.data.licence else {})


def _describe(section: Section | None, run: Path) -> Any:
    if section is None:
        return "none"
    return _relative(section.model_dump(mode="json", exclude_none=True), run)


def _relative(value: Any, run: Path) -> Any:
    """Return a value of a recipe with every absolute path in it relative to the run, and without empty sections."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if inner not in ({}, "") and key not in _OF_A_MACHINE}
        return {key: _relative(inner, run) for key, inner in kept.items()}
    if isinstance(value, list):
        return [_relative(inner, run) for inner in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    parts, start = Path(value).parts, run.resolve().parts
    shared = next((at for at, pair in enumerate(zip(parts, start, strict=False)) if pair[0] != pair[1]), len(start))
    return Path(*[".."] * (len(start) - shared), *parts[shared:]).as_posix()


def _read_maker(folder: Path, run: Path) -> dict[str, Any]:
    """Return the name and the student of the recipe whose run contains a model; empty if it is in no run."""
    path = folder.parent / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        student = {key: value for key, value in recipe["student"].items() if value is not None}
        return {"recipe": recipe["name"], "student": _relative(student, run)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}  # the name is additional; the hash identifies the model
