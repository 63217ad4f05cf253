"""Run the masked forward pass of MFD: a vision transformer sees only some of its patches.

The patches are dropped between the positional embedding and the first block, where both kinds of vision transformer in
open_clip have a slot for patch dropout; class and register tokens stay.  The choice is hashed from the sample's
identity, like its views (`random_numbers.py`), so it does not depend on the rest of the batch, the rank, the worker or
a resume.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from toolchain.data.random_numbers import uniforms
from toolchain.errors import UsageError
from toolchain.models.towers import take_features

_STREAM = int.from_bytes(b"mfd-mask", "big")  # differs from the stream of the views with the same seed


def kept_patches(seed: int, sample_B: NDArray[np.int64], draw: int, *, num_patches: int, mask_ratio: float) -> Tensor:
    """Return [B, K] indices of the patches that the student sees, int64, hashed from (seed, sample, draw).

    K = int(L (1 - mask_ratio)).  `draw` (the view or the step, say) makes each showing of a sample use new patches.

    Raises:
        UsageError: no patch would remain.
    """
    noise_BL = torch.from_numpy(uniforms(seed ^ _STREAM, sample_B, draw, num_patches))
    return patches_of_least_noise(noise_BL, mask_ratio)


def patches_of_least_noise(noise_BL: Tensor, mask_ratio: float) -> Tensor:
    """Return [B, K] indices of the K = int(L (1 - mask_ratio)) patches with the least noise, in its order.

    MAE (arXiv:2111.06377), section 3, and CLIP-KD's code choose patches this way.

    Raises:
        UsageError: no patch would remain.
    """
    num_patches = noise_BL.shape[1]
    num_kept = int(num_patches * (1 - mask_ratio))
    if num_kept < 1:
        raise UsageError(
            f"distill.mask_ratio {mask_ratio:g} hides all of the student's {num_patches} patches; lower it"
        )
    return noise_BL.argsort(dim=1, stable=True)[:, :num_kept]


def check_can_mask(visual: nn.Module) -> None:
    """Refuse an image tower that cannot drop patches.

    Raises:
        UsageError: `visual` is neither open_clip's VisionTransformer nor timm's.
    """
    _find_slot(visual)


def num_patches(visual: nn.Module) -> int:
    """Return the number of patches of an image tower.

    Raises:
        UsageError: see `check_can_mask`.
    """
    return _find_slot(visual).num_patches


def masked_image_features(
    visual: nn.Module,
    pixel_values_BCHW: Tensor,
    kept_BK: Tensor,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return raw features [B, D] of an image tower that sees only the patches `kept_BK` of each image.

    `encode` runs the tower; by default the tower runs itself.

    With all patches kept these are the tower's ordinary features; they replace its own patch dropout.

    Raises:
        UsageError: see `check_can_mask`.
    """
    slot = _find_slot(visual)
    keep = _KeepPatches(slot.num_prefix_tokens, kept_BK)
    with _replace(slot, keep):
        features_BD = take_features((encode or visual)(pixel_values_BCHW))
    assert keep.calls == 1, f"{type(visual).__name__} passed its patch-dropout slot {keep.calls} times"
    return features_BD


class _Slot(NamedTuple):
    """The patch-dropout slot of an image tower."""

    owner: nn.Module
    name: str
    num_prefix_tokens: int
    num_patches: int


def _find_slot(visual: nn.Module) -> _Slot:
    if isinstance(visual, VisionTransformer):
        return _Slot(visual, "patch_dropout", 1, visual.grid_size[0] * visual.grid_size[1])
    kind = type(visual).__name__
    if isinstance(visual, TimmModel):
        trunk = visual.trunk
        if isinstance(trunk, TimmVisionTransformer):
            return _Slot(trunk, "patch_drop", trunk.num_prefix_tokens, trunk.patch_embed.num_patches)
        kind = f"timm's {type(trunk).__name__} ({trunk.pretrained_cfg['architecture']})"
    raise UsageError(
        f"the student's image tower, {kind}, cannot drop patches, which masked feature distillation needs; "
        "remove distill.loss_weights.mfd, or choose a student with a vision transformer"
    )


class _KeepPatches(nn.Module):
    """A reduction of tokens [B, P + L, W] to the prefix and the kept patches [B, P + K, W]."""

    def __init__(self, num_prefix_tokens: int, kept_BK: Tensor) -> None:
        super().__init__()
        self.num_prefix_tokens, self.kept_BK, self.calls = num_prefix_tokens, kept_BK, 0

    def forward(self, tokens_BLW: Tensor) -> Tensor:
        self.calls += 1
        kept_BK = self.kept_BK.to(tokens_BLW.device)
        assert len(kept_BK) == len(tokens_BLW)  # gather would silently take the first rows
        prefix_BPW, patches_BLW = tokens_BLW.tensor_split([self.num_prefix_tokens], dim=1)
        patches_BKW = patches_BLW.gather(1, kept_BK.unsqueeze(-1).expand(-1, -1, tokens_BLW.shape[-1]))
        return torch.cat([prefix_BPW, patches_BKW], dim=1)


@contextmanager
def _replace(slot: _Slot, module: nn.Module) -> Iterator[None]:
    own = getattr(slot.owner, slot.name)
    setattr(slot.owner, slot.name, module)
    try:
        yield
    finally:
        setattr(slot.owner, slot.name, own)
