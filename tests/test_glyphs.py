"""The embedded data set: what is in it, what is kept out of it, and what it reads and writes."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import ft2font
from PIL import ImageFont

from toolchain.data import glyphs

FACES = tuple(dict.fromkeys((*glyphs.TRAIN_FACES, *glyphs.EVAL_FACES.values())))
EACH_FACE = pytest.mark.parametrize("face", FACES)
EACH_SET = pytest.mark.parametrize("set_name", glyphs.EVAL_FACES)

MIN_TRAINING_NAMES = 4000  # the design promises thousands of concepts; DejaVu 2.37 gives 5,127
MIN_EVAL_CLASSES = {"stix": 2000, "serif": 1_800, "novel": 400}  # below 2,915, 1,936 and 506
NOVEL_SHARE = (0.08, 0.12)  # of one in ten: four standard deviations of a fair hash over 5,000 characters

CACHED = (glyphs.fingerprint, glyphs.load_face, glyphs.training_set, glyphs.eval_set)


def forget() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def drawn_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every face drawn by the code under test, not taken from what an earlier version left on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        forget()
        yield
    forget()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_here: None) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def one_small_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Face files with 40 characters, so that a test can afford to draw them again and again."""
    full = ft2font.FT2Font

    class Small:
        def __init__(self, path: Path) -> None:
            self.charmap = dict(sorted(full(path).get_charmap().items())[:40])

        def get_charmap(self) -> dict[int, int]:
            return self.charmap

    monkeypatch.setattr(ft2font, "FT2Font", Small)


def code_points(names: list[str]) -> list[int]:
    return [ord(unicodedata.lookup(name)) for name in names]


# What is in it.


def test_training_and_evaluation_sets_are_not_small() -> None:
    assert len(glyphs.training_set().names) > MIN_TRAINING_NAMES
    assert glyphs.EVAL_FACES.keys() == MIN_EVAL_CLASSES.keys()
    assert not [name for name, least in MIN_EVAL_CLASSES.items() if len(glyphs.eval_set(name).names) <= least]


@pytest.mark.parametrize("name", glyphs.EVAL_FACES)
def test_no_evaluation_drawing_is_a_training_drawing(name: str) -> None:
    trained = {mask_SS.tobytes() for mask_SS in glyphs.training_set().masks_NSS}
    code_point_of = {
        glyphs.name_character(c): c for c in glyphs.load_face(glyphs.EVAL_FACES[name]).code_points_N.tolist()
    }
    face = glyphs.load_face(glyphs.EVAL_FACES[name])
    masks = dict(zip(face.code_points_N.tolist(), face.masks_NSS, strict=True))
    assert not [n for n in glyphs.eval_set(name).names if masks[code_point_of[n]].tobytes() in trained]


def test_training_set_has_a_mask_a_character_and_a_name_for_every_sample() -> None:
    samples = glyphs.training_set()
    num_samples = sum(len(glyphs.load_face(face).code_points_N) for face in glyphs.TRAIN_FACES)
    num_novel = sum(sum(map(glyphs.is_novel, glyphs.load_face(face).code_points_N)) for face in glyphs.TRAIN_FACES)
    assert len(samples.masks_NSS) == len(samples.character_N) == num_samples - num_novel
    assert samples.masks_NSS.dtype == np.uint8
    assert np.array_equal(np.unique(samples.character_N), np.arange(len(samples.names)))
    assert len(set(samples.names)) == len(samples.names)


def test_training_sample_is_the_bitmap_of_the_character_it_is_called() -> None:
    samples = glyphs.training_set()
    known = {}
    for face in map(glyphs.load_face, glyphs.TRAIN_FACES):
        for code_point, mask_SS in zip(face.code_points_N.tolist(), face.masks_NSS, strict=True):
            known.setdefault(glyphs.name_character(code_point), set()).add(mask_SS.tobytes())
    for i in range(0, len(samples.character_N), 97):
        assert samples.masks_NSS[i].tobytes() in known[samples.names[samples.character_N[i]]]


@EACH_SET
def test_evaluation_set_has_one_image_for_each_name(set_name: str) -> None:
    evaluated = glyphs.eval_set(set_name)
    assert evaluated.images_KHWC.shape == (len(evaluated.names), glyphs.IMAGE_SIZE, glyphs.IMAGE_SIZE, 3)
    assert evaluated.images_KHWC.dtype == np.uint8
    assert len(set(evaluated.names)) == len(evaluated.names)
    distinct = {image.tobytes() for image in evaluated.images_KHWC}
    assert len(distinct) == len(evaluated.names), "two names of one set have the same image: one of them must be wrong"


@EACH_SET
def test_evaluation_images_are_black_ink_on_white_paper(set_name: str) -> None:
    images_KHWC = glyphs.eval_set(set_name).images_KHWC
    assert (images_KHWC == images_KHWC[..., :1]).all()
    assert (images_KHWC.max((1, 2, 3)) == 255).all()
    assert images_KHWC.min((1, 2, 3)).max() < 128, "a glyph without any ink darker than half"
    assert images_KHWC.mean() > 128


# What is kept out of it.


def test_no_novel_character_is_in_training() -> None:
    assert not [hex(x) for x in code_points(glyphs.training_set().names) if glyphs.is_novel(x)]
    assert set(glyphs.eval_set("novel").names).isdisjoint(glyphs.training_set().names)


@pytest.mark.parametrize("set_name", ["stix", "serif"])
def test_no_novel_character_is_in_the_other_sets(set_name: str) -> None:
    assert not [hex(x) for x in code_points(glyphs.eval_set(set_name).names) if glyphs.is_novel(x)]


def test_the_novel_set_holds_every_novel_character_of_its_face() -> None:
    face = glyphs.load_face(glyphs.EVAL_FACES["novel"])
    assert code_points(glyphs.eval_set("novel").names) == [x for x in face.code_points_N if glyphs.is_novel(x)]
    assert NOVEL_SHARE[0] < len(glyphs.eval_set("novel").names) / len(face.code_points_N) < NOVEL_SHARE[1]


@pytest.mark.parametrize(
    ("character", "sha256_of_code_point"),  # the output of `printf 72 | sha256sum`
    [
        ("H", "8722616204217eddb39e7df969e0698aed8e599ba62ed2de1ce49b03ade0fede"),
        ("i", "1253e9373e781b7500266caa55150e08e210bc8cd8cc70d89985e3600155e860"),
        ("A", "108c995b953c8a35561103e2014cf828eb654a99e310f87fab94c2f4b7d2a04f"),
        ("\N{LEFTWARDS ARROW}", "1724d7333046d2818a4a1b1edf16da3e4af6ff939f16f790f3d787909db9194d"),
    ],
)
def test_novel_is_decided_by_the_sha256_of_the_decimal_code_point(character: str, sha256_of_code_point: str) -> None:
    """A change here would move characters between the sets, under the weights that were trained on the old ones."""
    assert glyphs.is_novel(ord(character)) == (int(sha256_of_code_point, 16) % 10 == 0)
    assert glyphs.is_novel(ord(character)) == (character in "Hi")


@EACH_FACE
def test_face_holds_each_bitmap_once(face: str) -> None:
    loaded = glyphs.load_face(face)
    assert len({mask.tobytes() for mask in loaded.masks_NSS}) == len(loaded.masks_NSS) == len(loaded.code_points_N)
    assert (np.diff(loaded.code_points_N) > 0).all()


def test_of_look_alikes_the_lowest_code_point_stays() -> None:
    """DejaVu draws Latin, Greek and Cyrillic capitals A alike."""
    kept = set(glyphs.load_face("DejaVuSans").code_points_N.tolist())
    assert ord("A") in kept
    assert kept.isdisjoint({ord("\N{GREEK CAPITAL LETTER ALPHA}"), ord("\N{CYRILLIC CAPITAL LETTER A}")})


def claim_characters(monkeypatch: pytest.MonkeyPatch, characters: str) -> None:
    """Make every font file claim to hold these, in this order."""

    class Claiming:
        def __init__(self, path: Path) -> None:
            pass

        def get_charmap(self) -> dict[int, int]:
            return {ord(character): 1 for character in characters}

    monkeypatch.setattr(ft2font, "FT2Font", Claiming)


def test_look_alikes_are_found_whatever_the_order_of_the_font_file(monkeypatch: pytest.MonkeyPatch) -> None:
    claim_characters(monkeypatch, "\u0412\u0410\u0392\u0391BA")  # Cyrillic, Greek, Latin
    code_points_N, masks_NSS = glyphs._draw_face(glyphs.font_path("DejaVuSans"))
    assert code_points_N.tolist() == [ord("A"), ord("B")]
    assert masks_NSS.shape == (2, 64, 64)


def test_character_drawn_as_the_missing_glyph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    claim_characters(monkeypatch, "A\u4e00")  # DejaVu has no Chinese
    code_points_N, _ = glyphs._draw_face(glyphs.font_path("DejaVuSans"))
    assert code_points_N.tolist() == [ord("A")]


@EACH_FACE
def test_blank_glyphs_are_gone(face: str) -> None:
    loaded = glyphs.load_face(face)
    assert loaded.masks_NSS.any((1, 2)).all()
    assert {ord(" "), ord("\N{NO-BREAK SPACE}"), ord("\N{EM SPACE}")}.isdisjoint(loaded.code_points_N.tolist())


@EACH_FACE
def test_the_missing_glyph_is_gone(face: str) -> None:
    path = glyphs.font_path(face)
    font = ImageFont.truetype(path, glyphs._EM, layout_engine=ImageFont.Layout.BASIC)
    absent = next(x for x in range(0x4E00, 0x4F00) if x not in ft2font.FT2Font(path).get_charmap())
    box_SS = glyphs._draw(font, path, chr(absent))
    assert box_SS.any() or face == "STIXGeneral", "the box to look for should be there to see; STIX draws nothing"
    assert not (glyphs.load_face(face).masks_NSS == box_SS).all((1, 2)).any()


@EACH_FACE
def test_every_character_has_a_name(face: str) -> None:
    assert all(unicodedata.name(chr(x), "") for x in glyphs.load_face(face).code_points_N.tolist())


# What it reads and writes.


def test_only_the_listed_font_files_are_opened(
    empty_cache: Path, one_small_face: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[str] = set()
    truetype, small = ImageFont.truetype, ft2font.FT2Font

    def recorded_truetype(font: Path, *args: object, **options: object) -> ImageFont.FreeTypeFont:
        opened.add(str(font))
        return truetype(font, *args, **options)

    def recorded_ft2font(path: Path) -> object:
        opened.add(str(path))
        return small(path)

    monkeypatch.setattr(ImageFont, "truetype", recorded_truetype)
    monkeypatch.setattr(ft2font, "FT2Font", recorded_ft2font)
    glyphs.training_set()
    assert opened == {str(glyphs.font_path(face)) for face in glyphs.TRAIN_FACES}
    assert not any("STIX" in path for path in opened), "training may not see the family that it is measured on"
    for set_name in glyphs.EVAL_FACES:
        glyphs.eval_set(set_name)
    assert opened == {str(glyphs.font_path(face)) for face in FACES}


def test_cache_is_written_whole_and_read_again(
    empty_cache: Path, one_small_face: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = glyphs.load_face("DejaVuSans")
    folder = empty_cache / "clipkd" / f"glyphs-{glyphs.fingerprint()[:16]}"
    assert [path.name for path in folder.iterdir()] == ["DejaVuSans.npz"], "a partial file stayed, or a name changed"
    glyphs.load_face.cache_clear()
    monkeypatch.setattr(glyphs, "_draw_face", lambda path: pytest.fail(f"{path} was drawn although it is cached"))
    read = glyphs.load_face("DejaVuSans")
    assert np.array_equal(read.code_points_N, drawn.code_points_N)
    assert np.array_equal(read.masks_NSS, drawn.masks_NSS)


def test_interrupted_write_leaves_no_cache_entry(
    empty_cache: Path, one_small_face: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file, **arrays: object) -> None:
        file.write(b"PK\x03\x04 half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            glyphs.load_face("DejaVuSans")
    assert not list(empty_cache.rglob("*.npz"))
    assert len(glyphs.load_face("DejaVuSans").code_points_N) > 0


def test_drawing_twice_gives_the_same_bytes(one_small_face: None) -> None:
    path = glyphs.font_path("STIXGeneral")
    first, second = glyphs._draw_face(path), glyphs._draw_face(path)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


@pytest.fixture
def fonts_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of made font files, which `fingerprint` reads as bytes only."""
    for face in FACES:
        (tmp_path / face).write_bytes(face.encode())
    monkeypatch.setattr(glyphs, "font_path", lambda face: tmp_path / face)
    glyphs.fingerprint.cache_clear()
    yield tmp_path
    glyphs.fingerprint.cache_clear()


def test_fingerprint_is_stable(fonts_in: Path) -> None:
    first = glyphs.fingerprint()
    glyphs.fingerprint.cache_clear()
    assert glyphs.fingerprint() == first


@EACH_FACE
def test_fingerprint_changes_with_a_byte_of_any_font(fonts_in: Path, face: str) -> None:
    before = glyphs.fingerprint()
    folder = glyphs.cache_folder()
    with (fonts_in / face).open("ab") as file:
        file.write(b"\0")
    glyphs.fingerprint.cache_clear()
    assert glyphs.fingerprint() != before
    assert glyphs.cache_folder() != folder


def test_fingerprint_changes_with_the_renderer(fonts_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = glyphs.fingerprint()
    monkeypatch.setattr(glyphs, "_RENDERER", glyphs._RENDERER + 1)
    glyphs.fingerprint.cache_clear()
    assert glyphs.fingerprint() != before


def test_fingerprint_of_two_swapped_fonts_differs(fonts_in: Path) -> None:
    before = glyphs.fingerprint()
    first, second = (fonts_in / face for face in FACES[:2])
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)
    glyphs.fingerprint.cache_clear()
    assert glyphs.fingerprint() != before


@pytest.mark.parametrize("template", glyphs.TEMPLATES)
def test_template_takes_a_name(template: str) -> None:
    assert template.format("digit one").count("digit one") == 1
