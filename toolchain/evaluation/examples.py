"""Keep some images of the headline set with a model's answers, so a report can show them where the set is missing."""

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
    """Write examples.json: at most `count` images spread evenly over a set, the same ones for every model.

    It has `set`, and for each of `images`: `index`, `true` (correct names or captions), `top1` (the model's best text,
    null if none), its `cosine`, `right` (as counted by accuracy), and `picture`, a data URI of at most 96 x 96 pixels.
    Unreadable images are skipped.  `samples` is the second result of `evaluate`.
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
    small = Image.fromarray(np.asarray(image.convert("RGB")))  # pixels only: no location, camera or colour profile
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    kind, content = min((_encode(small, kind) for kind in ("PNG", "JPEG")), key=lambda made: len(made[1]))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def _encode(image: Image.Image, kind: str) -> tuple[str, bytes]:
    content = io.BytesIO()
    image.save(content, kind, quality=_JPEG_QUALITY, optimize=True)
    return kind, content.getvalue()
