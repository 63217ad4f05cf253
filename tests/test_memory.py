"""The memory of a training step, estimated before the first one, and the number of parts that fits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_forward_pass import BATCH, WIDTH, forward_of
from torch import nn
from training import assert_same_run, train

from toolchain.data.glyphs import TrainingSet
from toolchain.distillation import memory
from toolchain.distillation.memory import divisors, estimate_step, fit_parts, free_bytes
from toolchain.distillation.training_module import make_optimizer
from toolchain.errors import ClipkdError, UsageError
from toolchain.recipe.distill import DistillSpec

pytestmark = pytest.mark.usefixtures("one_thread")

MB = 10**6


def probed(middle: nn.Module, accumulate: Any = 1) -> Any:
    """Passes of a tiny student that can be probed, and its optimizer."""
    forward, _, _ = forward_of(middle, 1)
    spec = forward.spec.model_copy(update={"accumulate": accumulate})
    student = forward.trainee.student
    student.tokenize = lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64)
    student.net.visual.image_size = 2
    return SimpleNamespace(**{**vars(forward), "spec": spec, "pass_student": forward.pass_student})


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(memory, "example_pixels", lambda net: torch.zeros(1, 3, 2, 2))
    return probed(nn.Identity())


def test_a_sample_costs_what_autograd_keeps_of_it(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hidden layer of 1,000 numbers keeps its output, and has temporary arrays of that size."""
    optimizer = make_optimizer(forward.trainee, forward.spec)
    small = estimate_step(forward, optimizer, BATCH, WIDTH + 2)
    wide = probed(nn.Sequential(nn.Linear(WIDTH, 1000), nn.ReLU(), nn.Linear(1000, WIDTH)))
    large = estimate_step(wide, make_optimizer(wide.trainee, wide.spec), BATCH, WIDTH + 2)
    kept = 8 * 1000  # float64: the output of the ReLU, which is the input of the last layer
    assert large.of_sample - small.of_sample == pytest.approx(kept * (1 + memory._TEMPORARY), rel=0.2)
    added = 8 * (WIDTH * 1000 + 1000 + 1000 * WIDTH + WIDTH)  # weights
    assert large.other - small.other == pytest.approx(3 * added), "gradients and two moments"


def test_the_probe_changes_nothing(forward: Any) -> None:
    norm = probed(nn.BatchNorm1d(WIDTH))
    before = {name: value.clone() for name, value in norm.trainee.state_dict().items()}
    estimate_step(norm, make_optimizer(norm.trainee, norm.spec), BATCH, WIDTH + 2)
    assert all(torch.equal(value, before[name]) for name, value in norm.trainee.state_dict().items())
    assert all(parameter.grad is None for parameter in norm.trainee.parameters())


def test_the_probe_compiles_nothing(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled student is estimated as if it were not, and refused like others."""
    expected = estimate_step(forward, make_optimizer(forward.trainee, forward.spec), BATCH, WIDTH + 2)
    compiled: list[Any] = []

    def compile_graph(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    forward.spec = forward.spec.model_copy(update={"compile": True})
    forward.trainee.student.net.visual.compile(backend=compile_graph)
    found = estimate_step(forward, make_optimizer(forward.trainee, forward.spec), BATCH, WIDTH + 2)
    assert found == expected
    assert not compiled
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    with pytest.raises(UsageError, match=r"No distill.accumulate makes it fit"):
        fit_parts(forward, make_optimizer(forward.trainee, forward.spec), BATCH, WIDTH + 2)


@pytest.mark.parametrize(("free", "expected"), [(1000, 1), (170, 2), (70, 8)])
def test_auto_takes_the_smallest_number_of_parts_that_fits(
    forward: Any, monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    monkeypatch.setattr(memory, "estimate_step", lambda *_: memory.StepMemory(20 * MB, 30 * MB))
    monkeypatch.setattr(memory, "free_bytes", lambda device: free * MB)
    forward.spec = forward.spec.model_copy(update={"accumulate": "auto"})
    assert fit_parts(forward, SimpleNamespace(), BATCH, None) == expected  # type: ignore[arg-type]


def test_a_step_that_does_not_fit_is_refused_with_the_number_that_does(
    forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "estimate_step", lambda *_: memory.StepMemory(2000 * MB, 3000 * MB))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8000 * MB)
    with pytest.raises(UsageError) as caught:
        fit_parts(forward, SimpleNamespace(), BATCH, None)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "distill: a step needs about 19.0 GB (16.0 GB for 8 samples in the student, 3.0 GB for all else), and 8.0 GB "
        "are free. Set distill.accumulate: 4, the smallest that fits"
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000 * MB)
    with pytest.raises(UsageError, match=r"No distill.accumulate makes it fit: lower distill.batch_size \(8\) or"):
        fit_parts(forward, SimpleNamespace(), BATCH, None)  # type: ignore[arg-type]


def test_the_error_names_the_memory_of_the_rank_that_needs_most(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, whose message is printed, has enough memory; another rank of its machine does not."""
    needed = memory.StepMemory(2000 * MB, 3000 * MB)
    monkeypatch.setattr(memory, "estimate_step", lambda *_: needed)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 80_000 * MB)

    def gather_objects(own: Any) -> list[Any]:
        return [own, (needed, 8000 * MB)]

    forward.processes = SimpleNamespace(device=torch.device("cpu"), size=2, gather_objects=gather_objects)
    with pytest.raises(UsageError, match=r"8.0 GB are free on rank 1. Set distill.accumulate: 4, the smallest that"):
        fit_parts(forward, SimpleNamespace(), BATCH, None)  # type: ignore[arg-type]
    forward.spec = forward.spec.model_copy(update={"accumulate": "auto"})
    assert fit_parts(forward, SimpleNamespace(), BATCH, None) == 4  # type: ignore[arg-type]


def test_more_parts_than_needed_are_kept(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward.spec = forward.spec.model_copy(update={"accumulate": 4})
    assert fit_parts(forward, make_optimizer(forward.trainee, forward.spec), BATCH, WIDTH + 2) == 4


def test_where_memory_is_unknown_the_recipe_decides(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert fit_parts(forward, SimpleNamespace(), BATCH, None) == 1  # type: ignore[arg-type]


def test_free_memory_is_what_the_control_group_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\ninactive_file 500000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 3_500_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(torch.device("cpu")) == 1_750_000
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    found = free_bytes(torch.device("cpu"))
    assert found is None or found > 5_000_000


def test_a_gpu_without_room_for_the_models_is_explained(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(*_: Any) -> int:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr("toolchain.distillation.distill.fit_parts", probe)
    with pytest.raises(ClipkdError, match=r"^the GPU is out of memory: tried to allocate 2 GiB\. Lower distill"):
        train(tmp_path / "a", tiny_samples, teacher_folder)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


# Through the engine.


def test_training_with_auto_is_training_with_the_number_it_takes(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "estimate_step", lambda *_: memory.StepMemory(20 * MB, 30 * MB))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * MB)
    said: list[str] = []
    train(tmp_path / "auto", tiny_samples, teacher_folder, say=said.append, accumulate="auto")
    assert said[0] == "distill.accumulate: auto takes 4 part(s) of 2 samples"
    train(tmp_path / "four", tiny_samples, teacher_folder, accumulate=4)
    assert_same_run(tmp_path / "auto", tmp_path / "four")


def test_a_real_student_is_probed(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    said: list[str] = []
    train(tmp_path, tiny_samples, None, say=said.append, accumulate="auto")
    assert said == ["distill.accumulate: auto takes 1 part(s) of 8 samples"]


def test_the_number_of_parts_is_no_part_of_a_stages_key() -> None:
    usual = DistillSpec(steps=9, batch_size=8, lr=1, warmup=0)
    assert usual.key_fields() == usual.model_copy(update={"accumulate": 4, "loss_memory_mb": 9.0}).key_fields()
