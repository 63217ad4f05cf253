"""The model to ship: against a definition over made rows, and messages a person can act on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ended
from hypothesis import given
from hypothesis import strategies as st
from test_report import edit, make_run

from toolchain.errors import UsageError
from toolchain.report.choose_model import NUMBERS, choose_model, conditions, explain_no_choice
from toolchain.report.collect import collect
from toolchain.report.measured import OUTDATED
from toolchain.report.missing import measure_commands, missing_notes
from toolchain.report.row import ReportRow

Clipkd = Callable[..., Ended]


def row(name: str, **fields: Any) -> ReportRow:
    empty = dict.fromkeys(
        (*NUMBERS, "top1_high", "model", "role", "runtime", "pytorch", "precision", "machine", "headline", "run")
    )
    return empty | {"name": name, "device": "cpu", "status": "ok", "grade": "B", "flags": []} | fields


ROWS = [
    row("a", p90_ms=3.0, p50_ms=2.0, top1=0.60, precision="fp32", top1_low=0.58, top1_high=0.62),
    row("b", p90_ms=9.0, p50_ms=8.0, top1=0.70, precision="fp32", top1_low=0.68, top1_high=0.72),
    row("c", p90_ms=2.0, p50_ms=1.0, top1=0.55, precision="int8", top1_low=0.53, top1_high=0.57),
    row("d", p90_ms=None, p50_ms=1.0, top1=0.80, precision="int8"),
    row("e", p90_ms=1.0, p50_ms=0.5, top1=0.90, precision="int8", status="no profile.json"),
]


def test_the_best_that_meets_the_conditions_and_why_not_the_others() -> None:
    choice = choose_model(ROWS, conditions("p90_ms<=5"), "top1", None)
    assert (choice.best, choice.runner_up) == (ROWS[0], ROWS[2])
    reasons = {row["name"]: said for row, said in choice.rejected}
    assert reasons == {
        "b": ["p90_ms is 9, not <=5"],
        "c": ["top1 is 0.55, that of a 0.6"],
        "d": ["p90_ms is unknown"],
        "e": ["status: no profile.json"],
    }
    assert choice.warnings == []


def test_by_a_cost_the_least_wins_and_words_can_be_asked_for() -> None:
    assert choose_model(ROWS, conditions("precision=fp32"), "p50_ms", "cpu").best == ROWS[0]
    assert choose_model(ROWS, conditions("precision!=int8, p90_ms>3"), "p50_ms", "cpu").best == ROWS[1]
    assert choose_model(ROWS, conditions(""), "p90_ms", None).best == ROWS[2]


def test_nothing_fits() -> None:
    choice = choose_model(ROWS, conditions("top1>=0.99"), "top1", None)
    assert choice.best is choice.runner_up is None
    assert len(choice.rejected) == len(ROWS)


def test_equals_are_parted_by_speed() -> None:
    rows = [row("slow", p50_ms=3.0, top1=0.5), row("fast", p50_ms=1.0, top1=0.5)]
    choice = choose_model(rows, [], "top1", None)
    assert choice.best == rows[1]
    assert choice.rejected == [(rows[0], ["top1 is the same, but fast is faster"])]


def test_what_ran_in_pytorch_is_never_chosen() -> None:
    reference = row("r", p50_ms=0.1, top1=0.99, runtime="pytorch", pytorch="eager")
    choice = choose_model([*ROWS, reference], [], "top1", None)
    assert choice.best == ROWS[3]
    assert (reference, ["reference row: the checkpoint in PyTorch, which is not an exported model"]) in choice.rejected


def test_teacher_and_baseline_are_chosen_only_if_they_are_included() -> None:
    rows = [
        row("t", p50_ms=5.0, top1=0.9, role="teacher"),
        row("b", p50_ms=1.0, top1=0.7, role="baseline"),
        row("s", p50_ms=1.0, top1=0.6, role="student"),
        row("a", p50_ms=1.0, top1=0.5, role="adopted"),
    ]
    choice = choose_model(rows, [], "top1", None)
    assert (choice.best, choice.runner_up) == (rows[2], rows[3])
    assert (rows[0], ["only for comparison; --include teacher considers it"]) in choice.rejected
    assert choose_model(rows, [], "top1", None, ["teacher"]).best == rows[0]
    assert choose_model(rows, [], "top1", None, ["baseline"]).best == rows[1]
    with pytest.raises(UsageError, match="--include student: expected teacher or baseline"):
        choose_model(rows, [], "top1", None, ["student"])
    nothing = choose_model(rows[:2], [], "top1", None)
    assert explain_no_choice(nothing, []).startswith("no model that ships was exported; --include teacher")


def test_what_is_not_measured_is_on_no_device_and_is_no_second_one() -> None:
    kit = row("kit", device=None, status="not measured", role="student", runtime="tensorrt")
    kit |= {"run": "runs/mine", "model": "student-tensorrt-int8"}
    choice = choose_model([*ROWS, kit], [], "top1", None)
    assert choice.best == ROWS[3]
    assert (kit, ["status: not measured", "top1 is unknown"]) in choice.rejected
    assert choose_model([*ROWS, kit], [], "top1", "cpu").best == ROWS[3]
    alone = choose_model([kit], [], "top1", None)
    assert explain_no_choice(alone, conditions("p50_ms<=1")) == (
        "no model that ships is measured completely. Measure first:\n"
        "  clipkd profile runs/mine/exported/student-tensorrt-int8 --device DEVICE --evaluate"
    )


def test_the_reason_for_no_choice_makes_sense() -> None:
    where = conditions("top1>=0.99")
    fails = explain_no_choice(choose_model(ROWS, where, "top1", None), where)
    assert fails == "no model meets: top1>=0.99; relax a condition, see the reasons above"
    unknown = [row("x", p50_ms=1.0, top1=0.5)]
    fails = explain_no_choice(choose_model(unknown, [], "e2e_p50_ms", None), [])
    assert fails == "no model can be chosen, for the reasons above"


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "profile runs/a/exported/m --evaluate"),
        ({"top1": 0.5}, "profile runs/a/exported/m"),
        ({"p50_ms": 1.0}, "evaluate runs/a/exported/m"),
        ({"p50_ms": 1.0, "device": "orin"}, "profile runs/a/exported/m --device orin --evaluate"),
        ({"top1": 0.5, "status": OUTDATED[0]}, "profile runs/a/exported/m --evaluate"),
        ({"top1": 0.5, "p50_ms": 1.0, "status": "no parity.json"}, "profile runs/a/exported/m --evaluate"),
        ({"top1": 0.5, "pytorch": "eager", "runtime": "pytorch"}, "profile runs/a/student"),
        ({"pytorch": "compiled", "runtime": "pytorch"}, "run runs/a/recipe.yaml --out runs/a"),
        ({"run": "my runs/a"}, "profile 'my runs/a/exported/m' --evaluate"),
    ],
)
def test_a_row_names_the_command_that_measures_what_it_lacks(changes: dict[str, Any], command: str) -> None:
    about = {"run": "runs/a", "model": "m", "role": "student", "runtime": "onnxruntime", "status": "not measured"}
    assert measure_commands([row("x", **(about | changes)), *ROWS]) == [f"clipkd {command}"]


def test_one_command_measures_all_models_that_lack_the_same() -> None:
    about = {"run": "runs/a", "role": "student", "runtime": "onnxruntime", "status": "not measured"}
    rows = [row("x", model="m", **about), row("y", model="n", **about), row("z", model="m", **about | {"run": "b"})]
    assert measure_commands(rows) == [
        "clipkd profile runs/a/exported/m runs/a/exported/n --evaluate",
        "clipkd profile b/exported/m --evaluate",
    ]
    assert missing_notes(ROWS) == []
    (note,) = missing_notes(rows)
    assert "clipkd profile b/exported/m --evaluate" in note.text


def test_noise_and_overlap_are_warned_of() -> None:
    rows = [
        row("a", p50_ms=1.0, top1=0.60, top1_low=0.55, top1_high=0.65, grade="C", flags=["BUSY"]),
        row("b", p50_ms=1.0, top1=0.58, top1_low=0.53, top1_high=0.63),
    ]
    noisy, overlap = choose_model(rows, [], "top1", None).warnings
    assert "grade C (BUSY)" in noisy
    assert "intervals of top-1 of a and the runner-up b overlap" in overlap


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("p90ms<=10", "unknown field 'p90ms'; did you mean p90_ms?"),
        ("p90_ms", "'p90_ms' is not a condition; expected FIELD<=NUMBER"),
        ("p90_ms<=fast", "expected a number after <=, got 'fast'"),
        ("top1>=30%", "write 2 % as 0.02"),
        ("precision<fp16", "precision is text; compare it with = or !="),
        ("p50_ms<=1; import os", "expected a number"),
        ("p50_ms<=nan", "expected a number"),
        ("__class__=x", "unknown field '__class__'"),
        ("device=cpu", "--where cannot compare device; choose a device with --device"),
        ("status=ok", "--where cannot compare status; expected one of: batch, threads, fixed_batch"),
    ],
)
def test_a_condition_that_is_none(where: str, said: str) -> None:
    with pytest.raises(UsageError, match="(?s)" + said.replace("(", r"\(").replace("?", r"\?")):
        conditions(where)


def test_every_number_can_be_compared_and_what_has_a_better_direction_ranks() -> None:
    (condition,) = conditions("fixed_batch=1")
    assert condition.unmet_by({"fixed_batch": 1}) is None
    assert condition.unmet_by({"fixed_batch": None}) == "fixed_batch is unknown"
    with pytest.raises(UsageError, match="--by cannot rank by fixed_batch; expected one of: batch, "):
        choose_model(ROWS, [], "fixed_batch", None)
    with pytest.raises(UsageError, match="unknown field 'top'; did you mean top1"):
        choose_model(ROWS, [], "top", None)


def test_sizes_may_be_short() -> None:
    assert [condition.value for condition in conditions("size_bytes<=4M, params_image<300k")] == [4e6, 3e5]


def test_several_devices_need_a_name() -> None:
    rows = [*ROWS, row("f", device="orin", top1=0.5, p50_ms=4.0)]
    with pytest.raises(UsageError, match=r"several devices \(cpu, orin\); choose one with --device"):
        choose_model(rows, [], "top1", None)
    assert choose_model(rows, [], "top1", "orin").best == rows[-1]
    with pytest.raises(UsageError, match="--device pi: no rows of this device; expected one of: cpu, orin"):
        choose_model(rows, [], "top1", "pi")


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1)), min_size=1),
    st.floats(0.1, 100),
    st.sampled_from(["top1", "p50_ms"]),
)
def test_it_is_the_best_by_definition(points: list[tuple[float, float]], bound: float, by: str) -> None:
    rows = [row(str(place), p50_ms=p50_ms, top1=top1) for place, (p50_ms, top1) in enumerate(points)]
    choice = choose_model(rows, conditions(f"p50_ms<={bound!r}"), by, "cpu")
    fit = [made for made in rows if made["p50_ms"] <= bound]
    assert (choice.best is None) == (not fit)
    if choice.best is not None:
        assert all(choice.best[by] * NUMBERS[by] >= made[by] * NUMBERS[by] for made in fit)
    assert len(choice.rejected) + (choice.best is not None) == len(rows)


def test_the_command(clipkd: Clipkd, tmp_path: Path) -> None:
    run = make_run(tmp_path / "quickstart")
    ended = clipkd("best", run, "--where", "p50_ms<=0.95, role!=baseline")
    assert ended.code == 0
    assert ended.out.startswith("best: student fp32 (top-1 71.0 %, p50 0.91 ms, 11.4 MB)")
    assert "exported/student-onnxruntime-fp32" in ended.out
    assert "p50_ms is 3.2, not <=0.95" in ended.out
    ended = clipkd("best", run, "--where", "p50_ms<=0.01")
    assert ended.code == 5
    assert "no model meets: p50_ms<=0.01" in ended.err


def test_paired_drops_come_from_the_answers_that_were_kept(tmp_path: Path) -> None:
    run, n = make_run(tmp_path / "run"), 2000
    for model, wrong in (("teacher-onnxruntime-fp32", 360), ("student-onnxruntime-int8", 609)):
        rank_N = np.zeros(n, np.int32)
        rank_N[:wrong] = 3
        np.savez(run / "measured" / model / "cpu" / "samples.npz", stix_rank=rank_N)
        edit(run / "measured" / model / "cpu" / "evaluation.json")
    rows = {made["name"]: made for made in collect([run])["rows"]}
    int8 = rows["student int8"]
    assert int8["top1_drop_vs_teacher"] == pytest.approx(249 / n)
    assert int8["top1_drop_vs_teacher_low"] < 249 / n < int8["top1_drop_vs_teacher_high"]
    assert int8["top1_drop_vs_teacher_p"] < 1e-60
    assert int8["top1_drop_vs_fp32_p"] is None, "the float student's answers were not kept"
    assert rows["teacher fp32"]["top1_drop_vs_teacher"] == 0


def test_accuracies_on_different_sets_are_warned_of() -> None:
    rows = [
        row("a", p50_ms=1.0, top1=0.6, headline="mine", num_eval_images=20),
        row("b", p50_ms=1.0, top1=0.9, headline="other", num_eval_images=1000),
    ]
    (warning,) = choose_model(rows, [], "top1", None).warnings
    assert "top1 is of different evaluation sets, which cannot be compared: mine (20 images), other (1,000" in warning
    same = [each | {"headline": "mine", "num_eval_images": 20} for each in rows]
    assert not choose_model(same, [], "top1", None).warnings  # type: ignore[arg-type]
    assert not choose_model(rows, [], "p50_ms", None).warnings
