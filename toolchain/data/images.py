"""Turn the bytes of an image file into the crop that a model is shown.

Importing this module needs no torch; only resizing crops does.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from toolchain.data.bad_samples import (
    BROKEN,
    NOT_AN_IMAGE,
    TOO_LARGE,
    TRUNCATED,
    UNREAD_FORMAT,
    ZERO_BYTES,
    UnusableError,
)
from toolchain.data.file_content import name_content, name_unread_image

if TYPE_CHECKING:
    from toolchain.data.batch import Geometry

SUFFIXES_OF_FORMAT = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k", "jpf", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
"""The formats that training and evaluation read, with their file suffixes; packing writes the first suffix.

The format is detected from the bytes, not from the name.  The list is the same on every machine, so the samples of a
folder are, too; where Pillow lacks a decoder, its images are corrupt samples.  Pillow's other decoders, of formats that
nobody trains on, should not see untrusted files.  A change here needs a new `tar_files.PAIRING_VERSION`."""

FORMATS = tuple(
    name for name in SUFFIXES_OF_FORMAT if name != "AVIF" or importlib.util.find_spec("PIL.AvifImagePlugin") is not None
)
IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF_FORMAT.values() for suffix in suffixes)
"""In lower case, without a dot, in order of preference where a sample has several images."""

_ASPECT = (3 / 4, 4 / 3)  # range of a crop's width over height, as in CLIP-KD
_TRIES = 10
_GAP = 2.0  # a cheaply scaled image must stay this much finer than the result: 40 dB (test_webdataset_shards)
_SCALES = (8, 4, 2)  # libjpeg decodes faster at 1 / these sizes

_ANY_HEADER = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # starts of JPEG and PNG, whose headers have any length
_HEADER_BYTES = ((b"GIF8", 13), (b"RIFF", 30))  # starts of GIF and WebP, and the length of their headers

_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_PIXELS = 1 << 26
"""A larger image is refused by its header, because decoding takes 4 bytes per pixel: 256 MB in each loader.

A JPEG with one scan may have 64 times as many pixels, because it is decoded in strips at an eighth of its size."""

CROP_NUMBERS = 4 * _TRIES
"""Number of random numbers that a crop is drawn from."""


def is_image_name(name: str) -> bool:
    """Return True if a file's name ends in one of `IMAGE_SUFFIXES`."""
    return Path(name).suffix.lower().removeprefix(".") in IMAGE_SUFFIXES


def crop_box(
    width: int, height: int, crop_scale: tuple[float, float], random_R: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """Return CLIP-KD's random crop (arXiv:2307.12732; torchvision's RandomResizedCrop): left, top, right, bottom in px.

    The crop's share of the image's area is uniform in `crop_scale`, the logarithm of its aspect ratio is uniform
    between those of 3:4 and 4:3, and its position is uniform.  A crop that does not fit is drawn again.  After ten
    tries, the largest centred box of an allowed ratio is used.  `random_R` has 4 uniform numbers for each try.
    """
    low, high = map(math.log, _ASPECT)
    for area, ratio, x, y in random_R.reshape(_TRIES, 4).tolist():
        target = width * height * (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area)
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * _ASPECT[1])), min(height, round(width / _ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_image(
    content: bytes, crop_scale: tuple[float, float], random_R: NDArray[np.float64], geometries: "Sequence[Geometry]"
) -> list[NDArray[np.uint8]]:
    """Return [H, H, 3] the same crop of an image for every geometry; no result depends on the other geometries.

    The image is decoded once.  It is decoded again only for a geometry so small that a JPEG at a half, quarter or
    eighth of its size is fine enough, which takes less time.

    Raises:
        UnusableError: the file is empty, not an image, corrupt, or larger than `MAX_PIXELS`.
    """
    with decoding_image(content):
        return _crop(content, crop_scale, random_R, geometries)


@contextmanager
def decoding_image(content: bytes) -> Iterator[None]:
    """Convert any error that Pillow raises for an image's bytes into an `UnusableError`, and silence its warnings."""
    if not content:
        raise UnusableError(ZERO_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UnusableError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnusableError(TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise _name_unidentified(content) from error
    except Exception as error:  # Pillow's decoders raise almost anything on corrupt bytes
        reason = TRUNCATED if _is_cut(content) or "truncated" in str(error).lower() else BROKEN
        raise UnusableError(reason, f"{error} ({type(error).__name__})") from error


def _name_unidentified(content: bytes) -> UnusableError:
    """Return the reason that Pillow did not recognize an image: cut within its header, another format, or no image."""
    is_cut = content.startswith(_ANY_HEADER) and _is_cut(content)
    if is_cut or any(content.startswith(start) and len(content) < size for start, size in _HEADER_BYTES):
        return UnusableError(TRUNCATED, f"it ends within its header, at byte {len(content):,}")
    if content[4:8] == b"ftyp" and _is_cut(content):
        return UnusableError(TRUNCATED, f"it ends at byte {len(content):,}")
    unread = name_unread_image(content)
    if unread == "AVIF" and "AVIF" in FORMATS and features.check("avif"):
        return UnusableError(BROKEN, unread)
    if unread:
        return UnusableError(UNREAD_FORMAT, f"{unread}; convert it, for example to JPEG")
    known = name_content(content)
    return UnusableError(NOT_AN_IMAGE, f"it is {known}" if known else f"starts with {content[:8]!r}")


def _is_cut(content: bytes) -> bool:
    """Return True if a file lacks the end marker or the size that its format requires; TIFF has neither."""
    if content.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in content[-1024:]
    if content.startswith(b"RIFF"):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if content.startswith(b"GIF8"):
        return not content.rstrip(b"\0").endswith(b";")
    if content[4:8] in (b"ftyp", b"jP  "):
        return _is_last_box_cut(content)
    if content.startswith(b"BM"):
        return int.from_bytes(content[2:6], "little") > len(content)
    return content.startswith(b"\x89PNG") and b"IEND" not in content[-1024:]


def _is_last_box_cut(content: bytes) -> bool:
    """Return True if an AVIF or JPEG 2000 file ends within one of its boxes, each of which begins with its size."""
    position = 0
    while position < len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size == 0 and position + 4 <= len(content):  # to the end of the file
            return b"\xff\xd9" not in content[-16:] and content[4:8] == b"jP  "
        position += max(size, 8)
    return position > len(content)


def open_image(content: bytes) -> tuple[Image.Image, int]:
    """Return an image after reading only its header, and the least divisor (1, 2, 4, 8) that makes it small enough.

    The divisor depends on the image's size alone, not on the requested geometry, so a sample is corrupt for every model
    or for none.

    Raises:
        UnusableError: it has more than `MAX_PIXELS` at every scale at which it can be decoded.
    """
    if content.startswith(b"\xff\xd8\xff"):  # Pillow's own limit applies to the size before scaling
        image = _open_jpeg(content)
        largest = 8 if _is_decoded_in_strips(image, content) else 1
    else:
        image, largest = Image.open(io.BytesIO(content), formats=FORMATS), 1
    least = next((s for s in (1, 2, 4, 8) if image.width * image.height <= MAX_PIXELS * s**2), 16)
    if least > largest:
        raise UnusableError(TOO_LARGE, f"{image.width} x {image.height} pixels")
    return image, least


def _open_jpeg(content: bytes) -> Image.Image:
    try:
        return JpegImageFile(io.BytesIO(content))
    except Exception as error:  # as Image.open does
        raise UnidentifiedImageError(str(error)) from error


def _is_decoded_in_strips(image: Image.Image, content: bytes) -> bool:
    """Return True if a JPEG has a single scan; for any other, libjpeg keeps every coefficient at any scale."""
    assert isinstance(image, JpegImageFile)
    if image.info.get("progressive") or image.fp is None:
        return False
    header_bytes = 8 + 2 * image.layers  # header of a scan with all components, including its marker
    start = image.fp.tell() - header_bytes
    return start > 0 and content[start : start + 2] == b"\xff\xda"


def _crop(
    content: bytes, crop_scale: tuple[float, float], random_R: NDArray[np.float64], geometries: "Sequence[Geometry]"
) -> list[NDArray[np.uint8]]:
    views: list[NDArray[np.uint8]] = []
    decoded: dict[int, Image.Image] = {}
    image, least = open_image(content)
    with image:
        image_size = image.size  # before `draft` changes it
        orientation = _read_orientation(image)
        size = image_size[::-1] if orientation in (5, 6, 7, 8) else image_size  # rotated by 90 degrees
        box = crop_box(*size, crop_scale, random_R)
        cut_HW4: NDArray[np.uint8] | None = None
        for geometry in geometries:
            scale = 1
            if isinstance(image, JpegImageFile) and orientation == 1:  # a rotated box could fall between scaled pixels
                room = min(box[2] - box[0], box[3] - box[1]) / (_GAP * geometry.size)
                scale = next((scale for scale in _SCALES if scale <= room), 1)
            scale = max(scale, least)
            if scale not in decoded:
                fresh = open_image(content)[0] if decoded else image
                if scale > 1:
                    fresh.draft(None, (image_size[0] // scale, image_size[1] // scale))
                decoded[scale] = convert_to_rgb(fresh if orientation == 1 else fresh.transpose(_TURNS[orientation]))
            if scale == 1:
                if cut_HW4 is None:
                    cut_HW4 = cut_box(decoded[1], box)
                views.append(resize(cut_HW4, geometry))
            else:
                views.append(_resize_between_pixels(decoded[scale], [edge / scale for edge in box], geometry))
    return views


def _read_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation; 1 if it is unreadable (not an error) or if Pillow applies it itself."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def cut_box(image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Return [H, W, 4] part of an RGB image, with the four bytes per pixel that Pillow stores: the fastest copy."""
    left, top, right, bottom = box
    pixels_HW4 = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)
    return pixels_HW4[top:bottom, left:right].copy()  # torch needs writable memory


def resize(image_HWC: NDArray[np.uint8], geometry: "Geometry") -> NDArray[np.uint8]:
    """Return [H, H, 3] resized as Pillow would, up to rounding; with AVX2, torch takes a seventh of Pillow's time.

    Without AVX2 the result has the same bits, in twice Pillow's time.
    """
    import torch
    import torch.nn.functional as F

    image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    size = (geometry.size, geometry.size)
    view_1CHH = F.interpolate(image_1CHW, size, mode=geometry.interpolation, antialias=True)
    return view_1CHH[0, :3].permute(1, 2, 0).numpy()


def _resize_between_pixels(image: Image.Image, box: Sequence[float], geometry: "Geometry") -> NDArray[np.uint8]:
    """Return [H, H, 3] a resized box whose edges lie between pixels, which only Pillow supports."""
    resampling = Image.Resampling[geometry.interpolation.upper()]
    left, top, right, bottom = box
    size = (geometry.size, geometry.size)
    return np.asarray(image.resize(size, resampling, box=(left, top, right, bottom), reducing_gap=_GAP))


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB: transparency over white, 16-bit values reduced to their upper 8 bits."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
