"""Rows against the files they come from, the front against its definition, and pictures that can be read."""

import csv
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from toolchain.errors import ArtifactError
from toolchain.report.chart import latency_axis, render_chart
from toolchain.report.collect import collect
from toolchain.report.findings import findings
from toolchain.report.measured import machine_name
from toolchain.report.pareto import pareto_front
from toolchain.report.row import FIELDS, Number, ReportRow, Word, complete_row, read_report
from toolchain.report.tables import render_csv, render_markdown, terminal_rows
from toolchain.report.units import duration
from toolchain.report.write import write_report

ROUNDING = 1e-12  # float64 against float64, one operation
MACHINE = {"cpu": "Example CPU <2>", "cores": 2, "system": "Linux x86_64"}
N = 2000

DESIGN_FIELDS = {
    *("name", "role", "runtime", "precision", "device", "machine", "batch"),
    *("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "text_p50_ms", "e2e_p50_ms", "images_per_s"),
    *("top1", "top1_low", "top1_high", "num_eval_images", "top1_drop_vs_teacher", "top1_drop_vs_fp32"),
    *("accuracy", "retrieval", "params_image", "params_text", "size_bytes", "peak_memory_bytes", "train_s", "reverted"),
    *("grade", "flags", "status", "pareto", "source", "pytorch", "fixed_batch"),
}

# role, precision: p50 in ms, top-1 hits of N, size in bytes
MODELS = {
    ("teacher", "fp32"): (3.2, 1640, 48_000_000),
    ("baseline", "fp32"): (0.92, 1180, 11_400_000),
    ("student", "fp32"): (0.91, 1420, 11_400_000),
    ("student", "int8"): (0.48, 1391, 3_100_000),
}
TRAIN_S = {"teacher": 1810.0, "baseline": 61.0, "student": 95.5, "student-int8": 14.2}


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def manifest(summary) -> dict:
    return {
        "format": 1,
        "key": "5e884898da28047151d0e56f8dc62927",
        "summary": summary,
        "started_at": "2026-01-02T03:04:05+00:00",
        "took_s": 12.5,
        "machine": MACHINE,
        "versions": {"python": "3.11.2", "onnxruntime": "1.31.1"},
        "revision": "0123456789ab",
    }


def scores(hits: int) -> dict:
    p, half = hits / N, 1.96 * math.sqrt(hits / N * (1 - hits / N) / N)
    recalls = {f"{way}_r{k}": min(1.0, p * k**0.1) for way in ("name_to_image", "image_to_name") for k in (1, 5, 10)}
    top5 = min(1.0, p + 0.1)
    return {
        **{"top1": p, "top1_low": p - half, "top1_high": p + half, "n": N, "retrieval": recalls},
        **{"top5": top5, "top5_low": top5 - half, "top5_high": min(1.0, top5 + half)},
    }


def make_run(run: Path, *, models=MODELS, grade="B", curve_steps=120) -> Path:
    """A run directory as the stages leave it: a teacher, a baseline, a student in fp32 and in int8, measured on CPU."""
    for stage, train_s in TRAIN_S.items():
        write_json(run / stage / "manifest.json", manifest({"train_s": train_s}))
    noise = random.Random(0)
    for stage, names in (("student", ("task", "crd", "fd", "icl")), ("baseline", ("task",))):
        lines = []
        for step in range(curve_steps):
            terms = {
                name: {"unweighted": value, "weighted": value}
                for name in names
                for value in [(1 + len(name) / 4) * math.exp(-step / 40) + 0.4 + 0.05 * noise.random()]
            }
            loss = sum(term["weighted"] for term in terms.values())
            lines.append({"step": step, "loss": loss, "terms": terms, "images_per_s": 3000 + 200 * noise.random()})
        (run / stage / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.yaml").write_text("name: glyphs\n# a <comment> & an ampersand\ndistill: {steps: 120}\n")
    for (role, precision), (p50_ms, hits, size_bytes) in models.items():
        name = f"{role}-onnxruntime-{precision}"
        summary = {"role": role, "runtime": "onnxruntime", "precision": precision, "opset": 20}
        summary |= {"params_image": 2_000_000, "params_text": 850_000, "size_bytes": size_bytes}
        write_json(run / "exported" / name / "manifest.json", manifest(summary))
        measured = run / "measured" / name / "cpu"
        tower = {"min_cosine": 0.99999, "min_sqnr_db": 90.0, "worst_sample": 3, "num_samples": 256}
        write_json(measured / "manifest.json", manifest({}))
        write_json(measured / "parity.json", {"image": tower, "text": tower})
        sets = {"stix": scores(hits), "serif": scores(hits + 200), "novel": scores(hits // 2)}
        write_json(measured / "evaluation.json", {"headline": "stix", "sets": sets})
        latency = {"p50_ms": p50_ms, "p50_low_ms": 0.97 * p50_ms, "p50_high_ms": 1.04 * p50_ms}
        latency |= {"p90_ms": 1.2 * p50_ms, "p99_ms": None, "n": 400, "processes": 5, "load_ms": 20.0, "first_ms": 4.0}
        profile = {"device": "cpu", "machine": MACHINE, "threads": 1, "batch": 1, "grade": grade, "flags": []}
        profile |= {"image": latency | {"images_per_s": 900 / p50_ms}, "text": latency | {"texts_per_s": 400.0}}
        profile |= {"e2e_p50_ms": p50_ms + 0.3, "images_per_s": 1500 / p50_ms}
        profile |= {"peak_memory_bytes": 90_000_000, "size_bytes": size_bytes}
        write_json(measured / "profile.json", profile)
    return run


def add_reference(run: Path, *, mode="eager", p50_ms=2.0, hits=1420) -> Path:
    """The fp32 student as it was measured in PyTorch."""
    of = run / "measured" / "student-onnxruntime-fp32" / "cpu"
    measured = run / "measured" / f"student-pytorch-{mode}" / "cpu"
    shutil.copytree(of, measured)
    summary = {"role": "student", "runtime": "pytorch", "pytorch": mode, "precision": "fp32", "params_image": 2_000_000}
    write_json(measured / "manifest.json", manifest(summary) | {"kind": "reference"})
    latency = {"p50_ms": p50_ms, "p50_low_ms": 0.97 * p50_ms, "p50_high_ms": 1.04 * p50_ms}
    edit(measured / "profile.json", image=latency)
    evaluation = json.loads((measured / "evaluation.json").read_text())
    edit(measured / "evaluation.json", sets=evaluation["sets"] | {"stix": scores(hits)})
    return measured


def add_openvino(run: Path, *, faster=1.5) -> None:
    """The students again, in another runtime."""
    for precision in ("fp32", "int8"):
        name, other = f"student-openvino-{precision}", f"student-onnxruntime-{precision}"
        for folder in ("exported", "measured"):
            shutil.copytree(run / folder / other, run / folder / name)
        path = run / "exported" / name / "manifest.json"
        edit(path, summary=json.loads(path.read_text())["summary"] | {"runtime": "openvino"})
        profile = run / "measured" / name / "cpu" / "profile.json"
        image = json.loads(profile.read_text())["image"]
        scaled = {key: value / faster for key, value in image.items() if key.startswith("p50")}
        edit(profile, image=image | scaled)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "quickstart")


def by_name(report):
    return {row["name"]: row for row in report["rows"]}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def front_by_definition(points):
    def dominates(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    return [not any(dominates(other, point) for other in points) for point in points]


def test_pareto_front_equals_its_definition():
    random_ = random.Random(0)
    for size in range(12):
        for _ in range(60):
            points = [(random_.randint(0, 5), random_.randint(0, 5)) for _ in range(size)]  # small, so that many tie
            assert pareto_front(points) == front_by_definition(points)


def test_pareto_front_by_hand():
    assert pareto_front([(1, 0.5), (2, 0.6), (2, 0.5), (3, 0.6), (1, 0.5)]) == [True, True, False, False, True]
    assert pareto_front([(math.nan, 1.0), (1.0, math.nan), (2.0, 0.1)]) == [False, False, True]
    assert pareto_front([]) == []


def test_every_row_has_every_field_of_the_contract(run):
    edit(run / "exported" / "teacher-onnxruntime-fp32" / "manifest.json", summary={})
    make_run(run, models={("adopted", "fp16"): (1.0, 1000, 1)})
    for path in (run / "measured" / "adopted-onnxruntime-fp16" / "cpu").iterdir():
        path.unlink()
    report = collect([run])
    assert report["schema"] == 1
    assert len(report["rows"]) == 5
    for row in report["rows"]:
        assert row.keys() >= DESIGN_FIELDS
        assert list(row) == list(FIELDS) == list(ReportRow.__annotations__)
    json.dumps(report, allow_nan=False)


def test_an_unknown_row_has_values_of_its_own():
    first, second = complete_row({}), complete_row({"name": "rival"})
    assert list(first) == list(second) == list(FIELDS)
    first["flags"].append("noisy")
    assert (second["name"], second["flags"], second["status"], second["p50_ms"]) == ("rival", [], "ok", None)


def test_a_field_can_be_compared_by_best_only_as_what_it_is():
    for name, field in FIELDS.items():
        assert field.better is None or isinstance(field.kind, Number), name
        assert not field.where or isinstance(field.kind, Word), name
        assert not field.external or field.kind is not None, name


def test_every_field_is_documented_and_nothing_else():
    text = (REPOSITORY / "docs" / "report.md").read_text()
    section = text.split("## report.json")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert sorted(documented) == sorted(FIELDS)


def test_rows_say_what_the_files_say(run):
    rows = by_name(collect([run]))
    assert list(rows) == ["teacher fp32", "baseline fp32", "student fp32", "student int8"]
    row = rows["student int8"]
    assert row["role"] == "student"
    assert row["runtime"] == "onnxruntime"
    assert (row["device"], row["machine"], row["batch"]) == ("cpu", "Example CPU <2>, 2 cores", 1)
    assert (row["p50_ms"], row["p99_ms"]) == (0.48, None)
    assert row["text_p50_ms"] == 0.48
    assert row["top1"] == 1391 / N
    assert row["num_eval_images"] == N
    assert row["accuracy"]["serif"]["top1"] == 1591 / N
    assert set(row["accuracy"]) == set(row["retrieval"]) == {"stix", "serif", "novel"}
    assert row["retrieval"]["stix"]["name_to_image_r1"] == 1391 / N
    assert row["size_bytes"] == 3_100_000
    assert row["min_cosine"] == {"image": 0.99999, "text": 0.99999}
    assert row["source"] == "exported/student-onnxruntime-int8/manifest.json"
    assert (run / row["source"]).exists()
    assert row["status"] == "ok"


def test_train_time_is_that_of_the_checkpoint_exported(run):
    assert {name: row["train_s"] for name, row in by_name(collect([run])).items()} == {
        "teacher fp32": 1810.0,
        "baseline fp32": 61.0,
        "student fp32": 95.5,
        "student int8": 14.2,
    }
    (run / "student-int8" / "manifest.json").unlink()
    assert by_name(collect([run]))["student int8"]["train_s"] == 95.5  # quantized without training of its own


def test_int8_fp16_is_of_the_int8_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", models=MODELS | {("student", "int8-fp16"): MODELS["student", "int8"]})
    found = {"train_s": 14.2, "sensitivity": {"reverted": [{"layer": "image/a"}]}}
    write_json(run / "student-int8" / "manifest.json", manifest(found))
    row = by_name(collect([run]))["student int8-fp16"]
    assert (row["train_s"], row["reverted"]) == (14.2, 1)


def test_layers_in_float_are_counted_and_said(run):
    assert {row["reverted"] for row in collect([run])["rows"]} == {None}
    found = {"train_s": 14.2, "sensitivity": {"reverted": [{"layer": "image/a"}, {"layer": "text/b"}]}}
    write_json(run / "student-int8" / "manifest.json", manifest(found))
    rows = by_name(collect([run]))
    assert {name: row["reverted"] for name, row in rows.items() if row["reverted"] is not None} == {"student int8": 2}
    assert "2 layers in float" in render_markdown(collect([run]), title="mine")
    found["sensitivity"]["reverted"].clear()
    write_json(run / "student-int8" / "manifest.json", manifest(found))
    assert by_name(collect([run]))["student int8"]["reverted"] == 0
    assert "in float" not in render_markdown(collect([run]), title="mine")


def test_drops_are_reference_minus_row(run):
    rows = by_name(collect([run]))
    assert rows["teacher fp32"]["top1_drop_vs_teacher"] == 0
    assert rows["student fp32"]["top1_drop_vs_teacher"] == pytest.approx((1640 - 1420) / N, abs=ROUNDING)
    assert rows["student int8"]["top1_drop_vs_teacher"] == pytest.approx((1640 - 1391) / N, abs=ROUNDING)
    assert rows["student int8"]["top1_drop_vs_fp32"] == pytest.approx((1420 - 1391) / N, abs=ROUNDING)
    assert rows["baseline fp32"]["top1_drop_vs_fp32"] == 0


def test_without_a_teacher_there_is_no_drop_against_it(tmp_path):
    run = make_run(tmp_path / "adopted", models={("adopted", "int8"): (1.0, 900, 1)})
    (row,) = collect([run])["rows"]
    assert row["top1_drop_vs_teacher"] is None
    assert row["top1_drop_vs_fp32"] is None


def test_other_images_are_no_reference(run):
    path = run / "measured" / "teacher-onnxruntime-fp32" / "cpu" / "evaluation.json"
    edit(path, headline="serif")
    assert by_name(collect([run]))["student int8"]["top1_drop_vs_teacher"] is None


def test_the_front_needs_grade_a_or_b(run):
    assert {name for name, row in by_name(collect([run])).items() if row["pareto"]} == {
        "teacher fp32",
        "student fp32",
        "student int8",
    }
    edit(run / "measured" / "student-onnxruntime-int8" / "cpu" / "profile.json", grade="C", flags=["BUSY"])
    rows = by_name(collect([run]))
    assert not rows["student int8"]["pareto"]
    assert rows["student int8"]["flags"] == ["BUSY"]
    assert rows["student fp32"]["pareto"]


def test_a_checkpoint_in_pytorch_has_a_row_and_neither_stands_on_the_front_nor_moves_it(run):
    front = {row["model"] for row in collect([run])["rows"] if row["pareto"]}
    add_reference(run, p50_ms=0.1, hits=1900)
    report = write_report([run], run)
    rows = {row["model"]: row for row in report["rows"]}
    row = rows["student-pytorch-eager"]
    assert set(row) == set(rows["student-onnxruntime-fp32"])
    assert (row["role"], row["runtime"], row["pytorch"]) == ("student", "pytorch", "eager")
    assert (row["p50_ms"], row["top1"], row["train_s"]) == (0.1, 1900 / N, 95.5)
    assert row["source"] == "measured/student-pytorch-eager/cpu/manifest.json"
    assert row["top1_drop_vs_fp32"] == 0, "it is fp32 itself"
    assert {row["model"] for row in report["rows"] if row["pareto"]} == front
    edit(run / "measured" / "student-pytorch-eager" / "cpu" / "profile.json", grade="C", flags=["BUSY"])
    rows = {row["model"]: row for row in collect([run])["rows"]}
    assert rows["student-pytorch-eager"]["flags"] == ["BUSY"], "and no front is drawn for want of a better one"


def test_references_alone_have_a_picture_and_no_front(run):
    add_reference(run)
    report = collect([run])
    report["rows"] = [row for row in report["rows"] if row["pytorch"]]
    report["rows"][0]["pareto"] = False
    assert render_chart(report, "png").startswith(b"\x89PNG")


def test_where_everything_is_noisy_the_front_says_so(tmp_path):
    rows = by_name(collect([make_run(tmp_path / "noisy", grade="C")]))
    assert all(row["flags"] == ["noisy"] for row in rows.values())
    assert [name for name, row in rows.items() if not row["pareto"]] == ["baseline fp32"]


def test_each_device_and_machine_has_its_own_front(run):
    for folder in (run / "measured").iterdir():
        for name in ("parity.json", "evaluation.json", "profile.json"):
            write_json(folder / "orin" / name, json.loads((folder / "cpu" / name).read_text()))
        edit(folder / "orin" / "profile.json", device="orin", machine={"name": "Orin"})
    edit(
        run / "measured" / "baseline-onnxruntime-fp32" / "orin" / "profile.json",
        image={"p50_ms": 0.01, "p50_low_ms": 0.01, "p50_high_ms": 0.01},
    )
    rows = by_name(collect([run]))
    assert len(rows) == 8
    assert rows["baseline fp32 orin"]["pareto"]
    assert rows["baseline fp32 orin"]["machine"] == "Orin"
    assert not rows["baseline fp32 cpu"]["pareto"]


def test_names_say_no_more_than_it_takes(run):
    manifest_path = run / "exported" / "student-openvino-int8" / "manifest.json"
    write_json(manifest_path, manifest({"role": "student", "runtime": "openvino", "precision": "int8"}))
    names = [row["name"] for row in collect([run])["rows"]]
    assert set(names) == {
        *("teacher fp32", "baseline fp32", "student fp32", "student int8 onnxruntime", "student int8 openvino")
    }
    add_reference(run)
    add_reference(run, mode="compiled")
    names = [row["name"] for row in collect([run])["rows"]]
    assert {"student fp32 onnxruntime", "student fp32 pytorch eager", "student fp32 pytorch compiled"} < set(names)
    assert len(set(names)) == 7


@pytest.mark.parametrize(
    ("missing", "status"),
    [
        (["profile.json"], "no profile.json"),
        (["parity.json", "evaluation.json"], "no parity.json, evaluation.json"),
    ],
)
def test_a_gap_has_a_reason_and_no_place_on_the_front(run, missing, status):
    for name in missing:
        (run / "measured" / "student-onnxruntime-int8" / "cpu" / name).unlink()
    row = by_name(collect([run]))["student int8"]
    assert row["status"] == status
    assert not row["pareto"]
    write_report([run], run)


def test_what_was_measured_of_an_earlier_export_is_said_and_not_ranked(run):
    name, reference = "student-onnxruntime-int8", add_reference(run)
    exported, measured = run / "exported" / name / "manifest.json", run / "measured" / name / "cpu" / "manifest.json"
    edit(exported, digest="a")
    edit(measured, inputs={"model": "a"})
    edit(run / "student" / "manifest.json", digest="c")
    edit(reference / "manifest.json", inputs={"checkpoint": "c", "model": "e"})
    rows = by_name(collect([run]))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["student int8"]["pareto"]
    edit(exported, digest="b")
    edit(run / "student" / "manifest.json", digest="d")
    rows = by_name(collect([run]))
    assert rows["student int8"]["status"] == "measured before it was exported again"
    assert rows["student fp32 pytorch eager"]["status"] == "measured before it was trained again"
    assert not rows["student int8"]["pareto"]
    assert rows["teacher fp32"]["status"] == "ok"


def test_work_in_progress_is_not_reported(run):
    (run / "exported" / "student-onnxruntime-int8").rename(run / "exported" / ".student-onnxruntime-int8.partial")
    (run / "measured" / "student-onnxruntime-fp32" / "cpu").rename(
        run / "measured" / "student-onnxruntime-fp32" / ".cpu.partial"
    )
    rows = by_name(collect([run]))
    assert list(rows) == ["teacher fp32", "baseline fp32", "student fp32"]
    assert rows["student fp32"]["status"] == "not measured"
    assert rows["student fp32"]["top1_drop_vs_teacher"] is None


def test_nan_in_a_measurement_is_null_and_never_on_the_front(run):
    path = run / "measured" / "student-onnxruntime-int8" / "cpu" / "evaluation.json"
    path.write_text(path.read_text().replace(str(1391 / N), "NaN"))
    row = by_name(write_report([run], run))["student int8"]
    assert row["top1"] is None
    assert not row["pareto"]


def test_nothing_exported_is_an_error_with_the_next_command(tmp_path):
    with pytest.raises(ArtifactError) as raised:
        collect([tmp_path])
    assert str(raised.value) == (
        f"{tmp_path}: no exported/*/manifest.json, so there is nothing to report. Export a model first:\n"
        f"  clipkd export {tmp_path} --onnx --precision fp32"
    )


def test_what_is_no_report_is_not_to_be_deleted(tmp_path):
    """A user's own file may lie in a folder of his work: only a stage's folder can be made again."""
    own = tmp_path / "my.yaml"
    own.write_text("name: my\n")
    with pytest.raises(ArtifactError) as raised:
        read_report(own)
    assert str(raised.value) == (
        f"{own}: not JSON: Expecting value: line 1 column 1 (char 0). "
        "Expected the report.json that clipkd report writes"
    )


@pytest.mark.parametrize(("content", "complaint"), [("{", "not JSON: "), ("[1]", "expected a JSON object, got list")])
def test_a_damaged_file_is_named(run, content, complaint):
    path = run / "measured" / "student-onnxruntime-int8" / "cpu" / "profile.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=f"^{re.escape(f'{path}: {complaint}')}"):
        collect([run])


def test_a_machine_keeps_its_name_when_its_load_changes():
    names = {machine_name(MACHINE | {"load": load, "temperature": 50 + load}) for load in (0.1, 2.5)}
    assert names == {"Example CPU <2>, 2 cores"}
    assert machine_name(None) is None


def test_terminal_rows_by_hand(run):
    headers, rows = terminal_rows(collect([run]))
    assert headers == [
        *["name", "runtime", "precision", "p50 ms", "images/s", "size MB", "stix top-1 %", "drop vs teacher"],
        *["train time", "grade", "front"],
    ]
    assert rows[3] == [
        *["student int8", "onnxruntime", "int8", "0.480 [0.466, 0.499]", "3,125", "3.10", "69.5 [67.5, 71.6]"],
        *["12.4 pp", "14 s", "B", "★"],
    ]
    assert rows[1][10] == ""
    assert rows[0][7:9] == ["0.0 pp", "30 min 10 s"]


def test_unknown_cells_are_dashes(run):
    write_json(run / "exported" / "extra" / "manifest.json", manifest({}))
    _, rows = terminal_rows(collect([run]))
    assert [row[3:] for row in rows if row[0] == "extra"] == [["-"] * 7 + ["", "not measured"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_findings_name_what_distillation_bought(run):
    distillation, compression, quantization = findings(collect([run])["rows"])
    assert (distillation.value, compression.value, quantization.value) == (
        "+12.0 points",
        "3.52x faster",
        "1.90x faster",
    )
    assert distillation.detail == ("71.0 % top-1 instead of 59.0 %, for 1 min 36 s of training instead of 1 min 01 s")
    assert "3.10 MB instead of 11.4 MB, 69.5 % top-1 instead of 71.0 %" in quantization.detail
    assert "overlap" not in distillation.detail


def test_findings_compare_within_a_runtime(run):
    add_openvino(run)
    add_reference(run)
    distillation, compression, deployment, *quantization = findings(collect([run])["rows"])
    assert (distillation.value, compression.value) == ("+12.0 points", "3.52x faster")
    assert (deployment.title, deployment.value) == ("ONNX Runtime against PyTorch eager", "2.20x faster")
    assert "0.910 ms instead of 2.00 ms, both in fp32" in deployment.detail
    assert [(item.title, item.value) for item in quantization] == [
        ("int8 against fp32, ONNX Runtime", "1.90x faster"),
        ("int8 against fp32, OpenVINO", "1.90x faster"),
    ]


def test_findings_compare_within_a_run(tmp_path):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", models={key: value for key, value in MODELS.items() if key[0] != "baseline"})
    add_reference(first, p50_ms=2.0)
    add_reference(second, p50_ms=4.0)
    assert [(item.title, item.value) for item in findings(collect([first, second])["rows"])] == [
        ("Student against teacher", "3.52x faster"),
        ("ONNX Runtime against PyTorch eager", "4.40x faster"),
        ("int8 against fp32, ONNX Runtime", "1.90x faster"),
    ]


def test_findings_name_what_a_cut_vocabulary_saved(run):
    cut = {"tokens": 5_000, "of": 49_408, "words": 4_000, "removed_params": 2_550_000}
    edit(run / "student" / "manifest.json", **manifest({"train_s": 95.5, "vocabulary": cut}))
    report = collect([run])
    *others, vocabulary = findings(report["rows"])
    assert len(others) == 3
    assert (vocabulary.title, vocabulary.value) == ("Vocabulary", "4.00x smaller")
    assert vocabulary.detail.startswith("5,000 of 49,408 tokens: the text tower of the student has 850,000 parameters")
    row = next(row for row in report["rows"] if row["name"] == "student fp32")
    assert row["vocabulary"] == cut
    assert (row["size_image_bytes"], row["size_text_bytes"]) == (None, None)  # exported before these were recorded


def test_findings_admit_that_intervals_overlap(tmp_path):
    models = MODELS | {("baseline", "fp32"): (0.92, 1400, 1), ("student", "int8"): (0.93, 1391, 1)}
    distillation, _, quantization = findings(collect([make_run(tmp_path / "close", models=models)])["rows"])
    assert "(intervals overlap)" in distillation.detail
    assert quantization.value == "1.02x slower"
    assert "(intervals overlap)" in quantization.detail


def test_csv_has_the_same_rows(run):
    report = collect([run])
    lines = list(csv.DictReader(io.StringIO(render_csv(report))))
    assert [line["name"] for line in lines] == [row["name"] for row in report["rows"]]
    for line, row in zip(lines, report["rows"], strict=True):
        assert float(line["p50_ms"]) == row["p50_ms"]
        assert line["p99_ms"] == ""
        assert float(line["accuracy.novel.top1"]) == row["accuracy"]["novel"]["top1"]
        assert line["pareto"] == str(row["pareto"])


def test_markdown_tables_are_rectangular_whatever_names_hold(run):
    edit(run / "measured" / "student-onnxruntime-int8" / "cpu" / "profile.json", grade="C", flags=["a|b\nc"])
    text = render_markdown(collect([run]), title="quickstart")
    assert "![Accuracy against latency](report.png)" in text
    assert "C (a\\|b c)" in text
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    tables = [table for table in tables if table]
    assert [len(table) for table in tables] == [2 + 4, 2 + 4 * 3]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_write_report_leaves_six_files_their_record_and_nothing_else(run):
    before = {path.name for path in run.iterdir()}
    report = write_report([run], run)
    written = {path.name for path in run.iterdir()} - before
    files = {"report.json", "report.csv", "report.md", "report.png", "report.svg", "report.html"}
    assert written == files | {".report.json"}
    assert set(json.loads((run / ".report.json").read_text())["files"]) == files
    assert json.loads((run / "report.json").read_text()) == report == collect([run])
    again = {name: (run / name).read_bytes() for name in written}
    write_report([run], run)
    assert {name: (run / name).read_bytes() for name in written} == again


@pytest.mark.parametrize("span", [1.0, 1.05, 1.5, 4.0, 300.0])
def test_latency_axis_has_round_ticks_inside_its_limits(span):
    rows = [
        {"p50_ms": p50_ms, "p50_low_ms": None, "p50_high_ms": None} for p50_ms in (0.37, 0.37 * span, 0.37 * span**0.5)
    ]
    (low, high), ticks = latency_axis(rows)
    assert low < 0.37 <= 0.37 * span < high
    assert 4 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert len({f"{tick:.3g}" for tick in ticks}) == len(ticks)


def labels_and_points(monkeypatch, report):
    """What the picture's labels cover, and where its markers are, in pixels."""
    kept = []
    original = matplotlib.figure.Figure.__init__

    def keep(self, *args, **kwargs):
        original(self, *args, **kwargs)
        kept.append(self)

    monkeypatch.setattr(matplotlib.figure.Figure, "__init__", keep)
    render_chart(report, "png")
    (figure,) = kept
    (axes,) = figure.axes
    labels = [text for text in axes.texts if type(text).__name__ == "Annotation"]
    extents = {label.get_text(): label.get_window_extent() for label in labels}
    return extents, [axes.transData.transform((row["p50_ms"], 100 * row["top1"])) for row in report["rows"]], axes


CROWDED = {
    **MODELS,
    ("adopted", "fp32"): (0.90, 1424, 1),
    ("adopted", "int8"): (0.50, 1400, 1),
    ("external", "fp32"): (0.93, 1410, 1),
    ("baseline", "int8"): (0.47, 1380, 1),
}


@pytest.mark.parametrize("models", [MODELS, CROWDED, {("student", "fp32"): (1.0, 1000, 1)}], ids=["4", "8", "1"])
def test_labels_cover_neither_each_other_nor_a_marker(tmp_path, monkeypatch, models):
    report = collect([make_run(tmp_path / "made", models=models)])
    extents, points, axes = labels_and_points(monkeypatch, report)
    assert set(extents) == {row["name"] for row in report["rows"]}
    boxes = list(extents.values())
    for place, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 <= box.y1 <= axes.bbox.y1
        assert not any(box.contains(*point) for point in points)
        assert not any(box.overlaps(other) for other in boxes[:place])


def test_png_is_a_picture_with_ink(run):
    image = np.asarray(Image.open(io.BytesIO(render_chart(collect([run]), "png"))).convert("L"))
    assert min(image.shape) > 600
    assert 0.01 < (image < 200).mean() < 0.3


def test_png_without_any_measurement_says_so(run):
    report = collect([run])
    for row in report["rows"]:
        row["p50_ms"] = None
    assert render_chart(report, "png").startswith(b"\x89PNG")


def test_collecting_needs_no_plotting_and_no_torch(run):
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'plotly', 'export'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from toolchain.report.collect import collect\n"
        "from toolchain.report.tables import terminal_rows, render_csv, render_markdown\n"
        "report = collect([Path(sys.argv[1])]); terminal_rows(report); render_csv(report)\n"
        "render_markdown(report, title='x')"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_drawing_leaves_pyplot_alone(run):
    code = (
        "import sys\nfrom pathlib import Path\nfrom toolchain.report.collect import collect\n"
        "from toolchain.report.chart import render_chart\n"
        "render_chart(collect([Path(sys.argv[1])]), 'png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
