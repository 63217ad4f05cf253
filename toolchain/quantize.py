"""Make a student int8: calibrate with NNCF, fine-tune with fake quantization, save, restore, freeze for export.

Each tower is quantized by itself, because NNCF sees only what its root `forward` calls.  Weights are int8 per output
channel, activations 8 bits per tensor, all zero points are zero.  An activation that calibration never saw negative
(after a ReLU) is unsigned: ONNX Runtime then drops the ReLU and keeps the convolution in integers.  TensorRT knows
signed activations only; `signed_activations` is for it, at the price of one bit.

The range of an activation is the largest value that calibration saw.  NNCF's default, the mean of each image's largest
value, is less than half of what a picture of full contrast needs where most calibration images have little.

A tower with batch norms, convolutional or hybrid, first has its parallel branches merged (FastViT) and its batch norms
folded into its convolutions, and is quantized throughout, residual additions included.  A transformer has only its
linear layers and embeddings quantized: the outliers of its residual stream do not survive 8 bits (onnxsim#1742).  The
products within attention stay float as well, unless asked for.  In either, gains of layer norms first move into the
linear layers that read them.

NNCF is imported inside functions: exporting a float model must not need it, and its telemetry has to be refused before
its import.  Its compiled extension is never built: what NNCF would compile is computed in plain torch.

    B batch   D embedding width   T tokens   CHW image
"""

import copy
import io
import json
import logging
import math
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolchain.attention import plain_attention
from toolchain.errors import ArtifactError, MissingDependency
from toolchain.models import ClipModel
from toolchain.sources import WEIGHTS
from toolchain.stages import file_fingerprint

CONFIG, QUANTIZERS = "nncf.json", "nncf.safetensors"

Batch = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""pixel_values [B,3,H,W], input_ids [B,T], the teacher's unit image and text features [B,D] or None."""

LossOf = Callable[[Tensor, Tensor, Batch], Tensor]

TOWERS = ("image", "text")

_PRODUCTS = ["matmul", "__matmul__"]  # of attention, and open_clip's last projection
_FLOAT_EVERYWHERE = ["scaled_dot_product_attention", "bmm", "normalize", "layer_norm"]
_FLOAT_IN_TRANSFORMERS = ["conv2d", "add", "add_", "__add__", "__iadd__", "__radd__"]
_MERGES_BRANCHES = ("fuse", "reparameterize", "switch_to_deploy")  # what timm calls on the modules that have them
_CALIBRATION_BATCH = 64
_MAX_MOVE = 0.03  # of a unit feature, by merging and folding: 0.01 where channels are nearly dead, 0.1 if done wrong
_MAX_GAIN_MOVE = 1e-4  # by moving gains: 1e-6 at most in 29 architectures
_OPSET = 19  # the first in which QuantizeLinear and DequantizeLinear take float16 scales


class ImageTower(nn.Module):
    """pixel_values float32 [B, 3, H, W] to image_features float32 [B, D], unit norm."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.visual = net.visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return F.normalize(self.visual(pixel_values.to(dtype)).float(), dim=-1)  # type: ignore[operator]


class TextTower(nn.Module):
    """input_ids int64 [B, T] to text_features float32 [B, D], unit norm."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.clip = copy.copy(net)  # shares every weight; without the image tower, which must not be copied along
        self.clip._modules = {name: module for name, module in net._modules.items() if name != "visual"}

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_text(input_ids).float(), dim=-1)  # type: ignore[operator]


@contextmanager
def without_attention_fast_path() -> Iterator[None]:
    """Keep nn.MultiheadAttention on its open-coded path: the fused one can be neither quantized nor exported."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def fold_batch_norms(tower: nn.Module, example: Tensor) -> dict[str, str]:
    """Fold, in place, every batch norm that follows a convolution into it; returns {batch norm's name: convolution's}.

    What follows what is observed while `example` runs; a convolution that something else reads too stays as it is, as
    where FastViT's attention normalises a residual branch.  In float64, so that folding a batch norm already written
    back as the identity (see `_float_state`) restores the convolution to the bit.
    """
    convolution_of: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is held so that its id stays its own
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def produced(convolution: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(convolution, nn.Conv2d)
        convolution_of[id(output)] = (convolution, output)
        readers.count[id(output)] = 0  # of the tensor that had this id before

    def consumed(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(norm, nn.BatchNorm2d) and id(inputs[0]) in convolution_of:
            pairs.append((convolution_of[id(inputs[0])][0], norm))

    readers = _Readers()
    handles = [module.register_forward_hook(produced) for module in tower.modules() if isinstance(module, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(consumed) for m in tower.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(), readers:
        before_BD = tower(example)
    for handle in handles:
        handle.remove()
    output_of = {convolution: key for key, (convolution, _) in convolution_of.items()}
    pairs = [pair for pair in pairs if readers.count[output_of[pair[0]]] == 1]

    name_of = {module: name for name, module in tower.named_modules()}
    folded = {name_of[norm]: name_of[convolution] for convolution, norm in pairs}
    for convolution, norm in pairs:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale_C = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift_C = norm.bias.double() - norm.running_mean.double() * scale_C
            if convolution.bias is not None:
                shift_C += convolution.bias.double() * scale_C
            weight = convolution.weight.double() * scale_C[:, None, None, None]
            convolution.weight.copy_(weight)
            convolution.bias = nn.Parameter(shift_C.to(convolution.weight.dtype))
        # timm's BatchNormAct2d also holds the activation
        rest = [module for name in ("drop", "act") if isinstance(module := getattr(norm, name, None), nn.Module)]
        tower.set_submodule(name_of[norm], nn.Sequential(*rest) if rest else nn.Identity())
    with torch.no_grad():
        error = (tower(example) - before_BD).abs().max().item()
    assert error < _MAX_MOVE, f"folding the batch norms moved a unit feature by {error}"
    return folded


def move_gains(tower: nn.Module, example: Tensor) -> list[str]:
    """Move, in place, gain and bias of every layer norm that linear layers alone read into those; returns their names.

        W (g * n + b) + c = (W diag(g)) n + (W b + c)

    The gains amplify a few channels, and one scale for all of them then rounds the rest coarsely; a weight has a scale
    per output instead.  "Gamma migration", Outlier Suppression (arXiv:2209.13325), 4.1.  A runtime is also saved a pass
    over the activations.  What reads what is observed while `example` runs.  In float64, so that moving a gain of 1 and
    a bias of 0 (see `_float_state`) changes no bit.
    """
    outputs: list[tuple[nn.LayerNorm, Tensor]] = []

    def produced(norm: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(norm, nn.LayerNorm)
        outputs.append((norm, output))
        readers.count[id(output)] = 0  # of the tensor that had this id before, or within the layer

    readers = _Readers()
    norms = [module for module in tower.modules() if isinstance(module, nn.LayerNorm) and module.weight is not None]
    handles = [norm.register_forward_hook(produced) for norm in norms]
    with torch.no_grad(), readers:
        before_BD = tower(example)
    for handle in handles:
        handle.remove()
    runs, uses = Counter(norm for norm, _ in outputs), Counter(weight for _, weight, _ in readers.linears)
    read_by = {}
    for norm, output in outputs:
        linears = [(weight, bias) for read, weight, bias in readers.linears if read is output]
        by_linears_alone = len(linears) == readers.count[id(output)] > 0
        if by_linears_alone and runs[norm] == 1 and all(uses[weight] == 1 for weight, _ in linears):
            read_by[norm] = linears

    name_of = {module: name for name, module in tower.named_modules()}
    with torch.no_grad():
        for norm, linears in read_by.items():
            for weight, bias in linears:
                if norm.bias is not None:
                    bias.copy_(bias.double() + weight.double() @ norm.bias.double())
                weight.copy_(weight.double() * norm.weight.double())
            norm.weight = norm.bias = None  # type: ignore[assignment]
            norm.elementwise_affine = False
        error = (tower(example) - before_BD).abs().max().item()
    assert error < _MAX_GAIN_MOVE, f"moving the gains of layer norms moved a unit feature by {error}"
    return [name_of[norm] for norm in read_by]


class _Readers(TorchFunctionMode):
    """How many functions that return tensors read each tensor, by its id; and what linear layers with a bias read."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.linears: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple)) and not isinstance(result, torch.Size):
            given = (*args, *(kwargs or {}).values())
            several = (x for many in given if isinstance(many, (list, tuple)) for x in many)  # that are joined, say
            self.count.update({id(x) for x in (*given, *several) if isinstance(x, Tensor)})
        if func is F.linear and len(args) == 3 and all(isinstance(x, nn.Parameter) for x in args[1:]):
            self.linears.append(args)
        return result


def merge_branches(tower: ImageTower, example: Tensor) -> bool:
    """Merge, in place, the parallel branches that a tower only trains with, as FastViT's; whether it had any."""
    assert isinstance(tower.visual, nn.Module)
    if not any(hasattr(module, name) for module in tower.visual.modules() for name in _MERGES_BRANCHES):
        return False
    with torch.no_grad():
        before_BD = tower(example)
        reparameterize_model(tower.visual, inplace=True)
        error = (tower(example) - before_BD).abs().max().item()
    assert error < _MAX_MOVE, f"merging the branches moved a unit feature by {error}"
    tower.requires_grad_(True)  # what was merged is detached
    return True


def quantize(
    student: ClipModel,
    batches: Iterator[Batch],
    calibration: tuple[Tensor, Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    towers: Collection[str] = TOWERS,
    attention: bool = False,
    loss_of: LossOf | None = None,
    signed_activations: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    before_saving: Callable[[nn.Module, nn.Module], None] | None = None,
) -> None:
    """Calibrate on `calibration` (pixel_values, input_ids), fine-tune for `steps`, and write into `folder`:

        open_clip_model.safetensors   the float weights that int8 rounds, in plain open_clip's own layout
        nncf.safetensors, nncf.json   scales and places of the quantizers

    Where branches were merged, open_clip's layout has no place for what fine-tuning made of them: the first file then
    has the image tower as it was, and the second has it whole.

    `calibration` has to hold what the model will meet, the most contrasting inputs included: it sets the ranges.
    `towers` says which become int8; another stays as it is, and is not trained.  With `attention`, the products of
    queries and keys, and of softmax and values, read 8 bits too, as does the last projection; not where attention.py
    leaves attention fused.
    `loss_of(image_features_BD, text_features_BD, batch)` is minimised with AdamW at a rate that falls from `lr` to 0
    along half a cosine.  By default it is mean(1 - cos) to the batch's teacher features, or where the batch has none,
    to the float student's own.
    `before_saving(image_tower, text_tower)` may switch quantizers off (see sensitivity.py).

    Raises:
        MissingDependency: NNCF is not there, or asks for a compiler that is not.
    """
    nncf = _import_nncf()
    device = next(student.net.parameters()).device
    made = _float_towers(student.net, towers, calibration[1][:2])
    pixel_values_BCHW, input_ids_BT = (values.to(device) for values in calibration)
    with without_attention_fast_path(), _explaining_extensions():
        image_tower: nn.Module = made.image.requires_grad_("image" in towers)
        text_tower: nn.Module = made.text.requires_grad_("text" in towers)
        if "image" in towers:
            image_tower = _calibrate(
                nncf, image_tower, pixel_values_BCHW, is_convolutional=made.is_convolutional, attention=attention
            )
        if "text" in towers:
            text_tower = _calibrate(nncf, text_tower, input_ids_BT, is_convolutional=False, attention=attention)
        if signed_activations:
            for _, quantizer in (*quantizers_of(image_tower), *quantizers_of(text_tower)):
                quantizer.signed = True  # the scale stays: it is the largest positive value either way
        trained = [*image_tower.parameters(), *text_tower.parameters()]
        optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=lr, weight_decay=0.0)
        own_features = _frozen_features(student.net)
        for step in range(steps):
            pixel_values, input_ids, image_target_BD, text_target_BD = next(batches)
            batch = (pixel_values.to(device), input_ids.to(device), image_target_BD, text_target_BD)
            features = image_tower(batch[0]), text_tower(batch[1])
            loss = loss_of(*features, batch) if loss_of else _cosine_loss(*features, batch, own_features)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if on_step:
                on_step(step, loss.item())
        if before_saving:
            before_saving(image_tower, text_tower)
    _save(image_tower, text_tower, made, student, folder)


def int8_image_tower(net: nn.Module, pixel_values_BCHW: Tensor) -> nn.Module:
    """The image tower of a net in int8, calibrated and not fine-tuned, frozen for export.

    Raises:
        MissingDependency: NNCF is not there, or asks for a compiler that is not.
    """
    nncf, made = _import_nncf(), _float_towers(net, ["image"], None)
    with without_attention_fast_path(), _explaining_extensions():
        tower = _calibrate(nncf, made.image, pixel_values_BCHW, is_convolutional=made.is_convolutional)
        return freeze(tower, example_pixels(net))


def load_quantized(folder: Path, source: ClipModel) -> tuple[nn.Module, nn.Module]:
    """The image and text tower that `quantize` left in `folder`, with fake quantization, exactly as they were.

    `source` gives the architecture only; `load_model(folder)` will do.

    Raises:
        ArtifactError: the folder was not written by `quantize`, or for another architecture.
    """
    nncf = _import_nncf()
    for name in (WEIGHTS, QUANTIZERS, CONFIG):
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder}: no {name}; expected an int8 checkpoint. Make one with: clipkd quantize {folder.parent}"
            )
    net = copy.deepcopy(source.net)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        for name in (WEIGHTS, QUANTIZERS):
            if file_fingerprint(folder / name) != config["sha256"][name]:
                raise ArtifactError(
                    f"{folder / name}: not what clipkd quantize wrote: its sha256 differs from {CONFIG}'s. "
                    f"Delete {folder} and quantize again: clipkd quantize {folder.parent}"
                )
        net.load_state_dict(load_file(folder / WEIGHTS))
        made = _float_towers(net, [name for name in TOWERS if name in config], source.tokenize(["a", "b"]))
        if set(config.get("moved", ())) != made.moved:
            raise ArtifactError(
                f"{folder}: its layer norms keep their gains, as in checkpoints of an older clipkd. Quantize again: "
                f"clipkd quantize {folder.parent}"
            )
        saved = load_file(folder / QUANTIZERS)
        towers: list[nn.Module] = []
        for name, tower in (("image", made.image), ("text", made.text)):
            if name not in config:  # left float
                towers.append(tower.eval())
                continue
            quantized = nncf.torch.load_from_config(tower.eval(), _from_json(config[name]))
            state = {key: value for key, value in quantized.state_dict().items() if not _is_quantizer_key(key)}
            state |= {key.removeprefix(f"{name}."): v for key, v in saved.items() if key.startswith(f"{name}.")}
            quantized.load_state_dict(state)
            towers.append(quantized.eval())
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        SafetensorError,
        nncf.ValidationError,
        nncf.InternalError,
    ) as error:  # state of another architecture, JSON of another version, or a module that is not NNCF's
        raise ArtifactError(f"{folder}: does not fit the model in {source.name}: {error}") from error
    return towers[0], towers[1]


def sign_activations(*towers: nn.Module) -> None:
    """Make every quantizer signed, in place, as TensorRT needs: the scales stay, unsigned ones lose a bit."""
    for tower in towers:
        for _, quantizer in quantizers_of(tower):
            quantizer.signed = True


def freeze(tower: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a quantized tower that computes with the rounded values and exports as QuantizeLinear/DequantizeLinear.

    Weights become stored int8.  `example` runs once, to tell the quantizers of weights from those of activations.
    Quantizers that are switched off vanish; a tower without any is only copied.
    """
    tower = copy.deepcopy(tower).eval()
    recorders = {name: _Recorder(quantizer) for name, quantizer in quantizers_of(tower, every_place=True)}
    if not recorders:
        return tower
    hooks = _hooks_of(tower)
    for name, recorder in recorders.items():
        hooks.set_submodule(name, recorder)
    with torch.no_grad(), without_attention_fast_path(), _explaining_extensions():
        tower(example)
    table_of = {m.weight: name for name, m in tower.named_modules() if isinstance(m, nn.Embedding)}
    for name, recorder in recorders.items():
        if not recorder.quantizer.is_enabled_quantization():  # type: ignore[operator]
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
    """x to scale * clamp(round(x / scale), low, high), in the type of the scale: float32, or float16."""

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
        x = x.to(self.scale.dtype)  # pixel_values are float32 whatever the tower computes in
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
        # not torch.fake_quantize_per_tensor_affine: it multiplies by 1/scale, and so rounds other ties than ONNX does
        return (x.float() / self.scale.float()).round().clamp(self.low, self.high).mul(self.scale).to(x.dtype)


class _StoredWeight(nn.Module):
    """The int8 weight, dequantized; the float parameter it stands for is ignored and drops out of the graph."""

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
    """An embedding that looks up int8 rows first, so that a call dequantizes a sentence and not the vocabulary."""

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
    """A quantizer that remembers whether it is applied to a parameter."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.weight: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, nn.Parameter):
            self.weight = x
        return self.quantizer(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def _import_nncf() -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry; NNCF reads this once, at its import
    # ... but makes its reporter first, which writes an identity into the home folder
    hide_reporter = "openvino_telemetry" not in sys.modules
    if hide_reporter:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing it is then an ImportError
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for CUDA; nothing is compiled
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

    NNCF would compile a C++ or CUDA extension on the first forward, and its own fallback calls torch.compile: both need
    a compiler, and a minute.  The definition in plain torch is the same function.
    """
    from nncf.torch.quantization import extensions
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    plain = ReferenceQuantize(ReferenceBackendType.TORCH)
    functions = types.SimpleNamespace(Quantize_forward=plain.forward, Quantize_backward=plain.backward)
    for namespace in (extensions.QuantizedFunctionsCPU, extensions.QuantizedFunctionsCUDA):
        if isinstance(namespace, extensions.ExtensionNamespace):
            namespace._loaded_namespace = functions


@contextmanager
def _explaining_extensions() -> Iterator[None]:
    """One sentence, should NNCF compile after all and fail: a time-out, no compiler, no nvcc.

    Raises:
        MissingDependency: in place of what NNCF and torch raise then.
    """
    from nncf import InstallationError
    from nncf.torch.extensions import EXTENSION_LOAD_TIMEOUT_ENV_VAR, ExtensionLoaderTimeoutException

    try:
        yield
    except ExtensionLoaderTimeoutException as error:
        raise MissingDependency(
            "int8: NNCF did not finish compiling its extension in time, for a busy machine or a lock that a killed "
            f"process left. Allow it more, in seconds: {EXTENSION_LOAD_TIMEOUT_ENV_VAR}=600; or delete nncf's folder "
            "under TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions)"
        ) from error
    except InstallationError as error:
        raise MissingDependency(
            "int8 on a GPU: NNCF could not compile its CUDA extension, which takes nvcc, and torch does not bring one. "
            "Put nvcc of the CUDA toolkit that torch was built for on PATH, or hide the GPU: CUDA_VISIBLE_DEVICES="
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        raise MissingDependency(
            "int8: torch.compile, which NNCF fell back to, found no working C++ compiler. Install one (Debian: apt-get "
            "install g++), or name it in CXX"
        ) from error


class _FloatTowers(NamedTuple):
    """Copies of a student's towers, ready to be quantized."""

    image: ImageTower
    text: TextTower
    folded: dict[str, str]
    """Batch norms and the convolutions that took them in."""

    moved: set[str]
    """Layer norms, by their names in the student, whose gains and biases linear layers took in."""

    is_merged: bool
    """Whether the image tower had parallel branches, now merged."""

    @property
    def is_convolutional(self) -> bool:
        return bool(self.folded) or self.is_merged


def _float_towers(net: nn.Module, towers: Collection[str], input_ids_BT: Tensor | None) -> _FloatTowers:
    """Gains move only in `towers`: another is to stay as it is.  `input_ids_BT` are those of any texts, for "text"."""
    net = copy.deepcopy(net).eval().requires_grad_(True)
    plain_attention(net)
    image_tower, text_tower, example = ImageTower(net), TextTower(net), example_pixels(net)
    is_merged = merge_branches(image_tower, example)
    folded = fold_batch_norms(image_tower, example)
    moved: set[str] = set()
    if "image" in towers:
        moved.update(move_gains(image_tower, example))
    if "text" in towers:
        assert input_ids_BT is not None
        moved_in_text = move_gains(text_tower, input_ids_BT.to(example.device))
        moved.update(name.removeprefix("clip.") for name in moved_in_text)
    return _FloatTowers(image_tower, text_tower, folded, moved, is_merged)


def example_pixels(net: nn.Module, batch: int = 2) -> Tensor:
    """Random pixel_values of the model's input shape."""
    size = net.visual.image_size  # type: ignore[union-attr]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    parameter = next(net.parameters())
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(parameter)


def _calibrate(
    nncf: Any, tower: nn.Module, inputs: Tensor, *, is_convolutional: bool, attention: bool = False
) -> nn.Module:
    """The tower with fake quantization, ranges set from `inputs`, ready for fine-tuning."""
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    floating = _FLOAT_EVERYWHERE if is_convolutional else _FLOAT_EVERYWHERE + _FLOAT_IN_TRANSFORMERS
    floating = floating if attention else floating + _PRODUCTS
    off = nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    batches = list(torch.split(inputs, _CALIBRATION_BATCH))  # extremes of a batch are those of its rows: exact
    with redirect_stdout(io.StringIO()):  # NNCF draws its progress there
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
                # else what depthwise convolutions read gets a scale per channel, which no runtime computes with
                activations_quantization_params=QuantizationParameters(per_channel=False),
            ),
        )
    return quantized.eval()  # dropout off: the rounding is all the noise that the student should learn


def _hooks_of(tower: nn.Module) -> nn.Module:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    return get_hook_storage(tower)  # type: ignore[no-any-return]


def quantizers_of(tower: nn.Module, *, every_place: bool = False) -> list[tuple[str, Any]]:
    """(name within the hook storage, NNCF quantizer) of a quantized tower; none of a float one.

    What torch.cat joins shares a quantizer: it is named once, or, of `every_place`, wherever it is applied.
    """
    from nncf.torch.function_hook.wrapper import is_wrapped
    from nncf.torch.quantization.layers import BaseQuantizer

    if not is_wrapped(tower):
        return []
    hooks: Any = _hooks_of(tower)
    named = hooks.named_hooks(remove_duplicate=not every_place)
    return [(name, module) for name, module in named if isinstance(module, BaseQuantizer)]


def _frozen_features(net: nn.Module) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    image_tower, text_tower = ImageTower(net), TextTower(net)

    @torch.no_grad()
    def features(batch: Batch) -> tuple[Tensor, Tensor]:
        return image_tower(batch[0]), text_tower(batch[1])

    return features


def _cosine_loss(
    image_features_BD: Tensor,
    text_features_BD: Tensor,
    batch: Batch,
    own_features: Callable[[Batch], tuple[Tensor, Tensor]],
) -> Tensor:
    """mean_i (1 - cos) of images plus that of texts, to the batch's targets; in [0, 4]."""
    image_target_BD, text_target_BD = batch[2], batch[3]
    if image_target_BD is None or text_target_BD is None:
        image_target_BD, text_target_BD = own_features(batch)
    image_cosine_B = (image_features_BD * image_target_BD.to(image_features_BD)).sum(-1)
    text_cosine_B = (text_features_BD * text_target_BD.to(text_features_BD)).sum(-1)
    return (1 - image_cosine_B).mean() + (1 - text_cosine_B).mean()


def _save(image_tower: nn.Module, text_tower: nn.Module, made: _FloatTowers, student: ClipModel, folder: Path) -> None:
    nncf = _import_nncf()
    save_file(_float_state(image_tower, text_tower, made, student.net), folder / WEIGHTS)
    towers = {"image": image_tower, "text": text_tower}
    quantized = {name: tower for name, tower in towers.items() if quantizers_of(tower)}
    save_file(
        {
            f"{name}.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)  # some are shared
            for name, tower in quantized.items()
            for key, value in tower.state_dict().items()
            if _is_quantizer_key(key) or (made.is_merged and name == "image")
        },
        folder / QUANTIZERS,
    )
    config = {name: nncf.torch.get_config(tower) for name, tower in quantized.items()}
    config["moved"] = sorted(made.moved)
    config["sha256"] = {name: file_fingerprint(folder / name) for name in (WEIGHTS, QUANTIZERS)}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _float_state(
    image_tower: nn.Module, text_tower: nn.Module, made: _FloatTowers, net: nn.Module
) -> dict[str, Tensor]:
    """The fine-tuned float weights under the original model's names; a merged image tower as it was before.

    A folded batch norm is written as one that only adds the convolution's bias: mean 0, weight 1, variance 1 - eps; a
    layer norm whose gain moved as one with a gain of 1 and a bias of 0.
    """
    trained = {key.removeprefix("clip."): value for key, value in text_tower.state_dict().items()}
    folded: dict[str, str] = {}
    moved = made.moved
    if made.is_merged:
        moved = {name for name in moved if not name.startswith("visual.")}
    else:
        trained, folded = trained | image_tower.state_dict(), made.folded
    state = {}
    for key, value in net.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if module in folded and leaf != "num_batches_tracked":
            norm: Any = net.get_submodule(module)
            bias = trained[f"{folded[module]}.bias"]
            state[key] = {
                "weight": torch.ones_like(bias),
                "bias": bias,
                "running_mean": torch.zeros_like(bias),
                "running_var": torch.full_like(bias, 1 - norm.eps),
            }[leaf]
        elif module in moved:
            state[key] = torch.ones_like(value) if leaf == "weight" else torch.zeros_like(value)
        elif leaf == "bias" and module in folded.values():
            state[key] = torch.zeros_like(value)  # its value moved into the batch norm
        else:
            state[key] = trained.get(key, value)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _is_quantizer_key(key: str) -> bool:
    return key.startswith("__nncf_hooks.")


def _from_json(config: dict[str, Any]) -> dict[str, Any]:
    """NNCF's config with the types that JSON flattened: the scheme is an enum, a shape is a tuple."""
    from nncf.common.quantization.structs import QuantizationScheme

    for command in config["compression_state"]:
        module = command["module_config"]
        module["mode"] = QuantizationScheme(module["mode"])
        module["scale_shape"] = tuple(module["scale_shape"])
    return config
