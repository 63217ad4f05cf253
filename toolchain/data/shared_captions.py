"""Warn of data whose images all have the same captions, such as those of a single class."""

import math

import numpy as np

from toolchain.data.batch import TrainingData
from toolchain.errors import quote_start
from toolchain.recipe.distill import NEED_CAPTIONS, WITHOUT_CAPTIONS, LossWeights

_EXAMINED = 64  # samples, spread evenly: a few class folders or shards each have some


def warn_of_shared_captions(data: TrainingData, loss_weights: LossWeights, batch_size: int) -> list[str]:
    """Return a warning if images share all their captions and an objective must distinguish them by these.

    A contrastive loss over B equal captions has its minimum at ln B, the value of guessing.

    Raises:
        ClipkdError: a data file has changed or is missing.
    """
    wrong = [name for name in NEED_CAPTIONS if loss_weights.model_dump()[name]]
    number = min(_EXAMINED, data.num_samples)
    sample_B = np.linspace(0, data.num_samples - 1, number).round().astype(np.int64)
    captions = {texts for texts in data.list_captions(sample_B) if texts}
    if not wrong or number < 2 or len(captions) != 1:
        return []
    (texts,) = captions
    which = "all samples have" if number == data.num_samples else f"{number} samples, spread over the data, all have"
    least = f"ln {batch_size} = {math.log(batch_size):.2f}"
    return [
        f"{which} the same caption, {quote_start(texts[0])}: objectives that compare images with captions "
        f"({', '.join(wrong)}) cannot fall, a contrastive loss not below {least}. Add classes or captions, or set "
        f"distill.loss_weights to objectives that compare images alone ({WITHOUT_CAPTIONS})"
    ]
