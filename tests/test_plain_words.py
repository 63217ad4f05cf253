"""Prose stays plain: docstrings, comments, messages, help and docs use none of the words and openings listed here."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

# An expression, and its replacement.  Matched without regard to case.
REPLACED = {
    r"mend(s|ed|ing)?": "fix",
    r"h[eo]ld(s|ing)? (it |them |this )?(up )?against": "compare with",
    r"told apart|tell(s|ing)? apart": "significantly different, distinguish",
    r"taught": "teacher features, train",
    r"how manieth": "the number of",
    r"what of|whatever of": "the part of ... that",
    r"weighs?|weighed|weighing": "compare, measure",
    r"pictures?": "image; chart",
    r"said so|says so|so says|is said|are said": "report, with a message",
    r"looked|looks? (it|them|its \w+|their \w+) up": "decode, read, look-up",
    r"takes? turns|taken turns|taking turns|taken in turns|turn by turn": "interleaved",
    r"last words": "last lines of stderr",
    r"by chance": "at random",
    r"what it came from": "its inputs",
    r"normalis\w+|distils?": "normalize, distill",
    r"unless told": "by default",
}
BANNED = {re.compile(rf"\b(?:{words})\b", re.IGNORECASE): plain for words, plain in REPLACED.items()}
OPENING = re.compile(r"(What|Whether|Which|How|Where|Who|Whose|Of|In what|So that)\b")
NOT_A_VERB = re.compile(
    r"_*(?!embed\b|feed\b|need\b|speed\b)[a-z]+ed|\w+_of"
)  # a lone participle, or a name that hides its verb
CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)\n]*\)|<!--.*?-->", re.DOTALL)

FILES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in (
        *("*.md", "clipkd.py", "docs/*.md", "toolchain/**/*.py", "export/**/*.py", "benchmarks/*.py"),
        "recipes/**/*.yaml",
    )
    for path in REPOSITORY.glob(pattern)
)


def without_code(text: str) -> str:
    """Return text without what stands in backticks, targets of links, and comments of Markdown."""
    return CODE.sub(lambda match: " " * len(match[0]), text)


@pytest.mark.parametrize("page", [name for name in FILES if name.endswith(".md")])
def test_a_link_of_a_page_leads_to_a_file(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (REPOSITORY / page).parent.joinpath(link).exists()] == []


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring, and of each string that documents the name above it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string longer than one word; a `{}` stands for a value within it."""
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
        if isinstance(part, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if " " in text.strip():
            yield node.lineno, text


def comments(content: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def yaml_comments(content: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment of a recipe, whose values contain no #."""
    for number, line in enumerate(content.splitlines(), 1):
        _, mark, comment = line.partition("#")
        if mark:
            yield number, comment


def function_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each function but properties, which are named after their value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "property" not in map(ast.unparse, node.decorator_list):
            yield node.lineno, node.name


def problems_in(name: str, content: str) -> list[str]:
    """Return what is not plain in a file's prose, one line each."""
    if name.endswith(".md"):
        return _replaced_words(1, content)
    if name.endswith(".yaml"):
        return [problem for line, text in yaml_comments(content) for problem in _replaced_words(line, text)]
    tree = ast.parse(content)
    found = [
        f"line {line}: opens with {match[0]}"
        for line, text in docstrings(tree)
        if (match := OPENING.match(text.strip()))
    ]
    found += [
        f"line {line}: function {name}: name it with a verb"
        for line, name in function_names(tree)
        if NOT_A_VERB.fullmatch(name)
    ]
    prose = [*messages(tree), *comments(content)]
    return found + [problem for line, text in prose for problem in _replaced_words(line, text)]


def _replaced_words(line: int, text: str) -> list[str]:
    plain = without_code(text)
    return [
        f"line {line + plain.count(chr(10), 0, match.start())}: '{match[0]}'; write: {better}"
        for words, better in BANNED.items()
        for match in words.finditer(plain)
    ]


def problems_of(name: str) -> list[str]:
    return problems_in(name, (REPOSITORY / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_prose_is_plain(name: str) -> None:
    assert problems_of(name) == []


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("page.md", "One line.\nEach is held against its hash.", ["line 2: 'held against'; write: compare with"]),
        ("page.md", "The field `picture` and\n```\nmend it\n```\n[text](picture.png)", []),
        ("module.py", '"""What a run has."""', ["line 1: opens with What"]),
        ("module.py", '"""Return `mend`."""\n\nKEY = "picture"\n', []),
        ("module.py", 'def f(x):\n    raise ValueError(f"{x}: mend it")', ["line 2: 'mend'; write: fix"]),
        ("module.py", 'class A:\n    b: int\n    """How many."""', ["line 3: opens with How"]),
        (
            "module.py",
            'if x:\n    pass\nelse:\n    y = ("two " "pictures")',
            ["line 4: 'pictures'; write: image; chart"],
        ),
        ("module.py", "x = 1  # mends y", ["line 1: 'mends'; write: fix"]),
        ("recipe.yaml", "name: mend\nseed: 0  # mends y", ["line 2: 'mends'; write: fix"]),
        ("module.py", "def checked(): ...", ["line 1: function checked: name it with a verb"]),
        ("module.py", "def run_of(model): ...", ["line 1: function run_of: name it with a verb"]),
        ("module.py", "class A:\n    @property\n    def masked(self): ...\n\n    def embed(self): ...", []),
    ],
)
def test_a_replaced_word_is_found(name: str, content: str, found: list[str]) -> None:
    assert problems_in(name, content) == found


def test_files_were_found() -> None:
    assert {"README.md", "CHANGELOG.md", "clipkd.py", "docs/data.md", "toolchain/stage.py"} <= set(FILES)
    assert {"toolchain/distillation/losses.py", "recipes/glyphs.yaml", "recipes/paper/vit_t_16.yaml"} <= set(FILES)
    assert Path(REPOSITORY / "docs").is_dir()
