"""Shards: every batch a pure function of (seed, step), read from tar archives that may hold anything."""

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, jpeg, make_picture, make_shards, write_tar
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from toolchain.data import images as pictures
from toolchain.data import shard_index
from toolchain.data.assemble import TooFewSamples
from toolchain.data.bad_samples import LeftOut, describe_left_out
from toolchain.data.batch import Batch, Geometry, TrainingData
from toolchain.data.images import crop_box
from toolchain.data.inspection import inspect
from toolchain.data.random_numbers import uniforms
from toolchain.data.shard_index import Shard
from toolchain.data.tar_files import expand, fingerprint, read_members
from toolchain.data.webdataset_shards import WINDOW, ShardBatches
from toolchain.errors import ClipkdError, UsageError
from toolchain.recipe.data import WebdatasetSpec

SMALL, LARGE = Geometry(32, "bicubic"), Geometry(64, "bicubic")
NUM_SHARDS, PER_SHARD = 20, 5  # three windows, the last of 4 shards
EVERYTHING = slice(None)
PICTURE = jpeg(make_picture(40, 30, seed=0))

MIN_PSNR_DB = 40.0  # a mean error of 2.55 in 255: what decoding at reduced scale may cost
MAX_ROUNDING = 2  # a unit in each of two passes: torch and Pillow round weights differently
# Two-sample and one-sample Kolmogorov-Smirnov distances of this many draws stay below this but once in a million.
NUM_BOXES = 4000
MAX_KS = math.sqrt(-math.log(1e-6 / 2) / 2) / math.sqrt(NUM_BOXES)
MAX_KS_OF_TWO = MAX_KS * math.sqrt(2)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clipkd" / "shards"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, NUM_SHARDS, PER_SHARD, sizes=(80, 160))
    return folder


def opened(*patterns: str | Path, batch_size: int = 8, seed: int = 0, **spec: Any) -> ShardBatches:
    recipe = WebdatasetSpec(kind="webdataset", shards=tuple(map(str, patterns)), **spec)
    return ShardBatches.open(recipe, seed=seed, batch_size=batch_size)


@pytest.fixture
def data(folder: Path) -> ShardBatches:
    return opened(folder / "{00000..00019}.tar")


def imagined(num_shards: int, per_shard: int, batch_size: int, seed: int = 0) -> ShardBatches:
    """Shards of which only the order will be asked."""
    shard = Shard(Path("none.tar"), 0, 0, per_shard)
    return ShardBatches((shard,) * num_shards, seed, batch_size, (0.9, 1.0))


def same(first: Batch, second: Batch) -> bool:
    return (
        first.pixels.keys() == second.pixels.keys()
        and all(torch.equal(first.pixels[geometry], second.pixels[geometry]) for geometry in first.pixels)
        and np.array_equal(first.sample_B, second.sample_B)
        and first.captions_B == second.captions_B
        and first.view == second.view
    )


def psnr_db(first: Any, second: Any) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def raises(error: type[ClipkdError], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


# Names and fingerprints


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{b,a}{1..2}.tar", ["b1.tar", "b2.tar", "a1.tar", "a2.tar"]),
        ("{,x}a.tar", ["a.tar", "xa.tar"]),
        ("[a].tar", ["[a].tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert expand([str(tmp_path / pattern)]) == [tmp_path / name for name in names]


def test_bash_agrees(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    pattern = "{a,b}-{098..101}{,x}"
    said = subprocess.run([bash, "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout.split()
    for name in said:
        (tmp_path / name).touch()
    assert expand([f"{tmp_path}/{pattern}"]) == [tmp_path / name for name in said]
    assert len(said) == 16


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["{0..2.tar"], "data.shards: {0..2.tar: braces must be closed and cannot be nested"),
        (["{a,{b,c}}.tar"], "data.shards: {a,{b,c}}.tar: braces must be closed and cannot be nested"),
        (
            ["{2..0}.tar"],
            "data.shards: {2..0}.tar: {2..0} is neither an ascending range (00000..00331) nor a list (a,b)",
        ),
        (["{}.tar"], "data.shards: {}.tar: {} is neither an ascending range (00000..00331) nor a list (a,b)"),
        (
            ["*.tar"],
            "data.shards: *.tar: wildcards are not expanded; a missing shard would go unnoticed. "
            "List the shards, for example data/cc3m/{00000..00331}.tar",
        ),
        (
            ["0.tar", "{0..1}.tar"],
            "data.shards: 0.tar is listed 2 times; an epoch shows a sample once. List it once",
        ),
    ],
)
def test_patterns_that_mean_nothing_here(patterns: list[str], message: str) -> None:
    assert raises(UsageError, lambda: expand(patterns)) == message


def test_missing_shards_are_named_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (0, 3):
        Path(f"{number}.tar").touch()
    assert raises(UsageError, lambda: expand(["{0..8}.tar"])) == (
        "data.shards: 7 of 9 shards do not exist: 1.tar, 2.tar, 4.tar, 5.tar, 6.tar, ... (7 in "
        f"all) (2 exist; searched in {tmp_path}). Download them, or list only those you have"
    )


def test_the_fingerprint_is_of_names_sizes_and_order(tmp_path: Path) -> None:
    def written(folder: str, **contents: bytes) -> list[Path]:
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / name for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content)
        return paths

    here = written("here", a=b"12", b=b"3")
    assert fingerprint(here) == fingerprint(written("there", a=b"xy", b=b"z")), "wherever they lie; never read"
    others = [here[::-1], here[:1], written("size", a=b"123", b=b"3"), written("name", a=b"12", c=b"3")]
    assert len({fingerprint(paths) for paths in [here, *others]}) == 5


def test_names_and_fingerprints_need_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'PIL'])); "
        "from toolchain.data.tar_files import expand, fingerprint; from pathlib import Path; "
        "fingerprint(expand(['README.md']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# Tar archives

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as archive:
        return [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "folder/b.txt", "ünï.jpg", "d" * 90 + "/" + "e" * 90 + ".json", "last"]
    if format != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "c.jpg", "ü" * 120]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            archive.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = tarfile.SYMTYPE, ("to/" * 50 if format != tarfile.USTAR_FORMAT else "to")
            archive.addfile(link)
            directory = tarfile.TarInfo(f"folder{number}")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
    members, damage = read_members(path)
    assert damage == ""
    assert list(map(tuple, members)) == by_tarfile(path)
    assert [member.name for member in members] == names
    content = path.read_bytes()
    for number, member in enumerate(members):
        assert content[member.offset : member.offset + member.size_bytes] == bytes([65 + number]) * (number * 300)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sizes_too_large_for_octal_digits(tmp_path: Path, format: int) -> None:
    path = tmp_path / "sparse.tar"
    large, small = tarfile.TarInfo("large.bin"), tarfile.TarInfo("small.txt")
    large.size, small.size = 9 << 30, 3
    with path.open("wb") as file:  # a file with a hole: it takes a few kB of the disk
        file.write(large.tobuf(format))
        file.seek(large.size, os.SEEK_CUR)
        file.write(small.tobuf(format) + b"abc".ljust(512, b"\0") + bytes(1024))
    members, damage = read_members(path)
    assert (list(map(tuple, members)), damage) == (by_tarfile(path), "")
    assert [member.size_bytes for member in members] == [9 << 30, 3]


def test_of_a_truncated_archive_the_complete_files_are_found(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [(f"{number}.txt", b"x" * 700) for number in range(4)])
    content, members = whole.read_bytes(), read_members(whole)[0]
    path = tmp_path / "part.tar"
    for length in range(0, members[-1].offset + 2 * 512, 64):
        path.write_bytes(content[:length])
        found, damage = read_members(path)
        assert found == [member for member in members if member.offset + member.size_bytes <= length]
        cut = len(found) < 4 and length >= members[len(found)].offset
        what = f", within {len(found)}.txt" if cut else " without tar's end mark"
        assert damage == f"ends at byte {length:,}{what}"


def test_after_a_damaged_header_the_next_sound_one_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.txt", b"x" * 100) for number in range(3)])
    content = bytearray(path.read_bytes())
    content[1024 + 5] ^= 1
    path.write_bytes(content)
    members, damage = read_members(path)
    assert [member.name for member in members] == ["0.txt", "2.txt"]
    assert damage == "the header at byte 1,024 is damaged"
    path.write_bytes(b"\x9f\x8b" + os.urandom(2000))
    assert read_members(path) == ([], "the header at byte 0 is damaged")


def lfs_pointer(size_bytes: int) -> bytes:
    oid = hashlib.sha256(b"").hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size_bytes}\n".encode()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gzip.compress(b"x" * 2000), "compressed with gzip; decompress it with: gunzip"),
        (bz2.compress(b"x" * 2000), "compressed with bzip2; decompress it with: bunzip2"),
        (lzma.compress(b"x" * 2000), "compressed with xz; decompress it with: unxz"),
        (lfs_pointer(10**9), "a Git LFS pointer in place of the file; fetch the file with: git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>404</html>", "an HTML page, which servers send in place of a missing file"),
        (b"PK\x03\x04" + bytes(600), "a zip archive; unpack it with: unzip"),
    ],
    ids=["gzip", "bzip2", "xz", "lfs", "html", "zip"],
)
def test_a_file_in_place_of_a_shard_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert read_members(path) == ([], f"is not a tar archive but {named}")
    message = raises(TooFewSamples, lambda: opened(path, batch_size=2))
    assert f"skipped, broken tar: 1, first: {path}: is not a tar archive but {named}" in message


# The order


def order_by_definition(data: ShardBatches, epoch: int) -> list[int]:
    """Shards by their random number; in every window of them, samples by theirs."""
    counts = [shard.num_samples for shard in data.shards]
    numbers = [range(sum(counts[:s]), sum(counts[: s + 1])) for s in range(len(counts))]

    def drawn(sample: int) -> float:
        return float(uniforms(data.seed, np.array([sample]), epoch, 1)[0, 0])

    shards = sorted(range(len(counts)), key=lambda s: drawn(-1 - s))
    windows = [shards[start : start + WINDOW] for start in range(0, len(shards), WINDOW)]
    return [sample for window in windows for sample in sorted((n for s in window for n in numbers[s]), key=drawn)]


def samples_of_epoch(data: ShardBatches, epoch: int) -> list[int]:
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    return [sample for step in steps for sample in data.list_samples(step).tolist()]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=3 * WINDOW),
    batch_size=st.integers(2, 30),
    seed=st.integers(0, (1 << 63) - 1),
    epoch=st.integers(0, 5),
)
def test_the_order_is_its_definition(counts: list[int], batch_size: int, seed: int, epoch: int) -> None:
    assume(sum(counts) >= batch_size)
    shards = tuple(Shard(Path(f"{s}.tar"), 0, 0, count) for s, count in enumerate(counts))
    data = ShardBatches(shards, seed, batch_size, (0.9, 1.0))
    expected = order_by_definition(data, epoch)
    assert sorted(expected) == list(range(sum(counts)))
    assert samples_of_epoch(data, epoch) == expected[: data.steps_per_epoch * batch_size]


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    data = imagined(num_shards=30, per_shard=40, batch_size=16)
    first, second = samples_of_epoch(data, 0), samples_of_epoch(data, 1)
    assert sorted(first) == sorted(second) == list(range(1200))
    assert first != second
    assert first != samples_of_epoch(imagined(30, 40, 16, seed=1), 0)
    fixed = sum(a == b for a, b in zip(first, second, strict=True))
    assert fixed < 20, "two random orders agree in about one place"


def test_what_does_not_fill_a_batch_is_left_to_another_epoch() -> None:
    data = imagined(num_shards=3, per_shard=5, batch_size=8)
    assert data.steps_per_epoch == 1
    assert len({sample for epoch in range(20) for sample in samples_of_epoch(data, epoch)}) == 15


@pytest.mark.parametrize("batch_size", [2, 64, 300, 1000])
def test_a_batch_reads_from_few_shards(batch_size: int) -> None:
    per_shard = 50
    data = imagined(num_shards=100, per_shard=per_shard, batch_size=batch_size)
    windows = 2 + (batch_size - 2) // (WINDOW * per_shard)  # as many as that many neighbours can straddle
    touched = [len(set((data.list_samples(step) // per_shard).tolist())) for step in range(data.steps_per_epoch)]
    assert max(touched) <= windows * WINDOW
    assert batch_size < 64 or max(touched) >= WINDOW, "and is mixed from all shards of a window"


def test_samples_mix_evenly_within_a_window() -> None:
    data = imagined(num_shards=WINDOW, per_shard=1000, batch_size=1000)
    counts_SW = np.stack([np.bincount(data.list_samples(step) // 1000, minlength=WINDOW) for step in range(WINDOW)])
    # Hypergeometric: 125 expected, a standard deviation of 9.8; 6 of them in none of 64 counts.
    assert np.abs(counts_SW - 125).max() < 60


def test_order_and_crop_are_independent() -> None:
    """They are columns of the same hash: had they shared one, early samples would all be cropped alike."""
    data = imagined(num_shards=WINDOW, per_shard=500, batch_size=4000)
    random_NR = uniforms(data.seed, data.list_samples(0), 0, 42)[:, 1:]
    place_N = np.arange(4000)
    correlation_R = [np.corrcoef(place_N, column)[0, 1] for column in random_NR.T]
    assert np.abs(correlation_R).max() < 6 / math.sqrt(4000)


def test_thirteen_million_samples_are_ordered_at_once() -> None:
    """CC3M and CC12M together: the first batch anywhere in an epoch at once, a whole epoch's order in seconds."""
    data = imagined(num_shards=1300, per_shard=10_000, batch_size=1024)
    started = time.monotonic()
    drawn = data.list_samples(7 * data.steps_per_epoch + 9_999)
    assert time.monotonic() - started < 2, "measured: 0.02 s"
    assert len(np.unique(drawn)) == 1024
    started = time.monotonic()
    seen_N = np.zeros(data.num_samples, bool)
    for step in range(data.steps_per_epoch):
        seen_N[data.list_samples(step)] = True
    assert time.monotonic() - started < 60, "measured: 4 s"
    assert seen_N.sum() == data.steps_per_epoch * 1024


# Batches


def test_it_is_training_data(data: ShardBatches) -> None:
    training: TrainingData = data
    assert (training.num_samples, training.steps_per_epoch, training.num_views) == (100, 12, None)
    batch = training.batch(13, EVERYTHING, [SMALL, LARGE])
    assert list(batch.pixels) == [SMALL, LARGE]
    assert [(p.dtype, p.shape) for p in batch.pixels.values()] == [
        (torch.uint8, (8, 3, 32, 32)),
        (torch.uint8, (8, 3, 64, 64)),
    ]
    assert batch.view == 1
    assert (batch.sample_B.dtype, batch.sample_B.tolist()) == (np.int64, data.list_samples(13).tolist())


def test_a_pair_belongs_together(data: ShardBatches, folder: Path) -> None:
    """Each caption is the text beside its image, and each image that of the sample's number."""
    texts, pictures = [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                content = archive.extractfile(info).read()  # type: ignore[union-attr]
                if info.name.endswith(".txt"):
                    texts.append(content.decode())
                if info.name.endswith(".jpg"):
                    pictures.append(Image.open(io.BytesIO(content)).resize((8, 8), Image.Resampling.BOX))
    everything = data.read_view(np.arange(100), 0, [Geometry(8, "bicubic")])
    assert everything.captions_B == texts
    shown = everything.pixels[Geometry(8, "bicubic")].numpy().transpose(0, 2, 3, 1)
    for sample in range(100):
        psnr = [psnr_db(shown[sample], picture) for picture in pictures]
        assert int(np.argmax(psnr)) == sample


def test_a_batch_does_not_depend_on_those_before(data: ShardBatches, folder: Path) -> None:
    in_order = [data.batch(step, EVERYTHING, [SMALL]) for step in range(15)]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)  # no global generator may matter
    fresh = opened(folder / "{00000..00019}.tar")
    for step in (14, 3, 11, 0, 14):
        assert same(fresh.batch(step, EVERYTHING, [SMALL]), in_order[step])
    other = opened(folder / "{00000..00019}.tar", seed=1)
    assert not torch.equal(
        other.read_view(np.arange(8), 0, [SMALL]).pixels[SMALL], data.read_view(np.arange(8), 0, [SMALL]).pixels[SMALL]
    )


@pytest.mark.parametrize("cuts", [[4], [1, 2], [3, 7], list(range(1, 8))])
def test_rows_of_a_batch_are_the_batch(data: ShardBatches, cuts: list[int]) -> None:
    whole = data.batch(5, EVERYTHING, [SMALL, LARGE])
    parts = [data.batch(5, slice(start, stop), [SMALL, LARGE]) for start, stop in itertools.pairwise([0, *cuts, 8])]
    joined = Batch(
        {geometry: torch.cat([part.pixels[geometry] for part in parts]) for geometry in (SMALL, LARGE)},
        [caption for part in parts for caption in part.captions_B],
        np.concatenate([part.sample_B for part in parts]),
        np.concatenate([part.pick_B for part in parts]),
        parts[0].view,
    )
    assert same(joined, whole)


def test_a_batch_says_which_of_its_captions_each_sample_shows(data: ShardBatches) -> None:
    batch = data.read_view(np.arange(data.num_samples), 3, [SMALL])
    captions_B = data.list_captions(batch.sample_B)
    assert [captions[pick] for captions, pick in zip(captions_B, batch.pick_B, strict=True)] == batch.captions_B


def test_only_the_rows_asked_for_are_read(data: ShardBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        "toolchain.data.assemble.crop_image", lambda *_: read.append(1) or [np.zeros((32, 32, 3), np.uint8)]
    )
    data.batch(2, slice(3, 6), [SMALL])
    assert len(read) == 3


def test_a_geometry_alone_is_the_geometry_beside_another(data: ShardBatches) -> None:
    both, alone = data.batch(1, EVERYTHING, [LARGE, SMALL]), data.batch(1, EVERYTHING, [SMALL])
    assert torch.equal(both.pixels[SMALL], alone.pixels[SMALL])
    assert data.batch(1, EVERYTHING, []).captions_B == alone.captions_B


def test_view_of_is_the_view_of_the_batch(data: ShardBatches) -> None:
    batch = data.batch(30, EVERYTHING, [SMALL])
    assert batch.view == 2
    assert same(data.read_view(batch.sample_B, 2, [SMALL]), batch)
    assert not torch.equal(data.read_view(batch.sample_B, 1, [SMALL]).pixels[SMALL], batch.pixels[SMALL])


@dataclass
class Steps(Dataset[Batch]):
    data: ShardBatches

    def __getitem__(self, step: int) -> Batch:
        return self.data.batch(step, EVERYTHING, [SMALL])


# Python 3.12 warns of forking a process with threads, which PyTorch's is.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "spawn"), (2, "fork")])
def test_the_number_of_workers_changes_nothing(data: ShardBatches, workers: int, start: str | None) -> None:
    if start and start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    steps = range(9, 15)  # over the end of an epoch
    loader = DataLoader(Steps(data), batch_size=None, sampler=steps, num_workers=workers, multiprocessing_context=start)
    loaded = list(loader)
    assert len(loaded) == len(steps)
    for step, batch in zip(steps, loaded, strict=True):
        assert same(batch, data.batch(step, EVERYTHING, [SMALL]))


def test_workers_are_sent_little_and_keep_no_file_open(data: ShardBatches) -> None:
    data.batch(0, EVERYTHING, [SMALL])
    sent = pickle.dumps(data)
    assert len(sent) < 400 * NUM_SHARDS, "a few hundred bytes a shard; nothing of the samples"
    assert same(pickle.loads(sent).batch(4, EVERYTHING, [SMALL]), data.batch(4, EVERYTHING, [SMALL]))
    open_files = Path("/proc/self/fd")
    if open_files.exists():
        assert not [fd for fd in open_files.iterdir() if os.path.realpath(fd).endswith(".tar")]  # noqa: TID251


# Crops


def boxes(width: int, height: int, crop_scale: tuple[float, float]) -> np.ndarray[Any, Any]:
    random_NR = uniforms(5, np.arange(NUM_BOXES), 0, 40)
    return np.array([crop_box(width, height, crop_scale, random_R) for random_R in random_NR])


def ks_distance(first_N: Any, second_N: Any) -> float:
    """Kolmogorov-Smirnov: the greatest difference of two samples' distribution functions."""
    values = np.sort(np.concatenate([first_N, second_N]))
    first, second = (np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (first_N, second_N))
    return float(np.abs(first - second).max())


def test_areas_and_ratios_are_distributed_as_specified() -> None:
    """Where every box fits: area uniform, log ratio uniform, place uniform over what is left."""
    box_N4 = boxes(4000, 4000, (0.1, 0.3)).astype(np.float64)
    width_N, height_N = box_N4[:, 2] - box_N4[:, 0], box_N4[:, 3] - box_N4[:, 1]
    even_N = (np.arange(NUM_BOXES) + 0.5) / NUM_BOXES
    assert ks_distance(width_N * height_N / 4000**2, 0.1 + 0.2 * even_N) < MAX_KS
    assert ks_distance(np.log(width_N / height_N), np.log(3 / 4) + np.log(16 / 9) * even_N) < MAX_KS
    assert ks_distance(box_N4[:, 0] / (4000 - width_N), even_N) < MAX_KS
    assert ks_distance(box_N4[:, 1] / (4000 - height_N), even_N) < MAX_KS
    columns = np.stack([width_N * height_N, width_N / height_N, box_N4[:, 0] / (4000 - width_N)])
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 6 / math.sqrt(NUM_BOXES)


@pytest.mark.parametrize("size", [(300, 300), (400, 300), (300, 400), (450, 300), (512, 288), (200, 512), (7, 5)])
@pytest.mark.parametrize("crop_scale", [(0.9, 1.0), (0.2, 1.0)])
def test_boxes_are_torchvisions(size: tuple[int, int], crop_scale: tuple[float, float]) -> None:
    """What CLIP-KD trains with, also where boxes do not fit and are drawn again or replaced."""
    width, height = size
    ours = boxes(width, height, crop_scale)
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs_N4 = [RandomResizedCrop.get_params(picture, list(crop_scale), [3 / 4, 4 / 3]) for _ in range(NUM_BOXES)]
    top, left, h, w = np.array(theirs_N4).T
    theirs = np.stack([left, top, left + w, top + h], 1)
    for edge in range(4):
        assert ks_distance(ours[:, edge], theirs[:, edge]) < MAX_KS_OF_TWO
    assert ks_distance(np.prod(ours[:, 2:] - ours[:, :2], 1), h * w) < MAX_KS_OF_TWO


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    scales=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)),
    random_R=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_boxes_lie_within_the_picture(
    width: int, height: int, scales: tuple[float, float], random_R: list[float]
) -> None:
    low, high = sorted(scales)
    left, top, right, bottom = crop_box(width, height, (low, high), np.array(random_R))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def cropped(
    content: bytes, *geometries: Geometry, crop_scale: tuple[float, float] = (0.5, 0.9), sample: int = 0
) -> Any:
    random_R = uniforms(0, np.array([sample]), 0, 40)[0]
    return pictures.crop_image(content, crop_scale, random_R, geometries)


def plain(picture: Image.Image, geometry: Geometry, crop_scale: tuple[float, float], sample: int) -> Image.Image:
    """The same view the slow way: the whole picture in RGB, cut out, then resized."""
    random_R = uniforms(0, np.array([sample]), 0, 40)[0]
    box = crop_box(*picture.size, crop_scale, random_R)
    return (
        picture.convert("RGB").crop(box).resize((geometry.size,) * 2, Image.Resampling[geometry.interpolation.upper()])
    )


def png(picture: Image.Image, **options: Any) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", **options)
    return encoded.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_view_is_its_definition(interpolation: str) -> None:
    picture = make_picture(180, 130, seed=1)
    geometry = Geometry(64, interpolation)
    for sample in range(10):
        (view,) = cropped(png(picture), geometry, sample=sample)
        expected = np.asarray(plain(picture, geometry, (0.5, 0.9), sample))
        assert np.abs(view.astype(int) - expected).max() <= MAX_ROUNDING
        assert np.mean(view != expected) < 0.02


@settings(max_examples=60, deadline=None)
@given(
    width=st.one_of(st.integers(1, 40), st.integers(1, 700), st.sampled_from([1, 2, 5000])),
    height=st.one_of(st.integers(1, 40), st.integers(1, 700)),
    size=st.sampled_from([1, 7, 32, 224]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 99),
)
def test_resizing_is_pillows(width: int, height: int, size: int, interpolation: str, seed: int) -> None:
    """But for rounding, for pictures of any shape, made smaller or larger, noise and hard edges.

    Of middle tones: what overshoots black or white is cut off between the two passes, and which comes first differs.
    """
    random = np.random.default_rng(seed)
    shape = (height, width, 3)
    tones = random.integers(64, 192, shape, np.uint8) if seed % 2 else random.choice([64, 191], shape)
    picture_HW3 = tones.astype(np.uint8)
    expected = Image.fromarray(picture_HW3).resize((size, size), Image.Resampling[interpolation.upper()])
    view = pictures.resize(picture_HW3, Geometry(size, interpolation))
    assert view.shape == (size, size, 3)
    assert np.abs(view.astype(int) - np.asarray(expected)).max() <= MAX_ROUNDING


def test_geometries_show_the_same_crop() -> None:
    picture = png(make_picture(400, 300, seed=2))
    for sample in range(10):
        large, small = cropped(picture, Geometry(192, "bicubic"), Geometry(96, "bicubic"), sample=sample)
        shrunk = Image.fromarray(large).resize((96, 96), Image.Resampling.BICUBIC)
        (other,) = cropped(picture, Geometry(96, "bicubic"), sample=sample + 1)
        assert psnr_db(shrunk, small) > 35, "two passes of bicubic for one; measured 38 to 41"
        assert psnr_db(shrunk, other) < 30, "another crop is told apart"


def photographs() -> list[tuple[str, Image.Image]]:
    """Matplotlib's portrait of Grace Hopper, which is real and sharp, at several sizes; and made pictures."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    hopper = Image.open(path).convert("RGB")
    sized = [hopper.resize((side, side * 600 // 512), Image.Resampling.LANCZOS) for side in (511, 1023, 2047)]
    made = [make_picture(1537, 1025, seed=3), make_picture(640, 480, seed=4, noise=12)]
    return [(f"{picture.width}x{picture.height}", picture) for picture in [hopper, *sized, *made]]


def test_decoding_at_reduced_scale_is_close_to_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[int] = []
    draft = JpegImageFile.draft

    def counted(self: JpegImageFile, mode: Any, size: Any) -> Any:
        width, done = self.width, draft(self, mode, size)
        drafts.append(round(width / self.width))
        return done

    monkeypatch.setattr(JpegImageFile, "draft", counted)
    for name, picture in photographs():
        for subsampling, size, sample in itertools.product((0, 2), (48, 60, 100, 224, 336), range(2)):
            content, geometry = jpeg(picture, subsampling=subsampling), Geometry(size, "bicubic")
            (view,) = cropped(content, geometry, crop_scale=(0.9, 1.0), sample=sample)
            expected = plain(Image.open(io.BytesIO(content)), geometry, (0.9, 1.0), sample)
            psnr = psnr_db(view, expected)
            assert psnr >= MIN_PSNR_DB, f"{name} at {size}: {psnr:.1f} dB, decoded at 1/{drafts[-1:]}"
    assert set(drafts) == {2, 4, 8}


def test_no_geometry_changes_what_another_shows() -> None:
    """Though one is decoded at a quarter of the size and the other not: baselines are trained without the teacher's."""
    content = jpeg(make_picture(1100, 900, seed=7))
    geometries = [Geometry(size, "bicubic") for size in (336, 96, 224)]
    together = cropped(content, *geometries, crop_scale=(0.9, 1.0))
    for geometry, view in zip(geometries, together, strict=True):
        assert np.array_equal(view, cropped(content, geometry, crop_scale=(0.9, 1.0))[0])


# Pictures of every mode

TONE = Geometry(16, "bicubic")
RED, GREEN, CLEAR = (200, 30, 30, 255), (30, 160, 30, 255), (0, 0, 0, 0)


def tone(content: bytes) -> list[int]:
    (view,) = cropped(content, TONE)
    assert view.dtype == np.uint8
    assert view.shape == (16, 16, 3)
    assert view.std((0, 1)).max() < 1
    return view[8, 8].tolist()  # type: ignore[no-any-return]


def test_transparency_lies_on_white() -> None:
    half = Image.new("RGBA", (40, 40), (200, 0, 100, 128))
    assert tone(png(half)) == pytest.approx([227, 127, 177], abs=1)
    assert tone(png(Image.new("LA", (40, 40), (0, 0)))) == [255, 255, 255]
    assert tone(png(Image.new("RGBA", (40, 40), CLEAR))) == [255, 255, 255]
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7, 100, 100, 100])
    assert tone(png(palette)) == [9, 8, 7]
    assert tone(png(palette, transparency=1)) == [255, 255, 255]
    assert tone(png(palette, transparency=bytes([255, 0, 255]))) == [255, 255, 255]
    assert tone(png(Image.new("RGB", (40, 40), (1, 2, 3)), transparency=(1, 2, 3))) == [255, 255, 255]
    webp = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(webp, "WEBP", lossless=True)
    assert tone(webp.getvalue()) == [255, 255, 255]


def test_gray_16_bits_black_and_white_and_cmyk() -> None:
    assert tone(png(Image.new("L", (40, 40), 77))) == [77, 77, 77]
    assert tone(png(Image.fromarray(np.full((40, 40), 200 * 257, np.uint16)))) == [200, 200, 200]
    assert tone(png(Image.new("1", (40, 40), 1))) == [255, 255, 255]
    assert tone(jpeg(Image.new("L", (40, 40), 77))) == pytest.approx([77] * 3, abs=2)
    assert tone(jpeg(Image.new("CMYK", (40, 40), (255, 0, 0, 0)))) == pytest.approx([0, 255, 255], abs=3)


def test_a_palette_is_resized_in_colour() -> None:
    """Indices mean nothing between one another (defect D15 of the released code)."""
    stripes = Image.fromarray(np.indices((64, 64))[1].astype(np.uint8) % 2 * 255).convert("P")
    stripes.putpalette([0, 0, 0] + [7, 7, 7] * 254 + [255, 255, 255])
    (view,) = cropped(png(stripes), TONE)
    assert view.mean() == pytest.approx(127, abs=6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("encode", [png, jpeg])
def test_exif_orientation_is_undone(orientation: int, encode: Callable[..., bytes]) -> None:
    picture = make_picture(201, 143, seed=6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    for geometry in (TONE, LARGE):
        (view,) = cropped(content, geometry)
        assert psnr_db(view, plain(upright, geometry, (0.5, 0.9), 0)) > MIN_PSNR_DB


# Captions


def one_pair(tmp_path: Path, image: bytes | None = None, **parts: bytes) -> ShardBatches:
    """Two samples, so that there is a batch: a sound one, and `odd`."""
    sound = jpeg(make_picture(60, 50, seed=0))
    members = [("sound.jpg", sound), ("sound.txt", b"sound"), ("odd.jpg", sound if image is None else image)]
    members += [(f"odd.{kind}", content) for kind, content in parts.items()]
    return opened(write_tar(tmp_path / "one.tar", members), batch_size=2)


def caption(data: ShardBatches, view: int = 0) -> str:
    return data.read_view(np.array([1]), view, [SMALL]).captions_B[0]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"txt": b" a cat\n"}, "a cat"),
        ({"json": b'{"caption": " a cat "}'}, "a cat"),
        ({"json": b'{"caption": "of json"}', "txt": b"of txt"}, "of txt"),
        ({"json": b'{"caption": ["", "  only ", " "]}'}, "only"),
        ({"txt": "ein Käfer".encode()}, "ein Käfer"),
        ({"txt": "\ufeffmarked".encode()}, "marked"),
        ({"TXT": b"loud"}, "loud"),
    ],
)
def test_captions(tmp_path: Path, parts: dict[str, bytes], expected: str) -> None:
    assert caption(one_pair(tmp_path, **parts)) == expected


def test_of_several_captions_each_epoch_picks_one(tmp_path: Path) -> None:
    data = one_pair(tmp_path, json=json.dumps({"caption": ["one", "two", "three"]}).encode())
    picked = [caption(data, view) for view in range(60)]
    assert picked == [caption(data, view) for view in range(60)]
    assert {text: picked.count(text) >= 8 for text in picked} == {"one": True, "two": True, "three": True}


def damage(data: ShardBatches) -> tuple[str, str]:
    """Of the odd sample; the sound one is shown."""
    batch = data.read_view(np.arange(2), 0, [SMALL])
    assert batch.captions_B == ["sound"]
    assert batch.sample_B.tolist() == [0]
    assert len(batch.pixels[SMALL]) == 1
    (damaged,) = batch.damaged
    assert damaged.sample == 1
    return damaged.reason, damaged.where


@pytest.mark.parametrize(
    ("parts", "reason", "detail"),
    [
        ({"txt": b"  \n"}, "missing caption", "it is blank"),
        ({"json": b"{}"}, "missing caption", 'no "caption" among its keys: none; data.caption_key can name one'),
        ({"json": b'{"caption": null}'}, "missing caption", '"caption" is neither text nor a list of texts'),
        ({"json": b'{"caption": [1]}'}, "missing caption", '"caption" is neither text nor a list of texts'),
        ({"json": b"[]"}, "missing caption", 'its JSON is no object with a "caption"'),
        ({"json": b'{"caption'}, "bad JSON", "Unterminated string starting at: line 1 column 2 (char 1)"),
        ({"json": b"[" * 100_000}, "bad JSON", None),
        ({"json": b'{"caption": "\\ud800"}'}, "bad UTF-8", None),
        ({"txt": b"caf\xe9"}, "bad UTF-8", None),
    ],
)
def test_captions_that_cannot_be_read(tmp_path: Path, parts: dict[str, bytes], reason: str, detail: str | None) -> None:
    data = one_pair(tmp_path, **parts)
    found, where = damage(data)
    assert found == reason
    assert where.startswith(f"{tmp_path}/one.tar: odd (")
    assert detail is None or where == f"{tmp_path}/one.tar: odd ({detail})"
    assert data.list_captions(np.arange(2)) == [("sound",), ()]


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    whole = jpeg(make_picture(60, 50, seed=0))
    contents = [whole[: len(whole) // 2], b"<html>", b"GIF89a" + bytes(30), b"\xff\xd8\xff"]
    reasons = ["truncated image", "not an image", "not an image", "truncated image"]
    for number, (content, reason) in enumerate(zip(contents, reasons, strict=True)):
        (tmp_path / str(number)).mkdir()
        data = one_pair(tmp_path / str(number), image=content, txt=b"x")
        found, where = damage(data)
        assert found == reason, number
        assert where.startswith(f"{tmp_path}/{number}/one.tar: odd (")
        assert data.list_captions(np.arange(2)) == [("sound",), ("x",)]


# The index


def test_what_is_no_pair_is_left_out_and_counted(tmp_path: Path) -> None:
    picture = jpeg(make_picture(60, 50, seed=0))
    members = [
        ("whole.jpg", picture),
        ("whole.txt", b"one"),
        ("alone.jpg", picture),
        ("silent.jpg", picture),
        ("silent.txt", b""),
        ("silent.json", b'{"caption": null}'),
        ("unseen.txt", b"two"),
        ("empty.jpg", b""),
        ("empty.txt", b"three"),
        ("folder.x/deep.seg.png", picture),
        ("folder.x/deep.JPEG", picture),
        ("folder.x/deep.txt", b"four"),
        ("scattered.txt", b"five"),
        ("whole.jpg", b"a second of the same name"),
        ("scattered.webp", picture),
        ("noextension", b"."),
        ("._whole.jpg", b"written by a Mac"),
        ("folder.x/", b""),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    data = opened(path, batch_size=3)
    assert data.shards[0].num_samples == 3
    assert data.read_view(np.arange(3), 0, [SMALL]).captions_B == ["one", "four", "five"]
    assert data.left_out == (
        LeftOut("missing caption", 2, (f"{path}: alone (only jpg)", f"{path}: silent (it is blank)")),
        LeftOut("missing image", 1, (f"{path}: unseen (only txt)",)),
        LeftOut("zero-byte file", 1, (f"{path}: empty",)),
        LeftOut(".png beside the image", 1, (f"{path}: folder.x/deep.seg.png",), is_sample=False),
    )
    last = next(member for member in read_members(path)[0] if member.name == "scattered.webp")
    length = last.offset + 100
    path.write_bytes(path.read_bytes()[:length])
    assert describe_left_out(opened(path, batch_size=2).left_out) == [
        f"skipped, missing caption: 2, first: {path}: alone (only jpg)",
        f"skipped, missing image: 2, first: {path}: unseen (only txt)",
        f"skipped, zero-byte file: 1, first: {path}: empty",
        f"skipped, broken tar: 1, first: {path}: ends at byte {length:,}, within scattered.webp; "
        "samples found in it: 2",
        f"passed over, no samples: 1 .png beside the image; first: {path}: folder.x/deep.seg.png",
    ]


def test_dots_in_names_are_the_cause_in_a_short_message(tmp_path: Path) -> None:
    """Thousands of pairs then have one key; all of them are counted, and few are named."""
    picture = jpeg(make_picture(16, 16, seed=0))
    members = [("whole.jpg", picture), ("whole.txt", b"x"), ("other.jpg", picture), ("other.txt", b"y")]
    for number in range(3000):
        members += [(f"photo v1.{number}.jpg", b"x"), (f"photo v1.{number}.txt", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    data = opened(path, batch_size=2)
    (left,) = data.left_out
    assert (left.reason, left.number) == ("missing image", 3000)
    (message,) = describe_left_out(data.left_out)
    assert message == (
        f"skipped, missing image: 3,000, first: {path}: photo v1 (only 0.jpg, 0.txt, 1.jpg, 1.txt, 10.jpg, ... "
        "(6,000 in all); a sample's name ends at its first dot, so names with more dots do not pair. Rename them)"
    )
    found = inspect(WebdatasetSpec(kind="webdataset", shards=(str(path),)))
    assert found["broken"]["missing image"]["count"] == 3000
    assert len(json.dumps(found)) < 5000
    assert found["samples"] == 3002


def test_dots_in_names_beside_a_whole_pair_are_counted(tmp_path: Path) -> None:
    picture = jpeg(make_picture(16, 16, seed=0))
    members = [(f"photo v1{dot}.{kind}", picture) for dot in ("", ".2", ".3") for kind in ("jpg", "txt")]
    members = [(name, b"x" if name.endswith("txt") else content) for name, content in members]
    data = opened(write_tar(tmp_path / "a.tar", members), batch_size=1)
    assert data.num_samples == 1
    assert [(left.reason, left.number) for left in data.left_out] == [(".jpg beside the image", 2)]


def test_the_caption_of_another_key(tmp_path: Path) -> None:
    picture = jpeg(make_picture(16, 16, seed=0))
    record = {"text": "of the JSON", "url": "u", **{f"key{number:02}": 0 for number in range(30)}}
    members = [("a.jpg", picture), ("a.json", json.dumps(record).encode())]
    members += [("b.jpg", picture), ("b.txt", b"of the text"), ("b.json", b'{"text": ["first", "second"]}')]
    path = write_tar(tmp_path / "a.tar", members)
    named = WebdatasetSpec(kind="webdataset", shards=(str(path),), caption_key="text")
    plain = WebdatasetSpec(kind="webdataset", shards=(str(path),))
    for _ in ("indexed", "from the stored index, one for each"):
        with_key, without = (ShardBatches.open(spec, seed=0, batch_size=1) for spec in (named, plain))
        assert with_key.list_captions(np.arange(2)) == [("of the JSON",), ("first", "second")]
        assert without.list_captions(np.arange(2)) == [(), ("of the text",)]
    (damage,) = without.read_view(np.arange(2), 0, [SMALL]).damaged
    assert damage.reason == "missing caption"
    assert 'no "caption" among its keys: text, url, key00, key01, key02, ... (32 in all)' in damage.where
    assert "data.caption_key can name one" in damage.where
    assert (inspect(named)["captions"], inspect(plain)["captions"]) == (3, 1)


def test_a_folder_of_shards_is_named_for_what_it_is(tmp_path: Path) -> None:
    assert raises(UsageError, lambda: opened(tmp_path)) == (
        f"data.shards: {tmp_path} is a folder; expected tar files. Write the files in it, "
        f"for example {tmp_path}/{{00000..00331}}.tar"
    )


def test_too_little_data(tmp_path: Path) -> None:
    members = [("a.jpg", b"x"), ("a.txt", b"x"), ("b.jpg", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    assert raises(TooFewSamples, lambda: opened(path, batch_size=2)) == (
        "data.shards: 1 sample(s) in 1 shard(s) are fewer than a batch of 2; "
        f"skipped, missing caption: 1, first: {path}: b (only jpg). "
        "Add more shards, or lower the batch size"
    )
    assert raises(TooFewSamples, lambda: imagined(2, 600, 4096)) == (
        "data.shards: 1,200 sample(s) in 2 shard(s) are fewer than a batch of 4,096; nothing was skipped. "
        "Add more shards, or lower the batch size"
    )
    assert raises(TooFewSamples, lambda: opened(write_tar(tmp_path / "b.tar", []))).startswith(
        "data.shards: 0 sample(s)"
    )


def test_a_shard_is_indexed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int, int]] = []
    spec = WebdatasetSpec(kind="webdataset", shards=(str(folder / "{00000..00002}.tar"),))
    first = ShardBatches.open(spec, seed=0, batch_size=8, progress=lambda *what: said.append(what))
    assert said == [("indexing shards", done, 3) for done in (1, 2, 3)]
    monkeypatch.setattr(shard_index, "read_open_members", lambda file: pytest.fail(f"{file} was read again"))
    again = opened(folder / "{00000..00002}.tar")
    assert again.shards == first.shards
    shard_index.load_pairs.cache_clear()
    assert same(again.batch(0, EVERYTHING, [SMALL]), first.batch(0, EVERYTHING, [SMALL]))


def test_the_index_follows_the_shard(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    shutil.copy(folder / "00000.tar", path)
    assert opened(path, batch_size=2).num_samples == PER_SHARD
    members = [("a.jpg", PICTURE), ("a.txt", b"x"), ("b.jpg", PICTURE), ("b.txt", b"y"), ("c.jpg", PICTURE)]
    write_tar(path, [*members, ("c.txt", b"z")])
    size_bytes = path.stat().st_size
    assert opened(path, batch_size=2).read_view(np.arange(3), 0, []).captions_B == ["x", "y", "z"]
    time.sleep(0.02)  # a file system's clock ticks every few ms
    write_tar(path, [*members, ("d.txt", b"z")])
    assert path.stat().st_size == size_bytes, "only the time tells"
    assert opened(path, batch_size=2).num_samples == 2


def test_a_damaged_index_is_made_again(folder: Path, cache: Path) -> None:
    path = folder / "00000.tar"
    expected = opened(path, batch_size=2).read_view(np.arange(PER_SHARD), 0, [SMALL])
    (kept,) = cache.iterdir()
    sound = kept.read_bytes()
    damaged = [b"", b"junk", sound[:100], sound[:-1]]
    for position in range(0, len(sound), 7):
        damaged.append(sound[:position] + bytes([sound[position] ^ 0x55]) + sound[position + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        shard_index.load_pairs.cache_clear()
        assert same(opened(path, batch_size=2).read_view(np.arange(PER_SHARD), 0, [SMALL]), expected)
    assert [file.name for file in cache.iterdir()] == [kept.name], "and nothing is left beside it"


def test_a_shard_that_changes_while_training(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    shutil.copy(folder / "00000.tar", path)
    data = opened(path, batch_size=2)
    data.batch(0, EVERYTHING, [SMALL])
    shutil.copy(folder / "00001.tar", path)
    changed = f"{path}: has changed since training began, so sample numbers no longer match. Start training again"
    assert raises(ClipkdError, lambda: data.batch(0, EVERYTHING, [SMALL])) == changed
    shard_index.load_pairs.cache_clear()
    assert raises(ClipkdError, lambda: data.batch(0, EVERYTHING, [SMALL])) == changed
    path.unlink()
    gone = f"{path}: cannot be read: No such file or directory"
    assert raises(ClipkdError, lambda: data.batch(0, EVERYTHING, [SMALL])) == gone


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert raises(ClipkdError, lambda: opened(folder / "00000.tar")) == (
        f"{tmp_path}/file/clipkd/shards: the index of the shards cannot be written there: Not a directory. "
        "Free disk space, or set XDG_CACHE_HOME to another folder"
    )


# Anything may be in an archive

NAMES = st.one_of(
    st.sampled_from(["a", "b", "a.b", "dir/a", "dir.x/a", ".hidden", "", "/", "ü", "a b", "\n"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
KINDS = st.sampled_from(["jpg", "jpeg", "png", "webp", "JPG", "txt", "json", "cls", "seg.png", ""])
CONTENTS = st.one_of(
    st.sampled_from([b"", PICTURE, PICTURE[:200], b"a caption", b'{"caption": "c"}', b'{"caption": ["c", "d"]}']),
    st.binary(max_size=40),
)
MEMBERS = st.lists(st.tuples(NAMES, KINDS, CONTENTS), max_size=12)


def shown_or_refused(path: Path) -> ShardBatches | None:
    """Every sample, or an error that says why not; a traceback of any other kind fails the test."""
    said = ""
    try:
        data = opened(path, batch_size=2)
    except UsageError as error:
        said = str(error)
    if said:
        assert "fewer than a batch" in said
        return None
    refused = []
    for sample in range(data.num_samples):
        try:
            data.read_view(np.array([sample]), 0, [SMALL])
        except ClipkdError as error:
            refused.append(str(error))
    assert all(re.match(f"{re.escape(str(path))}: the (image|caption) of sample ", text) for text in refused)
    return data


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=MEMBERS, format=st.sampled_from(FORMATS))
def test_any_members(tmp_path: Path, members: list[tuple[str, str, bytes]], format: int) -> None:
    path = tmp_path / "any.tar"
    try:
        write_tar(path, [(f"{name}.{kind}", content) for name, kind, content in members], format)
    except ValueError:
        assume(False)  # ustar has no room for the name
    found, damage = read_members(path)
    assert damage == ""
    assert list(map(tuple, found)) == by_tarfile(path)
    data = shown_or_refused(path)
    kinds: dict[str, dict[str, bytes]] = {}
    for name, kind, content in members:
        matched = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", f"{name}.{kind}", re.DOTALL)
        if matched:
            kinds.setdefault(matched[1], {}).setdefault(matched[2].lower(), content)
    pairs = [
        parts
        for parts in kinds.values()
        if next((parts[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in parts), b"")
        and parts.get("txt", parts.get("json", b""))
    ]
    assert (data.num_samples if data else min(len(pairs), 1)) == len(pairs)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=MEMBERS,
    format=st.sampled_from(FORMATS),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=30)), max_size=4),
    keep=st.floats(0, 1),
)
def test_any_damage(
    tmp_path: Path,
    members: list[tuple[str, str, bytes]],
    format: int,
    damage: list[tuple[float, bytes]],
    keep: float,
) -> None:
    path = tmp_path / "damaged.tar"
    try:
        write_tar(path, [(f"{name}.{kind}", content) for name, kind, content in members], format)
    except ValueError:
        assume(False)
    content = path.read_bytes().rstrip(b"\0")
    for place, junk in damage:
        position = int(place * len(content))
        content = content[:position] + junk + content[position + len(junk) :]
    path.write_bytes(content[: round(keep * len(content))])
    shown_or_refused(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from([(0, 100), (100, 24), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)]),
    junk=st.binary(min_size=1, max_size=30),
    extension=st.binary(max_size=60),
    kind=st.sampled_from([b"x", b"g", b"L", b"K", b"0"]),
)
def test_any_header_with_a_sound_checksum(
    tmp_path: Path, field: tuple[int, int], junk: bytes, extension: bytes, kind: bytes
) -> None:
    """Damage that the checksum does not show, pax records that are none: still no traceback, and an end."""
    info = tarfile.TarInfo("extension")
    info.size, info.type = len(extension), kind
    first = info.tobuf(tarfile.GNU_FORMAT) + extension.ljust(512, b"\0")
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    start, length = field
    header[start : start + length] = junk[:length].ljust(length, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    path = tmp_path / "odd.tar"
    path.write_bytes(first + bytes(header) + bytes(2048))
    members, _ = read_members(path)
    assert all(0 <= m.offset <= m.offset + m.size_bytes <= path.stat().st_size for m in members)
    assert len(members) <= 2
