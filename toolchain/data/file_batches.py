"""Read image-text pairs from files on disk (a `Listing`); every batch is a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.assemble import UnreadSample, assemble_view, fill_batch, require_full_batch
from toolchain.data.bad_samples import LeftOut, UnusableError
from toolchain.data.batch import Batch, Geometry
from toolchain.data.listing import Listing, read_image
from toolchain.data.random_numbers import uniforms

_ORDER = 0  # column of `uniforms`


@dataclass(frozen=True, eq=False)
class FileBatches:
    """Batches from a listing, by step; each epoch shuffles all samples.

    Raises:
        UsageError: there are fewer samples than one batch.
    """

    listing: Listing
    seed: int
    batch_size: int
    crop_scale: tuple[float, float]
    """Smallest and largest share of the image's area that a crop keeps."""

    num_views: int | None = None

    def __post_init__(self) -> None:
        require_full_batch("data", self.num_samples, self.batch_size, self.left_out)

    @property
    def num_samples(self) -> int:
        return len(self.listing)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches; the next epoch shows the remaining samples at other positions."""
        return self.num_samples // self.batch_size

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return self.listing.left_out

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at positions `start` to `stop` of an epoch's order."""
        return _shuffle(self.seed, self.num_samples, epoch)[start:stop].astype(np.int64)

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """Return rows of an optimizer step's batch, with corrupt samples replaced.

        Raises:
            ClipkdError: a CSV file has changed or is missing, or there is no good sample to show.
        """
        return fill_batch(self, step, rows, geometries)

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """Return one view of chosen samples without the corrupt ones; every geometry shows the same crop.

        Raises:
            ClipkdError: a CSV file has changed or is missing.
        """
        samples = (
            UnreadSample(
                b,
                partial(self.listing.captions, sample),
                partial(self._read_image, sample),
                partial(self.listing.describe, sample),
            )
            for b, sample in enumerate(sample_B.tolist())
        )
        return assemble_view(samples, sample_B, view, geometries, seed=self.seed, crop_scale=self.crop_scale)

    def _read_image(self, sample: int) -> bytes:
        return read_image(self.listing.image_path(sample))

    def list_captions(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return [B] the captions of chosen samples, none where they are corrupt; images are not read.

        Raises:
            ClipkdError: a CSV file has changed or is missing.
        """
        captions_B: list[tuple[str, ...]] = []
        for sample in sample_B.tolist():
            try:
                captions_B.append(self.listing.captions(sample))
            except UnusableError:
                captions_B.append(())
        return captions_B

    def read_unaugmented(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """Return uint8 [B, 3, H, H] chosen samples with the largest crop of each image; corrupt ones are dropped.

        Raises:
            ClipkdError: a CSV file has changed or is missing.
        """
        return replace(self, crop_scale=(1.0, 1.0)).read_view(sample_B, 0, [geometry]).pixels[geometry]


@lru_cache(maxsize=2)
def _shuffle(seed: int, num_samples: int, epoch: int) -> NDArray[np.uint32 | np.int64]:
    """Return [N] the samples of an epoch in order; every worker keeps two epochs, so their numbers are kept small."""
    order_N = np.argsort(uniforms(seed, np.arange(num_samples), epoch, 1)[:, _ORDER], kind="stable")
    return order_N.astype(np.uint32) if num_samples <= 1 << 32 else order_N
