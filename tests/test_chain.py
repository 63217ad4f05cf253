"""The chain of single commands in the README: each reads what the one before it wrote, and nothing is lost between."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Ended
from PIL import Image

from export.devices import describe
from toolchain.stage import open_stage

Clipkd = Callable[..., Ended]
SHORT = ("--processes", "1", "--seconds", "0.03")


def readme_chain() -> list[list[str]]:
    """Return the words of each command of the README's chain, without `clipkd`."""
    text = (REPOSITORY / "README.md").read_text().split("<!-- chain")[1].split("<!-- end of chain")[0]
    (block,) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def own_set(folder: Path) -> dict[str, Any]:
    """Return an evaluate section: twenty images of noise in four classes."""
    for index in range(20):
        path = folder / f"class {index % 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (40, 36, 3), np.uint8)).save(path)
    return {"headline": "own", "sets": [{"kind": "folder", "name": "own", "path": str(folder)}], "examples": 3}


def numbers(run: Path, model: str = "student-onnxruntime-fp32") -> dict[str, Any]:
    """Return the parts of a stored measurement on the CPU, by file, and its manifest."""
    folder = open_stage(run / "measured" / model / "cpu").path
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that `run` makes once, and then copies."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def run(
    exported: Path, tmp_path: Path, tiny_recipe: Callable[..., Path], clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run without measurements: a student of three steps, its teacher, both exported in fp32."""
    monkeypatch.setattr(describe, "_LOOK_AROUND_S", 0.0)
    monkeypatch.setattr("toolchain.report.chart.render_chart", lambda report, form: b"drawn")
    made = exported / "run"
    if not made.exists():
        recipe = tiny_recipe(evaluate=own_set(exported / "images"), profile={"processes": 1, "seconds": 0.03})
        assert clipkd("distill", recipe, "--out", made).code == 0
        assert clipkd("export", made).code == 0
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.usefixtures("one_thread")
def test_the_chain_of_the_readme_ends_in_a_report_without_gaps(
    tiny_recipe: Callable[..., Path], tmp_path: Path, clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "_LOOK_AROUND_S", 0.0)
    tiny_recipe(
        "my",
        quantize={"method": "ptq", "calibration_samples": 8},
        export={"precisions": ["fp32", "int8"]},
        evaluate=own_set(tmp_path / "images"),
        profile={"processes": 1, "seconds": 0.03},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolchain.report.chart.render_chart", lambda report, form: b"drawn")
    ended: dict[str, Ended] = {}
    for words in readme_chain():
        expanded = [path for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]
        ended[words[0]] = clipkd(*expanded, *(SHORT if words[0] == "profile" else ()))
        assert ended[words[0]].code == 0, (words, ended[words[0]].err)
    assert list(ended) == ["distill", "quantize", "export", "evaluate", "profile", "report", "best"]
    rows = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text())["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [
        (name, "ok") for name in ("teacher fp32", "student fp32", "student int8")
    ]
    assert all(row["top1"] is not None and row["p50_ms"] > 0 for row in rows)
    assert "measure" not in ended["report"].err
    assert ended["best"].out.startswith("best: student ")
    assert "--include teacher" in ended["best"].out
    before = {row["name"]: row["p50_ms"] for row in rows}
    again = clipkd("run", "runs/mine/recipe.yaml", "--out", "runs/mine", "--json")
    assert again.code == 0, again.err
    lines = [line.split() for line in again.err.splitlines() if line.startswith("measured/")]
    assert [line[1] for line in lines] == ["cached"] * 3, "clipkd run reuses what the single commands measured"
    assert {row["name"]: row["p50_ms"] for row in json.loads(again.out)["rows"]} == before


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("first", ["evaluate", "profile"])
def test_the_other_command_adds_its_part_and_what_is_missing_is_named(run: Path, clipkd: Clipkd, first: str) -> None:
    model = run / "exported" / "student-onnxruntime-fp32"
    teacher = run / "exported" / "teacher-onnxruntime-fp32"
    options = {"evaluate": (), "profile": SHORT}
    unmeasured = clipkd("best", run)
    assert unmeasured.code == 5
    assert f"Measure first:\n  clipkd profile {model} --evaluate\n" in unmeasured.err
    assert clipkd(first, model, *options[first]).code == 0
    other = "profile" if first == "evaluate" else "evaluate"
    half = clipkd("best", run)
    assert half.code == 5
    assert f"Measure first:\n  clipkd {other} {model}\n" in half.err
    before = numbers(run)
    assert clipkd(other, model, *options[other]).code == 0
    after = numbers(run)
    kept = "evaluation" if first == "evaluate" else "profile"
    assert after[kept] == before[kept]
    assert after["manifest"]["fields"] == {
        "evaluate": after["manifest"]["fields"]["evaluate"],
        "profile": {"processes": 1, "seconds": 0.03},
    }
    with np.load(run / "measured" / model.name / "cpu" / "samples.npz") as samples:
        assert {"own_rank", "own_top1", "image_ms", "image_process"} <= set(samples.files)
    best = clipkd("best", run)
    assert best.out.startswith("best: student fp32 ")
    assert f"clipkd profile {teacher} --evaluate" in best.err, "a row that is not measured is named, though not needed"


@pytest.mark.usefixtures("one_thread")
def test_scores_are_reused_and_latencies_are_measured_again(run: Path, clipkd: Clipkd) -> None:
    model = run / "exported" / "student-onnxruntime-fp32"
    assert clipkd("profile", model, *SHORT, "--evaluate").code == 0
    first = numbers(run)
    ended = clipkd("evaluate", model, "--json")
    assert "cached" in ended.err
    assert json.loads(ended.out)["models"][0]["sets"] == first["evaluation"]["sets"]
    assert clipkd("profile", model, *SHORT).code == 0
    second = numbers(run)
    assert second["evaluation"] == first["evaluation"]
    assert second["profile"]["call"] != first["profile"]["call"]


@pytest.mark.usefixtures("one_thread")
def test_a_longer_measurement_is_kept(run: Path, clipkd: Clipkd) -> None:
    model = run / "exported" / "student-onnxruntime-fp32"
    assert clipkd("profile", model, "--processes", "2", "--seconds", "0.08").code == 0
    longer = numbers(run)["profile"]
    ended = clipkd("profile", model, *SHORT, "--evaluate", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)[0]["image"]["processes"] == 1
    assert (
        f"only printed, because its run has a longer measurement, of 2 processes and 0.08 s; delete {run}" in ended.err
    )
    assert numbers(run)["profile"] == longer
    assert "own" in numbers(run)["evaluation"]["sets"]
    ended = clipkd("run", run / "recipe.yaml", "--out", run, "--json")
    assert ended.code == 0, ended.err
    assert numbers(run)["profile"] == longer, "nor does clipkd run replace it by one of 0.03 s"
    assert clipkd("profile", model, "--processes", "2", "--seconds", "0.1").code == 0
    assert numbers(run)["manifest"]["fields"]["profile"] == {"processes": 2, "seconds": 0.1}


@pytest.mark.usefixtures("one_thread")
def test_a_model_exported_again_keeps_no_number_of_the_old_one(run: Path, clipkd: Clipkd) -> None:
    model = run / "exported" / "student-onnxruntime-fp32"
    assert clipkd("profile", model, *SHORT, "--evaluate").code == 0
    assert clipkd("export", run, "--set", "export.opset=18").code == 0
    assert f"clipkd profile {model} --evaluate" in clipkd("best", run).err
    assert clipkd("profile", model, *SHORT).code == 0
    assert "evaluation" not in numbers(run)
    assert clipkd("evaluate", model).code == 0
    assert "profile" in numbers(run)


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_is_stored_as_a_reference(run: Path, clipkd: Clipkd) -> None:
    ended = clipkd("evaluate", run / "student", run / "exported" / "student-onnxruntime-fp32", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["models"][0]["sets"]["own"]["n"] == 20
    assert clipkd("profile", run / "student", *SHORT).code == 0
    rows = json.loads(clipkd("report", run, "--json").out)["rows"]
    (reference,) = (row for row in rows if row["pytorch"] == "eager")
    assert (reference["role"], reference["device"], reference["status"]) == ("student", "cpu", "ok")
    ended = clipkd("run", run / "recipe.yaml", "--out", run, "--set", "profile.pytorch=[eager]", "--json")
    assert ended.code == 0, ended.err
    assert re.search(r"measured/student-pytorch-eager +cached", ended.err)
    shutil.rmtree(run / "exported" / "student-onnxruntime-fp32")
    ended = clipkd("evaluate", run / "student")
    assert ended.code == 0
    assert f"{run / 'student'}: only printed; a run stores" in ended.err


@pytest.mark.usefixtures("one_thread")
def test_other_sets_and_models_outside_of_a_run_are_only_printed(run: Path, tmp_path: Path, clipkd: Clipkd) -> None:
    model = run / "exported" / "student-onnxruntime-fp32"
    ended = clipkd("evaluate", model, "--set", "evaluate.examples=1")
    assert ended.code == 0
    assert f"{model}: only printed, because these evaluation sets are not those of {run / 'recipe.yaml'}" in ended.err
    outside = shutil.copytree(model, tmp_path / "outside")
    assert clipkd("evaluate", outside, "--recipe", run / "recipe.yaml").code == 0
    assert clipkd("profile", outside, *SHORT).code == 0
    assert not (run / "measured").exists()
