"""A checkpoint becomes two ONNX graphs, image and text, and everything a device without torch needs beside them.

Precision is a property of the exported graph, decided here: fp16 and bf16 store half-precision weights and compute in
them (inputs, outputs and the final normalisation stay fp32, LayerNormalization sums in fp32), int8 stores what
quantize.freeze rounded, int8-fp16 that with everything else as in fp16, and int8-bf16 the graph of int8, of which
OpenVINO computes everything else in bfloat16.

    B batch   D embedding width   K classes   P templates   T tokens   CHW, HWC image
"""

import copy
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg
from PIL import Image, ImageOps
from torch import Tensor, nn

from export.onnx_rewrites import products_apart, separate_gemm_biases
from export.preprocessing import UInt8Tower
from export.runtime import IMAGE_GRAPH, IMAGE_INPUT, UINT8_GRAPH, UINT8_INPUT
from export.tokenizers_json import write_tokenizer
from toolchain.attention import plain_attention
from toolchain.errors import ClipkdError, GateError
from toolchain.eval_sets import EvalSet, Picture
from toolchain.models import ClipModel, num_parameters
from toolchain.quantize import (
    ImageTower,
    TextTower,
    example_pixels,
    fold_batch_norms,
    merge_branches,
    without_attention_fast_path,
)

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-fp16", "int8-bf16")
_FROZEN, _HALF = ("int8", "int8-fp16", "int8-bf16"), ("fp16", "int8-fp16")
_WITHOUT_HALF = {"fp16": "Export this model in fp32 or bf16", "int8-fp16": "Export this model in int8"}
MAX_HALF_ACTIVATION = 3e4  # of 65504: pictures that calibration did not show may go twice as far
_HALF_SCALES_OPSET = 19  # the first in which QuantizeLinear takes float16
BF16_OPSET = 22  # the first in which every operator takes bfloat16; without QuantizeLinear nothing speaks against it
_LEAST_HALF = 2.0**-24  # greater than zero that fp16 knows
MAX_PARITY_SAMPLES = 256
MAX_PARITY_BYTES = 1 << 26  # of pictures: all 256 at 224x224
NUM_PARITY_PIXELS = 4  # whose pixel_values are kept too: at 224x224 each takes 600 kB, and one shows a wrong mean
_CHUNK = 256  # samples per forward
_MAX_BATCH = 1 << 16
_MAX_SIDE = 1 << 15  # of a picture, in pixels: int32 holds what its kernels are made of
_EXAMPLE_SIZE = 37, 53  # unlike each other and any model's, so that nothing is taken for the same size


def export_onnx(
    model: ClipModel,
    folder: Path,
    *,
    role: str,
    precision: str,
    headline: EvalSet,
    runtime: str = "onnxruntime",
    opset: int = 20,
    batch: int | None = None,
    uint8_input: bool = False,
    image_tower: nn.Module | None = None,
    text_tower: nn.Module | None = None,
) -> dict[str, Any]:
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json, classes.npz and parity.npz into `folder`.

    The classes, and the samples of parity, are those of `headline`; of a set of captions, which has no classes,
    classes.npz holds none.
    Returns the manifest's summary.  `image_tower` and `text_tower` are the frozen ones of an int8 student, in float32,
    and are then also what the exported graphs will be compared with; all others are compared with the float model.
    `batch` 1 fixes the first dimension of every graph; None leaves it free.  `uint8_input` adds image_uint8.onnx.
    Opset 20 is the last whose QuantizeLinear ONNX Runtime optimises correctly (onnxruntime#25526).

    Raises:
        ClipkdError: torch cannot export a tower, or exports a graph that breaks the contract.
        GateError: fp16 cannot hold a weight, or what a layer makes of the samples.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {PRECISIONS}")
    if (precision in _FROZEN) != (image_tower is not None and text_tower is not None):
        raise ValueError("int8 is exported from frozen towers, the others from the model's own")
    opset = max(opset, {"bf16": BF16_OPSET, "int8-fp16": _HALF_SCALES_OPSET}.get(precision, opset))
    reference_image = (image_tower or ImageTower(model.net)).eval()
    reference_text = (text_tower or TextTower(model.net)).eval()
    text_spec = write_tokenizer(model, folder)
    preprocess = {"image": asdict(PreprocessCfg(**model.config["preprocess_cfg"])), "text": text_spec}
    (folder / "preprocess.json").write_text(json.dumps(preprocess, indent=1) + "\n", encoding="utf-8")
    metadata = {
        "clipkd.version": _version(),
        "clipkd.tokenizer": model.name,
        "clipkd.role": role,
        "clipkd.precision": precision,
        "clipkd.preprocess": json.dumps(preprocess, sort_keys=True),
    }
    pixels = example_pixels(model.net).float().cpu()
    ids_2T = model.tokenize([headline.texts[0], headline.texts[-1]])
    with torch.no_grad(), without_attention_fast_path():
        for file, tower, reference, example, names_io in (
            ("image.onnx", image_tower, reference_image, pixels, ("pixel_values", "image_features")),
            ("text.onnx", text_tower, reference_text, ids_2T, ("input_ids", "text_features")),
        ):
            exported = prepared(reference, example, precision) if tower is None else frozen_in(tower, precision)
            write_graph(
                exported,
                example,
                folder / file,
                names_io=names_io,
                opset=opset,
                metadata=metadata,
                batch=batch,
                runtime=runtime,
            )
            if uint8_input and file == IMAGE_GRAPH:
                write_uint8_graph(exported, preprocess["image"], folder / UINT8_GRAPH, opset=opset, metadata=metadata)
        names = headline.texts if headline.has_classes else []
        features_KD = np.empty((0, model.embed_dim), np.float32)
        if names:
            features_KD = class_embeddings(reference_text, model, names, headline.templates).numpy()
        np.savez(
            folder / "classes.npz",
            names=np.array(names, np.str_),
            templates=np.array(headline.templates),
            features_KD=features_KD,
            logit_scale=model.logit_scale.detach().cpu().numpy(),
        )
        towers = reference_image, reference_text
        with (
            within_half_range(reference_image, "image", precision) if precision in _HALF else nullcontext(),
            within_half_range(reference_text, "text", precision) if precision in _HALF else nullcontext(),
        ):
            _write_parity_samples(folder / "parity.npz", model, towers, headline)
    params_image, params_text = num_parameters(model.net)
    return {
        "role": role,
        "runtime": runtime,
        "precision": precision,
        "params_image": params_image,
        "params_text": params_text,
        "opset": opset,
        "batch": batch,
        "size_bytes": sum((folder / file).stat().st_size for file in ("image.onnx", "text.onnx")),
    }


def _version() -> str:
    try:
        return version("clipkd")
    except PackageNotFoundError:  # run from a checkout
        return "source"


def write_graph(
    tower: nn.Module,
    example: Tensor,
    path: Path,
    *,
    names_io: tuple[str, str],
    opset: int,
    metadata: dict[str, str],
    batch: int | None = None,
    runtime: str = "onnxruntime",
) -> None:
    """Export one tower as one self-contained file, of a free batch or of a fixed one, and check what was written.

    Raises:
        ClipkdError: the exporter failed, or froze the batch that was to be free, or wrote an invalid graph.
    """
    assert len(example) > 1, "an example batch of 1 would silently fix the batch (pytorch#149065)"
    free = {0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)}
    graph = _converted(tower, example[:batch], path, names_io, free if batch is None else None, opset)
    if runtime == "openvino":
        products_apart(graph.graph)
    _check_and_save(graph, path, metadata)
    for value in (*graph.graph.input, *graph.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if batch is None and first.dim_param != "batch":
            raise ClipkdError(f"{path}: {value.name} has a fixed batch; expected a dynamic first dimension")
        if batch is not None and first.dim_value != batch:
            raise ClipkdError(
                f"{path}: {value.name} has a batch of {first.dim_value or 'any size'}, not fixed to {batch}"
            )


def write_uint8_graph(
    tower: nn.Module, image_spec: dict[str, Any], path: Path, *, opset: int, metadata: dict[str, str]
) -> None:
    """Export an image tower with its preprocessing before it: `pixels` uint8 [H, W, 3], RGB, of any H and W.

    Within the graph, what the tower sees is named `pixel_values`, for those who want to look at it.

    Raises:
        ClipkdError: the exporter failed, or froze a dimension, or wrote an invalid graph.
    """
    sizes = {index: torch.export.Dim(name, min=1, max=_MAX_SIDE) for index, name in enumerate(("height", "width"))}
    example = torch.zeros(*_EXAMPLE_SIZE, 3, dtype=torch.uint8)
    names_io = UINT8_INPUT, "image_features", IMAGE_INPUT
    graph = _converted(UInt8Tower(tower, image_spec), example, path, names_io, sizes, opset)
    del graph.graph.output[1:]
    _check_and_save(graph, path, metadata)
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    if [dim.dim_param or dim.dim_value for dim in dims] != ["height", "width", 3]:
        raise ClipkdError(f"{path}: {UINT8_INPUT} has a fixed size; expected free height and width")


def _converted(
    tower: nn.Module,
    example: Tensor,
    path: Path,
    names_io: tuple[str, ...],
    free: dict[int, Any] | None,
    opset: int,
) -> onnx.ModelProto:
    try:
        with (
            redirect_stdout(io.StringIO()),  # stdout belongs to the command's result
            _errors_only("torch.onnx", "onnxscript"),  # which warns of each chunk that it does not fold
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of torch's own internals
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                input_names=[names_io[0]],
                output_names=list(names_io[1:]),
                dynamic_shapes=None if free is None else (free,),
                opset_version=opset,
                external_data=False,
                verbose=False,
                dynamo=True,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ClipkdError(f"{path}: torch.onnx cannot export this tower at opset {opset}: {error}") from error
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    separate_gemm_biases(graph.graph)
    return graph


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Keep the loggers of these names from saying less than an error."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _check_and_save(graph: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    onnx.helper.set_model_props(graph, metadata)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ClipkdError(f"{path}: the exported graph is not valid ONNX: {error}") from error
    onnx.save(graph, path)


@torch.no_grad()
def class_embeddings(text_tower: nn.Module, model: ClipModel, names: list[str], templates: tuple[str, ...]) -> Tensor:
    """[K, D] float32: normalise( mean over templates of the unit text feature ).  CLIP (arXiv:2103.00020), 3.1.4."""
    ids_PKT = [model.tokenize([template.format(name) for name in names]) for template in templates]
    return F.normalize(torch.stack([_in_chunks(text_tower, ids_KT) for ids_KT in ids_PKT]).mean(0), dim=-1)


def _in_chunks(tower: nn.Module, inputs: Tensor) -> Tensor:
    """Features [B, D] on the CPU."""
    starts = range(0, len(inputs), _CHUNK)
    device = next((tensor.device for tensor in (*tower.parameters(), *tower.buffers())), inputs.device)
    return torch.cat([tower(inputs[start : start + _CHUNK].to(device)).cpu() for start in starts])


def prepared(tower: nn.Module, example: Tensor, precision: str) -> nn.Module:
    """A copy to export: attention open-coded, branches merged, batch norms folded (their variances may underflow),
    weights in the precision.

    Raises:
        GateError: a weight is beyond fp16's range.
    """
    tower = copy.deepcopy(tower).float().cpu()
    plain_attention(tower)
    if isinstance(tower, ImageTower):
        merge_branches(tower, example)
        fold_batch_norms(tower, example)
    if precision == "fp16":
        _require_half_weights(tower, precision)
    return tower.to({"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32))


def frozen_in(tower: nn.Module, precision: str) -> nn.Module:
    """What is exported of a frozen int8 tower: itself, or in int8-fp16 a copy whose floats, scales included, are fp16.

    The stored int8 weights stay as they are.  A scale that fp16 would round to zero becomes the smallest that it has,
    because nothing can be divided by zero; what it scales is below 1e-5 either way.

    Raises:
        GateError: a weight is beyond fp16's range.
    """
    if precision not in _HALF:
        return tower
    _require_half_weights(tower, precision)
    half = copy.deepcopy(tower).cpu().half()
    for name, buffer in half.named_buffers():
        if name.endswith("scale"):
            buffer.clamp_(min=_LEAST_HALF)
    return half


def _require_half_weights(tower: nn.Module, precision: str) -> None:
    for name, weight in tower.named_parameters():
        if not weight.abs().max() <= torch.finfo(torch.float16).max:  # not `>`: NaN must fail
            raise GateError(
                f"{precision}: the weight {name} has values up to {weight.abs().max():.3g}, expected at most 65504. "
                f"{_WITHOUT_HALF[precision]}"
            )


@contextmanager
def within_half_range(tower: nn.Module, what: str, precision: str = "fp16") -> Iterator[None]:
    """Watch what the layers of a float tower put out while the block runs.

    Raises:
        GateError: at the end, the first layer whose values pass MAX_HALF_ACTIVATION in magnitude, or are not finite.
    """
    peaks: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(value, Tensor) and value.is_floating_point():
                    peaks[name] = max(peaks.get(name, 0.0), value.detach().abs().nan_to_num(math.inf).max().item())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in tower.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    beyond = {name: peak for name, peak in peaks.items() if not peak <= MAX_HALF_ACTIVATION}
    if beyond:
        name, peak = next(iter(beyond.items()))
        raise GateError(
            f"{precision}: {what} tower, layer {name}: values up to {peak:.3g} on real samples, expected at most "
            f"{MAX_HALF_ACTIVATION:g} of fp16's 65504 ({len(beyond)} layer(s) in all). {_WITHOUT_HALF[precision]}"
        )


def _write_parity_samples(path: Path, model: ClipModel, towers: tuple[nn.Module, nn.Module], headline: EvalSet) -> None:
    """What parity.py feeds to a runtime, and what torch made of it.  Samples are spread evenly over the set."""
    shown, pictures = _parity_pictures(headline, model)
    spoken = _spread(len(headline.texts))
    captions = [headline.templates[0].format(headline.texts[index]) for index in spoken]
    pixel_values_BCHW = torch.stack([model.preprocess(picture) for picture in pictures])
    input_ids_BT = model.tokenize(captions)
    np.savez(
        path,
        names=np.array([headline.texts[index] for index in spoken]),
        image_names=np.array([headline.label(index) for index in shown]),
        captions=np.array(captions),
        pixels_BHWC=np.stack([np.asarray(picture) for picture in pictures]),
        pixel_values_FCHW=pixel_values_BCHW[:NUM_PARITY_PIXELS].numpy(),
        input_ids_BT=input_ids_BT.numpy(),
        image_features_BD=_in_chunks(towers[0], pixel_values_BCHW).numpy(),
        text_features_BD=_in_chunks(towers[1], input_ids_BT).numpy(),
    )


def _parity_pictures(headline: EvalSet, model: ClipModel) -> tuple[list[int], list[Image.Image]]:
    """Which pictures of a set, and the pictures, all of one size so that one array holds them.

    Glyphs are, and stay as they are.  Others are cut to a size a little larger than the model's, and not square, so
    that parity goes through resizing and cropping too.

    Raises:
        ClipkdError: none of them can be read.
    """
    cfg = model.config["preprocess_cfg"]
    height, width = cfg["size"] if isinstance(cfg["size"], list) else (cfg["size"], cfg["size"])
    fitted = width + width // 4, height + height // 8
    as_they_are = not isinstance(headline.pictures[0], Picture)  # an array: of one size already
    at_most = MAX_PARITY_SAMPLES if as_they_are else max(2, MAX_PARITY_BYTES // (3 * fitted[0] * fitted[1]))
    chosen = _spread(len(headline), min(MAX_PARITY_SAMPLES, at_most))
    shown: list[int] = []
    pictures: list[Image.Image] = []
    for index in chosen.tolist():
        picture = headline.image(index)
        if picture is not None:
            shown.append(index)
            pictures.append(picture if as_they_are else ImageOps.fit(picture, fitted))
    if not pictures:
        raise ClipkdError(f"evaluation set {headline.name}: none of {len(chosen)} pictures tried can be read")
    return shown, pictures


def _spread(count: int, at_most: int = MAX_PARITY_SAMPLES) -> NDArray[np.int64]:
    """At most so many indices below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(at_most, count)).round().astype(np.int64)
