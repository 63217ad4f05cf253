"""Open-coded attention: what torch's and timm's compute, in the same parameters."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock, Transformer
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from export.graphs.onnx_graph import write_graph
from toolchain.models.plain_attention import attend, plain_attention

MAX_ERROR = 1e-9  # of float64, whose sums run in another order


def text_transformer() -> nn.Module:
    return Transformer(width=32, layers=2, heads=4)


def image_transformer() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)


def resnet() -> nn.Module:
    return ModifiedResNet([1, 1, 1, 1], output_dim=12, heads=2, image_size=64, width=8)


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (text_transformer, torch.randn(3, 7, 32)),
        (image_transformer, torch.randn(3, 3, 16, 16)),
        (resnet, torch.randn(3, 3, 64, 64)),
    ],
)
def test_same_features_gradients_and_state(build: Callable[[], nn.Module], example: Tensor) -> None:
    torch.manual_seed(0)
    tower, example = build().eval().double(), example.double()
    plain = copy.deepcopy(tower)
    plain_attention(plain)
    kinds = nn.MultiheadAttention, Attention, AttentionPool2d
    assert not any(isinstance(module, kinds) for module in plain.modules())
    assert list(plain.state_dict()) == list(tower.state_dict())
    for one in (tower, plain):
        one(example).square().sum().backward()
    assert (plain(example) - tower(example)).abs().max() < MAX_ERROR
    theirs = dict(tower.named_parameters())
    for name, parameter in plain.named_parameters():
        grad, expected = parameter.grad, theirs[name].grad
        assert grad is not None
        assert expected is not None
        assert (grad - expected).abs().max() <= MAX_ERROR * (1 + expected.abs().max())


def test_masks_of_all_rows_and_of_each() -> None:
    """Against the definition, a head and a row at a time, in float64."""
    torch.manual_seed(0)
    batch, length, heads, width = 2, 5, 3, 4
    qkv = torch.randn(batch, length, 3 * heads * width, dtype=torch.float64)
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    own = torch.randn(batch * heads, length, length, dtype=torch.float64)
    for mask, mask_of in ((None, None), (causal, lambda b, h: causal), (own, lambda b, h: own[b * heads + h])):
        q_BLE, k_BLE, v_BLE = qkv.chunk(3, -1)
        got = attend(q_BLE, k_BLE, v_BLE, heads, mask)
        for b in range(batch):
            for h in range(heads):
                q, k, v = (qkv[b, :, (part * heads + h) * width :][:, :width] for part in range(3))
                for row in range(length):
                    logits = torch.stack([q[row] @ k[other] for other in range(length)]) / width**0.5
                    logits = logits + mask_of(b, h)[row] if mask_of else logits
                    shares = logits.exp() / logits.exp().sum()
                    expected = sum((share * v[other] for other, share in enumerate(shares)), torch.zeros(width))
                    assert (got[b, row, h * width :][:width] - expected).abs().max() < 1e-12


def test_what_is_more_than_self_attention_stays() -> None:
    pooler = AttentionalPooler(32, 32, n_head=4, n_queries=2)
    crossing = ResidualAttentionBlock(32, 4, is_cross_attention=True)
    normed = Attention(32, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm)
    for module in (pooler, crossing, nn.Sequential(normed)):
        kinds = [type(part) for part in module.modules()]
        plain_attention(module)
        assert [type(part) for part in module.modules()] == kinds


def test_a_graph_has_no_copies_but_those_of_the_heads(tmp_path: Path) -> None:
    import onnx

    tower = text_transformer().eval()
    plain_attention(tower)
    with torch.no_grad():
        names_io = ("x", "y")
        write_graph(tower, torch.randn(2, 7, 32), tmp_path / "x.onnx", names_io=names_io, opset=20, metadata={})
    kinds = [node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert kinds.count("Softmax") == 2
    # of each layer: 4 of weights, which runtimes fold, and q, k, v and back
    assert kinds.count("Transpose") <= 2 * (4 + 4)
    assert not {"Gather", "Slice", "Squeeze", "Unsqueeze"} & set(kinds)
