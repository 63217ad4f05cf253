"""Write parity.npz: real images and captions with the PyTorch features that every runtime is compared with."""

from pathlib import Path
from typing import NamedTuple

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
MAX_PROMPT_BYTES = 20 << 20  # of captions, ids and features: 10,000 prompts at 512 features
NUM_PARITY_PIXELS = 4  # samples stored with pixel_values: each takes 600 kB at 224x224, and one reveals a wrong mean
_CHUNK = 256  # samples per forward


def in_chunks(tower: nn.Module, inputs: Tensor) -> Tensor:
    """Return features [B, D] on the CPU."""
    starts = range(0, len(inputs), _CHUNK)
    device = next((tensor.device for tensor in (*tower.parameters(), *tower.buffers())), inputs.device)
    return torch.cat([tower(inputs[start : start + _CHUNK].to(device)).cpu() for start in starts])


class Prompts(NamedTuple):
    """Texts of an evaluation set in every template, one template after another, and PyTorch's results."""

    captions: list[str]
    input_ids_BT: Tensor
    features_BD: Tensor
    stored: NDArray[np.int64]
    """Indices of those that parity.npz stores, the ones spread over the set first."""

    num_prompts: int
    """The number of prompts that the set has."""


def embed_prompts(text_tower: nn.Module, model: ClipModel, headline: EvalSet) -> Prompts:
    """Return the features of all class prompts of a set, or of as many of its captions as parity.npz stores.

    Raises:
        ClipkdError: a feature is NaN or infinite.
    """
    captions = [template.format(text) for template in headline.templates for text in headline.texts]
    num_prompts, input_ids_BT = len(captions), model.tokenize(captions)
    row_bytes = _row_bytes(captions, input_ids_BT, model.embed_dim)
    stored = _choose_prompts(len(headline.texts), num_prompts, row_bytes)
    if not headline.has_classes:  # no class matrix is made of captions, and there may be many
        captions, input_ids_BT = [captions[index] for index in stored], input_ids_BT[stored]
        stored = np.arange(len(captions))
    features_BD = in_chunks(text_tower, input_ids_BT)
    require_finite("text", features_BD.numpy(), lambda row: repr(captions[row]))
    return Prompts(captions, input_ids_BT, features_BD, stored, num_prompts)


def write_parity_samples(
    path: Path, model: ClipModel, image_tower: nn.Module, prompts: Prompts, headline: EvalSet
) -> None:
    """Write the inputs that parity.py feeds to a runtime and torch's features.

    The first `num_spread` prompts are in one template and spread over the set, as the images are. All others follow;
    if they exceed `MAX_PROMPT_BYTES`, evenly spread ones do.

    Raises:
        ClipkdError: none of the images can be read, or a feature is NaN or infinite.
    """
    shown, images = _parity_images(headline, model)
    pixel_values_BCHW = torch.stack([model.preprocess(shown_image) for shown_image in images])
    image_features_BD = in_chunks(image_tower, pixel_values_BCHW)
    require_finite("image", image_features_BD.numpy(), lambda row: f"{headline.name}, {headline.label(shown[row])}")
    input_ids_BT = prompts.input_ids_BT.numpy()
    np.savez(
        path,
        image_names=np.array([headline.label(index) for index in shown]),
        captions=np.char.encode([prompts.captions[index] for index in prompts.stored], "utf-8"),
        num_spread=min(MAX_PARITY_SAMPLES, len(headline.texts)),
        num_prompts=prompts.num_prompts,
        pixels_BHWC=np.stack([np.asarray(shown_image) for shown_image in images]),
        pixel_values_FCHW=pixel_values_BCHW[:NUM_PARITY_PIXELS].numpy(),
        input_ids_BT=input_ids_BT[prompts.stored].astype(np.min_scalar_type(int(input_ids_BT.max()))),
        image_features_BD=image_features_BD.numpy(),
        text_features_BD=prompts.features_BD.numpy()[prompts.stored],
    )


def _row_bytes(captions: list[str], input_ids_BT: Tensor, width: int) -> int:
    """Return the bytes that parity.npz takes for one prompt."""
    id_bytes = np.min_scalar_type(int(input_ids_BT.max())).itemsize
    return max(len(caption.encode()) for caption in captions) + id_bytes * input_ids_BT.shape[-1] + 4 * width


def _choose_prompts(num_texts: int, num_prompts: int, row_bytes: int) -> NDArray[np.int64]:
    """Return the indices of the prompts to store: texts spread over the set in the first template, then the others."""
    spread = _spread(num_texts, MAX_PARITY_SAMPLES)
    others = np.setdiff1d(np.arange(num_prompts), spread)
    room = max(0, MAX_PROMPT_BYTES // row_bytes - len(spread))
    return np.concatenate([spread, others[_spread(len(others), room)]])


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
