"""Draw augmented views of glyphs: rotation, shear, scale, shift, colours and noise."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.glyphs import IMAGE_SIZE, TEMPLATES
from toolchain.data.random_numbers import uniforms

_ROTATION = 0.21  # radians, about 12 degrees
_SHEAR = 0.25
_LOG_SCALE = 0.22
_LOG_ASPECT = 0.16
_SHIFT = 0.14  # share of half the image
_NOISE = 0.08  # largest standard deviation, as a share of the full range
_MIN_CONTRAST = 0.35


def draw_views(masks_BSS: NDArray[np.uint8], seed: int, sample_B: NDArray[np.int64], view: int) -> Tensor:
    """Return uint8 [B, 3, H, H] distorted, coloured and noisy images of clean glyph masks."""
    random_BR = torch.from_numpy(uniforms(seed, sample_B, view, 16)).float()
    signed_BR = 2 * random_BR - 1
    angle = _ROTATION * signed_BR[:, 0]
    scale = torch.exp(_LOG_SCALE * signed_BR[:, 1])
    aspect = torch.exp(_LOG_ASPECT * signed_BR[:, 2])
    shear = _SHEAR * signed_BR[:, 3]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta_B23 = torch.stack(
        [
            torch.stack([cos * aspect, cos * aspect * shear - sin, _SHIFT * signed_BR[:, 4]], -1),
            torch.stack([sin / aspect, sin / aspect * shear + cos, _SHIFT * signed_BR[:, 5]], -1),
        ],
        1,
    )
    ink_B1SS = torch.from_numpy(masks_BSS).unsqueeze(1).float() / 255
    ink_B1SS = F.avg_pool2d(ink_B1SS, 3, stride=1, padding=1)  # softens the edge, so the stroke weight below can change
    grid_BHH2 = F.affine_grid(theta_B23, [len(masks_BSS), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    ink_B1HH = F.grid_sample(ink_B1SS, grid_BHH2, padding_mode="zeros", align_corners=False)
    weight_B111 = torch.exp2(signed_BR[:, 6]).view(
        -1, 1, 1, 1
    )  # exponent of the ink coverage: below 1 is bolder, above 1 lighter
    ink_B1HH = ink_B1HH.clamp(0, 1) ** weight_B111
    paper_B3, pen_B3 = random_BR[:, 7:10], random_BR[:, 10:13]
    luma = torch.tensor([0.299, 0.587, 0.114])
    contrast_B1 = ((pen_B3 - paper_B3) @ luma).unsqueeze(1)
    push_B1 = (_MIN_CONTRAST - contrast_B1.abs()).clamp(min=0) * torch.where(contrast_B1 < 0, -1.0, 1.0)
    pen_B311, paper_B311 = (pen_B3 + push_B1)[..., None, None], (paper_B3 - push_B1)[..., None, None]
    image_B3HH = paper_B311 + ink_B1HH * (pen_B311 - paper_B311)
    level_B111 = (_NOISE * random_BR[:, 13]).view(-1, 1, 1, 1)
    image_B3HH = image_B3HH + level_B111 * _noise(random_BR[:, 14:16])
    return (image_B3HH.clamp(0, 1) * 255).round().to(torch.uint8)


def template_picks(seed: int, sample_B: NDArray[np.int64], view: int) -> NDArray[np.int64]:
    """Return [B] the index of the prompt template that each view's caption uses."""
    return (uniforms(seed, sample_B, view, 17)[:, 16] * len(TEMPLATES)).astype(np.int64)


_FIELD = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)


def _noise(random_B2: Tensor) -> Tensor:
    """Return [B, 1, H, H] standard normal noise: windows of one fixed field at positions set by two uniform numbers."""
    corner_B2 = (random_B2 * (len(_FIELD) - IMAGE_SIZE)).long().numpy()
    span = np.arange(IMAGE_SIZE)
    rows, columns = corner_B2[:, :1] + span, corner_B2[:, 1:] + span
    return torch.from_numpy(_FIELD[rows[:, :, None], columns[:, None, :]]).unsqueeze(1)
