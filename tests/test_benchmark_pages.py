"""The scripts in benchmarks/ that write into the README and the docs: their text is what the pages have now."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from toolchain.report.row import ReportRow, complete_row
from toolchain.report.tables import columns

MANIFEST = {
    "revision": "0123456789ab",
    "machine": {"cpu": "Example CPU", "cores": 2},
    "started_at": "2026-01-02T03:04:05+00:00",
}
TEXT = {"baseline": (0.004, 38.0), "student": (0.092, 60.0)}  # role: top-1, seconds of training


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


def small_rows() -> list[ReportRow]:
    return [
        complete_row(
            {
                **{"name": f"{role} fp32", "run": "runs/quickstart", "model": f"{role}-onnxruntime-fp32", "role": role},
                **{"runtime": "onnxruntime", "precision": "fp32", "device": "cpu", "batch": 1, "headline": "stix"},
                **{"p50_ms": 0.08, "top1": top1, "train_s": train_s, "grade": "B", "status": "ok"},
            }
        )
        for role, (top1, train_s) in TEXT.items()
    ]


def test_the_readme_gets_table_and_gain_from_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import readme_table

    (tmp_path / "docs").mkdir()
    (tmp_path / "student").mkdir()
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "rows": small_rows()}))
    (tmp_path / "student" / "manifest.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "report.png").write_bytes(b"chart")
    (tmp_path / "README.md").write_text(f"before\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nafter\n")
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme_table.py", str(tmp_path)])
    readme_table.main()

    written = (tmp_path / "README.md").read_text()
    assert written.startswith("before\n")
    assert written.endswith("\n\nafter\n")
    assert "old" not in written
    gain = "**Distillation: +8.8 points.** 9.2 % top-1 instead of 0.4 %, for 1 min 00 s of training instead of 38 s."
    assert gain in written.splitlines()
    assert "| student fp32 | onnxruntime | fp32 | 0.080 |" in written
    assert "Commit `0123456789ab`, Example CPU, 2 cores, 2026-01-02." in written.splitlines()
    assert (tmp_path / "docs" / "quickstart.png").read_bytes() == b"chart"


def test_a_run_without_baseline_does_not_reach_the_readme() -> None:
    import readme_table

    with pytest.raises(SystemExit, match="make quickstart"):
        readme_table.make_section({"schema": 1, "rows": small_rows()[1:]}, MANIFEST)


def test_the_readme_is_as_the_script_writes_it() -> None:
    import readme_table

    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.partition(readme_table.BEGIN)[2].partition(readme_table.END)[0]
    headers = [column.header for column in columns([complete_row({"headline": "stix", "status": "ok"})])]
    assert "| " + " | ".join(headers) + " |" in section.splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in section.splitlines() if line.startswith("| ")}
    baseline, student = (
        float(cells[f"| {name}"][6].split(" [")[0]) for name in ("baseline fp32", "student fp32 onnxruntime")
    )
    gain = re.search(
        r"^\*\*Distillation: \+([\d.]+) points\.\*\* ([\d.]+) % top-1 instead of ([\d.]+) %", section, re.M
    )
    assert gain is not None
    assert [float(number) for number in gain.groups()] == pytest.approx(
        [student - baseline, student, baseline], abs=0.11
    )
    assert len(readme.splitlines()) <= 120


def test_the_table_of_data_sizes_is_as_the_script_writes_it() -> None:
    import data_table

    result = (REPOSITORY / "benchmarks" / "results" / "data.md").read_text(encoding="utf-8")
    written = data_table.make_table(json.loads(result.splitlines()[-1]))
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition(data_table.BEGIN)[2].partition(data_table.END)[0]
    assert section.strip().splitlines() == written


def test_the_table_of_measuring_is_as_the_script_writes_it() -> None:
    import measuring

    table = measuring.make_table(measuring.Seen(2, 19, 20, 10, 10, 0.024))
    page = (REPOSITORY / "docs" / "measuring.md").read_text(encoding="utf-8")
    assert page.partition(measuring.BEGIN)[2].strip().startswith("\n".join(table) + "\n")


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("ablation_glyphs", "docs/method.md"),
        ("beyond_glyphs", "docs/method.md"),
        ("kd_qat", "docs/method.md"),
        ("measuring", "docs/measuring.md"),
    ],
)
def test_a_page_shows_the_stored_result(script: str, page: str) -> None:
    """Check that a docs page has the table of benchmarks/results/, and that its header is the script's."""
    module = importlib.import_module(script)
    section = (
        (REPOSITORY / page).read_text(encoding="utf-8").partition(module.BEGIN)[2].partition(module.END)[0].strip()
    )
    result = (REPOSITORY / "benchmarks" / "results" / f"{script}.md").read_text(encoding="utf-8")
    assert section.startswith("| ")
    assert section in result
    source = re.sub(r'"\s*\n\s*f?"', "", Path(module.__file__ or "").read_text(encoding="utf-8"))
    assert section.splitlines()[0] in source


def test_the_tables_of_scaling_are_as_the_script_writes_them() -> None:
    """All but the memory of a GPU, which takes a student's forward passes."""
    import scaling

    page = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    document = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
    for name, lines in (("start-up", scaling.start_table(document)), ("teacher caches", scaling.cache_table())):
        begin, end = scaling.marks(name)
        assert page.partition(begin)[2].partition(end)[0].strip().splitlines() == lines
