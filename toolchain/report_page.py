"""The report as one HTML page that needs nothing else: no network, no server, no other file.

The page is readable before and without its script: headings, findings, tables and provenance are in the HTML; the
script draws the front and the training curves with Plotly, whose source is in the page, and sorts the tables.  A
content security policy forbids every request, so that nothing a run contains can make the page send one.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from toolchain.errors import ArtifactError
from toolchain.report import (
    READING,
    ROLE_COLORS,
    TRUSTED_GRADES,
    Row,
    columns,
    duration,
    findings,
    front_groups,
    group_title,
    read_json,
    set_rows,
)
from toolchain.report_picture import accuracy_axis, front_line, latency_axis

_TRAINED = ("student", "baseline", "student-int8", "teacher")
_MAX_CURVE_POINTS = 600  # more cannot be told apart on a screen, and a long run would make a page of many megabytes
_SYMBOLS = {
    "fp32": "circle",
    "bf16": "triangle-up",
    "fp16": "square",
    "int8": "diamond",
    "int8-fp16": "hexagon",
    "int8-bf16": "pentagon",
}


def render_page(runs: Sequence[Path], report: dict[str, Any], *, title: str) -> str:
    """The HTML of a report, with training curves and provenance read from the runs it was collected from."""
    rows: list[Row] = report["rows"]
    groups = list(front_groups(rows).values())
    logs = {_of_run(runs, run, stage): run / stage / "train.jsonl" for run in runs for stage in _TRAINED}
    curves = {name: read_curve(log) for name, log in logs.items() if log.exists()}
    data = {
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
        _examples_section(rows),
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
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body><main>",
            *filter(None, body),
            "</main>",
            f'<script type="application/json" id="data">{_script_json(data)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_SCRIPT}</script>",
            "</body>",
            "</html>\n",
        ]
    )


def _of_run(runs: Sequence[Path], run: Path, name: str) -> str:
    """A name within a run, with the run's where there are several."""
    return name if len(runs) == 1 else f"{run.name}: {name}"


def read_curve(log: Path) -> dict[str, Any]:
    """The columns of a train.jsonl: `step`, `loss`, `images_per_s`, and `terms` as weighted in the loss, means over
    stretches of equal length where there are more steps than a screen shows.

    Raises: ArtifactError for a line that is not a JSON object with a step.
    """
    lines = []
    for number, text in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text, parse_constant=lambda _: None)
            line["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{log}:{number}: expected a JSON object with a step, got {text[:60]!r}") from error
        lines.append(line)
    stretch = -(-len(lines) // _MAX_CURVE_POINTS)
    bins = [lines[start : start + stretch] for start in range(0, len(lines), max(1, stretch))]
    terms = list(dict.fromkeys(name for line in lines for name in line.get("terms") or {}))
    return {
        "step": [bin_[-1]["step"] for bin_ in bins],
        "loss": [_mean(line.get("loss") for line in bin_) for bin_ in bins],
        "images_per_s": [_mean(line.get("images_per_s") for line in bin_) for bin_ in bins],
        "terms": {
            name: [_mean(((line.get("terms") or {}).get(name) or {}).get("weighted") for line in bin_) for bin_ in bins]
            for name in terms
        },
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.5g}") if known else None


def _script_json(data: Any) -> str:
    """JSON that no string inside can end: `<` and `&` only as escapes."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


# --- sections --------------------------------------------------------------------------------------------------------


def _lead(groups: Sequence[Sequence[Row]]) -> str:
    """What was compared, in one line."""
    if not groups:
        return "<p class=lead>No model has both a latency and an accuracy yet.</p>"
    images = groups[0][0]["num_eval_images"]
    classes = f", {images:,} images" if images else ""
    where = "; ".join(group_title(group) for group in groups)
    return f"<p class=lead>{escape(str(groups[0][0]['headline']))} zero-shot{escape(classes)}. {escape(where)}.</p>"


def _findings_section(rows: Sequence[Row]) -> str:
    cards = [
        f"<div class=card><h3>{escape(item.title)}</h3><p class=value>{escape(item.value)}</p>"
        f"<p>{escape(item.detail)}.</p></div>"
        for item in findings(rows)
    ]
    return f"<section class=cards aria-label='What it bought and cost'>{''.join(cards)}</section>" if cards else ""


_FILTERS = ("device", "runtime", "precision", "grade")


def _filters_section(rows: Sequence[Row]) -> str:
    """A choice for every field in which rows differ; it works on fronts and tables alike."""
    choices = []
    for field in _FILTERS:
        values = sorted({_filter_value(row, field) for row in rows})
        if len(values) > 1:
            options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
            choices.append(
                f"<label>{field} <select data-field={field}><option value='*'>all</option>{options}</select></label>"
            )
    return f"<section class=filters aria-label=Filters>{' '.join(choices)}</section>" if choices else ""


def _filter_value(row: Row, field: str) -> str:
    return "unknown" if row[field] is None else str(row[field])


def _filter_data(row: Row) -> str:
    """Attributes by which the script shows or hides a table's row."""
    return "".join(f' data-{field}="{escape(_filter_value(row, field))}"' for field in _FILTERS)


def _front(group: Sequence[Row]) -> dict[str, Any]:
    """What the script needs to draw one front."""
    limits, ticks = latency_axis(group)
    shown = columns(group)
    return {
        "headline": group[0]["headline"],
        "limits_ms": limits,
        "ticks_ms": ticks,
        "limits_percent": accuracy_axis(group),
        "line": front_line(group),
        "points": [
            {
                "name": row["name"],
                **{field: _filter_value(row, field) for field in _FILTERS},
                "p50_ms": row["p50_ms"],
                "low_ms": row["p50_low_ms"],
                "high_ms": row["p50_high_ms"],
                "top1": row["top1"],
                "low": row["top1_low"],
                "high": row["top1_high"],
                "color": ROLE_COLORS.get(row["role"], "#888888"),
                "symbol": ("x" if row["pytorch"] else _SYMBOLS.get(row["precision"], "circle"))
                + ("" if row["grade"] in TRUSTED_GRADES else "-open"),
                "hover": [
                    [column.header, column.text(row)] for column in shown[3:] if column.text(row) not in ("", "-", "ok")
                ],
            }
            for row in group
        ],
    }


def _front_section(groups: Sequence[Sequence[Row]]) -> str:
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
        key += "Cross: PyTorch, for reference. "
    key += "Hover or tap for more."
    return f"<section><h2>Accuracy against latency</h2>{''.join(panels)}<p class=note>{key}</p></section>"


def _models_table(rows: Sequence[Row]) -> str:
    shown = columns(rows)
    keys = [[column.sort_key(row) for column in shown] for row in rows]
    numeric = [any(isinstance(row_keys[place], int | float) for row_keys in keys) for place in range(len(shown))]
    cells = [[column.text(row) for column in shown] for row in rows]
    marks = [(" class=front" if row["pareto"] else "") + _filter_data(row) for row in rows]
    return _table([column.header for column in shown], cells, keys, numeric, marks, "models")


def _sets_section(rows: Sequence[Row]) -> str:
    headers, cells = set_rows(rows)
    if not cells:
        return ""
    keys: list[list[float | str | None]] = [[*row[:2], *(_leading_number(cell) for cell in row[2:])] for row in cells]
    numeric = [place >= 2 for place in range(len(headers))]
    marks = [_filter_data(row) for row in rows for _ in row["accuracy"]]
    table = _table(headers, cells, keys, numeric, marks, "sets")
    return f"<section><h2>Every evaluation set</h2>{table}</section>"


def _leading_number(text: str) -> float | None:
    try:
        return float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return None


def _table(
    headers: Sequence[str],
    cells: Sequence[Sequence[str]],
    keys: Sequence[Sequence[float | str | None]],
    numeric: Sequence[bool],
    marks: Sequence[str],
    name: str,
) -> str:
    """A table whose columns the script sorts by `keys`; wide ones scroll under a first column that stays.

    `marks` are attributes of its rows.
    """
    head = "".join(
        f"<th scope=col{' class=number' if number else ''}><button type=button>{escape(header)}</button></th>"
        for header, number in zip(headers, numeric, strict=True)
    )
    body = []
    for row, row_keys, mark in zip(cells, keys, marks, strict=True):
        texts = [
            f'<{tag} data-key="{escape("" if key is None else str(key))}"{" class=number" if number else ""}>'
            f"{escape(text)}</{tag.split(' ')[0]}>"
            for tag, text, key, number in zip(
                ["th scope=row", *["td"] * (len(row) - 1)], row, row_keys, numeric, strict=True
            )
        ]
        body.append(f"<tr{mark}>{''.join(texts)}</tr>")
    table = f"<table class={name}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"<div class=scroll tabindex=0 role=region aria-label={name}>{table}</div>"


_MAX_EXAMPLES = 8


def _examples_section(rows: Sequence[Row]) -> str:
    """Some pictures of each headline set with what every model made of them."""
    pictures: dict[str, dict[str, list[tuple[Row, dict[str, Any]]]]] = {}  # by set, by picture
    for row in rows:
        folder = _measured(row)
        if folder is None or not (folder / "examples.json").exists():
            continue
        found = read_json(folder / "examples.json")
        for example in found["images"]:
            key = json.dumps([example["index"], example["true"], example["picture"]])
            pictures.setdefault(str(found["set"]), {}).setdefault(key, []).append((row, example))
    parts = []
    for name, answers in pictures.items():
        chosen = _telling(list(answers.values()))
        cards = "".join(_example(answered) for answered in chosen)
        note = (
            f"{len(chosen)} of {len(answers)} pictures spread evenly over {name}, those first on which models differ. "
            "A check mark is a right answer; numbers are cosines of picture and name."
        )
        parts.append(f"<div class=examples>{cards}</div><p class=note>{escape(note)}</p>")
    return f"<section><h2>Sample predictions</h2>{''.join(parts)}</section>" if parts else ""


def _telling(
    pictures: Sequence[list[tuple[Row, dict[str, Any]]]],
) -> list[list[tuple[Row, dict[str, Any]]]]:
    """At most `_MAX_EXAMPLES` pictures in their order: those that part right from wrong, then other disagreements."""

    def dullness(place: int) -> tuple[bool, bool]:
        answers = [answer for _, answer in pictures[place]]
        return len({answer["right"] for answer in answers}) < 2, len({answer["top1"] for answer in answers}) < 2

    chosen = sorted(sorted(range(len(pictures)), key=dullness)[:_MAX_EXAMPLES])
    return [pictures[place] for place in chosen]


def _example(answered: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """One picture, its true name, and every answer with the models that gave it."""
    first = answered[0][1]
    others = len(first["true"]) - 1
    true = str(first["true"][0]) + (f" (and {others} more)" if others else "")
    said: dict[tuple[bool, str], list[str]] = {}
    for row, answer in answered:
        key = (not answer["right"], "no answer" if answer["top1"] is None else str(answer["top1"]))
        cosine = "" if answer["cosine"] is None else f" {answer['cosine']:.2f}"
        model = f"<span{_filter_data(row)}>{escape(str(row['name']))}{cosine}</span>"
        said.setdefault(key, []).append(model)
    lines = "".join(
        f"<li class={'wrong' if wrong else 'right'}><b>{escape(text)}</b> <small>{''.join(models)}</small></li>"
        for (wrong, text), models in sorted(said.items(), key=lambda item: item[0][0])  # then as rows are ordered
    )
    picture = str(first["picture"])
    if not picture.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")):
        raise ArtifactError(f"examples.json: expected a picture as a data URI, got {picture[:40]!r}")
    return (
        f'<figure class=example><img src="{escape(picture)}" alt="{escape(true)}">'
        f"<figcaption><strong>{escape(true)}</strong><ul>{lines}</ul></figcaption></figure>"
    )


_STAGES = ("decode", "preprocess", "image_tower", "match")


def _latency_section(rows: Sequence[Row], histograms: Sequence[Any]) -> str:
    """Where the time from a picture's bytes to its label goes, and how single latencies are spread."""
    cells, marks = [], []
    for row in rows:
        stages_ms = _profile_of(row).get("e2e_stages_ms") or {}
        if stages_ms:
            values = [stages_ms.get(stage) for stage in _STAGES] + [row["e2e_p50_ms"]]
            cells.append([str(row["name"]), *("-" if ms is None else f"{ms:.3g}" for ms in values)])
            marks.append(_filter_data(row))
    parts = []
    if cells:
        headers = ["name", *(f"{stage.replace('_', ' ')} ms" for stage in _STAGES), "bytes to label ms"]
        keys: list[list[float | str | None]] = [[row[0], *map(_leading_number, row[1:])] for row in cells]
        numeric = [place > 0 for place in range(len(headers))]
        parts.append(_table(headers, cells, keys, numeric, marks, "stages"))
    parts += [
        f"<figure><figcaption>latencies of single queries of the image tower, {escape(histogram['title'])}</figcaption>"
        f"<div class='plot small' id=histogram-{place} role=img aria-label='Histogram of latencies'></div></figure>"
        for place, histogram in enumerate(histograms)
    ]
    if not parts:
        return ""
    note = "<p class=note>Medians at batch 1: of a JPEG's bytes to its label, and of its stages.</p>"
    return f"<section><h2>Where the time goes</h2>{''.join(parts)}{note}</section>"


def _histogram(group: Sequence[Row]) -> dict[str, Any] | None:
    """Shares of the latencies that were measured, in bins that all rows of a front have in common."""
    samples_ms = {str(row["name"]): found for row in group if (found := _samples_ms(row)) is not None}
    if not samples_ms:
        return None
    pooled = np.concatenate(list(samples_ms.values()))
    low, high = np.percentile(pooled, (0.1, 99))
    edges = np.geomspace(max(low, 1e-6), max(high, low * 1.001), _BINS + 1)
    colors = {str(row["name"]): ROLE_COLORS.get(row["role"], "#888888") for row in group}
    return {
        "title": group_title(group),
        "edges": [float(f"{edge:.5g}") for edge in edges],
        "rows": [
            {"name": name, "color": colors[name], "share": (np.histogram(ms, edges)[0] / len(ms)).round(5).tolist()}
            for name, ms in samples_ms.items()
        ],
    }


_BINS = 60


def _measured(row: Row) -> Path | None:
    return None if row["run"] is None else Path(row["run"]) / "measured" / row["model"] / str(row["device"])


def _profile_of(row: Row) -> dict[str, Any]:
    folder = _measured(row)
    return read_json(folder / "profile.json") if folder and (folder / "profile.json").exists() else {}


def _samples_ms(row: Row) -> Any:
    """Every latency of the image tower that was kept, [n] in milliseconds; None where none was."""
    folder = _measured(row)
    if folder is None or not (folder / "samples.npz").exists():
        return None
    with np.load(folder / "samples.npz", allow_pickle=False) as saved:
        found = saved.get("image_ms")
    return found if found is not None and len(found) else None


def _curves_section(curves: Sequence[dict[str, Any]]) -> str:
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


def _provenance_section(runs: Sequence[Path], rows: Sequence[Row]) -> str:
    """Where every number comes from: stages, machines, versions, source revision and recipe."""
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
    parts = [_plain_table(["stage", "source revision", "started", "took", "key"], stage_rows)]
    profiles = [path for run in runs for path in sorted(run.glob("measured/*/[!.]*/profile.json"))]
    machines = [read_json(path).get("machine") for path in profiles] + [stage.get("machine") for _, stage in stages]
    for title, facts_found in (("Machine", machines), ("Versions", [stage.get("versions") for _, stage in stages])):
        for facts in _distinct(facts_found):
            parts += [f"<h3>{title}</h3>", _plain_table(["", ""], [[key, _fact(facts[key])] for key in facts])]
    for run in runs:
        recipe = run / "recipe.yaml"
        if recipe.exists():
            text = escape(recipe.read_text(encoding="utf-8"))
            heading = "Recipe" if len(runs) == 1 else f"{run.name}: recipe"
            parts.append(f"<h3>{escape(heading)}</h3><pre tabindex=0><code>{text}</code></pre>")
    summary = "<summary>Stages, machine, versions, recipe</summary>"
    return f"<section><h2>Provenance</h2><details>{summary}{''.join(parts)}</details></section>"


def _manifests(run: Path, rows: Sequence[Row]) -> list[Path]:
    sources = dict.fromkeys(row["source"] for row in rows if row["run"] == run.as_posix())
    paths = [run / stage / "manifest.json" for stage in _TRAINED] + [run / source for source in sources]
    paths += sorted(run.glob("measured/*/[!.]*/manifest.json"))
    return [path for path in dict.fromkeys(paths) if path.exists()]  # a reference's source is its measurement


def _distinct(found: Iterable[Any]) -> list[dict[str, Any]]:
    return list({json.dumps(facts, sort_keys=True): facts for facts in found if isinstance(facts, dict)}.values())


def _fact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    thead = f"<thead><tr>{head}</tr></thead>" if any(headers) else ""
    table = f"<table class='plain{'' if any(headers) else ' facts'}'>{thead}<tbody>{body}</tbody></table>"
    return f"<div class=scroll tabindex=0 role=region aria-label=Table>{table}</div>"


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root {
  --paper: #ffffff; --ink: #1a1d21; --quiet: #5c636b; --line: #e2e5e9; --wash: #f6f7f9; --accent: #b34700;
  --right: #00734f;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e8eaed; --quiet: #9aa2ab; --line: #2c3238; --wash: #1c2125; --accent: #ff9d5c;
    --right: #4fc99a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--sans); }
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 80px; }
.kicker { margin: 0; color: var(--quiet); font-size: 14px; }
h1 { margin: 0; font-size: 32px; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 48px 0 12px; font-size: 20px; font-weight: 650; }
h3 { margin: 24px 0 8px; font-size: 15px; font-weight: 600; }
.lead, .note { color: var(--quiet); }
.lead { margin: 8px 0 0; }
.note { font-size: 14px; max-width: 80ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(208px, 1fr)); gap: 16px; margin-top: 32px; }
.card { padding: 16px 20px; background: var(--wash); border: 1px solid var(--line); border-radius: 8px; }
.card h3 { margin: 0; color: var(--quiet); font-weight: 500; }
.card p { margin: 4px 0 0; font-size: 14px; color: var(--quiet); }
.card .value { margin: 0; color: var(--ink); font-size: 28px; font-weight: 650; line-height: 1.3; }
.filters { display: flex; flex-wrap: wrap; gap: 8px 20px; margin-top: 32px; font-size: 14px; color: var(--quiet); }
select { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 8px; }
select:focus-visible { outline: 2px solid var(--accent); }
[hidden] { display: none !important; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--quiet); font-size: 14px; }
.plot { width: 100%; height: 460px; }
.plot.small { height: 300px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 24px 32px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: left; white-space: nowrap; font-weight: 400; }
th, td { border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
th[scope=row], thead th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { background: var(--wash); color: var(--quiet); vertical-align: bottom; }
th.number { white-space: normal; min-width: 5.5em; }
.sets th.number { min-width: 8em; }
thead th:first-child { background: var(--wash); }
tr.front th { font-weight: 650; }
.number { text-align: right; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.example { display: flex; gap: 16px; padding: 16px; border: 1px solid var(--line); border-radius: 8px; }
.example img { width: 72px; height: 72px; flex: none; object-fit: contain; background: #fff; border-radius: 4px;
  image-rendering: pixelated; }
.example figcaption { min-width: 0; overflow-wrap: anywhere; }
.example strong { color: var(--ink); font-weight: 650; }
.example ul { list-style: none; margin: 6px 0 0; padding: 0; }
.example li { position: relative; padding-left: 20px; margin-top: 6px; line-height: 1.35; }
.example li::before { position: absolute; left: 0; }
.example .right::before { content: "\\2713"; content: "\\2713" / "right:"; color: var(--right); font-weight: 650; }
.example .wrong::before { content: "\\2717"; content: "\\2717" / "wrong:"; color: var(--quiet); }
.example b { font-weight: 500; color: var(--ink); }
.example small { display: block; font-size: 12px; font-variant-numeric: tabular-nums; }
.example small span:not([hidden]) ~ span::before { content: ", "; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); }
th button::after { content: "\\2195"; margin-left: 4px; opacity: .35; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.plain td:first-child { color: var(--quiet); }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { width: 12em; }
summary { cursor: pointer; }
details > :nth-child(2) { margin-top: 12px; }
pre { overflow-x: auto; padding: 16px; background: var(--wash); border: 1px solid var(--line); border-radius: 8px; }
code { font: 13px/1.5 var(--mono); }
@media (max-width: 600px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 26px; }
  .plot { height: 400px; }
  .models :is(th, td):is(:nth-child(2), :nth-child(3)) { display: none; }
  .cards { gap: 12px; margin-top: 24px; }
}
@media print { .scroll { overflow: visible; } details { display: block; } }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const termColors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const settings = {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset"};

const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
// Plotly reads a little HTML, and %{fields}, in labels: what a run calls itself must stay text
const text = value => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
  .replace(/%\\{/g, "%&#123;");

function axis(title, more) {
  return {title: {text: title, font: {size: 13}, standoff: 10}, gridcolor: color("line"), linecolor: color("quiet"),
    tickcolor: color("quiet"), zeroline: false, automargin: true, fixedrange: narrow.matches, ...more};
}

function layout(x, y, more) {
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 48, r: 12, t: 12, b: 44},
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink")},
    hoverlabel: {bgcolor: color("paper"), bordercolor: color("line"), font: {color: color("ink"), size: 13},
      align: "left"},
    xaxis: x, yaxis: y, ...more};
}

function interval(value, low, high) {
  if (low === null || high === null) return {visible: false};
  return {type: "data", symmetric: false, array: [high - value], arrayminus: [value - low], thickness: 1.5, width: 0};
}

const filters = [...document.querySelectorAll(".filters select")];
const isShown = of => filters.every(({dataset: {field}, value}) => value === "*" || of(field) === value);

function drawFront(front, place) {
  const plot = document.getElementById("front-" + place);
  const points = front.points.filter(point => isShown(field => point[field]));
  plot.parentElement.hidden = points.length === 0;
  if (plot.parentElement.hidden) return;
  const traces = [{x: front.line.map(point => point[0]), y: front.line.map(point => point[1]), mode: "lines",
    line: {color: color("ink"), width: 1.2, dash: "dash"}, hoverinfo: "skip"}];
  for (const point of points) {
    const percent = value => value === null ? null : 100 * value;
    traces.push({x: [point.p50_ms], y: [percent(point.top1)], mode: "markers+text", cliponaxis: false,
      text: [text(point.name)], meta: point.name, textposition: "bottom right",
      textfont: {size: narrow.matches ? 12 : 13, color: color("ink")},
      marker: {size: 12, color: point.color, symbol: point.symbol, line: {width: 1.6, color: point.color}},
      error_x: {...interval(point.p50_ms, point.low_ms, point.high_ms), color: point.color},
      error_y: {...interval(percent(point.top1), percent(point.low), percent(point.high)), color: point.color},
      hovertemplate: "<b>" + text(point.name) + "</b><br>" +
        point.hover.map(([label, value]) => text(label) + ": " + text(value)).join("<br>") +
        "<extra></extra>"});
  }
  const x = axis("median latency of the image tower, ms", {type: "log", range: front.limits_ms.map(Math.log10),
    tickvals: front.ticks_ms, ticktext: front.ticks_ms.map(tick => String(Number(tick.toPrecision(3))))});
  const y = axis(text(front.headline) + " top-1, %", {range: front.limits_percent});
  const isNew = plot.data === undefined;
  Plotly.react(plot, traces, layout(x, y, {showlegend: false, hovermode: "closest"}), settings);
  if (isNew) plot.on("plotly_afterplot", () => placeLabels(plot));
  placeLabels(plot);
}

const sides = ["bottom right", "top left", "top right", "bottom left", "middle right", "middle left", "top center",
  "bottom center"];
const pen = document.createElement("canvas").getContext("2d");

// Every name where it covers least of the markers, the intervals and the names before it, and stays inside
function placeLabels(plot) {
  const area = plot.querySelector(".nsewdrag").getBoundingClientRect();
  const [x0, x1] = plot.layout.xaxis.range, [y0, y1] = plot.layout.yaxis.range;
  const toX = value => (Math.log10(value) - x0) / (x1 - x0) * area.width;
  const toY = value => (y1 - value) / (y1 - y0) * area.height;
  const points = plot.data.slice(1);
  const taken = [];
  for (const {x: [x], y: [y], error_x: across, error_y: along} of points) {
    taken.push([toX(x) - 9, toY(y) - 9, toX(x) + 9, toY(y) + 9]);
    if (across.array) taken.push([toX(x - across.arrayminus[0]), toY(y) - 2, toX(x + across.array[0]), toY(y) + 2]);
    if (along.array) taken.push([toX(x) - 2, toY(y + along.array[0]), toX(x) + 2, toY(y - along.arrayminus[0])]);
  }
  const line = plot.data[0];
  for (let i = 1; i < line.x.length; i++)
    for (let t = 0; t <= 1; t += 1 / 32) {
      const x = toX(line.x[i - 1]) * (1 - t) + toX(line.x[i]) * t;
      const y = toY(line.y[i - 1]) * (1 - t) + toY(line.y[i]) * t;
      taken.push([x - 2, y - 2, x + 2, y + 2]);
    }
  const common = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
    Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const chosen = points.map(point => {
    const size = point.textfont.size, x = toX(point.x[0]), y = toY(point.y[0]);
    pen.font = size + "px " + plot.layout.font.family;
    const width = pen.measureText(point.meta).width;
    let best = null;
    for (const side of sides) {
      const [vertical, horizontal] = side.split(" ");
      const left = horizontal === "left" ? x - 9 - width : horizontal === "right" ? x + 9 : x - width / 2;
      const top = vertical === "top" ? y - 9 - size : vertical === "bottom" ? y + 9 : y - size / 2;
      const box = [left, top, left + width, top + size];
      const outside = width * size - common(box, [0, 0, area.width, area.height]);
      const cost = taken.reduce((sum, other) => sum + common(box, other), 2 * outside);
      if (best === null || cost < best.cost) best = {side, box, cost};
    }
    taken.push(best.box);
    return best.side;
  });
  if (chosen.some((side, i) => side !== points[i].textposition))
    Plotly.restyle(plot, {textposition: chosen}, points.map((_, i) => i + 1));
}

function drawHistogram(histogram, place) {
  const shown = histogram.rows.filter(row => {
    const point = data.fronts.flatMap(front => front.points).find(point => point.name === row.name);
    return !point || isShown(field => point[field]);
  });
  const plot = document.getElementById("histogram-" + place);
  plot.parentElement.hidden = shown.length === 0;
  if (plot.parentElement.hidden) return;
  const traces = shown.map((row, i) => ({x: histogram.edges, y: [...row.share.map(share => 100 * share), 0],
    name: text(row.name), mode: "lines", line: {color: row.color, width: 1.5, shape: "hv",
      dash: ["solid", "dash", "dot", "dashdot"][i % 4]}, hovertemplate: "%{x:.3g} ms: %{y:.1f} %"}));
  Plotly.react(plot, traces, layout(axis("ms", {type: "log"}), axis("% of queries", {rangemode: "tozero"}),
    {showlegend: true, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "closest",
      margin: {l: 40, r: 12, t: 36, b: 44}}), settings);
}

function drawLoss(curve, place) {
  const line = (name, y, style) => ({x: curve.step, y, name: text(name), mode: "lines", line: style,
    hovertemplate: "%{y:.4g}"});
  const traces = [line("loss", curve.loss, {color: color("ink"), width: 2})];
  const terms = Object.entries(curve.terms);
  if (terms.length > 1)
    terms.forEach(([name, y], i) => traces.push(line(name, y, {color: termColors[i % termColors.length], width: 1.5})));
  Plotly.react("loss-" + place, traces, layout(axis("step"), axis("", {rangemode: "tozero"}),
    {showlegend: traces.length > 1, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "x unified",
      margin: {l: 40, r: 12, t: 36, b: 44}}), settings);
}

function drawSpeed() {
  const traces = data.curves.map((curve, i) => ({x: curve.step, y: curve.images_per_s, name: text(curve.stage),
    mode: "lines", line: {color: termColors[i % termColors.length], width: 1.5}, hovertemplate: "%{y:,.0f}"}));
  Plotly.react("speed", traces, layout(axis("step"), axis("", {rangemode: "tozero"}),
    {showlegend: true, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "x unified",
      margin: {l: 40, r: 12, t: 36, b: 44}}), settings);
}

function draw() {
  data.fronts.forEach(drawFront);
  data.histograms.forEach(drawHistogram);
  data.curves.forEach(drawLoss);
  if (data.curves.length) drawSpeed();
}

function filter() {
  for (const row of document.querySelectorAll("table:not(.plain) tbody tr"))
    row.hidden = !isShown(field => row.dataset[field]);
  for (const answer of document.querySelectorAll(".example li")) {
    const models = [...answer.querySelectorAll("span")];
    for (const model of models) model.hidden = !isShown(field => model.dataset[field]);
    answer.hidden = models.every(model => model.hidden);
  }
  data.fronts.forEach(drawFront);
  data.histograms.forEach(drawHistogram);
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const isNumber = head.classList.contains("number");
  const key = row => row.cells[column].dataset.key;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
    const order = isNumber ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b));
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table:not(.plain)"))
  [...table.tHead.rows[0].cells].forEach((cell, column) =>
    cell.firstElementChild.addEventListener("click", () => sortBy(table, column)));
for (const choice of filters) choice.addEventListener("change", filter);
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
"""
