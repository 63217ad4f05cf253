"""Rank labels for images with an exported model; needs no torch."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from export.runtime.exported_model import open_exported
from toolchain.data.class_folders import read_class_name
from toolchain.errors import ArtifactError, ClipkdError, UsageError
from toolchain.text_table import TextTable


def predict(model: Path, images: list[Path], labels: list[str] | None, top: int) -> list[dict[str, Any]]:
    """Return for each image its `top` labels with probabilities, best first.

    If `labels` is None, the labels exported with the model are ranked.

    Raises:
        UsageError: an image is missing or corrupt, or there are no labels.
        ArtifactError: `model` is not an exported model.
        ClipkdError: a feature is NaN or infinite.
    """
    if not (model / "image.onnx").is_file():
        inside = sorted(path.parent for path in model.rglob("image.onnx")) if model.is_dir() else []
        hint = f"it contains: {', '.join(map(str, inside))}" if inside else "make one with: clipkd export RUN"
        raise ArtifactError(f"{model}: no image.onnx; not an exported model; {hint}")
    opened = [_open(path) for path in images]
    encoders = open_exported(model)
    own_labels, own_features_KD = read_classes(model)
    if labels is None and not own_labels:
        raise UsageError(f"{model}: the model was exported without labels; pass some: --labels 'a cat,a dog'")
    labels = None if labels is None else [read_class_name(label) for label in labels]
    label_features_KD = own_features_KD if labels is None else encoders.encode_texts(labels)
    labels = own_labels if labels is None else labels
    probabilities_BK = encoders.compute_probabilities(encoders.encode_images(opened), label_features_KD)
    wrong = [str(path) for path, row_K in zip(images, probabilities_BK, strict=True) if not np.isfinite(row_K).all()]
    if wrong:
        raise ClipkdError(
            f"{model}: its features of {wrong[0]} ({len(wrong)} of {len(images)} images) or of the labels are NaN or "
            "infinite, so there is no answer. Export it in another precision, and see: clipkd evaluate"
        )
    answers = []
    for path, probability_K in zip(images, probabilities_BK, strict=True):
        best = np.argsort(-probability_K, kind="stable")[:top]
        ranked = [{"label": labels[k], "probability": float(probability_K[k])} for k in best.tolist()]
        answers.append({"image": str(path), "labels": ranked})
    return answers


def predictions_table(answers: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return a row for each label, the most probable first; an image is named in its first row."""
    rows = [
        ["" if position else answer["image"], ranked["label"], f"{100 * ranked['probability']:.1f} %"]
        for answer in answers
        for position, ranked in enumerate(answer["labels"])
    ]
    return TextTable(["image", "label", "probability"], rows)


def read_classes(model: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Return the label names and class matrix [K, D] of an exported model.

    Raises:
        ArtifactError: classes.npz is missing or corrupt.
    """
    path = model / "classes.npz"
    try:
        with np.load(path, allow_pickle=False) as classes:
            return classes["names"].tolist(), classes["features_KD"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: missing or corrupt ({error}); export it again: clipkd export RUN") from error


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UsageError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: not a readable image: {error}") from None
