"""Training: the loss falls, the same seed gives the same bytes, an interruption changes none, and the log adds up."""

import ast
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, STUDENT, Ended
from golden import golden_values
from torch import Tensor, nn
from training import (
    BATCH_SIZE,
    EVERY_STEP,
    STEPS,
    assert_same_run,
    cache_of,
    configured,
    files,
    last_state,
    rows,
    silent,
    spec,
    train,
)

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TEMPLATES, TrainingSet, eval_set
from toolchain.distillation import distill as distil_module
from toolchain.distillation import objectives, training_log
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.distill import CHECKPOINTS, HEADS, Training, distill, learning_rate
from toolchain.distillation.features import BatchFeatures, StudentFeatures, TeacherFeatures
from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.heads import DistillationHeads
from toolchain.distillation.loader import load_batches
from toolchain.distillation.losses import MAX_LOGIT_SCALE
from toolchain.distillation.objectives import OBJECTIVES, weighted_loss
from toolchain.distillation.teacher import CachedTeacher, LiveTeacher, live_teacher
from toolchain.distillation.training_log import _similarity
from toolchain.distillation.training_module import TrainingModule, clip_gradients, make_optimizer
from toolchain.distillation.training_options import TrainingOptions
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError, Interrupted, UsageError
from toolchain.evaluation.eval_set import classes_set
from toolchain.evaluation.torch_encoders import headline_accuracy
from toolchain.models.build import load_model, save_model
from toolchain.models.towers import unit_image_features, unit_text_features
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.load import load_recipe
from toolchain.recipe.model_names import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")

# A teacher sees a sample in other company when its features are stored: float32 sums in another order.
MAX_FEATURE_ERROR = 1e-5
# That difference in every step's terms, through the updates it causes.
MAX_RELATIVE_TERM_ERROR = 1e-3
# The same in the first steps, before the updates of Adam amplify it, and at the end: from 1e-7 it grows to 4e-3 in ten
# steps, through batch norms over ten rows.
NUM_FIRST_STEPS, MAX_FIRST_TERM_ERROR, MAX_LAST_TERM_ERROR = 4, 1e-5, 2e-2
# The loss is a float32 sum of four terms, each logged after rounding.
LOSS_RELATIVE_ERROR = 1e-6
# Both sides are float64 cosines of the same angle.
SCHEDULE_RELATIVE_ERROR = 1e-12
# float32 sums over some thousand numbers in another order.
NORM_RELATIVE_ERROR = 1e-5
# bfloat16 keeps 8 bits: 0.4 % a rounding, some of which add up through a tower, a step and the steps before it.
MAX_BF16_RELATIVE_TERM_ERROR = 0.15
MIN_BF16_TEACHER_COSINE = 0.999
# float16 keeps 11 bits, and so does every rounding on the way back through a tower.
MAX_FP16_RELATIVE_NORM_ERROR = 0.02
# exp(float32(ln 100)) is 100 but for rounding.
MAX_SCALE = MAX_LOGIT_SCALE * (1 + 1e-6)


class Stop(Exception):
    """What the tests interrupt with."""


def stopping(at: int, during: str = "training") -> Callable[..., None]:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if what == during and done >= at:
            raise Stop

    return progress


class _Poisoned(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def poison(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Tensor], calls: range
) -> Callable[[], None]:
    """Change the loss that one objective takes part in, in some of its calls, one a step; returns what undoes that."""
    real, made = objectives.sum_in_blocks, [0]

    def changed(sweeps: Any, weights: Any, memory_mb: float) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = real(sweeps, weights, memory_mb)
        if name not in terms:
            return total, terms
        made[0] += 1
        return (change(total), terms | {name: change(terms[name])}) if made[0] - 1 in calls else (total, terms)

    monkeypatch.setattr(objectives, "sum_in_blocks", changed)
    return lambda: monkeypatch.setattr(objectives, "sum_in_blocks", real)


@pytest.fixture(scope="session")
def wide_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another embedding width, so that the heads have something to learn."""
    parent = tmp_path_factory.mktemp("wide")
    (parent / "teacher").mkdir()
    save_model(
        load_model(configured(parent / "config", model_cfg={"embed_dim": 48}), random_seed=11), parent / "teacher"
    )
    return parent / "teacher"


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyphs student with a vision transformer, which drops patches and can be masked."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "patch_dropout": 0.25}
    return configured(tmp_path_factory.mktemp("vit") / "config", model_cfg={"vision_cfg": vision})


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_samples: TrainingSet, wide_teacher_folder: Path
) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before the fixture that does it for each test
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, tiny_samples, wide_teacher_folder, cached=True)
    torch.set_num_threads(threads)
    return folder


# A run.


@pytest.mark.parametrize("distilled", [True, False])
def test_the_loss_falls(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, distilled: bool) -> None:
    _, first_N = np.unique(tiny_samples.character_N, return_index=True)
    one_batch_N = first_N[:BATCH_SIZE]  # the same characters at every step
    samples = TrainingSet(
        tiny_samples.masks_NSS[one_batch_N], tiny_samples.character_N[one_batch_N], tiny_samples.names[:BATCH_SIZE]
    )
    train(tmp_path, samples, teacher_folder if distilled else None, steps=20)
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
        ".scratch",
        "heads.safetensors",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tensorboard",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.jsonl",
    ]


def test_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    train(tmp_path / "same", tiny_samples, wide_teacher_folder, cached=True)
    assert_same_run(tmp_path / "same", uninterrupted)
    train(tmp_path / "other", tiny_samples, wide_teacher_folder, cached=True, seed=1)
    assert rows(tmp_path / "other") != rows(uninterrupted)


def test_loaders_change_nothing(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    options = TrainingOptions(workers=2)
    train(tmp_path, tiny_samples, wide_teacher_folder, options=options, cached=True)
    assert_same_run(tmp_path, uninterrupted)


def test_epochs_are_so_many_steps(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    per_epoch = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2).steps_per_epoch
    train(tmp_path, tiny_samples, None, steps=None, epochs=2, warmup=0)
    assert len(rows(tmp_path)) == 2 * per_epoch
    with pytest.raises(UsageError) as caught:
        train(tmp_path, tiny_samples, None, steps=None, epochs=2, warmup=2 * per_epoch)
    assert str(caught.value) == (
        f"distill.warmup ({2 * per_epoch}) must be less than the {2 * per_epoch} steps of 2 epochs"
    )


def test_a_task_without_weight_needs_a_teacher(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    with pytest.raises(UsageError, match=r"loss_weights\.task is 0 and there is no teacher; nothing to train"):
        train(tmp_path, tiny_samples, None, loss_weights=LossWeights(task=0))


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_done(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path
) -> None:
    processes = Processes(0, 3, torch.device("cpu"))
    with pytest.raises(UsageError, match="batch_size 8 cannot be split evenly over 3 ranks"):
        train(tmp_path, tiny_samples, teacher_folder, processes=processes, cached=True)
    assert list(tmp_path.iterdir()) == []


# Interrupted.


@pytest.mark.parametrize(
    ("at", "every_steps"),
    [(1, 1), (int(np.random.default_rng(0).integers(2, STEPS)), 1), (STEPS, 1), (3, None), (7, 3)],
    ids=["at the first step", "at a random step", "at the last step", "before a checkpoint", "between checkpoints"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path,
    tiny_samples: TrainingSet,
    wide_teacher_folder: Path,
    uninterrupted: Path,
    at: int,
    every_steps: int | None,
) -> None:
    changes: dict[str, Any] = {"options": TrainingOptions(checkpoint_steps=every_steps), "cached": True}
    with pytest.raises(Stop):
        train(tmp_path, tiny_samples, wide_teacher_folder, stopping(at), **changes)
    saved = 0 if every_steps is None else (at - 1) // every_steps * every_steps
    checkpoint = Checkpoints(tmp_path / CHECKPOINTS).load(lambda text: None)
    assert (checkpoint["step"] if checkpoint else 0) == saved
    assert len(rows(tmp_path)) >= saved, "a row is logged before the checkpoint that follows it"
    assert not (tmp_path / "open_clip_model.safetensors").exists()
    done: list[tuple[str, int]] = []
    train(tmp_path, tiny_samples, wide_teacher_folder, lambda what, step, *_: done.append((what, step)), **changes)
    assert done[0] == ("training", saved + 1), "it continues, and the teacher is not asked again"
    assert_same_run(tmp_path, uninterrupted)


def test_interrupted_twice_and_in_the_teacher(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    changes: dict[str, Any] = {"options": EVERY_STEP, "cached": True}
    for progress in (stopping(1, "teacher features"), stopping(5), stopping(5), stopping(11)):
        with pytest.raises(Stop):
            train(tmp_path, tiny_samples, wide_teacher_folder, progress, **changes)
    train(tmp_path, tiny_samples, wide_teacher_folder, **changes)
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_only_saves_again(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    """As after a kill between the end of training and the end of its stage."""
    train(tmp_path, tiny_samples, teacher_folder, cached=True)
    before = files(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    done: list[str] = []
    train(tmp_path, tiny_samples, teacher_folder, lambda what, *_: done.append(what), cached=True)
    assert done == []
    assert files(tmp_path) == before
    assert len(rows(tmp_path)) == STEPS


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_everything_that_a_step_depends_on_is_in_a_checkpoint(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, vit_folder: Path, precision: str
) -> None:
    """Every objective, masks, patch dropout, clipping, and a gradient scaler that has already changed its scale."""
    weights = LossWeights(**dict.fromkeys(OBJECTIVES, 1.0) | {"gd": 0.01, "sigmoid_kd": 0.0})
    changes: dict[str, Any] = {"loss_weights": weights, "precision": precision, "grad_clip_norm": 1.0}
    changes |= {"student": vit_folder, "mask_ratio": 0.5, "options": EVERY_STEP}
    train(tmp_path / "whole", tiny_samples, teacher_folder, **changes)
    whole = last_state(tmp_path / "whole")
    if precision == "fp16":
        assert 1 < whole["scaler"]["scale"] < 65536, "the first scale was too large"
        skipped = [row["grad_norm"] is None for row in rows(tmp_path / "whole")]
        assert any(skipped[:3])
        assert not all(skipped)
    else:
        assert whole["scaler"] == {}
    for at in (3, 9):
        with pytest.raises(Stop):
            train(tmp_path / "parts", tiny_samples, teacher_folder, stopping(at), **changes)
    train(tmp_path / "parts", tiny_samples, teacher_folder, **changes)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_towers_own_dropout_is_a_function_of_the_step(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    config = json.loads((STUDENT / CONFIG).read_text())["model_cfg"]["vision_cfg"] | {"timm_drop": 0.5}
    student = configured(tmp_path / "config", model_cfg={"vision_cfg": config})
    for name in ("whole", "again"):
        train(tmp_path / name, tiny_samples, None, student=student)
    with pytest.raises(Stop):
        train(tmp_path / "parts", tiny_samples, None, stopping(6), student=student, options=EVERY_STEP)
    train(tmp_path / "parts", tiny_samples, None, student=student)
    for name in ("again", "parts"):
        assert_same_run(tmp_path / name, tmp_path / "whole")
    train(tmp_path / "without", tiny_samples, None)
    assert rows(tmp_path / "without") != rows(tmp_path / "whole"), "something is dropped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_asked_to_stop_it_keeps_the_step_it_is_in(
    tmp_path: Path,
    tiny_samples: TrainingSet,
    wide_teacher_folder: Path,
    uninterrupted: Path,
    number: signal.Signals,
    workers: int,
) -> None:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if what == "training" and done == 5:
            os.kill(os.getpid(), number)

    options, handlers = TrainingOptions(workers=workers), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    changes: dict[str, Any] = {"options": options, "cached": True}
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, tiny_samples, wide_teacher_folder, progress, **changes)
    assert caught.value.exit_code == 130
    # It came after the processes had agreed on step 5.
    assert str(caught.value) == f"{tmp_path}: stopped after step 6 of 11; run the same command to resume"
    assert last_state(tmp_path)["step"] == 6
    assert len(rows(tmp_path)) == 6
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    done: list[int] = []
    train(tmp_path, tiny_samples, wide_teacher_folder, lambda _, step, *__: done.append(step), **changes)
    assert done[0] == 7
    assert_same_run(tmp_path, uninterrupted)


def test_asked_to_stop_at_the_last_step_it_finishes(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if what == "training" and done == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path, tiny_samples, wide_teacher_folder, progress, cached=True)
    assert_same_run(tmp_path, uninterrupted)


def test_a_second_signal_acts_at_once(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigpending()  # somewhere to be interrupted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stop):
            train(tmp_path, tiny_samples, None, progress, options=EVERY_STEP)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert last_state(tmp_path)["step"] == 4


# What is not finite.


def test_a_loss_that_is_not_a_number_stops_with_its_step(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", tiny_samples, None)
    heal = poison(monkeypatch, "task", lambda loss: loss * math.nan, range(4, 99))
    with pytest.raises(ClipkdError) as caught:
        train(tmp_path / "run", tiny_samples, None, options=TrainingOptions(checkpoint_steps=3))
    sample_B = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2).batch(4, slice(None), []).sample_B.tolist()
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: the loss is not finite at step 4, in task (terms {{'task': nan}}; samples {sample_B}). "
        "The last checkpoint is intact; lower distill.lr"
    )
    state = last_state(tmp_path / "run")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["trained"].values() if value.is_floating_point())
    assert not (tmp_path / "run" / "open_clip_model.safetensors").exists()
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    heal()
    train(tmp_path / "run", tiny_samples, None)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_term_that_is_not_finite_is_named(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, "icl", lambda loss: loss + value, range(2, 99))
    with pytest.raises(ClipkdError, match=r"the loss is not finite at step 2, in icl \(terms \{'task': "):
        train(tmp_path, tiny_samples, teacher_folder, options=EVERY_STEP)
    assert last_state(tmp_path)["step"] == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_that_of_its_term(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, "fd", lambda loss: _Poisoned.apply(loss, value), range(2, 99))
    before = load_model(STUDENT, random_seed=0)
    with pytest.raises(ClipkdError) as caught:
        train(tmp_path, tiny_samples, teacher_folder, options=EVERY_STEP)
    assert f"{tmp_path}: the gradient is not finite at step 2, in fd (terms " in str(caught.value)
    assert "nan" not in str(caught.value), "every term is finite"
    state = last_state(tmp_path)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["trained"].values() if value.is_floating_point())
    assert any(not torch.equal(state["trained"][f"net.{n}"], p) for n, p in before.net.named_parameters())


def test_the_samples_of_a_large_batch_are_named_in_part(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "task", lambda loss: loss * math.nan, range(99))
    student, data = load_model(STUDENT, random_seed=0), GlyphBatches(tiny_samples, 0, 10, 2)
    with pytest.raises(ClipkdError) as caught:
        distill(Training(spec(batch_size=10), student, None, data), tmp_path, silent)
    sample_B = data.batch(0, slice(None), []).sample_B.tolist()
    assert f"samples {sample_B[:8]} and others). " in str(caught.value)


def test_half_precision_skips_a_step_that_overflows(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, Tensor]] = []

    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if done > 1:  # the state after the step before this one
            kept.append(last_state(tmp_path)["trained"])

    poison(monkeypatch, "task", lambda loss: _Poisoned.apply(loss, math.inf), range(6, 8))
    train(tmp_path, tiny_samples, None, progress, options=EVERY_STEP, precision="fp16")
    kept.append(last_state(tmp_path)["trained"])
    norms = [row["grad_norm"] for row in rows(tmp_path)]
    assert norms[6:8] == [None, None]
    assert None not in norms[8:]
    parameters = {f"net.{name}" for name, _ in load_model(STUDENT, random_seed=0).net.named_parameters()}
    for before, after, norm in zip(kept, kept[1:], norms[1:], strict=False):
        moved = any(not torch.equal(before[name], after[name]) for name in parameters)
        assert moved == (norm is not None)


def test_half_precision_logs_and_clips_gradients_without_the_scalers_factor(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path
) -> None:
    """At weights that stay where they are: by 65,536 and less, they would be far from float32's."""
    for precision in ("fp32", "fp16"):
        train(tmp_path / precision, tiny_samples, teacher_folder, precision=precision, lr=1e-12)
    norms = [[row["grad_norm"] for row in rows(tmp_path / precision)] for precision in ("fp32", "fp16")]
    assert sum(norm is not None for norm in norms[1]) > 3
    for exact, norm in zip(*norms, strict=True):
        assert norm is None or norm == pytest.approx(exact, rel=MAX_FP16_RELATIVE_NORM_ERROR)


def test_half_precision_that_always_overflows_stops(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "task", lambda loss: _Poisoned.apply(loss, math.inf), range(99))
    with pytest.raises(ClipkdError, match=r"the gradient is not finite at step 17, in task \("):
        train(tmp_path, tiny_samples, None, precision="fp16", steps=30)  # 2^16 halved to less than 1


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
        assert row["lr"] == learning_rate(spec(), row["step"] * 0 + STEPS, row["step"])
        assert 1 <= row["logit_scale"] <= MAX_SCALE
        assert 1 <= row["cross_logit_scale"] <= MAX_SCALE
        assert row["grad_norm"] > 0
        assert set(row["similarity"]) == {"image", "text"}
        assert all(-1 <= value <= 1 for value in row["similarity"].values())
    for line in (uninterrupted / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["images_per_s"] > 0
        assert 0 <= row["data_fraction"] <= 1
        assert 0 <= row["teacher_fraction"] <= 1
        assert row["data_fraction"] + row["teacher_fraction"] < 1, "something is left to train in"


def test_time_is_spent_where_the_log_says(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only loading and the teacher move: 3 s and 1 s of a step's 4."""
    now = [0.0]
    monkeypatch.setattr(distil_module.time, "monotonic", lambda: now[0])
    real_batch, real_features = GlyphBatches.batch, LiveTeacher.features

    def batch(*arguments: Any) -> Any:
        now[0] += 3
        return real_batch(*arguments)

    def features(*arguments: Any) -> Any:
        now[0] += 1
        return real_features(*arguments)

    monkeypatch.setattr(GlyphBatches, "batch", batch)
    monkeypatch.setattr(LiveTeacher, "features", features)
    train(tmp_path, tiny_samples, teacher_folder, steps=4, options=TrainingOptions(checkpoint_minutes=math.inf))
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["images_per_s"], row["data_fraction"], row["teacher_fraction"]) == (BATCH_SIZE / 4, 0.75, 0.25)


def test_a_baseline_has_the_task_alone(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    train(tmp_path, tiny_samples, None, steps=4)
    for row in rows(tmp_path):
        assert list(row["terms"]) == ["task"]
        assert row["terms"]["task"]["unweighted"] == row["loss"]
        assert set(row) == {"step", "loss", "lr", "grad_norm", "logit_scale", "terms"}
    assert not (tmp_path / HEADS).exists()


def test_weights_change_the_sum_and_not_the_terms(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    weights = LossWeights(task=0, crd=2, fd=0, icl=0.5)
    train(tmp_path, tiny_samples, wide_teacher_folder, steps=4, loss_weights=weights, cached=True)
    first, usual = rows(tmp_path)[0], rows(uninterrupted)[0]
    assert list(first["terms"]) == ["crd", "icl"]
    for name, term in first["terms"].items():
        assert term["unweighted"] == usual["terms"][name]["unweighted"]
    expected = 2 * usual["terms"]["crd"]["unweighted"] + 0.5 * usual["terms"]["icl"]["unweighted"]
    assert first["loss"] == pytest.approx(expected, rel=LOSS_RELATIVE_ERROR)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sigmoid_kd"])
def test_every_objective_trains_alone(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, vit_folder: Path, objective: str
) -> None:
    weights = LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | {objective: 1.0})
    train(tmp_path, tiny_samples, wide_teacher_folder, student=vit_folder, loss_weights=weights, steps=4)
    logged = rows(tmp_path)
    assert [list(row["terms"]) for row in logged] == [[objective]] * 4
    assert logged[-1]["loss"] != logged[0]["loss"]
    start = load_model(vit_folder, random_seed=0).net.state_dict()
    moved = {n for n, value in load_model(tmp_path).net.state_dict().items() if not torch.equal(value, start[n])}
    assert {"visual.conv1.weight", "token_embedding.weight"} <= moved, "it reaches the bottom of both towers"
    assert ("logit_scale" in moved) == (objective in ("task", "crd", "gd", "affinity"))
    if objective == "affinity":
        assert load_model(tmp_path).logit_scale.item() == pytest.approx(50), "that of the loss: nothing else trains it"


def test_the_result_says_what_the_manifest_should(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    student = load_model(STUDENT, random_seed=0)
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    said = distill(Training(spec(steps=4), student, None, data), tmp_path, silent)
    assert set(said) == {"train_s", "steps", "processes", "device"}
    assert (said["steps"], said["processes"], said["device"]) == (4, 1, "cpu")
    assert said["train_s"] >= 0.0


def test_the_time_of_interrupted_attempts_counts(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once whenever a step is announced."""
    now = [0.0]
    monkeypatch.setattr(distil_module.time, "monotonic", lambda: now[0])

    def ticking(stop: int) -> Callable[..., None]:
        def progress(what: str, done: int, total: int, note: str = "") -> None:
            now[0] += 1
            if done == stop:
                raise Stop

        return progress

    student, data = load_model(STUDENT, random_seed=0), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    monkeypatch.setattr(training_log.StepTimes, "shares", lambda *_: {"images_per_s": 1.0})  # its steps take no time
    with pytest.raises(Stop):
        distill(Training(spec(), student, None, data), tmp_path, ticking(6), options=EVERY_STEP)
    student = load_model(STUDENT, random_seed=0)
    said = distill(Training(spec(), student, None, data), tmp_path, ticking(99), options=EVERY_STEP)
    assert said["train_s"] == STEPS, "5 steps that were kept, and the 6 after them"


@pytest.mark.parametrize("width", [16, 24])
def test_similarity_is_the_mean_cosine(width: int) -> None:
    random = np.random.default_rng(0)

    def unit(columns: int) -> Tensor:
        return nn.functional.normalize(torch.from_numpy(random.standard_normal((5, columns))), dim=-1)

    image_BD, text_BD, image_BE, text_BE = unit(16), unit(16), unit(width), unit(width)
    projected = (unit(width), unit(width)) if width != 16 else (None, None)
    taught = TeacherFeatures(image_BE, text_BE, torch.tensor(1.0))
    found = _similarity(StudentFeatures(image_BD, text_BD, *projected), taught)
    for name, student, teacher in (
        ("image", projected[0] if width != 16 else image_BD, image_BE),
        ("text", projected[1] if width != 16 else text_BD, text_BE),
    ):
        assert student is not None
        cosines = [sum(student[b, d] * teacher[b, d] for d in range(width)).item() for b in range(5)]
        assert found[name].item() == pytest.approx(sum(cosines) / 5, rel=1e-12)
    if width != 16:
        assert _similarity(StudentFeatures(image_BD, text_BD), taught) == {}, "nothing maps one to the other"


# Evaluation while training.


def test_evaluations_are_logged_and_change_nothing_else(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    stix = eval_set("stix")
    accuracy = headline_accuracy(classes_set("stix", stix.images_KHWC[:40], stix.names[:40], TEMPLATES))
    changes: dict[str, Any] = {"accuracy": accuracy, "evaluate_every": 4, "cached": True}
    changes["options"] = EVERY_STEP
    with pytest.raises(Stop):
        train(tmp_path, tiny_samples, wide_teacher_folder, stopping(9), **changes)
    student = train(tmp_path, tiny_samples, wide_teacher_folder, **changes)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged if "accuracy" in row] == [3, 7, STEPS - 1]
    assert logged[-1]["accuracy"] == accuracy(student, ALONE)
    assert logged[3]["accuracy"]["n"] == 40
    for row in logged:
        row.pop("accuracy", None)
    assert logged == rows(uninterrupted)
    assert files(tmp_path) == files(uninterrupted)


# The teacher.


def test_stored_features_are_what_the_teacher_says_live(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path
) -> None:
    teacher, data = load_model(wide_teacher_folder), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    live = live_teacher(teacher, "fp32", torch.device("cpu"))
    cache = cache_of(teacher, data, tmp_path)
    stored = CachedTeacher(torch.tensor(cache.logit_scale))
    views = set()
    for step in (0, 5, data.steps_per_epoch + 1):
        student = load_model(STUDENT, random_seed=0)
        (batch,) = load_batches(data, range(step, step + 1), slice(None), student, teacher, 0)
        views.add(batch.view)
        (looked_up,) = load_batches(data, range(step, step + 1), slice(None), student, cache, 0)
        found, said = stored.features(looked_up), live.features(batch)
        with torch.inference_mode():
            assert batch.teacher_pixels is not None
            image_BE = unit_image_features(teacher.net, teacher.normalise(batch.teacher_pixels))
            text_BE = unit_text_features(teacher.net, teacher.tokenize(batch.captions_b))
        for each in (found, said):
            assert (each.image_BE - image_BE).abs().max() < MAX_FEATURE_ERROR
            assert (each.text_BE - text_BE).abs().max() < MAX_FEATURE_ERROR
            assert each.logit_scale.item() == teacher.logit_scale.item()
    assert views == {0, 1}


def test_stored_features_train_as_the_teacher_does_live(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    train(tmp_path, tiny_samples, wide_teacher_folder)
    for found, expected in zip(rows(tmp_path), rows(uninterrupted), strict=True):
        assert found["terms"].keys() == expected["terms"].keys()
        for name, term in found["terms"].items():
            value = expected["terms"][name]["unweighted"]
            error = MAX_FIRST_TERM_ERROR if found["step"] < NUM_FIRST_STEPS else MAX_LAST_TERM_ERROR
            assert term["unweighted"] == pytest.approx(value, rel=error), (found["step"], name)
        for name, cosine in found["similarity"].items():
            assert cosine == pytest.approx(expected["similarity"][name], abs=MAX_RELATIVE_TERM_ERROR)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path
) -> None:
    teacher, data = load_model(teacher_folder), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    live = live_teacher(teacher, "fp32", torch.device("cpu"))
    cache = cache_of(teacher, data, tmp_path)
    stored = CachedTeacher(torch.tensor(cache.logit_scale))
    (batch,) = load_batches(data, range(1), slice(None), teacher, teacher, 0)
    (looked_up,) = load_batches(data, range(1), slice(None), teacher, cache, 0)
    with torch.no_grad():
        image_BD = teacher.net.encode_image(teacher.normalise(batch.student_pixels))  # type: ignore[operator]
        text_BD = teacher.encode_text(batch.student_ids)
        weights = LossWeights().model_dump()
        heads = DistillationHeads(teacher.embed_dim, teacher.embed_dim, weights)
        for taught in (live.features(batch), stored.features(looked_up)):
            features = heads(image_BD, text_BD, taught)
            own = BatchFeatures(features, taught)
            _, terms = weighted_loss(own, own, heads.scales(teacher.logit_scale), weights)
            assert terms["crd"].item() < MAX_FEATURE_ERROR
            assert terms["fd"].item() < MAX_FEATURE_ERROR
            for cosine in _similarity(features, taught).values():
                assert cosine.item() == pytest.approx(1, abs=MAX_FEATURE_ERROR)


def test_the_teacher_stays_as_it_was(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    teacher, student = load_model(teacher_folder), load_model(STUDENT, random_seed=0)
    before = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    distill(Training(spec(steps=4), student, teacher, data), tmp_path, silent)
    assert not teacher.net.training
    assert all(parameter.grad is None for parameter in teacher.net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())


def test_a_teacher_in_bfloat16_is_near_the_float32_one(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    said = []
    for precision in ("fp32", "bf16"):
        teacher, data = load_model(wide_teacher_folder), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
        (batch,) = load_batches(data, range(1), slice(None), load_model(STUDENT, random_seed=0), teacher, 0)
        live = live_teacher(teacher, precision, torch.device("cpu"))  # type: ignore[arg-type]
        said.append(live.features(batch))
        assert {p.dtype for p in teacher.net.parameters()} == {live.dtype}
    for name in ("image_BE", "text_BE"):
        exact_BE, near_BE = (getattr(taught, name) for taught in said)
        assert near_BE.dtype == torch.float32
        assert not torch.equal(near_BE, exact_BE)
        assert (near_BE.norm(dim=1) - 1).abs().max() < MAX_FEATURE_ERROR
        assert (near_BE * exact_BE).sum(1).min() > MIN_BF16_TEACHER_COSINE
    assert said[0].logit_scale.item() == said[1].logit_scale.item(), "not rounded with the weights"
    train(tmp_path, tiny_samples, wide_teacher_folder, teacher_precision="bf16")
    for found, expected in zip(rows(tmp_path), rows(uninterrupted), strict=True):
        for name, term in found["terms"].items():
            value = expected["terms"][name]["unweighted"]
            assert term["unweighted"] == pytest.approx(value, rel=MAX_BF16_RELATIVE_TERM_ERROR), (found["step"], name)


def test_a_full_gpu_says_what_to_lower(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(Forward, "run", full)
    with pytest.raises(ClipkdError) as caught:
        train(tmp_path, tiny_samples, teacher_folder)
    assert str(caught.value) == (
        "the GPU is out of memory: tried to allocate 2 GiB. Lower distill.batch_size (8) or train on more ranks "
        "(torchrun); or set distill.precision: bf16; or set distill.teacher_precision: bf16"
    )


# Precision, layout, scales.


@contextmanager
def watched(module: nn.Module, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Every pass through a module: its input and its output."""

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    hook = module.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_towers_run_in_16_bits_and_losses_in_32(
    tiny_samples: TrainingSet, wide_teacher_folder: Path, precision: str, dtype: torch.dtype
) -> None:
    student, teacher = load_model(STUDENT, random_seed=0), load_model(wide_teacher_folder)
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    (batch,) = load_batches(data, range(1), slice(None), student, teacher, 0)
    taught = live_teacher(teacher, "fp32", torch.device("cpu")).features(batch)
    asked = spec(precision=precision)
    trained = TrainingModule(student, teacher, asked, ALONE)
    seen: list[tuple[Tensor, Tensor]] = []
    with watched(student.net.visual, seen):  # type: ignore[arg-type]
        done = Forward(trained, trained, asked, ALONE, 0).run(batch, taught, 0)
    assert [output.dtype for _, output in seen] == [dtype]
    numbers = {"loss": done.loss, **done.terms, **done.scales._asdict(), **done.everyone.student._asdict()}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    assert {name: value.dtype for name, value in numbers.items()} == dict.fromkeys(numbers, torch.float32)
    done.loss.backward()  # type: ignore[no-untyped-call]
    assert {p.grad.dtype for p in trained.parameters() if p.grad is not None} == {torch.float32}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


def test_bfloat16_trains_nearly_as_float32(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    train(tmp_path, tiny_samples, wide_teacher_folder, precision="bf16", cached=True)
    logged = rows(tmp_path)
    assert logged != rows(uninterrupted)
    for found, expected in zip(logged, rows(uninterrupted), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=MAX_BF16_RELATIVE_TERM_ERROR), found["step"]


@pytest.mark.parametrize("tower", ["convolutional", "transformer"])
def test_convolutional_towers_run_with_channels_last(
    tmp_path: Path, tiny_samples: TrainingSet, vit_folder: Path, tower: str
) -> None:
    """Also after a resume, of which the weights and the optimizer's moments come from a file."""
    folder = STUDENT if tower == "convolutional" else vit_folder
    with pytest.raises(Stop):
        train(tmp_path, tiny_samples, None, stopping(3), student=folder, options=EVERY_STEP)
    student, seen = load_model(folder, random_seed=0), []
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    visual: Any = student.net.visual
    student.probe_fast_paths()
    with watched(visual if tower == "convolutional" else visual.conv1, seen):
        distill(Training(spec(), student, None, data), tmp_path, silent)
    seen = [passed for passed in seen if len(passed[0]) == BATCH_SIZE]  # not what it is asked with before it trains
    assert len(seen) == STEPS - 2
    layout = torch.channels_last if tower == "convolutional" else torch.contiguous_format
    assert all(pixels.is_contiguous(memory_format=layout) for pixels, _ in seen)
    kernels = [p for p in student.net.visual.parameters() if p.ndim == 4 and min(p.shape[1:3]) > 1]  # type: ignore[union-attr]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    assert not kernels[0].is_contiguous() or tower == "transformer"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
def test_compiled_towers_train_as_others_do(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path
) -> None:
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    for name in ("usual", "compiled"):
        train(tmp_path / name, tiny_samples, wide_teacher_folder, compile=name == "compiled", steps=6)
    for found, expected in zip(rows(tmp_path / "compiled"), rows(tmp_path / "usual"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=MAX_RELATIVE_TERM_ERROR), found["step"]
    assert files(tmp_path / "compiled").keys() == files(tmp_path / "usual").keys()
    names = [list(load_model(tmp_path / name).net.state_dict()) for name in ("usual", "compiled")]
    assert names[0] == names[1]


@pytest.mark.parametrize("objectives", [("task", "crd"), ("icl", "afd")])
def test_scales_are_brought_back_into_their_bounds(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, objectives: tuple[str, ...]
) -> None:
    """Which a learning rate of 9 leaves at the first step, up or down."""
    weights = LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | dict.fromkeys(objectives, 1.0))
    train(tmp_path, tiny_samples, teacher_folder, loss_weights=weights, lr=9, warmup=0, steps=3)
    trained = last_state(tmp_path)["trained"]
    logs = {name: value.item() for name, value in trained.items() if "logit_scale" in name}
    moving = {"net.logit_scale"} if "task" in objectives else {k for k in logs if k != "net.logit_scale"}
    assert moving
    for name in moving:
        assert 0 <= logs[name] <= math.log(MAX_SCALE)
        assert logs[name] != pytest.approx(math.log(1 / 0.07)), "it moved"


def test_a_scale_kept_as_a_vector_of_one(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    for name, changes in (("scalar", {}), ("vector", {"nonscalar_logit_scale": True})):
        folder = configured(tmp_path / f"{name} config", model_cfg=changes)
        train(tmp_path / name, tiny_samples, teacher_folder, student=folder, steps=4)
    assert rows(tmp_path / "vector") == rows(tmp_path / "scalar")


# The optimizer and its schedule.


def test_the_learning_rate_is_the_papers() -> None:
    expected = golden_values("sched")["lr_base1e-3_warm100_total1000_steps0..999"]
    schedule = spec(lr=1e-3, warmup=100, steps=1000)
    assert [learning_rate(schedule, 1000, step) for step in range(1000)] == pytest.approx(
        expected.tolist(), rel=SCHEDULE_RELATIVE_ERROR
    )


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(spec(warmup=0, lr=0.5), STEPS, 0) == 0.5


def groups(trained: TrainingModule, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The weight decay of every parameter by name; every trained one is in one group."""
    decay = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in trained.named_parameters() if p.requires_grad}
    assert len(decay) == len(names) == len(dict(decay))
    return {names[key]: value for key, value in decay}


@pytest.mark.parametrize("reference_compat", [False, True])
def test_matrices_decay_and_vectors_do_not(wide_teacher_folder: Path, reference_compat: bool) -> None:
    asked = spec(weight_decay=0.3, reference_compat=reference_compat)
    trained = TrainingModule(load_model(STUDENT, random_seed=0), load_model(wide_teacher_folder), asked, ALONE)
    decay = groups(trained, make_optimizer(trained, asked))
    for name, parameter in trained.named_parameters():
        if name.startswith("heads."):
            expected = 0.01 if parameter.ndim >= 2 or reference_compat else 0.0
        else:
            expected = 0.3 if parameter.ndim >= 2 else 0.0
        assert decay[name] == expected, name
    assert {"heads.image_projection.weight", "heads.log_cross_logit_scale"} < set(decay)
    assert decay["net.logit_scale"] == 0
    assert decay["net.transformer.resblocks.0.mlp.c_fc.bias"] == 0
    assert decay["net.transformer.resblocks.0.mlp.c_fc.weight"] == 0.3


# By the released code's scripts: those with "vit" in their name have a transformer's moments.
STUDENTS = {
    "vit_t_16": True,
    "mobilevit_s": True,
    "swin_t": False,
    "mobilenetv3_small": False,
    "efficientnet_b0": False,
    "resnet18": False,
}


@pytest.mark.parametrize("name", STUDENTS)
def test_groups_and_moments_are_the_papers(name: str) -> None:
    """Its rule is by name too; the counts of ViT-T/16 were taken from its own optimizer."""
    asked = spec(weight_decay=0.1)
    trained = TrainingModule(load_model(REPOSITORY / "recipes" / name, random_seed=0), None, asked, ALONE)
    optimizer = make_optimizer(trained, asked)
    decay = groups(trained, optimizer)
    for parameter_name, parameter in trained.net.named_parameters():
        spared = parameter.ndim < 2 or any(part in parameter_name for part in ("bn", "ln", "bias", "logit_scale"))
        assert decay[f"net.{parameter_name}"] == (0.0 if spared else 0.1), parameter_name
    free = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] != 0 for p in group["params"]]
    if name == "vit_t_16":
        assert (len(free), sum(p.numel() for p in free)) == (200, 91_585)
        assert (len(decayed), sum(p.numel() for p in decayed)) == (102, 46_024_512)
    expected = ((0.9, 0.98), 1e-6) if STUDENTS[name] else ((0.9, 0.999), 1e-8)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == expected
    assert optimizer.defaults["fused"] is True


def test_every_paper_student_was_asked() -> None:
    """Students of the paper's recipes that clipkd includes; the others there are open_clip's own architectures."""
    written = {load_recipe(path).student.model for path in (REPOSITORY / "recipes" / "paper").glob("*.yaml")}
    included = {path.parent for path in (REPOSITORY / "recipes").glob("*/open_clip_config.json")}
    assert {path.name for path in included if str(path) in written or path.name in written} == set(STUDENTS)


def test_one_step_is_adamws(tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path) -> None:
    """The first step of AdamW, by its equations, on the gradient that the loss has: heads included."""
    asked = spec(warmup=0, lr=1e-2, weight_decay=0.3, steps=1)
    student, teacher = load_model(STUDENT, random_seed=0), load_model(wide_teacher_folder)
    torch.manual_seed(0)  # of the heads, as distil does
    before = TrainingModule(student, teacher, asked, ALONE).train()
    start = {name: value.clone() for name, value in before.named_parameters()}
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    (batch,) = load_batches(data, range(1), slice(None), student, teacher, 0)
    taught = live_teacher(teacher, "fp32", torch.device("cpu")).features(batch)
    loss = Forward(before, before, asked, ALONE, 0).run(batch, taught, 0).loss
    loss.backward()  # type: ignore[no-untyped-call]
    train(tmp_path, tiny_samples, wide_teacher_folder, warmup=0, lr=1e-2, weight_decay=0.3, steps=1)
    saved = last_state(tmp_path)["trained"]
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None, name
        decay = (0.01 if name.startswith("heads.") else 0.3) if parameter.ndim >= 2 else 0.0
        # Adam's first step: both moments, once corrected, are the gradient and its square.
        moved = start[name] * (1 - 1e-2 * decay) - 1e-2 * parameter.grad / (parameter.grad.abs() + 1e-8)
        assert (saved[name] - moved).abs().max() < MAX_FEATURE_ERROR, name


# Clipping.


def test_clipping_bounds_the_norm_of_everything(wide_teacher_folder: Path) -> None:
    trained = TrainingModule(load_model(STUDENT, random_seed=0), load_model(wide_teacher_folder), spec(), ALONE)
    random = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    parameters = dict(trained.named_parameters())
    head = parameters["heads.image_projection.weight"]
    assert head.grad is not None
    head.grad *= 100  # which alone would exceed the bound
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    square = sum(float((gradient.double() ** 2).sum()) for gradient in before.values())
    assert clip_gradients(trained, None).item() == pytest.approx(math.sqrt(square), rel=NORM_RELATIVE_ERROR)
    assert all(torch.equal(parameters[name].grad, gradient) for name, gradient in before.items())  # type: ignore[arg-type]
    assert clip_gradients(trained, 2.0).item() == pytest.approx(math.sqrt(square), rel=NORM_RELATIVE_ERROR), "as it was"
    for name, gradient in before.items():
        expected = gradient * (2.0 / math.sqrt(square))
        torch.testing.assert_close(parameters[name].grad, expected, rtol=NORM_RELATIVE_ERROR, atol=0)
    clipped = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    clip_gradients(trained, 3.0)
    assert all(torch.equal(parameters[name].grad, gradient) for name, gradient in clipped.items())  # type: ignore[arg-type]


def test_a_clipped_run_logs_the_norm_before_clipping(
    tmp_path: Path, tiny_samples: TrainingSet, wide_teacher_folder: Path, uninterrupted: Path
) -> None:
    changes: dict[str, Any] = {"cached": True, "grad_clip_norm": 1e-9}  # less than Adam's epsilon
    train(tmp_path, tiny_samples, wide_teacher_folder, **changes)
    found, expected = rows(tmp_path), rows(uninterrupted)
    assert found[0]["grad_norm"] == expected[0]["grad_norm"] > 1
    drift = [abs(row["logit_scale"] - found[0]["logit_scale"]) for row in (found[-1], expected[-1])]
    assert drift[0] < drift[1] / 10, "the steps are smaller"


# Stages: which models a recipe trains, and from where.


Clipkd = Callable[..., Ended]


def stages(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("*/manifest.json"))


def test_a_baseline_is_trained_where_a_recipe_asks_for_one(
    clipkd: Clipkd, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    for baseline in (False, True):
        run = tmp_path / f"run {baseline}"
        assert clipkd("distill", tiny_recipe(baseline=baseline), "--out", run).code == 0
        assert stages(run) == (["baseline", "student", "teacher"] if baseline else ["student", "teacher"])
    terms = {name: list(rows(run / name)[0]["terms"]) for name in ("baseline", "student")}
    assert terms == {"baseline": ["task"], "student": ["task", "crd", "fd", "icl"]}
    first = {name: rows(run / name)[0]["terms"]["task"] for name in ("baseline", "student")}
    assert first["baseline"] == first["student"], "the same student, seed and batch"
    assert files(run / "student") == files(tmp_path / "run False" / "student")


def test_a_teachers_recipe_is_trained_first(clipkd: Clipkd, tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    taught = tiny_recipe("teacher_of_mine", teacher=None, seed=5)
    mine = tiny_recipe(teacher={"recipe": taught.name})
    ended = clipkd("distill", mine, "--out", tmp_path / "run")
    assert ended.code == 0
    assert ended.out == f"{tmp_path / 'run' / 'teacher'}\n{tmp_path / 'run' / 'student'}\n"
    assert clipkd("distill", taught, "--out", tmp_path / "alone").code == 0
    assert files(tmp_path / "run" / "teacher") == files(tmp_path / "alone" / "student")
    manifests = [json.loads((tmp_path / "run" / name / "manifest.json").read_text()) for name in ("teacher", "student")]
    assert manifests[1]["inputs"] == {"teacher": manifests[0]["digest"]}
    again = clipkd("distill", mine, "--out", tmp_path / "run")
    assert [line.split() for line in again.err.splitlines()] == [["teacher", "cached"], ["student", "cached"]]


def test_training_again_gives_the_same_digest(clipkd: Clipkd, tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """So that what comes after the student is not made again: nothing dated or of this machine is in it."""
    path, digests = tiny_recipe(), []
    for _ in range(2):
        assert clipkd("distill", path, "--out", tmp_path / "run").code == 0
        manifest = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
        digests.append(manifest["digest"])
        assert any(name.startswith("tensorboard/") for name in manifest["files"]), "verified all the same"
        assert not any(name.startswith(".scratch") for name in manifest["files"])
        assert not (tmp_path / "run" / "student" / ".scratch").exists()
        shutil.rmtree(tmp_path / "run" / "student")
    assert digests[0] == digests[1]


def test_a_student_starts_from_weights_it_names(
    clipkd: Clipkd, tiny_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    weights = tmp_path / "start.safetensors"
    shutil.copyfile(teacher_folder / "open_clip_model.safetensors", weights)
    barely = {"steps": 1, "batch_size": BATCH_SIZE, "lr": 1e-12, "warmup": 0}
    expected = dict(load_model(teacher_folder).net.named_parameters())
    for name, student in (
        ("checkpoint", {"model": "glyphs_tiny", "checkpoint": weights.name}),
        ("weights", {"model": str(teacher_folder), "init": "weights"}),
        ("random", {"model": "glyphs_tiny"}),
    ):
        path = tiny_recipe(name, student=student, teacher=None, distill=barely)
        assert clipkd("distill", path, "--out", tmp_path / name).code == 0
        found = dict(load_model(tmp_path / name / "student").net.named_parameters())
        far = {key for key, value in expected.items() if not (found[key] - value).abs().max() < 1e-9}
        assert ("text_projection" in far) if name == "random" else not far, name


def test_refused_under_torchrun(
    clipkd: Clipkd, tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_recipe()
    assert clipkd("distill", path, "--out", tmp_path / "run").code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    run = tmp_path / "run"
    for arguments in (
        ["run", path, "--out", tmp_path / "other"],
        ["quantize", run],
        ["export", run],
        ["report", run],
    ):
        ended = clipkd(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err == (
            "error: under torchrun only `clipkd distill` and `clipkd cache` work; start this command without it\n"
        )
    assert not (tmp_path / "other").exists()
    shared = [
        node.name
        for node in ast.parse((REPOSITORY / "clipkd.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and "shared=True" in ast.unparse(node)
    ]
    assert shared == ["distill", "cache"], "the message names every command that torchrun may start"


def test_ranks_that_found_different_checkpoints_are_refused(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "gather_objects", lambda _, value: [value, 4])
    with pytest.raises(ClipkdError, match=r"the ranks found checkpoints of different steps \(0, 4\)"):
        train(tmp_path, tiny_samples, None)
