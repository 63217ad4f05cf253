"""Towers that return tokens beside their features, as CoCa's do, count as towers of features everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from torch import Tensor

from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.proof.parity import check_parity
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.patch_masking import masked_image_features
from toolchain.models.towers import ImageTower, TextTower, example_pixels, num_parameters, unit_image_features
from toolchain.quantization.checkpoint import load_quantized
from toolchain.quantization.quantize import Calibration, quantize
from toolchain.recipe.model import ModelSpec

COCA = SMALL | {"multimodal_cfg": {"width": 32, "heads": 2, "layers": 1}}
TOKENS = SMALL | {"vision_cfg": {**SMALL["vision_cfg"], "output_tokens": True}}  # type: ignore[dict-item]
WITH_TOKENS = {
    "CoCa": ModelSpec(model="coca_ViT-B-32", model_cfg=COCA, init="random"),
    "ViT": ModelSpec(model="ViT-B-16", model_cfg=TOKENS, init="random"),
}
CAPTIONS = ["a cat", "two small dogs", "a house"]
SAME = 1e-5  # of an entry of a unit feature, in float32


@pytest.fixture(params=WITH_TOKENS)
def model(request: pytest.FixtureRequest) -> ClipModel:
    return build_model(WITH_TOKENS[request.param], seed=0)


@torch.no_grad()
def expected(model: ClipModel, pixel_values_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first output of open_clip's own towers, normalized."""
    net: Any = model.net
    output = net.visual(pixel_values_BCHW)
    assert isinstance(output, tuple)
    text = net.encode_text(model.tokenize(CAPTIONS))
    return F.normalize(output[0], dim=-1), F.normalize(text, dim=-1)


@torch.no_grad()
def test_every_way_to_features_gives_the_towers_features(model: ClipModel) -> None:
    pixel_values_BCHW, ids_BT = example_pixels(model.net, 3), model.tokenize(CAPTIONS)
    image_BD, text_BD = expected(model, pixel_values_BCHW)
    net: Any = model.net
    for ours_BD in (
        ImageTower(net)(pixel_values_BCHW),
        unit_image_features(net, pixel_values_BCHW),
        F.normalize(model.encode_image(pixel_values_BCHW), dim=-1),
        F.normalize(masked_image_features(net.visual, pixel_values_BCHW, torch.arange(16).expand(3, -1)), dim=-1),
    ):
        torch.testing.assert_close(ours_BD, image_BD, atol=SAME, rtol=0)
    for ours_BD in (TextTower(net)(ids_BT), F.normalize(model.encode_text(ids_BT), dim=-1)):
        torch.testing.assert_close(ours_BD, text_BD, atol=SAME, rtol=0)


def test_a_decoder_of_captions_is_no_part_of_a_text_tower() -> None:
    net: Any = build_model(WITH_TOKENS["CoCa"], seed=0).net
    decoder = sum(parameter.numel() for parameter in net.text_decoder.parameters())
    assert decoder > 0
    assert sum(num_parameters(net)) == sum(parameter.numel() for parameter in net.parameters()) - decoder
    assert not any("decoder" in name for name, _ in TextTower(net).named_parameters())
    assert net.text_decoder is not None, "the model itself keeps it"


def test_they_are_exported(model: ClipModel, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    export_onnx(model, tmp_path, PlannedExport("adopted", "fp32"), classes_set("made", images, CAPTIONS, ("{}",)))
    assert check_parity(tmp_path, precision="fp32")["image"]["num_samples"] == 3
    (features,) = onnx.load(tmp_path / "image.onnx").graph.output
    assert features.name == "image_features"


def test_they_are_quantized(model: ClipModel, tmp_path: Path) -> None:
    pixel_values_BCHW, ids_BT = example_pixels(model.net, 8), model.tokenize(CAPTIONS)
    quantize(model, tmp_path, Calibration(pixel_values_BCHW, ids_BT))
    image_tower, text_tower = load_quantized(tmp_path, model)
    image_BD, text_BD = expected(model, pixel_values_BCHW)
    with torch.no_grad():
        assert (image_tower(pixel_values_BCHW) * image_BD).sum(-1).min() > 0.98
        assert (text_tower(ids_BT) * text_BD).sum(-1).min() > 0.9
