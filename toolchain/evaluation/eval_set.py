"""Define an evaluation set: images, and the classes or captions they are compared with."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from toolchain.data.bad_samples import UnusableError
from toolchain.data.images import FORMATS, decoding_image, open_image
from toolchain.errors import UsageError, quote_start

_CAPTION = ("{}",)  # captions need no template


class ImageFile(NamedTuple):
    """The location of an image's bytes: a file, or part of one."""

    path: Path
    offset: int = 0
    size_bytes: int | None = None
    """None: to the end of the file."""

    member: str = ""
    """Name within an archive."""

    def read(self) -> bytes:
        """Return the image's bytes.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.size_bytes is None else file.read(self.size_bytes)

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Images and texts; those with the same group number in `image_group_N` and `text_group_K` belong together."""

    name: str
    images: Sequence[ImageFile] | NDArray[np.uint8]
    """N images; arrays are uint8 [N, H, W, 3]."""

    texts: list[str]
    """Class names, or captions."""

    templates: tuple[str, ...]
    """Prompt templates, with {} in place of the text."""

    image_group_N: NDArray[np.int64]
    text_group_K: NDArray[np.int64]
    has_classes: bool
    """True if the texts are class names with one group each, False if they are captions."""

    upright: bool = False
    """Apply EXIF orientation.  Published benchmarks ignore it, because their published numbers do."""

    files: tuple[Path, ...] = ()
    """All files the set was read from."""

    repeats_names: bool = False
    """True if two classes may share a name, as in ImageNet; the first of them is then the answer for both."""

    passed_over: Mapping[str, int] = field(default_factory=dict)
    """Number of files beside the images that are none, by suffix."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def one_image_per_class(self) -> bool:
        """True if image k shows class k; retrieval between names and images is then defined."""
        return self.has_classes and np.array_equal(self.image_group_N, self.text_group_K)

    def label(self, index: int) -> str:
        """Return an image's name for messages."""
        if self.one_image_per_class:
            return self.texts[index]
        image = self.images[index]
        return str(image) if isinstance(image, ImageFile) else f"image {index}"  # an array has no name

    def image(self, index: int) -> Image.Image | None:
        """Return an image in RGB; None if it cannot be read."""
        image_file = self.images[index]
        if not isinstance(image_file, ImageFile):
            return Image.fromarray(image_file)
        try:
            content = image_file.read()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                turned = ImageOps.exif_transpose(image) if self.upright else image
                return turned.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's errors for corrupt files
            return None

    def describe_unreadable(self, index: int) -> str:
        """Return an unreadable image's name and the reason, as training names it."""
        image_file = self.images[index]
        assert isinstance(image_file, ImageFile)
        try:
            content = image_file.read()
            with decoding_image(content), open_image(content)[0] as image:
                image.load()
        except UnusableError as error:
            return f"{self.label(index)} ({error.reason}{f': {error.detail}' if error.detail else ''})"
        except OSError as error:
            return f"{self.label(index)} ({error.strerror})"
        return self.label(index)


def classes_set(
    name: str,
    images: Sequence[ImageFile] | NDArray[np.uint8],
    names: Sequence[str],
    templates: Sequence[str],
    label_N: Sequence[int] | NDArray[np.int64] | None = None,
    **more: Any,
) -> EvalSet:
    """Return a set of classes; without labels, image k shows class k.

    Raises:
        UsageError: there are no images, images and names do not match, a template has no {} for the name, or two
            classes have the same name.
    """
    repeats_names = more.get("repeats_names", False)
    if not templates:
        raise UsageError("evaluate: no prompt template; give at least one, with {} in place of the name, such as '{}'")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"evaluate: template {quote_start(template)} has no {{}} in place of the name")
    if label_N is None and (len(images) != len(names) or not names):
        raise UsageError(
            f"evaluate: set {name!r} has {len(images)} images and {len(names)} names, "
            "expected one image per name and at least one"
        )
    label_N = np.arange(len(names)) if label_N is None else np.asarray(label_N, np.int64)
    if not len(images) or not len(names):
        raise UsageError(
            f"evaluate: set {name!r} has {len(images)} images and {len(names)} classes, expected at least one of each"
        )
    twice, count = Counter(names).most_common(1)[0]
    if count > 1 and not repeats_names:  # their scores would always tie, so none could be right
        raise UsageError(
            f"evaluate: set {name!r} has {count} classes named {quote_start(twice)}, expected distinct names"
        )
    wrong_N = (label_N < 0) | (label_N >= len(names))
    if wrong_N.any():
        index = int(np.argmax(wrong_N))
        raise UsageError(
            f"evaluate: set {name!r}: {images[index]} has label {label_N[index]}, expected 0 to {len(names) - 1}"
        )
    return EvalSet(name, images, list(names), tuple(templates), label_N, np.arange(len(names)), True, **more)


def captions_set(
    name: str, images: Sequence[ImageFile] | NDArray[np.uint8], captions_N: Sequence[Sequence[str]], **more: Any
) -> EvalSet:
    """Return a set of images with one or more captions each.

    Raises:
        UsageError: there are no images, or an image has no caption.
    """
    if not len(images):
        raise UsageError(f"evaluate: set {name!r} has no images")
    for image_file, captions in zip(images, captions_N, strict=True):
        if not captions:
            raise UsageError(f"evaluate: set {name!r}: {image_file} has no caption")
    image_of_K = np.repeat(np.arange(len(images)), [len(captions) for captions in captions_N])
    texts = [caption for captions in captions_N for caption in captions]
    return EvalSet(name, images, texts, _CAPTION, np.arange(len(images)), image_of_K, False, **more)
