"""What a training run says of itself: rows, curves, and a screen that is a terminal or is not."""

import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended
from rich.console import Console
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import STEPS, TIMES, train

from toolchain import terminal
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation.training_log import LOG, TENSORBOARD, StepClock, TrainingLog, is_logged

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_ROWS = 10_000
FLOAT32_RELATIVE_ERROR = 1e-6  # curves are stored in float32, rows in full


def row(step: int, **changes: Any) -> dict[str, Any]:
    terms = {"task": {"unweighted": 2 + step / 3, "weighted": 2 + step / 3}, "fd": {"unweighted": 0.1, "weighted": 0.4}}
    return {"step": step, "loss": 1 / 3 + step, "lr": 1e-3, "grad_norm": 3.5, "terms": terms} | changes


def written(folder: Path, steps: Iterable[int], start: int = 0, **changes: Any) -> None:
    with TrainingLog(folder, start) as log:
        for step in steps:
            log.write(row(step, **changes))


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve's points, as TensorBoard shows them."""
    events = EventAccumulator(str(folder / TENSORBOARD), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# Which steps.


@pytest.mark.parametrize("steps", [1, 2, 11, MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1, 12_345, 20_000, 401_900])
def test_rows_are_even_and_not_too_many(steps: int) -> None:
    logged = [step for step in range(steps) if is_logged(step, steps)]
    assert logged[0] == 0
    assert logged[-1] == steps - 1
    assert len(logged) <= MAX_ROWS + 1
    if steps <= MAX_ROWS:
        assert logged == list(range(steps))
    else:
        assert len({after - before for before, after in itertools.pairwise(logged[:-1])}) == 1
        assert len(logged) > MAX_ROWS / 2


# The clock.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("busy", [True, False])
def test_waiting_for_data_counts_where_the_gpu_waits_too(busy: bool) -> None:
    clock = StepClock(torch.device("cuda", 0), 8)
    torch.cuda.synchronize()
    if busy:
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    clock.restart()
    with clock("data"):
        time.sleep(0.1)
    torch.cuda._sleep(100_000_000)
    times = clock.stop()
    times.wait()
    shares = times.shares()
    assert shares["images_per_s"] > 0
    assert (shares["data_fraction"] > 0.3) == (not busy), shares


# Rows.


def test_rows_are_read_back_exactly(tmp_path: Path) -> None:
    written(tmp_path, range(5), loss=math.pi)
    assert read(tmp_path) == [row(step, loss=math.pi) for step in range(5)]


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_rows_of_steps_to_come_are_dropped(tmp_path: Path, step: int) -> None:
    written(tmp_path, range(5))
    before = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    written(tmp_path, range(0), start=step)
    assert (tmp_path / LOG).read_bytes() == b"".join(before[:step])
    written(tmp_path, range(step, 7), start=step)
    assert read(tmp_path) == [row(number) for number in range(7)]


@pytest.mark.parametrize("cut", [1, 20, -2, -1])
def test_a_torn_line_is_dropped(tmp_path: Path, cut: int) -> None:
    """Even where only its end is missing: what follows it would continue the line."""
    written(tmp_path, range(3))
    *whole, last = (tmp_path / LOG).read_text().splitlines(keepends=True)
    (tmp_path / LOG).write_text("".join(whole) + last[:cut])
    written(tmp_path, range(2, 4), start=2)
    assert read(tmp_path) == [row(number) for number in range(4)]


def test_interrupted_while_rows_are_dropped_the_log_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, range(5))
    before = (tmp_path / LOG).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            TrainingLog(tmp_path, 2)
    assert (tmp_path / LOG).read_bytes() == before


def test_flushed_rows_are_in_the_file(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, 0) as log:
        log.write(row(0))
        log.flush()
        assert read(tmp_path) == [row(0)]
        assert curves(tmp_path)["loss"] == [(0, pytest.approx(1 / 3, rel=FLOAT32_RELATIVE_ERROR))]


def test_an_error_closes_the_log_with_its_rows(tmp_path: Path) -> None:
    def steps() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, steps())
    assert read(tmp_path) == [row(0)]
    assert curves(tmp_path)["lr"] == [(0, pytest.approx(1e-3, rel=FLOAT32_RELATIVE_ERROR))]


# Curves.


def test_every_number_of_a_row_has_a_curve(tmp_path: Path) -> None:
    similarity, accuracy = {"image": 0.25, "text": 0.5}, {"top1": 0.125, "n": 40}
    written(tmp_path, range(3), similarity=similarity, accuracy=accuracy, images_per_s=99.5)
    found = curves(tmp_path)
    constant = {"unweighted/fd": 0.1, "weighted/fd": 0.4, "lr": 1e-3, "grad_norm": 3.5, "images_per_s": 99.5}
    constant |= {f"similarity/{name}": value for name, value in similarity.items()}
    constant |= {f"accuracy/{name}": value for name, value in accuracy.items()}
    assert set(found) == {"loss", "unweighted/task", "weighted/task", *constant}
    for name, value in constant.items():
        assert found[name] == [(step, pytest.approx(value, rel=FLOAT32_RELATIVE_ERROR)) for step in range(3)], name
    for step, value in found["unweighted/task"]:
        assert value == pytest.approx(2 + step / 3, rel=FLOAT32_RELATIVE_ERROR)


def test_a_skipped_steps_norm_has_no_point(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, 0) as log:
        log.write(row(0))
        log.write(row(1, grad_norm=None))
        log.write(row(2))
    assert [step for step, _ in curves(tmp_path)["grad_norm"]] == [0, 2]
    assert read(tmp_path)[1]["grad_norm"] is None


def test_curves_of_an_interrupted_run_have_each_step_once(tmp_path: Path) -> None:
    written(tmp_path, range(5), loss=1.0)
    written(tmp_path, range(3, 7), start=3, loss=2.0)
    assert curves(tmp_path)["loss"] == [(step, 1.0 if step < 3 else 2.0) for step in range(7)]


# A run's own.


def test_the_curves_of_a_run_are_its_rows(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    train(tmp_path, tiny_samples, teacher_folder)
    rows, found = read(tmp_path), curves(tmp_path)
    terms = ("task", "crd", "fd", "icl")
    assert set(found) == {
        *("loss", "lr", "grad_norm", "logit_scale", "cross_logit_scale", "similarity/image", "similarity/text"),
        *(f"{kind}/{term}" for kind in ("unweighted", "weighted") for term in terms),
        *TIMES,
    }
    assert len(rows) == STEPS
    for name, points in found.items():
        assert [step for step, _ in points] == list(range(STEPS))
        for step, value in points:
            kind, _, part = name.partition("/")
            number = rows[step]["terms"][part][kind] if kind in ("unweighted", "weighted") else rows[step][kind]
            number = number[part] if isinstance(number, dict) else number
            assert value == pytest.approx(number, rel=FLOAT32_RELATIVE_ERROR), name


# The screen.


class Clock:
    now = 100.0


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> tuple[terminal.TerminalScreen, Clock, Callable[[], list[str]]]:
    """A screen that is no terminal, the clock it lives by, and what it has said since it was last asked."""
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock.now)
    screen = terminal.TerminalScreen(Progress(console=Console(file=file, width=200), disable=True))

    def said() -> list[str]:
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text.splitlines()

    return screen, clock, said


Lines = tuple[terminal.TerminalScreen, Clock, Callable[[], list[str]]]


def test_without_a_terminal_a_line_comes_now_and_then(lines: Lines) -> None:
    screen, clock, said = lines
    screen.starts("student")
    for done in range(101, 161):  # a run that continues at step 100 of 400, a step a second
        screen.progress("training", done, 400, "loss 3.210  8 images/s")
        clock.now += 1
    assert said() == ["student: training 131/400  0:04:29 left  loss 3.210  8 images/s"]
    screen.progress("training", 161, 400, "loss 3.000  8 images/s")
    assert said() == ["student: training 161/400  0:03:59 left  loss 3.000  8 images/s"]


def test_each_stage_and_part_has_its_own_rate(lines: Lines) -> None:
    screen, clock, said = lines
    screen.starts("student")
    screen.progress("teacher features", 10, 20)
    clock.now += 29
    screen.progress("teacher features", 15, 20)
    assert said() == []
    screen.progress("training", 1, 100)
    clock.now += 29
    screen.progress("training", 2, 100)
    assert said() == [], "half a minute since this began"
    clock.now += 31
    screen.progress("training", 4, 100)
    assert said() == ["student: training 4/100  0:32:00 left  "]
    screen.starts("other")
    screen.progress("training", 1, 100)  # the next stage's
    clock.now += 60
    screen.progress("training", 3, 100)
    assert said() == ["other: training 3/100  0:48:30 left  "]


def test_a_silent_screen_says_nothing(lines: Lines) -> None:
    screen, clock, said = lines
    screen.silent = True
    for done in range(1, 100):
        screen.progress("training", done, 100)
        clock.now += 10
    screen.line("student", "cached")
    screen.say("a tale")
    assert said() == []


def test_a_run_off_a_terminal_says_what_is_done(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_LINE_EVERY_S", 0.0)
    ended = clipkd("distill", tiny_recipe(), "--out", tmp_path / "run")
    assert ended.code == 0
    assert "\x1b" not in ended.err
    said = [re.sub(r"\d+\.\d+|\d+(?= images)|0:\d\d:\d\d|\d+(?= s$)", "N", line) for line in ended.err.splitlines()]
    assert said == [
        f"{'teacher':<40} done in N s",
        *(f"student: training {step}/3  N left  loss N  N images/s" for step in (1, 2, 3)),
        f"{'student':<40} done in N s",
    ]


def test_a_run_on_a_terminal_shows_a_bar_and_the_time_left(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", Console(file=file, force_terminal=True, width=140))
    real = Progress.update

    def drawn(self: Progress, *arguments: Any, **changes: Any) -> None:
        real(self, *arguments, **changes)
        self.refresh()  # every step, where a terminal sees some ten a second

    monkeypatch.setattr(Progress, "update", drawn)
    assert clipkd("distill", tiny_recipe(), "--out", tmp_path / "run").code == 0
    drawings = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()))
    for step in (1, 2, 3):
        pattern = rf"student: training ━*╸?╺?━*\s*{step}/3 (-:--:--|0:\d\d:\d\d) loss \d+\.\d+  \d+ images/s"
        assert any(re.match(pattern, drawing) for drawing in drawings), (step, drawings)
    assert any(re.fullmatch(r"student +done in \d+ s", drawing.strip()) for drawing in drawings)
