"""Labels for pictures: ranked by cosine, best first, and every wrong picture said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.runtime import predict as predict_module
from export.runtime.exported_model import ExportedEncoders
from export.runtime.predict import predict
from toolchain.errors import ArtifactError, ClipkdError, UsageError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

# A softmax in float32 sums to 1 up to its rounding.
MAX_SUM_ERROR = 1e-5


class Colours:
    """Encoders that know three colours: the feature of a picture is its mean colour."""

    logit_parameters = np.float32(100), None
    compute_probabilities = ExportedEncoders.compute_probabilities

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        pixels = [np.asarray(image.convert("RGB"), np.float32).mean((0, 1)) for image in images]
        return np.stack([mean_3 / np.linalg.norm(mean_3) for mean_3 in pixels])

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.array([COLOURS[text] for text in texts], np.float32) / 255


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "image.onnx").write_bytes(b"")
    features_KD = np.array([COLOURS["green"], COLOURS["blue"]], np.float32) / 255
    np.savez(
        folder / "classes.npz",
        names=np.array(["grass", "sky"]),
        templates=np.array(["{}"]),
        features_KD=features_KD,
        logit_scale=np.float32(100),
    )
    monkeypatch.setattr(predict_module, "open_exported", lambda path: Colours())
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in COLOURS]
    for path, colour in zip(paths, COLOURS.values(), strict=True):
        Image.new("RGB", (9, 7), tuple(channel // 2 + 60 for channel in colour)).save(path)
    return paths


def best(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["labels"][0]["label"] for answer in answers]


def test_the_best_label_comes_first(model: Path, pictures: list[Path]) -> None:
    answers = predict(model, pictures, ["blue", "red", "green"], top=3)
    assert [answer["image"] for answer in answers] == [str(path) for path in pictures], "in the order asked for"
    assert best(answers) == ["red", "green", "blue"]
    for answer in answers:
        probabilities = [ranked["probability"] for ranked in answer["labels"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert abs(sum(probabilities) - 1) < MAX_SUM_ERROR


def test_without_labels_the_models_own_are_used(model: Path, pictures: list[Path]) -> None:
    answers = predict(model, pictures[1:], None, top=5)
    assert best(answers) == ["grass", "sky"]
    assert [len(answer["labels"]) for answer in answers] == [2, 2], "no more than there are"


def test_only_the_top_labels(model: Path, pictures: list[Path]) -> None:
    answers = predict(model, pictures, list(COLOURS), top=1)
    assert [len(answer["labels"]) for answer in answers] == [1, 1, 1]


def test_equal_labels_keep_their_order(model: Path, pictures: list[Path]) -> None:
    ranked = predict(model, pictures[:1], ["green", "blue"], top=2)[0]["labels"]
    assert [entry["label"] for entry in ranked] == ["green", "blue"]
    assert ranked[0]["probability"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "torn", "folder"])
def test_an_unreadable_picture_is_said_before_the_model_is_opened(
    model: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(predict_module, "open_exported", None)
    broken = pictures[0].with_name("broken.png")
    if kind == "folder":
        broken.mkdir()
    elif kind != "absent":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(broken)
        whole = broken.read_bytes()
        broken.write_bytes({"empty": b"", "text": b"a cat", "torn": whole[: len(whole) // 2]}[kind])
    with pytest.raises(UsageError) as caught:
        predict(model, [*pictures, broken], ["red"], top=1)
    said = "no such image" if kind == "absent" else "not a readable image: "
    assert str(caught.value).startswith(f"{broken}: {said}")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_read(model: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.fromarray(np.full((8, 8), 200, np.uint16)).convert("I;16").save(path) if mode == "I;16" else Image.new(
        "RGB", (8, 8), (200, 200, 200)
    ).convert(mode).save(path)
    assert len(predict(model, [path], ["red"], top=1)) == 1


def test_a_run_is_not_a_model_but_says_which_it_has(tmp_path: Path) -> None:
    exported = tmp_path / "run" / "exported" / "student-onnxruntime-fp32"
    exported.mkdir(parents=True)
    (exported / "image.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        predict(tmp_path / "run", [], None, top=1)
    assert str(caught.value) == (f"{tmp_path / 'run'}: no image.onnx; not an exported model; it contains: {exported}")
    with pytest.raises(ArtifactError) as caught:
        predict(tmp_path / "absent", [], None, top=1)
    assert str(caught.value) == (
        f"{tmp_path / 'absent'}: no image.onnx; not an exported model; make one with: clipkd export RUN"
    )


def test_features_that_are_not_finite_give_no_answer(
    model: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax of NaN sorted: the first label, and every other model's answer as well."""
    monkeypatch.setattr(Colours, "encode_images", lambda self, images: np.full((len(images), 3), np.nan, np.float32))
    with pytest.raises(ClipkdError, match=r"red\.png \(3 of 3 images\) or of the labels are NaN or infinite"):
        predict(model, pictures, None, top=1)
