"""Run text towers without padding: captions fill a fifth of the 77 tokens that CLIP always runs.

With a causal mask and features read at the end token, tokens after the end token have no effect.  The tower can then
stop at the last end token of a batch, with the same features and gradients.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from toolchain.models.last_block import block_at
from toolchain.models.towers import is_compiled

_TOKENS_OF_A_PASS = 32  # cost of one more group on a CPU, in tokens (benchmarks/train_step.py)
_MAX_ERROR = 1e-6  # between unit features in float32: other shapes change the order of sums


def is_trimmable(net: nn.Module) -> bool:
    """Return True if tokens after the end token do not change a net's text features, so `encode_tokens` may trim them.

    This is tested against the whole forward pass on synthetic captions, in float32 on the CPU, for a net on any device
    and in any precision.  Never trimmed are text towers of transformers, CoCa's, and those without a causal mask or
    with another pooling than the end token.
    """
    tower = _text_tower(net)
    if tower is None:
        return False
    if {(parameter.device.type, parameter.dtype) for parameter in _parameters(tower)} != {("cpu", torch.float32)}:
        without_image_tower = {id(net.visual): nn.Identity()}
        net = copy.deepcopy(net, without_image_tower).cpu().float()
        tower = _text_tower(net)
        assert tower is not None
    input_ids_BT = _make_captions(tower)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        trimmed_BL = trim_tokens(net, input_ids_BT)
        if trimmed_BL.shape == input_ids_BT.shape:
            return False
        whole_BD: Tensor = net.encode_text(input_ids_BT)  # type: ignore[operator]
        difference_BD = F.normalize(encode_tokens(net, trimmed_BL), dim=-1) - F.normalize(whole_BD, dim=-1)
    return bool(difference_BD.abs().max() <= _MAX_ERROR)  # False for NaN


def trim_tokens(net: nn.Module, input_ids_BT: Tensor) -> Tensor:
    """Return the tokens up to the last end token of the batch, [B, L]; only for nets that are `is_trimmable`.

    On a GPU this would wait for the device: trim ids while they are on the CPU.
    """
    tower = _text_tower(net)
    assert tower is not None
    return input_ids_BT[:, : int(_end_positions(tower, input_ids_BT).max()) + 1]


def encode_tokens(net: nn.Module, input_ids_BL: Tensor) -> Tensor:
    """Return text features [B, D] of whole or trimmed captions; every caption must contain its end token.

    They equal those of open_clip's encode_text at full length; the last block and all later layers run only for the end
    tokens.  On a CPU, captions of similar length run together, so one long caption does not make all of them long.  A
    GPU is faster with one large batch, and reading the lengths would wait for the device.  Compiled blocks take all
    captions together too: a group of one caption would need a compilation of its own.
    """
    tower = _text_tower(net)
    assert tower is not None
    if input_ids_BL.device.type != "cpu" or is_compiled(tower.parts.transformer):
        return _encode(tower, input_ids_BL)
    length_B = _end_positions(tower, input_ids_BL) + 1
    order_B = length_B.argsort(stable=True)
    groups = groups_of_like_length(length_B[order_B].tolist())
    if len(groups) == 1:
        return _encode(tower, input_ids_BL[:, : int(length_B.max())])
    rows = [(order_B[start:end], int(length_B[order_B[end - 1]])) for start, end in groups]
    encoded_BD = torch.cat([_encode(tower, input_ids_BL[members, :length]) for members, length in rows])
    return encoded_BD[order_B.argsort()]


def groups_of_like_length(ascending: list[int]) -> list[tuple[int, int]]:
    """Return groups [start, end) of captions in order of length; each group runs at the length of its longest.

    A cut is made where it saves the most tokens, if that is more than the cost of another pass.
    """
    count, longest = len(ascending), ascending[-1]
    saved = [cut * (longest - ascending[cut - 1]) for cut in range(1, count)]
    if not saved or max(saved) <= _TOKENS_OF_A_PASS:
        return [(0, count)]
    cut = saved.index(max(saved)) + 1
    behind = groups_of_like_length(ascending[cut:])
    return groups_of_like_length(ascending[:cut]) + [(cut + start, cut + end) for start, end in behind]


def use_causal_kernels(net: nn.Module) -> None:
    """Let the attention of a text tower say that its mask is the causal one, instead of adding the mask: in place.

    On a GPU in 16 bits the blocks then run in FlashAttention or in cuDNN's attention.  FlashAttention takes no mask of
    numbers; with one, PyTorch runs its slower memory-efficient kernel, on a copy of the mask padded to a multiple of 8
    tokens (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).  The features are equal up to rounding.  A text tower
    that `encode_tokens` does not run, or with another mask or another attention, stays as it is.
    """
    tower = _text_tower(net)
    if tower is None:
        return
    mask_TT: Tensor = tower.parts.attn_mask
    if not torch.equal(mask_TT.float().cpu(), torch.full(mask_TT.shape, -math.inf).triu(1)):
        return
    for block in tower.parts.transformer.resblocks:
        if type(block) is ResidualAttentionBlock and type(block.attn) is nn.MultiheadAttention:
            block.attn.__class__ = _CausalAttention  # the parameters, their names and their order stay


class _CausalAttention(nn.MultiheadAttention):
    """open_clip's attention, told that a mask of [L, L] is the causal one."""

    def forward(  # type: ignore[override]  # as open_clip's blocks call it
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        is_causal = attn_mask is not None and attn_mask.dim() == 2  # the last block has the mask of one token a row
        return super().forward(query, key, value, need_weights=need_weights, attn_mask=attn_mask, is_causal=is_causal)


def _encode(tower: "_TextTower", input_ids_BL: Tensor) -> Tensor:
    parts, length = tower.parts, input_ids_BL.shape[1]
    dtype = parts.transformer.get_cast_dtype()
    x_BLD = parts.token_embedding(input_ids_BL).to(dtype) + parts.positional_embedding[:length].to(dtype)
    mask_LL = parts.attn_mask[:length, :length].to(dtype)
    *blocks, last = parts.transformer.resblocks
    for block in blocks:
        x_BLD = block(x_BLD, attn_mask=mask_LL)
    x_BD: Tensor = parts.ln_final(block_at(last, x_BLD, _end_positions(tower, input_ids_BL), mask_LL))
    if parts.text_projection is None:
        return x_BD
    if isinstance(parts.text_projection, nn.Linear):
        projected_BD: Tensor = parts.text_projection(x_BD)
        return projected_BD
    matrix_DE: Tensor = parts.text_projection
    return x_BD @ matrix_DE


@dataclass(frozen=True)
class _TextTower:
    """open_clip's own text tower: CLIP holds its parts, CustomTextCLIP holds it as one module."""

    parts: Any
    """The module with the attributes token_embedding, positional_embedding, transformer, ..."""

    pool_type: str
    eos_id: int


def _text_tower(net: Any) -> _TextTower | None:
    """Return the net's text tower if it is open_clip's own, causal, and read at the end token; else None."""
    if type(net) is CLIP:
        tower = _TextTower(net, net.text_pool_type, net.text_eos_id)
    elif type(net) is CustomTextCLIP and type(net.text) is TextTransformer:
        text: Any = net.text
        if text.cls_emb is not None or text.use_pad_mask or text.output_tokens:
            return None
        tower = _TextTower(text, text.pool_type, text.eos_id)
    else:
        return None
    return tower if tower.parts.attn_mask is not None and tower.pool_type in ("argmax", "eos") else None


def _parameters(tower: _TextTower) -> list[Tensor]:
    return [
        tower.parts.positional_embedding,
        *tower.parts.token_embedding.parameters(),
        *tower.parts.transformer.parameters(),
    ]


def _end_positions(tower: _TextTower, input_ids_BT: Tensor) -> Tensor:
    """Return the position [B] where open_clip reads each caption: its first end token, the largest id or `eos_id`."""
    ends_BT = input_ids_BT if tower.pool_type == "argmax" else (input_ids_BT == tower.eos_id).int()
    return ends_BT.argmax(dim=-1)


def _make_captions(tower: _TextTower) -> Tensor:
    """Return input_ids [3, T] with end tokens at different positions in the first half and arbitrary ids after them."""
    context, vocabulary = len(tower.parts.positional_embedding), tower.parts.token_embedding.num_embeddings
    end = vocabulary - 1 if tower.pool_type == "argmax" else tower.eos_id
    words = [word for word in range(min(vocabulary - 1, 1000)) if word != end]
    input_ids_BT = torch.tensor([[words[(17 * row + 5 * t) % len(words)] for t in range(context)] for row in range(3)])
    for row, position in enumerate((0, context // 4, context // 2)):
        input_ids_BT[row, position] = end
    return input_ids_BT
