"""Do two latencies differ?  Asked of the medians of fresh processes, which are independent; single queries are not.

F processes of the first model   S of the second
"""

from collections.abc import Sequence
from math import comb

MIN_PROCESSES = 3
MAX_P = 0.05
"""How often two equal models may be taken for different."""


def told_apart(first_F: Sequence[float], second_S: Sequence[float]) -> bool:
    """Whether chance would part two equal models so far in at most MAX_P of all cases.

    Three processes a side cannot show that: there one side must be wholly below the other, a chance of 1 in 10.  Fewer
    tell nothing apart.
    """
    if min(len(first_F), len(second_S)) < MIN_PROCESSES:
        return False
    least = 2 / comb(len(first_F) + len(second_S), len(first_F))
    return rank_sum(first_F, second_S) <= max(MAX_P, least)


def rank_sum(first_F: Sequence[float], second_S: Sequence[float]) -> float:
    """The two-sided exact p of the rank-sum test (Wilcoxon, Biometrics Bulletin 1, 1945; Mann and Whitney, 1947).

    U counts the pairs of a process of each in which the first's is the larger, ties half.  Were the models equal, all
    orders of the processes would be as likely: p = 2 P(U <= the smaller of what was found and its mirror), at most 1.
    """
    f, s = len(first_F), len(second_S)
    found = sum((one > other) + (one == other) / 2 for one in first_F for other in second_S)
    smaller = min(found, f * s - found)
    orders = [[1] + [0] * (f * s) for _ in range(f + 1)]  # by how many of the first are placed, and U
    for placed_s in range(1, s + 1):
        for placed_f in range(1, f + 1):  # the largest so far is the second's, or the first's, above all placed_s
            above = orders[placed_f - 1]
            orders[placed_f] = [
                orders[placed_f][u] + (above[u - placed_s] if u >= placed_s else 0) for u in range(f * s + 1)
            ]
    total = comb(f + s, f)
    return min(1.0, 2 * sum(count for u, count in enumerate(orders[f]) if u <= smaller) / total)
