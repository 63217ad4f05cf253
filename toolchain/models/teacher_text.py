"""Build a student that is an image tower in its teacher's space: it ships the teacher's text tower, frozen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from toolchain.errors import UsageError
from toolchain.models.build import assemble_model, build_model
from toolchain.models.clip_model import ClipModel
from toolchain.recipe.model import ModelSpec

_IMAGE_TOWER = "visual."


def build_on_text_tower(
    spec: ModelSpec,
    teacher: ClipModel,
    *,
    seed: int,
    has_weights: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ClipModel:
    """Return the image tower of `spec` with the teacher's text tower, tokenizer, logit scale and logit bias.

    Its features have the teacher's width.  The parameters of the text tower need no gradient.  `has_weights` (default:
    as `spec` has it) tells whether the image tower keeps its own weights.

    Raises:
        UsageError: the image tower has its own weights, and they are made for another width or activation.
        ArtifactError: as `build_model`.
    """
    own = build_model(spec, seed=seed, say=say)
    vision = own.config["model_cfg"]["vision_cfg"]
    if vision.get("timm_proj") == "none" and own.embed_dim != teacher.embed_dim:
        raise UsageError(
            f"student {own.name}: its image tower has no projection, so its features have width {own.embed_dim}; the "
            f"teacher's have width {teacher.embed_dim}. Set student.model_cfg: {{vision_cfg: {{timm_proj: ''}}}}"
        )
    keeps = not spec.is_random if has_weights is None else has_weights
    if keeps:
        _check_image_tower(own, teacher)
    config = {
        "model_cfg": teacher.config["model_cfg"] | {"vision_cfg": own.config["model_cfg"]["vision_cfg"]},
        "preprocess_cfg": own.config["preprocess_cfg"],
    }
    student = assemble_model(spec.model, config, teacher.tokenizer_files, seed)
    if keeps:
        _visual(student).load_state_dict(_visual(own).state_dict())
    inherited = {name: x for name, x in teacher.net.state_dict().items() if not name.startswith(_IMAGE_TOWER)}
    missing, unexpected = student.net.load_state_dict(inherited, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith(_IMAGE_TOWER) for name in missing), missing
    for name, parameter in student.net.named_parameters():
        if not name.startswith((_IMAGE_TOWER, "logit_")):
            parameter.requires_grad_(False)
    return replace(student, has_teachers_text=True)


def _check_image_tower(own: ClipModel, teacher: ClipModel) -> None:
    """Check that an image tower with weights computes the same in the student as in its own model."""
    if own.embed_dim != teacher.embed_dim:
        raise UsageError(
            f"student {own.name}: student.text_tower: teacher needs features of the teacher's width, "
            f"{teacher.embed_dim}, and the weights of this image tower give {own.embed_dim}. Start it at random "
            "(student.init: random), or choose weights of that width"
        )
    activations = [bool(model.config["model_cfg"].get("quick_gelu")) for model in (own, teacher)]
    if activations[0] != activations[1] and not own.config["model_cfg"]["vision_cfg"].get("timm_model_name"):
        names = ["QuickGELU" if quick else "GELU" for quick in activations]
        raise UsageError(
            f"student {own.name}: the weights of its image tower are for {names[0]}, and the teacher's text tower is "
            f"for {names[1]}; open_clip has one activation for both. Start it at random (student.init: random)"
        )


def _visual(model: ClipModel) -> nn.Module:
    net: Any = model.net
    visual: nn.Module = net.visual
    return visual
