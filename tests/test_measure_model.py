"""A checkpoint measured in PyTorch beside its export: the same answers, a row for reference, and what it needs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, STUDENT, Ended
from PIL import Image
from test_choose_precision import Silent

from export.device_programs.runner import fixed_batch, open_checkpoint
from export.devices import describe
from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.model_folder import find_exported
from export.pipeline import measure_model
from export.pipeline.cpu_measurement import Subject, scoring
from export.pipeline.measure import measure_on_cpu
from export.pipeline.plan import PlannedReference, plan_exports, plan_references
from export.profiling.protocol import Effort, Target, profile
from export.runtime.exported_model import open_exported
from export.runtime.remote_model import reference_encoders
from toolchain.errors import GateError, MissingDependency, UsageError
from toolchain.evaluation.open_sets import open_set
from toolchain.models.build import load_model, save_model
from toolchain.recipe.evaluate import EvaluateSpec, FolderSet
from toolchain.recipe.export import ProfileSpec
from toolchain.recipe.load import load_recipe, recipe_path
from toolchain.recipe.recipe import Recipe
from toolchain.report.choose_model import choose_model
from toolchain.report.collect import collect
from toolchain.stage import StageSpec, open_stage, run_stage

SAME_FEATURE = 1e-5  # of a unit vector: ONNX Runtime against PyTorch in float32
BRIEF = ProfileSpec(processes=1, seconds=0.05)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EvaluateSpec:
    """Twenty pictures of noise in four classes."""
    folder = tmp_path_factory.mktemp("set")
    for index in range(20):
        path = folder / f"class {index % 4}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (40, 36, 3), np.uint8)).save(path)
    return EvaluateSpec(headline="own", sets=(FolderSet(kind="folder", name="own", path=str(folder)),), examples=5)


@pytest.fixture(scope="module")
def run(spec: EvaluateSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained student and its fp32 export."""
    run = tmp_path_factory.mktemp("made") / "run"
    model = load_model(STUDENT, random_seed=3)
    about: dict[str, Any] = {"version": 1, "fields": {}, "fingerprints": {}, "inputs": {}}

    def train(folder: Path) -> dict[str, Any]:
        save_model(model, folder)
        return {}

    def export(folder: Path) -> dict[str, Any]:
        return {**export_onnx(model, folder, PlannedExport("student", "fp32"), open_set(spec.headline_set))}

    run_stage(StageSpec(run / "student", kind="train", **about), train)
    run_stage(StageSpec(run / "exported" / "student-onnxruntime-fp32", kind="export", **about), export)
    return run


@pytest.mark.usefixtures("one_thread")
def test_a_reference_is_measured_as_an_export_is_and_ships_as_nothing(run: Path, spec: EvaluateSpec) -> None:
    checkpoint, exported = run / "student", run / "exported" / "student-onnxruntime-fp32"
    subject = Subject(run, open_stage(exported), open_stage(checkpoint))
    stage = measure_on_cpu(subject, Silent(), scored=scoring(spec), timing=BRIEF)
    assert stage.path == run / "measured" / "student-pytorch-eager" / "cpu"
    names = {path.name for path in stage.path.iterdir()}
    assert names == {
        *("manifest.json", "parity.json", "evaluation.json", "examples.json", "samples.npz", "profile.json")
    }
    profiled = json.loads((stage.path / "profile.json").read_text())
    assert profiled["machine"]["pytorch"] == torch.__version__
    assert profiled["size_bytes"] == (checkpoint / "open_clip_model.safetensors").stat().st_size
    assert len(json.loads((stage.path / "examples.json").read_text())["images"]) == 5

    row, unmeasured = sorted(collect([run])["rows"], key=lambda row: row["status"] != "ok")
    assert (row["name"], row["status"]) == ("student fp32 pytorch eager", "ok")
    assert (row["role"], row["runtime"], row["pytorch"], row["precision"]) == ("student", "pytorch", "eager", "fp32")
    assert row["source"] == "measured/student-pytorch-eager/cpu/manifest.json"
    assert row["params_image"] > 0
    assert row["p50_ms"] > 0
    assert row["top1"] is not None
    assert not row["pareto"]
    assert unmeasured["pytorch"] is None
    choice = choose_model([row, unmeasured], [], "top1", "cpu")
    assert choice.best is None
    assert choice.rejected[0][1] == ["reference row: the checkpoint in PyTorch, which is not an exported model"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changed", [None, "machine", "versions"])
def test_the_parity_check_is_repeated_where_something_changed_since_the_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    exported = open_stage(copied / "exported" / "student-onnxruntime-fp32")
    found, again = {"image": "as at export"}, {"image": "checked again"}
    exported.manifest["summary"] |= {"runtime": "onnxruntime", "precision": "fp32", "parity": found}
    if changed:
        monkeypatch.setattr(measure_model, changed, lambda: {"another": changed})
    monkeypatch.setattr(measure_model, "prove", lambda *_, **__: {"parity": again})
    (tmp_path / "measured").mkdir()
    measure_model.measure(Subject(copied, exported), tmp_path / "measured", None, None, Silent().progress)
    stored = json.loads((tmp_path / "measured" / "parity.json").read_text())
    assert stored == (again if changed else found)


@pytest.mark.usefixtures("one_thread")
def test_pytorch_and_its_export_give_the_same_features(run: Path) -> None:
    exported = run / "exported" / "student-onnxruntime-fp32"
    reference = reference_encoders(run / "student", exported, compiled=False)
    shipped = open_exported(exported)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), np.uint8)
    np.testing.assert_allclose(
        reference.encode_images(pictures), shipped.encode_images(pictures), atol=SAME_FEATURE, rtol=0
    )
    texts = ["plus sign", "a much longer caption of a thing"]
    np.testing.assert_allclose(reference.encode_texts(texts), shipped.encode_texts(texts), atol=SAME_FEATURE, rtol=0)


@pytest.mark.usefixtures("one_thread")
def test_another_checkpoint_is_no_reference_of_an_export(run: Path, tmp_path: Path) -> None:
    def train(folder: Path) -> dict[str, Any]:
        save_model(load_model(STUDENT, random_seed=4), folder)
        return {}

    other = run_stage(StageSpec(tmp_path / "student", kind="train", version=1), train)
    exported = open_stage(run / "exported" / "student-onnxruntime-fp32")
    with pytest.raises(GateError, match="image tower, fp32: sample"):
        measure_on_cpu(Subject(tmp_path, exported, other), Silent(), timing=BRIEF)


def test_what_is_timed_is_what_open_clip_gives(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands between the query and open_clip's own methods, and the attention's fast path stays on."""
    seen = []

    class Net(torch.nn.Module):
        def encode_image(self, pixels: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            seen.append((torch.backends.mha.get_fastpath_enabled(), torch.is_inference_mode_enabled(), normalize))
            return pixels

    monkeypatch.setattr("open_clip.create_model", lambda name, **_: Net())
    graph = open_checkpoint(run / "student", "pixel_values", compiled=False, threads=None)
    graph.run(np.zeros((1, 3), np.float32))
    assert seen == [(True, True, True)]
    assert fixed_batch(graph) is None


def test_without_a_compiler_nothing_is_compiled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --std=c++20")
    said = r"needs a C\+\+ compiler, and there is no no-such-compiler on the PATH\. Install it with: sudo apt-get"
    with pytest.raises(MissingDependency, match=said):
        reference_encoders(run / "student", run / "exported" / "student-onnxruntime-fp32", compiled=True)
    with pytest.raises(MissingDependency, match=said):
        profile(run / "student", Effort(1, 0.05), Target(compiled=True))


@pytest.mark.slow
def test_compiled_computes_and_is_timed(run: Path) -> None:
    exported = run / "exported" / "student-onnxruntime-fp32"
    compiled = reference_encoders(run / "student", exported, compiled=True)
    texts = ["plus sign", "minus sign", "a caption"]
    np.testing.assert_allclose(
        compiled.encode_texts(texts), open_exported(exported).encode_texts(texts), atol=SAME_FEATURE, rtol=0
    )
    command = [
        sys.executable,
        REPOSITORY / "export" / "device_programs" / "runner.py",
        "--runtime",
        "pytorch",
        "--compiled",
    ]
    command += ["--model", run / "student" / "open_clip_model.safetensors", "--input", "input_ids"]
    command += ["--shape", "1,20", "--dtype", "int64", "--threads", "1", "--min-seconds", "0.05", "--batches", "2,4"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    timed = json.loads(done.stdout)
    assert timed["first_ms"] > 10 * np.median(timed["samples_ms"]), "it compiles at the first query"


def test_the_command_times_a_checkpoint(
    run: Path, clipkd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.profiling import interleaved

    commands = []

    def stopped(folder: Path, tower: str, arguments: list[str]) -> None:
        commands.append(arguments)
        raise UsageError("that is enough")

    monkeypatch.setattr(describe, "_LOOK_AROUND_S", 0.0)
    monkeypatch.setattr(interleaved, "runner_here", stopped)
    clipkd("profile", run / "student")
    (words,) = commands
    assert words[words.index("--model") + 1] == str(run / "student" / "open_clip_model.safetensors")
    assert words[words.index("--runtime") + 1] == "pytorch"
    assert "--compiled" not in words
    exported = run / "exported" / "student-onnxruntime-fp32"
    assert words[words.index("--classes") + 1] == str(exported / "classes.npz"), "the whole path is its export's"


def test_a_checkpoint_that_cannot_be_timed_says_why(run: Path, tmp_path: Path) -> None:
    save_model(load_model(STUDENT, random_seed=3), tmp_path)
    with pytest.raises(UsageError, match="Export it first: clipkd export"):
        profile(tmp_path, Effort(1, 0.05))
    with pytest.raises(UsageError, match="timed in PyTorch on the CPU, not on cuda"):
        profile(run / "student", Effort(1, 0.05), Target("cuda"))
    (tmp_path / "nncf.json").touch()
    with pytest.raises(UsageError, match="an int8 checkpoint runs in int8 only after export"):
        profile(tmp_path, Effort(1, 0.05))


def test_samples_are_those_of_the_fp32_export_if_there_is_one(tmp_path: Path) -> None:
    for name in ("student-onnxruntime-int8", "student-openvino-fp32", "teacher-onnxruntime-fp32"):
        (tmp_path / "exported" / name).mkdir(parents=True)
        (tmp_path / "exported" / name / "parity.npz").touch()
    assert find_exported(tmp_path / "student").name == "student-openvino-fp32"
    (tmp_path / "exported" / "student-openvino-fp32" / "parity.npz").unlink()
    assert find_exported(tmp_path / "student").name == "student-onnxruntime-int8"


def with_changes(recipe: Recipe, runtimes: tuple[str, ...], precisions: tuple[str, ...]) -> Recipe:
    spec = recipe.export.model_copy(update={"runtimes": runtimes, "precisions": precisions})
    return recipe.model_copy(update={"export": spec})


def test_what_ships_is_exported_for_every_runtime_and_what_it_is_compared_with_for_one() -> None:
    glyphs = load_recipe(recipe_path("glyphs"), ["profile.pytorch=[eager]"])
    assert [planned.name for planned in plan_exports(glyphs)] == [
        *("teacher-onnxruntime-fp32", "baseline-onnxruntime-fp32"),
        *("student-onnxruntime-fp32", "student-onnxruntime-int8", "student-openvino-fp32", "student-openvino-int8"),
    ]
    assert plan_references(glyphs) == [PlannedReference("student", "eager", "student-onnxruntime-fp32")]
    assert plan_references(glyphs)[0].name == "student-pytorch-eager"
    kits_first = with_changes(glyphs, ("tensorrt", "openvino"), ("int8",))
    assert [planned.name for planned in plan_exports(kits_first)] == [
        *("student-tensorrt-int8", "teacher-openvino-fp32", "baseline-openvino-fp32", "student-openvino-int8"),
    ]
    assert plan_references(kits_first) == [], "there is no fp32 export to stand beside"
    both = glyphs.model_copy(update={"profile": ProfileSpec(pytorch=("eager", "compiled"))})
    assert [planned.name for planned in plan_references(both)] == ["student-pytorch-eager", "student-pytorch-compiled"]
