"""Remote shards: the batches of a disk's, whatever the network does, through a folder of bounded size."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, STUDENT, Ended, make_shards, write_tar
from failing_server import FailingServer

from toolchain.data import remote_files, shard_index
from toolchain.data.bad_samples import BROKEN_TAR, Ledger
from toolchain.data.batch import Batch, Geometry
from toolchain.data.local_copies import LocalCopies, open_copies
from toolchain.data.open import fingerprint
from toolchain.data.packing import pack
from toolchain.data.remote_files import RemoteFile, list_files
from toolchain.data.tar_files import expand_urls
from toolchain.data.webdataset_shards import WINDOW, ShardBatches
from toolchain.distillation.loader import load_batches
from toolchain.errors import ClipkdError, MissingDependency, UsageError
from toolchain.pipeline.stage_inputs import data_fields
from toolchain.recipe.data import WebdatasetSpec

NEEDED = ("moto", "flask", "flask_cors", "s3fs", "aiohttp")
pytestmark = [
    pytest.mark.s3,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason=f"needs {', '.join(NEEDED)}: pip install 'clipkd[dev]'",
    ),
]

SMALL = Geometry(32, "bicubic")
NUM_SHARDS, PER_SHARD, BATCH = 36, 3, 8  # five windows, the last of 4 shards
PATTERN = f"{{00000..{NUM_SHARDS - 1:05d}}}.tar"
EVERYTHING = slice(None)
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files, "_FIRST_WAIT_S", 0.01)
    remote_files._list_once.cache_clear()
    shard_index.load_pairs.cache_clear()
    return tmp_path / "cache" / "clipkd"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as img2dataset writes them, without an index."""
    folder = tmp_path_factory.mktemp("remote")
    make_shards(folder, NUM_SHARDS, PER_SHARD, sizes=(40, 80))
    return folder


@pytest.fixture(scope="session")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples packed by clipkd, with its index."""
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(spec_of(folder / PATTERN), out, samples_per_shard=PER_SHARD)
    return out


@pytest.fixture
def serve() -> Iterator[Callable[[Path], FailingServer]]:
    servers: list[FailingServer] = []

    def start(folder: Path) -> FailingServer:
        servers.append(FailingServer(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def upload(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """`upload(FOLDER)`: its files in a bucket; the URL of the bucket."""
    import boto3

    for name, value in (("ENDPOINT_URL", s3_server), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def put(folder: Path) -> str:
        client, bucket = boto3.client("s3"), f"bucket-{time.time_ns()}"
        client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            client.upload_file(str(path), bucket, f"shards/{path.name}")
        client.close()
        return f"s3://{bucket}/shards"

    return put


def spec_of(*patterns: str | Path, **fields: Any) -> WebdatasetSpec:
    return WebdatasetSpec(kind="webdataset", shards=tuple(map(str, patterns)), **fields)


def opened(*patterns: str | Path, **fields: Any) -> ShardBatches:
    return ShardBatches.open(spec_of(*patterns, **fields), seed=0, batch_size=BATCH)


def same(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.pixels[SMALL], second.pixels[SMALL])
        and np.array_equal(first.sample_B, second.sample_B)
        and first.captions_B == second.captions_B
    )


def batch(data: ShardBatches, step: int) -> Batch:
    return data.batch(step, EVERYTHING, [SMALL])


def two_windows_gb(folder: Path) -> float:
    """The least that `cache_gb` may be."""
    sizes = sorted(path.stat().st_size for path in folder.glob("*.tar"))
    return sum(sizes[-2 * WINDOW :]) * 1.01 / 0.75 / 1e9


def settled(copies: LocalCopies) -> None:
    """Wait until nothing is copied in the background."""
    ends = time.monotonic() + TIMEOUT_S
    while any(copies.folder.glob("*.partial")):
        assert time.monotonic() < ends
        time.sleep(0.01)


# The samples of a disk


@pytest.mark.parametrize("has_index", [True, False])
def test_batches_are_those_of_a_disk(
    folder: Path, packed: Path, upload: Callable[[Path], str], has_index: bool
) -> None:
    local = packed if has_index else folder
    expected = opened(local / PATTERN)
    data = opened(f"{upload(local)}/{PATTERN}", cache_gb=two_windows_gb(local))
    assert data.copies is not None
    assert data.num_samples == expected.num_samples == NUM_SHARDS * PER_SHARD
    for step in range(2 * data.steps_per_epoch):
        assert same(batch(data, step), batch(expected, step)), step
    settled(data.copies)
    held = sum(path.stat().st_size for path in data.copies.folder.glob("*.tar"))
    assert 0 < held <= data.copies.limit_bytes < sum(shard.size_bytes for shard in data.shards)
    assert not list(data.copies.folder.glob("*.failed"))


def test_loaders_share_the_copies(packed: Path, serve: Callable[[Path], FailingServer]) -> None:
    """Two worker processes and one folder: the batches of a disk, and each shard is fetched once."""
    from toolchain.models.build import load_model

    student = load_model(STUDENT, random_seed=0)
    server = serve(packed)
    data, expected = opened(f"{server.url}/{PATTERN}"), opened(packed / PATTERN)
    steps = range(data.steps_per_epoch)
    loaded = list(load_batches(data, steps, EVERYTHING, student, None, workers=2))
    for step, found in zip(steps, loaded, strict=True):
        whole = expected.batch(step, EVERYTHING, [student.geometry])
        assert torch.equal(found.student_pixels, whole.pixels[student.geometry])
        assert not found.damaged
    assert {server.gets[f"{number:05d}.tar"] for number in range(NUM_SHARDS)} == {1}


def test_with_an_index_nothing_is_fetched_before_it_is_shown(
    packed: Path, serve: Callable[[Path], FailingServer]
) -> None:
    server = serve(packed)
    data = opened(f"{server.url}/{PATTERN}")
    assert data.num_samples == NUM_SHARDS * PER_SHARD
    assert server.gets == {"index.json": 1}
    assert fingerprint(spec_of(f"{server.url}/{PATTERN}"))
    assert server.gets == {"index.json": 1}, "a stage key needs no content"


def test_without_an_index_shards_are_counted_once(folder: Path, serve: Callable[[Path], FailingServer]) -> None:
    server = serve(folder)
    progress: list[int] = []
    spec = spec_of(f"{server.url}/{{00000..00007}}.tar")
    first = ShardBatches.open(spec, seed=0, batch_size=BATCH, progress=lambda what, done, total: progress.append(done))
    assert progress == list(range(1, 9))
    fetched = server.gets.total()
    shutil.rmtree(open_copies(spec, []).folder.parent)
    assert ShardBatches.open(spec, seed=0, batch_size=BATCH).shards == first.shards
    assert server.gets.total() == fetched + 1, "only whether there is an index by now"


def test_shards_in_order_are_copied_ahead(packed: Path, serve: Callable[[Path], FailingServer]) -> None:
    """A teacher cache reads samples in order; the shards that follow are fetched meanwhile."""
    server = serve(packed)
    data = opened(f"{server.url}/{PATTERN}")
    data.read_view(np.arange(PER_SHARD), 0, [SMALL])
    ends = time.monotonic() + TIMEOUT_S
    while server.gets["00007.tar"] == 0:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert server.gets["00020.tar"] == 0


# What a network does


@pytest.mark.parametrize("failure", ["503", "cut", "short"])
def test_a_failed_transfer_is_repeated(packed: Path, serve: Callable[[Path], FailingServer], failure: str) -> None:
    server = serve(packed)
    for number in range(NUM_SHARDS):
        server.failures[f"{number:05d}.tar"] = [failure, failure, ""]
    data, expected = opened(f"{server.url}/{PATTERN}"), opened(packed / PATTERN)
    for step in range(data.steps_per_epoch):
        found = batch(data, step)
        assert same(found, batch(expected, step))
        assert not found.damaged
    assert {server.gets[f"{number:05d}.tar"] for number in range(NUM_SHARDS)} == {3}


@pytest.mark.parametrize(
    ("failure", "detail"),
    [("503", "HTTP 503 Service Unavailable (attempts: 5)"), ("short", " bytes arrived (attempts: 5)")],
)
def test_a_shard_that_never_arrives_is_a_broken_tar(
    packed: Path, serve: Callable[[Path], FailingServer], failure: str, detail: str
) -> None:
    server = serve(packed)
    server.failures["00003.tar"] = [failure]
    data = opened(f"{server.url}/{PATTERN}")
    ledger = Ledger(data.left_out, data.num_samples, max_damaged=0.1)
    shown: list[int] = []
    for step in range(data.steps_per_epoch):
        found = batch(data, step)
        shown += found.sample_B.tolist()
        ledger.add(found.damaged)
    lost = range(3 * PER_SHARD, 4 * PER_SHARD)
    assert not set(shown) & set(lost)
    assert set(ledger.met) <= set(lost)
    assert ledger.counts() == {BROKEN_TAR: len(ledger.met)}
    assert ledger.examples()[BROKEN_TAR][0].startswith(f"{server.url}/00003.tar (cannot be copied: ")
    assert detail in ledger.examples()[BROKEN_TAR][0]
    assert server.gets["00003.tar"] == 5, "asked for in vain once, not for each of its samples"


def test_nothing_starts_with_a_shard_that_cannot_be_counted(
    folder: Path, serve: Callable[[Path], FailingServer]
) -> None:
    server = serve(folder)
    server.failures["00001.tar"] = ["503"]
    pattern = f"{server.url}/{{00000..00002}}.tar"
    with pytest.raises(ClipkdError, match=r"00001\.tar: cannot be copied: HTTP 503.* Repeat the command to continue"):
        opened(pattern)
    server.failures["00001.tar"] = [""]
    assert opened(pattern).num_samples == 3 * PER_SHARD, "a new start tries again at once"


def test_a_truncated_tar_is_counted_as_on_a_disk(
    folder: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(4):
        content = (folder / f"{number:05d}.tar").read_bytes()
        size = 2000 if number == 2 else len(content)
        (tmp_path / "shards" / f"{number:05d}.tar").write_bytes(content[:size])
    local = opened(tmp_path / "shards" / "{00000..00003}.tar")
    url = serve(tmp_path / "shards").url
    remote = opened(f"{url}/{{00000..00003}}.tar")
    assert remote.num_samples == local.num_samples
    assert [left._replace(examples=()) for left in remote.left_out] == [
        left._replace(examples=()) for left in local.left_out
    ]
    assert BROKEN_TAR in {left.reason for left in remote.left_out}
    assert same(batch(remote, 0), batch(local, 0))


def test_an_index_that_promises_more_samples(
    folder: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    shutil.copy(folder / "00000.tar", tmp_path)
    size = (tmp_path / "00000.tar").stat().st_size
    entry = {"name": "00000.tar", "samples": PER_SHARD + 1, "bytes": size}
    (tmp_path / "index.json").write_text(json.dumps({"shards": [entry]}))
    data = ShardBatches.open(spec_of(f"{serve(tmp_path).url}/00000.tar"), seed=0, batch_size=2)
    view = data.read_view(np.arange(PER_SHARD + 1), 0, [SMALL])
    assert view.sample_B.tolist() == list(range(PER_SHARD))
    assert [(damage.sample, damage.reason) for damage in view.damaged] == [(PER_SHARD, BROKEN_TAR)]
    assert f"it has {PER_SHARD} samples; index.json beside it has {PER_SHARD + 1}" in view.damaged[0].where


def test_an_object_that_changes_or_disappears(
    packed: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    data = opened(f"{serve(folder).url}/{PATTERN}")
    (folder / "00000.tar").unlink()
    write_tar(folder / "00001.tar", [])
    with pytest.raises(ClipkdError, match=r"00000\.tar: cannot be read: it no longer exists"):
        data.read_view(np.array([0]), 0, [SMALL])
    with pytest.raises(ClipkdError, match=r"00001\.tar: has changed since training began"):
        data.read_view(np.array([PER_SHARD]), 0, [SMALL])


# Several processes, and their ends


OPEN_COPY = """
import sys
from pathlib import Path
from toolchain.data.local_copies import LocalCopies
from toolchain.data.remote_files import RemoteFile

folder, url, size_bytes, version = sys.argv[1:]
with LocalCopies(Path(folder), 10**9).open(RemoteFile(url, int(size_bytes), version)) as file:
    print(len(file.read()))
"""


def start_opening(copies: LocalCopies, file: RemoteFile) -> subprocess.Popen[str]:
    """Open the copy of a shard in another process, which prints its size; without torch, so that it starts at once."""
    arguments = [str(copies.folder), file.url, str(file.size_bytes), file.version]
    command = [sys.executable, "-c", OPEN_COPY, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_several_processes_fetch_a_shard_once(
    folder: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    server = serve(folder)
    (file,) = list_files([f"{server.url}/00000.tar"])
    copies = LocalCopies(tmp_path / "copies", 10**9)
    processes = [start_opening(copies, file) for _ in range(3)]
    assert [process.communicate(timeout=TIMEOUT_S)[0] for process in processes] == [f"{file.size_bytes}\n"] * 3
    assert server.gets["00000.tar"] == 1
    assert {path.name for path in copies.folder.iterdir()} == {copies.path(file).name, ".lock"}


def test_kill_9_leaves_no_copy_that_is_taken_for_whole(
    folder: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    server = serve(folder)
    server.failures["00000.tar"] = ["hang", ""]
    file, other = list_files([f"{server.url}/00000.tar", f"{server.url}/00001.tar"])
    copies = LocalCopies(tmp_path / "copies", 10**9)
    process = start_opening(copies, file)
    assert server.hanging.wait(TIMEOUT_S)
    process.kill()
    process.communicate()
    assert not copies.path(file).exists()
    assert list(copies.folder.glob("*.partial"))
    with copies.open(other):
        assert not list(copies.folder.glob("*.partial")), "whoever makes room removes it"
    with copies.open(file) as opened_file:
        assert opened_file.read() == (folder / "00000.tar").read_bytes()


def test_what_was_used_longest_ago_makes_room(
    folder: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    server = serve(folder)
    files = list_files([f"{server.url}/{number:05d}.tar" for number in range(4)])
    copies = LocalCopies(tmp_path / "copies", sum(file.size_bytes for file in files[:3]) + 1)
    reading = copies.open(files[0])
    for number, file in enumerate(files[:3]):
        copies.open(file).close()
        os.utime(copies.path(file), (number, number))
    copies.touch(files[:1])
    copies.open(files[3]).close()
    assert [copies.path(file).exists() for file in files][:2] == [True, False]
    copies.path(files[0]).unlink()
    with reading:
        assert len(reading.read()) == files[0].size_bytes, "an open copy can be read to its end"


# Messages


def test_what_cannot_be_read_is_named(
    folder: Path, serve: Callable[[Path], FailingServer], upload: Callable[[Path], str], tmp_path: Path
) -> None:
    url = serve(folder).url
    cases: list[tuple[list[str], str]] = [
        ([f"{url}/{{00034..00037}}.tar"], r"2 of 4 shards do not exist: .*/00036\.tar, .*/00037\.tar\. Upload them"),
        ([f"{url}/00000.tar", "a.tar"], r"is remote and a\.tar is a file; expected one kind of place"),
        ([f"{url}/00000.tar"] * 2, r"is listed 2 times"),
        (["ftp://host/a.tar"], r"ftp:// is not read; expected s3://, gs://, https:// or http://"),
        (["s3://no-such-bucket/a.tar"], r"1 of 1 shards do not exist"),
    ]
    for patterns, message in cases:
        with pytest.raises(UsageError, match=message):
            opened(*patterns)
    with pytest.raises(UsageError, match=r"data\.cache_gb: 1e-06: too little: 16 shards of .* Set at least "):
        opened(f"{url}/{PATTERN}", cache_gb=1e-6)
    tmp_path.joinpath("index.json").write_text('{"shards": [{"name": "a.tar"}]}')
    tmp_path.joinpath("a.tar").touch()
    with pytest.raises(UsageError, match=r"index\.json: expected the index that `clipkd data pack` writes"):
        opened(f"{serve(tmp_path).url}/a.tar")


def test_a_server_that_refuses(folder: Path, serve: Callable[[Path], FailingServer]) -> None:
    server = serve(folder)
    file = list_files([f"{server.url}/00000.tar"])[0]
    server.failures["00000.tar"] = ["403"]
    with pytest.raises(UsageError, match=r"may not be read: HTTP 403 Forbidden\. Set the credentials"):
        remote_files.fetch(file, folder / "unused")
    assert server.gets["00000.tar"] == 1, "not repeated"


def test_a_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    with pytest.raises(MissingDependency, match=r"gs:// needs the package gcsfs.*pip install 'clipkd\[remote\]'"):
        opened("gs://bucket/a.tar")


def test_inspection_says_what_it_fetches(
    packed: Path, upload: Callable[[Path], str], clipkd: Callable[..., Ended], cache: Path
) -> None:
    url = upload(packed)
    ended = clipkd("data", "inspect", f"{url}/{PATTERN}", "--kind", "webdataset", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["good"] == NUM_SHARDS * PER_SHARD
    said = " ".join(ended.err.split())
    assert f"remote shards: {NUM_SHARDS}, 0.00 GB, the first {url}/00000.tar" in said
    assert "at most 20 GB at a time" in said


def test_stage_keys_depend_on_the_objects_alone(
    folder: Path, tmp_path: Path, serve: Callable[[Path], FailingServer]
) -> None:
    shards = Path(shutil.copytree(folder, tmp_path / "shards"))
    spec = partial(spec_of, f"{serve(shards).url}/{{00000..00003}}.tar")
    assert data_fields(spec()) == data_fields(spec(cache_gb=3, cache_dir="elsewhere"))
    before = fingerprint(spec())
    assert before == fingerprint(spec(cache_gb=3))
    remote_files._list_once.cache_clear()
    os.utime(shards / "00002.tar", ns=(1, 1))  # the server's ETag
    assert fingerprint(spec()) != before


def test_a_signature_is_in_no_key_and_no_message() -> None:
    first, second = (spec_of(f"https://h/{{a,b}}.tar?X-Amz-Signature={secret}") for secret in ("ONE", "TWO"))
    assert data_fields(first) == data_fields(second)
    assert data_fields(first)["shards"] == ("https://h/{a,b}.tar",)
    file = RemoteFile("https://h/a.tar?X-Amz-Signature=ONE", 1, "v")
    assert file.name == "https://h/a.tar"
    with pytest.raises(UsageError, match=r"https://h/get is listed 2 times") as caught:
        expand_urls(["https://h/get?file={a,b}.tar"])  # copies and index entries of the two would be the same
    assert "file=" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [OSError("Forbidden: https://g/o"), type("HttpError", (Exception,), {"code": "401"})("who?")]
)
def test_a_refusal_of_google_is_not_repeated(error: Exception) -> None:
    calls = []

    def refuse() -> None:
        calls.append(error)
        raise error

    with pytest.raises(UsageError, match=r"gs://b/a\.tar: may not be read: "):
        remote_files._repeat(refuse, "gs://b/a.tar?token=SECRET")
    assert len(calls) == 1
