"""Print progress on stderr and tables on stdout.  Only this module and `clipkd.py` use rich."""

import io
import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from toolchain.text_table import Note, TextTable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from toolchain.stage import Stage

stdout, stderr = Console(), Console(stderr=True)


def print_any_text() -> None:
    """Let the terminal's encoding fail on no character: one that it lacks is printed as an escape, such as \\u2605.

    A terminal's encoding may be ASCII or Latin-1, and a file name may be no text at all.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_LINE_EVERY_S = 30.0
_LONG_WORD = 24
_COMMAND = re.compile(r"(?<![\w/])(?:clipkd|pip|python|torchrun|make) [^`;,)]*?(?=[`;,)]|\. |$)")


@dataclass
class TerminalScreen:
    """Progress on stderr: a live bar on a terminal, otherwise periodic lines; one line per stage in both cases."""

    bar: "Progress"
    silent: bool = False
    task: "TaskID | None" = None
    what: str = ""
    stage: str = ""
    first: tuple[float, int] = (0.0, 0)
    printed_at: float = 0.0

    def starts(self, stage: str) -> None:
        self.stage, self.what = stage, ""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if self.bar.disable:
            self._print_periodically(what, done, total, note)
            return
        if self.task is None or what != self.what:
            self._clear()
            self.what, self.task = what, self.bar.add_task(f"{self.stage}: {what}", total=total, note="")
        self.bar.update(self.task, completed=done, total=total, note=note)

    def _print_periodically(self, what: str, done: int, total: int, note: str) -> None:
        """Print a line every 30 s with the estimated time left; used where there is no terminal."""
        now = time.monotonic()
        if what != self.what:
            self.what, self.first, self.printed_at = what, (now, done), now
        if now - self.printed_at < _LINE_EVERY_S or self.silent:
            return
        self.printed_at = now
        left_s = (now - self.first[0]) / max(1, done - self.first[1]) * (total - done)
        left = timedelta(seconds=round(left_s))
        self.bar.console.print(
            f"{self.stage}: {what} {done}/{total}  {left} left  {note}", highlight=False, markup=False, soft_wrap=True
        )

    def say(self, text: str) -> None:
        """Print a message that is neither progress nor an error."""
        if not self.silent:
            self.bar.console.print(_wrap(text, self.bar.console), highlight=False, markup=False, soft_wrap=True)

    def result(self, *lines: str) -> None:
        """Print lines of the result on stdout; a bar on the same terminal is removed meanwhile."""
        share_terminal = stdout.is_terminal and not self.bar.disable
        if share_terminal:
            self.bar.stop()
        for text in lines:
            print_line(text)
        if share_terminal:
            self.bar.start()

    def done(self, name: str, stage: "Stage") -> None:
        self.line(name, "cached" if stage.cached else f"done in {stage.manifest['took_s']:.0f} s")

    def line(self, name: str, text: str) -> None:
        self._clear()
        if not self.silent:
            self.bar.console.print(f"{name:<40} {text}", highlight=False, markup=False)

    def _clear(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


@contextmanager
def open_screen() -> "Iterator[TerminalScreen]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note, quiet = TextColumn("{task.fields[note]}"), not stderr.is_terminal
    with Progress(*columns, note, console=stderr, transient=True, disable=quiet) as bar:
        yield TerminalScreen(bar)


def print_result(document: Any, as_json: bool, *shown: TextTable | Note | object) -> None:
    """Print a command's result, either as one JSON document or as tables and lines in order."""
    if as_json:
        stdout.print_json(json.dumps(document))
        return
    for part in shown:
        match part:
            case TextTable():
                print_table(part)
            case Note():
                print_note(part.text)
            case _:
                print_line(part)


def print_line(text: object) -> None:
    """Print a line of the result on stdout, without markup."""
    stdout.print(str(text), soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_note(text: object) -> None:
    """Print a line that is not part of the result on stderr, without markup."""
    stderr.print(_wrap(str(text), stderr), soft_wrap=True, highlight=False, markup=False, emoji=False)


def _wrap(text: str, console: Console) -> str:
    """Break lines between words on a terminal; keep each command in one piece, so that it can be copied."""
    if not console.is_terminal:
        return text
    return "\n".join(_fill(line, console.width) for line in text.splitlines())


def _fill(line: str, width: int, indent: str = "") -> str:
    """Return a line as lines of at most `width`; those after the first are indented, by default by two more than it."""
    if len(line) <= width:
        return line
    whole = _COMMAND.sub(lambda command: command[0].replace(" ", "\0"), line)  # hides its spaces from textwrap
    indent = indent or " " * (2 + len(line) - len(line.lstrip()))
    filled = textwrap.fill(whole, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")


def print_table(table: TextTable) -> None:
    """Print a table on stdout, or a paragraph for each row if the terminal is too narrow for its columns.

    A file or a pipe counts as 160 columns wide.
    """
    console = stdout if stdout.is_terminal else Console(width=160)
    borders = len(table.headers) * (2 if table.dense else 3) + 1
    widths = _column_widths(table, console.width - borders)
    if widths is None:
        _print_paragraphs(table, console)
        return
    columns = [
        Column(escape(header), justify="right" if header in table.right else "left", overflow="fold", width=width)
        for header, width in zip(table.headers, widths, strict=True)
    ]
    drawn = Table(*columns, padding=(0, 0, 0, 1) if table.dense else (0, 1))
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)


def _column_widths(table: TextTable, width: int) -> list[int] | None:
    """Return widths that break no word of at most _LONG_WORD characters; None if they do not fit into `width`."""
    widths, wanted = [], []
    for header, *cells in zip(table.headers, *table.rows, strict=True):
        lines = [line for text in (header, *cells) for line in text.splitlines()]
        words = lines if header in table.no_wrap else [word for line in lines for word in line.split()]
        longest = max(map(len, words), default=0)
        widths.append(longest if header in table.no_wrap else min(longest, _LONG_WORD))
        wanted.append(max(map(len, lines), default=0))
    if sum(widths) > width:
        return None
    for _ in range(min(width, sum(wanted)) - sum(widths)):  # one by one to the column that lacks most
        column = max(range(len(widths)), key=lambda index: wanted[index] - widths[index])
        widths[column] += 1
    return widths


def _print_paragraphs(table: TextTable, console: Console) -> None:
    """Print each row as its first cell and, below it, `header: value` for every other cell that is not empty."""
    for first, *cells in table.rows:
        pairs = zip(table.headers[1:], cells, strict=True)
        named = [f"{header}: {cell}" for header, cell in pairs if cell.strip() not in {"", "-"}]
        texts = [" ".join(text.split()) for text in named]
        # a short text is kept on one line: its spaces are hidden from textwrap
        kept = "; ".join(text.replace(" ", "\0") if len(text) < console.width // 2 else text for text in texts)
        lines = _fill(f"  {kept}", console.width, indent="  ")
        console.print(f"{first}\n{lines}".replace("\0", " "), highlight=False, markup=False, soft_wrap=True)
