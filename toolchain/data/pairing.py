"""Group the files of a tar archive into samples, and pair images with captions, by webdataset's convention.

A sample's key is the file name up to the first dot of its last part; the suffix is the rest in lower case.  Training,
inspection, packing and evaluation all read archives with these functions.  Importing this module needs no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from toolchain.data.bad_samples import NO_CAPTION, NO_IMAGE, TOO_LARGE, ZERO_BYTES, UnusableError
from toolchain.data.images import IMAGE_SUFFIXES
from toolchain.data.tar_files import Member

CAPTION_SUFFIXES = ("txt", "json")
"""In order of preference."""

_MAX_BYTES = (1 << 32) - 1  # a shard's index stores sizes in 32 bits


class ImageTextPair(NamedTuple):
    """The two files of a training sample."""

    image: Member
    caption: Member
    is_json: bool
    """True if the caption is the "caption" entry of a JSON object."""


def split_name(name: str) -> tuple[str, str]:
    """Return a file name's key and suffix: ("shard/000", "seg.png") for shard/000.SEG.png."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def group_files(members: Iterable[Member], *, keep_strays: bool = False) -> dict[str, dict[str, Member]]:
    """Return each sample's files by suffix, with the samples in the order of their first files.

    If several files have the same name, the first counts.  A file without a suffix, or with nothing before its first
    dot, belongs to no sample and is skipped; with `keep_strays` it counts like any other.
    """
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        key, suffix = split_name(member.name)
        if keep_strays or (suffix and key and not key.endswith("/")):
            samples.setdefault(key, {}).setdefault(suffix, member)
    return samples


def find_first(files: Mapping[str, Member], suffixes: Sequence[str]) -> Member | None:
    """Return a sample's file with the first of these suffixes that it has; None if it has none of them."""
    for suffix in suffixes:
        if suffix in files:
            return files[suffix]
    return None


def pair_files(files: Mapping[str, Member]) -> ImageTextPair:
    """Return the image and the caption of a training sample.

    Raises:
        UnusableError: one of them is missing, empty or too large.
    """
    image, caption = find_first(files, IMAGE_SUFFIXES), find_first(files, CAPTION_SUFFIXES)
    if image is None:
        raise UnusableError(NO_IMAGE, f"only {', '.join(sorted(files))}")
    if image.size_bytes == 0:
        raise UnusableError(ZERO_BYTES)
    if image.size_bytes > _MAX_BYTES:
        raise UnusableError(TOO_LARGE, f"{image.size_bytes:,} bytes")
    if caption is None:
        raise UnusableError(NO_CAPTION, f"only {', '.join(sorted(files))}")
    if caption.size_bytes == 0:
        raise UnusableError(NO_CAPTION, "it is blank")
    if caption.size_bytes > _MAX_BYTES:
        raise UnusableError(NO_CAPTION, f"{caption.size_bytes:,} bytes")
    return ImageTextPair(image, caption, is_json="txt" not in files)
