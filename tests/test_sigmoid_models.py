"""A sigmoid model (SigLIP) keeps its logit bias on every way to a probability: predict, the card, baked-in classes.

And a sigmoid student is trained as one, by labels and by a sigmoid teacher, live or cached.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import open_clip
import pytest
import torch
from conftest import REPOSITORY, STUDENT
from PIL import Image
from training import BATCH_SIZE, cache_of, configured, rows, spec, train

from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.graphs.model_card import SNIPPET
from export.runtime.bake_classes import CLASSIFIER, bake
from export.runtime.exported_model import open_exported
from export.runtime.predict import predict
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation.losses import sigmoid_kd_loss, sigmoid_loss
from toolchain.distillation.teacher import open_teacher
from toolchain.distillation.teacher_cache import TeacherCache
from toolchain.errors import ArtifactError
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import build_model, load_model, save_model
from toolchain.models.clip_model import ClipModel
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.model import ModelSpec
from toolchain.stage import StageSpec, run_stage

LABELS = ["digit one", "plus sign", "a", "leftwards arrow"]
SIGLIP = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "test_byobnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 48},
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 1024,
        "hf_tokenizer_name": str(STUDENT),
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
SAME = 1e-4  # of a probability: float32 features of ONNX Runtime and of PyTorch, times a scale of 20
SAME_OF_A_STUDENT = 1e-5  # likewise, of a smaller model whose scale is 10
SIGMOID = {"init_logit_bias": -10, "init_logit_scale": float(np.log(10))}
WEIGHTS = LossWeights(**dict.fromkeys(LossWeights.model_fields, 0.0) | {"task": 1.0, "sigmoid_kd": 1.0, "fd": 1.0})


@pytest.fixture(scope="module")
def siglip() -> ClipModel:
    model = build_model(ModelSpec(model="ViT-B-16-SigLIP", model_cfg=SIGLIP, init="random"), seed=0)
    with torch.no_grad():
        model.net.logit_scale.fill_(np.log(20))
        model.net.logit_bias.fill_(-3)
    return model


@pytest.fixture(scope="module")
def exported(siglip: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sigmoid") / "exported"
    shown = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8)
    headline = classes_set("made", shown, LABELS, ("{}",))

    def work(folder: Path) -> dict[str, object]:
        return {**export_onnx(siglip, folder, PlannedExport("adopted", "fp32"), headline)}

    return run_stage(StageSpec(path, "export", 1), work).path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8)).save(path)
    return paths


def expected(model: ClipModel, images: list[Path], labels: list[str]) -> np.ndarray:
    """Return open_clip's own probabilities [B, K] of a sigmoid model."""
    pixel_values_BCHW = torch.stack([model.preprocess(Image.open(path)) for path in images])
    with torch.no_grad():
        image_logits_BK, _ = model.net.get_logits(pixel_values_BCHW, model.tokenize(labels))
    return image_logits_BK.sigmoid().numpy()


def test_the_exported_scale_and_bias_are_the_models(siglip: ClipModel, exported: Path) -> None:
    scale, bias = open_exported(exported, threads=1).logit_parameters
    assert scale == pytest.approx(20, rel=1e-6)
    assert bias == pytest.approx(-3)
    assert siglip.logit_bias is not None


def test_predict_gives_open_clips_probabilities(siglip: ClipModel, exported: Path, images: list[Path]) -> None:
    for labels in (None, ["latin small letter b", "digit two"]):
        probabilities_BK = expected(siglip, images, labels or LABELS)
        assert not np.allclose(probabilities_BK.sum(1), 1, atol=0.05), "so a softmax would fail this test"
        for answer, probability_K in zip(predict(exported, images, labels, top=9), probabilities_BK, strict=True):
            found = {ranked["label"]: ranked["probability"] for ranked in answer["labels"]}
            assert found == pytest.approx(dict(zip(labels or LABELS, probability_K.tolist(), strict=True)), abs=SAME)
            assert list(found) == sorted(found, key=lambda label: -found[label])


def test_the_cards_snippet_prints_them(siglip: ClipModel, exported: Path, images: list[Path]) -> None:
    code = SNIPPET.replace('"image.png"', repr(str(images[0])))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    printed = [float(number) for number in ended.stdout.replace("[", " ").replace("]", " ").split()]
    assert printed == pytest.approx(expected(siglip, images[:1], ["a cat", "a dog"])[0].tolist(), abs=SAME)


def test_baked_in_classes_keep_the_bias(siglip: ClipModel, exported: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("digit nine\nplus sign\n", encoding="utf-8")
    baked = bake(exported, tmp_path / "labels.txt", None, tmp_path / "baked").path
    probabilities_BK = expected(siglip, images, ["digit nine", "plus sign"])
    for answer, probability_K in zip(predict(baked, images, None, top=2), probabilities_BK, strict=True):
        found = {ranked["label"]: ranked["probability"] for ranked in answer["labels"]}
        assert [found["digit nine"], found["plus sign"]] == pytest.approx(probability_K.tolist(), abs=SAME)
    onnx.checker.check_model(onnx.load(baked / CLASSIFIER), full_check=True)
    session = ort.InferenceSession(baked / CLASSIFIER, providers=["CPUExecutionProvider"])
    pixel_values_BCHW = torch.stack([siglip.preprocess(Image.open(path)) for path in images]).numpy()
    (logits_BK,) = session.run(["logits"], {"pixel_values": pixel_values_BCHW})
    np.testing.assert_allclose(1 / (1 + np.exp(-logits_BK)), probabilities_BK, atol=SAME)


def test_a_very_unlikely_label_has_probability_0(exported: Path) -> None:
    encoders = open_exported(exported, threads=1)
    features_1D = np.zeros((1, 32), np.float32)
    features_1D[0, 0] = 1
    far = encoders.compute_probabilities(100 * features_1D, -features_1D)
    near = encoders.compute_probabilities(100 * features_1D, features_1D)
    assert (far.item(), near.item()) == (0, 1)


def test_without_a_bias_the_probabilities_are_a_softmax(tmp_path: Path, exported: Path, images: list[Path]) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "softmax"))
    (folder / "manifest.json").unlink()
    with np.load(exported / "classes.npz") as classes:
        kept = {name: classes[name] for name in classes.files if name != "logit_bias"}
    np.savez(folder / "classes.npz", **kept)
    for answer in predict(folder, images, None, top=9):
        assert sum(ranked["probability"] for ranked in answer["labels"]) == pytest.approx(1, abs=1e-5)


# A sigmoid student.


@pytest.fixture(scope="module")
def sigmoid_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration of a sigmoid student, and a sigmoid teacher of another width with weights."""
    parent = tmp_path_factory.mktemp("sigmoid models")
    student = configured(parent / "student", model_cfg=SIGMOID)
    config = configured(parent / "config", model_cfg=SIGMOID | {"embed_dim": 48, "init_logit_bias": -7})
    (parent / "teacher").mkdir()
    save_model(load_model(config, random_seed=5), parent / "teacher")
    return student, parent / "teacher"


@pytest.mark.parametrize("cached", [False, True])
def test_a_sigmoid_student_trains_its_scale_and_bias_and_saves_them(
    tmp_path: Path, tiny_samples: TrainingSet, sigmoid_folders: tuple[Path, Path], cached: bool
) -> None:
    student, teacher = sigmoid_folders
    train(tmp_path, tiny_samples, teacher, student=student, cached=cached, loss_weights=WEIGHTS, lr=1e-2)
    saved, logged = load_model(tmp_path), rows(tmp_path)
    assert saved.logit_bias is not None
    assert abs(saved.logit_bias.item() + 10) > 1e-3, "the bias moved"
    assert abs(saved.logit_scale.item() - 10) > 1e-3
    assert list(logged[0]["terms"]) == ["task", "fd", "sigmoid_kd"]
    assert logged[0]["logit_bias"] == pytest.approx(-10)
    assert logged[-1]["terms"]["task"]["unweighted"] < logged[0]["terms"]["task"]["unweighted"]


def test_the_first_loss_of_a_sigmoid_student_is_that_of_its_features(
    tmp_path: Path, tiny_samples: TrainingSet, sigmoid_folders: tuple[Path, Path]
) -> None:
    """From the models' own features of the first batch, live and cached: scale and bias are each model's own."""
    folders = [tmp_path / name for name in ("live", "cached")]
    for folder, cached in zip(folders, (False, True), strict=True):
        student, teacher = sigmoid_folders
        train(folder, tiny_samples, teacher, student=student, cached=cached, loss_weights=WEIGHTS, steps=4)
    models = load_model(sigmoid_folders[0], random_seed=0), load_model(sigmoid_folders[1])
    models[0].net.train()  # batch norms
    batch = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2).batch(0, slice(None), [model.geometry for model in models])
    with torch.no_grad():
        features = [
            torch.nn.functional.normalize(part, dim=-1)
            for model in models
            for part in (
                model.encode_image(model.normalise(batch.pixels[model.geometry])),
                model.encode_text(model.tokenize(batch.captions_B)),
            )
        ]
    expected = sigmoid_kd_loss(*features[:2], 10.0, -10.0, *features[2:], 10.0, -7.0).item()
    task = sigmoid_loss(*features[:2], 10.0, -10.0).item()
    for folder in folders:
        terms = rows(folder)[0]["terms"]
        assert terms["sigmoid_kd"]["unweighted"] == pytest.approx(expected, rel=SAME)
        assert terms["task"]["unweighted"] == pytest.approx(task, rel=SAME)


def test_a_trained_sigmoid_students_export_gives_plain_open_clips_probabilities(
    tmp_path: Path, tiny_samples: TrainingSet, sigmoid_folders: tuple[Path, Path], images: list[Path]
) -> None:
    student, teacher = sigmoid_folders
    train(tmp_path / "student", tiny_samples, teacher, student=student, loss_weights=WEIGHTS, lr=1e-2)
    trained = load_model(tmp_path / "student")
    shown = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    headline = classes_set("made", shown, LABELS, ("{}",))

    def work(folder: Path) -> dict[str, object]:
        return {**export_onnx(trained, folder, PlannedExport("student", "fp32"), headline)}

    exported = run_stage(StageSpec(tmp_path / "exported", "export", 1), work).path
    plain, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'student'}")
    plain.eval()
    tokens_KT = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'student'}")(LABELS)
    pixel_values_BCHW = torch.stack([preprocess(Image.open(path)) for path in images])
    with torch.no_grad():
        probabilities_BK = plain.get_logits(pixel_values_BCHW, tokens_KT)[0].sigmoid().numpy()
    assert probabilities_BK.max() > 100 * SAME_OF_A_STUDENT, "so a wrong bias would fail this test"
    for answer, probability_K in zip(predict(exported, images, None, top=9), probabilities_BK, strict=True):
        found = {ranked["label"]: ranked["probability"] for ranked in answer["labels"]}
        assert found == pytest.approx(dict(zip(LABELS, probability_K.tolist(), strict=True)), abs=SAME_OF_A_STUDENT)


def test_a_cache_from_before_the_bias_was_stored_is_refused(
    tmp_path: Path, tiny_samples: TrainingSet, sigmoid_folders: tuple[Path, Path]
) -> None:
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    cache = cache_of(load_model(sigmoid_folders[1]), data, tmp_path / "cache")
    assert cache.logit_bias == pytest.approx(-7)
    old = TeacherCache(cache.folder, {name: value for name, value in cache.about.items() if name != "logit_bias"})
    with pytest.raises(
        ArtifactError, match=r"needs the teacher's logit_bias, which this teacher cache lacks.*Delete it"
    ):
        open_teacher(old, spec(loss_weights=WEIGHTS), torch.device("cpu"))
    open_teacher(old, spec(), torch.device("cpu"))
