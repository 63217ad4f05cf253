"""Work of another recipe in a run: `show` describes it, and no command replaces what took long unless asked to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended
from killable import start
from training import files

from export.pipeline.plan_run import plan_run
from toolchain.errors import ClipkdError
from toolchain.pipeline.plan import PlannedStage
from toolchain.pipeline.quantize import quantize_spec
from toolchain.pipeline.stage_inputs import training_inputs
from toolchain.pipeline.train import adopt_spec, train_spec
from toolchain.recipe.load import load_recipe
from toolchain.recipe.recipe import Recipe
from toolchain.report.measured import list_manifests
from toolchain.stage import MANIFEST, REPLACED, Stage, StageSpec, open_stage, run_stage

Clipkd = Callable[..., Ended]
Recipes = Callable[..., Path]

WHOLE = {
    "quantize": {"method": "ptq"},
    "export": {"runtimes": ["onnxruntime"], "precisions": ["fp32", "int8"]},
    "evaluate": {"headline": "novel", "sets": ["novel"]},
}


def write_stage(spec: StageSpec, took_s: float = 1.0, source: str | None = None) -> Stage:
    """A finished stage without its work; `source` is the model that it has, if any."""

    def work(folder: Path) -> dict[str, Any]:
        if source is not None:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "name").write_text(spec.path.name)
        return {"role": spec.path.name}

    made = run_stage(spec, work)
    manifest = made.manifest | {"took_s": took_s}
    (spec.path / MANIFEST).write_text(json.dumps(manifest))
    return Stage(spec.path, manifest, cached=False)


def write_run(path: Path, run: Path, took_s: float = 600.0) -> dict[str, Stage]:
    """A run with a teacher, a student and its int8 student, the last two of which took long."""
    recipe = load_recipe(path)
    assert recipe.teacher is not None
    run.mkdir()
    (run / "recipe.yaml").write_text("# resolved by clipkd:\n" + path.read_text())
    made = {
        "teacher": write_stage(adopt_spec(recipe.teacher, recipe.seed, run / "teacher"), source=recipe.teacher.model)
    }
    made["student"] = write_stage(
        train_spec(training_inputs(recipe), run / "student", {"teacher": made["teacher"]}), took_s
    )
    quantized = quantize_spec(recipe, run, made)
    if quantized is not None:
        made["student-int8"] = write_stage(quantized, took_s)
    return made


def plan(path: Path, run: Path, *overrides: str) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in plan_run(load_recipe(path, list(overrides)), run)}


def texts(clipkd: Clipkd, path: Path, run: Path, *overrides: str) -> dict[str, str]:
    options = [word for override in overrides for word in ("--set", override)]
    ended = clipkd("show", path, "--out", run, "--json", *options)
    assert ended.code == 0, ended.err
    return {stage["stage"]: stage["text"] for stage in json.loads(ended.out)["stages"]}


# show.


def test_show_names_fields_that_differ_and_what_would_happen(
    clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    path, run = tiny_recipe(**WHOLE), tmp_path / "run"
    write_run(path, run)
    found = texts(clipkd, path, run)
    assert (found["teacher"], found["student"], found["student-int8"]) == ("made", "made", "made")
    assert found["exported/student-onnxruntime-int8"] == "not made"
    found = texts(clipkd, path, run, "distill.steps=12", "student.model=vit_t_16")
    assert found["teacher"] == "made"
    assert found["student"] == (
        "of another recipe: distill.steps 3 -> 12; student.model glyphs_tiny -> vit_t_16; took 10.0 min; "
        "would be replaced only with --replace"
    )
    assert found["student-int8"] == (
        "of another recipe: its student is made again; took 10.0 min; would be replaced only with --replace"
    )
    found = texts(clipkd, path, run, "quantize.calibration_samples=7")
    assert found["student"] == "made"
    assert found["student-int8"].startswith("of another recipe: quantize.calibration_samples 256 -> 7; took 10.0 min")
    printed = clipkd("show", path, "--out", run, "--set", "distill.steps=12")
    assert "# student: of another recipe: distill.steps 3 -> 12; took 10.0 min" in printed.out


def test_what_follows_another_teacher_is_replaced_too(tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(**WHOLE), tmp_path / "run"
    write_run(path, run)
    planned = plan(path, run, "teacher.model=vit_t_16", "teacher.init=random")
    assert [planned[name].state for name in ("teacher", "student", "student-int8")] == ["of another recipe"] * 3
    assert planned["student"].superseded[0].differences == ("its teacher is made again",)


def test_a_teacher_that_is_saved_again_keeps_its_student(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """Deleted, or written by an older clipkd: its bytes should be the same, and are compared when it is made."""
    path, run = tiny_recipe(**WHOLE), tmp_path / "run"
    write_run(path, run)
    manifest = json.loads((run / "teacher" / MANIFEST).read_text())
    (run / "teacher" / MANIFEST).write_text(json.dumps(manifest | {"key": "0" * 64, "version": 1}))
    planned = plan(path, run)
    assert planned["teacher"].superseded[0].differences == ("version 1 -> 2",)
    assert (planned["student"].superseded, planned["student-int8"].superseded) == ((), ())
    (run / "teacher").rename(tmp_path / "moved")
    planned = plan(path, run)
    assert planned["teacher"].state == "not made"
    assert (planned["student"].superseded, planned["student-int8"].superseded) == ((), ())


def test_exports_and_measurements_follow_their_checkpoint(tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(**WHOLE | {"quantize": None, "export": {"precisions": ["fp32"]}}), tmp_path / "run"
    made = write_run(path, run)
    name = "student-onnxruntime-fp32"
    for folder, inputs in ((f"exported/{name}", {"checkpoint": made["student"]}), (f"measured/{name}/cpu", {})):
        spec = StageSpec(run / folder, kind="export", version=5, fields={"opset": 20}, inputs=inputs)
        write_stage(spec)
    planned = plan(path, run, "distill.steps=4")
    assert "its checkpoint is made again" in planned[f"exported/{name}"].superseded[0].differences
    assert "its model is made again" in planned[f"measured/{name}/cpu"].superseded[0].differences


def test_show_names_the_step_of_an_interrupted_training(clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(), tmp_path / "run"
    process = start(
        *("distill", path, "--out", run, "--checkpoint-steps", "1", "--set", "distill.steps=99"),
        cache=tmp_path / "cache",
        said=tmp_path / "said",
    )
    assert process.hears(lambda heard: heard == 4), (tmp_path / "said").read_text()
    process.kill()
    found = texts(clipkd, path, run, "distill.steps=99")["student"]
    assert found.startswith("interrupted at step ")
    assert found.endswith("; would be resumed")
    found = texts(clipkd, path, run, "distill.steps=98")["student"]
    assert "of another recipe: distill.steps 99 -> 98; took " in found
    assert found.endswith(" s; would be replaced")


def test_data_that_cannot_be_read_leave_the_rest_of_show(clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(), tmp_path / "run"
    write_run(path, run)
    columns = {"delimiter": ",", "image_column": "file", "caption_column": "title"}
    csv = tiny_recipe("csv", data={"kind": "csv", "paths": [str(tmp_path / "none.csv")], **columns})
    found = texts(clipkd, csv, run)
    assert found["teacher"] == "made"
    assert found["student"].startswith("made; not known whether it is of this recipe: ")
    assert "none.csv" in found["student"]


# Refused, before anything is made or written.


@pytest.mark.parametrize("command", ["run", "distill", "quantize", "export", "cache", "adopt"])
def test_commands_refuse_to_replace_costly_work(
    clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path, command: str
) -> None:
    changes: dict[str, Any] = WHOLE
    if command == "cache":
        changes = WHOLE | {"distill": {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 0, "teacher_cache": {}}}
    path, run = tiny_recipe(**changes), tmp_path / "run"
    write_run(path, run)
    arguments: list[str | Path] = [path, "--out", run, "--set", "distill.steps=4"]
    expected = f"{run / 'student'} would be replaced. It took 10.0 min and is of another recipe: distill.steps 3 -> 4\n"
    if command in ("quantize", "export"):
        arguments = [run, "--set", "distill.steps=4"]
    if command == "cache":
        cache = StageSpec(run / "teacher-cache" / "teacher", kind="teacher-cache", version=1, fields={"seed": 7})
        write_stage(cache, 600)
        expected = f"{cache.path} would be replaced. It took 10.0 min and is of another recipe: "
    if command == "adopt":
        arguments = ["recipes/glyphs_teacher", "--out", run]
        adopted = StageSpec(run / "adopted", kind="adopt", version=2, fingerprints={"model": "another"})
        write_stage(adopted, 600)
        expected = (
            f"{run / 'adopted'} would be replaced. It took 10.0 min and is of another recipe: model: other content\n"
        )
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    ended = clipkd(command, *arguments)
    assert (ended.code, ended.out) == (1, "")
    assert expected in ended.err
    assert "To keep it, choose another --out. To replace it, add --replace to " in ended.err
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before, "not even recipe.yaml"


def test_cheap_work_is_replaced_without_a_question(clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(), tmp_path / "run"
    write_run(path, run, took_s=59)
    ended = clipkd("distill", path, "--out", run, "--set", "distill.steps=2")
    assert ended.code == 0, ended.err
    assert open_stage(run / "student").manifest["fields"]["distill"]["steps"] == 2
    assert not (run / REPLACED).exists()


def test_replace_keeps_the_student_until_the_new_one_is_complete(
    clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    """The new training stops with an error; the old recipe then needs no training."""
    path, run = tiny_recipe(), tmp_path / "run"
    old = write_run(path, run)["student"]
    worse = ["--set", "distill.lr=1e30", "--set", "distill.steps=5"]
    ended = clipkd("distill", path, "--out", run, *worse, "--replace")
    kept = run / REPLACED / "student"
    assert ended.code == 1
    assert ended.err.endswith(f". The earlier student is kept in {kept} until the new one is complete\n")
    assert open_stage(kept).digest == old.digest
    assert not (run / "student").exists()
    shown = clipkd("show", path, "--out", run, *worse).out
    assert f"the earlier one is kept in {kept} until this one is complete" in shown
    assert f"# student: made; kept in {kept}, would be put back" in clipkd("show", path, "--out", run).out
    ended = clipkd("distill", path, "--out", run)
    assert ended.code == 0, ended.err
    assert open_stage(run / "student").digest == old.digest


def test_a_killed_replacement_loses_neither_student(tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(), tmp_path / "run"
    where: dict[str, Any] = {"cache": tmp_path / "cache", "said": tmp_path / "said"}
    words: list[str | Path] = ["distill", path, "--out", run, "--checkpoint-steps", "1"]
    assert start(*words, **where).ends()[0] == 0, where["said"].read_text()
    first = files(run / "student")
    words += ["--set", "distill.steps=30", "--replace"]
    process = start(*words, **where)
    assert process.hears(lambda heard: heard == 4), where["said"].read_text()
    process.kill()
    assert files(run / REPLACED / "student") == first
    process = start(*words, **where)
    assert process.ends()[0] == 0, where["said"].read_text()
    assert process.steps[0] > 1, "it resumed"
    assert not (run / REPLACED).exists()
    assert open_stage(run / "student").manifest["fields"]["distill"]["steps"] == 30


def test_nothing_reads_what_is_kept(clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path) -> None:
    path, run = tiny_recipe(), tmp_path / "run"
    made = write_run(path, run)
    for kept in ("student", "exported/student-onnxruntime-fp32", "measured/student-onnxruntime-fp32/cpu"):
        write_stage(StageSpec(run / REPLACED / kept, kind="x", version=1))
    assert list_manifests(run) == [made[name].path / MANIFEST for name in ("student", "teacher")]
    ended = clipkd("report", run)
    assert "no exported/*/manifest.json" in ended.err
    assert clipkd("verify", run).out == f"ok {run / 'student'}\nok {run / 'teacher'}\n"


def test_run_passes_its_checkpoint_options_on(
    clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = []

    def stop(recipe: Recipe, out: Path, screen: Any, options: Any) -> None:
        got.append(options)
        raise ClipkdError("enough")

    monkeypatch.setattr("toolchain.pipeline.train.train_checkpoints", stop)
    path = tiny_recipe(evaluate=WHOLE["evaluate"])
    options = ["--checkpoint-steps", "7", "--checkpoint-minutes", "0.5", "--replace"]
    assert clipkd("run", path, "--out", tmp_path / "run", *options).code == 1
    assert (got[0].checkpoint_steps, got[0].checkpoint_minutes, got[0].replace) == (7, 0.5, True)


def test_a_run_that_trains_does_not_become_one_that_adopts_nor_the_other_way_round(
    clipkd: Clipkd, tiny_recipe: Recipes, tmp_path: Path, teacher_folder: Path
) -> None:
    """Its recipe.yaml would be lost, and the next export would be of the other model."""
    trained, adopted, path = tmp_path / "trained", tmp_path / "adopted", tiny_recipe()
    write_run(path, trained)
    before = files(trained)
    ended = clipkd("adopt", teacher_folder, "--out", trained)
    assert ended.code == 1
    assert f"{trained}: is the run of recipe mine, which trains a student; its recipe.yaml would be" in ended.err
    assert "choose another --out" in ended.err
    assert {name: content for name, content in files(trained).items() if name in before} == before
    assert clipkd("adopt", teacher_folder, "--out", adopted).code == 0
    ended = clipkd("distill", path, "--out", adopted)
    assert ended.code == 1
    assert "which adopts a model; its recipe.yaml would be replaced" in ended.err
    assert clipkd("adopt", teacher_folder, "--out", trained, "--replace").code == 0
    assert (trained / "student").exists()
