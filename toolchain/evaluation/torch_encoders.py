"""Zero-shot accuracy of a PyTorch model: while it trains, shared among the processes that train it, and by itself."""

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
from toolchain.evaluation.zero_shot import BLANK, accuracy, image_ranks
from toolchain.models.clip_model import ClipModel

_CHUNK = 256  # samples per forward


def headline_accuracy(data: EvalSet) -> Callable[[ClipModel, Processes], dict[str, float]]:
    """Return a function that scores a model on one set; every process must call it.

    Its result is top-1 and top-5 as fractions, the 95 % Wilson interval of top-1, and n: the same numbers as `evaluate`
    finds in the same features, whatever the number of processes.  It raises ClipkdError, in every process, where too
    many pictures of the set cannot be read.
    """

    def scored(model: ClipModel, processes: Processes) -> dict[str, float]:
        # Images and texts of this process; one at the least, which is then not counted.
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
            text_KD = nn.functional.normalize(text_PKD.double().sum(0), dim=-1).float()  # as `class_embeddings` rounds
        readable_N1 = torch.tensor(readable, device=image_ND.device)[:, None]
        rows_ND = torch.cat([image_ND * readable_N1, readable_N1.float()], dim=1)
        gathered_ND = processes.gather_rows(rows_ND, len(data)).cpu().numpy()
        gathered_KD = processes.gather_rows(text_KD, len(data.texts)).cpu().numpy()
        found = accuracy(image_ranks(data, gathered_ND[:, :-1], gathered_KD, gathered_ND[:, -1] == 0))
        return {
            "top1": found["top1"],
            "top1_low": found["top1_low"],
            "top1_high": found["top1_high"],
            "top5": found["top5"],
            "n": found["n"],
        }

    return scored


@dataclass(frozen=True)
class TorchEncoders:
    """A checkpoint as `evaluate` sees it."""

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
    """Yield chunks of pixel_values; `readable` grows by whether each picture could be read."""
    for start in range(0, len(chosen), _CHUNK):
        values = []
        for index in chosen[start : start + _CHUNK]:  # one picture at a time is decoded
            image = data.image(index)
            readable.append(image is not None)
            values.append(model.preprocess(image or BLANK))
        yield torch.stack(values)


def _encode(encode: Any, chunks: Iterable[Tensor], processes: Processes) -> Tensor:
    """Return unit features, float32, on the process's device."""
    features = [encode(chunk.to(processes.device)).float() for chunk in chunks]
    return nn.functional.normalize(torch.cat(features), dim=-1)
