import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.documents import PlannedExport
from export.graphs import parity_samples
from export.graphs.export_onnx import adapt_export, class_embeddings, export_onnx
from export.graphs.onnx_graph import write_graph
from export.graphs.parity_samples import _spread, embed_prompts, write_parity_samples
from export.pipeline.plan import is_adaptable
from export.profiling.protocol import Effort, profile
from export.proof.parity import check_parity, compare
from export.proof.prove import prove
from export.runtime.exported_model import open_exported
from toolchain.errors import ClipkdError, GateError
from toolchain.evaluation.eval_set import captions_set, classes_set
from toolchain.models.build import load_model
from toolchain.models.towers import ImageTower, TextTower, unit_text_features
from toolchain.precisions import PRECISIONS

STUDENT = Path(__file__).parents[1] / "recipes" / "glyphs_tiny"
NAMES = ["latin small letter a", "greek capital letter omega", "leftwards arrow with hook", "digit one", "plus sign"]
TEMPLATES = ("{}", "a drawing of {}")
PROMPTS = [template.format(name) for template in TEMPLATES for name in NAMES]
FLOAT32_NOISE = 1e-5  # of a unit feature: float32 sums in another order
FILES = {"image.onnx", "text.onnx", "tokenizer.json", "preprocess.json", "classes.npz", "parity.npz"}


@pytest.fixture(scope="module")
def model():
    return load_model(STUDENT, random_seed=0)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


def export(model, folder, images, precision):
    return export_onnx(
        model, folder, PlannedExport("student", precision), classes_set("made", images, NAMES, TEMPLATES)
    )


@pytest.fixture(scope="module")
def exported(model, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp32")
    return folder, export(model, folder, images, "fp32")


def test_the_folder_holds_the_contract_and_no_side_files(exported):
    folder, summary = exported
    assert {path.name for path in folder.iterdir()} == FILES
    assert summary["size_bytes"] == sum((folder / name).stat().st_size for name in ("image.onnx", "text.onnx"))
    assert {key: summary[key] for key in ("role", "runtime", "precision", "opset")} == {
        "role": "student",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "opset": 20,
    }


@pytest.mark.parametrize(
    ("file", "names_io", "dtype", "shape"),
    [
        ("image.onnx", ("pixel_values", "image_features"), onnx.TensorProto.FLOAT, [3, 32, 32]),
        ("text.onnx", ("input_ids", "text_features"), onnx.TensorProto.INT64, [20]),
    ],
)
def test_graph_signature(exported, file, names_io, dtype, shape):
    graph = onnx.load(exported[0] / file)
    (entry,), (result,) = graph.graph.input, graph.graph.output
    assert (entry.name, result.name) == names_io
    assert entry.type.tensor_type.elem_type == dtype
    assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:]] == shape
    assert result.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert result.type.tensor_type.shape.dim[1].dim_value == 128
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert (metadata["clipkd.role"], metadata["clipkd.precision"]) == ("student", "fp32")
    assert json.loads(metadata["clipkd.preprocess"]) == json.loads((exported[0] / "preprocess.json").read_text())


@pytest.mark.parametrize(("tower", "said"), [("visual.head.proj.weight", "image"), ("text_projection", "text")])
def test_a_checkpoint_whose_features_are_not_finite_is_not_exported(images, tmp_path, tower, said):
    model = load_model(STUDENT, random_seed=0)
    with torch.no_grad():
        model.net.get_parameter(tower).fill_(float("nan"))
    headline = classes_set("made", images, NAMES, TEMPLATES)
    said_first = rf"the model's {said} features are NaN or infinite for "

    def write() -> None:
        prompts = embed_prompts(TextTower(model.net), model, headline)
        write_parity_samples(tmp_path / "parity.npz", model, ImageTower(model.net), prompts, headline)

    with torch.no_grad(), pytest.raises(ClipkdError, match=said_first):
        write()
    assert not list(tmp_path.iterdir())


def test_every_batch_size_runs(exported, model, images):
    encoders = open_exported(exported[0], threads=1)
    one_by_one_BD = np.concatenate([encoders.encode_images(images[index : index + 1]) for index in range(5)])
    np.testing.assert_allclose(encoders.encode_images(images), one_by_one_BD, atol=FLOAT32_NOISE)


def test_class_embeddings_are_the_definition(exported, model):
    mean_KD = torch.zeros(len(NAMES), 128, dtype=torch.float64)
    with torch.no_grad():
        for k, name in enumerate(NAMES):
            for template in TEMPLATES:
                ids_1T = model.tokenize([template.format(name)])
                mean_KD[k] += unit_text_features(model.net, ids_1T)[0].double() / len(TEMPLATES)
    expected_KD = mean_KD / mean_KD.norm(dim=-1, keepdim=True)
    with np.load(exported[0] / "classes.npz") as saved:
        np.testing.assert_allclose(saved["features_KD"], expected_KD, atol=FLOAT32_NOISE)
        assert saved["features_KD"].dtype == np.float32
        assert saved["names"].tolist() == NAMES
        assert saved["templates"].tolist() == list(TEMPLATES)


def test_fp32_passes_its_gate_end_to_end(exported):
    result = check_parity(exported[0], precision="fp32")
    assert result["image"]["num_samples"] == 5
    assert result["text"]["num_samples"] == result["text"]["num_prompts"] == len(NAMES) * len(TEMPLATES)


def test_a_changed_weight_fails_the_gate(exported, tmp_path):
    for path in exported[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = onnx.load(tmp_path / "image.onnx")
    (weight,) = [tensor for tensor in graph.graph.initializer if list(tensor.dims) in ([96, 128], [128, 96])]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] *= 1.5  # one row of the projection
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, tmp_path / "image.onnx")
    with pytest.raises(GateError, match="image tower, fp32: sample"):
        check_parity(tmp_path, precision="fp32")


def test_fp16_stores_and_computes_in_half_and_passes_its_gate(model, images, tmp_path, exported):
    summary = export(model, tmp_path, images, "fp16")
    assert summary["size_bytes"] < 0.7 * exported[1]["size_bytes"]
    for file in ("image.onnx", "text.onnx"):
        graph = onnx.load(tmp_path / file).graph
        large = [tensor for tensor in graph.initializer if len(tensor.raw_data) > 1024]
        assert large
        assert all(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in large)
        assert {entry.type.tensor_type.elem_type for entry in graph.output} == {onnx.TensorProto.FLOAT}
    with np.load(tmp_path / "parity.npz") as samples:
        inputs_and_expected = (
            ("image.onnx", "pixel_values", samples["pixel_values_FCHW"], samples["image_features_BD"][:4]),
            ("text.onnx", "input_ids", samples["input_ids_BT"].astype(np.int64), samples["text_features_BD"]),
        )
    options = ort.SessionOptions()  # ENABLE_ALL crashes ONNX Runtime 1.31 on half-precision transformers on a CPU
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    for file, name, values, expected_BD in inputs_and_expected:
        session = ort.InferenceSession(tmp_path / file, options, providers=["CPUExecutionProvider"])
        (actual_BD,) = session.run(None, {name: values})
        names = PROMPTS[: len(expected_BD)]
        compare(expected_BD, actual_BD, min_sqnr_db=PRECISIONS["fp16"].min_sqnr_db, names=names, what=file)
        with pytest.raises(GateError):  # and is not mistaken for fp32
            compare(expected_BD, actual_BD, min_sqnr_db=PRECISIONS["fp32"].min_sqnr_db, names=names, what=file)


def test_exporting_prints_nothing_and_leaves_torch_as_it_was(model, tmp_path, capfd):
    torch.backends.mha.set_fastpath_enabled(True)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    export(model, tmp_path, np.zeros((5, 32, 32, 3), np.uint8), "fp32")
    assert capfd.readouterr().out == ""
    assert torch.backends.mha.get_fastpath_enabled()
    after = model.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parity_samples_are_spread_over_a_large_set():
    indices = _spread(1000)
    assert (indices[0], indices[-1], len(set(indices.tolist()))) == (0, 999, 256)
    assert _spread(5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("kept", "has_classes"), [(10, True), (7, True), (3, True), (5, False), (4, False)])
@torch.no_grad()
def test_every_prompt_is_stored_as_far_as_there_is_room(model, images, tmp_path, monkeypatch, kept, has_classes):
    monkeypatch.setattr(parity_samples, "MAX_PARITY_SAMPLES", 3)
    headline = classes_set("made", images, NAMES, TEMPLATES)
    if not has_classes:
        headline = captions_set("made", images, [[name] for name in NAMES])
    prompts = PROMPTS if has_classes else NAMES
    row_bytes = max(map(len, prompts)) + 2 * 20 + 4 * 128  # ids of 16 bits
    monkeypatch.setattr(parity_samples, "MAX_PROMPT_BYTES", kept * row_bytes + row_bytes - 1)
    tower = TextTower(model.net)
    embedded = embed_prompts(tower, model, headline)
    assert len(embedded.captions) == (len(PROMPTS) if has_classes else kept)
    write_parity_samples(tmp_path / "parity.npz", model, ImageTower(model.net), embedded, headline)
    with np.load(tmp_path / "parity.npz") as saved:
        assert (saved["num_spread"], saved["num_prompts"]) == (3, len(prompts))
        stored = [caption.decode() for caption in saved["captions"]]
        assert stored[:3] == [NAMES[0], NAMES[2], NAMES[4]]
        assert len(stored) == len(set(stored)) == len(saved["input_ids_BT"]) == kept
        assert set(stored) <= set(prompts)
        ids_BT = model.tokenize(stored)
        assert saved["input_ids_BT"].dtype == np.uint16
        np.testing.assert_array_equal(saved["input_ids_BT"], ids_BT.numpy())
        np.testing.assert_allclose(saved["text_features_BD"], tower(ids_BT).numpy(), atol=FLOAT32_NOISE)


def test_an_operator_onnx_lacks_is_a_clipkd_error(tmp_path):
    class Hopeless(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(ClipkdError, match=r"torch\.onnx cannot export this tower at opset 20"):
        write_graph(Hopeless(), torch.randn(2, 3, 3), tmp_path / "x.onnx", names_io=("a", "b"), opset=20, metadata={})


def test_a_graph_with_a_fixed_batch_is_refused(tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.ones(2, 3) * x.sum()

    with pytest.raises(ClipkdError, match="b has a fixed batch"):
        write_graph(Fixed(), torch.randn(2, 3), tmp_path / "x.onnx", names_io=("a", "b"), opset=20, metadata={})


@pytest.fixture(scope="module")
def single(model, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch-1")
    headline = classes_set("made", images, NAMES, TEMPLATES)
    return folder, export_onnx(model, folder, PlannedExport("student", "fp32", batch=1), headline)


def test_a_batch_of_1_is_fixed_and_takes_no_more_nodes(single, exported):
    assert (single[1]["batch"], exported[1]["batch"]) == (1, None)
    for file in ("image.onnx", "text.onnx"):
        graph, free = onnx.load(single[0] / file).graph, onnx.load(exported[0] / file).graph
        assert [entry.type.tensor_type.shape.dim[0].dim_value for entry in (*graph.input, *graph.output)] == [1, 1]
        assert len(graph.node) < len(free.node)
        assert not {node.op_type for node in graph.node} & {"Shape", "Range"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_batch_of_1_is_proven_and_encodes_row_by_row(single, exported, images, runtime):
    assert prove(single[0], runtime=runtime, precision="fp32")["parity"]["image"]["num_samples"] == 5
    if runtime == "openvino":
        return  # which shares no process with torch here: the proof has one of its own, and encoded row by row in it
    encoders, free = (open_exported(folder, runtime=runtime, threads=1) for folder in (single[0], exported[0]))
    np.testing.assert_allclose(encoders.encode_images(images), free.encode_images(images), atol=FLOAT32_NOISE)
    np.testing.assert_allclose(encoders.encode_texts(NAMES), free.encode_texts(NAMES), atol=FLOAT32_NOISE)
    assert encoders.encode_images([]).shape == (0, 128)


def test_a_batch_of_1_is_swept_at_no_other(single):
    timed = profile(single[0], Effort(1, 0.05), threads=1).document
    assert list(timed["sweep"]) == ["1"]
    assert timed["e2e_p50_ms"] > 0


def test_a_batch_of_1_that_the_graph_does_not_have_is_refused(tmp_path):
    class Two(torch.nn.Module):
        def forward(self, x):
            return torch.ones(2, 3) * x.sum()

    with pytest.raises(ClipkdError, match="b has a batch of 2, not fixed to 1"):
        write_graph(Two(), torch.randn(2, 3), tmp_path / "x.onnx", names_io=("a", "b"), opset=20, metadata={}, batch=1)


def test_an_export_adapted_to_another_runtime_is_the_one_that_tracing_would_give(exported, model, images, tmp_path):
    folder, summary = exported
    adapted, traced = tmp_path / "adapted", tmp_path / "traced"
    planned = PlannedExport("student", "fp32", "openvino")
    for path in (adapted, traced):
        path.mkdir()
    ours = adapt_export(folder, {**summary, "parity": "of the other"}, adapted, planned)
    assert ours == export_onnx(model, traced, planned, classes_set("made", images, NAMES, TEMPLATES))
    assert {path.name for path in adapted.iterdir()} == {path.name for path in traced.iterdir()}
    for path in traced.glob("*.onnx"):
        assert (adapted / path.name).read_bytes() == path.read_bytes(), path.name
    assert (adapted / "text.onnx").read_bytes() != (folder / "text.onnx").read_bytes(), "its products are separated"


ORT, OPENVINO = PlannedExport("student", "fp32"), PlannedExport("student", "fp32", "openvino")
KIT = PlannedExport("student", "fp32", "tensorrt")


@pytest.mark.parametrize(
    ("source", "planned", "expected"),
    [
        (ORT, OPENVINO, True),
        (ORT, KIT, True),
        (KIT, OPENVINO, True),
        (OPENVINO, ORT, False),
        (ORT, replace(OPENVINO, precision="fp16"), False),
        (ORT, replace(OPENVINO, batch=1), False),
        (ORT, replace(OPENVINO, role="teacher"), False),
        (ORT, replace(OPENVINO, uint8_input=True), False),
        (replace(ORT, uint8_input=True), KIT, True),
        (replace(ORT, precision="int8"), replace(OPENVINO, precision="int8"), True),
        (replace(ORT, precision="int8"), replace(KIT, precision="int8"), False),
    ],
)
def test_an_export_is_made_from_one_of_the_same_towers_only(source, planned, expected):
    assert is_adaptable(source, planned, False) is expected


def test_a_runtime_that_leaves_outputs_in_float_has_towers_of_its_own() -> None:
    ours, theirs = replace(ORT, precision="int8"), replace(OPENVINO, precision="int8")
    assert not is_adaptable(ours, theirs, has_rounded_outputs=True)
    assert is_adaptable(theirs, theirs, has_rounded_outputs=True) is False, "its products are separated"
    assert is_adaptable(ours, ours, has_rounded_outputs=True)


def test_int8_needs_frozen_towers_and_floats_refuse_them(model, tmp_path, images):
    with pytest.raises(ValueError, match="frozen"):
        export(model, tmp_path, images, "int8")


@torch.no_grad()
def test_class_embeddings_have_unit_norm(model, images):
    prompts = embed_prompts(TextTower(model.net), model, classes_set("made", images, NAMES, TEMPLATES))
    features_KD = class_embeddings(prompts.features_BD, len(TEMPLATES))
    assert features_KD.norm(dim=-1).numpy() == pytest.approx(1, abs=FLOAT32_NOISE)
    assert ImageTower(model.net)(torch.randn(2, 3, 32, 32)).norm(dim=-1).detach().numpy() == pytest.approx(1, abs=1e-5)
