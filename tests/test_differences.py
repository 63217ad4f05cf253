"""What differs between a stage's recorded inputs and those wanted now is named with both values."""

import json
from typing import Any

import pytest

from toolchain.differences import MADE_AGAIN, abridge, describe_duration, list_differences

RECORDED: dict[str, Any] = {
    "kind": "distil",
    "version": 3,
    "fields": {"seed": 0, "distill": {"steps": 2000, "crop": [0.5, 1.0]}},
    "fingerprints": {"data": "aa", "student": "bb", "machine": json.dumps({"cpu": "A", "cores": 2})},
    "inputs": {"teacher": "cc"},
    "described": {"student": {"model": "glyphs_tiny"}},
}


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({}, []),
        ({"fields": {"seed": 0, "distill": {"steps": 1999, "crop": (0.5, 1.0)}}}, ["distill.steps 2000 -> 1999"]),
        (
            {"fields": {"seed": 1, "distill": {"steps": 2000, "crop": [1, 1]}}},
            ["seed 0 -> 1", "distill.crop [0.5, 1.0] -> [1, 1]"],
        ),
        (
            {"fields": {"seed": 0, "distill": None, "headline": "x"}},
            ['distill {"steps": 2000, "crop": [0.5, 1.0]} -> null', "headline (not set) -> x"],
        ),
        ({"fields": {"seed": "s" * 99, "distill": RECORDED["fields"]["distill"]}}, [f"seed 0 -> {'s' * 57}..."]),
        ({"fingerprints": RECORDED["fingerprints"] | {"data": "ab"}}, ["data: other content"]),
        ({"fingerprints": RECORDED["fingerprints"] | {"student": "ab"}}, ["student: other content"]),
        (
            {
                "fingerprints": RECORDED["fingerprints"] | {"student": "ab"},
                "described": {"student": {"model": "ViT-B-16"}},
            },
            ["student.model glyphs_tiny -> ViT-B-16"],
        ),
        (
            {"fingerprints": RECORDED["fingerprints"] | {"machine": json.dumps({"cpu": "A", "cores": 4})}},
            ["machine.cores 2 -> 4"],
        ),
        ({"inputs": {"teacher": "cd"}}, ["made from another teacher"]),
        ({"inputs": {"teacher": MADE_AGAIN}}, ["its teacher is made again"]),
        ({"inputs": {}}, ["made with a teacher"]),
        ({"version": 4}, ["version 3 -> 4"]),
        (
            {"fields": {"seed": 1, "distill": {"steps": f"sha256 {MADE_AGAIN}", "crop": [0.5, 1.0]}}},
            ["seed 0 -> 1"],
        ),
    ],
)
def test_each_difference_is_named(change: dict[str, Any], differences: list[str]) -> None:
    assert list(list_differences(RECORDED, RECORDED | change)) == differences


def test_what_was_not_recorded_is_not_guessed() -> None:
    assert list_differences(None, RECORDED) == ("made with other fields, which were not recorded",)
    old = {key: value for key, value in RECORDED.items() if key != "described"}
    other = RECORDED | {"fingerprints": RECORDED["fingerprints"] | {"student": "ab"}}
    assert list_differences(old, other) == ("student: other content",)


def test_many_differences_are_counted() -> None:
    assert abridge(("a 1 -> 2", "b 1 -> 2")) == "a 1 -> 2; b 1 -> 2"
    assert abridge(tuple("abcdef")) == "a; b; c; d; and 2 more"


def test_a_duration_has_the_unit_that_suits_it() -> None:
    assert [describe_duration(seconds) for seconds in (42.4, 61, 12600)] == ["42 s", "1.0 min", "3.5 h"]
