"""What a recipe may name as a model: found from any folder, or refused with what it could have been."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
from conftest import REPOSITORY, STUDENT

from toolchain.errors import UsageError
from toolchain.recipe import model_names as sources
from toolchain.recipe.model import ModelSpec, TeacherSpec
from toolchain.recipe.model_names import (
    CONFIG,
    SHIPPED,
    architectures,
    fingerprint,
    model_folder,
    resolve_model,
    shipped_models,
)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for recipes, with a model, a run of clipkd's and a checkpoint in it; the current folder."""
    folder = tmp_path / "recipes"
    shutil.copytree(STUDENT, folder / "models" / "mine")
    shutil.copytree(STUDENT, folder / "run" / "student")
    (folder / "run" / "recipe.yaml").write_text("name: run\n")
    (folder / "weights.pt").write_bytes(b"weights")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def no_open_clip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device: open_clip is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    architectures.cache_clear()
    yield
    architectures.cache_clear()


def problem(model: str, folder: Path, **fields: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve_model(ModelSpec.model_validate({"model": model, **fields}), folder, "student")
    return str(caught.value)


# What is found.


@pytest.mark.parametrize(
    ("model", "resolved"),
    [
        ("glyphs_teacher", "glyphs_teacher"),
        ("vit_t_16", "vit_t_16"),
        ("ViT-B-16", "ViT-B-16"),
        ("ViT-B/16", "ViT-B-16"),
        ("ViT-B-32-quickgelu", "ViT-B-32-quickgelu"),
        ("hf-hub:org/name-1.0_x", "hf-hub:org/name-1.0_x"),
        ("models/mine", "FOLDER/models/mine"),
        ("./models/../models/mine", "FOLDER/models/mine"),
        ("local-dir:models/mine", "FOLDER/models/mine"),
        ("run", "FOLDER/run/student"),
        ("local-dir:run", "FOLDER/run/student"),
        ("run/student", "FOLDER/run/student"),
    ],
)
def test_a_model_means_the_same_in_any_folder(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, model: str, resolved: str
) -> None:
    monkeypatch.chdir("/")
    spec = resolve_model(ModelSpec(model=model), recipes, "student")
    assert spec.model == resolved.replace("FOLDER", str(recipes.resolve()))
    assert resolve_model(spec, Path("/"), "student") == spec, "what is resolved stays as it is"
    assert (model_folder(spec) is None) == spec.model.startswith(("hf-hub:", "ViT-B"))


def test_a_model_in_a_folder_above_or_at_an_absolute_path(recipes: Path) -> None:
    mine = recipes.resolve() / "models" / "mine"
    for model in (str(mine), f"local-dir:{mine}", "../recipes/models/mine"):
        assert resolve_model(ModelSpec(model=model), recipes, "student").model == str(mine)


def test_a_name_goes_before_a_folder_of_the_same_name(recipes: Path) -> None:
    for name in ("ViT-B-16", "glyphs_tiny"):
        shutil.copytree(STUDENT, recipes / name)
        assert resolve_model(ModelSpec(model=name), recipes, "student").model == name
        assert resolve_model(ModelSpec(model=f"./{name}"), recipes, "student").model == str(recipes.resolve() / name)


def test_everything_else_of_a_model_is_kept(recipes: Path) -> None:
    spec = TeacherSpec(model="ViT-B-16", checkpoint="weights.pt", model_cfg={"quick_gelu": True})
    expected = {"checkpoint": str(recipes.resolve() / "weights.pt"), "model_cfg": {"quick_gelu": True}}
    resolved = resolve_model(spec, recipes, "teacher")
    assert isinstance(resolved, TeacherSpec)
    assert resolved == TeacherSpec(model="ViT-B-16", **expected)


def test_every_architecture_of_open_clip_is_known_and_nothing_else() -> None:
    assert list(architectures()) == sorted(open_clip.list_models())
    assert {"glyphs_tiny", "glyphs_teacher", "vit_t_16", "resnet18"} <= set(shipped_models())
    assert not set(architectures()) & set(shipped_models()), "then one would hide the other"


@pytest.mark.usefixtures("no_open_clip")
def test_without_open_clip_a_name_is_taken_on_trust(recipes: Path) -> None:
    assert architectures() == ()
    assert resolve_model(ModelSpec(model="ViT-B-16"), recipes, "student").model == "ViT-B-16"
    assert resolve_model(ModelSpec(model="glyphs_tiny"), recipes, "student").model == "glyphs_tiny"
    assert "no such model" in problem("models/absent", recipes)
    assert "no such model" in problem("local-dir:absent", recipes)


def test_an_import_hook_that_hides_open_clip_is_like_not_having_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    architectures.cache_clear()
    try:
        assert architectures() == ()
    finally:
        architectures.cache_clear()


# What is refused.


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("glyphs_studnet", "glyphs_student"),
        ("vit-b-16", "ViT-B-16"),
        ("ViT-B16", "ViT-B-16"),
        ("ViT-B/61", "ViT-B-16"),
        ("resnet-18", "resnet18"),
        ("mobilevit", "mobilevit_s"),
    ],
)
def test_an_unknown_model_names_the_nearest(recipes: Path, model: str, near: str) -> None:
    said = problem(model, recipes)
    assert said.startswith(
        f"student.model '{model}': no such model, and no folder at {recipes.resolve() / model}. Did you mean {near}? "
    )
    assert said.endswith("an open_clip architecture (ViT-B-16), hf-hub:ORG/NAME, or a folder")


def test_an_unknown_model_like_no_other(recipes: Path) -> None:
    said = problem("zzzz", recipes)
    assert (
        f"no folder at {recipes.resolve() / 'zzzz'}. Expected an included model (efficientnet_b0, efficientvi" in said
    )


@pytest.mark.parametrize("model", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:a b/c", "hf-hub:a/b@main"])
def test_a_name_that_the_hub_cannot_have(recipes: Path, model: str) -> None:
    assert problem(model, recipes) == f"student.model '{model}': expected hf-hub:ORG/NAME"


def test_a_file_needs_its_architecture(recipes: Path) -> None:
    assert problem("weights.pt", recipes) == (
        f"student.model 'weights.pt': {recipes.resolve() / 'weights.pt'} is a file of weights; "
        "expected a model or a folder. "
        "Write student: {model: ViT-B-16, checkpoint: weights.pt} with its architecture instead of ViT-B-16"
    )


def test_a_folder_that_holds_no_model(recipes: Path) -> None:
    assert problem("models", recipes) == (
        f"student.model: {recipes.resolve() / 'models'} has neither open_clip_config.json (an open_clip local-dir) nor "
        "recipe.yaml (a run directory)"
    )
    assert "has neither" in problem("", recipes), "the recipe's own folder"


def test_a_run_that_has_no_student_yet(recipes: Path) -> None:
    shutil.rmtree(recipes / "run" / "student")
    run = recipes.resolve() / "run"
    assert problem("run", recipes) == (
        f"student.model: the run {run} has no student yet. "
        f"Make it with: clipkd distill {run / 'recipe.yaml'} --out {run}"
    )


def test_an_int8_model_cannot_teach(recipes: Path) -> None:
    folder = recipes / "run" / "student"
    for kind, fine in (("distil", True), ("quantize", False)):
        (folder / "manifest.json").write_text(json.dumps({"kind": kind}))
        if fine:
            resolve_model(ModelSpec(model="run"), recipes, "student")
        else:
            assert "is an int8 model, which cannot be a teacher or be trained further" in problem(
                "run/student", recipes
            )
    for foreign in ("{", "[]", '"text"', "{}"):
        (folder / "manifest.json").write_text(foreign)
        resolve_model(ModelSpec(model="run/student"), recipes, "student")


@pytest.mark.parametrize("model", ["glyphs_teacher", "models/mine", "hf-hub:org/name"])
def test_a_tag_belongs_to_an_architecture_of_open_clips(recipes: Path, model: str) -> None:
    said = problem(model, recipes, pretrained="openai")
    assert said.startswith(
        f"student.pretrained is a tag for open_clip's architectures, and {model} is not one of them. "
    )


def test_a_checkpoint_that_is_not_there(recipes: Path) -> None:
    assert problem("ViT-B-16", recipes, checkpoint="absent.pt") == (
        f"student.checkpoint 'absent.pt': no file at {recipes.resolve() / 'absent.pt'}"
    )
    assert "no file at" in problem("ViT-B-16", recipes, checkpoint="models")


# What a stage depends on.


def test_a_fingerprint_is_of_content_and_not_of_place(recipes: Path) -> None:
    moved = shutil.copytree(recipes / "models" / "mine", recipes / "moved")
    here, there, shipped = (
        fingerprint(resolve_model(ModelSpec(model=model), recipes, "student"))
        for model in ("models/mine", "moved", "glyphs_tiny")
    )
    assert here == there == shipped
    (moved / CONFIG).write_text((moved / CONFIG).read_text() + "\n")
    assert fingerprint(resolve_model(ModelSpec(model="moved"), recipes, "student")) != here


def test_a_checkpoints_content_is_in_the_fingerprint_and_its_name_is_not(recipes: Path) -> None:
    def of(name: str) -> str:
        return fingerprint(resolve_model(ModelSpec(model="ViT-B-16", checkpoint=name), recipes, "student"))

    (recipes / "same.pt").write_bytes(b"weights")
    (recipes / "other.pt").write_bytes(b"other weights")
    assert of("weights.pt") == of("same.pt") != of("other.pt")


def test_every_field_of_a_model_is_in_its_fingerprint() -> None:
    specs = [
        ModelSpec(model="ViT-B-16"),
        ModelSpec(model="ViT-B-32"),
        ModelSpec(model="hf-hub:org/name"),
        ModelSpec(model="ViT-B-16", pretrained="openai"),
        ModelSpec(model="ViT-B-16", pretrained="laion400m_e32"),
        ModelSpec(model="ViT-B-16", init="random"),
        ModelSpec(model="ViT-B-16", model_cfg={"vision_cfg": {"width": 64}}),
        ModelSpec(model="ViT-B-16", model_cfg={"vision_cfg": {"width": 32}}),
        ModelSpec(model="ViT-B-16", preprocess_cfg={"mean": [0, 0, 0]}),
    ]
    assert len({fingerprint(spec) for spec in specs}) == len(specs)
    fields = {name for spec in specs for name in spec.model_fields_set} | {"checkpoint"}
    assert fields == set(ModelSpec.model_fields), "a field that can change a model is missing above"
    for spec in specs:
        assert fingerprint(spec) == fingerprint(TeacherSpec.model_validate(spec.model_dump()))


# Where a model starts.


@pytest.mark.parametrize(
    ("fields", "student", "teacher"),
    [
        ({}, True, False),
        ({"init": "weights"}, False, False),
        ({"init": "random"}, True, True),
        ({"pretrained": "openai"}, False, False),
        ({"checkpoint": "weights.pt"}, False, False),
    ],
    ids=str,
)
def test_a_student_starts_at_random_unless_it_names_weights(
    fields: dict[str, str], student: bool, teacher: bool
) -> None:
    assert ModelSpec.model_validate({"model": "ViT-B-16", **fields}).is_random is student
    assert TeacherSpec.model_validate({"model": "ViT-B-16", **fields}).is_random is teacher


def test_a_recipe_is_read_and_its_models_found_without_a_heavy_package(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from toolchain.recipe.load import load_recipe
from toolchain.recipe.model_names import architectures, fingerprint
recipe = load_recipe(Path("recipes/glyphs.yaml"), ["student.model=ViT-B-16"])
fingerprint(recipe.student), fingerprint(recipe.teacher)
assert "ViT-B-16" in architectures()
print(sorted({"torch", "numpy", "open_clip", "timm", "safetensors", "huggingface_hub"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_recipes_lie_where_the_package_does() -> None:
    assert Path(sources.__file__).parents[2] / "recipes" == SHIPPED
