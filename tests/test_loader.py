"""The feed: the right rows of the right steps, each thing made once, whatever the number of loader processes.

Its memory is bounded, and what goes wrong in a loader process is one clear message.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
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
from test_corrupt_samples import KINDS, make_kinds, opened
from torch import Tensor
from training import BATCH_SIZE, cache_of, configured

from toolchain.data.batch import Batch, Geometry, TrainingData
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.data.listing import PackedStrings
from toolchain.data.open import training_data
from toolchain.data.webdataset_shards import ShardBatches
from toolchain.distillation import loader
from toolchain.distillation.loader import PreparedBatch, load_batches, loader_bytes, split_rows
from toolchain.distillation.loader_workers import SLOTS, Workers
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.training_options import TrainingOptions
from toolchain.errors import ClipkdError, UsageError
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
    assert (first.view, first.damaged) == (second.view, second.damaged)
    assert (first.teacher_features is None) == (second.teacher_features is None)
    for features in zip(first.teacher_features or (), second.teacher_features or (), strict=True):
        assert torch.equal(*features)


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


def feed(data: TrainingData, student: ClipModel, teacher: Any, workers: int, rows: slice) -> list[PreparedBatch]:
    with closing(load_batches(data, range(1, 4), rows, student, teacher, workers)) as fed:
        return list(fed)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_size_are_the_batch(
    kind: str, tmp_path: Path, student: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes them: pixels, ids of one length, and the corrupt samples that were replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = opened(**make_kinds(tmp_path)[kind])
    teacher = other_teacher(tmp_path / "teacher", geometry=True, tokenizer=True)
    for rows, workers, part_rows in ((slice(0, 8), 2, 3), (slice(2, 7), 1, 1), (slice(0, 8), 1, 64)):
        monkeypatch.setattr(loader, "PART_ROWS", part_rows)
        expected = feed(data, student, teacher, 0, rows)
        assert any(batch.damaged for batch in expected)
        for batch, wanted in zip(feed(data, student, teacher, workers, rows), expected, strict=True):
            assert_same(batch, wanted)


def test_parts_of_glyphs_and_stored_features_are_the_batch(
    tmp_path: Path, student: ClipModel, data: GlyphBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(load_model(STUDENT, random_seed=5), data, tmp_path / "cache")
    expected = feed(data, student, cache, 0, slice(None))
    for part_rows in (1, 3, 8):
        monkeypatch.setattr(loader, "PART_ROWS", part_rows)
        for batch, wanted in zip(feed(data, student, cache, 2, slice(None)), expected, strict=True):
            assert_same(batch, wanted)
            lengths = [student.tokenize_trimmed([caption]).shape[1] for caption in batch.captions_b]
            assert batch.student_ids.shape[1] == max(lengths) > min(lengths), "the longest caption decides"


@pytest.mark.parametrize("part_rows", [1, 3, 64])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 69), slice(0, 127), slice(4096, 8192)])
def test_parts_are_all_rows_once_and_no_needless_ones(
    rows: slice, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PART_ROWS", part_rows)
    parts, count = split_rows(rows), rows.stop - rows.start
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows.start, rows.stop))
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) < 2 * part_rows or count < part_rows
    assert min(sizes) >= min(part_rows, count)


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


def test_a_program_ends_that_closes_no_loader() -> None:
    """In a process of its own, since what happens at its exit is tested."""
    program = """
from conftest import STUDENT
from test_loader import Flat
from toolchain.distillation.loader import load_batches
from toolchain.models.build import load_model

fed = load_batches(Flat(), range(1000), slice(0, 128), load_model(STUDENT, random_seed=0), None, 2)
next(fed)
print("leaves", flush=True)
"""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "leaves\n", "")


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


# Memory.


class Flat:
    """Batches of 4,096 images that cost no time: row r of step s has the colour r + s; it counts the rows made."""

    batch_size = 4096

    def __init__(self) -> None:
        self.rows_made = multiprocessing.Value("q", 0)

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        row_b = np.arange(self.batch_size)[rows]
        with self.rows_made:
            self.rows_made.value += len(row_b)
        colour_b = torch.from_numpy((row_b + step) % 251).to(torch.uint8)
        pixels = {g: colour_b[:, None, None, None].expand(-1, 3, g.size, g.size).contiguous() for g in geometries}
        return Batch(pixels, ["a"] * len(row_b), row_b, np.zeros_like(row_b), 0)


def memory_bytes(processes: Sequence[int]) -> int:
    """What processes have in memory together; a page that n of them share counts n times one nth.

    Without pages of files: other processes, which come and go, share those of libraries.
    """
    total = 0
    for process in processes:
        content = Path(f"/proc/{process}/smaps_rollup").read_text()
        kinds = {line.split()[0]: int(line.split()[1]) for line in content.splitlines()[1:]}
        total += 1024 * (kinds["Pss_Anon:"] + kinds["Pss_Shmem:"])
    return total


def count_shm_files(process: int) -> int:
    """Of those that a process has mapped, deleted ones too."""
    return Path(f"/proc/{process}/maps").read_text().count("/dev/shm/")


SIDE_PX = 96
"""Of the images whose memory is measured: a batch has 113 MB."""

OF_A_PROCESS = 25e6  # what a forked interpreter writes to, besides arrays


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_at_a_batch_of_4096() -> None:
    """In a fresh process: libraries that other tests load keep memory that is freed."""
    process = multiprocessing.get_context("spawn").Process(target=check_memory)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def check_memory() -> None:
    """The peak of all processes is within the stated bound, nothing is in /dev/shm, and no batch is made too early."""
    student = load_model(STUDENT, random_seed=0)
    data, workers, row_bytes = Flat(), 2, 3 * SIDE_PX**2 + 8 * student.context_length
    config = {**student.config, "preprocess_cfg": {**student.config["preprocess_cfg"], "size": [SIDE_PX, SIDE_PX]}}
    student = replace(student, config=config)
    student.probe_fast_paths()
    before, shm_files = memory_bytes([os.getpid()]), count_shm_files(os.getpid())
    children = set(multiprocessing.active_children())
    peak = 0
    with closing(load_batches(data, range(4), slice(0, 4096), student, None, workers)) as fed:  # type: ignore[arg-type]
        for step, batch in enumerate(fed):
            assert batch.student_pixels[:, 0, 0, 0].tolist() == [(row + step) % 251 for row in range(4096)]
            processes = [os.getpid(), *(c.pid for c in multiprocessing.active_children() if c not in children if c.pid)]
            settled = -1
            while settled != data.rows_made.value:  # until the workers wait
                settled = data.rows_made.value
                time.sleep(0.2)
                peak = max(peak, memory_bytes(processes) - before)
            ahead = settled - 4096 * (step + 1)
            assert ahead <= 4096 + workers * SLOTS * loader.PART_ROWS
            assert {count_shm_files(process) for process in processes} == {shm_files}
    bound = loader_bytes(4096, row_bytes, workers)
    assert bound < 2.2 * 4096 * row_bytes, "two batches and a few parts"
    assert 2 * 4096 * row_bytes < peak < bound + OF_A_PROCESS * workers


def test_packed_strings_are_a_list() -> None:
    names = ["a/é.jpg", "", os.fsdecode(b"b/\xff.png"), "c" * 300]
    packed = PackedStrings(names)
    assert list(packed) == names == packed[:]
    assert (len(packed), packed[-1], packed[1:3]) == (4, names[-1], names[1:3])
    with pytest.raises(IndexError):
        packed[4]
    assert list(PackedStrings([])) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_reads_a_listing_does_not_copy_it() -> None:
    """A list of the same paths is copied page by page, as each read writes a reference count."""
    paths = [f"/data/images/class {number % 997}/{number:09d}.jpg" for number in range(200_000)]
    packed = PackedStrings(paths)
    text_bytes = sum(map(len, paths))
    assert measure_copied_bytes(paths) > text_bytes
    assert measure_copied_bytes(packed) < 0.2 * text_bytes


def measure_copied_bytes(strings: Sequence[str]) -> int:
    """Return by how much a forked process grows that reads all strings."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def read() -> None:
        gc.disable()
        before = memory_bytes_of_own()
        for number in range(len(strings)):
            strings[number]
        theirs.send(memory_bytes_of_own() - before)

    process = context.Process(target=read)
    process.start()
    grown: int = ours.recv()
    process.join()
    return grown


def memory_bytes_of_own() -> int:
    """Bytes that only this process has in memory, and has written."""
    content = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in content.splitlines() if line.startswith("Private_Dirty:"))


def test_the_stated_memory_of_a_batch_of_4096_at_224_px() -> None:
    row_bytes = 3 * 224**2
    assert loader_bytes(4096, row_bytes, 15) < 2e9
    assert loader_bytes(4096, row_bytes, 15) - loader_bytes(4096, row_bytes, 14) == 5 * 64 * row_bytes
    assert loader_bytes(4096, row_bytes, 15, pinned=True) < 4.5e9


def test_too_little_memory_is_said_before_anything_is_read(
    student: ClipModel, data: GlyphBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = loader._reader(data, student, None).count_bytes(1)
    free = loader_bytes(BATCH_SIZE, row_bytes, 5)
    monkeypatch.setattr(loader, "free_bytes", lambda device: free)
    before = multiprocessing.active_children()
    with pytest.raises(
        UsageError, match=r"6 worker\(s\) and batches of 8 samples .* Use at most --workers 5, or lower"
    ):
        next(load_batches(data, range(3), slice(0, 8), student, None, 6))
    assert multiprocessing.active_children() == before
    monkeypatch.setattr(loader, "free_bytes", lambda device: 1000)
    with pytest.raises(UsageError, match=r"Lower distill\.batch_size"):
        next(load_batches(data, range(3), slice(0, 8), student, None, 6))


def test_what_student_and_teacher_share_is_copied_once() -> None:
    pixels, ids = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.int64)
    batch = PreparedBatch(pixels, ids, pixels, ids, [""] * 4, np.arange(4), 0)
    for moved in (batch.to(torch.device("meta")), *batch.split(2)):
        assert moved.teacher_pixels is moved.student_pixels
        assert moved.teacher_ids is moved.student_ids


# What goes wrong in a loader process.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_loader_is_one_message(student: ClipModel, data: GlyphBatches, number: signal.Signals) -> None:
    before = multiprocessing.active_children()
    with closing(load_batches(data, range(1000), slice(None), student, None, 2)) as fed:
        next(fed)
        loaders = [child for child in multiprocessing.active_children() if child not in before]
        killed = loaders[1].pid
        assert killed is not None
        os.kill(killed, number)
        with pytest.raises(ClipkdError) as caught:
            list(fed)
    assert f"worker process {killed} was ended by {number.name}" in str(caught.value)
    assert "memory is full: 2 worker(s) share" in str(caught.value)
    assert "--workers" in str(caught.value)
    assert ended(loaders)


class Wrong(Failing):
    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        raise KeyError("a mistake of ours")


def test_a_mistake_of_ours_has_its_traceback(student: ClipModel, data: GlyphBatches) -> None:
    wrong: Any = Wrong(data, 0)
    with pytest.raises(RuntimeError, match=r"(?s)worker of the data loader.*in batch.*a mistake of ours"):
        list(load_batches(wrong, range(3), slice(None), student, None, 1))


def test_more_memory_than_there_is_is_one_message() -> None:
    with pytest.raises(ClipkdError, match=r"2 worker\(s\) with .* MB of shared memory cannot start: "):
        Workers(str, 2, 1 << 56)  # type: ignore[arg-type]
