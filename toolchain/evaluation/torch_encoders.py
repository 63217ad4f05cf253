"""Score zero-shot accuracy of a PyTorch model: during training, split over ranks, or of a finished checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from toolchain.distributed import Processes
from toolchain.evaluation.eval_set import EvalSet
from toolchain.evaluation.zero_shot import BLANK, accuracy, image_ranks, require_finite
from toolchain.models.clip_model import ClipModel

_CHUNK = 256  # samples per forward


def headline_accuracy(data: EvalSet) -> Callable[[ClipModel, Processes], dict[str, float]]:
    """Return a function that scores a model on one set; every rank must call it.

    It returns top-1 and top-5 as fractions, the 95 % Wilson interval of top-1, and n.  These equal what `evaluate`
    computes from the same features, for any number of ranks.  It raises ClipkdError on every rank if too many images of
    the set cannot be read, or a feature is NaN or infinite.
    """

    def score(model: ClipModel, processes: Processes) -> dict[str, float]:
        # Images and texts of this rank; at least one, which is not counted if it belongs to another rank.
        my_images = range(processes.rank, len(data), processes.size) or range(1)
        my_texts = range(processes.rank, len(data.texts), processes.size) or range(1)
        prompts = [[template.format(data.texts[index]) for index in my_texts] for template in data.templates]
        readable: list[bool] = []
        with torch.inference_mode():
            image_ND = _encode(model.encode_image, _read_pixels(data, my_images, model, readable), processes)
            text_PKD = torch.stack(
                [
                    _encode(model.encode_text, torch.split(model.tokenize_trimmed(row), _CHUNK), processes)
                    for row in prompts
                ]
            )
        text_KD = text_PKD[0]
        if data.has_classes:
            text_KD = nn.functional.normalize(text_PKD.double().sum(0), dim=-1).float()  # as in `class_embeddings`
        readable_N1 = torch.tensor(readable, device=image_ND.device)[:, None]
        rows_ND = torch.cat([image_ND * readable_N1, readable_N1.float()], dim=1)
        gathered_ND = processes.gather_rows(rows_ND, len(data)).cpu().numpy()
        gathered_KD = processes.gather_rows(text_KD, len(data.texts)).cpu().numpy()
        require_finite("image", gathered_ND, lambda index: f"{data.name}, {data.label(index)}")
        require_finite("text", gathered_KD, lambda index: repr(data.texts[index]))
        found = accuracy(image_ranks(data, gathered_ND[:, :-1], gathered_KD, gathered_ND[:, -1] == 0))
        return {
            "top1": found["top1"],
            "top1_low": found["top1_low"],
            "top1_high": found["top1_high"],
            "top5": found["top5"],
            "n": found["n"],
        }

    return score


@dataclass(frozen=True)
class TorchEncoders:
    """The `Encoders` of a PyTorch checkpoint."""

    model: ClipModel
    device: torch.device

    def preprocess(self, image: Image.Image, /) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.model.preprocess(image).numpy()
        return values

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32], /) -> NDArray[np.float32]:
        return self._unit(self.model.encode_image, torch.from_numpy(pixel_values_BCHW))

    def encode_texts(self, texts: list[str], /) -> NDArray[np.float32]:
        return self._unit(self.model.encode_text, self.model.tokenize_trimmed(texts))

    def _unit(self, encode: Any, inputs: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            features_BD = nn.functional.normalize(encode(inputs.to(self.device)).float(), dim=-1)
        unit_BD: NDArray[np.float32] = features_BD.cpu().numpy()
        return unit_BD


def _read_pixels(data: EvalSet, chosen: range, model: ClipModel, readable: list[bool]) -> Iterator[Tensor]:
    """Yield chunks of pixel_values; append to `readable`, for each image, whether it could be read."""
    for start in range(0, len(chosen), _CHUNK):
        values = []
        for index in chosen[start : start + _CHUNK]:  # decode one image at a time
            image = data.image(index)
            readable.append(image is not None)
            values.append(model.preprocess(image or BLANK))
        yield torch.stack(values)


def _encode(encode: Any, chunks: Iterable[Tensor], processes: Processes) -> Tensor:
    """Return unit features, float32, on the rank's device."""
    features = [encode(chunk.to(processes.device)).float() for chunk in chunks]
    return nn.functional.normalize(torch.cat(features), dim=-1)
