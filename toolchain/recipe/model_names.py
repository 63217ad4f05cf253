"""Names of models: resolve those that a recipe may use, and fingerprint what a stage that uses one depends on.

A model is an architecture and perhaps weights.  The architecture is a folder that ships with clipkd, a folder of one's
own (an open_clip local-dir, or a run of clipkd's), a repository of the Hugging Face Hub, or one that open_clip knows by
name.  The weights lie in that folder or repository, or open_clip's tag or a checkpoint file names them.

Nothing is opened here, and nothing is downloaded: importing this needs neither torch nor numpy nor open_clip, so that
a recipe can be checked, and a finished run recognised, on a device that has none of them.
"""

import difflib
import hashlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from toolchain.errors import UsageError
from toolchain.filesystem import file_sha256
from toolchain.stage import MANIFEST, folder_fingerprint

if TYPE_CHECKING:
    from toolchain.recipe.model import ModelSpec

    Spec = TypeVar("Spec", bound=ModelSpec)

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # of an open_clip local-dir
HUB, LOCAL_DIR = "hf-hub:", "local-dir:"


def anchored(spec: "Spec", recipe_folder: Path, role: str) -> "Spec":
    """The same model by a name or an absolute path, so that a resolved recipe means the same in any folder.

    Names go before paths: write ./ViT-B-16 for a folder of that name.  A path is relative to the recipe or, where there
    is nothing beside that, to the current folder, which is what --set means by one.  `role` is for messages.

    Raises:
        UsageError: nothing of this name is known, or what is there is no model.
    """
    model = _anchor_model(spec.model, recipe_folder, role)
    if spec.pretrained is not None and (model.startswith(HUB) or local_folder(model)):
        raise UsageError(
            f"{role}: pretrained is a tag of open_clip's for an architecture of its own, and {spec.model} is none. "
            f"Remove it (the weights there are used by init: weights), or name a file with {role}.checkpoint"
        )
    changes: dict[str, Any] = {"model": model}
    if spec.checkpoint is not None:
        path = resolved(spec.checkpoint, recipe_folder)
        if not path.is_file():
            raise UsageError(f"{role}.checkpoint '{spec.checkpoint}': no file at {path}{_other_place(path)}")
        changes["checkpoint"] = str(path)
    return spec.model_copy(update=changes)


def model_folder(spec: "ModelSpec") -> Path | None:
    """Return the folder of an anchored model; None: in the Hub, or among open_clip's own."""
    return local_folder(spec.model)


def local_folder(model: str) -> Path | None:
    """The folder of an anchored model's name, if it has one."""
    if model in shipped_models():
        return SHIPPED / model
    return Path(model) if Path(model).is_absolute() else None


def fingerprint(spec: "ModelSpec") -> str:
    """Return what a stage that uses an anchored model depends on: the content of its files, and the names of all else.

    A name stands for what it meant when the stage was made: nothing asks the Hub whether that has changed since.
    """
    folder = model_folder(spec)
    depends = {
        "model": folder_fingerprint(folder) if folder else spec.model,
        "checkpoint": file_sha256(Path(spec.checkpoint)) if spec.checkpoint else None,
        **spec.model_dump(mode="json", exclude={"model", "checkpoint", "recipe"}),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def shipped_models() -> list[str]:
    """Names of the models installed with clipkd."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


@cache
def architectures() -> tuple[str, ...]:
    """Names of the architectures that the installed open_clip knows, read without importing it; none without it."""
    try:
        package = importlib.util.find_spec("open_clip")
    except ModuleNotFoundError:  # what an import hook that hides the package raises
        package = None
    if package is None or package.origin is None:
        return ()
    return tuple(sorted(path.stem for path in Path(package.origin).parent.glob("model_configs/*.json")))


def suggestion(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The nearest known name, whatever its case."""
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
    path = resolved(written, recipe_folder)
    if path.is_dir():
        return str(_folder_of_model(path, role))
    if path.is_file():
        raise UsageError(
            f"{role}.model '{model}': {path} is a file; weights need their architecture. "
            f"Write {role}: {{model: ViT-B-16, checkpoint: {written}}} with theirs in place of ViT-B-16"
        )
    spelled = model.replace("/", "-")  # ViT-B/16, as papers write it and open_clip takes it
    if spelled in architectures():
        return spelled
    if not architectures() and written == model and re.fullmatch(r"[\w.-]+", model) and not model.startswith("."):
        return model  # no open_clip here to know it, and none that could build it
    near = suggestion(spelled, [*shipped_models(), *architectures()])
    hint = f"Did you mean {near}? " if near else ""
    raise UsageError(
        f"{role}.model '{model}': no such model, and no folder at {path}{_other_place(path)}. {hint}"
        f"A model is one that ships ({', '.join(shipped_models())}), "
        f"an architecture of open_clip's (ViT-B-16), {HUB}ORG/NAME, or a folder"
    )


def _folder_of_model(folder: Path, role: str) -> Path:
    """Return the folder of the model that a directory is or holds: a local-dir itself, of a run the student."""
    if (folder / CONFIG).is_file():
        if _stage_kind(folder) == "quantize":
            raise UsageError(
                f"{role}.model: {folder} is an int8 model, which cannot teach or be trained further. "
                f"Name the student it was made from"
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
        f"{role}.model: {folder} has neither {CONFIG} (an open_clip local-dir) nor recipe.yaml (a run of clipkd's)"
    )


def _stage_kind(folder: Path) -> str | None:
    try:
        kind: str | None = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):  # no stage of clipkd's; its manifest, if any, means something else
        return None
    return kind


def resolved(path: str, recipe_folder: Path) -> Path:
    """Return the absolute path of what a recipe names, beside the recipe or else in the current folder."""
    places = [(folder / Path(path).expanduser()).resolve() for folder in (recipe_folder, Path.cwd())]
    return next((place for place in places if place.exists()), places[0])


def _other_place(path: Path) -> str:
    """Return the other place where a path was looked for, for a message."""
    return "" if path.is_relative_to(Path.cwd()) else f", nor in {Path.cwd()}"
