"""Zero-shot accuracy and retrieval recall of anything that encodes images and texts, in numpy alone.

An evaluation set holds one image per class: image k shows `names[k]`, so zero-shot classification ranks the classes
of every image, and retrieval ranks names for images and images for names.

    K classes, and images   P prompt templates   D feature width   C rows of a chunk
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import UsageError

UNRANKED = np.iinfo(np.int32).max
"""The rank of a sample whose own score is NaN or infinite: outside of every top k, however few classes there are."""

TIE = 1e-6
"""Cosines closer than this are equal: float32 products of the same vectors differ by about 1e-7 from place to place
of one matrix product, and a constant encoder must not win ties by rounding."""

_CHUNK = 256
_Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


class Encoders(Protocol):
    """A model as evaluation sees it; features are [B, D], float32, of unit norm."""

    def encode_images(self, images: NDArray[np.uint8], /) -> NDArray[np.float32]: ...

    def encode_texts(self, texts: list[str], /) -> NDArray[np.float32]: ...


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, within [0, 1] and never empty; (0, 1) for n = 0.

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n) with p = successes / n: E. B. Wilson, "Probable
    Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    if n == 0:
        return 0.0, 1.0
    p, z2_n = successes / n, _Z_95**2 / n
    center = (p + z2_n / 2) / (1 + z2_n)
    half = _Z_95 * sqrt(p * (1 - p) / n + z2_n / (4 * n)) / (1 + z2_n)
    # exact at the ends, where rounding would leave 1e-17 below or above the proportion itself
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def class_embeddings(encoders: Encoders, names: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
    """[K, D]: per class the mean over templates of its prompts' unit features, scaled back to unit norm.

    CLIP (arXiv:2103.00020), section "Prompt Engineering and Ensembling".  A class whose mean is zero becomes NaN.
    """
    return _prompt_features(encoders, names, templates, lambda _: None)[1]


def ranks(query_features_QD: NDArray[np.float32], candidate_features_KD: NDArray[np.float32]) -> NDArray[np.int32]:
    """[Q]: how many candidates score at least as high as the right one, which for query q is candidate q.

    0 is best; ties count against the model, within `TIE`.  Scores that are NaN or infinite count as ahead of the right
    one, and where the right one is such a score the rank is `UNRANKED`.  Memory grows with K, never with Q K.
    """
    rank_Q = np.empty(len(query_features_QD), np.int32)
    for start in range(0, len(rank_Q), _CHUNK):
        with np.errstate(all="ignore"):  # features that are not finite are answered below, not warned about
            scores_CK = query_features_QD[start : start + _CHUNK] @ candidate_features_KD.T
        right_C = scores_CK[np.arange(len(scores_CK)), np.arange(start, start + len(scores_CK))]
        # written as "not behind", so that NaN counts as ahead
        behind_CK = np.isfinite(scores_CK) & (scores_CK < right_C[:, None] - np.float32(TIE))
        ahead_C = (~behind_CK).sum(1) - 1  # the right one is not behind itself
        rank_Q[start : start + _CHUNK] = np.where(np.isfinite(right_C), ahead_C, UNRANKED)
    return rank_Q


def evaluate(
    encoders: Encoders,
    sets: Mapping[str, tuple[NDArray[np.uint8], Sequence[str]]],
    templates: Sequence[str],
    *,
    headline: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The content of evaluation.json, and per set `<set>_rank` [K], the rank of every image's class.

    A set is its images [K, H, W, 3] and its K names.  Zero-shot scores use the class embeddings of all templates;
    retrieval uses the first template as the caption.  Fractions are in [0, 1], intervals are 95 %.
    `on_progress(done, total)` counts images and prompts.

    Raises: UsageError for a set that cannot be scored, templates without a place for the name, an unknown headline.
    """
    _check(sets, templates, headline)
    total = sum(len(names) * (1 + len(templates)) for _, names in sets.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    results: dict[str, Any] = {}
    samples: dict[str, NDArray[Any]] = {}
    for set_name, (images_KHWC, names) in sets.items():
        caption_features_KD, class_features_KD = _prompt_features(encoders, names, templates, advance)
        image_features_KD = _image_features(encoders, images_KHWC, advance)
        rank_K = ranks(image_features_KD, class_features_KD)
        results[set_name] = {
            **_accuracy(rank_K),
            "retrieval": {
                **_recalls("name_to_image", ranks(caption_features_KD, image_features_KD)),
                **_recalls("image_to_name", ranks(image_features_KD, caption_features_KD)),
            },
        }
        samples[f"{set_name}_rank"] = rank_K
    return {"headline": headline, "sets": results}, samples


def _check(
    sets: Mapping[str, tuple[NDArray[np.uint8], Sequence[str]]], templates: Sequence[str], headline: str
) -> None:
    if headline not in sets:
        raise UsageError(f"evaluate: the headline set is {headline!r}, the sets are: {', '.join(sets) or 'none'}")
    if not templates:
        raise UsageError("evaluate: no prompt template; a template has {} where the name goes, '{}' at the least")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"evaluate: template {template!r} has no {{}} where the name goes")
    for set_name, (images_KHWC, names) in sets.items():
        if len(images_KHWC) != len(names) or not names:
            raise UsageError(
                f"evaluate: set {set_name!r} has {len(images_KHWC)} images and {len(names)} names, "
                "expected one image per name and at least one"
            )
        name, count = Counter(names).most_common(1)[0]
        if count > 1:  # their scores tie by construction: none of them could ever be right
            raise UsageError(f"evaluate: set {set_name!r} has {count} classes named {name!r}, expected distinct names")


def _prompt_features(
    encoders: Encoders, names: Sequence[str], templates: Sequence[str], advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of the first template's prompts, and class embeddings, both [K, D]."""
    per_template_PKD = (
        _text_features(encoders, [template.format(name) for name in names], advance) for template in templates
    )
    caption_features_KD = next(per_template_PKD)
    sum_KD = caption_features_KD.astype(np.float64)
    for features_KD in per_template_PKD:
        sum_KD += features_KD
    with np.errstate(all="ignore"):  # a zero or broken sum becomes NaN, which never scores
        class_features_KD = sum_KD / np.linalg.norm(sum_KD, axis=1, keepdims=True)
    return caption_features_KD, class_features_KD.astype(np.float32)


def _text_features(encoders: Encoders, texts: Sequence[str], advance: Callable[[int], None]) -> NDArray[np.float32]:
    chunks: list[NDArray[np.float32]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        chunks.append(np.asarray(encoders.encode_texts(chunk), np.float32))
        advance(len(chunk))
    return np.concatenate(chunks)


def _image_features(
    encoders: Encoders, images_KHWC: NDArray[np.uint8], advance: Callable[[int], None]
) -> NDArray[np.float32]:
    chunks: list[NDArray[np.float32]] = []
    for start in range(0, len(images_KHWC), _CHUNK):
        chunk_CHWC = images_KHWC[start : start + _CHUNK]
        chunks.append(np.asarray(encoders.encode_images(chunk_CHWC), np.float32))
        advance(len(chunk_CHWC))
    return np.concatenate(chunks)


def _accuracy(rank_K: NDArray[np.int32]) -> dict[str, float | int]:
    accuracy: dict[str, float | int] = {}
    for k in (1, 5):
        hits = int((rank_K < k).sum())
        low, high = wilson(hits, len(rank_K))
        accuracy |= {f"top{k}": hits / len(rank_K), f"top{k}_low": low, f"top{k}_high": high}
    return accuracy | {"n": len(rank_K)}


def _recalls(direction: str, rank_K: NDArray[np.int32]) -> dict[str, float]:
    return {f"{direction}_r{k}": float((rank_K < k).mean()) for k in (1, 5, 10)}
