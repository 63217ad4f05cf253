"""Measure the gain of distillation at the quickstart's budget, over three seeds.

    python benchmarks/quickstart_gain.py [--out runs/quickstart_gain] [--seeds 0 1 2]

Each seed is a whole `clipkd run glyphs`: the same student, seed and batches with and without the teacher.  The accuracy
is measured on the exported models.  A run that exists is continued or reused.  The last line of stdout is one JSON
document; the exit code is 5 if a claim does not hold.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from claims import claim, finish

MIN_GAP_CLOSED = 0.6  # (student - baseline) / (teacher - baseline), top-1 on stix
MAX_INT8_DROP = 0.01  # top-1 fraction on stix, fp32 minus int8 of the same student
MIN_INT8_SPEEDUP = 1.4  # p50 of fp32 over p50 of int8, each in the runtime where it is fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_gain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    claims: list[dict[str, Any]] = []
    print(
        "| seed | baseline top-1 | distilled top-1 | gain | teacher | gap closed | int8 | int8 speedup "
        "| baseline train | distilled train | whole run |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        out = arguments.out / f"seed{seed}"
        command = [
            sys.executable,
            "-m",
            "clipkd",
            "run",
            "glyphs",
            "--out",
            str(out),
            "--set",
            f"seed={seed}",
            "--json",
        ]
        is_new, started = not out.exists(), time.monotonic()
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        whole_run = f"{time.monotonic() - started:.0f} s" if is_new else "continued"
        report = json.loads(finished.stdout)
        rows = {(row["role"], row["precision"]): row for row in report["rows"] if row["runtime"] == "onnxruntime"}
        baseline, student = rows["baseline", "fp32"], rows["student", "fp32"]
        teacher, int8 = rows["teacher", "fp32"], rows["student", "int8"]
        gain = student["top1"] - baseline["top1"]
        margin = student["top1_low"] - baseline["top1_high"]
        drop = student["top1"] - int8["top1"]
        closed = gain / (teacher["top1"] - baseline["top1"])
        speedup = _fastest(report["rows"], "fp32") / _fastest(report["rows"], "int8")
        print(
            f"| {seed} | {_interval(baseline)} | {_interval(student)} | {100 * gain:+.1f} "
            f"| {100 * teacher['top1']:.1f} % | {100 * closed:.0f} % "
            f"| {100 * int8['top1']:.1f} % | {speedup:.2f}x "
            f"| {baseline['train_s']:.0f} s | {student['train_s']:.0f} s | {whole_run} |"
        )
        claims += [
            claim(f"seed {seed}: gap closed on stix", closed, "fraction", ">=", MIN_GAP_CLOSED),
            claim(f"seed {seed}: distance between the 95 % intervals", margin, "top-1 fraction", ">", 0),
            claim(f"seed {seed}: int8 below fp32", drop, "top-1 fraction", "<=", MAX_INT8_DROP),
            claim(f"seed {seed}: int8 over fp32, p50", speedup, "x", ">=", MIN_INT8_SPEEDUP),
        ]
    finish("quickstart_gain", claims)


def _fastest(rows: list[dict[str, Any]], precision: str) -> float:
    """Return the student's lowest p50 in ms over the runtimes."""
    found = [row["p50_ms"] for row in rows if row["role"] == "student" and row["precision"] == precision]
    return float(min(found))


def _interval(row: dict[str, Any]) -> str:
    return f"{100 * row['top1']:.1f} % [{100 * row['top1_low']:.1f}, {100 * row['top1_high']:.1f}]"


if __name__ == "__main__":
    main()
