"""The two towers of a CLIP model as modules, and facts about their architecture."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from open_clip.transformer import Transformer, VisionTransformer
from timm.models.eva import Eva
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_shapes

_DECODER = "text_decoder"  # CoCa's module that writes captions

# torch counts the compilations of all modules together, the towers of student and teacher alike, and after 8 (its
# default) runs what is new without compiling it, at a warning
_RECOMPILE_LIMIT = 64


def is_vision_transformer(visual: nn.Module) -> bool:
    """Return True if an image tower counts as a transformer for AdamW's betas and epsilon.

    CLIP (arXiv:2103.00020, table 19) trains ViTs with beta2 0.98 and epsilon 1e-6, ResNets with 0.999 and 1e-8.
    CLIP-KD's released code tests for "vit" in the model's name.  This function tests the tower's modules: it accepts
    open_clip's and timm's ViT, EVA, and also the mostly convolutional MobileViT, because the paper trained MobileViT-S
    this way.  For every model of the paper both tests agree.
    """
    trunk = getattr(visual, "trunk", visual)
    if isinstance(trunk, (VisionTransformer, TimmVisionTransformer, VisionTransformerRelPos, Eva)):
        return True
    return any(isinstance(module, (MobileVitBlock, MobileVitV2Block)) for module in trunk.modules())


def is_convolutional(visual: nn.Module) -> bool:
    """Return True if an image tower has convolutions besides its patch embedding: channels last is then faster."""
    return sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1


def compile_towers(net: nn.Module) -> None:
    """Compile towers in place, with as few compilations as possible.

    The blocks of a transformer are equal: they share a compilation, which serves every number of rows and tokens.
    torch makes one for each way of running them: with gradients, without (the first pass of `distill.accumulate`), and
    in evaluation; and one more for a single row.  Another image tower is compiled as a whole, once for each batch
    size and way: fixed sizes let inductor choose the layout of convolutions.
    """
    limit: int = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _RECOMPILE_LIMIT)
    symbolic_shapes.use_duck_shape = False  # else a first batch of as many rows as tokens would tie both numbers
    stacks = [module for module in net.modules() if isinstance(module, Transformer)]
    for stack in stacks:
        for block in stack.resblocks:
            block.compile(dynamic=True)
    if not any(isinstance(module, Transformer) for module in net.visual.modules()):  # type: ignore[union-attr]
        net.visual.compile(dynamic=False)  # type: ignore[union-attr]


def is_compiled(stack: nn.Module) -> bool:
    """Return True if `compile_towers` compiled the blocks of a transformer."""
    return any(block._compiled_call_impl is not None for block in stack.resblocks)  # type: ignore[union-attr]


def take_features(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the features [B, D] of a tower's output.

    Towers built with `output_tokens`, such as CoCa's, return a tuple of features and tokens.
    """
    return output[0] if isinstance(output, tuple) else output


def unit_image_features(net: nn.Module, pixel_values_BCHW: Tensor) -> Tensor:
    """Return features [B, D] in float32, rows of unit norm."""
    return F.normalize(take_features(net.encode_image(pixel_values_BCHW)).float(), dim=-1)  # type: ignore[operator]


def unit_text_features(net: nn.Module, input_ids_BT: Tensor) -> Tensor:
    """Return features [B, D] in float32, rows of unit norm."""
    return F.normalize(take_features(net.encode_text(input_ids_BT)).float(), dim=-1)  # type: ignore[operator]


def num_parameters(net: nn.Module) -> tuple[int, int]:
    """Return the number of parameters of the image tower and of the text tower; logit scale and bias count as text.

    CoCa's caption decoder does not count: no feature depends on it, and an export does not contain it.
    """
    visual: nn.Module = net.visual  # type: ignore[assignment]  # nn.Module types attributes loosely
    image = sum(parameter.numel() for parameter in visual.parameters())
    decoder = sum(parameter.numel() for parameter in getattr(net, _DECODER, nn.Identity()).parameters())
    return image, sum(parameter.numel() for parameter in net.parameters()) - image - decoder


class ImageTower(nn.Module):
    """The image tower: maps pixel_values float32 [B, 3, H, W] to image_features float32 [B, D], unit norm."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.visual = net.visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return F.normalize(take_features(self.visual(pixel_values.to(dtype))).float(), dim=-1)  # type: ignore[operator]


class TextTower(nn.Module):
    """The text tower: maps input_ids int64 [B, T] to text_features float32 [B, D], unit norm."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.clip = copy.copy(net)  # shares every weight, but must not hold the image tower or CoCa's decoder
        self.clip._modules = {k: module for k, module in net._modules.items() if k not in ("visual", _DECODER)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return unit_text_features(self.clip, input_ids)


@contextmanager
def without_attention_fast_path() -> Iterator[None]:
    """Disable the fused path of nn.MultiheadAttention, which can be neither quantized nor exported."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def example_pixels(net: nn.Module, batch: int = 2) -> Tensor:
    """Return random pixel_values of the model's input shape."""
    size = net.visual.image_size  # type: ignore[union-attr]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    parameter = next(net.parameters())
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(parameter)
