"""Which student to train: what candidates take on a device, measured before any of them is trained.

Latency does not depend on weights, so an afternoon of GPU time need not be spent to learn that a model is too slow.
Every candidate's image tower is built with random weights, exported, and timed in fresh processes that take turns.
Results are kept for each machine, so that a second call only prints them.
"""

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from export.machine import describe_machine
from export.profile import grade, summarise
from toolchain.errors import ClipkdError, UsageError
from toolchain.glyphs import user_cache_folder
from toolchain.report import pareto_front

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]

PROCESSES, SECONDS = 3, 2.0
"""The quick protocol: fresh processes for each candidate, and measured time in each."""

_FORMAT = 1
_PACKAGES = ("torch", "timm", "open_clip_torch", "nncf", "onnxruntime-gpu", "onnxruntime")
_RUNNER = Path(__file__).with_name("runner.py")
_TIMEOUT_S = 600.0
_COLORS = {"fp32": "#0072B2", "fp16": "#009E73", "bf16": "#CC79A7", "int8": "#D55E00"}  # Wong, Nature Methods 8


@dataclass(frozen=True)
class Candidate:
    """An architecture, and what somebody reached with it."""

    model: str
    """What a recipe's student.model says."""

    published_top1: float | None = None
    """ImageNet zero-shot, fraction."""

    source: str = ""
    """Trained by whom, on what; arXiv id or document."""


_CLIP_KD = "CLIP-KD from ViT-B/16, CC3M+12M; arXiv:2307.12732"
CANDIDATES = (
    Candidate("mobilenetv3_small", 0.2695, _CLIP_KD),
    Candidate("vit_t_16", 0.426, "CLIP-KD from ViT-B/16 of LAION-400M, on CC3M+12M; arXiv:2307.12732"),
    Candidate("mobilevit_s", 0.3596, _CLIP_KD),
    Candidate("efficientnet_b0", 0.3544, _CLIP_KD),
    Candidate("resnet18", 0.3136, _CLIP_KD),
    Candidate("swin_t", 0.4018, _CLIP_KD),
    Candidate("ViT-S-32"),
    Candidate("ViT-S-16"),
    Candidate("ViT-M-32"),
    Candidate("ViT-B-32", 0.6917, "DataComp-XL; open_clip docs/PRETRAINED.md"),
    Candidate("ViT-B-16", 0.7624, "DFN-2B; open_clip docs/openclip_results.csv"),
    Candidate("RN50", 0.598, "OpenAI; arXiv:2103.00020"),
    Candidate("MobileCLIP2-S0", 0.715, "DFNDR-2B; arXiv:2508.20691"),
    Candidate("MobileCLIP-S1", 0.726, "DataCompDR-1B; arXiv:2311.17049"),
    Candidate("MobileCLIP2-S2", 0.772, "DFNDR-2B; arXiv:2508.20691"),
    Candidate("PE-Core-T-16-384", 0.621, "Meta's 5.4B pairs; arXiv:2504.13181"),
)
"""What `clipkd students` measures unless told."""


def candidates(models: Sequence[str]) -> list[Candidate]:
    """Those named, or all that clipkd knows; a name it does not know is an architecture like any other."""
    known = {candidate.model: candidate for candidate in CANDIDATES}
    return [known.get(model, Candidate(model)) for model in models] or list(CANDIDATES)


def measure_students(
    wanted: Sequence[Candidate],
    precisions: Sequence[str],
    *,
    threads: int | None = None,
    seconds: float = SECONDS,
    progress: Progress = lambda what, done, total: None,
) -> list[Row]:
    """A row per candidate and precision, the fastest first.

    A row has `name`, `precision`, `runtime`, `params_image`, `gmacs` (of one image), `image_size`, `size_bytes`, the
    latency fields of report.json, `grade`, `flags`, `status` (`ok`, or why it could not be built, exported or run),
    `published_top1` and its `source`, and `front`: nothing else is both faster and, as published, more accurate.

    Rows are kept in the user's cache folder, by machine, versions and protocol; only what is not there is measured.
    """
    machine = describe_machine()
    threads = threads or machine["usable_cores"]
    key = {
        "format": _FORMAT,
        "machine": {name: machine[name] for name in ("cpu", "usable_cores", "architecture")},
        "versions": {package: _version(package) for package in _PACKAGES},
        "threads": threads,
        "seconds": seconds,
    }
    pairs = [(candidate, precision) for candidate in wanted for precision in precisions]
    rows = {pair: _kept(pair, key) for pair in pairs}
    missing = [pair for pair, row in rows.items() if row is None]
    if missing:
        with tempfile.TemporaryDirectory(prefix="clipkd-students-") as scratch:
            for pair, row in _measured(missing, Path(scratch), threads, seconds, machine, progress).items():
                rows[pair] = row
                _keep(pair, key, row)
    found = [
        {**row, "published_top1": pair[0].published_top1, "source": pair[0].source, "front": False}
        for pair, row in rows.items()
        if row is not None
    ]
    published = [row for row in found if row["status"] == "ok" and row["published_top1"] is not None]
    points = [(row["p50_ms"], row["published_top1"]) for row in published]
    for row, on_front in zip(published, pareto_front(points), strict=True):
        row["front"] = on_front
    return sorted(found, key=lambda row: (row["status"] != "ok", row.get("p50_ms") or 0.0, row["name"]))


def _measured(
    pairs: Sequence[tuple[Candidate, str]],
    scratch: Path,
    threads: int,
    seconds: float,
    machine: Mapping[str, Any],
    progress: Progress,
) -> dict[tuple[Candidate, str], Row]:
    rows: dict[tuple[Candidate, str], Row] = {}
    for done, pair in enumerate(pairs):
        progress(f"building {pair[0].model} {pair[1]}", done, len(pairs))
        rows[pair] = {"name": pair[0].model, "precision": pair[1], "runtime": "onnxruntime", "status": "ok"}
        try:
            rows[pair] |= _built(pair[0], pair[1], scratch / f"{done}.onnx")
        except UsageError:
            raise  # a name that is none
        except Exception as error:  # torch, timm and exporters raise anything of an architecture that they cannot take
            rows[pair]["status"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    turns: dict[tuple[Candidate, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for turn in range(PROCESSES):
        order = list(enumerate(pairs))[:: -1 if turn % 2 else 1]  # no one always runs on what the same other heated
        for place, (index, pair) in enumerate(order):
            progress("timing", turn * len(pairs) + place, PROCESSES * len(pairs))
            if rows[pair]["status"] == "ok":
                try:
                    turns[pair].append(_timed(scratch / f"{index}.onnx", rows[pair]["image_size"], threads, seconds))
                except ClipkdError as error:
                    rows[pair]["status"] = str(error)
    for pair, results in turns.items():
        if rows[pair]["status"] == "ok":
            rows[pair] |= summarise(results)
            rows[pair] |= {"peak_memory_bytes": max(result["peak_rss_bytes"] for result in results), "threads": threads}
            rows[pair] |= grade([results], machine, [])
    return rows


def _built(candidate: Candidate, precision: str, path: Path) -> Row:
    """Write the graph of an image tower with random weights; returns what is known without running it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.to_onnx import prepared, write_graph
    from toolchain.models import build_model, num_parameters
    from toolchain.quantize import ImageTower, example_pixels, int8_image_tower, without_attention_fast_path
    from toolchain.recipe import ModelSpec
    from toolchain.sources import anchored

    spec = anchored(ModelSpec(model=candidate.model, init="random"), Path(), "student")
    model = build_model(spec, seed=0)
    pixels = example_pixels(model.net).float().cpu()
    with torch.no_grad(), without_attention_fast_path():
        tower = prepared(ImageTower(model.net).eval(), pixels, "fp32").requires_grad_(False)  # else not counted
        with FlopCounterMode(display=False) as counter:
            tower(pixels[:1])
        if precision == "int8":  # the ranges that noise sets are wrong, and take as long as right ones
            random = torch.Generator().manual_seed(0)
            tower = int8_image_tower(model.net, torch.randn(8, *pixels.shape[1:], generator=random))
        write_graph(tower, pixels, path, names_io=("pixel_values", "image_features"), opset=20, metadata={})
    return {
        "params_image": num_parameters(model.net)[0],
        "gmacs": round(counter.get_total_flops() / 2e9, 3),
        "image_size": pixels.shape[-1],
        "size_bytes": path.stat().st_size,
    }


def _timed(graph: Path, size: int, threads: int, seconds: float) -> dict[str, Any]:
    """The runner's document for one graph in a fresh process."""
    command = [sys.executable, str(_RUNNER), "--model", str(graph), "--input", "pixel_values", "--dtype", "float32"]
    command += ["--shape", f"1,3,{size},{size}", "--threads", str(threads)]
    command += ["--min-seconds", f"{seconds:g}", "--max-warm-up", f"{seconds:g}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ClipkdError(f"took longer than {_TIMEOUT_S:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["(nothing on stderr)"])[-1]
        raise ClipkdError(f"the process that timed it ended with status {done.returncode}: {last}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _place(pair: tuple[Candidate, str]) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in pair[0].model)
    return user_cache_folder() / "students" / f"{name}-{pair[1]}.json"


def _kept(pair: tuple[Candidate, str], key: Row) -> Row | None:
    try:
        saved = json.loads(_place(pair).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whatever is wrong with it, it is measured again
        return None
    return saved["row"] if saved.get("key") == key and saved.get("model") == pair[0].model else None


def _keep(pair: tuple[Candidate, str], key: Row, row: Row) -> None:
    if row["status"] != "ok":
        return  # tried again next time
    path = _place(pair)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"key": key, "model": pair[0].model, "row": row}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def render_students(rows: Sequence[Row]) -> bytes:
    """A PNG: latency against published accuracy, and against the work that a forward pass is said to be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fit = [row for row in rows if row["status"] == "ok"]
    figure = Figure(figsize=(8, 9.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (
            "published_top1",
            100.0,
            "published ImageNet zero-shot top-1, %",
            "Published accuracy against measured latency",
        ),
        ("gmacs", 1.0, "GMACs of one image", "The work of a forward pass does not say how long it takes"),
    )
    for place, (field, factor, axis, title) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 1, place)
        axes.set_xscale("log")
        if field == "gmacs":
            axes.set_yscale("log")
        shown = [row for row in fit if row[field] is not None]
        for index, row in enumerate(shown):  # by latency, so that neighbours' names take turns above and below
            x, y, color = row["p50_ms"], factor * row[field], _COLORS[row["precision"]]
            axes.hlines(y, row["p50_low_ms"], row["p50_high_ms"], color=color)
            axes.plot(x, y, "o", color=color, markerfacecolor=color if row["grade"] != "C" else "white", markersize=6)
            axes.annotate(
                row["name"],
                (x, y),
                (5, -9 if index % 2 else 3),
                textcoords="offset points",
                fontsize=7,
                color="#333333",
                annotation_clip=True,
            )
        axes.grid(color="#e4e6e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("median latency of the image tower at batch 1, ms")
        axes.set_ylabel(axis)
        handles = [
            axes.plot([], [], "o", color=color, label=precision)[0]
            for precision, color in _COLORS.items()
            if any(row["precision"] == precision for row in fit)
        ]
        axes.legend(handles=handles, frameon=False, loc="upper left", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
