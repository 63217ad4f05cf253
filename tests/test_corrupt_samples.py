"""Every kind of data, whole and damaged: what is shown, counted and named, and that nothing else is lost.

B batch   N samples
"""

import csv
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STUDENT, Ended, jpeg, make_picture, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter
from torch.utils.data import DataLoader, Dataset
from training import configured, rows, silent, spec
from two_processes import spawn

from toolchain.data.assemble import fill_batch
from toolchain.data.bad_samples import REASONS, Damage, Ledger, LeftOut
from toolchain.data.batch import Batch, Geometry, TrainingData
from toolchain.data.csv_listing import read_csv_rows, split_fields
from toolchain.data.inspection import inspect
from toolchain.data.open import fingerprint, training_data
from toolchain.data.packing import pack
from toolchain.data.shared_captions import warn_of_shared_captions
from toolchain.distillation import make_teacher_cache as caching
from toolchain.distillation.distill import Training, distill
from toolchain.distillation.make_teacher_cache import CachePlan, make_cache
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import ABOUT, TeacherCache
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError, UsageError
from toolchain.models.build import load_model
from toolchain.recipe.data import DataSpec
from toolchain.recipe.distill import LossWeights

SMALL = Geometry(16, "bicubic")
EVERYTHING = slice(None)
BATCH = 8
PER_REASON = 34
GOOD = 120
MAX_RELATIVE_LOSS_ERROR = 1e-3  # of float32 sums in another order, carried on over 40 steps


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(batch_size: int = BATCH, seed: int = 0, **fields: Any) -> TrainingData:
    parsed: DataSpec = TypeAdapter(DataSpec).validate_python(fields)
    return training_data(parsed, seed=seed, batch_size=batch_size)


def png(picture: Image.Image, **options: Any) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", **options)
    return encoded.getvalue()


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 by its header, and of a few bytes."""
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (header, body, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SOUND = [jpeg(make_picture(40, 30, seed=number)) for number in range(4)]


def odd_but_sound() -> dict[str, bytes]:
    """Pictures that are unusual and no damage."""
    exif = Image.Exif()
    exif[0x0112] = 6
    broken_exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40))
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    webp = io.BytesIO()
    frames[0].save(webp, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return {
        "1x1.png": png(Image.new("RGB", (1, 1), "red")),
        "cmyk.jpg": jpeg(Image.new("CMYK", (30, 20))),
        "palette.png": png(Image.new("P", (30, 20))),
        "16bit.png": png(Image.fromarray(np.full((20, 30), 999, np.uint16))),
        "turned.jpg": jpeg(make_picture(30, 20, seed=9), exif=exif),
        "exif_of_nothing.jpg": jpeg(make_picture(30, 20, seed=9), exif=broken_exif),
        "exif_of_junk.jpg": jpeg(make_picture(30, 20, seed=9), exif=b"Exif\0\0junkjunkjunk"),
        "animated.png": png(frames[0], save_all=True, append_images=frames[1:]),
        "animated.webp": webp.getvalue(),
        "la.png": png(Image.new("LA", (30, 20))),
        "rgba.png": png(Image.new("RGBA", (30, 20))),
        "wide.jpg": jpeg(Image.new("L", (20_000, 4)), quality=30),
    }


DAMAGED = {
    "truncated image": SOUND[0][: len(SOUND[0]) // 2],
    "not an image": b"<html>no longer here</html>",
    "zero-byte file": b"",
    "too large an image": bomb(),
}
"""Pictures' contents by what is wrong with them."""


def pictures() -> list[tuple[str, bytes, str]]:
    """Name, content and reason ("" for none) of good and damaged pictures."""
    made = [(f"good{number:03}.jpg", SOUND[number % 4], "") for number in range(GOOD)]
    made += [(name, content, "") for name, content in odd_but_sound().items()]
    made += [
        (f"{reason.partition(' ')[0]}{number:03}.jpg", content, reason)
        for reason, content in DAMAGED.items()
        for number in range(PER_REASON)
    ]
    return made


def write_webdataset(folder: Path) -> tuple[dict[str, Any], Counter[str]]:
    members: list[tuple[str, bytes]] = []
    expected: Counter[str] = Counter()
    for name, content, reason in pictures():
        key = name.replace(".", "-")
        members += [(f"{key}.jpg", content), (f"{key}.txt", name.encode())]
        expected[reason] += 1
    for number in range(PER_REASON):
        for key, kind, caption, reason in [
            ("latin", "txt", b"caf\xe9", "bad UTF-8"),
            ("blank", "txt", b" \n", "missing caption"),
            ("json", "json", b'{"caption', "bad JSON"),
            ("../../escaped", "txt", b"", "missing caption"),
        ]:
            members += [(f"{key}{number:03}.jpg", SOUND[0]), (f"{key}{number:03}.{kind}", caption)]
            expected[reason] += 1
        members += [(f"/alone{number:03}.txt", b"alone")]
        expected["missing image"] += 1
    write_tar(folder / "whole.tar", members[: len(members) // 4 * 2])
    path = write_tar(folder / "cut.tar", members[len(members) // 4 * 2 :])
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    expected["broken tar"] = 1
    return {"kind": "webdataset", "shards": [str(folder / "{whole,cut}.tar")]}, expected


def write_csv(folder: Path) -> tuple[dict[str, Any], Counter[str]]:
    expected: Counter[str] = Counter()
    lines = [b"file,title"]
    for name, content, reason in pictures():
        (folder / name).write_bytes(content)
        lines.append(f'{name},"{name}, quoted"'.encode())
        expected[reason] += 1
    for number in range(PER_REASON):
        for line, reason in [
            (f"gone{number}.jpg,gone", "no such file"),
            (f"good{number:03}.jpg,a,b", "wrong number of columns"),
            (f'good{number:03}.jpg,"open', "unbalanced quote"),
            (f"blank{number}.jpg, ", "missing caption"),
            (",nothing", "missing image"),
        ]:
            lines.insert(2 + number * 3, line.encode())
            expected[reason] += 1
        lines.insert(5, b"caf\xe9.jpg,a")
        expected["bad UTF-8"] += 1
    path = folder / "list.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    columns = {"image_column": "file", "caption_column": "title", "delimiter": ",", "quoted": True}
    return {"kind": "csv", "paths": [str(path)]} | columns, expected


def write_folders(folder: Path) -> tuple[dict[str, Any], Counter[str]]:
    expected: Counter[str] = Counter()
    for number, (name, content, reason) in enumerate(pictures()):
        path = folder / "root" / f"class_{number % 3}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        expected[reason] += 1
    for number in range(2 * PER_REASON):
        (folder / "root" / "class_0" / f"half{number}.png").write_bytes(png(make_picture(20, 20, 0))[:-200])
        expected["truncated image"] += 1
    return {"kind": "image_folder", "path": str(folder / "root")}, expected


WRITERS = {"webdataset": write_webdataset, "csv": write_csv, "image_folder": write_folders}


def shown_once(data: TrainingData) -> tuple[Counter[str], Counter[int]]:
    """The distinct damage of an epoch and how often each sample was shown in it."""
    damaged: dict[int, str] = {}
    shown: Counter[int] = Counter()
    for step in range(data.steps_per_epoch):
        batch = data.batch(step, EVERYTHING, [SMALL])
        assert len(batch.sample_B) == len(set(batch.sample_B.tolist())) == BATCH
        assert len(batch.captions_B) == len(batch.pixels[SMALL]) == BATCH
        shown.update(batch.sample_B.tolist())
        damaged.update({damage.sample: damage.reason for damage in batch.damaged})
    return Counter(damaged.values()), shown


class Letters:
    """Seven samples without images, in the order of their numbers, of which some are corrupt."""

    num_samples, batch_size, steps_per_epoch, num_views, left_out = 7, 2, 3, None, ()

    def __init__(self, corrupt: str) -> None:
        self.corrupt, self.tried = corrupt, list[str]()

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop)

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        letters = ["abcdefg"[sample] for sample in sample_B.tolist()]
        self.tried.append("".join(letters))
        is_good_B = np.array([letter not in self.corrupt for letter in letters])
        damaged = [Damage(s, "lost", "abcdefg"[s]) for s in sample_B[~is_good_B].tolist()]
        good = [letter for letter in letters if letter not in self.corrupt]
        return Batch({}, good, sample_B[is_good_B], np.zeros(len(good), np.int64), view, tuple(damaged))


@pytest.mark.parametrize(
    ("corrupt", "shown", "tried"),
    [
        ("", "cd", ["cd"]),
        ("cd", "ef", ["cd", "ef"]),
        ("c", "ed", ["cd", "e"]),
        ("cdef", "ga", ["cd", "ef", "ga"]),
        ("cdefga", None, ["cd", "ef", "ga", "b", "c"]),
        ("cefgab", "dd", ["cd", "e", "g", "b", "d"]),
    ],
)
def test_what_is_tried_in_place_of_a_corrupt_sample(corrupt: str, shown: str | None, tried: list[str]) -> None:
    """The example of `fill_batch`."""
    data: Any = Letters(corrupt)
    if shown is None:
        with pytest.raises(ClipkdError, match=r"step 1: every sample tried for 1 row\(s\)"):
            fill_batch(data, 1, EVERYTHING, [])
    else:
        batch = fill_batch(data, 1, EVERYTHING, [])
        assert "".join(batch.captions_B) == shown
        assert {damage.where for damage in batch.damaged} == set(corrupt) & set("".join(tried))
    assert data.tried == tried


def test_a_kind_of_data_states_its_facts_beside_its_fields(kinds: dict[str, dict[str, Any]]) -> None:
    adapter: TypeAdapter[DataSpec] = TypeAdapter(DataSpec)
    parsed = {kind: adapter.validate_python(fields) for kind, fields in kinds.items()}
    glyphs = parsed["glyphs"] = adapter.validate_python({"kind": "glyphs"})
    parsed["mixed"] = adapter.validate_python({"kind": "mixture", "sources": [kinds["csv"], kinds["images"]]})
    captionless = {kind: spec.captionless_kind for kind, spec in parsed.items() if spec.captionless_kind}
    assert captionless == {"images": "images", "mixed": "images"}
    assert [kind for kind, spec in parsed.items() if not spec.needs_loader_workers] == ["glyphs"]
    assert [kind for kind, spec in parsed.items() if not spec.is_stored] == ["glyphs"]
    assert [kind for kind, spec in parsed.items() if spec.licence] == ["glyphs"]
    assert glyphs.max_damaged == 1.0
    assert glyphs.model_dump() == {"kind": "glyphs", "views": 3}, "no fact is part of a stage's key"


@pytest.mark.parametrize("kind", WRITERS)
def test_hundreds_of_damaged_samples_are_trained_through(kind: str, tmp_path: Path, one_thread: None) -> None:
    fields, expected = WRITERS[kind](tmp_path)
    good = expected.pop("")
    assert expected.total() >= 200
    data = opened(**fields)
    epochs = 2  # so that what fits into no batch of one epoch is met in another
    student = load_model(STUDENT, random_seed=0)
    said: list[str] = []
    steps = epochs * data.steps_per_epoch
    weights = {"loss_weights": {"task": 1, "crd": 0, "fd": 0, "icl": 0}}
    (tmp_path / "run").mkdir()
    training = Training(spec(steps=steps, **weights), student, None, data, max_damaged=1.0)
    summary = distill(training, tmp_path / "run", silent, say=said.append)
    assert summary["damaged"] == dict(sorted(expected.items()))
    assert set(expected) <= set(REASONS)
    assert set(summary["damaged_first"]) == set(expected)
    assert all(1 <= len(examples) <= 5 for examples in summary["damaged_first"].values())
    met_while_training = set(expected) - {left.reason for left in data.left_out}
    assert {text.partition(":")[0] for text in said} >= met_while_training
    assert len(said) <= len(expected)
    # No good sample is lost: each can be shown, and nothing else can.
    everything = data.read_view(np.arange(data.num_samples), 0, [SMALL])
    assert len(everything.sample_B) == good
    assert len(everything.damaged) == data.num_samples - good
    assert not list(tmp_path.parent.glob("escaped*"))


def trained_through(processes: Processes, fields: dict[str, Any], model: str, folder: str) -> dict[str, int]:
    """A process's part of training on damaged data; the counts that the manifest would say."""
    said: list[str] = []
    student = load_model(Path(model), random_seed=0)
    weights = {"loss_weights": {"task": 1, "crd": 0, "fd": 0, "icl": 0}}
    asked = spec(steps=40, **weights)
    training = Training(asked, student, None, opened(**fields), max_damaged=1.0)
    summary = distill(training, Path(folder), silent, processes=processes, say=said.append)
    assert bool(said) == processes.leads, "one of the processes speaks"
    counts: dict[str, int] = summary["damaged"]
    return counts


def test_two_processes_count_and_show_what_one_does(tmp_path: Path, one_thread: None) -> None:
    fields, _ = write_csv(tmp_path)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    vit = str(configured(tmp_path / "vit", model_cfg={"vision_cfg": vision}))  # no batch norms: one batch's statistics
    expected = trained_through(ALONE, fields, vit, str(alone))
    assert spawn([(trained_through, fields, vit, str(together))]) == [[expected, expected]]
    assert "truncated image" in expected
    for found, row in zip(rows(together), rows(alone), strict=True):
        assert found["loss"] == pytest.approx(row["loss"], rel=MAX_RELATIVE_LOSS_ERROR)


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
def test_a_run_stops_when_too_much_is_damaged(kind: str, tmp_path: Path) -> None:
    fields, _ = WRITERS[kind](tmp_path)
    student = load_model(STUDENT, random_seed=0)
    weights = {"loss_weights": {"task": 1, "crd": 0, "fd": 0, "icl": 0}}
    data = opened(**fields)
    stopped = r"% of the samples are corrupt, estimated from .*data.max_damaged allows 10.0%"
    with pytest.raises(ClipkdError, match=stopped):
        distill(Training(spec(steps=200, **weights), student, None, data), tmp_path, silent)


@pytest.mark.parametrize("kind", WRITERS)
def test_inspecting_and_packing_count_the_same_damage(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    fields, expected = WRITERS[kind](tmp_path / "source")
    good = expected.pop("")
    parsed: DataSpec = TypeAdapter(DataSpec).validate_python(fields)
    found = inspect(parsed)
    assert {reason: damage["count"] for reason, damage in found["broken"].items()} == expected
    assert all(len(damage["examples"]) == min(5, damage["count"]) for damage in found["broken"].values())
    assert found["good"] == good
    index = pack(parsed, tmp_path / "packed", samples_per_shard=50)
    assert {reason: damage["count"] for reason, damage in index["left_out"].items()} == expected
    assert index["samples"] == good
    packed = opened(kind="webdataset", shards=[str(tmp_path / "packed" / shard["name"]) for shard in index["shards"]])
    assert packed.num_samples == good
    everything = packed.read_view(np.arange(good), 0, [SMALL])
    assert everything.damaged == ()
    again = pack(parsed, tmp_path / "again", samples_per_shard=50)
    assert [shard["sha256"] for shard in again["shards"]] == [shard["sha256"] for shard in index["shards"]]
    if kind == "image_folder":  # by chance, not class after class
        captions = packed.read_view(np.arange(20), 0, []).captions_B
        assert set(captions) == {f"a photo of a class {number}." for number in range(3)}


@pytest.mark.parametrize("kind", [*WRITERS, "mixture"])
def test_a_teacher_cache_counts_the_same_damage_and_trains_through_it(
    kind: str, tmp_path: Path, teacher_folder: Path, one_thread: None
) -> None:
    if kind == "mixture":
        expected = Counter[str]()
        sources = []
        for part in WRITERS:
            (tmp_path / part).mkdir()
            fields, damage = WRITERS[part](tmp_path / part)
            sources.append(fields)
            expected += damage
        fields = {"kind": "mixture", "sources": sources, "repeat": [2, 1, 1]}
    else:
        fields, expected = WRITERS[kind](tmp_path)
    expected.pop("")
    data = opened(**fields, views=2)
    teacher, student = load_model(teacher_folder), load_model(STUDENT, random_seed=0)
    live = live_teacher(teacher, "fp32", torch.device("cpu"))
    folder = tmp_path / "features"
    folder.mkdir()
    depends = {"views": 2, "dtype": "float16", "shard_samples": caching.SHARD_SAMPLES}
    made = make_cache(live, data, folder, CachePlan(depends, "float16", num_views=2, steps=10), silent)
    assert made["damaged"] == dict(sorted(expected.items()))
    cache = TeacherCache(folder, json.loads((folder / ABOUT).read_text()))
    (tmp_path / "run").mkdir()
    steps = 3 * data.steps_per_epoch
    training = Training(spec(steps=steps), student, cache, data, max_damaged=1.0)
    summary = distill(training, tmp_path / "run", silent)
    assert summary["damaged"] == made["damaged"]


def test_pictures_without_captions_are_inspected_and_not_packed(
    kinds: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    parsed: DataSpec = TypeAdapter(DataSpec).validate_python(kinds["images"])
    assert inspect(parsed)["captions"] == 0
    mixed: DataSpec = TypeAdapter(DataSpec).validate_python(
        {"kind": "mixture", "sources": [kinds["csv"], kinds["images"]]}
    )
    for source in (parsed, mixed):
        with pytest.raises(UsageError, match="its images have no captions"):
            pack(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["webdataset", "csv", "image_folder", "images", "mixture"])
def test_stored_views_repeat(kind: str, kinds: dict[str, dict[str, Any]]) -> None:
    data = opened(**kinds[kind] | {"views": 2})
    assert data.num_views == 2
    step = data.steps_per_epoch * 3
    batch = data.batch(step, EVERYTHING, [SMALL])
    assert batch.view == 1
    again = data.read_view(batch.sample_B, 1, [SMALL])
    assert torch.equal(again.pixels[SMALL], batch.pixels[SMALL])
    assert again.captions_B == batch.captions_B


def test_a_large_jpeg_of_many_scans_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those libjpeg keeps every coefficient, whatever the scale."""
    monkeypatch.setattr("toolchain.data.images.MAX_PIXELS", 100 * 100)
    (tmp_path / "root" / "a").mkdir(parents=True)
    picture = make_picture(300, 200, seed=0)
    for number in range(2):
        (tmp_path / "root" / "a" / f"{number}.jpg").write_bytes(jpeg(picture, progressive=bool(number)))
    (tmp_path / "root" / "a" / "2.png").write_bytes(png(picture))
    spec: dict[str, Any] = {"kind": "image_folder", "path": str(tmp_path / "root")}
    batch = opened(batch_size=2, **spec).read_view(np.arange(3), 0, [SMALL])
    assert batch.sample_B.tolist() == [0]
    assert [(damage.sample, damage.reason) for damage in batch.damaged] == [
        (1, "too large an image"),
        (2, "too large an image"),
    ]
    parsed: DataSpec = TypeAdapter(DataSpec).validate_python(spec)
    assert {reason: found["count"] for reason, found in inspect(parsed)["broken"].items()} == {"too large an image": 2}


def test_few_samples_stop_no_run_and_many_do() -> None:
    from toolchain.data.bad_samples import Damage

    ledger = Ledger([], 1_000_000, 0.01)
    ledger.add([Damage(3, "not an image", "here")])
    ledger.check(8)
    ledger.check(1000)
    ledger.add([Damage(3, "not an image", "here")])
    assert ledger.counts() == {"not an image": 1}, "once, however often it is met"
    ledger.add([Damage(n, "not an image", "here") for n in range(10, 20)])
    with pytest.raises(ClipkdError, match=r"1\.1% of the samples"):
        ledger.check(1000)
    ledger.check(1101)
    again = Ledger([], 1_000_000, 0.01)
    again.restore(json.loads(json.dumps(ledger.state())))
    assert again.met == ledger.met
    left = Ledger([LeftOut("missing caption", 5, ("a",))], 95, 0.04)
    with pytest.raises(ClipkdError, match=r"5\.0%"):
        left.check(95)


# Purity: whatever the workers, rows and history


def make_kinds(folder: Path) -> dict[str, dict[str, Any]]:
    made = {}
    for kind, write in WRITERS.items():
        (folder / kind).mkdir(parents=True)
        made[kind] = write(folder / kind)[0]
    (folder / "classes.txt").write_text("cat\ndog\nKäfer\n", encoding="utf-8")
    made["images"] = {
        "kind": "images",
        "path": str(folder / "image_folder" / "root"),
        "classes": str(folder / "classes.txt"),
    }
    made["mixture"] = {
        "kind": "mixture",
        "sources": [made["webdataset"], made["csv"], made["image_folder"]],
        "repeat": [1, 2, 1],
    }
    return made


KINDS = (*WRITERS, "images", "mixture")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return make_kinds(tmp_path_factory.mktemp("kinds"))


class Steps(Dataset[Batch]):
    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __getitem__(self, step: int) -> Batch:
        return self.data.batch(step, EVERYTHING, [SMALL])


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.pixels[SMALL], second.pixels[SMALL])
    assert first.captions_B == second.captions_B
    assert first.sample_B.tolist() == second.sample_B.tolist()
    assert first.pick_B.tolist() == second.pick_B.tolist()
    assert (first.view, set(first.damaged)) == (second.view, set(second.damaged))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_functions_of_seed_and_step(kind: str, kinds: dict[str, dict[str, Any]]) -> None:
    """In the middle of a shard, in another process, in any order, and however the rows are shared."""
    data = opened(**kinds[kind])
    steps = [2, data.steps_per_epoch - 1, data.steps_per_epoch + 3]
    straight = [data.batch(step, EVERYTHING, [SMALL]) for step in steps]
    assert any(batch.damaged for batch in straight)
    fresh = opened(**kinds[kind])
    for step, whole in reversed(list(zip(steps, straight, strict=True))):
        assert_same(fresh.batch(step, EVERYTHING, [SMALL]), whole)
        parts = [fresh.batch(step, rows, [SMALL]) for rows in (slice(0, 2), slice(2, 8))]
        assert torch.equal(torch.cat([part.pixels[SMALL] for part in parts]), whole.pixels[SMALL])
        assert np.concatenate([part.sample_B for part in parts]).tolist() == whole.sample_B.tolist()
        assert {damage for part in parts for damage in part.damaged} == set(whole.damaged)
    loader = DataLoader(Steps(opened(**kinds[kind])), batch_size=None, sampler=steps, num_workers=2)
    for made, whole in zip(loader, straight, strict=True):
        assert_same(made, whole)
    other = opened(seed=1, **kinds[kind])
    assert other.batch(2, EVERYTHING, [SMALL]).sample_B.tolist() != straight[0].sample_B.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_those_that_are_shown(kind: str, kinds: dict[str, dict[str, Any]]) -> None:
    data = opened(**kinds[kind])
    batch = data.batch(1, EVERYTHING, [SMALL])
    listed = data.list_captions(batch.sample_B)
    assert [captions[pick] for captions, pick in zip(listed, batch.pick_B, strict=True)] == batch.captions_B
    assert len(data.read_unaugmented(batch.sample_B, SMALL)) == BATCH


def test_a_mixture_shows_every_sample_of_every_turn_once_an_epoch(kinds: dict[str, dict[str, Any]]) -> None:
    data: Any = opened(**kinds["mixture"])
    for epoch in range(2):
        assert sorted(data.in_order(epoch, 0, data.num_samples).tolist()) == list(range(data.num_samples))
    counts = [opened(**kinds[kind]).num_samples for kind in ("webdataset", "csv", "image_folder")]
    assert data.num_samples == counts[0] + 2 * counts[1] + counts[2]
    first, second = data.parts[1], data.parts[2]
    batches = [data.read_view(np.array([part.first]), 0, [SMALL]) for part in (first, second)]
    same_picture = batches[0].captions_B == batches[1].captions_B
    assert same_picture
    assert not torch.equal(batches[0].pixels[SMALL], batches[1].pixels[SMALL]), "cropped anew"


def test_where_nothing_else_is_sound_a_row_is_shown_twice(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "cat"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(SOUND[number] if number else b"")
    data = opened(batch_size=4, kind="image_folder", path=str(tmp_path / "root"))
    batch = data.batch(0, EVERYTHING, [SMALL])
    assert sorted(Counter(batch.sample_B.tolist()).values()) == [1, 1, 2]
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(ClipkdError, match="every sample tried for 4 row"):
        opened(batch_size=4, kind="image_folder", path=str(tmp_path / "root")).batch(0, EVERYTHING, [SMALL])


def test_a_huge_jpeg_is_decoded_smaller(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "cat"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(jpeg(Image.new("L", (12_000, 8_000), 99), quality=20))
    shown = opened(batch_size=2, kind="image_folder", path=str(tmp_path / "root")).batch(0, EVERYTHING, [SMALL])
    assert shown.damaged == ()
    assert shown.pixels[SMALL].float().mean() == pytest.approx(99, abs=2)


# CSV


def rows_of(content: bytes, tmp_path: Path, *, quoted: bool = True) -> tuple[list[list[str]], Counter[str]]:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    rows = list(read_csv_rows(path, ",", quoted=quoted))
    return [row.fields for row in rows if not row.reason], Counter(row.reason for row in rows if row.reason)


def test_a_quoted_field_may_span_lines_and_an_open_quote_swallows_none(tmp_path: Path) -> None:
    good = b'a,b\r\n1,"two\nlines, ""quoted"""\r\n2,x\n'
    expected = [["a", "b"], ["1", 'two\nlines, "quoted"'], ["2", "x"]]
    assert rows_of(good, tmp_path) == (expected, Counter())
    found, broken = rows_of(b'a,b\n1,"open\n2,x\n3,y\n4,"z"\n', tmp_path)
    assert found == [["a", "b"], ["2", "x"], ["3", "y"], ["4", "z"]]
    assert broken == {"unbalanced quote": 1}
    assert rows_of(b'a,b\n1,"bare\n2,x"\n', tmp_path, quoted=False)[0] == [["a", "b"], ["1", '"bare'], ["2", 'x"']]
    assert rows_of(b"\xef\xbb\xbfa,b\n1,2", tmp_path)[0] == [["a", "b"], ["1", "2"]]


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(FIELD, min_size=2, max_size=2), min_size=1, max_size=6))
def test_what_csv_writes_is_read(tmp_path: Path, rows: list[list[str]]) -> None:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    for line, row in zip(written.getvalue().split("\n"), rows, strict=False):
        assert split_fields(line, ",", quoted=True) == row
    assert rows_of(b"a,b\n" + written.getvalue().encode(), tmp_path)[0][1:] == rows


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(st.sampled_from([b'"', b",", b"\n", b"\r\n", b"a.jpg,x\n", b'b.jpg,"y"\n']), st.binary(max_size=8)),
        max_size=25,
    )
)
def test_any_csv(tmp_path: Path, pieces: list[bytes]) -> None:
    """Data or a ClipkdError, and every line that is a good row by itself is one."""
    content = b"file,title\n" + b"".join(pieces)
    found, _ = rows_of(content, tmp_path)
    own = [line.removesuffix(b"\r") for line in content.split(b"\n")[1:]]
    whole = []
    for line in own:
        try:
            fields = split_fields(line.decode(), ",", quoted=True)
        except UnicodeDecodeError:
            continue
        if fields and len(fields) == 2:
            whole.append(fields)
    remaining = iter(found[1:])
    assert all(any(fields == other for other in remaining) for fields in whole), "in order, none swallowed"
    try:
        data = opened(
            batch_size=2,
            kind="csv",
            paths=[str(tmp_path / "rows.csv")],
            delimiter=",",
            image_column="file",
            caption_column="title",
            quoted=True,
        )
    except ClipkdError:
        return
    assert len(data.read_view(np.arange(data.num_samples), 0, [SMALL]).damaged) == data.num_samples


def test_rows_and_columns_of_a_picture_are_its_captions(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(SOUND[0])
    (tmp_path / "l.tsv").write_text("f\tone\ttwo\na.jpg\tA\tB\nb.jpg\tC\t\na.jpg\t\tD\n")
    columns = {"delimiter": "\t", "image_column": "f", "caption_column": ["one", "two"]}
    data = opened(batch_size=2, kind="csv", paths=[str(tmp_path / "l.tsv")], **columns)
    assert data.list_captions(np.arange(2)) == [("A", "B", "D"), ("C",)]
    (tmp_path / "l.tsv").write_text("changed")
    with pytest.raises(ClipkdError, match="has changed since training began"):
        data.batch(0, EVERYTHING, [SMALL])
    (tmp_path / "l.tsv").write_text("f, one\n")
    with pytest.raises(UsageError, match=r"called f, one, two; .* names: f, one\. Fix"):
        opened(batch_size=2, kind="csv", paths=[str(tmp_path / "l.tsv")], **columns)


def test_one_class_with_a_contrastive_loss_is_warned_of(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / "root" / "red_circle" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SOUND[number % 4])
    folder = {"kind": "image_folder", "path": str(tmp_path / "root"), "templates": ["a {}.", "the {}."]}
    data = opened(batch_size=2, **folder)
    (warning,) = warn_of_shared_captions(data, LossWeights(icl=0), 4)
    same = "all samples have the same caption, 'a red circle.': objectives that compare images with captions (task) "
    assert warning.startswith(same + "cannot fall, a contrastive loss not below ln 4 = 1.39")
    assert warn_of_shared_captions(data, LossWeights(task=0, icl=0), 4) == []
    (tmp_path / "root" / "blue_square").mkdir()
    (tmp_path / "root" / "blue_square" / "a.jpg").write_bytes(SOUND[0])
    assert warn_of_shared_captions(opened(batch_size=2, **folder), LossWeights(), 4) == []


COLUMNS = {"delimiter": ",", "image_column": "file", "caption_column": "title"}


def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SOUND[0])
    (tmp_path / "b.jpg").write_bytes(b"")
    path = tmp_path / "l.csv"
    path.write_text('file,title\na.jpg,"two\nlines"\n\nb.jpg,x\ngone.jpg,y\n')
    data = opened(batch_size=1, kind="csv", paths=[str(path)], quoted=True, **COLUMNS)
    damaged = data.read_view(np.arange(data.num_samples), 0, [SMALL]).damaged
    assert [damage.where for damage in damaged] == [
        f"{path}: line 5: {tmp_path}/b.jpg",
        f"{path}: line 6: {tmp_path}/gone.jpg (No such file or directory)",
    ]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("file,title\na.jpg,x\n".encode("utf-16"), "text in UTF-16; save it as UTF-8, for example with: iconv"),
        ("file,title\na.jpg,x\n".encode("utf-16-le"), "text in UTF-16 without a mark, or not text at all"),
        (b"\x1f\x8b\x08\x00" + bytes(range(256)), "compressed with gzip; decompress it with: gunzip"),
        (b"PK\x03\x04" + bytes(range(256)), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer in place of the file"),
        ("file,Titel für alle\n".encode("latin-1"), "line 1: is not UTF-8"),
    ],
)
def test_a_table_that_is_none_is_named_for_what_it_is(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "l.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        opened(batch_size=1, kind="csv", paths=[str(path)], **COLUMNS)
    assert str(path) in str(raised.value)
    assert named in str(raised.value)
    (tmp_path / "root" / "cat").mkdir(parents=True)
    for fields in (
        {"kind": "images", "path": str(tmp_path / "root"), "classes": str(path)},
        {"kind": "image_folder", "path": str(tmp_path / "root"), "names": str(path)},
    ):
        with pytest.raises(UsageError) as raised:
            opened(batch_size=1, **fields)
        assert named in str(raised.value)


def test_a_zero_byte_in_a_row_costs_that_row_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SOUND[0])
    path = tmp_path / "l.csv"
    path.write_bytes(b"file,title\na.jpg,x\nb\0.jpg,y\n")
    data = opened(batch_size=1, kind="csv", paths=[str(path)], **COLUMNS)
    assert len(data.read_view(np.arange(data.num_samples), 0, [SMALL]).sample_B) == 1


def test_a_message_about_many_columns_stays_short(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text(",".join(f"column{number}" for number in range(5000)) + "\n")
    with pytest.raises(UsageError, match=r"column19, \.\.\. \(5,000 in all\)") as raised:
        opened(batch_size=1, kind="csv", paths=[str(path)], **COLUMNS)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_follows_the_data(kind: str, tmp_path: Path) -> None:
    fields = make_kinds(tmp_path)[kind]
    parsed: DataSpec = TypeAdapter(DataSpec).validate_python(fields)
    before = fingerprint(parsed)
    assert fingerprint(parsed) == before
    for path in (tmp_path / "webdataset" / "whole.tar", tmp_path / "csv" / "list.csv"):
        path.write_bytes(path.read_bytes() + b"x")
    (tmp_path / "image_folder" / "root" / "class_0" / "new.jpg").write_bytes(b"x")
    assert fingerprint(parsed) != before


# Recipes


def test_pictures_without_captions_have_their_objectives(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], kinds: dict[str, dict[str, Any]]
) -> None:
    distill = {"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0}
    ended = clipkd("show", tiny_recipe(data=kinds["images"], distill=distill))
    assert ended.code == 2
    assert "data of kind images has no captions, but task, icl need images with their own captions" in ended.err
    distill["loss_weights"] = {"task": 0, "icl": 0, "crd": 1, "fd": 1}  # type: ignore[assignment]
    recipe = tiny_recipe(data=kinds["images"] | {"max_damaged": 1.0}, distill=distill)
    assert clipkd("show", recipe).code == 0
    ended = clipkd("distill", recipe, "--out", recipe.parent / "run")
    assert ended.code == 0, ended.err
    manifest = json.loads((recipe.parent / "run" / "student" / "manifest.json").read_text())
    assert manifest["summary"]["damaged"]


@pytest.mark.parametrize("kind", KINDS)
def test_show_knows_every_kind(
    kind: str, clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], kinds: dict[str, dict[str, Any]]
) -> None:
    weights = {"task": 0, "icl": 0, "crd": 1, "fd": 1}
    distill = {"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0, "loss_weights": weights}
    ended = clipkd("show", tiny_recipe(data=kinds[kind], distill=distill))
    assert ended.code == 0, ended.err
    assert kind in ended.out


def test_a_run_that_stopped_continues_where_more_damage_is_permitted(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "root" / "cat").mkdir(parents=True)
    for number in range(24):
        (tmp_path / "root" / "cat" / f"{number:02}.jpg").write_bytes(SOUND[number % 4] if number % 6 else b"")
    recipe = tiny_recipe(
        data={"kind": "image_folder", "path": str(tmp_path / "root"), "views": 1},
        distill={"steps": 9, "batch_size": 8, "lr": 1e-3, "warmup": 0, "teacher_cache": {}},
    )
    run = tmp_path / "run"
    ended = clipkd("cache", recipe, "--out", run)
    assert ended.code == 0, ended.err
    cached = json.loads((run / "teacher-cache" / "teacher" / "manifest.json").read_text())
    assert cached["summary"]["damaged"] == {"zero-byte file": 4}
    stopped = clipkd("distill", recipe, "--out", run, "--checkpoint-steps", "1")
    assert stopped.code == 1
    assert "16.7% of the samples are corrupt" in stopped.err
    assert "data.max_damaged allows 10.0%. zero-byte file: 4 (" in stopped.err
    ended = clipkd("distill", recipe, "--out", run, "--set", "data.max_damaged=0.2")
    assert ended.code == 0, ended.err
    summary = json.loads((run / "student" / "manifest.json").read_text())["summary"]
    assert summary["damaged"] == {"zero-byte file": 4}
    assert sorted(summary["damaged_first"]["zero-byte file"]) == [
        str(tmp_path / "root" / "cat" / f"{number:02}.jpg") for number in range(0, 24, 6)
    ]
