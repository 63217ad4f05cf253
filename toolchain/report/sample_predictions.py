"""Write the page's section of sample predictions: every model's answers to the same images."""

import json
from collections.abc import Sequence
from html import escape
from typing import TypedDict

from toolchain.errors import ArtifactError
from toolchain.report.html_tables import filter_data
from toolchain.report.measured import read_json
from toolchain.report.row import ReportRow, measured_folder

_MAX_EXAMPLES = 8


class Example(TypedDict):
    """An image of the headline set with a model's answer, as stored in examples.json."""

    index: int
    true: list[str]
    top1: str | None
    cosine: float | None
    right: bool
    picture: str


def examples_section(rows: Sequence[ReportRow]) -> str:
    """Return the section: a few images of each headline set with every model's answer."""
    answers_by_image: dict[str, dict[str, list[tuple[ReportRow, Example]]]] = {}  # by set, by image
    for row in rows:
        folder = measured_folder(row)
        if folder is None or not (folder / "examples.json").exists():
            continue
        found = read_json(folder / "examples.json")
        for example in found["images"]:
            key = json.dumps([example["index"], example["true"], example["picture"]])
            answers_by_image.setdefault(str(found["set"]), {}).setdefault(key, []).append((row, example))
    parts = []
    for name, answers in answers_by_image.items():
        chosen = _choose_images(list(answers.values()))
        cards = "".join(_example(answered) for answered in chosen)
        note = (
            f"{len(chosen)} of {len(answers)} images spaced evenly over {name}, first those on which models differ. "
            "A check mark is a correct answer; numbers are cosine similarities of image and class name."
        )
        parts.append(f"<div class=examples>{cards}</div><p class=note>{escape(note)}</p>")
    return f"<section><h2>Sample predictions</h2>{''.join(parts)}</section>" if parts else ""


def _choose_images(
    answers_N: Sequence[list[tuple[ReportRow, Example]]],
) -> list[list[tuple[ReportRow, Example]]]:
    """Return at most `_MAX_EXAMPLES` images, in their order.

    Images with both right and wrong answers come first, then images whose answers differ otherwise.
    """

    def dullness(place: int) -> tuple[bool, bool]:
        answers = [answer for _, answer in answers_N[place]]
        return len({answer["right"] for answer in answers}) < 2, len({answer["top1"] for answer in answers}) < 2

    chosen = sorted(sorted(range(len(answers_N)), key=dullness)[:_MAX_EXAMPLES])
    return [answers_N[place] for place in chosen]


def _example(answered: Sequence[tuple[ReportRow, Example]]) -> str:
    """Return one image, its true class name, and every answer with the models that gave it."""
    first = answered[0][1]
    others = len(first["true"]) - 1
    true = str(first["true"][0]) + (f" (and {others} more)" if others else "")
    answers: dict[tuple[bool, str], list[str]] = {}
    for row, answer in answered:
        key = (not answer["right"], "no answer" if answer["top1"] is None else str(answer["top1"]))
        cosine = "" if answer["cosine"] is None else f" {answer['cosine']:.2f}"
        model = f"<span{filter_data(row)}>{escape(str(row['name']))}{cosine}</span>"
        answers.setdefault(key, []).append(model)
    lines = "".join(
        f"<li class={'wrong' if wrong else 'right'}><b>{escape(text)}</b> <small>{''.join(models)}</small></li>"
        for (wrong, text), models in sorted(
            answers.items(), key=lambda item: item[0][0]
        )  # then in the order of the rows
    )
    picture = str(first["picture"])
    if not picture.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")):
        raise ArtifactError(f"examples.json: expected an image as a data URI, got {picture[:40]!r}")
    return (
        f'<figure class=example><img src="{escape(picture)}" alt="{escape(true)}">'
        f"<figcaption><strong>{escape(true)}</strong><ul>{lines}</ul></figcaption></figure>"
    )
