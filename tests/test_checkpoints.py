"""Checkpoints: whole or not there, the last few kept, a damaged one passed over aloud."""

import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toolchain.distillation import checkpoints as module
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.errors import ClipkdError


def state(value: float) -> dict[str, Any]:
    return {
        "weights": {"w": torch.full((50,), value)},
        "optimizer": {"betas": (0.9, 0.98), "step": torch.tensor(value)},
    }


def names(folder: Path) -> list[str]:
    """What is there, without the hashes."""
    return sorted(path.name.rpartition("-")[0] or path.name for path in folder.iterdir())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "one bit": flipped,
    "cut short": lambda content: content[: len(content) // 2],
    "a byte more": lambda content: content + b"\0",
    "emptied": lambda content: b"",
}


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One that stands still, from the time it is."""
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def saved(folder: Path, steps: list[int], **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step))
    return checkpoints


def loaded(checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
    """The step that is loaded, once its content is found to be that step's, and what was said."""
    said: list[str] = []
    found = checkpoints.load(said.append)
    if found is None:
        return None, said
    step = found.pop("step")
    expected = state(step)
    assert found.keys() == expected.keys()
    assert torch.equal(found["weights"]["w"], expected["weights"]["w"])
    assert found["optimizer"]["betas"] == expected["optimizer"]["betas"]
    return step, said


def damage(folder: Path, step: int, how: Callable[[bytes], bytes]) -> Path:
    (path,) = folder.glob(f"step-{step:08}-*.pt")
    path.write_bytes(how(path.read_bytes()))
    return path


# What is kept.


def test_what_was_saved_last_is_loaded(tmp_path: Path) -> None:
    assert loaded(saved(tmp_path / "inner" / "checkpoints", [3, 7])) == (7, [])


def test_where_there_is_none_none_is_loaded(tmp_path: Path) -> None:
    assert loaded(Checkpoints(tmp_path / "absent")) == (None, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    steps = [1, 2, 9, 10, 11, 100]
    for number, step in enumerate(steps, start=1):
        checkpoints.save(step, state(step))
        assert names(tmp_path) == [f"step-{step:08}" for step in steps[max(0, number - keep) : number]]


def test_a_name_is_the_step_and_the_hash_of_the_bytes(tmp_path: Path) -> None:
    saved(tmp_path, [1200])
    (path,) = tmp_path.iterdir()
    assert path.name == f"step-00001200-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"


# When one is due.


def test_due_by_step(tmp_path: Path, clock: Clock) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=3, every_s=math.inf)
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]
    assert not any(Checkpoints(tmp_path, every_s=math.inf).due(step) for step in range(1, 10))


def test_due_by_time_since_the_last(tmp_path: Path, clock: Clock) -> None:
    checkpoints = Checkpoints(tmp_path, every_s=60)
    due = []
    for step in range(1, 11):
        clock.now += 25
        if checkpoints.due(step):
            due.append(step)
            checkpoints.save(step, state(step))
    assert due == [3, 6, 9], "75 s apart, the first too"


def test_due_by_whichever_comes_first(tmp_path: Path, clock: Clock) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=4, every_s=60)
    due = []
    for step in range(1, 9):
        clock.now += 51 if step == 5 else 21
        if checkpoints.due(step):
            due.append(step)
            checkpoints.save(step, state(step))
    assert due == [3, 4, 6, 8]


# Damage.


@pytest.mark.parametrize("how", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, how: Callable[[bytes], bytes]) -> None:
    checkpoints = saved(tmp_path, [3, 7])
    path = damage(tmp_path, 7, how)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert loaded(checkpoints) == (
        3,
        [f"{path}: corrupt checkpoint, its hash is {digest}; using the one before it"],
    )


@pytest.mark.parametrize("how", DAMAGE.values(), ids=list(DAMAGE))
def test_every_one_damaged_is_an_error(tmp_path: Path, how: Callable[[bytes], bytes]) -> None:
    checkpoints = saved(tmp_path, [3, 7])
    for step in (3, 7):
        damage(tmp_path, step, how)
    said: list[str] = []
    with pytest.raises(ClipkdError) as caught:
        checkpoints.load(said.append)
    assert str(caught.value) == (f"{tmp_path}: every checkpoint is corrupt. Delete the folder to train from the start")
    assert len(said) == 2


@pytest.mark.parametrize("next_step", [5, 7, 8])
def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path, next_step: int) -> None:
    """A run that continued before it saves earlier, again at its step, or later."""
    checkpoints = saved(tmp_path, [3, 7])
    damage(tmp_path, 7, flipped)
    assert loaded(checkpoints)[0] == 3
    checkpoints.save(next_step, state(next_step))
    if next_step <= 7:
        assert names(tmp_path) == ["step-00000003", f"step-{next_step:08}"]
    assert loaded(checkpoints) == (next_step, [])
    checkpoints.save(9, state(9))
    damage(tmp_path, 9, flipped)
    assert loaded(checkpoints)[0] == next_step, "there is still one to fall back to"


def test_a_step_saved_twice_is_there_once(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [3])
    checkpoints.save(3, state(3) | {"elapsed_s": 1.0})
    assert names(tmp_path) == ["step-00000003"]
    found = checkpoints.load(lambda text: None)
    assert found is not None
    assert found["elapsed_s"] == 1.0


# Interrupted while saving.


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename"])
def test_interrupted_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    checkpoints = saved(tmp_path, [3, 7])

    def killed(*arguments: Any, **options: Any) -> Any:
        raise Killed

    def half_written(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise Killed

    changes: dict[str, tuple[Any, str, Any]] = {
        "half written": (module.torch, "save", half_written),
        "before the rename": (Path, "replace", killed),
        "after the rename": (Path, "unlink", killed),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*changes[moment])
        with pytest.raises(Killed):
            checkpoints.save(9, state(9))
    left = ["checkpoint.partial", "step-00000003", "step-00000007"]
    assert names(tmp_path) == (left if moment != "after the rename" else [*left[1:], "step-00000009"])
    assert loaded(Checkpoints(tmp_path)) == (9 if moment == "after the rename" else 7, [])
    Checkpoints(tmp_path).save(10, state(10))
    assert names(tmp_path) == [f"step-{9 if moment == 'after the rename' else 7:08}", "step-00000010"]


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_sync, real_replace, real_unlink = os.fsync, Path.replace, Path.unlink
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("sync"), real_sync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append("name"), real_replace(path, to))[1])
    monkeypatch.setattr(Path, "unlink", lambda path: (order.append("remove"), real_unlink(path))[1])
    saved(tmp_path, [3, 7], keep=1)
    assert order == ["sync", "name", "sync", "name", "remove"]
