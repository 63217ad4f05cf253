"""Compare the towers of two architectures, to find the weights of a larger model that a smaller one can start from.

An architecture is the `model_cfg` of an open_clip_config.json.  Importing this module needs neither torch nor
open_clip, so `clipkd show` can tell what will be inherited before any model is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TowerName = Literal["image", "text"]
TOWERS: tuple[TowerName, ...] = ("image", "text")

Extent = Literal["all", "thinned", "ends", "nothing"]
"""all: the towers are alike; thinned: layers, channels and heads are chosen; ends: everything but the blocks, because
these do not fit; nothing."""

_SECTIONS: dict[TowerName, str] = {"image": "vision_cfg", "text": "text_cfg"}
_CUSTOM_BLOCKS = ("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn")
_NOT_PLAIN = frozenset(
    (*_CUSTOM_BLOCKS, "scale_fc", "attentional_pool", "embed_cls", "timm_model_name", "hf_model_name")
)
"""Settings of towers that are not made of open_clip's plain blocks alone."""

_WITHOUT_WEIGHTS = frozenset(
    ("image_size", "timm_model_pretrained", "timm_drop", "timm_drop_path", "patch_dropout", "hf_model_pretrained")
)


@dataclass(frozen=True)
class TowerSize:
    """The size of a tower of open_clip's own."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    patch_size: int
    """Side of a patch in pixels; 0 for text."""

    positions: int
    """Patches per side, or tokens of a text."""

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class TowerPlan:
    """The extent of what a student's tower inherits, and its description."""

    extent: Extent
    text: str


def tower_size(model_cfg: Mapping[str, Any], tower: TowerName) -> TowerSize | None:
    """Return the size of a tower; None if it is not one of open_clip's own transformers.

    The defaults are those of open_clip's CLIPVisionCfg and CLIPTextCfg.
    """
    cfg = model_cfg.get(_SECTIONS[tower], {})
    layers = cfg.get("layers", 12)
    if not isinstance(layers, int) or any(cfg.get(name) for name in _NOT_PLAIN):
        return None
    if tower == "text":
        width, heads = cfg.get("width", 512), cfg.get("heads", 8)
        patch_size, positions = 0, cfg.get("context_length", 77)
    else:
        width, patch_size = cfg.get("width", 768), cfg.get("patch_size", 16)
        heads, image_size = width // cfg.get("head_width", 64), cfg.get("image_size", 224)
        if not isinstance(patch_size, int) or not isinstance(image_size, int):
            return None
        positions = image_size // patch_size
    return TowerSize(layers, width, heads, int(width * cfg.get("mlp_ratio", 4.0)), patch_size, positions)


def spread_layers(of: int, number: int) -> list[int]:
    """Return `number` of `of` layers at even distances, with the first and the last: 0, 2, 4, 7, 9, 11 for 6 of 12."""
    return [round(i * (of - 1) / max(number - 1, 1)) for i in range(number)]


def plan_tower(student_cfg: Mapping[str, Any], source_cfg: Mapping[str, Any], tower: TowerName) -> TowerPlan:
    """Return what a student's tower can inherit from the same tower of another architecture."""
    student, source = tower_size(student_cfg, tower), tower_size(source_cfg, tower)
    if student is None or source is None:
        kept = [
            {key: value for key, value in cfg.get(_SECTIONS[tower], {}).items() if key not in _WITHOUT_WEIGHTS}
            for cfg in (student_cfg, source_cfg)
        ]
        if kept[0] == kept[1]:
            return TowerPlan("all", "all weights")
        return TowerPlan("nothing", "nothing; only transformers of open_clip's own can be thinned")
    if student.width > source.width:
        return TowerPlan("nothing", f"nothing; its width {student.width} is larger than {source.width}")
    larger = _describe_larger(student, source)
    details = [] if larger else _describe_blocks(student, source)
    details[:0] = _describe_part(student.width, source.width, "channels")
    details += _describe_positions(student, source, tower)
    if larger:
        names = "token embeddings, positions" if tower == "text" else "patch embedding, positions"
        text = "; ".join([f"{names} and projection, because {larger}", *details])
        return TowerPlan("ends", text)
    if student == source:
        return TowerPlan("all", "all weights")
    return TowerPlan("thinned", ", ".join(details))


def plan_space(student_cfg: Mapping[str, Any], source_cfg: Mapping[str, Any]) -> str | None:
    """Return how the width of the features changes, in words; None if it does not."""
    own, given = student_cfg["embed_dim"], source_cfg["embed_dim"]
    if own == given:
        return None
    if own > given:
        return f"projections start at random, because embed_dim {own} is larger than {given}"
    return f"the {own} of {given} directions of the features in which the projections are largest"


def describe_activations(student_cfg: Mapping[str, Any], source_cfg: Mapping[str, Any]) -> str | None:
    """Return a remark if one model computes with QuickGELU and the other with GELU; None if both do the same."""
    own, given = (bool(cfg.get("quick_gelu")) for cfg in (student_cfg, source_cfg))
    if own == given:
        return None
    names = {True: "QuickGELU", False: "GELU"}
    return (
        f"student.inherit: its source was trained with {names[given]}, and the student has {names[own]}; training has "
        f"to repair the difference. To keep the source's, set student.model_cfg: {{quick_gelu: {str(given).lower()}}}"
    )


def why_nothing_fits(student_cfg: Mapping[str, Any], source_cfg: Mapping[str, Any]) -> str | None:
    """Return the reasons if neither tower can inherit anything; None if one can."""
    plans = {tower: plan_tower(student_cfg, source_cfg, tower) for tower in TOWERS}
    if any(plan.extent != "nothing" for plan in plans.values()):
        return None
    return "; ".join(f"{tower} tower: {plan.text}" for tower, plan in plans.items())


def _describe_larger(student: TowerSize, source: TowerSize) -> str | None:
    """Return the first size in which the student's blocks do not fit into the source's; None if they fit."""
    for name in ("layers", "heads", "head_width", "mlp_width"):
        own, given = getattr(student, name), getattr(source, name)
        if own > given:
            return f"{name} {own} is larger than {given}"
    return None


def _describe_blocks(student: TowerSize, source: TowerSize) -> list[str]:
    found = []
    if student.layers < source.layers:
        numbers = ", ".join(map(str, spread_layers(source.layers, student.layers)))
        found.append(f"layers {numbers} of {source.layers}")
    found += _describe_part(student.heads, source.heads, "heads")
    found += _describe_part(student.head_width, source.head_width, "channels of a head")
    return found + _describe_part(student.mlp_width, source.mlp_width, "MLP channels")


def _describe_positions(student: TowerSize, source: TowerSize, tower: TowerName) -> list[str]:
    own, given = student.positions, source.positions
    found = []
    if student.patch_size != source.patch_size:
        found.append(f"no patch embedding, because patches of {student.patch_size} pixels are not {source.patch_size}")
    if own != given and tower == "image":
        found.append(f"positions interpolated from {given} x {given} to {own} x {own}")
    elif own < given:
        found.append(f"the first {own} of {given} positions")
    elif own > given:
        found.append(f"{given} of its {own} positions")
    return found


def _describe_part(own: int, given: int, what: str) -> list[str]:
    return [f"{own:,} of {given:,} {what}"] if own < given else []
