"""Errors that a user can cause, and their exit codes.

    ClipkdError               printed without a traceback                      1
    ├── UsageError            a flag or a recipe is wrong                      2
    ├── ArtifactError         a folder missing, foreign, corrupt, busy or full 1
    ├── MissingDependency     a package, compiler or driver is not installed   3
    ├── UnavailableBackend    the requested device or provider is not there    4
    ├── GateError             parity, accuracy or a budget was not met         5
    └── Interrupted           asked to stop; finished work is kept           130

Any other exception is a bug in clipkd and is shown with its traceback.
A message gives, in this order: the problem, where it is, expected and got, and the next command.
A message shortens what it found with `name_some` (lists) or `quote_start` (text), so it never grows with the data.
"""

from collections.abc import Iterable

_NAMED = 5
_QUOTED_CHARACTERS = 80


class ClipkdError(Exception):
    exit_code = 1


class UsageError(ClipkdError):
    exit_code = 2


class ArtifactError(ClipkdError):
    pass


class MissingDependency(ClipkdError):
    exit_code = 3


class UnavailableBackend(ClipkdError):
    exit_code = 4


class GateError(ClipkdError):
    exit_code = 5


class Interrupted(ClipkdError):
    exit_code = 130


def name_some(names: Iterable[object], number: int = _NAMED) -> str:
    """Return the first few of several names for a message, and how many there are if not all are named."""
    listed = [str(name) for name in names]
    if len(listed) <= number:
        return ", ".join(listed)
    return f"{', '.join(listed[:number])}, ... ({len(listed):,} in all)"


def quote_start(text: str) -> str:
    """Return the start of a text in quotes for a message, and the text's length if that is not all of it."""
    if len(text) <= _QUOTED_CHARACTERS:
        return repr(text)
    return f"{text[:_QUOTED_CHARACTERS]!r}... ({len(text):,} characters)"


def one_line(error: Exception) -> str:
    """Return an error's message on one line of at most 300 characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:300] + " …"
