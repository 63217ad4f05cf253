"""List the samples of CSV files, and report rows that are unusable.

Importing this module needs no torch.
"""

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from toolchain.data.bad_samples import (
    BAD_ROW,
    BAD_UTF8,
    NO_CAPTION,
    NO_IMAGE,
    OPEN_QUOTE,
    LeftOut,
    merge_left_out,
    strip_captions,
    to_utf8,
)
from toolchain.data.file_content import HEAD_BYTES, name_bad_text
from toolchain.data.listing import decode_text, require_file
from toolchain.errors import ClipkdError, UsageError, name_some
from toolchain.recipe.data import CsvSpec

_LONGEST_ROW = 100  # lines that a quoted field may span
_LONGEST_LINE = 1 << 20  # bytes; a longer line is treated as corrupt


class CsvRow(NamedTuple):
    """A row of a CSV file: its position and its fields, or the reason it is unusable."""

    offset: int
    size_bytes: int
    line: int
    fields: list[str]
    reason: str = ""


def split_fields(row: str, delimiter: str, *, quoted: bool) -> list[str] | None:
    """Return the fields of a row; None if a quote is not closed, or closes before the end of a field.

    Quotes have a meaning only if `quoted` is set; a quote inside an unquoted field is then an error (RFC 4180).
    """
    if not quoted:
        return row.split(delimiter)
    fields, position = [], 0
    while True:
        if row[position : position + 1] != '"':
            end = row.find(delimiter, position)
            field = row[position:] if end < 0 else row[position:end]
            if '"' in field:
                return None
            fields.append(field)
            if end < 0:
                return fields
            position = end + 1
            continue
        closing = position + 1
        while (closing := row.find('"', closing)) >= 0 and row[closing + 1 : closing + 2] == '"':
            closing += 2
        if closing < 0:
            return None
        fields.append(row[position + 1 : closing].replace('""', '"'))
        if closing + 1 == len(row):
            return fields
        if row[closing + 1] != delimiter:
            return None
        position = closing + 2


class _Line(NamedTuple):
    offset: int
    number: int
    content: bytes


class _Dialect(NamedTuple):
    """The format of a file's rows."""

    delimiter: str
    quoted: bool
    width: int = 0
    """Number of fields; 0 accepts any number."""


def read_csv_rows(path: Path, delimiter: str, *, quoted: bool) -> Iterator[CsvRow]:
    """Yield the rows of a file, its header first.

    A row is a line.  Only a quoted field may span several lines, and only if its quote closes, the joined row has as
    many fields as the header, and none of the joined lines is a complete row by itself.  So an unbalanced quote never
    swallows a good row.
    """
    dialect = _Dialect(delimiter, quoted)
    with path.open("rb") as file:
        lines, ahead = _read_lines(file), deque[_Line]()
        while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
            row = _parse_row(line, dialect)
            if row.reason == OPEN_QUOTE and dialect.width:
                row = _join_lines(line, lines, ahead, dialect) or row
            if not dialect.width:
                dialect = dialect._replace(width=len(row.fields))
            if line.content.strip() or row.fields != [""]:
                yield row


def _join_lines(line: _Line, lines: Iterator[_Line], ahead: deque[_Line], dialect: _Dialect) -> CsvRow | None:
    """Return the row that begins in a line and ends in a later one; None if it never ends.

    `lines` yields the unread lines; `ahead` holds lines that were read but belong to no row yet.
    """
    joined = line.content
    for taken in range(_LONGEST_ROW):
        if taken == len(ahead):
            following = next(lines, None)
            if following is None:
                return None
            ahead.append(following)
        if not _parse_row(ahead[taken], dialect).reason:
            return None
        joined += ahead[taken].content
        row = _parse_row(_Line(line.offset, line.number, joined), dialect)
        if not row.reason:
            for _ in range(taken + 1):
                ahead.popleft()
            return row
    return None


def _read_lines(file: BinaryIO) -> Iterator[_Line]:
    offset, number = 0, 0
    while content := file.readline():
        number += 1
        yield _Line(offset, number, content)
        offset += len(content)


def _parse_row(line: _Line, dialect: _Dialect) -> CsvRow:
    offset, number, content = line
    try:
        text = content.decode("utf-8-sig" if offset == 0 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        return CsvRow(offset, len(content), number, [], BAD_UTF8)
    if len(content) > _LONGEST_LINE:
        return CsvRow(offset, len(content), number, [], BAD_ROW)
    fields = split_fields(text, dialect.delimiter, quoted=dialect.quoted)
    if fields is None:
        return CsvRow(offset, len(content), number, [], OPEN_QUOTE)
    if dialect.width and len(fields) != dialect.width:
        return CsvRow(offset, len(content), number, fields, BAD_ROW)
    return CsvRow(offset, len(content), number, fields)


@dataclass(frozen=True)
class _Table:
    """One CSV file and the columns read from it."""

    path: Path
    size_bytes: int
    mtime_ns: int
    dialect: _Dialect
    image: int
    captions: tuple[int, ...]

    def missing_in(self, fields: Sequence[str]) -> str:
        """Return the reason a row is unusable if it has no image name or no caption; "" if it has both."""
        if not fields[self.image].strip():
            return NO_IMAGE
        return "" if any(fields[c].strip() for c in self.captions) else NO_CAPTION


class CsvListing:
    """Samples of CSV files: each is an image and all rows that name it.  Rows are read on demand.

    Memory use is 40 bytes per row and 8 per sample.
    """

    def __init__(self, spec: CsvSpec) -> None:
        self._root = None if spec.root is None else Path(spec.root)
        self._tables: list[_Table] = []
        self._table_R, self._offset_R, self._bytes_R = array("q"), array("q"), array("q")  # position of each row
        self._line_R = array("q")  # for messages
        self._next_R = array("q")  # the next row of the same sample, or -1
        self._first_N = array("q")  # the first row of each sample
        last_row: dict[bytes, int] = {}
        left_out: tuple[LeftOut, ...] = ()
        for path in map(require_file, spec.paths):
            _refuse_other_content(path)
            rows = read_csv_rows(path, spec.delimiter, quoted=spec.quoted)
            self._tables.append(_make_table(path, next(rows, None), spec))
            left_out = merge_left_out([*left_out, *self._add_rows(rows, last_row)])
        self.left_out = left_out

    def _add_rows(self, rows: Iterable[CsvRow], last_row: dict[bytes, int]) -> list[LeftOut]:
        """Add the rows of the last table, and return those that are unusable.

        `last_row` maps a hash of each image's path to the last row of that image so far.
        """
        number, table = len(self._tables) - 1, self._tables[-1]
        left_out: list[LeftOut] = []
        for row in rows:
            reason = row.reason or table.missing_in(row.fields)
            if reason:
                left_out.append(LeftOut(reason, 1, (to_utf8(f"{table.path}: line {row.line}"),)))
                if len(left_out) > 1000:
                    left_out = list(merge_left_out(left_out))
                continue
            self._table_R.append(number)
            self._offset_R.append(row.offset)
            self._bytes_R.append(row.size_bytes)
            self._line_R.append(row.line)
            self._link(len(self._next_R), str(self._image_path(table, row.fields)), last_row)
        return left_out

    def _link(self, row: int, image: str, last_row: dict[bytes, int]) -> None:
        """Start a new sample with a row, or append the row to the sample of its image."""
        key = hashlib.blake2b(image.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        before = last_row.get(key)
        if before is None:
            self._first_N.append(row)
        else:
            self._next_R[before] = row
        last_row[key] = row
        self._next_R.append(-1)

    def __len__(self) -> int:
        return len(self._first_N)

    def image_path(self, sample: int) -> Path:
        return self._image_path(*self._read(self._first_N[sample]))

    def captions(self, sample: int) -> tuple[str, ...]:
        """Return the captions of every row that names the image, in order, from every caption column."""
        found: list[str] = []
        row = self._first_N[sample]
        while row >= 0:
            table, fields = self._read(row)
            found += [fields[c] for c in table.captions]
            row = self._next_R[row]
        return strip_captions(found)

    def describe(self, sample: int) -> str:
        row = self._first_N[sample]
        place = f"{self._tables[self._table_R[row]].path}: line {self._line_R[row]}"
        return to_utf8(f"{place}: {self.image_path(sample)}")

    def _image_path(self, table: _Table, fields: Sequence[str]) -> Path:
        return (self._root or table.path.parent) / fields[table.image].strip()

    def _read(self, row: int) -> tuple[_Table, list[str]]:
        """Return a row's table and fields; the file must not have changed since it was listed."""
        table, offset = self._tables[self._table_R[row]], self._offset_R[row]
        try:
            with table.path.open("rb") as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != (table.size_bytes, table.mtime_ns):
                    raise ClipkdError(
                        f"{table.path}: has changed since training began, so sample numbers no longer match. Start "
                        "training again"
                    )
                file.seek(offset)
                content = file.read(self._bytes_R[row])
        except OSError as error:
            raise ClipkdError(f"{table.path}: cannot be read: {error.strerror}") from None
        return table, _parse_row(_Line(offset, 0, content), table.dialect).fields


def _refuse_other_content(path: Path) -> None:
    """Refuse a file whose beginning is not UTF-8 text, such as a table saved in UTF-16 or an archive.

    Raises:
        UsageError: its content is another; the message names it if it is known.
        ClipkdError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head, header = file.read(HEAD_BYTES), b""
            if not name_bad_text(head):
                file.seek(0)
                header = file.readline(_LONGEST_LINE)
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    decode_text(header or head, str(path))


def _make_table(path: Path, header: CsvRow | None, spec: CsvSpec) -> _Table:
    about = path.stat()
    columns = [] if header is None else [name.strip() for name in header.fields]
    wanted = (spec.caption_column,) if isinstance(spec.caption_column, str) else spec.caption_column
    missing = [name for name in (spec.image_column, *wanted) if columns.count(name) != 1]
    if missing:
        raise UsageError(
            f"{path}: no column, or more than one, is called {', '.join(missing)}; its first line, split at "
            f"{spec.delimiter!r}, names: {to_utf8(name_some(columns, 20)) or 'nothing'}. Fix data.image_column, "
            "data.caption_column or data.delimiter"
        )
    dialect = _Dialect(spec.delimiter, spec.quoted, len(columns))
    image, captions = columns.index(spec.image_column), tuple(columns.index(name) for name in wanted)
    return _Table(path, about.st_size, about.st_mtime_ns, dialect, image, captions)
