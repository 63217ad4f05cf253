"""The double gate as a decision: what is not within the budget, or not measurably faster, is never what ships."""

import math
from dataclasses import replace
from random import Random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.pipeline.precision_verdicts import (
    MIN_PROCESSES,
    Candidate,
    Latency,
    Verdict,
    decide,
    doubts,
    too_far,
)
from export.profiling.summary import bootstrap_interval
from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION, SAFEST_FIRST
from toolchain.recipe.export import ExportSpec
from toolchain.significance import PairedDrop

MAX_DROP = 0.01
NAN = math.nan


def timed(precision: str, ms: float, half: float = 0.1, drop: float = 0.0) -> Candidate:
    lost = None if precision == REFERENCE_PRECISION else PairedDrop(drop, drop - 0.002, drop + 0.002, 0.5)
    return Candidate(precision, drop=lost, latency=Latency(ms, ms - half, ms + half))


def counts(*candidates: Candidate) -> dict[str, str]:
    return {precision: verdict.count for precision, verdict in decide(candidates, MAX_DROP).items()}


def test_the_fastest_within_the_budget_is_chosen() -> None:
    found = decide([timed("fp32", 20), timed("fp16", 12), timed("bf16", 9), timed("int8", 5)], MAX_DROP)
    assert found["int8"] == Verdict("chosen")
    assert found["fp32"] == Verdict("speed", "fp16 is measurably faster: 12 [11.9, 12.1] against 20 [19.9, 20.1] ms")
    assert found["fp16"] == Verdict("speed", "bf16 is measurably faster: 9 [8.9, 9.1] against 12 [11.9, 12.1] ms")
    assert found["bf16"] == Verdict("speed", "int8 is measurably faster: 5 [4.9, 5.1] against 9 [8.9, 9.1] ms")


def test_int8_that_does_not_pay_leaves_fp16() -> None:
    found = decide([timed("fp32", 20), timed("fp16", 12), timed("int8", 24)], MAX_DROP)
    assert found["fp16"] == Verdict("chosen")
    assert found["int8"] == Verdict(
        "speed", "not measurably faster than fp16: 24 [23.9, 24.1] against 12 [11.9, 12.1] ms"
    )


def test_int8_that_is_fast_and_wrong_is_rejected_for_its_accuracy() -> None:
    found = decide([timed("fp32", 20), timed("fp16", 12), timed("int8", 5, drop=0.0101)], MAX_DROP)
    assert found["fp16"] == Verdict("chosen")
    assert found["int8"] == Verdict("accuracy", "top-1 drops by 1.01 [0.81, 1.21] pp, more than 1 pp")


def test_intervals_that_touch_are_no_proof() -> None:
    assert counts(timed("fp32", 12, 0.3), timed("fp16", 11.5, 0.3)) == {"fp32": "chosen", "fp16": "speed"}
    assert counts(timed("fp32", 12, 0.25), timed("fp16", 11.5, 0.25)) == {"fp32": "chosen", "fp16": "speed"}
    assert counts(timed("fp32", 12, 0.2), timed("fp16", 11.5, 0.2)) == {"fp32": "speed", "fp16": "chosen"}


def test_it_is_held_against_the_one_chosen_and_not_the_one_before() -> None:
    fp32, fp16, bf16 = timed("fp32", 20), timed("fp16", 12), timed("bf16", 30)
    assert counts(fp32, fp16, bf16, timed("int8", 15))["fp16"] == "chosen", (
        "faster than bf16, which is out, is not enough"
    )
    assert counts(fp32, fp16, bf16, timed("int8", 11))["int8"] == "chosen"


def test_a_precision_that_failed_is_passed_over_with_its_reason() -> None:
    found = decide([timed("fp32", 20), Candidate("fp16", problem="SQNR 3 dB"), timed("int8", 5)], MAX_DROP)
    assert found["fp16"] == Verdict("failed", "SQNR 3 dB")
    assert found["int8"] == Verdict("chosen")


@pytest.mark.parametrize(
    "fp32", [None, Candidate("fp32", problem="it crashed"), Candidate("fp32"), timed("fp32", NAN)], ids=str
)
def test_without_fp32_nothing_is_chosen(fp32: Candidate | None) -> None:
    broken = Candidate("fp16", problem="SQNR 3 dB")
    found = decide([*([fp32] if fp32 else []), broken, Candidate("bf16"), timed("int8", 5)], MAX_DROP)
    assert {verdict.count for verdict in found.values()} == {"failed"}
    assert found["fp16"].reason == "SQNR 3 dB"
    assert found["int8"].reason == "there is no fp32 in this runtime to compare it with"
    assert all(verdict.reason for verdict in found.values())


@pytest.mark.parametrize("drop", [None, PairedDrop(NAN, NAN, NAN, NAN), PairedDrop(NAN, 0.0, 0.0, 1.0)])
def test_an_accuracy_that_is_not_known_is_not_within_the_budget(drop: PairedDrop | None) -> None:
    unknown = replace(timed("int8", 1), drop=drop)
    assert counts(timed("fp32", 20), unknown) == {"fp32": "chosen", "int8": "accuracy"}
    assert too_far(unknown, MAX_DROP) is not None


@pytest.mark.parametrize(
    "latency",
    [None, (NAN, NAN, NAN), (1.0, NAN, 1.1), (1.0, 0.9, NAN), (NAN, 0.9, 1.1), (0.0, 0.0, 0.0), (1.0, -1.0, 1.1)],
    ids=str,
)
def test_a_latency_that_is_none_is_not_faster(latency: tuple[float, float, float] | None) -> None:
    unknown = replace(timed("int8", 1), latency=latency and Latency(*latency))
    assert counts(timed("fp32", 20), unknown) == {"fp32": "chosen", "int8": "failed"}


def test_the_order_is_of_safety_and_knows_every_precision() -> None:
    (named, _) = get_args(ExportSpec.model_fields["precisions"].annotation)
    assert get_args(named) == SAFEST_FIRST
    assert set(SAFEST_FIRST) == set(PRECISIONS)
    assert list(SAFEST_FIRST[:4]) == ["fp32", "fp16", "bf16", "int8"]
    shuffled = [timed("int8", 5), timed("bf16", 12), timed("fp32", 20), timed("fp16", 12)]
    assert list(decide(shuffled, MAX_DROP)) == ["fp32", "fp16", "bf16", "int8"]
    assert counts(*shuffled[1:])["fp16"] == "chosen", "of two equals the safer"


NUMBERS = st.one_of(st.floats(0.1, 50), st.sampled_from([NAN, math.inf, 0.0, -1.0]))
DROPS = st.one_of(st.none(), st.builds(PairedDrop, *[st.one_of(st.floats(-0.1, 0.1), st.just(NAN))] * 3, st.just(0.5)))
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        precision=st.sampled_from(SAFEST_FIRST),
        problem=st.one_of(st.none(), st.just("broken")),
        drop=DROPS,
        latency=st.one_of(st.none(), st.builds(Latency, NUMBERS, NUMBERS, NUMBERS)),
    ),
    unique_by=lambda candidate: candidate.precision,
)


@given(CANDIDATES, st.randoms())
def test_whatever_was_measured(candidates: list[Candidate], random: Random) -> None:
    found = decide(candidates, MAX_DROP)
    known = {candidate.precision: candidate for candidate in candidates}
    chosen = [precision for precision, verdict in found.items() if verdict.count == "chosen"]
    assert len(chosen) <= 1
    assert set(found) == {*known, REFERENCE_PRECISION}
    assert all(verdict.reason for precision, verdict in found.items() if precision not in chosen)
    random.shuffle(candidates)
    assert decide(candidates, MAX_DROP) == found
    for precision in chosen:
        best, fp32 = known[precision], known[REFERENCE_PRECISION]
        assert best.problem is None
        assert best.latency is not None
        assert fp32.latency is not None
        if precision != REFERENCE_PRECISION:
            assert best.drop is not None
            assert best.drop.drop <= MAX_DROP
            assert best.latency.high_ms < fp32.latency.low_ms


def test_a_drop_whose_interval_reaches_beyond_the_budget_is_said() -> None:
    assert doubts(timed("fp32", 20), MAX_DROP) == []
    assert doubts(timed("int8", 5, drop=0.005), MAX_DROP) == []
    (said,) = doubts(timed("int8", 5, drop=0.009), MAX_DROP)
    assert said == (
        "int8: its drop is within 1 pp, but the 95 % interval reaches 1.10 pp; use a larger headline set to be sure"
    )


def test_equal_models_are_told_apart_as_seldom_as_is_said() -> None:
    """The interval of five medians is their range, and below another's range it lies once in C(10, 5)."""
    medians = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert bootstrap_interval(medians) == (1.0, 5.0)
    assert math.comb(2 * MIN_PROCESSES, MIN_PROCESSES) == 252
