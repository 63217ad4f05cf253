"""Write any tokenizer open_clip uses as one `tokenizers` library file, so that a device tokenizes without open_clip.

The written `tokenizer.json` holds everything after cleaning: splitting, merges, the start and end tokens, truncation
that keeps the end token, and padding to the context length. The library cannot express cleaning with ftfy and two
habits of open_clip's HFTokenizer; the "text" section of `preprocess.json` names these, see `text_spec`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer

from toolchain.errors import UsageError
from toolchain.models.stock_tokenizer import cleaning_name, stock_tokenizer_json, wrap_tokens

if TYPE_CHECKING:
    from toolchain.models.clip_model import ClipModel


def write_tokenizer(clip_model: ClipModel, folder: Path) -> dict[str, Any]:
    """Write `folder/tokenizer.json` and return the "text" section of `preprocess.json` (see `text_spec`).

    Raises:
        UsageError: the model's tokenizer cannot be reproduced without open_clip.
    """
    tokenizer, where = clip_model.tokenize, clip_model.name
    zeroed_id = appended_id = None
    if isinstance(tokenizer, SimpleTokenizer):
        if tokenizer.reduction_fn is not None:
            raise UsageError(
                f"{where}: its tokenizer drops tokens at random (reduction_mask), which an export cannot reproduce. "
                "Remove text_cfg.tokenizer_kwargs.reduction_mask from open_clip_config.json"
            )
        text = stock_tokenizer_json(tokenizer, context_length=clip_model.context_length)
        pad_id, eot_id = 0, tokenizer.eot_token_id
    elif isinstance(tokenizer, HFTokenizer):
        if not getattr(tokenizer.tokenizer, "is_fast", False):
            raise UsageError(
                f"{where}: its tokenizer is {type(tokenizer.tokenizer).__name__}, which has no `tokenizers` form. "
                "Expected a folder with a tokenizer.json; convert it with transformers' convert_slow_tokenizer"
            )
        text, appended_id = _hf_tokenizer_json(tokenizer, clip_model.context_length)
        pad_id, eot_id = tokenizer.tokenizer.pad_token_id, tokenizer.tokenizer.eos_token_id
        if eot_id is None:
            eot_id = tokenizer.tokenizer.sep_token_id
        if tokenizer.strip_sep_token:
            zeroed_id = tokenizer.tokenizer.sep_token_id
    else:
        raise UsageError(
            f"{where}: its tokenizer is {type(tokenizer).__name__}; an export reproduces open_clip's SimpleTokenizer "
            "and HFTokenizer. Choose a model that open_clip.get_tokenizer gives one of these for"
        )
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return text_spec(
        context_length=clip_model.context_length,
        pad_id=pad_id,
        eot_id=eot_id,
        clean=cleaning_name(tokenizer),
        zeroed_id=zeroed_id,
        appended_id=appended_id,
    )


def text_spec(
    *,
    context_length: int,
    pad_id: int,
    eot_id: int | None,
    clean: str,
    zeroed_id: int | None = None,
    appended_id: int | None = None,
) -> dict[str, Any]:
    """Return the "text" section of `preprocess.json`: how a caption becomes the text graph's `input_ids`.

    `context_length`  T, the width of `input_ids`.
    `pad_id`          the token that fills a row after its end token; `tokenizer.json` already pads with it.
    `eot_id`          the end-of-text token, kept by truncation; None if the vocabulary has none.
    `clean`           how a caption is cleaned first: `whitespace` is ftfy.fix_text, html.unescape twice and every run
                      of whitespace to one space; `lower` is that in lower case; `canonicalize` replaces underscores by
                      spaces, removes ASCII punctuation and lowers the case.
    `zeroed_id`       a token that open_clip overwrites with 0 (`strip_sep_token`), or None.
    `appended_id`     a token that open_clip appends after the padding (`tokenizer_mode: clips`), or None; then
                      `tokenizer.json` makes rows of T - 1.
    """
    return {
        "context_length": context_length,
        "pad_id": pad_id,
        "eot_id": eot_id,
        "clean": clean,
        "zeroed_id": zeroed_id,
        "appended_id": appended_id,
    }


def _hf_tokenizer_json(tokenizer: HFTokenizer, context_length: int) -> tuple[str, int | None]:
    tokenizer([""], context_length=context_length)  # transformers sets padding and truncation of its backend on use
    backend = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
    if tokenizer.tokenizer_mode != "clips":
        return backend.to_str(), None
    special = tokenizer.tokenizer
    backend.post_processor = wrap_tokens(
        (special.bos_token, special.bos_token_id), (special.eos_token, special.eos_token_id)
    )
    backend.enable_truncation(context_length - 1)
    backend.enable_padding(length=context_length - 1, pad_id=special.pad_token_id, pad_token=special.pad_token)
    return backend.to_str(), special.cls_token_id
