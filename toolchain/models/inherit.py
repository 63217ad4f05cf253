"""Start a smaller model from a larger one's weights: choose its layers, channels, heads and MLP channels.

This is TinyCLIP's weight inheritance (arXiv:2309.12314, section 3.2) with a rule in place of learned masks: a part is
important if what it can write and what reads it are large.  No data is needed, and the result is deterministic.

    channel c     sum over matrices M of |M_c|^2 / |M|^2, where M_c writes c into the residual stream or reads it
    head h        |O_h V_h|, the product of its output and value matrices
    MLP channel f |out_f| |in_f|

Every matrix that reads a layer norm is multiplied by the norm's gain, and one that writes through a layer scale by
that scale.  One choice of channels serves the whole tower, because its residual stream connects all layers.  Heads and
MLP channels are chosen per layer, by their effect on the chosen channels; layers lie at even distances.

A part that computes nothing in the source is never chosen while another is left, so removing it changes no feature.
Removing channels changes the mean and variance in every layer norm; training repairs that.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from toolchain.errors import UsageError
from toolchain.models.clip_model import ClipModel
from toolchain.models.tower_sizes import (
    TOWERS,
    TowerName,
    plan_space,
    plan_tower,
    spread_layers,
    tower_size,
    why_nothing_fits,
)


@dataclass(frozen=True)
class TowerChoice:
    """The parts of the source that a tower inherited."""

    text: str
    layers: list[int]
    """The source's number of each layer; empty if all or none are inherited."""

    heads: list[list[int]]
    """The source's numbers of the heads of each layer."""

    channels: list[int]
    """The source's numbers of the channels of the residual stream; empty if all are inherited."""


def check_inheritance(source: ClipModel, student: ClipModel) -> None:
    """Check that a student can inherit something of a model; no weights are read.

    Raises:
        UsageError: neither tower of the student fits.
    """
    reasons = why_nothing_fits(student.config["model_cfg"], source.config["model_cfg"])
    if reasons is not None:
        raise UsageError(f"student.inherit: {student.name} can inherit nothing from {source.name} ({reasons})")


@torch.no_grad()
def inherit_weights(source: ClipModel, student: ClipModel) -> dict[str, Any]:
    """Overwrite, in place, as much of a student's weights as fits the source's; return what the manifest records.

    Raises:
        UsageError: as `check_inheritance`.
    """
    check_inheritance(source, student)
    cfgs = student.config["model_cfg"], source.config["model_cfg"]
    plans = {tower: plan_tower(*cfgs, tower) for tower in TOWERS}
    basis_EF = _choose_directions(source, student)
    recorded: dict[str, Any] = {"from": source.name, "features": plan_space(*cfgs)}
    for tower, plan in plans.items():
        if plan.extent == "nothing":
            choice = TowerChoice(plan.text, [], [], [])
        elif tower_size(cfgs[0], tower) is None:
            choice = _copy_tower(source.net, student.net, tower)
        else:
            pair = _Pair(_tower(source, tower), _tower(student, tower), basis_EF)
            choice = _thin_tower(pair, plan.text, with_blocks=plan.extent != "ends")
            if tower == "text":
                _inherit_tokens(source, student, choice)
        recorded[tower] = asdict(choice)
    kinds = {getattr(model.net, "logit_bias", None) is None for model in (student, source)}
    for name in ("logit_scale", "logit_bias") if len(kinds) == 1 else ():  # softmax and sigmoid models differ in scale
        own, given = (getattr(model.net, name, None) for model in (student, source))
        if isinstance(own, Tensor) and isinstance(given, Tensor):
            own.copy_(given.reshape(own.shape))
    return recorded


def _copy_tower(source: nn.Module, student: nn.Module, tower: TowerName) -> TowerChoice:
    """Copy a tower of equal architecture; tensors that depend on the image size or on embed_dim stay at random."""
    given, own = source.state_dict(), student.state_dict()
    names = [name for name in own if name.startswith("visual.") == (tower == "image") and "logit_" not in name]
    wrong = [name for name in names if name not in given or given[name].shape != own[name].shape]
    for name in names:
        if name not in wrong:
            own[name].copy_(given[name])
    return TowerChoice("all weights" + (f" but {', '.join(wrong)}" if wrong else ""), [], [], [])


# Towers ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tower:
    """One of open_clip's own transformers."""

    parts: Any
    """The module that has the attributes positional_embedding and transformer."""

    tower: TowerName
    vocabulary: int

    @property
    def blocks(self) -> Any:
        return self.parts.transformer.resblocks

    @property
    def norm(self) -> Any:
        """The layer norm before the projection."""
        return self.parts.ln_post if self.tower == "image" else self.parts.ln_final

    @property
    def projection_WE(self) -> Tensor | None:
        """The matrix to the features; None if the tower has none."""
        found: Any = self.parts.proj if self.tower == "image" else self.parts.text_projection
        matrix_WE: Tensor | None = found.weight.T if isinstance(found, nn.Linear) else found
        return matrix_WE


def _tower(model: ClipModel, tower: TowerName) -> _Tower:
    net: Any = model.net
    if tower == "image":
        return _Tower(net.visual, tower, 0)
    if type(net) is CustomTextCLIP and type(net.text) is TextTransformer:
        return _Tower(net.text, tower, net.text.token_embedding.num_embeddings)
    if type(net) is CLIP:
        return _Tower(net, tower, net.token_embedding.num_embeddings)
    raise UsageError(
        f"student.inherit: {model.name} is a {type(net).__name__}; expected a model with an image tower and a text "
        "tower only"
    )


@dataclass(frozen=True)
class _Pair:
    """The towers that weights are copied between."""

    source: _Tower
    student: _Tower
    basis_EF: Tensor | None
    """Orthonormal columns [E, F]: the student's directions in the source's feature space.  None: the same space."""


def _thin_tower(pair: _Pair, text: str, *, with_blocks: bool) -> TowerChoice:
    source, student = pair.source, pair.student
    width = student.parts.positional_embedding.shape[1]
    blocks = list(source.blocks)
    layers = _choose_layers(blocks, len(student.blocks)) if with_blocks else list(range(len(blocks)))
    kept_C = _choose_channels(source, [blocks[i] for i in layers], width)
    heads = []
    if with_blocks:
        for number, own in zip(layers, student.blocks, strict=True):
            heads.append(_inherit_block(blocks[number], own, kept_C))
    _inherit_ends(pair, kept_C)
    is_whole = len(kept_C) == source.parts.positional_embedding.shape[1]
    return TowerChoice(text, layers if with_blocks else [], heads, [] if is_whole else kept_C.tolist())


# Choosing ------------------------------------------------------------------------------------------------------------


def _choose_layers(blocks: list[Any], number: int) -> list[int]:
    """Return layers at even distances, among those that write anything if these suffice."""
    active = [i for i, block in enumerate(blocks) if any(bool(write_WK.any()) for write_WK in _writes(block))]
    if len(active) < number:
        idle = [i for i in range(len(blocks)) if i not in active]
        active = sorted(active + idle[: number - len(active)])
    return [active[i] for i in spread_layers(len(active), number)]


def _choose_channels(tower: _Tower, blocks: list[Any], number: int) -> Tensor:
    """Return the most important channels of the residual stream, in ascending order."""
    parts, width = tower.parts, tower.parts.positional_embedding.shape[1]
    if number == width:
        return torch.arange(width)
    if tower.tower == "image":
        embedded_WK = torch.cat(
            [parts.conv1.weight.flatten(1), parts.class_embedding[:, None], parts.positional_embedding.T], 1
        )
        if isinstance(parts.ln_pre, nn.LayerNorm):
            embedded_WK = torch.cat([parts.ln_pre.weight[:, None] * embedded_WK, parts.ln_pre.bias[:, None]], 1)
    else:
        embedded_WK = torch.cat([parts.token_embedding.weight, parts.positional_embedding]).T
    matrices = [embedded_WK]
    for block in blocks:
        matrices += [*_writes(block), _read(block.attn.in_proj_weight, block.ln_1)]
        matrices.append(_read(block.mlp.c_fc.weight, block.ln_2))
    if tower.projection_WE is not None:
        matrices.append(_read(tower.projection_WE.T, tower.norm))
    importance_W = torch.zeros(width, dtype=torch.float64)
    for matrix_WK in matrices:
        square_W = matrix_WK.double().square().sum(1)
        importance_W += square_W / square_W.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return _largest(importance_W, number)


def _choose_directions(source: ClipModel, student: ClipModel) -> Tensor | None:
    """Return the student's directions [E, F] in the source's feature space; None if the student has as many.

    They are the leading eigenvectors of the sum over towers of P^T G^2 P / |G P|^2, with projection P and the gain G
    before it: what an orthogonal projection keeps of dot products between features, if channels are independent.
    """
    width = source.embed_dim
    if student.embed_dim >= width:
        return None
    energy_EE = torch.zeros(width, width, dtype=torch.float64)
    for tower in TOWERS:
        if tower_size(source.config["model_cfg"], tower) is not None:
            found = _tower(source, tower)
            if found.projection_WE is not None:
                matrix_EW = _read(found.projection_WE.T, found.norm).T.double()
                energy_EE += matrix_EW @ matrix_EW.T / matrix_EW.square().sum()
    directions_EE: Tensor = torch.linalg.eigh(energy_EE).eigenvectors.flip(1)
    return directions_EE[:, : student.embed_dim].float()


def _writes(block: Any) -> tuple[Tensor, Tensor]:
    """Return what attention and MLP write into the residual stream, one row per channel: weights and bias."""
    found = []
    for linear, scale in ((block.attn.out_proj, block.ls_1), (block.mlp.c_proj, block.ls_2)):
        write_WK = torch.cat([linear.weight, linear.bias[:, None]], 1)
        gamma_W: Tensor | None = getattr(scale, "gamma", None)
        found.append(write_WK if gamma_W is None else gamma_W[:, None] * write_WK)
    return found[0], found[1]


def _read(weight_KW: Tensor, norm: Any) -> Tensor:
    """Return a matrix that reads a layer norm, with its gain, one row per channel [W, K]."""
    gain_W: Tensor | None = norm.weight
    read_WK: Tensor = weight_KW.T if gain_W is None else (weight_KW * gain_W).T
    return read_WK


def _largest(importance_N: Tensor, number: int) -> Tensor:
    """Return the indices of the largest values in ascending order; of equal ones, the first."""
    order_N = importance_N.argsort(descending=True, stable=True)
    return order_N[:number].sort().values


# Copying --------------------------------------------------------------------------------------------------------------


def _inherit_ends(pair: _Pair, kept_C: Tensor) -> None:
    """Copy everything but the blocks and token embeddings: patch embedding, positions, norms and projection."""
    own, given = pair.student.parts, pair.source.parts
    if pair.student.tower == "image":
        if own.conv1.weight.shape[2:] == given.conv1.weight.shape[2:]:
            own.conv1.weight.copy_(given.conv1.weight[kept_C])
        own.class_embedding.copy_(given.class_embedding[kept_C])
        own.positional_embedding.copy_(_resize_grid(given, own.grid_size)[:, kept_C])
        if isinstance(own.ln_pre, nn.LayerNorm) and isinstance(given.ln_pre, nn.LayerNorm):
            _copy_norm(given.ln_pre, own.ln_pre, kept_C)
    else:
        length = min(len(own.positional_embedding), len(given.positional_embedding))
        own.positional_embedding[:length].copy_(given.positional_embedding[:length, kept_C])
    _copy_norm(pair.source.norm, pair.student.norm, kept_C)
    own_WF, given_WE = pair.student.projection_WE, pair.source.projection_WE
    if own_WF is None or given_WE is None or own_WF.shape[1] > given_WE.shape[1]:
        return
    own_WF.copy_(given_WE[kept_C] if pair.basis_EF is None else given_WE[kept_C] @ pair.basis_EF)
    own_bias, given_bias = (_projection_bias(tower) for tower in (pair.student, pair.source))
    if own_bias is not None and given_bias is not None:
        own_bias.copy_(given_bias if pair.basis_EF is None else given_bias @ pair.basis_EF)


def _projection_bias(tower: _Tower) -> Tensor | None:
    found: Any = None if tower.tower == "image" else tower.parts.text_projection
    bias_E: Tensor | None = found.bias if isinstance(found, nn.Linear) else None
    return bias_E


def _resize_grid(visual: Any, grid: tuple[int, int]) -> Tensor:
    """Return an image tower's positional embedding for another grid, interpolated as open_clip does.

    [T, W], with one row for the class token and then one per patch.
    """
    table_TW: Tensor = visual.positional_embedding
    if tuple(grid) == tuple(visual.grid_size):
        return table_TW
    cells_1WHW = table_TW[1:].reshape(1, *visual.grid_size, -1).permute(0, 3, 1, 2)
    cells_1WHW = F.interpolate(cells_1WHW, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table_TW[:1], cells_1WHW.flatten(2)[0].T])


def _inherit_block(given: Any, own: Any, kept_C: Tensor) -> list[int]:
    """Copy one layer; return the source's heads that were chosen."""
    _copy_norm(given.ln_1, own.ln_1, kept_C)
    _copy_norm(given.ln_2, own.ln_2, kept_C)
    for ours, theirs in ((own.ls_1, given.ls_1), (own.ls_2, given.ls_2)):
        if hasattr(ours, "gamma"):
            ours.gamma.copy_(theirs.gamma[kept_C] if hasattr(theirs, "gamma") else torch.ones(len(kept_C)))
    _inherit_mlp(given, own, kept_C)
    return _inherit_attention(given, own, kept_C)


def _inherit_mlp(given: Any, own: Any, kept_C: Tensor) -> None:
    _, write_WF1 = _writes(given)
    weight_FW, bias_F = given.mlp.c_fc.weight, given.mlp.c_fc.bias
    read_F = _row_norms(weight_FW, bias_F, given.ln_2, kept_C)
    written_F = write_WF1[kept_C, :-1].double().norm(dim=0)
    kept_F = _keep(len(own.mlp.c_fc.bias), read_F * written_F)
    own.mlp.c_fc.weight.copy_(weight_FW[kept_F][:, kept_C])
    own.mlp.c_fc.bias.copy_(_fold_bias(weight_FW, bias_F, given.ln_2, kept_C)[kept_F])
    weight_WF, bias_W = given.mlp.c_proj.weight, given.mlp.c_proj.bias
    scale_C = _missing_scale(given.ls_2, own.ls_2, kept_C)
    own.mlp.c_proj.weight.copy_(scale_C[:, None] * weight_WF[kept_C][:, kept_F])
    own.mlp.c_proj.bias.copy_(scale_C * bias_W[kept_C])


def _inherit_attention(given: Any, own: Any, kept_C: Tensor) -> list[int]:
    """Choose heads, and within them channels if the student's are narrower.

    A head of d channels divides its logits by sqrt(d), so queries are scaled to keep the logits.
    """
    heads, own_heads = given.attn.num_heads, own.attn.num_heads
    width, own_width = given.attn.head_dim, own.attn.head_dim
    weight_3HDW = given.attn.in_proj_weight.unflatten(0, (3, heads, width))
    bias_3HD = given.attn.in_proj_bias.unflatten(0, (3, heads, width))
    folded = _fold_bias(weight_3HDW.flatten(0, 2), bias_3HD.flatten(), given.ln_1, kept_C).reshape(bias_3HD.shape)
    row_3HD = _row_norms(weight_3HDW.flatten(0, 2), bias_3HD.flatten(), given.ln_1, kept_C).reshape(bias_3HD.shape)
    write_CHD = _writes(given)[0][kept_C, :-1].reshape(-1, heads, width).double()
    gain_W = torch.ones(weight_3HDW.shape[-1]) if given.ln_1.weight is None else given.ln_1.weight
    value_HDC = torch.cat([(weight_3HDW[2] * gain_W)[..., kept_C], bias_3HD[2][..., None]], -1).double()
    importance_H = torch.stack([(write_CHD[:, h] @ value_HDC[h]).norm() for h in range(heads)])
    kept_H: list[int] = _keep(own_heads, importance_H).tolist()

    written_HD = write_CHD.norm(dim=0)
    scale_C = _missing_scale(given.ls_1, own.ls_1, kept_C)
    own_weight_3HDW = own.attn.in_proj_weight.unflatten(0, (3, own_heads, own_width))
    own_bias_3HD = own.attn.in_proj_bias.unflatten(0, (3, own_heads, own_width))
    own_write_CHD = own.attn.out_proj.weight.unflatten(1, (own_heads, own_width))
    for number, head in enumerate(kept_H):
        compared_D = _keep(own_width, row_3HD[0, head] * row_3HD[1, head])
        passed_D = _keep(own_width, row_3HD[2, head] * written_HD[head])
        query_scale = math.sqrt(own_width / width)
        for part, kept_D, scale in ((0, compared_D, query_scale), (1, compared_D, 1.0), (2, passed_D, 1.0)):
            own_weight_3HDW[part, number].copy_(scale * weight_3HDW[part, head][kept_D][:, kept_C])
            own_bias_3HD[part, number].copy_(scale * folded[part, head][kept_D])
        given_write_CD = given.attn.out_proj.weight.unflatten(1, (heads, width))[kept_C, head][:, passed_D]
        own_write_CHD[:, number].copy_(scale_C[:, None] * given_write_CD)
    own.attn.out_proj.bias.copy_(scale_C * given.attn.out_proj.bias[kept_C])
    return kept_H


def _keep(number: int, importance_N: Tensor) -> Tensor:
    return torch.arange(number) if number == len(importance_N) else _largest(importance_N, number)


def _row_norms(weight_KW: Tensor, bias_K: Tensor, norm: Any, kept_C: Tensor) -> Tensor:
    """Return the norm of each row that reads the kept channels of a layer norm, with its bias."""
    read_CK = _read(weight_KW, norm)[kept_C].double()
    folded_K = bias_K if norm.bias is None else bias_K + weight_KW @ norm.bias
    return (read_CK.square().sum(0) + folded_K.double().square()).sqrt()


def _fold_bias(weight_KW: Tensor, bias_K: Tensor, norm: Any, kept_C: Tensor) -> Tensor:
    """Return the bias of a linear layer with what the norm's biases in the removed channels contributed to it."""
    removed = torch.ones(weight_KW.shape[1], dtype=torch.bool).index_fill(0, kept_C, False)
    if norm.bias is None or not bool(removed.any()):
        return bias_K
    folded_K: Tensor = bias_K + weight_KW[:, removed] @ norm.bias[removed]
    return folded_K


def _missing_scale(given: Any, own: Any, kept_C: Tensor) -> Tensor:
    """Return the source's layer scale if the student has none that could hold it; otherwise ones."""
    if hasattr(given, "gamma") and not hasattr(own, "gamma"):
        gamma: Tensor = given.gamma[kept_C]
        return gamma
    return torch.ones(len(kept_C))


def _copy_norm(given: Any, own: Any, kept_C: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(own, name) is not None and getattr(given, name) is not None:
            getattr(own, name).copy_(getattr(given, name)[kept_C])


# Tokens ---------------------------------------------------------------------------------------------------------------


def _inherit_tokens(source: ClipModel, student: ClipModel, choice: TowerChoice) -> None:
    """Copy the embeddings of the tokens that both vocabularies spell alike; further tokens stay at random."""
    given_VW = _tower(source, "text").parts.token_embedding.weight
    own_VW = _tower(student, "text").parts.token_embedding.weight
    kept_C = torch.tensor(choice.channels) if choice.channels else torch.arange(given_VW.shape[1])
    own, given = (_token_ids(model) for model in (student, source))
    if own == given and len(own_VW) == len(given_VW):
        own_VW.copy_(given_VW[:, kept_C])
        return
    pairs = [(number, given[token]) for token, number in own.items() if token in given]
    pairs = [(number, other) for number, other in pairs if number < len(own_VW) and other < len(given_VW)]
    if not any(number == _pad_id(student) for number, _ in pairs):
        pairs.append((_pad_id(student), _pad_id(source)))
    own_ids, given_ids = torch.tensor(pairs).T
    own_VW[own_ids] = given_VW[given_ids][:, kept_C]


def _token_ids(model: ClipModel) -> dict[str, int]:
    if isinstance(model.tokenize, HFTokenizer):
        return dict(model.tokenize.tokenizer.get_vocab())
    return dict(getattr(model.tokenize, "encoder", {}))


def _pad_id(model: ClipModel) -> int:
    """Return the token that pads a text; open_clip's own tokenizer pads with token 0."""
    return int(model.tokenize.tokenizer.pad_token_id or 0) if isinstance(model.tokenize, HFTokenizer) else 0
