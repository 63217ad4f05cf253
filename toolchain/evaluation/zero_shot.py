"""Compute zero-shot accuracy and retrieval recall of any image and text encoder, with numpy only.

Classification ranks a set's classes for every image; retrieval ranks captions for images and images for captions.  Both
count how many wrong candidates score at least as high as the best right one (`ranks`).  Images are decoded and scores
computed in chunks, so memory grows with the features, never with the square of a set.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.errors import ClipkdError, UsageError
from toolchain.evaluation.documents import Evaluation, SetScores
from toolchain.evaluation.eval_set import EvalSet
from toolchain.progress import Progress, no_progress
from toolchain.significance import wilson

UNRANKED = np.iinfo(np.int32).max
"""The rank of a sample whose own score is NaN or infinite; it is outside every top k, however few classes there are."""

TIE = 1e-6
"""Cosines closer than this count as equal.  Float32 products of the same vectors differ by about 1e-7 within one matrix
product, and a constant encoder must not win ties by rounding."""

MAX_UNREADABLE = 0.01
"""Largest share of a set's images that may be unreadable and count as wrong; with more, the score would describe
another set."""

BLANK = Image.new("RGB", (64, 64))
"""Used in place of an image that cannot be read."""

_CHUNK = 256
_NAMED_UNREADABLE = 5


class Encoders(Protocol):
    """The interface of a model to evaluation; features are [B, D], float32, of unit norm."""

    def preprocess(self, image: Image.Image, /) -> NDArray[np.float32]:
        """Return pixel_values [3, H, W] from the model's own evaluation transform."""
        ...

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32], /) -> NDArray[np.float32]: ...

    def encode_texts(self, texts: list[str], /) -> NDArray[np.float32]: ...


def class_embeddings(encoders: Encoders, names: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
    """Return [K, D] for each class the mean over templates of its prompts' unit features, normalized to unit norm.

    Source: CLIP (arXiv:2103.00020), section "Prompt Engineering and Ensembling".  A class whose mean is zero becomes
    NaN.
    """
    return _prompt_features(encoders, names, templates, lambda _: None)[1]


def ranks(
    query_features_QD: NDArray[np.float32],
    candidate_features_KD: NDArray[np.float32],
    query_group_Q: NDArray[np.int64] | None = None,
    candidate_group_K: NDArray[np.int64] | None = None,
    alike_K: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Return [Q] the number of wrong candidates that score at least as high as the best right one.

    Candidates in the query's group are right.  Rank 0 is best; ties within `TIE` count against the model.  NaN or
    infinite scores count as ahead of the right candidate; if no right candidate has a finite score, the rank is
    `UNRANKED`.  Absent groups are 0, 1, 2, ...: the only right candidate of query q is q.  Candidates with equal
    `alike_K` are the same text; among them, only earlier ones can be ahead of later ones.  Memory grows with K, never
    with Q K.
    """
    query_group_Q = np.arange(len(query_features_QD)) if query_group_Q is None else query_group_Q
    candidate_group_K = np.arange(len(candidate_features_KD)) if candidate_group_K is None else candidate_group_K
    rank_Q = np.empty(len(query_features_QD), np.int32)
    for start in range(0, len(rank_Q), _CHUNK):
        with np.errstate(all="ignore"):  # non-finite features are handled below
            scores_CK = query_features_QD[start : start + _CHUNK] @ candidate_features_KD.T
        right_CK = query_group_Q[start : start + _CHUNK, None] == candidate_group_K
        finite_CK = np.isfinite(scores_CK)
        best_C1 = np.where(right_CK & finite_CK, scores_CK, -np.inf).max(1, keepdims=True)
        # "not behind" rather than "ahead", because comparisons with NaN are false and NaN must count as ahead
        ahead_CK = ~(right_CK | (finite_CK & (scores_CK < best_C1 - np.float32(TIE))))
        if alike_K is not None:
            place_C1 = right_CK.argmax(1)[:, None]
            ahead_CK &= ~((alike_K == alike_K[place_C1]) & (np.arange(len(alike_K)) > place_C1))
        rank_Q[start : start + _CHUNK] = np.where(np.isfinite(best_C1[:, 0]), ahead_CK.sum(1), UNRANKED)
    return rank_Q


def nearest(
    query_features_QD: NDArray[np.float32], candidate_features_KD: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return [Q] the highest-scoring candidate of each query (the first among equals), and [Q] its score.

    They are -1 and NaN where no score is finite.  Memory grows with K, never with Q K.
    """
    best_Q = np.empty(len(query_features_QD), np.int32)
    score_Q = np.empty(len(query_features_QD), np.float32)
    for start in range(0, len(best_Q), _CHUNK):
        with np.errstate(all="ignore"):  # as in `ranks`
            scores_CK = query_features_QD[start : start + _CHUNK] @ candidate_features_KD.T
        scores_CK = np.where(np.isfinite(scores_CK), scores_CK, -np.inf)
        best_C = scores_CK.argmax(1)
        score_C = scores_CK[np.arange(len(best_C)), best_C]
        best_Q[start : start + _CHUNK] = np.where(np.isfinite(score_C), best_C, -1)
        score_Q[start : start + _CHUNK] = np.where(np.isfinite(score_C), score_C, np.nan)
    return best_Q, score_Q


def image_ranks(
    data: EvalSet,
    image_features_ND: NDArray[np.float32],
    text_features_KD: NDArray[np.float32],
    unreadable_N: NDArray[np.bool_],
) -> NDArray[np.int32]:
    """Return [N] the rank of each image's class, or of its best caption; `UNRANKED` for an unreadable image.

    Raises:
        ClipkdError: more images are unreadable than `MAX_UNREADABLE` allows.
    """
    unreadable = np.flatnonzero(unreadable_N)
    if len(unreadable) > MAX_UNREADABLE * len(data):
        named = ", ".join(data.describe_unreadable(index) for index in unreadable[:_NAMED_UNREADABLE].tolist())
        raise ClipkdError(
            f"evaluation set {data.name}: {len(unreadable)} of {len(data)} images cannot be read, more than "
            f"{MAX_UNREADABLE:.0%}: {named}{', ...' if len(unreadable) > _NAMED_UNREADABLE else ''}. "
            "Replace them, or remove them from the set"
        )
    rank_N = ranks(image_features_ND, text_features_KD, data.image_group_N, data.text_group_K, _alike(data))
    rank_N[unreadable_N] = UNRANKED
    return rank_N


def evaluate(
    encoders: Encoders,
    sets: Sequence[EvalSet],
    *,
    headline: str,
    progress: Progress = no_progress,
    what: str = "scoring",
) -> tuple[Evaluation, dict[str, NDArray[Any]]]:
    """Return the content of evaluation.json, and the ranks and answers it was computed from.

    For paired tests, each set has `<set>_rank` [N], the rank of every image's class or best caption, and, if it has
    retrieval scores, `<set>_to_image_rank` [K], the rank of every text's image.  The headline set also has `<set>_top1`
    [N], the text that scores highest for each image (-1 if none), and its cosine `<set>_top1_cosine` [N].  Top-1 of a
    set of captions is the share of images whose highest-scoring caption is one of their own.  Zero-shot scores use the
    class embeddings of all templates; retrieval of glyphs uses the first template as the caption.  Fractions are in
    [0, 1], intervals are 95 %.  `progress` counts images and prompts under the label `what`.

    Raises:
        UsageError: the headline is not one of the sets.
        ClipkdError: too many images of a set cannot be read, or a feature is NaN or infinite.
    """
    if headline not in [data.name for data in sets]:
        names = ", ".join(data.name for data in sets) or "none"
        raise UsageError(f"evaluate: the headline set is {headline!r}, the sets are: {names}")
    total = sum(len(data) + len(data.texts) * len(data.templates) for data in sets)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    results: dict[str, SetScores] = {}
    samples: dict[str, NDArray[Any]] = {}
    for data in sets:
        results[data.name], found = _score_set(encoders, data, advance, with_answers=data.name == headline)
        samples |= {f"{data.name}_{kind}": values for kind, values in found.items()}
    return {"headline": headline, "sets": results}, samples


def _score_set(
    encoders: Encoders, data: EvalSet, advance: Callable[[int], None], *, with_answers: bool
) -> tuple[SetScores, dict[str, NDArray[Any]]]:
    """Return the scores of one set, and its ranks by kind; `with_answers` adds the answer to every image."""
    caption_features_KD, class_features_KD = _prompt_features(encoders, data.texts, data.templates, advance)
    image_features_ND, unreadable_N = _image_features(encoders, data, advance)
    text_features_KD = class_features_KD if data.has_classes else caption_features_KD
    rank_N = image_ranks(data, image_features_ND, text_features_KD, unreadable_N)
    scores = accuracy(rank_N)
    samples: dict[str, NDArray[Any]] = {"rank": rank_N}
    if with_answers:
        top1_N, cosine_N = nearest(image_features_ND, text_features_KD)
        top1_N[unreadable_N], cosine_N[unreadable_N] = -1, np.nan
        samples |= {"top1": top1_N, "top1_cosine": cosine_N}
    if data.has_classes:
        scores["mean_per_class_recall"] = mean_per_class_recall(rank_N, data.image_group_N)
    if unreadable_N.any():
        first = np.flatnonzero(unreadable_N)[:_NAMED_UNREADABLE].tolist()
        scores["unreadable"] = {"n": int(unreadable_N.sum()), "first": [data.label(index) for index in first]}
    if data.passed_over:
        scores["passed_over"] = dict(data.passed_over)
    if data.one_image_per_class or not data.has_classes:
        to_image_K = ranks(caption_features_KD, image_features_ND, data.text_group_K, data.image_group_N)
        to_image_K[np.isin(data.text_group_K, data.image_group_N[unreadable_N])] = UNRANKED
        to_text_N = image_ranks(data, image_features_ND, caption_features_KD, unreadable_N)
        text = "name" if data.has_classes else "text"
        scores["retrieval"] = {**_recalls(f"{text}_to_image", to_image_K), **_recalls(f"image_to_{text}", to_text_N)}
        samples["to_image_rank"] = to_image_K
    return scores, samples


def require_finite(tower: str, features_BD: NDArray[np.float32], name: Callable[[int], str]) -> None:
    """Check features before they are scored; `name` returns what a row was computed from.

    Raises:
        ClipkdError: a feature is NaN or infinite: a score of such a model would mean nothing.
    """
    wrong = np.flatnonzero(~np.isfinite(features_BD).all(1))
    if len(wrong):
        raise ClipkdError(
            f"the model's {tower} features are NaN or infinite for {len(wrong)} of {len(features_BD)} inputs, the "
            f"first: {name(int(wrong[0]))}. It cannot be scored. Where it is not fp32, its precision overflows: use "
            "another; where it is, its weights are wrong"
        )


def accuracy(rank_N: NDArray[np.int32]) -> SetScores:
    """Return top1 and top5 with their 95 % intervals, and n."""
    top1, top5 = int((rank_N < 1).sum()), int((rank_N < 5).sum())
    (top1_low, top1_high), (top5_low, top5_high) = wilson(top1, len(rank_N)), wilson(top5, len(rank_N))
    return {
        "top1": top1 / len(rank_N),
        "top1_low": top1_low,
        "top1_high": top1_high,
        "top5": top5 / len(rank_N),
        "top5_low": top5_low,
        "top5_high": top5_high,
        "n": len(rank_N),
    }


def mean_per_class_recall(rank_N: NDArray[np.int32], label_N: NDArray[np.int64]) -> float:
    """Return the mean of per-class accuracy over the classes that have images."""
    count_K = np.bincount(label_N)
    right_K = np.bincount(label_N, weights=rank_N < 1)
    return float((right_K[count_K > 0] / count_K[count_K > 0]).mean())


def _alike(data: EvalSet) -> NDArray[np.int64] | None:
    """Return [K] the first class with each class's name; None if no name repeats."""
    if not data.repeats_names or max(Counter(data.texts).values()) == 1:
        return None
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, k) for k, text in enumerate(data.texts)])


def _prompt_features(
    encoders: Encoders, names: Sequence[str], templates: Sequence[str], advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return features of the first template's prompts, and class embeddings, both [K, D]."""
    per_template_PKD = (
        _text_features(encoders, [template.format(name) for name in names], advance) for template in templates
    )
    caption_features_KD = next(per_template_PKD)
    sum_KD = caption_features_KD.astype(np.float64)
    for features_KD in per_template_PKD:
        sum_KD += features_KD
    with np.errstate(all="ignore"):  # a zero or non-finite sum becomes NaN, which never scores
        class_features_KD = sum_KD / np.linalg.norm(sum_KD, axis=1, keepdims=True)
    return caption_features_KD, class_features_KD.astype(np.float32)


def _text_features(encoders: Encoders, texts: Sequence[str], advance: Callable[[int], None]) -> NDArray[np.float32]:
    chunks: list[NDArray[np.float32]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        features_CD = np.asarray(encoders.encode_texts(chunk), np.float32)
        require_finite("text", features_CD, lambda index, chunk=chunk: repr(chunk[index]))  # type: ignore[misc]
        chunks.append(features_CD)
        advance(len(chunk))
    return np.concatenate(chunks)


def _image_features(
    encoders: Encoders, data: EvalSet, advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return features [N, D], and a mask [N] of unreadable images, whose features are set to 0."""
    chunks: list[NDArray[np.float32]] = []
    unreadable_N = np.zeros(len(data), np.bool_)
    for start in range(0, len(data), _CHUNK):
        chosen = range(start, min(start + _CHUNK, len(data)))
        values: list[NDArray[np.float32]] = []
        for index in chosen:  # decode one image at a time, and keep only the model's input size
            image = data.image(index)
            unreadable_N[index] = image is None
            values.append(encoders.preprocess(image or BLANK))
        features_CD = np.array(encoders.encode_pixels(np.stack(values)), np.float32)
        features_CD[unreadable_N[start : chosen.stop]] = 0
        require_finite(
            "image",
            features_CD,
            lambda index, start=start: f"{data.name}, {data.label(start + index)}",  # type: ignore[misc]
        )
        chunks.append(features_CD)
        advance(len(chosen))
    return np.concatenate(chunks), unreadable_N


def _recalls(direction: str, rank_Q: NDArray[np.int32]) -> dict[str, float]:
    return {f"{direction}_r{k}": float((rank_Q < k).mean()) for k in (1, 5, 10)}
