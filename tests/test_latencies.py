"""Two latencies are told apart by their processes: against every order there is, and what few processes cannot show."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.latencies import MAX_P, rank_sum, told_apart


def by_every_order(first: list[float], second: list[float]) -> float:
    """The definition: of all ways to deal the ranks, how many part the sides at least so far."""
    f, s = len(first), len(second)
    found = sum((a > b) + (a == b) / 2 for a in first for b in second)
    smaller = min(found, f * s - found)
    below = 0
    for places in combinations(range(f + s), f):
        others = [place for place in range(f + s) if place not in places]
        below += sum(a > b for a in places for b in others) <= smaller
    return min(1.0, 2 * below / math.comb(f + s, f))


values = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=6)


@given(values, values)
def test_rank_sum_is_the_share_of_orders(first: list[float], second: list[float]) -> None:
    assert math.isclose(rank_sum(first, second), by_every_order(first, second))
    assert math.isclose(rank_sum(first, second), rank_sum(second, first))


def test_equal_models_are_rarely_told_apart_and_one_outlier_hides_nothing() -> None:
    random = np.random.default_rng(0)
    processes, draws = 10, 2000
    false = [told_apart(*random.lognormal(0, 0.1, (2, processes)).tolist()) for _ in range(draws)]
    assert np.mean(false) < MAX_P + 0.015  # three standard errors of 2,000 draws
    first = [1.0 + 0.001 * i for i in range(processes)]
    second = [1.1 * value for value in first]
    second[0], first[3] = 0.7, 1.6  # each met a moment of another machine
    assert told_apart(first, second)


@pytest.mark.parametrize(("processes", "apart"), [(1, False), (2, False), (3, True), (4, True)])
def test_few_processes_must_be_apart_altogether(processes: int, apart: bool) -> None:
    first = [1.0 + i for i in range(processes)]
    second = [100.0 + i for i in range(processes)]
    assert told_apart(first, second) == apart
    assert not told_apart(first, [*second[:-1], 0.5])
