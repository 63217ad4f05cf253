"""The samples of a source as they are stored, one by one: for looking at them and packing them, not for training.

Importing this needs no torch.
"""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from toolchain.damage import UnusableError
from toolchain.errors import ClipkdError, UsageError
from toolchain.listings import Listing, content_of, listing
from toolchain.pictures import FORMATS, in_rgb
from toolchain.recipe import (
    DataSpec,
    GlyphsSpec,
    MixtureSpec,
    WebdatasetSpec,
    load_recipe,
    recipe_path,
    shipped_recipes,
)
from toolchain.shard_files import Member, expand, read_members

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
            raise UsageError(f"{error}. For a path or pattern of data, say its kind: --kind webdataset") from None
        if recipe.data is None:
            raise UsageError(f"{source}: this recipe has no data")
        return recipe.data
    if kind == "webdataset":
        return WebdatasetSpec(kind="webdataset", shards=(source,))
    raise UsageError(f"--kind {kind}: a path alone names data of kind webdataset; write a recipe with the rest")


def places(spec: DataSpec) -> Iterator[Place]:
    """Every sample of a source in order; listing them reads no picture.

    Raises:
        UsageError: shards are missing or misnamed.
        ClipkdError: a shard cannot be read.
    """
    if isinstance(spec, GlyphsSpec):
        yield from _glyph_places()
        return
    if isinstance(spec, MixtureSpec):
        for source in spec.sources:
            yield from places(source)
        return
    if not isinstance(spec, WebdatasetSpec):
        yield from _places_of_files(listing(spec))
        return
    for path in expand(spec.shards):
        yield from _places_in_shard(path)


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


# Files


def _places_of_files(files: Listing) -> Iterator[Place]:
    """A listing's samples, then what it left out, of each kind the first one named."""
    for number in range(len(files)):
        yield partial(_read_file, files, number)
    for left in files.left_out:
        for _ in range(left.number):
            yield partial(Broken, left.first, left.reason)


def _read_file(files: Listing, number: int) -> Sample | Broken:
    try:
        return Sample(files.where(number), content_of(files.picture(number)), files.captions(number))
    except UnusableError as error:
        return Broken(files.where(number), error.reason, error.detail)


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
        yield partial(Broken, str(path), "the archive is damaged", f"{damage}; samples before that: {len(files_of):,}")


def _read_from_shard(path: Path, key: str, files: dict[str, Member]) -> Sample | Broken:
    where = f"{path}: {key}".encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # whatever bytes it has
    picture = next((files[kind] for kind in _PICTURES if kind in files), None)
    caption = files.get("txt") or files.get("json")
    if picture is None:
        return Broken(where, "no picture", f"only {', '.join(sorted(files))}")
    if caption is None:
        return Broken(where, "no caption", f"only {', '.join(sorted(files))}")
    try:
        with path.open("rb") as file:
            contents = [_read(file, member) for member in (picture, caption)]
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    if not contents[0]:
        return Broken(where, "the picture's file is empty")
    try:
        return Sample(where, contents[0], captions_of(contents[1], is_json="txt" not in files))
    except ValueError as error:
        return Broken(where, "the caption cannot be read", f"{error}")


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    content: bytes = file.read(member.size_bytes)
    return content


def captions_of(content: bytes, *, is_json: bool) -> tuple[str, ...]:
    """A caption file's captions, stripped, without blank ones.

    Raises:
        ValueError: it is not UTF-8, not JSON, or says nothing.
    """
    said: Any = content.decode("utf-8-sig")
    if is_json:
        record = json.loads(said)
        said = record.get("caption") if isinstance(record, dict) else None
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('"caption" is neither text nor a list of texts')
    captions = tuple(text.strip() for text in texts if text.strip())
    "".join(captions).encode()  # JSON can spell half a character
    if not captions:
        raise ValueError("it is blank")
    return captions


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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(sample.picture), formats=FORMATS) as image:
                size, kind = image.size, str(image.format)
                image.draft("RGB", (min(size[0], small_px), min(size[1], small_px)))
                image.load()
                return Looked(kind, *size, in_rgb(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Broken(sample.where, "the picture is too large", str(error))
    except Exception as error:  # Pillow's decoders raise almost anything on broken bytes
        return Broken(sample.where, "the picture cannot be decoded", f"{error} ({type(error).__name__})")


def examined(place: Place, small_px: int = 1) -> tuple[Sample, Looked] | Broken:
    """A sample read, and its picture decoded as `look` does; or what is wrong with either."""
    sample = place()
    if isinstance(sample, Broken):
        return sample
    looked = look(sample, small_px)
    return looked if isinstance(looked, Broken) else (sample, looked)
