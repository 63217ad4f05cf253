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

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import ImageTower, TextTower, example_pixels, without_attention_fast_path
from toolchain.quantization.checkpoint import TOWERS, float_towers, save_quantized
from toolchain.quantization.freeze import freeze
from toolchain.quantization.nncf_backend import calibrate, explain_extension_errors, import_nncf, quantizers_of

Batch = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""pixel_values [B,3,H,W], input_ids [B,T], the teacher's unit image and text features [B,D] or None."""

LossOf = Callable[[Tensor, Tensor, Batch], Tensor]


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
    nncf = import_nncf()
    device = next(student.net.parameters()).device
    made = float_towers(student.net, towers, calibration[1][:2])
    pixel_values_BCHW, input_ids_BT = (values.to(device) for values in calibration)
    with without_attention_fast_path(), explain_extension_errors():
        image_tower: nn.Module = made.image.requires_grad_("image" in towers)
        text_tower: nn.Module = made.text.requires_grad_("text" in towers)
        if "image" in towers:
            image_tower = calibrate(
                nncf, image_tower, pixel_values_BCHW, is_convolutional=made.is_convolutional, attention=attention
            )
        if "text" in towers:
            text_tower = calibrate(nncf, text_tower, input_ids_BT, is_convolutional=False, attention=attention)
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
    save_quantized(image_tower, text_tower, made, student, folder)


def int8_image_tower(net: nn.Module, pixel_values_BCHW: Tensor) -> nn.Module:
    """The image tower of a net in int8, calibrated and not fine-tuned, frozen for export.

    Raises:
        MissingDependency: NNCF is not there, or asks for a compiler that is not.
    """
    nncf, made = import_nncf(), float_towers(net, ["image"], None)
    with without_attention_fast_path(), explain_extension_errors():
        tower = calibrate(nncf, made.image, pixel_values_BCHW, is_convolutional=made.is_convolutional)
        return freeze(tower, example_pixels(net))


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
