"""How fast and how big an exported model is on this machine, and how sure we are.

Every number comes from `runner.py` in fresh processes.  Image and text tower take turns, so that drift of the machine
hits both.  The protocol follows MLPerf's single stream (github.com/mlcommons/inference_policies) and, for repeating
whole processes, Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time" (ISMM 2013).
"""

from __future__ import annotations

import io
import itertools
import json
import re
import secrets
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.devices import Device
from export.machine import describe_machine, other_cpu_share
from export.probes import cpp_compiler
from export.remote import TimedOut, by_hand, carry, run_on
from export.runner import preprocess_image
from toolchain.errors import ArtifactError, ClipkdError, MissingDependency, UnavailableBackend, UsageError
from toolchain.latencies import told_apart
from toolchain.sources import CONFIG, WEIGHTS

Progress = Callable[[str, int, int], None]


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

MIN_SAMPLES_P90, MIN_SAMPLES_P99 = 64, 662
"""Fewer samples cannot bound a percentile at 99 % confidence: that at most one of them lies above it is then likelier
than 1 % (MLPerf's early stopping)."""

MAX_CV = 0.05
"""Coefficient of variation of the processes' medians past which a measurement is UNSTABLE."""

MAX_OTHER_CPU = 0.25
"""Share of the machine's CPU time that other programs may take before a measurement is BUSY."""

SWEEP = (2, 4, 8, 16, 32)
"""Batches beside 1, for throughput."""

_NUM_INPUTS, _MIN_INPUTS, _MAX_INPUT_BYTES = 64, 8, 16 << 20  # inputs lie in the memory that is being measured
_LOOK_AROUND_S = 2.0  # how long other programs are watched before the start
_TIMEOUT_S = 600.0  # a runner that takes longer than this, and _TIMES what it was to measure for, hangs
_TIMES = 6  # warm-up and measurement, and a quarter of both for the whole path and each of the larger batches
_STDERR_LINES = 8
_REASON_CHARACTERS = 100  # in the table; the whole of it is the error's
_RESAMPLES = 2000
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|bad_alloc|ALLOC_FAILED|MemoryAllocation|out ?of ?memory|fail\w* to allocate", re.I
)
_KILLED = {"SIGKILL": " (a machine that runs out of memory ends a process so)"}
_GPU_CLOCKS = ("sudo nvidia-smi -pm 1", "sudo nvidia-smi -lgc F,F  # F in MHz: nvidia-smi -q -d SUPPORTED_CLOCKS")
_STATUS = {error.exit_code: error for error in (MissingDependency, UnavailableBackend)}
_RUNNER = Path(__file__).with_name("runner.py")
_MACHINE = Path(__file__).with_name("machine.py")
_PATHS = frozenset({"--model", "--graph", "--inputs", "--images", "--classes", "--preprocess"})  # the runner's


class Finished(Protocol):
    """How a runner ended, here or elsewhere."""

    @property
    def returncode(self) -> int: ...

    @property
    def stdout(self) -> str: ...

    @property
    def stderr(self) -> str: ...


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
    on_progress: Progress | None = None,
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
        on_progress=on_progress,
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
    on_progress: Progress | None = None,
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
                staged = _stage(
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
                if on_progress is not None:
                    on_progress("timing", done, processes * len(commands))
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


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the printed table of rows with `model` and `status`, and a profile where that is `ok`.

    Times are milliseconds to three digits; a percentile of too few samples says how few.
    """
    headers = ["model", "p50 ms [95 %]", "p90 ms", "p99 ms", "text\np50 ms", "end to\nend ms"]
    headers += ["images/s\n(batch)", "load,\nfirst ms", "peak\nMB", "grade"]
    timed = [row for row in rows if row["status"] == "ok"]
    headers += ["p50 to\nthe first"] if len(timed) > 1 else []
    all_ok = all(row["status"] == "ok" for row in rows)
    names = [Path(row["model"]).name for row in rows]
    if len(set(names)) < len(names):
        names = [row["model"] for row in rows]
    cells = [
        [*_cells(row), *([_against(timed[0], row)] if len(timed) > 1 else [])]
        if row["status"] == "ok"
        else ["-"] * (len(headers) - 1)
        for row in rows
    ]
    status = [[] if all_ok else [_reason(row)] for row in rows]
    return headers + ([] if all_ok else ["status"]), [
        [name, *measured, *said] for name, measured, said in zip(names, cells, status, strict=True)
    ]


def _reason(row: Mapping[str, Any]) -> str:
    """The beginning of a status, without what the row says already."""
    said: str = row["status"].partition("\n")[0].removeprefix(row["model"]).lstrip("/: ")
    return said if len(said) <= _REASON_CHARACTERS else f"{said[:_REASON_CHARACTERS]}…"


def _cells(found: Mapping[str, Any]) -> list[str]:
    image, sweep = found["image"], found["sweep"]
    floors = {"p90_ms": MIN_SAMPLES_P90, "p99_ms": MIN_SAMPLES_P99}
    return [
        f"{_ms(image['p50_ms'])} [{_ms(image['p50_low_ms'])}, {_ms(image['p50_high_ms'])}]",
        *(f"n<{floor}" if image[key] is None else _ms(image[key]) for key, floor in floors.items()),
        _ms(found["text"]["p50_ms"]),
        "-" if found["e2e_p50_ms"] is None else _ms(found["e2e_p50_ms"]),
        f"{found['images_per_s']:,.0f} ({max(sweep, key=sweep.__getitem__)})",
        f"{_ms(image['load_ms'])}, {_ms(image['first_ms'])}",
        f"{found['peak_memory_bytes'] / 1e6:,.0f}",
        " ".join([found["grade"], *found["flags"]]),
    ]


def _against(first: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The ratio of their p50, and whether it may be chance."""
    if row is first:
        return "-"
    ours, theirs = row["image"], first["image"]
    in_turns = row.get("call") == first.get("call") is not None
    apart = told_apart(theirs["p50_by_process_ms"], ours["p50_by_process_ms"], in_turns=in_turns)
    return f"{ours['p50_ms'] / theirs['p50_ms']:.2f}{'' if apart else ' (may be chance)'}"


def _ms(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def tower_files(folder: Path, engines: Path | None) -> dict[str, Path]:
    """What is opened of each tower; a checkpoint is one file."""
    if is_checkpoint(folder):
        return dict.fromkeys(("image", "text"), folder / WEIGHTS)
    where, suffix = (folder, "onnx") if engines is None else (engines, "engine")
    return {tower: where / f"{tower}.{suffix}" for tower in ("image", "text")}


def with_clocks_of(kind: str, machine: dict[str, Any]) -> dict[str, Any]:
    """The machine, its clocks being those of the CPU and of the kind of device that computes."""
    is_jetson = "sudo jetson_clocks" in machine["to_lock_clocks"]  # which locks the GPU's as well
    if kind == "cpu" or is_jetson:
        return machine
    of_cpu = [] if machine["clocks_locked"] else machine["to_lock_clocks"]
    return machine | {
        "clocks_locked": False,
        "to_lock_clocks": [*of_cpu, *(_GPU_CLOCKS if kind == "cuda" else ())],
    }


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
    sweep, text_sweep = _rates(results["image"]), _rates(results["text"])
    whole = [result["e2e"] for result in results["image"] if "e2e" in result]  # none of a model without classes
    document = {
        "call": call,
        "device": device,
        "machine": {key: machine[key] for key in machine if key != "to_lock_clocks"} | results["image"][0]["versions"],
        "threads": threads,
        "batch": 1,
        "image": image | {"images_per_s": max(sweep.values())},
        "text": text | {"texts_per_s": max(text_sweep.values())},
        "e2e_p50_ms": statistics.median(_medians(whole)) if whole else None,
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


def grade(
    towers: Sequence[Sequence[dict[str, Any]]], machine: Mapping[str, Any], flags: Sequence[str]
) -> dict[str, Any]:
    """`grade` and `flags` of a measurement, from the runner's documents of each tower and flags raised already."""
    raised = list(flags)
    if not all(result["steady"] for results in towers for result in results):
        raised.insert(0, "UNSTEADY")
    if any(_cv(_medians(results)) > MAX_CV for results in towers):
        raised.insert(0, "UNSTABLE")
    if any(len(results) == 1 for results in towers):
        raised.append("SINGLE")
    return {"grade": "C" if raised else "A" if machine["clocks_locked"] else "B", "flags": raised}


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Latency of one tower from the runner's documents, one per process; times in milliseconds."""
    medians = _medians(results)
    low_ms, high_ms = bootstrap_interval(medians)
    pooled = np.concatenate([result["samples_ms"] for result in results])
    return {
        "p50_ms": statistics.median(medians),
        "p50_low_ms": low_ms,
        "p50_high_ms": high_ms,
        "p90_ms": float(np.percentile(pooled, 90)) if len(pooled) >= MIN_SAMPLES_P90 else None,
        "p99_ms": float(np.percentile(pooled, 99)) if len(pooled) >= MIN_SAMPLES_P99 else None,
        "n": len(pooled),
        "processes": len(results),
        "p50_by_process_ms": medians,
        "load_ms": statistics.median(result["load_ms"] for result in results),
        "first_ms": statistics.median(result["first_ms"] for result in results),
    }


def bootstrap_interval(medians: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the median, resampling processes; every resample once where there are few."""
    n = len(medians)
    if n**n <= _RESAMPLES:
        resamples = np.array(list(itertools.product(medians, repeat=n)))
    else:
        resamples = np.random.default_rng(0).choice(np.asarray(medians), (_RESAMPLES, n))
    low, high = np.percentile(np.median(resamples, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _medians(results: Sequence[dict[str, Any]]) -> list[float]:
    return [statistics.median(result["samples_ms"]) for result in results]


def _cv(values: Sequence[float]) -> float:
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def _rates(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Samples per second by batch: of each the median over processes of the median time."""
    rates = {"1": 1000 / statistics.median(_medians(results))}
    for batch in sorted(set.intersection(*(set(result["batches"]) for result in results)), key=int):
        typical_ms = statistics.median(_medians([result["batches"][batch] for result in results]))
        rates[batch] = int(batch) * 1000 / typical_ms
    return rates


def _stage(
    folder: Path,
    scratch: Path,
    seconds: float,
    threads: int,
    device: str,
    engines: Path | None,
    compiled: bool,
    sweep: Sequence[int],
) -> dict[str, list[str]]:
    """The runner's arguments per tower, its inputs (real images and captions of parity.npz) written to `scratch`."""
    is_reference = is_checkpoint(folder)
    if is_reference and device != "cpu":
        raise UsageError(
            f"{folder}: a checkpoint is timed in PyTorch on the CPU, not on {device}; name an export of it"
        )
    if is_reference and compiled:
        require_compiler()
    exported = exported_of(folder) if is_reference else folder
    for name in ("image.onnx", "text.onnx", "preprocess.json", "classes.npz", "parity.npz"):
        if not (exported / name).is_file():
            raise ArtifactError(
                f"{exported / name}: missing; profiling needs it. Export again: clipkd export RUN --onnx"
            )
    scratch.mkdir(exist_ok=True)
    image_spec = json.loads((exported / "preprocess.json").read_text(encoding="utf-8"))["image"]
    with np.load(exported / "parity.npz") as samples:
        pixels_BHWC, input_ids_BT = samples["pixels_BHWC"][:_NUM_INPUTS], samples["input_ids_BT"][:_NUM_INPUTS]
    pictures = [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
    values_CHW = preprocess_image(pictures[0], image_spec)
    count = max(_MIN_INPUTS, _MAX_INPUT_BYTES // values_CHW.nbytes)
    np.save(scratch / "image.npy", np.stack([preprocess_image(picture, image_spec) for picture in pictures[:count]]))
    np.save(scratch / "text.npy", input_ids_BT)
    (scratch / "images").mkdir()
    for index, picture in enumerate(pictures):
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=95)
        (scratch / "images" / f"{index:03}.jpg").write_bytes(encoded.getvalue())
    shared = ["--threads", str(threads), "--min-seconds", f"{seconds:g}", "--max-warm-up", f"{seconds:g}"]
    shared += [
        *(_reference_words(compiled) if is_reference else runtime_words(folder) if engines is None else ()),
        "--device",
        device,
        *(("--batches", ",".join(map(str, sweep))) if sweep else ()),
    ]
    whole_path = ["--images", str(scratch / "images"), "--classes", str(exported / "classes.npz")]
    whole_path += ["--preprocess", str(exported / "preprocess.json")]
    with np.load(exported / "classes.npz") as classes:
        has_classes = len(classes["names"]) > 0  # a headline set of captions has none

    def arguments(tower: str, input_name: str, dtype: str, shape: tuple[int, ...]) -> list[str]:
        graph = ["--model", str(tower_files(folder, engines)[tower]), "--input", input_name, "--dtype", dtype]
        graph += ["--graph", str(folder / f"{tower}.onnx")] if engines is not None else []
        query = ["--shape", ",".join(map(str, (1, *shape))), *shared, "--inputs", str(scratch / f"{tower}.npy")]
        return graph + query

    return {
        "image": arguments("image", "pixel_values", "float32", values_CHW.shape) + (whole_path if has_classes else []),
        "text": arguments("text", "input_ids", "int64", input_ids_BT.shape[1:]),
    }


def is_checkpoint(model: Path) -> bool:
    """Whether a directory is a checkpoint's, which runs in PyTorch, and not an exported model's.

    Raises:
        UsageError: an int8 checkpoint, which PyTorch cannot run in integers.
    """
    if (model / "nncf.json").is_file():
        raise UsageError(f"{model}: an int8 checkpoint, which is int8 only once exported; name RUN/exported/...-int8")
    return (model / CONFIG).is_file() and not (model / "image.onnx").is_file()


def exported_of(checkpoint: Path) -> Path:
    """The exported model of a run's checkpoint, in fp32 if there is one: their samples and preprocessing are the same.

    Raises:
        UsageError: there is none.
    """
    made = [path.parent for path in checkpoint.parent.glob(f"exported/{checkpoint.name}-*/parity.npz")]
    if not made:
        raise UsageError(
            f"{checkpoint}: a checkpoint is timed with the samples of its exported model, and there is no "
            f"{checkpoint.parent / 'exported' / checkpoint.name}-*. "
            f"Export it first: clipkd export {checkpoint.parent} --onnx --precision fp32"
        )
    return min(made, key=lambda path: (not path.name.endswith("-fp32"), path.name))


def require_compiler() -> None:
    """Know that torch.compile can compile, before it is begun.

    Raises:
        MissingDependency: the C++ compiler that torch would call is not there.
    """
    compiler = cpp_compiler()[0]
    if shutil.which(compiler) is None:
        raise MissingDependency(
            f"torch.compile needs a C++ compiler, and there is no {compiler} on the PATH. Install it with: "
            "sudo apt-get install g++, or set profile.pytorch=[eager]"
        )


def _reference_words(compiled: bool) -> list[str]:
    return ["--runtime", "pytorch", *(["--compiled"] if compiled else [])]


def runtime_words(folder: Path) -> list[str]:
    """The runner's arguments that say how the manifest would have the graphs opened."""
    manifest = folder / "manifest.json"
    summary = json.loads(manifest.read_text(encoding="utf-8"))["summary"] if manifest.is_file() else {}
    named = {name: summary[name] for name in ("runtime", "precision") if name in summary}
    return [part for name, value in named.items() for part in (f"--{name}", value)]


def runner_here(folder: Path, tower: str, arguments: list[str]) -> dict[str, Any]:
    """The runner's document; whatever ends it otherwise becomes an error of this process, never its own end.

    Raises:
        ClipkdError, UnavailableBackend, MissingDependency: it crashed or hung; the device, the runtime is not there.
    """
    command, timeout_s = [sys.executable, str(_RUNNER), *arguments], _timeout_s(arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        stderr = error.stderr or b""
        raise _failure(folder, tower, f"took longer than {timeout_s:g} s", stderr, command) from None
    return _document(folder, tower, done, command)


def runner_on(
    device: Device, folder: Path, tower: str, arguments: list[str], *, once: Sequence[Path] = ()
) -> dict[str, Any]:
    """The document of the runner on a device, to which the files that its arguments name are copied.

    Raises:
        ClipkdError: it crashed, hung, or failed; and as `export.remote.run_on`.
        MissingDependency: the device lacks numpy or the runtime.
    """
    named = [Path(word) if before in _PATHS else word for before, word in itertools.pairwise(["", *arguments])]
    files, words = carry(named)
    try:
        done = run_on(
            device, {**files, _RUNNER.name: _RUNNER}, _RUNNER.name, words, timeout_s=_timeout_s(arguments), once=once
        )
    except TimedOut as error:
        raise ClipkdError(f"{folder / tower}.onnx: on {error}") from None
    if done.returncode > 0 and "No module named" in done.stderr:
        last = done.stderr.strip().splitlines()[-1]
        runtime = arguments[arguments.index("--runtime") + 1] if "--runtime" in arguments else "onnxruntime"
        raise MissingDependency(
            f"{device.name}: {last.removeprefix('ModuleNotFoundError: ')}. Install it there: "
            + by_hand(device, device.python, "-m", "pip", "install", "numpy", runtime, "pillow")
        )
    return _document(folder, tower, done, [sys.executable, str(_RUNNER), *arguments])


def _timeout_s(arguments: Sequence[str]) -> float:
    named = dict(itertools.pairwise(arguments))
    return _TIMEOUT_S + _TIMES * float(named.get("--min-seconds", 0))


def look_at(on: Device | None) -> tuple[dict[str, Any], Iterator[float | None]]:
    """A machine, None for this one, and, as `other_cpu_share`, the share of its CPU time that other programs take."""
    if on is None:
        return describe_machine(), other_cpu_share(_LOOK_AROUND_S)
    document = _describe(on, _LOOK_AROUND_S)
    return document["machine"], iter([None, document["other_cpu_share"]])


def describe_device(device: Device | None) -> dict[str, Any]:
    """What of a device reached by ssh, or of this machine, stays the same from one measurement to the next."""
    machine = describe_machine() if device is None else _describe(device, 0.0)["machine"]
    where = {} if device is None else {"destination": device.destination}
    return {**where, **{key: machine[key] for key in ("name", "architecture", "cpu_quota")}}


def _describe(device: Device, watch_seconds: float) -> dict[str, Any]:
    words = ["--watch-seconds", f"{watch_seconds:g}"]
    done = run_on(device, {_MACHINE.name: _MACHINE}, _MACHINE.name, words, timeout_s=_TIMEOUT_S)
    if done.returncode:
        raise ClipkdError(f"{device.name}: it could not be described:\n{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _document(folder: Path, tower: str, done: Finished, command: list[str]) -> dict[str, Any]:
    if done.returncode in _STATUS:
        raise _STATUS[done.returncode](f"{_tower_name(folder, tower)}: {done.stderr.strip()}")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise _failure(folder, tower, f"was killed by {name}{_KILLED.get(name, '')}", done.stderr, command)
    if done.returncode:
        what = "ran out of memory and " if _OUT_OF_MEMORY.search(done.stderr) else ""
        raise _failure(folder, tower, f"{what}exited with status {done.returncode}", done.stderr, command)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _failure(folder: Path, tower: str, what: str, stderr: str | bytes, command: list[str]) -> ClipkdError:
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr
    lines = text.strip().splitlines()[-_STDERR_LINES:] or ["(nothing on stderr)"]
    by_hand = shlex.join(command[: command.index("--inputs")])  # the staged inputs are gone: random ones do
    return ClipkdError(
        f"{_tower_name(folder, tower)}: the process that timed it {what}. Its last words:\n"
        + "\n".join(f"  {line}" for line in lines)
        + f"\nSee for yourself: {by_hand}"
    )


def _tower_name(folder: Path, tower: str) -> str:
    return f"{folder}: {tower} tower" if is_checkpoint(folder) else f"{folder / tower}.onnx"
