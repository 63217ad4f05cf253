"""The flags of `clipkd export` as changes of a recipe, which is then checked as a whole."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.pipeline.plan import plan_exports, select_kits
from toolchain.errors import UsageError
from toolchain.precisions import SAFEST_FIRST
from toolchain.recipe.export import AutoSpec, ExportFlags, ExportSpec, export_overrides
from toolchain.recipe.load import load_recipe
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import RuntimeName

BOTH = ExportSpec(runtimes=("onnxruntime", "openvino"), precisions=("fp32", "fp16"))
CHOOSING = BOTH.model_copy(update={"auto": AutoSpec(max_drop=0.02)})
WITH_KITS = BOTH.model_copy(update={"runtimes": ("openvino", "tensorrt")})
KITS_ALONE = BOTH.model_copy(update={"runtimes": ("tensorrt",)})


@pytest.mark.parametrize(
    ("recorded", "flags", "changes"),
    [
        (BOTH, {}, {}),
        (CHOOSING, {}, {}),
        (BOTH, {"runtimes": ("openvino",)}, {"runtimes": ["openvino"]}),
        (BOTH, {"precisions": ("int8",)}, {"precisions": ["int8"]}),
        (BOTH, {"precisions": ("int8", "fp32", "int8")}, {"precisions": ["int8", "fp32"]}),
        (BOTH, {"batch": 1, "uint8_input": True}, {"batch": 1, "uint8_input": True}),
        (CHOOSING, {"auto": False}, {"auto": None}),
        # Kits are added to the runtimes, recorded or named, and end a choice: they are not measured here.
        (
            CHOOSING,
            {"runtimes": ("tensorrt",)},
            {"auto": None, "runtimes": ["onnxruntime", "openvino", "tensorrt"], "build_engines": True},
        ),
        (
            WITH_KITS,
            {"runtimes": ("onnxruntime", "tensorrt"), "build_engines": False},
            {"auto": None, "runtimes": ["onnxruntime", "tensorrt"], "build_engines": False},
        ),
        (
            WITH_KITS,
            {"runtimes": ("tensorrt",)},
            {"auto": None, "runtimes": ["openvino", "tensorrt"], "build_engines": True},
        ),
        # A choice is among all precisions, or fp32 and those named, in the runtimes that run here.
        (
            WITH_KITS,
            {"auto": True},
            {"runtimes": ["openvino"], "precisions": list(SAFEST_FIRST), "auto": {"max_drop": None}},
        ),
        (
            KITS_ALONE,
            {"auto": True, "runtimes": ("onnxruntime",), "precisions": ("int8", "fp32"), "max_drop": 0.03},
            {"runtimes": ["onnxruntime"], "precisions": ["fp32", "int8"], "auto": {"max_drop": 0.03}},
        ),
    ],
)
def test_flags_change_what_they_name(recorded: ExportSpec, flags: dict[str, Any], changes: dict[str, Any]) -> None:
    assert export_overrides(recorded, ExportFlags(**flags)) == changes


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"build_engines": False}, "--no-build applies to TensorRT engines"),
        ({"max_drop": 0.01}, "--max-drop applies to --auto"),
        ({"max_drop": 0.01, "auto": False}, "--max-drop applies to --auto"),
        ({"max_drop": 2.0, "auto": True}, "--max-drop 2: expected a fraction of 1"),
        ({"max_drop": float("nan"), "auto": True}, "--max-drop nan: expected a fraction of 1"),
        ({"precisions": ("fp32", "int4")}, r"^--precision int4: no such precision; did you mean int8\?$"),
        (
            {"precisions": ("fp8",)},
            "--precision fp8: no such precision; expected one or more of fp32, bf16, fp16, int8",
        ),
        ({"precisions": ()}, "--precision: names no precision; expected one or more of fp32"),
        (
            {"auto": True, "runtimes": ("tensorrt",)},
            "--auto measures on this machine, but TensorRT engines run on the target device",
        ),
    ],
)
def test_flags_that_make_no_sense_together(flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        ExportFlags(**flags)


def test_a_choice_needs_a_runtime_that_runs_here() -> None:
    with pytest.raises(UsageError, match="the recipe exports only for tensorrt: add --onnx or --openvino"):
        export_overrides(KITS_ALONE, ExportFlags(auto=True))


@pytest.mark.parametrize(
    ("runtimes", "expected"),
    [
        ((), False),
        (("onnxruntime",), False),
        (("onnxruntime", "tensorrt"), False),
        (("tensorrt",), True),
    ],
)
def test_kits_alone_are_exported_alone(tmp_path: Path, runtimes: tuple[RuntimeName, ...], expected: bool) -> None:
    flags = ExportFlags(runtimes=runtimes)
    assert flags.only_kits is expected
    if expected:
        recipe = exporting(written(tmp_path / "recipe.yaml", BOTH), flags)
        assert recipe.export.runtimes == ("onnxruntime", "openvino", "tensorrt"), "the recipe keeps the others"
        planned = plan_exports(select_kits(recipe))
        assert [export.name for export in planned] == ["adopted-tensorrt-fp32", "adopted-tensorrt-fp16"]


def test_an_error_of_a_flag_is_not_told_as_one_of_the_recipe(tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", BOTH)
    with pytest.raises(UsageError) as caught:
        exporting(path, ExportFlags(precisions=("int8",)), ["export.opset=18"])
    assert str(caught.value).startswith(f"{path} with its flags --set export.opset=18: 1 problem(s)")
    with pytest.raises(UsageError) as caught:
        load_recipe(path, ["export.opset=3"])
    assert str(caught.value).startswith(f"{path} with --set export.opset=3: 1 problem(s)")
    path.write_text(path.read_text().replace("opset: 20", "opset: 3"))
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: 1 problem(s)")


def written(path: Path, export: ExportSpec) -> Path:
    student = {"model": "ViT-B-32", "pretrained": "openai"}
    path.write_text(
        yaml.safe_dump({"name": "x", "student": student, "export": export.model_dump(mode="json", exclude_none=True)})
    )
    return path


def exporting(path: Path, flags: ExportFlags, overrides: list[str] | None = None) -> Recipe:
    changes = export_overrides(load_recipe(path).export, flags)
    return load_recipe(path, overrides, changes={"export": changes})


RUNTIMES_OF_FLAGS: list[tuple[RuntimeName, ...]] = [(), ("openvino",), ("tensorrt",), ("onnxruntime", "tensorrt")]


@pytest.mark.parametrize("recorded", [BOTH, CHOOSING, WITH_KITS, KITS_ALONE], ids=["both", "auto", "kits", "alone"])
def test_every_combination_gives_a_valid_recipe_or_a_usage_error(recorded: ExportSpec, tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", recorded)
    made = 0
    for runtimes, precisions, build, auto, drop in product(
        RUNTIMES_OF_FLAGS, (None, ("fp16",)), (True, False), (None, True, False), (None, 0.5)
    ):
        try:
            flags = ExportFlags(runtimes, precisions, build_engines=build, auto=auto, max_drop=drop)
            spec = exporting(path, flags).export
        except UsageError:
            continue
        made += 1
        assert ExportSpec.model_validate(spec.model_dump()) == spec, "the schema's rules hold of what flags made"
        assert spec.auto is None or "tensorrt" not in spec.runtimes
    assert made >= 24


def test_what_flags_make_is_checked_with_what_set_says(tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", BOTH)
    kits = ExportFlags(runtimes=("tensorrt",))
    with pytest.raises(UsageError, match="tensorrt engines run on the target device: export tensorrt without auto"):
        exporting(path, kits, ["export.auto={}"])
    chosen = exporting(path, ExportFlags(auto=True), ["export.auto.max_drop=0.03", "export.precisions=[fp32, fp16]"])
    assert chosen.export.auto == AutoSpec(max_drop=0.03)
    assert chosen.export.precisions == ("fp32", "fp16")
