"""An image tower in its teacher's space ships the teacher's text tower: built, trained on images alone, exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from conftest import SMALL, Ended, jpeg, make_picture
from training import BATCH_SIZE, STEPS, configured, rows, silent, spec

from toolchain.data.open import training_data
from toolchain.distillation.compatibility import check_pair
from toolchain.distillation.distill import Training, distill
from toolchain.errors import UsageError
from toolchain.models.build import build_model, load_model, save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.teacher_text import build_on_text_tower
from toolchain.recipe.data import ImagesSpec
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.load import load_recipe
from toolchain.recipe.model import ModelSpec, StudentSpec
from toolchain.recipe.model_names import fingerprint, resolve_model

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["red thing", "blue thing", "dog", "cat"]
ALONE = {"steps": 3, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 0}
NONE = dict.fromkeys(LossWeights.model_fields, 0.0)
VISION = {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sigmoid teacher of its own width, tokenizer and image size."""
    parent = tmp_path_factory.mktemp("teacher of a text tower")
    config = configured(parent / "config", model_cfg={"embed_dim": 40, "init_logit_bias": -7, "init_logit_scale": 3.0})
    (parent / "teacher").mkdir()
    save_model(load_model(config, random_seed=5), parent / "teacher")
    return parent / "teacher"


@pytest.fixture
def teacher(teacher_path: Path) -> ClipModel:
    return load_model(teacher_path)


def image_tower(**changes: Any) -> StudentSpec:
    """A small vision transformer of open_clip's with its 77 tokens, of which only the image tower is used."""
    fields = {"model": "ViT-B-16", "model_cfg": {"vision_cfg": VISION}, "text_tower": "teacher"} | changes
    return resolve_model(StudentSpec(**fields), Path(), "student")


@pytest.fixture
def pictures(tmp_path: Path) -> ImagesSpec:
    (tmp_path / "pictures").mkdir()
    for number in range(2 * BATCH_SIZE):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(jpeg(make_picture(40, 32, seed=number)))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return ImagesSpec(
        kind="images",
        path=str(tmp_path / "pictures"),
        classes=str(tmp_path / "classes.txt"),
        templates=("a {}.",),
        views=2,
    )


# Building.


def test_the_text_side_is_the_teachers_and_the_image_tower_is_new(teacher: ClipModel, tmp_path: Path) -> None:
    student = build_on_text_tower(image_tower(), teacher, seed=0)
    assert student.has_teachers_text
    assert (student.embed_dim, student.image_size, student.context_length) == (40, 24, 20)
    assert student.tokenizes_like(teacher)
    ids_BT = student.tokenize(CLASSES)
    with torch.no_grad():
        assert torch.equal(student.encode_text(ids_BT), teacher.encode_text(teacher.tokenize(CLASSES)))
    assert student.logit_scale.item() == teacher.logit_scale.item()
    assert student.logit_bias is not None
    assert student.logit_bias.item() == -7
    trained = {name for name, parameter in student.net.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"visual", "logit_scale", "logit_bias"}
    again, other = (build_on_text_tower(image_tower(), teacher, seed=seed) for seed in (0, 1))
    assert torch.equal(again.net.visual.conv1.weight, student.net.visual.conv1.weight)
    assert not torch.equal(other.net.visual.conv1.weight, student.net.visual.conv1.weight)
    save_model(student, tmp_path)
    plain = open_clip.create_model(f"local-dir:{tmp_path}")
    tokens_BT = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval().encode_text(tokens_BT), student.encode_text(ids_BT))


def test_an_image_tower_keeps_its_weights(teacher: ClipModel, tmp_path: Path) -> None:
    own = build_model(image_tower(model_cfg={"vision_cfg": VISION, "embed_dim": 40}, text_tower=None), seed=3)
    (tmp_path / "own").mkdir()
    save_model(own, tmp_path / "own")
    student = build_on_text_tower(
        image_tower(model=str(tmp_path / "own"), model_cfg={}, init="weights"), teacher, seed=0
    )
    for name, x in own.net.visual.state_dict().items():
        assert torch.equal(student.net.visual.state_dict()[name], x), name


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"embed_dim": 48}, "features of the teacher's width, 40, and the weights of this image tower give 48"),
        ({"embed_dim": 40, "quick_gelu": True}, "for QuickGELU, and the teacher's text tower is for GELU"),
    ],
)
def test_weights_that_would_compute_something_else_are_refused(
    teacher: ClipModel, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    own = build_model(image_tower(model_cfg={"vision_cfg": VISION} | changes, text_tower=None), seed=3)
    (tmp_path / "own").mkdir()
    save_model(own, tmp_path / "own")
    with pytest.raises(UsageError, match=problem):
        build_on_text_tower(image_tower(model=str(tmp_path / "own"), model_cfg={}, init="weights"), teacher, seed=0)


def test_a_bias_of_the_teachers_need_not_be_trained(teacher: ClipModel) -> None:
    check_pair(build_on_text_tower(image_tower(), teacher, seed=0), teacher, LossWeights(**NONE | {"fd": 1.0}))


# Recipes.


def write_recipe(tmp_path: Path, teacher_path: Path, pictures: ImagesSpec, **changes: Any) -> Path:
    content = {
        "name": "images",
        "data": pictures.model_dump(mode="json", exclude_defaults=True) | {"kind": "images"},
        "teacher": {"model": str(teacher_path)},
        "student": {"model": "ViT-B-16", "model_cfg": {"vision_cfg": VISION}, "text_tower": "teacher"},
        "distill": {
            "steps": 3, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 0, "teacher_cache": {},
            "loss_weights": NONE | {"fd": 1.0},
        },
        "export": {"precisions": ["fp32"]},
    }  # fmt: skip
    path = tmp_path / "images.yaml"
    path.write_text(yaml.safe_dump({name: part for name, part in (content | changes).items() if part is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"teacher": None, "data": {"kind": "glyphs"}, "distill": ALONE},
            "student.text_tower: teacher needs the sections `teacher` and `distill`",
        ),
        (
            {"student": {"model": "ViT-B-16", "text_tower": "teacher", "model_cfg": {"embed_dim": 9}}},
            "remove model_cfg",
        ),
    ],
)
def test_what_contradicts_the_teachers_text_tower_is_refused(
    tmp_path: Path, teacher_path: Path, pictures: ImagesSpec, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        load_recipe(write_recipe(tmp_path, teacher_path, pictures, **changes))


def test_a_baseline_without_a_text_tower_is_refused(tmp_path: Path, teacher_path: Path, pictures: ImagesSpec) -> None:
    changes: dict[str, Any] = {"data": {"kind": "glyphs"}, "baseline": True}
    with pytest.raises(UsageError, match="text_tower: teacher has no baseline"):
        load_recipe(write_recipe(tmp_path, teacher_path, pictures, **changes))


def test_the_default_is_not_in_the_key_of_a_stage() -> None:
    """Students that were trained before the field came are still those of their recipes."""
    plain = resolve_model(ModelSpec(model="ViT-B-16", model_cfg=SMALL), Path(), "student")
    own = resolve_model(StudentSpec(model="ViT-B-16", model_cfg=SMALL), Path(), "student")
    assert fingerprint(own) == fingerprint(plain)
    assert fingerprint(own.model_copy(update={"text_tower": "teacher"})) != fingerprint(plain)


# Training.


def test_images_alone_move_the_image_tower_to_the_teacher(
    tmp_path: Path, teacher: ClipModel, pictures: ImagesSpec
) -> None:
    """FD is then that of the images, and the text tower does not run."""
    student = build_on_text_tower(image_tower(), teacher, seed=0)
    before = {name: x.clone() for name, x in student.net.state_dict().items()}
    data = training_data(pictures, seed=0, batch_size=BATCH_SIZE)
    weights = LossWeights(**NONE | {"fd": 1.0})
    ran: list[int] = []
    hook = student.net.transformer.register_forward_hook(lambda *_: ran.append(1))
    distill(Training(spec(loss_weights=weights, lr=3e-3, steps=30), student, teacher, data), tmp_path, silent)
    hook.remove()
    assert len(ran) <= 1, "the test of its fast path"
    logged = rows(tmp_path)
    for row in logged:
        assert row["similarity"]["text"] == pytest.approx(1, abs=1e-6)
        assert row["loss"] == pytest.approx(2 - 2 * row["similarity"]["image"], rel=1e-4), "in the width of 40"
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    after = load_model(tmp_path).net.state_dict()
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved
    assert all(name.startswith("visual.") for name in moved)


def test_a_step_is_the_one_of_a_text_tower_that_runs(tmp_path: Path, teacher: ClipModel, pictures: ImagesSpec) -> None:
    """The same first losses and the same weights as if the student computed its text features itself."""
    data = training_data(pictures, seed=0, batch_size=BATCH_SIZE)
    weights = LossWeights(**NONE | {"fd": 1.0, "crd": 1.0, "sigmoid_kd": 1.0, "mfd": 0.5, "affinity": 0.5})
    found = []
    for runs in (False, True):
        student = build_on_text_tower(image_tower(), teacher, seed=0)
        if runs:
            object.__setattr__(student, "has_teachers_text", False)
        folder = tmp_path / str(runs)
        folder.mkdir()
        distill(Training(spec(loss_weights=weights), student, teacher, data), folder, silent)
        found.append(rows(folder))
    assert len(found[0]) == STEPS
    for first, second in zip(*found, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_images_and_classes_alone_end_in_an_exported_classifier(
    tmp_path: Path, teacher_path: Path, pictures: ImagesSpec, clipkd: Callable[..., Ended]
) -> None:
    """From the command line: cached features, parity, zero-shot accuracy with classes that label no training image."""
    for index in range(8):
        path = tmp_path / "labelled" / CLASSES[index % 4] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(pictures.path) / f"{index}.jpg", path)
    own = {"kind": "folder", "name": "own", "path": str(tmp_path / "labelled")}
    recipe = write_recipe(tmp_path, teacher_path, pictures, evaluate={"headline": "own", "sets": [own]})
    run = tmp_path / "run"
    assert clipkd("distill", recipe, "--out", run).code == 0
    ended = clipkd("export", run)
    assert ended.code == 0, ended.err
    exported = run / "exported" / "student-onnxruntime-fp32"
    ended = clipkd("evaluate", exported, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["models"][0]["sets"]["own"]["n"] == 8
    teacher, student = load_model(teacher_path), load_model(run / "student")
    features = [
        torch.nn.functional.normalize(model.encode_text(model.tokenize(CLASSES)), dim=-1).detach().numpy()
        for model in (teacher, student)
    ]
    np.testing.assert_array_equal(*features)
    ended = clipkd("distill", recipe, "--out", run)
    assert ended.code == 0
    assert "student" in ended.err
    assert "cached" in ended.err
