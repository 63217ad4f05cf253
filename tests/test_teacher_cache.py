"""The teacher cache: the features of the very views that training shows, whole shards or none, and nobody else's."""

import json
import multiprocessing
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ended, make_shards
from killable import start
from training import BATCH_SIZE, STUDENT, cache_of, configured, files, spec

from toolchain import stage as stages
from toolchain.data.bad_samples import Damage
from toolchain.data.batch import Batch, TrainingData
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.data.open import training_data
from toolchain.distillation import make_teacher_cache as caching
from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.loader import load_batches
from toolchain.distillation.make_teacher_cache import CachePlan, break_even, make_cache, needed_bytes
from toolchain.distillation.objectives import OBJECTIVES
from toolchain.distillation.teacher import CachedTeacher, live_teacher
from toolchain.distillation.teacher_cache import TeacherCache, open_cache, shard_path
from toolchain.distillation.training_module import TrainingModule
from toolchain.distributed import ALONE
from toolchain.errors import ArtifactError, ClipkdError
from toolchain.models.build import load_model, save_model
from toolchain.recipe.data import WebdatasetSpec
from toolchain.recipe.distill import LossWeights

SHARD = 16
MIN_COSINE = {"float32": 0.9999, "float16": 0.9999, "bfloat16": 0.9999, "int8": 0.999}
"""The issue's bound; int8 keeps 8 bits of the largest of 64 numbers, half a step of error in each."""

MAX_RELATIVE_TERM_ERROR = 1e-5  # float32 features of other batches: sums in another order
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_SAMPLES", SHARD)
    monkeypatch.setattr(caching, "CHUNK", 5)


@pytest.fixture
def glyphs(tiny_samples: TrainingSet) -> GlyphBatches:
    return GlyphBatches(tiny_samples, 3, BATCH_SIZE, 2)


@pytest.fixture
def shards(tmp_path: Path) -> TrainingData:
    make_shards(tmp_path / "shards", 2, 20, sizes=(40, 60))
    names = (str(tmp_path / "shards" / "{00000..00001}.tar"),)
    return training_data(WebdatasetSpec(kind="webdataset", shards=names, views=2), seed=3, batch_size=BATCH_SIZE)


@pytest.mark.parametrize("dtype", MIN_COSINE)
@pytest.mark.parametrize("source", ["glyphs", "shards"])
def test_cached_features_are_live_ones_of_the_same_view(
    tmp_path: Path, teacher_folder: Path, request: pytest.FixtureRequest, source: str, dtype: str
) -> None:
    data: TrainingData = request.getfixturevalue(source)
    teacher, student = load_model(teacher_folder), load_model(STUDENT, random_seed=0)
    live, cache = live_teacher(teacher, "fp32", CPU), cache_of(teacher, data, tmp_path / "cache", dtype=dtype)
    guide, views = CachedTeacher(torch.tensor(cache.logit_scale)), set()
    steps = range(2 * data.steps_per_epoch + 1)
    both = zip(
        load_batches(data, steps, slice(None), student, teacher, 0),
        load_batches(data, steps, slice(None), student, cache, 0),
        strict=True,
    )
    for shown, looked_up in both:
        views.add(shown.view)
        for said, stored in zip(live.features(shown)[:2], guide.features(looked_up)[:2], strict=True):
            assert (said * stored).sum(-1).min().item() >= MIN_COSINE[dtype]
            assert stored.norm(dim=-1).sub(1).abs().max().item() < MAX_RELATIVE_TERM_ERROR
    assert views == {0, 1}


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sigmoid_kd"])  # of sigmoid models
def test_every_objective_has_the_live_teachers_value(
    tmp_path: Path, glyphs: GlyphBatches, wide_teacher: Path, masked_folder: Path, objective: str
) -> None:
    weights = LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | {objective: 1.0})
    teacher = load_model(wide_teacher)
    live, cache = live_teacher(teacher, "fp32", CPU), cache_of(teacher, glyphs, tmp_path / "cache")
    losses = []
    for guide, source in ((live, teacher), (CachedTeacher(torch.tensor(cache.logit_scale)), cache)):
        student = load_model(masked_folder, random_seed=0)
        torch.manual_seed(0)
        trained = TrainingModule(student, source, spec(loss_weights=weights), ALONE)
        (batch,) = load_batches(glyphs, range(4, 5), slice(None), student, source, 0)
        forward = Forward(trained, trained, spec(loss_weights=weights), ALONE, 0)
        done = forward.run(batch, guide.features(batch), 4)
        losses.append(done.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=MAX_RELATIVE_TERM_ERROR)


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("wide")
    (parent / "teacher").mkdir()
    wide = load_model(configured(parent / "config", model_cfg={"embed_dim": 48}), random_seed=11)
    save_model(wide, parent / "teacher")
    return parent / "teacher"


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyphs student with a vision transformer, which can be masked."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    return configured(tmp_path_factory.mktemp("vit") / "config", model_cfg={"vision_cfg": vision})


class Damaged:
    """Data of which some samples cannot be shown."""

    def __init__(self, data: TrainingData, damaged: set[int]) -> None:
        self.data, self.damaged = data, damaged

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def read_view(self, sample_B: Any, view: int, geometries: Any) -> Batch:
        kept = np.array([sample not in self.damaged for sample in sample_B.tolist()], bool)
        whole = self.data.read_view(sample_B, view, geometries)
        pixels = {geometry: drawn[torch.from_numpy(kept)] for geometry, drawn in whole.pixels.items()}
        captions_B = [caption for caption, keep in zip(whole.captions_B, kept.tolist(), strict=True) if keep]
        lost = tuple(Damage(sample, "truncated picture", "somewhere") for sample in sample_B[~kept].tolist())
        return Batch(pixels, captions_B, sample_B[kept], whole.pick_B[kept], view, lost)

    def list_captions(self, sample_B: Any) -> list[tuple[str, ...]]:
        whole = self.data.list_captions(sample_B)
        return [() if s in self.damaged else c for s, c in zip(sample_B.tolist(), whole, strict=True)]


def test_damaged_samples_are_counted_and_lose_no_other(
    tmp_path: Path, glyphs: GlyphBatches, teacher_folder: Path
) -> None:
    teacher, damaged = load_model(teacher_folder), {0, 7, *range(16, 32), glyphs.num_samples - 1}
    data: Any = Damaged(glyphs, damaged)
    (tmp_path / "holed").mkdir()
    live = live_teacher(teacher, "fp32", CPU)
    depends = {"views": 2, "dtype": "float32", "shard_samples": SHARD}
    made = make_cache(
        live, data, tmp_path / "holed", CachePlan(depends, "float32", num_views=2, steps=9), lambda *_: None
    )
    assert made["damaged"] == {"truncated picture": len(damaged)}
    assert made["samples"] == glyphs.num_samples
    holed = TeacherCache(tmp_path / "holed", depends | {"embed_dim": teacher.embed_dim, "logit_scale": 1.0})
    whole = cache_of(teacher, glyphs, tmp_path / "whole")
    good_B = np.array([sample for sample in range(glyphs.num_samples) if sample not in damaged])
    pick_B = np.ones(len(good_B), np.int64)
    for found, expected in zip(holed.features(good_B, pick_B, 1), whole.features(good_B, pick_B, 1), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    for sample in sorted(damaged):
        with pytest.raises(ClipkdError, match=f"sample {sample} has no features for view 1"):
            holed.features(np.array([sample]), np.array([1]), 1)


def test_workers_change_no_byte_and_end(
    tmp_path: Path, glyphs: GlyphBatches, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of corrupt samples alone, and of fewer samples at a shard's end, are the same from other processes."""
    monkeypatch.setattr(caching, "CHUNK", 12)
    data: Any = Damaged(glyphs, {0, 7, *range(12, 32), glyphs.num_samples - 1})
    live = live_teacher(load_model(teacher_folder), "fp32", CPU)
    depends = {"views": 2, "dtype": "float16", "shard_samples": SHARD}
    before = multiprocessing.active_children()
    for workers in (0, 1, 2):
        (tmp_path / str(workers)).mkdir()
        plan = CachePlan(depends, "float16", num_views=2, steps=9, workers=workers)
        made = make_cache(live, data, tmp_path / str(workers), plan, lambda *_: None)
        assert made["damaged"] == {"truncated picture": len(data.damaged)}
        assert multiprocessing.active_children() == before
    first, *others = ({p.name: p.read_bytes() for p in (tmp_path / str(w)).iterdir()} for w in (0, 1, 2))
    assert len(first) > 2
    assert all(other == first for other in others)


def test_an_error_in_a_worker_ends_all(
    tmp_path: Path, glyphs: GlyphBatches, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Batch:
        raise ClipkdError("00000.tar: has changed")

    monkeypatch.setattr(GlyphBatches, "read_view", fail)
    live, before = live_teacher(load_model(teacher_folder), "fp32", CPU), multiprocessing.active_children()
    plan = CachePlan({"views": 2, "dtype": "float32", "shard_samples": SHARD}, "float32", 2, steps=9, workers=2)
    with pytest.raises(ClipkdError, match=r"^00000\.tar: has changed$"):
        make_cache(live, glyphs, tmp_path, plan, lambda *_: None)
    assert multiprocessing.active_children() == before


def test_a_cache_of_something_else_is_refused_with_what_differs(tmp_path: Path) -> None:
    found = {"seed": 0, "teacher": {"weights": "ab"}, "data": {"crop_scale": [0.5, 1.0]}, "embed_dim": 4}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(found))
    assert open_cache(tmp_path / "cache", found).embed_dim == 4
    expected = {"seed": 1, "teacher": {"weights": "cd"}, "data": {"crop_scale": (0.9, 1.0)}}
    with pytest.raises(ArtifactError) as caught:
        open_cache(tmp_path / "cache", expected)
    for difference in (
        "data.crop_scale: expected [0.9, 1.0], got [0.5, 1.0]",
        "seed: expected 1, got 0",
        "teacher.weights: expected cd, got ab",
    ):
        assert difference in str(caught.value)


def test_what_it_saves_and_needs_is_right(tmp_path: Path, glyphs: GlyphBatches, teacher_folder: Path) -> None:
    per_epoch, samples = glyphs.steps_per_epoch, glyphs.num_samples
    said = break_even(glyphs, 2, 10 * per_epoch)
    assert said == (
        f"teacher passes: {10 * samples:,} live (10.0 epochs), {2 * samples:,} cached (2 views): 5.0 times fewer"
    )
    assert "no saving; lower data.views or train uncached" in break_even(glyphs, 2, per_epoch)
    teacher = load_model(teacher_folder)
    cache_of(teacher, glyphs, tmp_path / "cache")
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    header = 1024 * len(list((tmp_path / "cache").glob("*.safetensors")))
    assert size <= needed_bytes(glyphs, 2, teacher.embed_dim, "float32") + header


def test_a_disk_too_small_is_refused_before_the_teacher_runs(
    tmp_path: Path, glyphs: GlyphBatches, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = caching.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ClipkdError, match=r"the teacher cache needs .* more, and the disk has 0\.0 MB free"):
        cache_of(load_model(teacher_folder), glyphs, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


# The command.


def test_progress_counts_the_samples_and_not_full_shards(
    tmp_path: Path, glyphs: GlyphBatches, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD_SAMPLES", 16)
    shown: list[tuple[int, int]] = []
    cache_of(
        load_model(teacher_folder),
        glyphs,
        tmp_path / "cache",
        lambda what, done, total, note: shown.append((done, total)),
    )
    assert glyphs.num_samples % 16
    assert glyphs.num_views
    everything = glyphs.num_samples * glyphs.num_views
    assert shown[-1] == (everything, everything)
    assert {total for _, total in shown} == {everything}
    assert all(done < everything for done, _ in shown[:-1])


def test_distill_reuses_what_cache_made(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = {"steps": 3, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 0, "teacher_cache": {"dtype": "float16"}}
    recipe = tiny_recipe(distill=distill)
    ended = clipkd("cache", recipe, "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    assert "teacher passes:" in ended.err
    summary = json.loads(ended.out)["teacher-cache/teacher"]
    assert summary["fidelity"]["image_cosine_worst"] >= MIN_COSINE["float16"]
    before = files(tmp_path / "run" / "teacher-cache")
    ended = clipkd("distill", recipe, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert files(tmp_path / "run" / "teacher-cache") == before
    other = {**distill, "teacher_cache": {"dtype": "float16", "path": str(tmp_path / "run/teacher-cache/teacher")}}
    ended = clipkd("distill", tiny_recipe("elsewhere", distill=other), "--out", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "other" / "teacher-cache").exists()
    students = [files(tmp_path / run / "student") for run in ("run", "other")]
    assert students[0] == students[1]
    monkeypatch.setattr(stages, "COSTLY_S", 0.0)
    ended = clipkd("distill", recipe, "--out", tmp_path / "run", "--set", "seed=5")
    assert ended.code == 1
    for stage in ("student", "teacher-cache/teacher"):
        assert re.search(
            f"/{stage} would be replaced. It took [0-9]+ s and is of another recipe: seed 0 -> 5", ended.err
        )
    path = shard_path(tmp_path / "run" / "teacher-cache" / "teacher", 0)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    ended = clipkd("verify", tmp_path / "run")
    assert ended.code == 1
    assert "00000.safetensors: changed since clipkd wrote it" in ended.err


def test_further_teachers_have_a_cache_each_from_their_own_weights(
    clipkd: Callable[..., Ended],
    tiny_recipe: Callable[..., Path],
    teacher_folder: Path,
    wide_teacher: Path,
    tmp_path: Path,
) -> None:
    also = [{"model": str(teacher_folder)}, {"model": str(wide_teacher)}]
    distill = {"steps": 3, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 0, "teacher_cache": {"also": also}}
    ended = clipkd("cache", tiny_recipe(distill=distill), "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    assert list(json.loads(ended.out)) == [f"teacher-cache/teacher{end}" for end in ("", "-2", "-3")]
    first, same, other = (files(tmp_path / "run" / "teacher-cache" / f"teacher{end}") for end in ("", "-2", "-3"))
    assert same == first, "the same weights, and none drawn from the seed"
    assert other["00000.safetensors"] != first["00000.safetensors"]
    assert clipkd("verify", tmp_path / "run").code == 0
    distill["teacher_cache"] = {"also": [{"recipe": "glyphs_teacher"}]}
    ended = clipkd("cache", tiny_recipe(distill=distill), "--out", tmp_path / "run")
    assert ended.code == 2
    assert "name its run as model" in ended.err


def test_a_cache_needs_a_number_of_views(clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path]) -> None:
    data = {"kind": "webdataset", "shards": ["x.tar"]}
    distill = {"steps": 3, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 0, "teacher_cache": {}}
    ended = clipkd("cache", tiny_recipe(data=data, distill=distill), "--out", "nowhere")
    assert ended.code == 2
    assert "distill.teacher_cache needs data.views" in ended.err


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_bytes_are_the_same(
    tiny_recipe: Callable[..., Path], tmp_path: Path, kills: int
) -> None:
    distill = {"steps": 3, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 0, "teacher_cache": {}}
    recipe, seed = tiny_recipe(distill=distill), random.randrange(1 << 30)
    chosen = random.Random(seed)
    where: dict[str, Any] = {"cache": tmp_path / "cache", "said": tmp_path / "said"}
    assert start("cache", recipe, "--out", tmp_path / "whole", **where).ends()[0] == 0, where["said"].read_text()
    killed = 0
    while killed < kills:
        process = start("cache", recipe, "--out", tmp_path / "parts", **where)
        shown = chosen.randint(0, 8)
        heard: list[Any] = []
        if process.hears(lambda what, heard=heard, shown=shown: heard.append(what) or len(heard) > shown):
            time.sleep(chosen.uniform(0, 0.02))
            process.kill()
            killed += 1
        else:  # it ended first: from the start again
            process.ends()
            shutil.rmtree(tmp_path / "parts")
    assert start("cache", recipe, "--out", tmp_path / "parts", **where).ends()[0] == 0, where["said"].read_text()
    expected, found = (files(tmp_path / run / "teacher-cache" / "teacher") for run in ("whole", "parts"))
    assert len(expected) > 3
    assert sorted(found) == sorted(expected), f"seed of the kills: {seed}"
    assert found == expected, f"seed of the kills: {seed}"
    manifests = [
        json.loads((tmp_path / run / "teacher-cache/teacher/manifest.json").read_text()) for run in ("whole", "parts")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]
