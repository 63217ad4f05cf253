"""Killed anywhere, the same command continues and ends as if it never had been: weights, optimizer and log, by bits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, jpeg, make_picture, make_shards, write_tar
from killable import MOMENTS, Killable, start
from training import assert_same_state, files, rows
from two_processes import spawn

from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.distill import CHECKPOINTS
from toolchain.distributed import Processes

BATCH_SIZE = 4
STEPS_OF_A_LIFE = 4  # an attempt is killed after so many steps at the most, and what it does before the kill arrives
DATA = ("glyphs", "webdataset", "csv")  # all but the first with damaged samples


@dataclass(frozen=True)
class Command:
    """`clipkd distill` on a recipe, again and again."""

    recipe: Path
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def student(self) -> Path:
        return self.run / "student"

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def start(self, *arguments: str | int, waiting: tuple[str, int] | None = None) -> Killable:
        everywhere = {"cache": self.folder.parent / "cache", "said": self.folder / "said", "keep": self.folder / "kept"}
        self.folder.mkdir(exist_ok=True)
        words = ["distill", self.recipe, "--out", self.run, "--checkpoint-steps", "1", *map(str, arguments)]
        return start(*words, waiting=waiting, **everywhere)  # type: ignore[arg-type]

    def completes(self, *arguments: str | int) -> Killable:
        process = self.start(*arguments)
        assert process.ends()[0] == 0, self.said
        return process

    def last_state(self, stage: str = "student") -> dict[str, Any]:
        """The last checkpoint of a finished stage: weights, heads, the optimizer's and the scaler's state."""
        state = Checkpoints(self.folder / "kept" / f".{stage}.partial").load(lambda text: None)
        assert state is not None
        return {name: value for name, value in state.items() if name != "elapsed_s"}


@pytest.fixture
def commands(tmp_path: Path, tiny_recipe: Callable[..., Path]) -> Callable[..., tuple[Command, Command]]:
    """The same command twice, in two run directories: one for a run that nothing interrupts."""

    def make(data: str, steps: int, baseline: bool = False, **changes: Any) -> tuple[Command, Command]:
        sections: dict[str, Any] = {"baseline": baseline}
        if data == "webdataset":
            make_shards(tmp_path / "shards", 3, 7, sizes=(40, 60))
            damaged = [(f"{n}.{kind}", content) for n in range(6) for kind, content in (("jpg", b"no"), ("txt", b"x"))]
            write_tar(tmp_path / "shards" / "00003.tar", damaged)
            shards = [str(tmp_path / "shards" / "{00000..00003}.tar")]
            sections["data"] = {"kind": data, "shards": shards, "max_damaged": 1.0}
        if data == "csv":
            lines = ["file\ttitle"]
            for number in range(21):
                name = f"{number}.jpg"
                (tmp_path / name).write_bytes(b"" if number % 4 == 1 else jpeg(make_picture(50, 40, number)))
                lines.append(f"{name}\tpicture {number}")
            (tmp_path / "list.tsv").write_text("\n".join(lines))
            columns = {"delimiter": "\t", "image_column": "file", "caption_column": "title", "max_damaged": 1.0}
            sections["data"] = {"kind": data, "paths": [str(tmp_path / "list.tsv")], **columns}
        sections["distill"] = {"steps": steps, "batch_size": BATCH_SIZE, "lr": 1e-3, "warmup": 2} | changes
        recipe = tiny_recipe(**sections)
        return Command(recipe, tmp_path / "whole"), Command(recipe, tmp_path / "parts")

    return make


def assert_same(parts: Command, whole: Command, stages: tuple[str, ...] = ("student",)) -> None:
    for stage in stages:
        found, expected = files(parts.run / stage), files(whole.run / stage)
        assert "open_clip_model.safetensors" in found
        assert found == expected
        assert rows(parts.run / stage) == rows(whole.run / stage)
        assert_same_state(parts.last_state(stage), whole.last_state(stage))
        manifests = [json.loads((command.run / stage / "manifest.json").read_text()) for command in (parts, whole)]
        assert manifests[0]["digest"] == manifests[1]["digest"]
        assert manifests[0]["summary"].get("damaged") == manifests[1]["summary"].get("damaged")
        assert sorted(path.name for path in (parts.run / stage).iterdir()) == sorted(
            path.name for path in (whole.run / stage).iterdir()
        )
    assert not [path for path in parts.run.iterdir() if path.name.endswith((".partial", ".old"))]


# At random.


def killed_at_random(parts: Command, kills: int, seed: int) -> list[int]:
    """Kill the command so often, then let it complete; the steps from which the attempts that trained began."""
    chosen, began = random.Random(seed), []
    for number in range(kills):
        workers, every, kept = 2 * (number % 2), chosen.choice([1, 1, 2]), chosen.randint(1, 3)
        process = parts.start("--workers", workers, "--checkpoint-steps", every, "--keep-checkpoints", kept)
        last = number == kills - 1  # which leaves something to continue
        steps = chosen.randint(3 if last else 0, STEPS_OF_A_LIFE)
        assert process.hears(lambda heard, steps=steps, process=process: len(process.steps) == steps), parts.said
        # While it starts; or somewhere in the steps and checkpoints that follow, of which it then does not do many.
        time.sleep(chosen.uniform(0, 0.03 if steps else 0.3))
        process.kill()
        assert process.process.exitcode == -signal.SIGKILL, f"it ended before it was killed: {parts.said}"
        if process.steps:
            began.append(process.steps[0])
    completed = parts.completes("--workers", 2 * (kills % 2))
    return [*began, completed.steps[0]]


@pytest.mark.parametrize("data", ["glyphs", "webdataset", pytest.param("csv", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        pytest.param(3, {}, id="3 kills"),
        pytest.param(24, {"precision": "bf16", "grad_clip_norm": 1.0}, id="24 kills", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(
    commands: Callable[..., tuple[Command, Command]],
    request: pytest.FixtureRequest,
    data: str,
    kills: int,
    changes: dict[str, Any],
) -> None:
    given = request.config.getoption("--kill-seed")
    seed = int.from_bytes(os.urandom(4), "big") if given is None else given
    print(f"repeat with --kill-seed {seed}")  # noqa: T201  # pytest shows it where the test fails
    whole, parts = commands(data, steps=kills * (STEPS_OF_A_LIFE + 6) + 4, **changes)
    began = killed_at_random(parts, kills, seed)
    whole.completes("--workers", 0)
    assert began == sorted(began), "no attempt lost what an earlier one had kept"
    assert began[-1] > 1, "the last attempt continued"
    assert_same(parts, whole)


# At each moment that matters, one after the other.


@pytest.mark.parametrize("data", ["glyphs", *(pytest.param(kind, marks=pytest.mark.slow) for kind in DATA[1:])])
def test_killed_at_every_moment_of_writing(commands: Callable[..., tuple[Command, Command]], data: str) -> None:
    whole, parts = commands(data, steps=12)
    whole.completes()
    continues = 1
    for number, moment in enumerate(MOMENTS):
        # Of a checkpoint the third occurrence in an attempt, so that there is something to fall back to.
        occurrence = 3 if "checkpoint " in f"{moment} " and "log" not in moment else 1
        process = parts.start("--workers", 2 * (number % 2), waiting=(moment, occurrence))
        assert process.hears(lambda heard: heard == "waiting"), (moment, parts.said)
        if process.steps:
            assert process.steps[0] == continues, moment
            continues = process.steps[-1] + (moment == "an old checkpoint before its removal")
        process.kill()
    assert continues <= 12
    last = parts.start()
    code, _ = last.ends()
    assert (code, last.steps) == (0, []), parts.said
    assert re.search(r"^student +cached$", parts.said, re.MULTILINE), "what was finished is not made again"
    assert_same(parts, whole)


def test_a_damaged_checkpoint_is_passed_over_aloud(commands: Callable[..., tuple[Command, Command]]) -> None:
    whole, parts = commands("glyphs", steps=8)
    process = parts.start()
    assert process.hears(lambda heard: heard == 6)
    process.kill()
    newest = max((parts.run / ".student.partial" / CHECKPOINTS).glob("step-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    step = int(newest.name.split("-")[1])
    last = parts.completes()
    assert last.steps[0] == step, "the one before is a step older"
    assert re.search(
        f"^{re.escape(str(newest))}: corrupt checkpoint, its hash is [0-9a-f]{{16}}; using the one before it$",
        parts.said,
        re.MULTILINE,
    )
    whole.completes()
    assert_same(parts, whole)


def test_loaders_end_with_a_process_that_is_killed(commands: Callable[..., tuple[Command, Command]]) -> None:
    """Though they heed no signal, and though a server forks by default here, as everywhere from Python 3.14 on."""
    _, parts = commands("glyphs", steps=1000)
    process = parts.start("--workers", 2)
    assert process.hears(lambda heard: heard == 1)
    listed = subprocess.run(["pgrep", "-P", str(process.process.pid)], capture_output=True, text=True, check=True)
    loaders = [Path("/proc", pid) for pid in listed.stdout.split()]
    assert len(loaders) == 2, "its own children"
    process.kill()
    deadline = time.monotonic() + 30  # they look every 5 s
    while alive := [loader for loader in loaders if loader.exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_killed_after_each_step_in_turn(commands: Callable[..., tuple[Command, Command]], precision: str) -> None:
    """Teacher, baseline and student, the second killed too; twenty kills and more."""
    whole, parts = commands("glyphs", steps=12, baseline=True, precision=precision)
    whole.completes()
    killed = 0
    while True:
        process = parts.start("--workers", 2 * (killed % 2))
        if not process.hears(lambda heard: isinstance(heard, int)):
            break
        assert process.hears(lambda heard: isinstance(heard, int)) or process.steps[-1] == 12
        process.kill()
        killed += 1
    assert process.ends()[0] == 0, parts.said
    assert killed >= 20
    assert_same(parts, whole, ("baseline", "student"))


# As a user does it: a process that imports everything itself, and torchrun.


def environment(parts: Command) -> dict[str, str]:
    cache = {"XDG_CACHE_HOME": str(parts.folder.parent / "cache")}
    return os.environ | cache | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}


def until(what: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    """What it gives as soon as it gives something, while a process works."""
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def test_a_signal_to_the_whole_group_checkpoints_and_ends_with_130(
    commands: Callable[..., tuple[Command, Command]],
) -> None:
    """As Ctrl-C in a terminal, or a job's end: the loaders get it too."""
    whole, parts = commands("webdataset", steps=30)
    parts.folder.mkdir()
    words = [sys.executable, "-m", "clipkd", "distill", parts.recipe, "--out", parts.run, "--workers", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    checkpoints = parts.run / ".student.partial" / CHECKPOINTS
    with subprocess.Popen(
        [*words, "--checkpoint-steps", "2"], cwd=REPOSITORY, env=environment(parts), start_new_session=True, **pipes
    ) as process:
        until(lambda: list(checkpoints.glob("step-*.pt")), process)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    saved = max(map(step_of, checkpoints.glob("step-*.pt")))
    assert err.splitlines()[-1] == (
        f"error: {parts.run / '.student.partial'}: stopped after step {saved} of 30; run the same command to resume"
    )
    assert "Traceback" not in err
    last = parts.completes("--workers", 0)
    assert last.steps == list(range(saved + 1, 31))
    whole.completes("--workers", 0)
    assert_same(parts, whole)


def torchrun(parts: Command, *arguments: str) -> list[str | Path]:
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "clipkd", "distill", parts.recipe, "--out", parts.run, *arguments]


def test_torchrun_continues_what_one_process_began_and_then_finds_it_cached(
    commands: Callable[..., tuple[Command, Command]],
) -> None:
    _, parts = commands("webdataset", steps=8)
    process = parts.start()
    assert process.hears(lambda heard: heard == 4)
    process.kill()
    saved = max(map(step_of, (parts.run / ".student.partial" / CHECKPOINTS).glob("step-*.pt")))
    before = rows(parts.run / ".student.partial")[:saved]
    ended = [
        subprocess.run(torchrun(parts), env=environment(parts), cwd=REPOSITORY, capture_output=True, text=True)
        for _ in range(2)
    ]
    for each in ended:
        assert each.returncode == 0, each.stderr
        assert each.stdout == f"{parts.run / 'teacher'}\n{parts.run / 'student'}\n"
        assert "Traceback" not in each.stderr
    done = [re.findall(r"^(teacher|student) +(cached|done in \d+ s)$", each.stderr, re.MULTILINE) for each in ended]
    assert done[0][0] == ("teacher", "cached")
    assert done[0][1][1].startswith("done in")
    assert done[1] == [("teacher", "cached"), ("student", "cached")]
    logged = rows(parts.student)
    assert [row["step"] for row in logged] == list(range(8))
    assert logged[:saved] == before, "what one process had logged stays"
    assert json.loads((parts.student / "manifest.json").read_text())["summary"]["processes"] == 2


def kill_rank(launcher: "subprocess.Popen[str]", rank: int) -> None:
    """kill -9 one of the processes that torchrun started."""
    listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    for pid in listed.stdout.split():
        if f"RANK={rank}".encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank} in {listed.stdout.split()}")


def distill_as_rank(processes: Processes, arguments: list[str], cache: str) -> int:
    """The command on one of two ranks that have already met."""
    import clipkd as command

    os.environ |= {"RANK": str(processes.rank), "WORLD_SIZE": str(processes.size), "XDG_CACHE_HOME": cache}
    sys.argv = ["clipkd", *arguments]
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_of_which_one_is_killed_are_started_again_and_continue_exactly(
    commands: Callable[..., tuple[Command, Command]], rank: int
) -> None:
    """Rank 0 holds the locks and writes the checkpoints."""
    whole, parts = commands("webdataset", steps=16)
    arguments = ["distill", str(whole.recipe), "--out", str(whole.run), "--workers", "0"]
    assert spawn([(distill_as_rank, arguments, environment(whole)["XDG_CACHE_HOME"])]) == [[0, 0]]
    parts.folder.mkdir()
    checkpoints = parts.run / ".student.partial" / CHECKPOINTS

    def newest() -> int:
        return max(map(step_of, checkpoints.glob("step-*.pt")), default=0)

    words = torchrun(parts, "--checkpoint-steps", "1", "--workers", "0")
    words[1:1] = ["--max-restarts", "2"]
    seen = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(parts), cwd=REPOSITORY, **pipes) as process:
        until(lambda: newest() > 2, process)
        kill_rank(process, rank)
        while process.poll() is None:
            seen.append(newest())
            time.sleep(0.05)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    # torchrun names the rank whose end it sees first: the killed one, or the one that lost its connection to it
    assert f"failed (exitcode: -9) local_rank: {rank}" in err or f"failed (exitcode: 1) local_rank: {1 - rank}" in err
    running = [step for step in seen if step]  # none is left once it has finished
    assert running == sorted(running), "the second attempt did not begin anew"
    assert files(parts.student) == files(whole.student)
    assert rows(parts.student) == rows(whole.student)


@pytest.mark.slow
def test_torchrun_stopped_continues_exactly(commands: Callable[..., tuple[Command, Command]]) -> None:
    whole, parts = commands("webdataset", steps=60)
    for command in (whole, parts):
        command.folder.mkdir()
    again: dict[str, Any] = {"env": environment(parts), "cwd": REPOSITORY, "text": True}
    checkpoints = parts.run / ".student.partial" / CHECKPOINTS
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = max(map(step_of, checkpoints.glob("step-*.pt")), default=0)
        words = torchrun(parts, "--checkpoint-steps", "1", "--workers", "1")
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **again
        ) as process:
            until(lambda b=before: max(map(step_of, checkpoints.glob("step-*.pt")), default=0) > b + 3, process)
            if number == signal.SIGTERM:
                process.terminate()
            else:  # torchrun and what it started, each of which has a session of its own
                listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
                for pid in [*listed.stdout.split(), str(process.pid)]:
                    os.kill(int(pid), signal.SIGKILL)
            _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        if number == signal.SIGTERM:
            assert "run the same command to resume" in err
    for command in (parts, whole):
        ended = subprocess.run(torchrun(command), capture_output=True, **again)
        assert ended.returncode == 0, ended.stderr
    assert files(parts.student) == files(whole.student)
    assert rows(parts.student) == rows(whole.student)


@pytest.mark.slow
def test_torchrun_with_a_batch_that_cannot_be_shared(commands: Callable[..., tuple[Command, Command]]) -> None:
    _, parts = commands("webdataset", steps=8, batch_size=5)
    parts.folder.mkdir()
    ended = subprocess.run(torchrun(parts), env=environment(parts), cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode != 0
    said = "error: distill.batch_size 5 cannot be split evenly over 2 ranks; the nearest size that can: 4"
    assert said in ended.stderr.splitlines()
    assert not parts.student.exists()
