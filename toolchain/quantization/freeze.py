"""Freeze fake-quantized towers into modules that export integers."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolchain.models.towers import without_attention_fast_path
from toolchain.quantization.nncf_backend import explain_extension_errors, find_hooks, list_quantizers

_OPSET = 19  # the first in which QuantizeLinear and DequantizeLinear take float16 scales


def sign_activations(*towers: nn.Module) -> None:
    """Make every quantizer signed, in place, as TensorRT needs: scales stay, and unsigned quantizers lose a bit."""
    for tower in towers:
        for _, quantizer in list_quantizers(tower):
            quantizer.signed = True


def freeze(tower: nn.Module, example: Tensor, *, round_outputs: bool = True) -> nn.Module:
    """Return a copy of a quantized tower that computes with rounded values and exports Quantize/DequantizeLinear.

    Weights are stored as int8.  `example` runs once, to distinguish quantizers of weights from those of activations.
    Disabled quantizers are removed, and without `round_outputs` those of convolutions' outputs (output_rounding.py).  A
    tower without quantizers is only copied.
    """
    tower = copy.deepcopy(tower).eval()
    recorders = {name: _Recorder(quantizer) for name, quantizer in list_quantizers(tower, every_place=True)}
    if not recorders:
        return tower
    from toolchain.quantization.output_rounding import OutputQuantizer  # NNCF is imported if there are quantizers

    hooks = find_hooks(tower)
    for name, recorder in recorders.items():
        hooks.set_submodule(name, recorder)
    with torch.no_grad(), without_attention_fast_path(), explain_extension_errors():
        tower(example)
    table_of = {m.weight: name for name, m in tower.named_modules() if isinstance(m, nn.Embedding)}
    for name, recorder in recorders.items():
        removed = isinstance(recorder.quantizer, OutputQuantizer) and not round_outputs
        if removed or not recorder.quantizer.is_enabled_quantization():  # type: ignore[operator]
            hooks.set_submodule(name, nn.Identity())
            continue
        if recorder.weight is None:
            hooks.set_submodule(name, _ActivationRounding(recorder.quantizer))
            continue
        stored = _StoredWeight(recorder.quantizer, recorder.weight)
        if recorder.weight in table_of:
            tower.set_submodule(table_of[recorder.weight], _StoredEmbedding(stored))
            hooks.set_submodule(name, nn.Identity())
        else:
            hooks.set_submodule(name, stored)
    return tower


class _ActivationRounding(nn.Module):
    """Rounding of x to scale * clamp(round(x / scale), low, high), in the scale's type: float32 or float16."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Any) -> None:
        super().__init__()
        quantizer.set_levels()
        self.low, self.high, scale, zero_point = quantizer.get_parameters_for_torch_fq()
        assert not quantizer.per_channel, "activations have one scale per tensor"
        assert not zero_point.any(), "activations are symmetric"
        self.register_buffer("scale", scale.detach().float().reshape(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8 if self.low < 0 else torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.dtype)  # pixel_values are float32 even if the tower is not
        if torch.onnx.is_in_onnx_export():
            quantized = torch.onnx.ops.symbolic(
                "::QuantizeLinear",
                (x, self.scale, self.zero_point),
                dtype=self.zero_point.dtype,
                shape=x.shape,
                version=_OPSET,
            )
            inputs = (quantized, self.scale, self.zero_point)
            return torch.onnx.ops.symbolic("::DequantizeLinear", inputs, dtype=x.dtype, shape=x.shape, version=_OPSET)
        # torch.fake_quantize_per_tensor_affine multiplies by 1/scale and so rounds ties differently from ONNX
        return (x.float() / self.scale.float()).round().clamp(self.low, self.high).mul(self.scale).to(x.dtype)


class _StoredWeight(nn.Module):
    """The int8 weight, dequantized; it replaces the float parameter, which drops out of the exported graph."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Any, parameter: Tensor) -> None:
        super().__init__()
        quantizer.set_levels()
        low, high, scale, _ = quantizer.get_parameters_for_torch_fq()
        assert quantizer.per_channel, "weights have one scale per output channel"
        assert low < 0, "weights are signed"
        self.axis = max(range(parameter.dim()), key=lambda axis: quantizer.scale_shape[axis])
        self.shape = [-1 if axis == self.axis else 1 for axis in range(parameter.dim())]
        with torch.no_grad():
            rounded = (quantizer.quantize(parameter.detach()) / scale.reshape(self.shape)).round()
        self.register_buffer("weight", rounded.clamp(-high, high).to(torch.int8))  # -128 saturates x86 int16 sums
        self.register_buffer("scale", scale.detach().float().reshape(-1))
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int8))

    def forward(self, _: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return torch.onnx.ops.symbolic(
                "::DequantizeLinear",
                (self.weight, self.scale, self.zero_point),
                {"axis": self.axis},
                dtype=self.scale.dtype,
                shape=list(self.weight.shape),
                version=_OPSET,
            )
        return self.weight.to(self.scale.dtype) * self.scale.reshape(self.shape)


class _StoredEmbedding(nn.Module):
    """An embedding that looks up int8 rows first, so a call dequantizes the sentence and not the whole vocabulary."""

    def __init__(self, table: _StoredWeight) -> None:
        super().__init__()
        assert table.axis == 0, "one scale per row"
        self.register_buffer("weight", table.weight)
        self.register_buffer("scale", table.scale[:, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        rows: Tensor = F.embedding(input_ids, self.weight)  # type: ignore[arg-type]  # a buffer
        scale: Tensor = F.embedding(input_ids, self.scale)  # type: ignore[arg-type]
        return rows.to(scale.dtype) * scale


class _Recorder(nn.Module):
    """A quantizer that records the parameter it is applied to, if it is one."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.weight: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, nn.Parameter):
            self.weight = x
        return self.quantizer(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped
