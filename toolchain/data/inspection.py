"""What is in a source of training data: numbers, sizes, lengths, repetitions, damage, and a sheet of pictures."""

import errno
import hashlib
import random
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toolchain.data import caption_lengths
from toolchain.data.open import num_places, places
from toolchain.data.stored_samples import Broken, Looked, Place, examined
from toolchain.errors import UsageError
from toolchain.filesystem import partial_path, replacing
from toolchain.progress import Progress, no_progress
from toolchain.recipe.data import DataSpec

CONTEXT = 77
"""Tokens that CLIP reads of a caption, its start and end among them."""

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_EXAMPLES = 5
_COLUMNS, _ROWS = 8, 5
_CELL_PX, _PICTURE_PX, _TEXT_PX, _LINES, _MARGIN_PX = 176, 160, 12, 3, 8

Document = dict[str, Any]


def inspect(
    spec: DataSpec,
    *,
    sample: int | None = None,
    sheet: Path | None = None,
    progress: Progress = no_progress,
) -> Document:
    """What a source holds, as one document; every picture of it is decoded, or those of `sample` samples by chance.

    The choice is the same each time.  Identical pictures are identical files; of identical captions, pictures may
    differ.  `sheet`: where to write a PNG of some of the pictures.

    Raises:
        UsageError: the sheet cannot be written; or as `toolchain.data.stored_samples.places`.
        ClipkdError: as `toolchain.data.stored_samples.places`.
    """
    if sheet is not None:
        _make_room(sheet)  # before an hour of reading
    total = num_places(spec, progress)
    chosen = set(random.Random(0).sample(range(total), sample)) if sample is not None and sample < total else None
    num_chosen = total if chosen is None else len(chosen)
    shown = set(random.Random(1).sample(range(num_chosen), min(num_chosen, _COLUMNS * _ROWS)))
    unit, length_of = caption_lengths.counter()
    broken: dict[str, list[str]] = defaultdict(list)
    formats: Counter[str] = Counter()
    sizes, lengths, per_sample = [], [], []
    first_picture: dict[bytes, str] = {}
    first_caption: dict[bytes, str] = {}
    same_pictures: list[str] = []
    same_captions: list[str] = []
    cells: list[tuple[Image.Image, str]] = []
    for number, place in enumerate(_chosen(spec, chosen)):
        progress("reading samples", number + 1, num_chosen)
        found = examined(place, _PICTURE_PX if number in shown else 1)
        if isinstance(found, Broken):
            broken[found.reason].append(found.where + (f": {found.detail}" if found.detail else ""))
            continue
        read, looked = found
        formats[looked.format] += 1
        sizes.append((looked.width, looked.height, len(read.picture)))
        lengths += [length_of(caption) for caption in read.captions]
        per_sample.append(len(read.captions))
        _remember(read.picture, read.where, first_picture, same_pictures)
        for caption in read.captions:
            _remember(caption.encode("utf-8", "surrogatepass"), read.where, first_caption, same_captions)
        if number in shown:
            cells.append((_fitted(looked), " / ".join(read.captions)))
    if sheet is not None:
        _write_sheet(sheet, cells)
    size_N3 = np.array(sizes, np.int64).reshape(-1, 3)
    return {
        "samples": total,
        "sampled": None if chosen is None else num_chosen,
        "good": len(sizes),
        "broken": {reason: {"count": len(found), "examples": found[:_EXAMPLES]} for reason, found in broken.items()},
        "formats": dict(formats.most_common()),
        "width": _quantiles(size_N3[:, 0]),
        "height": _quantiles(size_N3[:, 1]),
        "picture_bytes": _quantiles(size_N3[:, 2]) | {"sum": int(size_N3[:, 2].sum())},
        "captions": len(lengths),
        "captions_per_sample": _quantiles(np.array(per_sample, np.int64)),
        "caption_length": {"unit": unit} | _quantiles(np.array(lengths, np.int64)),
        "captions_cut": sum(length > CONTEXT for length in lengths) if unit == "tokens" else None,
        "same_pictures": {"count": len(same_pictures), "examples": same_pictures[:_EXAMPLES]},
        "same_captions": {"count": len(same_captions), "examples": same_captions[:_EXAMPLES]},
        "sheet": None if sheet is None else str(sheet),
    }


def _chosen(spec: DataSpec, chosen: set[int] | None) -> Iterator[Place]:
    return (place for number, place in enumerate(places(spec)) if chosen is None or number in chosen)


def _remember(content: bytes, where: str, first: dict[bytes, str], repeated: list[str]) -> None:
    digest = hashlib.sha256(content).digest()
    if digest in first:
        repeated.append(f"{where} = {first[digest]}")
    else:
        first[digest] = where


def _quantiles(values_N: "np.ndarray[Any, np.dtype[np.int64]]") -> Document:
    """Values at shares of all, each one that occurs; none of nothing."""
    if not len(values_N):
        return {}
    found = np.quantile(values_N, _QUANTILES, method="inverted_cdf").tolist()
    return {f"{share:g}": value for share, value in zip(_QUANTILES, found, strict=True)}


# The sheet


def _fitted(looked: Looked) -> Image.Image:
    """Whole, as large as a cell shows it."""
    scale = _PICTURE_PX / max(looked.small.size)
    size = [max(1, round(scale * side)) for side in looked.small.size]
    return looked.small.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _write_sheet(path: Path, cells: Sequence[tuple[Image.Image, str]]) -> None:
    """Pictures in the order of the source, row by row, each over the beginning of its captions."""
    height_px = _PICTURE_PX + _LINES * (_TEXT_PX + 3) + _MARGIN_PX
    rows = max(1, -(-len(cells) // _COLUMNS))
    page = Image.new("RGB", (_COLUMNS * _CELL_PX + _MARGIN_PX, rows * (height_px + _MARGIN_PX) + _MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=_TEXT_PX)
    for number, (picture, said) in enumerate(cells):
        row, column = divmod(number, _COLUMNS)
        x, y = _MARGIN_PX + column * _CELL_PX, _MARGIN_PX + row * (height_px + _MARGIN_PX)
        page.paste(picture, (x + (_PICTURE_PX - picture.width) // 2, y + (_PICTURE_PX - picture.height) // 2))
        draw.rectangle([x - 1, y - 1, x + _PICTURE_PX, y + _PICTURE_PX], outline=(210, 210, 210))
        for line, words in enumerate(_lines(said, font)):
            draw.text((x, y + _PICTURE_PX + 4 + line * (_TEXT_PX + 3)), words, font=font, fill=(40, 40, 40))
    with replacing(path) as partial:
        page.save(partial, "PNG")


def _make_room(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        raise UsageError(f"--sheet {path}: cannot be written: {error.strerror}. Name another file") from None


def _lines(said: str, font: Any) -> list[str]:
    """The beginning of a text, in as many lines as a cell has, each as wide as it."""
    characters = max(1, int(_PICTURE_PX / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27))
    return textwrap.wrap(said, characters, max_lines=_LINES, placeholder=" ...")
