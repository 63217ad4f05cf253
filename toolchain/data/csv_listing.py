"""List the samples of CSV files, and what in them is none.

Importing this needs no torch.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator
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
    readable,
    stripped,
    together,
)
from toolchain.data.listing import require_file
from toolchain.errors import ClipkdError, UsageError
from toolchain.recipe.data import CsvSpec

_LONGEST_ROW = 100  # lines that a quoted field may span
_LONGEST_LINE = 1 << 20  # bytes; a longer one is damage


# CSV files


class Row(NamedTuple):
    """A row of a CSV file: where it lies and what its fields are, or why it has none."""

    offset: int
    size_bytes: int
    line: int
    fields: list[str]
    reason: str = ""


def fields_of(row: str, delimiter: str, *, quoted: bool) -> list[str] | None:
    """The fields of a row; None where a quote is not closed, or not at the end of a field.

    Quotes count only if they are said to; then one in the middle of a bare field is an error (RFC 4180).
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


def csv_rows(path: Path, delimiter: str, *, quoted: bool) -> Iterator[Row]:
    """The rows of a file, its header first.

    A row is a line.  Only a quoted field may go on in the next ones, and only to where it closes, the row then has as
    many fields as the header, and none of the lines taken along is such a row by itself: an unbalanced quote swallows
    no good row.
    """
    with path.open("rb") as file:
        lines = _lines(file)
        ahead: list[tuple[int, int, bytes]] = []
        width = 0
        while ahead or (first := next(lines, None)) is not None:
            if ahead:
                first = ahead.pop(0)
            assert first is not None
            offset, number, raw = first
            row = _row(offset, number, raw, width, delimiter, quoted)
            if row.reason == OPEN_QUOTE and width:
                taken, joined = 0, raw
                while taken < _LONGEST_ROW:
                    if taken == len(ahead):
                        following = next(lines, None)
                        if following is None:
                            break
                        ahead.append(following)
                    if not _row(*ahead[taken], width, delimiter, quoted).reason:
                        break
                    joined += ahead[taken][2]
                    taken += 1
                    whole = _row(offset, number, joined, width, delimiter, quoted)
                    if not whole.reason:
                        row = whole
                        del ahead[:taken]
                        break
            width = width or len(row.fields)
            if raw.strip() or row.fields != [""]:
                yield row


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    offset, number = 0, 0
    while line := file.readline():
        number += 1
        yield offset, number, line
        offset += len(line)


def _row(offset: int, number: int, raw: bytes, width: int, delimiter: str, quoted: bool) -> Row:
    """`width` 0: any number of fields is right."""
    try:
        text = raw.decode("utf-8-sig" if offset == 0 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        return Row(offset, len(raw), number, [], BAD_UTF8)
    if len(raw) > _LONGEST_LINE:
        return Row(offset, len(raw), number, [], BAD_ROW)
    fields = fields_of(text, delimiter, quoted=quoted)
    if fields is None:
        return Row(offset, len(raw), number, [], OPEN_QUOTE)
    if width and len(fields) != width:
        return Row(offset, len(raw), number, fields, BAD_ROW)
    return Row(offset, len(raw), number, fields)


@dataclass(frozen=True)
class _Table:
    """One file, and which of its columns are read."""

    path: Path
    size_bytes: int
    mtime_ns: int
    width: int
    image: int
    captions: tuple[int, ...]


class CsvRows:
    """Samples of CSV files, each a picture and the rows that name it; rows are read when they are asked for.

    Kept in memory are 24 bytes a row and 8 a sample.
    """

    def __init__(self, spec: CsvSpec) -> None:
        self._spec = spec
        self._tables: list[_Table] = []
        places: list[array[int]] = [array("q"), array("q"), array("q")]  # file, offset, bytes: of each row
        self._file_R, self._offset_R, self._bytes_R = places
        self._next_R = array("q")  # the next row of the same sample, or -1
        self._first_N, last_N = array("q"), array("q")
        sample_of: dict[bytes, int] = {}
        left_out: list[LeftOut] = []
        for f, path in enumerate(map(require_file, spec.paths)):
            rows = csv_rows(path, spec.delimiter, quoted=spec.quoted)
            table = self._table(path, next(rows, None))
            self._tables.append(table)
            for row in rows:
                reason = row.reason
                if not reason and not row.fields[table.image].strip():
                    reason = NO_IMAGE
                if not reason and not any(row.fields[c].strip() for c in table.captions):
                    reason = NO_CAPTION
                if reason:
                    left_out.append(LeftOut(reason, 1, (readable(f"{path}: line {row.line}"),)))
                    if len(left_out) > 1000:
                        left_out = list(together(left_out))
                    continue
                name = str(self._picture(table, row.fields[table.image].strip()))
                key = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
                r = len(self._next_R)
                for column, value in zip(places, (f, row.offset, row.size_bytes), strict=True):
                    column.append(value)
                self._next_R.append(-1)
                sample = sample_of.setdefault(key, len(self._first_N))
                if sample == len(self._first_N):
                    self._first_N.append(r)
                    last_N.append(r)
                else:
                    self._next_R[last_N[sample]] = r
                    last_N[sample] = r
        self.left_out = together(left_out)

    def __len__(self) -> int:
        return len(self._first_N)

    def picture(self, sample: int) -> Path:
        table, fields = self._read(self._first_N[sample])
        return self._picture(table, fields[table.image].strip())

    def captions(self, sample: int) -> tuple[str, ...]:
        """Of every row that names the picture, in order, and of every column."""
        found: list[str] = []
        row = self._first_N[sample]
        while row >= 0:
            table, fields = self._read(row)
            found += [fields[c] for c in table.captions]
            row = self._next_R[row]
        return stripped(found)

    def where(self, sample: int) -> str:
        row = self._first_N[sample]
        place = f"{self._tables[self._file_R[row]].path}: the row at byte {self._offset_R[row]:,}"
        return readable(f"{place}: {self.picture(sample)}")

    def _table(self, path: Path, header: Row | None) -> _Table:
        about, spec = path.stat(), self._spec
        columns = [] if header is None else [name.strip() for name in header.fields]
        wanted = (spec.caption_column,) if isinstance(spec.caption_column, str) else spec.caption_column
        missing = [name for name in (spec.image_column, *wanted) if columns.count(name) != 1]
        if missing:
            raise UsageError(
                f"{path}: no column, or more than one, is called {', '.join(missing)}; its first line, cut at "
                f"{spec.delimiter!r}, names: {readable(', '.join(columns[:20])) or 'nothing'}. Mend data.image_column, "
                "data.caption_column or data.delimiter"
            )
        at = columns.index(spec.image_column), tuple(columns.index(name) for name in wanted)
        return _Table(path, about.st_size, about.st_mtime_ns, len(columns), *at)

    def _picture(self, table: _Table, name: str) -> Path:
        return (table.path.parent if self._spec.root is None else Path(self._spec.root)) / name

    def _read(self, row: int) -> tuple[_Table, list[str]]:
        """A row's fields; every row that was listed is one, as long as its file stays as it was."""
        table = self._tables[self._file_R[row]]
        try:
            with table.path.open("rb") as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != (table.size_bytes, table.mtime_ns):
                    raise ClipkdError(
                        f"{table.path}: has changed since training began; samples are numbered anew. Start again"
                    )
                file.seek(self._offset_R[row])
                raw = file.read(self._bytes_R[row])
        except OSError as error:
            raise ClipkdError(f"{table.path}: cannot be read: {error.strerror}") from None
        spec = self._spec
        return table, _row(self._offset_R[row], 0, raw, table.width, spec.delimiter, spec.quoted).fields
