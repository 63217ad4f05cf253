"""Labels for images: ranked by cosine, best first; folders and patterns; a row with a reason for each bad file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.runtime import predict as predict_module
from export.runtime.exported_model import ExportedEncoders
from export.runtime.predict import Answer, answer_lines, describe_other_files, find_images, predict
from toolchain.errors import ArtifactError, UsageError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

# A softmax in float32 sums to 1 up to its rounding.
MAX_SUM_ERROR = 1e-5
LARGEST_BATCH = 32


class Colours:
    """Encoders that know three colours: the feature of a picture is its mean colour."""

    logit_parameters = np.float32(100), None
    compute_probabilities = ExportedEncoders.compute_probabilities

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB"), np.float32).mean((0, 1)).reshape(3, 1, 1)

    def encode_pixels(self, pixel_values_BCHW: np.ndarray) -> np.ndarray:
        assert 0 < len(pixel_values_BCHW) <= LARGEST_BATCH
        mean_B3 = pixel_values_BCHW[:, :, 0, 0]
        with np.errstate(invalid="ignore"):  # black has no direction
            return mean_B3 / np.linalg.norm(mean_B3, axis=-1, keepdims=True)

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


def best(answers: list[Answer]) -> list[str]:
    return [answer["labels"][0]["label"] for answer in answers]


def test_the_best_label_comes_first(model: Path, pictures: list[Path]) -> None:
    answers = list(predict(model, pictures, ["blue", "red", "green"], top=3))
    assert [answer["image"] for answer in answers] == [str(path) for path in pictures], "in the order asked for"
    assert best(answers) == ["red", "green", "blue"]
    for answer in answers:
        probabilities = [ranked["probability"] for ranked in answer["labels"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert abs(sum(probabilities) - 1) < MAX_SUM_ERROR


def test_without_labels_the_models_own_are_used(model: Path, pictures: list[Path]) -> None:
    answers = list(predict(model, pictures[1:], None, top=5))
    assert best(answers) == ["grass", "sky"]
    assert [len(answer["labels"]) for answer in answers] == [2, 2], "no more than there are"


def test_only_the_top_labels(model: Path, pictures: list[Path]) -> None:
    answers = list(predict(model, pictures, list(COLOURS), top=1))
    assert [len(answer["labels"]) for answer in answers] == [1, 1, 1]


def test_equal_labels_keep_their_order(model: Path, pictures: list[Path]) -> None:
    (answer,) = predict(model, pictures[:1], ["green", "blue"], top=2)
    ranked = answer["labels"]
    assert [entry["label"] for entry in ranked] == ["green", "blue"]
    assert ranked[0]["probability"] == pytest.approx(0.5)


REASONS = {
    "absent": "no such file",
    "empty": "zero-byte file",
    "text": "not an image: starts with b'a cat'",
    "torn": "truncated image: ",
    "folder": "a folder without images",
    "black": "the model returns NaN or infinity for this image",
}


@pytest.mark.parametrize("kind", REASONS)
def test_an_image_without_an_answer_is_a_row_with_its_reason_and_the_others_are_answered(
    model: Path, pictures: list[Path], kind: str
) -> None:
    broken = pictures[0].with_name("broken.png")
    if kind == "folder":
        broken.mkdir()
    elif kind != "absent":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise * (kind != "black")).save(broken)
        whole = broken.read_bytes()
        broken.write_bytes({"empty": b"", "text": b"a cat", "torn": whole[: len(whole) // 2]}.get(kind, whole))
    before, wrong, *after = predict(model, [pictures[0], broken, *pictures[1:]], list(COLOURS), top=1)
    assert best([before, *after]) == list(COLOURS)
    assert (wrong["image"], wrong["labels"]) == (str(broken), [])
    assert str(wrong["error"]).startswith(REASONS[kind])
    assert answer_lines(wrong, 3) == [f"{broken}  error: {wrong['error']}"]


def test_many_images_are_encoded_in_batches_and_the_first_answers_come_before_the_last_image_is_read(
    model: Path, pictures: list[Path]
) -> None:
    many = pictures * LARGEST_BATCH
    last = many[-1] = pictures[0].with_name("late.png")
    shown: list[tuple[str, int, int, str]] = []
    answers = predict(
        model, many, list(COLOURS), 1, lambda what, done, total, note="": shown.append((what, done, total, note))
    )
    first = [next(answers) for _ in range(LARGEST_BATCH)]
    pictures[1].rename(last)  # a file that appears meanwhile is read when its turn comes
    rest = list(answers)
    assert [answer["image"] for answer in first + rest] == [str(path) for path in many]
    assert best(first)[:3] == list(COLOURS)
    assert rest[-1]["labels"][0]["label"] == "green"
    assert [done for _, done, _, _ in shown] == [LARGEST_BATCH, 2 * LARGEST_BATCH, len(many)]


def test_folders_and_patterns_stand_for_their_images(pictures: list[Path], tmp_path: Path) -> None:
    deep = tmp_path / "photos" / "deep"
    deep.mkdir(parents=True)
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "more.TXT", "LICENSE"):
        (deep / name).touch()
    (tmp_path / "photos" / "z[1].webp").touch()
    whole = [deep / "a.png", deep / "b.JPG"]
    assert sorted(find_images([tmp_path / "photos"])) == [*whole, tmp_path / "photos" / "z[1].webp"]
    assert find_images([tmp_path / "photos" / "z[1].webp"]) == [tmp_path / "photos" / "z[1].webp"], "not a pattern"
    assert find_images([tmp_path / "*.png"]) == sorted(pictures)
    assert sorted(find_images([deep / "**"])) == sorted(
        [*whole, deep / "LICENSE", deep / "more.TXT", deep / "notes.txt"]
    )
    assert find_images([tmp_path / "*.gif", tmp_path / "absent", deep / "a.png"]) == [
        tmp_path / "*.gif",
        tmp_path / "absent",
        deep / "a.png",
    ]
    other = describe_other_files([tmp_path / "photos", pictures[0]])
    assert other == "passed over, not images: 2 .txt, 1 without suffix"
    assert describe_other_files(pictures) == ""
    for number in range(1000):
        (deep / f"photo.v{number}").touch()
    assert len(describe_other_files([deep])) < 150, "a message is not as long as the data"


def test_labels_given_twice_are_named(model: Path, pictures: list[Path]) -> None:
    with pytest.raises(UsageError, match="--labels: given twice: red, blue; name each label once"):
        predict(model, pictures, ["red", "green", "blue", "red", "blue"], top=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_read(model: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.fromarray(np.full((8, 8), 200, np.uint16)).convert("I;16").save(path) if mode == "I;16" else Image.new(
        "RGB", (8, 8), (200, 200, 200)
    ).convert(mode).save(path)
    (answer,) = predict(model, [path], ["red"], top=1)
    assert answer["labels"]


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
        f"{tmp_path / 'absent'}: no image.onnx; not an exported model; no such directory; "
        "make one with: clipkd export RUN"
    )


def test_features_that_are_not_finite_give_no_answer(
    model: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax of NaN sorted: the first label, and every other model's answer as well."""
    nan = np.full((len(pictures), 3), np.nan, np.float32)
    monkeypatch.setattr(Colours, "encode_pixels", lambda self, pixel_values_BCHW: nan)
    answers = list(predict(model, pictures, None, top=1))
    assert [answer["labels"] for answer in answers] == [[]] * len(pictures)
    assert {answer["error"] for answer in answers} == {"the model returns NaN or infinity for this image"}
