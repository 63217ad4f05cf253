"""Tables and messages on terminals of any width: no word is broken, and nothing is cut."""

import io
import re

import pytest
from rich.console import Console

from toolchain import terminal
from toolchain.text_table import Note, TextTable

TABLE = TextTable(
    ["name", "p50 ms", "grade"],
    [
        ["student fp32 onnxruntime", "0.193 [0.167, 0.213]", "C (UNSTABLE, UNSTEADY, noisy)"],
        ["teacher", "0.589 [0.572, 0.640]", "B"],
    ],
)
WORDS = {word for cells in (TABLE.headers, *TABLE.rows) for cell in cells for word in cell.split()}
BORDERS = 3 * len(TABLE.headers) + 1
LEAST_WIDTH = len("onnxruntime") + len("[0.167,") + len("(UNSTABLE,") + BORDERS


def printed(table: TextTable, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    file = io.StringIO()
    monkeypatch.setattr(terminal, "stdout", Console(file=file, force_terminal=True, width=width))
    terminal.print_table(table)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("width", range(LEAST_WIDTH, 120, 7))
def test_no_word_of_a_table_is_broken_and_no_line_is_wider_than_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(TABLE, width, monkeypatch)
    assert "┃" in text
    assert max(map(len, text.splitlines())) <= width
    assert set(re.findall(r"[^\s│┃]+", text)) >= WORDS


def test_a_wide_terminal_shows_every_row_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(TABLE, 160, monkeypatch).splitlines()
    assert [re.split(r"\s*│\s*", line)[1:-1] for line in lines if line.startswith("│")] == TABLE.rows


def test_a_terminal_too_narrow_for_the_words_gets_a_paragraph_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(TABLE, LEAST_WIDTH - 1, monkeypatch).splitlines() == [
        "student fp32 onnxruntime",
        "  p50 ms: 0.193 [0.167, 0.213];",
        "  grade: C (UNSTABLE, UNSTEADY,",
        "  noisy)",
        "teacher",
        "  p50 ms: 0.589 [0.572, 0.640];",
        "  grade: B",
    ]


def test_columns_that_may_not_wrap_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(TABLE._replace(no_wrap=["p50 ms"]), 60, monkeypatch)
    assert "0.193 [0.167, 0.213]" in text


def test_a_result_is_printed_as_json_or_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "stdout", Console(file=out, width=80))
    monkeypatch.setattr(terminal, "stderr", Console(file=err, width=80))
    terminal.print_result({"a": 1}, True, "a line", Note("a note"))
    assert out.getvalue().split() == ["{", '"a":', "1", "}"]
    assert err.getvalue() == ""
    terminal.print_result({"a": 1}, False, "[x] a line", Note("a note"))
    assert out.getvalue().endswith("[x] a line\n")
    assert err.getvalue() == "a note\n"


MESSAGE = (
    "error: /data/mine: 2 of 9 shards do not exist (searched in /work). Make them with: clipkd data pack my.yaml --out "
    "/data/mine; or list only those you have.\n"
    "  data.kind: Input should be 'webdataset', 'csv', 'image_folder' or 'mixture' (got 'tar')"
)


def noted(text: str, width: int, monkeypatch: pytest.MonkeyPatch, *, terminal_too: bool = True) -> str:
    file = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", Console(file=file, force_terminal=terminal_too, width=width))
    terminal.print_note(text)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("width", [60, 80, 100, 400])
def test_a_message_breaks_between_words_and_never_within_a_command(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = noted(MESSAGE, width, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    assert text.split() == MESSAGE.split()
    assert any("clipkd data pack my.yaml --out /data/mine;" in line for line in text.splitlines())
    assert width < 400 or text == MESSAGE + "\n"


def test_a_message_in_a_file_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noted(MESSAGE, 60, monkeypatch, terminal_too=False) == MESSAGE + "\n"
    assert noted("x" * 200, 60, monkeypatch) == "x" * 200 + "\n", "a long path stays whole"


def test_results_and_a_bar_on_one_terminal_stand_on_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(terminal, name, Console(file=file, force_terminal=True, width=80))
    with terminal.open_screen() as screen:
        screen.starts("predict")
        screen.progress("images", 1, 3)
        screen.result("a :cat: line", "[b] another")
        screen.progress("images", 2, 3)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert lines.index("[b] another") == lines.index("a :cat: line") + 1
    assert sum("predict: images" in line for line in lines) >= 2
