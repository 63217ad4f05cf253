"""Measure what int8 costs the quickstart's student in top-1: calibrated, fine-tuned alone, or with the teacher.

    python benchmarks/kd_qat.py [--out runs/kd_qat] [--seeds 0 1 2] [--write]

The script trains the quickstart's student once from each seed (`clipkd distill glyphs`) and quantizes it in three ways,
each with the recipe's calibration, steps, learning rate, batches and anchor:

    PTQ                    calibrated only
    QAT without teacher    fine-tuned with the float student's own features instead of the teacher's
    QAT with teacher       fine-tuned as `clipkd run glyphs` does it, with distillation's objectives

Every model is exported and scored in ONNX Runtime, over the images of the three glyph sets together; each image is
classified among the names of its own set.  A drop is the top-1 of a student in fp32 minus its top-1 in int8.  Its
interval is a paired bootstrap: images are drawn with replacement, each with its outcomes under both models and all
seeds.  The upper bound is the upper end of the 95 % interval, the 97.5 % quantile.  "No worse than PTQ" is tested on
the paired difference of the two int8 models: its 95 % interval must not lie entirely below zero.  The mean difference
is in the document and in the table.

After an interruption the same command continues.  `--write` puts the table into docs/method.md and benchmarks/results/.
The last line of stdout is one JSON document; the exit code is 5 if a claim does not hold.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from claims import claim, finish
from glyphs_students import SETS, quiet, write_result
from numpy.typing import NDArray

BEGIN, END = "<!-- kd_qat: written by benchmarks/kd_qat.py -->", "<!-- end of kd_qat -->"
MAX_MEAN_DROP = 0.003  # top-1 fraction, KD-QAT below fp32
MAX_UPPER_BOUND = 0.006  # the same, upper end of the 95 % interval
RESAMPLES = 10_000
VARIANTS = {
    "fp32": "fp32",
    "ptq": "int8, PTQ",
    "qat": "int8, QAT without teacher",
    "kd_qat": "int8, QAT with teacher",
}


def train_or_reuse(run: Path, seed: int, overrides: list[str]) -> None:
    """Make the teacher and the student of a seed; continue or reuse a run that exists."""
    changes = [f"seed={seed}", "baseline=false", *overrides]
    command = [sys.executable, "-m", "clipkd", "distill", "glyphs", "--out", str(run)]
    command += [part for change in changes for part in ("--set", change)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=Path.cwd())


def outcomes(run: Path, variant: str, seed: int, overrides: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Return which images of each set the exported model classifies correctly; reuse the result of an earlier call."""
    from toolchain.recipe.load import load_recipe, recipe_path
    from toolchain.stage import folder_fingerprint

    spec = load_recipe(recipe_path("glyphs"), overrides).quantize
    digest = hashlib.sha256(f"{folder_fingerprint(run / 'student')} {spec}".encode()).hexdigest()
    folder = run / "kd_qat" / f"{variant}-{digest[:12]}"
    result = folder / "right.npz"
    if not result.exists():
        from export.runtime.exported_model import open_exported
        from toolchain.evaluation.open_sets import open_set
        from toolchain.evaluation.zero_shot import evaluate

        folder.mkdir(parents=True, exist_ok=True)
        export(run, folder, variant, seed, overrides)
        sets = [open_set(name) for name in SETS]
        precision = "fp32" if variant == "fp32" else "int8"
        _, samples = evaluate(open_exported(folder, precision=precision), sets, headline="stix")
        np.savez(result, **{name: samples[f"{name}_rank"] < 1 for name in SETS})  # type: ignore[arg-type]
    with np.load(result) as saved:
        return dict(saved)


def export(run: Path, folder: Path, variant: str, seed: int, overrides: list[str]) -> None:
    """Quantize the run's student as the variant says, and export it."""
    from export.documents import PlannedExport
    from export.graphs.export_onnx import FrozenTowers, export_onnx
    from export.proof.parity import check_parity
    from toolchain.data import glyphs
    from toolchain.data.open import training_data
    from toolchain.evaluation.open_sets import open_set
    from toolchain.models.build import load_model
    from toolchain.models.towers import example_pixels
    from toolchain.quantization.checkpoint import load_quantized
    from toolchain.quantization.freeze import freeze
    from toolchain.quantization.quantize_student import Quantization, quantize_student
    from toolchain.recipe.load import load_recipe, recipe_path

    recipe = load_recipe(recipe_path("glyphs"), overrides)
    assert recipe.quantize is not None
    model, frozen = load_model(run / "student"), None
    if variant != "fp32":
        spec = recipe.quantize.model_copy(update={"method": "ptq" if variant == "ptq" else "qat"})
        teacher = load_model(run / "teacher") if variant == "kd_qat" else None
        data = training_data(recipe.data, seed=seed, batch_size=spec.batch_size)
        checkpoint = folder / "int8"
        checkpoint.mkdir(exist_ok=True)
        weights = recipe.distill.loss_weights
        quantize_student(Quantization(spec, weights, model, teacher, data, seed), checkpoint, quiet)
        model = load_model(checkpoint)
        image, text = load_quantized(checkpoint, model)
        examples = example_pixels(model.net), model.tokenize(list(glyphs.TEMPLATES))
        frozen = FrozenTowers(freeze(image, examples[0]), freeze(text, examples[1]))
    planned = PlannedExport("student", "int8" if frozen else "fp32", opset=recipe.export.opset)
    export_onnx(model, folder, planned, open_set("stix"), frozen)
    check_parity(folder, precision=planned.precision)


def mean_and_interval(values_SN: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean over seeds and images, and its 95 % bootstrap interval over the images."""
    values_N = values_SN.mean(0)
    random = np.random.default_rng(0)
    means = [values_N[random.integers(0, len(values_N), len(values_N))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values_N.mean()), float(low), float(high)


def summary(right: dict[str, list[dict[str, NDArray[np.bool_]]]], seeds: list[int]) -> tuple[str, list[Any], float]:
    """Return the table, the claims, and the mean top-1 of KD-QAT minus that of PTQ."""
    pooled = {
        variant: np.array([np.concatenate(list(sets.values())) for sets in of_seed], np.float64)
        for variant, of_seed in right.items()
    }
    lines = [
        "| model | top-1 %, mean ± sd | stix / serif / novel % | drop from fp32, points: mean [95 %] | by seed "
        "| above PTQ, points: mean [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    drops = {name: mean_and_interval(pooled["fp32"] - pooled[name]) for name in VARIANTS}
    above = {name: mean_and_interval(pooled[name] - pooled["ptq"]) for name in VARIANTS}
    for name, words in VARIANTS.items():
        top1_S = pooled[name].mean(1)
        spread = statistics.stdev(top1_S) if len(seeds) > 1 else float("nan")
        sets = " / ".join(f"{100 * np.mean([of[part].mean() for of in right[name]]):.1f}" for part in right[name][0])
        by_seed = ", ".join(f"{100 * drop:+.2f}" for drop in (pooled["fp32"] - pooled[name]).mean(1))
        lines.append(
            f"| {words} | {100 * top1_S.mean():.2f} ± {100 * spread:.2f} | {sets} "
            f"| {'-' if name == 'fp32' else points(drops[name])} | {'-' if name == 'fp32' else by_seed} "
            f"| {'-' if name in ('fp32', 'ptq') else points(above[name])} |"
        )
    num_images = pooled["fp32"].shape[1]
    lines += ["", f"Seeds {', '.join(map(str, seeds))}; {num_images} images, the same for every model and seed."]
    drop, _, upper = drops["kd_qat"]
    claims = [
        claim("KD-QAT: mean drop from fp32", drop, "top-1 fraction", "<=", MAX_MEAN_DROP),
        claim("KD-QAT: paired 95 % upper bound of the drop", upper, "top-1 fraction", "<=", MAX_UPPER_BOUND),
        claim("KD-QAT minus PTQ: upper end of the 95 % interval", above["kd_qat"][2], "top-1 fraction", ">=", 0),
    ]
    return "\n".join(lines), claims, above["kd_qat"][0]


def points(interval: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kd_qat"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="change the recipe, for a trial")
    parser.add_argument("--write", action="store_true", help="put the table into docs/method.md")
    arguments = parser.parse_args()
    started = time.monotonic()
    right: dict[str, list[dict[str, NDArray[np.bool_]]]] = {variant: [] for variant in VARIANTS}
    for seed in arguments.seeds:
        run = arguments.out / f"seed{seed}"
        train_or_reuse(run, seed, arguments.overrides)
        for variant, found in right.items():
            found.append(outcomes(run, variant, seed, arguments.overrides))
            minutes = (time.monotonic() - started) / 60
            print(f"seed {seed}: {variant} after {minutes:.1f} min", file=sys.stderr, flush=True)
    table, claims, above_ptq = summary(right, arguments.seeds)
    print(table)
    if arguments.write:
        write_result("kd_qat", (BEGIN, END), table, describe_settings(), claims)
    finish("kd_qat", claims, kd_qat_minus_ptq=round(above_ptq, 5), overrides=arguments.overrides)


def describe_settings() -> str:
    from toolchain.recipe.load import load_recipe, recipe_path

    spec = load_recipe(recipe_path("glyphs")).quantize
    assert spec is not None
    return (
        f"{spec.steps} steps of {spec.batch_size} at {spec.lr:g}, anchor {spec.anchor:g}, {spec.calibration_samples} "
        "samples for calibration; scored in ONNX Runtime"
    )


if __name__ == "__main__":
    main()
