"""Prove and measure on one machine with a GPU what was written for one: one command, ten minutes, one table.

    python benchmarks/gpu.py --out runs/gpu [--minutes 9.5] [--only train_step,losses]
    python benchmarks/gpu.py --dry          all steps on a CPU with tiny sizes, in two minutes: what CI runs

The steps, in the order of their worth (each runs in a process of its own; benchmarks/gpu_NAME.py says what it does):

    machine      the GPU, its clocks and rates, versions, `clipkd doctor`
    correctness  golden values in float64, gradients, batches, kill -9 and resume, the tests marked gpu
    train_step   ViT-B/16 -> ViT-T/16 at 224 px: a straightforward loop and ours; images/s, MFU, memory, shares
    shards       training from tar shards, end to end, and the share of time the GPU waits for data
    losses       memory and time of the losses at batches of 4k to 256k
    quickstart   `clipkd run glyphs`
    deploy       TensorRT and ONNX Runtime on the GPU, as far as they are installed
    teacher      a glyphs teacher trained ten times as long, as the time that is left allows

A step has a share of the time; what one leaves, the later ones get.  Rows are in gpu.jsonl as soon as they are measured
and in gpu.md after each step, so a run that is cut off leaves what it has.  A package that is missing costs its step
one line.  A machine without network needs what benchmarks/gpu_kit.sh gathers; run that first, it prints the commands.

A row that disappoints has a flag (`gpu_results.disappointments`).  The last line of stdout is one JSON document; the
exit code is 5 if a claim does not hold.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare machine has this folder and no installed clipkd

from claims import claim, finish  # noqa: E402
from gpu_results import (  # noqa: E402
    MAX_WAITING,
    MFU_BATCH,
    MIN_MFU,
    MIN_SPEEDUP_CACHED,
    PAGE,
    Step,
    disappointments,
    drop_steps,
    failed_checks,
    list_rows,
    read_lines,
    write_page,
)

from toolchain.provenance import machine, revision  # noqa: E402

COMMIT = ROOT / ".gpu_kit" / "commit"
"""Written by gpu_kit.sh, for a machine that gets the files without their history."""

LOG = "gpu.log"
_END_S = 6.0  # to write the page
_GRACE_S = 4.0  # between asking a step to end and ending it


class Planned(NamedTuple):
    """A step, and the seconds that it takes of 9.5 minutes if none before it leaves any."""

    name: str
    seconds: float


STEPS = (
    Planned("machine", 45),
    Planned("correctness", 75),
    Planned("train_step", 180),
    Planned("shards", 65),
    Planned("losses", 50),
    Planned("quickstart", 80),
    Planned("deploy", 40),
    Planned("teacher", 35),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results; --dry alone needs none")
    parser.add_argument("--only", help="names of steps, comma-separated")
    parser.add_argument("--minutes", type=float, help="default 9.5; a dry run has no limit to speak of")
    given = parser.parse_args()
    if given.out is None and not given.dry:
        parser.error("--out: name the folder that the results are written to")
    chosen = tuple(step for step in STEPS if given.only is None or step.name in given.only.split(","))
    unknown = set(given.only.split(",")) - {step.name for step in STEPS} if given.only else set()
    if unknown:
        parser.error(f"--only: unknown steps {', '.join(sorted(unknown))}; known: {', '.join(s.name for s in STEPS)}")
    ends_at = time.monotonic() + 60 * (given.minutes or (60.0 if given.dry else 9.5)) - _END_S
    with tempfile.TemporaryDirectory(prefix="clipkd-gpu-") as scratch:
        out = given.out or Path(scratch) / "out"
        out.mkdir(parents=True, exist_ok=True)
        (Path(scratch) / "work").mkdir()
        run_all(chosen, out, Path(scratch) / "work", ends_at, dry=given.dry)
        print((out / PAGE).read_text(encoding="utf-8"))
        conclude(out, dry=given.dry)


def run_all(chosen: tuple[Planned, ...], out: Path, scratch: Path, ends_at: float, *, dry: bool) -> None:
    drop_steps(out, [planned.name for planned in chosen])
    for number, planned in enumerate(chosen):
        later_s = sum(step.seconds for step in chosen[number:])
        limit_s = max(1.0, (ends_at - time.monotonic()) * planned.seconds / later_s)
        began = time.monotonic()
        ending = run_one(planned.name, out, scratch, limit_s, dry=dry)
        took = f"{time.monotonic() - began:.0f} s of {limit_s:.0f} s"
        Step(planned.name, dry, out, scratch, ends_at).note(f"{ending}, {took}")
        write_page(out, make_heading(out, dry=dry), failed_checks if dry else disappointments)


def run_one(name: str, out: Path, scratch: Path, limit_s: float, *, dry: bool) -> str:
    """Run a step in a process of its own, which is ended at its limit with all that it started; say how it ended."""
    command = [sys.executable, "-m", "gpu_step", name, "--out", str(out), "--scratch", str(scratch)]
    command += ["--seconds", f"{limit_s:.1f}", *(["--dry"] if dry else [])]
    with (out / LOG).open("a", encoding="utf-8") as log:
        running = subprocess.Popen(
            command, stdout=log, stderr=log, env=make_environment(scratch, dry=dry), start_new_session=True
        )
        try:
            code = running.wait(limit_s)
            return "done" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            return "cut off at its limit"
        finally:
            end_group(running)


def end_group(running: subprocess.Popen[bytes]) -> None:
    """End what is left of a step's processes."""
    for number, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(running.pid, number)
            running.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def make_environment(scratch: Path, *, dry: bool) -> dict[str, str]:
    ours = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU does not start CUDA, so forks may
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})


# The page and the document --------------------------------------------------------------------------------------------


def describe_commit() -> str | None:
    return revision() or (COMMIT.read_text(encoding="utf-8").strip() if COMMIT.exists() else None)


def find_gpu(out: Path) -> str | None:
    """Return the name of the GPU, from the rows of the first step."""
    rows = list_rows(read_lines(out))
    return next((row["value"] for row in rows if row.get("query") == "name"), None)


def make_heading(out: Path, *, dry: bool) -> list[str]:
    lines = read_lines(out)
    where = find_gpu(out) or "no GPU"
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    heading = [f"# gpu, {where}, {machine()['cpu']}, {machine()['cores']} cores, {today}, commit {describe_commit()}"]
    if dry:
        return [
            *heading,
            "",
            "A dry run on a CPU with tiny sizes: it shows that every step runs, and no figure counts.",
        ]
    flags = [f"- {line['step']}: {name_row(line['row'])}: {flag}" for line in lines if "row" in line
             for flag in disappointments(line["row"])]  # fmt: skip
    return [*heading, "", f"**{len(flags)} figures disappoint.**", "", *flags]


def name_row(row: dict[str, Any]) -> str:
    """Return the first values of a row, which say what was measured."""
    return ", ".join(str(value) for value in list(row.values())[:3])


def conclude(out: Path, *, dry: bool) -> NoReturn:
    """Print the document; in a dry run, only that all steps ran and all checks held is claimed."""
    lines = read_lines(out)
    rows = list_rows(lines)
    endings = {line["step"]: line["note"] for line in lines if "note" in line}  # the last note of a step
    broken = [step for step, ending in endings.items() if not ending.startswith("done")]
    wrong = [row for row in rows if row.get("holds") is False]
    claims = [
        claim("steps that failed or were cut off", len(broken), "steps", "<=", 0),
        claim("checks outside their bounds", len(wrong), "checks", "<=", 0),
    ]
    if not dry:
        claims += check_figures(rows)
    finish("gpu", claims, dry=dry, gpu=find_gpu(out), commit=describe_commit(), steps=endings)


def check_figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the claims about the figures that were measured."""
    claims = []
    ours = [row for row in rows if str(row.get("side", "")).startswith("ours")]
    cached = [row["to_bf16_loop"] for row in ours if "cached" in row["side"] and row.get("to_bf16_loop") is not None]
    mfu = [row["mfu"] for row in ours if row.get("batch") == MFU_BATCH and row.get("mfu") is not None]
    waiting = [row["waiting"] for row in rows if row.get("waiting") is not None]
    if waiting:
        claims.append(claim("largest share of time the GPU waits for data", max(waiting), "share", "<=", MAX_WAITING))
    if cached:
        claims.append(claim("least speed-up with a cached teacher to the straightforward loop in bf16", min(cached),
                            "ratio", ">=", MIN_SPEEDUP_CACHED))  # fmt: skip
    if mfu:
        claims.append(claim(f"least MFU of ours at a batch of {MFU_BATCH:,}", min(mfu), "share", ">=", MIN_MFU))
    return claims


if __name__ == "__main__":
    main()
