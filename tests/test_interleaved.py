"""Processes that take turns: their order, what a failure leaves, what an interruption had done; when BUSY is raised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from export.device_programs.machine import describe_machine
from export.devices.documents import Machine
from export.devices.registry import Device
from export.profiling import interleaved
from export.profiling.interleaved import Job, look_before, time_in_turns
from toolchain.errors import ClipkdError
from toolchain.progress import no_progress

BOARD = Device("board", "board")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which towers were timed; those that are called bad fail."""
    seen: list[str] = []

    def run(folder: Path, tower: str, arguments: list[str]) -> dict[str, Any]:
        seen.append(tower)
        if "bad" in tower:
            raise ClipkdError(f"{tower} crashed")
        return {"samples_ms": [float(len(seen))]}

    monkeypatch.setattr(interleaved, "runner_here", run)
    return seen


def job(model: int, tower: str, **rest: Any) -> Job:
    return Job(model, Path(), tower, [], **rest)


def test_every_other_turn_goes_back(timed: list[str]) -> None:
    jobs = [job(0, "a"), job(0, "b"), job(1, "c")]
    found = list(time_in_turns(jobs, None, 3, no_progress))
    assert "".join(timed) == "abc" + "cba" + "abc"
    assert [(one.tower, document) for one, document in found[:4]] == [
        (tower, {"samples_ms": [count]}) for tower, count in zip("abcc", (1.0, 2.0, 3.0, 4.0), strict=True)
    ]


def test_a_model_that_failed_is_not_run_again_and_the_others_are(timed: list[str]) -> None:
    ticks: list[tuple[object, ...]] = []
    jobs = [job(0, "bad"), job(0, "of the same model"), job(1, "good")]
    found = list(time_in_turns(jobs, None, 2, lambda *tick: ticks.append(tick)))
    assert timed == ["bad", "good", "good"]
    assert [str(outcome) for _, outcome in found if isinstance(outcome, ClipkdError)] == ["bad crashed"]
    assert ticks == [("timing", done, 6) for done in range(1, 7)], "what is left out counts as done"


def test_an_interrupted_job_has_the_turns_that_are_left_and_is_announced_by_its_title(timed: list[str]) -> None:
    ticks: list[tuple[object, ...]] = []
    jobs = [job(0, "a", title="A", num_done=2), job(1, "b", title="B", num_done=1)]
    assert len(list(time_in_turns(jobs, None, 3, lambda *tick: ticks.append(tick)))) == 3
    assert "".join(timed) == "b" + "ab"
    assert ticks == [("timing", done, 6, title) for done, title in enumerate("ABBAAB")]


def test_a_device_forgets_after_the_last_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(on: Device, folder: Path, tower: str, arguments: list[str], *, once: Sequence[Path]) -> dict[str, Any]:
        asked.append((on, list(once)))
        return {}

    monkeypatch.setattr(interleaved, "runner_on", run)
    list(time_in_turns([job(0, "a", once=[Path("a.onnx")])], BOARD, 3, no_progress))
    assert asked == [(BOARD, []), (BOARD, []), (BOARD, [Path("a.onnx")])]


@pytest.mark.parametrize(("share", "flags"), [(0.25, []), (0.26, ["BUSY"]), (None, [])])
def test_a_machine_is_watched_while_jobs_are_made(
    monkeypatch: pytest.MonkeyPatch, share: float | None, flags: list[str]
) -> None:
    told: list[str] = []

    def watched() -> Any:
        told.append("watching starts")
        yield None
        told.append("watching ends")
        yield share

    def prepare(machine: Machine) -> int:
        told.append("prepared")
        return machine["usable_cores"]

    monkeypatch.setattr(interleaved, "look_at", lambda on: (describe_machine(), watched()))
    machine, raised, prepared = look_before(None, prepare)
    assert (raised, prepared) == (flags, machine["usable_cores"])
    assert told == ["watching starts", "prepared", "watching ends"]
