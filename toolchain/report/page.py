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
from toolchain.precisions import PRECISIONS
from toolchain.report.chart import accuracy_axis, front_line, latency_axis
from toolchain.report.findings import findings
from toolchain.report.pareto import front_groups, group_title
from toolchain.report.row import ROLE_COLORS, TRUSTED_GRADES, Row, read_json
from toolchain.report.tables import READING, columns, set_rows
from toolchain.report.units import duration

_TRAINED = ("student", "baseline", "student-int8", "teacher")
_MAX_CURVE_POINTS = 600  # more cannot be told apart on a screen, and a long run would make a page of many megabytes


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
                "symbol": _symbol(row),
                "hover": [
                    [column.header, column.text(row)] for column in shown[3:] if column.text(row) not in ("", "-", "ok")
                ],
            }
            for row in group
        ],
    }


def _symbol(row: Row) -> str:
    shape = PRECISIONS[row["precision"]].symbol if row["precision"] in PRECISIONS else "circle"
    return ("x" if row["pytorch"] else shape) + ("" if row["grade"] in TRUSTED_GRADES else "-open")


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


def _asset(name: str) -> str:
    """The page's stylesheet or script, a file beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
