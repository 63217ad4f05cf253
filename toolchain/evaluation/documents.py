"""The documents that evaluation writes: evaluation.json of one model, and the scores of several models side by side.

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
    """Images of the set."""


class Unreadable(TypedDict):
    """Images that cannot be read and count as wrong."""

    n: int
    first: list[str]
    """The first few, in words."""


class SetScores(_Accuracy, total=False):
    """A model's scores on one set."""

    mean_per_class_recall: float
    """Sets of classes only."""

    unreadable: Unreadable
    """Absent if every image can be read."""

    retrieval: dict[str, float]
    """Recall by direction and rank, as text_to_image_r5; name_to_image_r5 if each class has one image."""


class Evaluation(TypedDict):
    """evaluation.json."""

    headline: str
    sets: dict[str, SetScores]
    """By the sets' names."""


class _Scored(TypedDict):
    model: str
    sets: dict[str, SetScores]


class EvaluatedModel(_Scored, total=False):
    against_first: dict[str, dict[str, Any]]
    """By set, how the top-1 differs from the first model's (`significance.paired_drop`); absent of the first."""


class ModelComparison(TypedDict):
    """The document of `clipkd evaluate`."""

    headline: str
    models: list[EvaluatedModel]
