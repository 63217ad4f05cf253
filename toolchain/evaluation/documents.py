"""Define the documents that evaluation writes: evaluation.json of one model, and the comparison of several models.

Fractions are in [0, 1]; `_low` and `_high` bound the 95 % Wilson interval.
"""

from typing import Any, TypedDict


class _Accuracy(TypedDict):
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    top5_low: float
    top5_high: float
    n: int
    """Number of images in the set."""


class Unreadable(TypedDict):
    """Images that cannot be read and count as wrong."""

    n: int
    first: list[str]
    """Names of the first few."""


class SetScores(_Accuracy, total=False):
    """A model's scores on one set."""

    mean_per_class_recall: float
    """Present only for sets of classes."""

    unreadable: Unreadable
    """Present only if some images cannot be read."""

    passed_over: dict[str, int]
    """Number of files beside the images that are none, by suffix; present only if there are some."""

    retrieval: dict[str, float]
    """Recall by direction and rank, such as text_to_image_r5; name_to_image_r5 if each class has one image."""


class Evaluation(TypedDict):
    """The document evaluation.json."""

    headline: str
    sets: dict[str, SetScores]
    """Scores by set name."""


class _Scored(TypedDict):
    model: str
    sets: dict[str, SetScores]


class EvaluatedModel(_Scored, total=False):
    against_first: dict[str, dict[str, Any]]
    """By set, the difference in top-1 from the first model (`significance.paired_drop`); absent for the first model."""


class ModelComparison(TypedDict):
    """The document that `clipkd evaluate` writes."""

    headline: str
    models: list[EvaluatedModel]
