import gc
import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from export.documents import PlannedExport
from export.graphs.export_onnx import FrozenTowers, export_onnx
from export.graphs.onnx_graph import write_graph
from export.graphs.precision import convert_frozen_tower
from export.proof.parity import compare
from export.proof.prove import prove
from toolchain.errors import ArtifactError, ClipkdError, GateError, MissingDependency, UnavailableBackend
from toolchain.evaluation.eval_set import classes_set
from toolchain.filesystem import file_sha256
from toolchain.models.build import load_model
from toolchain.models.folding import fold_batch_norms
from toolchain.models.towers import ImageTower, TextTower
from toolchain.precisions import PRECISIONS
from toolchain.quantization import checkpoint as checkpoint_module
from toolchain.quantization import nncf_backend
from toolchain.quantization import quantize as quantize_module
from toolchain.quantization.checkpoint import TOWERS, load_quantized
from toolchain.quantization.freeze import freeze
from toolchain.quantization.nncf_backend import decode_json, import_nncf, list_quantizers
from toolchain.quantization.quantize import Calibration, FineTuning, FineTuningBatch, quantize

STUDENT = Path(__file__).parents[1] / "recipes" / "glyphs_tiny"
NUM_SAMPLES = 24
CAPTIONS = [f"latin small letter {chr(97 + index)} with {'acute' if index % 2 else 'hook'}" for index in range(24)]
INT8, FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
ROUNDING = 1e-5  # relative, of a largest activation: batches of other sizes add in another order, 4e-7 measured
FOLDING_NOISE = 1e-5  # of a unit feature: float32 rounding of the folded weights
MIN_PTQ_COSINE = 0.8  # float against calibrated int8, random weights, whose features lie close together: 0.85 measured


@pytest.fixture(scope="module")
def model():
    model = load_model(STUDENT, random_seed=0)
    model.net.train()  # statistics that fold into something other than the identity
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)  # timm starts the last of a block at zero
        for name, parameter in model.net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02, generator=generator)  # a trained model has no bias that folds away
        for _ in range(20):
            model.net.visual(torch.randn(16, 3, 32, 32, generator=generator))
    model.net.eval()
    return model


@pytest.fixture(scope="module")
def inputs(model):
    pixel_values = torch.randn(NUM_SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return pixel_values, model.tokenize(CAPTIONS)


def forever(*batch):
    while True:
        yield FineTuningBatch(*batch)


def quantized_folder(
    folder, model, inputs, targets=(None, None), steps=0, *, loss_fn=None, towers=TOWERS, signed_activations=False
):
    losses = []
    calibration = Calibration(*inputs, towers=towers, signed_activations=signed_activations)
    batches = forever(*inputs, *targets)
    fine_tuning = FineTuning(batches, steps, 1e-4, loss_fn, on_step=lambda step, loss: losses.append(loss))
    quantize(model, folder, calibration, fine_tuning)
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STUDENT / name, folder / name)
    return losses


@pytest.fixture(scope="module")
def checkpoint(model, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    quantized_folder(folder, model, inputs, steps=0)
    return folder


@pytest.fixture(scope="module")
def frozen(checkpoint, inputs):
    towers = load_quantized(checkpoint, load_model(checkpoint))
    return tuple(freeze(tower, values[:2]) for tower, values in zip(towers, inputs, strict=True))


@pytest.fixture(scope="module")
def graphs(frozen, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    names_io = (("pixel_values", "image_features"), ("input_ids", "text_features"))
    for tower, values, io in zip(frozen, inputs, names_io, strict=True):
        with torch.no_grad():
            write_graph(tower, values[:2], folder / f"{io[0]}.onnx", names_io=io, opset=20, metadata={})
    return folder / "pixel_values.onnx", folder / "input_ids.onnx"


def test_folding_leaves_no_batch_norm_and_the_same_function(model, inputs):
    tower = ImageTower(load_model(STUDENT, random_seed=0).net)
    tower.load_state_dict(ImageTower(model.net).state_dict())
    with torch.no_grad():
        expected_BD = tower(inputs[0])
        assert len(fold_batch_norms(tower, inputs[0][:2])) == 15
        torch.testing.assert_close(tower(inputs[0]), expected_BD, atol=FOLDING_NOISE, rtol=0)
    assert not [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("forked", [lambda norm, x: norm(x) + x, lambda norm, x: x.add_(norm(x))])
def test_a_convolution_with_two_readers_keeps_its_batch_norm(forked):
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.second, self.alone = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            nn.init.constant_(self.norm.running_mean, 1.0)
            nn.init.constant_(self.alone.running_mean, 1.0)

        def forward(self, x):
            x = self.convolution(x)
            return F.normalize(self.alone(self.second(forked(self.norm, x))).flatten(1), dim=-1)

    tower, example = Forked().eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected_BD = tower(example)
        assert fold_batch_norms(tower, example) == {"alone": "second"}
        torch.testing.assert_close(tower(example), expected_BD, atol=FOLDING_NOISE, rtol=0)


def test_the_float_weights_stay_a_model_that_plain_open_clip_opens(checkpoint, model, inputs):
    reopened = load_model(checkpoint)
    with torch.no_grad():
        for tower, values in ((ImageTower, inputs[0]), (TextTower, inputs[1])):
            torch.testing.assert_close(
                tower(reopened.net)(values), tower(model.net)(values), atol=FOLDING_NOISE, rtol=0
            )


def test_restoring_is_exact_and_needs_no_float_checkpoint(checkpoint, model, inputs):
    from_itself = load_quantized(checkpoint, load_model(checkpoint))
    from_another = load_quantized(checkpoint, load_model(STUDENT, random_seed=7))
    for first, second, values in zip(from_itself, from_another, inputs, strict=True):
        with torch.no_grad():
            assert torch.equal(first(values), second(values))
        state = first.state_dict()
        assert all(torch.equal(state[key], value) for key, value in second.state_dict().items())


def test_fine_tuning_approaches_the_target_and_is_restored_exactly(model, inputs, tmp_path, monkeypatch):
    saved = []
    save = checkpoint_module.save_quantized
    monkeypatch.setattr(quantize_module, "save_quantized", lambda *args: (saved.extend(args[:2]), save(*args)))
    generator = torch.Generator().manual_seed(3)
    targets = [F.normalize(torch.randn(NUM_SAMPLES, 128, generator=generator), dim=-1) for _ in range(2)]
    losses = quantized_folder(tmp_path, model, inputs, targets, steps=4)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for trained, restored, values in zip(saved, load_quantized(tmp_path, load_model(tmp_path)), inputs, strict=True):
        with torch.no_grad():
            assert torch.equal(trained(values), restored(values))


def test_a_given_loss_receives_the_batch(model, inputs, tmp_path):
    seen = []

    def loss_fn(image_features_BD, text_features_BD, batch):
        seen.append((image_features_BD.shape, text_features_BD.shape, len(batch)))
        return (image_features_BD * text_features_BD).sum(-1).mean()

    quantized_folder(tmp_path, model, inputs, steps=1, loss_fn=loss_fn)
    assert seen == [((NUM_SAMPLES, 128), (NUM_SAMPLES, 128), 4)]


def test_a_loss_that_is_not_finite_stops_with_the_step(model, inputs, tmp_path):
    for first, advice in ((0, "No step was taken yet: "), (2, "Lower quantize.lr")):
        calls = iter(range(9))

        def loss_fn(image_features_BD, text_features_BD, batch, first=first, calls=calls):
            return image_features_BD.sum() * (float("nan") if next(calls) >= first else 1.0)

        with pytest.raises(ClipkdError, match=f"the loss is not finite at step {first}. {advice}"):
            quantized_folder(tmp_path, model, inputs, steps=4, loss_fn=loss_fn)


def test_scales_and_weights_that_are_not_finite_are_neither_saved_nor_loaded(model, inputs, checkpoint, tmp_path):
    def spoil(image_tower, text_tower):
        list_quantizers(image_tower)[0][1].scale.data.fill_(float("nan"))

    with pytest.raises(ClipkdError, match=r"the int8 model has NaN or infinity in 1 of .* tensors: image\."):
        quantize(model, tmp_path, Calibration(*inputs), before_saving=spoil)
    assert not list(tmp_path.iterdir())
    for name in ("open_clip_model.safetensors", "nncf.safetensors"):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        tensors = load_file(folder / name)
        key = next(key for key in sorted(tensors) if tensors[key].is_floating_point())
        tensors[key].view(-1)[0] = float("inf")
        save_file(tensors, folder / name)
        config = json.loads((folder / "nncf.json").read_text())
        config["sha256"][name] = file_sha256(folder / name)
        (folder / "nncf.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match=rf"{name}: NaN or infinity in 1 of .*quantize again: clipkd quantize"):
            load_quantized(folder, model)


def test_calibrated_towers_resemble_the_float_ones(checkpoint, model, inputs):
    image_tower, text_tower = load_quantized(checkpoint, load_model(checkpoint))
    with torch.no_grad():
        for quantized, original, values in (
            (image_tower, ImageTower(model.net), inputs[0]),
            (text_tower, TextTower(model.net), inputs[1]),
        ):
            cosine_B = F.cosine_similarity(quantized(values), original(values))
            assert cosine_B.min() > MIN_PTQ_COSINE
            assert cosine_B.max() < 1 - 1e-6  # something was quantized


def test_faint_inputs_do_not_narrow_a_range(model, inputs, tmp_path):
    """NNCF's default averages the largest values of images, and so clips those of more contrast than most."""
    ranges = []
    faint = 0.01 * inputs[0].repeat(9, 1, 1, 1), inputs[1].repeat(9, 1)
    for name, shown in (("alone", ()), ("outnumbered", faint)):
        folder = tmp_path / name
        folder.mkdir()
        calibration = tuple(torch.cat(parts) for parts in zip(*([shown] if shown else []), inputs, strict=True))
        quantize(model, folder, Calibration(*calibration))
        image_tower, _ = load_quantized(folder, model)
        ranges.append({name: quantizer.scale.detach() for name, quantizer in list_quantizers(image_tower)})
    alone, outnumbered = ranges
    assert alone.keys() == outnumbered.keys()
    assert all((outnumbered[name] >= (1 - ROUNDING) * alone[name]).all() for name in alone)


def test_fine_tuning_starts_at_the_given_rate_and_ends_near_zero(model, inputs, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    quantized_folder(tmp_path, model, inputs, steps=4)
    assert rates == pytest.approx([1e-4 * share for share in (1, 0.8535534, 0.5, 0.1464466)])


def test_frozen_fake_quantized_and_exported_agree(checkpoint, frozen, graphs, inputs):
    for fake, tower, path, values in zip(
        load_quantized(checkpoint, load_model(checkpoint)), frozen, graphs, inputs, strict=True
    ):
        with torch.no_grad():
            fake_BD, frozen_BD = fake(values).numpy(), tower(values).numpy()
        options = {"min_sqnr_db": PRECISIONS["int8"].min_sqnr_db, "names": CAPTIONS}
        compare(fake_BD, frozen_BD, what="frozen against fake-quantized", **options)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (actual_BD,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
        compare(frozen_BD, actual_BD, what="ONNX Runtime against frozen", **options)


def test_zero_points_are_zero_and_weights_are_stored_as_int8(graphs, model):
    for path, tower in zip(graphs, (ImageTower(model.net), TextTower(model.net)), strict=True):
        graph = onnx.load(path).graph
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        quantizing = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert quantizing
        assert not any(constants[node.input[2]].any() for node in quantizing)
        stored_int8 = sum(array.size for array in constants.values() if array.dtype == np.int8)
        matrices = sum(parameter.numel() for parameter in tower.parameters() if parameter.dim() > 1)
        assert stored_int8 > 0.9 * matrices  # the rest: positional embedding and text projection
        assert min(array.min() for array in constants.values() if array.dtype == np.int8) >= -127


def test_onnx_runtime_computes_in_integers(graphs, tmp_path):
    counts = []
    for path in graphs:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / path.name)
        options.log_severity_level = 3  # it warns that an optimised graph is for this machine only
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in onnx.load(tmp_path / path.name).graph.node]
        counts.append({operator: operators.count(operator) for operator in set(operators)})
    image, text = counts
    assert "Conv" not in image
    assert "FusedConv" not in image
    assert (image["QLinearConv"], image["QGemm"], image["QLinearAdd"]) == (15, 1, 4)
    assert text["MatMulIntegerToFloat"] + text.get("QGemm", 0) == 8  # four linear layers in each of two blocks
    assert "DequantizeLinear" not in text  # neither weights nor the vocabulary are dequantized on every call


@pytest.fixture(scope="module")
def half(checkpoint, frozen, inputs, tmp_path_factory):
    """The int8-fp16 export, of pictures that calibration would recognise."""
    folder = tmp_path_factory.mktemp("int8-fp16")
    pixels = ((inputs[0].clamp(-2, 2) + 2) / 4 * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    headline = classes_set("made", pixels, CAPTIONS, ("{}",))
    planned = PlannedExport("student", "int8-fp16", opset=18)
    export_onnx(load_model(checkpoint), folder, planned, headline, FrozenTowers(*frozen))
    return folder


def test_int8_fp16_keeps_the_int8_weights_and_halves_all_else(half, graphs):
    for path, name in zip(graphs, ("image.onnx", "text.onnx"), strict=True):
        model = onnx.load(half / name)
        assert model.opset_import[0].version >= 19  # the first whose QuantizeLinear takes float16
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        rounded = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == INT8}
        assert rounded
        assert all(stored[key].raw_data == tensor.raw_data for key, tensor in rounded.items())
        assert not [key for key, tensor in stored.items() if tensor.data_type == FLOAT and np.prod(tensor.dims) > 1]
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert stored[node.input[1]].data_type == onnx.TensorProto.FLOAT16
                assert (onnx.numpy_helper.to_array(stored[node.input[1]]) > 0).all()
            if node.op_type == "LayerNormalization":  # float32 sums: the attribute's default
                assert [a.i for a in node.attribute if a.name == "stash_type"] in ([], [FLOAT])
        assert {entry.type.tensor_type.elem_type for entry in model.graph.output} == {FLOAT}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_fp16_runs_on_a_cpu_and_is_proven_there(half, runtime):
    proven = prove(half, runtime=runtime, precision="int8-fp16")
    assert proven["parity"]["image"]["num_not_finite"] == proven["parity"]["text"]["num_not_finite"] == 0
    assert (proven["nodes"]["image"]["integer"] > 0) == (runtime == "openvino")  # ONNX Runtime: in floats on a CPU


def test_int8_bf16_is_the_graph_of_int8_and_openvino_s_alone(graphs, half, checkpoint, frozen, tmp_path):
    with np.load(half / "parity.npz") as saved:
        pixels, captions = saved["pixels_BHWC"], [caption.decode() for caption in saved["captions"]]
    headline = classes_set("made", pixels, captions, ("{}",))
    planned = PlannedExport("student", "int8-bf16")
    export_onnx(load_model(checkpoint), tmp_path, planned, headline, FrozenTowers(*frozen))
    for path, name in zip(graphs, ("image.onnx", "text.onnx"), strict=True):
        assert list(onnx.load(tmp_path / name).graph.node) == list(onnx.load(path).graph.node)
    proven = prove(tmp_path, runtime="openvino", precision="int8-bf16")
    assert proven["parity"]["image"]["num_not_finite"] == proven["parity"]["text"]["num_not_finite"] == 0
    assert proven["nodes"]["image"]["integer"] > 0
    with pytest.raises(
        UnavailableBackend, match=r"does not support int8-bf16, which needs OpenVINO; export int8 instead"
    ):
        prove(tmp_path, runtime="onnxruntime", precision="int8-bf16")


def test_int8_fp16_refuses_a_weight_beyond_half_and_lifts_a_scale_below(frozen):
    tower = convert_frozen_tower(frozen[1], "int8")
    assert tower is frozen[1]
    half = convert_frozen_tower(tower, "int8-fp16")
    assert {buffer.dtype for name, buffer in half.named_buffers() if name.endswith("scale")} == {torch.float16}
    (first, *_) = [module for module in tower.modules() if hasattr(module, "scale")]
    kept = first.scale.clone()
    first.scale.fill_(1e-9)
    lifted = next(module for module in convert_frozen_tower(tower, "int8-fp16").modules() if hasattr(module, "scale"))
    assert (lifted.scale > 0).all()
    first.scale.copy_(kept)
    weight = next(tower.parameters())
    value = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(1e6)
        with pytest.raises(
            GateError, match=r"int8-fp16: the weight .* has values up to 1e\+06.*Export this model in int8"
        ):
            convert_frozen_tower(tower, "int8-fp16")
        weight.copy_(value)


def test_signed_activations_use_no_uint8(model, inputs, tmp_path):
    quantized_folder(tmp_path, model, inputs, steps=0, signed_activations=True)
    image_tower, _ = load_quantized(tmp_path, load_model(tmp_path))
    assert all(quantizer.signed for _, quantizer in list_quantizers(image_tower))
    buffers = dict(freeze(image_tower, inputs[0][:2]).named_buffers())
    assert {value.dtype for name, value in buffers.items() if name.endswith("zero_point")} == {torch.int8}


def test_a_folder_without_quantizers_names_the_next_command(tmp_path, model):
    with pytest.raises(ArtifactError, match=r"expected an int8 checkpoint\. Make one with: clipkd quantize"):
        load_quantized(tmp_path, model)


def without_a_command(config):
    config["text"]["compression_state"].pop()


def of_another_package(config):
    config["image"]["compression_state"][0].update(module_path="subprocess", module_cls_name="Popen")


def of_an_unknown_scheme(config):
    config["image"]["compression_state"][0]["module_config"]["mode"] = "sideways"


def without_places(config):
    config["image"] = []


def without_hashes(config):
    config["sha256"] = {}


@pytest.mark.parametrize(
    "change", [without_a_command, of_another_package, of_an_unknown_scheme, without_places, without_hashes]
)
def test_quantizers_of_another_model_are_refused(checkpoint, tmp_path, model, change):
    shutil.copytree(checkpoint, tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "nncf.json").read_text())
    change(config)
    (tmp_path / "int8" / "nncf.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="does not fit the model"):
        load_quantized(tmp_path / "int8", model)


@pytest.mark.parametrize("name", ["nncf.safetensors", "open_clip_model.safetensors"])
def test_a_changed_bit_is_refused(checkpoint, tmp_path, model, name):
    shutil.copytree(checkpoint, tmp_path / "int8")
    path = tmp_path / "int8" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last number
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}: changed since clipkd quantize wrote it"):
        load_quantized(tmp_path / "int8", model)


def test_a_tower_that_stays_float_is_as_it_was_and_is_not_trained(model, inputs, tmp_path):
    quantized_folder(tmp_path, model, inputs, steps=2, towers=("image",))
    assert set(json.loads((tmp_path / "nncf.json").read_text())) == {"image", "moved", "sha256"}
    image_tower, text_tower = load_quantized(tmp_path, load_model(tmp_path))
    assert list_quantizers(image_tower)
    assert not list_quantizers(text_tower)
    with torch.no_grad():
        expected_BD = TextTower(model.net)(inputs[1])
        actual_BD = text_tower(inputs[1])
        assert (actual_BD - expected_BD).abs().max() < 1e-6  # attention sums in another order
        assert torch.equal(freeze(text_tower, inputs[1])(inputs[1]), actual_BD)
        assert not torch.equal(image_tower(inputs[0]), ImageTower(model.net)(inputs[0]))


def test_nncf_config_survives_json(checkpoint):
    nncf = import_nncf()
    config = json.loads((checkpoint / "nncf.json").read_text())
    for tower, name in zip(load_quantized(checkpoint, load_model(checkpoint)), ("image", "text"), strict=True):
        assert nncf.torch.get_config(tower) == decode_json(config[name])


def test_the_parts_of_nncf_that_freezing_relies_on():
    import_nncf()
    from nncf.torch.quantization import extensions
    from nncf.torch.quantization.layers import SymmetricQuantizer
    from nncf.torch.quantization.quantize_functions import QuantizedFunctionsCPU

    assert QuantizedFunctionsCPU is extensions.QuantizedFunctionsCPU
    for name in ("set_levels", "get_parameters_for_torch_fq", "quantize", "signed", "per_channel", "scale_shape"):
        assert hasattr(SymmetricQuantizer, name)


def test_quantizing_compiles_prints_and_writes_nothing_else(tmp_path):
    """In a process of its own, because pytest itself switches NNCF's telemetry off."""
    script = f"""
import os, sys, pathlib, socket, torch
def unplugged(*args, **kwargs): raise AssertionError("a network was looked for")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, unplugged)
socket.getaddrinfo = socket.create_connection = unplugged
from toolchain.models.build import load_model
from toolchain.quantization.quantize import Calibration, FineTuning, FineTuningBatch, quantize
def refuse(*args, **kwargs): raise AssertionError("a compiler was called")
torch.compile = refuse
import torch.utils.cpp_extension as extension
extension.load = refuse
model = load_model(pathlib.Path({str(STUDENT)!r}), random_seed=0)
batch = torch.randn(4, 3, 32, 32), model.tokenize(["a", "b", "c", "d"])
pathlib.Path("out").mkdir()
fine_tuning = FineTuning(iter([FineTuningBatch(*batch)] * 2), steps=1, lr=1e-4)
quantize(model, pathlib.Path("out"), Calibration(*batch), fine_tuning)
from nncf.telemetry.wrapper import NNCFTelemetryStub, telemetry
assert isinstance(telemetry, NNCFTelemetryStub), telemetry
assert os.environ["NNCF_CI"] == "1" and "openvino_telemetry" not in sys.modules
telemetry.send_event("what", "ever", "no one hears")
"""
    root = str(STUDENT.parents[1])
    environment = {"PYTHONPATH": root, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"out/open_clip_model.safetensors", "out/nncf.safetensors", "out/nncf.json"}


def out_of_time(monkeypatch):
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPULoader

    monkeypatch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "1")
    monkeypatch.setattr(QuantizedFunctionsCPULoader, "load", classmethod(lambda _: time.sleep(1.5)))


def without_nvcc(monkeypatch):
    import nncf
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPULoader

    def load(_):
        raise nncf.InstallationError("CUDA is available for PyTorch, but NNCF could not compile")

    monkeypatch.setattr(QuantizedFunctionsCPULoader, "load", classmethod(load))


def without_a_compiler(monkeypatch):
    """NNCF's own fallback, in an environment where no compiler answers."""
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPULoader
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    plain = ReferenceQuantize(ReferenceBackendType.TORCH)
    functions = types.SimpleNamespace(
        Quantize_forward=torch.compile(plain.forward), Quantize_backward=torch.compile(plain.backward)
    )
    monkeypatch.setattr(QuantizedFunctionsCPULoader, "load", classmethod(lambda _: functions))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (out_of_time, "NNCF_EXTENSION_LOAD_TIMEOUT=600"),
        (without_nvcc, "nvcc of the CUDA toolkit"),
        (without_a_compiler, r"no working C\+\+ compiler"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NNCF leaves its loader's thread pool
def test_an_extension_that_will_not_compile_is_one_message(model, inputs, tmp_path, monkeypatch, broken, words):
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU

    monkeypatch.setattr(nncf_backend, "_keep_from_compiling", lambda: None)  # which is why no user should see this
    monkeypatch.setattr(QuantizedFunctionsCPU, "_loaded_namespace", None)
    broken(monkeypatch)
    with pytest.raises(MissingDependency, match=words) as caught:
        quantized_folder(tmp_path, model, inputs, steps=1)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1
    del caught
    gc.collect()  # the pool, here


def test_without_nncf_the_message_names_what_to_install(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependency, match=r"pip install 'clipkd\[train\]'"):
        quantized_folder(tmp_path, model, inputs, steps=0)
