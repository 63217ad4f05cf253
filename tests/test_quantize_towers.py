"""Image towers of every family: calibrated, frozen, exported and run in ONNX Runtime, with random weights."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from conftest import STUDENT
from torch import Tensor, nn

from export.device_programs.machine import describe_machine
from export.graphs.onnx_graph import write_graph
from export.proof.executed_graph import read_executed_graph
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import ImageTower, example_pixels
from toolchain.quantization.checkpoint import float_towers, load_quantized
from toolchain.quantization.freeze import freeze
from toolchain.quantization.nncf_backend import calibrate, import_nncf, list_quantizers
from toolchain.quantization.quantize import Calibration, FineTuning, FineTuningBatch, quantize
from toolchain.quantization.sensitivity import list_layers
from toolchain.recipe.model import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 32
MERGED_AND_FOLDED = 1e-4  # of a unit feature: float32 rounding of up to a hundred folded layers; 2e-5 measured

# Least signal-to-noise ratio of all samples together, ONNX Runtime's int8 features against the float tower's, in dB.
# Random weights amplify a disturbance from layer to layer, as trained ones do not; a wrong scale leaves 3 dB or less.
MIN_SQNR_DB = {"transformer": 30.0, "windows": 30.0, "resnet": 15.0, "depthwise": 8.0, "MobileNetV4": 7.0}
# x86 without VNNI (AVX2, AVX-512F) adds pairs of 8-bit products in 16 bits, which saturate: on AVX2, 23 dB measured in
# the ViT, where the frozen tower has 43, and 19 dB in Swin-T.  ONNX Runtime's way out, session.x64quantprecision, fails
# on tied weights (1.31).
if not any("vnni" in name for name in describe_machine()["isa"]):
    MIN_SQNR_DB |= {"transformer": 20.0, "windows": 18.0}

VIT = {"timm_model_name": None, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
RESNET_50 = {"timm_model_name": None, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None}


def timm(name: str, size: int = 64, proj: str = "linear", **more: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": "avg", "timm_proj": proj, "image_size": size} | more


slow = pytest.mark.slow
TOWERS = [
    pytest.param(VIT, "transformer", {"MatMulIntegerToFloat"}, id="ViT"),
    pytest.param(timm("test_efficientnet", 32), "depthwise", {"QLinearConv"}, id="small EfficientNet"),
    pytest.param(timm("resnet18"), "resnet", {"QLinearConv", "QLinearAdd"}, id="ResNet-18", marks=slow),
    pytest.param(RESNET_50 | {"image_size": 64}, "resnet", {"QLinearConv"}, id="CLIP's ResNet", marks=slow),
    pytest.param(timm("mobilenetv3_small_100", proj=""), "depthwise", {"QLinearConv"}, id="MobileNetV3", marks=slow),
    pytest.param(timm("mobilenetv4_conv_small", proj=""), "MobileNetV4", {"QLinearConv"}, id="MobileNetV4", marks=slow),
    pytest.param(timm("mobilenetv4_hybrid_medium", proj=""), "depthwise", {"QLinearConv"}, id="hybrid", marks=slow),
    pytest.param(timm("efficientnet_b0"), "depthwise", {"QLinearConv"}, id="EfficientNet-B0", marks=slow),
    pytest.param(timm("fastvit_t8"), "depthwise", {"QLinearConv"}, id="FastViT-T8", marks=slow),
    pytest.param(timm("fastvit_mci0"), "depthwise", {"MatMulIntegerToFloat"}, id="MobileCLIP2-S0", marks=slow),
    pytest.param(
        timm("swin_tiny_patch4_window7_224", 224, timm_pool=""),
        "windows",
        {"MatMulIntegerToFloat"},
        id="Swin-T",
        marks=slow,
    ),
]


def pictures(count: int, size: int, seed: int) -> Tensor:
    """Smooth and of every contrast, as pictures are: white noise is what trained towers never see."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic") + 0.1 * fine


def built(vision_cfg: dict[str, Any]) -> ClipModel:
    """Of random weights, with batch statistics that fold into something other than the identity."""
    model = build_model(ModelSpec(model=str(STUDENT), model_cfg={"vision_cfg": vision_cfg}), seed=0)
    norms = [module for module in model.net.modules() if isinstance(module, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 0.3
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(std=0.1, generator=generator)
        model.net.train()
        for step in range(12 if norms else 0):
            model.net.visual(pictures(24, model.image_size, step))
    model.net.eval()
    return model


def write_image_graph(tower: nn.Module, pixel_values: Tensor, path: Path) -> None:
    with torch.no_grad():
        write_graph(tower, pixel_values[:2], path, names_io=("pixel_values", "image_features"), opset=20, metadata={})


def executed_operators(path: Path) -> dict[str, int]:
    found = read_executed_graph(path, "pixel_values", runtime="onnxruntime", precision="int8")
    assert found is not None
    return found["ops"]


def quantize_and_restore(
    model: ClipModel, folder: Path, calibration: Calibration, fine_tuning: FineTuning | None = None
) -> tuple[list[nn.Module], tuple[nn.Module, nn.Module]]:
    """Return the towers as they were saved, and as they are restored."""
    kept: list[nn.Module] = []
    quantize(model, folder, calibration, fine_tuning, before_saving=lambda *towers: kept.extend(towers))
    return kept, load_quantized(folder, model)


@pytest.mark.parametrize(("vision_cfg", "kind", "integer_kernels"), TOWERS)
def test_every_family_calibrates_freezes_exports_and_runs(
    vision_cfg: dict[str, Any], kind: str, integer_kernels: set[str], tmp_path: Path
) -> None:
    model = built(vision_cfg)
    pixel_values = pictures(SAMPLES, model.image_size, 100)
    with torch.no_grad():
        expected_BD = ImageTower(model.net)(pixel_values)
        prepared_BD = float_towers(model.net, ["image"], None).image(pixel_values)
    torch.testing.assert_close(prepared_BD, expected_BD, atol=MERGED_AND_FOLDED, rtol=0)

    calibration = pixel_values, model.tokenize(["a"] * 2)
    quantize(model, tmp_path, Calibration(*calibration, towers=("image",)))
    image_tower, _ = load_quantized(tmp_path, model)
    frozen = freeze(image_tower, example_pixels(model.net))
    path = tmp_path / "image.onnx"
    write_image_graph(frozen, pixel_values, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (actual_BD,) = session.run(None, {"pixel_values": pixel_values.numpy()})

    noise = np.square(actual_BD.astype(np.float64) - expected_BD.numpy()).sum()
    sqnr_db = 10 * np.log10(np.square(expected_BD.double().numpy()).sum() / noise)
    assert sqnr_db >= MIN_SQNR_DB[kind], "not `<`: NaN must fail"
    assert integer_kernels <= set(executed_operators(path))
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    matrices = sum(parameter.numel() for parameter in frozen.parameters() if parameter.dim() > 1)
    int8 = sum(array.size for array in stored if array.dtype == np.int8)
    assert int8 > 0.7 * matrices, "the rest: patch and position embeddings, and squeeze-and-excitation, as NNCF has it"


@pytest.mark.slow
def test_a_mobilevit_whose_blocks_share_quantizers_is_saved_restored_and_frozen(tmp_path: Path) -> None:
    """Its accuracy is another matter: with random weights, 1e-6 of an input is 0.03 of a feature once it is int8."""
    model = built(timm("mobilevit_xxs"))
    pixel_values = pictures(4, 64, 100)
    calibration = Calibration(pixel_values, model.tokenize(["a"] * 4), towers=("image",))
    kept, (restored, _) = quantize_and_restore(model, tmp_path, calibration)
    assert len(list_quantizers(restored, every_place=True)) > len(list_quantizers(restored))
    found = {quantizer for of_layer in list_layers(restored, pixel_values[:2]).values() for quantizer in of_layer}
    assert found == {quantizer for _, quantizer in list_quantizers(restored)}, "each belongs to a layer"
    assert not list_quantizers(freeze(restored, pixel_values), every_place=True)
    with torch.no_grad():
        assert torch.equal(kept[0](pixel_values), restored(pixel_values))


class Joined(nn.Module):
    """Two convolutions of a picture, joined, as MobileViT joins its blocks; what is joined has one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.last(torch.cat((self.first(x), self.second(x)), dim=1))
        return joined.mean((2, 3))


def test_a_quantizer_that_two_places_share_is_frozen_in_both() -> None:
    net = nn.Module()
    net.visual = Joined().eval()
    pixel_values = pictures(4, 32, 0)
    tower = calibrate(import_nncf(), ImageTower(net).eval(), pixel_values, is_convolutional=True)
    assert len(list_quantizers(tower, every_place=True)) > len(list_quantizers(tower)), "there is such a quantizer"
    frozen = freeze(tower, pixel_values)
    assert not list_quantizers(frozen, every_place=True)
    with torch.no_grad():
        torch.testing.assert_close(frozen(pixel_values), tower(pixel_values), atol=2e-2, rtol=0)


@pytest.mark.slow
def test_a_fine_tuned_tower_of_merged_branches_is_restored_exactly(tmp_path: Path) -> None:
    model = built(timm("fastvit_t8"))
    pixel_values, input_ids = pictures(8, 64, 100), model.tokenize(["a"] * 8)
    fine_tuning = FineTuning(iter([FineTuningBatch(pixel_values, input_ids)] * 2), steps=2, lr=1e-3)
    kept, both_restored = quantize_and_restore(model, tmp_path, Calibration(pixel_values, input_ids), fine_tuning)
    merged = float_towers(model.net, ["image"], None).image.state_dict()
    moved = [name for name, value in kept[0].state_dict().items() if name in merged and not value.equal(merged[name])]
    assert any("reparam" in name for name in moved), "what was merged is trained"
    for tower, restored, values in zip(kept, both_restored, (pixel_values, input_ids), strict=True):
        with torch.no_grad():
            assert torch.equal(tower(values), restored(values))


class Activated(nn.Module):
    """Convolutions before a ReLU, a SiLU, both branches of a sum, and a dropout with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.silu, self.one, self.other, self.scaled = (nn.Conv2d(c, 8, 3) for c in (3, 8, 8, 8, 8))
        self.last, self.scale = nn.Conv2d(8, 4, 1), nn.Parameter(torch.linspace(0.5, 1.5, 8)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.silu(F.relu(self.relu(x))))
        x = self.one(x) + self.other(x)
        x = F.dropout(self.scaled(x), 0.1, self.training) * self.scale
        pooled: Tensor = self.last(x).mean((2, 3))
        return pooled


def test_outputs_are_rounded_where_a_convolution_would_be_computed_in_floats(tmp_path: Path) -> None:
    nncf = import_nncf()
    from toolchain.quantization.output_rounding import OutputQuantizer, round_outputs

    torch.manual_seed(0)
    net = nn.Module()
    net.visual = Activated().eval()
    pixel_values = pictures(16, 32, 0)
    tower = calibrate(nncf, ImageTower(net).eval(), pixel_values, is_convolutional=True)
    round_outputs(tower, [pixel_values[:10], pixel_values[10:]])
    rounded = [name for name, quantizer in list_quantizers(tower) if isinstance(quantizer, OutputQuantizer)]
    assert {name.split("/")[1] for name in rounded} == {"silu", "scaled"}

    seen: dict[str, Tensor] = {}
    plain = copy.deepcopy(net.visual)
    plain.silu.register_forward_hook(lambda module, inputs, output: seen.update(silu=output))
    with torch.no_grad():
        plain(pixel_values)
    scale = next(q.scale for name, q in list_quantizers(tower) if name in rounded and "/silu/" in name)
    assert scale.item() == pytest.approx(seen["silu"].abs().max().item(), rel=0.05), "what it reads is rounded, too"

    frozen = freeze(tower, pixel_values, round_outputs=False)
    path = tmp_path / "image.onnx"
    for exported, in_integers in ((freeze(tower, pixel_values), 6), (frozen, 4)):
        write_image_graph(exported, pixel_values, path)
        operators = executed_operators(path)
        assert (operators["QLinearConv"], operators.get("Conv", 0)) == (in_integers, 6 - in_integers)
    with torch.no_grad():
        for int8 in (tower, frozen):
            torch.testing.assert_close(int8(pixel_values), ImageTower(net)(pixel_values), atol=2e-2, rtol=0)


def test_the_output_of_a_dead_convolution_stays_finite() -> None:
    nncf = import_nncf()
    from toolchain.quantization.output_rounding import round_outputs

    net = nn.Module()
    net.visual = Activated().eval()
    for parameter in net.visual.silu.parameters():
        nn.init.zeros_(parameter)
    pixel_values = pictures(4, 32, 0)
    tower = calibrate(nncf, ImageTower(net).eval(), pixel_values, is_convolutional=True)
    round_outputs(tower, [pixel_values])
    scales = [quantizer.scale for _, quantizer in list_quantizers(tower)]
    assert all((scale > 0).all() for scale in scales)
    with torch.no_grad():
        assert freeze(tower, pixel_values)(pixel_values).isfinite().all()


def test_rounded_outputs_are_saved_and_restored(tmp_path: Path) -> None:
    model = built(timm("test_efficientnet", 32))
    pixel_values = pictures(8, 32, 0)
    calibration = Calibration(pixel_values, model.tokenize(["a"] * 2), towers=("image",))
    kept, (restored, _) = quantize_and_restore(model, tmp_path, calibration)
    kinds = [[(name, type(q).__name__) for name, q in list_quantizers(tower)] for tower in (kept[0], restored)]
    assert kinds[0] == kinds[1]
    assert "OutputQuantizer" in dict(kinds[1]).values()
    layers = list_layers(restored, pixel_values[:2])
    assert {q for of_layer in layers.values() for q in of_layer} == {q for _, q in list_quantizers(restored)}
    with torch.no_grad():
        assert torch.equal(kept[0](pixel_values), restored(pixel_values))
