"""Training runs of a few dozen samples, which the tests of training share."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import STUDENT

from toolchain.data.batch import TrainingData
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation import make_teacher_cache as caching
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.distill import CHECKPOINTS, Training, distill
from toolchain.distillation.make_teacher_cache import CachePlan, make_cache
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import ABOUT, TeacherCache, open_cache
from toolchain.distillation.training_options import TrainingOptions
from toolchain.distributed import ALONE, Processes
from toolchain.models.build import load_model
from toolchain.models.clip_model import ClipModel
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.model_names import CONFIG
from toolchain.stage import SCRATCH

BATCH_SIZE = 8
STEPS = 11  # more than an epoch of the tiny samples, so that a second view is shown
TIMES = {"images_per_s", "data_fraction", "teacher_fraction"}
"""What of a row of the log is time, and differs from run to run."""

USUAL, EVERY_STEP = TrainingOptions(), TrainingOptions(checkpoint_steps=1)
"""Checkpoints at the end alone, as few tests take a minute, and after every step."""


def silent(what: str, done: int, total: int, note: str = "") -> None:
    pass


def spec(**changes: Any) -> DistillSpec:
    return DistillSpec(**({"steps": STEPS, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 3} | changes))


def train(
    folder: Path,
    samples: TrainingSet,
    teacher: Path | None,
    progress: Callable[..., None] = silent,
    *,
    seed: int = 0,
    options: TrainingOptions = USUAL,
    processes: Processes = ALONE,
    accuracy: Callable[[ClipModel, Processes], dict[str, float]] | None = None,
    student: Path = STUDENT,
    cached: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> ClipModel:
    """What the distil stage does, and where the teacher is cached what that stage does before it."""
    folder.mkdir(exist_ok=True, parents=True)
    trained = load_model(student, random_seed=seed)
    frozen = load_model(teacher) if teacher else None
    data = GlyphBatches(samples, seed, BATCH_SIZE, 2)
    guide: ClipModel | TeacherCache | None = frozen
    if cached and frozen:
        processes.rows(BATCH_SIZE)
        guide = cache_of(frozen, data, folder / SCRATCH / "cache", progress)
    training = Training(spec(**changes), trained, guide, data, seed=seed, accuracy=accuracy)
    distill(training, folder, progress, options=options, processes=processes, say=say)
    return trained


def cache_of(
    teacher: ClipModel, data: TrainingData, folder: Path, progress: Callable[..., None] = silent, **changes: Any
) -> TeacherCache:
    """The teacher's features of every view, made where they are not there yet."""
    folder.mkdir(exist_ok=True, parents=True)
    if not (folder / "complete").exists():
        assert data.num_views
        views, dtype = data.num_views, changes.get("dtype", "float32")
        live = live_teacher(teacher, "fp32", torch.device("cpu"))
        depends = {"views": views, "dtype": dtype, "shard_samples": caching.SHARD_SAMPLES}
        make_cache(live, data, folder, CachePlan(depends, dtype, num_views=views, steps=STEPS), progress)
        (folder / "complete").touch()
    return open_cache(folder, {**json.loads((folder / ABOUT).read_text())})


def configured(folder: Path, source: Path = STUDENT, **changes: Any) -> Path:
    """A model's configuration and tokenizer in a new folder, some of its model_cfg and preprocess_cfg changed."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    for section in ("model_cfg", "preprocess_cfg"):
        config[section] |= changes.get(section, {})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    parsed = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in parsed]


def last_state(folder: Path) -> dict[str, Any]:
    """The last checkpoint's content: weights, heads, the optimizer's and the scaler's state, and the step."""
    state = Checkpoints(folder / CHECKPOINTS).load(lambda text: None)
    assert state is not None
    return {name: value for name, value in state.items() if name != "elapsed_s"}


def files(folder: Path) -> dict[str, bytes]:
    """What is saved, but for what is named or dated by the time it was made."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder): path for path in paths}
    left_out = {".scratch", "tensorboard", "train.jsonl", "manifest.json"}
    return {str(name): path.read_bytes() for name, path in names.items() if name.parts[0] not in left_out}


def assert_same_state(first: Any, second: Any, where: str = "") -> None:
    """Bit for bit, and in the same structure."""
    assert type(first) is type(second), where
    if isinstance(first, Mapping):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same_state(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_state(*pair, f"{where}.{index}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def assert_same_run(first: Path, second: Path) -> None:
    """Two runs wrote the same weights, ended in the same optimizer state and logged the same numbers."""
    found, expected = files(first), files(second)
    assert "open_clip_model.safetensors" in found
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == expected[name], name
    assert rows(first) == rows(second)
    assert_same_state(last_state(first), last_state(second))
