"""Rewrite attention into the form that inference runtimes recognize.

nn.MultiheadAttention of torch moves the batch behind the positions and back, and stacks queries, keys and values before
it splits them: 5 copies per layer.  OpenVINO still recognizes attention between them; ONNX Runtime executes each copy.
The attention pool of open_clip's ResNet also computes an output for every position, although only the first is used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import ResidualAttentionBlock
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn


def plain_attention(tower: nn.Module) -> None:
    """Replace, in place, the attention pool of open_clip's ResNet and the plain self-attention of open_clip and timm.

    Other kinds stay.

    Parameters remain the same objects under the same names.
    """
    for name, module in list(tower.named_modules()):
        if isinstance(module, ResidualAttentionBlock) and not hasattr(module, "ln_1_kv") and module.attn.batch_first:
            module.attn = _OfTorch(module.attn)
        elif type(module) is TimmAttention and _is_plain(module):
            tower.set_submodule(name, _OfTimm(module))
        elif type(module) is AttentionPool2d:
            tower.set_submodule(name, _OfResNet(module))


def _is_plain(module: Any) -> bool:
    return module.gate is None and all(type(p) is nn.Identity for p in (module.q_norm, module.k_norm, module.norm))


def attend(q_BQE: Tensor, k_BLE: Tensor, v_BLE: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + mask) v, heads concatenated: [B, Q, E].  arXiv:1706.03762, 3.2.

    The mask is [Q, L] or [B * H, Q, L].
    """
    width = q_BQE.shape[-1] // num_heads
    if q_BQE.dtype == torch.float16:  # the product's sums could overflow float16
        q_BQE = q_BQE * width**-0.5
    q_BHQD, k_BHLD, v_BHLD = (
        part_BLE.reshape(*part_BLE.shape[:2], num_heads, width).transpose(1, 2) for part_BLE in (q_BQE, k_BLE, v_BLE)
    )
    logits_BHQL = q_BHQD @ k_BHLD.transpose(-2, -1)
    if q_BQE.dtype != torch.float16:  # OpenVINO's attention fuses a scale between product and softmax
        logits_BHQL = logits_BHQL * width**-0.5
    if mask is not None:
        logits_BHQL = logits_BHQL + (mask if mask.dim() == 2 else mask.reshape(-1, num_heads, *mask.shape[1:]))
    mixed_BQHD = (logits_BHQL.softmax(-1) @ v_BHLD).transpose(1, 2)
    return mixed_BQHD.flatten(-2)


class _OfTorch(nn.Module):
    """A replacement of nn.MultiheadAttention for self-attention."""

    def __init__(self, replaced: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = replaced.in_proj_weight, replaced.in_proj_bias
        self.out_proj, self.num_heads = replaced.out_proj, replaced.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        assert key is query
        assert value is query
        qkv_BLE3 = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q_BLE, k_BLE, v_BLE = qkv_BLE3.chunk(3, -1)
        return self.out_proj(attend(q_BLE, k_BLE, v_BLE, self.num_heads, attn_mask)), None


class _OfTimm(nn.Module):
    """A replacement of timm's attention."""

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = replaced.qkv, replaced.proj, replaced.num_heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert not is_causal
        q_BLE, k_BLE, v_BLE = self.qkv(x).chunk(3, -1)
        projected: Tensor = self.proj(attend(q_BLE, k_BLE, v_BLE, self.num_heads, attn_mask))
        return projected


class _OfResNet(nn.Module):
    """A replacement of the attention pool of open_clip's ResNet: the mean of positions attends to it and to them."""

    def __init__(self, replaced: AttentionPool2d) -> None:
        super().__init__()
        self.positional_embedding, self.num_heads = replaced.positional_embedding, replaced.num_heads
        self.k_proj, self.q_proj, self.v_proj = replaced.k_proj, replaced.q_proj, replaced.v_proj
        self.c_proj = replaced.c_proj

    def forward(self, x: Tensor) -> Tensor:
        positions_BLE = x.flatten(2).transpose(1, 2)
        positions_BLE = torch.cat([positions_BLE.mean(1, keepdim=True), positions_BLE], 1)
        positions_BLE = positions_BLE + self.positional_embedding
        q_B1E = self.q_proj(positions_BLE[:, :1])
        pooled_B1E = attend(q_B1E, self.k_proj(positions_BLE), self.v_proj(positions_BLE), self.num_heads, None)
        projected: Tensor = self.c_proj(pooled_B1E[:, 0])
        return projected
