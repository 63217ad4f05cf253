"""Make a teacher cache: run a frozen teacher once over every stored view and caption, and measure the fidelity.

A shard is a function of the teacher, the data and its number, so any rank can make any shard.  A rank that is killed
leaves only complete shards, which the next attempt keeps.

Images are read in chunks of `CHUNK` samples, in this process or by workers.  Each worker holds at most two chunks in
shared memory and three more while it makes one: 39 MB each for images of 224 px.
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain.data.bad_samples import Damage, LeftOut
from toolchain.data.batch import Geometry, TrainingData
from toolchain.distillation.loader_workers import Made, Workers
from toolchain.distillation.teacher import LiveTeacher
from toolchain.distillation.teacher_cache import ABOUT, STORED, TeacherCache, encode_features, shard_path
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError
from toolchain.filesystem import replacing
from toolchain.progress import Progress
from toolchain.recipe.section import StoredDtype

SHARD_SAMPLES = 4096
CHUNK = 256
"""Samples or captions per forward pass."""

_PIXELS = "pixels"  # the name of a chunk's array
_STRETCHES, _STRETCH_SAMPLES = 8, 128  # stretches of samples whose captions represent all captions
_CHECKED_SAMPLES = 256
_CHECKED_STRETCH = 16  # neighbours: of remote shards, 16 are then read and not 256
_CHECKED_TOGETHER = 64  # candidates per image in the top-1 check of the fidelity


@dataclass(frozen=True)
class CachePlan:
    """The teacher features to store, and their format."""

    depends: Mapping[str, Any]
    """Everything that determines the features' bytes; stored in cache.json."""

    dtype: StoredDtype
    num_views: int
    steps: int
    """Training steps that will read the cache, for the message about the saving."""

    workers: int = 0
    """Processes that read the images; the result does not depend on their number."""


def break_even(data: TrainingData, num_views: int, steps: int) -> str:
    """Return a message on the teacher passes over an image and its caption, live and cached."""
    samples = data.num_samples
    epochs = steps / data.steps_per_epoch
    saved, spent = round(epochs * samples), num_views * samples
    verdict = f"{saved / spent:.1f} times fewer" if saved > spent else "no saving; lower data.views or train uncached"
    return f"teacher passes: {saved:,} live ({epochs:.1f} epochs), {spent:,} cached ({num_views} views): {verdict}"


def needed_bytes(data: TrainingData, num_views: int, embed_dim: int, dtype: StoredDtype) -> int:
    """Return an upper bound, estimated on short stretches of samples: whole shards repeat more captions."""
    stretch = min(_STRETCH_SAMPLES, SHARD_SAMPLES, data.num_samples)
    samples, num_captions, distinct = 0, 0, 0
    for start in np.unique(np.linspace(0, data.num_samples - stretch, _STRETCHES).astype(np.int64)).tolist():
        captions_N = data.list_captions(np.arange(start, start + stretch))
        samples, num_captions = samples + stretch, num_captions + sum(map(len, captions_N))
        distinct += len({caption for captions in captions_N for caption in captions})
    return cache_bytes(
        data.num_samples, num_views, embed_dim, dtype, captions=num_captions / samples, distinct=distinct / samples
    )


def cache_bytes(
    num_samples: int,
    num_views: int,
    embed_dim: int,
    dtype: StoredDtype,
    *,
    captions: float = 1.0,
    distinct: float = 1.0,
) -> int:
    """Return the bytes of a cache, given the captions of a sample and how many of them no other sample has."""
    row = embed_dim * STORED[dtype].itemsize + (4 if dtype == "int8" else 0)
    return round(num_samples * (num_views * (row + 1) + distinct * row + captions * 4 + 8))


def make_cache(
    live: LiveTeacher,
    data: TrainingData,
    folder: Path,
    plan: CachePlan,
    progress: Progress,
    *,
    processes: Processes = ALONE,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write every missing shard; return what the manifest records.

    Raises:
        ClipkdError: the disk has too little free space, the teacher's features are not finite, or no sample of those
            that are checked can be read.
    """
    embed_dim = live.model.embed_dim
    about = {**plan.depends, "embed_dim": embed_dim, "logit_scale": live.logit_scale.item()}
    about |= {} if live.logit_bias is None else {"logit_bias": live.logit_bias.item()}
    numbers = range(-(-data.num_samples // SHARD_SAMPLES))
    todo = [number for number in numbers[processes.rank :: processes.size] if not shard_path(folder, number).exists()]
    processes.wait()  # until every rank has listed its missing shards
    if processes.leads:
        bytes_needed = needed_bytes(data, plan.num_views, embed_dim, plan.dtype)
        say(break_even(data, plan.num_views, plan.steps))
        _refuse_small_disk(folder, bytes_needed, say)
        _write(folder / ABOUT, json.dumps(about, indent=1, sort_keys=True) + "\n")
    sizes = [min(SHARD_SAMPLES, data.num_samples - number * SHARD_SAMPLES) for number in todo]  # the last is smaller
    counter = _Counter(progress, sum(sizes) * plan.num_views, processes)
    with _read_chunks(data, live.model.geometry, todo, plan) as chunks:
        for number in todo:
            _write_shard(live, data, folder, number, plan, counter, chunks)
    processes.wait()
    if not processes.leads:
        return {}
    cache = TeacherCache(folder, about)
    damaged = _count_damaged(folder, numbers, data.left_out)
    fidelity = measure_fidelity(live, data, cache)
    _require_fidelity(fidelity, folder)
    say(
        f"teacher cache in {plan.dtype}: worst cosine to live features: image {fidelity['image_cosine_worst']:.6f}, "
        f"text {fidelity['text_cosine_worst']:.6f}; same top-1 caption for "
        f"{100 * fidelity['top1_agreement']:.1f} % of {fidelity['samples']} images"
    )
    size_bytes = sum(shard_path(folder, number).stat().st_size for number in numbers)
    return {"samples": data.num_samples, "damaged": damaged, "bytes": size_bytes, "fidelity": fidelity}


@dataclass
class _Counter:
    """Progress and rate over all ranks, estimated from this rank: the ranks share the work evenly."""

    progress: Progress
    total: int
    processes: Processes
    done: int = 0
    started: float = 0.0

    def add(self, images: int) -> None:
        self.started = self.started or time.monotonic()
        self.done += images
        if self.processes.leads:
            rate = self.done * self.processes.size / max(1e-3, time.monotonic() - self.started)
            note = f"{rate:.0f} images/s"
            self.progress("teacher features", min(self.done, self.total), self.total, note)


def _refuse_small_disk(folder: Path, bytes_needed: int, say: Callable[[str], None]) -> None:
    present = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    say(f"teacher cache: needs at most {_size(bytes_needed)} of disk; {_size(free)} free")
    if bytes_needed - present > free:
        raise ClipkdError(
            f"{folder.parent}: the teacher cache needs {_size(bytes_needed - present)} more, and the disk has "
            f"{_size(free)} free. Free some space, choose a smaller distill.teacher_cache.dtype, or lower data.views"
        )


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


class _Chunk(NamedTuple):
    """Samples that pass the teacher together, in one view."""

    sample_B: NDArray[np.int64]
    view: int


class _ChunkLabels(NamedTuple):
    sample_B: NDArray[np.int64]
    """The samples without the corrupt ones."""

    damaged: tuple[Damage, ...]


def _list_samples(data: TrainingData, number: int) -> NDArray[np.int64]:
    """Return [N] the samples of a shard."""
    return np.arange(number * SHARD_SAMPLES, min((number + 1) * SHARD_SAMPLES, data.num_samples))


def _list_chunks(sample_N: NDArray[np.int64], num_views: int) -> list[_Chunk]:
    """Return the chunks of a shard in the order in which they are read."""
    firsts = range(0, len(sample_N), CHUNK)
    return [_Chunk(sample_N[first : first + CHUNK], view) for view in range(num_views) for first in firsts]


def _read_chunk(data: TrainingData, geometry: Geometry, chunk: _Chunk) -> Made[_ChunkLabels]:
    batch = data.read_view(chunk.sample_B, chunk.view, [geometry])
    return {_PIXELS: batch.pixels[geometry]}, _ChunkLabels(batch.sample_B, batch.damaged)


@contextmanager
def _read_chunks(
    data: TrainingData, geometry: Geometry, shards: Sequence[int], plan: CachePlan
) -> Iterator[Iterator[Made[_ChunkLabels]]]:
    """Yield the chunks of all shards in order; without workers, each is read when it is requested."""
    read = partial(_read_chunk, data, geometry)
    chunks = (chunk for number in shards for chunk in _list_chunks(_list_samples(data, number), plan.num_views))
    if not plan.workers or not shards:
        yield map(read, chunks)
        return
    workers = Workers(read, plan.workers, 3 * geometry.size**2 * min(CHUNK, data.num_samples))
    try:
        yield workers.make(chunks)
    finally:
        workers.end()


@torch.inference_mode()
def _write_shard(
    live: LiveTeacher,
    data: TrainingData,
    folder: Path,
    number: int,
    plan: CachePlan,
    counter: _Counter,
    chunks: Iterator[Made[_ChunkLabels]],
) -> None:
    """Run the teacher over one shard's samples; `chunks` yields those of this shard next."""
    device, sample_N = live.logit_scale.device, _list_samples(data, number)
    image_VNE = torch.zeros(plan.num_views, len(sample_N), live.model.embed_dim)
    present_VN = torch.zeros(plan.num_views, len(sample_N), dtype=torch.bool)
    damaged: dict[int, str] = {}
    for chunk in _list_chunks(sample_N, plan.num_views):
        arrays, labels = next(chunks)
        damaged |= {damage.sample: damage.reason for damage in labels.damaged}
        row_B = torch.from_numpy(labels.sample_B - sample_N[0])
        if len(row_B):
            image_BE = live.image_features(arrays[_PIXELS].to(device)).cpu()
            inputs = [f"sample {sample}, view {chunk.view}" for sample in labels.sample_B.tolist()]
            _require_finite(live, "image", image_BE, inputs)
            image_VNE[chunk.view, row_B] = image_BE
            present_VN[chunk.view, row_B] = True
        counter.add(len(chunk.sample_B))
    captions_N = data.list_captions(sample_N)
    text_of = {caption: row for row, caption in enumerate(sorted({c for cs in captions_N for c in cs}, key=_short))}
    text_CE = torch.zeros(len(text_of), live.model.embed_dim)
    texts = list(text_of)  # sorted by length: batches of short captions need few tokens
    for first in range(0, len(texts), CHUNK):
        few = texts[first : first + CHUNK]
        text_BE = live.text_features(live.model.tokenize_trimmed(few).to(device)).cpu()
        _require_finite(live, "text", text_BE, [f"caption {text!r}" for text in few])
        text_CE[first : first + CHUNK] = text_BE
    texts_N = [[text_of[caption] for caption in captions] for captions in captions_N]
    write_shard(shard_path(folder, number), image_VNE, text_CE, present_VN, texts_N, dtype=plan.dtype, damaged=damaged)


def _require_finite(live: LiveTeacher, part: str, features_BE: Tensor, inputs: Sequence[str]) -> None:
    """Check features before they are stored; `inputs` names what each row was computed from."""
    wrong_B = ~features_BE.isfinite().all(-1)
    if wrong_B.any():
        raise ClipkdError(
            f"teacher {live.model.name}: its {part} features of {int(wrong_B.sum())} of {len(inputs)} inputs are not "
            f"finite, the first: {inputs[int(torch.nonzero(wrong_B)[0])]}. {live.non_finite_advice}"
        )


def write_shard(
    path: Path,
    image_VNE: Tensor,
    text_CE: Tensor,
    present_VN: Tensor,
    texts_N: list[list[int]],
    *,
    dtype: StoredDtype,
    damaged: Mapping[int, str],
) -> None:
    """Write a shard's file atomically; `texts_N` has the caption rows of each sample."""
    arrays = {
        **encode_features("image", image_VNE, dtype),
        **encode_features("text", text_CE, dtype),
        "present": present_VN,
        "text_of_caption": torch.tensor([text for texts in texts_N for text in texts], dtype=torch.int32),
        "first_caption": torch.tensor(np.cumsum([0, *map(len, texts_N)]), dtype=torch.int64),
    }
    with replacing(path) as partial:
        save_file(arrays, partial, {"damaged": json.dumps(sorted(damaged.items()))})


def _short(caption: str) -> tuple[int, str]:
    return len(caption), caption


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _count_damaged(folder: Path, numbers: range, left_out: Sequence[LeftOut]) -> dict[str, int]:
    """Return the number of samples without features by reason, including those skipped while listing the data."""
    reasons: Counter[str] = Counter()
    for number in numbers:
        with safe_open(shard_path(folder, number), "pt") as file:
            reasons.update(dict(json.loads(file.metadata()["damaged"])).values())
    for left in left_out:
        if left.is_sample:
            reasons[left.reason] += left.number
    return dict(sorted(reasons.items()))


# Fidelity -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_fidelity(live: LiveTeacher, data: TrainingData, cache: TeacherCache) -> dict[str, float]:
    """Return cosines of stored to live features, and how often both find the same caption for an image.

    Stretches of the samples are spread evenly over the data.  Their batches differ from those that made the cache, and
    each batch has another view.
    """
    agreed, total = 0, 0
    cosines: dict[str, list[Tensor]] = {"image": [], "text": []}
    for live_BE, stored_BE in _live_and_stored(live, data, cache):
        for part, computed, stored in zip(cosines, live_BE, stored_BE, strict=True):
            cosines[part].append(nn.functional.cosine_similarity(computed.double(), stored.double(), dim=-1))
        matches = [(image_BE @ text_BE.T).argmax(-1) for image_BE, text_BE in (live_BE, stored_BE)]
        agreed, total = agreed + int((matches[0] == matches[1]).sum()), total + len(matches[0])
    found: dict[str, float] = {"samples": total, "top1_agreement": agreed / total if total else float("nan")}
    for part, values in cosines.items():
        together = torch.cat(values) if values else torch.tensor([float("nan")])
        found |= {f"{part}_cosine_worst": together.min().item(), f"{part}_cosine_mean": together.mean().item()}
    return found


def _require_fidelity(fidelity: Mapping[str, float], folder: Path) -> None:
    if not fidelity["samples"]:
        raise ClipkdError(
            f"{folder}: none of the samples that are checked can be read, so the cache is useless. Fix the data"
        )
    wrong = [name for name, value in fidelity.items() if not math.isfinite(value)]
    if wrong:
        raise ClipkdError(
            f"{folder}: the fidelity of the teacher cache is not finite: {', '.join(wrong)}. It contains features that "
            "are NaN or infinite. Delete it and run the command again"
        )


def _live_and_stored(
    live: LiveTeacher, data: TrainingData, cache: TeacherCache
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    device, geometry = live.logit_scale.device, live.model.geometry
    last = max(0, data.num_samples - _CHECKED_STRETCH)
    first_S = np.linspace(0, last, _CHECKED_SAMPLES // _CHECKED_STRETCH).astype(np.int64)
    sample_N = np.unique(first_S[:, None] + np.arange(min(_CHECKED_STRETCH, data.num_samples)))
    for batch_number, first in enumerate(range(0, len(sample_N), _CHECKED_TOGETHER)):
        view = batch_number % int(cache.about["views"])
        batch = data.read_view(sample_N[first : first + _CHECKED_TOGETHER], view, [geometry])
        if len(batch.sample_B):
            image_BE = live.image_features(batch.pixels[geometry].to(device)).cpu()
            text_BE = live.text_features(live.model.tokenize_trimmed(batch.captions_B).to(device)).cpu()
            yield (image_BE, text_BE), cache.features(batch.sample_B, batch.pick_B, view)
