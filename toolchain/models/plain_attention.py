"""Rewrite attention into the form that inference runtimes recognize.

nn.MultiheadAttention of torch moves the batch behind the positions and back, and stacks queries, keys and values before
it splits them: 5 copies per layer.  OpenVINO still recognizes attention between them; ONNX Runtime executes each copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn


def plain_attention(tower: nn.Module) -> None:
    """Replace, in place, the plain self-attention of open_clip's and timm's transformers; other kinds stay.

    Parameters remain the same objects under the same names.
    """
    for name, module in list(tower.named_modules()):
        if isinstance(module, ResidualAttentionBlock) and not hasattr(module, "ln_1_kv") and module.attn.batch_first:
            module.attn = _OfTorch(module.attn)
        elif type(module) is TimmAttention and _is_plain(module):
            tower.set_submodule(name, _OfTimm(module))


def _is_plain(module: Any) -> bool:
    return module.gate is None and all(type(p) is nn.Identity for p in (module.q_norm, module.k_norm, module.norm))


def attend(qkv_BLE3: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + mask) v, heads concatenated: [B, L, E].  arXiv:1706.03762, 3.2.

    `qkv_BLE3` concatenates queries, keys and values, [B, L, 3 E]; the mask is [L, L] or [B * H, L, L].
    """
    q_BLE, k_BLE, v_BLE = qkv_BLE3.chunk(3, -1)
    width = q_BLE.shape[-1] // num_heads
    if q_BLE.dtype == torch.float16:  # the product's sums could overflow float16
        q_BLE = q_BLE * width**-0.5
    q_BHLD, k_BHLD, v_BHLD = (
        part_BLE.reshape(*part_BLE.shape[:2], num_heads, width).transpose(1, 2) for part_BLE in (q_BLE, k_BLE, v_BLE)
    )
    logits_BHLL = q_BHLD @ k_BHLD.transpose(-2, -1)
    if q_BLE.dtype != torch.float16:  # OpenVINO's attention fuses a scale between product and softmax
        logits_BHLL = logits_BHLL * width**-0.5
    if mask is not None:
        logits_BHLL = logits_BHLL + (mask if mask.dim() == 2 else mask.reshape(-1, num_heads, *mask.shape[1:]))
    mixed_BLHD = (logits_BHLL.softmax(-1) @ v_BHLD).transpose(1, 2)
    return mixed_BLHD.flatten(-2)


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
        return self.out_proj(attend(qkv_BLE3, self.num_heads, attn_mask)), None


class _OfTimm(nn.Module):
    """A replacement of timm's attention."""

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = replaced.qkv, replaced.proj, replaced.num_heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert not is_causal
        projected: Tensor = self.proj(attend(self.qkv(x), self.num_heads, attn_mask))
        return projected
