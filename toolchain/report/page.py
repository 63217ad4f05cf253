"""Write the report as one self-contained HTML page: no network, no server, no other file.

The page is readable without its script: headings, findings, tables and provenance are in the HTML.  The script draws
the front and the training curves with Plotly, whose source is in the page, and sorts the tables.  A content security
policy forbids every request, so no content of a run can make the page send one.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from toolchain.precisions import PRECISIONS
from toolchain.report.chart import accuracy_axis, front_line, latency_axis
from toolchain.report.curves import Curve, read_curve
from toolchain.report.findings import findings
from toolchain.report.html_tables import FILTERS, filter_data, filter_value, leading_number, plain_table, sortable_table
from toolchain.report.measured import read_json
from toolchain.report.pareto import front_groups, group_title, point
from toolchain.report.row import ROLE_COLORS, TRUSTED_GRADES, Report, ReportRow, measured_folder
from toolchain.report.sample_predictions import examples_section
from toolchain.report.tables import READING, Column, columns, set_rows
from toolchain.report.units import duration

_TRAINED = ("student", "baseline", "student-int8", "teacher")


class Point(TypedDict):
    """A point of a front for the script; it has every field of FILTERS."""

    name: str
    device: str
    runtime: str
    precision: str
    grade: str
    p50_ms: float
    low_ms: float | None
    high_ms: float | None
    top1: float
    low: float | None
    high: float | None
    color: str
    symbol: str
    hover: list[list[str]]
    """Headers and cells of the table, shown when hovering over the point."""


class Front(TypedDict):
    """One front for the script."""

    headline: str | None
    limits_ms: tuple[float, float]
    ticks_ms: list[float]
    limits_percent: tuple[float, float]
    line: list[tuple[float, float]]
    points: list[Point]


class Shares(TypedDict):
    """The shares of a row's latencies in the bins of its histogram."""

    name: str
    color: str
    share: list[float]


class Histogram(TypedDict):
    """The latencies of the rows of one front, in common bins."""

    title: str
    edges: list[float]
    rows: list[Shares]


class StageCurve(Curve):
    """The training curve of a stage."""

    stage: str


class PageData(TypedDict):
    """All data for the script."""

    fronts: list[Front]
    histograms: list[Histogram]
    curves: list[StageCurve]


def render_page(runs: Sequence[Path], report: Report, *, title: str) -> str:
    """Return the HTML of a report, with training curves and provenance read from the runs it was collected from."""
    rows = report["rows"]
    groups = list(front_groups(rows).values())
    logs = {_of_run(runs, run, stage): run / stage / "train.jsonl" for run in runs for stage in _TRAINED}
    curves = {name: read_curve(log) for name, log in logs.items() if log.exists()}
    data: PageData = {
        "fronts": [_front(group) for group in groups],
        "histograms": [histogram for group in groups if (histogram := _histogram(group))],
        "curves": [{"stage": stage, **curve} for stage, curve in curves.items() if curve["step"]],
    }
    body = [
        f"<header><p class=kicker>clipkd report</p><h1>{escape(title)}</h1>{_lead(groups)}</header>",
        _findings_section(rows),
        _filters_section(rows),
        _front_section(groups),
        f"<section><h2>Every model</h2>{_models_table(rows)}<p class=note>{escape(READING)}</p></section>",
        _latency_section(rows, data["histograms"]),
        _sets_section(rows),
        examples_section(rows),
        _curves_section(data["curves"]),
        _provenance_section(runs, rows),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',  # otherwise a browser asks the server for one
            f"<title>{escape(title)} - clipkd report</title>",
            f"<style>\n{_asset('page.css')}</style>",
            "</head>",
            "<body><main>",
            *filter(None, body),
            "</main>",
            f'<script type="application/json" id="data">{_script_json(data)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{_asset('page.js')}</script>",
            "</body>",
            "</html>\n",
        ]
    )


def _of_run(runs: Sequence[Path], run: Path, name: str) -> str:
    """Return a name in a run, prefixed with the run's name if there are several runs."""
    return name if len(runs) == 1 else f"{run.name}: {name}"


def _script_json(data: Any) -> str:
    """Return JSON with `<` and `&` escaped, so no string inside can end the script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


# --- sections --------------------------------------------------------------------------------------------------------


def _lead(groups: Sequence[Sequence[ReportRow]]) -> str:
    """Return one line on what was compared."""
    if not groups:
        return "<p class=lead>No model has both a latency and an accuracy yet.</p>"
    images = groups[0][0]["num_eval_images"]
    classes = f", {images:,} images" if images else ""
    where = "; ".join(group_title(group) for group in groups)
    return f"<p class=lead>{escape(str(groups[0][0]['headline']))} zero-shot{escape(classes)}. {escape(where)}.</p>"


def _findings_section(rows: Sequence[ReportRow]) -> str:
    cards = [
        f"<div class=card><h3>{escape(item.title)}</h3><p class=value>{escape(item.value)}</p>"
        f"<p>{escape(item.detail)}.</p></div>"
        for item in findings(rows)
    ]
    return f"<section class=cards aria-label='Gains and costs'>{''.join(cards)}</section>" if cards else ""


def _filters_section(rows: Sequence[ReportRow]) -> str:
    """Return a filter for every field in which rows differ; it applies to charts and tables."""
    choices = []
    for field in FILTERS:
        values = sorted({filter_value(row, field) for row in rows})
        if len(values) > 1:
            options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
            choices.append(
                f"<label>{field} <select data-field={field}><option value='*'>all</option>{options}</select></label>"
            )
    return f"<section class=filters aria-label=Filters>{' '.join(choices)}</section>" if choices else ""


def _front(group: Sequence[ReportRow]) -> Front:
    limits, ticks = latency_axis(group)
    shown = columns(group)
    return {
        "headline": group[0]["headline"],
        "limits_ms": limits,
        "ticks_ms": ticks,
        "limits_percent": accuracy_axis(group),
        "line": front_line(group),
        "points": [_point(row, shown[3:]) for row in group],
    }


def _point(row: ReportRow, shown: Sequence[Column]) -> Point:
    p50_ms, top1 = point(row)
    precision = PRECISIONS.get(str(row["precision"]))
    symbol = "x" if row["pytorch"] else precision.symbol if precision else "circle"
    return {
        "name": row["name"],
        "device": filter_value(row, "device"),
        "runtime": filter_value(row, "runtime"),
        "precision": filter_value(row, "precision"),
        "grade": filter_value(row, "grade"),
        "p50_ms": p50_ms,
        "low_ms": row["p50_low_ms"],
        "high_ms": row["p50_high_ms"],
        "top1": top1,
        "low": row["top1_low"],
        "high": row["top1_high"],
        "color": ROLE_COLORS.get(str(row["role"]), "#888888"),
        "symbol": symbol + ("" if row["grade"] in TRUSTED_GRADES else "-open"),
        "hover": [[column.header, column.text(row)] for column in shown if column.text(row) not in ("", "-", "ok")],
    }


def _front_section(groups: Sequence[Sequence[ReportRow]]) -> str:
    panels = [
        f"<figure><figcaption>{escape(group_title(group))}</figcaption>"
        f"<div class=plot id=front-{place} role=img aria-label='Accuracy against latency; the table below has the "
        "numbers'></div></figure>"
        for place, group in enumerate(groups)
    ]
    if not panels:
        return ""
    key = "Up and left is better. Dashed: Pareto front. Lines: 95 % intervals. Hollow: grade C. "
    if any(row["pytorch"] for group in groups for row in group):
        key += "Cross: PyTorch (reference). "
    key += "Hover or tap for more."
    return f"<section><h2>Accuracy against latency</h2>{''.join(panels)}<p class=note>{key}</p></section>"


def _models_table(rows: Sequence[ReportRow]) -> str:
    shown = columns(rows)
    keys = [[column.sort_key(row) for column in shown] for row in rows]
    numeric = [any(isinstance(row_keys[place], int | float) for row_keys in keys) for place in range(len(shown))]
    cells = [[column.text(row) for column in shown] for row in rows]
    marks = [(" class=front" if row["pareto"] else "") + filter_data(row) for row in rows]
    return sortable_table([column.header for column in shown], cells, keys, numeric, marks, "models")


def _sets_section(rows: Sequence[ReportRow]) -> str:
    headers, cells = set_rows(rows)
    if not cells:
        return ""
    keys: list[list[float | str | None]] = [[*row[:2], *(leading_number(cell) for cell in row[2:])] for row in cells]
    numeric = [place >= 2 for place in range(len(headers))]
    marks = [filter_data(row) for row in rows for _ in row["accuracy"]]
    table = sortable_table(headers, cells, keys, numeric, marks, "sets")
    return f"<section><h2>Every evaluation set</h2>{table}</section>"


_STAGES = ("decode", "preprocess", "image_tower", "match")


def _latency_section(rows: Sequence[ReportRow], histograms: Sequence[Histogram]) -> str:
    """Return the section on latency: its parts from image bytes to label, and its distribution."""
    cells, marks = [], []
    for row in rows:
        stages_ms = _read_profile(row).get("e2e_stages_ms") or {}
        if stages_ms:
            values = [stages_ms.get(stage) for stage in _STAGES] + [row["e2e_p50_ms"]]
            cells.append([str(row["name"]), *("-" if ms is None else f"{ms:.3g}" for ms in values)])
            marks.append(filter_data(row))
    parts = []
    if cells:
        headers = ["name", *(f"{stage.replace('_', ' ')} ms" for stage in _STAGES), "bytes to label ms"]
        keys: list[list[float | str | None]] = [[row[0], *map(leading_number, row[1:])] for row in cells]
        numeric = [place > 0 for place in range(len(headers))]
        parts.append(sortable_table(headers, cells, keys, numeric, marks, "stages"))
    parts += [
        f"<figure><figcaption>Latencies of single image-tower queries, {escape(histogram['title'])}</figcaption>"
        f"<div class='plot small' id=histogram-{place} role=img aria-label='Histogram of latencies'></div></figure>"
        for place, histogram in enumerate(histograms)
    ]
    if not parts:
        return ""
    note = "<p class=note>Medians at batch 1: from JPEG bytes to label, and of each step.</p>"
    return f"<section><h2>Where the time goes</h2>{''.join(parts)}{note}</section>"


def _histogram(group: Sequence[ReportRow]) -> Histogram | None:
    """Return the share of latencies in each bin, with common bins for all rows of a front."""
    samples_ms = {str(row["name"]): found for row in group if (found := _samples_ms(row)) is not None}
    if not samples_ms:
        return None
    pooled = np.concatenate(list(samples_ms.values()))
    low, high = np.percentile(pooled, (0.1, 99))
    edges = np.geomspace(max(low, 1e-6), max(high, low * 1.001), _BINS + 1)
    colors = {str(row["name"]): ROLE_COLORS.get(str(row["role"]), "#888888") for row in group}
    return {
        "title": group_title(group),
        "edges": [float(f"{edge:.5g}") for edge in edges],
        "rows": [
            {"name": name, "color": colors[name], "share": (np.histogram(ms, edges)[0] / len(ms)).round(5).tolist()}
            for name, ms in samples_ms.items()
        ],
    }


_BINS = 60


def _read_profile(row: ReportRow) -> dict[str, Any]:
    folder = measured_folder(row)
    return read_json(folder / "profile.json") if folder and (folder / "profile.json").exists() else {}


def _samples_ms(row: ReportRow) -> NDArray[Any] | None:
    """Return every stored latency of the image tower, [n] in milliseconds; None if none was stored."""
    folder = measured_folder(row)
    if folder is None or not (folder / "samples.npz").exists():
        return None
    with np.load(folder / "samples.npz", allow_pickle=False) as saved:
        found = saved.get("image_ms")
    return found if found is not None and len(found) else None


def _curves_section(curves: Sequence[StageCurve]) -> str:
    panels = [
        f"<figure><figcaption>{stage}: loss and its weighted terms</figcaption>"
        f"<div class='plot small' id=loss-{place} role=img aria-label='Training loss of {stage}'></div></figure>"
        for place, stage in enumerate(escape(curve["stage"]) for curve in curves)
    ]
    if not panels:
        return ""
    speed = (
        "<figure><figcaption>Training speed, images per second</figcaption>"
        "<div class='plot small' id=speed role=img aria-label='Images per second while training'></div></figure>"
    )
    return f"<section><h2>Training</h2><div class=pair>{''.join(panels)}{speed}</div></section>"


def _provenance_section(runs: Sequence[Path], rows: Sequence[ReportRow]) -> str:
    """Return the section on the origin of the numbers: stages, machines, versions, source revision and recipe."""
    found = [(run, path) for run in runs for path in _manifests(run, rows)]
    stages = [(_of_run(runs, run, path.parent.relative_to(run).as_posix()), read_json(path)) for run, path in found]
    stage_rows = [
        [
            name,
            str(manifest.get("revision") or "-"),
            str(manifest.get("started_at") or "-"),
            "-" if manifest.get("took_s") is None else duration(manifest["took_s"]),
            str(manifest.get("key") or "-")[:12],
        ]
        for name, manifest in stages
    ]
    parts = [plain_table(["stage", "source revision", "started", "took", "key"], stage_rows)]
    profiles = [path for run in runs for path in sorted(run.glob("measured/*/[!.]*/profile.json"))]
    machines = [read_json(path).get("machine") for path in profiles] + [stage.get("machine") for _, stage in stages]
    for title, facts_found in (("Machine", machines), ("Versions", [stage.get("versions") for _, stage in stages])):
        for facts in _distinct(facts_found):
            parts += [f"<h3>{title}</h3>", plain_table(["", ""], [[key, _fact(facts[key])] for key in facts])]
    for run in runs:
        recipe = run / "recipe.yaml"
        if recipe.exists():
            text = escape(recipe.read_text(encoding="utf-8"))
            heading = "Recipe" if len(runs) == 1 else f"{run.name}: recipe"
            parts.append(f"<h3>{escape(heading)}</h3><pre tabindex=0><code>{text}</code></pre>")
    summary = "<summary>Stages, machine, versions, recipe</summary>"
    return f"<section><h2>Provenance</h2><details>{summary}{''.join(parts)}</details></section>"


def _manifests(run: Path, rows: Sequence[ReportRow]) -> list[Path]:
    sources = dict.fromkeys(row["source"] for row in rows if row["run"] == run.as_posix())
    paths = [run / stage / "manifest.json" for stage in _TRAINED] + [run / str(source) for source in sources]
    paths += sorted(run.glob("measured/*/[!.]*/manifest.json"))
    return [path for path in dict.fromkeys(paths) if path.exists()]  # the source of a reference row is its measurement


def _distinct(found: Iterable[Any]) -> list[dict[str, Any]]:
    return list({json.dumps(facts, sort_keys=True): facts for facts in found if isinstance(facts, dict)}.values())


def _fact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _asset(name: str) -> str:
    """Return the page's stylesheet or script, a file next to this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
