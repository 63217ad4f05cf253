"""Untrained candidates: really built, exported and timed once, then remembered; what fails is a row that says why."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import Ended
from PIL import Image

from export.devices.registry import Device
from export.profiling import interleaved
from export.students import measure as module
from export.students.candidates import CANDIDATES, Candidate, candidates
from export.students.chart import render_students
from export.students.documents import MeasuredStudent, is_measured
from export.students.measure import WORTH, measure_students
from export.students.table import students_table
from toolchain.errors import ArtifactError, ClipkdError, UnavailableBackend, UsageError
from toolchain.recipe.model_names import CONFIG, SHIPPED, architectures, model_folder
from toolchain.text_table import TextTable

Clipkd = Callable[..., Ended]
TINY = Candidate("glyphs_tiny", 0.3, "nobody")
QUICK = {"threads": 1, "seconds": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which graphs were timed, without timing them: candidate a takes 1 ms, b 2 ms, ..."""
    timed: list[str] = []

    def document(folder: Path, name: str, arguments: list[str]) -> dict[str, Any]:
        assert (folder / f"{name}.onnx").is_file()
        timed.append(name)
        ms = 1.0 + ord(name[0]) - ord("a")
        return {"samples_ms": [ms] * 100, "steady": True, "load_ms": 1.0, "first_ms": ms, "peak_rss_bytes": 1 << 20}

    monkeypatch.setattr(interleaved, "runner_here", document)
    monkeypatch.setattr(module, "require", lambda runtime, device: f"{runtime} 1.0")
    return timed


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else runs, for tests that are not about that."""
    monkeypatch.setattr("export.devices.describe._LOOK_AROUND_S", 0.0)
    monkeypatch.setattr("export.device_programs.machine._other_cpu_seconds", lambda: 0.0)


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Candidates that need no torch, and which of them were built; `broken` cannot be."""
    made: list[str] = []

    def built(candidate: Candidate, precision: str, runtime: str, path: Path) -> dict[str, Any]:
        if candidate.model == "broken":
            raise RuntimeError("no such layer\nand a long story")
        path.write_bytes(b"graph")
        made.append(path.stem)
        return {"params_image": 10, "params_text": 20, "gmacs": 0.5, "image_size": 32, "size_bytes": 5}

    monkeypatch.setattr(module, "_build_graph", built)
    return made


def test_every_candidate_is_an_architecture_with_a_source_for_its_number() -> None:
    for candidate in CANDIDATES:
        assert candidate.model in architectures() or model_folder_of(candidate.model).is_dir()
        assert (candidate.published_top1 is None) == (candidate.source == "")
        assert candidate.published_top1 is None or 0 < candidate.published_top1 < 1
        assert (candidate.weights == "") == (candidate.licence == "")
    assert len(CANDIDATES) >= 12


def test_licences_are_those_that_timm_states_for_weights_of_the_same_tower() -> None:
    import timm

    assert sum(bool(candidate.licence) for candidate in CANDIDATES) >= 12
    for candidate in CANDIDATES:
        if candidate.licence:
            assert timm.get_pretrained_cfg(candidate.weights).license == candidate.licence, candidate.model
        folder = SHIPPED / candidate.model
        if candidate.licence and folder.is_dir():
            vision = json.loads((folder / CONFIG).read_text())["model_cfg"]["vision_cfg"]
            assert vision["timm_model_name"] == candidate.weights.partition(".")[0]


def model_folder_of(name: str) -> Path:
    from toolchain.recipe.model import ModelSpec
    from toolchain.recipe.model_names import resolve_model

    folder = model_folder(resolve_model(ModelSpec(model=name, init="random"), Path(), "student"))
    assert folder is not None
    return folder


def test_a_student_is_built_exported_timed_and_then_remembered(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (row,) = measure_students([TINY], ["fp32"], **QUICK)
    assert row["status"] == "ok"
    assert 0 < row["p50_low_ms"] <= row["p50_ms"] <= row["p50_high_ms"] < 1000
    assert row["image_size"] == 32
    assert row["params_image"] > 1000
    assert row["gmacs"] > 0
    assert row["size_bytes"] > 4 * row["params_image"]
    assert row["front"] == list(WORTH)
    assert (row["device"], row["runtime"], row["threads"]) == ("cpu", "onnxruntime", 1)
    monkeypatch.setattr(interleaved, "runner_here", lambda *_: pytest.fail("timed again"))
    assert measure_students([TINY], ["fp32"], **QUICK) == [row]
    assert [path.name for path in cache.rglob("*-*.*")] == ["glyphs_tiny-fp32.json"], "a graph goes once it is timed"

    def crashes(*_: object) -> dict[str, Any]:
        raise ClipkdError("it crashed")

    monkeypatch.setattr(interleaved, "runner_here", crashes)
    (other,) = measure_students([TINY], ["fp32"], threads=2, seconds=0.1)
    assert other["status"] == "it crashed", "with other threads it is measured again"
    assert measure_students([TINY], ["fp32"], **QUICK) == [row], "and the first is still there"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_built_and_run(precision: str) -> None:
    (row,) = measure_students([TINY], [precision], **QUICK)
    assert row["status"] == "ok"
    assert row["size_bytes"] < 4 * row["params_image"]


def test_turns_are_taken(told: list[str], unbuilt: list[str]) -> None:
    measure_students([Candidate("a"), Candidate("b"), Candidate("c")], ["fp32"], **QUICK)
    assert "".join(name[0] for name in told) == "abc" + "cba" + "abc"


def test_only_what_is_not_kept_is_measured(told: list[str], unbuilt: list[str], cache: Path) -> None:
    first = measure_students([Candidate("a"), Candidate("b")], ["fp32"], **QUICK)
    told.clear()
    rows = measure_students([Candidate("a"), Candidate("b"), Candidate("c")], ["fp32"], **QUICK)
    assert told == ["c-fp32"] * 3
    for old, new in zip(first, rows, strict=False):
        assert {**old, "front": None} == {**new, "front": None}
    (kept,) = cache.rglob("a-fp32.json")
    kept.write_text("{")
    told.clear()
    measure_students([Candidate("a")], ["fp32"], **QUICK)
    assert told == ["a-fp32"] * 3, "what cannot be read is measured again"


@pytest.mark.parametrize("turn", range(6))
def test_an_interrupted_call_is_continued(
    told: list[str], unbuilt: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path, turn: int
) -> None:
    whole = interleaved.runner_here

    def interrupted(*arguments: Any) -> dict[str, Any]:
        if len(told) == turn:
            raise SystemExit(130)
        return whole(*arguments)

    wanted = [Candidate("a"), Candidate("b")]
    monkeypatch.setattr(interleaved, "runner_here", interrupted)
    with pytest.raises(SystemExit):
        measure_students(wanted, ["fp32"], **QUICK)
    monkeypatch.setattr(interleaved, "runner_here", whole)
    rows = measure_students(wanted, ["fp32"], **QUICK)
    assert [(row["name"], row["status"], row["processes"]) for row in rows] == [("a", "ok", 3), ("b", "ok", 3)]
    assert unbuilt == ["a-fp32", "b-fp32"], "each was built once"
    assert sorted(told) == ["a-fp32"] * 3 + ["b-fp32"] * 3, "and no turn taken twice"
    assert list(cache.rglob("*.onnx")) == []


def test_the_front_is_of_one_precision_and_of_each_worth(told: list[str], unbuilt: list[str]) -> None:
    wanted = [Candidate("a", 0.3, "x"), Candidate("b"), Candidate("c", 0.2, "x"), Candidate("d", 0.5, "x")]
    rows = measure_students(wanted, ["fp32", "int8"], **QUICK)
    on_front = {row["name"]: row["front"] for row in rows if row["precision"] == "fp32"}
    top1 = "published_fp32_top1"
    assert on_front == {"a": list(WORTH), "b": [], "c": [], "d": [top1]}, "all have as many parameters and GMACs"
    assert {row["name"]: row["front"] for row in rows if row["precision"] == "int8"} == on_front


def test_the_table_of_students_has_a_source_for_each_published_number(told: list[str], unbuilt: list[str]) -> None:
    wanted = [Candidate("a", 0.3, "x", "a.in1k", "mit"), Candidate("b"), Candidate("c", 0.2, "y")]
    rows = [row for row in measure_students(wanted, ["fp32", "int8"], **QUICK) if is_measured(row)]
    assert set(rows[0]) == set(get_type_hints(MeasuredStudent))
    table, *notes = students_table(rows)
    assert isinstance(table, TextTable)
    shown = {(row[0], row[1]): dict(zip(table.headers, row, strict=True)) for row in table.rows}
    assert shown["a", "fp32"] == {
        **{"student": "a", "": "fp32", "p50 ms": "1", "95 %": "1-1", "params M": "0.00 ★", "GMACs": "0.50 ★"},
        **{"MB": "5e-06", "text M": "0.0", "top-1 %": "30.0 [1] ★", "grade": rows[0]["grade"], "licence": "mit"},
    }
    published = {key: row["top-1 %"].strip() for key, row in shown.items()}
    assert published["b", "fp32"] == ""
    assert published["a", "int8"] == "(30.0) [1] ★"
    assert published["c", "int8"] == "(20.0) [2]"
    assert notes[0] == (
        "on cpu, onnxruntime, 1 thread(s), batch 1, image towers alone; text M: parameters of the text tower"
    )
    assert notes[-2:] == ["[1] x", "[2] y"]


def test_what_cannot_be_built_is_a_row_and_is_tried_again(told: list[str], unbuilt: list[str]) -> None:
    for _ in range(2):
        good, bad = measure_students([Candidate("broken"), Candidate("a")], ["fp32"], **QUICK)
        assert (good["name"], good["status"]) == ("a", "ok")
        assert bad["status"] == "RuntimeError: no such layer"
    assert len(told) == 3


def test_two_calls_at_once_do_not_share_graphs(told: list[str], unbuilt: list[str], cache: Path) -> None:
    measure_students([Candidate("a")], ["fp32"], **QUICK)
    (lock,) = cache.rglob(".lock")
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ArtifactError, match="another clipkd measures students on cpu"):
            measure_students([Candidate("a")], ["fp32"], **QUICK)
        process.kill()


@pytest.mark.parametrize(
    ("device", "runtime", "expected"),
    [
        ("gpu", None, "openvino"),
        ("npu", None, "openvino"),
        ("cuda:0", None, "onnxruntime"),
        ("cpu", "openvino", "openvino"),
    ],
)
def test_a_device_says_which_runtime(
    told: list[str], unbuilt: list[str], monkeypatch: pytest.MonkeyPatch, device: str, runtime: str, expected: str
) -> None:
    asked: list[list[str]] = []
    whole = interleaved.runner_here
    monkeypatch.setattr(interleaved, "runner_here", lambda *words: [asked.append(words[2]), whole(*words)][1])
    (row,) = measure_students([Candidate("a")], ["int8"], device=device, runtime=runtime, **QUICK)
    assert (row["device"], row["runtime"]) == (device, expected)
    named = dict(zip(asked[0][::2], asked[0][1::2], strict=True))
    assert (named["--runtime"], named["--device"], named["--precision"]) == (expected, device, "int8")


def test_a_graph_that_fails_is_a_row_and_a_device_that_is_gone_ends_the_call(
    told: list[str], unbuilt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Device("board", "me@board")
    is_there = [True]

    def describe(on: Device | None) -> dict[str, Any]:
        if not is_there[0]:
            raise UnavailableBackend("board: cannot be reached")
        return {"name": "a board"}

    def run(on: Device, folder: Path, name: str, arguments: list[str], *, once: list[Path]) -> dict[str, Any]:
        if name == "a-fp32":
            raise ClipkdError("it broke")
        assert once == ([folder / f"{name}.onnx"] if told.count(name) == 2 else [])
        return interleaved.runner_here(folder, name, arguments)

    monkeypatch.setattr(module, "describe_device", describe)
    monkeypatch.setattr(
        interleaved,
        "look_at",
        lambda on: ({"usable_cores": 4, "clocks_locked": True, "to_lock_clocks": []}, iter([None, 0.9])),
    )
    monkeypatch.setattr(interleaved, "runner_on", run)
    wanted = [Candidate("a"), Candidate("b")]
    good, bad = measure_students(wanted, ["fp32"], device=board)
    assert (bad["name"], bad["status"]) == ("a", "it broke")
    assert (good["name"], good["device"], good["threads"]) == ("b", "board", 4)
    assert (good["grade"], good["flags"]) == ("C", ["BUSY"])

    def breaks(*_: object, **__: object) -> dict[str, Any]:
        is_there[0] = False
        raise ClipkdError("the connection broke")

    monkeypatch.setattr(interleaved, "runner_on", breaks)
    with pytest.raises(UnavailableBackend, match="cannot be reached"):
        measure_students(wanted, ["fp32"], device=board, seconds=0.5)


def test_a_device_that_is_not_there_is_said_before_anything_is_built(unbuilt: list[str], clipkd: Clipkd) -> None:
    ended = clipkd("students", "a", "--device", "cuda:0")
    assert ended.code in (3, 4)
    assert "onnxruntime cuda (here)" in ended.err
    assert unbuilt == []
    assert clipkd("students", "a", "--device", "gpu", "--runtime", "onnxruntime").code == 2
    assert clipkd("students", "a", "--device", "nobody").code == 2
    assert clipkd("students", "a", "--runtime", "tensorrt").code == 2


def test_a_name_that_is_none(cache: Path) -> None:
    with pytest.raises(UsageError, match="ViT-B-32"):
        measure_students([Candidate("ViT-B-33")], ["fp32"], **QUICK)


def test_the_command_prints_writes_and_bounds(
    told: list[str], unbuilt: list[str], clipkd: Clipkd, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = clipkd("students", "a", "vit_t_16", "--precision", "fp32", "--threads", "1", "--out", out, "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)
    assert rows == json.loads((out / "students.json").read_text())
    assert [row["published_fp32_top1"] for row in rows] == [None, 0.426]
    assert Image.open(io.BytesIO((out / "students.png").read_bytes())).size[0] > 800
    ended = clipkd(
        "students", "a", "vit_t_16", "--precision", "fp32", "--threads", "1", "--out", out, "--max-ms", "1.5"
    )
    assert ended.code == 0
    assert "vit_t_16" not in ended.out
    ended = clipkd("students", "a", "--precision", "fp32", "--threads", "1", "--out", out, "--max-ms", "0.5")
    assert ended.code == 5
    assert "no candidate takes at most 0.5 ms on cpu" in ended.err
    assert clipkd("students", "a", "--precision", "fp8", "--out", out).code == 2
    assert candidates([]) == list(CANDIDATES)
    assert render_students([]).startswith(b"\x89PNG")
