"""Advise on a teacher that is far larger than its student; parameters are counted from configurations alone."""

import re
from collections.abc import Mapping
from typing import Any

from toolchain.recipe.model_config import read_model_cfg
from toolchain.recipe.recipe import Recipe

FAR_LARGER = 50.0
"""Ratio of image parameters above which there is advice: between MobileNetV3 with ViT-B/16, 42, which CLIP-KD's tables
speak for, and ViT-T/16 with ViT-L/14, 54, which they speak against."""

# Parameters of image towers of timm in millions, of the included students and of ViTs by the size in their name; their
# number of classes or projection is counted for a width of 512.
_TIMM = {
    "efficientnet_b0": 4.7,
    "efficientvit_b1": 8.3,
    "fastvit_mci0": 11.4,
    "fastvit_mci1": 21.5,
    "fastvit_mci2": 35.7,
    "fastvit_t8": 3.7,
    "mobilenetv3_small_100": 2.0,
    "mobilenetv4_conv_medium": 9.1,
    "mobilenetv4_conv_small": 3.1,
    "mobilevit_s": 5.3,
    "repvit_m1_0": 6.6,
    "resnet18": 11.4,
    "swin_tiny_patch4_window7_224": 27.9,
    "tiny_vit_5m_224": 5.2,
}
_TIMM_VIT = {"tiny": 6, "small": 23, "base": 90, "large": 310, "so400m": 428, "huge": 640, "giant": 1020}


def advise_on_teacher(recipe: Recipe) -> list[str]:
    """Return the advice on a recipe's teacher, if there is any: at most one line."""
    from toolchain.recipe.load import teacher_recipe

    if recipe.teacher is None:
        return []
    teacher = teacher_recipe(recipe.teacher).student if recipe.teacher.recipe else recipe.teacher
    return advise_on_models(read_model_cfg(teacher) or {}, read_model_cfg(recipe.student) or {})


def advise_on_models(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    """Return the same for the `model_cfg` of two models; none if the size of one is unknown."""
    sizes = [image_parameters(each) for each in (teacher, student)]
    if sizes[0] is None or sizes[1] is None or sizes[0] <= FAR_LARGER * sizes[1]:
        return []
    return [
        f"the teacher's image tower has {sizes[0] / sizes[1]:.0f} times the student's parameters "
        f"({sizes[0] / 1e6:.0f} M, {sizes[1] / 1e6:.1f} M). In CLIP-KD (arXiv:2307.12732, teachers of LAION-400M), "
        "ViT-T/16 reached 40.9 % on ImageNet with ViT-L/14, 54 times its size, and 42.6 % with ViT-B/16, 15 times its "
        "size, although ViT-L/14 itself is better (72.8 %, 67.1 %). Compare with a smaller teacher"
    ]


def image_parameters(model_cfg: Mapping[str, Any]) -> float | None:
    """Return the number of parameters of an image tower; None if its configuration does not tell it."""
    vision: Mapping[str, Any] = model_cfg.get("vision_cfg", {})
    if name := vision.get("timm_model_name"):
        found = _TIMM.get(name)
        if found is None and (size := re.match(rf"vit_(?:pe_core_)?({'|'.join(_TIMM_VIT)})_patch", name)):
            found = _TIMM_VIT[size[1]]
        return None if found is None else 1e6 * found
    layers, width, image = vision.get("layers", 12), vision.get("width", 768), vision.get("image_size", 224)
    patch = vision.get("patch_size") or 16  # null for a ResNet
    if not isinstance(image, int) or not isinstance(patch, int) or not model_cfg.get("embed_dim"):
        return None
    if isinstance(layers, int):
        return _of_vit(layers, width, image, patch, vision.get("mlp_ratio", 4.0), model_cfg["embed_dim"])
    return _of_resnet(layers, vision.get("width", 64), image, model_cfg["embed_dim"])


def _of_vit(layers: int, width: int, image: int, patch: int, mlp_ratio: float, embed_dim: int) -> float:
    """Return the parameters of open_clip's ViT: of its blocks, its patch and position embeddings, its projection."""
    hidden = int(width * mlp_ratio)
    block = 4 * width**2 + 2 * width * hidden + 9 * width + hidden
    return layers * block + width * (3 * patch**2 + (image // patch) ** 2 + 1 + 5 + embed_dim)


def _of_resnet(layers: list[int], width: int, image: int, embed_dim: int) -> float:
    """Return the parameters of CLIP's ResNet: of its stem, its bottlenecks and its attention pooling."""
    total, channels = width * (27 + 9 * width // 2 + 9 * width) // 2 + 4 * width, width
    for number, blocks in enumerate(layers):
        planes = width << number
        for _ in range(blocks):
            total += planes * channels + 9 * planes**2 + 4 * planes**2 + 12 * planes
            total += 0 if channels == 4 * planes else 4 * planes * channels + 8 * planes  # a block that changes sizes
            channels = 4 * planes
    positions = (image // 32) ** 2 + 1
    return total + channels * positions + 3 * channels * (channels + 1) + (channels + 1) * embed_dim
