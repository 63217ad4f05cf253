"""What every kind of training data provides: batches that are pure functions of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.bad_samples import Damage, LeftOut


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


class OrderedData(TrainingData, Protocol):
    """Training data whose samples have an order in each epoch: what can replace a corrupt sample, and can be mixed."""

    @property
    def batch_size(self) -> int: ...

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at some places of an epoch's order."""
        ...
