"""Cut a model's vocabulary to the tokens that given texts use: most of a small text tower is token embeddings."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

import torch

from toolchain.errors import UsageError
from toolchain.models.build import assemble_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.cut_tokenizer import CutTokenizer, cut_tokenizer
from toolchain.recipe.model_config import merge_config

_COMPARED_TEXTS = 1000


def cut_vocabulary(model: ClipModel, texts: Iterable[str]) -> tuple[ClipModel, dict[str, int]]:
    """Return a model with the rows of fewer tokens and its own tokenizer, and what the manifest records.

    The texts keep their tokens, so their features stay equal.  Other texts keep theirs where their words are among the
    texts' words, and are split into smaller tokens elsewhere.

    Raises:
        UsageError: there are no texts, or the model's text tower or tokenizer cannot be cut.
    """
    state = model.net.state_dict()
    names = [name for name in ("token_embedding.weight", "text.token_embedding.weight") if name in state]
    if not names:
        raise UsageError(
            f"student.vocabulary: the text tower of {model.name} is not open_clip's own, and cannot be cut. Remove "
            "vocabulary"
        )
    embedding_VW, text_cfg = state[names[0]], model.config["model_cfg"]["text_cfg"]
    remaining = iter(texts)
    first = list(islice(remaining, _COMPARED_TEXTS))
    cut = cut_tokenizer(model.tokenize, text_cfg, len(embedding_VW), chain(first, remaining))
    model_cfg = merge_config(model.config["model_cfg"], {"text_cfg": cut.settings})
    if not model.tokenizer_files:  # settings of open_clip's own tokenizer mean nothing to the new one
        model_cfg["text_cfg"]["tokenizer_kwargs"] = cut.settings["tokenizer_kwargs"]
    made = assemble_model(model.name, {**model.config, "model_cfg": model_cfg}, cut.files)
    made.net.load_state_dict(state | {names[0]: embedding_VW[torch.tensor(cut.source_ids)]})
    _compare_texts(model, made, cut, first)
    removed = embedding_VW.numel() - len(cut.source_ids) * embedding_VW.shape[1]
    counts = {"tokens": len(cut.source_ids), "of": len(embedding_VW), "words": cut.num_words}
    return made, counts | {"removed_params": removed}


def _compare_texts(whole: ClipModel, made: ClipModel, cut: CutTokenizer, texts: list[str]) -> None:
    """Check that whole texts, with their start, end and padding, keep their tokens.

    Raises:
        UsageError: a text has other tokens.
    """
    source_ids = torch.tensor(cut.source_ids)
    for text in _find_changed(texts, source_ids[made.tokenize(texts)], whole.tokenize(texts)):
        raise UsageError(
            f"student.vocabulary: the tokenizer of {whole.name} cannot be cut: {text!r} would have other tokens"
        )


def _find_changed(texts: list[str], found_BT: torch.Tensor, wanted_BT: torch.Tensor) -> Iterator[str]:
    yield from (text for text, same in zip(texts, (found_BT == wanted_BT).all(1).tolist(), strict=True) if not same)
