"""Batches: no character twice, every sample at most once an epoch, and each a pure function of (seed, step)."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import NUM_CHARACTERS

from toolchain.data.batch import Batch, Geometry
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TEMPLATES, TrainingSet

# Lopsided samples have several faces of half the characters only, and no more of those fit into one batch.
KINDS_AND_SIZES = [("even", 2), ("even", 5), ("even", 8), ("even", 11), ("lopsided", 2), ("lopsided", 5)]
EPOCHS = 4
OWN, LARGER = Geometry(32, "bicubic"), Geometry(64, "bicubic")


def lopsided(samples: TrainingSet) -> TrainingSet:
    """Seven faces of some characters, one of others: as fonts really are."""
    rank_N = np.array(
        [np.sum(samples.character_N[:n] == samples.character_N[n]) for n in range(len(samples.masks_NSS))]
    )
    kept_N = rank_N < 1 + (samples.character_N * 7) % 7
    kept_N |= samples.character_N < NUM_CHARACTERS // 2
    return TrainingSet(samples.masks_NSS[kept_N], samples.character_N[kept_N], samples.names)


def batches(samples: TrainingSet, batch_size: int = 8, seed: int = 0, views: int = 3) -> GlyphBatches:
    return GlyphBatches(samples, seed, batch_size, views)


def same(first: Batch, second: Batch) -> bool:
    pixels = first.pixels.keys() == second.pixels.keys() and all(
        torch.equal(values, second.pixels[geometry]) for geometry, values in first.pixels.items()
    )
    texts = first.captions_B == second.captions_B and first.view == second.view
    return pixels and texts and np.array_equal(first.sample_B, second.sample_B)


def whole(data: GlyphBatches, step: int) -> Batch:
    return data.batch(step, slice(None), [OWN])


def characters(samples: TrainingSet, batch: Batch) -> list[int]:
    found: list[int] = samples.character_N[batch.sample_B].tolist()
    return found


def test_the_samples_are_what_the_tests_take_them_for(tiny_samples: TrainingSet) -> None:
    assert len(tiny_samples.names) == NUM_CHARACTERS
    assert len(tiny_samples.masks_NSS) > 5 * NUM_CHARACTERS
    assert tiny_samples.names[0] == "latin small letter a"


@pytest.mark.parametrize(("kind", "batch_size"), KINDS_AND_SIZES)
def test_no_batch_holds_a_character_twice_and_no_epoch_a_sample_twice(
    tiny_samples: TrainingSet, kind: str, batch_size: int
) -> None:
    samples = tiny_samples if kind == "even" else lopsided(tiny_samples)
    data = batches(samples, batch_size)
    for epoch in range(EPOCHS):
        seen: list[int] = []
        for index in range(data.steps_per_epoch):
            batch = whole(data, epoch * data.steps_per_epoch + index)
            assert len(batch.sample_B) == len(set(characters(samples, batch))) == batch_size
            seen += batch.sample_B.tolist()
        assert len(seen) == len(set(seen))


def test_an_epoch_shows_nearly_everything(tiny_samples: TrainingSet) -> None:
    data = batches(tiny_samples)
    assert data.steps_per_epoch == len(tiny_samples.masks_NSS) // 8 - 1
    seen = {
        sample
        for epoch in range(EPOCHS)
        for step in range(data.steps_per_epoch)
        for sample in whole(data, epoch * data.steps_per_epoch + step).sample_B.tolist()
    }
    assert seen == set(range(len(tiny_samples.masks_NSS))), "what one epoch leaves out another shows"


def test_a_batch_does_not_depend_on_those_before(tiny_samples: TrainingSet) -> None:
    in_order = [whole(batches(tiny_samples), step) for step in range(25)]
    torch.manual_seed(3)
    np.random.seed(3)  # no global generator may matter
    fresh = batches(dataclasses.replace(tiny_samples))
    for step in (24, 3, 11, 0, 24):
        assert same(whole(fresh, step), in_order[step])


def test_order_depends_on_seed_and_epoch(tiny_samples: TrainingSet) -> None:
    data = batches(tiny_samples)
    other = batches(tiny_samples, seed=1)
    first, next_epoch = whole(data, 0), whole(data, data.steps_per_epoch)
    assert first.sample_B.tolist() != next_epoch.sample_B.tolist()
    assert first.sample_B.tolist() != whole(other, 0).sample_B.tolist()
    assert not torch.equal(
        data.read_view(first.sample_B, 0, [OWN]).pixels[OWN], other.read_view(first.sample_B, 0, [OWN]).pixels[OWN]
    )


@pytest.mark.parametrize("views", [1, 2, 3])
def test_epoch_e_shows_view_e_mod_views(tiny_samples: TrainingSet, views: int) -> None:
    data = batches(tiny_samples, views=views)
    for epoch in range(2 * views + 1):
        batch = whole(data, epoch * data.steps_per_epoch + 2)
        assert batch.view == epoch % views
        assert same(batch, data.read_view(batch.sample_B, epoch % views, [OWN])), "the same view, live and looked up"


def test_a_pair_belongs_together(tiny_samples: TrainingSet) -> None:
    batch = whole(batches(tiny_samples), 4)
    assert batch.pixels[OWN].shape == (8, 3, 32, 32)
    assert batch.pixels[OWN].dtype == torch.uint8
    for caption, character in zip(batch.captions_B, characters(tiny_samples, batch), strict=True):
        assert caption in [template.format(tiny_samples.names[character]) for template in TEMPLATES]


def test_rows_are_a_part_of_the_batch(tiny_samples: TrainingSet) -> None:
    data = batches(tiny_samples)
    everything = whole(data, 3)
    for rows in (slice(0, 4), slice(4, 8), slice(2, 3)):
        part = data.batch(3, rows, [OWN])
        assert torch.equal(part.pixels[OWN], everything.pixels[OWN][rows])
        assert part.captions_B == everything.captions_B[rows]
        assert np.array_equal(part.sample_B, everything.sample_B[rows])


def test_every_geometry_shows_the_same_view(tiny_samples: TrainingSet) -> None:
    batch = batches(tiny_samples).batch(1, slice(None), [OWN, LARGER])
    assert batch.pixels[LARGER].shape == (8, 3, 64, 64)
    assert torch.equal(batch.pixels[OWN], whole(batches(tiny_samples), 1).pixels[OWN])
    halved_B3HH = torch.nn.functional.avg_pool2d(batch.pixels[LARGER].float(), 2)
    error = (halved_B3HH - batch.pixels[OWN].float()).abs().mean().item()
    other = (halved_B3HH - batch.pixels[OWN].float().roll(1, 0)).abs().mean().item()
    assert error < other / 5, "the same characters at twice the size"


def test_a_batch_says_which_of_its_captions_each_sample_shows(tiny_samples: TrainingSet) -> None:
    data = GlyphBatches(tiny_samples, 0, 8, 2)
    batch = data.batch(1, slice(None), [])
    captions_B = data.list_captions(batch.sample_B)
    assert [captions[pick] for captions, pick in zip(captions_B, batch.pick_B, strict=True)] == batch.captions_B
    assert [len(captions) for captions in captions_B] == [data.views] * 8
