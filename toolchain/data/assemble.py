"""Assemble batches from samples on disk: crops in every requested size, and replacements for corrupt samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.data.bad_samples import Damage, LeftOut, UnusableError, describe, describe_left_out
from toolchain.data.batch import Batch, Geometry, OrderedData
from toolchain.data.images import CROP_NUMBERS, crop_image
from toolchain.data.random_numbers import uniforms
from toolchain.errors import ClipkdError, UsageError


class UnreadSample(NamedTuple):
    """A sample on disk that is read only when needed; both readers raise UnusableError if it is corrupt."""

    row: int
    """Its index among the requested samples."""

    read_captions: Callable[[], tuple[str, ...]]
    read_image: Callable[[], bytes]
    describe: Callable[[], str]
    """Return its name for a message."""


def assemble_view(
    samples: Iterable[UnreadSample],
    sample_B: NDArray[np.int64],
    view: int,
    geometries: Sequence[Geometry],
    *,
    seed: int,
    crop_scale: tuple[float, float],
) -> Batch:
    """Return one view of chosen samples without the corrupt ones; every geometry shows the same crop."""
    random_BR = uniforms(seed, sample_B, view, _CAPTION + 1)
    pixels = {geometry: np.empty((len(sample_B), 3, geometry.size, geometry.size), np.uint8) for geometry in geometries}
    picked: dict[int, tuple[str, int]] = {}
    damaged: list[Damage] = []
    for b, read_captions, read_image, name in samples:
        try:
            captions = read_captions()
            crops = crop_image(read_image(), crop_scale, random_BR[b, _CROP:_CAPTION], geometries)
        except UnusableError as error:
            damaged.append(Damage(int(sample_B[b]), error.reason, describe(name(), error)))
            continue
        for geometry, crop_HH3 in zip(geometries, crops, strict=True):
            pixels[geometry][b] = crop_HH3.transpose(2, 0, 1)
        pick = int(random_BR[b, _CAPTION] * len(captions))
        picked[b] = captions[pick], pick
    rows = sorted(picked)
    if damaged:
        pixels = {geometry: pixels_B3HH[rows] for geometry, pixels_B3HH in pixels.items()}
    return Batch(
        {geometry: torch.from_numpy(pixels_B3HH) for geometry, pixels_B3HH in pixels.items()},
        [picked[b][0] for b in rows],
        sample_B[rows],
        np.array([picked[b][1] for b in rows], np.int64),
        view,
        tuple(damaged),
    )


_CROP, _CAPTION = 1, 1 + CROP_NUMBERS  # columns of `uniforms`; 0 orders samples


class TooFewSamples(UsageError):
    """Data with fewer samples than a batch; `training_data` adds which field of the recipe sets the batch size."""


def require_full_batch(
    field: str, num_samples: int, batch_size: int, left_out: Sequence[LeftOut], *, held: str = "", more: str = "data"
) -> None:
    """Refuse data with fewer samples than a batch; `field` is the recipe's, `held` names where the samples are.

    Raises:
        TooFewSamples: there are fewer samples than `batch_size`.
    """
    if num_samples < batch_size:
        raise TooFewSamples(
            f"{field}: {num_samples:,} sample(s){held} are fewer than a batch of {batch_size:,}; "
            f"{'; '.join(describe_left_out(left_out)) or 'nothing was skipped'}. Add more {more}, or lower "
            "the batch size"
        )


_ATTEMPTS = 64  # batches whose samples are tried in place of a corrupt one


def fill_batch(data: OrderedData, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
    """Return the rows of a step's batch, with corrupt samples replaced by others of the epoch.

    A corrupt sample in row i is replaced by row i of the next batch, or of the batch after that.  No two rows ever try
    the same sample, so a rank need not know the rows of other ranks, and a batch contains no sample twice.  A sample of
    the same batch is repeated only if the epoch has no other good sample for the row.

    Example: the epoch's order is a b c d e f g, a batch has 2 samples, and step 1 should show c and d.  If both are
    corrupt, row 0 tries e and row 1 tries f, as in the next batch.  Next, row 0 tries g and row 1 tries a, because the
    order wraps around at its end.  Then row 0 tries b, and row 1 tries nothing, because its next index is in the batch
    itself.  Finally each row tries the other sample of the batch: row 0 tries d, row 1 tries c.

    Raises:
        ClipkdError: every sample tried is corrupt.
    """
    epoch, index = divmod(step, data.steps_per_epoch)
    view = epoch if data.num_views is None else epoch % data.num_views
    size, total = data.batch_size, data.num_samples
    start = index * size
    row_b = np.arange(size)[rows]
    sample_b = data.in_order(epoch, start, start + size)[rows]
    batch = data.read_view(sample_b, view, geometries)
    if not batch.damaged:
        return batch
    damaged = list(batch.damaged)
    is_missing_b = ~np.isin(sample_b, batch.sample_B)
    parts = [(row_b[~is_missing_b], batch)]
    for place_b in _places_to_try(row_b, size, total):
        if not is_missing_b.any():
            break
        (tried_t,) = np.nonzero(is_missing_b & (place_b >= 0))
        if not len(tried_t):
            continue
        place_t = (start + place_b[tried_t]) % total
        sample_t = np.array([data.in_order(epoch, place, place + 1)[0] for place in place_t.tolist()], np.int64)
        found = data.read_view(sample_t, view, geometries)
        damaged += found.damaged
        filled_t = tried_t[np.isin(sample_t, found.sample_B)]
        parts.append((row_b[filled_t], found))
        is_missing_b[filled_t] = False
    if is_missing_b.any():
        raise ClipkdError(
            f"step {step}: every sample tried for {is_missing_b.sum()} row(s) of the batch is corrupt; "
            f"the last: {damaged[-1].reason}: {damaged[-1].where}. Fix the data"
        )
    return replace(_join_rows(parts, geometries), damaged=tuple(damaged))


def _places_to_try(row_b: NDArray[np.int64], size: int, total: int) -> Iterator[NDArray[np.int64]]:
    """Yield for each attempt the index of the sample that each row tries, counted from the batch's start; -1 for none.

    Indices outside the batch come first, then those inside it (0 to size - 1).
    """
    for shift in range(size, total, size)[:_ATTEMPTS]:
        place_b = (row_b + shift) % total
        yield np.where(place_b >= size, place_b, -1)
    for shift in range(1, size):
        yield (row_b + shift) % size


def _join_rows(parts: Sequence[tuple[NDArray[np.int64], Batch]], geometries: Sequence[Geometry]) -> Batch:
    """Return one batch joined from several, with its rows sorted by the row numbers given with each batch."""
    order_b = np.argsort(np.concatenate([row for row, _ in parts]), kind="stable")
    batches = [batch for _, batch in parts]
    captions = [caption for batch in batches for caption in batch.captions_B]
    return replace(
        batches[0],
        pixels={g: torch.cat([batch.pixels[g] for batch in batches])[torch.from_numpy(order_b)] for g in geometries},
        captions_B=[captions[b] for b in order_b.tolist()],
        sample_B=np.concatenate([batch.sample_B for batch in batches])[order_b],
        pick_B=np.concatenate([batch.pick_B for batch in batches])[order_b],
    )
