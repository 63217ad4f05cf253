"""A CLIP model with its preprocessing and tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from toolchain.data.batch import Geometry
from toolchain.errors import UsageError
from toolchain.models.last_block import encode_class_token, reads_class_token
from toolchain.models.text_trimming import encode_tokens, is_trimmable, trim_tokens
from toolchain.models.towers import is_convolutional, take_features


@dataclass(frozen=True)
class ClipModel:
    """A model, with the preprocessing and tokenizer for its inputs."""

    net: nn.Module
    name: str
    """The model's origin, for messages."""

    config: dict[str, Any]
    """The content of this model's open_clip_config.json: model_cfg and preprocess_cfg."""

    tokenizer_files: dict[str, bytes]
    """The tokenizer's files; empty for open_clip's own tokenizer."""

    tokenize: Callable[[list[str]], Tensor]
    """Maps captions to input_ids [B, T], int64."""

    preprocess: Callable[[Image.Image], Tensor]
    """open_clip's evaluation transform: maps an image to pixel_values [3, H, W]."""

    has_teachers_text: bool = False
    """True for a student whose text tower is its teacher's, frozen: the teacher's text features are its own."""

    @property
    def geometry(self) -> Geometry:
        """The image size and interpolation that a batch is prepared with.

        Raises:
            UsageError: the model's images are not square.
        """
        cfg = self.config["preprocess_cfg"]
        height, width = cfg["size"] if isinstance(cfg["size"], list) else (cfg["size"], cfg["size"])
        if height != width:
            raise UsageError(
                f"{self.name}: its images are {height} x {width} (height x width); clipkd supports square images only. "
                "Choose a model with a square image_size"
            )
        return Geometry(height, cfg["interpolation"])

    @property
    def image_size(self) -> int:
        return self.geometry.size

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
        return log_logit_scale.exp().reshape(())  # some models keep it as a vector of one

    @property
    def logit_bias(self) -> Tensor | None:
        """The number that a sigmoid model adds to every scaled cosine similarity; None for a softmax model."""
        bias: Tensor | None = getattr(self.net, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Convert uint8 images of the model's own size to pixel_values, on the same device, as `preprocess` does."""
        cfg = self.config["preprocess_cfg"]
        scale_311, shift_311 = _statistics(tuple(cfg["mean"]), tuple(cfg["std"]), pixels_BCHW.device)
        layout = torch.channels_last if self._is_convolutional else torch.contiguous_format
        return torch.addcmul(shift_311, pixels_BCHW.to(torch.float32, memory_format=layout), scale_311)

    def probe_fast_paths(self) -> None:
        """Test now which fast paths give identical features; otherwise this happens on first use.

        Call it before the net is masked, and before workers start, which have no GPU.
        """
        _ = self._reads_class_token, self._is_trimmable

    def encode_image(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Return features [B, D], the same as open_clip's encode_image, without tokens."""
        if self._reads_class_token:
            return encode_class_token(self.net.visual, pixel_values_BCHW)  # type: ignore[arg-type]
        return take_features(self.net.encode_image(pixel_values_BCHW))  # type: ignore[operator]

    def tokenize_trimmed(self, captions: list[str]) -> Tensor:
        """Return input_ids [B, L] of captions, without padding if their features do not depend on it."""
        return self.trim(self.tokenize(captions))

    def trim(self, input_ids_BT: Tensor) -> Tensor:
        """Return input_ids [B, L] of a whole batch without padding, if the features do not depend on it."""
        return trim_tokens(self.net, input_ids_BT) if self._is_trimmable else input_ids_BT

    def encode_text(self, input_ids_BL: Tensor) -> Tensor:
        """Return features [B, D] of whole or trimmed input_ids, the same as open_clip's encode_text of whole ones."""
        if self._is_trimmable:
            return encode_tokens(self.net, input_ids_BL)
        return take_features(self.net.encode_text(input_ids_BL))  # type: ignore[operator]

    def tokenizes_like(self, other: "ClipModel") -> bool:
        """Return True if both tokenizers return the same input_ids for the same captions."""
        sections = [model.config["model_cfg"].get("text_cfg", {}) for model in (self, other)]
        keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "context_length")
        settings = [[section.get(key) for key in keys] for section in sections]
        return (
            settings[0] == settings[1]
            and self.context_length == other.context_length
            and self.tokenizer_files == other.tokenizer_files
            and self._is_trimmable == other._is_trimmable
        )

    @cached_property
    def _reads_class_token(self) -> bool:
        return reads_class_token(self.net.visual)  # type: ignore[arg-type]

    @cached_property
    def _is_trimmable(self) -> bool:
        return is_trimmable(self.net)

    @cached_property
    def _is_convolutional(self) -> bool:
        return is_convolutional(self.net.visual)  # type: ignore[arg-type]


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift with byte * scale + shift = (byte / 255 - mean) / std."""
    with torch.inference_mode(False):  # the cache outlives the mode it is filled in
        mean_311, std_311 = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        return (1 / (255 * std_311)).float().to(device), (-mean_311 / std_311).float().to(device)
