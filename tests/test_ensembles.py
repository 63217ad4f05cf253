"""Several teachers train one student: relations averaged after the softmax, features through heads of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, Ended
from torch import Tensor
from training import BATCH_SIZE, assert_same_run, cache_of, configured, last_state, rows, silent, spec

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation import losses
from toolchain.distillation.distill import Training, distill
from toolchain.distillation.features import BatchFeatures, TeacherFeatures
from toolchain.distillation.heads import DistillationHeads
from toolchain.distillation.objectives import OBJECTIVES, weighted_loss
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.errors import UsageError
from toolchain.models.build import build_model, load_model, save_model
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.load import load_recipe
from toolchain.recipe.model import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 1e-10  # of the largest element: float64, summed in another order
BATCH, WIDTH, WIDTHS = 7, 6, (5, 9)
SCALES, BIASES = (21.0, 8.0), (-8.0, -3.0)
NONE = dict.fromkeys(LossWeights.model_fields, 0.0)


def draw(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(BATCH, columns, generator=generator, dtype=torch.float64), dim=1)


TEACHERS = [(draw(width, 10 * width), draw(width, 10 * width + 1)) for width in WIDTHS]


def together() -> TeacherFeatures:
    """Both teachers, side by side."""
    image, text = (torch.cat(parts, dim=1) for parts in zip(*TEACHERS, strict=True))
    scale, bias = (torch.tensor(values, dtype=torch.float64) for values in (SCALES, BIASES))
    return TeacherFeatures(image, text, scale, bias, WIDTHS)


def compute(name: str, *, memory_mb: float = 128) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """An objective with two teachers: the loss, the gradients in the student's raw features, and the heads' weights."""
    torch.manual_seed(0)
    heads = DistillationHeads(WIDTH, WIDTHS, {name: 1.0}).double()
    raw = {part: (3 * draw(WIDTH, seed)).requires_grad_() for seed, part in enumerate(("image", "text", "masked"))}
    teacher = together()
    features = BatchFeatures(heads(raw["image"], raw["text"], teacher, raw["masked"]), teacher)
    bias = torch.tensor(-5.0, dtype=torch.float64) if name == "sigmoid_kd" else None
    scales = heads.scales(torch.tensor(14.0, dtype=torch.float64), bias)
    loss, _ = weighted_loss(features, features, scales, {name: 1.0}, memory_mb=memory_mb)
    found = torch.autograd.grad(loss, list(raw.values()), allow_unused=True)
    return loss, {part: x for part, x in zip(raw, found, strict=True) if x is not None}, heads.state_dict()


def define_for(name: str, number: int, unit: dict[str, Tensor], projected: dict[str, Tensor], cross: Tensor) -> Tensor:
    """An objective's definition for one of the teachers."""
    student, teacher, scale = (unit["image"], unit["text"]), TEACHERS[number], SCALES[number]
    whole, masked = (tuple(projected.get(part) for part in parts) for parts in (("image", "text"), ("masked", "text")))
    match name:
        case "crd":
            return losses.crd_loss(*student, 14.0, *teacher, scale)
        case "affinity":
            return losses.affinity_loss(*student, *teacher, 50.0)
        case "sigmoid_kd":
            return losses.sigmoid_kd_loss(*student, 14.0, -5.0, *teacher, scale, BIASES[number])
        case "fd":
            return losses.fd_loss(*whole, *teacher)
        case "mfd":
            return losses.fd_loss(*masked, *teacher)
        case "gd":
            return losses.gd_loss(*whole, 14.0, *teacher, scale)
        case "icl":
            return losses.icl_loss(*whole, *teacher, cross)
        case "cross_kd":
            return losses.cross_kd_loss(*whole, *teacher, cross, scale)
    raise AssertionError(name)


def define(name: str, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over teachers of an objective's definition, each with its own rows of the projections."""
    raw = {part: (3 * draw(WIDTH, seed)).requires_grad_() for seed, part in enumerate(("image", "text", "masked"))}
    unit = {part: F.normalize(x, dim=1) for part, x in raw.items()}
    cross = state.get("log_cross_logit_scale", torch.zeros(())).exp()
    start, values = 0, []
    for number, width in enumerate(WIDTHS):
        own = slice(start, start + width)
        start += width
        projected = {}
        for part, x in raw.items() if "image_projection.weight" in state else ():
            tower = "text" if part == "text" else "image"
            weight, shift = (state[f"{tower}_projection.{kind}"][own] for kind in ("weight", "bias"))
            projected[part] = F.normalize(x @ weight.T + shift, dim=1)
        values.append(define_for(name, number, unit, projected, cross))
    loss = torch.stack(values).mean()
    found = torch.autograd.grad(loss, list(raw.values()), allow_unused=True)
    return loss, {part: x for part, x in zip(raw, found, strict=True) if x is not None}


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("task", "afd")])
@pytest.mark.parametrize("memory_mb", [128, 1e-4], ids=["one block", "rows"])
def test_an_objective_is_the_mean_over_the_teachers(name: str, memory_mb: float) -> None:
    loss, gradients, state = compute(name, memory_mb=memory_mb)
    expected, of_definition = define(name, state)
    assert loss.item() == pytest.approx(expected.item(), rel=SAME)
    assert gradients.keys() == of_definition.keys()
    for part, value in of_definition.items():
        bound = SAME * max(1.0, value.abs().max().item())
        assert (gradients[part] - value).abs().max().item() <= bound, part


def test_relations_are_averaged_after_the_softmax() -> None:
    """The gradient of CRD is that of the KL divergence from the teachers' average distribution; the value is more."""
    loss, gradients, _ = compute("crd")
    raw = {part: (3 * draw(WIDTH, seed)).requires_grad_() for seed, part in enumerate(("image", "text"))}
    u, w = (F.normalize(x, dim=1) for x in raw.values())
    values = []
    for dim in (1, 0):
        relations = [(scale * i @ t.T).softmax(dim) for (i, t), scale in zip(TEACHERS, SCALES, strict=True)]
        average = torch.stack(relations).mean(0)
        values.append((average * (average.log() - (14.0 * u @ w.T).log_softmax(dim))).sum() / BATCH)
    averaged = (values[0] + values[1]) / 2
    for part, value in zip(raw, torch.autograd.grad(averaged, list(raw.values())), strict=True):
        torch.testing.assert_close(gradients[part], value, rtol=SAME, atol=SAME)
    assert loss.item() > averaged.item(), "by the divergence of the teachers from their average"


def test_the_task_and_a_fusion_are_computed_once() -> None:
    torch.manual_seed(0)
    heads = DistillationHeads(WIDTH, WIDTHS, {"task": 1.0, "afd": 1.0}).double()
    teacher = together()
    features = BatchFeatures(heads(3 * draw(WIDTH, 0), 3 * draw(WIDTH, 1), teacher), teacher)
    scales = heads.scales(torch.tensor(14.0, dtype=torch.float64))
    _, terms = weighted_loss(features, features, scales, {"task": 1.0, "afd": 1.0})
    unit = draw(WIDTH, 0), draw(WIDTH, 1)
    assert terms["task"].item() == pytest.approx(losses.clip_loss(*unit, 14.0).item(), rel=SAME)
    fused = features.student.fused_image_BD, features.student.fused_text_BD
    assert heads.image_fusion.weight.shape == (WIDTH, WIDTH + sum(WIDTHS))
    expected = losses.afd_loss(*fused, heads.fusion_logit_scale)
    assert terms["afd"].item() == pytest.approx(expected.item(), rel=SAME)


def test_two_equal_teachers_are_one() -> None:
    image, text = TEACHERS[0]
    two = TeacherFeatures(
        torch.cat([image, image], 1), torch.cat([text, text], 1), torch.tensor([21.0, 21.0]).double(), None, (5, 5)
    )
    one = TeacherFeatures(image, text, torch.tensor(21.0).double())
    found = []
    for teacher, widths in ((two, (5, 5)), (one, 5)):
        torch.manual_seed(0)
        heads = DistillationHeads(WIDTH, widths, {"crd": 1.0, "affinity": 1.0}).double()
        features = BatchFeatures(heads(draw(WIDTH, 0), draw(WIDTH, 1), teacher), teacher)
        scales = heads.scales(torch.tensor(14.0, dtype=torch.float64))
        found.append(weighted_loss(features, features, scales, {"crd": 1.0, "affinity": 1.0})[0].item())
    assert found[0] == pytest.approx(found[1], rel=SAME)


def test_each_teacher_has_a_projection_of_its_own_even_of_the_students_width() -> None:
    heads = DistillationHeads(WIDTH, (WIDTH, 9), {"fd": 1.0}).double()
    assert heads.image_projection.weight.shape == (WIDTH + 9, WIDTH)
    teacher = TeacherFeatures(torch.zeros(2, 15).double(), torch.zeros(2, 15).double(), torch.ones(2), None, (WIDTH, 9))
    features = heads(draw(WIDTH, 0)[:2], draw(WIDTH, 1)[:2], teacher)
    for part in torch.split(features.image_BE, [WIDTH, 9], dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(2, dtype=torch.float64))


# From the recipe to the student.


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Teachers that differ in architecture, width, image size, tokenizer and context length."""
    parent = tmp_path_factory.mktemp("two teachers")
    glyphs = load_model(configured(parent / "config", model_cfg={"embed_dim": 48}), random_seed=11)
    vision = SMALL["vision_cfg"] | {"image_size": 24}  # type: ignore[operator]
    stock = build_model(ModelSpec(model="ViT-B-16", model_cfg=SMALL | {"vision_cfg": vision}), seed=12)
    assert glyphs.geometry != stock.geometry
    assert not glyphs.tokenizes_like(stock)
    folders = [parent / "glyphs", parent / "stock"]
    for folder, model in zip(folders, (glyphs, stock), strict=True):
        folder.mkdir()
        save_model(model, folder)
    return folders


def distil_from(caches: TeacherCache | TeacherCaches, folder: Path, samples: TrainingSet, student: Path) -> None:
    folder.mkdir(exist_ok=True)
    weights = LossWeights(**NONE | {"task": 1.0, "crd": 1.0, "fd": 1.0, "icl": 1.0})
    data = GlyphBatches(samples, 0, BATCH_SIZE, 2)
    distill(Training(spec(loss_weights=weights), load_model(student, random_seed=0), caches, data), folder, silent)


def test_a_student_learns_from_two_caches(
    tmp_path: Path, tiny_samples: TrainingSet, two_teachers: list[Path], student_folder: Path
) -> None:
    """Its first relational loss is the mean of those with either teacher, and the same caches give the same student."""
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    caches = [cache_of(load_model(path), data, tmp_path / f"cache of {path.name}") for path in two_teachers]
    teachers = {"both": TeacherCaches(tuple(caches)), "first": caches[0], "second": caches[1]}
    for name, teacher in teachers.items():
        distil_from(teacher, tmp_path / name, tiny_samples, student_folder)
    first = {name: rows(tmp_path / name)[0]["terms"] for name in teachers}
    assert list(first["both"]) == ["task", "crd", "fd", "icl"]
    for name in ("task", "crd"):
        mean = (first["first"][name]["unweighted"] + first["second"][name]["unweighted"]) / 2
        assert first["both"][name]["unweighted"] == pytest.approx(mean, rel=1e-4), "float32"
    both = rows(tmp_path / "both")
    assert both[-1]["terms"]["fd"]["unweighted"] < both[0]["terms"]["fd"]["unweighted"]
    assert -1 <= both[0]["similarity"]["image"] <= 1
    heads = last_state(tmp_path / "both")["trained"]
    assert heads["heads.image_projection.weight"].shape == (48 + 32, 128)
    distil_from(TeacherCaches(tuple(caches)), tmp_path / "again", tiny_samples, student_folder)
    assert_same_run(tmp_path / "both", tmp_path / "again")


def test_a_recipe_trains_one_student_with_two_teachers(
    tmp_path: Path, tiny_recipe: Callable[..., Path], two_teachers: list[Path], clipkd: Callable[..., Ended]
) -> None:
    first, second = ({"model": str(path)} for path in two_teachers)
    steps = {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 0, "teacher_cache": {}}
    recipe = tiny_recipe(teacher=first, more_teachers=[second], distill=steps)
    run = tmp_path / "run"
    ended = clipkd("distill", recipe, "--out", run)
    assert ended.code == 0, ended.err
    made = json.loads((run / "student" / "manifest.json").read_text())["inputs"]
    assert list(made) == ["teacher", "teacher-2"]
    for name, width in (("teacher", 48), ("teacher-2", 32)):
        assert json.loads((run / "teacher-cache" / name / "cache.json").read_text())["embed_dim"] == width
    again = clipkd("distill", recipe, "--out", run)
    assert again.code == 0
    assert [line.split()[1] for line in again.err.splitlines() if line.startswith("student ")] == ["cached"]
    shown = json.loads(clipkd("show", recipe, "--out", run, "--json").out)
    states = {stage["stage"]: stage["state"] for stage in shown["stages"]}
    names = ["teacher", "teacher-2", "teacher-cache/teacher", "teacher-cache/teacher-2", "student"]
    assert list(states.items()) == [(name, "made") for name in names]
    other = tiny_recipe("other", teacher=first, more_teachers=[first], distill=steps)
    shown = json.loads(clipkd("show", other, "--out", run, "--json").out)
    states = {stage["stage"]: stage["state"] for stage in shown["stages"]}
    assert states["teacher"] == "made"
    assert states["teacher-2"] == states["student"] == "of another recipe"


CACHED = {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 0, "teacher_cache": {}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"teacher": None, "distill": CACHED | {"teacher_cache": None}}, "more_teachers needs a `teacher` section"),
        ({"distill": CACHED | {"teacher_cache": None}}, "more_teachers needs distill.teacher_cache"),
        (
            {"distill": CACHED | {"loss_weights": {"task": 0, "crd": 0, "fd": 1, "icl": 1, "afd": 1}}},
            "give one of task, crd, affinity, sigmoid_kd a weight",
        ),
        (
            {"distill": CACHED | {"teacher_cache": {"path": "runs/other"}}},
            "teacher_cache.path is the cache of one teacher",
        ),
        ({"student": {"model": "ViT-B-16", "text_tower": "teacher"}}, "is the text tower of one teacher"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused(
    tmp_path: Path, teacher_folder: Path, changes: dict[str, Any], problem: str
) -> None:
    teacher = {"model": str(teacher_folder)}
    content: dict[str, Any] = {
        "name": "mine",
        "data": {"kind": "glyphs"},
        "teacher": teacher,
        "more_teachers": [teacher],
        "student": {"model": "glyphs_tiny"},
        "distill": CACHED,
    } | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({name: part for name, part in content.items() if part is not None}))
    with pytest.raises(UsageError, match=problem):
        load_recipe(path)
