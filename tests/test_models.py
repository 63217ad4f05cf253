"""Models from anywhere: what is saved opens in plain open_clip and computes the same; what is broken is said."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import REPOSITORY, SMALL, STUDENT
from open_clip.model import CLIP
from PIL import Image
from torch import nn

from toolchain.distillation.compatibility import check_pair
from toolchain.errors import ArtifactError, UsageError
from toolchain.models import hub
from toolchain.models.build import build_model, load_model, save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import (
    is_convolutional,
    is_vision_transformer,
    num_parameters,
    unit_image_features,
    unit_text_features,
)
from toolchain.recipe.distill import OF_OWN_FEATURES, LossWeights
from toolchain.recipe.model import ModelSpec, TeacherSpec
from toolchain.recipe.model_names import CONFIG, SHIPPED, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["", "latin small letter a", "the character LEFTWARDS ARROW with hook", "a drawing of " + "very " * 40]
SIZES = [(32, 32), (64, 64), (31, 47), (200, 10)]

# Plain open_clip keeps images in another memory layout: the same products, summed in another order.
MAX_FEATURE_ERROR = 1e-5
# One multiplication in place of a division: the last bit.
MAX_PIXEL_ERROR = 1e-6


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_a_saved_model_opens_in_plain_open_clip_anywhere(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_model(teacher_folder)
    moved = shutil.copytree(teacher_folder, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path)
    net, _, preprocess = open_clip.create_model_and_transforms("local-dir:elsewhere/moved")
    tokenize = open_clip.get_tokenizer("local-dir:elsewhere/moved")
    net.eval()

    expected = {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in moved.iterdir()} == expected
    plain = net.state_dict()
    assert plain.keys() == ours.net.state_dict().keys()
    assert all(torch.equal(value, plain[key]) for key, value in ours.net.state_dict().items())

    input_ids_BT = ours.tokenize(CAPTIONS)
    assert torch.equal(input_ids_BT, tokenize(CAPTIONS))
    assert input_ids_BT.shape == (len(CAPTIONS), ours.context_length)
    for size in SIZES:
        assert torch.equal(ours.preprocess(picture(size)), preprocess(picture(size)))

    pixel_values_BCHW = torch.stack([preprocess(picture((32, 32), seed)) for seed in range(4)])
    with torch.inference_mode():
        image_BD, text_BD = net.encode_image(pixel_values_BCHW), net.encode_text(input_ids_BT)
        ours_image_BD = unit_image_features(ours.net, pixel_values_BCHW)
        ours_text_BD = unit_text_features(ours.net, input_ids_BT)
    for theirs, unit in ((image_BD, ours_image_BD), (text_BD, ours_text_BD)):
        assert unit.dtype == torch.float32
        assert torch.allclose(unit.norm(dim=-1), torch.ones(4))
        assert (unit - theirs / theirs.norm(dim=-1, keepdim=True)).abs().max() < MAX_FEATURE_ERROR


def test_what_the_configuration_says(teacher_folder: Path) -> None:
    model = load_model(teacher_folder)
    assert (model.image_size, model.context_length, model.embed_dim) == (32, 20, 128)
    assert not model.net.training
    assert model.logit_scale.item() == pytest.approx(1 / 0.07), "the multiplier, which open_clip initialises so"
    assert sum(num_parameters(model.net)) == sum(parameter.numel() for parameter in model.net.parameters())
    assert num_parameters(model.net)[0] == sum(parameter.numel() for parameter in model.net.visual.parameters())


def test_saving_again_gives_the_same_bytes(teacher_folder: Path, tmp_path: Path) -> None:
    save_model(load_model(teacher_folder), tmp_path)
    for path in teacher_folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_normalise_equals_preprocess_where_nothing_is_resized(student_folder: Path) -> None:
    config = json.loads((student_folder / CONFIG).read_text())
    config["preprocess_cfg"] |= {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.27, 0.28]}  # channels that differ
    (student_folder / CONFIG).write_text(json.dumps(config))
    model = load_model(student_folder, random_seed=0)
    pictures = [picture((32, 32), seed) for seed in range(3)]
    pixels_BCHW = torch.stack([torch.from_numpy(np.array(image)) for image in pictures]).permute(0, 3, 1, 2)
    expected_BCHW = torch.stack([model.preprocess(image) for image in pictures])
    assert (model.normalise(pixels_BCHW) - expected_BCHW).abs().max() < MAX_PIXEL_ERROR


def test_a_random_model_is_a_function_of_its_seed() -> None:
    first, again, other = (load_model(STUDENT, random_seed=seed).net.state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


# From anywhere.


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model": "ViT-B-16", "model_cfg": SMALL} | fields)


def small(seed: int = 0, **fields: Any) -> ClipModel:
    return build_model(spec(**fields), seed=seed)


GLYPHS_TEXT = SMALL["text_cfg"] | {"hf_tokenizer_name": str(STUDENT), "vocab_size": 1024, "context_length": 20}  # type: ignore[operator]
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
    "text_cfg": GLYPHS_TEXT,
}
TIMM = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "test_byobnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 48},
}
COCA = SMALL | {"multimodal_cfg": {"width": 32, "heads": 2, "layers": 1}}
ROBERTA = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROBERTA |= {"intermediate_size": 64, "vocab_size": 1024, "max_position_embeddings": 90, "pad_token_id": 0}

KINDS: dict[str, ModelSpec] = {
    "an architecture": spec(),
    "QuickGELU": spec(model="ViT-B-16-quickgelu"),
    "QuickGELU by change": spec(model_cfg=SMALL | {"quick_gelu": True}),
    "its own tokenizer": spec(model_cfg=SMALL | {"text_cfg": GLYPHS_TEXT}),
    "CustomTextCLIP": spec(model_cfg=SMALL | {"custom_text": True}),
    "SigLIP": spec(model="ViT-B-16-SigLIP", model_cfg=TIMM | {"text_cfg": GLYPHS_TEXT}),
    "ResNet": spec(model="RN50", model_cfg=RESNET),
    "timm": spec(model="resnet18", model_cfg=TIMM | {"text_cfg": SMALL["text_cfg"]}),
    "CoCa": spec(model="coca_ViT-B-32", model_cfg=COCA),
    "other preprocessing": spec(preprocess_cfg={"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "resize_mode": "squash"}),
    "other interpolation": spec(preprocess_cfg={"interpolation": "bilinear"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_anywhere_opens_in_plain_open_clip_once_it_is_saved(kind: str, tmp_path: Path) -> None:
    same_everywhere(build_model(KINDS[kind], seed=3), tmp_path)


def test_a_text_tower_of_transformers_opens_in_plain_open_clip_once_it_is_saved(tmp_path: Path) -> None:
    (tmp_path / "roberta").mkdir()
    (tmp_path / "roberta" / "config.json").write_text(json.dumps(ROBERTA))
    text = {"hf_model_name": str(tmp_path / "roberta"), "hf_tokenizer_name": str(STUDENT), "context_length": 20}
    model = small(model="roberta-ViT-B-32", model_cfg=SMALL | {"text_cfg": text})
    (tmp_path / "saved").mkdir()
    same_everywhere(model, tmp_path / "saved")


def same_everywhere(model: ClipModel, folder: Path) -> None:
    """Plain open_clip, and we ourselves, make the same model of what is saved of it."""
    save_model(model, folder)
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    net.eval()
    assert type(net) is type(model.net)
    size = model.image_size
    for picture_size in ((size, size), (51, 33)):
        assert torch.equal(model.preprocess(picture(picture_size)), preprocess(picture(picture_size)))
    input_ids_BT = model.tokenize(CAPTIONS)
    assert torch.equal(input_ids_BT, tokenize(CAPTIONS))
    assert input_ids_BT.shape == (len(CAPTIONS), model.context_length)
    pixel_values_BCHW = torch.stack([preprocess(picture((size, size), seed)) for seed in range(2)])
    again = load_model(folder)
    with torch.inference_mode():
        for other in (net, again.net):
            for encode, inputs in ((unit_image_features, pixel_values_BCHW), (unit_text_features, input_ids_BT)):
                expected_BD = encode(model.net, inputs)
                assert (encode(other, inputs) - expected_BD).abs().max() < MAX_FEATURE_ERROR
                assert expected_BD.shape[1] == model.embed_dim
    assert again.config == model.config
    assert again.tokenizer_files == model.tokenizer_files


def test_an_activation_changes_what_is_computed() -> None:
    """The comparison above would not see a QuickGELU that is lost on both sides."""
    plain, quick = small(), small(model="ViT-B-16-quickgelu")
    assert quick.config["model_cfg"]["quick_gelu"] is True
    pixel_values_BCHW = plain.preprocess(picture((32, 32)))[None]
    with torch.inference_mode():
        difference_BD = plain.net.encode_image(pixel_values_BCHW) - quick.net.encode_image(pixel_values_BCHW)
    assert difference_BD.abs().max() > 100 * MAX_FEATURE_ERROR


def test_a_random_model_is_the_same_by_either_road() -> None:
    built = build_model(ModelSpec(model="glyphs_tiny"), seed=5).net.state_dict()
    loaded = load_model(STUDENT, random_seed=5).net.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in built.items())


def test_weights_and_randomness_are_as_the_specification_says(teacher_folder: Path) -> None:
    stored = load_model(teacher_folder).net.state_dict()["text_projection"]
    for cls, init, random in (
        (ModelSpec, None, True),
        (ModelSpec, "weights", False),
        (ModelSpec, "random", True),
        (TeacherSpec, None, False),
        (TeacherSpec, "random", True),
    ):
        net = build_model(cls(model=str(teacher_folder), init=init), seed=0).net
        assert torch.equal(net.state_dict()["text_projection"], stored) is not random


def test_changes_reach_only_what_they_name() -> None:
    model = build_model(ModelSpec(model="glyphs_tiny", model_cfg={"text_cfg": {"layers": 1}}), seed=0)
    theirs = json.loads((STUDENT / CONFIG).read_text())
    theirs["model_cfg"]["text_cfg"]["layers"] = 1
    assert model.config == theirs
    assert len(model.net.transformer.resblocks) == 1


def test_a_folder_of_the_recipes_own_takes_changes_of_the_image_size(teacher_folder: Path) -> None:
    changed = ModelSpec(model=str(teacher_folder), model_cfg={"vision_cfg": {"image_size": 64}}, init="weights")
    model = build_model(changed, seed=0)
    assert model.geometry == (64, "bicubic")
    assert model.preprocess(picture((100, 80))).shape == (3, 64, 64)


# Tags and the Hub: what open_clip would download, put where it would find it.


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Every tag's weights are those of a small model; returns the tags asked for."""
    asked: list[dict[str, Any]] = []

    def fetch(tag: dict[str, Any]) -> str:
        asked.append(tag)
        return str(tmp_path / "downloaded.safetensors")

    monkeypatch.setattr(hub.open_clip_pretrained, "download_pretrained", fetch)
    monkeypatch.setattr(hub, "offline_reason", lambda: None)
    save_model(small(seed=9), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "downloaded.safetensors")
    return asked


def test_a_tag_brings_weights_activation_and_preprocessing(download: list[dict[str, Any]]) -> None:
    said: list[str] = []
    for tag, quick in (("openai", True), ("laion400m_e32", None), ("laion400m-e32", None)):
        tagged = TeacherSpec.model_validate(spec(pretrained=tag).model_dump())
        model = build_model(tagged, seed=0, say=said.append)
        assert torch.equal(model.net.text_projection, small(seed=9).net.text_projection)
        assert model.config["model_cfg"].get("quick_gelu") is quick, "the tag's, which open_clip only warns about"
        assert (open_clip.transformer.QuickGELU in {type(m) for m in model.net.modules()}) is bool(quick)
    assert [tag["hf_hub"].split(".")[-1] for tag in download] == ["openai/", "laion400m_e32/", "laion400m_e32/"]
    assert said[0].startswith(
        "ViT-B-16, weights openai: loading from timm/vit_base_patch16_clip_224.openai/ or its local cache"
    )
    assert len(said) == 3
    said_otherwise = spec(pretrained="openai", model_cfg=SMALL | {"quick_gelu": False})
    assert build_model(said_otherwise, seed=0).config["model_cfg"]["quick_gelu"] is False


def test_a_tags_normalisation_and_resizing(download: list[dict[str, Any]]) -> None:
    siglip = {"text_cfg": SMALL["text_cfg"], "custom_text": False, "init_logit_bias": None, "embed_dim": 32}
    siglip |= {"vision_cfg": SMALL["vision_cfg"] | {"timm_model_name": None}}  # type: ignore[operator]
    siglip["text_cfg"] |= {"hf_tokenizer_name": None, "tokenizer_kwargs": {}, "vocab_size": 49408, "context_length": 77}
    siglip["text_cfg"] |= {"no_causal_mask": False, "pool_type": "argmax", "proj_bias": False}
    model = small(model="ViT-B-16-SigLIP", pretrained="webli", model_cfg=siglip)
    assert download[0]["hf_hub"] == "timm/ViT-B-16-SigLIP/"
    cfg = model.config["preprocess_cfg"]
    assert (cfg["mean"], cfg["std"], cfg["resize_mode"]) == ([0.5] * 3, [0.5] * 3, "squash")
    assert cfg["size"] == [32, 32]


def test_a_random_model_downloads_nothing(download: list[dict[str, Any]]) -> None:
    said: list[str] = []
    build_model(spec(), seed=0, say=said.append)
    build_model(TeacherSpec(model="ViT-B-16", model_cfg=SMALL, init="random"), seed=0, say=said.append)
    assert download == []
    assert said == []


def test_a_model_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_model(small(seed=9, model_cfg=SMALL | {"text_cfg": GLYPHS_TEXT, "quick_gelu": True}), tmp_path)
    asked: list[tuple[str, str | None]] = []

    def fetch(repository: str, filename: str | None = None) -> str:
        asked.append((repository, filename))
        return str(tmp_path / (filename or WEIGHTS))

    monkeypatch.setattr(hub.open_clip_pretrained, "download_pretrained_from_hf", fetch)
    monkeypatch.setattr(hub, "offline_reason", lambda: None)
    said: list[str] = []
    teacher = build_model(TeacherSpec(model="hf-hub:org/name"), seed=0, say=said.append)
    assert asked == [("org/name", CONFIG), ("org/name", None)]
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [
        "org/name, open_clip_config.json",
        "org/name, its weights",
    ]
    saved = load_model(tmp_path)
    assert teacher.config == saved.config
    assert teacher.name == "hf-hub:org/name"
    assert all(torch.equal(value, saved.net.state_dict()[key]) for key, value in teacher.net.state_dict().items())
    asked.clear()
    build_model(ModelSpec(model="hf-hub:org/name"), seed=0)
    assert asked == [("org/name", CONFIG)], "a student that starts at random needs the architecture only"


OFFLINE = """
import json, sys
from toolchain.errors import ClipkdError
from toolchain.models.build import build_model
from toolchain.recipe.model import ModelSpec, TeacherSpec

for spec in (
    TeacherSpec(model="ViT-B-16", pretrained="laion400m_e32"),
    TeacherSpec(model="hf-hub:org/name"),
    ModelSpec(model="ViT-B-16-SigLIP"),
    ModelSpec(model="roberta-ViT-B-32", model_cfg={"text_cfg": {"hf_tokenizer_name": None}}),
):
    try:
        build_model(spec, seed=0)
    except ClipkdError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_offline_a_download_fails_with_one_message(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.stderr == ""
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    whats = [
        "ViT-B-16, weights laion400m_e32",
        "hf-hub:org/name, open_clip_config.json",
        "tokenizer timm/ViT-B-16-SigLIP",
        "roberta-ViT-B-32: the configuration of its text tower roberta-base",
    ]
    assert len(said) == len(whats)
    for (kind, message), what in zip(said, whats, strict=True):
        assert kind == "ArtifactError"
        assert message.startswith(f"{what}: cannot be downloaded (")
        assert message.endswith("of a machine that has downloaded it, or name a folder, or a file with checkpoint")
        assert "\n" not in message


UNREACHABLE = """
import json, time
from toolchain.errors import ArtifactError
from toolchain.models.build import build_model
from toolchain.recipe.model import ModelSpec, TeacherSpec

for spec in (TeacherSpec(model="hf-hub:org/name"), ModelSpec(model="ViT-B-16-SigLIP")):
    started = time.monotonic()
    try:
        build_model(spec, seed=0)
    except ArtifactError as error:
        print(json.dumps([time.monotonic() - started, str(error)]))
"""


def test_a_hub_that_does_not_answer_costs_seconds_and_prints_nothing(tmp_path: Path) -> None:
    """A closed port instead of the Hub: its client by itself repeats each request for 25 s, with two lines each."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", UNREACHABLE],
        cwd=REPOSITORY,
        env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.stderr == ""
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(said) == 2
    for took_s, message in said:
        assert took_s < 10
        assert "cannot be downloaded (http://127.0.0.1:9 cannot be reached: " in message
        assert "HF_HUB_OFFLINE" not in message, "clipkd itself made the client go offline"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"model": "RN50-quickgelu", "init": "weights"},
            "model RN50-quickgelu: an architecture, and the recipe names no weights for it. Add pretrained: openai "
            "(or another of yfcc15m, cc12m), checkpoint: FILE, or init: random",
        ),
        (
            {"model": "ViT-M-16", "init": "weights"},
            "model ViT-M-16: an architecture, and the recipe names no weights for it. Add checkpoint: FILE, ",
        ),
        (
            {"pretrained": "laion400m"},
            "pretrained 'laion400m': open_clip has no such weights for ViT-B-16; did you mean laion4",
        ),
        (
            {"pretrained": "OpenIA"},
            "pretrained 'OpenIA': open_clip has no such weights for ViT-B-16; did you mean openai?",
        ),
        (
            {"pretrained": "weights/mine.pt"},
            "pretrained 'weights/mine.pt': open_clip has no such weights for ViT-B-16; for a file, write checkpoint: ",
        ),
        (
            {"model": "ViT-B-32-quickgelu", "pretrained": "zzz"},
            "pretrained 'zzz': open_clip has no such weights for ViT-B-32-quickgelu; it has openai, laion400m_e31, ",
        ),
        (
            {"model": "ViT-M-16", "pretrained": "zzz"},
            "pretrained 'zzz': open_clip has no such weights for ViT-M-16; it has none",
        ),
        ({"model": "ViT-B-61"}, "model 'ViT-B-61': open_clip has no such architecture; did you mean ViT-B-16?"),
        (
            {"model_cfg": {"vision_cfg": {"widht": 64}}},
            "ViT-B-16: open_clip cannot build this model with the recipe's changes: CLIPVisionCfg.__init__() got an "
            "unexpected keyword argument 'widht'",
        ),
        (
            {"preprocess_cfg": {"maen": [0, 0, 0]}},
            "ViT-B-16: open_clip cannot build this model with the recipe's changes: PreprocessCfg.__init__() got an "
            "unexpected keyword argument 'maen'",
        ),
        (
            {"model": "swin_t", "model_cfg": {"vision_cfg": {"image_size": 32}}},
            "swin_t: its image tower takes 224 x 224 pixels but image_size is 32 x 32, and open_clip cannot resize ",
        ),
    ],
    ids=str,
)
def test_what_the_recipe_has_wrong_is_said(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_model(ModelSpec.model_validate({"model": "ViT-B-16"} | fields), seed=0)
    assert str(caught.value).startswith(said)


def test_a_tokenizer_that_does_not_survive_saving_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip.tokenizer import HFTokenizer

    save = HFTokenizer.save_pretrained

    def lossy(tokenizer: HFTokenizer, folder: str) -> None:
        save(tokenizer, folder)
        path = Path(folder) / "tokenizer.json"
        path.write_text(path.read_text().replace('"<end>"', '"<fin>"'))
        (Path(folder) / "tokenizer_config.json").write_text(
            (Path(folder) / "tokenizer_config.json").read_text().replace('"<end>"', '"<fin>"')
        )
        content = json.loads(path.read_text())
        content["post_processor"] = None
        path.write_text(json.dumps(content))

    monkeypatch.setattr(HFTokenizer, "save_pretrained", lossy)
    with pytest.raises(ArtifactError, match="after saving and loading it tokenizes differently"):
        small(model_cfg=SMALL | {"text_cfg": GLYPHS_TEXT})


# What a model is.


# The paper's models: parameters of the image tower, the text transformer and all, then the same in millions as the
# paper's second table gives them, and whether the released code's rule ("vit" in its name for the model) trains them
# with a transformer's betas.
PAPER: dict[str, tuple[int, int, int, str, str, str, str]] = {
    "ViT-L-14": (303_966_208, 85_054_464, 427_616_513, "303.97", "85.05", "427.6", "ViT-L-14"),
    "ViT-B-16": (86_192_640, 37_828_608, 149_620_737, "86.19", "37.83", "149.6", "ViT-B-16"),
    "RN101": (56_259_936, 37_828_608, 119_688_033, "56.26", "37.83", "119.7", "RN101"),
    "RN50": (38_316_896, 37_828_608, 102_007_137, "38.32", "37.83", "102.0", "RN50"),
    "vit_t_16": (5_622_912, 21_293_568, 46_116_097, "5.62", "21.29", "46.1", "ViT-T-16"),
    "mobilevit_s": (5_265_312, 21_293_568, 45_758_497, "5.27", "21.29", "45.8", "timm-mobilevit_s"),
    "swin_t": (27_912_570, 21_293_568, 68_405_755, "27.91", "21.29", "68.4", "timm-swin_tiny_patch4_window7_224"),
    "mobilenetv3_small": (2_042_656, 21_293_568, 42_535_841, "2.04", "21.29", "42.5", "timm_mobilenetv3_small_100"),
    "efficientnet_b0": (4_662_908, 21_293_568, 45_156_093, "4.66", "21.29", "45.2", "timm-efficientnet-b0"),
    "resnet18": (11_438_656, 21_293_568, 51_931_841, "11.44", "21.29", "51.9", "timm_resnet18"),
}


def without_memory(name: str) -> nn.Module:
    """A model of which only the shapes exist."""
    path = SHIPPED / name / CONFIG
    config = json.loads(path.read_text())["model_cfg"] if path.exists() else open_clip.get_model_config(name)
    with torch.device("meta"):
        return CLIP(**config)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_papers_sizes(name: str) -> None:
    image, transformer, total, *rounded, their_name = PAPER[name]
    net: Any = without_memory(name)
    counts = (num_parameters(net)[0], sum(p.numel() for p in net.transformer.parameters()), sum(num_parameters(net)))
    assert counts == (image, transformer, total)
    for count, digits in zip(counts, rounded, strict=True):
        assert f"{count / 1e6:.{len(digits.partition('.')[2])}f}" == digits
    assert is_vision_transformer(net.visual) is ("vit" in their_name.lower())
    assert is_convolutional(net.visual) is (name not in ("ViT-L-14", "ViT-B-16", "vit_t_16", "swin_t"))


def test_mobilenetv3_projects_what_follows_its_last_convolution() -> None:
    """1,024 features and not 576; the bias of the projection is timm's, 512 parameters that the paper's has not."""
    visual: Any = without_memory("mobilenetv3_small").visual
    assert visual.trunk.classifier.weight.shape == (512, 1024)
    assert visual.trunk.classifier.bias.shape == (512,)
    assert len(visual.head) == 0


@pytest.mark.parametrize("name", [name for name, sizes in PAPER.items() if (SHIPPED / name / CONFIG).exists()])
def test_the_papers_students_run(name: str) -> None:
    model = build_model(ModelSpec(model=name), seed=0)
    assert model.geometry == (224, "bicubic")
    assert (model.embed_dim, model.context_length) == (512, 77)
    blank = Image.new("RGB", (300, 224))
    with torch.inference_mode():
        image_BD = unit_image_features(model.net, model.preprocess(blank)[None])
        text_BD = unit_text_features(model.net, model.tokenize(["a photo of nothing"]))
    for features_BD in (image_BD, text_BD):
        assert features_BD.shape == (1, 512)
        assert torch.allclose(features_BD.norm(dim=-1), torch.ones(1))


@pytest.mark.parametrize(
    ("name", "is_vit", "convolves"),
    [
        ("vit_tiny_patch16_224", True, False),
        ("deit_tiny_distilled_patch16_224", True, False),
        ("eva02_tiny_patch14_224", True, False),
        ("vit_relpos_small_patch16_224", True, False),
        ("mobilevitv2_050", True, True),
        ("resnet18", False, True),
        ("convnext_atto", False, True),
        ("swin_tiny_patch4_window7_224", False, False),
        ("mixer_s32_224", False, False),
    ],
)
def test_a_towers_kind_is_that_of_its_layers(name: str, is_vit: bool, convolves: bool) -> None:
    import timm

    with torch.device("meta"):
        visual = types.SimpleNamespace(trunk=timm.create_model(name))
    visual.modules = visual.trunk.modules
    assert is_vision_transformer(visual) is is_vit  # type: ignore[arg-type]
    assert is_convolutional(visual) is convolves  # type: ignore[arg-type]


def test_pictures_lie_in_memory_as_the_tower_likes_them(teacher_folder: Path) -> None:
    for model, last in ((load_model(teacher_folder), True), (small(), False)):
        pixels_BCHW = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        values_BCHW = model.normalise(pixels_BCHW)
        assert values_BCHW.dtype == torch.float32
        assert values_BCHW.is_contiguous(memory_format=torch.channels_last) is last
        layouts = {
            weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
            for weight in model.net.visual.parameters()
            if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] > 1
        }
        assert layouts == {last}


def test_normalised_pictures_of_the_first_call_in_inference_can_be_trained_on() -> None:
    model = small(preprocess_cfg={"mean": [0.11, 0.22, 0.33]})
    pixels_BCHW = torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)
    with torch.inference_mode():
        first_BCHW = model.normalise(pixels_BCHW)
    weight = torch.ones((), requires_grad=True)
    (weight * model.normalise(pixels_BCHW)).sum().backward()
    assert weight.grad is not None
    assert torch.isclose(weight.grad, first_BCHW.sum())


def test_the_statistics_are_where_the_pictures_are() -> None:
    values_BCHW = small().normalise(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta"))
    assert (values_BCHW.device.type, values_BCHW.dtype) == ("meta", torch.float32)


def test_a_scale_is_a_number_whatever_shape_the_model_keeps_it_in() -> None:
    model = small(model_cfg=SMALL | {"nonscalar_logit_scale": True})
    assert model.net.logit_scale.shape == (1,)
    assert model.logit_scale.shape == ()


def test_pictures_that_are_not_square_are_refused() -> None:
    tall = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"image_size": [64, 32]}}  # type: ignore[operator]
    model = small(model_cfg=tall)
    for ask in (lambda: model.geometry, lambda: model.image_size, lambda: check_pair(small(), model, LossWeights())):
        with pytest.raises(
            UsageError, match=r"ViT-B-16: its images are 64 x 32 \(height x width\); clipkd supports sq"
        ):
            ask()


# Which go together.


def test_models_that_differ_in_everything_else_go_together(teacher_folder: Path) -> None:
    glyphs = load_model(teacher_folder)  # 32 pixels, 20 tokens of its own, 128 wide, its own normalisation
    quick = small(
        model="ViT-B-16-quickgelu", model_cfg=SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"image_size": 64}}
    )  # type: ignore[operator]
    everything = LossWeights.model_validate(
        {name: 1.0 for name in LossWeights.model_fields if name not in ("mfd", "sigmoid_kd")}
    )
    for student, teacher in itertools.permutations((glyphs, quick, small()), 2):
        check_pair(student, teacher, everything)
    check_pair(quick, None, everything)


NONE = dict.fromkeys(LossWeights.model_fields, 0.0)


def test_at_another_width_an_objective_must_train_the_features_that_ship(teacher_folder: Path) -> None:
    glyphs, wider = load_model(teacher_folder), small()
    assert glyphs.embed_dim != wider.embed_dim
    features = NONE | {"fd": 1.0, "icl": 1.0}
    check_pair(glyphs, glyphs, LossWeights(**features))
    for name in OF_OWN_FEATURES[:3]:  # the last needs two sigmoid models
        check_pair(glyphs, wider, LossWeights(**features | {name: 0.5}))
    with pytest.raises(UsageError, match=r"\(fd, icl\).*\(width 128\).*width \(32\).*Give one of task, crd"):
        check_pair(glyphs, wider, LossWeights(**features))


def test_sigmoid_models_teach_and_learn() -> None:
    sigmoid, softmax = small(model_cfg=SMALL | {"init_logit_bias": -10}), small()
    relations = LossWeights(crd=1, cross_kd=1, gd=1, affinity=1)
    for student, teacher in itertools.permutations((softmax, sigmoid), 2):
        check_pair(student, teacher, relations)
    check_pair(sigmoid, None, LossWeights())
    check_pair(sigmoid, sigmoid, LossWeights(**NONE | {"sigmoid_kd": 1.0}))


@pytest.mark.parametrize("weights", [{"crd": 1.0, "fd": 1.0}, {"affinity": 1.0}])
def test_a_bias_that_nothing_trains_is_refused(weights: dict[str, float]) -> None:
    sigmoid = small(model_cfg=SMALL | {"init_logit_bias": -10})
    with pytest.raises(
        UsageError, match=r"student ViT-B-16: has a logit_bias.*loss_weights.task.*\{init_logit_bias: nu"
    ):
        check_pair(sigmoid, small(), LossWeights(**NONE | weights))


def test_sigmoid_distillation_is_of_two_sigmoid_models() -> None:
    sigmoid, softmax = small(model_cfg=SMALL | {"init_logit_bias": -10}), small()
    with pytest.raises(UsageError, match=r"student ViT-B-16: has no logit_bias.*init_logit_bias: -10"):
        check_pair(softmax, sigmoid, LossWeights(sigmoid_kd=1))
    with pytest.raises(UsageError, match=r"teacher ViT-B-16: has no logit_bias.*or use crd"):
        check_pair(sigmoid, softmax, LossWeights(sigmoid_kd=1))


def test_of_independent_pairs_the_one_that_matches_is_distributed_as_softmax_says() -> None:
    """Why a sigmoid teacher may teach CRD: by enumeration of every outcome of a row's candidates."""
    random = np.random.default_rng(0)
    scale, bias, cosine_K = 9.0, -4.0, random.uniform(-1, 1, 5)
    probability_K = 1 / (1 + np.exp(-(scale * cosine_K + bias)))
    exactly_one_K = np.zeros(5)
    for outcome_K in itertools.product((0, 1), repeat=5):
        if sum(outcome_K) == 1:
            exactly_one_K[outcome_K.index(1)] = math.prod(np.where(outcome_K, probability_K, 1 - probability_K))
    softmax_K = np.exp(scale * cosine_K) / np.exp(scale * cosine_K).sum()
    np.testing.assert_allclose(exactly_one_K / exactly_one_K.sum(), softmax_K, rtol=1e-12)


def test_a_coca_model_teaches_only() -> None:
    coca = build_model(KINDS["CoCa"], seed=0)
    check_pair(small(), coca, LossWeights())
    with pytest.raises(
        UsageError, match="student coca_ViT-B-32: a CoCa model, and no loss of clipkd trains its caption"
    ):
        check_pair(coca, small(), LossWeights())


def test_masks_are_asked_of_the_student_where_they_are_needed() -> None:
    sees_patches, convolves = small(), build_model(KINDS["ResNet"], seed=0)
    check_pair(sees_patches, convolves, LossWeights(mfd=1))
    check_pair(convolves, sees_patches, LossWeights(mfd=0))
    check_pair(convolves, None, LossWeights(mfd=1))
    with pytest.raises(UsageError, match="mfd"):
        check_pair(convolves, sees_patches, LossWeights(mfd=1))


# Broken folders.


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "FOLDER: no open_clip_config.json; expected an open_clip local-dir"),
        (without(CONFIG), "FOLDER: no open_clip_config.json; expected an open_clip local-dir"),
        (without(WEIGHTS), "FOLDER: no open_clip_model.safetensors; this model has a configuration but no weights"),
        (lambda folder: (folder / CONFIG).write_text("{"), "FOLDER/open_clip_config.json: not JSON: "),
        (
            lambda folder: (folder / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
            "FOLDER/open_clip_config.json: a Git LFS pointer, ",
        ),
        (
            lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{"),
            "FOLDER/open_clip_config.json: this is UTF-16 text",
        ),
        (
            lambda folder: (folder / CONFIG).write_text("{}"),
            "FOLDER/open_clip_config.json: no model_cfg and no preprocess_cfg; expected an open_clip local-dir's conf",
        ),
        (
            edit(lambda config: config.pop("preprocess_cfg")),
            "FOLDER/open_clip_config.json: no preprocess_cfg; expected",
        ),
        (
            edit(lambda config: config["model_cfg"].update(embed_dim=64)),
            "FOLDER/open_clip_model.safetensors: these weights do not fit FOLDER: 2 with a different shape: "
            "text_projection [128, 128] instead of [128, 64], visual.head.proj.weight [128, 96] instead of [64, 96]. "
            "Most likely they belong to another ",
        ),
        (edit(lambda config: config["model_cfg"].update(vision=3)), "FOLDER: open_clip cannot build this model: "),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
            "FOLDER/open_clip_model.safetensors: not a weights file, or corrupt: ",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b""),
            "FOLDER/open_clip_model.safetensors: an empty file, not weights. ",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "FOLDER: "),
        (edit(lambda config: config["preprocess_cfg"].update(sise=3)), "FOLDER: "),
    ],
)
def test_a_broken_folder_is_said(
    teacher_folder: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(said.replace("FOLDER", str(folder)))


def test_a_random_model_needs_no_weights(student_folder: Path) -> None:
    assert not (student_folder / WEIGHTS).exists()
    load_model(student_folder, random_seed=0)
