"""Do two latencies differ?  Asked of the medians of fresh processes, which are independent; single queries are not.

F processes of the first model   S of the second
"""

from collections.abc import Sequence
from itertools import groupby
from math import comb

MIN_PROCESSES = 3
MIN_TURNS = 6
"""From so many on, all turns for the same side are beyond chance: 2 / 2^6."""

MAX_P = 0.05
"""How often two equal models may be taken for different."""


def told_apart(first_F: Sequence[float], second_S: Sequence[float], *, in_turns: bool = False) -> bool:
    """Whether chance would part two equal models so far in at most MAX_P of all cases.

    `in_turns` says that the processes of the two took turns: then each is held against the one that ran beside it,
    because a machine drifts further in a minute than in a second.  Fewer than MIN_TURNS could not show anything so.
    Three processes a side cannot either: there one side must be wholly below the other, a chance of 1 in 10.  Fewer
    tell nothing apart.
    """
    if min(len(first_F), len(second_S)) < MIN_PROCESSES:
        return False
    if in_turns and len(first_F) == len(second_S) >= MIN_TURNS:
        return signed_rank(first_F, second_S) <= MAX_P
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


def signed_rank(first_T: Sequence[float], second_T: Sequence[float]) -> float:
    """The two-sided exact p of the signed-rank test over T turns (Wilcoxon, Biometrics Bulletin 1, 1945).

    Turns are ranked by the slower over the faster of the two; W sums the ranks of those in which the second was slower.
    Equal turns are left out, ties share their mean rank.  Were the models equal, each rank would be as likely
    on either side: p = 2 P(W <= the smaller of what was found and its mirror), at most 1.
    """
    pairs = zip(first_T, second_T, strict=True)
    turns = sorted((max(one, other) / min(one, other), other > one) for one, other in pairs if one != other)
    found, placed = 0, 0
    twice_ranks: list[int] = []
    for _, tied in groupby(turns, key=lambda turn: turn[0]):
        slower = [second_is_slower for _, second_is_slower in tied]
        twice_rank = 2 * placed + 1 + len(slower)  # the mean rank may be half a whole one
        found += twice_rank * sum(slower)
        twice_ranks += [twice_rank] * len(slower)
        placed += len(slower)
    ways = [1]  # to reach each sum
    for twice_rank in twice_ranks:
        ways = [a + b for a, b in zip([*ways, *[0] * twice_rank], [*[0] * twice_rank, *ways], strict=True)]
    smaller = min(found, sum(twice_ranks) - found)
    return min(1.0, 2 * sum(ways[: smaller + 1]) / sum(ways))
