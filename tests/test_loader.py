"""The feed: the right rows of the right steps, each thing made once, whatever the number of loader processes."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STUDENT, make_shards
from PIL import Image
from torch import Tensor
from training import BATCH_SIZE, configured

from toolchain.data.batch import Batch, Geometry, TrainingData
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.data.open import training_data
from toolchain.data.webdataset_shards import ShardBatches
from toolchain.distillation.loader import PreparedBatch, load_batches
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.training_options import TrainingOptions
from toolchain.errors import ClipkdError
from toolchain.models import clip_model as models_module
from toolchain.models.build import TOKENIZER_FILES, load_model
from toolchain.models.clip_model import ClipModel
from toolchain.pipeline import stage_inputs
from toolchain.recipe.data import GlyphsSpec, WebdatasetSpec

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums in another order: captions of unlike length run in groups, or all at full length.
MAX_FEATURE_ERROR = 1e-5
# Of 255: Pillow and torchvision round, and cut what overshoots, between the passes in other places.
MAX_RESIZE_LEVELS, MAX_MEAN_RESIZE_LEVELS = 8, 0.5

OTHER_GEOMETRY, OTHER_TOKENIZER = Geometry(48, "bicubic"), {"context_length": 32, "vocab_size": 49408}


class Counted:
    """Data that remembers what it was asked for; only without loader processes, of which each has its own."""

    def __init__(self, data: TrainingData) -> None:
        self.data, self.asked = data, []  # type: ignore[var-annotated]

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        self.asked.append((step, list(geometries)))
        return self.data.batch(step, rows, geometries)


def counting(model: ClipModel, calls: list[list[str]]) -> ClipModel:
    """A model that remembers which captions it tokenized."""
    return replace(model, tokenize=lambda captions: (calls.append(captions), model.tokenize(captions))[1])


def other_teacher(folder: Path, *, geometry: bool, tokenizer: bool) -> ClipModel:
    """A teacher that differs from the student in what it is told to differ in; in normalisation it always does."""
    changes: dict[str, Any] = {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.6, 0.7, 0.8]}}
    vision = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg"}
    vision |= {"timm_proj": "linear", "image_size": 48 if geometry else 32}
    changes["model_cfg"] = {"embed_dim": 48, "vision_cfg": vision}
    if geometry:
        changes["preprocess_cfg"]["size"] = [48, 48]
    if tokenizer:  # open_clip's own, which is no file
        changes["model_cfg"]["text_cfg"] = OTHER_TOKENIZER | {"width": 64, "heads": 2, "layers": 2}
    configured(folder, **changes)
    if tokenizer:
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
    return load_model(folder, random_seed=3)


@pytest.fixture
def student() -> ClipModel:
    return load_model(STUDENT, random_seed=0)


@pytest.fixture
def data(tiny_samples: TrainingSet) -> GlyphBatches:
    return GlyphBatches(tiny_samples, 0, BATCH_SIZE, 2)


def assert_same(first: PreparedBatch, second: PreparedBatch) -> None:
    for name in ("student_pixels", "student_ids", "teacher_pixels", "teacher_ids"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name
    assert first.captions_b == second.captions_b
    assert first.sample_b.tolist() == second.sample_b.tolist()
    assert first.view == second.view


# Each thing once.


@pytest.mark.parametrize("tokenizer", [False, True], ids=["its tokenizer", "another tokenizer"])
@pytest.mark.parametrize("geometry", [False, True], ids=["its geometry", "another geometry"])
def test_every_distinct_thing_is_made_once(
    tmp_path: Path, student: ClipModel, data: GlyphBatches, geometry: bool, tokenizer: bool
) -> None:
    teacher = other_teacher(tmp_path / "teacher", geometry=geometry, tokenizer=tokenizer)
    counted, students, teachers = Counted(data), [], []  # type: ignore[var-annotated]
    ours, theirs = counting(student, students), counting(teacher, teachers)
    fed = list(load_batches(counted, range(3), slice(None), ours, theirs, 0))  # type: ignore[arg-type]
    sizes = [student.geometry, OTHER_GEOMETRY] if geometry else [student.geometry]
    assert counted.asked == [(step, sizes) for step in range(3)]
    captions = [batch.captions_b for batch in fed]
    assert [call for call in students if call in captions] == captions
    assert [call for call in teachers if call in captions] == (captions if tokenizer else [])
    for step, batch in enumerate(fed):
        expected = data.batch(step, slice(None), sizes)
        assert torch.equal(batch.student_pixels, expected.pixels[student.geometry])
        assert batch.teacher_pixels is not None
        assert torch.equal(batch.teacher_pixels, expected.pixels[sizes[-1]])
        assert (batch.teacher_pixels is batch.student_pixels) == (not geometry)
        assert (batch.teacher_ids is batch.student_ids) == (not tokenizer)


def test_without_a_live_teacher_nothing_is_made_for_one(student: ClipModel, data: GlyphBatches) -> None:
    counted = Counted(data)
    (batch,) = load_batches(counted, range(4, 5), slice(None), student, None, 0)  # type: ignore[arg-type]
    assert (batch.teacher_pixels, batch.teacher_ids) == (None, None)
    assert counted.asked == [(4, [student.geometry])]


def test_a_teacher_sees_what_its_own_preprocessing_and_tokenizer_make(
    tmp_path: Path, student: ClipModel, data: GlyphBatches
) -> None:
    """Another image size, normalisation and tokenizer: its features are those of open_clip used plainly."""
    teacher = other_teacher(tmp_path / "teacher", geometry=True, tokenizer=True)
    (batch,) = load_batches(data, range(2, 3), slice(None), student, teacher, 0)
    taught = live_teacher(teacher, "fp32", torch.device("cpu")).features(batch)
    assert batch.teacher_pixels is not None
    assert batch.teacher_ids is not None
    assert batch.teacher_pixels.shape == (BATCH_SIZE, 3, 48, 48)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ([0.1, 0.2, 0.3], [0.6, 0.7, 0.8]))
    pixel_values = ((batch.teacher_pixels.double() / 255 - mean) / std).float()
    with torch.no_grad():
        net: Any = teacher.net
        image_BE = net.encode_image(pixel_values, normalize=True)
        text_BE = net.encode_text(teacher.tokenize(batch.captions_b), normalize=True)
    assert (taught.image_BE - image_BE).abs().max() < MAX_FEATURE_ERROR
    assert (taught.text_BE - text_BE).abs().max() < MAX_FEATURE_ERROR
    assert batch.teacher_ids.max() > 1024, "ids that the student's vocabulary does not have"
    # And the pixels are the student's picture in the teacher's size.
    for small_3HH, large_3HH in zip(batch.student_pixels, batch.teacher_pixels, strict=True):
        picture = Image.fromarray(small_3HH.permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC), np.int16).transpose(2, 0, 1)
        difference_3HH = np.abs(large_3HH.numpy() - expected)
        assert difference_3HH.max() <= MAX_RESIZE_LEVELS
        assert difference_3HH.mean() <= MAX_MEAN_RESIZE_LEVELS


# The right rows of the right steps.


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than a small machine has cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_step_is_the_same_wherever_one_begins(student: ClipModel, data: GlyphBatches, workers: int) -> None:
    whole = list(load_batches(data, range(12), slice(None), student, student, 0))
    assert {batch.view for batch in whole} == {0, 1}
    with closing(load_batches(data, range(5, 12), slice(None), student, student, workers)) as rest:
        for expected, batch in zip(whole[5:], rest, strict=True):
            assert_same(batch, expected)


def test_no_steps_no_batches(student: ClipModel, data: GlyphBatches) -> None:
    assert list(load_batches(data, range(7, 7), slice(None), student, None, 2)) == []


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_put_together_are_the_batch(student: ClipModel, data: GlyphBatches, processes: int) -> None:
    share = BATCH_SIZE // processes
    for step in (0, 8):
        (whole,) = load_batches(data, range(step, step + 1), slice(None), student, student, 0)
        for rank in range(processes):
            rows = slice(rank * share, (rank + 1) * share)
            (part,) = load_batches(data, range(step, step + 1), rows, student, student, 0)
            assert torch.equal(part.student_pixels, whole.student_pixels[rows])
            assert part.captions_b == whole.captions_b[rows]
            assert part.sample_b.tolist() == whole.sample_b[rows].tolist()
            length = part.student_ids.shape[1]
            assert torch.equal(part.student_ids, whole.student_ids[rows, :length])
            assert not whole.student_ids[rows, length:].any(), "what the part leaves out is padding"


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_fed_alike(
    tmp_path: Path, student: ClipModel, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_shards(tmp_path / "shards", 2, 6, sizes=(40, 60))
    spec = WebdatasetSpec(kind="webdataset", shards=(str(tmp_path / "shards" / "{00000..00001}.tar"),))
    data = training_data(spec, seed=0, batch_size=4)
    assert isinstance(data, ShardBatches)
    expected = [data.batch(step, slice(None), [student.geometry]) for step in range(7)]
    with closing(load_batches(data, range(7), slice(None), student, None, workers)) as fed:
        for batch, wanted in zip(fed, expected, strict=True):
            assert torch.equal(batch.student_pixels, wanted.pixels[student.geometry])
            assert torch.equal(batch.student_ids, student.tokenize_trimmed(wanted.captions_B))


def test_glyphs_are_glyphs(tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.data.glyphs.training_set", lambda: tiny_samples)
    data = training_data(GlyphsSpec(kind="glyphs", views=5), seed=3, batch_size=4)
    assert data == GlyphBatches(tiny_samples, 3, 4, 5)


def test_a_batch_moves_to_its_device_whole(student: ClipModel, data: GlyphBatches) -> None:
    (batch,) = load_batches(data, range(1), slice(None), student, student, 0)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))  # as good as a GPU here
    tensors = (moved.student_pixels, moved.student_ids, moved.teacher_pixels, moved.teacher_ids)
    assert [tensor.device.type for tensor in tensors if tensor is not None] == ["meta"] * 4
    assert (moved.captions_b, moved.view) == (batch.captions_b, batch.view)
    (alone,) = load_batches(data, range(1), slice(None), student, None, 0)
    assert alone.to(torch.device("meta")).teacher_pixels is None


@pytest.mark.gpu
def test_batches_are_pinned_for_the_gpu(student: ClipModel, data: GlyphBatches) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    with closing(load_batches(data, range(1), slice(None), student, student, 1)) as fed:
        batch = next(fed)
    assert batch.student_pixels.is_pinned()
    assert batch.teacher_ids is not None
    assert batch.teacher_ids.is_pinned()


# Loader processes.


class Failing:
    """Data of which one step cannot be read."""

    batch_size = BATCH_SIZE

    def __init__(self, data: TrainingData, at: int) -> None:
        self.data, self.at = data, at

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        if step == self.at:
            raise ClipkdError("00000.tar: the image of sample 7 cannot be read")
        return self.data.batch(step, rows, geometries)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_at_its_step_and_as_it_was(student: ClipModel, data: GlyphBatches, workers: int) -> None:
    failing: Any = Failing(data, 3)
    with closing(load_batches(failing, range(6), slice(None), student, None, workers)) as fed:
        for _ in range(3):
            next(fed)
        with pytest.raises(ClipkdError) as caught:
            next(fed)
    assert str(caught.value) == "00000.tar: the image of sample 7 cannot be read"


class Asking:
    """Data whose captions say what a loader's process computes with."""

    batch_size = BATCH_SIZE

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        batch = self.data.batch(step, rows, geometries)
        found = f"{torch.get_num_threads()} thread, tokenizers {os.environ.get('TOKENIZERS_PARALLELISM')}"
        return replace(batch, captions_B=[found] * len(batch.captions_B))


def test_loaders_compute_in_one_thread_each(student: ClipModel, data: GlyphBatches) -> None:
    """Torch sees to its own threads, open_clip to those of Hugging Face's tokenizers: neither is ours to forget."""
    torch.set_num_threads(2)  # until `one_thread` ends
    asking: Any = Asking(data)
    with closing(load_batches(asking, range(2), slice(None), student, None, 2)) as fed:
        assert {caption for made in fed for caption in made.captions_b} == {"1 thread, tokenizers false"}


@pytest.mark.parametrize(
    ("kind", "device", "size", "told", "expected"),
    [
        ("glyphs", "cuda", 1, None, 0),
        ("webdataset", "cuda", 1, None, 7),
        ("webdataset", "cuda", 4, None, 1),
        ("webdataset", "cuda", 8, None, 1),
        ("webdataset", "cpu", 1, None, 1),
        ("webdataset", "cpu", 1, 5, 5),
        ("glyphs", "cpu", 1, 2, 2),
    ],
)
def test_loaders_leave_the_cores_to_training(
    monkeypatch: pytest.MonkeyPatch, kind: str, device: str, size: int, told: int | None, expected: int
) -> None:
    """Of 8 cores that this process may use, on a machine that has more."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("WORLD_SIZE", str(size))
    specs = {"glyphs": GlyphsSpec(kind="glyphs"), "webdataset": WebdatasetSpec(kind="webdataset", shards=("a.tar",))}
    assert stage_inputs.num_workers(specs[kind], TrainingOptions(told), device) == expected


def ended(processes: list[Any]) -> bool:
    """Whether all have ended, or do within a few seconds."""
    deadline = time.monotonic() + 10
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loaders_leave_signals_to_the_process_they_work_for(
    student: ClipModel, data: GlyphBatches, number: signal.Signals
) -> None:
    """A terminal's Ctrl-C and a job's SIGTERM reach them too, and a loader that dies takes the run with it."""
    before = multiprocessing.active_children()
    with closing(load_batches(data, range(40), slice(None), student, None, 2)) as fed:
        next(fed)
        loaders = [child for child in multiprocessing.active_children() if child not in before]
        assert len(loaders) == 2
        for loader in loaders:
            assert loader.pid is not None
            os.kill(loader.pid, number)
        assert len(list(fed)) == 39
    assert ended(loaders)


def test_closed_early_no_loader_is_left(student: ClipModel, data: GlyphBatches) -> None:
    before = multiprocessing.active_children()
    fed = load_batches(data, range(1000), slice(None), student, None, 2)
    next(fed)
    loaders = [child for child in multiprocessing.active_children() if child not in before]
    assert loaders
    fed.close()
    assert ended(loaders)


def test_no_loader_outlives_an_error_that_is_still_held(student: ClipModel, data: GlyphBatches) -> None:
    """At its end a process waits for what it forked: it would never end, while the error's traceback is kept."""
    before = multiprocessing.active_children()
    failing: Any = Failing(data, 3)
    fed = load_batches(failing, range(1000), slice(None), student, None, 2)
    next(fed)
    loaders = [child for child in multiprocessing.active_children() if child not in before]
    assert loaders
    with pytest.raises(ClipkdError) as caught:
        list(fed)
    assert ended(loaders)
    assert caught.tb is not None


def test_no_loader_asks_a_net_whether_its_text_is_trimmed(
    tmp_path: Path, data: GlyphBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs the net, which may be on a GPU, where a forked process cannot go."""
    student = load_model(STUDENT, random_seed=0)
    teacher = other_teacher(tmp_path / "teacher", geometry=False, tokenizer=True)
    asked: list[int] = multiprocessing.Manager().list()  # type: ignore[assignment]
    real: Callable[[Tensor], bool] = models_module.is_trimmable
    monkeypatch.setattr(models_module, "is_trimmable", lambda net: (asked.append(os.getpid()), real(net))[1])
    with closing(load_batches(data, range(4), slice(None), student, teacher, 2)) as fed:
        assert len(list(fed)) == 4
    assert list(asked) == [os.getpid()] * 2, "once of each model"
