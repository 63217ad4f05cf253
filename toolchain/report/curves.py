"""Read the training curves that the page draws."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from toolchain.errors import ArtifactError

MAX_POINTS = 600  # a screen shows no more, and a long run would make a page of many megabytes


class Curve(TypedDict):
    """The columns of a training log; a value is null if it was not logged or is not finite."""

    step: list[int]
    loss: list[float | None]
    images_per_s: list[float | None]
    terms: dict[str, list[float | None]]
    """Each weighted term of the loss."""


def read_curve(log: Path) -> Curve:
    """Return the columns of a train.jsonl, averaged over equal numbers of steps if it has more than MAX_POINTS.

    Raises: ArtifactError for a line that is not a JSON object with a step.
    """
    lines = []
    for number, text in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text, parse_constant=lambda _: None)
            line["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{log}:{number}: expected a JSON object with a step, got {text[:60]!r}") from error
        lines.append(line)
    stretch = -(-len(lines) // MAX_POINTS)
    bins = [lines[start : start + stretch] for start in range(0, len(lines), max(1, stretch))]
    terms = list(dict.fromkeys(name for line in lines for name in line.get("terms") or {}))
    return {
        "step": [bin_[-1]["step"] for bin_ in bins],
        "loss": [_mean(line.get("loss") for line in bin_) for bin_ in bins],
        "images_per_s": [_mean(line.get("images_per_s") for line in bin_) for bin_ in bins],
        "terms": {
            name: [_mean(((line.get("terms") or {}).get(name) or {}).get("weighted") for line in bin_) for bin_ in bins]
            for name in terms
        },
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.5g}") if known else None
