"""Two models on the same images: how sure is it that one is better?

N images
"""

from math import exp, lgamma, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z_95 = 1.959963984540054


class PairedDrop(NamedTuple):
    """What top-1 loses from one model to another on the same images."""

    drop: float
    """Fraction of the images, positive where the second model is worse."""

    low: float
    high: float
    """Its 95 % interval."""

    p: float
    """McNemar's exact p: how often chance alone would part two equal models at least so far."""


def paired_drop(first_right_N: NDArray[np.bool_], second_right_N: NDArray[np.bool_]) -> PairedDrop:
    """From which images each of two models gets right.

    The interval is Agresti and Min's, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24 (2005): Wald's, with half an image added to each of the four cells.

    Raises: ValueError if the two were not asked about the same images.
    """
    if first_right_N.shape != second_right_N.shape or not len(first_right_N):
        raise ValueError(f"expected the same images, got {first_right_N.shape} and {second_right_N.shape}")
    n = len(first_right_N)
    only_first = int((first_right_N & ~second_right_N).sum())
    only_second = int((second_right_N & ~first_right_N).sum())
    apart, together, total = only_first - only_second, only_first + only_second + 1, n + 2
    half = _Z_95 * sqrt(together - apart**2 / total) / total
    center = apart / total
    return PairedDrop(apart / n, center - half, center + half, mcnemar(only_first, only_second))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p of McNemar's test (Psychometrika 12, 1947), from the images that only one gets right.

    Were the models equal, each of these would be as likely either's: p = 2 P(X <= min), X binomial(n, 1/2), at most 1.
    """
    n = only_first + only_second
    tail = sum(
        exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2))
        for k in range(min(only_first, only_second) + 1)
    )
    return min(1.0, 2 * tail)
