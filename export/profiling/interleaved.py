"""Time jobs in interleaved processes, so that drift of the machine affects all of them alike.

Only this module decides the order of the processes, when a machine counts as busy, and how the other jobs go on after
one fails.  `clipkd profile` and `clipkd students` both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from export.devices.describe import look_at
from export.devices.documents import Machine, RunnerDocument
from export.devices.registry import Device
from export.devices.run_runner import runner_here, runner_on
from export.profiling.summary import MAX_OTHER_CPU
from toolchain.errors import ClipkdError
from toolchain.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One graph to time in several processes."""

    model: int
    """The number of its model: after one job of a model has failed, the model's other jobs do not run."""

    folder: Path
    tower: str
    """`folder` and `tower` are named in errors."""

    arguments: list[str]
    """The runner's arguments."""

    title: str = ""
    """Shown by progress while the job runs; if empty, progress shows only how many have run."""

    num_done: int = 0
    """The number of its processes that ran before an interruption; these are not run again."""

    once: Sequence[Path] = ()
    """Files that a device deletes after the last process."""


def look_before(on: Device | None, prepare: Callable[[Machine], T]) -> tuple[Machine, list[str], T]:
    """Return a description of `on` (None: this machine), its flags (BUSY or none), and the result of `prepare`.

    The load of other programs is measured while `prepare` runs.
    """
    machine, others = look_at(on)
    next(others)  # starts measuring the load
    prepared = prepare(machine)
    busy_share = next(others)
    return machine, ["BUSY"] if busy_share is not None and busy_share > MAX_OTHER_CPU else [], prepared


def time_in_turns(
    jobs: Sequence[Job], on: Device | None, processes: int, progress: Progress
) -> Iterator[tuple[Job, RunnerDocument | ClipkdError]]:
    """Run each job in `processes` fresh processes, here or on a device; yield each document or error as it arrives."""
    failed: set[int] = set()
    done, total = 0, processes * len(jobs)
    for turn in range(processes):
        for job in jobs[:: -1 if turn % 2 else 1]:  # alternate, so that no job always follows the same other one
            if job.title:
                progress("timing", done, total, job.title)
            if turn >= job.num_done and job.model not in failed:
                found = _run(job, on, is_last=turn == processes - 1)
                if isinstance(found, ClipkdError):
                    failed.add(job.model)
                yield job, found
            done += 1
            if not job.title:
                progress("timing", done, total)


def _run(job: Job, on: Device | None, *, is_last: bool) -> RunnerDocument | ClipkdError:
    try:
        if on is None:
            return runner_here(job.folder, job.tower, job.arguments)
        return runner_on(on, job.folder, job.tower, job.arguments, once=job.once if is_last else [])
    except ClipkdError as error:
        return error
