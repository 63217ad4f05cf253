"""Read a model's configuration without torch or open_clip, as far as that is possible before anything is downloaded."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import CONFIG, model_folder
from toolchain.user_documents import InvalidDocument, decode_document, parse_json


def read_model_cfg(spec: ModelSpec) -> dict[str, Any] | None:
    """Return the `model_cfg` of a resolved model with the recipe's changes; None if it is not on this machine."""
    folder = model_folder(spec)
    try:
        if folder is not None:
            content: Any = parse_json(decode_document((folder / CONFIG).read_bytes()))["model_cfg"]
        else:
            package = importlib.util.find_spec("open_clip")
            if package is None or package.origin is None:
                return None
            path = Path(package.origin).parent / "model_configs" / f"{spec.model}.json"
            content = parse_json(decode_document(path.read_bytes()))
    except (OSError, KeyError, InvalidDocument):  # building the model has the better message
        return None
    return merge_config(content, spec.model_cfg)


def merge_config(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` merged in, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge_config(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
