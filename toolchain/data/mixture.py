"""Mix several sources: an epoch shows all of them, mixed evenly, each in its own order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.assemble import fill_batch, require_full_batch
from toolchain.data.bad_samples import LeftOut, merge_left_out
from toolchain.data.batch import Batch, Geometry, OrderedData
from toolchain.data.random_numbers import uniforms

_MIXED = 1  # column of `uniforms` that mixes the parts; column 0 orders samples within a part


class _Part(NamedTuple):
    """One pass over a source within an epoch (`turn` of `turns`), and the offset of its sample numbers."""

    source: OrderedData
    turn: int
    turns: int
    first: int
    first_turn: int
    """Offset of the sample numbers in the source's first turn."""


@dataclass(frozen=True, eq=False)
class MixtureBatches:
    """Batches from several sources, by step.  A repeated source's sample has a different number in each turn.

    Raises:
        UsageError: there are fewer samples than one batch.
    """

    parts: tuple[_Part, ...]
    seed: int
    batch_size: int

    num_views: int | None = None

    def __post_init__(self) -> None:
        require_full_batch("data.sources", self.num_samples, self.batch_size, self.left_out)

    @classmethod
    def from_sources(
        cls,
        sources: Sequence[OrderedData],
        repeat: Sequence[int] | None,
        *,
        seed: int,
        batch_size: int,
        num_views: int | None,
    ) -> "MixtureBatches":
        """Mix opened sources; an epoch shows each as often as `repeat` gives, or once if it is absent."""
        parts: list[_Part] = []
        first = 0
        for number, source in enumerate(sources):
            turns = repeat[number] if repeat else 1
            start = first
            for turn in range(turns):
                parts.append(_Part(source, turn, turns, first, start))
                first += source.num_samples
        return cls(tuple(parts), seed, batch_size, num_views)

    @property
    def num_samples(self) -> int:
        return sum(part.source.num_samples for part in self.parts)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches; the next epoch shows the remaining samples at other positions."""
        return self.num_samples // self.batch_size

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return merge_left_out(left for part in self.parts if part.turn == 0 for left in part.source.left_out)

    def in_order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at positions `start` to `stop` of an epoch's order."""
        part_N, rank_N = _mix(self.seed, tuple(part.source.num_samples for part in self.parts), epoch)
        sample_B = np.empty(stop - start, np.int64)
        for p in np.unique(part_N[start:stop]).tolist():
            part, chosen_B = self.parts[p], part_N[start:stop] == p
            rank_B = rank_N[start:stop][chosen_B]
            view = epoch * part.turns + part.turn
            ordered = part.source.in_order(view, int(rank_B[0]), int(rank_B[-1]) + 1)  # a part's ranks are consecutive
            sample_B[chosen_B] = part.first + ordered
        return sample_B

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """Return rows of an optimizer step's batch, with corrupt samples replaced.

        Raises:
            ClipkdError: a data file has changed or is missing, or there is no good sample to show.
        """
        return fill_batch(self, step, rows, geometries)

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """Return one view of chosen samples without the corrupt ones.

        A corrupt sample of a repeated source is reported under its number in the first turn.

        Raises:
            ClipkdError: a data file has changed or is missing.
        """
        made = []
        for part, place_b in self._split_by_part(sample_B):
            own = part.source.read_view(sample_B[place_b] - part.first, view * part.turns + part.turn, geometries)
            kept_b = place_b[np.isin(sample_B[place_b] - part.first, own.sample_B)]
            made.append((part, kept_b, own))
        if not made:
            empty = {g: torch.empty(0, 3, g.size, g.size, dtype=torch.uint8) for g in geometries}
            return Batch(empty, [], sample_B, np.zeros(0, np.int64), view)
        order_b = np.argsort(np.concatenate([kept_b for _, kept_b, _ in made]), kind="stable")
        captions = [caption for _, _, own in made for caption in own.captions_B]
        pixels = {g: torch.cat([own.pixels[g] for _, _, own in made])[torch.from_numpy(order_b)] for g in geometries}
        return Batch(
            pixels,
            [captions[b] for b in order_b.tolist()],
            np.concatenate([part.first + own.sample_B for part, _, own in made])[order_b],
            np.concatenate([own.pick_B for _, _, own in made])[order_b],
            view,
            tuple(
                damage._replace(sample=part.first_turn + damage.sample)
                for part, _, own in made
                for damage in own.damaged
            ),
        )

    def list_captions(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return [B] the captions of chosen samples, none for corrupt ones.

        Raises:
            ClipkdError: a data file has changed or is missing.
        """
        captions_B: list[tuple[str, ...]] = [()] * len(sample_B)
        for part, place_b in self._split_by_part(sample_B):
            own = part.source.list_captions(sample_B[place_b] - part.first)
            for b, captions in zip(place_b.tolist(), own, strict=True):
                captions_B[b] = captions
        return captions_B

    def read_unaugmented(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """Return uint8 [B, 3, H, H] chosen samples without augmentation, by source; corrupt ones are dropped.

        Raises:
            ClipkdError: a data file has changed or is missing.
        """
        return torch.cat(
            [
                part.source.read_unaugmented(sample_B[place_b] - part.first, geometry)
                for part, place_b in self._split_by_part(sample_B)
            ]
        )

    def _split_by_part(self, sample_B: NDArray[np.int64]) -> list[tuple[_Part, NDArray[np.int64]]]:
        first_P = np.array([part.first for part in self.parts])
        part_B = np.searchsorted(first_P, sample_B, side="right") - 1
        return [(self.parts[p], np.flatnonzero(part_B == p)) for p in np.unique(part_B).tolist()]


def source_seed(seed: int, number: int) -> int:
    """Return a different seed for each source of a mixture, because no two may crop and shuffle alike."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=2)
def _mix(seed: int, counts: tuple[int, ...], epoch: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Return [N] the part at each position of an epoch, and [N] the position within that part's own order."""
    owner_N = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    part_N = owner_N[np.argsort(uniforms(seed, np.arange(len(owner_N)), epoch, _MIXED + 1)[:, _MIXED], kind="stable")]
    rank_N = np.empty(len(part_N), np.int64)
    for p, count in enumerate(counts):
        rank_N[part_N == p] = np.arange(count)
    return part_N, rank_N
