"""The samples of a source as they are stored, one by one: for looking at them and packing them, not for training.

Importing this needs no torch.
"""

import io
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from toolchain.damage import BROKEN_TAR, NO_CAPTION, NO_IMAGE, ZERO_BYTES, UnusableError, readable
from toolchain.errors import ClipkdError, UsageError
from toolchain.listings import Listing, content_of, listing
from toolchain.pictures import in_rgb, opened, readable_picture
from toolchain.recipe import (
    DataSpec,
    FileSpec,
    GlyphsSpec,
    ImageFolderSpec,
    ImagesSpec,
    MixtureSpec,
    WebdatasetSpec,
    load_recipe,
    recipe_path,
    shipped_recipes,
)
from toolchain.shard_files import Member, captions_in, expand, read_members

_PROGRESS_EVERY = 1000
_PICTURES = ("jpg", "jpeg", "png", "webp")


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


def source_spec(source: str, kind: str | None) -> DataSpec:
    """The training data of a recipe; or, with a kind, what a path or pattern of that kind names.

    Raises:
        UsageError: there is no such recipe, it has no data, or nothing of this kind is named by a path alone.
    """
    if kind is None:
        try:
            recipe = load_recipe(recipe_path(source))
        except UsageError as error:
            if Path(source).suffix in (".yaml", ".yml") or source in shipped_recipes():
                raise
            raise UsageError(
                f"{error}. For a path or pattern of data, say its kind: --kind webdataset or image_folder"
            ) from None
        if recipe.data is None:
            raise UsageError(f"{source}: this recipe has no data")
        return recipe.data
    if kind == "webdataset":
        return WebdatasetSpec(kind="webdataset", shards=(source,))
    if kind == "image_folder":
        return ImageFolderSpec(kind="image_folder", path=source)
    raise UsageError(
        f"--kind {kind}: a path alone names data of kind webdataset or image_folder; write a recipe with the rest"
    )


def places(spec: DataSpec) -> Iterator[Place]:
    """Every sample of a source in order; listing them reads no picture.

    Of a folder of classes the order is by chance, the same each time: one class after another is no order to train in.
    Sources that are mixed follow each other, each once.

    Raises:
        UsageError: files are missing or misnamed.
        ClipkdError: one cannot be read.
    """
    if isinstance(spec, GlyphsSpec):
        yield from _glyph_places()
    elif isinstance(spec, MixtureSpec):
        for source in spec.sources:
            yield from places(source)
    elif isinstance(spec, WebdatasetSpec):
        for path in expand(spec.shards):
            yield from _places_in_shard(path)
    else:
        yield from _listed_places(spec)


def num_places(spec: DataSpec, progress: Callable[[str, int, int], None]) -> int:
    """How many samples a source has, the broken ones among them.

    Raises:
        UsageError, ClipkdError: as `places`.
    """
    total = 0
    for _ in places(spec):
        total += 1
        if total % _PROGRESS_EVERY == 0:
            progress("listing samples", total, total)
    return total


# Webdataset shards


def _places_in_shard(path: Path) -> Iterator[Place]:
    """A shard's samples in the order of their first files; then, if it is damaged, what ended it."""
    try:
        members, damage = read_members(path)
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    files_of: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        if stem and kind:
            files_of.setdefault(folder + slash + stem, {}).setdefault(kind.lower(), member)
    for key, files in files_of.items():
        yield partial(_read_from_shard, path, key, files)
    if damage:
        yield partial(Broken, str(path), BROKEN_TAR, f"{damage}; samples before that: {len(files_of):,}")


def _read_from_shard(path: Path, key: str, files: dict[str, Member]) -> Sample | Broken:
    where = readable(f"{path}: {key}")
    picture = next((files[kind] for kind in _PICTURES if kind in files), None)
    caption = files.get("txt") or files.get("json")
    if picture is None:
        return Broken(where, NO_IMAGE, f"only {', '.join(sorted(files))}")
    if caption is None:
        return Broken(where, NO_CAPTION, f"only {', '.join(sorted(files))}")
    try:
        with path.open("rb") as file:
            contents = [_read(file, member) for member in (picture, caption)]
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    if not contents[0]:
        return Broken(where, ZERO_BYTES)
    try:
        return Sample(where, contents[0], captions_in(contents[1], is_json="txt" not in files))
    except UnusableError as error:
        return Broken(where, error.reason, error.detail)


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    content: bytes = file.read(member.size_bytes)
    return content


# Files


def _listed_places(spec: FileSpec) -> Iterator[Place]:
    listed = listing(spec)
    order = list(range(len(listed)))
    if isinstance(spec, ImageFolderSpec):
        random.Random(0).shuffle(order)
    for number in order:
        yield partial(_read_listed, listed, number, has_captions=not isinstance(spec, ImagesSpec))
    for left in listed.left_out:
        for number in range(left.number):
            yield partial(Broken, left.examples[number] if number < len(left.examples) else "", left.reason)


def _read_listed(listed: Listing, number: int, *, has_captions: bool) -> Sample | Broken:
    where = listed.where(number)
    try:
        content = content_of(listed.picture(number))
        if not content:
            raise UnusableError(ZERO_BYTES)
        return Sample(where, content, listed.captions(number) if has_captions else ())
    except UnusableError as error:
        return Broken(where, error.reason, readable(error.detail))


# Glyphs


def _glyph_places() -> Iterator[Place]:
    from toolchain import glyphs

    drawn = glyphs.training_set()
    for number in range(len(drawn.character_N)):
        yield partial(_draw, number)


def _draw(number: int) -> Sample:
    from toolchain import glyphs

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
