"""Step 7 of benchmarks/gpu.py: an exported model on the GPU, in TensorRT and in ONNX Runtime, as far as they are here.

The TensorRT engines are built from the kit as a user builds them: with its `build_on_device.sh`, in a copy of the kit.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_clipkd import call_clipkd
from gpu_results import Step


def main(step: Step) -> None:
    run = step.scratch / "quickstart"
    if not (run / "report.json").exists():  # the step before did not end
        run = step.scratch / "adopted"
        call_clipkd("adopt", "glyphs_teacher", "--like", "glyphs", "--out", run, "--set", "quantize=null",
                    "--set", "export.precisions=[fp32]", "--json")  # fmt: skip
        call_clipkd("export", run, "--onnx", "--precision", "fp32", "--json")
    graphs = [path for path in exported_models(run) if "-onnxruntime-fp32" in path.name][: 1 if step.dry else None]
    if "CUDAExecutionProvider" in providers():
        profile(step, "cuda:0", graphs)
    else:
        step.note("skipped: ONNX Runtime on the GPU: the installed package has no CUDAExecutionProvider")
    profile(step, "cpu", graphs[:1])  # a CPU is not what this is for
    precisions = "fp32" if step.dry else "fp32,fp16"
    call_clipkd("export", run, "--trt", "--no-build", "--precision", precisions, "--json", accept=(0, 5))
    kits = [path for path in exported_models(run) if "-tensorrt-" in path.name]
    step.note(f"TensorRT kits: {', '.join(path.name for path in kits)}")
    if find_spec("tensorrt") is None or step.dry:
        step.note("skipped: building engines: " + ("a dry run" if step.dry else "tensorrt is not installed"))
        return
    for kit in kits:
        build(step, kit)
    profile(step, "cuda:0", kits)


def exported_models(run: Path) -> list[Path]:
    return sorted(path for path in (run / "exported").iterdir() if (path / "manifest.json").exists())


def providers() -> list[str]:
    """Return the devices that ONNX Runtime offers; it loads the CUDA libraries of torch."""
    import onnxruntime
    import torch

    found: list[str] = onnxruntime.get_available_providers()
    return found if torch.cuda.is_available() else ["CPUExecutionProvider"]


def profile(step: Step, device: str, models: list[Path]) -> None:
    """Record the latencies of exported models; one that cannot run is a row with its reason."""
    effort = ("--processes", "1", "--seconds", "0.05") if step.dry else ("--seconds", "2")
    try:
        rows: list[dict[str, Any]] = call_clipkd("profile", *models, "--device", device, *effort, "--json",
                                                 accept=(0, 1, 5))  # fmt: skip
    except RuntimeError as error:
        step.record("exported models", device=device, status=str(error))
        return
    for row in rows:
        measured = row["status"] == "ok"
        step.record(
            "exported models",
            device=device,
            model=Path(row["model"]).name,
            image_p50_ms=row["image"]["p50_ms"] if measured else None,
            text_p50_ms=row["text"]["p50_ms"] if measured else None,
            images_per_s=row["images_per_s"] if measured else None,
            grade=row["grade"] if measured else None,
            status=row["status"],
        )


def build(step: Step, kit: Path) -> None:
    """Build the engines of a kit in a copy of it, with its own script."""
    copy = shutil.copytree(kit, step.scratch / "kits" / kit.name)
    ended = subprocess.run(
        ["sh", "build_on_device.sh"], cwd=copy, capture_output=True, text=True, timeout=step.left_s()
    )
    last = (ended.stdout + ended.stderr).strip().splitlines()[-1:]
    step.record("TensorRT kits", kit=kit.name, exit_code=ended.returncode, said=" ".join(last),
                holds=ended.returncode == 0, python=sys.version.split()[0])  # fmt: skip
