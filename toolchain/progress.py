"""Protocols that stages and functions call to report progress; `terminal.py` shows it."""

from typing import Protocol

from toolchain.stage import Stage


class Progress(Protocol):
    """Report that `done` of `total` units of `what` are done; `note` is a rate or a loss shown after the bar."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None: ...


def no_progress(what: str, done: int, total: int, note: str = "", /) -> None:
    """Report nothing."""


class Screen(Protocol):
    """The output of a command's stages."""

    def starts(self, stage: str) -> None:
        """Begin a stage; the progress that follows belongs to it."""
        ...

    def progress(self, what: str, done: int, total: int, note: str = "", /) -> None: ...

    def say(self, text: str) -> None:
        """Print a message that is neither progress nor an error."""
        ...

    def line(self, name: str, text: str) -> None:
        """Print the result of a stage."""
        ...

    def done(self, name: str, stage: Stage) -> None:
        """Print that a stage is complete: made now, or cached."""
        ...
