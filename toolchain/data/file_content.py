"""Name a file's content by its first bytes or its suffix, for messages about files that are not what they should be.

Importing this module needs neither torch nor numpy.
"""

from toolchain.user_documents import GIT_LFS

HEAD_BYTES = 1024
"""Number of bytes that `name_content` needs at most."""

UNREAD_SUFFIXES = (
    "heic", "heif", "hif", "jxl", "psd", "svg", "exr", "hdr", "tga", "ico", "dng", "cr2", "cr3", "nef", "arw", "orf",
    "rw2", "raf", "raw", "pcx", "dds", "eps",
)  # fmt: skip
"""Suffixes of images in formats that are not read; messages name these files as images."""

_STARTS = (
    (GIT_LFS, "a Git LFS pointer in place of the file; fetch the file with: git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip; decompress it with: gunzip"),
    (b"BZh", "compressed with bzip2; decompress it with: bunzip2"),
    (b"\xfd7zXZ\0", "compressed with xz; decompress it with: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it with: unzstd"),
    (b"PK\x03\x04", "a zip archive; unpack it with: unzip"),
    (b"%PDF", "a PDF document"),
    (b"\xff\xfe", "text in UTF-16; save it as UTF-8, for example with: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16; save it as UTF-8, for example with: iconv -f UTF-16 -t UTF-8"),
)
_UTF_16_WITHOUT_MARK = "text in UTF-16 without a mark, or not text at all; save it as UTF-8"
_UNREAD_IMAGES = (
    (b"8BPS", "a Photoshop document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"v/1\x01", "OpenEXR"),
)
_ISO_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF"}


def name_content(head: bytes) -> str:
    """Return a phrase for known content that is neither an image, a tar archive nor UTF-8 text; "" for any other."""
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    text = head[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, which servers send in place of a missing file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    return ""


def name_unread_image(head: bytes) -> str:
    """Return the name of an image format that Pillow does not read here; "" for any other content."""
    for start, name in _UNREAD_IMAGES:
        if head.startswith(start):
            return name
    if head[4:8] == b"ftyp" and head[8:12] in _ISO_BRANDS:
        return _ISO_BRANDS[head[8:12]]
    text = head[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_svg = text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text)
    return "SVG, a drawing without pixels" if is_svg else ""


def is_unread_suffix(suffix: str) -> bool:
    """Return True for the suffix of an image in a format that is not read, with or without its dot."""
    return suffix.lower().removeprefix(".") in UNREAD_SUFFIXES


def name_bad_text(head: bytes) -> str:
    """Return a phrase for content that cannot be UTF-8 text, such as UTF-16; "" for text."""
    found = name_content(head)
    is_utf_16 = 0 < len(head) <= 4 * head.count(b"\0")  # half of the bytes of UTF-16; a stray one costs its row
    return found or (_UTF_16_WITHOUT_MARK if is_utf_16 else "")
