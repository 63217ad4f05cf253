"""Programs on a device that a real OpenSSH server on loopback stands for: what arrives, what stays, how it breaks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import ssh_server
import test_exported_folders
import test_profiling
from conftest import Ended

from export.devices.registry import Device, add_device
from export.devices.ssh import SSH_CONFIG, Fetch, TimedOut, build_engines_on, run_on
from export.profiling.protocol import Effort, Target, profile
from export.proof.parity import check_parity
from export.runtime.exported_model import open_exported
from export.runtime.remote_model import encoders_on
from export.students.candidates import Candidate
from export.students.measure import WORTH
from toolchain.errors import ClipkdError, MissingDependency, UnavailableBackend, UsageError
from toolchain.precisions import PRECISIONS
from toolchain.report.collect import collect
from toolchain.stage import RESOLVED, StageSpec, open_stage, run_stage

pytestmark = [
    pytest.mark.ssh,
    pytest.mark.skipif(ssh_server.why_not() is not None, reason=str(ssh_server.why_not())),
]

ECHO = """
import json, os, sys
names = sorted(os.path.join(folder, name)[2:] for folder, _, names in os.walk(".") for name in names)
contents = {name: open(name, "rb").read().decode() for name in names if name != "program.py"}
print(json.dumps({"arguments": sys.argv[1:], "contents": contents, "here": os.getcwd()}))
"""
SLEEP = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
sys.stderr.write(f"started {os.getpid()} {child.pid}\\n")
sys.stderr.flush()
time.sleep(600)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ssh_server.running(tmp_path_factory.mktemp("sshd")) as config:
        yield config


@pytest.fixture
def board(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setenv(SSH_CONFIG, str(server))
    return Device("board", "board", python=sys.executable, workdir=str(tmp_path / "on the device"))


def test_what_is_of_no_use_again_is_not_kept(board: Device, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("once")
    files = {**program(tmp_path, ECHO), "a": tmp_path / "a"}
    for _ in range(2):
        ended = run_on(board, files, "program.py", [], once=[tmp_path / "a"])
        assert json.loads(ended.stdout)["contents"] == {"a": "once"}
        assert len(list((Path(str(board.workdir)) / "files").iterdir())) == 1
    assert ended.copied_bytes == 4


def program(tmp_path: Path, source: str) -> dict[str, Path]:
    path = tmp_path / "local.py"
    path.write_text(source)
    return {"program.py": path}


def wrapped(tmp_path: Path, script: str) -> str:
    """A Python of the device that is a shell script around the real one."""
    path = tmp_path / "python-wrapper"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def left_behind(device: Device) -> list[Path]:
    """What runs left on the device, once those that were cut off have had the time to end."""
    runs = Path(str(device.workdir)) / "runs"
    for _ in range(100):
        left = list(runs.iterdir()) if runs.is_dir() else []
        if not left:
            break
        time.sleep(0.05)
    return left


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_program_runs_and_a_second_run_copies_nothing(board: Device, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    files = {**program(tmp_path, ECHO), "data/a": tmp_path / "a", "data/b": tmp_path / "b"}
    first = run_on(board, files, "program.py", ["--x", "data/a"])
    assert first.returncode == 0, first.stderr
    said = json.loads(first.stdout)
    assert said["arguments"] == ["--x", "data/a"]
    assert said["contents"] == {"data/a": "one", "data/b": "two"}
    assert first.copied_bytes == len(ECHO) + 6
    assert run_on(board, files, "program.py", []).copied_bytes == 0
    (tmp_path / "b").write_text("TWO")
    assert run_on(board, files, "program.py", []).copied_bytes == 3
    assert left_behind(board) == []
    assert not Path(said["here"]).exists()


HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "line\nbreak",
    "-rf",
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "é*?[",
    "~",
]


def test_hostile_names_and_arguments_arrive_as_they_are(board: Device, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for index, name in enumerate(HOSTILE):
        (folder / name).write_text(str(index))
    files = {name: folder / name for name in HOSTILE}
    device = Device("board", "board", python=board.python, workdir=f"{board.workdir} $(touch pwned) 'x'")
    ended = run_on(device, {**program(tmp_path, ECHO), **files}, "program.py", HOSTILE)
    said = json.loads(ended.stdout)
    assert said["contents"] == {name: str(index) for index, name in enumerate(HOSTILE)}
    assert said["arguments"] == HOSTILE
    assert left_behind(device) == []  # before the search: a folder may disappear under it
    assert not list(tmp_path.rglob("pwned"))
    assert not (Path.home() / "pwned").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "."])
def test_names_stay_in_their_folder(board: Device, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected a name inside a folder"):
        run_on(board, {**program(tmp_path, ECHO), name: tmp_path / "local.py"}, "program.py", [])


def test_results_are_brought_back_and_lines_heard_as_they_come(board: Device, tmp_path: Path) -> None:
    source = """
import pathlib, sys
pathlib.Path("out/deep").mkdir(parents=True)
pathlib.Path("out/deep/x").write_bytes(b"\\0clipkd\\n" * 1000)
pathlib.Path("out/y").write_bytes(b"")
sys.stderr.write("step 1\\rstep 2\\nlast")
"""
    heard: list[str] = []
    ended = run_on(
        board,
        program(tmp_path, source),
        "program.py",
        [],
        fetch=Fetch(["out"], tmp_path / "back"),
        on_line=heard.append,
    )
    assert ended.returncode == 0
    assert heard == ["step 1", "step 2", "last"]
    assert (tmp_path / "back/out/deep/x").read_bytes() == b"\0clipkd\n" * 1000
    assert (tmp_path / "back/out/y").read_bytes() == b""


def test_a_crash_keeps_its_signal_and_last_words(board: Device, tmp_path: Path) -> None:
    source = "import os, sys\nsys.stderr.write('last words')\nsys.stderr.flush()\nos.kill(os.getpid(), 11)"
    ended = run_on(board, program(tmp_path, source), "program.py", [])
    assert (ended.returncode, ended.stderr) == (-signal.SIGSEGV, "last words")
    assert left_behind(board) == []


def test_what_the_login_shell_prints_is_no_part_of_it(board: Device, tmp_path: Path) -> None:
    noisy = wrapped(tmp_path, f"echo welcome; printf 'no newline'; exec {sys.executable} \"$@\"")
    device = Device("board", "board", python=noisy, workdir=board.workdir)
    assert json.loads(run_on(device, program(tmp_path, ECHO), "program.py", []).stdout)["arguments"] == []


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("known_by_other_host_key", "the host key of board differs from the one in known_hosts"),
        ("empty", "the host key of board is not known yet"),
    ],
)
def test_a_host_key_that_is_not_the_known_one_is_refused(
    board: Device, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str, expected: str
) -> None:
    port = int(server.read_text().split("Port ")[1].split()[0])
    monkeypatch.setenv(SSH_CONFIG, str(ssh_server.write_config(server.parent, port, known)))
    with pytest.raises(UnavailableBackend, match=expected):
        run_on(board, program(tmp_path, ECHO), "program.py", [])
    assert not Path(str(board.workdir)).exists()
    assert (server.parent / "empty").read_text() == ""  # nobody accepted it on the user's behalf


def test_a_machine_that_is_not_there(board: Device, tmp_path: Path) -> None:
    device = Device("board", "board", port=1, python=board.python)
    with pytest.raises(UnavailableBackend, match=r"board: board cannot be reached\. Try: ssh -p 1 -- board"):
        run_on(device, program(tmp_path, ECHO), "program.py", [])


def test_a_user_who_is_not_let_in(board: Device, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text(server.read_text().replace("user_key", "other_host_key"))
    monkeypatch.setenv(SSH_CONFIG, str(config))
    with pytest.raises(UnavailableBackend, match="does not accept this user without a password"):
        run_on(board, program(tmp_path, ECHO), "program.py", [])


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, "nothing does not run there"),
        ("exit 97", "is older than Python 3.8"),
    ],
)
def test_a_device_without_a_python(board: Device, tmp_path: Path, script: str | None, expected: str) -> None:
    python = str(tmp_path / "nothing") if script is None else wrapped(tmp_path, script)
    with pytest.raises(MissingDependency, match=rf"(?s){expected}.*clipkd devices add board board --python PATH"):
        run_on(Device("board", "board", python=python), program(tmp_path, ECHO), "program.py", [])


def started(heard: list[str]) -> tuple[int, int]:
    for _ in range(200):
        if heard:
            _, program_pid, child_pid = heard[0].split()
            return int(program_pid), int(child_pid)
        time.sleep(0.05)
    raise AssertionError("the program did not start")


def test_a_program_that_hangs_is_ended_with_what_it_started(board: Device, tmp_path: Path) -> None:
    heard: list[str] = []
    with pytest.raises(TimedOut, match=r"board: the program took longer than 0\.5 s and was ended"):
        run_on(board, program(tmp_path, SLEEP), "program.py", [], timeout_s=0.5, on_line=heard.append)
    assert all(ends(pid) for pid in started(heard))
    assert left_behind(board) == []


def test_a_device_that_never_answers(board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.devices.ssh._ANSWER_S", 0.7)
    stuck = wrapped(tmp_path, "exec sleep 3")
    with pytest.raises(UnavailableBackend, match="no answer from board in time"):
        run_on(Device("board", "board", python=stuck), program(tmp_path, ECHO), "program.py", [])


@pytest.mark.parametrize("victim", ["ssh", "sshd"])
def test_a_connection_that_drops_leaves_nothing(board: Device, tmp_path: Path, victim: str) -> None:
    heard: list[str] = []
    caught: list[BaseException] = []

    def run() -> None:
        try:
            run_on(board, program(tmp_path, SLEEP), "program.py", [], on_line=heard.append)
        except ClipkdError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pids = started(heard)
    agent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    if victim == "ssh":
        os.kill(ssh_client(), signal.SIGKILL)
    else:
        os.kill(int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    thread.join(20)
    assert not thread.is_alive()
    assert "the connection to board broke" in str(caught[0])
    assert all(ends(pid) for pid in (*pids, agent))
    assert left_behind(board) == []
    assert run_on(board, program(tmp_path, ECHO), "program.py", []).returncode == 0


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == parent and words[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def ssh_client() -> int:
    (client,) = [pid for pid in children_of(os.getpid()) if name_of(pid) == "ssh"]  # and not sshd, the server
    return client


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_an_agent_that_is_killed_is_cleaned_up_by_the_next_run(board: Device, tmp_path: Path) -> None:
    heard: list[str] = []
    thread = threading.Thread(target=lambda: _swallow(board, tmp_path, heard))
    thread.start()
    program_pid, child_pid = started(heard)
    agent = int(Path(f"/proc/{program_pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    thread.join(20)
    assert ends(program_pid)  # it dies with the agent
    runs = Path(str(board.workdir)) / "runs"
    assert len(list(runs.iterdir())) == 1
    assert run_on(board, program(tmp_path, ECHO), "program.py", []).returncode == 0
    assert ends(child_pid)
    assert left_behind(board) == []


def _swallow(board: Device, tmp_path: Path, heard: list[str]) -> None:
    with pytest.raises(ClipkdError):
        run_on(board, program(tmp_path, SLEEP), "program.py", [], on_line=heard.append)


def test_runs_at_the_same_time_do_not_sweep_each_other(board: Device, tmp_path: Path) -> None:
    heard: list[str] = []
    thread = threading.Thread(target=lambda: _swallow(board, tmp_path, heard))
    thread.start()
    program_pid, _ = started(heard)
    assert run_on(board, program(tmp_path, ECHO), "program.py", []).returncode == 0
    assert is_alive(program_pid)
    os.kill(ssh_client(), signal.SIGKILL)
    thread.join(20)
    assert left_behind(board) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this user may mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    for _ in range(100):  # the agent of the last run may still be on its way out
        if subprocess.run(["umount", folder], capture_output=True).returncode == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} stays mounted")


@pytest.mark.parametrize("kind", ["tmpfs", "ulimit"])
def test_a_full_disk_is_said_and_left_clean(
    board: Device, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Once with a real full file system; and, for users who cannot mount one, with a limit on the size of a file."""
    workdir = request.getfixturevalue("small_disk") / "work" if kind == "tmpfs" else tmp_path / "work"
    limited = wrapped(tmp_path, f'ulimit -f 1024; exec {sys.executable} "$@"')  # blocks of 512 or 1024 bytes
    device = Device("board", "board", python=limited if kind == "ulimit" else board.python, workdir=str(workdir))
    (tmp_path / "large").write_bytes(os.urandom(3 << 20))
    files = {**program(tmp_path, ECHO), "large": tmp_path / "large"}
    with pytest.raises(ClipkdError, match=rf"board: its disk is full \(\d+ MB free at {workdir}\)"):
        run_on(device, files, "program.py", [])
    assert left_behind(device) == []
    assert all(path.stat().st_size < 1 << 20 for path in (workdir / "files").iterdir())
    assert run_on(device, program(tmp_path, ECHO), "program.py", []).returncode == 0


def test_a_program_that_fills_the_disk_says_so_too(board: Device, tmp_path: Path, small_disk: Path) -> None:
    device = Device("board", "board", python=board.python, workdir=str(small_disk))
    with pytest.raises(ClipkdError, match="board: its disk is full"):
        run_on(device, program(tmp_path, "open('x', 'wb').write(b'0' * (3 << 20))"), "program.py", [])
    assert left_behind(device) == []


def test_a_kit_is_built_there_with_progress(board: Device, tmp_path: Path) -> None:
    """A stand-in for TensorRT: what arrives, what comes back, and the errors of its exit codes."""
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "image.onnx").write_bytes(b"graph")
    (kit / "build_engine.py").write_text("""
import json, pathlib, sys
kit, out = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])
if (kit / "image.onnx").read_bytes() == b"none":
    sys.stderr.write("error: no NVIDIA GPU here\\n")
    sys.exit(4)
out.mkdir()
for step in range(3):
    sys.stderr.write(f"\\rimage: tactics {step}/2      ")
(out / "image.engine").write_bytes((kit / "image.onnx").read_bytes() * 2)
print(json.dumps({"engines": 1}))
""")
    heard: list[str] = []
    out = tmp_path / "engines of the run"
    assert build_engines_on(board, kit, out, on_line=heard.append) == {"engines": 1}
    assert (out / "image.engine").read_bytes() == b"graphgraph"
    assert [path.name for path in out.iterdir()] == ["image.engine"]
    assert len(heard) == 3
    (kit / "image.onnx").write_bytes(b"none")
    with pytest.raises(UnavailableBackend, match="no NVIDIA GPU here"):
        build_engines_on(board, kit, out, on_line=heard.append)


folder = test_profiling.folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.devices.describe._LOOK_AROUND_S", 0.1)


@pytest.mark.usefixtures("quick")
def test_a_profile_of_a_device_is_that_of_a_machine(board: Device, folder: Path) -> None:
    found = profile(folder, Effort(2, 0.06), Target(on=board), threads=1)
    result = found.document
    assert len(found.samples["image_ms"]) == result["image"]["n"]
    assert set(result) == test_profiling.KEYS
    assert result["device"] == "board"
    assert result["machine"]["numpy"]
    assert isinstance(result["to_lock_clocks"], list)
    for tower in (result["image"], result["text"]):
        assert 0 < tower["p50_low_ms"] <= tower["p50_ms"] <= tower["p50_high_ms"]
        assert tower["processes"] == 2
    assert result["e2e_p50_ms"] > 0
    assert left_behind(board) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("module", ["onnxruntime", "numpy"])
def test_what_a_device_lacks_is_named_with_the_line_that_mends_it(
    board: Device, folder: Path, tmp_path: Path, module: str
) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / f"{module}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{module}'\")")
    python = wrapped(tmp_path, f'PYTHONPATH={tmp_path}/shim exec {sys.executable} "$@"')
    lacking = Device("board", "board", python=python, workdir=board.workdir)
    with pytest.raises(MissingDependency) as caught:
        profile(folder, Effort(1, 0.02), Target(on=lacking))
    assert f"board: No module named '{module}'." in str(caught.value)
    assert f"Install it on the device: ssh -- board '{python} -m pip install numpy onnxruntime pillow'" in str(
        caught.value
    )


@pytest.mark.usefixtures("quick")
def test_a_runner_that_hangs_on_a_device_is_an_error_of_the_model(
    board: Device, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_profiling.replace_runner(monkeypatch, tmp_path, "import time\ntime.sleep(600)\n")
    monkeypatch.setattr("export.devices.run_runner.TIMEOUT_S", 1.0)
    with pytest.raises(ClipkdError, match=r"image\.onnx: on board: the program took longer than 1\.12 s"):
        profile(folder, Effort(1, 0.02), Target(on=board))


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """For graphs that no PyTorch model is behind."""
    monkeypatch.setattr("export.pipeline.profile_models.encoders_on", lambda *arguments, **settings: None)
    monkeypatch.setattr(
        "export.pipeline.profile_models.check_parity", lambda *arguments, **settings: {"image": {"min_cosine": 1.0}}
    )


def a_run(run: Path, exported: Path, runtime: str) -> Path:
    """A run with one exported model, a copy of a folder."""
    run.mkdir()
    (run / "recipe.yaml").write_text(f"# {RESOLVED}\n")

    def work(made: Path) -> dict[str, str]:
        for file in (path for path in exported.iterdir() if path.suffix in (".onnx", ".npz", ".json", ".py")):
            shutil.copy(file, made)
        return {"role": "student", "precision": "fp32", "runtime": runtime}

    nothing: dict[str, str] = {}
    path = run / "exported" / "m"
    return run_stage(StageSpec(path, kind="export", version=1, fingerprints=nothing), work).path


@pytest.fixture
def known_board(board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is in the user's own list, under its name."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    add_device(board)


@pytest.mark.usefixtures("quick", "proven", "known_board")
def test_the_command_keeps_a_devices_profile_in_the_run(
    folder: Path, tmp_path: Path, clipkd: Callable[..., Ended]
) -> None:
    run = tmp_path / "run"
    model = a_run(run, folder, "onnxruntime")
    words = ("profile", model, "--device", "board", "--processes", "2", "--seconds", "0.06", "--json")
    first = clipkd(*words)
    assert first.code == 0, first.err
    kept = open_stage(run / "measured" / "m" / "board")
    (document,) = json.loads(first.out)
    measured = json.loads((kept.path / "profile.json").read_text())
    samples = str(kept.path / "samples.npz")
    assert document == {"model": str(model), "status": "ok", **measured, "samples": samples}
    assert document["device"] == "board"
    again = clipkd(*words)
    assert json.loads(again.out) == [document]
    assert "cached" in again.err
    (row,) = collect([run])["rows"]
    assert (row["device"], row["p50_ms"]) == ("board", document["image"]["p50_ms"])
    assert row["status"] == "no evaluation.json"


@pytest.mark.usefixtures("quick", "proven", "known_board")
def test_models_take_turns_on_a_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipkd: Callable[..., Ended]
) -> None:
    """One in a run, one in none; a third is not what it should be."""
    inside = a_run(tmp_path / "run", folder, "onnxruntime")
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside, ignore=shutil.ignore_patterns("run", "outside", "on the device", "config"))
    turns = []

    def runner_on(
        device: Device, model: Path, tower: str, arguments: list[str], *, once: Sequence[Path]
    ) -> dict[str, object]:
        turns.append((device.name, model.name, tower))
        return test_profiling.documents([1.0])[0]

    monkeypatch.setattr("export.profiling.interleaved.runner_on", runner_on)
    words = ("--device", "board", "--processes", "2", "--out", tmp_path / "kept", "--json")
    ended = clipkd("profile", tmp_path / "run" / "exported" / "none", inside, outside, *words)
    assert ended.code == 1
    towers = [("board", model, tower) for model in ("m", "outside") for tower in ("image", "text")]
    assert turns == towers + towers[::-1]
    lost, kept, loose = json.loads(ended.out)
    assert lost["status"].endswith("none: no such directory")
    assert (kept["device"], kept["status"], loose["device"], loose["status"]) == ("board", "ok", "board", "ok")
    assert open_stage(tmp_path / "run" / "measured" / "m" / "board").path.is_dir()
    assert [row["samples"] for row in (kept, loose)] == [str(tmp_path / "kept" / f"samples-{n}.npz") for n in (2, 3)]


FAKE_BUILD = """
import hashlib, json, pathlib, sys
kit, out = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])
out.mkdir()
graphs = {}
for tower in ("image", "text"):
    sys.stderr.write(f"\\r{tower}: tactics 1/1      ")
    (out / f"{tower}.engine").write_bytes(b"plan of " + (kit / f"{tower}.onnx").read_bytes())
    graphs[tower] = hashlib.sha256((kit / f"{tower}.onnx").read_bytes()).hexdigest()
(out / "engine.json").write_text(json.dumps({"graphs": graphs}))
print(json.dumps({"graphs": graphs, "tensorrt": "10.13"}))
"""
FAKE_RUNNER = """
import json, pathlib, sys
named = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model, graph = pathlib.Path(named["--model"]), pathlib.Path(named["--graph"])
assert model.read_bytes() == b"plan of " + graph.read_bytes()
assert (model.parent / "engine.json").is_file()
assert "--runtime" not in named
timed = {"samples_ms": [1.0, 1.0], "steady": True}
e2e = {"e2e": dict(timed, stages_ms={"decode": 0.5})} if "--images" in named else {}
rest = {"load_ms": 1, "first_ms": 1, "batches": {}, "peak_rss_bytes": 1, "versions": {"tensorrt": "10.13"}}
print(json.dumps(dict(timed, **rest, **e2e)))
"""


@pytest.mark.usefixtures("quick", "proven", "known_board")
def test_a_kit_is_built_where_it_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipkd: Callable[..., Ended]
) -> None:
    """Stand-ins for TensorRT: the engines are built there, kept in the run, opened there beside their manifest."""
    (folder / "build_engine.py").write_text(FAKE_BUILD)
    model = a_run(tmp_path / "run", folder, "tensorrt")
    test_profiling.replace_runner(monkeypatch, tmp_path, FAKE_RUNNER)
    words = ("profile", model, "--device", "board", "--processes", "2", "--json")
    ended = clipkd(*words)
    assert ended.code == 0, ended.err
    (document,) = json.loads(ended.out)
    assert (document["device"], document["image"]["p50_ms"]) == ("board", 1.0)
    assert document["machine"]["tensorrt"] == "10.13"
    engines = open_stage(tmp_path / "run" / "engines" / "m@board")
    assert engines.manifest["summary"]["tensorrt"] == "10.13"
    assert document["size_bytes"] == sum(
        (engines.path / f"{tower}.engine").stat().st_size for tower in ("image", "text")
    )
    again = clipkd(*words)
    assert json.loads(again.out) == [document]
    assert again.err.count("cached") == 2


@pytest.mark.usefixtures("quick", "known_board")
def test_students_are_built_here_timed_there_and_not_kept_there(
    board: Device, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipkd: Callable[..., Ended]
) -> None:
    def built(candidate: Candidate, precision: str, runtime: str, path: Path) -> dict[str, int]:
        shutil.copy(folder / "image.onnx", path)
        facts = {"params_image": 768, "params_text": 0, "gmacs": 1, "image_size": 8}
        return facts | {"size_bytes": path.stat().st_size}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("export.students.measure._build_graph", built)
    words = ("students", "vit_t_16", "--device", "board", "--precision", "fp32", "--json", "--out", tmp_path / "out")
    ended = clipkd(*words)
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)
    assert (row["device"], row["status"], row["processes"], row["front"]) == ("board", "ok", 3, list(WORTH))
    assert left_behind(board) == []
    kept = {file.read_bytes() for file in (Path(str(board.workdir)) / "files").iterdir()}
    assert (folder / "image.onnx").read_bytes() not in kept
    assert Path(test_profiling.RUNNER).read_bytes() in kept
    monkeypatch.setattr("export.profiling.interleaved.runner_on", lambda *_: pytest.fail("timed again"))
    assert json.loads(clipkd(*words).out) == [row]


run = test_exported_folders.run
model = test_exported_folders.model


@pytest.mark.slow
def test_a_device_encodes_as_this_machine_does(board: Device, model: Path) -> None:
    """The same graphs and runtime: bit by bit; and what PyTorch computed, within parity's bounds."""
    there, here = encoders_on(board, model, precision="fp32"), open_exported(model)
    random = np.random.default_rng(0)
    pixels_BHWC = random.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(there.encode_images(pixels_BHWC), here.encode_images(pixels_BHWC))
    texts = ["latin small letter a", "a b"]
    assert np.array_equal(there.encode_texts(texts), here.encode_texts(texts))
    assert (
        check_parity(model, precision="fp32", encoders=there)["image"]["min_sqnr_db"] > PRECISIONS["fp32"].min_sqnr_db
    )
    assert left_behind(board) == []
