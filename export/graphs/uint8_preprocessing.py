"""Compute preprocessing with torch operations, so that it can be part of a graph: from an image to pixel_values.

It computes the same as `runner.preprocess_image` with Pillow, without relying on any runtime's own resizing.
In names of arrays, H and W are the sides of the image, h and w those of the model's input.
"""

from typing import Any

import torch
from PIL import __version__ as pillow_version
from torch import Tensor, nn

from export.device_programs.runner import as_pair, as_triple

_VERTICAL_FIRST_IF_TALL = int(pillow_version.partition(".")[0]) >= 13


class Preprocessing(nn.Module):
    """A module from uint8 RGB [H, W, 3] to pixel_values float32 [1, 3, h, w], following an open_clip preprocess_cfg.

    Pillow's resampling (Resample.c) is two products with matrices, along the width and then along the height, each
    rounded to whole grey levels.  With the support s of the filter f, 2 of the bicubic (a = -0.5), 1 of the bilinear:

        K[j, i] = f( ((j + 1/2) - (i + 1/2) old / new) / max(old / new, 1) ), each column divided by its sum

    The argument is one quotient of integers, so float32 loses nothing in it. Only the part that cropping keeps is
    computed. Pillow sums in integers of 2^-22; float32 sums round differently where a value lies half way between two
    levels, which is frequent with a bilinear kernel if the ratio of sizes is a ratio of small numbers.
    Pillow 13 and later resize the height first if it shrinks by more than twice as much as the width
    (python-pillow/Pillow#9549); the graph follows the Pillow version installed at export.
    """

    mean: Tensor
    std: Tensor
    fill: Tensor

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.height, self.width = as_pair(spec["size"])
        self.mode = spec["resize_mode"]
        is_square_crop = self.mode == "shortest" and self.height == self.width
        # open_clip's ResizeKeepRatio ignores the requested interpolation if it crops
        disregarded = self.mode == "shortest" and not is_square_crop
        self.is_bilinear = spec["interpolation"] == "bilinear" and not disregarded
        self.is_square_crop = is_square_crop
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(as_triple(spec[name]), dtype=torch.float32).reshape(3, 1, 1))
        fill = as_triple(spec.get("fill_color", 0) if self.mode == "longest" else 0)
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.float32).reshape(3, 1, 1))

    def forward(self, pixels_HWC: Tensor) -> Tensor:
        # int64 tensors instead of Python numbers: the graph computes them from the image's shape
        height, width = (torch.full((), size, dtype=torch.int64) for size in pixels_HWC.shape[:2])
        new_height, new_width = self._size_after_resize(height, width)
        kernel_Ww, inside_w = self._kernel(pixels_HWC.shape[1], width, new_width, self.width)
        kernel_Hh, inside_h = self._kernel(pixels_HWC.shape[0], height, new_height, self.height)
        levels_CHW = pixels_HWC.permute(2, 0, 1).float()
        passes = levels_CHW, kernel_Ww, kernel_Hh
        if not _VERTICAL_FIRST_IF_TALL:
            levels_Chw = _horizontal_first(*passes)
        else:
            falls = height - new_height
            is_tall = (falls > 0) & (falls > 2 * (width - new_width))
            if torch.compiler.is_exporting():  # becomes an If in the graph; outside of export, torch would compile it
                levels_Chw = torch.cond(is_tall, _vertical_first, _horizontal_first, passes)
            else:
                levels_Chw = (_vertical_first if is_tall else _horizontal_first)(*passes)
        if self.mode == "longest":
            levels_Chw = torch.where(inside_h[:, None] & inside_w, levels_Chw, self.fill)
        return ((levels_Chw / 255 - self.mean) / self.std)[None]

    def _size_after_resize(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Return height and width after resizing and before cropping or padding."""
        target_height, target_width = (torch.full_like(height, size) for size in (self.height, self.width))
        if self.mode == "squash":
            return target_height, target_width
        # one side fits exactly and the other follows; the ratios decide which, compared without a division
        follows_width = width * self.height <= height * self.width
        if self.mode == "longest":
            follows_width = ~follows_width
        follow = torch.floor_divide if self.is_square_crop else _rounded_quotient
        return (
            torch.where(follows_width, follow(height * self.width, width), target_height),
            torch.where(follows_width, target_width, follow(width * self.height, height)),
        )

    def _kernel(self, source: int, size: Tensor, new: Tensor, target: int) -> tuple[Tensor, Tensor]:
        """Return weights [source, target] that resize `size` to `new` and crop, and a mask of image pixels."""
        spare = new - target
        cropped = (spare + spare // 2 % 2) // 2  # half of it, rounded to even, as Python rounds
        padded = -spare // 2
        place_i = torch.arange(target) + torch.where(spare > 0, cropped, -padded)
        inside_i = (place_i >= 0) & (place_i < new)
        place_i = torch.minimum(place_i.clamp(min=0), new - 1)
        away_ji = (2 * torch.arange(source) + 1)[:, None] * new - (2 * place_i + 1) * size
        weight_ji = self._filter(away_ji.float() / (2 * torch.maximum(size, new)).float())
        return weight_ji / weight_ji.sum(0), inside_i

    def _filter(self, x: Tensor) -> Tensor:
        x = x.abs()
        if self.is_bilinear:
            return (1 - x).clamp(min=0)
        near = (1.5 * x - 2.5) * x * x + 1
        far = -0.5 * (((x - 5) * x + 8) * x - 4)
        return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


class UInt8Tower(nn.Module):
    """A module from uint8 RGB [H, W, 3] to image_features [1, D] and the pixel_values they were computed from."""

    def __init__(self, tower: nn.Module, spec: dict[str, Any]) -> None:
        super().__init__()
        self.preprocessing, self.tower = Preprocessing(spec), tower

    def forward(self, pixels_HWC: Tensor) -> tuple[Tensor, Tensor]:
        pixel_values_1CHW = self.preprocessing(pixels_HWC)
        return self.tower(pixel_values_1CHW), pixel_values_1CHW


def _horizontal_first(levels_CHW: Tensor, kernel_Ww: Tensor, kernel_Hh: Tensor) -> Tensor:
    return _whole(kernel_Hh.T @ _whole(levels_CHW @ kernel_Ww))


def _vertical_first(levels_CHW: Tensor, kernel_Ww: Tensor, kernel_Hh: Tensor) -> Tensor:
    return _whole(_whole(kernel_Hh.T @ levels_CHW) @ kernel_Ww)


def _whole(levels: Tensor) -> Tensor:
    return torch.floor(levels + 0.5).clamp(0, 255)


def _rounded_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient rounded to the nearest integer, halves to even, as Python rounds."""
    twice = 2 * numerator + denominator
    nearest = twice // (2 * denominator)
    is_half = twice % (2 * denominator) == 0
    return nearest - (is_half & (nearest % 2 == 1)).long()
