"""benchmarks/gpu.py without a GPU: flags, rows of a step that is cut off, missing packages, the packed library."""

import json
import math
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

LIMIT_S = 6.0  # for a program that only starts Python, on a busy machine


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.mark.parametrize(
    ("row", "flagged"),
    [
        ({"waiting": 0.101}, True),
        ({"waiting": 0.1}, False),
        ({"waiting": math.nan}, True),
        ({"side": "ours, cached teacher", "batch": 256, "to_bf16_loop": 1.99}, True),
        ({"side": "ours, cached teacher", "batch": 256, "to_bf16_loop": 2.0}, False),
        ({"side": "ours, live teacher", "batch": 256, "to_bf16_loop": 1.0}, False),
        ({"side": "ours, live teacher", "batch": 1024, "mfu": 0.349}, True),
        ({"side": "ours, live teacher", "batch": 256, "mfu": 0.1}, False),
        ({"side": "straightforward bf16", "batch": 1024, "mfu": 0.1}, False),
        ({"error": 2.0, "bound": 1.0, "holds": False}, True),
    ],
)
def test_a_figure_that_disappoints_is_flagged(row: dict[str, Any], flagged: bool, tmp_path: Path) -> None:
    import gpu_results

    assert bool(gpu_results.disappointments(row)) == flagged
    gpu_results.Step("a step", True, tmp_path, tmp_path, 0.0).record("a table", **row)
    gpu_results.write_page(tmp_path, ["# heading"])
    header = (tmp_path / gpu_results.PAGE).read_text().splitlines()[6]
    assert header.startswith("| ")
    assert header.endswith("| flag |") == flagged


def write_step(folder: Path, name: str, body: str, *imports: str) -> None:
    lines = [f"    {line}" for line in body.splitlines()]
    source = ["import subprocess, sys, time", *imports, "def main(step):", *lines]
    (folder / f"gpu_{name}.py").write_text("\n".join(source))


def run_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bodies: dict[str, str], seconds: float) -> list[Any]:
    """Run steps made for a test, with equal shares of the time; return the lines of the results.

    What stands before a line of three dashes is done when the step is imported.
    """
    import gpu

    for name, body in bodies.items():
        write_step(tmp_path, name, *reversed(body.split("\n---\n")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    planned = tuple(gpu.Planned(name, 1.0) for name in bodies)
    gpu.run_all(planned, tmp_path, tmp_path, time.monotonic() + seconds, dry=True)
    lines: list[Any] = gpu.read_lines(tmp_path)
    return lines


def test_a_step_that_is_cut_off_leaves_its_rows_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = (
        'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\n'
        'step.record("rows", number=1, child=child.pid)\ntime.sleep(600)'
    )
    lines = run_steps(tmp_path, monkeypatch, {"slow": slow, "next": 'step.record("rows", number=2)'}, 2 * LIMIT_S)
    rows = {line["step"]: line["row"] for line in lines if "row" in line}
    notes = {line["step"]: line["note"] for line in lines if "note" in line}
    assert {name: row["number"] for name, row in rows.items()} == {"slow": 1, "next": 2}
    assert notes["slow"].startswith("cut off at its limit")
    assert notes["next"].startswith("done")
    stat = Path(f"/proc/{rows['slow']['child']}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_a_step_leaves_of_its_time_goes_to_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'step.record("limit", seconds=step.left_s())'
    lines = run_steps(tmp_path, monkeypatch, {"first": body, "second": body}, 4 * LIMIT_S)
    first_s, second_s = (line["row"]["seconds"] for line in lines if "row" in line)
    assert first_s <= 2 * LIMIT_S < second_s


def test_a_step_that_runs_again_replaces_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {name: 'step.record("rows", number=1)' for name in ("first", "second")}
    before = run_steps(tmp_path, monkeypatch, bodies, 4 * LIMIT_S)
    after = run_steps(tmp_path, monkeypatch, {"first": 'step.record("rows", number=2)'}, 2 * LIMIT_S)
    assert [line for line in after if line["step"] == "second"] == [x for x in before if x["step"] == "second"]
    assert [line["row"] for line in after if line["step"] == "first" and "row" in line] == [{"number": 2}]


def test_a_missing_package_costs_a_step_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "needy": 'step.record("rows", number=1)\nimport no_such_package',
        "at_once": "import no_such_package\n---\nstep.note('never')",
        "wrong": "raise ValueError('no')",
    }
    lines = run_steps(tmp_path, monkeypatch, bodies, 6 * LIMIT_S)
    notes = {name: [line["note"] for line in lines if line["step"] == name and "note" in line] for name in bodies}
    for name in ("needy", "at_once"):
        assert notes[name][0] == "skipped: no_such_package is not installed"
        assert notes[name][1].startswith("done")
    assert notes["wrong"][0] == "failed: ValueError: no"
    assert notes["wrong"][1].startswith("failed, exit code 1")


def test_a_dry_run_hides_the_gpu_and_finds_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setenv("PYTHONPATH", "/carried")
    environment = gpu.make_environment(tmp_path, dry=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    found = environment["PYTHONPATH"].split(os.pathsep)
    assert found == [str(REPOSITORY), str(REPOSITORY / "benchmarks"), "/carried"]


def test_every_step_is_a_program_and_in_the_help() -> None:
    import gpu

    assert sum(step.seconds for step in gpu.STEPS) == 9.5 * 60
    for step in gpu.STEPS:
        assert (REPOSITORY / "benchmarks" / f"gpu_{step.name}.py").is_file()
        assert f"\n    {step.name} " in (gpu.__doc__ or "")


def test_the_document_fails_if_a_step_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    for note, code in (("done, 1 s of 2 s", 0), ("cut off at its limit, 2 s of 2 s", 5)):
        step = gpu.Step("losses", False, tmp_path, tmp_path, 0.0)
        step.note(note)
        with pytest.raises(SystemExit) as ended:
            gpu.conclude(tmp_path, dry=False)
        assert ended.value.code == code
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["steps"] == {"losses": note}


def fat_binary(kinds: dict[int, bytes]) -> bytes:
    entries = b"".join(
        struct.pack("<HHIQIIII", 2, 257, 64, len(payload), 0, 0, 65544, sm) + bytes(32) + payload
        for sm, payload in kinds.items()
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_the_packed_library_keeps_its_layout_and_the_kernels_of_one_gpu() -> None:
    from gpu_kit_onnxruntime import keep_kernels

    general = {75: b"a" * 8, 80: b"b" * 16, 90: b"c" * 24, 120: b"d" * 8}
    library = b"code" * 3 + fat_binary(general) + struct.pack("<I", 0xBA55ED50) + b"chance" * 9
    library += fat_binary({90: b"e" * 32, 120: b"f" * 8}) + b"data"
    packed, kept = keep_kernels(library, 90)
    assert kept == 24
    assert len(packed) == len(library)
    for byte in b"abdef":
        assert bytes([byte]) * 8 not in packed
    changed = [i for i, (x, y) in enumerate(zip(packed, library, strict=True)) if x != y]
    assert len(changed) == 8 + 16 + 8 + 32 + 8
    assert b"c" * 24 in packed
    with pytest.raises(SystemExit, match="sm_70"):
        keep_kernels(library, 70)
