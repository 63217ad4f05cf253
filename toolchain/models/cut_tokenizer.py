"""Cut a tokenizer to the tokens that given texts use, with the same tokens for every word of these texts.

A word is what the tokenizer's merges or search work on: a part of a text between spaces or punctuation.

- BPE: a word is merged by the first merge in the list that applies, then the next.  Only merges that were applied to
  some word are kept, in their order, so at every step of such a word the first applicable merge is the same as before.
- Unigram, WordPiece and WordLevel: the best segmentation of a word is still there, and every other one was there
  before.

Further words are split into smaller tokens that were kept: at least bytes or characters, of which all are kept.  Tokens
keep their order, because open_clip reads a text at its largest id, the end token.  Every word is compared at the end.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer

from toolchain.errors import UsageError
from toolchain.models.stock_tokenizer import cleaning_name, stock_tokenizer_json

_PAD = "<pad>"  # CLIP's own tokenizer pads with token 0, an exclamation mark
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_SIDES = ("padding_side", "truncation_side", "model_input_names")

Pair = tuple[str, str]


@dataclass(frozen=True)
class CutTokenizer:
    """A tokenizer with fewer tokens, for open_clip's HFTokenizer."""

    files: dict[str, bytes]
    settings: dict[str, Any]
    """Changes to the model's text_cfg."""

    source_ids: list[int]
    """The id that each token had in the whole vocabulary."""

    num_words: int
    """Number of different words in the texts."""


def cut_tokenizer(tokenizer: Any, text_cfg: Mapping[str, Any], num_rows: int, texts: Iterable[str]) -> CutTokenizer:
    """Return a model's tokenizer, cut to the texts; `num_rows` is the number of its token embeddings.

    Raises:
        UsageError: there are no texts, or it is a tokenizer that cannot be cut.
    """
    document, special = _read_tokenizer(tokenizer)
    whole = Tokenizer.from_str(json.dumps(document))
    words = _list_words(whole, tokenizer.clean_fn, texts) - set(special.values())
    if not words:
        raise UsageError("student.vocabulary: its texts have no words; name at least one text")
    ids_of = whole.get_vocab()
    merges = _applied_merges(document["model"], words) if document["model"]["type"] == "BPE" else set()
    tokens = _choose_tokens(document["model"], whole, words, merges) | set(special.values())
    tokens |= {each["content"] for each in document["added_tokens"]}
    is_stock = isinstance(tokenizer, SimpleTokenizer)
    kept = sorted({0} | {ids_of[token] for token in tokens if ids_of.get(token, num_rows) < num_rows})
    source_ids = [0, *kept] if is_stock else kept  # in front: the row that the stock tokenizer pads with
    new_ids = {number: place + is_stock for place, number in enumerate(kept)}
    _renumber(document, ids_of, new_ids, merges)
    if is_stock:
        special["pad_token"] = _PAD
        document["model"]["vocab"][_PAD] = 0
        document["added_tokens"] = [
            _add_special(document["model"]["vocab"][token], token) for token in special.values()
        ]
    _compare_words(whole, Tokenizer.from_str(json.dumps(document)), words)
    settings: dict[str, Any] = {"vocab_size": len(source_ids)}
    if is_stock:
        settings |= {"hf_tokenizer_name": "clip-cut", "tokenizer_kwargs": {"clean": cleaning_name(tokenizer)}}
    if text_cfg.get("pool_type") == "eos":
        settings["eos_id"] = new_ids[text_cfg.get("eos_id", 2)]
    if not is_stock and text_cfg.get("pad_id"):
        settings["pad_id"] = new_ids[text_cfg["pad_id"]]
    configuration = _describe(tokenizer, special, text_cfg)
    files = {"tokenizer.json": document, "tokenizer_config.json": configuration}
    encoded = {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}
    return CutTokenizer(encoded, settings, source_ids, len(words))


def _read_tokenizer(tokenizer: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a tokenizer as the content of a tokenizer.json, and its special tokens by role."""
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
        start, end = (tokenizer.decoder[number] for number in (tokenizer.sot_token_id, tokenizer.eot_token_id))
        document = json.loads(stock_tokenizer_json(tokenizer))
        # HFTokenizer finds special tokens in a text by itself: the merges that spell them are not needed
        document["model"]["vocab"] = dict(tokenizer.encoder)
        document["model"]["merges"] = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
        special = {"bos_token": start, "eos_token": end}
    elif isinstance(tokenizer, HFTokenizer) and getattr(tokenizer.tokenizer, "is_fast", False):
        document = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
        found = {role: getattr(tokenizer.tokenizer, role, None) for role in _ROLES}
        special = {role: str(token) for role, token in found.items() if token is not None}
    else:
        raise UsageError(
            f"student.vocabulary: the tokenizer {type(tokenizer).__name__} cannot be cut; expected open_clip's own, or "
            "one of the Hugging Face Hub that has a tokenizer.json"
        )
    kind, model = document["model"]["type"], document["model"]
    if kind not in ("BPE", "Unigram", "WordPiece", "WordLevel") or (
        kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("dropout"))
    ):
        raise UsageError(f"student.vocabulary: a tokenizer of type {kind} with these settings cannot be cut")
    document |= {"padding": None, "truncation": None}  # open_clip sets both in every call
    return document, special


def _list_words(whole: Tokenizer, clean: Any, texts: Iterable[str]) -> set[str]:
    words: set[str] = set()
    for text in texts:
        cleaned = clean(text)
        if whole.normalizer is not None:
            cleaned = whole.normalizer.normalize_str(cleaned)
        if whole.pre_tokenizer is None:
            words.add(cleaned)
        else:
            words.update(word for word, _ in whole.pre_tokenizer.pre_tokenize_str(cleaned))
    return words - {""}


# The tokens that are kept ---------------------------------------------------------------------------------------------


def _list_merges(model: Mapping[str, Any]) -> list[Pair]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _applied_merges(model: Mapping[str, Any], words: Iterable[str]) -> set[Pair]:
    """Return every merge that BPE applies to some word, by its definition: the first in the list that applies."""
    rank_of = {pair: rank for rank, pair in enumerate(_list_merges(model))}
    suffix, applied = model.get("end_of_word_suffix") or "", set()
    for word in words:
        if model.get("ignore_merges") and word in model["vocab"]:
            continue
        symbols = [*word[:-1], word[-1] + suffix]
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: rank_of.get(pair, len(rank_of)))
            if pair not in rank_of:
                break
            applied.add(pair)
            symbols = _merge(symbols, pair)
    return applied


def _merge(symbols: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    place = 0
    while place < len(symbols):
        if tuple(symbols[place : place + 2]) == pair:
            merged.append(pair[0] + pair[1])
            place += 2
        else:
            merged.append(symbols[place])
            place += 1
    return merged


def _choose_tokens(model: Mapping[str, Any], whole: Tokenizer, words: Iterable[str], merges: set[Pair]) -> set[str]:
    """Return the words' tokens and all that no merge makes, or that have a single character."""
    tokens = {token.value for word in words for token in whole.model.tokenize(word)}
    match model["type"]:
        case "BPE":
            merged = {first + second for first, second in _list_merges(model)}
            tokens |= {first + second for first, second in merges}
            tokens |= {token for token in model["vocab"] if token not in merged}
        case "Unigram":
            pieces = [piece for piece, _ in model["vocab"]]
            tokens |= {piece for piece in pieces if len(piece) == 1 or piece.startswith("<0x")}
            tokens |= {pieces[model["unk_id"]]} if model.get("unk_id") is not None else set()
        case _:
            prefix = model.get("continuing_subword_prefix") or ""
            if model["type"] == "WordPiece":
                tokens |= {token for token in model["vocab"] if len(token.removeprefix(prefix)) == 1}
            tokens.add(model["unk_token"])
    return tokens


# The new tokenizer ----------------------------------------------------------------------------------------------------


def _renumber(
    document: dict[str, Any], ids_of: Mapping[str, int], new_ids: Mapping[int, int], merges: set[Pair]
) -> None:
    """Remove, in place, all tokens that have no new id, and give the others theirs."""
    model = document["model"]
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
        model["unk_id"] = None if unknown is None else new_ids[unknown]
    else:
        model["vocab"] = {token: new_ids[number] for token, number in model["vocab"].items() if number in new_ids}
    if model["type"] == "BPE":
        model["merges"] = [list(pair) for pair in _list_merges(model) if pair in merges]
    document["added_tokens"] = [
        each | {"id": new_ids[each["id"]]} for each in document["added_tokens"] if each["id"] in new_ids
    ]
    _renumber_special(document.get("post_processor"), ids_of, new_ids)


def _renumber_special(step: Any, ids_of: Mapping[str, int], new_ids: Mapping[int, int]) -> None:
    """Give, in place, the tokens that a post-processor puts around a text their new ids."""
    for inner in (step or {}).get("processors", []):
        _renumber_special(inner, ids_of, new_ids)
    for each in (step or {}).get("special_tokens", {}).values():
        each["ids"] = [new_ids[number] for number in each["ids"]]
    for role in ("sep", "cls"):
        if isinstance((step or {}).get(role), list):
            token, number = step[role]
            step[role] = [token, new_ids[number]]


def _add_special(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _describe(tokenizer: Any, special: Mapping[str, str], text_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    inner = getattr(tokenizer, "tokenizer", None)
    sides = {name: getattr(inner, name) for name in _SIDES if hasattr(inner, name)}
    length = text_cfg.get("context_length", 77)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **special, **sides}


def _compare_words(whole: Tokenizer, cut: Tokenizer, words: Iterable[str]) -> None:
    for word in words:
        before, after = ([token.value for token in each.model.tokenize(word)] for each in (whole, cut))
        if before != after:
            raise UsageError(
                f"student.vocabulary: this tokenizer cannot be cut: {word!r} would become {after}, and was {before}"
            )
