"""The statistics of a profile against their definitions; a small model end to end; runners that crash and hang."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.device_programs import machine as machine_module
from export.device_programs import runner
from export.device_programs.machine import describe_machine
from export.device_programs.runner import open_graph
from export.devices import describe, run_runner
from export.devices.documents import Machine, RunnerDocument
from export.profiling import interleaved
from export.profiling.documents import Latency, ProfileDocument
from export.profiling.protocol import Effort, profile, profile_together
from export.profiling.summary import MIN_SAMPLES_P90, MIN_SAMPLES_P99, bootstrap_interval, summarise
from toolchain.errors import ArtifactError, ClipkdError, UsageError

RUNNER = Path(runner.__file__)
KEYS = {
    *("call", "device", "machine", "threads", "batch", "image", "text", "e2e_p50_ms", "images_per_s"),
    *(
        "peak_memory_bytes",
        "size_bytes",
        "size_image_bytes",
        "size_text_bytes",
        "grade",
        "flags",
        "e2e_stages_ms",
        "sweep",
        "to_lock_clocks",
    ),
}
TOWER_KEYS = {
    *(
        "p50_ms",
        "p50_low_ms",
        "p50_high_ms",
        "p90_ms",
        "p99_ms",
        "n",
        "processes",
        "p50_by_process_ms",
        "load_ms",
        "first_ms",
    ),
}


@pytest.fixture
def folder(tmp_path):
    """An exported folder as far as profiling reads it: 8x8 images, 5 tokens, 4 features, 3 classes."""
    random = np.random.default_rng(0)

    def write(name, inputs, width, *nodes):
        weights = numpy_helper.from_array(random.standard_normal((width, 4), dtype=np.float32), "weights")
        graph = helper.make_graph(
            [*nodes, helper.make_node("MatMul", ["flat", "weights"], [f"{name}_features"])],
            name,
            [inputs],
            [helper.make_tensor_value_info(f"{name}_features", TensorProto.FLOAT, ["batch", 4])],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, tmp_path / f"{name}.onnx")

    write(
        "image",
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8]),
        192,
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
    )
    write(
        "text",
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 5]),
        5,
        helper.make_node("Cast", ["input_ids"], ["flat"], to=TensorProto.FLOAT),
    )
    image = {"size": [8, 8], "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3}
    image |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    (tmp_path / "preprocess.json").write_text(json.dumps({"image": image, "text": {"context_length": 5}}))
    np.savez(
        tmp_path / "classes.npz",
        names=np.array(["a", "b", "c"]),
        templates=np.array(["{}"]),
        features_KD=random.standard_normal((3, 4), dtype=np.float32),
    )
    np.savez(
        tmp_path / "parity.npz",
        pixels_BHWC=random.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8),
        input_ids_BT=random.integers(0, 9, (70, 5)),
    )
    return tmp_path


@pytest.fixture
def quiet_machine(monkeypatch):
    """A machine on which nothing else runs, for tests that are not about that."""
    monkeypatch.setattr(describe, "_LOOK_AROUND_S", 0.0)
    monkeypatch.setattr(machine_module, "_other_cpu_seconds", lambda: 0.0)


@pytest.mark.usefixtures("quiet_machine")
def test_a_profile_has_the_keys_of_the_contract_and_agrees_with_itself(folder):
    ticks = []
    found = profile(folder, Effort(2, 0.06), threads=1, progress=lambda *tick: ticks.append(tick))
    result = found.document
    assert set(result) == KEYS
    assert set(result["image"]) == TOWER_KEYS | {"images_per_s"}
    assert set(result["text"]) == TOWER_KEYS | {"texts_per_s"}
    json.dumps(result, allow_nan=False)
    for tower in (result["image"], result["text"]):
        assert 0 < tower["p50_low_ms"] <= tower["p50_ms"] <= tower["p50_high_ms"]
        assert tower["processes"] == 2
        assert tower["load_ms"] > 0
        assert tower["first_ms"] > 0
    assert result["images_per_s"] == result["image"]["images_per_s"] >= 1000 / result["image"]["p50_ms"] * 0.999
    assert result["e2e_p50_ms"] > result["image"]["p50_low_ms"]  # it decodes and preprocesses as well
    assert result["size_bytes"] == sum((folder / f"{tower}.onnx").stat().st_size for tower in ("image", "text"))
    assert result["peak_memory_bytes"] > 10 << 20  # an interpreter with numpy
    assert (result["device"], result["batch"], result["threads"]) == ("cpu", 1, 1)
    assert result["grade"] == ("C" if result["flags"] else "A" if result["machine"]["clocks_locked"] else "B")
    assert "BUSY" not in result["flags"]
    assert ticks == [("timing", done, 4) for done in (1, 2, 3, 4)]
    stages_ms = result["e2e_stages_ms"]
    assert list(stages_ms) == ["decode", "preprocess", "image_tower", "match"]
    assert all(ms > 0 for ms in stages_ms.values())
    assert sum(stages_ms.values()) == pytest.approx(result["e2e_p50_ms"], rel=0.5), "medians do not quite add up"
    assert next(iter(result["sweep"])) == "1"
    assert max(result["sweep"].values()) == result["images_per_s"]
    for name, tower in (("image", result["image"]), ("text", result["text"])):
        samples_ms, process = found.samples[f"{name}_ms"], found.samples[f"{name}_process"]
        assert len(samples_ms) == len(process) == tower["n"]
        medians = [np.median(samples_ms[process == index]) for index in (0, 1)]
        assert np.median(medians) == pytest.approx(tower["p50_ms"], rel=1e-5), "kept in float32"


STAGES = ("decode", "preprocess", "image_tower", "match")


def documents(medians, n=700):
    versions = {"python": "3", "numpy": "2", "onnxruntime": "1"}
    timed = {"steady": True, "warm_up_s": 0.1}
    return [
        {
            "samples_ms": [median] * n,
            "steady": True,
            "load_ms": 1.0,
            "first_ms": 2.0,
            "e2e": timed | {"samples_ms": [3 * median], "stages_ms": dict.fromkeys(STAGES, median)},
            "batches": {"32": timed | {"samples_ms": [8 * median]}},
            "peak_rss_bytes": 100 + index,
            "versions": versions,
        }
        for index, median in enumerate(medians)
    ]


@pytest.mark.usefixtures("quiet_machine")
@pytest.mark.parametrize(
    ("medians", "others", "locked", "grade", "flags"),
    [
        ([1.0, 1.0, 1.0], 0.0, True, "A", []),
        ([1.0, 1.0, 1.0], 0.0, False, "B", []),
        ([1.0, 1.04, 1.0], 0.25, False, "B", []),  # CV 2.3 %, and a quarter is not more than a quarter
        ([1.0, 1.2, 1.0], 0.0, True, "C", ["UNSTABLE"]),
        ([1.0, 1.0, 1.0], 0.26, True, "C", ["BUSY"]),
        ([1.0, 1.0, 1.0], None, False, "B", []),  # no /proc/stat
        ([1.0], 0.0, True, "C", ["SINGLE"]),
    ],
)
def test_flags_and_grade(folder, monkeypatch, medians, others, locked, grade, flags):
    left = {"image": documents(medians), "text": documents(medians)}
    order = []

    def run(folder, tower, arguments):
        order.append(tower)
        return left[tower].pop(0)

    machine = describe_machine() | {"clocks_locked": locked}
    monkeypatch.setattr(interleaved, "runner_here", run)
    monkeypatch.setattr(describe, "describe_machine", lambda: machine)
    monkeypatch.setattr(describe, "other_cpu_share", lambda duration_s: iter([None, others]))
    result = profile(folder, Effort(len(medians))).document
    assert (result["grade"], result["flags"]) == (grade, flags)
    assert order == ["image", "text", "text", "image", "image", "text"][: 2 * len(medians)]
    assert result["images_per_s"] == pytest.approx(32 * 1000 / (8 * sorted(medians)[len(medians) // 2]))
    assert result["peak_memory_bytes"] == 100 + len(medians) - 1


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0, None])
@pytest.mark.parametrize("place", ["samples_ms", "batches"])
def test_times_that_are_no_positive_numbers_are_refused(tmp_path, monkeypatch, place, broken):
    (document,) = documents([1.0])
    times = document["samples_ms"] if place == "samples_ms" else document["batches"]["32"]["samples_ms"]
    if broken is None:
        times.clear()
    else:
        times[0] = broken
    monkeypatch.setattr(run_runner, "_document", lambda *_: document)
    monkeypatch.setattr(run_runner.subprocess, "run", lambda *_, **__: None)
    with pytest.raises(ClipkdError, match=r"image\.onnx: a measured time is not a positive number; measure it again"):
        run_runner.runner_here(tmp_path, "image", [])


def test_percentiles_appear_at_their_floor():
    at = {n: summarise(documents([1.0], n)) for n in (MIN_SAMPLES_P90 - 1, MIN_SAMPLES_P90, MIN_SAMPLES_P99)}
    assert (at[63]["p90_ms"], at[63]["p99_ms"]) == (None, None)
    assert (at[64]["p90_ms"], at[64]["p99_ms"]) == (1.0, None)
    assert (at[662]["p90_ms"], at[662]["p99_ms"]) == (1.0, 1.0)


@pytest.mark.parametrize(("fraction", "floor"), [(0.90, MIN_SAMPLES_P90), (0.99, MIN_SAMPLES_P99)])
def test_floors_are_mlperfs(fraction, floor):
    """The fewest samples of which, with 99 % confidence, more than one lies above the true percentile."""

    def chance_of_at_most_one_above(n):
        return fraction**n + n * (1 - fraction) * fraction ** (n - 1)

    assert chance_of_at_most_one_above(floor) <= 0.01 < chance_of_at_most_one_above(floor - 1)


def test_the_point_is_the_median_of_medians_not_of_all_samples():
    unequal = [{**documents([1.0], 10)[0]}, {**documents([2.0], 10)[0]}, {**documents([9.0], 1000)[0]}]
    result = summarise(unequal)
    assert result["p50_ms"] == 2.0
    assert result["n"] == 1020
    assert (result["p50_low_ms"], result["p50_high_ms"]) == (1.0, 9.0)


def test_bootstrap_by_definition():
    medians = [3.0, 1.0, 2.0, 7.0]
    all_resamples = [float(np.median([a, b, c, d])) for a in medians for b in medians for c in medians for d in medians]
    assert bootstrap_interval(medians) == tuple(np.percentile(all_resamples, (2.5, 97.5)))
    assert bootstrap_interval([5.0]) == (5.0, 5.0)
    many = list(np.linspace(1, 2, 20))
    assert bootstrap_interval(many) == bootstrap_interval(many)  # sampled, but the same every time
    assert 1 < bootstrap_interval(many)[0] < 1.5 < bootstrap_interval(many)[1] < 2


@pytest.mark.parametrize(("processes", "splits"), [(3, 20), (4, 70), (5, 252)])
def test_how_often_equal_models_have_disjoint_intervals(processes, splits):
    """docs/measuring.md: every way to deal the medians of one distribution to two models is as likely."""
    medians = [float(rank) for rank in range(2 * processes)]
    chosen = list(itertools.combinations(medians, processes))
    intervals = {first: bootstrap_interval(first) for first in chosen}
    disjoint = 0
    for first in chosen:
        low, high = intervals[first]
        other_low, other_high = intervals[tuple(median for median in medians if median not in first)]
        assert (low, high) == (min(first), max(first))
        disjoint += high < other_low or other_high < low
    assert (disjoint, len(chosen)) == (2, splits)


def replace_runner(monkeypatch, tmp_path, source):
    path = tmp_path / "another_runner.py"
    path.write_text(source)
    monkeypatch.setattr(run_runner, "_RUNNER", path)


@pytest.mark.usefixtures("quiet_machine")
def test_a_crash_names_the_signal_and_the_last_words(folder, monkeypatch):
    replace_runner(
        monkeypatch,
        folder,
        "import os, signal, sys\nsys.stderr.write('noise\\n' * 50 + 'last words\\n')\nsys.stderr.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    with pytest.raises(ClipkdError) as caught:
        profile(folder, Effort(seconds=0.01))
    message = str(caught.value)
    assert message.startswith(
        f"{folder / 'image.onnx'}: the process that timed it was killed by SIGKILL (the signal that "
    )
    assert "last words" in message
    assert message.count("noise") < 10
    assert "--model" in message
    assert "--inputs" not in message  # they are gone with the scratch folder


@pytest.mark.usefixtures("quiet_machine")
def test_a_runner_that_hangs_is_ended(folder, monkeypatch):
    monkeypatch.setattr(run_runner, "TIMEOUT_S", 0.5)
    replace_runner(monkeypatch, folder, "import time\ntime.sleep(60)\n")
    with pytest.raises(ClipkdError, match=r"image\.onnx: the process that timed it took longer than 0\.52 s"):
        profile(folder, Effort(seconds=0.01))


@pytest.mark.usefixtures("quiet_machine")
def test_a_graph_that_does_not_load_is_an_error_with_the_reason(folder):
    (folder / "image.onnx").write_bytes(b"damaged")
    with pytest.raises(
        ClipkdError, match=r"(?s)image\.onnx: the process that timed it exited with status 1\..*Protobuf"
    ):
        profile(folder, Effort(seconds=0.01))


@pytest.mark.usefixtures("quiet_machine")
def test_a_run_is_not_profiled_but_its_models_are_named(folder, tmp_path):
    run = tmp_path / "run"
    exported = shutil.copytree(folder, run / "exported" / "student-onnxruntime-fp32")
    with pytest.raises(ArtifactError, match=re.escape(f"{run}: it contains: {exported}")):
        profile(run)
    shutil.rmtree(exported)
    (run / "recipe.yaml").write_text("name: mine\n")
    with pytest.raises(ArtifactError, match=f"a run without exported models; make them with: clipkd export {run}"):
        profile(run)


@pytest.mark.usefixtures("quiet_machine")
@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "preprocess.json", "classes.npz", "parity.npz"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing; profiling needs it"):
        profile(folder)


def test_senseless_requests_are_refused(folder):
    for nonsense in ({"processes": 0}, {"seconds": 0.0}, {"seconds": float("nan")}):
        with pytest.raises(UsageError, match="expected at least one process and some time"):
            profile(folder, Effort(**nonsense))


def test_other_programs_are_noticed_and_this_one_is_not(monkeypatch):
    """/proc/stat counts everybody; what this process and its children used is taken off."""
    seconds = iter([100.0, 101.0])
    monkeypatch.setattr(machine_module, "_other_cpu_seconds", lambda: next(seconds))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    share = machine_module.other_cpu_share(0.2)
    assert next(share) is None
    assert next(share) == pytest.approx(1.0 / (0.2 * 4), rel=0.5)  # sleeping takes at least as long as asked for


def test_own_work_does_not_count_as_others(monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(machine_module, "_read", lambda path: f"cpu {90 * ticks} 0 {10 * ticks} 500 0 0 0 0 0 0\ncpu0")
    own = os.times()
    expected = 100 - own.user - own.system - own.children_user - own.children_system
    assert machine_module._other_cpu_seconds() == pytest.approx(expected, abs=1.0)
    monkeypatch.setattr(machine_module, "_read", lambda path: None)
    assert machine_module._other_cpu_seconds() is None


@pytest.mark.parametrize(
    ("files", "locked"),
    [
        ({}, False),
        ({"cpu0/cpufreq/scaling_min_freq": "2000", "cpu0/cpufreq/scaling_max_freq": "2000"}, True),
        ({"cpu0/cpufreq/scaling_min_freq": "800", "cpu0/cpufreq/scaling_max_freq": "2000"}, False),
        ({"cpu0/cpufreq/scaling_governor": "performance"}, False),  # turbo still floats
        ({"cpu0/cpufreq/scaling_governor": "performance", "intel_pstate/no_turbo": "1"}, True),
        ({"cpu0/cpufreq/scaling_governor": "powersave", "cpufreq/boost": "0"}, False),
    ],
)
def test_clocks_count_as_locked_only_when_they_cannot_move(monkeypatch, files, locked):
    monkeypatch.setattr(machine_module, "_read", lambda path: files.get(path.removeprefix("/sys/devices/system/cpu/")))
    assert machine_module._is_clock_locked(0) is locked


def test_the_runner_runs_alone_and_prints_one_document(folder, tmp_path):
    alone = tmp_path / "device" / "runner.py"
    alone.parent.mkdir()
    alone.write_bytes(RUNNER.read_bytes())
    command = [sys.executable, str(alone), "--model", str(folder / "text.onnx"), "--input", "input_ids"]
    command += ["--shape", "1,5", "--dtype", "int64", "--threads", "1", "--min-seconds", "0.02", "--batches", "2,100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["samples_ms"]) > 1
    assert sum(result["samples_ms"]) <= 1000
    assert set(result["batches"]) == {"2", "100"}  # more than the 64 inputs it makes
    assert set(result["versions"]) == {"python", "numpy", "onnxruntime"}
    assert result["peak_rss_bytes"] > 10 << 20
    assert isinstance(result["steady"], bool)


def test_types_name_what_programs_print(folder):
    assert set(describe_machine()) == set(get_type_hints(Machine))
    command = [sys.executable, str(RUNNER), "--model", str(folder / "image.onnx"), "--input", "pixel_values"]
    command += ["--shape", "1,3,8,8", "--dtype", "float32", "--threads", "1", "--min-seconds", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert set(json.loads(done.stdout)) == set(get_type_hints(RunnerDocument)) - {"e2e"}, "a whole path has images"
    found = documents([1.0])
    assert set(summarise(found)) == set(get_type_hints(Latency)) == TOWER_KEYS
    assert set(get_type_hints(ProfileDocument)) == KEYS


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_runner_encodes_every_row_once(folder, tmp_path, count):
    ids_BT = np.random.default_rng(count).integers(0, 9, (count, 5))
    np.save(tmp_path / "ids.npy", ids_BT)
    command = [sys.executable, str(RUNNER), "--model", str(folder / "text.onnx"), "--input", "input_ids", "--encode"]
    command += ["--shape", "1,5", "--dtype", "int64", "--threads", "1", "--inputs", str(tmp_path / "ids.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    graph = open_graph(folder / "text.onnx", "onnxruntime", precision=None, device="cpu", threads=1)
    np.testing.assert_allclose(json.loads(done.stdout)["features"], graph.run(ids_BT), rtol=1e-5)


def test_the_runner_refuses_inputs_of_another_shape(folder, tmp_path):
    np.save(tmp_path / "wrong.npy", np.zeros((4, 6), np.int64))
    command = [sys.executable, str(RUNNER), "--model", str(folder / "text.onnx"), "--input", "input_ids"]
    command += ["--shape", "1,5", "--dtype", "int64", "--threads", "1", "--inputs", str(tmp_path / "wrong.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "expected int64 inputs of shape [5], got int64 of [6]" in done.stderr


@pytest.mark.usefixtures("quiet_machine")
def test_models_take_turns_and_one_that_fails_leaves_the_others(folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("other"))
    order = []

    def run(place, tower, arguments):
        order.append((place.name, tower))
        if place == other and len(order) > 4:
            raise ClipkdError("it crashed")
        return documents([1.0])[0]

    monkeypatch.setattr(interleaved, "runner_here", run)
    found, failed = profile_together([folder, other], Effort(3))
    assert str(failed) == "it crashed"
    assert found.document["image"]["processes"] == 3
    a, b = folder.name, "other"
    first_turn = [(a, "image"), (a, "text"), (b, "image"), (b, "text")]
    assert order[:5] == [*first_turn, (b, "text")], "and back in the other direction"
    assert [name for name, _ in order[5:]] == [a] * 4, "what failed is not tried again"
    missing, good = profile_together([tmp_path / "none", folder], Effort(1))
    assert isinstance(missing, ArtifactError)
    assert good.document["flags"] == ["SINGLE"]


@pytest.mark.usefixtures("quiet_machine")
def test_spinning_slows_a_model_by_what_it_says(folder):
    plain, slowed = profile_together([folder, folder], Effort(1, 0.2), threads=1, spin_ms=[0.0, 5.0])
    gained_ms = slowed.document["image"]["p50_ms"] - plain.document["image"]["p50_ms"]
    assert 4.5 < gained_ms < 15.0  # what is beyond 5 ms is other programs' doing


@pytest.mark.usefixtures("quiet_machine")
def test_a_warm_up_that_never_settles_is_flagged(folder, monkeypatch):
    monkeypatch.setattr(interleaved, "runner_here", lambda *_: documents([1.0])[0] | {"steady": False})
    assert profile(folder, Effort(2)).document["flags"] == ["UNSTEADY"]
