"""Layers of int8 towers, what each costs, and which go back to float: found by damaging one."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import STUDENT
from torch import Tensor, nn

from toolchain.data import glyphs
from toolchain.distributed import ALONE
from toolchain.errors import ClipkdError, GateError
from toolchain.evaluation.eval_set import classes_set
from toolchain.evaluation.torch_encoders import headline_accuracy
from toolchain.models.build import load_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import ImageTower, TextTower
from toolchain.quantization import sensitivity
from toolchain.quantization.checkpoint import load_quantized
from toolchain.quantization.freeze import freeze
from toolchain.quantization.nncf_backend import list_quantizers
from toolchain.quantization.quantize import Calibration, quantize
from toolchain.quantization.sensitivity import (
    Criterion,
    agreement_criterion,
    headline_criterion,
    list_layers,
    revert_worst,
    score_towers,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"letter {chr(97 + index)}" for index in range(16)]
NOISE = 1e-5  # of a unit feature: folded batch norms round otherwise
DAMAGED = "image/visual/trunk/layer3/0/conv2/conv2d/0"
BUDGET = 1e-3  # of the mean cosine: int8 costs 2e-4 here, the damage ten times as much and more
WRONG_SCALE = 60.0  # times the right one: two levels are left of 127


class Case(NamedTuple):
    model: ClipModel
    folder: Path
    inputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = load_model(STUDENT, random_seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in model.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)  # timm starts the last of a block at zero
    pixel_values = torch.randn(len(NAMES), 3, 32, 32, generator=generator)
    inputs = {"image": pixel_values, "text": model.tokenize(NAMES)}
    folder = tmp_path_factory.mktemp("int8")
    quantize(model, folder, Calibration(inputs["image"], inputs["text"]))
    return Case(model, folder, inputs)


@pytest.fixture
def towers(case: Case) -> dict[str, nn.Module]:
    return dict(zip(("image", "text"), load_quantized(case.folder, case.model), strict=True))


@pytest.fixture
def damaged(case: Case, towers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    weight = list_layers(towers["image"], case.inputs["image"][:2])[DAMAGED.removeprefix("image/")][0]
    with torch.no_grad():
        weight.scale.mul_(WRONG_SCALE)
    return towers


def likeness(case: Case) -> Criterion:
    """Scores the mean cosine to the float student's features: finer than top-1 of random weights."""
    expected = [tower(case.model.net)(values) for tower, values in floats(case)]

    def score(image_BD: Tensor, text_BD: Tensor) -> float:
        cosines = [(x * y).sum(-1).mean().item() for x, y in zip((image_BD, text_BD), expected, strict=True)]
        return sum(cosines) / 2

    return Criterion("likeness", case.inputs["image"], case.inputs["text"], score)


def floats(case: Case) -> Iterator[tuple[Any, Tensor]]:
    yield ImageTower, case.inputs["image"]
    yield TextTower, case.inputs["text"]


def enabled(tower: nn.Module) -> list[bool]:
    return [quantizer.is_enabled_quantization() for _, quantizer in list_quantizers(tower)]


def test_a_layer_is_its_weight_and_what_it_reads(case: Case, towers: dict[str, nn.Module]) -> None:
    quantizers = dict(list_quantizers(towers["image"]))
    layers = list_layers(towers["image"], case.inputs["image"][:2])
    assert len(layers) == 16, "15 convolutions and the projection"
    second = layers["visual/trunk/conv1/3/conv2d/0"]
    assert second[0] is quantizers["pre_hooks.visual/trunk/conv1/3/conv2d/0__1.0"]
    assert second[1:] == (quantizers["post_hooks.visual/trunk/conv1/2/relu_/0__0.0"],)
    branch = quantizers["post_hooks.visual/trunk/layer1/0/conv2/conv2d/0__0.0"]
    assert [name for name, of in layers.items() if branch in of] == ["visual/trunk/layer1/0/conv2/conv2d/0"]
    owned = {id(quantizer) for of in layers.values() for quantizer in of}
    assert owned == {id(quantizer) for quantizer in quantizers.values()}
    text = list_layers(towers["text"], case.inputs["text"][:2])
    assert {name: len(of) for name, of in text.items()} == dict.fromkeys(text, 2) | {"/embedding/0": 1}
    assert len(text) == 9, "four linear layers in each of two blocks, and the vocabulary"
    assert list_layers(TextTower(case.model.net), case.inputs["text"][:2]) == {}


def test_each_layers_sqnr_is_that_of_it_alone(case: Case, towers: dict[str, nn.Module]) -> None:
    found = revert_worst(towers, case.inputs, likeness(case), 1.0, max_drop=0.999)
    assert found["reverted"] == []
    assert [row["sqnr_db"] for row in found["layers"]] == sorted(row["sqnr_db"] for row in found["layers"])
    assert all(all(enabled(tower)) for tower in towers.values()), "all are on again"
    layer = found["layers"][0]
    tower, _, name = layer["layer"].partition("/")
    for _, quantizer in list_quantizers(towers[tower]):
        quantizer.enabled.fill_(0)
    with torch.no_grad():
        float_BD = towers[tower](case.inputs[tower]).double()
        for quantizer in layers_of_enabled(towers[tower], case.inputs[tower])[name]:
            quantizer.enabled.fill_(1)
        alone_BD = towers[tower](case.inputs[tower]).double()
    expected_BD = (ImageTower if tower == "image" else TextTower)(case.model.net)(case.inputs[tower])
    torch.testing.assert_close(float_BD.float(), expected_BD, atol=NOISE, rtol=0)
    noise = sum((a - b) ** 2 for a, b in zip(float_BD.flatten().tolist(), alone_BD.flatten().tolist(), strict=True))
    signal = sum(a**2 for a in float_BD.flatten().tolist())
    assert layer["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=0.06)


def layers_of_enabled(tower: nn.Module, inputs: Tensor) -> Any:
    """As `list_layers` finds them while all quantizers are on: one that is off is not in the graph."""
    before = enabled(tower)
    for _, quantizer in list_quantizers(tower):
        quantizer.enabled.fill_(1)
    layers = list_layers(tower, inputs[:2])
    for on, (_, quantizer) in zip(before, list_quantizers(tower), strict=True):
        quantizer.enabled.fill_(int(on))
    return layers


def test_the_damaged_layer_and_no_other_goes_back_to_float(case: Case, damaged: dict[str, nn.Module]) -> None:
    criterion = likeness(case)
    before = score_towers(damaged, criterion)
    found = revert_worst(damaged, case.inputs, criterion, 1.0, max_drop=BUDGET)
    assert [row["layer"] for row in found["reverted"]] == [DAMAGED]
    (row,) = found["reverted"]
    assert row["drop_before"] == found["drop_before"] == pytest.approx(1 - before, abs=1e-5)
    assert row["drop_before"] > BUDGET >= row["drop_after"] == found["drop"]
    assert found["drop"] == pytest.approx(1 - score_towers(damaged, criterion), abs=1e-5), "as it is left"
    frozen = freeze(damaged["image"], case.inputs["image"][:2])
    stored = [buffer for buffer in frozen.buffers() if buffer.dtype == torch.int8 and buffer.dim() == 4]
    assert len(stored) == 14, "15 convolutions, one of them in float"
    with torch.no_grad():
        expected_BD = damaged["image"](case.inputs["image"])
        assert (frozen(case.inputs["image"]) * expected_BD).sum(-1).min() > 0.99


def test_reverting_is_deterministic(case: Case) -> None:
    found = []
    for _ in range(2):
        towers = dict(zip(("image", "text"), load_quantized(case.folder, case.model), strict=True))
        found.append(revert_worst(towers, case.inputs, likeness(case), 1.0, max_drop=1e-5))
    assert found[0] == found[1]
    assert found[0]["reverted"], "else nothing was compared"


def test_what_was_reverted_survives_saving(case: Case, tmp_path: Path) -> None:
    kept = []

    def before_saving(image_tower: nn.Module, text_tower: nn.Module) -> None:
        towers = {"image": image_tower, "text": text_tower}
        revert_worst(towers, case.inputs, likeness(case), 1.0, max_drop=1e-5)
        kept.extend(towers.values())

    calibration = case.inputs["image"], case.inputs["text"]
    quantize(case.model, tmp_path, Calibration(*calibration), before_saving=before_saving)
    for tower, restored, values in zip(kept, load_quantized(tmp_path, case.model), calibration, strict=True):
        assert enabled(tower) == enabled(restored)
        with torch.no_grad():
            assert torch.equal(tower(values), restored(values))
    assert not all(enabled(kept[0]) + enabled(kept[1]))


@pytest.mark.parametrize("float_score", [2.0, math.nan])
def test_a_budget_that_cannot_hold_is_a_failed_gate(
    case: Case, towers: dict[str, nn.Module], float_score: float
) -> None:
    with pytest.raises(GateError, match=r"even with every layer in float; allowed: 0\.5"):
        revert_worst(towers, case.inputs, likeness(case), float_score, max_drop=0.5)


def test_the_headline_is_scored_as_evaluation_scores_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = glyphs.eval_set("novel")
    data = classes_set("novel", shown.images_KHWC[:40], shown.names[:40], glyphs.TEMPLATES)
    monkeypatch.setattr(sensitivity, "MAX_EFFECT_IMAGES", 10)
    criterion = headline_criterion(case.model, data)
    found = score_towers({"image": ImageTower(case.model.net), "text": TextTower(case.model.net)}, criterion)
    assert found == headline_accuracy(data)(case.model, ALONE)["top1"]
    assert criterion.what == "top-1 on novel"
    assert criterion.subset is not None
    assert criterion.subset.what == "top-1 on novel, 10 images"
    assert len(criterion.subset.pixel_values_BCHW) == 10
    assert len(criterion.subset.input_ids_CT) == 10 * len(glyphs.TEMPLATES)
    assert torch.equal(criterion.subset.pixel_values_BCHW[-1], criterion.pixel_values_BCHW[-1])
    assert torch.equal(criterion.subset.input_ids_CT[9], criterion.input_ids_CT[39]), "the last class's first prompt"


def test_classes_of_many_images_all_stay(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = glyphs.eval_set("novel")
    data = classes_set("mine", shown.images_KHWC[:40], shown.names[:5], glyphs.TEMPLATES, np.arange(40) % 5)
    monkeypatch.setattr(sensitivity, "MAX_EFFECT_IMAGES", 10)
    criterion = headline_criterion(case.model, data)
    found = score_towers({"image": ImageTower(case.model.net), "text": TextTower(case.model.net)}, criterion)
    assert found == headline_accuracy(data)(case.model, ALONE)["top1"]
    assert criterion.subset is not None
    assert len(criterion.subset.pixel_values_BCHW) == 10
    assert torch.equal(criterion.subset.input_ids_CT, criterion.input_ids_CT)


def test_agreement_is_the_share_of_equal_choices() -> None:
    text_CD = torch.eye(3)
    image_BD = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    criterion = agreement_criterion("me", image_BD, torch.arange(3)[:, None], torch.tensor([0, 1, 2, 0]))
    assert criterion.what == "agreement with me"
    assert criterion.score(image_BD, text_CD) == 0.5


def test_features_that_are_not_finite_agree_with_nothing_and_have_the_lowest_sqnr() -> None:
    text_CD, image_BD = torch.eye(3), torch.eye(3)
    criterion = agreement_criterion("me", image_BD, torch.arange(3)[:, None], torch.zeros(3, dtype=torch.int64))
    assert criterion.score(torch.full((3, 3), math.nan), text_CD) == 0, "argmax chooses 0, the first NaN"
    assert sensitivity._sqnr_db(image_BD, image_BD) == sensitivity.EXACT_DB
    for value in (math.nan, math.inf):
        broken_BD = image_BD.clone()
        broken_BD[1, 1] = value
        assert sensitivity._sqnr_db(image_BD, broken_BD) == -sensitivity.EXACT_DB
    assert sensitivity._sqnr_db(torch.zeros(3, 3), image_BD) == -sensitivity.EXACT_DB


def test_no_budget_is_compared_with_a_float_student_of_nan(case: Case) -> None:
    towers: dict[str, nn.Module] = {"image": ImageTower(case.model.net), "text": nn.Identity()}
    towers["text"].register_parameter("scale", nn.Parameter(torch.ones(())))
    criterion = Criterion("top-1", case.inputs["image"], torch.full((4, 3), math.nan), lambda *_: 1.0)
    with pytest.raises(
        ClipkdError, match=r"top-1: the features of the model to quantize have NaN or infinity in 1 of 2 "
    ):
        score_towers(towers, criterion)
