"""What int8 makes of a transformer: gains of layer norms move into the linear layers behind them, the same function,
which 8 bits hold better; attention stays float unless asked for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT
from test_quantize_towers import VIT
from torch import Tensor, nn

from toolchain.errors import ArtifactError
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.folding import move_gains
from toolchain.models.plain_attention import plain_attention
from toolchain.models.towers import ImageTower, TextTower
from toolchain.quantization import checkpoint
from toolchain.quantization.checkpoint import load_quantized
from toolchain.quantization.freeze import freeze
from toolchain.quantization.nncf_backend import list_quantizers
from toolchain.quantization.quantize import Calibration, FineTuning, FineTuningBatch, quantize
from toolchain.quantization.sensitivity import list_layers
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import INT8_CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = ModelSpec(model=str(STUDENT), model_cfg={"vision_cfg": VIT})
OUTLIER = 40.0  # the gain of one channel in 32, as trained towers have them (arXiv:2209.13325, figure 2)


@pytest.fixture
def model() -> ClipModel:
    """With gains and biases unlike 1 and 0."""
    built = build_model(SPEC, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in built.net.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.bias.normal_(std=0.3, generator=draw)
    built.net.eval()
    return built


def inputs(model: ClipModel, count: int = 8) -> tuple[Tensor, Tensor]:
    size = model.image_size
    pixel_values = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
    return pixel_values, model.tokenize([f"the letter {letter}" for letter in "abcdefgh"[:count]])


def test_what_moves_leaves_the_features_as_they_were(model: ClipModel) -> None:
    plain_attention(model.net)
    for tower, shown in zip((ImageTower(model.net), TextTower(model.net)), inputs(model), strict=True):
        with torch.no_grad():
            before_BD = tower(shown)
            moved = move_gains(tower, shown[:2])
            torch.testing.assert_close(tower(shown), before_BD, atol=1e-5, rtol=0)
        norms = {name for name, module in tower.named_modules() if isinstance(module, nn.LayerNorm)}
        assert set(moved) == {name for name in norms if name.endswith((".ln_1", ".ln_2"))}
        assert all(tower.get_submodule(name).weight is None for name in moved)
        assert all(tower.get_submodule(name).weight is not None for name in norms - {*moved})
        assert move_gains(tower, shown[:2]) == [], "none is left"


class Tower(nn.Module):
    def __init__(self, forward: Callable[["Tower", Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4, bias=bias), nn.Linear(4, 4)
        self.of = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


@pytest.mark.parametrize(
    ("forward", "bias", "moves"),
    [
        pytest.param(lambda t, x: t.first(n := t.norm(x)) + t.second(n), True, True, id="two linear layers"),
        pytest.param(lambda t, x: t.first(n := t.norm(x)) + n, True, False, id="something else too"),
        pytest.param(lambda t, x: t.first(t.norm(x)), False, False, id="a linear layer without a bias"),
        pytest.param(lambda t, x: t.first(t.norm(x)) + t.first(x), True, False, id="a layer that reads others too"),
        pytest.param(lambda t, x: t.first(t.norm(x)) + t.second(t.norm(-x)), True, False, id="a norm that runs twice"),
        pytest.param(lambda t, x: t.first(n := t.norm(x)) + n.shape[-1], True, True, id="its shape is no reader"),
        pytest.param(lambda t, x: torch.cat([t.first(n := t.norm(x)), n]), True, False, id="what joins it"),
        pytest.param(lambda t, x: t.norm(x), True, False, id="nothing"),
    ],
)
def test_only_what_linear_layers_alone_read_moves(
    forward: Callable[[Tower, Tensor], Tensor], bias: bool, moves: bool
) -> None:
    torch.manual_seed(0)
    tower, x = Tower(forward, bias), torch.randn(3, 4)
    nn.init.normal_(tower.norm.weight)
    nn.init.normal_(tower.norm.bias)
    with torch.no_grad():
        before = tower(x)
        assert move_gains(tower, x) == (["norm"] if moves else [])
        torch.testing.assert_close(tower(x), before)


def test_one_loud_channel_costs_the_others_less(
    model: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, _ = calibration = inputs(model)
    with torch.no_grad():
        for name, module in model.net.visual.named_modules():
            if name.endswith((".ln_1", ".ln_2")):
                module.weight[3] = OUTLIER
        expected_BD = ImageTower(model.net)(shown)

    def noise(folder: Path) -> float:
        folder.mkdir()
        quantize(model, folder, Calibration(*calibration, towers=("image",)))
        with torch.no_grad():
            frozen = freeze(load_quantized(folder, model)[0], shown)
            return (frozen(shown) - expected_BD).square().sum().item()

    moved = noise(tmp_path / "moved")
    monkeypatch.setattr(checkpoint, "move_gains", lambda tower, example: [])
    assert moved < noise(tmp_path / "kept") / 2, "3 dB"


def test_fine_tuned_towers_are_restored_to_the_bit_and_stay_plain_open_clip(model: ClipModel, tmp_path: Path) -> None:
    batch = FineTuningBatch(*inputs(model))
    kept: list[nn.Module] = []
    quantize(
        model,
        tmp_path,
        Calibration(*inputs(model)),
        FineTuning(iter([batch] * 3), steps=3, lr=1e-3),
        before_saving=lambda *t: kept.extend(t),
    )
    plain = build_model(SPEC, seed=3)
    plain.net.load_state_dict(checkpoint.load_file(tmp_path / checkpoint.WEIGHTS))
    assert torch.equal(
        plain.net.visual.transformer.resblocks[0].ln_1.weight, torch.ones_like(model.net.visual.ln_post.weight)
    )
    restored = load_quantized(tmp_path, model)
    for trained, tower, shown in zip(kept, restored, inputs(model), strict=True):
        assert not any(name.endswith(("ln_1.weight", "ln_2.bias")) for name, _ in trained.named_parameters())
        with torch.no_grad():
            assert torch.equal(trained.eval()(shown), tower(shown))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, id="more positions"),
        pytest.param(
            {"model_type": "bert", "max_position_embeddings": 64, "pad_token_id": 0}, id="all zeros are padding"
        ),
    ],
)
def test_a_text_tower_from_transformers_is_quantized_and_restored(config: dict[str, Any], tmp_path: Path) -> None:
    small = {"vocab_size": 1200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | small | {"intermediate_size": 64}))
    text_cfg = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(STUDENT), "hf_model_pretrained": False}
    text_cfg |= {"hf_pooler_type": "mean_pooler", "context_length": 20}
    changes = {"vision_cfg": VIT, "text_cfg": text_cfg}
    model = build_model(ModelSpec(model=str(STUDENT), model_cfg=changes), seed=0)
    model.net.eval()
    _, input_ids = calibration = inputs(model)
    kept: list[nn.Module] = []
    (tmp_path / "int8").mkdir()
    quantize(
        model,
        tmp_path / "int8",
        Calibration(*calibration, towers=("text",)),
        before_saving=lambda *towers: kept.extend(towers),
    )
    tower = load_quantized(tmp_path / "int8", model)[1]
    with torch.no_grad():
        assert torch.equal(tower(input_ids), kept[1](input_ids))
        assert (tower(input_ids) * TextTower(model.net)(input_ids)).sum(-1).min() > 0.99


def test_a_checkpoint_from_before_is_refused(model: ClipModel, tmp_path: Path) -> None:
    quantize(model, tmp_path, Calibration(*inputs(model)))
    config = json.loads((tmp_path / INT8_CONFIG).read_text())
    del config["moved"]
    (tmp_path / INT8_CONFIG).write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"older clipkd\. Quantize again: clipkd quantize"):
        load_quantized(tmp_path, model)


def test_attention_is_rounded_only_if_asked_for(model: ClipModel, tmp_path: Path) -> None:
    shown, _ = calibration = inputs(model)
    towers = {}
    for attention in (False, True):
        (tmp_path / str(attention)).mkdir()
        quantize(model, tmp_path / str(attention), Calibration(*calibration, towers=("image",), attention=attention))
        towers[attention] = load_quantized(tmp_path / str(attention), model)[0]
    names = {attention: {name for name, _ in list_quantizers(tower)} for attention, tower in towers.items()}
    assert names[False] < names[True]
    added = names[True] - names[False]
    assert sum("/softmax/" in name for name in added) == VIT["layers"]
    assert sum("/attn/linear/" in name for name in added) == VIT["layers"], "queries, keys and values share one"
    layers = list_layers(towers[True], shown[:2])
    assert all("linear" in name or "matmul" in name for name in layers), "what reads no weight belongs to what made it"
    with torch.no_grad():
        expected_BD = ImageTower(model.net)(shown)
        for tower in towers.values():
            signal_to_noise = 1 / (freeze(tower, shown)(shown) - expected_BD).square().sum(-1).max()
            assert signal_to_noise > 100, "20 dB"
