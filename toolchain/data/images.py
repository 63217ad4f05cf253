"""Images: from a file's bytes to the crop that a model is shown.

Importing this needs no torch, with which crops are resized.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from toolchain.data.bad_samples import BROKEN, NOT_AN_IMAGE, TOO_LARGE, TRUNCATED, ZERO_BYTES, UnusableError

if TYPE_CHECKING:
    from toolchain.data.batch import Geometry

SUFFIXES_OF_FORMAT = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
}
"""The formats that training and evaluation read, and the suffixes of their files; the first is the one packing writes.

An image is decoded by its bytes, whatever its name says.  Pillow's other decoders should not see strangers' files."""

FORMATS = tuple(SUFFIXES_OF_FORMAT)
IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF_FORMAT.values() for suffix in suffixes)
"""In lower case, without a dot, in order of preference where a sample has several images."""

_ASPECT = (3 / 4, 4 / 3)  # of the crops' width over height, as in CLIP-KD
_TRIES = 10
_GAP = 2.0  # how much finer than asked for a picture must stay where it is first scaled cheaply: 40 dB (test_shards)
_SCALES = (8, 4, 2)  # 1 / these: at which libjpeg decodes for less

_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_PIXELS = 1 << 26
"""A picture of more is refused by its header: decoded, it takes 4 bytes a pixel, 256 MB in each loader.

A JPEG of one scan may have 64 times as many, as it is decoded, strip by strip, at an eighth of its size."""

CROP_NUMBERS = 4 * _TRIES
"""How many random numbers a crop is drawn from."""


def is_image_name(name: str) -> bool:
    """Return True if a file's name ends in one of `IMAGE_SUFFIXES`."""
    return Path(name).suffix.lower().removeprefix(".") in IMAGE_SUFFIXES


def crop_box(
    width: int, height: int, crop_scale: tuple[float, float], random_R: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """CLIP-KD's random crop (arXiv:2307.12732; torchvision's RandomResizedCrop): left, top, right, bottom in pixels.

    The area is uniform in `crop_scale` of the picture's, the logarithm of the aspect ratio uniform between those of 3:4
    and 4:3, the place uniform.  What does not fit is drawn again, at the tenth time replaced by the largest centred box
    of a permitted ratio.  `random_R` are 4 uniform numbers for each try.
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
    """Return [H, H, 3] the same crop of an image for every geometry, each as if no other had been asked for.

    It is decoded once; again only for a geometry so small that a JPEG gives it enough at a half, quarter or eighth of
    the size, which takes less time.

    Raises:
        UnusableError: it is empty, no picture, damaged, or larger than `MAX_PIXELS`.
    """
    with decoding_image(content):
        return _crop(content, crop_scale, random_R, geometries)


@contextmanager
def decoding_image(content: bytes) -> Iterator[None]:
    """Make an `UnusableError` of whatever Pillow raises for an image's bytes, and silence its warnings."""
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
        raise UnusableError(NOT_AN_IMAGE, f"starts with {content[:8]!r}") from error
    except Exception as error:  # Pillow's decoders raise almost anything on broken bytes
        reason = TRUNCATED if _is_cut(content) or "truncated" in str(error) else BROKEN
        raise UnusableError(reason, f"{error} ({type(error).__name__})") from error


def _is_cut(content: bytes) -> bool:
    """Return True if a file lacks the end that its format marks or announces; TIFF does neither."""
    if content.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in content[-1024:]
    if content.startswith(b"RIFF"):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if content.startswith(b"GIF8"):
        return not content.rstrip(b"\0").endswith(b";")
    if content.startswith(b"BM"):
        return int.from_bytes(content[2:6], "little") > len(content)
    return content.startswith(b"\x89PNG") and b"IEND" not in content[-1024:]


def open_image(content: bytes) -> tuple[Image.Image, int]:
    """Return an image of which only the header was read, and 1 over the scale, 1 to 8, above which it is too large.

    By its size alone and not what is asked for: what is damaged is so for every model.

    Raises:
        UnusableError: it has more than `MAX_PIXELS` at every scale that it can be decoded at.
    """
    if content.startswith(b"\xff\xd8\xff"):  # Pillow's own bound is of the size before it is scaled
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
    """Return True if one scan holds all of a JPEG: of any other, libjpeg keeps every coefficient at any scale."""
    assert isinstance(image, JpegImageFile)
    if image.info.get("progressive") or image.fp is None:
        return False
    header_bytes = 8 + 2 * image.layers  # of a scan of all components, its marker included
    start = image.fp.tell() - header_bytes
    return start > 0 and content[start : start + 2] == b"\xff\xda"


def _crop(
    content: bytes, crop_scale: tuple[float, float], random_R: NDArray[np.float64], geometries: "Sequence[Geometry]"
) -> list[NDArray[np.uint8]]:
    views: list[NDArray[np.uint8]] = []
    decoded: dict[int, Image.Image] = {}
    image, least = open_image(content)
    with image:
        image_size = image.size  # before a draft
        orientation = _read_orientation(image)
        size = image_size[::-1] if orientation in (5, 6, 7, 8) else image_size  # these turn it by a quarter
        box = crop_box(*size, crop_scale, random_R)
        cut_HW4: NDArray[np.uint8] | None = None
        for geometry in geometries:
            scale = 1
            if isinstance(image, JpegImageFile) and orientation == 1:  # turned, a box might fall between scaled pixels
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
    """Return EXIF's orientation; 1 if it cannot be read, which is no damage, or if Pillow turns the image itself."""
    if image.format == "TIFF":
        return 1
    try:
        said = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return said if isinstance(said, int) and said in _TURNS else 1


def cut_box(image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Return [H, W, 4] part of an RGB image, in the four bytes a pixel that Pillow keeps: the quickest way out."""
    left, top, right, bottom = box
    pixels_HW4 = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)
    return pixels_HW4[top:bottom, left:right].copy()  # torch wants to be able to write


def resize(picture_HWC: NDArray[np.uint8], geometry: "Geometry") -> NDArray[np.uint8]:
    """Return [H, H, 3] as Pillow resizes, but for rounding: where a CPU has AVX2, torch takes a seventh of its time.

    Where it has not, the same bits take twice Pillow's.
    """
    import torch
    import torch.nn.functional as F

    picture_1CHW = torch.from_numpy(picture_HWC).permute(2, 0, 1)[None]
    size = (geometry.size, geometry.size)
    view_1CHH = F.interpolate(picture_1CHW, size, mode=geometry.interpolation, antialias=True)
    return view_1CHH[0, :3].permute(1, 2, 0).numpy()


def _resize_between_pixels(image: Image.Image, box: Sequence[float], geometry: "Geometry") -> NDArray[np.uint8]:
    """Return [H, H, 3] a box whose edges lie between pixels, which only Pillow resizes."""
    resampling = Image.Resampling[geometry.interpolation.upper()]
    left, top, right, bottom = box
    size = (geometry.size, geometry.size)
    return np.asarray(image.resize(size, resampling, box=(left, top, right, bottom), reducing_gap=_GAP))


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, what is transparent on white, of 16 bits the upper 8."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
