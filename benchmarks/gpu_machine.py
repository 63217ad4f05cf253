"""Step 1 of benchmarks/gpu.py: the GPU, its clocks and rates, package versions, and what `clipkd doctor` finds."""

import shutil
import subprocess

import torch
from gpu_clipkd import call_clipkd
from gpu_results import Step
from gpu_timing import copy_gb_s, gemm_tflops, to_device_gb_s

from toolchain.provenance import machine, versions

_QUERIES = """
    name driver_version memory.total memory.used compute_cap clocks.sm clocks.max.sm clocks.mem clocks.max.mem
    power.draw power.limit power.max_limit temperature.gpu utilization.gpu pcie.link.gen.current pcie.link.width.current
    persistence_mode ecc.mode.current
"""
"""Only read: the settings of the card stay as they are."""


def main(step: Step) -> None:
    query_driver(step)
    found = versions() | {"cuda of torch": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package, version in (found | {key: str(value) for key, value in machine().items()}).items():
        step.record("versions", package=package, version=version)
    for folder in ("/dev/shm", step.scratch):  # loader processes hand over batches through the first
        usage = shutil.disk_usage(folder)
        step.record("folders", folder=str(folder), total_gb=usage.total / 1e9, free_gb=usage.free / 1e9)
    measure_rates(step)
    document = call_clipkd("doctor", *(["--quick"] if step.dry else []), "--json", accept=(0, 3, 4))
    for row in document["rows"]:
        step.record(
            "clipkd doctor",
            capability=row["capability"],
            status=row["status"],
            detail=row["detail"],
            seconds=row["took_s"],
        )


def query_driver(step: Step) -> None:
    """Record what nvidia-smi says; a query that this driver does not know is left out."""
    for query in _QUERIES.split():
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            step.note(f"nvidia-smi: {type(error).__name__}")
            return
        if ended.returncode == 0:
            step.record("GPU", query=query, value=ended.stdout.strip())


def measure_rates(step: Step) -> None:
    """Record the rates that bound a training step."""
    device = torch.device(step.device_type)
    size, megabytes = (256, 4) if step.dry else (8192, 2048)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("fp32, TF32 on", torch.float32, True),
        ("fp32, TF32 off", torch.float32, False),
    ):
        rate = gemm_tflops(device, size, dtype, tf32=tf32)
        step.record("rates", what=f"matrix product {size} x {size}, {name}", rate=rate, unit="TFLOP/s")
    step.record("rates", what="copy within memory", rate=copy_gb_s(device, megabytes), unit="GB/s")
    step.record("rates", what="copy from pinned memory", rate=to_device_gb_s(device, megabytes // 4), unit="GB/s")
