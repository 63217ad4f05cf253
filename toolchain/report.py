"""The accuracy-latency front of a run, and the tables and pictures around it.

`report.json` is the contract with everything outside: one row per exported model and device, every field present in
every row, null where it is not known.  Everything else here is drawn from it.  Matplotlib and Plotly are imported
where they draw: `collect` and `pareto_front` also serve devices on which neither is installed.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from toolchain.errors import ArtifactError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Row: TypeAlias = dict[str, Any]

SCHEMA = 1
ROLES = ("teacher", "baseline", "student", "adopted", "external")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-fp16")
TRUSTED_GRADES = ("A", "B")

# Wong, "Points of view: Color blindness", Nature Methods 8 (2011); grey is the one to beat
ROLE_COLORS = {
    "teacher": "#0072B2",
    "baseline": "#7F7F7F",
    "student": "#D55E00",
    "adopted": "#009E73",
    "external": "#CC79A7",
}
_MARKERS = {"fp32": "o", "bf16": "^", "fp16": "s", "int8": "D", "int8-fp16": "P"}


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


def collect(run: Path) -> dict[str, Any]:
    """The content of report.json: what `exported/`, `measured/` and the training stages' manifests of a run say.

    Raises: ArtifactError if nothing was exported, or for a file that is not what its name says.
    """
    manifests = sorted(path for path in run.glob("exported/*/manifest.json") if not path.parent.name.startswith("."))
    if not manifests:
        raise ArtifactError(
            f"{run}: no exported/*/manifest.json, nothing to report. Export a model first:\n"
            f"  clipkd export {run} --onnx --precision fp32"
        )
    rows: list[Row] = []
    for manifest in manifests:
        summary = read_json(manifest).get("summary", {})
        measured = run / "measured" / manifest.parent.name
        devices = sorted(path for path in measured.glob("*") if path.is_dir() and not path.name.startswith("."))
        rows += [_row(run, manifest, summary, device) for device in (devices or (None,))]
    rows.sort(key=_reading_order)
    for row, name in zip(rows, _unique_names(rows), strict=True):
        row["name"] = name
        row["top1_drop_vs_teacher"] = _drop(row, _reference(rows, row, role="teacher", precision=None))
        row["top1_drop_vs_fp32"] = _drop(row, _reference(rows, row, role=row["role"], precision="fp32"))
    for group in front_groups(rows).values():
        _mark_front(group)
    return {"schema": SCHEMA, "rows": rows}


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


def write_report(run: Path) -> dict[str, Any]:
    """`collect`, written to the run as report.json, .csv, .md, .png and .html, each replaced in one step."""
    from toolchain.report_page import render_page  # brings Plotly

    report = collect(run)
    contents = {
        "report.csv": render_csv(report).encode(),
        "report.md": render_markdown(report, title=run.resolve().name).encode(),
        "report.png": render_png(report),
        "report.html": render_page(run, report).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    for name, content in contents.items():
        partial = run / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(run / name)
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
    return {
        "name": None,
        "model": manifest.parent.name,
        "role": role,
        "runtime": summary.get("runtime"),
        "precision": precision,
        "device": profile.get("device") or (measured.name if measured is not None else None),
        "machine": machine_name(profile.get("machine")),
        "batch": profile.get("batch"),
        "threads": profile.get("threads"),
        **{key: image.get(key) for key in ("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms")},
        "text_p50_ms": text.get("p50_ms"),
        "e2e_p50_ms": profile.get("e2e_p50_ms"),
        "images_per_s": profile.get("images_per_s"),
        "headline": headline,
        **{key: scores.get(key) for key in ("top1", "top1_low", "top1_high")},
        "num_eval_images": scores.get("n"),
        "top1_drop_vs_teacher": None,
        "top1_drop_vs_fp32": None,
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
        "grade": profile.get("grade"),
        "flags": list(profile.get("flags") or []),
        "status": _status(measured, parity, evaluation, profile),
        "pareto": False,
        "source": manifest.relative_to(run).as_posix(),
    }


def _status(measured: Path | None, parity: Row, evaluation: Row, profile: Row) -> str:
    """`ok`, or why the row has gaps."""
    if measured is None:
        return "not measured"
    found = {"parity.json": parity, "evaluation.json": evaluation, "profile.json": profile}
    missing = [name for name, content in found.items() if not content]
    return f"no {', '.join(missing)}" if missing else "ok"


def _train_s(run: Path, role: str | None, precision: str | None) -> float | None:
    """The training time of the checkpoint a model was exported from: fine-tuned in its precision, or as distilled."""
    for stage in (f"{role}-{precision}", f"{role}"):
        manifest = run / stage / "manifest.json"
        if manifest.exists():
            train_s: float | None = (read_json(manifest).get("summary") or {}).get("train_s")
            return train_s
    return None


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
    return *where, place(row["role"], ROLES), place(row["precision"], PRECISIONS), row["runtime"] or "", row["model"]


def _unique_names(rows: Sequence[Row]) -> list[str]:
    """Role and precision, and as much more as it takes to tell all rows of the report apart."""
    names = [f"{row['role']} {row['precision']}" if row["role"] else row["model"] for row in rows]
    for detail in ("runtime", "device", "machine", "model"):
        if len(set(names)) == len(names):
            break
        names = [f"{name} {row[detail]}" for name, row in zip(names, rows, strict=True)]
    return names


def _reference(rows: Sequence[Row], row: Row, *, role: str | None, precision: str | None) -> Row | None:
    """The row to compare with on the same images: fp32, then the same runtime, then the same device."""
    candidates = [
        other
        for other in rows
        if other["role"] == role
        and precision in (None, other["precision"])
        and other["top1"] is not None
        and (other["headline"], other["num_eval_images"]) == (row["headline"], row["num_eval_images"])
    ]

    def closeness(other: Row) -> tuple[bool, ...]:
        same = ("runtime", "device", "machine", "batch")
        return other["precision"] == "fp32", *(other[key] == row[key] for key in same)

    return max(candidates, key=closeness, default=None)


def _drop(row: Row, reference: Row | None) -> float | None:
    if reference is None or row["top1"] is None:
        return None
    return float(reference["top1"] - row["top1"])


def _mark_front(group: Sequence[Row]) -> None:
    """Sets `pareto` over grades A and B; where there is nothing better, over all, which are then flagged as noisy."""
    ranked = [row for row in group if row["grade"] in TRUSTED_GRADES]
    if not ranked:
        ranked = list(group)
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
        flags = ", ".join(row["flags"])
        return " ".join(filter(None, [row["grade"] or "", f"({flags})" if flags else ""])) or _or_dash(None)

    shown = [
        Column("name", lambda row: str(row["name"]), by("name")),
        Column("runtime", lambda row: _or_dash(row["runtime"]), by("runtime")),
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
    """What distillation, the smaller model and quantization bought and cost, as far as the rows can tell."""
    for group in front_groups(rows).values():
        fp32 = {row["role"]: row for row in group if row["precision"] == "fp32"}
        int8 = {row["role"]: row for row in group if row["precision"] == "int8"}
        teacher, baseline, student = (fp32.get(role) for role in ("teacher", "baseline", "student"))
        pairs = [
            (_distillation, baseline, student),
            (_compression, teacher, student),
            (_quantization, student, int8.get("student")),
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


def _quantization(fp32: Row, int8: Row) -> Finding:
    return Finding(
        "int8 against fp32",
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


READING = (
    "p50 is the median latency of the image tower at the batch size given, inputs resident; square brackets are 95 % "
    "intervals. Accuracy is measured on the exported model in its own runtime. A star marks the Pareto front of its "
    "device: nothing else is both faster and more accurate. Grade A was measured with locked clocks, B was stable, C "
    "is noisy for the reasons named; the front is drawn over A and B where there are any."
)


def set_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One line per row and evaluation set: zero-shot accuracy and retrieval."""
    recalls = ("name_to_image_r1", "name_to_image_r5", "image_to_name_r1", "image_to_name_r5")
    headers = ["name", "set", "n", "top-1 %", "top-5 %", "name to image R@1 %", "R@5 %", "image to name R@1 %", "R@5 %"]
    cells = []
    for row in rows:
        for set_name, accuracy in row["accuracy"].items():
            interval = {"top1": accuracy["top1"], "top1_low": accuracy["low"], "top1_high": accuracy["high"]}
            retrieval = row["retrieval"].get(set_name, {})
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


# --- picture ---------------------------------------------------------------------------------------------------------

_INK, _QUIET, _GRID = "#1a1a1a", "#5f6368", "#e4e6e8"
_LABEL_DARKNESS = 0.62  # of a role's colour: at least 4.5 : 1 against white for every one of them


def render_png(report: dict[str, Any]) -> bytes:
    """p50 (log) against top-1 with both intervals, one panel per device, the front drawn through its points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(front_groups(report["rows"]).values())
    figure = Figure(figsize=(8, 5.2 * max(1, len(groups))), dpi=160, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if not groups:
        figure.text(0.5, 0.5, "no row has both a latency and an accuracy yet", ha="center", color=_QUIET)
    panels = [(figure.add_subplot(len(groups), 1, place), group) for place, group in enumerate(groups, 1)]
    for axes, group in panels:
        _draw_panel(axes, group)
    figure.draw_without_rendering()  # settles the layout, without which labels cannot be placed
    figure.set_layout_engine("none")
    for axes, group in panels:
        _place_labels(axes, group)
    png = io.BytesIO()
    canvas.print_png(png)  # type: ignore[no-untyped-call]  # Matplotlib leaves it untyped
    return png.getvalue()


def latency_axis(rows: Sequence[Row]) -> tuple[tuple[float, float], list[float]]:
    """Limits in ms that leave room around the intervals, and round ticks on a logarithmic axis."""
    ends = [row[key] for row in rows for key in ("p50_ms", "p50_low_ms", "p50_high_ms") if row[key] is not None]
    low, high = math.log10(min(ends)), math.log10(max(ends))
    room = max(0.18 * (high - low), 0.1)
    low, high = low - room, high + room
    for mantissas in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [m * 10.0**decade for decade in decades for m in mantissas if low <= math.log10(m) + decade <= high]
        if len(ticks) >= 4:
            return (10**low, 10**high), ticks
    # less than about half a decade: evenly spaced, the step the largest of 1, 2 or 5 times 10^n that gives four
    wanted = (10**high - 10**low) / 5
    decade = 10.0 ** math.floor(math.log10(wanted))
    step = max(m * decade for m in (1, 2, 5) if m * decade <= wanted)
    ticks = [step * count for count in range(math.ceil(10**low / step), math.floor(10**high / step) + 1)]
    return (10**low, 10**high), ticks


def accuracy_axis(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits in percent that leave room around the intervals."""
    ends = [100 * row[key] for row in rows for key in ("top1", "top1_low", "top1_high") if row[key] is not None]
    room = max(0.14 * (max(ends) - min(ends)), 1.0)
    return max(min(ends) - room, -1.0), min(max(ends) + room, 101.0)


def front_line(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The front's points (ms, percent) from fast to slow."""
    return sorted((float(row["p50_ms"]), 100 * float(row["top1"])) for row in rows if row["pareto"])


def _draw_panel(axes: "Axes", group: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    limits, ticks = latency_axis(group)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(*accuracy_axis(group))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelsize=9)
    headline = group[0]["headline"]
    axes.set_title(f"{headline}: zero-shot accuracy against latency", loc="left", color=_INK, fontsize=12, pad=22)
    axes.text(
        0, 1.02, f"{group_title(group)}; up and left is better", transform=axes.transAxes, color=_QUIET, fontsize=9
    )
    axes.set_xlabel("median latency of the image tower, ms", color=_INK, fontsize=10)
    axes.set_ylabel("top-1, %", color=_INK, fontsize=10)
    line = front_line(group)
    axes.plot(*zip(*line, strict=True), color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    for row in group:
        color = ROLE_COLORS.get(row["role"], _INK)
        p50_ms, top1 = row["p50_ms"], 100 * row["top1"]
        for key, unit, factor, draw in (("p50", "_ms", 1, axes.hlines), ("top1", "", 100, axes.vlines)):
            ends = [row[f"{key}_low{unit}"], row[f"{key}_high{unit}"]]
            if None not in ends:
                across = top1 if key == "p50" else p50_ms
                draw(across, factor * ends[0], factor * ends[1], color=color, linewidth=1.4, zorder=3)
        trusted = row["grade"] in TRUSTED_GRADES
        axes.plot(
            p50_ms,
            top1,
            marker=_MARKERS.get(row["precision"], "o"),
            markersize=8,
            markerfacecolor=color if trusted else "white",
            markeredgecolor=color,
            markeredgewidth=1.6,
            zorder=4,
        )
    key = "dashed: Pareto front    lines: 95 % intervals    hollow: grade C"
    axes.text(1, -0.16, key, transform=axes.transAxes, ha="right", va="top", color=_QUIET, fontsize=8)


def _place_labels(axes: "Axes", group: Sequence[Row]) -> None:
    """Writes every name where it covers least: no marker, interval, front or other name if there is such a place."""
    from matplotlib.transforms import Bbox

    def pixels(p50_ms: float, top1: float) -> tuple[float, float]:
        x, y = axes.transData.transform((p50_ms, 100 * top1))
        return float(x), float(y)

    def box(first: tuple[float, float], second: tuple[float, float], margin: float) -> Bbox:
        xs, ys = sorted((first[0], second[0])), sorted((first[1], second[1]))
        return Bbox([[xs[0] - margin, ys[0] - margin], [xs[1] + margin, ys[1] + margin]])

    taken: list[Bbox] = []
    for row in group:
        center = pixels(row["p50_ms"], row["top1"])
        taken.append(box(center, center, 12))
        if row["p50_low_ms"] is not None and row["p50_high_ms"] is not None:
            ends = [pixels(row[key], row["top1"]) for key in ("p50_low_ms", "p50_high_ms")]
            taken.append(box(ends[0], ends[1], 3))
        if row["top1_low"] is not None and row["top1_high"] is not None:
            ends = [pixels(row["p50_ms"], row[key]) for key in ("top1_low", "top1_high")]
            taken.append(box(ends[0], ends[1], 3))
    line = [pixels(p50_ms, percent / 100) for p50_ms, percent in front_line(group)]
    for (x0, y0), (x1, y1) in pairwise(line):
        steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 12))
        along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
        taken += [box(point, point, 3) for point in along]

    for row in group:
        tried = [_label(axes, row, direction, distance) for distance in (9, 20, 34, 50) for direction in _DIRECTIONS]
        extents = [annotation.get_window_extent() for annotation in tried]
        covered = [_covered(extent, taken, axes.bbox) for extent in extents]
        best = covered.index(min(covered))
        for place, annotation in enumerate(tried):
            if place != best:
                annotation.remove()
        taken.append(extents[best])


_DIRECTIONS = ((1, -1), (-1, 1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_SIDES = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}


def _label(axes: "Axes", row: Row, direction: tuple[int, int], distance: int) -> "Annotation":
    from matplotlib.colors import to_rgb

    near = distance < 15
    red, green, blue = (_LABEL_DARKNESS * channel for channel in to_rgb(ROLE_COLORS.get(row["role"], _INK)))
    return axes.annotate(
        row["name"],
        (row["p50_ms"], 100 * row["top1"]),
        (direction[0] * distance, direction[1] * distance),
        textcoords="offset points",
        ha=_SIDES[direction[0]][0],
        va=_SIDES[direction[1]][1],
        fontsize=9.5,
        color=(red, green, blue),
        zorder=5,
        arrowprops=None if near else {"arrowstyle": "-", "color": _QUIET, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
    )


def _covered(extent: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """Pixels of a label that lie on something, and, counted double, outside of the panel."""
    from matplotlib.transforms import Bbox

    def area(box: Bbox | None) -> float:
        return 0.0 if box is None else float(box.width * box.height)

    outside = area(extent) - area(Bbox.intersection(extent, inside))
    return 2 * outside + sum(area(Bbox.intersection(extent, other)) for other in taken)
