"""Describe every problem of a recipe, each with its path and a suggestion."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from toolchain.recipe.recipe import Recipe


def describe_problem(problem: Any) -> str:
    """Return one line on a validation error of pydantic."""
    places, known = _walk(problem["loc"])
    where = ".".join(places) or "recipe"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(places[-1], known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"  {where}: unknown key; {hint}"
    if problem["type"] == "union_tag_not_found":
        return f"  {where}.kind: Field required"
    if problem["type"] == "union_tag_invalid":
        kinds = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"  {where}.kind: Input should be {kinds} (got {problem['ctx']['tag']!r})"
    got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"  {where}: {problem['msg'].removeprefix('Value error, ')}{got}"


def _walk(location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """Return a problem's path in the recipe, and the known fields of the section that contains it.

    pydantic's location also contains the `kind` of a section, which is not part of the path in the recipe.
    """
    models: list[Any] = [Recipe]
    places: list[str] = []
    known: list[str] = []
    for part in location:
        kinds = [model for model in models if "kind" in model.model_fields]
        if len(kinds) > 1:
            if isinstance(part, int):  # an index into a list of sections
                places.append(str(part))
                continue
            models = [model for model in kinds if part in get_args(model.model_fields["kind"].annotation)]
            continue
        places.append(str(part))
        known = list(models[0].model_fields) if models else known
        field = models[0].model_fields.get(part) if models else None
        models = _sections(field.annotation) if field else []
    return places, known


def _sections(annotation: Any) -> list[Any]:
    """Return the section types that a field may have, directly or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
