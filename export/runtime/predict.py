"""Rank labels for images with an exported model; needs no torch."""

import glob
import io
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.model_folder import name_models
from export.runtime.exported_model import ExportedEncoders, open_exported
from toolchain.data.bad_samples import NO_FILE, UnusableError, count_passed_over, merge_left_out, to_utf8
from toolchain.data.class_folders import read_class_name
from toolchain.data.images import decoding_image
from toolchain.data.listing import list_images, read_image
from toolchain.errors import ArtifactError, UsageError, name_some
from toolchain.progress import Progress, no_progress

_BATCH = 32  # images: bounds the wait for the next answers; larger batches are no faster on a CPU
_WIDEST_NAME = 60  # characters of an image's name that answers are aligned to


class RankedLabel(TypedDict):
    label: str
    probability: float


class Answer(TypedDict):
    """The labels of one image, best first, or the reason why there are none."""

    image: str
    labels: list[RankedLabel]
    error: str | None


class _Classifier(NamedTuple):
    """The opened image tower, and the labels to rank."""

    encoders: ExportedEncoders
    names: list[str]
    features_KD: NDArray[np.float32]


def find_images(given: Sequence[Path]) -> list[Path]:
    """Return the images that files, folders and patterns stand for: `photos`, `photos/*.jpg`, `**/*.png`.

    A folder stands for all images below it, sorted by name. A folder without images, and a pattern or name without a
    file, stay in the list and become rows with that reason.
    """
    found: list[Path] = []
    for path in given:
        is_pattern = glob.has_magic(str(path)) and not path.exists()
        matches = [Path(match) for match in sorted(_glob(str(path)))] if is_pattern else [path]
        images = [image for match in matches for image in (_list_folder(match) if match.is_dir() else [match])]
        found += dict.fromkeys(images) or [path]  # `**` matches a folder and the files in it
    return found


def _list_folder(folder: Path) -> list[Path]:
    return [Path(name) for name in list_images(folder).paths]


def describe_other_files(given: Sequence[Path]) -> str:
    """Return how many files of the given folders are passed over, by suffix; empty if there are none."""
    left_out = (left for path in given if path.is_dir() for left in list_images(path).left_out)
    counts = count_passed_over(merge_left_out(left_out))
    named = name_some(f"{number:,} {suffix}" for suffix, number in counts.items())
    return f"passed over, not images: {named}" if counts else ""


def predict(
    model: Path, images: Sequence[Path], labels: list[str] | None, top: int, progress: Progress = no_progress
) -> Iterator[Answer]:
    """Return an iterator over one answer for each image, in order: its `top` labels with probabilities, best first.

    If `labels` is None, the labels exported with the model are ranked. Images are read and encoded in batches while
    the answers are taken. One that cannot be read has the reason as its answer.

    Raises:
        UsageError: there are no labels, or a label is given twice.
        ArtifactError: `model` is not an exported model.
    """
    if not (model / "image.onnx").is_file():
        raise ArtifactError(f"{model}: no image.onnx; not an exported model; {name_models(model)}")
    labels = None if labels is None else [read_class_name(label) for label in labels]
    repeated = [label for label, count in Counter(labels or []).items() if count > 1]
    if repeated:
        raise UsageError(f"--labels: given twice: {name_some(repeated)}; name each label once")
    own_labels, own_features_KD = read_classes(model)
    if labels is None and not own_labels:
        raise UsageError(f"{model}: the model was exported without labels; pass some: --labels 'a cat,a dog'")
    encoders = open_exported(model)
    if labels is None:
        classifier = _Classifier(encoders, own_labels, own_features_KD)
    else:
        classifier = _Classifier(encoders, labels, encoders.encode_texts(labels))
    return _rank(classifier, images, top, progress)


def answer_lines(answer: Answer, width: int) -> list[str]:
    """Return an answer for people: the image's name in `width` columns, then a line for each label, or the reason."""
    if answer["error"] is not None:
        return [f"{answer['image']:<{width}}  error: {answer['error']}"]
    names = [answer["image"], *[""] * (len(answer["labels"]) - 1)]
    return [
        f"{name:<{width}}  {100 * ranked['probability']:5.1f} %  {ranked['label']}"
        for name, ranked in zip(names, answer["labels"], strict=True)
    ]


def name_width(images: Sequence[Path]) -> int:
    """Return the columns that `answer_lines` needs for the names of images."""
    return min(_WIDEST_NAME, max(len(str(path)) for path in images))


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


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207  # Path.glob refuses absolute patterns


def _rank(classifier: _Classifier, images: Sequence[Path], top: int, progress: Progress) -> Iterator[Answer]:
    encoders, names, features_KD = classifier
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        read = [_read_pixel_values(path, encoders) for path in batch]
        usable = [pixel_values_CHW for pixel_values_CHW in read if not isinstance(pixel_values_CHW, str)]
        rows: Iterator[NDArray[np.float32]] = iter(())
        if usable:
            rows = iter(encoders.compute_probabilities(encoders.encode_pixels(np.stack(usable)), features_KD))
        for path, pixel_values in zip(batch, read, strict=True):
            error, ranked = (pixel_values, []) if isinstance(pixel_values, str) else _best(next(rows), names, top)
            yield {"image": to_utf8(str(path)), "labels": ranked, "error": error}
        progress("images", start + len(batch), len(images))


def _best(probability_K: NDArray[np.float32], names: list[str], top: int) -> tuple[str | None, list[RankedLabel]]:
    """Return the most probable labels, equal ones in their order; or an error if the model returned no numbers."""
    if not np.isfinite(probability_K).all():
        return "the model returns NaN or infinity for this image", []
    best = np.argsort(-probability_K, kind="stable")[:top].tolist()
    return None, [{"label": names[k], "probability": float(probability_K[k])} for k in best]


def _read_pixel_values(path: Path, encoders: ExportedEncoders) -> NDArray[np.float32] | str:
    """Return pixel_values [3, H, W] of an image file, or the reason why it cannot be used."""
    if path.is_dir():
        return "a folder without images"
    if not path.exists():
        return "no file matches this pattern" if glob.has_magic(str(path)) else NO_FILE
    try:
        content = read_image(path)
        with decoding_image(content), Image.open(io.BytesIO(content)) as image:
            image.load()
            return encoders.preprocess(image)
    except UnusableError as error:
        return to_utf8(f"{error.reason}: {error.detail}" if error.detail else error.reason)
    except MemoryError:  # one side is so much longer than the other that no machine can resize the image
        return "too large an image: it does not fit in memory"
