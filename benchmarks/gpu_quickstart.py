"""Step 6 of benchmarks/gpu.py: the quickstart on a machine with a GPU, from distillation to the report."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_clipkd import call_clipkd
from gpu_results import Step

from toolchain.stage import count_seconds

_TINY = (
    "distill.steps=3",
    "distill.warmup=1",
    "distill.batch_size=64",
    "baseline=false",
    "quantize=null",
    "export.runtimes=[onnxruntime]",
    "export.precisions=[fp32]",
    "evaluate.headline=novel",
    "evaluate.sets=[novel]",
    "profile.processes=1",
    "profile.seconds=0.1",
    "profile.pytorch=[]",
)


def main(step: Step) -> None:
    settings = list(_TINY) if step.dry else without_missing(step)
    run = step.scratch / "quickstart"
    started = time.monotonic()
    changes = [word for setting in settings for word in ("--set", setting)]
    document: dict[str, Any] = {"rows": []}
    try:
        document = call_clipkd("run", "glyphs", "--out", run, *changes, "--json", accept=(0, 5))
        step.note(f"the whole line took {time.monotonic() - started:.1f} s")
    finally:  # stages that were made before an error, or before the end of the time
        record_stages(step, run)
        if (log := run / "student" / "train.jsonl").exists():
            record_training_rate(step, log)
    for row in document["rows"]:
        kept = ("name", "runtime", "precision", "device", "p50_ms", "top1", "top1_drop_vs_teacher", "status")
        step.record("report of the quickstart", **{key: row.get(key) for key in kept})


def record_stages(step: Step, run: Path) -> None:
    """Record the stages that a run has made, with their seconds."""
    for path in sorted(run.glob("**/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "key" in manifest and not any(part.startswith(".") for part in path.relative_to(run).parts):
            where = path.parent.relative_to(run)
            device = manifest.get("summary", {}).get("device")
            step.record("stages of the quickstart", stage=str(where), seconds=count_seconds(manifest), device=device)


def without_missing(step: Step) -> list[str]:
    """Return the settings that leave out what needs a package that is not installed."""
    settings = []
    runtimes = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
    if len(runtimes) < 2:
        step.note(f"runtimes of the quickstart here: {', '.join(runtimes) or 'none'}")
        settings.append(f"export.runtimes=[{', '.join(runtimes)}]")
    if find_spec("nncf") is None:
        step.note("int8 is left out: nncf is not installed")
        settings += ["quantize=null", "export.precisions=[fp32]"]
    return settings


def record_training_rate(step: Step, log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rates = sorted(row["images_per_s"] for row in rows[len(rows) // 4 :] if row.get("images_per_s"))
    if rates:
        waits = [row["data_fraction"] for row in rows[len(rows) // 4 :] if row.get("data_fraction") is not None]
        step.record(
            "training of the quickstart",
            images_per_s=rates[len(rates) // 2],
            waiting=sum(waits) / len(waits) if waits else None,
        )
