"""Find, read and override recipes, and make their paths absolute."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolchain.errors import UsageError
from toolchain.recipe.evaluate import EvalSetSpec
from toolchain.recipe.model import CORPUS_SECTIONS, StudentSpec, TeacherSpec
from toolchain.recipe.model_names import SHIPPED, resolve_model, resolve_path
from toolchain.recipe.problems import describe_problems
from toolchain.recipe.recipe import Recipe
from toolchain.user_documents import InvalidDocument, decode_document, parse_yaml


def recipe_path(name: str, recipe_folder: Path | None = None) -> Path:
    """Return the path of a recipe, given an included recipe's name or a path, relative to the recipe that has it.

    Raises:
        UsageError: there is no such recipe.
    """
    names = shipped_recipes()
    if name in names:
        return SHIPPED / f"{name}.yaml"
    path = Path(name) if recipe_folder is None else resolve_path(name, recipe_folder)
    if path.is_file():
        return path
    if name and path.is_dir():
        inside = path / "recipe.yaml"
        advice = f"name this one's recipe: {inside}" if inside.is_file() else "name a file"
        raise UsageError(f"{name}: is a directory; expected a recipe; {advice}")
    last_parts = {shipped.rpartition("/")[2]: shipped for shipped in names}
    near = difflib.get_close_matches(name.rpartition("/")[2], last_parts, 1)
    hint = f"did you mean {last_parts[near[0]]}?" if near else "clipkd recipes lists the included recipes"
    raise UsageError(f"{name}: no included recipe has this name, and no such file exists; {hint}")


def shipped_recipes() -> list[str]:
    """Return the names of the recipes installed with clipkd, with their subfolder if any: paper/vit_t_16."""
    paths = [path.relative_to(SHIPPED) for path in (*SHIPPED.glob("*.yaml"), *SHIPPED.glob("*/*.yaml"))]
    return sorted(path.with_suffix("").as_posix() for path in paths)


def recipe_headlines() -> dict[str, str]:
    """Return the first sentence of the header of each recipe that ships, by name."""
    texts = {name: (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8") for name in shipped_recipes()}
    return {name: text.split("\n#\n")[0].replace("\n", " ").replace("# ", "") for name, text in texts.items()}


def load_recipe(
    path: Path, overrides: list[str] | None = None, *, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """Return a recipe, read and checked as a whole.

    `changes` replaces fields by section, as a command's flags do; `overrides` are `section.field=value` strings and
    are applied after `changes`.

    Raises:
        UsageError: not YAML, a key is written twice, or fields are unknown or wrong; the message lists every problem
            with its path.
    """
    try:
        raw = parse_yaml(decode_document(path.read_bytes()))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe") from None
    except InvalidDocument as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    for section, fields in (changes or {}).items():
        raw[section] = {**(raw.get(section) or {}), **fields}
    for override in overrides or []:
        _apply(raw, override)
    given = ["its flags"] if any((changes or {}).values()) else []
    given += [f"--set {override}" for override in overrides or []]
    return check_recipe(raw, f"{path} with {' '.join(given)}" if given else str(path), path.parent)


def make_adoption_recipe(
    model: str,
    weights: dict[str, str],
    like: Recipe | None,
    overrides: list[str] | None = None,
    vocabulary: Path | None = None,
) -> Recipe:
    """Return a recipe that adopts a model without training it, with the data, quantize, export, evaluate and profile
    sections of `like`.  `vocabulary` is a file of texts, to whose tokens the model's vocabulary is cut.

    Raises:
        UsageError: there is no such model, or it has no weights and none are given.
    """
    sections = ("data", "quantize", "export", "evaluate", "profile")
    taken = {} if like is None else like.model_dump(mode="json", include=set(sections), exclude_none=True)
    student = {"model": model, **(weights or {"init": "weights"})}
    if vocabulary is not None:
        student["vocabulary"] = str(vocabulary)
    raw = {"name": model.rpartition("/")[2], "student": student, **taken}
    for override in overrides or []:
        _apply(raw, override)
    return check_recipe(raw, f"adopting {model}", Path())


def check_recipe(raw: dict[str, Any], where: str, folder: Path) -> Recipe:
    """Return a checked recipe from its sections, whose paths are relative to `folder`; `where` is for messages.

    Raises:
        UsageError: fields are unknown or wrong; the message lists every problem with its path.
    """
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = describe_problems(error.errors(), raw)
        raise UsageError("\n".join([f"{where}: {len(problems)} problem(s)", *problems])) from None
    changes: dict[str, Any] = {"student": _anchor_student(recipe.student, folder)}
    if recipe.teacher is not None:
        changes["teacher"] = _anchor_teacher(recipe.teacher, folder, "teacher")
    changes["more_teachers"] = tuple(_anchor_teacher(spec, folder, "more_teachers") for spec in recipe.more_teachers)
    if recipe.evaluate is not None:
        sets = tuple(_anchor_set(spec, folder) for spec in recipe.evaluate.sets)
        changes["evaluate"] = recipe.evaluate.model_copy(update={"sets": sets})
    if recipe.distill is not None and recipe.distill.teacher_cache is not None:
        cache = recipe.distill.teacher_cache
        also = tuple(resolve_model(spec, folder, "distill.teacher_cache.also") for spec in cache.also)
        cache = cache.model_copy(update={"also": also})
        changes["distill"] = recipe.distill.model_copy(update={"teacher_cache": cache})
    return recipe.model_copy(update=changes)


def teacher_recipe(spec: TeacherSpec) -> Recipe:
    """Return the recipe that trains a loaded recipe's teacher."""
    assert spec.recipe is not None
    return load_recipe(recipe_path(spec.recipe))


def _anchor_student(spec: StudentSpec, folder: Path) -> StudentSpec:
    """Return the student with absolute paths, found relative to the recipe or else to the current folder.

    Raises:
        UsageError: its model, the model that it inherits from, or a file of its vocabulary does not exist.
    """
    spec = resolve_model(spec, folder, "student")
    texts = [name if name in CORPUS_SECTIONS else str(resolve_path(name, folder)) for name in spec.vocabulary]
    for written, path in zip(spec.vocabulary, texts, strict=True):
        if path not in CORPUS_SECTIONS and not Path(path).is_file():
            raise UsageError(
                f"student.vocabulary '{written}': no file at {path}. Expected a file with one text per line, or "
                f"{' or '.join(CORPUS_SECTIONS)}"
            )
    inherit = spec.inherit
    if inherit is not None and not spec.inherits_from_teacher:
        inherit = resolve_model(inherit, folder, "student.inherit")
    return spec.model_copy(update={"inherit": inherit, "vocabulary": tuple(texts)})


def _anchor_teacher(spec: TeacherSpec, folder: Path, role: str) -> TeacherSpec:
    return _anchor_recipe(spec, folder, role) if spec.recipe is not None else resolve_model(spec, folder, role)


def _anchor_recipe(spec: TeacherSpec, recipe_folder: Path, role: str) -> TeacherSpec:
    """Check that a recipe can train a teacher; return it by its included name or by an absolute path.

    Raises:
        UsageError: there is no such recipe, it has errors, or it has a teacher itself.
    """
    assert spec.recipe is not None
    try:
        path = recipe_path(spec.recipe, recipe_folder).resolve()
    except UsageError as error:
        raise UsageError(f"{role}.recipe {error}") from None
    try:
        raw = parse_yaml(decode_document(path.read_bytes()))
    except InvalidDocument:
        raw = None  # load_recipe has the better message
    if isinstance(raw, dict) and raw.get("teacher") is not None:  # before loading, because it may refer to itself
        raise UsageError(
            f"{role}.recipe {spec.recipe}: this recipe has a teacher itself; expected plain contrastive training. "
            f"To distill from its student, run it and write teacher: {{model: runs/NAME}}"
        )
    load_recipe(path)
    return spec if spec.recipe in shipped_recipes() else spec.model_copy(update={"recipe": str(path)})


def _anchor_set(spec: EvalSetSpec, folder: Path) -> EvalSetSpec:
    """Return the same set with absolute paths, found relative to the recipe or else to the current folder."""
    if isinstance(spec, str):
        return spec
    written = {key: getattr(spec, key, None) for key in ("path", "file", "images", "classes", "templates")}
    return spec.model_copy(
        update={key: str(resolve_path(value, folder)) for key, value in written.items() if isinstance(value, str)}
    )


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override}: expected section.field=value, as in --set distill.steps=100")
    section: Any = raw
    for key in keys[:-1]:
        section[key] = section = {} if section.get(key) is None else section[key]
        if not isinstance(section, dict):
            raise UsageError(f"--set {override}: {key} is not a section")
    try:
        section[keys[-1]] = parse_yaml(text)
    except InvalidDocument as error:
        raise UsageError(f"--set {override}: '{text}' is not a YAML value ({error}); quote it for the shell") from None
