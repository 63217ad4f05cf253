"""Stages: reused when nothing they depend on changed, continued when interrupted, never half there, never trampled."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from toolchain import stage as stages
from toolchain.errors import ArtifactError, ClipkdError
from toolchain.filesystem import partial_path
from toolchain.provenance import machine
from toolchain.stage import (
    MANIFEST,
    REPLACED,
    SCRATCH,
    Stage,
    StageSpec,
    count_seconds,
    folder_fingerprint,
    is_made,
    open_stage,
    run_lock,
    run_stage,
)

DEPENDS: dict[str, Any] = {
    "kind": "test",
    "version": 1,
    "fields": {"steps": 3},
    "fingerprints": {"fonts": "abc"},
    "inputs": {},
}
# What `python -c` runs in a process of its own: the same stage as `make`, stopped in the middle of its work.
STOPPED_HALF_WAY = f"""
import sys, time
from pathlib import Path
from toolchain.stage import StageSpec, run_stage

def work(folder):
    (folder / "checkpoint").write_text("half")
    (folder / "weights.partial").write_text("torn")
    (folder / ".tmpAb3x_Z").write_text("torn")  # as safetensors names what it is writing
    print("working", flush=True)
    time.sleep(60)

run_stage(StageSpec(Path(sys.argv[1]), **{DEPENDS!r}), work)
"""


def write(content: str = "result") -> Callable[[Path], dict[str, Any]]:
    def work(folder: Path) -> dict[str, Any]:
        (folder / "weights").write_text(content)
        (folder / "inner").mkdir(exist_ok=True)
        (folder / "inner" / "file").write_text("inside")
        return {"role": "student"}

    return work


def continued(folder: Path) -> dict[str, Any]:
    """Work that goes on from its checkpoint."""
    checkpoint = folder / "checkpoint"
    found = f"continued from {checkpoint.read_text()}" if checkpoint.exists() else "from scratch"
    (folder / "weights").write_text(found)
    checkpoint.unlink(missing_ok=True)
    return {}


def must_not_run(folder: Path) -> dict[str, Any]:
    raise AssertionError("this stage is complete: nothing may be computed")


def make(path: Path, work: Callable[[Path], dict[str, Any]] = must_not_run, **changes: Any) -> Stage:
    return run_stage(StageSpec(path, **DEPENDS | changes), work)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def at_work(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of the stage's work, killed at the end at the latest."""
    command = [sys.executable, "-c", STOPPED_HALF_WAY, str(path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        try:
            yield process
        finally:
            process.kill()


# Made once, then reused.


def test_a_stage_is_made_then_cached(tmp_path: Path) -> None:
    made = make(tmp_path / "student", write())
    assert not made.cached
    assert (tmp_path / "student" / "weights").read_text() == "result"
    before = tree(tmp_path)
    again = make(tmp_path / "student")
    assert again.cached
    assert (again.digest, again.manifest) == (made.digest, made.manifest)
    assert tree(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"], "nothing else may stay behind"


def test_the_manifest_says_what_the_stage_came_from(tmp_path: Path) -> None:
    manifest = make(tmp_path / "student", write(), inputs={"teacher": make(tmp_path / "teacher", write("t"))}).manifest
    assert manifest == json.loads((tmp_path / "student" / MANIFEST).read_text())
    assert (manifest["kind"], manifest["version"], manifest["fields"]) == ("test", 1, {"steps": 3})
    assert manifest["summary"] == {"role": "student"}
    assert manifest["inputs"] == {"teacher": open_stage(tmp_path / "teacher").digest}
    assert sorted(manifest["files"]) == ["inner/file", "weights"]
    assert manifest["machine"] == machine()
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert {"key", "digest", "started_at", "took_s", "revision"} < set(manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"version": 2},
        {"fields": {"steps": 4}},
        {"fields": {"steps": 3, "lr": 0.1}},
        {"fingerprints": {"fonts": "abd"}},
        {"fingerprints": {}},
        {"inputs": {"teacher": Stage(Path("t"), {"digest": "d"}, cached=True)}},
    ],
    ids=str,
)
def test_every_dependency_makes_another_stage(tmp_path: Path, change: dict[str, Any]) -> None:
    first = make(tmp_path / "student", write("old"))
    assert is_made(StageSpec(tmp_path / "student", **DEPENDS))
    assert not is_made(StageSpec(tmp_path / "student", **DEPENDS | change))
    second = make(tmp_path / "student", write("new"), **change)
    assert not second.cached
    assert second.manifest["key"] != first.manifest["key"]
    assert (tmp_path / "student" / "weights").read_text() == "new"


def test_what_is_not_there_or_damaged_is_not_made(tmp_path: Path) -> None:
    assert not is_made(StageSpec(tmp_path / "student", **DEPENDS))
    make(tmp_path / "student", write())
    (tmp_path / "student" / "weights").write_text("other")
    assert not is_made(StageSpec(tmp_path / "student", **DEPENDS))
    (tmp_path / "file").write_text("")
    assert not is_made(StageSpec(tmp_path / "file", **DEPENDS))


def test_order_of_fields_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "student", write(), fields={"a": 1, "b": 2})
    assert make(tmp_path / "student", fields={"b": 2, "a": 1}).cached


def test_what_comes_after_is_redone_only_for_other_bytes(tmp_path: Path) -> None:
    def chain(content: str) -> Stage:
        first = make(tmp_path / "first", write(content))
        return make(tmp_path / "second", write("second"), inputs={"first": first})

    chain("a")
    shutil.rmtree(tmp_path / "first")
    assert chain("a").cached, "the same bytes, though another manifest"
    shutil.rmtree(tmp_path / "first")
    assert not chain("b").cached


def test_the_digest_excludes_how_it_went(tmp_path: Path) -> None:
    def logged(log: str) -> Callable[[Path], dict[str, Any]]:
        def work(folder: Path) -> dict[str, Any]:
            (folder / "train.jsonl").write_text(log)
            (folder / "tensorboard").mkdir()
            (folder / "tensorboard" / f"events.out.tfevents.{len(log)}.host").write_text(log)
            (folder / "weights").write_text("same")
            return {"train_s": len(log)}

        return work

    slow, fast = make(tmp_path / "slow", logged("12 images/s")), make(tmp_path / "fast", logged("900 images/s"))
    assert slow.digest == fast.digest
    assert len([name for name in slow.manifest["files"] if name.startswith("tensorboard/")]) == 1
    assert slow.manifest["files"]["train.jsonl"] != fast.manifest["files"]["train.jsonl"], "it is still verified"


def test_a_folder_fingerprint_is_of_names_and_bytes(tmp_path: Path) -> None:
    def fingerprint(name: str, content: str) -> str:
        folder = tmp_path / f"{name}-{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        return folder_fingerprint(folder)

    assert len({fingerprint("a", "x"), fingerprint("b", "x"), fingerprint("a", "y")}) == 3


# Superseded.


def test_the_old_stage_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "student"
    make(path, write("old"))

    def failing(folder: Path) -> dict[str, Any]:
        assert open_stage(path).manifest["fields"] == {"steps": 3}
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        make(path, failing, fields={"steps": 4})
    assert (path / "weights").read_text() == "old"
    assert make(path).cached

    make(path, write("new"), fields={"steps": 4})
    assert (path / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "student"
    make(path, write("old"))
    (tmp_path / REPLACED).mkdir()
    path.rename(tmp_path / REPLACED / "student")
    shutil.copytree(tmp_path / REPLACED / "student", tmp_path / ".student.partial")
    assert not make(path, write("new"), fields={"steps": 4}).cached
    assert open_stage(path).manifest["fields"] == {"steps": 4}
    assert (path / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def attempted(folder: Path) -> dict[str, Any]:
    """Work that is interrupted after more than a minute, by the times of its files."""
    (folder / "checkpoint").write_text("half")
    later = time.time() + 90
    os.utime(folder / "checkpoint", (later, later))
    raise ClipkdError("stopped")


def resume(path: Path, work: Callable[[Path], dict[str, Any]], *, steps: int, replace: bool = False) -> Stage:
    spec = StageSpec(path, **DEPENDS | {"fields": {"steps": steps}}, resumes=True)
    return run_stage(spec, work, replace=replace)


def test_costly_work_is_replaced_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student"
    resume(path, write("old"), steps=3)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"took_s": 61}))
    before = tree(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        resume(path, must_not_run, steps=4)
    assert str(caught.value) == (
        f"{path} would be replaced. It took 1.0 min and is of another recipe: steps 3 -> 4\n"
        "To keep it, choose another --out. "
        "To replace it, add --replace to clipkd run, distill, adopt, cache or quantize"
    )
    assert tree(tmp_path) == before
    resume(path, write("new"), steps=4, replace=True)
    assert (path / "weights").read_text() == "new"
    resume(path, write("newer"), steps=5)  # cheap: it took no second
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_training_that_was_resumed_counts_all_its_seconds(tmp_path: Path) -> None:
    path = tmp_path / "student"
    with pytest.raises(ClipkdError, match=r"^stopped$"):
        resume(path, attempted, steps=3)
    assert resume(path, continued, steps=3).manifest["took_s"] == pytest.approx(90, abs=5)
    assert count_seconds({"took_s": 2.0, "summary": {"train_s": 3600.0}}) == 3600  # as earlier versions recorded it


def test_a_costly_attempt_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "student"
    with pytest.raises(ClipkdError, match=r"^stopped$"):
        resume(path, attempted, steps=2000)
    before = tree(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"student \(unfinished\) would be replaced. It took 1\.5 min .*: steps 2000 -> 1999\n"
    ):
        resume(path, must_not_run, steps=1999)
    assert tree(tmp_path) == before
    with pytest.raises(ClipkdError, match=r"^stopped$"):
        resume(path, attempted, steps=1999, replace=True)
    assert (tmp_path / REPLACED / ".student.partial" / "checkpoint").read_text() == "half"
    resume(path, continued, steps=2000, replace=True)  # the attempts change places
    assert (path / "weights").read_text() == "continued from half"
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_an_attempt_whose_fields_were_not_recorded(tmp_path: Path) -> None:
    """As earlier versions left it: its key alone."""
    partial = tmp_path / ".student.partial"
    partial.mkdir()
    (partial / "key").write_text(StageSpec(tmp_path / "student", **DEPENDS).key)
    (partial / "checkpoint").write_text("half")
    os.utime(partial / "key", (0, 0))
    with pytest.raises(ArtifactError, match="is of another recipe: made with other fields, which were not recorded\n"):
        resume(tmp_path / "student", must_not_run, steps=4)
    assert resume(tmp_path / "student", continued, steps=3).manifest["took_s"] > 1e6
    assert (tmp_path / "student" / "weights").read_text() == "continued from half"


def test_a_stage_that_fails_to_be_replaced_is_kept_and_put_back(tmp_path: Path) -> None:
    path = tmp_path / "student"
    old = resume(path, write("old"), steps=3)
    with pytest.raises(ClipkdError) as caught:
        resume(path, attempted, steps=4)
    kept = tmp_path / REPLACED / "student"
    assert str(caught.value) == f"stopped. The earlier student is kept in {kept} until the new one is complete"
    assert open_stage(kept).digest == old.digest
    assert not path.exists()
    assert resume(path, must_not_run, steps=3).cached
    assert not kept.parent.exists()
    resume(path, continued, steps=4, replace=True)
    assert (path / "weights").read_text() == "continued from half"


def test_a_kept_stage_is_not_given_up_for_a_third_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student"
    resume(path, write("old"), steps=3)
    with pytest.raises(ClipkdError, match="is kept in"):
        resume(path, attempted, steps=4)
    monkeypatch.setattr(stages, "COSTLY_S", -1.0)
    with pytest.raises(ArtifactError, match=r"/\.replaced/student would be replaced\. .*: steps 3 -> 5\n"):
        resume(path, must_not_run, steps=5)
    resume(path, continued, steps=4)  # the one that it was given up for
    assert (path / "weights").read_text() == "continued from half"


def test_a_complete_attempt_that_was_not_renamed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_swap_in", stopped)
        with pytest.raises(KeyboardInterrupt):
            resume(path, write("old"), steps=3)
    monkeypatch.setattr(stages, "COSTLY_S", -1.0)
    with pytest.raises(ArtifactError, match=r"student \(unfinished\) would be replaced\. .*: steps 3 -> 4\n"):
        resume(path, must_not_run, steps=4)
    with pytest.raises(ClipkdError, match=r"^stopped$"):
        resume(path, attempted, steps=4, replace=True)
    assert resume(path, must_not_run, steps=3, replace=True).cached
    assert (path / "weights").read_text() == "old"


@pytest.mark.parametrize("step", ["rename", "rmtree", "mkdir"])
def test_killed_at_any_moment_of_replacing_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner = shutil if step == "rmtree" else Path
    real = getattr(owner, step)
    for number in range(20):
        run = tmp_path / str(number)
        resume(run / "student", write("old"), steps=3)
        left = number

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, counted)
            try:
                resume(run / "student", write("new"), steps=4, replace=True)
            except KeyboardInterrupt:
                killed = True
        places = [run / "student", run / REPLACED / "student"]
        found = [(place / "weights").read_text() for place in places if (place / MANIFEST).exists()]
        assert "old" in found or "new" in found, number
        for steps, content in ((3, "old"), (4, "new")):
            assert (resume(run / "student", write(content), steps=steps).path / "weights").read_text() == content
        assert [entry.name for entry in run.iterdir()] == ["student"]
        if not killed:
            assert number > 0
            return
    pytest.fail("never complete")


def test_a_kept_stage_is_put_back_into_a_folder_that_was_removed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# clipkd run glyphs\n# resolved by clipkd:\nname: glyphs\n")
    path = tmp_path / "teacher-cache" / "teacher"
    resume(path, write("old"), steps=3)
    with pytest.raises(ClipkdError, match="is kept in"):
        resume(path, attempted, steps=4)
    shutil.rmtree(path.parent)
    assert resume(path, must_not_run, steps=3).cached


def test_what_a_killed_deletion_left_is_deleted_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student"
    resume(path, write("old"), steps=3)

    def killed(folder: Path, **_: Any) -> None:
        if REPLACED in folder.parts:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(path, write("new"), steps=4)
    assert (tmp_path / REPLACED / "student").exists()
    assert resume(path, must_not_run, steps=4).cached
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_stage_that_is_replaced_while_it_is_read_is_not_called_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, waiting = tmp_path / "student", stages.file_sha256, [True]
    make(path, write("old"))

    def replaced_meanwhile(file: Path) -> str:
        if waiting.pop() if waiting else False:
            monkeypatch.setattr(stages, "file_sha256", real)
            make(path, write("new"), fields={"steps": 4})
        return real(file)

    monkeypatch.setattr(stages, "file_sha256", replaced_meanwhile)
    assert open_stage(path).manifest["fields"] == {"steps": 4}


@pytest.mark.parametrize("looks", [0, 1])
def test_a_file_that_vanishes_while_an_attempt_is_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """As `clipkd show --out RUN` reads a run in which another process replaces the checkpoints."""
    path, real, left = tmp_path / "student", Path.stat, looks
    with pytest.raises(ClipkdError, match="stopped"):
        resume(path, attempted, steps=3)

    def vanishes(file: Path, **options: Any) -> os.stat_result:
        nonlocal left
        if file.name == "checkpoint":
            left -= 1
            if left < 0:
                file.unlink(missing_ok=True)
        return real(file, **options)

    monkeypatch.setattr(Path, "stat", vanishes)
    attempt = stages.read_attempt(partial_path(path))
    assert attempt is not None
    assert attempt.took_s == pytest.approx(90 if looks else 0, abs=5)


def test_what_a_run_replaces_lies_in_the_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# clipkd run glyphs\n# resolved by clipkd:\nname: glyphs\n")
    path = tmp_path / "teacher-cache" / "teacher"
    resume(path, write("old"), steps=3)
    with pytest.raises(ClipkdError, match="is kept in"):
        resume(path, attempted, steps=4)
    assert open_stage(tmp_path / REPLACED / "teacher-cache" / "teacher").manifest["fields"] == {"steps": 3}
    resume(path, continued, steps=4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["recipe.yaml", "teacher-cache"]


# Interrupted.


def test_an_exception_leaves_only_the_partial_and_the_same_call_continues(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> dict[str, Any]:
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "student", interrupted)
    assert [entry.name for entry in tmp_path.iterdir()] == [".student.partial"]
    assert not make(tmp_path / "student", continued).cached
    assert (tmp_path / "student" / "weights").read_text() == "continued from half"
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    with at_work(tmp_path / "student") as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == [".student.partial"]
    with pytest.raises(ArtifactError, match="no such directory"):
        open_stage(tmp_path / "student")
    make(tmp_path / "student", continued)
    assert (tmp_path / "student" / "weights").read_text() == "continued from half"
    assert sorted(tree(tmp_path / "student")) == [MANIFEST, "weights"], "no lock, key or torn file may be shipped"


def test_an_interrupted_attempt_at_something_else_is_not_continued(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> dict[str, Any]:
        (folder / "checkpoint").write_text("half")
        (folder / "inner").mkdir()
        (folder / "inner" / "stale").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "student", interrupted)
    make(tmp_path / "student", continued, fields={"steps": 4})
    assert (tmp_path / "student" / "weights").read_text() == "from scratch"
    assert sorted(tree(tmp_path / "student")) == [MANIFEST, "weights"]


def test_a_partial_that_does_not_say_what_it_is_of_is_emptied(tmp_path: Path) -> None:
    (tmp_path / ".student.partial").mkdir()
    (tmp_path / ".student.partial" / "checkpoint").write_text("of who knows what")
    make(tmp_path / "student", continued)
    assert (tmp_path / "student" / "weights").read_text() == "from scratch"


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


def scratched(folder: Path) -> dict[str, Any]:
    """Work that keeps its checkpoints where they stay until the stage is complete."""
    scratch = folder / SCRATCH
    found = "from scratch" if not scratch.exists() else (scratch / "checkpoint").read_text()
    scratch.mkdir(exist_ok=True)
    (scratch / "checkpoint").write_text("all of it")
    (scratch / "torn.partial").write_text("torn")
    (folder / "weights").write_text("result")
    return {"began": found}


@pytest.mark.parametrize("moment", ["_hashes", "versions", "_swap_in", "the last rename"])
def test_killed_after_its_work_a_stage_does_not_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with monkeypatch.context() as patch:
        if moment == "the last rename":
            patch.setattr(Path, "rename", stopped)
        else:
            patch.setattr(stages, moment, stopped)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "student", scratched)
    assert not (tmp_path / "student").exists()
    had_manifest = moment in ("_swap_in", "the last rename")
    stage = make(tmp_path / "student", must_not_run if had_manifest else scratched)
    assert stage.cached == had_manifest
    assert stage.manifest["summary"] == {"began": "from scratch" if had_manifest else "all of it"}
    assert sorted(tree(tmp_path / "student")) == [MANIFEST, "weights"]
    assert list(stage.manifest["files"]) == ["weights"]
    assert not (tmp_path / "student" / SCRATCH).exists()
    assert make(tmp_path / "student").cached


def test_another_stages_finished_attempt_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_swap_in", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "student", scratched)
    stage = make(tmp_path / "student", scratched, fields={"steps": 4})
    assert (stage.cached, stage.manifest["summary"]) == (False, {"began": "from scratch"})


def test_a_manifest_without_its_content_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "student", lambda folder: scratched(folder) and stopped())  # type: ignore[arg-type]
    (tmp_path / ".student.partial" / MANIFEST).write_text("")
    assert make(tmp_path / "student", scratched).manifest["summary"] == {"began": "all of it"}


def test_continuing_writes_nothing_that_a_kill_could_leave_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is empty says that what is there is of something else, and must go."""
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "student", lambda folder: scratched(folder) and stopped())  # type: ignore[arg-type]
    real = Path.write_text

    def torn(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "key":
            real(path, "")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", torn)
    assert make(tmp_path / "student", scratched).manifest["summary"] == {"began": "all of it"}


# The directory is removed.


@pytest.mark.parametrize("writes", [True, False])
def test_a_directory_removed_during_the_work_is_explained(tmp_path: Path, writes: bool) -> None:
    def removing(folder: Path) -> dict[str, Any]:
        shutil.rmtree(folder)
        if writes:
            (folder / "weights").write_text("half")
        return {}

    with pytest.raises(ArtifactError, match=r"\.student\.partial: removed while clipkd was writing into it\. Repeat"):
        make(tmp_path / "student", removing)
    assert make(tmp_path / "student", write()).path.is_dir()


# The disk is full.


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        (folder / "checkpoint").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "weights"))

    finished = make(tmp_path / "teacher", write())
    with pytest.raises(ArtifactError) as caught:
        make(tmp_path / "student", full)
    partial = tmp_path / ".student.partial"
    free = f"{shutil.disk_usage(tmp_path).free / 1e6:.0f}"
    assert str(caught.value).replace(free, "N").startswith(f"{partial}: the disk is full (")
    assert str(caught.value).endswith(
        "MB free). Finished stages and the last training checkpoint are kept: free some space and repeat the command "
        "to resume"
    )
    assert make(tmp_path / "teacher").digest == finished.digest
    make(tmp_path / "student", continued)
    assert (tmp_path / "student" / "weights").read_text() == "continued from half"


def test_another_failure_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def denied(folder: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        make(tmp_path / "student", denied)


@pytest.mark.parametrize("writer", ["write_bytes", "torch.save", "save_file"])
def test_a_disk_that_is_really_full(tmp_path: Path, writer: str) -> None:
    def full(folder: Path) -> dict[str, Any]:
        if writer == "write_bytes":
            (folder / "weights").write_bytes(bytes(1 << 20))
            return {}
        import torch
        from safetensors.torch import save_file

        weights = {"weights": torch.zeros(1 << 20)}
        if writer == "torch.save":
            torch.save(weights, folder / "weights")  # raises a RuntimeError about positions
        else:
            save_file(weights, folder / "weights")  # raises an error of its own
        return {}

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        finished = make(small / "teacher", write())
        with pytest.raises(ClipkdError, match=r"/\.student\.partial: the disk is full \(0 MB free\)\. Finished stages"):
            make(small / "student", full)
        assert make(small / "teacher").digest == finished.digest
        assert not (small / "student").exists()
        (small / ".student.partial" / "weights").unlink(missing_ok=True)  # some space is freed
        make(small / "student", write())
        open_stage(small / "student")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Damaged, foreign, busy.


def test_damage_is_found_and_both_hashes_are_said(tmp_path: Path) -> None:
    path = tmp_path / "student"
    recorded = make(path, write()).manifest["files"]["weights"]
    content = bytearray((path / "weights").read_bytes())
    content[0] ^= 1  # one bit
    (path / "weights").write_bytes(content)
    got = subprocess.run(["sha256sum", path / "weights"], capture_output=True, text=True, check=True).stdout.split()[0]
    with pytest.raises(ArtifactError) as caught:
        make(path)
    assert str(caught.value) == (
        f"{path / 'weights'}: changed since clipkd wrote it: expected sha256 {recorded[:16]}, got {got[:16]}. "
        f"Restore it from a copy, or remove {path} and run the command again"
    )
    with pytest.raises(ArtifactError):  # also where another stage is asked for: damage is never silently replaced
        make(path, write(), fields={"steps": 4})
    shutil.rmtree(path)
    assert not make(path, write()).cached


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    make(tmp_path / "student", write())
    (tmp_path / "student" / "inner" / "file").unlink()
    with pytest.raises(
        ArtifactError,
        match=r"inner/file: changed since clipkd wrote it: expected sha256 [0-9a-f]{16}, got no such file. ",
    ):
        make(tmp_path / "student")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: "",
        lambda manifest: "{",
        lambda manifest: "[]",
        lambda manifest: "\xff",
        lambda manifest: json.dumps({key: value for key, value in manifest.items() if key != "digest"}),
        lambda manifest: json.dumps({key: value for key, value in manifest.items() if key != "key"}),
        lambda manifest: json.dumps(manifest | {"files": 3}),
        lambda manifest: json.dumps(manifest | {"files": ["weights"]}),
    ],
)
def test_a_broken_manifest_is_said(tmp_path: Path, change: Callable[[dict[str, Any]], str]) -> None:
    stage = make(tmp_path / "student", write())
    (stage.path / MANIFEST).write_text(change(stage.manifest), encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"student/manifest\.json: not a clipkd manifest \("):
        make(tmp_path / "student")


def test_a_digest_that_is_not_of_the_files_is_said(tmp_path: Path) -> None:
    stage = make(tmp_path / "student", write())
    (stage.path / MANIFEST).write_text(json.dumps(stage.manifest | {"digest": "0" * 64}))
    with pytest.raises(ArtifactError, match="its digest does not match its list of files; remove "):
        open_stage(stage.path)


def test_a_foreign_directory_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "student"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError) as caught:
        make(path, write())
    assert (
        str(caught.value) == f"{path}: no manifest.json, so clipkd did not make this directory and does not change it"
    )
    assert tree(tmp_path) == {"student/thesis.tex": b"years of work"}


def test_a_stage_at_work_elsewhere_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "student"
    with at_work(path):
        before = tree(tmp_path)
        with pytest.raises(ArtifactError) as caught:
            make(path)
        assert str(caught.value) == (
            f"{tmp_path / '.student.partial'}: another process is making this stage; wait for it to end"
        )
        assert tree(tmp_path) == before
    make(path, continued)  # killed, so the lock is free


# A run directory.


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from toolchain.stage import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('holding', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(run)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(ArtifactError) as caught, run_lock(run):
            pass
        assert str(caught.value) == (
            f"{run}: another clipkd is using this run; wait for it to end, or choose another --out"
        )
        holder.kill()
    with run_lock(run):
        pass


def test_what_a_killed_process_forked_does_not_hold_its_run(tmp_path: Path) -> None:
    """Loader processes outlive a kill -9 by seconds, in which the same command is repeated."""
    run = tmp_path / "run"
    script = (
        "import os, sys, time; from pathlib import Path; from toolchain.stage import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    child = os.fork() or (time.sleep(60), os._exit(0))\n"
        "    print(child, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(run)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(ArtifactError), run_lock(run):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is still there
        with run_lock(run):
            pass
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["thesis.tex", "recipe.yaml"])
def test_somebody_elses_directory_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("name: apple pie\n")
    with pytest.raises(ArtifactError) as caught, run_lock(tmp_path):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: not empty, and no recipe.yaml of clipkd; not a run. Choose another --out"
    )
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208  # the names are what matters


def test_a_copied_run_without_its_hidden_files_is_still_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# clipkd run glyphs --out a\n# resolved by clipkd:\nname: glyphs\n")
    with run_lock(tmp_path):
        pass


def test_a_run_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(ArtifactError, match=f"{file}: is a file; expected a run directory. Choose another --out"),
        run_lock(file),
    ):
        pass
    with pytest.raises(ArtifactError) as caught, run_lock(file / "run"):
        pass
    assert str(caught.value) == f"{file / 'run'}: cannot make this directory: Not a directory. Choose another --out"
