"""NaN and infinity stop training and caching with their cause: the teacher, the first weights, or the steps."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import BATCH_SIZE, EVERY_STEP, STUDENT, assert_same_state, cache_of, rows, silent, spec, train

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation import distill as distil_module
from toolchain.distillation import make_teacher_cache as caching
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.distill import CHECKPOINTS, Training, distill
from toolchain.distillation.make_teacher_cache import write_shard
from toolchain.distillation.non_finite import step_if_finite
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import TeacherCache, shard_path
from toolchain.errors import ArtifactError, ClipkdError
from toolchain.models.build import load_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.finite import describe_non_finite
from toolchain.recipe.distill import LossWeights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@torch.no_grad()
def spoil(model: ClipModel, part: str, value: float = math.nan) -> ClipModel:
    """Make one number of a tower's last layer NaN, as no file that is loaded has it."""
    named = dict(model.net.named_parameters())
    name = next(
        name for name in reversed(named) if name.startswith("visual.") == (part == "image") and "logit" not in name
    )
    named[name].view(-1)[0] = value
    return model


def test_tensors_with_nan_or_infinity_are_counted() -> None:
    tensors = {"a": torch.ones(3), "number": torch.tensor(3), "b": torch.tensor([1.0, math.nan, math.inf])}
    assert describe_non_finite(tensors) == "NaN or infinity in 1 of 3 tensors: b (2 of 3 values)"
    assert describe_non_finite({"a": torch.ones(3), "half": torch.tensor(6e4).half()}) is None
    assert describe_non_finite({"double": torch.tensor([1e300], dtype=torch.float64)}), "it does not fit float32"
    many = {str(number): torch.full((2,), math.nan) for number in range(5)}
    assert str(describe_non_finite(many)).endswith(
        "5 of 5 tensors: 0 (2 of 2 values), 1 (2 of 2 values), 2 (2 of 2 values), …"
    )


def stop(training: Training, folder: Path) -> str:
    with pytest.raises(ClipkdError) as caught:
        distill(training, folder, silent, options=EVERY_STEP)
    return str(caught.value)


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        (
            "fp32",
            "The teacher overflows in fp32 on these inputs: look at them, and check that its weights are the right",
        ),
        ("bf16", "The teacher overflows in its precision. Set distill.teacher_precision: fp32"),
    ],
)
@pytest.mark.parametrize("part", ["image", "text"])
def test_features_of_the_teacher_blame_the_teacher(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, part: str, precision: str, advice: str
) -> None:
    teacher, student = spoil(load_model(teacher_folder), part), load_model(STUDENT, random_seed=0)
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    said = stop(Training(spec(teacher_precision=precision), student, teacher, data), tmp_path)
    samples = data.batch(0, slice(None), []).sample_B.tolist()
    blamed = f"the teacher's {part} features of 8 of 8 samples are not finite (samples {samples})"
    assert said.startswith(f"{tmp_path}: the loss is not finite at step 0, because {blamed}. {advice}")
    assert "distill.lr" not in said


@pytest.mark.parametrize(
    ("precision", "advice"),
    [("fp32", "Check the weights that the student starts from"), ("bf16", "Set distill.precision: fp32 (now bf16)")],
)
def test_the_first_step_does_not_blame_the_learning_rate(
    tmp_path: Path, tiny_samples: TrainingSet, precision: str, advice: str
) -> None:
    student = spoil(load_model(STUDENT, random_seed=0), "text")
    training = Training(spec(precision=precision), student, None, GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2))
    said = stop(training, tmp_path)
    assert f"The cause: the student's text features of {BATCH_SIZE} of {BATCH_SIZE} samples are not finite" in said
    assert f"No step was taken yet, so distill.lr is not the cause. {advice}" in said


def test_weights_that_a_step_made_infinite_are_never_saved(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    with pytest.raises(
        ClipkdError, match=r"the weights are not finite after step 1: NaN or infinity in .*; lower distill\.lr"
    ):
        train(tmp_path, tiny_samples, None, options=EVERY_STEP, lr=3e38, warmup=0, weight_decay=1.0)
    assert Checkpoints(tmp_path / CHECKPOINTS).load(lambda _: None) is None
    assert not (tmp_path / "open_clip_model.safetensors").exists()


def test_a_checkpoint_that_is_not_finite_is_not_continued(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    train(tmp_path, tiny_samples, None, options=EVERY_STEP)
    checkpoints = Checkpoints(tmp_path / CHECKPOINTS)
    state: Any = checkpoints.load(lambda _: None)
    state["trained"]["net.logit_scale"].fill_(math.nan)
    checkpoints.save(state["step"], state)
    with pytest.raises(
        ClipkdError, match=r"the checkpoint of step 11 has NaN or infinity in 1 of .* net\.logit_scale "
    ):
        train(tmp_path, tiny_samples, None)


def test_a_sum_that_overflows_blames_the_weights_of_the_losses(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    data = GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    asked = spec(loss_weights=LossWeights(task=3.4e38))
    said = stop(Training(asked, load_model(STUDENT, random_seed=0), None, data), tmp_path)
    assert "the loss is not finite at step 0, in the weighted sum (terms {'task': " in said
    assert said.endswith("Lower distill.loss_weights: each term is finite, and their weighted sum is not")


# A step that is not finite is skipped on the device, and found out a step later.


def weights_and_optimizer() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)


def take_step(
    optimizer: Any, layer: Any, scaler: Any, failed: Tensor, loss: float = 1.0, gradient: float = 1.0
) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    if scaler.is_enabled():
        scaler.scale(torch.ones(()))  # makes its scale
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in layer.parameters()])
    step_if_finite(optimizer, scaler, torch.tensor(loss), norm, failed)


def state_of(layer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"weights": layer.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_a_step_that_is_not_finite_changes_nothing_nor_do_those_after_it(loss: float, gradient: float) -> None:
    (layer, optimizer), failed = weights_and_optimizer(), torch.zeros((), dtype=torch.bool)
    usual, expected = weights_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    take_step(optimizer, layer, scaler, failed)
    for parameter in usual.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected.step()
    before = state_of(layer, optimizer)
    assert_same_state(before, state_of(usual, expected))
    assert not failed
    take_step(optimizer, layer, scaler, failed, loss, gradient)
    take_step(optimizer, layer, scaler, failed)
    assert failed
    assert_same_state(state_of(layer, optimizer), before)


def test_an_overflow_of_fp16_fails_only_once_its_scale_is_below_1() -> None:
    (layer, optimizer), failed = weights_and_optimizer(), torch.zeros((), dtype=torch.bool)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    take_step(optimizer, layer, scaler, failed)
    before = state_of(layer, optimizer)
    for scale in (4, 2, 1):
        assert scaler.get_scale() == scale
        take_step(optimizer, layer, scaler, failed, gradient=math.inf)
        assert not failed
    assert_same_state(state_of(layer, optimizer), before)
    take_step(optimizer, layer, scaler, failed)
    assert not torch.equal(layer.weight, before["weights"]["weight"]), "the next finite step is taken"
    take_step(optimizer, layer, scaler, failed, gradient=math.inf)
    assert failed
    scaler, failed = torch.amp.GradScaler("cpu", init_scale=4.0), torch.zeros((), dtype=torch.bool)
    take_step(optimizer, layer, scaler, failed, loss=math.inf)
    assert failed, "a loss that overflows is no matter of the scale"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_failure_found_a_step_late_leaves_the_weights_of_its_step(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Step 4 fails, and step 5 is begun before that is known."""
    real, weights = distil_module.clip_gradients, []

    def poisoned(trainee: Any, max_norm: float | None) -> Tensor:
        weights.append({name: value.clone() for name, value in trainee.state_dict().items()})
        if len(weights) == 5:
            next(trainee.parameters()).grad.fill_(math.nan)
        return real(trainee, max_norm)

    monkeypatch.setattr(distil_module, "clip_gradients", poisoned)
    student, data = load_model(STUDENT, random_seed=0), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    with pytest.raises(ClipkdError, match="the gradient is not finite at step 4, "):
        distill(Training(spec(precision=precision), student, None, data), tmp_path, silent)
    assert len(weights) == 6, "the next step had begun"
    names = [name for name, _ in student.net.named_parameters()]
    for name in names:
        assert torch.equal(weights[5][f"net.{name}"], weights[4][f"net.{name}"]), name
        assert torch.equal(student.net.state_dict()[name], weights[4][f"net.{name}"]), name
    assert any(not torch.equal(weights[4][f"net.{name}"], weights[3][f"net.{name}"]) for name in names)
    assert Checkpoints(tmp_path / CHECKPOINTS).load(lambda _: None) is None
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]


# The teacher cache.


@pytest.mark.parametrize(("part", "first"), [("image", "sample 0, view 0"), ("text", "caption '")])
def test_a_cache_of_features_that_are_not_finite_fails(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, part: str, first: str
) -> None:
    teacher = spoil(load_model(teacher_folder), part)
    with pytest.raises(ClipkdError) as caught:
        cache_of(teacher, GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2), tmp_path / "cache")
    said = str(caught.value)
    assert said.startswith(f"teacher {teacher.name}: its {part} features of ")
    assert f" inputs are not finite, the first: {first}" in said
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_logit_scale_that_is_not_finite_is_no_teachers(teacher_folder: Path) -> None:
    teacher = load_model(teacher_folder)
    teacher.net.logit_scale.data.fill_(100.0)
    with pytest.raises(ArtifactError, match="the exponential of its logit_scale is not finite"):
        live_teacher(teacher, "fp32", CPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_stored_features_that_are_not_finite_are_refused_when_read(tmp_path: Path, dtype: Any) -> None:
    image_VNE = torch.nn.functional.normalize(torch.ones(1, 4, 8), dim=-1)
    image_VNE[0, 2, 3] = math.nan
    present_VN, texts_N = torch.ones(1, 4, dtype=torch.bool), [[0], [0], [0], [0]]
    text_CE = torch.nn.functional.normalize(torch.ones(1, 8), dim=-1)
    write_shard(shard_path(tmp_path, 0), image_VNE, text_CE, present_VN, texts_N, dtype=dtype, damaged={})
    cache = TeacherCache(tmp_path, {"embed_dim": 8, "logit_scale": 1.0, "shard_samples": 4, "views": 1})
    pick_B = np.zeros(2, np.int64)
    assert cache.features(np.array([0, 1]), pick_B, 0)[0].isfinite().all()
    with pytest.raises(
        ClipkdError, match="the stored image features of 1 of 2 samples are not finite, the first is sample 2"
    ):
        cache.features(np.array([1, 2]), pick_B, 0)


@pytest.mark.parametrize(
    ("fidelity", "said"),
    [
        ({"samples": 4, "top1_agreement": 1.0, "text_cosine_worst": math.nan}, "is not finite: text_cosine_worst. "),
        ({"samples": 0, "top1_agreement": math.nan}, "none of the samples that are checked can be read"),
    ],
)
def test_a_fidelity_that_is_not_finite_fails(
    tmp_path: Path,
    tiny_samples: TrainingSet,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fidelity: dict[str, float],
    said: str,
) -> None:
    monkeypatch.setattr(caching, "measure_fidelity", lambda *_: fidelity)
    with pytest.raises(ClipkdError, match=said):
        cache_of(load_model(teacher_folder), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2), tmp_path / "cache")
