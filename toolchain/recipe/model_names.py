"""Resolve the model names that a recipe may use, and compute the fingerprint of a model for stage keys.

A model is an architecture and optionally weights.  The architecture is a folder included in clipkd, the user's own
folder (an open_clip local-dir or a run directory), a repository of the Hugging Face Hub, or the name of an open_clip
architecture.  The weights are in that folder or repository, or are given by open_clip's tag or a checkpoint file.

This module loads no model and downloads nothing.  Importing it needs neither torch nor numpy nor open_clip, so a device
without them can check a recipe and recognize a finished run.
"""

import difflib
import hashlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from toolchain.errors import UsageError
from toolchain.filesystem import file_sha256
from toolchain.recipe.model import CORPUS_SECTIONS, ModelSpec, StudentSpec
from toolchain.stage import MANIFEST, folder_fingerprint

Spec = TypeVar("Spec", bound=ModelSpec)

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # of an open_clip local-dir
INT8_CONFIG = "nncf.json"  # of an int8 checkpoint: the places of its quantizers
HUB, LOCAL_DIR = "hf-hub:", "local-dir:"


def resolve_model(spec: Spec, recipe_folder: Path, role: str) -> Spec:
    """Return the model with a known name or an absolute path, so a resolved recipe means the same in any folder.

    Names take precedence over paths: write ./ViT-B-16 for a folder of that name.  A path is relative to the recipe or,
    if nothing exists there, to the current folder, as in --set.  `role` is for messages.

    Raises:
        UsageError: the name is unknown, or the path is not a model.
    """
    model = _anchor_model(spec.model, recipe_folder, role)
    if spec.pretrained is not None and (model.startswith(HUB) or local_folder(model)):
        raise UsageError(
            f"{role}.pretrained is a tag for open_clip's architectures, and {spec.model} is not one of them. "
            f"Remove pretrained (init: weights uses the weights of {spec.model}), or give a file as {role}.checkpoint"
        )
    changes: dict[str, Any] = {"model": model}
    if spec.checkpoint is not None:
        path = resolve_path(spec.checkpoint, recipe_folder)
        if not path.is_file():
            raise UsageError(f"{role}.checkpoint '{spec.checkpoint}': no file at {path}{_other_place(path)}")
        changes["checkpoint"] = str(path)
    return spec.model_copy(update=changes)


def model_folder(spec: ModelSpec) -> Path | None:
    """Return the folder of a resolved model; None if it is in the Hub or an open_clip architecture."""
    return local_folder(spec.model)


def local_folder(model: str) -> Path | None:
    """Return the folder of a resolved model name; None if it has none."""
    if model in shipped_models():
        return SHIPPED / model
    return Path(model) if Path(model).is_absolute() else None


def fingerprint(spec: ModelSpec) -> str:
    """Return a hash of a resolved model for stage keys: of its files' content, and of the names of everything else.

    A repository on the Hub enters by name only: a later change to it is not noticed.
    """
    folder = model_folder(spec)
    depends = {
        "model": folder_fingerprint(folder) if folder else spec.model,
        "checkpoint": file_sha256(Path(spec.checkpoint)) if spec.checkpoint else None,
        **spec.model_dump(
            mode="json", exclude={"model", "checkpoint", "recipe", "inherit", "vocabulary", "text_tower"}
        ),
    }
    if isinstance(spec, StudentSpec):  # these fields came after the first release: absent, they leave no trace
        if spec.inherit is not None:
            depends["inherit"] = spec.inherit.model if spec.inherits_from_teacher else fingerprint(spec.inherit)
        if spec.vocabulary:
            texts = spec.vocabulary
            depends["vocabulary"] = [name if name in CORPUS_SECTIONS else file_sha256(Path(name)) for name in texts]
        if spec.has_teachers_text:
            depends["text_tower"] = "teacher"
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def shipped_models() -> list[str]:
    """Return the names of the models installed with clipkd."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


@cache
def architectures() -> tuple[str, ...]:
    """Return the architecture names of the installed open_clip without importing it; empty if it is not installed."""
    try:
        package = importlib.util.find_spec("open_clip")
    except ModuleNotFoundError:  # raised by an import hook that hides the package
        package = None
    if package is None or package.origin is None:
        return ()
    return tuple(sorted(path.stem for path in Path(package.origin).parent.glob("model_configs/*.json")))


def suggestion(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """Return the most similar known name, ignoring case; None if none is similar."""
    folded = {entry.casefold(): entry for entry in known}
    near = difflib.get_close_matches(name.casefold(), folded, 1)
    return folded[near[0]] if near else None


def _anchor_model(model: str, recipe_folder: Path, role: str) -> str:
    if model in shipped_models() or model in architectures():
        return model
    if model.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model.removeprefix(HUB)):
            raise UsageError(f"{role}.model '{model}': expected {HUB}ORG/NAME")
        return model
    written = model.removeprefix(LOCAL_DIR)
    path = resolve_path(written, recipe_folder)
    if path.is_dir():
        return str(_folder_of_model(path, role))
    if path.is_file():
        raise UsageError(
            f"{role}.model '{model}': {path} is a file of weights; expected a model or a folder. "
            f"Write {role}: {{model: ViT-B-16, checkpoint: {written}}} with its architecture instead of ViT-B-16"
        )
    spelled = model.replace("/", "-")  # papers write ViT-B/16, and open_clip accepts it
    if spelled in architectures():
        return spelled
    if not architectures() and written == model and re.fullmatch(r"[\w.-]+", model) and not model.startswith("."):
        return model  # open_clip is not installed, so the name cannot be checked
    near = suggestion(spelled, [*shipped_models(), *architectures()])
    hint = f"Did you mean {near}? " if near else ""
    raise UsageError(
        f"{role}.model '{model}': no such model, and no folder at {path}{_other_place(path)}. {hint}"
        f"Expected an included model ({', '.join(shipped_models())}), "
        f"an open_clip architecture (ViT-B-16), {HUB}ORG/NAME, or a folder"
    )


def _folder_of_model(folder: Path, role: str) -> Path:
    """Return the model's folder: the given folder if it is a local-dir, the student's folder if it is a run."""
    if (folder / CONFIG).is_file():
        if _stage_kind(folder) == "quantize":
            raise UsageError(
                f"{role}.model: {folder} is an int8 model, which cannot be a teacher or be trained further. "
                f"Give the student it was quantized from"
            )
        return folder
    if (folder / "recipe.yaml").is_file():
        student = folder / "student"
        if (student / CONFIG).is_file():
            return student
        raise UsageError(
            f"{role}.model: the run {folder} has no student yet. "
            f"Make it with: clipkd distill {folder / 'recipe.yaml'} --out {folder}"
        )
    raise UsageError(
        f"{role}.model: {folder} has neither {CONFIG} (an open_clip local-dir) nor recipe.yaml (a run directory)"
    )


def _stage_kind(folder: Path) -> str | None:
    try:
        kind: str | None = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):  # not a stage of clipkd; a manifest of another program may exist
        return None
    return kind


def resolve_path(path: str, recipe_folder: Path) -> Path:
    """Return the absolute path of a path in a recipe: relative to the recipe or else to the current folder."""
    places = [(folder / Path(path).expanduser()).resolve() for folder in (recipe_folder, Path.cwd())]
    return next((place for place in places if place.exists()), places[0])


def _other_place(path: Path) -> str:
    """Return the second folder that was searched for a path, for a message."""
    return "" if path.is_relative_to(Path.cwd()) else f", nor in {Path.cwd()}"
