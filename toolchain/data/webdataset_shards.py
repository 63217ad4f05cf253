"""Read image-text pairs from webdataset shards, local or remote; every batch is a pure function of (seed, step).

A shard is a tar archive as img2dataset writes it: KEY.jpg (or another of `images.IMAGE_SUFFIXES`) with KEY.txt, or with
KEY.json that has a "caption".  An index of each shard stores the positions of its pairs, so a batch reads only what it
shows (shard_index.py).  No generator or open file keeps a position, so any process can make any batch: a resumed run
continues exactly, and the numbers of workers and ranks change no pixel.

The order of an epoch is random at a scale that suits disks: the shards are shuffled and grouped into windows of
`WINDOW` shards, and the samples are shuffled within each window.  With img2dataset's 10,000 samples per shard, a window
has 80,000 samples, some 2 to 4 GB.  The page cache of a training machine holds it, so an epoch reads each file from
disk once.  Remote shards are copied to a local folder in the same order, before they are needed (local_copies.py).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.assemble import UnreadSample, assemble_view, fill_batch, require_full_batch
from toolchain.data.bad_samples import BROKEN_TAR, LeftOut, UnusableError, merge_left_out
from toolchain.data.batch import Batch, Geometry
from toolchain.data.local_copies import LocalCopies, open_copies
from toolchain.data.pairing import caption_json_key, split_name
from toolchain.data.random_numbers import uniforms
from toolchain.data.remote_files import INDEX, RemoteFile, add_counts, list_files
from toolchain.data.shard_index import Shard, changed_error, index_remote_shards, index_shards, load_pairs
from toolchain.data.tar_files import expand, expand_urls, parse_captions, read_members
from toolchain.errors import ClipkdError, UsageError
from toolchain.progress import Progress, no_progress
from toolchain.recipe.data import WebdatasetSpec

WINDOW = 8
"""Number of shards among which samples are shuffled; a batch reads from few more than these."""

# Column of `uniforms` that orders samples within an epoch; assemble.py uses the others.
_ORDER = 0


@dataclass(frozen=True, eq=False)
class ShardBatches:
    """Batches from shards, by step.  A sample's number is its index among all pairs of all shards, in listed order.

    Raises:
        UsageError: there are fewer samples than one batch.
    """

    shards: tuple[Shard, ...]
    seed: int
    batch_size: int
    crop_scale: tuple[float, float]
    """Smallest and largest share of the image's area that a crop keeps."""

    num_views: int | None = None
    copies: LocalCopies | None = None
    """The folder of copies of remote shards; None for local shards."""

    @cached_property
    def end_S(self) -> NDArray[np.int64]:
        """Return [S] the number of samples up to each shard's end."""
        return np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Entries of the shards that form no pair, by reason."""
        return merge_left_out(left for shard in self.shards for left in shard.left_out)

    def __post_init__(self) -> None:
        held = f" in {len(self.shards)} shard(s)"
        require_full_batch("data.shards", self.num_samples, self.batch_size, self.left_out, held=held, more="shards")

    @classmethod
    def open(
        cls,
        spec: WebdatasetSpec,
        *,
        seed: int,
        batch_size: int,
        progress: Progress = no_progress,
    ) -> "ShardBatches":
        """Open the shards that a recipe names; they are indexed first, which is slow only the first time.

        Raises:
            UsageError: shards are missing or misnamed, or contain fewer samples than one batch.
            ClipkdError: a shard cannot be read, or its index cannot be written.
        """
        if urls := expand_urls(spec.shards):
            files, copies = add_counts(list_files(urls)), open_copies(spec, urls)
            _require_room(files, copies)
            copies.forget_failures()
            shards = index_remote_shards(files, copies, spec.caption_key, progress)
            return cls(shards, seed, batch_size, spec.crop_scale, spec.views, copies)
        shards = index_shards(expand(spec.shards), spec.caption_key, progress)
        return cls(shards, seed, batch_size, spec.crop_scale, spec.views)

    @property
    def num_samples(self) -> int:
        return int(self.end_S[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches; the next epoch shows the remaining samples at other positions."""
        return self.num_samples // self.batch_size

    def list_samples(self, step: int) -> NDArray[np.int64]:
        """Return [B] the samples of an optimizer step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.in_order(epoch, index * self.batch_size, (index + 1) * self.batch_size)

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at positions `start` to `stop` of an epoch's order."""
        return _slice_order(self, epoch, start, stop)

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """Return rows of an optimizer step's batch, with corrupt samples replaced; nothing else is read.

        Raises:
            ClipkdError: a shard has changed or is missing, or there is no good sample to show.
        """
        if self.copies is not None:
            epoch, index = divmod(step, self.steps_per_epoch)
            _read_ahead(self, epoch, _find_window(self, epoch, index * self.batch_size), os.getpid())
        return fill_batch(self, step, rows, geometries)

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """Return one view of chosen samples without the corrupt ones; every geometry shows the same crop.

        Raises:
            ClipkdError: a shard has changed or is missing.
        """
        if self.copies is not None and len(sample_B) > 1 and (np.diff(sample_B) == 1).all():  # all are read in order
            _read_on(self, int(np.searchsorted(self.end_S, sample_B[0], side="right")), os.getpid())
        samples = _walk_in_disk_order(self, sample_B)
        return assemble_view(samples, sample_B, view, geometries, seed=self.seed, crop_scale=self.crop_scale)

    def list_captions(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return [B] the captions of chosen samples, none where the caption is corrupt; images are not read.

        Raises:
            ClipkdError: a shard has changed or is missing.
        """
        captions_B: list[tuple[str, ...]] = [()] * len(sample_B)
        for sample in _walk_in_disk_order(self, sample_B):
            with contextlib.suppress(UnusableError):
                captions_B[sample.row] = sample.read_captions()
        return captions_B

    def read_unaugmented(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """Return uint8 [B, 3, H, H] chosen samples with the largest crop of each image; corrupt ones are dropped.

        Raises:
            ClipkdError: as for `read_view`.
        """
        return replace(self, crop_scale=(1.0, 1.0)).read_view(sample_B, 0, [geometry]).pixels[geometry]


# The order


def _slice_order(data: ShardBatches, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
    """Return the samples at positions `start` to `stop` of an epoch's order."""
    first_W, window = _window_starts(data, epoch), _find_window(data, epoch, start)
    pieces = []
    while start < stop:
        pieces.append(_shuffle_window(data, epoch, window)[start - first_W[window] : stop - first_W[window]])
        start += len(pieces[-1])
        window += 1
    return np.concatenate(pieces)


def _shuffle_shards(data: ShardBatches, epoch: int) -> NDArray[np.int64]:
    shard_S = -1 - np.arange(len(data.shards))  # negative, so no shard hashes like a sample
    return np.argsort(uniforms(data.seed, shard_S, epoch, 1)[:, _ORDER], kind="stable")


def _find_window(data: ShardBatches, epoch: int, position: int) -> int:
    """Return the window at a position of an epoch's order."""
    return int(np.searchsorted(_window_starts(data, epoch), position, side="right")) - 1


@lru_cache(maxsize=4)
def _window_starts(data: ShardBatches, epoch: int) -> NDArray[np.int64]:
    """Return [W] the positions in an epoch's order where its windows start."""
    counts_S = np.array([data.shards[s].num_samples for s in _shuffle_shards(data, epoch)])
    return np.cumsum(np.concatenate([[0], counts_S]))[:-1:WINDOW]


@lru_cache(maxsize=4)
def _shuffle_window(data: ShardBatches, epoch: int, window: int) -> NDArray[np.int64]:
    """Return the shuffled samples of one window of an epoch."""
    chosen = _shuffle_shards(data, epoch)[window * WINDOW : (window + 1) * WINDOW].tolist()
    sample_N = np.concatenate([np.arange(data.end_S[s] - data.shards[s].num_samples, data.end_S[s]) for s in chosen])
    return sample_N[np.argsort(uniforms(data.seed, sample_N, epoch, 1)[:, _ORDER], kind="stable")]


# Remote shards


def _require_room(files: Sequence[RemoteFile], copies: LocalCopies) -> None:
    """Refuse a folder of copies that does not hold the two windows that one batch can need.

    Raises:
        UsageError: the largest shards of two windows take more than the folder may.
    """
    needed = sum(sorted((file.size_bytes for file in files), reverse=True)[: 2 * WINDOW])
    if needed > copies.ahead_bytes:
        raise UsageError(
            f"data.cache_gb: {copies.limit_bytes / 1e9:g}: too little: {min(len(files), 2 * WINDOW)} shards of "
            f"{files[0].name.rpartition('/')[0]} are read at once, and copies of them take {needed / 1e9:.3g} GB. "
            f"Set at least {-(-needed * copies.limit_bytes // max(1, copies.ahead_bytes)) / 1e9:.3g}"
        )


@lru_cache(maxsize=4)
def _read_ahead(data: ShardBatches, epoch: int, window: int, process: int) -> None:
    """Copy the shards of a window and of those that follow, as many as the folder holds; once in each process."""
    order = [_shuffle_shards(data, epoch)[window * WINDOW :], _shuffle_shards(data, epoch + 1)]
    _copy_in_order(data, np.concatenate(order).tolist())


@lru_cache(maxsize=4)
def _read_on(data: ShardBatches, shard: int, process: int) -> None:
    """Copy a shard and the next few in listed order; once in each process."""
    _copy_in_order(data, range(shard, min(shard + WINDOW, len(data.shards))))


def _copy_in_order(data: ShardBatches, order: Iterable[int]) -> None:
    assert data.copies is not None
    wanted: dict[RemoteFile, None] = {}
    free_bytes = data.copies.ahead_bytes
    for s in order:
        file = data.shards[s].remote
        assert file is not None
        free_bytes -= 0 if file in wanted else file.size_bytes
        if free_bytes < 0:
            break
        wanted[file] = None
    data.copies.read_ahead(list(wanted))


# Reading


@contextlib.contextmanager
def _open_shard(shard: Shard, copies: LocalCopies | None) -> Iterator[BinaryIO]:
    try:
        file = shard.path.open("rb") if shard.remote is None or copies is None else copies.open(shard.remote)
    except OSError as error:
        raise ClipkdError(f"{shard.path}: cannot be read: {error.strerror}") from None
    with file:
        stat = os.fstat(file.fileno())
        if shard.remote is None and (stat.st_size, stat.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
            raise changed_error(shard)
        yield file


def _walk_in_disk_order(data: ShardBatches, sample_B: NDArray[np.int64]) -> Iterator[UnreadSample]:
    """Yield the chosen samples in disk order; each can be read until the next is taken.

    All samples of a remote shard that cannot be copied are corrupt.
    """
    shard_B = np.searchsorted(data.end_S, sample_B, side="right")
    for s in np.unique(shard_B).tolist():
        shard = data.shards[s]
        row_B = sample_B - (data.end_S[s] - shard.num_samples)
        chosen_B = np.flatnonzero(shard_B == s)
        chosen = chosen_B[np.argsort(row_B[chosen_B])].tolist()
        try:
            with _open_shard(shard, data.copies) as file:
                pair_N = load_pairs(shard, data.copies)
                for b in chosen:
                    yield _find_sample(b, shard, file, pair_N, int(row_B[b]))
        except UnusableError as error:
            yield from (_lost_sample(b, shard, error) for b in chosen)


def _find_sample(b: int, shard: Shard, file: BinaryIO, pair_N: NDArray[np.void], row: int) -> UnreadSample:
    if row >= len(pair_N):
        detail = f"it has {len(pair_N):,} samples; {INDEX} beside it has {shard.num_samples:,}"
        return _lost_sample(b, shard, UnusableError(BROKEN_TAR, detail))
    pair = pair_N[row]
    return UnreadSample(
        b,
        partial(_read_captions, shard, file, pair),
        partial(_read_part, file, pair, "image"),
        partial(_describe, shard, pair),
    )


def _lost_sample(b: int, shard: Shard, error: UnusableError) -> UnreadSample:
    def fail() -> Any:
        raise error

    return UnreadSample(b, fail, fail, lambda: shard.name)


def _read_captions(shard: Shard, file: BinaryIO, pair: np.void) -> tuple[str, ...]:
    json_key = caption_json_key(shard.caption_key, is_json=bool(pair["is_json"]))
    return parse_captions(_read_part(file, pair, "caption"), json_key)


def _describe(shard: Shard, pair: np.void) -> str:
    return f"{shard.name}: {_find_key(shard.path, int(pair['image']))}"


def _find_key(path: Path, offset: int) -> str:
    """Return the name of an image's sample, read from the headers because the index stores no names."""
    try:
        return _read_keys(path).get(offset, f"at byte {offset:,}")
    except OSError:
        return f"at byte {offset:,}"


@lru_cache(maxsize=WINDOW)
def _read_keys(path: Path) -> dict[int, str]:
    """Return the samples' names by file position; cached, so all corrupt samples of a shard share one read."""
    return {member.offset: split_name(member.name)[0] for member in read_members(path)[0]}


def _read_part(file: BinaryIO, pair: np.void, part: str) -> bytes:
    file.seek(int(pair[part]))
    return file.read(int(pair[f"{part}_bytes"]))
