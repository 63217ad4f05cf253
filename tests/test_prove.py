"""A whole export and its proof in a process of its own; damage, crashes, and devices that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import make_picture

from export.devices.registry import Device
from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.graphs.precision import MAX_HALF_ACTIVATION, prepare_tower, require_half_range
from export.proof import prove as proof
from export.proof.prove import prove
from export.runtime import remote_model
from export.runtime.exported_model import open_exported
from export.runtime.remote_model import encoders_on
from toolchain.errors import GateError, UnavailableBackend
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import load_model
from toolchain.models.towers import ImageTower, example_pixels

REPOSITORY = Path(__file__).parents[1]
STUDENT = REPOSITORY / "recipes" / "glyphs_tiny"
NAMES = ["latin small letter a", "greek capital letter omega", "leftwards arrow with hook", "digit one", "plus sign"]


@pytest.fixture(scope="module")
def model():
    return load_model(STUDENT, random_seed=0)


def export(model, folder, precision):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    headline = classes_set("made", images, NAMES, ("{}",))
    export_onnx(model, folder, PlannedExport("student", precision), headline)
    return folder


@pytest.fixture(scope="module")
def fp32(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("fp32"), "fp32")


@pytest.fixture(scope="module")
def fp16(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("fp16"), "fp16")


@pytest.fixture
def copied(fp32, tmp_path):
    for path in fp32.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_projection(folder, change):
    graph = onnx.load(folder / "image.onnx")
    (weight,) = [tensor for tensor in graph.graph.initializer if list(tensor.dims) in ([96, 128], [128, 96])]
    weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight).copy()), weight.name))
    onnx.save(graph, folder / "image.onnx")


def negated_row(values):
    values[3] *= -1
    return values


def a_nan(values):
    values[3, 5] = np.nan
    return values


def wrong_scale(values):
    values[3] *= 4
    return values


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("damage", [negated_row, a_nan, wrong_scale])
def test_a_damaged_weight_is_caught_in_every_runtime(copied, runtime, damage):
    change_projection(copied, damage)
    with pytest.raises(GateError, match=r"image tower, fp32: sample \d of 5") as caught:
        prove(copied, runtime=runtime, precision="fp32")
    assert caught.value.exit_code == 5


def test_a_swapped_mean_is_caught(copied):
    spec = json.loads((copied / "preprocess.json").read_text())
    spec["image"]["mean"] = [0.1, *spec["image"]["mean"][1:]]
    (copied / "preprocess.json").write_text(json.dumps(spec))
    with pytest.raises(GateError, match="preprocessing of sample"):
        prove(copied, runtime="openvino", precision="fp32")


def test_a_tokenizer_that_drops_the_end_token_is_caught(copied):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GateError, match=r"tokenizer in tokenizer\.json differs"):
        prove(copied, runtime="openvino", precision="fp32")


def test_a_runtime_that_crashes_is_a_reason_and_not_the_end(fp32, monkeypatch):
    monkeypatch.setattr(proof, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(GateError, match="fp32: the process of the parity check was killed by SIGSEGV"):
        prove(fp32, runtime="onnxruntime", precision="fp32")


def test_a_runtime_that_hangs_is_ended(fp32, monkeypatch):
    monkeypatch.setattr(proof, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(proof, "_TIMEOUT_S", 0.5)
    with pytest.raises(GateError, match=r"took longer than 0\.5 s"):
        prove(fp32, runtime="onnxruntime", precision="fp32")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_runtimes_pass_in_both_floats_and_say_what_they_run(fp32, fp16, runtime):
    for precision, folder in (("fp32", fp32), ("fp16", fp16)):
        proven = prove(folder, runtime=runtime, precision=precision)
        assert proven["parity"]["image"]["num_not_finite"] == 0
        assert proven["nodes"]["image"]["integer"] == 0
        assert sum(proven["nodes"]["text"]["attention"].values()) == 2  # one for each layer


def test_openvino_computes_fp32_in_fp32(fp32):
    nodes = prove(fp32, runtime="openvino", precision="fp32")["nodes"]
    assert set(nodes["image"]["precisions"]) == set(nodes["text"]["precisions"]) == {"f32"}


def test_bf16_passes_in_openvino_and_is_unavailable_in_onnx_runtime_on_a_cpu(model, tmp_path):
    folder = export(model, tmp_path, "bf16")
    assert prove(folder, runtime="openvino", precision="bf16")["parity"]["text"]["num_samples"] == 5
    with pytest.raises(UnavailableBackend, match="cannot run this graph in bf16 on cpu") as caught:
        prove(folder, runtime="onnxruntime", precision="bf16")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("runtime", "device"), [("onnxruntime", "rocm"), ("openvino", "npu"), ("openvino", "gpu.7")])
def test_a_device_that_is_not_there_is_no_other_device(fp32, runtime, device):
    with pytest.raises(UnavailableBackend, match=f"has no device {device} here"):
        open_exported(fp32, runtime=runtime, device=device)


def test_a_device_runs_what_this_machine_cannot(fp32, monkeypatch):
    """Nothing but pictures, texts and features is of this machine; ONNX Runtime here would refuse this precision."""
    asked = []

    def encode_on(device, folder, tower, words, *, once):
        rows = np.load(once[0])
        asked.append((device.name, tower, words[words.index("--input") + 1], rows.shape))
        return {"features": [[1.0, 0.0]] * len(rows)}

    monkeypatch.setattr(remote_model, "encode_on", encode_on)
    encoders = encoders_on(Device("board", "board"), fp32, precision="int8-bf16")
    assert encoders.encode_images(np.zeros((3, 40, 50, 3), np.uint8)).shape == (3, 2)
    assert encoders.encode_texts(["a b"]).shape == (1, 2)
    assert asked == [
        ("board", "image", "pixel_values", (3, 3, 32, 32)),
        ("board", "text", "input_ids", (1, encoders.context_length)),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda_is_not_the_cpu(fp32):
    with pytest.raises(UnavailableBackend):
        prove(fp32, runtime="onnxruntime", precision="fp32", device="cuda")


@pytest.fixture(scope="module")
def uint8(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uint8")
    images = np.stack([np.asarray(make_picture(40, 36, seed, noise=20)) for seed in range(5)])
    headline = classes_set("made", images, NAMES, ("{}",))
    export_onnx(model, folder, PlannedExport("student", "fp32", uint8_input=True), headline)
    return folder


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_preprocessing_in_the_graph_is_measured_in_every_runtime(uint8, runtime):
    measured = prove(uint8, runtime=runtime, precision="fp32", uint8_input=True)["uint8_input"]
    assert measured["num_pictures"] == 20
    assert measured["max_levels"] < 1.01
    assert measured["share_of_values"] < 1e-3
    assert measured["min_cosine"] > 1 - 1e-6
    assert measured["size_bytes"] == (uint8 / "image_uint8.onnx").stat().st_size


def test_the_graph_that_preprocesses_stands_alone_and_takes_pictures_of_any_size(uint8):
    path = uint8 / "image_uint8.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    ((entry,), (result,)) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape) == ("pixels", "tensor(uint8)", ["height", "width", 3])
    assert (result.name, result.shape) == ("image_features", [1, 128])
    assert "clipkd.preprocess" in session.get_modelmeta().custom_metadata_map
    encoders = open_exported(uint8, threads=1)
    for size in ((1, 1), (32, 32), (500, 70), (70, 500), (1, 300)):
        picture = make_picture(*size, seed=7)
        (features_1D,) = session.run(None, {"pixels": np.asarray(picture)})
        np.testing.assert_allclose(features_1D, encoders.encode_images([picture]), atol=1e-3)  # a level, of 255


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("preprocessing.mean", lambda mean: mean * 0.9, "differs from Pillow's by .* grey levels"),
        ("weight", lambda weight: -weight, "preprocessing in the graph, fp32: sample"),
    ],
)
def test_a_graph_that_preprocesses_wrongly_fails(uint8, tmp_path, name, change, said):
    for path in uint8.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / "image_uint8.onnx")
    damaged = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)][-1]
    damaged.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(damaged)), damaged.name))
    onnx.save(model, tmp_path / "image_uint8.onnx")
    with pytest.raises(GateError, match=said):
        prove(tmp_path, runtime="onnxruntime", precision="fp32", uint8_input=True)


def test_the_runner_times_openvino_and_refuses_absent_devices(fp32):
    command = [
        sys.executable,
        str(REPOSITORY / "export" / "device_programs" / "runner.py"),
        "--model",
        str(fp32 / "image.onnx"),
    ]
    command += ["--input", "pixel_values", "--shape", "1,3,32,32", "--dtype", "float32", "--threads", "1"]
    command += ["--runtime", "openvino", "--min-seconds", "0.02", "--max-warm-up", "0.02"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result = json.loads(done.stdout)
    assert result["samples_ms"]
    assert result["versions"]["openvino"]
    absent = subprocess.run([*command, "--device", "npu"], capture_output=True, text=True, env=environment)
    assert absent.returncode == 4
    assert "no device npu" in absent.stderr


class Loud(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.quiet = torch.nn.Identity()
        self.loud = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.constant_(self.loud.weight, gain)

    def forward(self, x):
        return self.loud(self.quiet(x)) * 0


@pytest.mark.parametrize("gain", [1.01 * MAX_HALF_ACTIVATION, float("inf"), float("nan")])
def test_activations_beyond_half_are_refused_by_the_layers_name(gain):
    tower = Loud(gain)
    with pytest.raises(GateError, match="image tower, layer loud: values up to"), require_half_range(tower, "image"):
        tower(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert not tower.loud._forward_hooks


def test_activations_within_half_pass():
    tower = Loud(0.99 * MAX_HALF_ACTIVATION)
    with require_half_range(tower, "image"):
        assert tower(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).isfinite().all()


def test_a_weight_beyond_half_is_refused_by_name(model):
    tower = ImageTower(load_model(STUDENT, random_seed=0).net).eval()
    weight = next(p for n, p in tower.named_parameters() if n.endswith("proj.weight") or "head" in n)
    with torch.no_grad():
        weight.fill_(1e6)
    with pytest.raises(GateError, match=r"fp16: the weight .* has values up to"):
        prepare_tower(tower, example_pixels(model.net), "fp16")
