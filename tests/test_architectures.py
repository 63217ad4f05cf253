"""open_clip's architectures: a shrunk model of each family is adopted, exported, and computes what open_clip does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, Ended
from PIL import Image

from export.runtime.exported_model import open_exported
from toolchain.models.build import save_model

FAMILIES = (
    "coca_base",
    "coca_roberta-ViT-B-32",
    "coca_ViT-B-32",
    "convnext_base",
    "convnext_large_d",
    "EVA01-g-14",
    "EVA02-B-16",
    "EVA02-E-14",
    "MobileCLIP2-B",
    "MobileCLIP2-L-14",
    "MobileCLIP2-S0",
    "MobileCLIP2-S3",
    "mt5-base-ViT-B-32",
    "nllb-clip-base",
    "nllb-clip-base-siglip",
    "PE-Core-B-16",
    "PE-Core-bigG-14-448",
    "RN50",
    "RN50-quickgelu",
    "roberta-ViT-B-32",
    "swin_base_patch4_window7_224",
    "ViT-B-16",
    "ViT-B-16-quickgelu",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "ViT-B-32-SigLIP2-256",
    "ViT-bigG-14-CLIPA",
    "ViT-bigG-14-worldwide",
    "ViT-H-14-worldwide-quickgelu",
    "ViT-L-14-worldwide",
    "ViT-L-14-worldwide-quickgelu",
    "ViT-M-16-alt",
    "ViT-SO400M-14-SigLIP",
    "ViT-SO400M-16-SigLIP-i18n-256",
    "vit_medium_patch16_gap_256",
    "vit_relpos_medium_patch16_cls_224",
    "ViTamin-B",
    "ViTamin-XL-256",
    "xlm-roberta-base-ViT-B-32",
)
"""The first architecture of each family, in the order of open_clip.list_models()."""

SAME = 1e-4  # of entries of unit features and of probabilities: float32 in ONNX Runtime and in PyTorch
CAPTIONS = ["digit one", "a small plus sign", "leftwards arrow with hook"]


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import architectures

    return architectures


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six images in folders of three classes."""
    paths = []
    for index in range(6):
        path = tmp_path / "images" / CAPTIONS[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (80, 70, 3), np.uint8)).save(path)
        paths.append(path)
    return paths


def test_every_architecture_belongs_to_one_family(architectures: ModuleType) -> None:
    families = architectures.families()
    assert sorted(name for names in families.values() for name in names) == sorted(open_clip.list_models())
    assert tuple(names[0] for names in families.values()) == FAMILIES, "a family is new: add it, and export it"


def test_the_table_in_the_docs_has_every_architecture(architectures: ModuleType) -> None:
    table = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8").partition("export_families: begin")[2]
    rows = [line.split("|")[1].strip() for line in table.partition("export_families: end")[0].splitlines()[3:-1]]
    assert sorted(rows, key=str.lower) == sorted(map(", ".join, architectures.families().values()), key=str.lower)


def test_shrinking_keeps_what_makes_a_family(architectures: ModuleType) -> None:
    siglip = architectures.shrink(open_clip.get_model_config("ViT-L-16-SigLIP2-512"))
    assert siglip["init_logit_bias"] == -10
    assert siglip["text_cfg"]["act_kwargs"] == {"approximate": "tanh"}
    assert (siglip["text_cfg"]["pool_type"], siglip["text_cfg"]["layers"]) == ("last", 2)
    coca = architectures.shrink(open_clip.get_model_config("coca_ViT-L-14"))
    assert coca["vision_cfg"]["attentional_pool"] is True
    assert coca["text_cfg"]["embed_cls"] is True


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_timms_towers_of_a_family_differ_in_sizes_only(architectures: ModuleType) -> None:
    visions = [open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()]
    for name in sorted({vision["timm_model_name"] for vision in visions if "timm_model_name" in vision}):
        chosen, sizes = architectures.find_sizes(name)
        with torch.device("meta"):
            towers = [timm.create_model(each, **sizes) for each in (name, chosen)]
        ours, theirs = (
            (without_numbers(str(tower)), {without_numbers(key) for key in tower.state_dict()}) for tower in towers
        )
        assert ours == theirs, name


def without_numbers(text: str) -> str:
    return re.sub(r"[\d.]+(e-?\d+)?", "N", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # timm and transformers warn about their own next versions
@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_of_each_family_is_adopted_and_exported(
    name: str,
    architectures: ModuleType,
    images: list[Path],
    tiny_recipe: Callable[..., Path],
    clipkd: Callable[..., Ended],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = architectures.build_small(architectures.shrink(open_clip.get_model_config(name)), folder)
    save_model(model, folder)
    evaluate = {"headline": "made", "sets": [{"name": "made", "kind": "folder", "path": str(tmp_path / "images")}]}
    recipe = tiny_recipe(evaluate=evaluate)
    for command in (["adopt", folder, "--like", recipe, "--out", tmp_path / "run"], ["export", tmp_path / "run"]):
        ended = clipkd(*command)
        assert ended.code == 0, ended.err

    encoders = open_exported(tmp_path / "run" / "exported" / "adopted-onnxruntime-fp32", threads=1)
    net: Any = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False).eval()
    shown = [Image.open(path) for path in images]
    with torch.no_grad():
        image_BD = F.normalize(net.encode_image(torch.stack([model.preprocess(image) for image in shown])), dim=-1)
        text_KD = F.normalize(net.encode_text(model.tokenize(CAPTIONS)), dim=-1)
        logits_BK = net.logit_scale.exp() * image_BD @ text_KD.T
        bias = getattr(net, "logit_bias", None)
        probabilities_BK = logits_BK.softmax(-1) if bias is None else (logits_BK + bias).sigmoid()
    ours_BD, ours_KD = encoders.encode_images(shown), encoders.encode_texts(CAPTIONS)
    np.testing.assert_allclose(ours_BD, image_BD, atol=SAME)
    np.testing.assert_allclose(ours_KD, text_KD, atol=SAME)
    np.testing.assert_allclose(encoders.compute_probabilities(ours_BD, ours_KD), probabilities_BK, atol=SAME)
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"].get("init_logit_bias") == (
        None if bias is None else -10
    )
