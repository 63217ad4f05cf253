"""Quantize a student to int8: calibrate with NNCF, fine-tune with fake quantization, and save.

Each tower is quantized separately, because NNCF sees only what its root `forward` calls.  Weights are int8 per output
channel, activations 8 bits per tensor, and all zero points are zero.  An activation that was never negative during
calibration (after a ReLU) is unsigned: ONNX Runtime then drops the ReLU and keeps the convolution in integers.
TensorRT supports only signed activations; `signed_activations` is for it, and costs one bit.

The range of an activation is the largest value during calibration.  NNCF's default is the mean of each image's largest
value.  If most calibration images have little contrast, that is less than half of what a full-contrast image needs.

In a tower with batch norms, convolutional or hybrid, the parallel branches are first merged (FastViT) and the batch
norms folded into the convolutions.  The tower is then quantized throughout, residual additions included.  In a
transformer only linear layers and embeddings are quantized: the outliers of its residual stream do not survive 8 bits
(onnxsim#1742).  The products within attention also stay float, unless requested.  In both, gains of layer norms first
move into the linear layers that read them.

NNCF is imported inside functions, because exporting a float model must not need it and its telemetry has to be disabled
before the import.  Its compiled extension is never built: plain torch computes the same functions.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolchain.errors import ClipkdError
from toolchain.models.clip_model import ClipModel
from toolchain.models.finite import describe_non_finite
from toolchain.models.towers import ImageTower, TextTower, example_pixels, without_attention_fast_path
from toolchain.quantization.checkpoint import TOWERS, FloatTowers, float_towers, save_quantized
from toolchain.quantization.freeze import freeze, sign_activations
from toolchain.quantization.nncf_backend import CALIBRATION_BATCH, calibrate, explain_extension_errors, import_nncf


class FineTuningBatch(NamedTuple):
    """Inputs of both towers, and the target unit features."""

    pixel_values_BCHW: Tensor
    input_ids_BT: Tensor
    image_target_BD: Tensor | None = None
    """The teacher's features; None means the float student's own."""

    text_target_BD: Tensor | None = None


LossFn = Callable[[Tensor, Tensor, FineTuningBatch], Tensor]
"""Loss as a function of image features [B, D], text features [B, D] and their batch."""


@dataclass(frozen=True)
class Calibration:
    """The towers that become int8, and the inputs that set the ranges of their activations."""

    pixel_values_BCHW: Tensor
    """Images that cover what the model will meet, including those of the highest contrast."""

    input_ids_BT: Tensor
    towers: Collection[str] = TOWERS
    """A tower not listed stays unchanged and is not trained."""

    attention: bool = False
    """Also quantize the products of queries and keys, and of softmax and values, and the last projection, except where
    plain_attention.py leaves attention fused."""

    signed_activations: bool = False


@dataclass(frozen=True)
class FineTuning:
    """Settings of fine-tuning: AdamW, rounding in the forward pass, `lr` falling to 0 along half a cosine."""

    batches: Iterator[FineTuningBatch]
    steps: int
    lr: float
    loss_fn: LossFn | None = None
    """None: mean(1 - cos) to the batch's targets."""

    on_step: Callable[[int, float], None] = lambda step, loss: None
    """Receives each step and its loss."""


def quantize(
    student: ClipModel,
    folder: Path,
    calibration: Calibration,
    fine_tuning: FineTuning | None = None,
    *,
    before_saving: Callable[[nn.Module, nn.Module], None] | None = None,
) -> None:
    """Calibrate, fine-tune, and write into `folder`:

        open_clip_model.safetensors   the float weights that int8 rounds, in plain open_clip's own layout
        nncf.safetensors, nncf.json   scales and locations of the quantizers

    If branches were merged, open_clip's layout cannot hold the fine-tuned weights.  The first file then has the
    original image tower, and the second has the whole fine-tuned one.

    `before_saving(image_tower, text_tower)` may switch quantizers off (see sensitivity.py).

    Raises:
        ClipkdError: the loss, a weight or a scale became NaN or infinite.
        MissingDependency: NNCF, or a compiler that it needs, is not installed.
    """
    import_nncf()  # explain_extension_errors needs it
    prepared = float_towers(student.net, calibration.towers, calibration.input_ids_BT[:2])
    with without_attention_fast_path(), explain_extension_errors():
        image_tower, text_tower = _calibrate_towers(prepared, calibration)
        if fine_tuning is not None:
            _fine_tune(image_tower, text_tower, student.net, fine_tuning)
        if before_saving:
            before_saving(image_tower, text_tower)
    save_quantized(image_tower, text_tower, prepared, student, folder)


def _calibrate_towers(prepared: FloatTowers, calibration: Calibration) -> tuple[nn.Module, nn.Module]:
    """Return the image and the text tower with fake quantization, ready for fine-tuning."""
    nncf, attention = import_nncf(), calibration.attention
    image_tower: nn.Module = prepared.image.requires_grad_("image" in calibration.towers)
    text_tower: nn.Module = prepared.text.requires_grad_("text" in calibration.towers)
    device = next(image_tower.parameters()).device
    if "image" in calibration.towers:
        image_tower = _calibrate_image(prepared, calibration.pixel_values_BCHW.to(device), attention=attention)
    if "text" in calibration.towers:
        input_ids_BT = calibration.input_ids_BT.to(device)
        text_tower = calibrate(nncf, text_tower, input_ids_BT, is_convolutional=False, attention=attention)
    if calibration.signed_activations:
        sign_activations(image_tower, text_tower)
    return image_tower, text_tower


def _calibrate_image(prepared: FloatTowers, pixel_values_BCHW: Tensor, *, attention: bool = False) -> nn.Module:
    """Return the image tower with fake quantization, of convolutions' outputs too where ONNX Runtime needs it."""
    nncf, is_convolutional = import_nncf(), prepared.is_convolutional
    tower = calibrate(nncf, prepared.image, pixel_values_BCHW, is_convolutional=is_convolutional, attention=attention)
    if is_convolutional:
        from toolchain.quantization.output_rounding import round_outputs

        round_outputs(tower, torch.split(pixel_values_BCHW, CALIBRATION_BATCH))
    return tower


def _fine_tune(image_tower: nn.Module, text_tower: nn.Module, net: nn.Module, tuning: FineTuning) -> None:
    """Train the towers in place; `net` is the float student."""
    device = next(net.parameters()).device
    trained = [*image_tower.parameters(), *text_tower.parameters()]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=tuning.lr, weight_decay=0.0)
    own_towers = ImageTower(net), TextTower(net)
    for step in range(tuning.steps):
        batch = next(tuning.batches)
        pixel_values_BCHW, input_ids_BT = batch.pixel_values_BCHW.to(device), batch.input_ids_BT.to(device)
        batch = batch._replace(pixel_values_BCHW=pixel_values_BCHW, input_ids_BT=input_ids_BT)
        features = image_tower(pixel_values_BCHW), text_tower(input_ids_BT)
        loss = tuning.loss_fn(*features, batch) if tuning.loss_fn else _cosine_loss(*features, batch, own_towers)
        if not math.isfinite(loss.item()):
            raise _explain_divergence(step, features)
        for group in optimizer.param_groups:
            group["lr"] = tuning.lr * 0.5 * (1 + math.cos(math.pi * step / tuning.steps))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tuning.on_step(step, loss.item())


def _explain_divergence(step: int, features: tuple[Tensor, Tensor]) -> ClipkdError:
    """Return the error for a loss of fine-tuning that is not finite; the learning rate is blamed from step 1 on."""
    what = describe_non_finite(dict(zip(("image features", "text features"), features, strict=True)))
    advice = "Lower quantize.lr" if step else "No step was taken yet: check the float student and its teacher"
    return ClipkdError(
        f"fine-tuning in int8: the loss is not finite at step {step}{f' ({what})' if what else ''}. {advice}"
    )


def int8_image_tower(net: nn.Module, pixel_values_BCHW: Tensor, *, round_outputs: bool = True) -> nn.Module:
    """Return a net's image tower in int8, calibrated but not fine-tuned, frozen for export as by `freeze`.

    Raises:
        MissingDependency: NNCF, or a compiler that it needs, is not installed.
    """
    import_nncf()  # explain_extension_errors needs it
    prepared = float_towers(net, ["image"], None)
    with without_attention_fast_path(), explain_extension_errors():
        tower = _calibrate_image(prepared, pixel_values_BCHW)
        return freeze(tower, example_pixels(net), round_outputs=round_outputs)


def _cosine_loss(
    image_features_BD: Tensor,
    text_features_BD: Tensor,
    batch: FineTuningBatch,
    own_towers: tuple[ImageTower, TextTower],
) -> Tensor:
    """Return mean_i (1 - cos) of images plus that of texts, to the batch's targets; in [0, 4]."""
    image_target_BD, text_target_BD = batch.image_target_BD, batch.text_target_BD
    if image_target_BD is None or text_target_BD is None:
        with torch.no_grad():
            image_target_BD, text_target_BD = own_towers[0](batch.pixel_values_BCHW), own_towers[1](batch.input_ids_BT)
    image_cosine_B = (image_features_BD * image_target_BD.to(image_features_BD)).sum(-1)
    text_cosine_B = (text_features_BD * text_target_BD.to(text_features_BD)).sum(-1)
    return (1 - image_cosine_B).mean() + (1 - text_cosine_B).mean()
