"""Describe every problem of a recipe, each with its path and a suggestion."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel

from toolchain.recipe.recipe import Recipe

_MAX_CHARACTERS = 100


@dataclass(frozen=True)
class _Place:
    """The place of a problem in the recipe, without the parts that only pydantic has."""

    path: tuple[Any, ...]
    union: tuple[Any, ...] | None
    """Path of the field whose value matches none of several types; None if the field has one type."""


def describe_problems(problems: Iterable[Any], raw: dict[str, Any]) -> list[str]:
    """Return one line for each wrong place; `problems` are pydantic's errors on the sections `raw`.

    A value that matches none of several types has an error for each of them: those that reach farthest into the value
    count, because they are about the type that was meant.
    """
    placed = [
        (_find_place(each, raw), each)
        for each in problems
        if each["type"] != "default_factory_not_called"  # a default that depends on another wrong field
    ]
    farthest: dict[tuple[Any, ...], int] = {}
    for place, _ in placed:
        if place.union is not None:
            farthest[place.union] = max(len(place.path), farthest.get(place.union, 0))
    lines: list[str] = []
    alternatives: dict[tuple[Any, ...], list[Any]] = {}
    for place, problem in placed:
        if place.union is None:
            lines.append(_describe(problem, place.path))
        elif len(place.path) == farthest[place.union]:
            alternatives.setdefault(place.path, []).append(problem)
    for path, tried in alternatives.items():
        messages = [tried[0]["msg"], *(each["msg"].removeprefix("Input should be ") for each in tried[1:])]
        lines.append(_describe(tried[0] | {"msg": " or ".join(messages)}, path))
    return lines


def _describe(problem: Any, path: tuple[Any, ...]) -> str:
    kind, value, message = problem["type"], problem["input"], problem["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, path)) or "recipe"
    if kind == "extra_forbidden":
        known = _known_fields(problem["loc"])
        near = difflib.get_close_matches(str(path[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"  {where}: unknown key; {hint}"
    if kind == "union_tag_not_found":
        return f"  {where}.kind: Field required"
    if kind == "union_tag_invalid":
        kinds = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"  {where}.kind: Input should be {kinds} (got {problem['ctx']['tag']!r})"
    if kind == "invalid_key" or problem["loc"][-1:] == ("[key]",):
        return f"  {where}: Keys should be strings{_explain_type(value)}"
    got = "" if isinstance(value, dict) else f" (got {_shorten(value)})"
    return f"  {where}: {_plain(message)}{got}{_explain_type(value) if kind == 'string_type' else ''}"


def _plain(message: str) -> str:
    return message.replace("valid tuple", "valid list").replace("Tuple should", "List should")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _explain_type(value: Any) -> str:
    """Explain why a word or number without quotes is not text."""
    if isinstance(value, bool):
        words = "yes, on and true" if value else "no, off and false"
        return f"; YAML reads {words} as a boolean, so write a text in quotes"
    if isinstance(value, (int, float, date)):
        return f"; YAML reads it as a {'date' if isinstance(value, date) else 'number'}, so write a text in quotes"
    return ""


def _find_place(problem: Any, raw: dict[str, Any]) -> _Place:
    """Follow a problem's location through what was written.

    Pydantic's location also has the `kind` of a section, and the type that was tried of several.
    """
    value: Any = raw
    path: list[Any] = []
    union: tuple[Any, ...] | None = None
    for number, part in enumerate(problem["loc"], 1):
        if isinstance(value, dict) and part == value.get("kind") and number < len(problem["loc"]):
            value = {key: entry for key, entry in value.items() if key != "kind"} | {"kind": None}
        elif isinstance(value, dict) and part in value:
            path.append(next(key for key in value if key == part))  # a key False is 0 in the location
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        elif problem["type"] == "missing":
            path.append(part)
        elif part != "[key]" and union is None:
            union = tuple(path)
    return _Place(tuple(path), union)


def _known_fields(location: tuple[Any, ...]) -> list[str]:
    """Return the fields of the section that contains a problem's place."""
    models: list[Any] = [Recipe]
    known: list[str] = []
    for part in location:
        kinds = [model for model in models if "kind" in model.model_fields]
        if len(kinds) > 1:
            if not isinstance(part, int):  # not an index into a list of sections
                models = [model for model in kinds if part in get_args(model.model_fields["kind"].annotation)]
            continue
        known = list(models[0].model_fields) if models else known
        field = models[0].model_fields.get(part) if models else None
        models = _sections(field.annotation) if field else []
    return known


def _sections(annotation: Any) -> list[Any]:
    """Return the section types that a field may have, directly or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
