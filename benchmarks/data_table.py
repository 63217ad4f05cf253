"""Write sizes and times for CC3M and CC12M into docs/data.md, computed from the rates that benchmarks/data.py measured.

    python benchmarks/data.py > data.txt; python benchmarks/data_table.py data.txt

Replaces the text between the two `sizes and times` marks.  The numbers of samples are those that CLIP-KD trained on: as
many of both datasets as could be downloaded (arXiv:2307.12732).
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from pages import replace_section

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- sizes and times: written by benchmarks/data_table.py -->", "<!-- end of sizes and times -->"
SAMPLES = {"CC3M": 2.89e6, "CC12M": 9.97e6}
WIDTH = 512
DTYPE_BYTES = {"float32": 4, "float16 or bfloat16": 2, "int8": 1}


def main() -> None:
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()[-1])
    page = ROOT / "docs" / "data.md"
    replace_section(page, BEGIN, END, "\n".join(["", *make_table(measured), ""]))


def make_table(measured: dict[str, Any]) -> list[str]:
    """Return the table and the sentence below it, as lines of Markdown."""
    samples = [*SAMPLES.values(), sum(SAMPLES.values())]
    rates, image_bytes = measured["samples_per_s"], measured["sizes"]["256"]["image_bytes"]
    rows = [
        ["samples", *(f"{number / 1e6:.2f} M" for number in samples)],
        [
            f"images of 256 by 256 px, {image_bytes / 1e3:.0f} kB each",
            *(size(number * image_bytes) for number in samples),
        ],
    ]
    for label, work in (
        ("`clipkd data inspect` of every sample", "clipkd data inspect"),
        ("`clipkd data pack`", "clipkd data pack"),
        ("images of an epoch, read, decoded and cropped", "decoding an epoch"),
        ("teacher ViT-B/16 once on every image and caption, float32", "teacher"),
    ):
        rate = rates[work]
        rows.append([f"{label}: {rate:,.0f}/s on one core", *(time(number / rate) for number in samples)])
    for dtype, bytes_ in DTYPE_BYTES.items():
        cells = [size(number * WIDTH * bytes_) for number in samples]
        rows.append([f"cached features, {WIDTH} wide, {dtype}: each view, and each caption", *cells])
    machine = measured["machine"]
    note = (
        f"Rates: commit `{measured['commit']}`, {machine['cpu']}, one core; synthetic images, JPEG quality 90. On n "
        "cores the first three times are divided by n. The teacher belongs on a GPU: before it starts, `clipkd cache` "
        "prints your GPU's rate and the size of the cache."
    )
    return [
        "| | " + " | ".join([*SAMPLES, "both"]) + " |",
        "|---|" + "---|" * len(samples),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *textwrap.wrap(note, 120),
    ]


def size(number: float) -> str:
    return f"{number / 1e12:.2f} TB" if number >= 1e12 else f"{number / 1e9:.1f} GB"


def time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main()
