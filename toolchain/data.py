"""Training batches of glyphs, each a pure function of (seed, step).

N samples   B batch   K characters   H image size
"""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolchain.errors import UsageError
from toolchain.glyphs import TEMPLATES, TrainingSet
from toolchain.views import draw_views, template_picks


@dataclass(frozen=True)
class Batch:
    """Image-text pairs, no character twice, so that every label off the diagonal is truly negative."""

    pixels_B3HH: Tensor
    captions_B: list[str]
    sample_B: NDArray[np.int64]
    character_B: NDArray[np.int64]
    template_B: NDArray[np.int64]
    view: int


@dataclass(frozen=True)
class GlyphBatches:
    """All batches of a training run, by step."""

    samples: TrainingSet
    seed: int
    batch_size: int
    views: int
    """Distinct augmentations of each sample; epoch e shows view e mod views."""

    @property
    def steps_per_epoch(self) -> int:
        """One batch fewer than fit: room for the characters that still meet at an epoch's end."""
        return max(1, len(self.samples.character_N) // self.batch_size - 1)

    def batch(self, step: int) -> Batch:
        """The batch of an optimizer step.

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
        return self.view_of(batches[index], epoch % self.views)

    def view_of(self, sample_B: NDArray[np.int64], view: int) -> Batch:
        """One view of chosen samples."""
        character_B = self.samples.character_N[sample_B]
        template_B = template_picks(self.seed, sample_B, view)
        captions_B = [
            TEMPLATES[template].format(self.samples.names[character])
            for template, character in zip(template_B.tolist(), character_B.tolist(), strict=True)
        ]
        pixels_B3HH = draw_views(self.samples.masks_NSS[sample_B], self.seed, sample_B, view)
        return Batch(pixels_B3HH, captions_B, sample_B, character_B, template_B, view)


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
