"""What an exported folder holds beside its graphs: kits, model cards, hashes that are verified, labels baked in."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import yaml
from PIL import Image

from export.device_programs.runner import onnxruntime_options
from export.graphs.model_card import CARD, SNIPPET, uint8_snippet, write_card
from export.runtime.bake_classes import bake, read_lines, read_templates
from export.runtime.exported_model import open_exported
from export.runtime.predict import predict
from toolchain.errors import ArtifactError, UsageError
from toolchain.stage import open_stage

REPOSITORY = Path(__file__).parents[1]
TEACHER = str(REPOSITORY / "recipes" / "glyphs_teacher")
ONE_RUNTIME = ["--set", "export.precisions=[fp32]", "--set", "export.runtimes=[onnxruntime]"]
SAME_PROBABILITY = 1e-5  # of a softmax over logits equal to float32's rounding
SAME_FEATURE = 1e-5  # ONNX Runtime against PyTorch in float32, entries of unit vectors
SAME_LOGITS = 1e-3  # of logits up to 100: one float32 product against ONNX Runtime's, at 24 bits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped teacher's weights as a run, exported to ONNX and as a TensorRT kit by the command line."""
    import clipkd as command

    out = tmp_path_factory.mktemp("of") / "run"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for arguments in (
        ["adopt", TEACHER, "--like", "glyphs", *ONE_RUNTIME, "--out", str(out)],
        ["export", str(out), "--onnx", "--trt", "--no-build"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["clipkd", *arguments])
            with pytest.raises(SystemExit) as ended:
                command.main()
        assert not ended.value.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out


@pytest.fixture(scope="module")
def model(run) -> Path:
    return run / "exported" / "adopted-onnxruntime-fp32"


@pytest.fixture(scope="module")
def kit(run) -> Path:
    return run / "exported" / "adopted-tensorrt-fp32"


@pytest.fixture
def labels(tmp_path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("latin small letter a\nlatin small letter b\nÅngström {0.x} \u201cquoted\u201d\n", encoding="utf-8")
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return path


def test_a_kit_is_complete_and_recorded(run, model, kit) -> None:
    names = {path.name for path in kit.iterdir()}
    assert {"image.onnx", "text.onnx", "tokenizer.json", "preprocess.json", "classes.npz"} <= names
    assert {"build_engine.py", "build_on_device.sh", "runner.py", "SHA256SUMS", "README.md", CARD} <= names
    sums = dict(reversed(line.split("  ")) for line in (kit / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == names - {"SHA256SUMS", "manifest.json"}
    assert sums == {name: hashlib.sha256((kit / name).read_bytes()).hexdigest() for name in sums}
    assert (kit / "image.onnx").read_bytes() == (model / "image.onnx").read_bytes()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["export"]["runtimes"] == ["onnxruntime", "tensorrt"]
    assert recipe["export"]["build_engines"] is False


def test_without_tensorrt_the_kit_is_written_and_said(run, clipkd, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ended = clipkd("export", run, "--trt")
    assert ended.code == 3
    assert "pip install tensorrt" in ended.err
    assert "adopted-tensorrt-fp32; build on the device with build_on_device.sh" in ended.err
    assert "onnxruntime" not in ended.err, "kits alone were asked for"
    assert not (run / "engines").exists()
    assert clipkd("export", run, "--no-build").code == 2


def test_a_damaged_file_is_named_before_anything_is_opened(model, tmp_path) -> None:
    for name in ("image.onnx", "text.onnx", "tokenizer.json", "preprocess.json", "classes.npz"):
        folder = Path(shutil.copytree(model, tmp_path / name))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name}: changed since clipkd wrote it"):
            open_exported(folder)


def test_the_cards_snippet_runs_without_torch(model, picture) -> None:
    card = (model / CARD).read_text(encoding="utf-8")
    assert SNIPPET in card
    assert "SQNR" in card
    blocked = "import sys; sys.modules['torch'] = sys.modules['onnx'] = sys.modules['open_clip'] = None\n"
    code = blocked + SNIPPET.replace('"image.png"', repr(str(picture)))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=model, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.split()) >= 2


def test_the_card_lists_every_file_and_is_deterministic(model, tmp_path) -> None:
    card = (model / CARD).read_text(encoding="utf-8")
    for path in model.iterdir():
        if path.name not in (CARD, "manifest.json"):
            assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in card
    summary = json.loads((model / "manifest.json").read_text())["summary"]
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    cards = []
    for _ in range(2):
        write_card(folder, "x", summary, {"data": {"b": 1, "a": 2}})
        cards.append((folder / CARD).read_bytes())
    assert cards[0] == cards[1]
    assert "dependencies and ONNX Runtime;" in card
    write_card(folder, "x", {**summary, "runtime": "openvino"}, {})
    assert "dependencies and OpenVINO;" in (folder / CARD).read_text(encoding="utf-8")


def test_a_batch_of_1_and_preprocessing_are_asked_for_by_flags(run, clipkd, labels, picture, tmp_path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    before = json.loads((copied / "exported" / "adopted-onnxruntime-fp32" / "manifest.json").read_text())["summary"]
    assert before["batch"] is None
    assert "uint8_input" not in before
    assert clipkd("export", copied, "--onnx", "--batch", "1", "--uint8-input").code == 0
    made = copied / "exported" / "adopted-onnxruntime-fp32"
    summary = json.loads((made / "manifest.json").read_text())["summary"]
    assert summary["batch"] == 1
    assert summary["uint8_input"]["size_bytes"] == (made / "image_uint8.onnx").stat().st_size
    assert yaml.safe_load((copied / "recipe.yaml").read_text())["export"]["uint8_input"] is True
    card = (made / CARD).read_text(encoding="utf-8")
    snippet = uint8_snippet("fp32")
    assert snippet in card
    assert "batch size 1 only" in card
    code = snippet.replace('"image.png"', repr(str(picture))) + "print(image_features.shape)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=made, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [answer["error"] for answer in predict(made, [picture, picture], ["a", "b"], 1)] == [None, None]
    baked = bake(made, labels, None, tmp_path / "baked")
    assert "uint8_input" not in baked.manifest["summary"]
    (logits,) = ort.InferenceSession(baked.path / "classifier.onnx").get_outputs()
    assert logits.shape == [1, 3]


def test_another_runtime_takes_the_graphs_and_features_that_are_there(run, clipkd, tmp_path, monkeypatch) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    model, other = (copied / "exported" / f"adopted-{runtime}-fp32" for runtime in ("onnxruntime", "openvino"))

    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("the towers were traced again")

    monkeypatch.setattr("torch.onnx.export", trace)
    assert clipkd("export", copied, "--openvino", "--onnx").code == 0
    for name in ("classes.npz", "parity.npz", "tokenizer.json", "preprocess.json"):
        assert (other / name).read_bytes() == (model / name).read_bytes()
    ours, source = (json.loads((path / "manifest.json").read_text())["summary"] for path in (other, model))
    assert ours["runtime"] == "openvino"
    assert ours["size_bytes"] == sum((other / name).stat().st_size for name in ("image.onnx", "text.onnx"))
    assert ours["parity"] != source["parity"], "of its own runtime"
    assert ours["nodes"] != source["nodes"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int8-fp16"])
def test_the_cards_options_are_those_that_clipkd_opens_graphs_with(precision) -> None:
    said = uint8_snippet(precision).partition("options = ")[2].partition("session = ")[0]
    scope: dict[str, Any] = {"onnxruntime": ort}
    exec("options = " + said, scope)
    ours, theirs = onnxruntime_options(precision, None), scope["options"]
    assert theirs.graph_optimization_level == ours.graph_optimization_level
    for options in (ours, theirs):
        try:
            entry = options.get_session_config_entry("optimization.disable_specified_optimizers")
        except RuntimeError:  # not set
            entry = None
        expected = {"int8": "MatMulAddFusion", "int8-fp16": "MatMulAddFusion;WeightBiasQuantization"}
        assert entry == expected.get(precision)


def test_the_graphs_say_what_they_are(model) -> None:
    said = ort.InferenceSession(model / "image.onnx", providers=["CPUExecutionProvider"]).get_modelmeta()
    assert {"clipkd.version", "clipkd.tokenizer", "clipkd.role", "clipkd.precision", "clipkd.preprocess"} <= set(
        said.custom_metadata_map
    )


def test_baked_labels_answer_as_the_same_labels_given(model, labels, picture, tmp_path) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("{}\n", encoding="utf-8")
    stage = bake(model, labels, templates, tmp_path / "baked")
    assert not {"text.onnx", "tokenizer.json"} & {path.name for path in stage.path.iterdir()}
    names = read_lines(labels, "labels")
    (given,), (baked,) = predict(model, [picture], names, 3), predict(stage.path, [picture], None, 3)
    assert [row["label"] for row in baked["labels"]] == [row["label"] for row in given["labels"]]
    np.testing.assert_allclose(
        [row["probability"] for row in baked["labels"]],
        [row["probability"] for row in given["labels"]],
        atol=SAME_PROBABILITY,
    )
    with np.load(stage.path / "classes.npz", allow_pickle=False) as classes:
        assert classes["names"].tolist() == names
        assert classes["templates"].tolist() == ["{}"]
    with pytest.raises(ArtifactError, match="its labels are baked in"):
        predict(stage.path, [picture], ["a cat"], 1)
    assert bake(model, labels, templates, tmp_path / "baked").cached


def test_labels_are_named_as_classes_are(model, picture, tmp_path) -> None:
    """With spaces for underscores, in a file of labels as in --labels, as training and evaluation name folders."""
    labels = tmp_path / "labels.txt"
    labels.write_text("plus_sign\nneuro sign\n", encoding="utf-8")
    stage = bake(model, labels, None, tmp_path / "baked")
    with np.load(stage.path / "classes.npz", allow_pickle=False) as classes:
        assert classes["names"].tolist() == ["plus sign", "neuro sign"]
    underscores, spaces = (
        list(predict(model, [picture], [label, "neuro sign"], 2)) for label in ("plus_sign", "plus sign")
    )
    assert underscores == spaces
    labels.write_text("plus_sign\nplus sign\n", encoding="utf-8")
    with pytest.raises(UsageError, match="2 labels are 'plus sign', with underscores read as spaces"):
        bake(model, labels, None, tmp_path / "twice")


def test_the_class_matrix_is_the_models_own_for_its_own_labels(model, tmp_path) -> None:
    with np.load(model / "classes.npz", allow_pickle=False) as classes:
        names, expected_KD = classes["names"].tolist()[:20], classes["features_KD"][:20]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(names), encoding="utf-8")
    stage = bake(model, labels, None, tmp_path / "baked")
    with np.load(stage.path / "classes.npz", allow_pickle=False) as classes:
        np.testing.assert_allclose(classes["features_KD"], expected_KD, atol=SAME_FEATURE)


def test_the_baked_graph_computes_the_logits(model, labels, picture, tmp_path) -> None:
    stage = bake(model, labels, None, tmp_path / "baked")
    encoders = open_exported(stage.path)
    pixel_values = encoders.preprocess(Image.open(picture))[None]
    session = ort.InferenceSession(stage.path / "classifier.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values})
    with np.load(stage.path / "classes.npz", allow_pickle=False) as classes:
        expected = classes["logit_scale"] * encoders.encode_pixels(pixel_values) @ classes["features_KD"].T
    np.testing.assert_allclose(logits, expected, atol=SAME_LOGITS)
    assert json.loads(session.get_modelmeta().custom_metadata_map["clipkd.labels"]) == read_lines(labels, "labels")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b"\xef\xbb\xbf\r\n \r\n", "empty"),
        (b"a\nb\n\na\n b \n", "line 4 repeats line 1: 'a'; line 5 repeats line 2: 'b'. Keep one of each"),
        (b"a\n" * 3000, "line 6 repeats line 1: 'a'; and 2,994 more. Keep"),
        (b"caf\xe9\n", "not UTF-8 at byte 3"),
        (b"a\0b\n", "line 1 contains a NUL"),
    ],
)
def test_label_files_are_refused_with_the_line(tmp_path, content, said) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_lines(path, "labels")


def test_label_files_of_other_systems_are_read(tmp_path) -> None:
    path = tmp_path / "labels.txt"
    for content in (b"\xef\xbb\xbfa cat\r\na dog\r\n", b"\n a cat\n\n\na dog\t\n\n", b"a cat\ra dog"):
        path.write_bytes(content)
        assert read_lines(path, "labels") == ["a cat", "a dog"]
    with pytest.raises(UsageError, match="cannot read labels"):
        read_lines(tmp_path / "absent.txt", "labels")


def test_templates_need_one_place_for_the_label(tmp_path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("{} a\n\na photo\n")
    with pytest.raises(UsageError, match=r"line 3: expected one \{\} where the label goes"):
        read_templates(path)


def test_other_peoples_directories_are_not_replaced(model, labels, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    for out in (model, tmp_path / "mine", Path(shutil.copytree(model, tmp_path / "another"))):
        with pytest.raises(UsageError, match="--out"):
            bake(model, labels, None, out)
    assert open_stage(model).manifest["kind"] == "export"
