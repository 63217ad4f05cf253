"""Compare clipkd's training step with a straightforward one: ViT-B/16 or ViT-L/14 teaches ViT-T/16 at 224 px, on a CPU.

    python benchmarks/train_step.py [--batch 16] [--rounds 7] [--teacher ViT-L-14]

The straightforward step follows the equations: the teacher in float32, all 77 tokens in every text tower, the same
losses, and torch's AdamW.  clipkd's step is that of its training loop (distill.py), measured three times: with the
teacher in float32, with the teacher in bfloat16, and with float32 features from a teacher cache (teacher_cache.py),
where the step includes reading them.  All sides use the same batches, interleaved step by step, and each has its own
student from the same initialisation.  Weights are random and images are noise; neither changes the cost of a step.

Caption lengths are those of CC3M and CC12M (Changpinyo et al., arXiv:2102.08981, table 1: 10.3 +- 4.5 and 20.2 +- 16.3
words), mixed as CLIP-KD trains on them (2.89 and 9.97 million captions).  They are log-normal with those moments, have
1.3 tokens a word and a start and an end token, and are cut at 77 tokens.  The last line of stdout is one JSON document;
the exit code is 5 if a claim does not hold.
"""

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from claims import claim, finish
from torch import Tensor

from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.losses import clip_loss, crd_loss, fd_loss, icl_loss
from toolchain.distillation.make_teacher_cache import write_shard
from toolchain.distillation.teacher import CachedTeacher, live_teacher
from toolchain.distillation.teacher_cache import TeacherCache, shard_path
from toolchain.distillation.training_log import StepClock, start_row
from toolchain.distillation.training_module import TrainingModule, make_optimizer
from toolchain.distributed import ALONE
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.text_trimming import trim_tokens
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.model import ModelSpec

MIN_SPEEDUP = 1.4  # float32, at equal loss values
MIN_SPEEDUP_BF16 = 2.0  # with the teacher in bfloat16
MIN_SPEEDUP_CACHED = {"ViT-B-16": 5.0, "ViT-L-14": 15.0}  # float32 features from a teacher cache, by teacher
MIN_COSINE = 0.9995  # between the bfloat16 teacher's features and those in float32, the worst sample
MAX_LOSS_DIFFERENCE = 1e-4  # relative; float32 sums differ with the order of their terms
CONTEXT, END = 77, 49407


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", choices=MIN_SPEEDUP_CACHED, default="ViT-B-16")
    arguments = parser.parse_args()
    spec = DistillSpec(steps=1000, batch_size=arguments.batch, lr=1e-3, warmup=100, weight_decay=0.1)
    teacher = build_model(ModelSpec(model=arguments.teacher), seed=1)
    student = build_model(ModelSpec(model="vit_t_16"), seed=0)
    batches = [make_batch(arguments.batch, seed) for seed in range(arguments.rounds + 1)]
    lengths = torch.cat([ids.argmax(-1) + 1 for _, ids in batches]).float()
    print(f"caption tokens: mean {lengths.mean():.1f}, median {lengths.median():.0f}, longest {lengths.max():.0f}")
    halved = live_teacher(copy.deepcopy(teacher), "bf16", ALONE.device)
    whole = live_teacher(copy.deepcopy(teacher), "fp32", ALONE.device)
    sides: dict[str, Callable[[int, Any], dict[str, float]]] = {
        "straightforward": straightforward(copy.deepcopy(teacher), copy.deepcopy(student), spec),
        "clipkd fp32": ours(copy.deepcopy(student), whole, spec),
        "clipkd, teacher in bf16": ours(copy.deepcopy(student), halved, spec),
    }
    folder = tempfile.TemporaryDirectory()
    cache = cache_features(whole, batches, Path(folder.name))
    sides["clipkd, cached teacher"] = ours(copy.deepcopy(student), CachedTeacher(whole.logit_scale), spec, cache)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    differences: dict[str, list[float]] = {"clipkd fp32": [], "clipkd, cached teacher": []}
    cosines = []
    for step, batch in enumerate(batches):
        losses = {}
        for name, side in sides.items():
            started = time.perf_counter()
            found = side(step, batch)
            if step:  # the first step is the warm-up
                taken[name].append(time.perf_counter() - started)
                parts[name].append(found)
            losses[name] = found.pop("loss")
        for name, found_here in differences.items():
            found_here.append(abs(losses[name] / losses["straightforward"] - 1))
        with torch.no_grad():
            ids = trim_tokens(teacher.net, batch[1])
            pairs = [(whole.image_features(batch[0]), halved.image_features(batch[0]))]
            pairs += [(whole.text_features(ids), halved.text_features(ids))]
            cosines += [(a * b).sum(-1).min().item() for a, b in pairs]
        print(f"step {step}: " + ", ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()), flush=True)
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    print_parts(medians, parts)
    ratio = statistics.median(a / b for a, b in zip(taken["straightforward"], taken["clipkd fp32"], strict=True))
    cached = zip(taken["straightforward"], taken["clipkd, cached teacher"], strict=True)
    cached_ratio = statistics.median(a / b for a, b in cached)
    bf16 = zip(taken["straightforward"], taken["clipkd, teacher in bf16"], strict=True)
    finish(
        "train_step",
        [
            claim("speed-up of a step in float32, median of paired ratios", ratio, "ratio", ">=", MIN_SPEEDUP),
            claim("largest difference of its loss", max(differences["clipkd fp32"]), "relative", "<=",
                  MAX_LOSS_DIFFERENCE),
            claim("speed-up with the teacher in bf16", statistics.median(a / b for a, b in bf16), "ratio", ">=",
                  MIN_SPEEDUP_BF16),
            claim("speed-up with a cached teacher", cached_ratio, "ratio", ">=", MIN_SPEEDUP_CACHED[arguments.teacher]),
            claim("largest difference of its loss, cached", max(differences["clipkd, cached teacher"]), "relative",
                  "<=", MAX_LOSS_DIFFERENCE),
            claim("bf16 teacher's features and float32's, worst", min(cosines), "cosine", ">=", MIN_COSINE),
        ],
        threads=torch.get_num_threads(),
        batch=arguments.batch,
        teacher=arguments.teacher,
        seconds={name: round(median, 3) for name, median in medians.items()},
    )  # fmt: skip


def make_batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return uint8 pixels [B, 3, 224, 224] and input_ids [B, 77]."""
    random = np.random.default_rng(seed)
    from_cc12m_B = random.random(size) < 9.97 / (2.89 + 9.97)
    mean_B, std_B = np.where(from_cc12m_B, 20.2, 10.3), np.where(from_cc12m_B, 16.3, 4.5)
    variance_B = np.log1p((std_B / mean_B) ** 2)
    words_B = random.lognormal(np.log(mean_B) - variance_B / 2, np.sqrt(variance_B))
    tokens_B = np.clip(np.round(1.3 * words_B).astype(int), 1, CONTEXT - 2)
    ids_BT = torch.zeros(size, CONTEXT, dtype=torch.int64)
    for row, count in enumerate(tokens_B.tolist()):
        ids_BT[row, 0], ids_BT[row, count + 1] = END - 1, END
        ids_BT[row, 1 : count + 1] = torch.from_numpy(random.integers(320, 40000, count))
    pixels = torch.from_numpy(random.integers(0, 256, (size, 3, 224, 224), np.uint8))
    return pixels, ids_BT


def straightforward(
    teacher: ClipModel, student: ClipModel, spec: DistillSpec, make_clock: Callable[[], Any] | None = None
) -> Callable[[int, Any], dict[str, float]]:
    """Return a step as the equations state it; the losses are the same functions as in clipkd's step.

    The step runs where the models are, and its batch must be there.  `make_clock` returns another clock than `Clock`.
    """
    weights = spec.loss_weights
    net: Any = student.net.train()
    guide: Any = teacher.net.eval().requires_grad_(False)
    device = net.logit_scale.device
    cross = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))
    widths = student.embed_dim, teacher.embed_dim
    torch.manual_seed(0)
    projections = torch.nn.ModuleList([torch.nn.Linear(*widths) for _ in range(2)] if widths[0] != widths[1] else [])
    projections.to(device)
    optimizer = torch.optim.AdamW(
        [*net.parameters(), *projections.parameters(), cross], lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )

    def step(index: int, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        pixels, ids_BT = batch
        clock = make_clock() if make_clock else Clock()
        pixel_values = student.normalise(pixels)
        with torch.no_grad():
            with clock("teacher image"):
                V = F.normalize(guide.encode_image(pixel_values), dim=-1)
            with clock("teacher text"):
                T = F.normalize(guide.encode_text(ids_BT), dim=-1)
        with clock("student image"):
            raw_u = net.encode_image(pixel_values)
            u = F.normalize(raw_u, dim=-1)
        with clock("student text"):
            raw_w = net.encode_text(ids_BT)
            w = F.normalize(raw_w, dim=-1)
        with clock("losses"):
            p, q = u, w
            if projections:
                p, q = (F.normalize(f(x), dim=-1) for f, x in zip(projections, (raw_u, raw_w), strict=True))
            s, r = net.logit_scale.exp(), guide.logit_scale.exp()
            loss = weights.task * clip_loss(u, w, s) + weights.crd * crd_loss(u, w, s, V, T, r)
            loss = loss + weights.fd * fd_loss(p, q, V, T) + weights.icl * icl_loss(p, q, V, T, cross.exp())
        with clock("backward"):
            optimizer.zero_grad()
            loss.backward()
        with clock("optimizer"):
            optimizer.step()
        return clock.parts | {"loss": loss.item()}

    return step


def cache_features(live: Any, batches: list[tuple[Tensor, Tensor]], folder: Path) -> TeacherCache:
    """Store the teacher's features of all batches as `clipkd cache` does: one sample a row, in order."""
    with torch.no_grad():
        images = torch.cat([live.image_features(pixels) for pixels, _ in batches])
        texts = torch.cat([live.text_features(trim_tokens(live.model.net, ids)) for _, ids in batches])
    count = len(images)
    write_shard(
        shard_path(folder, 0), images[None], texts, torch.ones(1, count, dtype=torch.bool), [[n] for n in range(count)],
        dtype="float32", damaged={},
    )  # fmt: skip
    about = {"shard_samples": count, "embed_dim": live.model.embed_dim, "logit_scale": live.logit_scale.item()}
    return TeacherCache(folder, about)


def ours(
    student: ClipModel, guide: Any, spec: DistillSpec, cache: TeacherCache | None = None
) -> Callable[[int, Any], dict[str, float]]:
    """Return the step of clipkd's training loop, with a clock around each part."""
    torch.manual_seed(0)
    trained = TrainingModule(student, cache or guide.model, spec, ALONE)
    optimizer = make_optimizer(trained, spec)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    trained.train()
    weights = spec.loss_weights.model_dump()
    forward, failed = Forward(trained, trained, spec, ALONE, 0), torch.zeros((), dtype=torch.bool)

    def step(index: int, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        pixels, ids_BT = batch
        clock = Clock()
        ids_BL = trim_tokens(student.net, ids_BT)
        with clock("teacher"):
            sample_B = np.arange(index * len(pixels), (index + 1) * len(pixels))
            features = cache.features(sample_B, np.zeros_like(sample_B), 0) if cache else None
            prepared = PreparedBatch(pixels, ids_BL, pixels, ids_BL, [], sample_B, 0, teacher_features=features)
            teacher_features = guide.features(prepared)
        with clock("student and losses"):
            done = forward.run(prepared, teacher_features, index)
        with clock("backward"):
            optimizer.zero_grad(set_to_none=True)
            forward.backward(done, prepared, index)
        with clock("gradient norm and log"):
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained.parameters() if p.grad is not None])
            row, _ = start_row(
                index, 1e-5, norm, done, weights, failed, StepClock(torch.device("cpu"), len(pixels))
            ).read()
        with clock("optimizer"):
            optimizer.step()
            trained.clamp_parameters_()
        return clock.parts | {"loss": row["loss"]}

    return step


class Clock:
    """Record the seconds that each part takes."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Any:
        started = time.perf_counter()
        yield
        self.parts[part] = time.perf_counter() - started


def print_parts(medians: dict[str, float], parts: dict[str, list[dict[str, float]]]) -> None:
    print("\n| side | part | s | share |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | whole step | {median:.3f} | 100 % |")
        for part in parts[name][0]:
            seconds = statistics.median(found[part] for found in parts[name])
            print(f"| | {part} | {seconds:.3f} | {100 * seconds / median:.1f} % |")


if __name__ == "__main__":
    main()
