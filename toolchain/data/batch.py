"""Define the interface of every kind of training data: batches that are pure functions of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.bad_samples import Damage, LeftOut


class Geometry(NamedTuple):
    """The part of a model's preprocessing that determines pixels; models with the same geometry share them."""

    size: int
    """Height and width."""

    interpolation: str


@dataclass(frozen=True)
class Batch:
    """Image-text pairs of one optimizer step, or one rank's share of them.

    Its rows contain no corrupt samples: a step's batch replaces them, and a view of chosen samples has fewer rows.
    """

    pixels: dict[Geometry, Tensor]
    """uint8 [B, 3, H, H] for every requested geometry, all showing the same views."""

    captions_B: list[str]
    sample_B: NDArray[np.int64]
    """Sample numbers of the rows; masks are drawn from them and messages name them."""

    pick_B: NDArray[np.int64]
    """Index of each row's caption in the list that `list_captions` returns."""

    view: int
    damaged: tuple[Damage, ...] = ()


class TrainingData(Protocol):
    """Training samples whose order and augmentations are pure functions of seed, step and sample.

    No position is stored, so any process can make any batch, before or after any other.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def num_views(self) -> int | None:
        """Number of augmentations per sample; epoch e shows view e mod `num_views`.  None: every epoch has its own."""
        ...

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Entries skipped while listing the data, counted by reason."""
        ...

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """Return rows of an optimizer step's batch, with corrupt samples replaced by others."""
        ...

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """Return one view of chosen samples without the corrupt ones."""
        ...

    def list_captions(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return [B] all captions that each chosen sample may be shown with; none for a corrupt sample."""
        ...

    def read_unaugmented(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """Return uint8 [B, 3, H, H] chosen samples without augmentation, as in evaluation; corrupt ones are dropped."""
        ...


class OrderedData(TrainingData, Protocol):
    """Training data with an order of samples in each epoch, as needed to replace corrupt samples and to mix sources."""

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at positions `start` to `stop` of an epoch's order."""
        ...
