"""Recipes: what ships loads, what is wrong is said with its place, and what is resolved means the same anywhere."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, STUDENT

from toolchain.errors import UsageError
from toolchain.recipe import Recipe, load_recipe, recipe_path, shipped_recipes
from toolchain.sources import SHIPPED, model_folder

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "name": "mine",
    "data": {"kind": "glyphs"},
    "student": {"model": "glyphs_student"},
    "distill": {"steps": 10, "batch_size": 8, "lr": 1e-3, "warmup": 2},
    "export": {"precisions": ["fp32"]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def load(path: Path, overrides: list[str] | None = None, **changes: Any) -> Recipe:
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return load_recipe(path, overrides)


def problem(path: Path, overrides: list[str] | None = None, **changes: Any) -> str:
    """What is said of a wrong recipe, without the place of the file."""
    with pytest.raises(UsageError) as caught:
        load(path, overrides, **changes)
    return str(caught.value).replace(f"{path}", "mine.yaml")


# What ships.


def test_recipes_were_found() -> None:
    assert {"glyphs", "glyphs_teacher"} <= {path.stem for path in RECIPES}
    assert shipped_recipes() == [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_loads_and_its_header_shows_the_command_that_runs_it(path: Path) -> None:
    recipe = load_recipe(recipe_path(path.stem))
    assert recipe.name == path.stem
    header = path.read_text().partition("\nname:")[0]
    verb = "run" if recipe.teacher else "distill"
    commands = re.findall(r"^#   clipkd (.*)$", header, re.MULTILINE)
    assert commands, "a recipe says how it is run"
    assert re.fullmatch(rf"{verb} {path.stem} --out runs/\w+", commands[0])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_models_of_a_recipe_that_ships_ship(path: Path) -> None:
    recipe = load_recipe(path)
    for spec in filter(None, (recipe.student, recipe.teacher)):
        assert model_folder(spec).parent == SHIPPED
        assert (model_folder(spec) / "open_clip_config.json").is_file()
        assert (model_folder(spec) / "tokenizer.json").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["seed=7", "distill.lr=3e-4"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


# By name, by path.


def test_a_recipe_is_found_by_name_and_by_path(path: Path) -> None:
    assert recipe_path("glyphs") == SHIPPED / "glyphs.yaml"
    path.write_text("")
    assert recipe_path(str(path)) == path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("glyhps", "did you mean glyphs?"),
        ("imagenet.yaml", "clipkd recipes lists those that ship"),
        ("", "clipkd recipes"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_path(name)
    assert str(caught.value).startswith(f"{name}: no recipe of this name ships and no such file exists; {hint}")


# What is wrong.


def test_an_unknown_key_suggests_the_nearest_valid_one(path: Path) -> None:
    assert problem(path, distill=MINIMAL["distill"] | {"weight_decy": 0.1}) == (
        "mine.yaml: 1 problem(s)\n  distill.weight_decy: unknown key; did you mean weight_decay?"
    )
    assert problem(path, distil=3) == "mine.yaml: 1 problem(s)\n  distil: unknown key; did you mean distill?"


def test_an_unknown_key_like_no_other_lists_those_known(path: Path) -> None:
    assert problem(path, profile={"zzz": 1}) == (
        "mine.yaml: 1 problem(s)\n  profile.zzz: unknown key; known here: processes, seconds"
    )


def test_an_unknown_key_in_an_optional_section(path: Path) -> None:
    said = problem(path, quantize={"steps": 1, "gradient": 2})
    assert said.endswith("quantize.gradient: unknown key; known here: steps, lr, batch_size, calibration_samples")
    said = problem(path, teacher={"modell": "x", "model": "y"})
    assert said.endswith("teacher.modell: unknown key; did you mean model?")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "soon"}, "seed: Input should be a valid integer, unable to parse string as an integer (got 'soon')"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": 1.5}, "seed: Input should be a valid integer, got a number with a fractional part (got 1.5)"),
        ({"data": {"kind": "laion"}}, "data.kind: Input should be 'glyphs' or 'webdataset' (got 'laion')"),
        ({"data": {"kind": "glyphs", "views": 0}}, "data.views: Input should be greater than 0 (got 0)"),
        (
            {"distill": MINIMAL["distill"] | {"lr": float("inf")}},
            "distill.lr: Input should be a finite number (got inf)",
        ),
        (
            {"distill": MINIMAL["distill"] | {"lr": float("nan")}},
            "distill.lr: Input should be a finite number (got nan)",
        ),
        (
            {"distill": MINIMAL["distill"] | {"loss_weights": {"fd": "much"}}},
            "distill.loss_weights.fd: Input should be a valid number, unable to parse string as a number (got 'much')",
        ),
        (
            {"distill": MINIMAL["distill"] | {"loss_weights": {"fd": -1}}},
            "distill.loss_weights.fd: Input should be greater than or equal to 0 (got -1)",
        ),
        (
            {"distill": MINIMAL["distill"] | {"batch_size": 1}},
            "distill.batch_size: Input should be greater than or equal to 2 (got 1)",
        ),
        ({"export": {"precisions": ["fp8"]}}, "export.precisions.0: Input should be 'fp32' or 'int8' (got 'fp8')"),
        ({"student": {}}, "student.model: Field required"),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_place(path: Path, changes: dict[str, Any], said: str) -> None:
    assert problem(path, **changes) == f"mine.yaml: 1 problem(s)\n  {said}"


@pytest.mark.parametrize("changes", [{"export": {"precisions": []}}, {"export": {"runtimes": []}}])
def test_nothing_to_export_is_a_mistake(path: Path, changes: dict[str, Any]) -> None:
    assert problem(path, **changes).endswith("  export: runtimes and precisions need at least one entry each")


@pytest.mark.parametrize("value", [5, "text", [1], None])
def test_a_section_that_is_none(path: Path, value: object) -> None:
    assert "\n  distill: Input should be a valid dictionary" in problem(path, distill=value)


def test_all_problems_are_said_at_once(path: Path) -> None:
    said = problem(path, sed=1, data={"kind": "laion"}, distill={"steps": "x", "lr": 1, "warmup": 0})
    places = [line.split(":")[0].strip() for line in said.splitlines()]
    assert said.startswith("mine.yaml: 4 problem(s)\n")
    assert places[1:] == ["data.kind", "distill.steps", "distill.batch_size", "sed"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": MINIMAL["distill"] | {"warmup": 10}}, "distill: warmup (10) must be less than steps (10)"),
        (
            {"evaluate": {"headline": "novel", "sets": ["stix", "serif"]}},
            "evaluate: headline 'novel' is not among sets ['stix', 'serif']",
        ),
        (
            {"export": {"precisions": ["fp32", "int8"]}},
            "recipe: export.precisions has int8 but there is no quantize section; add one or drop int8",
        ),
    ],
    ids=["warmup", "headline", "int8"],
)
def test_fields_must_agree(path: Path, changes: dict[str, Any], said: str) -> None:
    assert problem(path, **changes) == f"mine.yaml: 1 problem(s)\n  {said}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: [", "not YAML: "),
        (b"\xff\xfe\x00", "not YAML: "),
        (b"", "a recipe is a mapping of sections; got NoneType"),
        (b"- a\n- b\n", "a recipe is a mapping of sections; got list"),
        (b"1: 2\n", "1 problem(s)\n"),
    ],
)
def test_a_file_that_is_no_recipe(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message or "problem(s)" in message
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(path.with_name("absent.yaml"))


# --set.


def test_overrides_apply_before_the_check(path: Path) -> None:
    recipe = load(
        path, ["distill.steps=5", "distill.lr=5e-4", "name=other", "distill.loss_weights.fd=0", "quantize.steps=3"]
    )
    assert (recipe.distill.steps, recipe.distill.lr, recipe.name) == (5, 5e-4, "other")
    assert recipe.distill.loss_weights.fd == 0
    assert recipe.distill.loss_weights.crd == 1, "the rest of a section keeps its values"
    assert recipe.quantize is not None
    assert recipe.quantize.steps == 3
    broken = MINIMAL["distill"] | {"warmup": 99}
    assert load(path, ["distill.warmup=1"], distill=broken).distill.warmup == 1, "an override may mend the recipe"
    assert problem(path, ["distill.stepps=5"]).endswith("distill.stepps: unknown key; did you mean steps?")
    assert "warmup (2) must be less than steps (2)" in problem(path, ["distill.steps=2"])


def test_the_last_override_of_a_field_counts(path: Path) -> None:
    assert load(path, ["seed=1", "seed=2"]).seed == 2


def test_overrides_take_yaml_values(path: Path) -> None:
    recipe = load(path, ["export.precisions=[fp32, int8]", "quantize={steps: 4}", "teacher=null"])
    assert recipe.export.precisions == ("fp32", "int8")
    assert recipe.quantize is not None
    assert recipe.quantize.steps == 4
    assert load(path, ["quantize.steps=4"], quantize=None).quantize is not None, "an empty section can be filled"


@pytest.mark.parametrize("override", ["distill.steps", "=5", "distill.=5", ".steps=5", "distill..steps=5", ""])
def test_an_override_that_assigns_nothing(path: Path, override: str) -> None:
    assert problem(path, [override]) == f"--set {override}: expected section.field=value, as in --set distill.steps=100"


def test_an_override_below_a_value(path: Path) -> None:
    assert problem(path, ["name.first=x"]) == "--set name.first=x: name is not a section"
    assert problem(path, ["distill.steps.x.y=1"]) == "--set distill.steps.x.y=1: steps is not a section"


def test_an_override_that_is_not_yaml(path: Path) -> None:
    assert problem(path, ["distill.lr=["]) == "--set distill.lr=[: '[' is not a YAML value; quote it for the shell"


def test_yaml_reads_5e_4_as_text_and_the_recipe_as_a_number(path: Path) -> None:
    assert yaml.safe_load("5e-4") == "5e-4"
    assert load(path, distill=MINIMAL["distill"] | {"lr": "5e-4"}).distill.lr == 0.0005


def test_a_recipe_cannot_be_changed(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(path).seed = 3  # type: ignore[misc]


# Models.


def test_a_path_to_a_model_is_relative_to_the_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(STUDENT, path.parent / "models" / "mine")
    (path.parent / "elsewhere").mkdir()
    monkeypatch.chdir(path.parent / "elsewhere")
    recipe = load(path, student={"model": "models/mine"})
    assert model_folder(recipe.student) == path.parent / "models" / "mine"
    assert Path(recipe.student.model).is_absolute(), "the resolved recipe lies in another folder"


def test_a_path_is_never_looked_up_among_the_recipes_that_ship(path: Path) -> None:
    assert (SHIPPED / "../tests").is_dir()
    assert "student.model '../tests': no such model, and no folder at " in problem(path, student={"model": "../tests"})
