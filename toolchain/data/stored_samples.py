"""Read the stored samples of a source one by one, for inspection and packing; training reads batches instead.

Importing this module needs no torch.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

from PIL import Image

from toolchain.data import glyphs
from toolchain.data.bad_samples import BROKEN_TAR, ZERO_BYTES, LeftOut, UnusableError, to_utf8
from toolchain.data.images import convert_to_rgb, decoding_image, open_image
from toolchain.data.listing import Listing, read_image
from toolchain.data.pairing import ImageTextPair, caption_json_key, group_files, list_unused_images, pair_files
from toolchain.data.tar_files import Member, parse_captions, read_open_members
from toolchain.errors import ClipkdError

PROGRESS_EVERY = 1000


class Sample(NamedTuple):
    """An image and its captions."""

    where: str
    image: bytes
    captions: tuple[str, ...]


class CorruptSample(NamedTuple):
    """A sample that cannot be used."""

    where: str
    reason: str
    """One of `bad_samples.REASONS`; samples are counted by it."""

    detail: str = ""


ReadSample = Callable[[], Sample | CorruptSample]
"""A sample that has not been read yet; calling it reads the sample."""


# Webdataset shards


def list_shard_samples(
    name: str, open_shard: Callable[[], BinaryIO], caption_key: str | None, note: Callable[[LeftOut], None]
) -> Iterator[ReadSample]:
    """Yield a shard's samples in the order of their first files; for a corrupt archive, one corrupt sample follows.

    `note` is called with files that are no samples.
    """
    try:
        with open_shard() as file:
            members, damage = read_open_members(file)
    except UnusableError as error:  # it is remote and cannot be copied
        yield partial(CorruptSample, name, error.reason, error.detail)
        return
    except OSError as error:
        raise ClipkdError(f"{name}: cannot be read: {error.strerror}") from None
    files_of = group_files(members)
    for key, files in files_of.items():
        where = to_utf8(f"{name}: {key}")
        try:
            pair = pair_files(files, prefers_json=caption_key is not None)
        except UnusableError as error:
            yield from [partial(CorruptSample, where, error.reason, error.detail)] * error.number
            continue
        for left in list_unused_images(name, files):
            note(left)
        yield partial(_read_shard_sample, name, open_shard, where, pair, caption_key)
    if damage:
        yield partial(CorruptSample, name, BROKEN_TAR, f"{damage}; samples before that: {len(files_of):,}")


def _read_shard_sample(
    name: str, open_shard: Callable[[], BinaryIO], where: str, pair: ImageTextPair, caption_key: str | None
) -> Sample | CorruptSample:
    try:
        with open_shard() as file:
            image, caption = _read_member(file, pair.image), _read_member(file, pair.caption)
        return Sample(where, image, parse_captions(caption, caption_json_key(caption_key, is_json=pair.is_json)))
    except UnusableError as error:
        return CorruptSample(where, error.reason, error.detail)
    except OSError as error:
        raise ClipkdError(f"{name}: cannot be read: {error.strerror}") from None


def _read_member(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size_bytes)


def read_listed_sample(listed: Listing, number: int, *, has_captions: bool) -> Sample | CorruptSample:
    where = listed.describe(number)
    try:
        content = read_image(listed.image_path(number))
        if not content:
            raise UnusableError(ZERO_BYTES)
        return Sample(where, content, listed.captions(number) if has_captions else ())
    except UnusableError as error:
        return CorruptSample(where, error.reason, to_utf8(error.detail))


# Glyphs


def list_glyph_samples() -> Iterator[ReadSample]:
    drawn = glyphs.training_set()
    for number in range(len(drawn.character_N)):
        yield partial(_draw_glyph, number)


def _draw_glyph(number: int) -> Sample:
    drawn = glyphs.training_set()
    (image_HH3,) = glyphs.clean_images(drawn.masks_NSS[number : number + 1])
    encoded = io.BytesIO()
    Image.fromarray(image_HH3).save(encoded, "PNG", compress_level=1)
    name = drawn.names[int(drawn.character_N[number])]
    captions = tuple(template.format(name) for template in glyphs.TEMPLATES)
    return Sample(f"glyph {number}", encoded.getvalue(), captions)


# Images


class DecodedImage(NamedTuple):
    """An image and the facts in its header."""

    format: str
    width: int
    height: int
    small: Image.Image
    """RGB, possibly at reduced scale."""


def decode_image(sample: Sample, small_px: int) -> DecodedImage | CorruptSample:
    """Decode an image to its end, as cheaply as its format allows; `small` has at least `small_px` if the image does.

    A JPEG is decoded at reduced scale, which still reads all its data.
    """
    try:
        with decoding_image(sample.image), open_image(sample.image)[0] as image:
            size, kind = image.size, str(image.format)
            image.draft("RGB", (min(size[0], small_px), min(size[1], small_px)))
            image.load()
            return DecodedImage(kind, *size, convert_to_rgb(image))
    except UnusableError as error:
        return CorruptSample(sample.where, error.reason, error.detail)


def read_and_decode(read_sample: ReadSample, small_px: int = 1) -> tuple[Sample, DecodedImage] | CorruptSample:
    """Read a sample and decode its image with `decode_image`; return both, or the corrupt sample with its reason."""
    sample = read_sample()
    if isinstance(sample, CorruptSample):
        return sample
    image = decode_image(sample, small_px)
    return image if isinstance(image, CorruptSample) else (sample, image)
