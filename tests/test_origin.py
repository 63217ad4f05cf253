"""The origin that a model card gives: which teacher it was, where, and under which name, however it was written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from export.pipeline.origin import describe_origin
from toolchain.recipe.load import check_recipe
from toolchain.stage import Stage

CHECKPOINT, TEACHER = (Stage(Path("stage"), {"digest": digest}, cached=True) for digest in ("c0ffee", "7eac4e7"))
TRAINED = {"distill": {"steps": 1, "batch_size": 2, "lr": 0.1, "warmup": 0}, "export": {"precisions": ["fp32"]}}
HUB = "hf-hub:timm/ViT-B-16-SigLIP"


def write_model(folder: Path, **recipe: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text("{}")
    if recipe:
        (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def origin_of(root: Path, teacher: dict[str, Any], **student: Any) -> dict[str, Any]:
    raw = {"name": "x", "teacher": teacher, "student": {"model": "glyphs_tiny", **student}, **TRAINED}
    raw["data"] = {"kind": "image_folder", "path": str(root / "data" / "photos")}
    return describe_origin(check_recipe(raw, "x", root), root / "runs" / "mine", CHECKPOINT, TEACHER)


@pytest.mark.parametrize("written", ["runs/teacher", "runs/teacher/student"])
def test_a_teacher_in_a_run_has_its_path_its_hash_and_its_first_name(tmp_path: Path, written: str) -> None:
    student = {"model": str(tmp_path / "models" / "vit"), "pretrained": None, "model_cfg": {}}
    write_model(tmp_path / "runs" / "teacher" / "student", name="large_teacher", student=student)
    described = origin_of(tmp_path, {"model": written})
    assert described["teacher"] == {
        "model": "../teacher/student",
        "sha256": "7eac4e7",
        "made_by": {"recipe": "large_teacher", "student": {"model": "../../models/vit"}},
    }
    assert described["checkpoint"] == "sha256 c0ffee"
    assert described["data"]["path"] == "../../data/photos"
    assert str(tmp_path) not in str(described), "a card is passed on"


def test_an_adopted_model_keeps_its_name_of_the_hub(tmp_path: Path) -> None:
    write_model(tmp_path / "runs" / "adopted" / "adopted", name="ViT-B-16-SigLIP", student={"model": HUB})
    described = origin_of(tmp_path, {"model": "glyphs_teacher"}, model="runs/adopted/adopted", init="weights")
    assert described["student"] == {
        "model": "../adopted/adopted",
        "init": "weights",
        "made_by": {"recipe": "ViT-B-16-SigLIP", "student": {"model": HUB}},
    }
    assert described["teacher"] == {"model": "glyphs_teacher", "sha256": "7eac4e7"}


def test_every_model_of_the_recipe_has_its_maker(tmp_path: Path) -> None:
    for name in ("half", "second"):
        write_model(tmp_path / "runs" / name / "student", name=name, student={"model": "ViT-B-16"})
    raw = {"name": "x", "teacher": {"model": "glyphs_teacher"}, "more_teachers": [{"model": "runs/second"}], **TRAINED}
    raw["student"] = {"model": "glyphs_tiny", "inherit": "runs/half"}
    raw["data"] = {"kind": "image_folder", "path": str(tmp_path / "data"), "views": 1}
    raw["distill"] = {**TRAINED["distill"], "teacher_cache": {"dtype": "float32"}}
    described = describe_origin(check_recipe(raw, "x", tmp_path), tmp_path / "runs" / "mine", CHECKPOINT, TEACHER)
    assert described["student"]["inherit"]["made_by"] == {"recipe": "half", "student": {"model": "ViT-B-16"}}
    (second,) = described["more teachers"]
    assert second["made_by"] == {"recipe": "second", "student": {"model": "ViT-B-16"}}


@pytest.mark.parametrize("beside", [None, "not: [a recipe", "name: x", "[1, 2]", "student: x\nname: y"])
def test_a_folder_in_no_run_has_its_path_and_hash(tmp_path: Path, beside: str | None) -> None:
    write_model(tmp_path / "models" / "vit")
    if beside is not None:
        (tmp_path / "models" / "recipe.yaml").write_text(beside)
    (tmp_path / "epoch_10.pt").touch()
    described = origin_of(tmp_path, {"model": "models/vit", "checkpoint": "epoch_10.pt"})
    assert described["teacher"] == {
        "model": "../../models/vit",
        "checkpoint": "../../epoch_10.pt",
        "sha256": "7eac4e7",
    }


def test_a_model_without_training_has_no_teacher(tmp_path: Path) -> None:
    raw = {"name": "x", "student": {"model": "glyphs_teacher", "init": "weights"}, "export": {"precisions": ["fp32"]}}
    described = describe_origin(check_recipe(raw, "x", tmp_path), tmp_path, CHECKPOINT, None)
    assert (described["teacher"], described["data"]) == ("none", "none")
    assert described["student"] == {"model": "glyphs_teacher", "init": "weights"}


def test_settings_of_a_machine_are_not_in_it(tmp_path: Path) -> None:
    def describe(**data: Any) -> Any:
        raw = {"name": "x", "student": {"model": "glyphs_tiny"}, **TRAINED}
        raw["data"] = {"kind": "webdataset", "shards": ["s3://b/{0..9}.tar"], **data}
        return describe_origin(check_recipe(raw, "x", tmp_path), tmp_path / "runs" / "mine", CHECKPOINT, None)["data"]

    assert describe(cache_gb=3, cache_dir=str(tmp_path)) == describe()
    assert not {"cache_gb", "cache_dir"} & set(describe())
