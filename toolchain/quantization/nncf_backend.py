"""Use NNCF: import it quietly, prevent compilation, calibrate, and read its quantizers."""

import io
import logging
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.errors import MissingDependency

_PRODUCTS = ["matmul", "__matmul__"]  # of attention, and open_clip's last projection
_FLOAT_EVERYWHERE = ["scaled_dot_product_attention", "bmm", "normalize", "layer_norm"]
_FLOAT_IN_TRANSFORMERS = ["conv2d", "add", "add_", "__add__", "__iadd__", "__radd__"]
CALIBRATION_BATCH = 64
_HOOKS = "__nncf_hooks."


def import_nncf() -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry; NNCF reads this once, when imported
    # NNCF creates its telemetry reporter before that, which writes an identity into the home folder
    hide_reporter = "openvino_telemetry" not in sys.modules
    if hide_reporter:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # makes importing it an ImportError
    logging.getLogger("torch.utils.cpp_extension").setLevel(
        logging.ERROR
    )  # it warns about CUDA, but nothing is compiled
    try:
        import nncf
        import nncf.torch
    except ModuleNotFoundError as error:
        raise MissingDependency("int8 needs NNCF. Install it with: pip install 'clipkd[train]'") from error
    finally:
        if hide_reporter:
            del sys.modules["openvino_telemetry"]
    nncf.set_log_level(logging.ERROR)
    _keep_from_compiling()
    return nncf


def _keep_from_compiling() -> None:
    """Compute NNCF's two functions in plain torch.

    NNCF would compile a C++ or CUDA extension on the first forward pass, and its own fallback calls torch.compile.
    Both need a compiler and a minute.  Plain torch computes the same functions.
    """
    from nncf.torch.quantization import extensions
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    plain = ReferenceQuantize(ReferenceBackendType.TORCH)
    functions = types.SimpleNamespace(Quantize_forward=plain.forward, Quantize_backward=plain.backward)
    for namespace in (extensions.QuantizedFunctionsCPU, extensions.QuantizedFunctionsCUDA):
        if isinstance(namespace, extensions.ExtensionNamespace):
            namespace._loaded_namespace = functions


@contextmanager
def explain_extension_errors() -> Iterator[None]:
    """Explain in one message why NNCF's compilation failed, if it compiles after all: time-out, no compiler, no nvcc.

    Raises:
        MissingDependency: replaces the errors of NNCF and torch.
    """
    from nncf import InstallationError
    from nncf.torch.extensions import EXTENSION_LOAD_TIMEOUT_ENV_VAR, ExtensionLoaderTimeoutException

    try:
        yield
    except ExtensionLoaderTimeoutException as error:
        raise MissingDependency(
            "int8: NNCF did not finish compiling its extension in time: the machine is busy, or a killed process left "
            f"a lock. Raise the limit, in seconds: {EXTENSION_LOAD_TIMEOUT_ENV_VAR}=600; or delete nncf's folder "
            "under TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions)"
        ) from error
    except InstallationError as error:
        raise MissingDependency(
            "int8 on a GPU: NNCF could not compile its CUDA extension: it needs nvcc, which torch does not include. "
            "Put nvcc of the CUDA toolkit that torch was built for on PATH, or hide the GPU: CUDA_VISIBLE_DEVICES="
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        raise MissingDependency(
            "int8: NNCF fell back to torch.compile, which found no working C++ compiler. Install one (Debian: apt-get "
            "install g++), or name it in CXX"
        ) from error


def calibrate(
    nncf: Any, tower: nn.Module, inputs: Tensor, *, is_convolutional: bool, attention: bool = False
) -> nn.Module:
    """Return the tower with fake quantization and ranges set from `inputs`, ready for fine-tuning."""
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    floating = _FLOAT_EVERYWHERE if is_convolutional else _FLOAT_EVERYWHERE + _FLOAT_IN_TRANSFORMERS
    floating = floating if attention else floating + _PRODUCTS
    off = nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    batches = list(torch.split(inputs, CALIBRATION_BATCH))  # the ranges are exact for any batch size
    with redirect_stdout(io.StringIO()):  # NNCF prints its progress there
        quantized: nn.Module = nncf.quantize(
            tower,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(types=floating, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=off,  # SmoothQuant ignores the ignored scope (nncf#4172)
                disable_bias_correction=True,  # fine-tuning moves the biases anyway
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                # otherwise inputs of depthwise convolutions get a scale per channel, which no runtime supports
                activations_quantization_params=QuantizationParameters(per_channel=False),
            ),
        )
    return quantized.eval()  # no dropout: rounding is the only noise the student should learn


def find_hooks(tower: nn.Module) -> nn.Module:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    return get_hook_storage(tower)  # type: ignore[no-any-return]


def list_quantizers(tower: nn.Module, *, every_place: bool = False) -> list[tuple[str, Any]]:
    """Return (name within the hook storage, NNCF quantizer) of a quantized tower; empty for a float one.

    Inputs of torch.cat share a quantizer.  It is listed once, or with `every_place` once per application.
    """
    from nncf.torch.function_hook.wrapper import is_wrapped
    from nncf.torch.quantization.layers import BaseQuantizer

    if not is_wrapped(tower):
        return []
    hooks: Any = find_hooks(tower)
    named = hooks.named_hooks(remove_duplicate=not every_place)
    return [(name, module) for name, module in named if isinstance(module, BaseQuantizer)]


def find_quantizer_nodes(graph: Any) -> dict[str, str]:
    """Return {node of an NNCF graph that rounds: the quantizer's name within the hook storage}."""
    found = {}
    for node in graph.get_all_nodes():
        names = [previous.node_name for previous in graph.get_previous_nodes(node)]
        scale = next((name for name in names if name.startswith(_HOOKS)), None)
        if scale is not None:
            found[node.node_name] = scale.removeprefix(_HOOKS).rpartition(".")[0]
    return found


def is_quantizer_key(key: str) -> bool:
    return key.startswith(_HOOKS)


def decode_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return NNCF's config with the types that JSON lost: the scheme is an enum, a shape is a tuple."""
    from nncf.common.quantization.structs import QuantizationScheme

    for command in config["compression_state"]:
        module = command["module_config"]
        module["mode"] = QuantizationScheme(module["mode"])
        module["scale_shape"] = tuple(module["scale_shape"])
    return config
