"""Tables and notes as values; modules return them, and `terminal.py` prints them."""

from collections.abc import Sequence
from typing import NamedTuple


class TextTable(NamedTuple):
    """Headers and rows of text, and the layout of the columns."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    right: Sequence[str] = ()
    """Headers of right-aligned columns."""

    no_wrap: Sequence[str] = ()
    """Headers of columns that are never wrapped."""

    dense: bool = False
    """True: no space on the left of cells, so a wide table fits into 100 columns."""


class Note(NamedTuple):
    """A line for stderr that is not part of the result."""

    text: str
