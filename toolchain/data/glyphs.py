"""Draw glyphs: an image-text dataset that needs no download, made from the fonts that Matplotlib installs.

A sample is one named character in one face.  Its caption is the character's Unicode name, so captions are
compositional ("latin capital letter a with circumflex") and thousands of concepts exist.  The training faces are seven
of the DejaVu family.  The zero-shot sets are another family (`stix`), another cut (`serif`) and characters that
training never shows (`novel`).

Fonts: DejaVu (Bitstream Vera and Arev licences, changes in the public domain) and STIX (SIL Open Font Licence 1.1).
They are read from Matplotlib's installation and never copied.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from toolchain.filesystem import replacing, user_cache_folder

TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
)
EVAL_FACES = {"stix": "STIXGeneral", "serif": "DejaVuSerif", "novel": "DejaVuSans"}
TEMPLATES = ("{}", "the character {}", "a drawing of {}")
IMAGE_SIZE = 32

_DRAWN_SIZE = 64  # glyphs are drawn at twice the output size, so one affine warp distorts and antialiases
_EM = 46  # leaves room for the tallest accents and the deepest descenders of a typical face
_BASELINE = 46
_RENDERER = 1  # increase when a drawn bitmap may change


@dataclass(frozen=True)
class Face:
    """The distinct characters of one font file."""

    code_points_N: NDArray[np.int32]
    masks_NSS: NDArray[np.uint8]
    """Ink coverage, 0 to 255; the glyph stands on its baseline and is centred horizontally."""


def name_character(code_point: int) -> str:
    """Return the core of a caption: the character's Unicode name in lower case."""
    return unicodedata.name(chr(code_point)).lower()


def is_novel(code_point: int) -> bool:
    """Return True for characters held out of all training: one in ten, by a hash that no library version changes."""
    return int.from_bytes(hashlib.sha256(str(code_point).encode()).digest(), "big") % 10 == 0


def font_path(face: str) -> Path:
    """Return the path of a face in Matplotlib's installation."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@cache
def fingerprint() -> str:
    """Return a hash of what the data depends on: the font files' bytes and the renderer's version."""
    digest = hashlib.sha256(f"renderer {_RENDERER} freetype {features.version('freetype2')}".encode())
    for face in (*TRAIN_FACES, *EVAL_FACES.values()):
        digest.update(hashlib.sha256(font_path(face).read_bytes()).digest())
    return digest.hexdigest()


def cache_folder() -> Path:
    return user_cache_folder() / f"glyphs-{fingerprint()[:16]}"


@cache
def load_face(face: str) -> Face:
    """Return a face's characters, drawn once per machine and kept in the user's cache folder."""
    path = cache_folder() / f"{face}.npz"
    if not path.exists():
        code_points, masks = _draw_face(font_path(face))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, code_points=code_points, masks=masks)
    with np.load(path) as saved:
        return Face(saved["code_points"], saved["masks"])


def _draw_face(path: Path) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    from matplotlib.ft2font import FT2Font

    font = ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)  # Raqm fails on lone combining marks
    missing = _draw(font, path, chr(0xFFFF))
    first_with: dict[bytes, int] = {}
    for code_point in sorted(FT2Font(path).get_charmap()):
        if unicodedata.name(chr(code_point), "") == "":
            continue
        mask_SS = _draw(font, path, chr(code_point))
        if mask_SS.any() and not np.array_equal(mask_SS, missing):
            first_with.setdefault(mask_SS.tobytes(), code_point)  # identical drawings keep the lowest code point
    shape = (len(first_with), _DRAWN_SIZE, _DRAWN_SIZE)
    masks_NSS = np.frombuffer(b"".join(first_with), np.uint8).reshape(shape)
    return np.array(list(first_with.values()), np.int32), masks_NSS


def _draw(font: ImageFont.FreeTypeFont, path: Path, character: str) -> NDArray[np.uint8]:
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    overflow = max((right - left) / _DRAWN_SIZE, -top / _BASELINE, bottom / (_DRAWN_SIZE - _BASELINE))
    if overflow > 1:  # shrink about the baseline rather than clip
        size = max(1, int(font.size / overflow))
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = font.getbbox(character, anchor="ls")
    image = Image.new("L", (_DRAWN_SIZE, _DRAWN_SIZE))
    x = (_DRAWN_SIZE - (right - left)) // 2 - left
    ImageDraw.Draw(image).text((x, _BASELINE), character, fill=255, font=font, anchor="ls")
    return np.asarray(image)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """All training samples, by index: one character in one face each."""

    masks_NSS: NDArray[np.uint8]
    character_N: NDArray[np.int64]
    """Index into `names`; a batch may contain each only once."""

    names: list[str]


@dataclass(frozen=True)
class EvalSet:
    """A zero-shot set with one clean image per class; class k is `names[k]`."""

    images_KHWC: NDArray[np.uint8]
    names: list[str]


@cache
def training_set() -> TrainingSet:
    faces = [load_face(face) for face in TRAIN_FACES]
    code_points_N = np.concatenate([face.code_points_N for face in faces])
    masks_NSS = np.concatenate([face.masks_NSS for face in faces])
    seen_N = ~np.array([is_novel(code_point) for code_point in code_points_N.tolist()])
    classes_K, character_N = np.unique(code_points_N[seen_N], return_inverse=True)
    return TrainingSet(
        masks_NSS[seen_N], character_N, [name_character(code_point) for code_point in classes_K.tolist()]
    )


@cache
def eval_set(name: str) -> EvalSet:
    """Return the set `stix`, `serif` or `novel`: black on white, undistorted.

    Faces of one family share some drawings; a drawing that is identical to a training sample is excluded.
    """
    face = load_face(EVAL_FACES[name])
    trained = {mask_SS.tobytes() for mask_SS in training_set().masks_NSS}
    wanted_N = np.array(
        [
            is_novel(code_point) == (name == "novel") and mask_SS.tobytes() not in trained
            for code_point, mask_SS in zip(face.code_points_N.tolist(), face.masks_NSS, strict=True)
        ]
    )
    names = [name_character(code_point) for code_point in face.code_points_N[wanted_N].tolist()]
    return EvalSet(clean_images(face.masks_NSS[wanted_N]), names)


def clean_images(masks_KSS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return [K, H, H, 3] glyphs black on white and undistorted, as evaluation shows them."""
    size = _DRAWN_SIZE // 2
    gray_KHH = 255 - masks_KSS.reshape(-1, size, 2, size, 2).mean((2, 4)).round().astype(np.uint8)
    return np.repeat(gray_KHH[..., None], 3, axis=-1)
