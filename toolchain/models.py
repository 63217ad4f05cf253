"""An open_clip model with its own preprocessing and tokenizer, in a folder that plain open_clip opens as `local-dir:`.

B batch   D embedding width   T tokens   CHW image
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain.errors import ArtifactError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ClipModel:
    """A model and what turns pictures and words into its inputs."""

    net: nn.Module
    folder: Path
    config: dict[str, Any]
    """The content of open_clip_config.json."""

    tokenize: Callable[[list[str]], Tensor]
    """Captions to input_ids [B, T], int64."""

    preprocess: Callable[[Image.Image], Tensor]
    """open_clip's evaluation transform: a picture to pixel_values [3, H, W]."""

    @property
    def image_size(self) -> int:
        return int(self.config["model_cfg"]["vision_cfg"]["image_size"])

    @property
    def context_length(self) -> int:
        return int(self.config["model_cfg"]["text_cfg"].get("context_length", 77))

    @property
    def embed_dim(self) -> int:
        return int(self.config["model_cfg"]["embed_dim"])

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of cosine similarities (open_clip's attribute of this name is its logarithm)."""
        log_logit_scale: Tensor = self.net.logit_scale  # type: ignore[assignment]  # nn.Module types attributes loosely
        return log_logit_scale.exp()

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images of the model's own size to pixel_values, as `preprocess` makes them."""
        statistics = self.config["preprocess_cfg"]
        mean_311 = torch.tensor(statistics["mean"])[:, None, None]
        std_311 = torch.tensor(statistics["std"])[:, None, None]
        values_BCHW = (pixels_BCHW.float() / 255 - mean_311) / std_311
        return values_BCHW.contiguous(memory_format=torch.channels_last)


def load_model(folder: Path, *, random_seed: int | None = None) -> ClipModel:
    """Open a local-dir; its weights are required unless `random_seed` asks for a fresh initialisation.

    Raises:
        ArtifactError: the folder is no open_clip local-dir, or its weights are missing or do not fit its config.
    """
    config = read_config(folder)
    if random_seed is None and not (folder / WEIGHTS).is_file():
        raise ArtifactError(f"{folder}: no {WEIGHTS}; this model has a configuration but no weights")
    name = f"local-dir:{folder}"
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # open_clip narrates every look-up on the root logger
    if random_seed is not None:
        torch.manual_seed(random_seed)
    try:
        net = open_clip.create_model(name, load_weights=random_seed is None)
        tokenize = open_clip.get_tokenizer(name)
        preprocess = image_transform_v2(PreprocessCfg(**config["preprocess_cfg"]), is_train=False)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # open_clip raises whatever the JSON, safetensors or torch reader raised
        raise ArtifactError(f"{folder}: open_clip cannot build this model: {error}") from error
    finally:
        root.setLevel(level)
    net.visual.to(memory_format=torch.channels_last)  # convolutions run twice as fast so
    return ClipModel(net.eval(), folder, config, tokenize, preprocess)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a local-dir's open_clip_config.json."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {CONFIG}; expected an open_clip local-dir") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from None
    missing = [key for key in ("model_cfg", "preprocess_cfg") if key not in config]
    if missing:
        raise ArtifactError(f"{path}: no {' and no '.join(missing)}; expected an open_clip local-dir's configuration")
    return config


def save_model(model: ClipModel, folder: Path) -> None:
    """Write weights, configuration and tokenizer: a folder that `open_clip.create_model("local-dir:…")` opens."""
    state = {key: value.detach().contiguous() for key, value in model.net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    for name in (CONFIG, *TOKENIZER_FILES):
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)


def unit_image_features(net: nn.Module, pixel_values_BCHW: Tensor) -> Tensor:
    """[B, D] float32 rows of unit norm."""
    return F.normalize(net.encode_image(pixel_values_BCHW).float(), dim=-1)  # type: ignore[operator]


def unit_text_features(net: nn.Module, input_ids_BT: Tensor) -> Tensor:
    """[B, D] float32 rows of unit norm."""
    return F.normalize(net.encode_text(input_ids_BT).float(), dim=-1)  # type: ignore[operator]


def num_parameters(net: nn.Module) -> tuple[int, int]:
    """Parameters of the image tower, and of everything else (the text tower and the scale)."""
    visual: nn.Module = net.visual  # type: ignore[assignment]  # nn.Module types attributes loosely
    image = sum(parameter.numel() for parameter in visual.parameters())
    return image, sum(parameter.numel() for parameter in net.parameters()) - image
