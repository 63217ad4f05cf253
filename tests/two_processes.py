"""Jobs for two processes that train together: real ones, over gloo, that start once for many jobs.

They are forked by a server that has imported what they need, and once for all of the tests.
"""

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from toolchain.distributed import Processes

multiprocessing.set_forkserver_preload(
    ["toolchain.distillation.distill", "toolchain.evaluation.torch_encoders", "tensorboard"]
)


def spawn(jobs: list[tuple[Any, ...]]) -> list[list[Any]]:
    """What each job, a function and its arguments after the processes, returns in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_entered, (jobs, folder), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
        both = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return [list(found) for found in zip(*both, strict=True)]


def _entered(rank: int, jobs: list[tuple[Any, ...]], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    torch.save([work(processes, *arguments) for work, *arguments in jobs], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
