"""The one rule by which archives' files become samples, and the one list of what is an image."""

import io

import numpy as np
import pytest
from conftest import make_picture
from PIL import ExifTags, Image

from toolchain.data.bad_samples import NO_CAPTION, NO_IMAGE, TOO_LARGE, UNREAD_FORMAT, ZERO_BYTES, UnusableError
from toolchain.data.batch import Geometry
from toolchain.data.file_content import is_unread_suffix
from toolchain.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    SUFFIXES_OF_FORMAT,
    crop_image,
    is_image_name,
)
from toolchain.data.pairing import find_first, group_files, pair_files, split_name
from toolchain.data.tar_files import Member


def members(*names: str) -> list[Member]:
    return [Member(name, offset, 1) for offset, name in enumerate(names)]


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("000.jpg", "000", "jpg"),
        ("a.b/000.seg.PNG", "a.b/000", "seg.png"),
        ("README", "README", ""),
        ("a/._000.jpg", "a/", "_000.jpg"),
    ],
)
def test_a_key_ends_at_the_first_dot(name: str, key: str, suffix: str) -> None:
    assert split_name(name) == (key, suffix)


def test_the_first_file_of_a_kind_counts_and_samples_keep_their_order() -> None:
    listed = members("b.txt", "a.jpg", "b.JPG", "a.jpg", "README", ".hidden", "c/.x", "a.txt")
    samples = group_files(listed)
    assert {key: {suffix: file.offset for suffix, file in files.items()} for key, files in samples.items()} == {
        "b": {"txt": 0, "jpg": 2},
        "a": {"jpg": 1, "txt": 7},
    }
    assert list(samples) == ["b", "a"]
    assert list(group_files(listed, keep_strays=True)) == ["b", "a", "README", "", "c/"]


def test_suffixes_are_tried_in_order() -> None:
    (files,) = group_files(members("a.png", "a.tiff", "a.json", "a.jpeg", "a.txt")).values()
    assert [find_first(files, order) for order in (("webp",), ("tiff", "png"))] == [None, files["tiff"]]
    assert pair_files(files) == (files["jpeg"], files["txt"], False)
    assert pair_files({suffix: files[suffix] for suffix in ("json", "tiff", "png")}) == (
        files["png"],
        files["json"],
        True,
    )


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"txt": 1}, NO_IMAGE),
        ({"1.jpg": 1, "1.txt": 1}, NO_IMAGE),
        ({"heic": 1, "txt": 1}, UNREAD_FORMAT),
        ({"jpg": 0}, ZERO_BYTES),
        ({"jpg": 1 << 32, "txt": 1}, TOO_LARGE),
        ({"jpg": 1}, NO_CAPTION),
        ({"jpg": 1, "txt": 0, "json": 1}, NO_CAPTION),
        ({"jpg": 1, "txt": 1 << 32}, NO_CAPTION),
    ],
)
def test_what_is_no_pair_says_why(sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        pair_files({suffix: Member(f"a.{suffix}", 0, size) for suffix, size in sizes.items()})
    assert caught.value.reason == reason


def test_one_list_says_what_an_image_is() -> None:
    everyday = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm"}
    assert everyday <= set(IMAGE_SUFFIXES)
    assert IMAGE_SUFFIXES[:2] == ("jpg", "jpeg"), "the first that a sample has is shown"
    assert all(is_image_name(f"a.{suffix}") and is_image_name(f"a.{suffix.upper()}") for suffix in IMAGE_SUFFIXES)
    assert not any(map(is_image_name, ("jpg", ".jpg", "a.jpg.txt", "a.", "a.psd")))
    assert set(map(is_unread_suffix, (".HEIC", "psd", ".dng"))) == {True}
    assert not any(map(is_unread_suffix, (".txt", "", *IMAGE_SUFFIXES)))


def test_every_suffix_of_a_format_that_is_read_is_pillows() -> None:
    Image.init()
    by_format = {kind: set[str]() for kind in SUFFIXES_OF_FORMAT}
    for suffix, kind in Image.registered_extensions().items():
        by_format.setdefault(kind, set()).add(suffix.removeprefix("."))
    by_format["JPEG"] |= by_format["MPO"]
    for kind, suffixes in SUFFIXES_OF_FORMAT.items():
        assert set(suffixes) <= by_format[kind], kind


def shown(content: bytes) -> np.ndarray:
    (view,) = crop_image(content, (1.0, 1.0), np.full(40, 0.5), [Geometry(32, "bicubic")])
    return view


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_decoded_for_training(kind: str) -> None:
    picture = make_picture(40, 40, seed=3)
    lossless = encoded(picture, "PNG")
    difference = shown(encoded(picture, kind)).astype(int) - shown(lossless)
    assert np.abs(difference).mean() < (
        0.5 if kind in ("PNG", "BMP", "TIFF", "PPM") else 8
    )  # the others lose something


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_shown_upright_once(orientation: int) -> None:
    picture = make_picture(40, 32, seed=3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    views = [shown(encoded(picture, kind, exif=exif)) for kind in ("TIFF", "PNG")]
    assert np.abs(views[0].astype(int) - views[1]).max() <= 1
