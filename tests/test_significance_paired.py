"""Paired comparison against its definition: all outcomes of the images on which two models differ."""

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.significance import mcnemar, paired_drop

ROUNDING = 1e-12
MISSED = 0.06  # a 95 % interval may miss a little more often than it says where counts are small


@pytest.mark.parametrize(("only_first", "only_second"), list(product(range(7), repeat=2)))
def test_mcnemar_counts_outcomes_at_least_as_uneven(only_first: int, only_second: int) -> None:
    n = only_first + only_second
    outcomes = [sum(outcome) for outcome in product((0, 1), repeat=n)]
    as_uneven = sum(abs(2 * firsts - n) >= abs(only_first - only_second) for firsts in outcomes)
    assert mcnemar(only_first, only_second) == pytest.approx(as_uneven / 2**n, abs=ROUNDING)


def test_mcnemar_of_many_images_does_not_overflow() -> None:
    assert mcnemar(25_000, 25_000) == 1
    assert 0 <= mcnemar(30_000, 20_000) < 1e-300
    exact = 2 * sum(comb(1000, k) for k in range(451)) / 2**1000
    assert mcnemar(450, 550) == pytest.approx(exact, rel=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_the_drop_is_the_difference_and_lies_in_its_interval(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    found = paired_drop(first, second)
    assert found.drop == pytest.approx(first.mean() - second.mean(), abs=ROUNDING)
    assert found.low <= found.drop <= found.high or len(pairs) < 4
    other = paired_drop(second, first)
    assert (-other.drop, -other.high, -other.low, other.p) == pytest.approx(found, abs=ROUNDING)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    n, trials, missed = 300, 2000, 0
    both, first_only, second_only = 0.5, 0.10, 0.05
    for _ in range(trials):
        cell_N = random.choice(4, n, p=[both, first_only, second_only, 1 - both - first_only - second_only])
        found = paired_drop(cell_N <= 1, (cell_N == 0) | (cell_N == 2))
        missed += not found.low <= first_only - second_only <= found.high
    assert missed / trials <= MISSED


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="the same images"):
        paired_drop(np.ones(3, bool), np.ones(4, bool))
