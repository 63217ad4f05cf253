"""Measure latency, throughput, memory and size of an exported model on a machine, with confidence intervals.

Every number comes from `runner.py` in fresh processes.  Processes of the image and the text tower are interleaved, so
that drift of the machine affects both.  The protocol follows MLPerf's single stream
(github.com/mlcommons/inference_policies) and, for repeating whole processes, Kalibera and Jones, "Rigorous Benchmarking
in Reasonable Time" (ISMM 2013).

At batch 1 each tower is measured for the seconds of an `Effort`, shared among its processes.  The whole path, from a
JPEG's bytes to its class, and each larger batch take a quarter of that each.  `documents.py` defines the results.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from export.devices.describe import add_clocks
from export.devices.documents import Machine, RunnerDocument
from export.devices.registry import Device
from export.model_folder import tower_files
from export.profiling.documents import MeasuredMachine, ProfileDocument
from export.profiling.inputs import RunnerOptions, write_inputs
from export.profiling.interleaved import Job, look_before, time_in_turns
from export.profiling.summary import grade, images_per_second, process_medians, summarise
from toolchain.errors import ClipkdError, UsageError
from toolchain.progress import Progress, no_progress


class Effort(NamedTuple):
    """The time spent on measuring a model."""

    processes: int = 3
    """Fresh processes for each tower."""

    seconds: float = 1.0
    """Measured time of each tower at batch 1, shared among its processes."""


BRIEF = Effort()
"""The default."""

QUICK = Effort(3, 6.0)
"""For a first impression: 2 s in each of three processes."""

STANDARD = Effort(5, 60.0)
"""The interval of five medians spans from the smallest to the largest: those of two equal models are disjoint in 1 of
126 pairs; with three processes, in 1 of 10.  In 60 s, a tower of up to 90 ms yields enough samples for a p99."""

SWEEP = (8, 32)
"""Batch sizes for throughput, in addition to 1."""


@dataclass(frozen=True)
class Target:
    """The device and the runtime options that models are timed with."""

    device: str = "cpu"
    """A device of the machine, by the runtime's name."""

    on: Device | None = None
    """A machine reached by ssh; None is this one."""

    engines: Mapping[Path, Path] = field(default_factory=dict)
    """Folder of the TensorRT engines built on the machine, by the folder of their build kit."""

    compiled: bool = False
    """Run checkpoints with torch.compile instead of eager."""


CPU = Target()


@dataclass(frozen=True)
class Profile:
    """The measurement of one exported model."""

    document: ProfileDocument
    """The content of profile.json."""

    samples: dict[str, NDArray[np.float32]]
    """Every latency in order (`image_ms`, `text_ms`, `e2e_ms`), and the number of its process (`..._process`)."""


def profile(
    folder: Path,
    effort: Effort = BRIEF,
    target: Target = CPU,
    *,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Profile:
    """Return the profile of one model, timed as in `profile_together`.

    Raises:
        ArtifactError: the folder lacks a file.
        ClipkdError: a runner crashed, hung, or could not run the graph.
        UnavailableBackend: the device is not there.
        MissingDependency: the runtime is not installed.
    """
    (found,) = profile_together([folder], effort, target, threads=threads, progress=progress)
    if isinstance(found, ClipkdError):
        raise found
    return found


def profile_together(
    folders: Sequence[Path],
    effort: Effort = BRIEF,
    target: Target = CPU,
    *,
    threads: int | None = None,
    spin_ms: Sequence[float] = (),
    progress: Progress = no_progress,
) -> list[Profile | ClipkdError]:
    """Return the profiles of several models, timed in interleaved processes, in order; for a failed one, its error.

    A folder is an exported model, or a checkpoint of a run, which is timed in PyTorch on this machine's CPU with the
    samples of its exported model.  `threads` defaults to all usable cores.  `spin_ms` adds a delay to every query of a
    model, to test this protocol.
    """
    processes, seconds = effort
    if processes < 1 or not seconds > 0:
        raise UsageError(f"profile: expected at least one process and some time, got {processes} and {seconds} s")
    failures: dict[int, ClipkdError] = {}
    results: list[dict[str, list[RunnerDocument]]] = [{"image": [], "text": []} for _ in folders]
    with tempfile.TemporaryDirectory(prefix="clipkd-profile-") as scratch:

        def prepare(machine: Machine) -> list[Job]:
            own_threads = threads or machine["usable_cores"]
            options = RunnerOptions(seconds / processes, own_threads, target.device, target.compiled, SWEEP)
            jobs: list[Job] = []
            for place, folder in enumerate(folders):
                try:
                    words = write_inputs(folder, Path(scratch) / str(place), options, target.engines.get(folder))
                except ClipkdError as error:
                    failures[place] = error
                    continue
                spin = ["--spin-ms", f"{spin_ms[place]:g}"] if spin_ms and spin_ms[place] else []
                jobs += [Job(place, folder, tower, [*arguments, *spin]) for tower, arguments in words.items()]
            return jobs

        machine, flags, jobs = look_before(target.on, prepare)
        for job, found in time_in_turns(jobs, target.on, processes, progress):
            if isinstance(found, ClipkdError):
                failures[job.model] = found
            else:
                results[job.model][job.tower].append(found)
    name, call = target.device if target.on is None else target.on.name, secrets.token_hex(8)
    return [
        failures.get(place)
        or _summarize(
            tower_files(folder, target.engines.get(folder)),
            results[place],
            add_clocks("cuda" if folder in target.engines else target.device.partition(":")[0], machine),
            threads or machine["usable_cores"],
            name,
            flags,
            call,
        )
        for place, folder in enumerate(folders)
    ]


def _summarize(
    files: Mapping[str, Path],
    results: Mapping[str, Sequence[RunnerDocument]],
    machine: Machine,
    threads: int,
    device: str,
    flags: Sequence[str],
    call: str,
) -> Profile:
    image, text = summarise(results["image"]), summarise(results["text"])
    sweep, text_sweep = images_per_second(results["image"]), images_per_second(results["text"])
    whole = [result["e2e"] for result in results["image"] if "e2e" in result]  # empty for a model without classes
    is_split = len(set(files.values())) == len(files)
    sizes = {tower: path.stat().st_size if is_split else None for tower, path in files.items()}
    hardware = {key: value for key, value in machine.items() if key != "to_lock_clocks"}
    document: ProfileDocument = {
        "call": call,
        "device": device,
        "machine": cast(MeasuredMachine, hardware | results["image"][0]["versions"]),
        "threads": threads,
        "batch": 1,
        "image": {**image, "images_per_s": max(sweep.values())},
        "text": {**text, "texts_per_s": max(text_sweep.values())},
        "e2e_p50_ms": statistics.median(process_medians(whole)) if whole else None,
        "e2e_stages_ms": {
            stage: statistics.median(result["stages_ms"][stage] for result in whole)
            for stage in (whole[0]["stages_ms"] if whole else ())
        },
        "images_per_s": max(sweep.values()),
        "sweep": sweep,
        "peak_memory_bytes": max(result["peak_rss_bytes"] for result in [*results["image"], *results["text"]]),
        "size_bytes": sum(path.stat().st_size for path in set(files.values())),
        "size_image_bytes": sizes["image"],
        "size_text_bytes": sizes["text"],
        "to_lock_clocks": [] if machine["clocks_locked"] else machine["to_lock_clocks"],
        **grade(list(results.values()), machine, flags),
    }
    samples: dict[str, NDArray[np.float32]] = {}
    for name, documents in (("image", results["image"]), ("text", results["text"]), ("e2e", whole)):
        samples[f"{name}_ms"] = np.array([ms for each in documents for ms in each["samples_ms"]], np.float32)
        lengths = [len(each["samples_ms"]) for each in documents]
        samples[f"{name}_process"] = np.repeat(np.arange(len(documents)), lengths).astype(np.float32)
    return Profile(document, samples)
