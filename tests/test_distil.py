"""Training: the loss falls, the same seed gives the same bytes, an interruption changes none, and the log adds up."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, STUDENT
from open_clip.transformer import VisionTransformer

from toolchain import distil as distil_module
from toolchain import objectives
from toolchain.data import GlyphBatches
from toolchain.distil import _optimizer, distil, learning_rate, teacher_features
from toolchain.errors import ClipkdError
from toolchain.glyphs import TrainingSet
from toolchain.models import CONFIG, ClipModel, load_model, save_model, unit_image_features, unit_text_features
from toolchain.objectives import DistillationHeads, loss_terms
from toolchain.recipe import DistillSpec, LossWeights

GOLDEN = REPOSITORY / "tests" / "data" / "clip_kd.npz"
BATCH_SIZE = 8
STEPS = 11  # more than an epoch of the tiny samples, so that a second view is shown

# A teacher sees a sample in other company when its features are stored: float32 sums in another order.
MAX_FEATURE_ERROR = 1e-5
# The loss is a float32 sum of four terms, each logged after rounding.
LOSS_RELATIVE_ERROR = 1e-6
# Both sides are float64 cosines of the same angle.
SCHEDULE_RELATIVE_ERROR = 1e-12


class Stop(Exception):
    """What the tests interrupt with."""


def silent(what: str, done: int, total: int, note: str = "") -> None:
    pass


def stopping(at: int, during: str = "training") -> Callable[..., None]:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if what == during and done >= at:
            raise Stop

    return progress


def spec(**changes: Any) -> DistillSpec:
    return DistillSpec(**({"steps": STEPS, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 3} | changes))


@pytest.fixture(scope="session")
def wide_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another embedding width, so that the heads have something to learn."""
    source, folder = tmp_path_factory.mktemp("config"), tmp_path_factory.mktemp("wide_teacher")
    for path in STUDENT.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / CONFIG).read_text())
    config["model_cfg"]["embed_dim"] = 48
    (source / CONFIG).write_text(json.dumps(config))
    save_model(load_model(source, random_seed=11), folder)
    return folder


def train(
    folder: Path,
    samples: TrainingSet,
    teacher: Path | None,
    progress: Callable[..., None] = silent,
    seed: int = 0,
    **changes: Any,
) -> ClipModel:
    """What the distil stage does."""
    folder.mkdir(exist_ok=True)
    student = load_model(STUDENT, random_seed=seed)
    frozen = load_model(teacher) if teacher else None
    distil(spec(**changes), student, frozen, GlyphBatches(samples, seed, BATCH_SIZE, 2), folder, progress)
    return student


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    parsed = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in parsed]


def assert_same_result(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert "open_clip_model.safetensors" in names
    for name in names:
        if name != "train.jsonl":
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert rows(first) == rows(second)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_samples: TrainingSet, wide_teacher_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, tiny_samples, wide_teacher_folder)
    return folder


# A run.


@pytest.mark.parametrize("distilled", [True, False])
def test_the_loss_falls(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, distilled: bool) -> None:
    _, first_N = np.unique(tiny_samples.character_N, return_index=True)
    one_batch_N = first_N[:BATCH_SIZE]  # the same characters at every step
    samples = TrainingSet(
        tiny_samples.masks_NSS[one_batch_N], tiny_samples.character_N[one_batch_N], tiny_samples.names[:BATCH_SIZE]
    )
    train(tmp_path, samples, teacher_folder if distilled else None, steps=16)
    logged = rows(tmp_path)
    assert logged[-1]["loss"] < logged[0]["loss"] / 2
    if not distilled:  # the other's teacher is random, and no help at the task
        assert logged[-1]["loss"] < math.log(BATCH_SIZE) / 2, "half of what a constant scores"


def test_what_is_saved_is_what_was_trained(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    student = train(tmp_path, tiny_samples, teacher_folder)
    assert not student.net.training
    saved = load_model(tmp_path).net.state_dict()
    start = load_model(STUDENT, random_seed=0).net.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in student.net.state_dict().items())
    moved = [key for key, value in start.items() if not torch.equal(value, saved[key])]
    assert {"logit_scale", "text_projection", "visual.trunk.conv1.0.weight"} & set(moved)
    assert sum(torch.equal(value, saved[key]) for key, value in start.items()) < 0.1 * len(start), "nothing is frozen"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "heads.pt",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.jsonl",
    ]


def test_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    train(tmp_path, tiny_samples, wide_teacher_folder)
    assert_same_result(tmp_path, uninterrupted)
    train(tmp_path / "other", tiny_samples, wide_teacher_folder, seed=1)
    assert rows(tmp_path / "other") != rows(uninterrupted)


@pytest.mark.parametrize(
    ("at", "every_s"),
    [(1, 0.0), (int(np.random.default_rng(0).integers(2, STEPS)), 0.0), (STEPS, 0.0), (3, math.inf)],
    ids=["at the first step", "at a random step", "at the last step", "before a checkpoint"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path,
    tiny_samples: TrainingSet,
    wide_teacher_folder: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    every_s: float,
) -> None:
    monkeypatch.setattr(distil_module, "_CHECKPOINT_EVERY_S", every_s)
    with pytest.raises(Stop):
        train(tmp_path, tiny_samples, wide_teacher_folder, stopping(at))
    assert (tmp_path / "checkpoint.pt").exists() == (every_s == 0 and at > 1)
    assert not (tmp_path / "open_clip_model.safetensors").exists()
    done: list[tuple[str, int]] = []
    train(tmp_path, tiny_samples, wide_teacher_folder, lambda what, step, *_: done.append((what, step)))
    assert done[0] == ("training", at if every_s == 0 else 1), "it continues, and the teacher is not asked again"
    assert_same_result(tmp_path, uninterrupted)


def test_interrupted_twice_and_in_the_teacher(
    tmp_path: Path,
    tiny_samples: TrainingSet,
    wide_teacher_folder: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distil_module, "_CHECKPOINT_EVERY_S", 0.0)
    for progress in (stopping(1, "teacher features"), stopping(5), stopping(5), stopping(11)):
        with pytest.raises(Stop):
            train(tmp_path, tiny_samples, wide_teacher_folder, progress)
    train(tmp_path, tiny_samples, wide_teacher_folder)
    assert_same_result(tmp_path, uninterrupted)


def test_a_loss_that_is_not_a_number_stops_with_its_step(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil_module, "_CHECKPOINT_EVERY_S", 0.0)
    real, calls = objectives.clip_loss, [0]

    def failing(*arguments: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return real(*arguments) * (math.nan if calls[0] == 5 else 1)

    monkeypatch.setattr(objectives, "clip_loss", failing)
    with pytest.raises(ClipkdError) as caught:
        train(tmp_path, tiny_samples, None)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: the loss is nan at step 4 (terms {{'task': nan}}; samples [")
    assert message.endswith("and others). The last checkpoint is intact; lower distill.lr")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["net"].values() if value.is_floating_point())
    assert not (tmp_path / "open_clip_model.safetensors").exists()


# What is logged.


def test_the_log_adds_up(uninterrupted: Path) -> None:
    logged, weights = rows(uninterrupted), LossWeights().model_dump()
    assert [row["step"] for row in logged] == list(range(STEPS))
    for row in logged:
        assert list(row["terms"]) == ["task", "crd", "fd", "icl"]
        for name, term in row["terms"].items():
            assert term["weighted"] == weights[name] * term["unweighted"]
            assert term["unweighted"] > 0
        total = sum(term["weighted"] for term in row["terms"].values())
        assert row["loss"] == pytest.approx(total, rel=LOSS_RELATIVE_ERROR)
        assert row["lr"] == learning_rate(spec(), row["step"])
        assert 1 <= row["logit_scale"] <= 100 * (1 + 1e-6)


def test_a_baseline_has_the_task_alone(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    train(tmp_path, tiny_samples, None, steps=4)
    for row in rows(tmp_path):
        assert list(row["terms"]) == ["task"]
        assert row["terms"]["task"]["unweighted"] == row["loss"]
    assert not (tmp_path / "heads.pt").exists()


def test_weights_change_the_sum_and_not_the_terms(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    train(tmp_path, tiny_samples, wide_teacher_folder, steps=4, loss_weights=LossWeights(task=0, crd=2, fd=0, icl=0.5))
    first, usual = rows(tmp_path)[0], rows(uninterrupted)[0]
    for name, term in first["terms"].items():
        assert term["unweighted"] == usual["terms"][name]["unweighted"]
    expected = 2 * usual["terms"]["crd"]["unweighted"] + 0.5 * usual["terms"]["icl"]["unweighted"]
    assert first["loss"] == pytest.approx(expected, rel=LOSS_RELATIVE_ERROR)


def test_the_result_says_what_the_manifest_should(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    student = load_model(STUDENT, random_seed=0)
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    said = distil(spec(steps=4), student, None, data, tmp_path, silent)
    assert said["steps"] == 4
    assert said["train_s"] >= said["teacher_s"] == 0.0


# The teacher.


def test_stored_features_are_what_the_teacher_says_live(tiny_samples: TrainingSet, wide_teacher_folder: Path) -> None:
    teacher, data = load_model(wide_teacher_folder), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    stored = teacher_features(teacher, data, 2, silent)
    views = set()
    for step in (0, 5, data.steps_per_epoch + 1):
        batch = data.batch(step)
        views.add(batch.view)
        found = stored.of(batch)
        with torch.inference_mode():
            image_BE = unit_image_features(teacher.net, teacher.normalise(batch.pixels_B3HH))
            text_BE = unit_text_features(teacher.net, teacher.tokenize(batch.captions_B))
        assert (found.image_BE - image_BE).abs().max() < MAX_FEATURE_ERROR
        assert (found.text_BE - text_BE).abs().max() < MAX_FEATURE_ERROR
        assert found.logit_scale.item() == teacher.logit_scale.item()
    assert views == {0, 1}


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(
    tiny_samples: TrainingSet, teacher_folder: Path
) -> None:
    teacher, data = load_model(teacher_folder), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    batch = data.batch(0)
    with torch.no_grad():
        image_BD = teacher.net.encode_image(teacher.normalise(batch.pixels_B3HH))
        text_BD = teacher.net.encode_text(teacher.tokenize(batch.captions_B))
        weights = LossWeights().model_dump()
        heads = DistillationHeads(teacher.embed_dim, teacher.embed_dim, weights)
        found = teacher_features(teacher, data, 1, silent).of(batch)
        terms = loss_terms(heads(image_BD, text_BD, found), teacher.logit_scale, found, heads, weights)
    assert terms["crd"].item() < MAX_FEATURE_ERROR
    assert terms["fd"].item() < MAX_FEATURE_ERROR


# The optimizer and its schedule.


def test_the_learning_rate_is_the_papers() -> None:
    with np.load(GOLDEN) as golden:
        expected = golden["sched.lr_base1e-3_warm100_total1000_steps0..999"]
    schedule = spec(lr=1e-3, warmup=100, steps=1000)
    assert [learning_rate(schedule, step) for step in range(1000)] == pytest.approx(
        expected.tolist(), rel=SCHEDULE_RELATIVE_ERROR
    )


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(spec(warmup=0, lr=0.5), 0) == 0.5


def test_matrices_decay_and_vectors_do_not() -> None:
    student, heads = load_model(STUDENT, random_seed=0), DistillationHeads(128, 48, LossWeights().model_dump())
    optimizer = _optimizer(student.net, heads, spec(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(student.net.named_parameters()) | dict(heads.named_parameters(prefix="heads"))
    assert len(decay) == len(parameters), "every parameter, the heads' too, in one group"
    for name, parameter in parameters.items():
        assert decay[id(parameter)] == (0.3 if parameter.ndim >= 2 else 0.0), name
    assert decay[id(student.net.logit_scale)] == 0
    assert decay[id(student.net.transformer.resblocks[0].mlp.c_fc.bias)] == 0
    assert decay[id(student.net.transformer.resblocks[0].mlp.c_fc.weight)] == 0.3


def test_betas_are_by_the_image_tower() -> None:
    heads = DistillationHeads(8, 8, LossWeights().model_dump())
    tower = VisionTransformer(image_size=8, patch_size=4, width=8, layers=1, heads=1, mlp_ratio=2, output_dim=8)
    transformer = _optimizer(SimpleNamespace(visual=tower, parameters=tower.parameters), heads, spec())  # type: ignore[arg-type]
    assert (transformer.defaults["betas"], transformer.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    convolutional = _optimizer(load_model(STUDENT, random_seed=0).net, heads, spec())
    assert (convolutional.defaults["betas"], convolutional.defaults["eps"]) == ((0.9, 0.999), 1e-8)
