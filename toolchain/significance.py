"""Test whether two results differ significantly: accuracies on the same images, latencies of interleaved runs."""

from collections.abc import Sequence
from itertools import groupby
from math import comb, exp, inf, lgamma, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_PROCESSES = 3
MIN_TURNS = 6
"""Least number of interleaved runs that can be significant: all six in favour of one side have p = 2 / 2^6."""

MAX_P = 0.05
"""Significance level: how often two equal models may be found different."""


def differ_significantly(first_F: Sequence[float], second_S: Sequence[float], *, in_turns: bool = False) -> bool:
    """Return True if two latencies differ at significance level MAX_P.

    `in_turns` is True if the processes of the two were interleaved.  Each is then compared with its neighbour, because
    a machine drifts more in a minute than in a second; this needs at least MIN_TURNS.  Three processes a side cannot
    reach MAX_P: there one side must be entirely below the other, a chance of 1 in 10.  With fewer, return False.

    Raises: ValueError if a latency is not a positive number; ranks of NaN would look significant.
    """
    if not all(0 < latency < inf for latency in (*first_F, *second_S)):
        raise ValueError(f"expected positive latencies, got {list(first_F)} and {list(second_S)}")
    if min(len(first_F), len(second_S)) < MIN_PROCESSES:
        return False
    if in_turns and len(first_F) == len(second_S) >= MIN_TURNS:
        return signed_rank(first_F, second_S) <= MAX_P
    least = 2 / comb(len(first_F) + len(second_S), len(first_F))
    return rank_sum(first_F, second_S) <= max(MAX_P, least)


def rank_sum(first_F: Sequence[float], second_S: Sequence[float]) -> float:
    """Return the exact two-sided p of the rank-sum test (Wilcoxon, Biometrics Bulletin 1, 1945; Mann and Whitney 1947).

    U counts the pairs of processes in which the first's is larger; ties count half.  For equal models all orders of
    the processes are equally likely: p = 2 P(U <= the smaller of the observed U and its mirror), at most 1.
    """
    f, s = len(first_F), len(second_S)
    found = sum((one > other) + (one == other) / 2 for one in first_F for other in second_S)
    smaller = min(found, f * s - found)
    orders = [[1] + [0] * (f * s) for _ in range(f + 1)]  # indexed by the number of placed values of the first, and U
    for placed_s in range(1, s + 1):
        for placed_f in range(
            1, f + 1
        ):  # the largest value so far is the second's, or it is the first's and above all placed_s
            above = orders[placed_f - 1]
            orders[placed_f] = [
                orders[placed_f][u] + (above[u - placed_s] if u >= placed_s else 0) for u in range(f * s + 1)
            ]
    total = comb(f + s, f)
    return min(1.0, 2 * sum(count for u, count in enumerate(orders[f]) if u <= smaller) / total)


def signed_rank(first_T: Sequence[float], second_T: Sequence[float]) -> float:
    """Return the two-sided exact p of the signed-rank test over T turns (Wilcoxon, Biometrics Bulletin 1, 1945).

    Turns are ranked by slower / faster; W sums the ranks of the turns in which the second was slower.  Equal turns are
    skipped, ties share their mean rank.  For equal models each rank is equally likely on either side:
    p = 2 P(W <= the smaller of the observed W and its mirror), at most 1.
    """
    pairs = zip(first_T, second_T, strict=True)
    turns = sorted((max(one, other) / min(one, other), other > one) for one, other in pairs if one != other)
    found, placed = 0, 0
    twice_ranks: list[int] = []
    for _, tied in groupby(turns, key=lambda turn: turn[0]):
        slower = [second_is_slower for _, second_is_slower in tied]
        twice_rank = 2 * placed + 1 + len(slower)  # doubled, because a mean rank may be a half
        found += twice_rank * sum(slower)
        twice_ranks += [twice_rank] * len(slower)
        placed += len(slower)
    ways = [1]  # number of ways to reach each sum
    for twice_rank in twice_ranks:
        ways = [a + b for a, b in zip([*ways, *[0] * twice_rank], [*[0] * twice_rank, *ways], strict=True)]
    smaller = min(found, sum(twice_ranks) - found)
    return min(1.0, 2 * sum(ways[: smaller + 1]) / sum(ways))


_Z_95 = 1.959963984540054


class PairedDrop(NamedTuple):
    """The top-1 drop from one model to another on the same images."""

    drop: float
    """Fraction of the images, positive where the second model is worse."""

    low: float
    high: float
    """Its 95 % interval."""

    p: float
    """McNemar's exact p: the probability that two equal models differ at least this much."""


def paired_drop(first_right_N: NDArray[np.bool_], second_right_N: NDArray[np.bool_]) -> PairedDrop:
    """Return the top-1 drop, given the images that each of two models classifies correctly.

    The interval is Agresti and Min's, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24 (2005): Wald's, with half an image added to each of the four cells.

    Raises: ValueError if the two arrays differ in length or are empty.
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
    """Return the exact two-sided p of McNemar's test (Psychometrika 12, 1947), from the images only one gets right.

    For equal models each of these is equally likely to be either's: p = 2 P(X <= min), X binomial(n, 1/2), at most 1.
    """
    n = only_first + only_second
    tail = sum(
        exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2))
        for k in range(min(only_first, only_second) + 1)
    )
    return min(1.0, 2 * tail)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion, within [0, 1] and never empty; (0, 1) for n = 0.

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n) with p = successes / n: E. B. Wilson, "Probable
    Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    if n == 0:
        return 0.0, 1.0
    p, z2_n = successes / n, _Z_95**2 / n
    center = (p + z2_n / 2) / (1 + z2_n)
    half = _Z_95 * sqrt(p * (1 - p) / n + z2_n / (4 * n)) / (1 + z2_n)
    # exact at the ends, where rounding would leave an error of 1e-17
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)
