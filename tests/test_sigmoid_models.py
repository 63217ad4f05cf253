"""A sigmoid model (SigLIP) keeps its logit bias on every way to a probability: predict, the card, baked-in classes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import REPOSITORY, STUDENT
from PIL import Image

from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.graphs.model_card import SNIPPET
from export.runtime.bake_classes import CLASSIFIER, bake
from export.runtime.exported_model import open_exported
from export.runtime.predict import predict
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
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
