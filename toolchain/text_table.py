"""A table as a value: what a module makes for people to read, and `terminal.py` prints."""

from collections.abc import Sequence
from typing import NamedTuple


class TextTable(NamedTuple):
    """Headers and rows of text, and how the columns are laid out."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    right: Sequence[str] = ()
    """Headers of the columns that are aligned to the right."""

    no_wrap: Sequence[str] = ()
    """Headers of the columns that are never broken over lines."""

    dense: bool = False
    """No space on the left of cells, so that a wide table fits into 100 columns."""


class Note(NamedTuple):
    """A line beside the result, for stderr."""

    text: str
