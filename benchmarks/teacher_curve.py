"""Draw the training curve of the included glyphs teacher, and write it as a table.

    python benchmarks/teacher_curve.py runs/glyphs_teacher/student/train.jsonl

Writes docs/glyphs_teacher.png and benchmarks/results/glyphs_teacher.csv; each row is the mean of 25 steps.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 25


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    windows = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]
    keys = ("loss", "lr", "logit_scale", "images_per_s")
    means = [{key: statistics.fmean(row[key] for row in window) for key in keys} for window in windows]
    steps = [window[-1]["step"] + 1 for window in windows]
    with (ROOT / "benchmarks" / "results" / "glyphs_teacher.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *keys])
        writer.writerows([step, *(f"{mean[key]:.6g}" for key in keys)] for step, mean in zip(steps, means, strict=True))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [mean["loss"] for mean in means], color="#0072B2")
    axes.set(xlabel="step (batch of 256)", ylabel="contrastive loss, nats", yscale="log")
    axes.set_title("glyphs teacher", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "glyphs_teacher.png", dpi=130)


if __name__ == "__main__":
    main()
