"""The samples of a source as they are stored, one by one: for looking at them and packing them, not for training.

Importing this needs no torch.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from toolchain.data.bad_samples import BROKEN_TAR, ZERO_BYTES, UnusableError, readable
from toolchain.data.images import in_rgb, opened, readable_picture
from toolchain.data.listing import Listing, content_of
from toolchain.data.pairing import group_files, pair_files
from toolchain.data.tar_files import Member, captions_in, read_members
from toolchain.errors import ClipkdError

PROGRESS_EVERY = 1000


class Sample(NamedTuple):
    """A picture and what is said of it."""

    where: str
    picture: bytes
    captions: tuple[str, ...]


class Broken(NamedTuple):
    """A sample that cannot be shown."""

    where: str
    reason: str
    """The kind of damage, the same for every sample of the kind: what is counted by."""

    detail: str = ""


Place = Callable[[], Sample | Broken]
"""A sample that has not been read yet; whoever calls it reads it."""


# Webdataset shards


def places_in_shard(path: Path) -> Iterator[Place]:
    """A shard's samples in the order of their first files; then, if it is damaged, what ended it."""
    try:
        members, damage = read_members(path)
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    files_of = group_files(members)
    for key, files in files_of.items():
        yield partial(_read_from_shard, path, key, files)
    if damage:
        yield partial(Broken, str(path), BROKEN_TAR, f"{damage}; samples before that: {len(files_of):,}")


def _read_from_shard(path: Path, key: str, files: dict[str, Member]) -> Sample | Broken:
    where = readable(f"{path}: {key}")
    try:
        pair = pair_files(files)
        with path.open("rb") as file:
            image, caption = _read_member(file, pair.image), _read_member(file, pair.caption)
        return Sample(where, image, captions_in(caption, is_json=pair.is_json))
    except UnusableError as error:
        return Broken(where, error.reason, error.detail)
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None


def _read_member(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size_bytes)


def read_listed(listed: Listing, number: int, *, has_captions: bool) -> Sample | Broken:
    where = listed.where(number)
    try:
        content = content_of(listed.picture(number))
        if not content:
            raise UnusableError(ZERO_BYTES)
        return Sample(where, content, listed.captions(number) if has_captions else ())
    except UnusableError as error:
        return Broken(where, error.reason, readable(error.detail))


# Glyphs


def glyph_places() -> Iterator[Place]:
    from toolchain.data import glyphs

    drawn = glyphs.training_set()
    for number in range(len(drawn.character_N)):
        yield partial(_draw, number)


def _draw(number: int) -> Sample:
    from toolchain.data import glyphs

    drawn = glyphs.training_set()
    (image_HH3,) = glyphs.clean_images(drawn.masks_NSS[number : number + 1])
    encoded = io.BytesIO()
    Image.fromarray(image_HH3).save(encoded, "PNG", compress_level=1)
    name = drawn.names[int(drawn.character_N[number])]
    captions = tuple(template.format(name) for template in glyphs.TEMPLATES)
    return Sample(f"glyph {number}", encoded.getvalue(), captions)


# Pictures


class Looked(NamedTuple):
    """What a picture is, once decoded."""

    format: str
    width: int
    height: int
    small: Image.Image
    """RGB, perhaps at reduced scale."""


def look(sample: Sample, small_px: int) -> Looked | Broken:
    """Decode a picture to its end, as cheaply as its format allows; `small` has at least `small_px` where it can.

    A JPEG is decoded at reduced scale, which still reads all of its data.
    """
    try:
        with readable_picture(sample.picture), opened(sample.picture)[0] as image:
            size, kind = image.size, str(image.format)
            image.draft("RGB", (min(size[0], small_px), min(size[1], small_px)))
            image.load()
            return Looked(kind, *size, in_rgb(image))
    except UnusableError as error:
        return Broken(sample.where, error.reason, error.detail)


def examined(place: Place, small_px: int = 1) -> tuple[Sample, Looked] | Broken:
    """A sample read, and its picture decoded as `look` does; or what is wrong with either."""
    sample = place()
    if isinstance(sample, Broken):
        return sample
    looked = look(sample, small_px)
    return looked if isinstance(looked, Broken) else (sample, looked)
