"""Short trainings in processes of their own, for benchmarks/gpu_correctness.py to kill and to continue.

They are forked by a server that has imported torch and has not used the GPU.
"""

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation.distill import Training, distill
from toolchain.distillation.training_options import TrainingOptions
from toolchain.distributed import Processes
from toolchain.models.build import load_model, save_model
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.model_names import WEIGHTS

RECIPES = Path(__file__).parents[1] / "recipes"
STEPS, HELD_AT, BATCH = 16, 12, 64
START, SAID = "start", "said.txt"
TIMEOUT_S = 120.0  # for one step, with what comes before the first


@dataclass(frozen=True)
class Running:
    """A training at work."""

    process: Any
    connection: Connection

    def hear(self) -> int | None:
        """Return the next step that it finished; None at its end."""
        try:
            return int(self.connection.recv()) if self.connection.poll(TIMEOUT_S) else None
        except EOFError:
            return None


def start(folder: Path, mode: str, device_type: str, held_at: int | None = None) -> Running:
    """Start a training, or continue the one that `folder` has a checkpoint of; it waits at step `held_at`, if given."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_resume"])
    process = context.Process(target=train, args=(folder, mode, device_type, theirs, held_at))
    process.start()
    theirs.close()
    return Running(process, ours)


def train(folder: Path, mode: str, device_type: str, connection: Connection, held_at: int | None = None) -> None:
    """Train the glyphs student with its teacher, with a checkpoint after each step; send each finished step."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic algorithms need it, before cuBLAS starts
    with (folder / SAID).open("a") as said:
        os.dup2(said.fileno(), 2)
    torch.use_deterministic_algorithms(mode == "deterministic")
    student = load_model(RECIPES / "glyphs_tiny", random_seed=0)
    if not (folder / START).exists():
        (folder / START).mkdir()
        save_model(student, folder / START)
    teacher = load_model(RECIPES / "glyphs_teacher")
    data = GlyphBatches(make_samples(), 0, BATCH, 2)
    spec = DistillSpec(steps=STEPS, batch_size=BATCH, lr=1e-3, warmup=3, grad_clip_norm=1.0)

    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if what == "training":
            connection.send(done)
            if done == held_at:
                time.sleep(TIMEOUT_S)  # to be killed before the checkpoint of this step

    distill(
        Training(spec, student, teacher, data),
        folder,
        progress,
        options=TrainingOptions(checkpoint_steps=1),
        processes=Processes(0, 1, torch.device(device_type)),
    )


def make_samples() -> TrainingSet:
    """Return samples of noise: drawing the glyphs would take longer than the training."""
    masks_NSS = np.random.default_rng(5).integers(0, 256, (2 * BATCH, 64, 64), np.uint8)
    names = [f"character {number}" for number in range(2 * BATCH)]
    return TrainingSet(masks_NSS, np.arange(2 * BATCH), names)


def read_weights(folder: Path) -> Tensor:
    """Return all weights of a model as one vector, in float64."""
    state = load_file(folder / WEIGHTS)
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])
