"""Trimmed text towers give the features and gradients of whole ones, and towers that would not are not trimmed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from toolchain.models import text_trimming as trimming
from toolchain.models.build import build_model
from toolchain.models.text_trimming import (
    encode_tokens,
    groups_of_like_length,
    is_trimmable,
    trim_tokens,
    use_causal_kernels,
)
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import CONFIG, SHIPPED, shipped_models

# Of unit features in float32: products of other shapes are summed in another order.
MAX_FEATURE_ERROR = 1e-6
# Of gradients in float64, relative to the largest.
MAX_GRADIENT_ERROR = 1e-12

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["", "a cat", "two dogs on a lawn", "the character leftwards arrow with hook above a small letter"]
END = 49407


def text(**changes: Any) -> dict[str, Any]:
    return {**SMALL["text_cfg"], **changes}  # type: ignore[dict-item]


def net_of(text_cfg: dict[str, Any], kind: type[nn.Module] = CLIP, **others: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(SMALL["embed_dim"], SMALL["vision_cfg"], text_cfg, **others).eval()


def shipped_text_cfgs() -> list[dict[str, Any]]:
    """Each text tower that ships, once: the paper's students share theirs."""
    configs = [json.loads((SHIPPED / name / CONFIG).read_text())["model_cfg"]["text_cfg"] for name in shipped_models()]
    return [config for index, config in enumerate(configs) if config not in configs[:index]]


TRIMMED: dict[str, Callable[[], nn.Module]] = {
    "CLIP": lambda: net_of(text()),
    "QuickGELU": lambda: net_of(text(), quick_gelu=True),
    "CustomTextCLIP": lambda: net_of(text(), CustomTextCLIP),
    "CustomTextCLIP, its own end": lambda: net_of(text(pool_type="eos", eos_id=END), CustomTextCLIP),
    "projection with bias": lambda: net_of(text(proj_bias=True), CustomTextCLIP),
    "no projection": lambda: net_of(text(proj_type="none"), CustomTextCLIP),
    "own end": lambda: net_of(text(pool_type="eos", eos_id=END)),
    "other blocks": lambda: net_of(text(qk_norm=True, scale_fc=True, ls_init_value=0.1)),
}


def input_ids(net: Any) -> Tensor:
    """Rows of different lengths, none as long as the context, zeros behind them."""
    context, vocabulary = net.context_length, net.vocab_size
    input_ids_BT = torch.zeros(4, context, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate((2, 3, context // 3, context // 2)):
        input_ids_BT[row, : length - 1] = torch.randint(1, vocabulary - 2, (length - 1,), generator=generator)
        input_ids_BT[row, length - 1] = vocabulary - 1
    return input_ids_BT


def features(net: Any, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Trimmed and whole, of unit norm."""
    with torch.inference_mode():
        trimmed, whole = encode_tokens(net, trim_tokens(net, input_ids_BT)), net.encode_text(input_ids_BT)
    return F.normalize(trimmed, dim=-1), F.normalize(whole, dim=-1)


@pytest.mark.parametrize("net", [*TRIMMED.values()], ids=[*TRIMMED])
@pytest.mark.parametrize("training", [False, True])
def test_trimmed_features_are_whole_ones(net: Callable[[], nn.Module], training: bool) -> None:
    holds(net().train(training))


@pytest.mark.parametrize(
    "text_cfg", [*shipped_text_cfgs(), open_clip.get_model_config("ViT-L-14")["text_cfg"]], ids=str
)
def test_trimmed_features_of_text_towers_at_their_size(text_cfg: dict[str, Any]) -> None:
    holds(net_of(text_cfg))


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "CustomTextCLIP, its own end"])
def test_causal_kernels_compute_the_same_without_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = TRIMMED[name]()
    input_ids_BT, before = input_ids(net), copy.deepcopy(net)
    use_causal_kernels(net)
    masks: list[tuple[bool, bool]] = []
    real = F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> Tensor:
        masks.append((attn_mask is not None, is_causal))
        return real(q, k, v, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for training in (False, True):
        masks.clear()
        trimmed_BL = trim_tokens(net, input_ids_BT)
        found_BD, expected_BD = (
            F.normalize(encode_tokens(n.train(training), trimmed_BL), dim=-1) for n in (net, before)
        )
        assert (found_BD - expected_BD).abs().max() <= MAX_FEATURE_ERROR
    causal = masks[: len(masks) // 2]  # the rest is that of the net before
    assert set(causal) == {(False, True), (True, False)}, "all blocks but the last, which has one token, know it"
    assert set(masks[len(masks) // 2 :]) == {(True, False)}
    assert [*net.state_dict()] == [*before.state_dict()]
    whole_BD = F.normalize(net.encode_text(input_ids_BT), dim=-1)
    assert (found_BD - whole_BD).abs().max() <= MAX_FEATURE_ERROR
    assert net.eval().encode_text(input_ids_BT[:1]).shape == (1, 32), "open_clip's own pass works too"


def test_another_mask_stays_added() -> None:
    net: Any = TRIMMED["CLIP"]()
    net.attn_mask[0, 1] = 0.0  # the first token sees the second
    use_causal_kernels(net)
    assert {type(block.attn) for block in net.transformer.resblocks} == {nn.MultiheadAttention}
    image: Any = TRIMMED["CLIP"]()
    use_causal_kernels(image)
    assert {type(block.attn) for block in image.visual.transformer.resblocks} == {nn.MultiheadAttention}


def holds(net: nn.Module) -> None:
    assert is_trimmable(net)
    input_ids_BT = input_ids(net)
    assert trim_tokens(net, input_ids_BT).shape == (4, net.context_length // 2)
    trimmed_BD, whole_BD = features(net, input_ids_BT)
    assert (trimmed_BD - whole_BD).abs().max() <= MAX_FEATURE_ERROR
    assert not (whole_BD[0] - whole_BD[1]).abs().max() <= 100 * MAX_FEATURE_ERROR, "captions differ by more than that"


def test_real_captions_through_a_model_of_clipkds() -> None:
    model = build_model(ModelSpec(model="ViT-B-16", model_cfg=SMALL), seed=0)
    input_ids_BT = model.tokenize(CAPTIONS)
    longest = int((input_ids_BT == END).int().argmax(-1).max()) + 1
    ran: list[int] = []
    model.net.transformer.resblocks[0].register_forward_pre_hook(lambda _, inputs: ran.append(inputs[0].shape[1]))
    with torch.inference_mode():
        whole_BD = model.net.encode_text(input_ids_BT)
        assert ran == [77]
        trimmed_BD = model.encode_text(input_ids_BT)
        ran.clear()
        model.encode_text(input_ids_BT)
    assert max(ran) == longest, "the tower ran no further than the longest caption, and the proof is made once"
    assert (F.normalize(trimmed_BD, dim=-1) - F.normalize(whole_BD, dim=-1)).abs().max() <= MAX_FEATURE_ERROR


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "CustomTextCLIP, its own end", "other blocks"])
def test_gradients_are_those_of_the_whole_tower(name: str) -> None:
    net: Any = TRIMMED[name]().double()
    input_ids_BT = input_ids(net)
    direction_BD = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        net.zero_grad()
        (F.normalize(encode(input_ids_BT), dim=-1) * direction_BD).sum().backward()
        return {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}

    trimmed, whole = gradients(lambda ids: encode_tokens(net, trim_tokens(net, ids))), gradients(net.encode_text)
    assert trimmed.keys() == whole.keys()
    assert len(whole) > 20
    largest = max(gradient.abs().max() for gradient in whole.values())
    for key, gradient in whole.items():
        assert (trimmed[key] - gradient).abs().max() <= MAX_GRADIENT_ERROR * largest, key


def test_tokens_may_be_cut_before_they_are_encoded() -> None:
    net = TRIMMED["CLIP"]()
    input_ids_BT = input_ids(net)
    with torch.inference_mode():
        whole_BD = encode_tokens(net, input_ids_BT)
        for length in (net.context_length // 2, net.context_length // 2 + 1, 60):
            cut_BD = encode_tokens(net, input_ids_BT[:, :length])
            assert (F.normalize(cut_BD, dim=-1) - F.normalize(whole_BD, dim=-1)).abs().max() <= MAX_FEATURE_ERROR


def test_the_longest_caption_leaves_nothing_to_cut() -> None:
    net: Any = TRIMMED["CLIP"]()
    input_ids_BT = input_ids(net)
    input_ids_BT[0] = 7
    input_ids_BT[0, -1] = END
    assert trim_tokens(net, input_ids_BT).shape == input_ids_BT.shape
    trimmed_BD, whole_BD = features(net, input_ids_BT)
    assert (trimmed_BD - whole_BD).abs().max() <= MAX_FEATURE_ERROR


def test_a_caption_that_spells_the_end_is_read_at_its_first_one() -> None:
    net: Any = TRIMMED["CLIP"]()
    input_ids_BT = input_ids(net)
    input_ids_BT[:, 1] = END
    assert trim_tokens(net, input_ids_BT).shape == (4, 2)
    trimmed_BD, whole_BD = features(net, input_ids_BT)
    assert (trimmed_BD - whole_BD).abs().max() <= MAX_FEATURE_ERROR


def test_a_row_without_an_end_of_its_own_is_read_at_the_first_token_as_in_open_clip() -> None:
    net: Any = TRIMMED["own end"]()
    input_ids_BT = input_ids(net)
    input_ids_BT[0] = 7
    trimmed_BD, whole_BD = features(net, input_ids_BT)
    assert (trimmed_BD - whole_BD).abs().max() <= MAX_FEATURE_ERROR


def test_the_net_may_be_in_another_precision_and_is_left_as_it_is() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        net = TRIMMED["CLIP"]().to(dtype)
        before = copy.deepcopy(net.state_dict())
        assert is_trimmable(net)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert isinstance(net.visual, open_clip.transformer.VisionTransformer)


# Captions of like length run together, on a CPU.


def test_groups_cover_every_caption_once_and_cost_no_more_than_one() -> None:
    lengths = sorted(torch.randint(3, 78, (64,), generator=torch.Generator().manual_seed(0)).tolist())
    groups = groups_of_like_length(lengths)
    assert len(groups) > 2
    assert [start for start, _ in groups] == [0, *(end for _, end in groups[:-1])]
    assert groups[-1][1] == len(lengths)
    tokens = sum((end - start) * lengths[end - 1] for start, end in groups)
    assert sum(lengths) <= tokens < 0.7 * len(lengths) * lengths[-1]


@pytest.mark.parametrize("lengths", [[5], [9, 9, 9], [8, 9, 9, 10]], ids=str)
def test_captions_of_like_length_stay_together(lengths: list[int]) -> None:
    assert groups_of_like_length(lengths) == [(0, len(lengths))]


def test_one_long_caption_runs_alone() -> None:
    net: Any = TRIMMED["CLIP"]()
    ran: list[tuple[int, ...]] = []
    net.transformer.resblocks[0].register_forward_pre_hook(lambda _, inputs: ran.append(tuple(inputs[0].shape[:2])))
    input_ids_BT = torch.zeros(9, 77, dtype=torch.long)
    for row, length in enumerate((6, 6, 77, 6, 6, 6, 6, 6, 6)):
        input_ids_BT[row, : length - 1], input_ids_BT[row, length - 1] = row + 1, END
    with torch.inference_mode():
        found_BD = encode_tokens(net, input_ids_BT)
        assert ran == [(8, 6), (1, 77)]
        whole_BD = net.encode_text(input_ids_BT)
    error = (F.normalize(found_BD, dim=-1) - F.normalize(whole_BD, dim=-1)).abs().max()
    assert error <= MAX_FEATURE_ERROR, "in the order in which they came"


# Not trimmed.


def hugging_face(tmp_path: Path) -> nn.Module:
    """A text tower of transformers, from a configuration on disk."""
    roberta = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta |= {"intermediate_size": 64, "vocab_size": 1000, "max_position_embeddings": 90, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(roberta))
    cfg = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    return net_of(cfg, CustomTextCLIP)


def coca(_: Path) -> nn.Module:
    return open_clip.coca_model.CoCa(
        32, {"width": 32, "heads": 2, "layers": 1, "context_length": 20}, text(embed_cls=True), SMALL["vision_cfg"]
    ).eval()


NOT_TRIMMED: dict[str, Callable[[Path], nn.Module]] = {
    "no causal mask": lambda _: net_of(text(no_causal_mask=True)),
    "no causal mask, CustomTextCLIP": lambda _: net_of(text(no_causal_mask=True), CustomTextCLIP),
    "last": lambda _: net_of(text(pool_type="last")),
    "first": lambda _: net_of(text(pool_type="first"), CustomTextCLIP),
    "none": lambda _: net_of(text(pool_type="none"), CustomTextCLIP),
    "class token": lambda _: net_of(text(embed_cls=True), CustomTextCLIP),
    "tokens too": lambda _: net_of(text(output_tokens=True), CustomTextCLIP),
    "SigLIP": lambda _: net_of(text(no_causal_mask=True, pool_type="last", proj_bias=True), CustomTextCLIP),
    "transformers": hugging_face,
    "CoCa": coca,
    "a context of one": lambda _: net_of(text(context_length=1)),
}


@pytest.mark.parametrize("name", NOT_TRIMMED)
def test_a_tower_of_another_kind_is_not_trimmed(tmp_path: Path, name: str) -> None:
    assert not is_trimmable(NOT_TRIMMED[name](tmp_path))


def test_a_model_that_is_not_trimmed_still_encodes(student_folder: Path) -> None:
    model = build_model(ModelSpec(model="ViT-B-16", model_cfg=SMALL | {"text_cfg": text(no_causal_mask=True)}), seed=0)
    input_ids_BT = model.tokenize(CAPTIONS)
    with torch.inference_mode():
        assert torch.equal(model.encode_text(input_ids_BT), model.net.encode_text(input_ids_BT))


class SeesAll(nn.Module):
    """A block that ignores its mask, although the model has one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def get_weight_dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        seen: Tensor = self.block(x)
        return seen


def test_trimming_is_proven_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = TRIMMED["CLIP"]()
    net.transformer.resblocks[0] = SeesAll(net.transformer.resblocks[0])
    assert not is_trimmable(net), "what follows the end token has an effect here"
    net = TRIMMED["CLIP"]()
    with torch.no_grad():
        net.positional_embedding[0, 0] = float("nan")
    assert not is_trimmable(net), "NaN is not equal to anything"
    net = TRIMMED["CLIP"]()
    shift = 3 * MAX_FEATURE_ERROR
    monkeypatch.setattr(
        trimming, "encode_tokens", lambda net, ids: F.normalize(encode_tokens(net, ids), dim=-1) + shift
    )
    assert not is_trimmable(net), "the bound is tight"
