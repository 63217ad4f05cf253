"""Samples as they come from the web: odd ones that are good, and every sort of damage."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from conftest import jpeg, make_picture
from PIL import Image

from toolchain.data.bad_samples import (
    BAD_JSON,
    BAD_UTF8,
    BROKEN,
    NO_CAPTION,
    NO_IMAGE,
    NOT_AN_IMAGE,
    TOO_LARGE,
    TRUNCATED,
    UNREAD_FORMAT,
    ZERO_BYTES,
)

PICTURE = jpeg(make_picture(60, 50, seed=0))


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, kind, **options)
    return encoded.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG's header, and nothing behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def hostile() -> tuple[dict[str, dict[str, bytes]], dict[str, str]]:
    """Samples by key and kind of file, every sort of damage among good ones; and what is wrong with the damaged."""
    picture = make_picture(64, 48, seed=1)
    pixels_HW3 = np.asarray(picture)
    good = {
        "one_pixel": saved(picture.resize((1, 1)), "JPEG"),
        "cmyk": saved(picture.convert("CMYK"), "JPEG"),
        "palette": saved(picture.quantize(7), "PNG"),
        "sixteen_bits": saved(Image.fromarray(pixels_HW3[..., 0].astype(np.uint16) * 257), "PNG"),
        "gray": saved(picture.convert("L"), "JPEG"),
        "turned": saved(picture, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
        "animated": saved(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
        "progressive": saved(picture, "JPEG", progressive=True),
        "png_called_jpg": saved(picture, "PNG"),
        "gif": saved(picture, "GIF"),
        "bmp": saved(picture, "BMP"),
        "tiff": saved(picture, "TIFF"),
        "avif": saved(picture, "AVIF"),
        "jpeg2000": saved(picture, "JPEG2000"),
        "ppm": saved(picture, "PPM"),
    }
    samples = {key: {"jpg": content, "txt": b"fine"} for key, content in good.items()}
    whole_png = saved(picture, "PNG")
    undecodable = {
        "cut_jpeg": (PICTURE[: len(PICTURE) // 2], TRUNCATED),
        "cut_png": (whole_png[: len(whole_png) // 2], TRUNCATED),
        "cut_webp": (good["animated"][:200], TRUNCATED),
        "text": (b"<html>404 not found</html>", NOT_AN_IMAGE),
        "cut_gif": (good["gif"][: len(good["gif"]) // 2], TRUNCATED),
        "cut_bmp": (good["bmp"][: len(good["bmp"]) // 2], TRUNCATED),
        "cut_header": (PICTURE[:50], TRUNCATED),
        "cut_png_header": (whole_png[:20], TRUNCATED),
        "cut_avif": (good["avif"][: len(good["avif"]) // 2], TRUNCATED),
        "cut_jpeg2000": (good["jpeg2000"][: len(good["jpeg2000"]) // 4], TRUNCATED),
        "cut_ppm": (good["ppm"][:500], TRUNCATED),
        "icon": (saved(picture, "ICO"), NOT_AN_IMAGE),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", NOT_AN_IMAGE),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(200), UNREAD_FORMAT),
        "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', UNREAD_FORMAT),
        "zeros": (bytes(1000), NOT_AN_IMAGE),
        "flipped_png": (whole_png[:60] + bytes([whole_png[60] ^ 255]) + whole_png[61:], BROKEN),
    }
    too_large = {"huge": png_that_claims(20_000, 20_000), "large": png_that_claims(10_000, 10_000)}
    unreadable = {
        "latin1": ("é".encode("latin1"), BAD_UTF8),
        "blank": (b" \n\t", NO_CAPTION),
        "empty": (b"", NO_CAPTION),
    }
    json_unreadable = {
        "list": (b"[1]", NO_CAPTION),
        "number": (b'{"caption": 3}', NO_CAPTION),
        "half": (b'{"caption": "\\ud800"}', BAD_UTF8),
        "open": (b"{", BAD_JSON),
    }
    damaged = {}
    for key, (content, reason) in undecodable.items():
        samples[key], damaged[key] = {"jpg": content, "txt": b"x"}, reason
    for key, content in too_large.items():
        samples[key], damaged[key] = {"png": content, "txt": b"x"}, TOO_LARGE
    for key, (content, reason) in unreadable.items():
        samples[key], damaged[key] = {"jpg": PICTURE, "txt": content}, reason
    for key, (content, reason) in json_unreadable.items():
        samples[key], damaged[key] = {"jpg": PICTURE, "json": content}, reason
    samples["no_bytes"], damaged["no_bytes"] = {"jpg": b"", "txt": b"x"}, ZERO_BYTES
    samples["alone"], damaged["alone"] = {"jpg": PICTURE}, NO_CAPTION
    samples["imagined"], damaged["imagined"] = {"txt": b"x", "json": b"{}"}, NO_IMAGE
    return samples, damaged
