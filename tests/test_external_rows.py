"""Tables of the user's and of trtexec: what they give, and what is said of what they cannot."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from conftest import Ended
from test_report import edit, make_run

from toolchain.errors import UsageError
from toolchain.report.collect import collect
from toolchain.report.compare import compare
from toolchain.report.external_rows import external_rows
from toolchain.stage import RESOLVED

Clipkd = Callable[..., Ended]


def table(tmp_path: Path, text: str, name: str = "rows.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_and_json_give_the_same_rows(tmp_path: Path) -> None:
    csv = table(tmp_path, 'name,device,p50_ms,top1,size_bytes\n"Mobile, B",orin,4.5,0.41,30000000\nother,orin,,0.2,\n')
    rows = external_rows(csv)
    content = [
        {"name": "Mobile, B", "device": "orin", "p50_ms": 4.5, "top1": 0.41, "size_bytes": 30_000_000},
        {"name": "other", "device": "orin", "top1": 0.2, "p50_ms": None},
    ]
    same = external_rows(table(tmp_path, json.dumps(content), "rows.json"))
    assert [made | {"source": ""} for made in rows] == [made | {"source": ""} for made in same]
    assert rows[0]["role"] == "external"
    assert rows[0]["size_bytes"] == 30_000_000
    assert "p50_ms" not in rows[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,device,p50ms\na,b,1\n", "row 1: unknown field 'p50ms'; did you mean p50_ms?"),
        ("name,p50_ms\na,1\n", "row 1: no device; every row needs name and device"),
        ("name,device,top1\na,b,41\n", "expected a fraction from 0 to 1, not percent"),
        ("name,device,p50_ms\na,b,fast\n", "p50_ms 'fast'; expected a number of at least 0"),
        ("name,device,p50_ms\na,b,nan\n", "p50_ms 'nan'; expected a number of at least 0"),
        ("name,device,precision\na,b,fp8\n", "precision 'fp8'; expected one of fp32"),
        ("name,device\na,b,c\n", "more cells than the header"),
        ("name,device\n", "no rows; expected a CSV header and rows"),
        ('name,device\n"a,b\n', "not CSV"),
    ],
)
def test_a_table_that_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        external_rows(table(tmp_path, text))


@pytest.mark.parametrize("text", ["{}", "[1]", "no"])
def test_json_that_is_no_table(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"rows\.json: (not JSON|expected a JSON list of objects)"):
        external_rows(table(tmp_path, text, "rows.json"))


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_the_times_of_trtexec(tmp_path: Path, count: int) -> None:
    times_ms = np.random.default_rng(0).gamma(4, 0.5, count)
    (tmp_path / "times.json").write_text(json.dumps([{"computeMs": t, "inMs": 0.1} for t in times_ms.tolist()]))
    (row,) = external_rows(table(tmp_path, "name,device,top1,trtexec\nengine,orin,0.4,times.json\n"))
    assert row["runtime"] == "tensorrt"
    assert row["p50_ms"] == pytest.approx(np.median(times_ms))
    assert ("p90_ms" in row, "p99_ms" in row) == (count >= 64, count >= 662), "below the floor it is not known"


@pytest.mark.parametrize("content", [None, "[]", "{}", '[{"latencyMs": 1}]', '[{"computeMs": NaN}]'])
def test_times_that_are_not_trtexecs(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "times.json").write_text(content)
    with pytest.raises(UsageError, match=r"row 1: trtexec: .*times\.json"):
        external_rows(table(tmp_path, "name,device,trtexec\nengine,orin,times.json\n"))


def test_runs_and_tables_share_one_report(clipkd: Clipkd, tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    rows = table(
        tmp_path,
        'name,device,machine,batch,headline,p50_ms,top1\nrival,cpu,"Example CPU <2>, 2 cores",1,stix,0.3,0.6\n',
    )
    out = tmp_path / "together"
    ended = clipkd("report", first, second, "--out", out, "--external", rows, "--json")
    assert ended.code == 0
    document = json.loads(ended.out)
    names = [made["name"] for made in document["rows"]]
    assert len(set(names)) == len(names) == 9
    assert {"student fp32 first", "student fp32 second", "rival"} <= set(names)
    (rival,) = (made for made in document["rows"] if made["name"] == "rival")
    assert set(rival) == set(document["rows"][0]), "every field is in every row"
    assert rival["pareto"] is False, "no grade, and there are rows with one"
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {
        f"report.{kind}" for kind in ("json", "csv", "md", "png", "svg", "html")
    }
    page = (out / "report.html").read_text()
    assert "first: student" in page
    assert "second: recipe" in page


def test_several_runs_need_a_place(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("report", make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert ended.code == 2
    assert "say where to write it: --out DIR" in ended.err


def change(run: Path, model: str, p50_ms: float, top1: float) -> None:
    measured = run / "measured" / model / "cpu"
    edit(measured / "profile.json", image={"p50_ms": p50_ms, "p50_low_ms": 0.98 * p50_ms, "p50_high_ms": 1.02 * p50_ms})
    sets = json.loads((measured / "evaluation.json").read_text())["sets"]
    sets["stix"] |= {"top1": top1}
    edit(measured / "evaluation.json", sets=sets)


def test_what_got_worse_since(clipkd: Clipkd, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(f"# {RESOLVED}\nname: glyphs\n")
    old = collect([run])
    tolerances = {"max_slower": 0.05, "max_top1_loss": 0.005}
    assert compare(old, collect([run]), **tolerances).holds
    (tmp_path / "old.json").write_text(json.dumps(old))
    change(run, "student-onnxruntime-int8", 0.49, 1391 / 2000)  # 2 % slower, within the noise
    change(run, "baseline-onnxruntime-fp32", 0.5, 0.7)  # better
    assert compare(old, collect([run]), **tolerances).holds
    assert clipkd("report", run, "--against", tmp_path / "old.json").code == 0
    change(run, "student-onnxruntime-fp32", 1.2, 0.69)
    compared = compare(old, collect([run]), **tolerances)
    worse = {made.name: made.worse for made in compared.changes if made.worse}
    assert worse == {"student fp32": ["31.9 % slower", "2.0 points of top-1 lost"]}
    ended = clipkd("report", run, "--against", tmp_path / "old.json", "--json")
    assert ended.code == 5
    assert json.loads(ended.out)["holds"] is False
    assert "worse than" in ended.err


@pytest.mark.parametrize("medians_ms", [[0.5], [0.49, 0.51], [0.49, 0.5, 0.51]], ids=len)
def test_twice_as_slow_is_worse_however_few_the_processes(tmp_path: Path, medians_ms: list[float]) -> None:
    run = make_run(tmp_path / "run")

    def timed(factor: float) -> dict[str, Any]:
        ms = [factor * one for one in medians_ms]
        image = {"p50_ms": median(ms), "p50_low_ms": min(ms), "p50_high_ms": max(ms), "p50_by_process_ms": ms}
        edit(run / "measured" / "student-onnxruntime-int8" / "cpu" / "profile.json", image=image)
        return collect([run])

    old, new = timed(1), timed(2)
    tolerances = {"max_slower": 0.05, "max_top1_loss": 0.005}
    assert compare(old, old, **tolerances).holds
    worse = {made.name: made.worse for made in compare(old, new, **tolerances).changes if made.worse}
    assert worse == {"student int8": ["100.0 % slower"]}


def test_a_model_that_is_gone_is_worse(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    old = collect([run])
    new = {"rows": [made for made in old["rows"] if made["role"] != "teacher"]}
    compared = compare(old, new, max_slower=1.0, max_top1_loss=1.0)
    assert (compared.only_old, compared.only_new, compared.holds) == (["teacher fp32"], [], False)
    assert compare(new, old, max_slower=0.0, max_top1_loss=0.0).holds, "what is new is not worse"


@pytest.mark.parametrize(("field", "said"), [("p50_ms", "nan % slower"), ("top1", "nan points of top-1 lost")])
def test_a_number_that_is_nan_is_worse(tmp_path: Path, field: str, said: str) -> None:
    """A report edited by hand, or of another program: JSON has no NaN, but Python's reader takes it."""
    old = collect([make_run(tmp_path / "run")])
    new = json.loads(json.dumps(old))
    for row in new["rows"]:
        row[field] = math.nan
        row["p50_by_process_ms"] = [math.nan, 1.0, None]
    compared = compare(old, new, max_slower=0.5, max_top1_loss=0.5)
    assert not compared.holds
    assert all(change.worse == [said] for change in compared.changes)
