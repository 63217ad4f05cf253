"""Many shards: the work of a start grows with their number, and most of it is done once, by all cores."""

import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg, make_picture, write_tar

from toolchain.data import shard_index
from toolchain.data.bad_samples import BROKEN_TAR, NO_CAPTION, Damage, Ledger
from toolchain.data.open import fingerprint
from toolchain.data.shard_index import Shard, index_shards
from toolchain.data.webdataset_shards import ShardBatches
from toolchain.distillation.training_options import TrainingOptions
from toolchain.distributed import Processes
from toolchain.errors import ClipkdError
from toolchain.pipeline.stage_inputs import num_workers
from toolchain.progress import no_progress
from toolchain.recipe.data import WebdatasetSpec

NUM_SHARDS = 1000
MAX_EVENTS = 4  # of the file system for each shard on a second start: each is looked for, hashed and compared


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clipkd" / "shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One small shard under many names; every hundredth is damaged or lacks a caption."""
    folder = tmp_path / "shards"
    folder.mkdir()
    picture = jpeg(make_picture(32, 32, seed=0))
    members = [("a.jpg", picture), ("a.txt", b"a"), ("b.jpg", picture), ("b.txt", b"b")]
    good, less = write_tar(tmp_path / "good.tar", members), write_tar(tmp_path / "less.tar", members[:3])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[:-10_000])
    for number in range(NUM_SHARDS):
        source = {0: less, 50: cut}.get(number % 100, good)
        os.link(source, folder / f"{number:05d}.tar")
    return folder


def spec_of(pattern: str) -> WebdatasetSpec:
    return WebdatasetSpec(kind="webdataset", shards=(pattern,))


def opened(folder: Path, count: int = NUM_SHARDS) -> ShardBatches:
    spec = spec_of(f"{folder}/{{00000..{count - 1:05d}}}.tar")
    fingerprint(spec)
    return ShardBatches.open(spec, seed=0, batch_size=8)


def test_a_second_start_reads_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder)
    assert {left.reason: left.number for left in first.left_out} == {NO_CAPTION: 10, BROKEN_TAR: 10}
    opens: Counter[str] = Counter()
    stats = 0
    counting = True

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if counting and event == "open":
            opens[Path(str(arguments[0])).suffix] += 1

    sys.addaudithook(audit)
    real_stat = os.stat

    def stat(*arguments: object, **options: object) -> os.stat_result:
        nonlocal stats
        stats += 1
        return real_stat(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    second = opened(folder)
    counting = False
    assert second.shards == first.shards
    assert opens[".list"] == 1
    assert opens[".tar"] == opens[".index"] == 0
    assert NUM_SHARDS <= stats <= MAX_EVENTS * NUM_SHARDS


def test_processes_index_what_one_does(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    paths = [folder / f"{number:05d}.tar" for number in range(300)]
    reports: list[int] = []
    several = index_shards(paths, None, lambda what, done, total, note="": reports.append(done))
    assert reports == list(range(1, 301))
    shutil.rmtree(cache)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert index_shards(paths, None, no_progress) == several
    assert several == tuple(shard_index._index_shard(path, None) for path in paths)


def test_the_list_follows_its_shards(folder: Path, tmp_path: Path, cache: Path) -> None:
    before = opened(folder, 100)
    (listed,) = cache.glob("*.list")
    (folder / "00007.tar").unlink()
    write_tar(folder / "00007.tar", [])
    after = opened(folder, 100)
    assert [shard.num_samples for shard in after.shards[6:9]] == [2, 0, 2]
    assert after.num_samples == before.num_samples - 2
    sound = listed.read_bytes()
    for content in (b"", b"junk", sound[:100], sound.replace(b"2", b"3", 1)):
        listed.write_bytes(content)
        assert opened(folder, 100).shards == after.shards
        assert listed.read_bytes() == sound


def test_an_error_in_a_process_is_the_users(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ClipkdError, match="the index of the shards cannot be written there"):
        opened(folder, 300)


def test_the_order_of_400_million_samples_needs_no_more_memory_than_a_window() -> None:
    """Nothing is held for each sample: 40,000 shards of 10,000 samples, batches from anywhere."""
    data = ShardBatches((Shard(Path("none.tar"), 0, 0, 10_000),) * 40_000, 0, 4096, (0.9, 1.0))
    started = time.process_time()
    for step in np.linspace(0, 2 * data.steps_per_epoch, 5).astype(int).tolist():
        assert len(np.unique(data.list_samples(step))) == 4096
    assert time.process_time() - started < 10, "measured: 0.3 s"


def test_a_ledger_of_many_samples_does_not_look_through_them() -> None:
    met = {sample: Damage(sample, NO_CAPTION, "") for sample in range(200_000)}
    ledger = Ledger((), 10**9, 0.1)
    ledger.restore([list(damage) for damage in met.values()])
    started = time.process_time()
    for sample in range(1000):
        ledger.add([Damage(10**6 + sample, NO_CAPTION, "")])
    assert time.process_time() - started < 2, "looking through all of them took 10 s"
    assert len(ledger.met) == 201_000
    assert len(ledger.add([Damage(5 * 10**6, BROKEN_TAR, "x.tar")])) == 1


def test_loaders_share_the_cores_of_their_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for name, value in (("WORLD_SIZE", "64"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert num_workers(spec_of("a.tar"), TrainingOptions(), "cuda") == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert num_workers(spec_of("a.tar"), TrainingOptions(), "cuda") == 7


@pytest.mark.parametrize(
    ("rank", "local_rank", "order"),
    [
        (0, "0", ["block", "barrier"]),
        (1, "1", ["barrier", "block"]),
        (8, "0", ["block", "barrier"]),
        (9, "1", ["barrier", "block"]),
    ],
)
def test_each_machine_indexes_its_shards_once(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: str, order: list[str]
) -> None:
    said: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: said.append("barrier"))
    with Processes(rank, 16, torch.device("cpu")).first_alone():
        said.append("block")
    assert said == order
