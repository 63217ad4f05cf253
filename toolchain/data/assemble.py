"""Assemble batches from samples on a disk: crops of every size asked for, other samples in place of corrupt ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.data.bad_samples import Damage, LeftOut, UnusableError, described, sentences
from toolchain.data.batch import Batch, Geometry
from toolchain.data.images import CROP_NUMBERS, cropped
from toolchain.data.random_numbers import uniforms
from toolchain.errors import ClipkdError, UsageError


class Ordered(Protocol):
    """Samples in an order of each epoch: what batches with substitutes are made of."""

    @property
    def num_samples(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def num_views(self) -> int | None: ...

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at some places of an epoch's order."""
        ...

    def view_of(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch: ...


class Readable(NamedTuple):
    """A sample of pictures on a disk, read when its turn comes; each function raises UnusableError for damage."""

    place: int
    """Among the samples asked for."""

    captions: Callable[[], tuple[str, ...]]
    picture: Callable[[], bytes]
    where: Callable[[], str]
    """What it is called in a message."""


def cropped_view(
    samples: Iterable[Readable],
    sample_B: NDArray[np.int64],
    view: int,
    geometries: Sequence[Geometry],
    *,
    seed: int,
    crop_scale: tuple[float, float],
) -> Batch:
    """One view of chosen samples, the damaged left out; every geometry shows the same crop."""
    random_BR = uniforms(seed, sample_B, view, _CAPTION + 1)
    shown: dict[int, tuple[list[NDArray[np.uint8]], str, int]] = {}
    damaged: list[Damage] = []
    for b, captions_of, picture_of, where in samples:
        try:
            captions = captions_of()
            views = cropped(picture_of(), crop_scale, random_BR[b, _CROP:_CAPTION], geometries)
        except UnusableError as error:
            damaged.append(Damage(int(sample_B[b]), error.reason, described(where(), error)))
            continue
        pick = int(random_BR[b, _CAPTION] * len(captions))
        shown[b] = views, captions[pick], pick
    rows = [shown[b] for b in sorted(shown)]
    pixels = {}
    for index, geometry in enumerate(geometries):
        pixels_B3HH = np.empty((len(rows), 3, geometry.size, geometry.size), np.uint8)
        for b, (views, _, _) in enumerate(rows):
            pixels_B3HH[b] = views[index].transpose(2, 0, 1)
        pixels[geometry] = torch.from_numpy(pixels_B3HH)
    pick_B = np.array([pick for _, _, pick in rows], np.int64)
    return Batch(pixels, [caption for _, caption, _ in rows], sample_B[sorted(shown)], pick_B, view, tuple(damaged))


_CROP, _CAPTION = 1, 1 + CROP_NUMBERS  # columns of `uniforms`; 0 orders samples


def require_a_batch(
    field: str, num_samples: int, batch_size: int, left_out: Sequence[LeftOut], *, held: str = "", more: str = "data"
) -> None:
    """Refuse data that has fewer samples than a batch; `field` is the recipe's, `held` says what holds them.

    Raises:
        UsageError: it has.
    """
    if num_samples < batch_size:
        raise UsageError(
            f"{field}: {num_samples:,} sample(s){held} are fewer than a batch of {batch_size:,}; "
            f"{'; '.join(sentences(left_out)) or 'nothing was left out'}. Name more {more}, or lower distill.batch_size"
        )


_ATTEMPTS = 64  # batches whose samples are tried in place of a damaged one


def filled_batch(data: Ordered, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
    """The rows of a step's batch, samples from elsewhere in the epoch in place of damaged ones.

    In place of row i, row i of the next batch is shown, or of the one after that: no two rows ever try the same sample,
    so that the rows of other processes need not be known, and a batch holds no sample twice.  Only where an epoch has
    no other sound sample for a row is one of the same batch shown again.

    Raises:
        ClipkdError: every sample tried is damaged.
    """
    epoch, index = divmod(step, data.steps_per_epoch)
    view = epoch if data.num_views is None else epoch % data.num_views
    size, total = data.batch_size, data.num_samples
    start = index * size
    row_b = np.arange(size)[rows]
    sample_b = data.in_order(epoch, start, start + size)[rows]
    batch = data.view_of(sample_b, view, geometries)
    if not batch.damaged:
        return batch
    damaged = list(batch.damaged)
    made = [(row_b[np.isin(sample_b, batch.sample_B)], batch)]
    missing_m = row_b[~np.isin(sample_b, batch.sample_B)]
    shifts = [shift for shift in range(size, total, size)][:_ATTEMPTS] + list(range(total + 1, total + size))
    for shift in shifts:
        if not len(missing_m):
            break
        if shift > total:  # nothing elsewhere: the other rows of this batch
            place_m = (missing_m + shift - total) % size
            able_m = np.ones(len(missing_m), bool)
        else:
            place_m = (missing_m + shift) % total
            able_m = place_m >= size
        tried_t, place_t = missing_m[able_m], (start + place_m[able_m]) % total
        if not len(tried_t):
            continue
        candidate_t = np.array([data.in_order(epoch, place, place + 1)[0] for place in place_t.tolist()], np.int64)
        more = data.view_of(candidate_t, view, geometries)
        damaged += more.damaged
        found_t = np.isin(candidate_t, more.sample_B)
        made.append((tried_t[found_t], more))
        missing_m = np.setdiff1d(missing_m, tried_t[found_t])
    if len(missing_m):
        raise ClipkdError(
            f"step {step}: every sample tried for {len(missing_m)} row(s) of the batch is damaged; "
            f"the last: {damaged[-1].reason}: {damaged[-1].where}. Mend the data"
        )
    order_b = np.argsort(np.concatenate([row for row, _ in made]), kind="stable")
    parts = [part for _, part in made]
    captions = [caption for part in parts for caption in part.captions_B]
    return replace(
        batch,
        pixels={g: torch.cat([part.pixels[g] for part in parts])[torch.from_numpy(order_b)] for g in geometries},
        captions_B=[captions[b] for b in order_b.tolist()],
        sample_B=np.concatenate([part.sample_B for part in parts])[order_b],
        pick_B=np.concatenate([part.pick_B for part in parts])[order_b],
        damaged=tuple(damaged),
    )
