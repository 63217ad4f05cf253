"""Read image-text pairs from webdataset shards on local disks; every batch is a pure function of (seed, step).

A shard is a tar archive as img2dataset writes it: KEY.jpg (or another of `images.IMAGE_SUFFIXES`) with KEY.txt, or with
KEY.json that has a "caption".  An index of each shard stores the positions of its pairs, so a batch reads only what it
shows.  It is made once from the tar headers and kept in the user's cache folder.  No generator or open file keeps a
position, so any process can make any batch: a resumed run continues exactly, and the numbers of workers and ranks
change no pixel.

The order of an epoch is random at a scale that suits disks: the shards are shuffled and grouped into windows of
`WINDOW` shards, and the samples are shuffled within each window.  With img2dataset's 10,000 samples per shard, a window
has 80,000 samples, some 2 to 4 GB.  The page cache of a training machine holds it, so an epoch reads each file from
disk once.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.assemble import UnreadSample, assemble_view, fill_batch, require_full_batch
from toolchain.data.bad_samples import BROKEN_TAR, LeftOut, UnusableError, describe, merge_left_out, to_utf8
from toolchain.data.batch import Batch, Geometry
from toolchain.data.pairing import caption_json_key, group_files, list_unused_images, pair_files, split_name
from toolchain.data.random_numbers import uniforms
from toolchain.data.tar_files import PAIRING_VERSION, Member, expand, parse_captions, read_members
from toolchain.errors import ClipkdError
from toolchain.filesystem import replacing, user_cache_folder
from toolchain.progress import Progress, no_progress
from toolchain.recipe.data import WebdatasetSpec

WINDOW = 8
"""Number of shards among which samples are shuffled; a batch reads from few more than these."""

# Column of `uniforms` that orders samples within an epoch; assemble.py uses the others.
_ORDER = 0

_INDEX_THREADS = 8  # reading headers is bound by the disk, not by computation
_PAIR = np.dtype(
    [("image", "<i8"), ("caption", "<i8"), ("image_bytes", "<u4"), ("caption_bytes", "<u4"), ("is_json", "?")]
)


class Shard(NamedTuple):
    """A shard's entry in the index."""

    path: Path
    size_bytes: int
    mtime_ns: int
    num_samples: int
    left_out: tuple[LeftOut, ...] = ()
    """Members that form no image-text pair, and damage to the archive itself."""

    caption_key: str | None = None
    """The recipe's key of the caption in a sample's JSON."""


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
        paths = expand(spec.shards)
        shards: list[Shard] = []
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            try:
                for shard, _ in pool.map(partial(_load_index, caption_key=spec.caption_key), paths):
                    shards.append(shard)
                    progress("indexing shards", len(shards), len(paths))
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or an interrupt, do not start the rest
        return cls(tuple(shards), seed, batch_size, spec.crop_scale, spec.views)

    @cached_property
    def end_S(self) -> NDArray[np.int64]:
        """[S] the number of the first sample after each shard; every part of a batch needs them."""
        return np.cumsum([shard.num_samples for shard in self.shards])

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
        return fill_batch(self, step, rows, geometries)

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """Return one view of chosen samples without the corrupt ones; every geometry shows the same crop.

        Raises:
            ClipkdError: a shard has changed or is missing.
        """
        samples = (
            UnreadSample(
                b,
                partial(_read_captions, shard, file, pair),
                partial(_read_part, file, pair, "image"),
                partial(_describe, shard, pair),
            )
            for b, shard, file, pair in _walk_in_disk_order(self, sample_B)
        )
        return assemble_view(samples, sample_B, view, geometries, seed=self.seed, crop_scale=self.crop_scale)

    def list_captions(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return [B] the captions of chosen samples, none where the caption is corrupt; images are not read.

        Raises:
            ClipkdError: a shard has changed or is missing.
        """
        captions_B: list[tuple[str, ...]] = [()] * len(sample_B)
        for b, shard, file, pair in _walk_in_disk_order(self, sample_B):
            with contextlib.suppress(UnusableError):
                captions_B[b] = _read_captions(shard, file, pair)
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
    first_W = _window_starts(data, epoch)
    window = int(np.searchsorted(first_W, start, side="right")) - 1
    pieces = []
    while start < stop:
        pieces.append(_shuffle_window(data, epoch, window)[start - first_W[window] : stop - first_W[window]])
        start += len(pieces[-1])
        window += 1
    return np.concatenate(pieces)


def _shuffle_shards(data: ShardBatches, epoch: int) -> NDArray[np.int64]:
    shard_S = -1 - np.arange(len(data.shards))  # negative, so no shard hashes like a sample
    return np.argsort(uniforms(data.seed, shard_S, epoch, 1)[:, _ORDER], kind="stable")


@lru_cache(maxsize=4)
def _window_starts(data: ShardBatches, epoch: int) -> NDArray[np.int64]:
    """Return [W] the positions in an epoch's order where its windows start."""
    counts_S = np.array([data.shards[s].num_samples for s in _shuffle_shards(data, epoch)])
    return np.cumsum(np.concatenate([[0], counts_S]))[:-1:WINDOW]


@lru_cache(maxsize=4)
def _shuffle_window(data: ShardBatches, epoch: int, window: int) -> NDArray[np.int64]:
    """Return the shuffled samples of one window of an epoch."""
    end_S = data.end_S
    chosen = _shuffle_shards(data, epoch)[window * WINDOW : (window + 1) * WINDOW].tolist()
    sample_N = np.concatenate([np.arange(end_S[s] - data.shards[s].num_samples, end_S[s]) for s in chosen])
    return sample_N[np.argsort(uniforms(data.seed, sample_N, epoch, 1)[:, _ORDER], kind="stable")]


# The index


@lru_cache(maxsize=4 * WINDOW)
def _load_pairs(shard: Shard) -> NDArray[np.void]:
    """Return the positions of a shard's pairs."""
    now, pair_N = _load_index(shard.path, shard.caption_key)
    if now != shard:
        raise _changed_error(shard)
    return pair_N


def _changed_error(shard: Shard) -> ClipkdError:
    return ClipkdError(
        f"{shard.path}: has changed since training began, so sample numbers no longer match. Start training again"
    )


def _load_index(path: Path, caption_key: str | None) -> tuple[Shard, NDArray[np.void]]:
    """Return a shard and its pairs from the user's cache folder; make and store the index if it is missing."""
    try:
        stat = path.stat()
        stamp = [PAIRING_VERSION, stat.st_size, stat.st_mtime_ns]
        preference = "" if caption_key is None else "\0json"  # with a key, the pairs are others
        digest = hashlib.sha256(f"{path.resolve()}{preference}".encode("utf-8", "surrogateescape")).hexdigest()
        kept = user_cache_folder() / "shards" / f"{digest[:32]}.npz"
        # An unreadable index is made again.  The file is opened here because numpy leaves an invalid archive open.
        with contextlib.suppress(Exception), kept.open("rb") as file, np.load(file) as saved:
            if saved["stamp"].tolist() == stamp:
                pair_N = saved["pairs"]
                left_out = tuple(
                    LeftOut(reason, number, tuple(examples), is_sample)
                    for reason, number, examples, is_sample in json.loads(str(saved["left_out"]))
                )
                return Shard(path, stat.st_size, stat.st_mtime_ns, len(pair_N), left_out, caption_key), pair_N
        members, damage = read_members(path)
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    pair_N, left_out = _pair_members(path, members, prefers_json=caption_key is not None)
    if damage:
        example = f"{path}: {damage}; samples found in it: {len(pair_N):,}"
        left_out += (LeftOut(BROKEN_TAR, 1, (to_utf8(example),)),)
    _save_index(kept, stamp=stamp, pairs=pair_N, left_out=json.dumps(left_out))
    return Shard(path, stat.st_size, stat.st_mtime_ns, len(pair_N), left_out, caption_key), pair_N


def _save_index(path: Path, **arrays: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ClipkdError(
            f"{path.parent}: the index of the shards cannot be written there: {error.strerror}. "
            "Free disk space, or set XDG_CACHE_HOME to another folder"
        ) from None


def _pair_members(
    path: Path, members: list[Member], *, prefers_json: bool
) -> tuple[NDArray[np.void], tuple[LeftOut, ...]]:
    """Return the pairs of a shard in the order of their first files, and the samples that form no pair."""
    rows, left_out = [], []
    for key, files in group_files(members).items():
        try:
            image, caption, is_json = pair_files(files, prefers_json=prefers_json)
        except UnusableError as error:
            left_out.append(LeftOut(error.reason, error.number, (describe(f"{path}: {key}", error),)))
            continue
        left_out += list_unused_images(path, files)
        rows.append((image.offset, caption.offset, image.size_bytes, caption.size_bytes, is_json))
    return np.array(rows, _PAIR), merge_left_out(left_out)


# Reading


@contextlib.contextmanager
def _open_shard(shard: Shard) -> Iterator[BinaryIO]:
    try:
        file = shard.path.open("rb")
    except OSError as error:
        raise ClipkdError(f"{shard.path}: cannot be read: {error.strerror}") from None
    with file:
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
            raise _changed_error(shard)
        yield file


def _walk_in_disk_order(
    data: ShardBatches, sample_B: NDArray[np.int64]
) -> Iterator[tuple[int, Shard, BinaryIO, np.void]]:
    """Yield, in disk order, each chosen sample's index b, its shard, the opened file and the position of its pair."""
    shards, end_S = data.shards, data.end_S
    shard_B = np.searchsorted(end_S, sample_B, side="right")
    for s in np.unique(shard_B).tolist():
        pair_N = _load_pairs(shards[s])
        row_B = sample_B - (end_S[s] - shards[s].num_samples)
        chosen_B = np.flatnonzero(shard_B == s)
        with _open_shard(shards[s]) as file:
            for b in chosen_B[np.argsort(row_B[chosen_B])].tolist():
                yield b, shards[s], file, pair_N[row_B[b]]


def _read_captions(shard: Shard, file: BinaryIO, pair: np.void) -> tuple[str, ...]:
    json_key = caption_json_key(shard.caption_key, is_json=bool(pair["is_json"]))
    return parse_captions(_read_part(file, pair, "caption"), json_key)


def _describe(shard: Shard, pair: np.void) -> str:
    return f"{shard.path}: {_find_key(shard.path, int(pair['image']))}"


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
