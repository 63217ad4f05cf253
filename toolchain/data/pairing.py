"""Group the files of a tar archive into samples, and pair images with captions, by webdataset's convention.

A sample's key is the file name up to the first dot of its last part; the suffix is the rest in lower case.  Training,
inspection, packing and evaluation all read archives with these functions.  Importing this module needs no torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from toolchain.data.bad_samples import (
    NO_CAPTION,
    NO_IMAGE,
    TOO_LARGE,
    UNREAD_FORMAT,
    ZERO_BYTES,
    LeftOut,
    UnusableError,
    to_utf8,
)
from toolchain.data.file_content import is_unread_suffix
from toolchain.data.images import IMAGE_SUFFIXES
from toolchain.data.tar_files import Member
from toolchain.errors import name_some

CAPTION_SUFFIXES = ("txt", "json")
"""In order of preference."""

_MAX_BYTES = (1 << 32) - 1  # a shard's index stores sizes in 32 bits


class ImageTextPair(NamedTuple):
    """The two files of a training sample."""

    image: Member
    caption: Member
    is_json: bool
    """True if the caption is an entry of a JSON object."""


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


def pair_files(files: Mapping[str, Member], *, prefers_json: bool = False) -> ImageTextPair:
    """Return the image and the caption of a training sample; a .txt comes before a .json unless `prefers_json`.

    Raises:
        UnusableError: one of them is missing, empty or too large.
    """
    suffixes = CAPTION_SUFFIXES[::-1] if prefers_json else CAPTION_SUFFIXES
    image, caption = find_first(files, IMAGE_SUFFIXES), find_first(files, suffixes)
    if image is None:
        raise explain_missing_image(files)
    if image.size_bytes == 0:
        raise UnusableError(ZERO_BYTES)
    if image.size_bytes > _MAX_BYTES:
        raise UnusableError(TOO_LARGE, f"{image.size_bytes:,} bytes")
    if caption is None:
        raise UnusableError(NO_CAPTION, f"only {name_some(sorted(files))}")
    if caption.size_bytes == 0:
        raise UnusableError(NO_CAPTION, "it is blank")
    if caption.size_bytes > _MAX_BYTES:
        raise UnusableError(NO_CAPTION, f"{caption.size_bytes:,} bytes")
    return ImageTextPair(image, caption, is_json=caption is files.get("json"))


def list_unused_images(archive: Path | str, files: Mapping[str, Member]) -> Iterator[LeftOut]:
    """Yield each further image of a sample of an archive; training shows only the first."""
    used = find_first(files, IMAGE_SUFFIXES)
    for suffix, file in files.items():
        if file is not used and _is_image_suffix(suffix):
            reason = f".{suffix.rpartition('.')[2]} beside the image"
            yield LeftOut(reason, 1, (to_utf8(f"{archive}: {file.name}"),), is_sample=False)


def caption_json_key(caption_key: str | None, *, is_json: bool) -> str | None:
    """Return the key of the caption in a sample's JSON; None if its caption is a text file."""
    return (caption_key or "caption") if is_json else None


def _is_image_suffix(suffix: str) -> bool:
    """Return True for the suffix of an image, read or not; for "seg.png", its last part counts."""
    last = suffix.rpartition(".")[2]
    return last in IMAGE_SUFFIXES or is_unread_suffix(last)


def explain_missing_image(files: Mapping[str, Member]) -> UnusableError:
    """Return the reason that a sample has no image: its format, or dots in the names of several samples."""
    held = f"only {name_some(sorted(files))}"
    unread = [suffix for suffix in files if is_unread_suffix(suffix)]
    if unread:
        return UnusableError(UNREAD_FORMAT, f"{held}; convert .{unread[0]} images, for example to JPEG")
    dotted = sum("." in suffix and _is_image_suffix(suffix) for suffix in files)
    if dotted:
        reason = "a sample's name ends at its first dot, so names with more dots do not pair. Rename them"
        return UnusableError(NO_IMAGE, f"{held}; {reason}", dotted)
    return UnusableError(NO_IMAGE, held)
