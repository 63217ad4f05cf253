"""Prepare a tower for the precision of its graph: fp32, fp16, bf16, and frozen int8 with float parts in either."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.errors import GateError
from toolchain.models.folding import fold_batch_norms, merge_branches
from toolchain.models.plain_attention import plain_attention
from toolchain.models.towers import ImageTower
from toolchain.precisions import PRECISIONS

MAX_HALF_ACTIVATION = 3e4  # fp16 max is 65504: images outside the calibration samples may reach twice as far
_LEAST_HALF = 2.0**-24  # the smallest positive fp16 number
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def is_half(precision: str) -> bool:
    """Return True if the graph stores its floats in float16, whose range is small."""
    return PRECISIONS[precision].stored_floats == "float16"


def prepare_tower(tower: nn.Module, example: Tensor, precision: str) -> nn.Module:
    """Return a copy to export: attention open-coded, branches merged, batch norms folded (their variances may
    underflow), weights in the precision.

    Raises:
        GateError: a weight is beyond fp16's range.
    """
    tower = copy.deepcopy(tower).float().cpu()
    plain_attention(tower)
    if isinstance(tower, ImageTower):
        merge_branches(tower, example)
        fold_batch_norms(tower, example)
    if is_half(precision):
        _require_half_weights(tower, precision)
    return tower.to(_TYPES[PRECISIONS[precision].stored_floats])


def convert_frozen_tower(tower: nn.Module, precision: str) -> nn.Module:
    """Return a frozen int8 tower as it is, or for int8-fp16 a copy whose floats, scales included, are fp16.

    The stored int8 weights stay as they are. A scale that fp16 would round to zero becomes the smallest positive fp16
    number, because a division by zero must not occur; the scaled values are below 1e-5 either way.

    Raises:
        GateError: a weight is beyond fp16's range.
    """
    if not is_half(precision):
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
                f"Export this model in {PRECISIONS[precision].instead}"
            )


@contextmanager
def require_half_range(tower: nn.Module, what: str, precision: str = "fp16") -> Iterator[None]:
    """Check the outputs of a float tower's layers while the block runs.

    Raises:
        GateError: at the end, naming the first layer whose values exceed MAX_HALF_ACTIVATION or are not finite.
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
            f"{MAX_HALF_ACTIVATION:g} (fp16 max is 65504; {len(beyond)} layer(s) exceed it). Export this model in "
            f"{PRECISIONS[precision].instead}"
        )
