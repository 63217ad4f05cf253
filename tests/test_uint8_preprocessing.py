"""Preprocessing in torch operations against Pillow's, by way of the function that equals open_clip's own transform."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture
from PIL import Image

from export.device_programs.runner import preprocess_image
from export.graphs.uint8_preprocessing import Preprocessing

SPEC: dict[str, Any] = {
    "size": [32, 32],
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": (7, 100, 255),
}
SIZES = [(32, 32), (24, 40), (40, 24), (32, 90), (90, 32), (300, 200), (201, 333), (9, 7), (5, 90), (1, 1)]
# Share of values one level apart, where float32 sums round otherwise than Pillow's integers: 1e-4 and 0.013 measured.
MAX_SHARE = {"bicubic": 1e-3, "bilinear": 0.02}


def levels_apart(picture: Image.Image, spec: dict[str, Any]) -> np.ndarray:
    """[h, w, 3] of grey levels."""
    expected_CHW = preprocess_image(picture, spec)
    pixels_HWC = torch.from_numpy(np.array(picture))
    (values_CHW,) = Preprocessing(spec)(pixels_HWC).numpy()
    assert values_CHW.shape == expected_CHW.shape
    return 255 * (np.abs(values_CHW - expected_CHW).transpose(1, 2, 0) * np.array(spec["std"]))


@pytest.mark.parametrize("size", [[32, 32], [24, 40], [40, 24]], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pictures_of_every_size_are_within_a_rounded_level_of_pillows(size, interpolation, resize_mode):
    spec = SPEC | {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}
    apart = [
        levels_apart(make_picture(width, height, seed, noise=20), spec).ravel()
        for seed, (width, height) in enumerate(SIZES)
    ]
    assert np.concatenate(apart).max() < 1.01
    assert (np.concatenate(apart) > 0.01).mean() <= MAX_SHARE[interpolation]


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [[32, 32], [224, 224], [24, 40]], ids=str)
def test_a_picture_of_the_models_size_is_exact(size, resize_mode):
    spec = SPEC | {"size": size, "resize_mode": resize_mode}
    picture = make_picture(size[1], size[0], 1, noise=60)
    assert levels_apart(picture, spec).max() < 1e-3


def test_every_size_is_resized_to_pillows():
    """The integers of `_size_after_resize` against Python's rounding of floats, where the exact quotient is no half."""
    for mode, size in (("shortest", [24, 24]), ("shortest", [24, 40]), ("longest", [40, 24]), ("longest", [32, 32])):
        ours = Preprocessing(SPEC | {"resize_mode": mode, "size": size})
        height_N, width_N = (grid.ravel() for grid in torch.meshgrid(*[torch.arange(1, 130)] * 2, indexing="ij"))
        got = torch.stack(ours._size_after_resize(height_N, width_N), 1).tolist()
        wrong = 0
        for new, old_height, old_width in zip(got, height_N.tolist(), width_N.tolist(), strict=True):
            if mode == "shortest" and size[0] == size[1]:
                length = int(size[0] * max(old_height, old_width) / min(old_height, old_width))
                expected = [length, size[0]] if old_width <= old_height else [size[0], length]
            else:
                ratios = old_height / size[0], old_width / size[1]
                ratio = max(ratios) if mode == "longest" else min(ratios)
                expected = [round(old_height / ratio), round(old_width / ratio)]
            if new != expected:
                halves = 2 * old_height * size[1] % old_width, 2 * old_width * size[0] % old_height
                assert 0 in halves, (mode, size, old_height, old_width, new, expected)
                wrong += 1
        assert wrong <= 0.002 * len(got)
