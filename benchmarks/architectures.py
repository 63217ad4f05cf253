"""Shrink each of open_clip's architectures to a model of its family that exports in seconds.

Two architectures are of one family if they differ only in sizes: their shrunk configurations are then equal. A shrunk
model has the modules and the settings of its family, two blocks or layers, and random weights.
"""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import open_clip
import timm
from timm.models import model_entrypoint

from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import CONFIG

TOKENIZER = Path(__file__).parents[1] / "recipes" / "glyphs_tiny"
"""The tokenizer that replaces those of the Hub: 1,024 tokens, the last of which ends a text."""

WIDTH = 64  # of both towers and of the features
IMAGE_SIZE = 64
_VIT = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2}
_SIZED = {**_VIT, "img_size": IMAGE_SIZE}

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    # expression of timm's names: (the one that stands for all, the sizes that shrink it)
    r"convnext_.*": ("convnext_base", {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, WIDTH)}),
    r"eva_giant_.*": ("eva_giant_patch14_224", {**_SIZED, "patch_size": 16}),
    r"eva02_(base|large)_.*": ("eva02_base_patch16_clip_224", {**_SIZED, "patch_size": 16}),
    r"eva02_enormous_.*": ("eva02_enormous_patch14_clip_224", {**_SIZED, "patch_size": 16}),
    r"fastvit_mci[012]": ("fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, WIDTH, 2 * WIDTH)}),
    r"fastvit_mci[34]": ("fastvit_mci3", {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 128, 128)}),
    r"swin_.*": ("swin_base_patch4_window7_224", {"img_size": 56, "embed_dim": 16, "depths": (1, 1, 1, 1)}),
    r"vit_base_mci_224": ("vit_base_mci_224", {"img_size": IMAGE_SIZE, "depth": 2}),  # its stem has a fixed width
    r"vit_large_patch14_clip_224": ("vit_large_patch14_clip_224", {**_SIZED, "patch_size": 16}),
    r"vit_medium_patch16_gap_256": ("vit_medium_patch16_gap_256", _SIZED),
    r"vit_pe_core_gigantic_.*": ("vit_pe_core_gigantic_patch14_448", {**_SIZED, "patch_size": 16}),
    r"vit_pe_core_.*": ("vit_pe_core_base_patch16_224", {**_SIZED, "patch_size": 16}),
    r"vit_relpos_.*": ("vit_relpos_medium_patch16_cls_224", _SIZED),
    r"vit_(giantopt_patch16|base_patch32|so400m_patch16)_siglip_.*|vit_large_patch16_siglip_512": (  # with another GELU
        "vit_base_patch32_siglip_256",
        {**_SIZED, "patch_size": 16},
    ),
    r"vit_.*_siglip_.*": ("vit_base_patch16_siglip_224", {**_SIZED, "patch_size": 16}),
    r"vitamin_xlarge_.*": ("vitamin_xlarge_256", {"img_size": IMAGE_SIZE, "depth": 2}),  # its stem has a fixed width
    r"vitamin_.*": ("vitamin_small_224", {"img_size": IMAGE_SIZE, "depth": 2}),
}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    # expression of the Hub's names, and the configuration that transformers builds a small tower of this kind from
    r"roberta-.*": {"model_type": "roberta", "pad_token_id": 0, "max_position_embeddings": 130},
    r"xlm-roberta-.*": {"model_type": "xlm-roberta", "pad_token_id": 0, "max_position_embeddings": 130},
    r"google/mt5-.*": {"model_type": "mt5", "d_kv": 32, "d_ff": WIDTH},
    r"facebook/nllb-.*": {"model_type": "m2m_100", "pad_token_id": 0, "max_position_embeddings": 130},
}
_TOWER = {"vocab_size": 1024, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER |= {"intermediate_size": 2 * WIDTH, "d_model": WIDTH, "num_layers": 2, "num_heads": 2, "encoder_layers": 2}
_TOWER |= {"decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def families() -> dict[str, list[str]]:
    """Return open_clip's architectures by family: the shrunk configuration as JSON, and the names."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in open_clip.list_models():
        found[json.dumps(shrink(open_clip.get_model_config(name)), sort_keys=True)].append(name)
    return dict(found)


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return an architecture's configuration with small sizes; a text tower of the Hub is named by its kind."""
    small = {key: value for key, value in config.items() if key not in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    vision, text = _shrink_vision(config["vision_cfg"]), _shrink_text(config["text_cfg"])
    small |= {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
    if "multimodal_cfg" in config:
        small["multimodal_cfg"] = {"width": WIDTH, "heads": 2, "layers": 1}
        small["multimodal_cfg"]["context_length"] = config["multimodal_cfg"]["context_length"]
    return small


def _shrink_vision(vision: dict[str, Any]) -> dict[str, Any]:
    name = vision.get("timm_model_name")
    if name is not None:
        chosen, changes = find_sizes(name)
        size = changes.get("img_size", IMAGE_SIZE)
        return vision | {"timm_model_name": f"small_{chosen}", "image_size": size, "timm_drop_path": 0.0}
    kept = {key: value for key, value in vision.items() if key not in ("mlp_ratio", "head_width", "patch_size")}
    if isinstance(vision["layers"], list):
        return kept | {"layers": [1, 1, 1, 1], "width": 16, "image_size": IMAGE_SIZE}
    return kept | {"layers": 2, "width": WIDTH, "head_width": 32, "patch_size": 16, "image_size": IMAGE_SIZE}


def find_sizes(timm_name: str) -> tuple[str, dict[str, Any]]:
    """Return the row of TIMM for one of timm's names."""
    return next(row for pattern, row in TIMM.items() if re.fullmatch(pattern, timm_name))


def _shrink_text(text: dict[str, Any]) -> dict[str, Any]:
    small = {key: value for key, value in text.items() if key != "mlp_ratio"}
    if "hf_tokenizer_name" in text:
        small |= {"hf_tokenizer_name": "small", "vocab_size": 1024}
    if "strip_sep_token" in text.get("tokenizer_kwargs", {}):
        small["tokenizer_kwargs"] = text["tokenizer_kwargs"] | {"sep_token": "<end>"}
    if "eos_id" in text:
        small["eos_id"] = 1023
    if "hf_model_name" in text:
        kind = next(kind for pattern, kind in TRANSFORMERS.items() if re.fullmatch(pattern, text["hf_model_name"]))
        return small | {"hf_model_name": kind["model_type"], "hf_model_pretrained": False}
    return small | {"width": WIDTH, "heads": 2, "layers": 2}


def build_small(config: dict[str, Any], folder: Path) -> ClipModel:
    """Write a shrunk architecture into `folder` and return its model, with random weights.

    The folder must stay while a model with a text tower of transformers is in use: its configuration is there.
    """
    config = json.loads(json.dumps(config))
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / file, folder / file)
    if "hf_model_name" in text:
        kind = next(kind for kind in TRANSFORMERS.values() if kind["model_type"] == text["hf_model_name"])
        text["hf_model_name"] = str(folder / "text_tower")
        (folder / "text_tower").mkdir()
        (folder / "text_tower" / "config.json").write_text(json.dumps(_TOWER | kind))
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return build_model(ModelSpec(model=str(folder), init="random"), seed=0)


def register_small(name: str, sizes: dict[str, Any]) -> None:
    """Give timm a small variant of a tower, `small_NAME`."""
    entry = model_entrypoint(name)

    def small(pretrained: bool = False, **settings: Any) -> Any:
        return entry(pretrained=pretrained, **sizes, **settings)

    small.__name__ = f"small_{name}"
    timm.models.register_model(small)


for _name, _sizes in TIMM.values():
    register_small(_name, _sizes)
