"""What doctor says of a machine that lacks something, where something crashes, and where something hangs."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import ssh_server
from conftest import REPOSITORY, Ended
from test_architecture import FORBIDDEN

from export.device_programs import probes
from export.device_programs.probes import one_node_graph
from export.devices import doctor
from export.devices.doctor import CAPABILITIES, diagnose, needs, problem
from export.devices.registry import Device, add_device
from export.devices.ssh import SSH_CONFIG
from toolchain.errors import MissingDependency, UnavailableBackend
from toolchain.recipe.load import load_recipe, recipe_path

SEGFAULT = "import ctypes\nctypes.string_at(0)\n"
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def only(monkeypatch: pytest.MonkeyPatch, *names: str, timeout_s: float | None = None) -> None:
    """A doctor of these capabilities alone."""
    chosen = tuple(each for each in CAPABILITIES if each.name in names)
    assert len(chosen) == len(names)
    if timeout_s is not None:
        chosen = tuple(replace(each, timeout_s=timeout_s) for each in chosen)
    monkeypatch.setattr(doctor, "CAPABILITIES", chosen)


def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    """Put a module in front of the real one, for processes started from here."""
    folder = tmp_path / "shim"
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def rows_by_name(document: dict) -> dict[str, dict]:  # type: ignore[type-arg]
    return {row["capability"]: row for row in document["rows"]}


def test_the_graph_of_one_node_is_valid_and_computes() -> None:
    graph = one_node_graph()
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([-1, 3], np.float32)})[0].tolist() == [0.0, 3.0]


def test_what_works_is_ok_with_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "measure", "pictures", "onnxruntime cpu")
    document = diagnose(None, "cpu")
    rows = rows_by_name(document)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert ort.__version__ in rows["onnxruntime cpu"]["detail"]
    assert [row["mend"] for row in rows.values()] == [None] * len(rows)
    assert problem(document["rows"]) is None
    machine = document["machine"]
    assert machine["disk_free_bytes"] > 0
    assert {"isa", "memory_limit_bytes", "cpu_quota", "governor"} <= set(machine)
    json.dumps(document, allow_nan=False)


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "measure", "onnxruntime cpu")
    shim(tmp_path, monkeypatch, "sitecustomize", ABSENT.format(names=["onnxruntime"]))
    document = diagnose(None, "cpu")
    row = rows_by_name(document)["onnxruntime cpu"]
    assert (row["status"], row["needed"]) == ("not installed", True)
    assert row["detail"] == "No module named 'onnxruntime'"
    assert row["mend"] == "pip install 'clipkd[onnxruntime]'"
    error = problem(document["rows"])
    assert isinstance(error, MissingDependency)
    assert "onnxruntime cpu (here): not installed. Fix: pip install 'clipkd[onnxruntime]'" in str(error)
    assert problem(diagnose()["rows"]) is None  # nobody needs it


def test_an_import_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "measure", "onnxruntime cpu")
    shim(tmp_path, monkeypatch, "onnxruntime", "raise RuntimeError('two\\nlines')")
    row = rows_by_name(diagnose(None, "cpu"))["onnxruntime cpu"]
    assert (row["status"], row["detail"]) == ("failed", "RuntimeError: two lines")
    assert row["mend"] == "pip install --force-reinstall 'clipkd[onnxruntime]'"


def test_a_probe_that_segfaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "measure", "onnxruntime cpu")
    shim(tmp_path, monkeypatch, "onnxruntime", SEGFAULT)
    document = diagnose(None, "cpu")
    rows = rows_by_name(document)
    assert (rows["onnxruntime cpu"]["status"], rows["onnxruntime cpu"]["detail"]) == ("crashed", "ended by SIGSEGV")
    assert rows["measure"]["status"] == "ok"  # the others are none the worse
    assert isinstance(problem(document["rows"]), MissingDependency)


def test_a_probe_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "onnxruntime cpu", timeout_s=1.0)
    pid = tmp_path / "pid"
    shim(
        tmp_path,
        monkeypatch,
        "onnxruntime",
        "import pathlib, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\ntime.sleep(600)\n",
    )
    started = time.monotonic()
    row = rows_by_name(diagnose(None, "cpu"))["onnxruntime cpu"]
    assert (row["status"], row["detail"]) == ("hangs", "no result within 1 s")
    assert time.monotonic() - started < 30
    stat = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):  # what it started is ended too
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("its child lives on")


def test_probes_run_side_by_side_and_the_slow_ones_start_last(monkeypatch: pytest.MonkeyPatch) -> None:
    order, both_run = [], threading.Barrier(2)

    def probe(name: str, timeout_s: float) -> tuple[int, dict[str, str], str]:
        order.append(name)
        if name in ("base", "pictures"):
            both_run.wait(30)  # breaks unless two run at once
        return 0, {}, ""

    only(monkeypatch, "train", "measure", "pictures", "export")
    monkeypatch.setattr(doctor, "_probe_here", probe)
    monkeypatch.setattr(doctor, "_SIDE_BY_SIDE", 2)
    said: list[tuple[int, int]] = []
    document = diagnose(progress=lambda what, done, total, note="": said.append((done, total)))
    assert [row["capability"] for row in document["rows"]] == ["measure", "pictures", "train", "export", "ssh"]
    assert {row["status"] for row in document["rows"]} == {"ok"}
    assert set(order[:2]) == {"base", "pictures"}
    assert said == [(done, 5) for done in range(1, 6)]


def test_a_bug_in_a_probe_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(name: str, timeout_s: float) -> tuple[int, dict[str, str], str]:
        raise RuntimeError(name)

    only(monkeypatch, "measure")
    monkeypatch.setattr(doctor, "_probe_here", probe)
    with pytest.raises(RuntimeError, match="base"):
        diagnose()


def test_quick_leaves_out_what_is_slow_and_says_so(
    clipkd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ["train", "quantize", "export", "tensorrt build"]
    only(monkeypatch, "measure", *slow)
    ended = clipkd("doctor", "--quick", "--json")
    assert (ended.code, json.loads(ended.out)["left_out"]) == (0, slow)
    assert list(rows_by_name(json.loads(ended.out))) == ["measure", "ssh"]
    assert "--quick left out: train, quantize, export, tensorrt build" in ended.err


def test_a_provider_that_only_says_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu does without a GPU: it lists CUDA, and makes a session on the CPU."""
    only(monkeypatch, "measure", "pictures", "onnxruntime cuda", "nvidia driver")
    shim(
        tmp_path,
        monkeypatch,
        "onnxruntime",
        "__version__ = '9'\nset_default_logger_severity = print\n"
        "get_available_providers = lambda: ['CUDAExecutionProvider']\n"
        "class InferenceSession:\n    def __init__(self, *args, **rest): pass\n"
        "    def get_providers(self): return ['CPUExecutionProvider']\n",
    )
    row = rows_by_name(diagnose(None, "cuda:0"))["onnxruntime cuda"]
    assert (row["status"], row["needed"]) == ("not there", True)
    assert "a session of it runs on the CPU" in row["detail"]
    assert isinstance(problem([row]), UnavailableBackend)


def test_the_base_install_can_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim(tmp_path, monkeypatch, "sitecustomize", ABSENT.format(names=FORBIDDEN))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    command = [sys.executable, "-m", "clipkd", "doctor", "glyphs", "--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    rows = rows_by_name(json.loads(done.stdout))
    lacking = {name for name, row in rows.items() if row["status"] != "ok" and row["needed"]}
    assert lacking == {"train", "quantize", "export"}
    assert rows["onnxruntime cpu"]["status"] == "ok"
    assert rows["train"]["mend"] == "pip install 'clipkd[train]'"
    assert "train (here): not installed" in done.stderr


@pytest.mark.slow
def test_everything_on_this_machine(clipkd: Callable[..., Ended]) -> None:
    ended = clipkd("doctor", "glyphs", "--device", "cpu", "--json")
    assert ended.code == 0, ended.err
    rows = rows_by_name(json.loads(ended.out))
    assert set(rows) == {each.name for each in CAPABILITIES} | {"ssh"}
    assert all(row["status"] == "ok" for row in rows.values() if row["needed"])
    assert all(row["mend"] for row in rows.values() if row["status"] != "ok")


def test_a_device_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipkd: Callable[..., Ended]) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv(SSH_CONFIG, str(tmp_path / "config"))
    (tmp_path / "config").write_text(f"UserKnownHostsFile {tmp_path / 'none'}\n")
    only(monkeypatch, "measure")
    add_device(Device("nobody", "127.0.0.1", port=1))
    ended = clipkd("doctor", "--device", "nobody", "--json")
    row = rows_by_name(json.loads(ended.out))["remote"]
    assert (ended.code, row["status"], row["needed"]) == (4, "not there", True)
    assert row["mend"] == "ssh -p 1 -- 127.0.0.1"


@pytest.mark.ssh
@pytest.mark.skipif(ssh_server.why_not() is not None, reason=str(ssh_server.why_not()))
def test_a_device_is_probed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipkd: Callable[..., Ended]
) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "openvino.py").write_text(SEGFAULT)
    (tmp_path / "shim" / "sitecustomize.py").write_text(ABSENT.format(names=["onnxruntime"]))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/shim exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with ssh_server.running(tmp_path) as config:
        monkeypatch.setenv(SSH_CONFIG, str(config))
        add_device(Device("board", "board", python=str(python), workdir=str(tmp_path / "there")))
        ended = clipkd("devices", "test", "board", "--json")
    document = json.loads(ended.out)
    rows = rows_by_name(document)
    assert ended.code == 3
    assert rows["remote"]["status"] == rows["measure"]["status"] == rows["pictures"]["status"] == "ok"
    assert rows["onnxruntime cpu"]["status"] == "not installed"
    assert rows["onnxruntime cpu"]["mend"] == f"ssh -- board '{python} -m pip install onnxruntime'"
    assert rows["openvino cpu"]["detail"] == "ended by SIGSEGV"
    assert document["system"]["architecture"]
    for _ in range(100):  # the agent of the last run may still be on its way out
        if not list((tmp_path / "there" / "runs").iterdir()):
            return
        time.sleep(0.05)
    raise AssertionError("a run is left behind")


def test_what_the_quickstart_needs_and_what_compiling_adds() -> None:
    glyphs = load_recipe(recipe_path("glyphs"))
    here, there = needs(glyphs, None)
    assert here == {
        *("measure", "pictures", "train", "quantize", "export", "report", "onnxruntime cpu", "openvino cpu")
    }
    assert there == frozenset()
    compiled = load_recipe(recipe_path("glyphs"), ["profile.pytorch=[eager, compiled]"])
    assert needs(compiled, None)[0] - here == {"compile"}


def test_the_compiler_that_is_tried_is_the_one_torch_compile_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --std=c++20")
    with pytest.raises(ImportError, match="no no-such-compiler on the PATH"):
        probes._compiler("")
