"""Run text towers without padding: captions fill a fifth of the 77 tokens that CLIP always runs.

With a causal mask, and the end token's feature as the caption's, what follows the end token has no effect.  Then the
tower need run no further than the last end token of a batch, and gives the same features and gradients.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from toolchain.models.last_block import block_at

_TOKENS_OF_A_PASS = 32  # what running one more group costs a text tower on a CPU, in tokens (benchmarks/train_step.py)
_MAX_ERROR = 1e-6  # of unit features in float32: products of other shapes are summed in another order


def is_trimmable(net: nn.Module) -> bool:
    """Return True if no token behind the end token changes a net's text features: `encode_tokens` may be given fewer.

    That is not assumed of any model: it is compared with the whole forward pass on made-up captions, in float32 on
    the CPU, wherever and in whatever precision the net itself is.  Not trimmed, whatever they would compute: text
    towers of transformers, CoCa's, and those without a causal mask or with another pooling than the end token.
    """
    tower = _text_tower(net)
    if tower is None:
        return False
    if {(parameter.device.type, parameter.dtype) for parameter in _parameters(tower)} != {("cpu", torch.float32)}:
        without_image_tower = {id(net.visual): nn.Identity()}
        net = copy.deepcopy(net, without_image_tower).cpu().float()
        tower = _text_tower(net)
        assert tower is not None
    input_ids_BT = _made_up_captions(tower)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        trimmed_BL = trim_tokens(net, input_ids_BT)
        if trimmed_BL.shape == input_ids_BT.shape:
            return False
        whole_BD: Tensor = net.encode_text(input_ids_BT)  # type: ignore[operator]
        difference_BD = F.normalize(encode_tokens(net, trimmed_BL), dim=-1) - F.normalize(whole_BD, dim=-1)
    return bool(difference_BD.abs().max() <= _MAX_ERROR)  # NaN: not trimmed


def trim_tokens(net: nn.Module, input_ids_BT: Tensor) -> Tensor:
    """Return [B, L], the tokens up to the last end token of the batch; only for nets that `is_trimmable` has passed.

    On a GPU this would wait for the device: cut ids while they are on the CPU.
    """
    tower = _text_tower(net)
    assert tower is not None
    return input_ids_BT[:, : int(_end_positions(tower, input_ids_BT).max()) + 1]


def encode_tokens(net: nn.Module, input_ids_BL: Tensor) -> Tensor:
    """Return [B, D] text features of captions in as many tokens as are given, every caption's end token among them.

    They are what open_clip's encode_text computes at full length; the last block and what follows it run for the end
    tokens alone.  On a CPU, captions of like length run together, so that one long caption does not make all of them
    long; a GPU is better served by one large batch, and would have to be waited for to know the lengths.
    """
    tower = _text_tower(net)
    assert tower is not None
    if input_ids_BL.device.type != "cpu":
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
    """Return groups [start, end) of captions in order of length, each of which runs at its longest's length.

    A cut is made where it saves the most tokens, and where that is more than what another pass costs.
    """
    count, longest = len(ascending), ascending[-1]
    saved = [cut * (longest - ascending[cut - 1]) for cut in range(1, count)]
    if not saved or max(saved) <= _TOKENS_OF_A_PASS:
        return [(0, count)]
    cut = saved.index(max(saved)) + 1
    behind = groups_of_like_length(ascending[cut:])
    return groups_of_like_length(ascending[:cut]) + [(cut + start, cut + end) for start, end in behind]


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
    """open_clip's own text tower, which CLIP holds in pieces and CustomTextCLIP whole."""

    parts: Any
    """What has the attributes token_embedding, positional_embedding, transformer, ..."""

    pool_type: str
    eos_id: int


def _text_tower(net: Any) -> _TextTower | None:
    """Return the net's text tower, if it is causal, of open_clip's own kind, and reads a caption at its end token."""
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
    """Return [B], where open_clip reads each caption: its first end token, the largest id or one of its own."""
    ends_BT = input_ids_BT if tower.pool_type == "argmax" else (input_ids_BT == tower.eos_id).int()
    return ends_BT.argmax(dim=-1)


def _made_up_captions(tower: _TextTower) -> Tensor:
    """Return input_ids [3, T] with end tokens at different places, none beyond the middle, and anything behind them."""
    context, vocabulary = len(tower.parts.positional_embedding), tower.parts.token_embedding.num_embeddings
    end = vocabulary - 1 if tower.pool_type == "argmax" else tower.eos_id
    words = [word for word in range(min(vocabulary - 1, 1000)) if word != end]
    input_ids_BT = torch.tensor([[words[(17 * row + 5 * t) % len(words)] for t in range(context)] for row in range(3)])
    for row, position in enumerate((0, context // 4, context // 2)):
        input_ids_BT[row, position] = end
    return input_ids_BT
