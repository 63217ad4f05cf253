"""Write CLIP's own tokenizer, which open_clip implements in Python, as one `tokenizers` library file."""

import copy

import regex
from open_clip import tokenizer as open_clip_tokenizer
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

_CLEAN_NAMES = {
    open_clip_tokenizer._clean_whitespace: "whitespace",
    open_clip_tokenizer._clean_lower: "lower",
    open_clip_tokenizer._clean_canonicalize: "canonicalize",
}


def cleaning_name(tokenizer: SimpleTokenizer | HFTokenizer) -> str:
    """Return open_clip's name of how a tokenizer cleans texts: whitespace, lower or canonicalize."""
    return _CLEAN_NAMES[tokenizer.clean_fn]


def wrap_tokens(start: tuple[str, int], end: tuple[str, int]) -> processors.TemplateProcessing:
    """Return a step that puts a start and an end token, each with its id, around a text."""
    return processors.TemplateProcessing(
        single=f"{start[0]} $A {end[0]}", special_tokens=list(dict.fromkeys((start, end)))
    )


def stock_tokenizer_json(tokenizer: SimpleTokenizer | None = None, *, context_length: int = 77) -> str:
    """Return CLIP's byte-level BPE (open_clip's SimpleTokenizer, 49,408 tokens) as the text of a `tokenizer.json`.

    It expects cleaned text. It follows SimpleTokenizer where transformers' conversion does not: letters and digits are
    those of the `regex` package's Unicode version, which is newer than the library's; and a caption that spells a
    special token gets that token only where SimpleTokenizer's pattern finds it.
    """
    tokenizer = tokenizer or SimpleTokenizer()
    special_tokens = [tokenizer.decoder[token_id] for token_id in tokenizer.all_special_ids]
    vocab = {token: token_id for token, token_id in tokenizer.encoder.items() if token not in special_tokens}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    spelling: dict[tuple[str, str], None] = {}
    unaware = copy.copy(tokenizer)
    unaware.cache = {}  # this cache is where SimpleTokenizer keeps special tokens whole
    for token in special_tokens:
        # Merges of the lowest priority spell the special token out of the pieces its text falls into.  They fire
        # nowhere else: only the special alternatives of the pattern put a letter next to a punctuation mark.
        joined, *pieces = unaware.bpe(token).split(" ")
        for piece in pieces:
            spelling[joined, piece] = None
            joined += piece
            vocab.setdefault(joined, tokenizer.vocab_size + len(spelling))
        vocab[joined] = tokenizer.encoder[token]
    rust = Tokenizer(models.BPE(vocab=vocab, merges=[*merges, *spelling], end_of_word_suffix="</w>"))
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_stock_pattern(special_tokens)), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = special_tokens[:2]
    rust.post_processor = wrap_tokens((start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id))
    rust.enable_truncation(context_length)
    rust.enable_padding(length=context_length, pad_id=0, pad_token=tokenizer.decoder[0])
    return rust.to_str()


def _stock_pattern(special_tokens: list[str]) -> str:
    """Return SimpleTokenizer's pattern with every class spelled out as open_clip's engine matches it, ignoring case."""
    words = [*special_tokens, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    spelled = ["".join(_members(regex.escape(character)) for character in word) for word in words]
    return "|".join([*spelled, _members(r"[\p{L}]") + "+", _members(r"[\p{N}]"), _members(r"[^\s\p{L}\p{N}]") + "+"])


def _members(pattern: str) -> str:
    """Return a class of all characters that a pattern matches ignoring case: s, S and the long s for an s."""
    runs = regex.findall(f"{pattern}+", _ALL_CHARACTERS, regex.IGNORECASE)
    ends = ((ord(run[0]), ord(run[-1])) for run in runs)
    return (
        "[" + "".join(f"\\x{{{first:x}}}" + (f"-\\x{{{last:x}}}" if last > first else "") for first, last in ends) + "]"
    )


_ALL_CHARACTERS = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)  # no surrogates
