"""Packing: the same pictures and captions, damage counted exactly, the same bytes whatever ends a process."""

import hashlib
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, make_picture, make_shards, write_tar
from hostile import PICTURE, hostile, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.data import packing
from toolchain.data.bad_samples import BROKEN_TAR
from toolchain.data.batch import Geometry
from toolchain.data.open import list_stored_samples
from toolchain.data.packing import INDEX, pack
from toolchain.data.stored_samples import CorruptSample, Sample
from toolchain.data.webdataset_shards import ShardBatches
from toolchain.errors import ArtifactError, ClipkdError, UsageError
from toolchain.recipe.data import GlyphsSpec, WebdatasetSpec

GEOMETRY = Geometry(32, "bicubic")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_shards(folder, 3, 5, sizes=(40, 80))
    return folder


def spec_of(*patterns: str | Path) -> WebdatasetSpec:
    return WebdatasetSpec(kind="webdataset", shards=tuple(map(str, patterns)))


def spec_of_packed(out: Path) -> WebdatasetSpec:
    return spec_of(*sorted(out.glob("*.tar")))


def good(spec: WebdatasetSpec) -> list[tuple[bytes, tuple[str, ...]]]:
    read = [read() for read in list_stored_samples(spec)]
    return [(sample.image, sample.captions) for sample in read if isinstance(sample, Sample)]


def files_of(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def test_what_is_packed_is_what_was_there(folder: Path, tmp_path: Path) -> None:
    source = spec_of(folder / "{00000..00002}.tar")
    index = pack(source, tmp_path / "out", samples_per_shard=4)
    packed = spec_of_packed(tmp_path / "out")
    assert good(packed) == good(source), "picture bytes, captions and their order"
    assert [shard["samples"] for shard in index["shards"]] == [4, 4, 4, 3]
    assert [shard["name"] for shard in index["shards"]] == [f"{number:05d}.tar" for number in range(4)]
    assert index["samples"] == index["captions"] == 15
    assert index["left_out"] == {}
    for shard in index["shards"]:
        content = (tmp_path / "out" / shard["name"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert index == json.loads((tmp_path / "out" / INDEX).read_text())


def test_training_shows_the_same_of_packed_shards(folder: Path, tmp_path: Path) -> None:
    """Sample by sample: pixels, captions, crops, all as of the source."""
    source = spec_of(folder / "{00000..00002}.tar")
    pack(source, tmp_path / "out", samples_per_shard=4)
    before, after = (
        ShardBatches.open(spec, seed=3, batch_size=15).read_view(np.arange(15), 2, [GEOMETRY])
        for spec in (source, spec_of_packed(tmp_path / "out"))
    )
    assert before.captions_B == after.captions_B
    assert bool((before.pixels[GEOMETRY] == after.pixels[GEOMETRY]).all())


def test_several_captions_are_kept(tmp_path: Path) -> None:
    captions = [["a cat", "eine Katze", '猫 \\ "quoted"\nin two lines'], ["one"], ["zwei", "two"]]
    members = []
    for number, texts in enumerate(captions):
        members += [(f"{number}.png", saved(make_picture(20, 20, number), "PNG"))]
        members += [(f"{number}.json", json.dumps({"caption": texts}).encode())]
    source = spec_of(write_tar(tmp_path / "a.tar", members))
    index = pack(source, tmp_path / "out")
    assert good(spec_of_packed(tmp_path / "out")) == good(source)
    assert [list(texts) for _, texts in good(source)] == captions
    assert index["captions"] == 6
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        suffixes = [name.partition(".")[2] for name in archive.getnames()]
    assert suffixes == ["png", "json", "png", "txt", "png", "json"]


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts_N=st.lists(TEXTS, min_size=1, max_size=4))
def test_any_caption_is_kept(tmp_path: Path, texts_N: list[list[str]]) -> None:
    """Line ends, marks, controls, whatever alphabet: what was read is read again."""
    members = [
        (f"{number}.{kind}", content)
        for number, texts in enumerate(texts_N)
        for kind, content in (("jpg", PICTURE), ("json", json.dumps({"caption": texts}).encode()))
    ]
    with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
        source = spec_of(write_tar(Path(scratch) / "a.tar", members))
        index = pack(source, Path(scratch) / "out")
        readable = [texts for texts in texts_N if any(text.strip() for text in texts)]
        assert [captions for _, captions in good(source)] == [
            tuple(text.strip() for text in texts if text.strip()) for texts in readable
        ]
        assert sum(found["count"] for found in index["left_out"].values()) == len(texts_N) - len(readable)
        if readable:
            assert good(spec_of_packed(Path(scratch) / "out")) == good(source)


def test_damage_is_left_out_and_counted_exactly(tmp_path: Path) -> None:
    samples, damaged = hostile()
    order = np.random.default_rng(0).permutation(list(samples)).tolist()
    members = [(f"{key}.{kind}", content) for key in order for kind, content in samples[key].items()]
    path = write_tar(tmp_path / "a.tar", members)
    cut = write_tar(tmp_path / "b.tar", [("x.jpg", PICTURE), ("x.txt", b"x"), ("y.jpg", PICTURE), ("y.txt", b"y")])
    cut.write_bytes(cut.read_bytes()[: 512 + len(PICTURE) // 512 * 512 + 512 + 1024 + 700])
    index = pack(spec_of(path, cut), tmp_path / "out", samples_per_shard=3)
    expected: dict[str, list[str]] = {BROKEN_TAR: [str(cut)]}
    for key in order:
        if key in damaged:
            expected.setdefault(damaged[key], []).append(f"{path}: {key}")
    left_out = index["left_out"]
    assert {reason: found["count"] for reason, found in left_out.items()} == {
        reason: len(keys) for reason, keys in expected.items()
    }
    for reason, found in left_out.items():
        assert len(found["examples"]) == min(5, len(expected[reason])), "the first five are named"
        for example, where in zip(found["examples"], expected[reason], strict=False):
            assert example.startswith(where)
    kept = [picture for picture, _ in good(spec_of_packed(tmp_path / "out"))]
    assert kept == [samples[key]["jpg"] for key in order if key not in damaged] + [PICTURE]
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        assert {name.partition(".")[2] for name in archive.getnames()} <= {
            "jpg",
            "png",
            "webp",
            "bmp",
            "gif",
            "tif",
            "avif",
            "jp2",
            "ppm",
            "txt",
        }


def test_a_source_of_nothing_good_has_an_index_and_no_shard(tmp_path: Path) -> None:
    index = pack(spec_of(write_tar(tmp_path / "a.tar", [("x.jpg", b"no"), ("x.txt", b"x")])), tmp_path / "out")
    assert index["samples"] == 0
    assert list(tmp_path.glob("out/*.tar")) == []


class Dead(BaseException):
    """The process ends."""


@pytest.fixture(scope="session")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(spec_of(folder / "{00000..00002}.tar"), out, samples_per_shard=4)
    return files_of(out)


def dying(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> list[Path]:
    """Let the process end before or after the rename of this number; the renames that it came to."""
    replace, seen = Path.replace, []

    def counted(self: Path, target: Path) -> Path:
        seen.append(Path(target))
        if len(seen) == at + 1 and not after:
            raise Dead
        done = replace(self, target)
        if len(seen) == at + 1:
            raise Dead
        return done

    monkeypatch.setattr(Path, "replace", counted)
    return seen


def test_whatever_rename_it_ends_at_it_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, str]
) -> None:
    """Before and after each: of a shard, of what says how far the packing is, of the index."""
    source = spec_of(folder / "{00000..00002}.tar")
    with monkeypatch.context() as patch:
        renamed = dying(patch, at=-2, after=False)
        pack(source, tmp_path / "whole", samples_per_shard=4)
    assert len(renamed) == 1 + 2 * 4 + 1, "the beginning, each shard and then how far it is, the index"
    for at, after in itertools.product(range(len(renamed)), (False, True)):
        out = tmp_path / f"{at}{after}"
        with monkeypatch.context() as patch:
            dying(patch, at, after)
            with pytest.raises(Dead):
                pack(source, out, samples_per_shard=4)
        pack(source, out, samples_per_shard=4)
        assert files_of(out) == uninterrupted


CHILD = """
import sys, time
from pathlib import Path
from toolchain.data.packing import pack
from toolchain.recipe.data import WebdatasetSpec

def progress(what, done, total):
    print(done, flush=True)
    if done == int(sys.argv[3]):
        time.sleep(600)

spec = WebdatasetSpec(kind="webdataset", shards=(sys.argv[1],))
pack(spec, Path(sys.argv[2]), samples_per_shard=4, progress=progress)
"""


def test_killed_in_the_middle_it_continues(folder: Path, tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    """kill -9 within the first, a middle and the last shard; what was packed is not packed again."""
    pattern, out = folder / "{00000..00002}.tar", tmp_path / "out"
    for begins, last in ((1, 3), (1, 7), (5, 14)):
        command = [sys.executable, "-c", CHILD, str(pattern), str(out), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
            assert process.stdout is not None
            for expected in range(begins, last + 1):
                assert process.stdout.readline() == f"{expected}\n"
            process.kill()
        assert process.returncode == -9
    seen: list[int] = []
    pack(spec_of(pattern), out, samples_per_shard=4, progress=lambda what, done, total: seen.append(done))
    assert seen == [13, 14, 15], "whole shards are not made again"
    assert files_of(out) == uninterrupted


def refused(error: type[ClipkdError], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_what_is_there_is_not_written_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = spec_of(folder / "00000.tar")
    index = pack(source, tmp_path / "out", samples_per_shard=2)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "list_stored_samples", lambda spec: pytest.fail("read again"))
        assert pack(source, tmp_path / "out", samples_per_shard=2) == index
    assert "samples_per_shard" in refused(ArtifactError, lambda: pack(source, tmp_path / "out", samples_per_shard=3))
    other = spec_of(folder / "00001.tar")
    assert "was packed with a different source (its files' names and sizes, or " in refused(
        ArtifactError, lambda: pack(other, tmp_path / "out", samples_per_shard=2)
    )
    keyed = source.model_copy(update={"caption_key": "text"})
    assert "was packed with a different choice of captions" in refused(
        ArtifactError, lambda: pack(keyed, tmp_path / "out", samples_per_shard=2)
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_bytes(b"precious")
    assert "contains 00000.tar, which clipkd did not write" in refused(
        ArtifactError, lambda: pack(source, tmp_path / "mine")
    )
    assert list((tmp_path / "mine").iterdir()) == [tmp_path / "mine" / "00000.tar"]
    assert (tmp_path / "mine" / "00000.tar").read_bytes() == b"precious"
    (tmp_path / "file").write_text("")
    refused(ArtifactError, lambda: pack(source, tmp_path / "file"))


def test_a_shard_that_goes_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("x.jpg", PICTURE), ("x.txt", b"x")])
    (read_sample,) = list_stored_samples(spec_of(path))
    path.unlink()
    assert refused(ClipkdError, read_sample) == f"{path}: cannot be read: No such file or directory"


def test_glyphs_have_nothing_to_pack(tmp_path: Path) -> None:
    assert "nothing to pack" in refused(UsageError, lambda: pack(GlyphsSpec(kind="glyphs"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_places_are_read_when_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = list(list_stored_samples(spec_of(folder / "00000.tar")))
    assert len(listed) == 5
    assert not any(isinstance(read(), CorruptSample) for read in listed)
