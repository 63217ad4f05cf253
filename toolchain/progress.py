"""How long work reports progress: stages and functions call these protocols, and `terminal.py` shows them."""

from typing import Protocol

from toolchain.stage import Stage


class Progress(Protocol):
    """Report that `done` of `total` units of `what` are done; `note` is a rate or a loss beside the bar."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None: ...


def no_progress(what: str, done: int, total: int, note: str = "", /) -> None:
    """Report nothing."""


class Screen(Protocol):
    """Where the stages of a command report what they do."""

    def starts(self, stage: str) -> None:
        """A stage begins; the progress that follows belongs to it."""
        ...

    def progress(self, what: str, done: int, total: int, note: str = "", /) -> None: ...

    def say(self, text: str) -> None:
        """Print a message that is neither progress nor an error."""
        ...

    def line(self, name: str, text: str) -> None:
        """Print how a stage ended."""
        ...

    def done(self, name: str, stage: Stage) -> None:
        """Print that a stage is complete: made now, or cached."""
        ...
