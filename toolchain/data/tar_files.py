"""Expand a recipe's shard patterns, fingerprint the shards, and locate the files in a tar archive.

Importing this module needs neither torch nor numpy, because stage keys are also computed where neither is installed.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from toolchain.data.bad_samples import BAD_JSON, BAD_UTF8, NO_CAPTION, UnusableError, strip_captions
from toolchain.data.file_content import HEAD_BYTES, name_content
from toolchain.data.remote_files import is_remote, without_query
from toolchain.errors import UsageError, name_some

PAIRING_VERSION = 5
"""Version of the rule by which archives' files become samples; a change of it changes the numbers of samples.

It is part of the fingerprint and of stored indexes: a teacher cache of another numbering is then refused."""

_BLOCK = 512  # tar consists of blocks of this size: a header, then the content padded with zeros
_END = bytes(_BLOCK)
_FILE_TYPES = frozenset({b"0", b"\0", b"7"})
_WITHOUT_CONTENT = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})  # links, devices, folders, whatever size is given
_EXTENSIONS = frozenset({b"L", b"K", b"x", b"g"})  # GNU's long name and link, pax's headers for one file and for all
_LONGEST_EXTENSION = 1 << 20  # bytes; a longer one is treated as corrupt


def expand_urls(patterns: Sequence[str]) -> list[str]:
    """Return the URLs that patterns name, in order; none if the shards are files.

    Raises:
        UsageError: as for `expand`, or some shards are files and others are not.
    """
    names = [name for pattern in patterns for name in _expand_pattern(pattern)]
    urls = [name for name in names if is_remote(name)]
    if urls and len(urls) < len(names):
        local = next(name for name in names if not is_remote(name))
        raise UsageError(
            f"data.shards: {without_query(urls[0])} is remote and {local} is a file; expected one kind of place. "
            "Write two sources of a mixture"
        )
    _refuse_repeated([without_query(url) for url in urls])  # copies and their index are named so
    return urls


def _refuse_repeated(names: Sequence[Path] | Sequence[str]) -> None:
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise UsageError(f"data.shards: {name} is listed {times} times; an epoch shows a sample once. List it once")


def expand(patterns: Sequence[str]) -> list[Path]:
    """Return the shards that patterns name, in order; {00000..00331} and {a,b} expand as in a shell.

    Wildcards are refused: they match whatever has been downloaded so far, but a shard that is still missing must be an
    error.

    Raises:
        UsageError: unsupported braces or wildcards, a shard listed twice, shards that do not exist, or a URL.
    """
    names = [name for pattern in patterns for name in _expand_pattern(pattern)]
    if urls := [name for name in names if is_remote(name)]:
        raise UsageError(
            f"data.shards: {without_query(urls[0])} is a URL; only the data of training is read from there. Download it"
        )
    paths = [Path(name) for name in names]
    _refuse_repeated(paths)
    missing = [path for path in paths if not path.is_file()]
    if folders := [path for path in missing if path.is_dir()]:
        raise UsageError(
            f"data.shards: {folders[0]} is a folder; expected tar files. Write the files in it, "
            f"for example {folders[0] / '{00000..00331}.tar'}"
        )
    if missing:
        raise UsageError(
            f"data.shards: {len(missing)} of {len(paths)} shards do not exist: {name_some(missing)} "
            f"({len(paths) - len(missing)} exist; searched in {Path.cwd()}). Download them, or list only those you have"
        )
    return paths


def _expand_pattern(pattern: str) -> Iterator[str]:
    literals_and_braces = re.split(r"\{([^{}]*)\}", pattern)
    if any(mark in literal for literal in literals_and_braces[::2] for mark in "{}"):
        raise UsageError(f"data.shards: {pattern}: braces must be closed and cannot be nested")
    if "*" in pattern or ("?" in pattern and not pattern.startswith("http")):  # a signed URL has a query
        raise UsageError(
            f"data.shards: {pattern}: wildcards are not expanded; a missing shard would go unnoticed. "
            "List the shards, for example data/cc3m/{00000..00331}.tar"
        )
    choices = [
        _expand_braces(part, pattern) if position % 2 else [part] for position, part in enumerate(literals_and_braces)
    ]
    return map("".join, itertools.product(*choices))


def _expand_braces(braces: str, pattern: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if ends and int(ends[1]) <= int(ends[2]):
        width = max(map(len, ends.groups())) if any(re.match(r"0\d", end) for end in ends.groups()) else 0
        return [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    if "," in braces:
        return braces.split(",")
    raise UsageError(
        f"data.shards: {pattern}: {{{braces}}} is neither an ascending range (00000..00331) nor a list (a,b)"
    )


def fingerprint(paths: Sequence[Path]) -> str:
    """Return a hash of the shards' names and sizes, in order: samples and their numbers depend on these.

    It also changes when clipkd counts other files of the same shards as samples.
    """
    digest = hashlib.sha256(f"{PAIRING_VERSION}\0".encode())
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class Member(NamedTuple):
    """A regular file in a tar archive."""

    name: str
    offset: int
    """Position of its content in the archive."""

    size_bytes: int


def read_members(path: Path) -> tuple[list[Member], str]:
    """Return the files in a tar archive and a description of its damage; see `read_open_members`."""
    with path.open("rb") as file:
        return read_open_members(file)


def read_open_members(file: BinaryIO) -> tuple[list[Member], str]:
    """Return the files in a tar archive, read from its headers alone, and a description of its damage ("" if none).

    Reads ustar, with GNU's and pax's long names and sizes (POSIX.1-2001, pax).  After a corrupt header, reading
    continues at the next valid ustar or GNU header.  For a truncated archive, the files before the cut are returned.
    A file of another kind, such as a compressed archive, has no members, and the description names it.
    """
    members: list[Member] = []
    number, position, extended = file.fileno(), 0, _Extended()
    size_bytes = os.fstat(number).st_size
    first_damage = ""
    head = os.pread(number, HEAD_BYTES, 0)
    if head[257:262] != b"ustar" and (known := name_content(head)):
        return [], f"is not a tar archive but {known}"
    while True:
        header = os.pread(number, _BLOCK, position)  # a buffered read would fetch eight blocks of content with it
        if header == _END:
            return members, first_damage
        if len(header) < _BLOCK:
            return members, first_damage or f"ends at byte {size_bytes:,} without tar's end mark"
        try:
            name, content_bytes, kind = _parse_header(header)
            if kind not in _EXTENSIONS:
                name = extended.name or name
                content_bytes = content_bytes if extended.size_bytes is None else extended.size_bytes
                extended = _Extended()
            if kind in _WITHOUT_CONTENT:
                content_bytes = 0
            offset = position + _BLOCK
            if offset + content_bytes > size_bytes:
                return members, first_damage or f"ends at byte {size_bytes:,}, within {name}"
            if kind in (b"L", b"x"):
                content = os.pread(number, min(content_bytes, _LONGEST_EXTENSION), offset)
                extended = _parse_extension(kind, content, extended)
        except ValueError:
            first_damage = first_damage or f"the header at byte {position:,} is damaged"
            extended = _Extended()
            next_header = _find_header(file, position + _BLOCK)
            if next_header is None:
                return members, first_damage
            position = next_header
            continue
        if kind in _FILE_TYPES and not name.endswith("/"):  # the oldest tar programs mark folders this way
            members.append(Member(name, offset, content_bytes))
        position = offset + -(-content_bytes // _BLOCK) * _BLOCK


def _find_header(file: BinaryIO, position: int) -> int | None:
    """Return the position of the next valid header; None if there is none."""
    file.seek(position)
    while block := file.read(_BLOCK):
        if block[257:262] == b"ustar":
            with contextlib.suppress(ValueError):
                _parse_header(block)
                return position
        position += _BLOCK
    return None


class _Extended(NamedTuple):
    """Name and size from GNU or pax extensions, which override the header of the file that follows."""

    name: str = ""
    size_bytes: int | None = None


def _parse_header(header: bytes) -> tuple[str, int, bytes]:
    """Return name, size and type from a header; raise ValueError if it is corrupt."""
    if _parse_number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""  # GNU stores times there
    return _decode_name(prefix + b"/" + name if prefix else name), _parse_number(header[124:136]), header[156:157]


def _parse_number(field: bytes, base: int = 8) -> int:
    """Return the value of digits, or of the binary number after a byte of 0x80, which stores larger values."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit():  # int() would also accept a sign and underscores
        raise ValueError
    return int(digits, base)


def _parse_extension(kind: bytes, content: bytes, before: _Extended) -> _Extended:
    """Parse an extension: a long name, or pax records "LENGTH KEY=VALUE\\n", where LENGTH counts the whole record."""
    if kind == b"L":
        return before._replace(name=_decode_name(content.partition(b"\0")[0]))
    found: dict[bytes, bytes] = {}
    while content:
        digits = content.partition(b" ")[0]
        length = _parse_number(digits, 10)
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or content[length - 1 : length] != b"\n":
            raise ValueError
        found[key] = value
        content = content[length:]
    name, size = found.get(b"path"), found.get(b"size")
    return _Extended(
        before.name if name is None else _decode_name(name),
        before.size_bytes if size is None else _parse_number(size, 10),
    )


def _decode_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def parse_captions(content: bytes, json_key: str | None) -> tuple[str, ...]:
    """Return a caption file's captions, stripped; blank captions are dropped.

    `json_key` names the caption in a JSON object; None: the file is text.

    Raises:
        UnusableError: the file is not UTF-8, is not JSON, or has no caption.
    """
    try:
        caption: Any = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError(BAD_UTF8, str(error)) from error
    if json_key is not None:
        try:
            record = json.loads(caption)
        except (ValueError, RecursionError) as error:
            raise UnusableError(BAD_JSON, str(error)) from error
        if not isinstance(record, dict):
            raise UnusableError(NO_CAPTION, f'its JSON is no object with a "{json_key}"')
        if json_key not in record:
            keys = name_some(record) or "none"
            raise UnusableError(NO_CAPTION, f'no "{json_key}" among its keys: {keys}; data.caption_key can name one')
        caption = record[json_key]
    texts = [caption] if isinstance(caption, str) else caption
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UnusableError(NO_CAPTION, f'"{json_key}" is neither text nor a list of texts')
    return strip_captions(texts)
