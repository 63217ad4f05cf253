"""`clipkd export --auto`: graphs that are really timed, one of them slowed and one wrong; what it records and says."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from conftest import REPOSITORY, Ended
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export.devices import describe
from export.pipeline import choose_precision as auto_stages
from export.pipeline import export as deployment_stages
from export.pipeline import measure as measure_module
from export.pipeline import precision_verdicts as auto
from export.pipeline import quantize_or_reject as rejecting_module
from export.pipeline import report as report_module
from export.pipeline.choose_precision import choose_precisions, without_failed
from export.pipeline.export import export_models
from export.pipeline.plan import mark_failed, stage_paths
from export.pipeline.quantize_or_reject import quantize_or_reject
from export.profiling import protocol as profile_module
from export.profiling.protocol import Profile
from toolchain.errors import ArtifactError, ClipkdError, GateError, UsageError
from toolchain.pipeline import train as training_stages
from toolchain.precisions import SAFEST_FIRST
from toolchain.recipe.load import check_recipe, load_recipe
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, Work, open_stage, run_stage

Clipkd = Callable[..., Ended]

NUM_IMAGES = 400
SPIN_MS = 4.0  # many times what the graphs of this file take


class Silent:
    """A screen that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def starts(self, stage: str) -> None:
        pass

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def line(self, name: str, text: str) -> None:
        self.lines[name] = text

    def done(self, name: str, stage: Stage) -> None:
        self.lines[name] = "cached" if stage.cached else "done"


def recipe_of(**changes: Any) -> Recipe:
    content = {
        "name": "mine",
        "student": {"model": str(REPOSITORY / "recipes" / "glyphs_teacher"), "init": "weights"},
        "export": {"precisions": ["fp32", "fp16", "bf16", "int8"], "auto": {}},
        "evaluate": {"headline": "novel", "sets": ["novel"]},
        "profile": {"processes": 2, "seconds": 0.04},
    }
    return check_recipe(content | changes, "mine", Path())


@pytest.fixture(autouse=True)
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_stages, "MIN_PROCESSES", 2)
    monkeypatch.setattr(describe, "_LOOK_AROUND_S", 0.0)


def write_graphs(folder: Path) -> dict[str, Any]:
    """An exported folder as far as profiling reads it: 8x8 images, 5 tokens, 4 features."""
    random = np.random.default_rng(0)

    def write(name: str, inputs: Any, width: int, node: Any) -> None:
        weights = numpy_helper.from_array(random.standard_normal((width, 4), dtype=np.float32), "weights")
        features = helper.make_tensor_value_info(f"{name}_features", TensorProto.FLOAT, ["batch", 4])
        product = helper.make_node("MatMul", ["flat", "weights"], [f"{name}_features"])
        graph = helper.make_graph([node, product], name, [inputs], [features], [weights])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
            folder / f"{name}.onnx",
        )

    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8])
    write("image", pixels, 192, helper.make_node("Flatten", ["pixel_values"], ["flat"]))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 5])
    write("text", ids, 5, helper.make_node("Cast", ["input_ids"], ["flat"], to=TensorProto.FLOAT))
    image = {"size": [8, 8], "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3}
    image |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    (folder / "preprocess.json").write_text(json.dumps({"image": image, "text": {"context_length": 5}}))
    np.savez(folder / "classes.npz", names=np.array([], np.str_), features_KD=np.empty((0, 4), np.float32))
    np.savez(
        folder / "parity.npz",
        pixels_BHWC=random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        input_ids_BT=random.integers(0, 9, (20, 5)),
    )
    return {"runtime": "onnxruntime"}


def made(path: Path, work: Callable[[Path], dict[str, Any]], **fields: Any) -> Stage:
    return run_stage(StageSpec(path, kind="test", version=1, fields=fields), work)


@pytest.fixture
def exported(tmp_path: Path) -> dict[str, Stage]:
    """Every precision but bf16, which failed."""
    folder = tmp_path / "exported"
    mark_failed(folder / "adopted-onnxruntime-bf16", GateError("no kernels"))
    names = [f"adopted-onnxruntime-{precision}" for precision in ("fp32", "fp16", "int8")]
    return {name: made(folder / name, write_graphs, name=name) for name in names}


def measured(exported: Mapping[str, Stage], run: Path, **wrong: int) -> dict[str, Stage]:
    """Half of the images right, and by some of the precisions so many of them wrong after all."""

    def scored(lost: int) -> Callable[[Path], dict[str, Any]]:
        def work(folder: Path) -> dict[str, Any]:
            rank_N = np.arange(NUM_IMAGES) % 2
            rank_N[: 2 * lost] = 1
            np.savez(folder / "samples.npz", novel_rank=rank_N)
            return {}

        return work

    lost = {name: wrong.get(name.rpartition("-")[2], 0) for name in exported}
    return {name: made(run / "measured" / name / "cpu", scored(lost[name]), lost=lost[name]) for name in exported}


def slowed(monkeypatch: pytest.MonkeyPatch, **spin_ms: float) -> list[list[str]]:
    """Waste time in every query of some of the precisions; which were timed together."""
    real, together = profile_module.profile_together, []

    def profile_together(folders: list[Path], **settings: Any) -> Any:
        precisions = [folder.name.rpartition("-")[2] for folder in folders]
        together.append(precisions)
        return real(folders, spin_ms=[spin_ms.get(precision, 0.0) for precision in precisions], threads=1, **settings)

    monkeypatch.setattr(profile_module, "profile_together", profile_together)
    return together


def told(monkeypatch: pytest.MonkeyPatch, **ms: float | ClipkdError) -> list[list[str]]:
    """What each precision takes, without timing it; which were asked for together."""
    together = []

    def answer(precision: str) -> Any:
        found = ms[precision]
        if isinstance(found, ClipkdError):
            return found
        image = {"p50_ms": found, "p50_low_ms": 0.9 * found, "p50_high_ms": 1.1 * found}
        return Profile({"image": image, "grade": "B", "flags": []}, {})

    def profile_together(folders: list[Path], **_: Any) -> Any:
        together.append([folder.name.rpartition("-")[2] for folder in folders])
        return [answer(precision) for precision in together[-1]]

    monkeypatch.setattr(profile_module, "profile_together", profile_together)
    return together


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    return {row["precision"]: row["verdict"] for row in document["runtimes"]["onnxruntime"]["candidates"]}


def test_what_cannot_be_measured_is_not_measured_for_the_report(
    exported: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`clipkd run` chooses first: a model that only its measuring finds to be no good does not end it."""
    told(monkeypatch, fp32=1.0, fp16=2.0)
    scores = dict(measured(exported, tmp_path))
    broken = scores.pop("adopted-onnxruntime-int8", None)
    assert broken is not None

    def fails(*_: Any) -> dict[str, Stage]:
        raise GateError("it crashed its runtime")

    monkeypatch.setattr(auto_stages, "measure_models", fails)
    document = choose_precisions(recipe_of(), tmp_path, exported, scores, Silent())
    assert verdicts(document)["int8"] == "failed"
    assert set(without_failed(exported, document)) == set(exported) - {"adopted-onnxruntime-int8"}


def test_a_slowed_and_a_wrong_model_are_rejected_each_on_its_count(
    exported: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = slowed(monkeypatch, fp32=SPIN_MS, fp16=10 * SPIN_MS)
    scores, screen = measured(exported, tmp_path, int8=20), Silent()
    document = choose_precisions(recipe_of(), tmp_path, exported, scores, screen)
    assert verdicts(document) == {"fp32": "chosen", "fp16": "speed", "bf16": "failed", "int8": "accuracy"}
    found = document["runtimes"]["onnxruntime"]
    assert (found["precision"], found["model"]) == ("fp32", "exported/adopted-onnxruntime-fp32")
    fp32, fp16, bf16, int8 = found["candidates"]
    assert fp32["digest"] == open_stage(tmp_path / found["model"]).digest
    assert bf16["digest"] is None
    assert fp16["p50_low_ms"] > fp32["p50_high_ms"] > SPIN_MS
    assert fp16["reason"].startswith("not measurably faster than fp32: ")
    assert bf16["reason"] == "no kernels"
    assert int8["top1_drop_vs_fp32"] == 20 / NUM_IMAGES
    assert int8["reason"].startswith("top-1 drops by 5.00 [")
    assert int8["p50_ms"] is None
    assert fp16["top1_drop_vs_fp32"] == 0
    assert together == [["fp32", "fp16"]], "what is wrong is not timed"
    assert json.loads((tmp_path / "auto.json").read_text()) == document
    assert screen.lines["auto/onnxruntime"] == "ship fp32"
    assert not list(tmp_path.glob(".auto*"))

    assert choose_precisions(recipe_of(), tmp_path, exported, scores, Silent()) == document
    assert len(together) == 1, "what was timed is used again"

    tolerant = recipe_of(export={"precisions": ["fp32", "fp16", "bf16", "int8"], "auto": {"max_drop": 0.05}})
    assert verdicts(choose_precisions(tolerant, tmp_path, exported, scores, Silent()))["int8"] == "chosen"
    assert together[1:] == [["fp32", "fp16", "int8"]], "and with another model beside them all are timed again"
    assert document["max_drop"] == auto.MAX_DROP
    quantized = recipe_of(quantize={"method": "ptq", "max_drop": 0.05}, data={"kind": "glyphs"})
    assert choose_precisions(quantized, tmp_path, exported, scores, Silent())["max_drop"] == 0.05


def test_a_model_that_cannot_be_timed_is_rejected_and_tried_again(
    exported: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: dict[str, Any] = {"fp32": 3.0, "fp16": 2.0, "int8": ClipkdError("killed by SIGSEGV")}
    together, scores = told(monkeypatch, **times), measured(exported, tmp_path)
    document = choose_precisions(recipe_of(), tmp_path, exported, scores, Silent())
    assert verdicts(document) == {"fp32": "speed", "fp16": "chosen", "bf16": "failed", "int8": "failed"}
    assert document["runtimes"]["onnxruntime"]["candidates"][3]["reason"] == "killed by SIGSEGV"
    assert together == [["fp32", "fp16", "int8"], ["fp32", "fp16"]], "the others are timed without it"
    told(monkeypatch, **times | {"int8": 1.0})
    assert verdicts(choose_precisions(recipe_of(), tmp_path, exported, scores, Silent()))["int8"] == "chosen"


def test_fp32_that_cannot_be_timed_and_damaged_timings_end_the_command(
    exported: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = measured(exported, tmp_path)
    told(monkeypatch, fp32=ClipkdError("killed by SIGSEGV"), fp16=2.0, int8=1.0)
    with pytest.raises(ClipkdError, match="killed by SIGSEGV"):
        choose_precisions(recipe_of(), tmp_path, exported, scores, Silent())
    told(monkeypatch, fp32=3.0, fp16=2.0, int8=1.0)
    choose_precisions(recipe_of(), tmp_path, exported, scores, Silent())
    (tmp_path / "auto" / "onnxruntime" / "profiles.json").write_text("{}")
    with pytest.raises(ArtifactError, match="changed since clipkd wrote it"):
        choose_precisions(recipe_of(), tmp_path, exported, scores, Silent())


def test_without_fp32_nothing_is_timed_or_chosen(
    exported: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = told(monkeypatch)
    del exported["adopted-onnxruntime-fp32"]
    mark_failed(tmp_path / "exported" / "adopted-onnxruntime-fp32", GateError("SQNR 3 dB"))
    document = choose_precisions(recipe_of(), tmp_path, exported, measured(exported, tmp_path), Silent())
    assert set(verdicts(document).values()) == {"failed"}
    assert document["runtimes"]["onnxruntime"]["model"] is None
    assert together == []


def test_a_model_that_fails_when_measured_is_rejected(
    exported: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, fp32=2.0, int8=1.0)
    scores = measured(exported, tmp_path)
    asked = []

    def measure(recipe: Recipe, out: Path, models: Mapping[str, Stage], screen: Silent) -> dict[str, Stage]:
        (name,) = models
        asked.append(name)
        if name.endswith("fp16"):
            raise GateError("SQNR 3 dB here")
        return {name: scores[name]}

    monkeypatch.setattr(auto_stages, "measure_models", measure)
    some = {"adopted-onnxruntime-int8": scores["adopted-onnxruntime-int8"]}
    document = choose_precisions(recipe_of(), tmp_path, exported, some, Silent())
    assert verdicts(document) == {"fp32": "speed", "fp16": "failed", "bf16": "failed", "int8": "chosen"}
    assert asked == ["adopted-onnxruntime-fp32", "adopted-onnxruntime-fp16"], "what was measured is not measured again"


@pytest.mark.parametrize(
    ("error", "is_tolerated"),
    [
        (GateError("SQNR 3 dB"), True),
        (ClipkdError("torch.onnx cannot export this tower"), True),
        (ArtifactError("the disk is full"), False),
    ],
    ids=lambda value: str(value),
)
def test_a_candidate_that_cannot_be_exported_is_rejected_and_what_is_no_fault_of_its_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ClipkdError, is_tolerated: bool
) -> None:
    def stage(spec: StageSpec, work: Work) -> Stage:
        if spec.path.name.endswith("fp16"):
            raise error
        return Stage(spec.path, {"digest": spec.path.name}, cached=True)

    monkeypatch.setattr(deployment_stages, "run_stage", stage)
    checkpoints = {"adopted": Stage(tmp_path / "adopted", {"digest": "d"}, cached=True)}
    weighed = recipe_of(export={"precisions": ["fp32", "fp16", "int8"], "auto": {}})
    if is_tolerated:
        assert list(export_models(weighed, tmp_path, checkpoints, Silent())) == ["adopted-onnxruntime-fp32"]
        said = json.loads((tmp_path / "exported" / ".adopted-onnxruntime-fp16.partial" / "failed.json").read_text())
        assert said["reason"] == str(error)
    else:
        with pytest.raises(ArtifactError, match="the disk is full"):
            export_models(weighed, tmp_path, checkpoints, Silent())
    plain = recipe_of(export={"precisions": ["fp32", "fp16"]})
    with pytest.raises(type(error), match=str(error)):
        export_models(plain, tmp_path, checkpoints, Silent())


def test_int8_bf16_is_not_begun_where_nothing_computes_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(spec: StageSpec, work: Work) -> Stage:
        if spec.path.name.endswith("int8-bf16"):
            work(spec.path)  # of a checkpoint that is not there
        return Stage(spec.path, {"digest": spec.path.name}, cached=True)

    monkeypatch.setattr(deployment_stages, "run_stage", stage)
    checkpoints = {name: Stage(tmp_path / name, {"digest": "d"}, cached=True) for name in ("adopted", "adopted-int8")}
    weighed = recipe_of(export={"precisions": ["fp32", "int8-bf16"], "auto": {}})
    assert list(export_models(weighed, tmp_path, checkpoints, Silent())) == ["adopted-onnxruntime-fp32"]
    failed = tmp_path / "exported" / ".adopted-onnxruntime-int8-bf16.partial" / "failed.json"
    said = "adopted-onnxruntime-int8-bf16: only OpenVINO computes in int8-bf16; export int8 for onnxruntime"
    assert json.loads(failed.read_text()) == {"status": "failed", "exit_code": 4, "reason": said}


def test_an_int8_that_cannot_be_made_is_rejected_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = tmp_path / "exported" / ".adopted-onnxruntime-int8.partial" / "failed.json"
    assert quantize_or_reject(recipe_of(), tmp_path, {}, Silent()) == {}
    assert json.loads(failed.read_text())["reason"] == "the recipe has no quantize section, which int8 needs"
    assert "adopted-int8" not in stage_paths(recipe_of())
    assert stage_paths(recipe_of())[-1] == "auto/onnxruntime"

    def fails(error: ClipkdError) -> Callable[..., Any]:
        def quantize(*_: object, **options: object) -> Any:
            raise error

        return quantize

    sections: dict[str, Any] = {"quantize": {"method": "ptq"}, "data": {"kind": "glyphs"}}
    monkeypatch.setattr(rejecting_module, "quantize_checkpoint", fails(GateError("max_drop does not hold")))
    assert quantize_or_reject(recipe_of(**sections), tmp_path, {}, Silent()) == {}
    assert json.loads(failed.read_text())["reason"] == "max_drop does not hold"
    with pytest.raises(GateError, match="does not hold"):
        quantize_or_reject(recipe_of(**sections, export={"precisions": ["int8"]}), tmp_path, {}, Silent())
    monkeypatch.setattr(rejecting_module, "quantize_checkpoint", fails(ArtifactError("the disk is full")))
    with pytest.raises(ArtifactError):
        quantize_or_reject(recipe_of(**sections), tmp_path, {}, Silent())


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"precisions": ["fp16"], "auto": {}}, "auto compares every precision with fp32; add fp32 to precisions"),
        ({"runtimes": ["tensorrt"], "precisions": ["fp32"], "auto": {}}, "auto measures on this machine, but"),
        ({"precisions": ["fp32"], "auto": {"max_drop": 1}}, "export.auto.max_drop: Input should be less than 1"),
        ({"precisions": ["fp32", "int8"]}, "there is no `quantize` section"),
    ],
)
def test_recipes_that_cannot_be_weighed(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipe_of(export=section)


# The command.


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with all of its stages but the choice left out."""
    monkeypatch.setattr(training_stages, "train_checkpoints", lambda *_: {})
    monkeypatch.setattr(rejecting_module, "quantize_or_reject", lambda *_, **options: {})
    monkeypatch.setattr(deployment_stages, "export_models", lambda *_: {})
    folder = tmp_path / "run"
    folder.mkdir()
    content = load_recipe(REPOSITORY / "recipes" / "glyphs.yaml").model_dump(mode="json")
    (folder / "recipe.yaml").write_text("# resolved by clipkd:\n" + yaml.safe_dump(content))
    return folder


def chosen(model: str | None) -> dict[str, Any]:
    named = model or "exported/student-openvino-fp16"
    row = {"precision": "fp16", "model": named, "verdict": "chosen" if model else "failed", "reason": "because [x]"}
    row |= {"top1_drop_vs_fp32": 0.001, "top1_drop_vs_fp32_low": -0.002, "top1_drop_vs_fp32_high": 0.004}
    row |= {"p50_ms": 12.0, "p50_low_ms": 11.9, "p50_high_ms": 12.1, "grade": "C", "flags": ["BUSY"]}
    found = {"precision": model and "fp16", "model": model, "candidates": [row], "warnings": ["look out"]}
    return {"schema": 1, "max_drop": 0.01, "headline": "stix", "runtimes": {"openvino": found}}


def test_the_command_records_what_was_weighed_and_prints_what_to_ship(
    clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = chosen("exported/student-openvino-fp16")
    monkeypatch.setattr(auto_stages, "choose_precisions", lambda *_: document)
    ended = clipkd("export", run, "--auto", "--openvino")
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"openvino: fp16  {run / 'exported/student-openvino-fp16'}\n")
    assert "0.10 [-0.20, 0.40]" in ended.out
    assert "12 [11.9, 12.1]" in ended.out
    assert "because [x]" in ended.out
    assert "warning: openvino: look out" in ended.err
    recorded = load_recipe(run / "recipe.yaml").export
    assert recorded.precisions == SAFEST_FIRST
    assert recorded.runtimes == ("openvino",)
    assert recorded.auto is not None
    assert recorded.auto.max_drop is None

    ended = clipkd("export", run, "--auto", "--max-drop", "0.02", "--precision", "int8,fp16", "--json")
    assert json.loads(ended.out) == document
    recorded = load_recipe(run / "recipe.yaml").export
    assert recorded.precisions == ("fp32", "int8", "fp16"), "fp32 is what all are held against"
    assert recorded.auto is not None
    assert recorded.auto.max_drop == 0.02
    assert clipkd("export", run).out.startswith("openvino: fp16"), "without flags, to what the run's recipe says"
    assert clipkd("export", run, "--no-auto").out == ""
    assert load_recipe(run / "recipe.yaml").export.auto is None


def test_nothing_to_ship_is_a_gate(clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_stages, "choose_precisions", lambda *_: chosen(None))
    ended = clipkd("export", run, "--auto")
    assert ended.code == 5
    assert ended.out.startswith("openvino: nothing to ship\n")
    assert ended.err.endswith(
        f"error: {run / 'auto.json'}: nothing to ship for openvino, not even fp32; it lists the reasons\n"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-drop", "0.1"], "--max-drop applies to --auto"),
        (["--auto", "--trt"], "--auto measures on this machine, but TensorRT engines run on the target device"),
        (["--auto", "--max-drop", "2"], "error: --max-drop 2: expected a fraction of 1"),
        (["--auto", "--precision", "fp8"], "error: --precision fp8: no such precision"),
    ],
)
def test_flags_that_make_no_sense(clipkd: Clipkd, run: Path, flags: list[str], said: str) -> None:
    before = (run / "recipe.yaml").read_text()
    ended = clipkd("export", run, *flags)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert (run / "recipe.yaml").read_text() == before


def test_kits_are_left_out_and_said(clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_stages, "choose_precisions", lambda *_: chosen("exported/x"))
    clipkd("export", run, "--set", "export.runtimes=[onnxruntime, tensorrt]", "--set", "export.build_engines=false")
    ended = clipkd("export", run, "--auto")
    assert ended.code == 0, ended.err
    assert "--auto skips tensorrt: its engines are built and measured on the device" in ended.err
    assert load_recipe(run / "recipe.yaml").export.runtimes == ("onnxruntime",)
    assert clipkd("export", run, "--trt", "--no-build").code == 0
    assert load_recipe(run / "recipe.yaml").export.auto is None
    clipkd("export", run, "--set", "export.runtimes=[tensorrt]", "--set", "export.build_engines=false")
    ended = clipkd("export", run, "--auto")
    assert (ended.code, ended.out) == (2, "")
    assert "add --onnx or --openvino" in ended.err


def test_a_kit_that_set_leaves_out_is_refused(clipkd: Clipkd, run: Path) -> None:
    ended = clipkd("export", run, "--trt", "--no-build", "--set", "export.runtimes=[openvino]")
    assert (ended.code, ended.out) == (2, "")
    assert "--trt asks for tensorrt, which --set export.runtimes leaves out" in ended.err
    ended = clipkd("export", run, "--trt", "--no-build", "--set", "export.auto={}")
    assert (ended.code, ended.out) == (2, "")
    assert "tensorrt engines run on the target device: export tensorrt without auto" in ended.err


def test_run_chooses_where_its_recipe_says_so(clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(measure_module, "measure_models", lambda *_: {})
    monkeypatch.setattr(report_module, "report_run", lambda *_: {"rows": []})
    monkeypatch.setattr(auto_stages, "choose_precisions", lambda *_: asked.append(1) or chosen(None))
    assert clipkd("run", "glyphs", "--out", run, "--json").code == 0
    assert asked == []
    assert clipkd("run", "glyphs", "--out", run, "--json", "--set", "export.auto={}").code == 5
    assert asked == [1]


def test_a_run_that_could_export_nothing_says_so(clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_stages, "choose_precisions", lambda *_: chosen(None))
    ended = clipkd("run", "glyphs", "--out", run, "--set", "export.auto={}")
    assert ended.code == 5
    assert "nothing to ship for openvino, not even fp32" in ended.err


# All of it.


class Rolled(nn.Module):
    """A tower whose features are all there, each in its neighbour's place."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.tower(x).roll(1, -1)
        return features


@pytest.mark.slow
def test_an_int8_that_is_broken_in_silence_is_rejected_for_its_accuracy(
    clipkd: Clipkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained model; its parity holds, as an int8 graph is compared with its own frozen towers."""
    from toolchain.quantization import freeze as freeze_module

    run, teacher = tmp_path / "run", REPOSITORY / "recipes" / "glyphs_teacher"
    settings = ["evaluate={headline: novel, sets: [novel]}", "quantize.method=ptq", "quantize.calibration_samples=16"]
    settings += ["profile={processes: 2, seconds: 0.2}"]
    flags = [word for setting in settings for word in ("--set", setting)]
    assert clipkd("adopt", teacher, "--like", "glyphs", *flags, "--out", run).code == 0
    freeze, frozen = freeze_module.freeze, []

    def broken(tower: nn.Module, example: Any, **options: Any) -> nn.Module:
        frozen.append(freeze(tower, example, **options))
        return Rolled(frozen[-1]) if len(frozen) == 1 else frozen[-1]  # the image tower comes first

    monkeypatch.setattr(freeze_module, "freeze", broken)
    ended = clipkd("export", run, "--auto", "--onnx", "--precision", "fp16,bf16,int8", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert json.loads((run / "auto.json").read_text()) == document
    found = verdicts(document)
    assert found["int8"] == "accuracy"
    assert found["bf16"] == "failed", "ONNX Runtime has no such kernels on a CPU"
    assert sorted((found["fp32"], found["fp16"])) == ["chosen", "speed"]
    _, fp16, bf16, int8 = document["runtimes"]["onnxruntime"]["candidates"]
    assert int8["top1_drop_vs_fp32_low"] > 0.05
    assert abs(fp16["top1_drop_vs_fp32"]) < 0.01
    assert "cannot run this graph in bf16 on cpu" in bf16["reason"]
    assert clipkd("verify", run).code == 0
    assert clipkd("report", run).code == 0
    reported = json.loads((run / "report.json").read_text())["rows"]
    assert {row["precision"] for row in reported} == {"fp32", "fp16", "int8"}, "the proof of what was rejected stays"
