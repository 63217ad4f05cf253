"""Measure captions in tokens of CLIP's stock tokenizer, without torch; in words if open_clip is not installed.

The vocabulary is the file installed with open_clip; reading it imports nothing from open_clip.
"""

import gzip
import html
import importlib.util
from collections.abc import Callable
from pathlib import Path

import ftfy
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

_NUM_MERGES = 49152 - 256 - 2  # merges read; with single bytes and two special tokens: 49,408
_PATTERN = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def make_counter() -> tuple[str, Callable[[str], int]]:
    """Return "tokens" or "words", and a function that counts them in a caption, including start and end tokens."""
    found = importlib.util.find_spec("open_clip")
    folders = list(found.submodule_search_locations or []) if found else []
    vocabulary = Path(folders[0]) / "bpe_simple_vocab_16e6.txt.gz" if folders else None
    if vocabulary is None or not vocabulary.is_file():
        return "words", lambda caption: len(caption.split())
    tokenizer = _make_tokenizer(vocabulary)
    return "tokens", lambda caption: 2 + len(tokenizer.encode(_clean(caption)).ids)


def _clean(caption: str) -> str:
    """Return text cleaned as by CLIP: fixed by ftfy, HTML entities resolved (twice), single spaces, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


def _make_tokenizer(vocabulary: Path) -> Tokenizer:
    """Return CLIP's byte-level BPE: bytes, bytes that end a word, and merges in the order they were learnt."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 1 + _NUM_MERGES]]
    merges = [(first, second) for first, second in pairs]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
