"""Write parity.npz: real images and captions with the PyTorch features that every runtime is compared with."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from toolchain.errors import ClipkdError
from toolchain.evaluation.eval_set import EvalSet, ImageFile
from toolchain.evaluation.zero_shot import require_finite
from toolchain.models.clip_model import ClipModel

MAX_PARITY_SAMPLES = 256
MAX_PARITY_BYTES = 1 << 26  # of image pixels: all 256 samples at 224x224
NUM_PARITY_PIXELS = 4  # samples stored with pixel_values: each takes 600 kB at 224x224, and one reveals a wrong mean
_CHUNK = 256  # samples per forward


def in_chunks(tower: nn.Module, inputs: Tensor) -> Tensor:
    """Return features [B, D] on the CPU."""
    starts = range(0, len(inputs), _CHUNK)
    device = next((tensor.device for tensor in (*tower.parameters(), *tower.buffers())), inputs.device)
    return torch.cat([tower(inputs[start : start + _CHUNK].to(device)).cpu() for start in starts])


def write_parity_samples(path: Path, model: ClipModel, towers: tuple[nn.Module, nn.Module], headline: EvalSet) -> None:
    """Write the inputs that parity.py feeds to a runtime and torch's features; samples are spread over the set.

    Raises:
        ClipkdError: none of the images can be read, or a feature is NaN or infinite.
    """
    shown, images = _parity_images(headline, model)
    spoken = _spread(len(headline.texts))
    captions = [headline.templates[0].format(headline.texts[index]) for index in spoken]
    pixel_values_BCHW = torch.stack([model.preprocess(shown_image) for shown_image in images])
    input_ids_BT = model.tokenize(captions)
    image_features_BD = in_chunks(towers[0], pixel_values_BCHW)
    text_features_BD = in_chunks(towers[1], input_ids_BT)
    require_finite("image", image_features_BD.numpy(), lambda row: f"{headline.name}, {headline.label(shown[row])}")
    require_finite("text", text_features_BD.numpy(), lambda row: repr(captions[row]))
    np.savez(
        path,
        names=np.array([headline.texts[index] for index in spoken]),
        image_names=np.array([headline.label(index) for index in shown]),
        captions=np.array(captions),
        pixels_BHWC=np.stack([np.asarray(shown_image) for shown_image in images]),
        pixel_values_FCHW=pixel_values_BCHW[:NUM_PARITY_PIXELS].numpy(),
        input_ids_BT=input_ids_BT.numpy(),
        image_features_BD=image_features_BD.numpy(),
        text_features_BD=text_features_BD.numpy(),
    )


def _parity_images(headline: EvalSet, model: ClipModel) -> tuple[list[int], list[Image.Image]]:
    """Return indices of images in a set, and the images, all of one size so that they fit one array.

    Glyphs have one size already and are not changed. Other images are cut to a size a little larger than the model's
    and not square, so that the parity check covers resizing and cropping too.

    Raises:
        ClipkdError: none of them can be read.
    """
    cfg = model.config["preprocess_cfg"]
    height, width = cfg["size"] if isinstance(cfg["size"], list) else (cfg["size"], cfg["size"])
    fitted = width + width // 4, height + height // 8
    as_they_are = not isinstance(headline.images[0], ImageFile)  # an array: of one size already
    at_most = MAX_PARITY_SAMPLES if as_they_are else max(2, MAX_PARITY_BYTES // (3 * fitted[0] * fitted[1]))
    chosen = _spread(len(headline), min(MAX_PARITY_SAMPLES, at_most))
    shown: list[int] = []
    images: list[Image.Image] = []
    for index in chosen.tolist():
        shown_image = headline.image(index)
        if shown_image is not None:
            shown.append(index)
            images.append(shown_image if as_they_are else ImageOps.fit(shown_image, fitted))
    if not images:
        raise ClipkdError(f"evaluation set {headline.name}: none of {len(chosen)} images tried can be read")
    return shown, images


def _spread(count: int, at_most: int = MAX_PARITY_SAMPLES) -> NDArray[np.int64]:
    """Return at most `at_most` indices below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(at_most, count)).round().astype(np.int64)
