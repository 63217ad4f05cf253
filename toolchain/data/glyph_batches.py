"""Make batches of glyphs by step; no batch contains a character twice."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torchvision.transforms.functional as tvf
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from toolchain.data.batch import Batch, Geometry
from toolchain.data.glyph_views import draw_views, template_picks
from toolchain.data.glyphs import TEMPLATES, TrainingSet, clean_images
from toolchain.errors import UsageError


@dataclass(frozen=True)
class GlyphBatches:
    """Batches of glyphs by step; no batch contains a character twice, so all off-diagonal pairs are true negatives."""

    samples: TrainingSet
    seed: int
    batch_size: int
    views: int
    """Number of augmentations per sample; epoch e shows view e mod `views`."""

    left_out = ()

    @property
    def num_samples(self) -> int:
        return len(self.samples.character_N)

    @property
    def num_views(self) -> int:
        return self.views

    @property
    def steps_per_epoch(self) -> int:
        """One batch fewer than fit, which leaves room for characters that still collide at an epoch's end."""
        return max(1, self.num_samples // self.batch_size - 1)

    def batch(self, step: int, rows: slice, geometries: Sequence[Geometry]) -> Batch:
        """Return rows of an optimizer step's batch.

        Raises:
            UsageError: the batch is too large for the number of distinct characters.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        batches = _epoch_batches(self, epoch)
        if index >= len(batches):
            raise UsageError(
                f"batch_size {self.batch_size}: a batch may not contain a character twice, and "
                f"{len(self.samples.names)} characters make only {len(batches)} such batches; lower "
                "distill.batch_size"
            )
        return self.read_view(batches[index][rows], epoch % self.views, geometries)

    def read_view(self, sample_B: NDArray[np.int64], view: int, geometries: Sequence[Geometry]) -> Batch:
        """Return one view of chosen samples."""
        names_B = [self.samples.names[character] for character in self.samples.character_N[sample_B].tolist()]
        template_B = template_picks(self.seed, sample_B, view)
        captions_B = [TEMPLATES[t].format(name) for t, name in zip(template_B.tolist(), names_B, strict=True)]
        drawn_B3HH = draw_views(self.samples.masks_NSS[sample_B], self.seed, sample_B, view)
        pixels = {geometry: _resize(drawn_B3HH, geometry) for geometry in geometries}
        return Batch(pixels, captions_B, sample_B, np.full(len(sample_B), view % self.views), view)

    def list_captions(self, sample_B: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return [B] the captions of each sample, one per view."""
        names_B = [self.samples.names[character] for character in self.samples.character_N[sample_B].tolist()]
        template_BV = np.stack([template_picks(self.seed, sample_B, view) for view in range(self.views)], 1).tolist()
        return [
            tuple(TEMPLATES[t].format(name) for t in template_V)
            for template_V, name in zip(template_BV, names_B, strict=True)
        ]

    def read_unaugmented(self, sample_B: NDArray[np.int64], geometry: Geometry) -> Tensor:
        """Return uint8 [B, 3, H, H] chosen samples, black on white."""
        clean_BHH3 = torch.from_numpy(clean_images(self.samples.masks_NSS[sample_B]))
        return _resize(clean_BHH3.movedim(-1, 1).contiguous(), geometry)


def _resize(pixels_B3HH: Tensor, geometry: Geometry) -> Tensor:
    size = (geometry.size, geometry.size)
    if pixels_B3HH.shape[-2:] == size:
        return pixels_B3HH
    mode = InterpolationMode(geometry.interpolation)
    resized: Tensor = tvf.resize(pixels_B3HH, list(size), mode, antialias=True)
    return resized


@lru_cache(maxsize=2)
def _epoch_batches(data: GlyphBatches, epoch: int) -> NDArray[np.int64]:
    """Return [steps, B] sample indices of one epoch: every sample at most once, no character twice in a batch.

    The faces of a character are spread evenly over the epoch; the few that still collide are moved to a later batch.
    """
    character_N = data.samples.character_N
    random = np.random.default_rng([data.seed, epoch])
    num_samples = len(character_N)
    shuffled_N = random.permutation(num_samples)
    shuffled_N = shuffled_N[
        np.argsort(character_N[shuffled_N], kind="stable")
    ]  # sorted by character, with the faces of each in random order
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
            break  # only repeated characters remain
        batches.append(list(chosen.values()))
    return np.array(batches, np.int64).reshape(-1, data.batch_size)
