"""Recipes: what ships loads, what is wrong is said with its place, and what is resolved means the same anywhere."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, STUDENT, Ended

from toolchain.errors import UsageError
from toolchain.recipe.data import WebdatasetSpec
from toolchain.recipe.distill import DistillSpec, LossWeights, TeacherCacheSpec
from toolchain.recipe.load import (
    check_recipe,
    load_recipe,
    make_adoption_recipe,
    recipe_path,
    shipped_recipes,
    teacher_recipe,
)
from toolchain.recipe.model import StudentSpec, TeacherSpec
from toolchain.recipe.model_names import SHIPPED, architectures, model_folder
from toolchain.recipe.recipe import Recipe

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
PAPER = [path for path in RECIPES if path.parent.name == "paper"]
NAMES = [path.relative_to(REPOSITORY / "recipes").with_suffix("").as_posix() for path in RECIPES]
MINIMAL: dict[str, Any] = {
    "name": "mine",
    "data": {"kind": "glyphs"},
    "student": {"model": "glyphs_tiny"},
    "distill": {"steps": 10, "batch_size": 8, "lr": 1e-3, "warmup": 2},
    "export": {"precisions": ["fp32"]},
}
OWN_SET: dict[str, Any] = {"kind": "folder", "name": "own", "path": "data/own"}


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
    assert {"glyphs", "glyphs_teacher", "paper/vit_b_16", "paper/vit_t_16_fd"} <= set(NAMES)
    assert shipped_recipes() == sorted(NAMES)
    assert len(PAPER) == 31
    assert len(RECIPES) == 44, "one more: count it here"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_ships_loads_and_its_header_shows_the_command_that_runs_it(name: str) -> None:
    path = recipe_path(name)
    recipe = load_recipe(path)
    assert path == SHIPPED / f"{name}.yaml"
    assert recipe.name == path.stem
    header = path.read_text().partition("\nname:")[0]
    verb = "run" if recipe.teacher and recipe.evaluate else "distill"
    commands = re.findall(r"^#   clipkd (.*)$", header, re.MULTILINE)
    assert commands, "a recipe says how it is run"
    assert re.fullmatch(rf"{verb} {name} --out runs/\w+", commands[0])


@pytest.mark.parametrize("name", NAMES)
def test_models_of_a_recipe_that_ships_ship_or_are_open_clips(name: str) -> None:
    recipe = load_recipe(recipe_path(name))
    specs = [recipe.student]
    if recipe.teacher is not None and recipe.teacher.recipe is not None:
        specs.append(teacher_recipe(recipe.teacher).student)
    elif recipe.teacher is not None:
        specs.append(recipe.teacher)
    for spec in specs:
        folder = model_folder(spec)
        if folder is None:
            assert spec.model in architectures()
            continue
        assert folder.parent == SHIPPED
        config = json.loads((folder / "open_clip_config.json").read_text())
        assert (folder / "tokenizer.json").is_file() is ("hf_tokenizer_name" in config["model_cfg"]["text_cfg"])


# Every row of CLIP-KD's tables: student, teacher, its loss or all of them, and the published number beside those it is
# to be compared with: the baseline's and the teacher's.
ROWS = {
    "vit_b_16": ("ViT-B-16", None, None, "36.99"),
    "rn101": ("RN101", None, None, "36.76"),
    "rn50": ("RN50", None, None, "35.3"),
    "vit_t_16": ("vit_t_16", None, None, "30.55"),
    "mobilevit_s": ("mobilevit_s", None, None, "32.60"),
    "swin_t": ("swin_t", None, None, "36.38"),
    "mobilenetv3_small": ("mobilenetv3_small", None, None, "25.11"),
    "efficientnet_b0": ("efficientnet_b0", None, None, "32.55"),
    "resnet18": ("resnet18", None, None, "28.55"),
    "vit_t_16_crd": ("vit_t_16", "ViT-B-16", "crd", "31.94 30.55 36.99"),
    "vit_t_16_fd": ("vit_t_16", "ViT-B-16", "fd", "34.23 30.55 36.99"),
    "vit_t_16_mfd": ("vit_t_16", "ViT-B-16", "mfd", "34.09 30.55 36.99"),
    "vit_t_16_gd": ("vit_t_16", "ViT-B-16", "gd", "31.54 30.55 36.99"),
    "vit_t_16_icl": ("vit_t_16", "ViT-B-16", "icl", "33.11 30.55 36.99"),
    "vit_t_16_afd": ("vit_t_16", "ViT-B-16", "afd", "31.42 30.55 36.99"),
    "vit_t_16_from_vit_b_16": ("vit_t_16", "ViT-B-16", "all", "34.90 30.55 36.99"),
    "mobilevit_s_from_vit_b_16": ("mobilevit_s", "ViT-B-16", "all", "35.96 32.60 36.99"),
    "swin_t_from_vit_b_16": ("swin_t", "ViT-B-16", "all", "40.18 36.38 36.99"),
    "mobilenetv3_small_from_vit_b_16": ("mobilenetv3_small", "ViT-B-16", "all", "26.95 25.11 36.99"),
    "efficientnet_b0_from_vit_b_16": ("efficientnet_b0", "ViT-B-16", "all", "35.44 32.55 36.99"),
    "resnet18_from_vit_b_16": ("resnet18", "ViT-B-16", "all", "31.36 28.55 36.99"),
    "mobilevit_s_from_rn101": ("mobilevit_s", "RN101", "all", "34.97 32.60 36.76"),
    "swin_t_from_rn101": ("swin_t", "RN101", "all", "39.51 36.38 36.76"),
    "mobilenetv3_small_from_rn101": ("mobilenetv3_small", "RN101", "all", "26.15 25.11 36.76"),
    "efficientnet_b0_from_rn101": ("efficientnet_b0", "RN101", "all", "34.64 32.55 36.76"),
    "resnet18_from_rn101": ("resnet18", "RN101", "all", "30.88 28.55 36.76"),
    "vit_b_16_from_laion_vit_l_14": ("ViT-B-16", "ViT-L-14 laion400m_e32", "all", "57.5 37.0 72.8"),
    "vit_t_16_from_laion_vit_l_14": ("vit_t_16", "ViT-L-14 laion400m_e32", "all", "40.9 30.6 72.8"),
    "vit_t_16_from_laion_vit_b_16": ("vit_t_16", "ViT-B-16 laion400m_e32", "all", "42.6 30.6 67.1"),
    "rn50_from_laion_vit_b_16": ("RN50", "ViT-B-16 laion400m_e32", "all", "55.4 35.3 67.1"),
    "vit_t_16_from_laion_vit_b_16_no_task": ("vit_t_16", "ViT-B-16 laion400m_e32", "no task", "40.1 42.6 67.1"),
}
WIDTHS = {"ViT-L-14": 768, "ViT-B-16": 512, "RN101": 512}
MAX_ROUNDING = 2e-3  # of a weight as a recipe writes it


def test_every_row_of_the_tables_has_its_recipe() -> None:
    assert {path.stem for path in PAPER} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_paper_recipe_is_its_row_of_the_tables(name: str) -> None:
    student, teacher, losses, published = ROWS[name]
    path = SHIPPED / "paper" / f"{name}.yaml"
    recipe, header = load_recipe(path), path.read_text().partition("\nname:")[0]
    assert recipe.student == StudentSpec(model=student)
    numbers = re.search(r"^# Published: (.*\n# )?.*\(arXiv:2307\.12732", header, re.MULTILINE)
    assert numbers is not None
    assert re.findall(r"([\d.]+) %", numbers[0]) == published.split()
    assert "Budget: 32 epochs of 12.86 M pairs at batch 1,024 (401,900 steps), on 8 GPUs" in header
    assert "Not yet run with clipkd." in header
    spec = recipe.distill
    assert (spec.epochs, spec.steps, spec.batch_size, spec.warmup) == (32, None, 1024, 10_000)
    assert (spec.lr, spec.weight_decay, spec.precision, spec.grad_clip_norm) == (1e-3, 0.1, "fp16", None)
    assert spec.reference_compat == (losses == "gd"), "whose published weight belongs to the released code"
    assert not recipe.baseline
    assert recipe.data == WebdatasetSpec(
        kind="webdataset",
        shards=("data/cc3m/{00000..00331}.tar", "data/cc12m/{00000..01242}.tar"),
        crop_scale=(0.9, 1.0),
    )
    if teacher is None:
        assert recipe.teacher is None
        return
    assert recipe.teacher is not None
    model, _, tag = teacher.partition(" ")
    if tag:
        assert recipe.teacher == TeacherSpec(model=model, pretrained=tag)
    else:
        trained = teacher_recipe(recipe.teacher)
        assert (trained.teacher, trained.student) == (None, StudentSpec(model=model))
    # The released code's weights, of means over the width and, for GD, of gradients that shrink with the batch.
    width, batch = WIDTHS[model], 1024
    released = {"task": 1, "crd": 1, "fd": 2000 / width, "icl": 1, "afd": 1}
    released |= {"mfd": 2000 / width, "gd": 1e8 / (batch**2 * width)}
    kept = {"all": ("task", "crd", "fd", "icl"), "no task": ("crd", "fd", "icl")}.get(losses or "", ("task", losses))
    for loss, weight in spec.loss_weights.model_dump().items():
        assert weight == pytest.approx(released[loss] if loss in kept else 0, rel=MAX_ROUNDING, abs=0)
    assert spec.mask_ratio == 0.75
    assert spec.teacher_precision == "fp16"


def test_the_papers_budget() -> None:
    assert round(32 * (12_860_000 / 1024), -2) == 401_900


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["seed=7", "distill.lr=3e-4"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


# By name, by path.


def test_a_recipe_is_found_by_name_and_by_path(path: Path) -> None:
    assert recipe_path("glyphs") == SHIPPED / "glyphs.yaml"
    assert recipe_path("paper/vit_t_16_fd") == SHIPPED / "paper" / "vit_t_16_fd.yaml"
    path.write_text("")
    assert recipe_path(str(path)) == path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("glyhps", "did you mean glyphs?"),
        ("paper/vit_t_16_fdd", "did you mean paper/vit_t_16_fd?"),
        ("vit_t_16_fd", "did you mean paper/vit_t_16_fd?"),
        ("vit_t16_fd", "did you mean paper/vit_t_16_fd?"),
        ("paper", "clipkd recipes lists the included recipes"),
        ("../recipes/glyphs", "did you mean glyphs?"),
        ("imagenet.yaml", "clipkd recipes lists the included recipes"),
        ("", "clipkd recipes"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_path(name)
    assert str(caught.value).startswith(f"{name}: no included recipe has this name, and no such file exists; {hint}")


# What is wrong.


def test_an_unknown_key_suggests_the_nearest_valid_one(path: Path) -> None:
    assert problem(path, distill=MINIMAL["distill"] | {"weight_decy": 0.1}) == (
        "mine.yaml: 1 problem(s)\n  distill.weight_decy: unknown key; did you mean weight_decay?"
    )
    assert problem(path, distil=3) == "mine.yaml: 1 problem(s)\n  distil: unknown key; did you mean distill?"


def test_an_unknown_key_like_no_other_lists_those_known(path: Path) -> None:
    assert problem(path, profile={"zzz": 1}) == (
        "mine.yaml: 1 problem(s)\n  profile.zzz: unknown key; known keys: processes, seconds, pytorch"
    )


def test_an_unknown_key_in_an_optional_section(path: Path) -> None:
    said = problem(path, quantize={"steps": 1, "gradient": 2})
    assert said.endswith(
        "quantize.gradient: unknown key; known keys: method, towers, attention, steps, lr, batch_size, "
        "calibration_samples, anchor, max_drop"
    )
    said = problem(path, teacher={"modell": "x", "model": "y"})
    assert said.endswith("teacher.modell: unknown key; did you mean model?")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "soon"}, "seed: Input should be a valid integer, unable to parse string as an integer (got 'soon')"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": 1.5}, "seed: Input should be a valid integer, got a number with a fractional part (got 1.5)"),
        (
            {"data": {"kind": "laion"}},
            "data.kind: Input should be 'glyphs' or 'webdataset' or 'csv' or 'image_folder' or 'images' or 'mixture' "
            "(got 'laion')",
        ),
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
        (
            {"export": {"precisions": ["fp8"]}},
            "export.precisions.0: Input should be 'fp32', 'fp16', 'bf16', 'int8', 'int8-fp16' or 'int8-bf16' "
            "(got 'fp8')",
        ),
        ({"student": {}}, "student.model: Field required"),
        (
            {"name": False},
            "name: Input should be a valid string (got False); "
            "YAML reads no, off and false as a boolean, so write a text in quotes",
        ),
        (
            {"distill": MINIMAL["distill"] | {"steps": True}},
            "distill: steps should be a number (got True); YAML reads yes, on and true as a boolean",
        ),
        (
            {"export": {"batch": True}},
            "export: batch should be a number (got True); YAML reads yes, on and true as a boolean",
        ),
        (
            {"distill": MINIMAL["distill"] | {"loss_weights": {"fd": False}}},
            "distill.loss_weights: fd should be a number (got False); YAML reads no, off and false as a boolean",
        ),
        ({"data": {"kind": "webdataset", "shards": 5}}, "data.shards: Input should be a valid list (got 5)"),
        (
            {"evaluate": {"sets": ["sticks"]}},
            "evaluate.sets.0: Input should be 'stix', 'serif' or 'novel' (got 'sticks')",
        ),
        (
            {"data": {"kind": "images", "path": "x", "images": 5, "classes": "y"}},
            "data.images: unknown key; did you mean views?",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_place(path: Path, changes: dict[str, Any], said: str) -> None:
    assert problem(path, **changes) == f"mine.yaml: 1 problem(s)\n  {said}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"classes": {False: "negative"}},
            "classes.False: Keys should be strings; "
            "YAML reads no, off and false as a boolean, so write a text in quotes",
        ),
        (
            {"classes": {"a": True}},
            "classes.a: Input should be a valid string (got True); "
            "YAML reads yes, on and true as a boolean, so write a text in quotes",
        ),
        (
            {"classes": {"7": 7}},
            "classes.7: Input should be a valid string (got 7); YAML reads it as a number, so write a text in quotes",
        ),
        ({"classes": ["a"]}, "classes: Input should be a valid string or a valid dictionary (got ['a'])"),
        ({"templates": {}}, "templates: Input should be a valid list or a valid string"),
    ],
    ids=str,
)
def test_a_value_of_several_types_has_one_problem_without_pydantics_names(
    path: Path, changes: dict[str, Any], said: str
) -> None:
    message = problem(path, evaluate={"sets": [OWN_SET | changes]})
    assert message == f"mine.yaml: 1 problem(s)\n  evaluate.sets.0.{said}"


def test_the_message_on_a_long_value_is_short(path: Path) -> None:
    assert len(problem(path, evaluate={"sets": [OWN_SET | {"classes": ["a class"] * 1000}]})) < 300


def test_a_list_of_one_needs_no_brackets(path: Path) -> None:
    pairs = {"kind": "pairs", "name": "own", "shards": "val.tar"}
    recipe = load(
        path, ["data.shards=x.tar", "export.precisions=fp16", "profile.pytorch=eager"],
        data={"kind": "webdataset"}, evaluate={"sets": pairs}, quantize={"method": "ptq", "towers": "image"},
    )  # fmt: skip
    assert isinstance(recipe.data, WebdatasetSpec)
    assert recipe.data.shards == ("x.tar",)
    assert (recipe.export.precisions, recipe.profile.pytorch) == (("fp16",), ("eager",))
    assert recipe.quantize is not None
    assert recipe.quantize.towers == ("image",)
    assert recipe.evaluate is not None
    assert recipe.evaluate.headline_set.shards == ("val.tar",)  # type: ignore[union-attr]
    assert check_recipe(recipe.model_dump(mode="json"), "again", Path()) == recipe


@pytest.mark.parametrize("changes", [{"export": {"precisions": []}}, {"export": {"runtimes": []}}])
def test_nothing_to_export_is_a_mistake(path: Path, changes: dict[str, Any]) -> None:
    assert problem(path, **changes).endswith("  export: runtimes and precisions need at least one entry each")


@pytest.mark.parametrize("value", [5, "text", [1]])
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
            "recipe: export.precisions has int8, but there is no `quantize` section; add one or drop int8",
        ),
        (
            {"quantize": {"lr": 1e-4}},
            "quantize: method: qat needs steps, its optimizer steps; set steps, or method: ptq to calibrate only",
        ),
        (
            {"quantize": {"method": "ptq", "towers": ["text", "text"]}},
            "quantize: towers ['text', 'text']: expected each tower at most once",
        ),
    ],
    ids=["warmup", "headline", "int8", "steps", "towers"],
)
def test_fields_must_agree(path: Path, changes: dict[str, Any], said: str) -> None:
    assert problem(path, **changes) == f"mine.yaml: 1 problem(s)\n  {said}"


def test_defaults_agree_with_the_sections_that_are_there(path: Path) -> None:
    """Nothing is asked for on behalf of a section that was never written."""
    for export in ({}, {"opset": 19}):
        trained = load(path, evaluate={"sets": [OWN_SET]}, export=export)
        assert trained.export.precisions == ("fp32",)
        assert check_recipe(trained.model_dump(mode="json"), "again", Path()) == trained
    ptq = {"method": "ptq"}
    assert load(path, quantize=ptq, export={}).export.precisions == ("fp32", "int8")
    assert load(path, quantize=ptq, export={"precisions": ["fp16"]}).export.precisions == ("fp16",)
    assert load(path, export={"auto": {}}).export.precisions == ("fp32", "int8"), "auto rejects what cannot be made"
    path.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "export"}))
    assert load_recipe(path).export.precisions == ("fp32",)
    assert load_recipe(path, ["quantize.method=ptq"]).export.precisions == ("fp32", "int8")


def test_the_headline_is_the_first_set_unless_written(path: Path) -> None:
    for sets, headline in (
        ([OWN_SET, "stix"], "own"),
        (["novel"], "novel"),
        ([{"kind": "imagenet", "path": "x"}], "imagenet"),
    ):
        spec = load(path, evaluate={"sets": sets}).evaluate
        assert spec is not None
        assert spec.headline == headline
    assert load(path, evaluate={"sets": [OWN_SET, "stix"], "headline": "stix"}).evaluate.headline == "stix"  # type: ignore[union-attr]
    assert problem(path, evaluate={"sets": []}).endswith("  evaluate: sets is empty; name at least one evaluation set")
    assert problem(path, evaluate={"sets": 5}).startswith("mine.yaml: 1 problem(s)\n")


def test_a_recipe_that_only_trains_passes_every_command_that_reads_it(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = tiny_recipe(export=None, evaluate={"sets": ["stix"]}), tmp_path / "run"
    assert clipkd("show", recipe).code == 0
    assert clipkd("distill", recipe, "--out", run).code == 0
    ended = clipkd("quantize", run)
    assert ended.code == 2
    assert "--set quantize.method=ptq --set 'export.precisions=[fp32, int8]'" in ended.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: [", "not YAML: "),
        ("name: x\n".encode("utf-16"), "this is UTF-16 text; expected UTF-8"),
        ("name: x\n".encode("utf-16-le"), "this is UTF-16 text; expected UTF-8"),
        ("a: 1\nname: Zoë\n".encode("latin-1"), "not UTF-8 text, first in line 2"),
        (b"data:\n\tkind: glyphs\n", "line 2, column 1: "),
        (b"seed: 1\nname: x\nseed: 2\n", "seed is written twice, in lines 1 and 3"),
        (b"", "expected a mapping of sections, got NoneType"),
        (b"- a\n- b\n", "expected a mapping of sections, got list"),
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
    assert problem(path, ["distill.lr=["]) == (
        "--set distill.lr=[: '[' is not a YAML value (not YAML: line 1, column 2: while parsing a flow node, "
        "expected the node content, but found '<stream end>'); quote it for the shell"
    )
    assert "steps is written twice, in line 1" in problem(path, ["distill={steps: 1, steps: 2}"])


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


def test_a_path_that_is_not_beside_the_recipe_is_one_from_here(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = path.parent / "here"
    shutil.copytree(STUDENT, here / "runs" / "mine" / "student")
    (here / "runs" / "mine" / "recipe.yaml").write_text("")
    (here / "weights.pt").write_bytes(b"")
    monkeypatch.chdir(here)
    recipe = load(path, ["student.model=runs/mine", "student.checkpoint=weights.pt"])
    assert recipe.student.model == str(here.resolve() / "runs" / "mine" / "student")
    assert recipe.student.checkpoint == str(here.resolve() / "weights.pt")
    said = problem(path, ["student.model=runs/absent"])
    assert (
        f"no folder at {path.parent.resolve() / 'runs' / 'absent'}, nor in {here.resolve()}. Expected an included model"
        in said
    )


def test_the_spec_of_a_model(path: Path) -> None:
    both = "keep one"
    assert problem(path, student={"model": "ViT-B-16", "pretrained": "openai", "checkpoint": "x.pt"}).endswith(
        f"student: pretrained and checkpoint both give weights; {both}"
    )
    for weights in ({"pretrained": "openai"}, {"checkpoint": "x.pt"}):
        assert problem(path, student={"model": "ViT-B-16", "init": "random", **weights}).endswith(
            f"student: init: random contradicts pretrained and checkpoint; {both}"
        )
    for teacher in ({}, {"model": "ViT-B-16", "recipe": "glyphs_teacher"}):
        assert problem(path, teacher=teacher).endswith("teacher: give either model or recipe")
    for extra in ({"init": "random"}, {"model_cfg": {"embed_dim": 3}}, {"pretrained": "openai"}):
        assert "a teacher given by recipe takes no " in problem(path, teacher={"recipe": "glyphs_teacher", **extra})
    recipe = load(path, teacher={"model": "glyphs_teacher", "model_cfg": {"text_cfg": {"layers": 1}}})
    assert recipe.teacher == TeacherSpec(model="glyphs_teacher", model_cfg={"text_cfg": {"layers": 1}})


# A teacher that a recipe trains.


def test_a_teacher_of_a_recipe_that_ships_keeps_its_name(path: Path) -> None:
    recipe = load(path, teacher={"recipe": "glyphs_teacher"})
    assert recipe.teacher == TeacherSpec(recipe="glyphs_teacher")
    assert teacher_recipe(recipe.teacher) == load_recipe(SHIPPED / "glyphs_teacher.yaml")


def test_a_teacher_of_a_recipe_beside_this_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = path.with_name("teacher.yaml")
    teacher.write_text(yaml.safe_dump(MINIMAL | {"name": "teacher"}))
    monkeypatch.chdir("/")
    recipe = load(path, teacher={"recipe": "teacher.yaml"})
    assert recipe.teacher == TeacherSpec(recipe=str(teacher.resolve()))
    assert teacher_recipe(recipe.teacher).name == "teacher"


def test_a_teacher_of_a_recipe_that_is_wrong_is_said(path: Path) -> None:
    assert problem(path, teacher={"recipe": "glyphs_taecher"}) == (
        "teacher.recipe glyphs_taecher: no included recipe has this name, and no such file exists; "
        "did you mean glyphs_teacher?"
    )
    taught = "teacher.recipe {}: this recipe has a teacher itself; expected plain contrastive training. "
    assert problem(path, teacher={"recipe": "glyphs"}).startswith(taught.format("glyphs"))
    assert problem(path, teacher={"recipe": "mine.yaml"}).startswith(taught.format("mine.yaml")), "itself"
    broken = path.with_name("broken.yaml")
    for content, said in (("name: x\n", "problem(s)"), ("name: [", "not YAML"), ("", "a mapping of sections")):
        broken.write_text(content)
        message = problem(path, teacher={"recipe": "broken.yaml"})
        assert message.startswith(f"{broken.resolve()}: ")
        assert said in message


# --- adopting --------------------------------------------------------------------------------------------------------


def test_adopting_takes_what_is_not_training() -> None:
    glyphs = load_recipe(recipe_path("glyphs"))
    recipe = make_adoption_recipe(str(SHIPPED / "glyphs_teacher"), {}, glyphs, ["export.precisions=[fp32]"])
    assert (recipe.distill, recipe.teacher, recipe.baseline) == (None, None, False)
    assert (recipe.data, recipe.evaluate, recipe.quantize) == (glyphs.data, glyphs.evaluate, glyphs.quantize)
    assert recipe.export.precisions == ("fp32",)
    assert recipe.student.init == "weights"
    assert check_recipe(recipe.model_dump(mode="json"), "again", Path()) == recipe, "it survives its run's recipe.yaml"


def test_adopting_alone_exports_in_float() -> None:
    recipe = make_adoption_recipe("ViT-B-32", {"pretrained": "laion2b_s34b_b79k"}, None)
    assert recipe.export.precisions == ("fp32",)
    assert recipe.name == "ViT-B-32"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": None}, "no `distill` section, so the student needs existing weights; add distill, or give"),
        ({"distill": None, "baseline": True}, "teacher and baseline are for training"),
        ({"data": None}, "no `data` section to train on; add one"),
    ],
)
def test_a_recipe_that_trains_nothing_has_no_more_than_it_needs(
    path: Path, changes: dict[str, object], said: str
) -> None:
    assert said in problem(path, **changes)


def test_training_without_a_teacher_depends_on_nothing_that_concerns_one() -> None:
    alone = {"steps": 9, "batch_size": 8, "lr": 1e-3, "warmup": 1}
    taught = {
        "loss_weights": LossWeights(task=2, mfd=1),
        "teacher_cache": TeacherCacheSpec(dtype="int8"),
        "teacher_precision": "bf16",
        "reference_compat": True,
    }
    without = DistillSpec(**alone, **taught).without_teacher()
    assert without == DistillSpec(**alone).without_teacher()
    assert {name for name, weight in without.loss_weights.model_dump().items() if weight} == {"task"}


@pytest.mark.parametrize(("length", "expected"), [({"steps": 9}, 9), ({"epochs": 3}, 21)])
def test_a_training_has_steps_or_epochs(length: dict[str, int], expected: int) -> None:
    assert DistillSpec(**length, batch_size=8, lr=1e-3, warmup=1).num_steps(7) == expected
