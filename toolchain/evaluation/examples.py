"""Some pictures of the headline set with a model's answers, kept while it is measured, so that a report can show them
where the set is not.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.evaluation.eval_set import EvalSet
from toolchain.filesystem import write_json

MAX_SIDE = 96  # pixels
_JPEG_QUALITY = 85


def write_examples(path: Path, data: EvalSet, samples: Mapping[str, NDArray[Any]], count: int) -> None:
    """Write examples.json: at most `count` pictures spread evenly over a set, the same ones for every model.

    `set`, and of each of `images` its `index`, `true` (names or captions that are right), `top1` (what the model held
    best, null if nothing), its `cosine`, whether that is `right` as accuracy counts it, and `picture`, a data URI of at
    most 96 x 96 pixels.  A picture that cannot be read is left out.  `samples` are those of `evaluate`.
    """
    rank_N, top1_N, cosine_N = (samples[f"{data.name}_{kind}"] for kind in ("rank", "top1", "top1_cosine"))
    images = []
    for index in np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)).tolist():
        image = data.image(index)
        if image is None:
            continue
        right = np.flatnonzero(data.text_group_K == data.image_group_N[index]).tolist()
        images.append(
            {
                "index": index,
                "true": [data.texts[k] for k in right],
                "top1": data.texts[top1_N[index]] if top1_N[index] >= 0 else None,
                "cosine": float(cosine_N[index]) if top1_N[index] >= 0 else None,
                "right": bool(rank_N[index] < 1),
                "picture": make_thumbnail(image),
            }
        )
    write_json(path, {"set": data.name, "images": images})


def make_thumbnail(image: Image.Image) -> str:
    """Return a data URI of an image, scaled down to at most 96 x 96 pixels: PNG or JPEG, whichever is smaller."""
    small = Image.fromarray(np.asarray(image.convert("RGB")))  # pixels alone: no place, camera or colour profile
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    kind, content = min((_encode(small, kind) for kind in ("PNG", "JPEG")), key=lambda made: len(made[1]))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def _encode(image: Image.Image, kind: str) -> tuple[str, bytes]:
    content = io.BytesIO()
    image.save(content, kind, quality=_JPEG_QUALITY, optimize=True)
    return kind, content.getvalue()
