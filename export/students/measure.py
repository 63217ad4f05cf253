"""Measure the latency of candidate students on a device before any of them is trained.

Latency does not depend on weights, so a model that is too slow can be ruled out before it is trained.  Every
candidate's image tower is built here with random weights, exported, and timed on its device in fresh, interleaved
processes.  Each result is stored per device as soon as it is known, so that a second call only prints the results and
an interrupted call resumes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from export.devices.describe import add_clocks, describe_device
from export.devices.doctor import require
from export.devices.documents import Machine, RunnerDocument
from export.devices.registry import Device
from export.profiling.interleaved import Job, look_before, time_in_turns
from export.profiling.summary import grade, summarise
from export.students.candidates import Candidate
from export.students.documents import GraphFacts, MeasuredStudent, StudentRow, Timing, Worth, is_measured
from toolchain.errors import ClipkdError, MissingDependency, UsageError
from toolchain.filesystem import hold_lock, user_cache_folder, write_json
from toolchain.precisions import PRECISIONS, SAFEST_FIRST
from toolchain.progress import Progress, no_progress
from toolchain.provenance import versions
from toolchain.report.pareto import pareto_front
from toolchain.runtimes import RUNTIMES, choose_runtime

STUDENT_PRECISIONS = tuple(name for name in SAFEST_FIRST if PRECISIONS[name].color is not None)
STUDENT_RUNTIMES = tuple(name for name, runtime in RUNTIMES.items() if not runtime.is_kit)
PROCESSES, SECONDS = 3, 1.0
"""The quick protocol: fresh processes for each candidate, and measured time in each."""

WORTH: tuple[Worth, ...] = ("params_image", "gmacs", "published_fp32_top1")
"""Metrics of the Pareto fronts: a slower student is on a front only if it is better in the metric."""

_FORMAT = 4
_NUM_CALIBRATION = 8
_OPSET = 20
_MIN_INPUTS, _INPUT_BYTES = 8, 16 << 20  # the inputs add to the measured memory

Pair = tuple[Candidate, str]  # a candidate and a precision


@dataclass(frozen=True)
class _Bench:
    """Device, runtime and effort with which graphs are timed."""

    device: str
    on: Device | None
    """The device if it is reached by ssh; None: this machine."""

    runtime: str
    threads: int | None
    seconds: float


class _State(TypedDict, total=False):
    """State of a pair: `row` when finished; `facts` and `documents` while processes are missing; `status` if failed."""

    row: Timing
    facts: GraphFacts
    documents: list[RunnerDocument]
    status: str
    """Why it could not be measured; not stored, so that a later call tries again."""


def measure_students(
    wanted: Sequence[Candidate],
    precisions: Sequence[str],
    *,
    device: Device | str = "cpu",
    runtime: str | None = None,
    threads: int | None = None,
    seconds: float = SECONDS,
    progress: Progress = no_progress,
) -> list[StudentRow]:
    """Return a row per candidate and precision, fastest first.

    `device` is a device reached by ssh, or the name of one of this machine.  `runtime` defaults to ONNX Runtime, and to
    OpenVINO on devices that only OpenVINO supports; `threads` defaults to all usable cores.

    Rows are stored in the user's cache folder, by device, versions and protocol; only missing rows are measured.
    A graph is stored there too until it is timed.

    Raises:
        UsageError: a candidate is not a known architecture, or the runtime has no such device.
        MissingDependency: the runtime is not installed on the device, or the exporter is not installed here.
        UnavailableBackend: the device is not there.
        ArtifactError: another clipkd process is measuring with the same device and options.
    """
    on = device if isinstance(device, Device) else None
    name = device.name if isinstance(device, Device) else device
    bench = _Bench(name, on, runtime or choose_runtime("cpu" if on else name), threads, seconds)
    key = {
        "format": _FORMAT,
        "machine": describe_device(on),
        "runtime": require(bench.runtime, device),
        "versions": versions(),
        "threads": threads,
        "seconds": seconds,
        "processes": PROCESSES,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = user_cache_folder() / "students" / _file_name(f"{name}-{bench.runtime}-{digest[:12]}")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(candidate, precision) for candidate in wanted for precision in precisions]
    with hold_lock(folder / ".lock", f"{folder}: another clipkd measures students on {name}; wait for it"):
        states = {pair: _read_state(folder, pair) for pair in pairs}
        _build(states, bench.runtime, folder, progress)
        _time(states, folder, bench, progress)
    rows = [_row(pair, state, bench) for pair, state in states.items()]
    measured = [row for row in rows if is_measured(row)]
    _mark_fronts(measured)
    failed = [row for row in rows if not is_measured(row)]
    return [
        *sorted(measured, key=lambda row: (row["p50_ms"], row["name"])),
        *sorted(failed, key=lambda row: row["name"]),
    ]


def _row(pair: Pair, state: _State, bench: _Bench) -> StudentRow:
    candidate, precision = pair
    row = {
        "name": candidate.model,
        "precision": precision,
        "device": bench.device,
        "runtime": bench.runtime,
        **(state["row"] if "row" in state else {"status": state["status"]}),
        "published_fp32_top1": candidate.published_top1,
        "source": candidate.source,
        "weights": candidate.weights,
        "licence": candidate.licence,
        "front": [],
    }
    return cast(StudentRow, row)


def _mark_fronts(rows: Sequence[MeasuredStudent]) -> None:
    """Fill in `front` among the rows of each precision; precisions share one published value, so they do not mix."""
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for field in WORTH:
            of_it = [row for row in rows if row["precision"] == precision]
            worths = [(row, value) for row in of_it if (value := row[field]) is not None]
            points = [(row["p50_ms"], value) for row, value in worths]
            for (row, _), on_front in zip(worths, pareto_front(points), strict=True):
                row["front"] += [field] if on_front else []


def _build(states: dict[Pair, _State], runtime: str, folder: Path, progress: Progress) -> None:
    """Write the graphs of the pairs without a state, and store their facts; put a failure into `status`."""
    unknown = [pair for pair, state in states.items() if not state]
    for done, pair in enumerate(unknown):
        progress("building", done, len(unknown), " ".join((pair[0].model, pair[1])))
        try:
            facts = _build_graph(*pair, runtime, folder / f"{_stem(pair)}.onnx")
        except (UsageError, MissingDependency, OSError):
            raise  # unknown architecture, missing NNCF, full disk: these would fail for every pair
        except ClipkdError as error:
            states[pair] = {"status": str(error)}
        except Exception as error:  # torch, timm and exporters raise any type for an unsupported architecture
            states[pair] = {"status": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        else:
            states[pair] = {"facts": facts, "documents": []}
            _write_state(folder, pair, states[pair])


def _time(states: dict[Pair, _State], folder: Path, bench: _Bench, progress: Progress) -> None:
    """Time the built graphs in interleaved processes; turn each finished one into a row and delete its graph."""
    built = [pair for pair, state in states.items() if "documents" in state]
    if not built:
        return

    def prepare(machine: Machine) -> list[Job]:
        return [
            _job(number, pair, states[pair], folder, bench, bench.threads or machine["usable_cores"])
            for number, pair in enumerate(built)
        ]

    machine, flags, jobs = look_before(bench.on, prepare)
    machine = add_clocks("cpu" if bench.on is not None else bench.device.partition(":")[0], machine)
    for job, found in time_in_turns(jobs, bench.on, PROCESSES, progress):
        pair = built[job.model]
        if isinstance(found, MissingDependency):
            raise found
        if isinstance(found, ClipkdError):
            describe_device(bench.on)  # raises if the device itself cannot be reached
            states[pair] = {"status": str(found)}
            continue
        facts, documents = states[pair]["facts"], [*states[pair]["documents"], found]
        if len(documents) < PROCESSES:
            states[pair] = {"facts": facts, "documents": documents}
        else:
            timing: Timing = {
                "status": "ok",
                **facts,
                **summarise(documents),
                "peak_memory_bytes": max(document["peak_rss_bytes"] for document in documents),
                "threads": bench.threads or machine["usable_cores"],
                **grade([documents], machine, flags),
            }
            states[pair] = {"row": timing}
            (folder / f"{_stem(pair)}.onnx").unlink()
        _write_state(folder, pair, states[pair])
    for inputs in folder.glob("inputs-*.npy"):
        inputs.unlink()


def _job(number: int, pair: Pair, state: _State, folder: Path, bench: _Bench, threads: int) -> Job:
    """Write the inputs of a pair's graph into the folder, and return the job that times the graph."""
    (candidate, precision), size = pair, state["facts"]["image_size"]
    graph, inputs = folder / f"{_stem(pair)}.onnx", folder / f"inputs-{size}.npy"
    if not inputs.is_file():
        count = max(_MIN_INPUTS, _INPUT_BYTES // (3 * size * size * 4))
        np.save(inputs, np.random.default_rng(0).standard_normal((count, 3, size, size), np.float32))
    words = ["--model", str(graph), "--input", "pixel_values", "--dtype", "float32", "--shape", f"1,3,{size},{size}"]
    words += ["--runtime", bench.runtime, "--precision", precision, "--threads", str(threads)]
    words += ["--device", bench.device if bench.on is None else "cpu"]
    words += ["--min-seconds", f"{bench.seconds:g}", "--max-warm-up", f"{bench.seconds:g}", "--inputs", str(inputs)]
    title = f"{candidate.model} {precision}"
    return Job(number, folder, _stem(pair), words, title, len(state["documents"]), once=[graph])


def _build_graph(candidate: Candidate, precision: str, runtime: str, path: Path) -> GraphFacts:
    """Write the graph of an image tower with random weights for a runtime; return the facts that need no run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.graphs.onnx_graph import write_graph
    from export.graphs.precision import prepare_tower
    from toolchain.models.build import build_model
    from toolchain.models.towers import ImageTower, example_pixels, num_parameters, without_attention_fast_path
    from toolchain.quantization.quantize import int8_image_tower
    from toolchain.recipe.model import ModelSpec
    from toolchain.recipe.model_names import resolve_model

    spec = resolve_model(ModelSpec(model=candidate.model, init="random"), Path(), "student")
    model = build_model(spec, seed=0)
    pixels = example_pixels(model.net).float().cpu()
    with torch.no_grad(), without_attention_fast_path():
        tower = prepare_tower(ImageTower(model.net).eval(), pixels, "fp32").requires_grad_(False)  # needed for counting
        with FlopCounterMode(display=False) as counter:
            tower(pixels[:1])
        if PRECISIONS[precision].is_quantized:  # calibrated on noise: the ranges are wrong, but latency is the same
            random = torch.Generator().manual_seed(0)
            noise = torch.randn(_NUM_CALIBRATION, *pixels.shape[1:], generator=random)
            tower = int8_image_tower(model.net, noise, round_outputs=RUNTIMES[runtime].rounds_outputs)
        elif precision != "fp32":
            tower = prepare_tower(ImageTower(model.net).eval(), pixels, precision)
        opset = max(_OPSET, PRECISIONS[precision].min_opset)
        write_graph(tower, pixels, path, names_io=("pixel_values", "image_features"), opset=opset, metadata={})
    params_image, params_text = num_parameters(model.net)
    return {
        "params_image": params_image,
        "params_text": params_text,
        "gmacs": round(counter.get_total_flops() / 2e9, 3),
        "image_size": pixels.shape[-1],
        "size_bytes": path.stat().st_size,
    }


def _stem(pair: Pair) -> str:
    return _file_name(f"{pair[0].model}-{pair[1]}")


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in text)


def _read_state(folder: Path, pair: Pair) -> _State:
    """Return the state of a pair that an earlier call stored, empty if there is none."""
    try:
        saved = json.loads((folder / f"{_stem(pair)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a missing or corrupt file is measured again
        return {}
    if saved.pop("model", None) != pair[0].model:  # another model whose name maps to the same file name
        return {}
    is_of_use = "row" in saved or (folder / f"{_stem(pair)}.onnx").is_file()
    return cast(_State, saved) if is_of_use else {}


def _write_state(folder: Path, pair: Pair, state: _State) -> None:
    write_json(folder / f"{_stem(pair)}.json", {"model": pair[0].model, **state})
