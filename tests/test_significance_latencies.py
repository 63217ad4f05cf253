"""Two latencies are told apart by their processes: against every order there is, and what few processes cannot show."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.significance import MAX_P, MIN_TURNS, differ_significantly, rank_sum, signed_rank


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
    false = [differ_significantly(*random.lognormal(0, 0.1, (2, processes)).tolist()) for _ in range(draws)]
    assert np.mean(false) < MAX_P + 0.015  # three standard errors of 2,000 draws
    first = [1.0 + 0.001 * i for i in range(processes)]
    second = [1.1 * value for value in first]
    second[0], first[3] = 0.7, 1.6  # each met a moment of another machine
    assert differ_significantly(first, second)


@pytest.mark.parametrize(("processes", "apart"), [(1, False), (2, False), (3, True), (4, True)])
def test_few_processes_must_be_apart_altogether(processes: int, apart: bool) -> None:
    first = [1.0 + i for i in range(processes)]
    second = [100.0 + i for i in range(processes)]
    assert differ_significantly(first, second) == apart
    assert not differ_significantly(first, [*second[:-1], 0.5])


def by_every_sign(first: list[float], second: list[float]) -> float:
    """The definition: of all ways to deal the turns' signs, how many favour a side at least so far."""
    ratios = [
        (max(pair) / min(pair), pair[1] > pair[0]) for pair in zip(first, second, strict=True) if len({*pair}) > 1
    ]
    ranks = [sum(r < ratio for r, _ in ratios) + (sum(r == ratio for r, _ in ratios) + 1) / 2 for ratio, _ in ratios]
    found = sum(rank for rank, (_, slower) in zip(ranks, ratios, strict=True) if slower)
    smaller = min(found, sum(ranks) - found)
    sums = [
        sum(rank for rank, slower in zip(ranks, signs, strict=True) if slower)
        for signs in product((0, 1), repeat=len(ranks))
    ]
    return min(1.0, 2 * sum(total <= smaller for total in sums) / len(sums))


turns = st.lists(st.tuples(st.integers(1, 8).map(float), st.integers(1, 8).map(float)), min_size=1, max_size=8)


@given(turns)
def test_signed_rank_is_the_share_of_signs(pairs: list[tuple[float, float]]) -> None:
    first, second = (list(side) for side in zip(*pairs, strict=True))
    assert math.isclose(signed_rank(first, second), by_every_sign(first, second))
    assert math.isclose(signed_rank(first, second), signed_rank(second, first))


def test_turns_see_through_a_machine_that_drifts() -> None:
    random = np.random.default_rng(0)
    drift = np.exp(0.2 * np.sin(np.arange(12)))  # a fifth up and down
    pairs = drift * random.lognormal(0, 0.02, (200, 2, 12))
    same = [differ_significantly(*pair.tolist(), in_turns=True) for pair in pairs]
    slowed = [differ_significantly(*(pair * [[1], [1.1]]).tolist(), in_turns=True) for pair in pairs]
    unpaired = [differ_significantly(*(pair * [[1], [1.1]]).tolist()) for pair in pairs]
    assert np.mean(same) < MAX_P + 0.05  # three standard errors of 200 draws
    assert np.mean(slowed) > 0.99 > 0.5 > np.mean(unpaired)


def test_few_turns_are_held_against_each_other_as_processes() -> None:
    first = [1.0, 1.1, 1.2, 1.3, 1.4]
    assert len(first) < MIN_TURNS
    second = [value + 1 for value in first]
    assert signed_rank(first, second) > MAX_P
    assert differ_significantly(first, second, in_turns=True)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("in_turns", [True, False])
def test_a_latency_that_is_no_positive_number_is_never_compared(broken: float, in_turns: bool) -> None:
    """Every rank of NaN is the lowest, so it would be significantly the fastest."""
    same = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    for pair in (([broken] * 6, same), (same, [*same[:-1], broken])):
        with pytest.raises(ValueError, match="expected positive latencies"):
            differ_significantly(*pair, in_turns=in_turns)
