"""Step 2 of benchmarks/gpu.py: the GPU computes what the CPU does, and what CLIP-KD's released code did.

- the golden values of every objective in float64, by the definitions (losses.py) and in blocks (objectives.py);
- the loss and the gradients of a small student, all objectives on, against a CPU in float32; also in parts;
- batches from loader processes, through pinned memory, bit for bit;
- a training that is killed (kill -9) and continued, against one that was not: bit for bit with deterministic
  algorithms, and within a bound without;
- the tests marked `gpu`, if pytest is installed.
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_results import Step
from gpu_resume import HELD_AT, SAID, START, STEPS, Running, make_samples, read_weights, start
from torch import Tensor

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.distillation.features import TeacherFeatures
from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.loader import PreparedBatch, load_batches
from toolchain.distillation.objectives import OBJECTIVES
from toolchain.distillation.training_module import TrainingModule
from toolchain.distributed import Processes
from toolchain.errors import one_line
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.recipe.distill import DistillSpec, LossWeights
from toolchain.recipe.model import ModelSpec

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
sys.path.append(str(TESTS))  # golden values, small models

BATCH, TEACHER_WIDTH = 16, 48
MAX_GRADIENT_ERROR = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Relative error of all gradients as one vector: float32 sums differ by their order, 2e-6 on a CPU; bf16 has 8 bits of
mantissa and fp16 11, whose errors through two blocks and back add up to about 10 roundings."""

MAX_LOSS_ERROR = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
MAX_WEIGHT_DIFFERENCE = 0.05
"""Relative to the change of the weights, between two runs whose sums differ in order: AdamW divides by the gradient's
size, so a rounding decides the direction of a weight whose gradient is near 0."""


def main(step: Step) -> None:
    device = torch.device(step.device_type)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    training = start_trainings(step)
    with step.guard_case("golden values"):
        check_golden_values(step, device)
    with step.guard_case("gradients"):
        check_gradients(step, device)
    with step.guard_case("batches"):
        check_batches(step, device)
    with step.guard_case("resume"):
        finish_trainings(step, training)
    run_gpu_tests(step)


def verdict(step: Step, what: str, error: float, bound: float, unit: str = "relative") -> None:
    """Record an error with its bound; NaN does not hold."""
    step.record("checks", what=what, error=error, unit=unit, bound=bound, holds=bool(error <= bound))


# Golden values --------------------------------------------------------------------------------------------------------


def check_golden_values(step: Step, device: torch.device) -> None:
    """Compare every objective and its gradients with CLIP-KD's code, in float64, on the device."""
    from golden import CASES, INTENDED_SCALE, RAW_SCALE, Golden
    from test_losses import golden_losses
    from test_objectives import golden_terms

    for case in CASES:
        for intended in (False, True):
            golden = Golden(case, device)
            scale: Any = INTENDED_SCALE
            if not intended:
                scale = torch.tensor(RAW_SCALE, dtype=torch.float64, device=device, requires_grad=True)
            losses = golden_losses(golden, scale, intended=intended)
            names = [name for name in losses if not intended or f"intended.{name}" in golden.values]
            found = []
            for name in names:
                leaves = dict(golden.leaves)
                if not intended:
                    leaves["fusion_logit_scale" if name == "afd" else "cross_logit_scale"] = scale
                found.append(differs(golden, name, losses[name], leaves, intended))
            golden = Golden(case, device)
            terms, leaves = golden_terms(golden, names, reference_compat=not intended)
            found += [differs(golden, name, terms[name], leaves, intended) for name in names]
            wrong = [problem for problem in found if problem]
            step.record(
                "golden values", widths=case, form="as intended" if intended else "as released",
                objectives=" ".join(names), compared=len(found), wrong=len(wrong), holds=not wrong,
                why="; ".join(wrong)[:500],
            )  # fmt: skip


def differs(golden: Any, name: str, loss: Tensor, leaves: dict[str, Tensor], intended: bool) -> str:
    """Return how a loss or its gradients differ from the golden values; empty if they do not."""
    try:
        golden.check(name, loss, leaves, intended=intended)
    except AssertionError as error:
        return f"{name}: {one_line(error)}"
    return ""


# Gradients ------------------------------------------------------------------------------------------------------------


def check_gradients(step: Step, device: torch.device) -> None:
    """Compare the loss and all gradients of a step with those of a CPU in float32."""
    expected_loss, expected = differentiate(torch.device("cpu"), "fp32", 1)
    for precision, bound in MAX_GRADIENT_ERROR.items():
        loss, found = differentiate(device, precision, 1)
        verdict(step, f"loss, {precision}", abs(loss / expected_loss - 1), MAX_LOSS_ERROR[precision])
        verdict(step, f"gradients, {precision}", relative_error(found, expected), bound)
    loss, found = differentiate(device, "fp32", 4)
    verdict(step, "gradients, fp32, in 4 parts", relative_error(found, expected), MAX_GRADIENT_ERROR["fp32"])
    _, expected = differentiate(torch.device("cpu"), "fp32", 1, bias=-10.0)
    _, found = differentiate(device, "fp32", 1, bias=-10.0)
    verdict(step, "gradients, fp32, sigmoid models", relative_error(found, expected), MAX_GRADIENT_ERROR["fp32"])


def small_model(seed: int, bias: float | None = None) -> ClipModel:
    from conftest import SMALL

    changes = SMALL if bias is None else SMALL | {"init_logit_bias": bias}
    return build_model(ModelSpec(model="ViT-B-16", init="random", model_cfg=changes), seed=seed)


def differentiate(device: torch.device, precision: str, parts: int, bias: float | None = None) -> tuple[float, Tensor]:
    """Return the loss of a step with every objective, masks included, and all its gradients as one vector.

    With a `bias`, student and teacher are sigmoid models.
    """
    student = small_model(seed=0, bias=bias)
    weights = LossWeights(**dict.fromkeys(OBJECTIVES, 1.0) | {"gd": 1e-3, "sigmoid_kd": float(bias is not None)})
    spec = DistillSpec(
        steps=9,
        batch_size=BATCH,
        lr=1e-3,
        warmup=0,
        precision=precision,
        accumulate=parts,
        loss_weights=weights,
        loss_memory_mb=0.005,  # several blocks
    )
    torch.manual_seed(3)
    processes = Processes(0, 1, device)
    teacher: Any = type("Teacher", (), {"embed_dim": TEACHER_WIDTH})
    trainee = TrainingModule(student, teacher, spec, processes).train()
    random = torch.Generator().manual_seed(4)
    pixels = torch.randint(256, (BATCH, 3, 32, 32), generator=random, dtype=torch.uint8)
    ids = student.tokenize_trimmed([f"an image of the number {number} " * (1 + number % 3) for number in range(BATCH)])
    images, texts = (torch.randn(BATCH, TEACHER_WIDTH, generator=random) for _ in range(2))
    features = [torch.nn.functional.normalize(x, dim=-1).to(device) for x in (images, texts)]
    batch = PreparedBatch(pixels, ids, None, None, [""] * BATCH, np.arange(BATCH), 0).to(device)
    forward = Forward(trainee, trainee, spec, processes, 0)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16", init_scale=1024.0)
    teacher_bias = None if bias is None else torch.tensor(bias, device=device)
    done = forward.run(batch, TeacherFeatures(*features, torch.tensor(20.0, device=device), teacher_bias), 5)
    forward.backward(done, batch, 5, scaler)
    gradients = [p.grad.detach().double().cpu().flatten() for p in trainee.parameters() if p.grad is not None]
    return float(done.loss.detach()), torch.cat(gradients) / scaler.get_scale()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Batches --------------------------------------------------------------------------------------------------------------


def check_batches(step: Step, device: torch.device) -> None:
    """Compare batches that loader processes made and that were copied to the device with those made here."""
    data = GlyphBatches(make_samples(), 0, BATCH, 2)
    student = small_model(seed=0)
    steps = range(4)
    with closing(load_batches(data, steps, slice(None), student, student, 2)) as loaded:
        for number in steps:
            batch = next(loaded).to(device)
            plain = data.batch(number, slice(None), [student.geometry])
            same = torch.equal(batch.student_pixels.cpu(), plain.pixels[student.geometry])
            same = same and batch.captions_b == plain.captions_B
            assert batch.teacher_ids is not None
            same = same and torch.equal(batch.teacher_ids, batch.student_ids)
            verdict(step, f"batch {number} by loader processes", float(not same), 0.0, "differences")


# Resume ---------------------------------------------------------------------------------------------------------------


def start_trainings(step: Step) -> dict[tuple[str, str], Running]:
    """Start whole trainings and trainings to be killed; they run while the other checks do."""
    modes = ["deterministic"] if step.dry else ["deterministic", "usual"]
    kinds = ("whole", "killed")
    return {
        (mode, kind): start(
            training_folder(step, mode, kind), mode, step.device_type, HELD_AT if kind == "killed" else None
        )
        for mode in modes
        for kind in kinds
    }


def training_folder(step: Step, mode: str, kind: str) -> Path:
    return step.scratch / f"resume-{mode}-{kind}"


def finish_trainings(step: Step, running: dict[tuple[str, str], Running]) -> None:
    """Kill a training of each mode in the middle, continue it, and compare its weights with the whole one's."""
    killed_at = {mode: kill_in_the_middle(each) for (mode, kind), each in running.items() if kind == "killed"}
    continued = {mode: start(training_folder(step, mode, "killed"), mode, step.device_type) for mode in killed_at}
    for mode, resumed in continued.items():
        whole_s, parts_s = steps_until_the_end(running[mode, "whole"]), steps_until_the_end(resumed)
        whole, parts = (training_folder(step, mode, kind) for kind in ("whole", "killed"))
        failed = [folder for folder, steps in ((whole, whole_s), (parts, parts_s)) if STEPS not in steps]
        if failed:
            said = (failed[0] / SAID).read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
            step.record("resume", algorithms=mode, holds=False, why=said[-1][:300])
            continue
        start_w, whole_w, parts_w = (read_weights(folder) for folder in (whole / START, whole, parts))
        difference = float((parts_w - whole_w).norm() / (whole_w - start_w).norm())
        bound = 0.0 if mode == "deterministic" else MAX_WEIGHT_DIFFERENCE
        step.record(
            "resume", algorithms=mode, killed_after=killed_at[mode], continued_with=parts_s[0], steps=STEPS,
            difference=difference, bound=bound, same_bits=torch.equal(whole_w, parts_w),
            holds=bool(difference <= bound and 1 < parts_s[0] <= STEPS),
        )  # fmt: skip


def kill_in_the_middle(running: Running) -> int:
    """Kill a training with SIGKILL at the step at which it waits for that; return the last step that it reported."""
    last = 0
    while last < HELD_AT and (heard := running.hear()) is not None:
        last = heard
    running.process.kill()
    running.process.join()
    return last


def steps_until_the_end(running: Running) -> list[int]:
    """Wait for the end of a training; return the steps that it reported."""
    steps = []
    while (heard := running.hear()) is not None:
        steps.append(heard)
    running.process.join()
    return steps


# The tests marked gpu -------------------------------------------------------------------------------------------------


class Outcomes:
    """A plugin of pytest that records what became of each test."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def pytest_collection_finish(self, session: Any) -> None:
        if self.step.dry:
            for item in session.items:
                self.step.record("tests marked gpu", test=item.nodeid, outcome="not run on a CPU")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.passed else one_line(report.longreprtext.strip().splitlines()[-1])
            self.step.record(
                "tests marked gpu", test=report.nodeid, outcome=report.outcome, holds=report.passed, why=why
            )


def run_gpu_tests(step: Step) -> None:
    import pytest

    marked = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(ROOT)]
    options += ["-W", "default"]  # versions of packages other than ours warn, as 3.12 does of forks beside threads
    options += ["--basetemp", str(step.scratch / "pytest"), *(["--collect-only"] if step.dry else [])]
    code = pytest.main([*options, *marked], plugins=[Outcomes(step)])
    step.note(f"pytest -m gpu on {len(marked)} file(s): exit code {int(code)}")
