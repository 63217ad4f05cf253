"""Training batches, each a pure function of (seed, step): what every kind of data provides, and glyphs.

N samples   B batch   K characters   H image size
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torchvision.transforms.functional as tvf
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from toolchain.damage import Damage as Damage
from toolchain.damage import LeftOut, UnusableError, described, sentences
from toolchain.errors import ClipkdError, UsageError
from toolchain.glyphs import TEMPLATES, TrainingSet, clean_images
from toolchain.pictures import CROP_NUMBERS, cropped
from toolchain.views import draw_views, template_picks, uniforms


class Geometry(NamedTuple):
    """The part of a model's preprocessing that a batch is prepared for: models that agree in it share the pixels."""

    size: int
    """Height and width."""

    interpolation: str


@dataclass(frozen=True)
class Batch:
    """Image-text pairs of one optimizer step, or a process's share of them.

    Damaged samples are not among its rows: a batch of a step shows others in their place, a view of chosen samples is
    shorter for them.
    """

    pixels: dict[Geometry, Tensor]
    """uint8 [B, 3, H, H], the same views for every geometry asked for."""

    captions_B: list[str]
    sample_B: NDArray[np.int64]
    """Which samples of the data these are: what masks are drawn by and messages name."""

    pick_B: NDArray[np.int64]
    """Which of its sample's captions, as `captions_of` lists them, each row shows."""

    view: int
    damaged: tuple[Damage, ...] = ()


class TrainingData(Protocol):
    """Training samples in an order, and with augmentations, that are pure functions of seed, step and sample.

    No position is kept: any process can make any batch, before or after any other.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def num_views(self) -> int | None:
        """Distinct augmentations of each sample; epoch e shows view e mod `num_views`.  None: every epoch its own."""
        ...

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What the listing of the data already showed to be no sample."""
        ...

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """The rows of the batch of an optimizer step, other samples in place of damaged ones."""
        ...

    def view_of(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """One view of chosen samples, the damaged ones left out."""
        ...

    def captions_of(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """[B] every caption that chosen samples may be shown with; none for a damaged one."""
        ...

    def undistorted(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """uint8 [B, 3, H, H] chosen samples as evaluation would show them: no augmentation; damaged ones left out."""
        ...


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


@dataclass(frozen=True)
class GlyphBatches:
    """Glyphs by step; no batch holds a character twice, so that every label off the diagonal is truly negative."""

    samples: TrainingSet
    seed: int
    batch_size: int
    views: int
    """Distinct augmentations of each sample; epoch e shows view e mod views."""

    left_out = ()

    @property
    def num_samples(self) -> int:
        return len(self.samples.character_N)

    @property
    def num_views(self) -> int:
        return self.views

    @property
    def steps_per_epoch(self) -> int:
        """One batch fewer than fit: room for the characters that still meet at an epoch's end."""
        return max(1, self.num_samples // self.batch_size - 1)

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """The rows of the batch of an optimizer step.

        Raises:
            UsageError: the batch is too large for the number of distinct characters.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        batches = _epoch_batches(self, epoch)
        if index >= len(batches):
            raise UsageError(
                f"batch_size {self.batch_size}: a batch holds no character twice, and of {len(self.samples.names)} "
                f"characters only {len(batches)} such batches can be made; lower distill.batch_size"
            )
        return self.view_of(batches[index][rows], epoch % self.views, geometries)

    def view_of(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """One view of chosen samples."""
        names_B = [self.samples.names[character] for character in self.samples.character_N[sample_B].tolist()]
        template_B = template_picks(self.seed, sample_B, view)
        captions_B = [TEMPLATES[t].format(name) for t, name in zip(template_B.tolist(), names_B, strict=True)]
        drawn_B3HH = draw_views(self.samples.masks_NSS[sample_B], self.seed, sample_B, view)
        pixels = {geometry: _resized(drawn_B3HH, geometry) for geometry in geometries}
        return Batch(pixels, captions_B, sample_B, np.full(len(sample_B), view % self.views), view)

    def captions_of(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """[B] the caption of each view."""
        names_B = [self.samples.names[character] for character in self.samples.character_N[sample_B].tolist()]
        template_BV = np.stack([template_picks(self.seed, sample_B, view) for view in range(self.views)], 1).tolist()
        return [
            tuple(TEMPLATES[t].format(name) for t in template_V)
            for template_V, name in zip(template_BV, names_B, strict=True)
        ]

    def undistorted(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """uint8 [B, 3, H, H] chosen samples, black on white."""
        clean_BHH3 = torch.from_numpy(clean_images(self.samples.masks_NSS[sample_B]))
        return _resized(clean_BHH3.movedim(-1, 1).contiguous(), geometry)


def _resized(pixels_B3HH: Tensor, geometry: Geometry) -> Tensor:
    size = (geometry.size, geometry.size)
    if pixels_B3HH.shape[-2:] == size:
        return pixels_B3HH
    mode = InterpolationMode(geometry.interpolation)
    resized: Tensor = tvf.resize(pixels_B3HH, list(size), mode, antialias=True)
    return resized


@lru_cache(maxsize=2)
def _epoch_batches(data: GlyphBatches, epoch: int) -> NDArray[np.int64]:
    """[steps, B] sample indices of one epoch: every sample at most once, no character twice in a row of B.

    The faces of a character are spread evenly over the epoch; the few that still meet are moved to a later batch.
    """
    character_N = data.samples.character_N
    random = np.random.default_rng([data.seed, epoch])
    num_samples = len(character_N)
    shuffled_N = random.permutation(num_samples)
    shuffled_N = shuffled_N[
        np.argsort(character_N[shuffled_N], kind="stable")
    ]  # by character, its faces in random order
    counts_K = np.bincount(character_N)
    rank_N = np.arange(num_samples) - np.repeat(np.cumsum(counts_K) - counts_K, counts_K)
    phase_N = (rank_N + random.random(num_samples)) / np.repeat(counts_K, counts_K)
    pending = deque(shuffled_N[np.argsort(phase_N, kind="stable")].tolist())
    batches: list[list[int]] = []
    postponed: deque[int] = deque()
    while len(postponed) + len(pending) >= data.batch_size:
        chosen: dict[int, int] = {}
        for _ in range(len(postponed)):
            sample = postponed.popleft()
            if len(chosen) == data.batch_size or chosen.setdefault(int(character_N[sample]), sample) != sample:
                postponed.append(sample)
        while len(chosen) < data.batch_size and pending:
            sample = pending.popleft()
            if chosen.setdefault(int(character_N[sample]), sample) != sample:
                postponed.append(sample)
        if len(chosen) < data.batch_size:
            break  # only repeats are left
        batches.append(list(chosen.values()))
    return np.array(batches, np.int64).reshape(-1, data.batch_size)
