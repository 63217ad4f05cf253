"""Zero-shot accuracy of a PyTorch model while it trains, shared among the processes that train it.

K classes, and images   P prompt templates   D feature width
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from toolchain.evaluate import ranks, wilson
from toolchain.models import ClipModel
from toolchain.processes import Processes

_CHUNK = 256  # samples per forward


def headline_accuracy(
    images_KHWC: NDArray[np.uint8], names: Sequence[str], templates: Sequence[str]
) -> Callable[[ClipModel, Processes], dict[str, float]]:
    """A function that scores a model on one set, of which image k shows class k; every process must call it.

    Its result is top-1 and top-5 as fractions, the 95 % Wilson interval of top-1, and n: the same numbers as `evaluate`
    finds in the same features, whatever the number of processes.
    """

    def accuracy(model: ClipModel, processes: Processes) -> dict[str, float]:
        # Images and classes of this process; one at the least, which is then not counted.
        mine = range(processes.rank, len(names), processes.size) or range(1)
        pixels = [model.preprocess(Image.fromarray(images_KHWC[index])) for index in mine]
        prompts = [[template.format(names[index]) for index in mine] for template in templates]
        with torch.inference_mode():
            image_KD = _encoded(model.encode_image, torch.stack(pixels), processes)
            text_PKD = torch.stack([_encoded(model.encode_text, model.ids_of(row), processes) for row in prompts])
        class_KD = nn.functional.normalize(text_PKD.double().sum(0), dim=-1).float()  # as `class_embeddings` rounds
        gathered = processes.gather_rows(torch.cat([image_KD, class_KD], dim=1), len(names))
        features_KD, classes_KD = gathered.chunk(2, dim=1)
        rank_K = ranks(features_KD.cpu().numpy(), classes_KD.cpu().numpy())
        hits = int((rank_K < 1).sum())
        low, high = wilson(hits, len(rank_K))
        top5 = float((rank_K < 5).mean())
        return {"top1": hits / len(rank_K), "top1_low": low, "top1_high": high, "top5": top5, "n": len(rank_K)}

    return accuracy


def _encoded(encode: Any, inputs: Tensor, processes: Processes) -> Tensor:
    """Unit features [K, D], float32, on the process's device."""
    chunks = [encode(chunk.to(processes.device)).float() for chunk in torch.split(inputs, _CHUNK)]
    return nn.functional.normalize(torch.cat(chunks), dim=-1)
