"""Write one tower as an ONNX graph: trace it, convert it, check it, save it."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.graphs.onnx_rewrites import separate_gemm_biases, separate_products, unsign_shared_activations
from export.graphs.uint8_preprocessing import UInt8Tower
from export.model_folder import IMAGE_INPUT, UINT8_INPUT
from toolchain.errors import ClipkdError
from toolchain.runtimes import RUNTIMES

_MAX_BATCH = 1 << 16
_MAX_SIDE = 1 << 15  # image side in pixels: the integers in the resize kernels then fit int32
_EXAMPLE_SIZE = 37, 53  # different from each other and from any model's size, so that no two sizes are unified


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
    """Export one tower as one self-contained file with a free or a fixed batch, and check the written graph.

    Raises:
        ClipkdError: the exporter failed, fixed a batch that must be free, or wrote an invalid graph.
    """
    assert len(example) > 1, "an example batch of 1 would silently fix the batch (pytorch#149065)"
    free = {0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)}
    graph = _convert(tower, example[:batch], path, names_io, free if batch is None else None, opset, runtime)
    onnx.helper.set_model_props(graph, metadata)
    _check_and_save(graph, path, runtime)
    for value in (*graph.graph.input, *graph.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if batch is None and first.dim_param != "batch":
            raise ClipkdError(f"{path}: {value.name} has a fixed batch; expected a dynamic first dimension")
        if batch is not None and first.dim_value != batch:
            raise ClipkdError(
                f"{path}: {value.name} has a batch of {first.dim_value or 'any size'}, not fixed to {batch}"
            )


def adapt_graph(source: Path, path: Path, runtime: str) -> None:
    """Write a graph that `write_graph` wrote for a runtime without rewrites as it would be for another runtime.

    The bytes are those that a new export would have, without tracing the tower again.
    """
    _check_and_save(onnx.load(source), path, runtime)


def write_uint8_graph(
    tower: nn.Module, image_spec: dict[str, Any], path: Path, *, opset: int, metadata: dict[str, str], runtime: str
) -> None:
    """Export an image tower preceded by its preprocessing: `pixels` uint8 [H, W, 3], RGB, of any H and W.

    The input of the tower is named `pixel_values` within the graph, for inspection.

    Raises:
        ClipkdError: the exporter failed, fixed a dimension, or wrote an invalid graph.
    """
    sizes = {index: torch.export.Dim(name, min=1, max=_MAX_SIDE) for index, name in enumerate(("height", "width"))}
    example = torch.zeros(*_EXAMPLE_SIZE, 3, dtype=torch.uint8)
    names_io = UINT8_INPUT, "image_features", IMAGE_INPUT
    graph = _convert(UInt8Tower(tower, image_spec), example, path, names_io, sizes, opset, runtime)
    del graph.graph.output[1:]
    onnx.helper.set_model_props(graph, metadata)
    _check_and_save(graph, path)
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    if [dim.dim_param or dim.dim_value for dim in dims] != ["height", "width", 3]:
        raise ClipkdError(f"{path}: {UINT8_INPUT} has a fixed size; expected free height and width")


def _convert(
    tower: nn.Module,
    example: Tensor,
    path: Path,
    names_io: tuple[str, ...],
    free: dict[int, Any] | None,
    opset: int,
    runtime: str,
) -> onnx.ModelProto:
    try:
        with (
            redirect_stdout(io.StringIO()),  # stdout belongs to the command's result
            _errors_only("torch.onnx", "onnxscript"),  # it warns about each chunk that it does not fold
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # they concern torch's internals
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
    if not RUNTIMES[runtime].is_kit:
        unsign_shared_activations(graph.graph)
    return graph


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Silence the named loggers below level ERROR."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _check_and_save(graph: onnx.ModelProto, path: Path, runtime: str = "onnxruntime") -> None:
    """Rewrite a graph for its runtime, check it and save it."""
    if RUNTIMES[runtime].separates_products:
        separate_products(graph.graph)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ClipkdError(f"{path}: the exported graph is not valid ONNX: {error}") from error
    onnx.save(graph, path)
