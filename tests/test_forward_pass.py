"""A batch that passes the student in parts: dropout is replayed, buffers are those of one pass, scalers and errors."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import EVERY_STEP, STEPS, assert_same_run, last_state, rows, silent, train

from toolchain.data.glyphs import TrainingSet
from toolchain.distillation.features import BatchFeatures, StudentFeatures, TeacherFeatures
from toolchain.distillation.forward_pass import Forward, _dropout_seed
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.objectives import OBJECTIVES, weighted_loss
from toolchain.distillation.training_module import TrainingModule
from toolchain.distributed import ALONE
from toolchain.errors import UsageError
from toolchain.recipe.distill import DistillSpec, LossWeights

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, WIDTH, STEP, SEED = 8, 6, 3, 1
RTOL = 1e-10  # float64, summed in another order
WEIGHTS = {"task": 1.0, "crd": 0.5, "fd": 2.0, "icl": 1.0, "gd": 0.1, "afd": 0.7}


class Net(nn.Module):
    """Two towers of one layer; the image tower has a batch norm or dropout."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH), middle)
        self.text = nn.Embedding(9, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))


def forward_of(
    middle: nn.Module, accumulate: int, batch_norm: Any = "all_processes"
) -> tuple[Forward, PreparedBatch, TeacherFeatures]:
    """Passes of one student, always from the same weights, over the same batch."""
    torch.manual_seed(0)
    net = Net(middle)
    student = SimpleNamespace(
        has_teachers_text=False,
        net=net,
        embed_dim=WIDTH,
        normalise=lambda pixels: pixels.double() / 255,
        probe_fast_paths=lambda: None,
        encode_image=net.visual,
        encode_text=lambda ids: net.text(ids).sum(1),
    )
    spec = DistillSpec(
        steps=9, batch_size=BATCH, lr=1, warmup=0, accumulate=accumulate, loss_memory_mb=1e-4, batch_norm=batch_norm,
        loss_weights=LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | WEIGHTS),
    )  # fmt: skip
    torch.manual_seed(1)
    trained = TrainingModule(student, SimpleNamespace(embed_dim=WIDTH + 2), spec, ALONE).double().train()  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (BATCH, 3, 2, 2), generator=random, dtype=torch.uint8)
    ids = torch.randint(9, (BATCH, 4), generator=random)
    unit = [torch.randn(BATCH, WIDTH + 2, generator=random, dtype=torch.float64) for _ in range(2)]
    teacher = TeacherFeatures(*(nn.functional.normalize(x, dim=-1) for x in unit), torch.tensor(9.0).double())
    batch = PreparedBatch(pixels, ids, None, None, [""] * BATCH, np.arange(BATCH), 0)
    return Forward(trained, trained, spec, ALONE, SEED), batch, teacher


def gradients_of(forward: Forward) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in forward.trainee.named_parameters() if p.grad is not None}


def differentiate(middle: nn.Module, accumulate: int, scaler: torch.amp.GradScaler | None = None) -> dict[str, Tensor]:
    forward, batch, teacher = forward_of(middle, accumulate)
    done = forward.run(batch, teacher, STEP)
    forward.backward(done, batch, STEP, scaler)
    return gradients_of(forward)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_dropout_is_the_same_in_both_passes(accumulate: int) -> None:
    """Against all parts in one graph, with the same seeds: the memory of the whole batch, and its gradient."""
    forward, batch, teacher = forward_of(nn.Dropout(0.5), accumulate)
    size = BATCH // accumulate
    parts: list[StudentFeatures] = []
    for number, part in enumerate(batch.split(accumulate)):
        torch.manual_seed(_dropout_seed(SEED, STEP, 0, number))
        own = slice(number * size, (number + 1) * size)
        taught = TeacherFeatures(teacher.image_BE[own], teacher.text_BE[own], teacher.logit_scale)
        values = part.student_pixels.double() / 255
        features, scales = forward.trainee(values, part.student_ids, taught, None, None)
        parts.append(features)
    whole = BatchFeatures(
        StudentFeatures._make(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)),
        teacher,
    )
    weighted_loss(whole, whole, scales, forward.spec.loss_weights.model_dump())[0].backward()
    expected = gradients_of(forward)
    found = differentiate(nn.Dropout(0.5), accumulate)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=RTOL, atol=RTOL * value.abs().max().item())
    without = differentiate(nn.Identity(), accumulate)
    assert not torch.allclose(found["net.visual.1.weight"], without["net.visual.1.weight"]), "something was dropped"


def test_dropout_of_a_whole_batch_stays_what_it_was() -> None:
    assert _dropout_seed(5, 7, 1, 0) == int(np.random.SeedSequence([5, 7, 1]).generate_state(1, np.uint64)[0] >> 1)
    assert len({_dropout_seed(5, 7, rank, part) for rank in range(3) for part in range(3)}) == 9


def test_batch_norms_see_each_part_once() -> None:
    forward, batch, teacher = forward_of(nn.BatchNorm1d(WIDTH), 2)
    expected = nn.BatchNorm1d(WIDTH).double()
    with torch.no_grad():
        for part in batch.split(2):
            expected(forward.trainee.net.visual[1](part.student_pixels.double().flatten(1) / 255))  # type: ignore[index,operator]
    forward.backward(forward.run(batch, teacher, STEP), batch, STEP)
    norm: Any = forward.trainee.net.visual[2]  # type: ignore[index]
    assert norm.num_batches_tracked.item() == 2
    torch.testing.assert_close(norm.running_mean, expected.running_mean, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(norm.running_var, expected.running_var, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_frozen_batch_norms_have_the_gradients_of_the_whole_batch(accumulate: int) -> None:
    """Their statistics stay; weights and biases are trained."""
    found = []
    for parts in (1, accumulate):
        norm = nn.BatchNorm1d(WIDTH)
        norm.running_mean, norm.running_var = torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH)
        forward, batch, teacher = forward_of(norm, parts, batch_norm="frozen")
        forward.backward(forward.run(batch, teacher, STEP), batch, STEP)
        found.append(gradients_of(forward))
        assert forward.trainee.training
        assert torch.equal(norm.running_mean, torch.linspace(-1, 1, WIDTH).double())
        assert torch.equal(norm.running_var, torch.linspace(0.5, 2, WIDTH).double())
        assert norm.num_batches_tracked == 0
    assert {"net.visual.2.weight", "net.visual.2.bias"} <= found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=RTOL, atol=RTOL * value.abs().max().item())


def test_batch_norms_without_statistics_are_not_frozen(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    with pytest.raises(UsageError, match="this student starts from random weights, without any"):
        train(tmp_path, tiny_samples, None, batch_norm="frozen")


def test_gradients_carry_the_scalers_factor_once() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, scaled = differentiate(nn.Identity(), 4), differentiate(nn.Identity(), 4, scaler)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], 1024 * value, rtol=RTOL, atol=1e-12)


def test_the_value_is_that_of_the_whole_batch() -> None:
    found = [forward_of(nn.Identity(), accumulate) for accumulate in (1, 2, 8)]
    whole, *in_parts = (forward.run(batch, teacher, STEP) for forward, batch, teacher in found)
    for done in in_parts:
        assert done.loss.item() == pytest.approx(whole.loss.item(), rel=RTOL)
        assert {name: term.item() for name, term in done.terms.items()} == pytest.approx(
            {name: term.item() for name, term in whole.terms.items()}, rel=RTOL
        )


# Through the engine.


def test_training_in_parts_resumes_exactly(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int, note: str = "") -> None:
        if done >= 5:
            raise Stop

    train(tmp_path / "whole", tiny_samples, teacher_folder, accumulate=2)
    with pytest.raises(Stop):
        train(tmp_path / "run", tiny_samples, teacher_folder, stop, options=EVERY_STEP, accumulate=2)
    assert last_state(tmp_path / "run")["step"] < STEPS
    train(tmp_path / "run", tiny_samples, teacher_folder, silent, accumulate=2)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))


def test_a_batch_that_cannot_be_cut_into_equal_parts_is_refused(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    with pytest.raises(UsageError) as caught:
        train(tmp_path, tiny_samples, None, accumulate=3)
    assert str(caught.value) == (
        "distill.accumulate 3 cannot split 8 samples (distill.batch_size 8 over 1 rank) into equal parts; "
        "choose one of 1, 2, 4, 8, or auto"
    )


def test_batch_norms_in_parts_are_named(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    said: list[str] = []
    train(tmp_path / "parts", tiny_samples, None, say=said.append, accumulate=4)
    assert said == ["distill.accumulate: batch norms take their statistics over each part of 2 samples"]
    train(tmp_path / "whole", tiny_samples, None, say=said.append)
    assert len(said) == 1
