"""How fast and how big an exported model is on this machine, and how sure we are.

Every number comes from `runner.py` in fresh processes.  Image and text tower take turns, so that drift of the machine
hits both.  The protocol follows MLPerf's single stream (github.com/mlcommons/inference_policies) and, for repeating
whole processes, Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time" (ISMM 2013).
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.devices.describe import look_at, with_clocks_of
from export.devices.registry import Device
from export.devices.run_runner import runner_here, runner_on
from export.model_folder import tower_files
from export.profiling.inputs import write_inputs
from export.profiling.summary import MAX_OTHER_CPU, grade, images_per_second, process_medians, summarise
from toolchain.errors import ClipkdError, UsageError
from toolchain.progress import Progress, no_progress


class Effort(NamedTuple):
    """How long a model is measured."""

    processes: int = 3
    """Fresh processes for each tower."""

    seconds: float = 1.0
    """Measured time of each tower at batch 1, shared among its processes."""


QUICK = Effort(3, 6.0)
"""A first look: 2 s in each of three processes."""

STANDARD = Effort(5, 60.0)
"""The interval of five medians reaches from the least to the greatest: those of two equal models are disjoint in 1 of
126 pairs, where with three processes it is 1 of 10.  In 60 s a tower of up to 90 ms has the samples of a p99."""

SWEEP = (2, 4, 8, 16, 32)
"""Batches beside 1, for throughput."""


@dataclass(frozen=True)
class Profile:
    """What one exported model takes."""

    document: dict[str, Any]
    """The content of profile.json."""

    samples: dict[str, NDArray[np.float32]]
    """Every latency measured, in order: `image_ms`, `text_ms`, `e2e_ms`, and for each `..._process`, whose it was."""


def profile(
    folder: Path,
    *,
    processes: int = 3,
    seconds: float = 1.0,
    threads: int | None = None,
    device: str = "cpu",
    on: Device | None = None,
    engines: Path | None = None,
    compiled: bool = False,
    progress: Progress = no_progress,
) -> Profile:
    """Latencies at batch 1 with inputs resident, throughput, memory, size and a grade, of one model.

    `on`, `device` and `compiled` as `profile_together`.  `engines` are the TensorRT engines of a kit, built where it is
    measured.

    Raises:
        ArtifactError: the folder lacks a file.
        ClipkdError: a runner crashed, hung, or could not run the graph.
        UnavailableBackend, MissingDependency: the device is not there, the runtime not installed.
    """
    settings: dict[str, Any] = {"processes": processes, "seconds": seconds, "threads": threads, "device": device}
    (found,) = profile_together(
        [folder],
        **settings,
        on=on,
        engines={folder: engines} if engines else {},
        compiled=compiled,
        progress=progress,
    )
    if isinstance(found, ClipkdError):
        raise found
    return found


def profile_together(
    folders: Sequence[Path],
    *,
    processes: int = 3,
    seconds: float = 1.0,
    threads: int | None = None,
    device: str = "cpu",
    on: Device | None = None,
    engines: Mapping[Path, Path] = MappingProxyType({}),
    compiled: bool = False,
    sweep: Sequence[int] = SWEEP,
    spin_ms: Sequence[float] = (),
    progress: Progress = no_progress,
) -> list[Profile | ClipkdError]:
    """Profiles of several models whose processes take turns, so that drift of the machine hits all; or why not.

    `seconds` is what each tower is measured for at batch 1, shared among the processes; the whole path and each larger
    batch take a quarter of it each.  `p50_ms` is the median over processes of the medians of their samples,
    `p50_low_ms` and `p50_high_ms` its 95 % bootstrap interval over processes; `p90_ms` and `p99_ms` are of all samples
    and None below their floors.  `e2e_p50_ms` is a JPEG's bytes to its class, `e2e_stages_ms` the medians of its
    stages: decoding, preprocessing, image tower, features @ class matrix and top-1.  `images_per_s` and `texts_per_s`
    are the best over the batches tried, `sweep` the former by batch.  `peak_memory_bytes` is the greater of the towers'
    processes, without the larger batches.  `load_ms` and `first_ms` are cold: of a process that has just begun.

    Grade A: clocks locked, no flags.  B: no flags.  C: a flag (UNSTABLE, UNSTEADY: a warm-up that never settled, BUSY,
    SINGLE: one process has no interval).  `to_lock_clocks` are the commands that would make an A possible; clipkd never
    runs them.  Whether those of a GPU or NPU are locked is not known, and counts as no.  `on` is a machine reached by
    ssh, and `device` one of its; None is this machine.  `engines` are those of TensorRT kits.  `call` is the same in
    the documents of models whose processes took turns.  A folder may be a checkpoint of a run, which is timed in
    PyTorch on this machine's CPU, eager or `compiled` by torch.compile, with the samples of its exported model.
    `spin_ms` wastes time in every query of a model, for checks of this protocol.
    """
    if processes < 1 or not seconds > 0:
        raise UsageError(f"profile: expected at least one process and some time, got {processes} and {seconds} s")
    run = runner_here if on is None else partial(runner_on, on)
    machine, others = look_at(on)
    threads = threads or machine["usable_cores"]
    next(others)  # starts watching; meanwhile the inputs are made
    results: list[dict[str, list[dict[str, Any]]]] = [{"image": [], "text": []} for _ in folders]
    failures: dict[int, ClipkdError] = {}
    with tempfile.TemporaryDirectory(prefix="clipkd-profile-") as scratch:
        commands: dict[tuple[int, str], list[str]] = {}
        for place, folder in enumerate(folders):
            try:
                staged = write_inputs(
                    folder,
                    Path(scratch) / str(place),
                    seconds / processes,
                    threads,
                    device,
                    engines.get(folder),
                    compiled,
                    sweep,
                )
            except ClipkdError as error:
                failures[place] = error
                continue
            spin = ["--spin-ms", f"{spin_ms[place]:g}"] if spin_ms and spin_ms[place] else []
            commands |= {(place, tower): [*arguments, *spin] for tower, arguments in staged.items()}
        busy_share = next(others)
        done = 0
        for turn in range(processes):
            order = list(commands)[:: -1 if turn % 2 else 1]  # no one always runs on what the same other heated
            for place, tower in order:
                if place not in failures:
                    try:
                        results[place][tower].append(run(folders[place], tower, commands[place, tower]))
                    except ClipkdError as error:
                        failures[place] = error
                done += 1
                progress("timing", done, processes * len(commands))
    flags = ["BUSY"] if busy_share is not None and busy_share > MAX_OTHER_CPU else []
    name, call = device if on is None else on.name, secrets.token_hex(8)
    return [
        failures.get(place)
        or _profile_of(
            tower_files(folder, engines.get(folder)),
            results[place],
            with_clocks_of("cuda" if folder in engines else device.partition(":")[0], machine),
            threads,
            name,
            flags,
            call,
        )
        for place, folder in enumerate(folders)
    ]


def _profile_of(
    files: Mapping[str, Path],
    results: dict[str, list[dict[str, Any]]],
    machine: dict[str, Any],
    threads: int,
    device: str,
    flags: Sequence[str],
    call: str,
) -> Profile:
    image, text = summarise(results["image"]), summarise(results["text"])
    sweep, text_sweep = images_per_second(results["image"]), images_per_second(results["text"])
    whole = [result["e2e"] for result in results["image"] if "e2e" in result]  # none of a model without classes
    document = {
        "call": call,
        "device": device,
        "machine": {key: machine[key] for key in machine if key != "to_lock_clocks"} | results["image"][0]["versions"],
        "threads": threads,
        "batch": 1,
        "image": image | {"images_per_s": max(sweep.values())},
        "text": text | {"texts_per_s": max(text_sweep.values())},
        "e2e_p50_ms": statistics.median(process_medians(whole)) if whole else None,
        "e2e_stages_ms": {
            stage: statistics.median(result["stages_ms"][stage] for result in whole)
            for stage in (whole[0]["stages_ms"] if whole else ())
        },
        "images_per_s": max(sweep.values()),
        "sweep": sweep,
        "peak_memory_bytes": max(result["peak_rss_bytes"] for result in [*results["image"], *results["text"]]),
        "size_bytes": sum(path.stat().st_size for path in set(files.values())),
        "to_lock_clocks": [] if machine["clocks_locked"] else machine["to_lock_clocks"],
        **grade(list(results.values()), machine, flags),
    }
    samples: dict[str, NDArray[np.float32]] = {}
    for name, documents in (("image", results["image"]), ("text", results["text"]), ("e2e", whole)):
        samples[f"{name}_ms"] = np.array([ms for each in documents for ms in each["samples_ms"]], np.float32)
        lengths = [len(each["samples_ms"]) for each in documents]
        samples[f"{name}_process"] = np.repeat(np.arange(len(documents)), lengths).astype(np.float32)
    return Profile(document, samples)
