"""`clipkd profile` of several models: taking turns, failing one by one, and what is kept where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_exported_folders
import test_profiling
from conftest import REPOSITORY, Ended
from onnx import TensorProto, helper

from export.devices import describe, run_runner
from export.devices import describe as describe_module
from export.profiling import interleaved
from export.profiling import protocol as profile_module
from export.profiling.protocol import QUICK, STANDARD, Effort, Target, profile_together
from export.profiling.summary import MIN_SAMPLES_P99
from export.profiling.table import profiles_table
from toolchain.errors import MissingDependency
from toolchain.report.collect import collect
from toolchain.stage import RESOLVED, StageSpec, open_stage, run_stage

Clipkd = Callable[..., Ended]
folder = test_profiling.folder
quiet_machine = test_profiling.quiet_machine

SHORT = ("--processes", "1", "--seconds", "0.03")
BAD_RUNNER = """
import os, signal, sys
if "crashes" in sys.argv[sys.argv.index("--model") + 1]:
    os.kill(os.getpid(), signal.SIGSEGV)
words = [{{"gpu": "cpu"}}.get(word, word) for word in sys.argv[1:]]
os.execv(sys.executable, [sys.executable, {runner!r}, *words])
"""


def copies(folder: Path, *names: str) -> list[Path]:
    made = []
    for name in names:
        made.append(folder.parent / f"{folder.name}-models" / name)
        shutil.copytree(folder, made[-1])
    return made


def exhaust_memory(model: Path) -> None:
    """A graph that asks for 3 TiB when it is run."""
    inputs = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8])
    output = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["batch", 4])
    nodes = [
        helper.make_node("Expand", ["pixel_values", "times"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["largest"], keepdims=0),
        helper.make_node("Expand", ["largest", "shape"], ["image_features"]),
    ]
    numbers = {"times": [1 << 16, 1 << 16, 1, 1, 1, 1], "shape": [1, 4]}
    initializers = [helper.make_tensor(key, TensorProto.INT64, [len(value)], value) for key, value in numbers.items()]
    graph = helper.make_graph(nodes, "image", [inputs], [output], initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, model / "image.onnx")


@pytest.fixture
def bad_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner, but it crashes on models whose names say so; what is called gpu is the CPU."""
    source = BAD_RUNNER.format(runner=str(test_profiling.RUNNER))
    test_profiling.replace_runner(monkeypatch, tmp_path, source)


@pytest.mark.usefixtures("quiet_machine", "bad_runner")
def test_what_fails_is_a_row_and_the_others_are_measured(folder: Path, tmp_path: Path, clipkd: Clipkd) -> None:
    good, crashes, starved, also_good, absent = copies(folder, "good", "crashes", "starved", "also_good", "absent")
    exhaust_memory(starved)
    shutil.rmtree(absent)
    out = tmp_path / "kept"
    models = (good, crashes, starved, also_good, absent)
    ended = clipkd("profile", *models, *SHORT, "--out", out, "--json")
    assert ended.code == 1, ended.err
    rows = json.loads(ended.out)
    assert [row["model"] for row in rows] == list(map(str, models))
    assert [row["status"] == "ok" for row in rows] == [True, False, False, True, False]
    assert "image.onnx: the process that timed it was killed by SIGSEGV." in rows[1]["status"]
    assert "image.onnx: the process that timed it ran out of memory and exited with status 1." in rows[2]["status"]
    assert "image.onnx: missing; profiling needs it" in rows[4]["status"]
    assert [row["exit_code"] for row in rows if row["status"] != "ok"] == [1, 1, 1]
    assert ended.err.endswith("".join(("error: ", "\n".join(rows[index]["status"] for index in (1, 2, 4)), "\n")))
    assert json.loads((out / "profile.json").read_text()) == rows
    for row in (rows[0], rows[3]):
        with np.load(row["samples"]) as samples:
            assert len(samples["image_ms"]) == row["image"]["n"]
            assert len(samples["e2e_process"]) > 1
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "samples-1.npz", "samples-4.npz"]


@pytest.mark.usefixtures("quiet_machine", "bad_runner")
def test_one_model_that_fails_is_one_error(folder: Path, clipkd: Clipkd) -> None:
    (crashes,) = copies(folder, "crashes")
    ended = clipkd("profile", crashes, *SHORT, "--json")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(f"error: {crashes / 'image.onnx'}: the process that timed it was killed by SIGSEGV.")


@pytest.mark.usefixtures("quiet_machine")
def test_the_exit_code_is_that_of_the_first_that_failed(folder: Path, clipkd: Clipkd) -> None:
    kit, good = copies(folder, "kit", "good")
    (kit / "build_engine.py").write_text("")
    ended = clipkd("profile", kit, good, kit.with_name("absent"), *SHORT)
    assert ended.code == 4
    said = " ".join(ended.out.replace("│", " ").split())
    assert "p50 ms [95 %]" in said
    assert "SINGLE" in said
    assert said.count("- - - - - - - - -") == 2, "of the two that have no numbers"
    assert "missing; profiling needs it" in ended.err
    assert f"error: {kit}: a TensorRT build kit, which the cpu of this machine cannot run" in ended.err


def test_how_long_is_said_once(clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def profile_models(models: Any, device: str, effort: Effort, **settings: Any) -> Any:
        asked.append(effort)
        return [], []

    monkeypatch.setattr("export.pipeline.profile_models.profile_models", profile_models)
    for words in ([], ["--quick"], ["--standard"], ["--seconds", "3"], ["--processes", "7", "--seconds", "2"]):
        assert clipkd("profile", "m", *words, "--json").code == 0
    assert asked == [(3, 1.0), QUICK, STANDARD, (3, 3.0), (7, 2.0)]
    for words in (["--quick", "--standard"], ["--quick", "--seconds", "1"], ["--standard", "--processes", "3"]):
        ended = clipkd("profile", "m", *words)
        assert (ended.code, ended.out) == (2, "")
        assert "choose one of --quick, --standard" in ended.err


@pytest.mark.parametrize("device", ["cuda:97", "cuda.97", "npu:97", "gpu:97", "auto"])
def test_a_device_of_this_machine_that_is_not_there(folder: Path, clipkd: Clipkd, device: str) -> None:
    ended = clipkd("profile", folder, "--device", device)
    assert (ended.code, ended.out) == (4, "")
    assert ended.err.startswith(f"error: this machine has no device {device}; it has: cpu")


def test_what_is_no_folder_is_not_written_to(folder: Path, tmp_path: Path, clipkd: Clipkd) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    ended = clipkd("profile", folder, "--out", tmp_path / "thesis.tex")
    assert (ended.code, ended.err) == (2, f"error: {tmp_path / 'thesis.tex'}: is a file; --out expects a folder\n")
    assert clipkd("profile", folder, "--evaluate").code == 2


def a_run(run: Path, exported: Path, *names: str, runtime: str = "onnxruntime") -> list[Path]:
    """A run of exported models, copies of a folder."""
    run.mkdir()
    (run / "recipe.yaml").write_text(f"# {RESOLVED}\n")

    def work(made: Path) -> dict[str, str]:
        for file in (path for path in exported.iterdir() if path.suffix in (".onnx", ".npz", ".json")):
            shutil.copy(file, made)
        if runtime == "tensorrt":
            (made / "build_engine.py").write_text("")
        return {"role": "student", "precision": "fp32", "runtime": runtime}

    nothing: dict[str, Any] = {"version": 1, "fields": {}, "fingerprints": {}, "inputs": {}}
    return [run_stage(StageSpec(run / "exported" / name, kind="export", **nothing), work).path for name in names]


@pytest.mark.usefixtures("quiet_machine", "bad_runner")
def test_a_run_keeps_what_its_machines_gpu_measured(
    folder: Path, tmp_path: Path, clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in: the machine says that it has a GPU, and the runner takes the CPU for it."""
    gpu = {"name": "gpu", "what": "Example Graphics"}
    monkeypatch.setattr("export.devices.doctor.local_devices", lambda: [{"name": "cpu", "what": "a CPU"}, gpu])
    proven, turns = [], []

    def prove(model: Path, **how: str) -> dict[str, Any]:
        proven.append((model.name, how))
        return {"parity": {"image": {"min_cosine": 1.0}, "text": {"min_cosine": 1.0}}}

    once = run_runner.runner_here

    def run(model: Path, tower: str, arguments: list[str]) -> dict[str, Any]:
        turns.append((model.name, tower, arguments[arguments.index("--device") + 1]))
        return once(model, tower, arguments)

    monkeypatch.setattr("export.pipeline.profile_models.prove", prove)
    monkeypatch.setattr(interleaved, "runner_here", run)
    first, second = a_run(tmp_path / "run", folder, "first", "second")
    words = ("--device", "gpu:0", *SHORT, "--json")
    assert clipkd("profile", first, *words).code == 0
    how = {"runtime": "onnxruntime", "precision": "fp32", "device": "gpu"}
    assert proven == [("first", how)]
    assert turns == [("first", "image", "gpu"), ("first", "text", "gpu")]
    turns.clear()
    kept = open_stage(tmp_path / "run" / "measured" / "first" / "gpu").path
    (outside,) = copies(folder, "outside")
    ended = clipkd("profile", first, outside, second, *words)
    assert ended.code == 0, ended.err
    assert "measured/first/gpu                       cached" in ended.err
    towers = [("outside", "image"), ("outside", "text"), ("second", "image"), ("second", "text")]
    assert turns == [(*each, "gpu") for each in towers], "together: what is not kept"
    rows = json.loads(ended.out)
    assert rows[0] == {
        **{"model": str(first), "status": "ok", "samples": str(kept / "samples.npz")},
        **json.loads((kept / "profile.json").read_text()),
    }
    assert rows[1]["samples"] is None
    assert all(row["device"] == "gpu" and row["machine"]["name"].startswith("Example Graphics, ") for row in rows)
    reported = collect([tmp_path / "run"])["rows"]
    assert [(row["model"], row["device"], row["p50_ms"]) for row in reported] == [
        (name, "gpu", row["image"]["p50_ms"]) for name, row in (("first", rows[0]), ("second", rows[2]))
    ]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.usefixtures("quiet_machine", "bad_runner")
def test_a_model_that_is_wrong_on_a_device_is_not_timed_there(
    folder: Path, tmp_path: Path, clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The real proof, of a folder that has none of what it needs."""
    here = [{"name": name, "what": f"Example {name}"} for name in ("cpu", "gpu")]
    monkeypatch.setattr("export.devices.doctor.local_devices", lambda: here)
    (model,) = a_run(tmp_path / "run", folder, "wrong")
    monkeypatch.setattr(interleaved, "runner_here", lambda *_: pytest.fail("it was timed"))
    ended = clipkd("profile", model, "--device", device, *SHORT)
    assert ended.code == 1
    assert not (tmp_path / "run" / "measured" / "wrong" / device).exists()


FAKE_RUNNER = """
import json, pathlib, sys
named = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert pathlib.Path(named["--model"]).read_bytes() == b"plan of " + pathlib.Path(named["--graph"]).read_bytes()
timed = {"samples_ms": [1.0, 1.0], "steady": True}
rest = {"load_ms": 1, "first_ms": 1, "batches": {}, "peak_rss_bytes": 1, "versions": {"tensorrt": "10.13"}}
print(json.dumps(dict(timed, **rest)))
"""


@pytest.mark.usefixtures("quiet_machine")
def test_a_kit_is_built_for_this_machines_gpu(
    folder: Path, tmp_path: Path, clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for TensorRT and a GPU; and what is said where TensorRT is not there."""
    here = [{"name": name, "what": "Example GPU"} for name in ("cuda:0", "cuda:1")]
    monkeypatch.setattr("export.devices.doctor.local_devices", lambda: here)
    (model,) = a_run(tmp_path / "run", folder, "kit", runtime="tensorrt")

    def absent() -> dict[str, str]:
        raise MissingDependency("no TensorRT")

    monkeypatch.setattr("export.pipeline.profile_models.can_build", absent)
    lacking = clipkd("profile", model, "--device", "cuda", *SHORT)
    assert (lacking.code, lacking.out, lacking.err) == (3, "", "error: no TensorRT\n")
    assert clipkd("profile", model, "--device", "cuda:1", *SHORT).code == 4

    def build(kit: Path, made: Path, progress: Any) -> dict[str, Any]:
        for tower in ("image", "text"):
            (made / f"{tower}.engine").write_bytes(b"plan of " + (kit / f"{tower}.onnx").read_bytes())
        return {"runtime": "tensorrt"}

    monkeypatch.setattr("export.pipeline.profile_models.can_build", lambda: {"gpu": "Example GPU"})
    monkeypatch.setattr("export.runtime.tensorrt_engines.build", build)
    monkeypatch.setattr("export.pipeline.profile_models.open_tensorrt", lambda kit, engines: engines)
    monkeypatch.setattr("export.pipeline.profile_models.check_parity", lambda kit, **settings: {})
    test_profiling.replace_runner(monkeypatch, tmp_path, FAKE_RUNNER)
    ended = clipkd("profile", model, "--device", "cuda", *SHORT, "--json")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)
    assert (row["device"], row["image"]["p50_ms"], row["machine"]["tensorrt"]) == ("cuda:0", 1.0, "10.13")
    engines = open_stage(tmp_path / "run" / "engines" / "kit").path
    assert row["size_bytes"] == sum(file.stat().st_size for file in engines.glob("*.engine"))
    assert open_stage(tmp_path / "run" / "measured" / "kit" / "cuda:0").manifest["inputs"]["engines"]


def test_the_clocks_of_a_gpu_count_as_floating(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = test_profiling.describe_machine() | {"clocks_locked": True, "to_lock_clocks": ["sudo cpupower"]}
    jetson = locked | {"to_lock_clocks": ["sudo nvpmodel -m 0", "sudo jetson_clocks"]}
    monkeypatch.setattr(interleaved, "runner_here", lambda *_: test_profiling.documents([1.0])[0])
    monkeypatch.setattr(describe, "other_cpu_share", lambda duration_s: iter([None, 0.0]))
    for suffix in ("image.engine", "text.engine"):
        (folder / suffix).write_bytes(b"")
    found = {}
    for name, machine in (("server", locked), ("jetson", jetson)):
        monkeypatch.setattr(describe, "describe_machine", lambda machine=machine: machine)
        for device, engines in (("cpu", {}), ("cuda:0", {}), ("gpu", {}), ("cpu", {folder: folder})):
            (one,) = profile_together([folder], Effort(2), Target(device, engines=engines))
            found[name, device, bool(engines)] = (one.document["grade"], one.document["to_lock_clocks"])
    nvidia = list(describe_module._GPU_CLOCKS)
    assert found["server", "cpu", False] == ("A", [])
    assert found["server", "cuda:0", False] == ("B", nvidia)
    assert found["server", "cpu", True] == ("B", nvidia)
    assert found["server", "gpu", False] == ("B", [])
    assert found["jetson", "cuda:0", False] == found["jetson", "cpu", True] == ("A", [])


def test_the_table_has_what_the_protocol_promises() -> None:
    machine = test_profiling.describe_machine()
    results = {tower: test_profiling.documents([1.0, 1.25, 2.0], n=40) for tower in ("image", "text")}
    files = {"image": Path(__file__), "text": Path(__file__)}
    found = profile_module._summarize(files, results, machine, 2, "cpu", [], "0").document
    headers, (shown, failed), *_ = profiles_table(
        [{"model": "m", "status": "ok", **found}, {"model": "n", "status": "it crashed\nfor this reason"}]
    )
    assert dict(zip(headers, shown, strict=True)) == {
        "model": "m",
        "p50 ms [95 %]": "1.25 [1.00, 2.00]",
        "p90 ms": "2.00",
        "p99 ms": f"n<{MIN_SAMPLES_P99}",
        "text\np50 ms": "1.25",
        "end to\nend ms": "3.75",
        "images/s\n(batch)": "3,200 (32)",
        "load,\nfirst ms": "1.00, 2.00",
        "peak\nMB": "0",
        "grade": "C UNSTABLE",
        "status": "ok",
    }
    assert failed == ["n", *["-"] * 9, "it crashed"]
    twins = [{"model": f"{run}/m", "status": f"{run}/m/image.onnx: {'why ' * 30}\nmore"} for run in ("a", "b")]
    assert [row[0] for row in profiles_table(twins)[1]] == ["a/m", "b/m"], "as much as tells them apart"
    assert {row[-1] for row in profiles_table(twins)[1]} == {f"image.onnx: {'why ' * 22}…"}
    assert "status" not in profiles_table([{"model": "m", "status": "ok", **found}])[0]


@pytest.mark.parametrize(("calls", "said"), [(("a", "a"), "1.10"), (("a", "b"), "1.10 (not significant)")])
def test_models_that_took_turns_are_held_against_each_other_turn_by_turn(calls: tuple[str, str], said: str) -> None:
    """On a machine that drifts by a fifth, which hides a tenth from whoever does not know what ran beside what."""
    drift = np.exp(0.2 * np.sin(np.arange(12)))
    machine = test_profiling.describe_machine()
    files = {"image": Path(__file__), "text": Path(__file__)}
    rows = [
        {"model": call, "status": "ok"}
        | profile_module._summarize(
            files,
            {tower: test_profiling.documents((slower * drift).tolist(), n=40) for tower in ("image", "text")},
            *(machine, 2, "cpu", [], call),
        ).document
        for call, slower in zip(calls, (1.0, 1.1), strict=True)
    ]
    headers, (_, second), *_ = profiles_table(rows)
    assert second[headers.index("p50 to\nthe first")] == said


run = test_exported_folders.run
model = test_exported_folders.model


@pytest.mark.slow
def test_profiles_differ_significantly_when_models_differ_and_only_then(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the claims of benchmarks/measuring.py, which takes half an hour and a machine with nothing else to do."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import measuring

    p50_ms = float(np.median(measuring.measure_pair(model, 0.0)[0]))
    assert measuring.count_different(model, 0.0, 20, "the same") <= measuring.MAX_FALSE
    slowed = measuring.count_different(model, measuring.SLOWED_BY * p50_ms, 20, "one a tenth slower")
    assert slowed >= measuring.MIN_FOUND
    assert measuring.count_grade_c_beside_hogs(model, 10) == 10


def test_a_long_measurement_is_given_its_time() -> None:
    limit_s = run_runner._timeout_s(["--model", "m", "--min-seconds", "200"])
    assert limit_s > run_runner.TIMEOUT_S + 2 * 200 + 6 * 2 * 50, "each with its warm-up"
    assert run_runner._timeout_s(["--encode"]) == run_runner.TIMEOUT_S
