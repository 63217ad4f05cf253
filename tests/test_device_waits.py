"""A training step never waits for the device: neither reads a value of it, nor copies without going on meanwhile.

On PyTorch's meta device tensors have shapes and no values.  A step that reads a value cannot be taken there, whatever
the function it reads it with; and it takes the branches that a GPU takes, as they ask for the kind of device.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import BATCH_SIZE, cache_of, configured, silent, spec

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation import distill as distil_module
from toolchain.distillation import training_module
from toolchain.distillation.distill import Training, _start, distill
from toolchain.distillation.loader import PreparedBatch, load_batches
from toolchain.distillation.objectives import OBJECTIVES
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import TeacherCache
from toolchain.distillation.training_log import StepClock, UnreadRow
from toolchain.distributed import Processes
from toolchain.models.build import load_model
from toolchain.models.clip_model import ClipModel
from toolchain.recipe.distill import LossWeights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, META = torch.device("cpu"), torch.device("meta")
EVERYTHING = LossWeights(**dict.fromkeys(OBJECTIVES, 1.0) | {"gd": 0.01, "sigmoid_kd": 0.0})  # of softmax models
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "patch_dropout": 0.25}

aten = torch.ops.aten
WAITING_KERNELS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}
READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__array__),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
}


class Copies(TorchDispatchMode):
    """The copies between the host and the meta device that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            ends = args[0].device.type, torch.device(kwargs["device"]).type
            if ends[0] != ends[1]:
                if not kwargs.get("non_blocking"):
                    self.waited.append(f"{tuple(args[0].shape)} from {ends[0]} to {ends[1]}")
                if ends == ("meta", "cpu"):
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class Kernels(TorchDispatchMode):
    """The kernels whose result the host needs at once, so that it waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (func in WAITING_KERNELS or by_mask) and not _groups_captions():
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """The functions of a tensor that return its values to Python; some of them call no kernel on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and not _groups_captions():
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _groups_captions() -> bool:
    """On a CPU, and there alone, captions of like length run together, and their lengths are read for it."""
    return any(frame.name == "encode_tokens" for frame in traceback.extract_stack(limit=12))


Step = Callable[[int], UnreadRow]


@contextmanager
def steps_on(device: torch.device, training: Training, folder: Path, parts: int) -> Iterator[Step]:
    """The steps of a training, as `distill` takes them; their batches are loaded before."""
    loaded = list(load_batches(training.data, range(2), slice(None), training.student, training.teacher, 0))
    run = _start(training, folder, Processes(0, 1, device), lambda text: None)
    run.trainee.train()
    run = replace(run, forward=replace(run.forward, spec=run.forward.spec.model_copy(update={"accumulate": parts})))
    clock = StepClock(device, BATCH_SIZE)

    def take(step: int) -> UnreadRow:
        batch: PreparedBatch = run.load_batch(iter(loaded[step:]), clock)
        return run.train_step(batch, step, clock)

    yield take


def made_training(samples: TrainingSet, folder: Path, tower: str, cached: bool, **changes: Any) -> Training:
    student = STUDENT
    weights = {"loss_weights": EVERYTHING, "mask_ratio": 0.5}
    if tower == "transformer":
        student = configured(folder / "student", model_cfg={"vision_cfg": VIT})
    else:  # which cannot be masked
        weights = {"loss_weights": EVERYTHING.model_copy(update={"mfd": 0.0})}
    data = GlyphBatches(samples, 0, BATCH_SIZE, 2)
    config = configured(folder / "teacher", model_cfg={"embed_dim": 48})
    teacher: ClipModel | TeacherCache = load_model(config, random_seed=1)
    if cached:
        assert isinstance(teacher, ClipModel)
        teacher = cache_of(teacher, data, folder / "cache")
    return Training(spec(**weights, **changes), load_model(student, random_seed=0), teacher, data)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch does for GPUs and CPUs alone: autocast, and a check of what a fused optimizer supports."""

    def open_teacher(teacher: ClipModel | TeacherCache, *_: Any) -> Any:
        if isinstance(teacher, TeacherCache):
            return real(teacher, spec(), META)
        return replace(
            live_teacher(teacher, "fp32", CPU), model=to_meta(teacher), logit_scale=torch.ones((), device=META)
        )

    def to_meta(model: ClipModel) -> ClipModel:
        model.net.to(META)
        return model

    real = distil_module.open_teacher
    monkeypatch.setattr(distil_module, "open_teacher", open_teacher)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    ("tower", "parts", "cached"), [("transformer", 1, False), ("transformer", 2, True), ("convolutional", 1, True)]
)
def test_a_step_reads_no_value(tmp_path: Path, tiny_samples: TrainingSet, tower: str, parts: int, cached: bool) -> None:
    training = made_training(tiny_samples, tmp_path, tower, cached, grad_clip_norm=1.0)
    with steps_on(META, training, tmp_path, parts) as take:
        for model in (training.student, training.teacher):
            if isinstance(model, ClipModel):  # constants that the first step copies, and later ones find
                model.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=META))
        with Copies() as copies:
            row = take(1)
    assert copies.waited == []
    assert len(row.names) > len(OBJECTIVES)
    assert row.numbers.device == CPU


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, bool])
def test_a_step_that_reads_a_value_is_found_on_meta(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch, read: Callable[[Tensor], Any]
) -> None:
    real = distil_module.clip_gradients

    def reading(*arguments: Any) -> Tensor:
        norm = real(*arguments)
        read(norm)
        return norm

    monkeypatch.setattr(distil_module, "clip_gradients", reading)
    student, data = load_model(STUDENT, random_seed=0), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    with steps_on(META, Training(spec(), student, None, data), tmp_path, 1) as take, Copies() as copies:
        if read is Tensor.tolist:  # which copies to the host first
            take(0)
        else:
            with pytest.raises(RuntimeError, match="meta"):
                take(0)
    assert ("() from meta to cpu" in copies.waited) == (read is Tensor.tolist)


@pytest.mark.usefixtures("on_meta")
def test_a_copy_that_is_waited_for_is_found(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "copy_to_device", lambda x, device: x.to(device))  # the masks
    training = made_training(tiny_samples, tmp_path, "transformer", True)
    with steps_on(META, training, tmp_path, 1) as take, Copies() as copies:
        take(1)
    assert f"({BATCH_SIZE}, 8) from cpu to meta" in copies.waited


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_calls_no_kernel_that_is_waited_for(
    tmp_path: Path, tiny_samples: TrainingSet, parts: int, precision: str
) -> None:
    """With values, and so in every precision."""
    training = made_training(tiny_samples, tmp_path, "transformer", False, precision=precision, grad_clip_norm=1.0)
    with steps_on(CPU, training, tmp_path, parts) as take:
        take(0)
        with Kernels() as kernels, Reads() as reads:
            row = take(1)
        assert (kernels.found, reads.found) == ([], [])
        with Kernels() as kernels, Reads() as reads:  # what is not found, were it there
            row.numbers[0].item()
            row.numbers[row.numbers > 0].tolist()
        assert len(kernels.found) >= 2
        assert len(reads.found) >= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_does_not_wait_for_a_gpu(tmp_path: Path, tiny_samples: TrainingSet, parts: int, precision: str) -> None:
    training = made_training(tiny_samples, tmp_path, "transformer", False, precision=precision, grad_clip_norm=1.0)
    with steps_on(torch.device("cuda", 0), training, tmp_path, parts) as take:
        take(0)
        try:
            torch.cuda.set_sync_debug_mode("error")  # after its warning: the mode is a prototype
            row = take(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert row.numbers.is_pinned()
        assert row.read()[0]["step"] == 1


def test_a_row_is_read_while_the_next_step_runs(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once after the first step, where the student is scored, and after the last."""
    events: list[str] = []
    real_step, real_read = distil_module._Run.train_step, UnreadRow.read

    def train_step(run: Any, batch: PreparedBatch, step: int, clock: StepClock) -> UnreadRow:
        events.append(f"start {step}")
        return real_step(run, batch, step, clock)

    def read(row: UnreadRow) -> Any:
        events.append(f"read {row.step}")
        return real_read(row)

    monkeypatch.setattr(distil_module._Run, "train_step", train_step)
    monkeypatch.setattr(UnreadRow, "read", read)
    student, data = load_model(STUDENT, random_seed=0), GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)
    asked = spec(steps=8, evaluate_every=5)
    distill(Training(asked, student, None, data, accuracy=lambda *_: {"top1": 0.5}), tmp_path, silent)
    assert " ".join(events) == (
        "start 0 read 0 start 1 start 2 read 1 start 3 read 2 start 4 read 3 read 4 start 5 start 6 read 5 start 7 "
        "read 6 read 7"
    )
