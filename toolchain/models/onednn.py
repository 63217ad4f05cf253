"""Run linear layers and attention on an x86 CPU in oneDNN, in the shapes for which it is fast.

PyTorch runs float32 matrix products in MKL, which on AMD's processors reaches half of oneDNN's rate (200 against 450
GFLOP/s on two cores of an EPYC with AVX-512), and convolutions in oneDNN.  A linear layer is a convolution of size 1
over its rows: its values and gradients are the same sums in another order.  In addition, nn.MultiheadAttention
transposes its input; PyTorch then computes one product per token and copies the weights each time.  One shape of
convolution is avoided, because oneDNN crashes on it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SAFE_CHANNELS = 8  # from here on, oneDNN's convolutions of size 1 with a stride do not crash (torch 2.15, float32)
_FEW_ROWS = 64  # below this, reordering the weights for oneDNN costs more than it saves
_FEW_PRODUCTS = 1 << 25  # below this, as in the glyph models, the call costs more than it saves


def on_onednn(device: torch.device, *, compiled: bool = False) -> AbstractContextManager[object]:
    """Return a context in which linear layers and attention run in oneDNN on a CPU.

    It changes nothing on a GPU, under autocast, and in towers compiled by torch.compile.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    asks_mkl = device.type == "cpu" and has_mkl and not torch.is_autocast_enabled("cpu")
    return _OneDNN() if asks_mkl and not compiled else nullcontext()


class _OneDNN(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs:
            return _linear(*args)
        if func is F.conv2d and not kwargs:
            return _convolution(*args)
        if func is F.multi_head_attention_forward and _is_plain(*args, **kwargs):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _convolution(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: Any = (0, 0),
    *rest: Any,
) -> Tensor:
    """Return F.conv2d's result; of one pixel in `stride`, if that is all that a convolution of size 1 reads.

    oneDNN's backward pass of such a convolution, of fewer than 8 channels in channels last, writes beyond its arrays:
    the process crashes.  FastViT, MobileCLIP and MobileOne begin with one, of the 3 channels of an image.
    """
    reads_few = stride != (1, 1) and tuple(weight.shape[2:]) == (1, 1) and padding == (0, 0)
    if reads_few and weight.shape[1] < _SAFE_CHANNELS:
        x_BCHW, stride = x_BCHW[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x_BCHW, weight, bias, stride, padding, *rest)


def _linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return [..., N] of [..., K]; the rows become the pixels of one channels-last image."""
    rows = x.numel() // x.shape[-1]
    is_small = rows < _FEW_ROWS or x.numel() * len(weight_NK) < _FEW_PRODUCTS
    if x.dtype != torch.float32 or is_small:
        return F.linear(x, weight_NK, bias_N)
    image_1KR1 = x.reshape(1, rows, 1, -1).permute(0, 3, 1, 2)
    # Dilation has no effect on a filter of size 1, but makes PyTorch use oneDNN in a single thread too.
    image_1NR1 = F.conv2d(image_1KR1, weight_NK[:, :, None, None], bias_N, dilation=2)
    return image_1NR1.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    *_: Any,
    training: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    use_separate_proj_weight: bool = False,
    **__: Any,
) -> bool:
    """Return True if F.multi_head_attention_forward is called the way open_clip's blocks call it."""
    extras = (bias_k is not None, add_zero_attn, dropout and training, key_padding_mask is not None, need_weights)
    return query.dim() == 3 and in_weight is not None and not use_separate_proj_weight and not any(extras)


def _attention(
    query_LBW: Tensor,
    key_TBW: Tensor,
    value_TBW: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor,
    in_bias: Tensor | None,
    bias_k: None,
    bias_v: None,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    attn_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return [L, B, W] like F.multi_head_attention_forward; a mask [L, T] or [B H, L, T] is added to the logits."""
    asked = query_LBW.transpose(0, 1), key_TBW.transpose(0, 1), value_TBW.transpose(0, 1)
    if query_LBW is key_TBW is value_TBW:
        parts = _linear(asked[0], in_weight, in_bias).chunk(3, dim=-1)
    else:
        biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
        parts = tuple(map(_linear, asked, in_weight.chunk(3), biases))
    q_BHLd, k_BHTd, v_BHTd = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in parts)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(-1, heads, *attn_mask.shape[1:])
    mixed_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHTd, v_BHTd, attn_mask)
    return _linear(mixed_BHLd.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1), None
