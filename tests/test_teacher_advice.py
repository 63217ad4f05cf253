"""Advice on a teacher that is far larger than its student."""

import json
from collections.abc import Callable

import open_clip
import pytest
import torch
from conftest import Ended

from toolchain.models.build import build_model
from toolchain.models.towers import num_parameters
from toolchain.pipeline.teacher_advice import FAR_LARGER, advise_on_models, advise_on_teacher, image_parameters
from toolchain.recipe.load import load_recipe, recipe_path, shipped_recipes
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import CONFIG, SHIPPED, shipped_models

MAX_RELATIVE_ERROR = 0.05  # of a table that is rounded to 0.1 million parameters, or of a size in a name

OWN = ("ViT-T-16", "ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-B-16-plus-240", "RN50", "RN101", "RN50x4")


@pytest.mark.parametrize("name", [name for name in OWN if name in open_clip.list_models()])
def test_parameters_of_open_clips_towers_are_counted_exactly(name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
        net = kind(**{key: value for key, value in config.items() if key in ("embed_dim", "vision_cfg", "text_cfg")})
    assert image_parameters(config) == num_parameters(net)[0]


@pytest.mark.parametrize("name", [*shipped_models(), "MobileCLIP2-S0", "PE-Core-T-16-384", "PE-Core-S-16-384"])
def test_parameters_of_included_students_are_known(name: str) -> None:
    spec = ModelSpec(model=str(SHIPPED / name) if name in shipped_models() else name, init="random")
    config = (
        json.loads((SHIPPED / name / CONFIG).read_text())["model_cfg"]
        if name in shipped_models()
        else open_clip.get_model_config(name)
    )
    counted = num_parameters(build_model(spec, seed=0).net)[0]
    if not name.startswith("glyphs"):
        assert image_parameters(config) == pytest.approx(counted, rel=MAX_RELATIVE_ERROR)


def test_the_advice_follows_the_papers_tables() -> None:
    advised = {name for name in shipped_recipes() if advise_on_teacher(load_recipe(recipe_path(name)))}
    assert advised == {"paper/vit_t_16_from_laion_vit_l_14"}
    (advice,) = advise_on_teacher(load_recipe(recipe_path("paper/vit_t_16_from_laion_vit_l_14")))
    assert advice.startswith(
        "the teacher's image tower has 54 times the student's parameters (304 M, 5.6 M). In CLIP-KD"
    )


def test_an_unknown_size_gets_no_advice() -> None:
    large = open_clip.get_model_config("ViT-H-14")
    small = {"embed_dim": 512, "vision_cfg": {"timm_model_name": "tiny_vit_5m_224"}}
    assert advise_on_models(large, small)
    assert advise_on_models(large, {"embed_dim": 512, "vision_cfg": {"timm_model_name": "unheard_of"}}) == []
    assert advise_on_models({}, small) == []
    assert advise_on_models(small, large) == []
    assert FAR_LARGER > 42, "MobileNetV3 learnt more from ViT-B/16, 42 times its size, than from RN101"


def test_show_prints_it_once(clipkd: Callable[..., Ended]) -> None:
    name = "paper/vit_t_16_from_laion_vit_l_14"
    assert clipkd("show", name).out.count("# the teacher's image tower has 54 times") == 1
    assert len(json.loads(clipkd("show", name, "--json").out)["advice"]) == 1
    assert json.loads(clipkd("show", "glyphs", "--json").out)["advice"] == []
