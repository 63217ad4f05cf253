"""Inspect a source of training data: counts, sizes, lengths, duplicates, corrupt samples, and a sheet of images."""

import errno
import hashlib
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toolchain.data import caption_lengths
from toolchain.data.bad_samples import count_passed_over
from toolchain.data.open import count_stored_samples, describe_remote, list_stored_samples
from toolchain.data.stored_samples import CorruptSample, DecodedImage, ReadSample, Sample, read_and_decode
from toolchain.errors import UsageError
from toolchain.filesystem import partial_path, replacing
from toolchain.progress import Progress, no_progress
from toolchain.recipe.data import DataSpec

CONTEXT = 77
"""Number of tokens that CLIP reads of a caption, including the start and end tokens."""

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_EXAMPLES = 5
_COLUMNS, _ROWS = 8, 5
_CELL_PX, _IMAGE_PX, _TEXT_PX, _LINES, _MARGIN_PX = 176, 160, 12, 3, 8

Document = dict[str, Any]


def inspect(
    spec: DataSpec,
    *,
    sample: int | None = None,
    sheet: Path | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> Document:
    """Return a document that describes a source, after decoding every image, or those of `sample` random samples.

    The random choice is the same each time.  Duplicate images are identical files; duplicate captions may belong to
    different images.  `sheet` is the path of a PNG that shows some of the images; `say` reports what is fetched.

    Raises:
        UsageError: the sheet cannot be written; or as for `toolchain.data.open.list_stored_samples`.
        ClipkdError: as for `toolchain.data.open.list_stored_samples`.
    """
    if sheet is not None:
        _check_writable(sheet)  # fail before an hour of reading
    for message in describe_remote(spec):
        say(message)
    total, left_out = count_stored_samples(spec, progress)
    chosen = set(random.Random(0).sample(range(total), sample)) if sample is not None and sample < total else None
    num_chosen = total if chosen is None else len(chosen)
    shown = set(random.Random(1).sample(range(num_chosen), min(num_chosen, _COLUMNS * _ROWS)))
    unit, count_length = caption_lengths.make_counter()
    tally = _Tally(count_length)
    cells: list[tuple[Image.Image, str]] = []
    for number, read_sample in enumerate(_choose(spec, chosen)):
        progress("reading samples", number + 1, num_chosen)
        found = read_and_decode(read_sample, _IMAGE_PX if number in shown else 1)
        if isinstance(found, CorruptSample):
            tally.add_corrupt(found)
            continue
        tally.add(*found)
        if number in shown:
            cells.append((_fit(found[1]), " / ".join(found[0].captions)))
    if sheet is not None:
        _write_sheet(sheet, cells)
    return {
        "samples": total,
        "sampled": None if chosen is None else num_chosen,
        **tally.document(unit),
        "passed_over": count_passed_over(left_out),
        "sheet": None if sheet is None else str(sheet),
    }


def _choose(spec: DataSpec, chosen: set[int] | None) -> Iterator[ReadSample]:
    return (read for number, read in enumerate(list_stored_samples(spec)) if chosen is None or number in chosen)


@dataclass
class _Repeats:
    """Locations of duplicate contents, and the first location of each content."""

    where: list[str] = field(default_factory=list)
    first: dict[bytes, str] = field(default_factory=dict)

    def add(self, content: bytes, where: str) -> None:
        digest = hashlib.sha256(content).digest()
        if digest in self.first:
            self.where.append(f"{where} = {self.first[digest]}")
        else:
            self.first[digest] = where

    def document(self) -> Document:
        return {"count": len(self.where), "examples": self.where[:_EXAMPLES]}


@dataclass
class _Tally:
    """Counts and measurements of the samples read so far."""

    count_length: Callable[[str], int]
    corrupt: dict[str, list[str]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    """Width and height in pixels, and bytes, of each image."""

    lengths: list[int] = field(default_factory=list)
    captions_per_sample: list[int] = field(default_factory=list)
    images: _Repeats = field(default_factory=_Repeats)
    captions: _Repeats = field(default_factory=_Repeats)

    def add_corrupt(self, sample: CorruptSample) -> None:
        where = sample.where + (f": {sample.detail}" if sample.detail else "")
        self.corrupt.setdefault(sample.reason, []).append(where)

    def add(self, sample: Sample, image: DecodedImage) -> None:
        self.formats[image.format] += 1
        self.sizes.append((image.width, image.height, len(sample.image)))
        self.lengths += map(self.count_length, sample.captions)
        self.captions_per_sample.append(len(sample.captions))
        self.images.add(sample.image, sample.where)
        for caption in sample.captions:
            self.captions.add(caption.encode("utf-8", "surrogatepass"), sample.where)

    def document(self, unit: str) -> Document:
        """Return everything but the number of samples; `unit` is the unit of caption lengths."""
        size_N3 = np.array(self.sizes, np.int64).reshape(-1, 3)
        return {
            "good": len(self.sizes),
            "broken": {
                reason: {"count": len(found), "examples": found[:_EXAMPLES]} for reason, found in self.corrupt.items()
            },
            "formats": dict(self.formats.most_common()),
            "width": _quantiles(size_N3[:, 0]),
            "height": _quantiles(size_N3[:, 1]),
            "picture_bytes": _quantiles(size_N3[:, 2]) | {"sum": int(size_N3[:, 2].sum())},
            "captions": len(self.lengths),
            "captions_per_sample": _quantiles(np.array(self.captions_per_sample, np.int64)),
            "caption_length": {"unit": unit} | _quantiles(np.array(self.lengths, np.int64)),
            "captions_cut": sum(length > CONTEXT for length in self.lengths) if unit == "tokens" else None,
            "same_pictures": self.images.document(),
            "same_captions": self.captions.document(),
        }


def _quantiles(values_N: "np.ndarray[Any, np.dtype[np.int64]]") -> Document:
    """Return the quantiles, each a value that occurs; an empty document if there are no values."""
    if not len(values_N):
        return {}
    found = np.quantile(values_N, _QUANTILES, method="inverted_cdf").tolist()
    return {f"{share:g}": value for share, value in zip(_QUANTILES, found, strict=True)}


# The sheet


def _fit(image: DecodedImage) -> Image.Image:
    """Return the whole image, scaled to fit a cell."""
    scale = _IMAGE_PX / max(image.small.size)
    size = [max(1, round(scale * side)) for side in image.small.size]
    return image.small.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _write_sheet(path: Path, cells: Sequence[tuple[Image.Image, str]]) -> None:
    """Write the images row by row in the order of the source, each above the beginning of its captions."""
    height_px = _IMAGE_PX + _LINES * (_TEXT_PX + 3) + _MARGIN_PX
    rows = max(1, -(-len(cells) // _COLUMNS))
    page = Image.new("RGB", (_COLUMNS * _CELL_PX + _MARGIN_PX, rows * (height_px + _MARGIN_PX) + _MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=_TEXT_PX)
    for number, (image, captions) in enumerate(cells):
        row, column = divmod(number, _COLUMNS)
        x, y = _MARGIN_PX + column * _CELL_PX, _MARGIN_PX + row * (height_px + _MARGIN_PX)
        page.paste(image, (x + (_IMAGE_PX - image.width) // 2, y + (_IMAGE_PX - image.height) // 2))
        draw.rectangle([x - 1, y - 1, x + _IMAGE_PX, y + _IMAGE_PX], outline=(210, 210, 210))
        for line, words in enumerate(_wrap(captions, font)):
            draw.text((x, y + _IMAGE_PX + 4 + line * (_TEXT_PX + 3)), words, font=font, fill=(40, 40, 40))
    with replacing(path) as partial:
        page.save(partial, "PNG")


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        raise UsageError(f"--sheet {path}: cannot be written: {error.strerror}. Choose another file") from None


def _wrap(captions: str, font: Any) -> list[str]:
    """Return the beginning of a text, wrapped to the lines and the width of a cell."""
    characters = max(1, int(_IMAGE_PX / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27))
    return textwrap.wrap(captions, characters, max_lines=_LINES, placeholder=" ...")
