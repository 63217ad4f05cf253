"""The accuracy-latency front of runs, and the tables around it.

`report.json` is the contract with everything outside: one row per exported model and device, every field present in
every row, null where it is not known.  Everything else is drawn from it (report_picture.py, report_page.py).

    N images of the headline set
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import ArtifactError, UsageError
from toolchain.paired import paired_drop
from toolchain.stages import MANIFEST, REFERENCE

Row: TypeAlias = dict[str, Any]

SCHEMA = 1
ROLES = ("teacher", "baseline", "student", "adopted", "external")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-fp16", "int8-bf16")
TRUSTED_GRADES = ("A", "B")

# Wong, "Points of view: Color blindness", Nature Methods 8 (2011); grey is the one to beat
ROLE_COLORS = {
    "teacher": "#0072B2",
    "baseline": "#7F7F7F",
    "student": "#D55E00",
    "adopted": "#009E73",
    "external": "#CC79A7",
}


@dataclass(frozen=True)
class Column:
    """One column of the printed table: what a person reads, and what it is sorted by (None is always last)."""

    header: str
    text: Callable[[Row], str]
    sort_key: Callable[[Row], float | str | None]


@dataclass(frozen=True)
class Finding:
    """One sentence a reader came for."""

    title: str
    value: str
    detail: str


def collect(runs: Sequence[Path], external: Sequence[Row] = ()) -> dict[str, Any]:
    """The content of report.json: what `exported/`, `measured/` and the training stages' manifests of runs say, and
    rows measured elsewhere (external_rows.py).

    A checkpoint that was measured in PyTorch has a row too, whose `pytorch` says how it was run: a reference.

    Raises: ArtifactError if nothing was exported, or for a file that is not what its name says.
    """
    rows = [row for run in runs for row in _rows_of(run)] + [_empty_row() | row for row in external]
    rows.sort(key=_reading_order)
    for row, name in zip(rows, _unique_names(rows), strict=True):
        row["name"] = row["name"] or name
    right = {id(row): _right_answers(row) for row in rows}
    for row in rows:
        for against, role, precision in (("teacher", "teacher", None), ("fp32", row["role"], "fp32")):
            reference = _reference(rows, row, role=role, precision=precision)
            row |= _drop(row, reference, right, against)
    for group in front_groups(rows).values():
        _mark_front(group)
    return {"schema": SCHEMA, "rows": rows}


def _rows_of(run: Path) -> list[Row]:
    manifests = sorted(path for path in run.glob("exported/*/manifest.json") if not path.parent.name.startswith("."))
    if not manifests:
        raise ArtifactError(
            f"{run}: no exported/*/manifest.json, nothing to report. Export a model first:\n"
            f"  clipkd export {run} --onnx --precision fp32"
        )
    rows: list[Row] = []
    for manifest in manifests:
        content = read_json(manifest)
        measured = run / "measured" / manifest.parent.name
        devices = sorted(path for path in measured.glob("*") if path.is_dir() and not path.name.startswith("."))
        for device in devices or (None,):
            rows.append(_row(run, manifest, content.get("summary", {}), device))
            if device is not None and _is_of_another(device, "model", content.get("digest")):
                rows[-1]["status"] = "measured before it was exported again"
    for manifest in sorted(run.glob("measured/*/[!.]*/manifest.json")):
        content = read_json(manifest)
        if content.get("kind") == REFERENCE:
            rows.append(_row(run, manifest, content.get("summary", {}), manifest.parent))
            checkpoint = run / str(rows[-1]["role"]) / MANIFEST
            digest = read_json(checkpoint).get("digest") if checkpoint.exists() else None
            if _is_of_another(manifest.parent, "checkpoint", digest):
                rows[-1]["status"] = "measured before it was trained again"
    return rows


def _is_of_another(measured: Path, what: str, digest: str | None) -> bool:
    """Whether a measurement is known to be of something else than what is there now."""
    manifest = measured / MANIFEST
    recorded = (read_json(manifest).get("inputs") or {}).get(what) if manifest.exists() else None
    return recorded is not None and digest is not None and recorded != digest


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, value) points are on the front: no other costs at most as much and is worth at least as much, one
    of the two strictly.  Equal points stand or fall together; a point with NaN is never on the front.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(math.isnan(number) for number in point)),
        key=lambda index: (points[index][0], -points[index][1]),
    )
    on_front = [False] * len(points)
    last: tuple[float, float] | None = None
    for index in order:  # by cost, so that only value can still be gained
        if last is None or points[index] == last or points[index][1] > last[1]:
            on_front[index], last = True, points[index]
    return on_front


def front_groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows with a latency and an accuracy, by what makes two of them comparable: one front each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row["p50_ms"] is not None and row["top1"] is not None:
            key = (row["device"], row["machine"], row["batch"], row["headline"])
            groups.setdefault(key, []).append(row)
    return groups


def group_title(rows: Sequence[Row]) -> str:
    """What the rows of one front have in common, for a heading."""
    first = rows[0]
    return ", ".join(str(part) for part in (first["device"], first["machine"], f"batch {first['batch']}") if part)


def write_report(runs: Sequence[Path], out: Path, external: Sequence[Row] = ()) -> dict[str, Any]:
    """`collect`, written to a folder as report.json, .csv, .md, .png, .svg and .html, each replaced in one step."""
    from toolchain.report_page import render_page  # brings Plotly
    from toolchain.report_picture import render_picture

    report = collect(runs, external)
    title = out.resolve().name
    contents = {
        "report.csv": render_csv(report).encode(),
        "report.md": render_markdown(report, title=title).encode(),
        "report.png": render_picture(report, "png"),
        "report.svg": render_picture(report, "svg"),
        "report.html": render_page(runs, report, title=title).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        partial = out / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(out / name)
    return report


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, or the one in a folder.

    Raises: UsageError if there is none; ArtifactError if it is not one that this clipkd reads.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such report. Write it with: clipkd report RUN")
    report = read_json(file)
    if report.get("schema") != SCHEMA or not isinstance(report.get("rows"), list):
        raise ArtifactError(f"{file}: expected a report of schema {SCHEMA}, got schema {report.get('schema')!r}")
    return report


def terminal_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the printed table."""
    shown = columns(report["rows"])
    return [column.header for column in shown], [[column.text(row) for column in shown] for row in report["rows"]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; NaN and infinities, which JSON does not have, are read as null."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}. Delete its folder and run the same command again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(run: Path, manifest: Path, summary: Row, measured: Path | None) -> Row:
    parity, evaluation, profile = (
        read_json(measured / name) if measured is not None and (measured / name).exists() else {}
        for name in ("parity.json", "evaluation.json", "profile.json")
    )
    role, precision = summary.get("role"), summary.get("precision")
    image, text = profile.get("image") or {}, profile.get("text") or {}
    sets = evaluation.get("sets") or {}
    headline = evaluation.get("headline")
    scores = sets.get(headline) or {}
    return _empty_row() | {
        "run": run.as_posix(),
        "model": manifest.relative_to(run).parts[1],
        "role": role,
        "runtime": summary.get("runtime"),
        "pytorch": summary.get("pytorch"),
        "precision": precision,
        "device": profile.get("device") or (measured.name if measured is not None else None),
        "machine": machine_name(profile.get("machine")),
        "batch": profile.get("batch"),
        "fixed_batch": summary.get("batch"),
        "threads": profile.get("threads"),
        **{key: image.get(key) for key in ("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms")},
        "p50_by_process_ms": image.get("p50_by_process_ms") or [],
        "text_p50_ms": text.get("p50_ms"),
        "e2e_p50_ms": profile.get("e2e_p50_ms"),
        "images_per_s": profile.get("images_per_s"),
        "headline": headline,
        **{key: scores.get(key) for key in ("top1", "top1_low", "top1_high")},
        "num_eval_images": scores.get("n"),
        "accuracy": {
            name: {
                "top1": values.get("top1"),
                "low": values.get("top1_low"),
                "high": values.get("top1_high"),
                "n": values.get("n"),
                "top5": values.get("top5"),
            }
            for name, values in sets.items()
        },
        "retrieval": {name: values.get("retrieval") or {} for name, values in sets.items()},
        "min_cosine": {tower: (parity.get(tower) or {}).get("min_cosine") for tower in ("image", "text")},
        "params_image": summary.get("params_image"),
        "params_text": summary.get("params_text"),
        "size_bytes": profile.get("size_bytes") or summary.get("size_bytes"),
        "peak_memory_bytes": profile.get("peak_memory_bytes"),
        "train_s": _train_s(run, role, precision),
        "reverted": _reverted(run, role, precision),
        "grade": profile.get("grade"),
        "flags": list(profile.get("flags") or []),
        "status": _status(measured, parity, evaluation, profile),
        "source": manifest.relative_to(run).as_posix(),
    }


def _empty_row() -> Row:
    """Every field that a row has, unknown."""
    unknown = (
        *("name", "run", "model", "role", "runtime", "pytorch", "precision", "device", "machine", "batch", "threads"),
        "fixed_batch",
        *("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "p50_by_process_ms"),
        *("text_p50_ms", "e2e_p50_ms", "images_per_s"),
        *("headline", "top1", "top1_low", "top1_high", "num_eval_images"),
        *(f"top1_drop_vs_{other}{part}" for other in ("teacher", "fp32") for part in ("", "_low", "_high", "_p")),
        *("accuracy", "retrieval", "min_cosine", "params_image", "params_text", "size_bytes", "peak_memory_bytes"),
        *("train_s", "reverted", "grade", "flags", "status", "pareto", "source"),
    )
    empty: Row = {"accuracy": {}, "retrieval": {}, "flags": [], "p50_by_process_ms": []}
    return dict.fromkeys(unknown) | empty | {"status": "ok", "pareto": False}


def _status(measured: Path | None, parity: Row, evaluation: Row, profile: Row) -> str:
    """`ok`, or why the row has gaps."""
    if measured is None:
        return "not measured"
    found = {"parity.json": parity, "evaluation.json": evaluation, "profile.json": profile}
    missing = [name for name, content in found.items() if not content]
    return f"no {', '.join(missing)}" if missing else "ok"


def _train_s(run: Path, role: str | None, precision: str | None) -> float | None:
    """The training time of the checkpoint a model was exported from: fine-tuned in its precision, or as distilled."""
    for stage in (_quantized_stage(role, precision), f"{role}"):
        manifest = run / stage / "manifest.json"
        if manifest.exists():
            train_s: float | None = (read_json(manifest).get("summary") or {}).get("train_s")
            return train_s
    return None


def _reverted(run: Path, role: str | None, precision: str | None) -> int | None:
    """How many layers of a quantized model went back to float for its accuracy; None where none was to."""
    manifest = run / _quantized_stage(role, precision) / "manifest.json"
    summary = read_json(manifest).get("summary") or {} if manifest.exists() else {}
    found = summary.get("sensitivity")
    return None if found is None else len(found["reverted"])


def _quantized_stage(role: str | None, precision: str | None) -> str:
    """The checkpoint of int8, int8-fp16 and int8-bf16 is one and the same."""
    return f"{role}-{'int8' if precision and precision.startswith('int8') else precision}"


def machine_name(machine: Any) -> str | None:
    """A machine in words that stay the same from one measurement to the next (load and temperature do not)."""
    if not isinstance(machine, dict):
        return None if machine is None else str(machine)
    if machine.get("name"):
        return str(machine["name"])
    parts = [str(machine["cpu"])] if machine.get("cpu") else []
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    return ", ".join(parts) or None


def _reading_order(row: Row) -> tuple[Any, ...]:
    def place(value: Any, order: tuple[str, ...]) -> int:
        return order.index(value) if value in order else len(order)

    where = (row["device"] is None, row["device"] or "", row["machine"] or "")
    what = (place(row["role"], ROLES), place(row["precision"], PRECISIONS), row["runtime"] or "", row["model"] or "")
    return *where, *what, row["run"] or "", row["name"] or ""


def _unique_names(rows: Sequence[Row]) -> list[str]:
    """Role and precision, and of those that share them as much more as it takes to tell them apart."""
    details = {
        "run": [Path(row["run"]).name if row["run"] else None for row in rows],
        "runtime": [runtime_name(row) for row in rows],
        **{key: [row[key] for row in rows] for key in ("device", "machine", "model")},
    }
    names = [row["name"] or (f"{row['role']} {row['precision']}" if row["role"] else row["model"]) for row in rows]
    for values in details.values():
        alike: dict[str, set[Any]] = {}
        for name, value in zip(names, values, strict=True):
            alike.setdefault(name, set()).add(value)
        names = [
            f"{name} {value or ''}".strip() if len(alike[name]) > 1 else name
            for name, value in zip(names, values, strict=True)
        ]
    return names


def runtime_name(row: Row) -> str | None:
    """The runtime, and of PyTorch how it ran: `pytorch eager`.  Reports written before had no such field."""
    return " ".join(filter(None, (row["runtime"], row.get("pytorch")))) or None


def _reference(rows: Sequence[Row], row: Row, *, role: str | None, precision: str | None) -> Row | None:
    """The row of the same run to compare with on the same images: fp32, then the same runtime, then device."""
    candidates = [
        other
        for other in rows
        if other["run"] is not None
        and other["run"] == row["run"]
        and other["role"] == role
        and precision in (None, other["precision"])
        and other["top1"] is not None
        and (other["headline"], other["num_eval_images"]) == (row["headline"], row["num_eval_images"])
    ]

    def closeness(other: Row) -> tuple[bool, ...]:
        same = ("runtime", "device", "machine", "batch")
        return other["precision"] == "fp32", *(other[key] == row[key] for key in same)

    return max(candidates, key=closeness, default=None)


def _right_answers(row: Row) -> NDArray[np.bool_] | None:
    """[N] which images of the headline set a row's model got right; None where that was not kept."""
    if row["run"] is None or row["headline"] is None:
        return None
    samples = Path(row["run"]) / "measured" / row["model"] / str(row["device"]) / "samples.npz"
    if not samples.exists():
        return None
    try:
        with np.load(samples, allow_pickle=False) as saved:
            rank_N = saved.get(f"{row['headline']}_rank")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{samples}: cannot be read: {error}. Delete its folder and measure again") from None
    return None if rank_N is None or len(rank_N) != row["num_eval_images"] else rank_N < 1


def _drop(row: Row, reference: Row | None, right: dict[int, NDArray[np.bool_] | None], against: str) -> Row:
    """Fields of what top-1 loses to a reference on the same images, where the answers were kept with a paired test."""
    key = f"top1_drop_vs_{against}"
    if reference is None or row["top1"] is None:
        return {}
    first, second = right[id(reference)], right[id(row)]
    if first is None or second is None or row is reference:
        return {key: float(reference["top1"] - row["top1"])}
    found = paired_drop(first, second)
    return {key: found.drop, f"{key}_low": found.low, f"{key}_high": found.high, f"{key}_p": found.p}


def _mark_front(group: Sequence[Row]) -> None:
    """Sets `pareto` over grades A and B; where there is nothing better, over all, which are then flagged as noisy.

    The front is what there is to choose from: a checkpoint measured in PyTorch is drawn beside it, but does not ship,
    so that it neither stands on the front nor keeps anything off it.
    """
    shipped = [row for row in group if row["pytorch"] is None]
    ranked = [row for row in shipped if row["grade"] in TRUSTED_GRADES]
    if not ranked:
        ranked = shipped
        for row in ranked:
            row["flags"].append("noisy")
    points = [(float(row["p50_ms"]), float(row["top1"])) for row in ranked]
    for row, on_front in zip(ranked, pareto_front(points), strict=True):
        row["pareto"] = on_front


# --- words -----------------------------------------------------------------------------------------------------------


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the printed table, with a status only if not all are ok; the one place that speaks percent."""
    headlines = {row["headline"] for row in rows if row["headline"]}
    top1 = f"{headlines.pop()} top-1" if len(headlines) == 1 else "top-1"

    def by(key: str) -> Callable[[Row], float | str | None]:
        return lambda row: row[key]

    def grade(row: Row) -> str:
        flags = ", ".join(row["flags"] + [f"{row['reverted']} layers in float"] * bool(row["reverted"]))
        return " ".join(filter(None, [row["grade"] or "", f"({flags})" if flags else ""])) or _or_dash(None)

    shown = [
        Column("name", lambda row: str(row["name"]), by("name")),
        Column("runtime", lambda row: _or_dash(runtime_name(row)), runtime_name),
        Column("precision", lambda row: _or_dash(row["precision"]), by("precision")),
        Column("p50 ms", lambda row: _with_interval(row, "p50", "_ms", _number), by("p50_ms")),
        Column("images/s", lambda row: _or_dash(row["images_per_s"], _count), by("images_per_s")),
        Column("size MB", lambda row: _or_dash(row["size_bytes"], _megabytes), by("size_bytes")),
        Column(f"{top1} %", lambda row: _with_interval(row, "top1", "", _percent), by("top1")),
        Column(
            "drop vs teacher", lambda row: _or_dash(row["top1_drop_vs_teacher"], _points), by("top1_drop_vs_teacher")
        ),
        Column("train time", lambda row: _or_dash(row["train_s"], duration), by("train_s")),
        Column("grade", grade, by("grade")),
        Column("front", lambda row: "★" if row["pareto"] else "", lambda row: 0.0 if row["pareto"] else 1.0),
    ]
    if any(row["status"] != "ok" for row in rows):
        shown.append(Column("status", lambda row: str(row["status"]), by("status")))
    return shown


def findings(rows: Sequence[Row]) -> list[Finding]:
    """What distillation, the smaller model and quantization bought and cost, as far as the rows of one run can tell; of
    several the last that has a student."""
    for comparable in front_groups(rows).values():
        runs = [row["run"] for row in comparable if row["role"] == "student" and row["run"] is not None]
        group = [row for row in comparable if row["run"] in runs[-1:]]  # one run's: others have weights of their own
        made = {(row["runtime"], row["role"], row["precision"]): row for row in group if row["pytorch"] is None}
        eager = next((row for row in group if row["pytorch"] == "eager"), None)
        runtimes = list(dict.fromkeys(runtime for runtime, *_ in made))
        # roles are compared in the runtime that has most of them: only what ships is exported for every one
        main = max(runtimes, key=lambda runtime: sum(key[0] == runtime for key in made), default=None)
        teacher, baseline, student = (made.get((main, role, "fp32")) for role in ("teacher", "baseline", "student"))
        pairs = [
            (_distillation, baseline, student),
            (_compression, teacher, student),
            (_deployment, eager, student),
            *(
                (_quantization, made.get((runtime, "student", "fp32")), made.get((runtime, "student", "int8")))
                for runtime in runtimes
            ),
        ]
        found = [state(before, after) for state, before, after in pairs if before is not None and after is not None]
        if found:
            return found
    return []


def _distillation(baseline: Row, student: Row) -> Finding:
    times = f"{_or_dash(student['train_s'], duration)} of training instead of {_or_dash(baseline['train_s'], duration)}"
    return Finding(
        "Distillation",
        f"{100 * (student['top1'] - baseline['top1']):+.1f} points",
        f"{_percent(student['top1'])} % top-1 instead of {_percent(baseline['top1'])} %"
        f"{_overlap(baseline, student, 'top1', '')}, for {times}",
    )


def _compression(teacher: Row, student: Row) -> Finding:
    return Finding(
        "Student against teacher",
        _speed(teacher, student),
        f"{_number(student['p50_ms'])} ms instead of {_number(teacher['p50_ms'])} ms"
        f"{_overlap(teacher, student, 'p50', '_ms')}{_smaller(teacher, student)}, "
        f"{_percent(student['top1'])} % top-1 instead of {_percent(teacher['top1'])} %",
    )


def _deployment(eager: Row, exported: Row) -> Finding:
    return Finding(
        f"{_RUNTIMES.get(exported['runtime'], exported['runtime'])} against PyTorch eager",
        _speed(eager, exported),
        f"{_number(exported['p50_ms'])} ms instead of {_number(eager['p50_ms'])} ms"
        f"{_overlap(eager, exported, 'p50', '_ms')}, both in fp32, with the same weights",
    )


def _quantization(fp32: Row, int8: Row) -> Finding:
    return Finding(
        f"int8 against fp32, {_RUNTIMES.get(int8['runtime'], int8['runtime'])}",
        _speed(fp32, int8),
        f"{_number(int8['p50_ms'])} ms instead of {_number(fp32['p50_ms'])} ms"
        f"{_overlap(fp32, int8, 'p50', '_ms')}{_smaller(fp32, int8)}, "
        f"{_percent(int8['top1'])} % top-1 instead of {_percent(fp32['top1'])} %",
    )


def _speed(before: Row, after: Row) -> str:
    ratio = before["p50_ms"] / after["p50_ms"]
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _smaller(before: Row, after: Row) -> str:
    if not before["size_bytes"] or not after["size_bytes"]:
        return ""
    return f", {_megabytes(after['size_bytes'])} MB instead of {_megabytes(before['size_bytes'])} MB"


def _overlap(first: Row, second: Row, key: str, unit: str) -> str:
    """Says so where two intervals do not tell two rows apart."""
    limits = [row[f"{key}_{end}{unit}"] for row in (first, second) for end in ("low", "high")]
    if None in limits:
        return ""
    return " (intervals overlap)" if limits[0] <= limits[3] and limits[2] <= limits[1] else ""


def _or_dash(value: Any, text: Callable[[Any], str] = str) -> str:
    return "-" if value is None else text(value)


def _with_interval(row: Row, key: str, unit: str, text: Callable[[float], str]) -> str:
    value, low, high = row[f"{key}{unit}"], row[f"{key}_low{unit}"], row[f"{key}_high{unit}"]
    if value is None:
        return "-"
    return text(value) if low is None or high is None else f"{text(value)} [{text(low)}, {text(high)}]"


def _number(value: float) -> str:
    """Three significant digits, never in exponents."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _megabytes(size_bytes: float) -> str:
    return f"{_number(size_bytes / 1e6)}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _points(fraction: float) -> str:
    shown = f"{100 * fraction:.1f}"
    return f"{'0.0' if shown == '-0.0' else shown} pp"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{minutes} min {rest:02d} s" if hours == 0 else f"{hours} h {minutes_left:02d} min"


# --- files -----------------------------------------------------------------------------------------------------------


def render_csv(report: dict[str, Any]) -> str:
    """The rows with nested fields as dotted columns (`accuracy.stix.top1`) and flags joined by semicolons."""
    flat_rows = [_flatten(row) for row in report["rows"]]
    fields = list(dict.fromkeys(field for row in flat_rows for field in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows)
    return text.getvalue()


def _flatten(row: Row, prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ";".join(map(str, value)) if isinstance(value, list) else value
    return flat


def render_markdown(report: dict[str, Any], *, title: str) -> str:
    rows: list[Row] = report["rows"]
    parts = [f"# {title}", "![Accuracy against latency](report.png)"]
    found = findings(rows)
    if found:
        parts.append("\n".join(f"- **{item.title}: {item.value}.** {item.detail}." for item in found))
    parts.append(_markdown_table(*terminal_rows(report)))
    parts.append(READING)
    headers, cells = set_rows(rows)
    if cells:
        parts += ["## Every evaluation set", _markdown_table(headers, cells)]
    return "\n\n".join(parts) + "\n"


_RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}

READING = (
    "p50 is the median latency of the image tower at the batch size given, inputs resident; square brackets are 95 % "
    "intervals. Accuracy is measured on the exported model in its own runtime. A star marks the Pareto front of its "
    "device: nothing else is both faster and more accurate. Grade A was measured with locked clocks, B was stable, C "
    "is noisy for the reasons named; the front is drawn over A and B where there are any. A row in PyTorch is the "
    "checkpoint as open_clip runs it, a reference that is never on the front: it is not what ships."
)


def set_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One line per row and evaluation set: zero-shot accuracy and retrieval."""
    recalls = ("text_to_image_r1", "text_to_image_r5", "image_to_text_r1", "image_to_text_r5")
    headers = ["name", "set", "n", "top-1 %", "top-5 %", "text to image R@1 %", "R@5 %", "image to text R@1 %", "R@5 %"]
    cells = []
    for row in rows:
        for set_name, accuracy in row["accuracy"].items():
            interval = {"top1": accuracy["top1"], "top1_low": accuracy["low"], "top1_high": accuracy["high"]}
            # of a set of classes, which has one image of each, the texts are the names
            retrieval = {
                key.replace("name", "text"): value for key, value in row["retrieval"].get(set_name, {}).items()
            }
            cells.append(
                [
                    str(row["name"]),
                    str(set_name),
                    _or_dash(accuracy["n"], _count),
                    _with_interval(interval, "top1", "", _percent),
                    _or_dash(accuracy["top5"], _percent),
                    *(_or_dash(retrieval.get(recall), _percent) for recall in recalls),
                ]
            )
    return headers, cells


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(headers), line(["---"] * len(headers)), *(line(row) for row in rows)])
