"""The last block run for one token gives what the whole block gives there, with the same gradients."""

import copy

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import nn

from toolchain.models.last_block import block_at, encode_class_token, reads_class_token

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WIDTH, HEADS, BATCH = 7, 12, 3, 4
MAX_ERROR = 1e-12  # float64, summed in another order


def tower(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 3, "heads": 2, "mlp_ratio": 4, "output_dim": 10}
    return VisionTransformer(**(sizes | changes)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("block_type", ["default", "custom"])
def test_one_token_is_what_the_whole_block_gives_there(
    causal: bool, layer_scale: float | None, block_type: str
) -> None:
    torch.manual_seed(0)
    block = Transformer(WIDTH, 1, HEADS, ls_init_value=layer_scale, block_type=block_type).resblocks[0].double()
    other = copy.deepcopy(block)
    mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1) if causal else None
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    position = torch.tensor([0, 6, 3, 3])
    whole = other(inputs[0], attn_mask=mask)[torch.arange(BATCH), position]
    found = block_at(block, inputs[1], position, mask)
    torch.testing.assert_close(found, whole, rtol=0, atol=MAX_ERROR)
    direction = torch.randn_like(whole)
    (whole * direction).sum().backward()
    (found * direction).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=MAX_ERROR)
    for (name, mine), theirs in zip(block.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=MAX_ERROR, msg=name)


def test_the_last_block_runs_its_mlp_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    block = ResidualAttentionBlock(WIDTH, HEADS)
    shapes = []
    block.mlp.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    block_at(block, torch.randn(BATCH, TOKENS, WIDTH), torch.zeros(BATCH, dtype=torch.int64), None)
    assert shapes == [(BATCH, WIDTH)]


@pytest.mark.parametrize("changes", [{}, {"output_dim": 24}, {"no_ln_pre": True}, {"ls_init_value": 0.1}], ids=str)
def test_an_image_tower_that_reads_its_class_token(changes: dict[str, object]) -> None:
    visual = tower(**changes)
    assert reads_class_token(visual)
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(encode_class_token(visual, pixels), visual(pixels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_tower_does_not_matter_to_the_check(dtype: torch.dtype) -> None:
    assert reads_class_token(tower().to(dtype))


def test_patch_dropout_still_drops() -> None:
    visual = tower(patch_dropout=0.5)
    assert reads_class_token(visual)
    visual.train()
    pixels = torch.randn(2, 3, 16, 16)
    assert not torch.equal(encode_class_token(visual, pixels), encode_class_token(visual, pixels))


@pytest.mark.parametrize(
    "changes", [{"pool_type": "avg"}, {"attentional_pool": True, "output_dim": 16}, {"output_tokens": True}], ids=str
)
def test_other_poolings_are_left_alone(changes: dict[str, object]) -> None:
    assert not reads_class_token(tower(**changes))


def test_other_towers_are_left_alone() -> None:
    assert not reads_class_token(nn.Conv2d(3, 4, 1))


def test_a_tower_that_computes_something_else_is_noticed() -> None:
    visual = tower()
    visual.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not reads_class_token(visual), "a hook of somebody's"
    broken = tower()
    with torch.no_grad():
        broken.conv1.weight.fill_(float("nan"))
    assert not reads_class_token(broken)
