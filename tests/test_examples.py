"""The pictures that a report shows: which, how large, what is said of them, and that nothing else goes along."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolchain.evaluation.eval_set import ImageFile, captions_set, classes_set
from toolchain.evaluation.examples import make_thumbnail, write_examples

NAMES = [f"name {k}" for k in range(100)]
PIXELS_NHWC = np.tile(np.random.default_rng(0).integers(0, 256, (100, 4, 1, 3), np.uint8), (1, 8, 32, 1))  # stripes


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def answers(name: str, n: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Image k is held to be k + 1, and every tenth, unreadable or unscored, to be nothing."""
    top1_N = (np.arange(n, dtype=np.int32) + 1) % n
    top1_N[::10] = -1
    cosine_N = np.linspace(0, 1, n).astype(np.float32)
    cosine_N[::10] = np.nan
    return {f"{name}_rank": np.arange(n, dtype=np.int32) % 2, f"{name}_top1": top1_N, f"{name}_top1_cosine": cosine_N}


def test_they_are_spread_over_the_set_and_say_what_was_answered(tmp_path: Path) -> None:
    data = classes_set("own", PIXELS_NHWC, NAMES, ("{}",))
    write_examples(tmp_path / "examples.json", data, answers("own", 100), 16)
    found = json.loads((tmp_path / "examples.json").read_text(), parse_constant=pytest.fail)
    assert found["set"] == "own"
    indices = [example["index"] for example in found["images"]]
    assert len(indices) == 16
    assert (indices[0], indices[-1]) == (0, 99)
    assert set(np.diff(indices)) <= {6, 7}
    for example in found["images"]:
        index = example["index"]
        assert example["true"] == [NAMES[index]]
        assert example["top1"] == (None if index % 10 == 0 else NAMES[(index + 1) % 100])
        assert (example["cosine"] is None) == (index % 10 == 0)
        assert example["right"] == (index % 2 == 0)
        np.testing.assert_array_equal(np.asarray(opened(example["picture"])), PIXELS_NHWC[index])


@pytest.mark.parametrize(("asked", "n", "got"), [(0, 100, 0), (1, 100, 1), (16, 3, 3), (16, 1, 1)])
def test_there_are_no_more_than_asked_for_or_than_there_are(tmp_path: Path, asked: int, n: int, got: int) -> None:
    data = classes_set("own", PIXELS_NHWC[:n], NAMES[:n], ("{}",))
    write_examples(tmp_path / "examples.json", data, answers("own", n), asked)
    assert len(json.loads((tmp_path / "examples.json").read_text())["images"]) == got


def test_every_caption_of_a_picture_is_right_and_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS_NHWC[0]).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no picture")
    data = captions_set("own", [ImageFile(tmp_path / name) for name in ("a.png", "b.png")], [["x", "y"], ["z"]])
    write_examples(tmp_path / "examples.json", data, answers("own", 2), 16)
    (example,) = json.loads((tmp_path / "examples.json").read_text())["images"]
    assert example["true"] == ["x", "y"]


def test_a_large_picture_becomes_small_and_loses_all_but_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera that was bought in a shop"
    content = io.BytesIO()
    smooth = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
    smooth.save(content, "JPEG", exif=exif, icc_profile=b"a profile of a monitor", comment=b"a comment")
    uri = make_thumbnail(Image.open(content))
    small = opened(uri)
    assert small.size == (96, 72)
    assert len(uri) < 10_000
    for said in (b"camera", b"monitor", b"comment"):
        assert said not in base64.b64decode(uri.partition(",")[2])
