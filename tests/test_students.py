"""Untrained candidates: really built, exported and timed once, then remembered; what fails is a row that says why."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended
from PIL import Image

from export import students as module
from export.students import CANDIDATES, Candidate, candidates, measure_students, render_students
from toolchain.errors import ClipkdError, UsageError
from toolchain.sources import architectures, model_folder

Clipkd = Callable[..., Ended]
TINY = Candidate("glyphs_student", 0.3, "nobody")
QUICK = {"threads": 1, "seconds": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which graphs were timed, without timing them: a candidate takes as many ms as its place in order."""
    timed: list[str] = []

    def document(graph: Path, size: int, threads: int, seconds: float) -> dict[str, Any]:
        assert graph.is_file()
        timed.append(graph.name)
        ms = 1.0 + int(graph.stem)
        return {"samples_ms": [ms] * 100, "steady": True, "load_ms": 1.0, "first_ms": ms, "peak_rss_bytes": 1 << 20}

    monkeypatch.setattr(module, "_timed", document)
    return timed


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that need no torch; `broken` cannot be built."""

    def built(candidate: Candidate, precision: str, path: Path) -> dict[str, Any]:
        if candidate.model == "broken":
            raise RuntimeError("no such layer\nand a long story")
        path.write_bytes(b"graph")
        return {"params_image": 10, "gmacs": 0.5, "image_size": 32, "size_bytes": 5}

    monkeypatch.setattr(module, "_built", built)


def test_every_candidate_is_an_architecture_with_a_source_for_its_number() -> None:
    for candidate in CANDIDATES:
        assert candidate.model in architectures() or model_folder_of(candidate.model).is_dir()
        assert (candidate.published_top1 is None) == (candidate.source == "")
        assert candidate.published_top1 is None or 0 < candidate.published_top1 < 1
    assert len(CANDIDATES) >= 12


def model_folder_of(name: str) -> Path:
    from toolchain.recipe import ModelSpec
    from toolchain.sources import anchored

    folder = model_folder(anchored(ModelSpec(model=name, init="random"), Path(), "student"))
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
    assert row["front"]
    monkeypatch.setattr(module, "_timed", lambda *_: pytest.fail("timed again"))
    assert measure_students([TINY], ["fp32"], **QUICK) == [row]

    def crashes(*_: object) -> dict[str, Any]:
        raise ClipkdError("it crashed")

    monkeypatch.setattr(module, "_timed", crashes)
    (other,) = measure_students([TINY], ["fp32"], threads=2, seconds=0.1)
    assert other["status"] == "it crashed", "with other threads it is measured again"


def test_turns_are_taken(told: list[str], unbuilt: None) -> None:
    measure_students([Candidate("a"), Candidate("b"), Candidate("c")], ["fp32"], **QUICK)
    assert told == ["0.onnx", "1.onnx", "2.onnx", "2.onnx", "1.onnx", "0.onnx", "0.onnx", "1.onnx", "2.onnx"]


def test_only_what_is_not_kept_is_measured(told: list[str], unbuilt: None, cache: Path) -> None:
    first = measure_students([Candidate("a"), Candidate("b")], ["fp32"], **QUICK)
    told.clear()
    rows = measure_students([Candidate("a"), Candidate("b"), Candidate("c")], ["fp32"], **QUICK)
    assert told == ["0.onnx"] * 3
    assert [row for row in rows if row["name"] != "c"] == first
    (cache / "clipkd" / "students" / "a-fp32.json").write_text("{")
    told.clear()
    measure_students([Candidate("a")], ["fp32"], **QUICK)
    assert told == ["0.onnx"] * 3, "what cannot be read is measured again"


def test_the_front_is_of_what_is_published(told: list[str], unbuilt: None) -> None:
    wanted = [Candidate("a", 0.3, "x"), Candidate("b"), Candidate("c", 0.2, "x"), Candidate("d", 0.5, "x")]
    rows = measure_students(wanted, ["fp32"], **QUICK)
    assert [(row["name"], row["front"]) for row in rows] == [("a", True), ("b", False), ("c", False), ("d", True)]


def test_what_cannot_be_built_is_a_row_and_is_tried_again(told: list[str], unbuilt: None) -> None:
    for _ in range(2):
        good, bad = measure_students([Candidate("broken"), Candidate("a")], ["fp32"], **QUICK)
        assert (good["name"], good["status"]) == ("a", "ok")
        assert bad["status"] == "RuntimeError: no such layer"
    assert len(told) == 3


def test_a_name_that_is_none(cache: Path) -> None:
    with pytest.raises(UsageError, match="ViT-B-32"):
        measure_students([Candidate("ViT-B-33")], ["fp32"], **QUICK)


def test_the_command_prints_writes_and_bounds(told: list[str], unbuilt: None, clipkd: Clipkd, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = clipkd("students", "a", "vit_t_16", "--precision", "fp32", "--threads", "1", "--out", out, "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)
    assert rows == json.loads((out / "students.json").read_text())
    assert [row["published_top1"] for row in rows] == [None, 0.426]
    assert Image.open(io.BytesIO((out / "students.png").read_bytes())).size[0] > 800
    ended = clipkd(
        "students", "a", "vit_t_16", "--precision", "fp32", "--threads", "1", "--out", out, "--max-ms", "1.5"
    )
    assert ended.code == 0
    assert "vit_t_16" not in ended.out
    ended = clipkd("students", "a", "--precision", "fp32", "--threads", "1", "--out", out, "--max-ms", "0.5")
    assert ended.code == 5
    assert "no candidate takes at most 0.5 ms" in ended.err
    assert clipkd("students", "a", "--precision", "fp8", "--out", out).code == 2
    assert candidates([]) == list(CANDIDATES)
    assert render_students([]).startswith(b"\x89PNG")
