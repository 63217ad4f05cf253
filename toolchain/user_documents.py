"""Parse the YAML and JSON that users write, and refuse what a parser would silently change.

PyYAML and json keep the last of two equal keys, so half of what was written would be lost without a message.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

GIT_LFS = b"version https://git-lfs"
"""Begins the pointers that a clone without Git LFS has in place of large files."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MERGE = "tag:yaml.org,2002:merge"
_NAMED = 5  # keys that a message lists


class InvalidDocument(ValueError):
    """A text that is not YAML or JSON, or has a key twice; the caller adds the file's name to the message."""


def decode_document(content: bytes) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        InvalidDocument: the text has another encoding, or is not the document but a Git LFS pointer.
    """
    if content.startswith(GIT_LFS):
        raise InvalidDocument("a Git LFS pointer, not the file itself. Fetch it: git lfs pull")
    if content.startswith(_UTF16) or b"\0" in content[:4]:
        raise InvalidDocument("this is UTF-16 text; expected UTF-8. Save it again with the encoding UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidDocument(f"not UTF-8 text, first in line {line}. Save it again with the encoding UTF-8") from None


def parse_yaml(text: str, *, as_text: bool = False) -> Any:
    """Return the value of a YAML document; with `as_text`, every scalar is text, so that no and 007 are names.

    Raises:
        InvalidDocument: not YAML, or a mapping has a key twice.
    """
    loader = (yaml.BaseLoader if as_text else yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_twice([(str(key.value), *lines) for key, lines in _yaml_twice(loader, node)])
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InvalidDocument(f"not YAML: {_describe(error)}") from None
    finally:
        loader.dispose()


def parse_json(text: str) -> Any:
    """Return the value of a JSON document.

    Raises:
        InvalidDocument: not JSON, or an object has a key twice.
    """
    has_twice = False

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal has_twice
        document = dict(pairs)
        has_twice |= len(document) < len(pairs)
        return document

    try:
        document = json.loads(text, object_pairs_hook=to_dict)
    except json.JSONDecodeError as error:
        raise InvalidDocument(f"not JSON: {error}") from None
    if has_twice:
        _refuse_twice(list(_json_twice(text)))
    return document


def _refuse_twice(twice: list[tuple[str, int, int]]) -> None:
    """Raise an error for keys that occur in two lines each."""
    if twice:
        lines = [
            f"{key} is written twice, in " + (f"line {first}" if first == second else f"lines {first} and {second}")
            for key, first, second in twice
        ]
        more = f"; and {len(lines) - _NAMED:,} more keys" if len(lines) > _NAMED else ""
        raise InvalidDocument(f"{'; '.join(lines[:_NAMED])}{more}. Only one of the two would count; remove the other")


def _yaml_twice(loader: Any, root: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, tuple[int, int]]]:
    """Yield the second occurrence of each key, with the lines of both.

    Nodes are compared before they are constructed, because a merge (<<) adds keys that a mapping may replace.
    """
    waiting, visited = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in visited:  # an alias; it may also refer to its own parent
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        if not isinstance(node, yaml.MappingNode):
            continue
        line_of: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, name = key.start_mark.line + 1, loader.construct_object(key)
            if name in line_of:
                yield key, (line_of[name], line)
            line_of.setdefault(name, line)
        waiting += [value for _, value in reversed(node.value)]


_JSON_TOKENS = re.compile(r'(?P<key>"(?:[^"\\]|\\.)*")(?=\s*:)|"(?:[^"\\]|\\.)*"|(?P<open>\{)|(?P<close>\})')


def _json_twice(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the second occurrence of each key of a valid document, with the lines of both."""
    objects: list[dict[str, int]] = []
    line, counted = 1, 0
    for token in _JSON_TOKENS.finditer(text):
        line, counted = line + text.count("\n", counted, token.start()), token.start()
        if token["open"]:
            objects.append({})
        elif token["close"]:
            objects.pop()
        elif token["key"]:
            name = json.loads(token["key"])
            if name in objects[-1]:
                yield name, objects[-1][name], line
            objects[-1].setdefault(name, line)


def _describe(error: yaml.YAMLError) -> str:
    """Return PyYAML's message in one line, without the copy of the text."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    hint = ". YAML is indented with spaces, not with tabs" if "\\t" in (error.problem or "") else ""
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}{hint}"
