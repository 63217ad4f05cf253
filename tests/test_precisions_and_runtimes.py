"""The tables of precisions and runtimes, and that what repeats a fact of theirs agrees with them."""

from typing import get_args

import pytest

from export.device_programs import probes, runner
from export.devices.doctor import CAPABILITIES
from export.graphs.model_card import uint8_snippet
from export.students.measure import STUDENT_PRECISIONS, STUDENT_RUNTIMES
from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION, SAFEST_FIRST, PrecisionName
from toolchain.recipe.export import ExportSpec
from toolchain.runtimes import RUNTIMES, RuntimeName, choose_runtime, runtime_that_computes_alone, runtime_title


def named_by(field: str) -> tuple[str, ...]:
    """The values that a recipe may list in a field of `export`."""
    (names, _) = get_args(ExportSpec.model_fields[field].annotation)
    return get_args(names)


def test_a_recipe_may_name_every_precision_and_runtime_and_no_other() -> None:
    assert named_by("precisions") == get_args(PrecisionName) == SAFEST_FIRST
    assert named_by("runtimes") == get_args(RuntimeName) == tuple(RUNTIMES)
    assert set(PRECISIONS) == set(SAFEST_FIRST)
    assert all(name == row.name for table in (PRECISIONS, RUNTIMES) for name, row in table.items())


def test_precisions_are_ranked_and_told_apart() -> None:
    rows = PRECISIONS.values()
    assert sorted(row.safety_rank for row in rows) == list(range(len(rows)))
    assert SAFEST_FIRST[0] == REFERENCE_PRECISION
    for shapes in (
        [row.marker for row in rows],
        [row.symbol for row in rows],
        [row.color for row in rows if row.color],
    ):
        assert len(set(shapes)) == len(shapes)
    assert [row.name for row in rows if row.is_quantized] == ["int8", "int8-fp16", "int8-bf16"]
    assert all(row.min_sqnr_db > 0 and 0.5 < row.min_top1_agreement <= 1 for row in rows)


def test_a_precision_that_can_fail_names_others_that_cannot() -> None:
    for row in PRECISIONS.values():
        can_fail = row.stored_floats == "float16" or runtime_that_computes_alone(row.name) is not None
        assert bool(row.instead) == can_fail
        for name in row.instead.split(" or ") if row.instead else ():
            assert PRECISIONS[name].stored_floats != "float16"
            assert PRECISIONS[name].is_quantized == row.is_quantized


def test_the_runner_opens_graphs_of_every_runtime_that_is_no_kit() -> None:
    assert set(runner._OPEN) == {name for name, runtime in RUNTIMES.items() if not runtime.is_kit}
    assert all(runtime.graphs_open_in in runner._OPEN for runtime in RUNTIMES.values())


def test_every_runtime_can_be_looked_for() -> None:
    known = {capability.name: capability for capability in CAPABILITIES}
    for runtime in RUNTIMES.values():
        assert set(runtime.capabilities) <= set(known)
        assert runtime.capabilities
    assert {capability.probe.partition(":")[0] for capability in CAPABILITIES} <= set(probes._PROBES)
    for name, runtime in RUNTIMES.items():
        if not runtime.is_kit:
            assert {f"{name} {device}" for device in runtime.devices} <= set(known)


def test_a_precision_of_one_runtime_is_found_there() -> None:
    alone = runtime_that_computes_alone("int8-bf16")
    assert alone is not None
    assert alone.name == "openvino"
    assert runtime_that_computes_alone("int8") is None


@pytest.mark.parametrize(
    ("device", "runtime"),
    [("cpu", "onnxruntime"), ("cuda:0", "onnxruntime"), ("gpu", "openvino"), ("npu", "openvino"), ("", "onnxruntime")],
)
def test_the_first_runtime_that_drives_a_device_is_taken(device: str, runtime: str) -> None:
    assert choose_runtime(device) == runtime


def test_titles() -> None:
    assert runtime_title("openvino") == "OpenVINO"
    assert runtime_title("ncnn") == "ncnn", "a row measured elsewhere names any runtime"


def test_students_are_measured_in_what_runs_graphs_as_they_are() -> None:
    assert STUDENT_PRECISIONS[:4] == ("fp32", "fp16", "bf16", "int8")
    assert set(STUDENT_RUNTIMES) == set(runner._OPEN)


@pytest.mark.parametrize("precision", [name for name in SAFEST_FIRST if runtime_that_computes_alone(name) is None])
def test_the_model_card_opens_a_graph_as_the_runner_does(precision: str) -> None:
    """The options of a session, read off the runner's."""
    import onnxruntime as ort

    options = runner.onnxruntime_options(precision, None)
    snippet = uint8_snippet(precision)
    lowered = options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert ("ORT_ENABLE_EXTENDED" in snippet) == lowered
    try:
        left_out = options.get_session_config_entry("optimization.disable_specified_optimizers")
    except RuntimeError:  # there is none
        assert "disable_specified_optimizers" not in snippet
    else:
        assert f'"{left_out}"' in snippet
