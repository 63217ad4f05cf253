"""The precisions that a model is exported in: one table row has every fact about each.

To add one, add its row and its name in `PrecisionName`, then define in runner.py how each runtime computes in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

PrecisionName: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int8-fp16", "int8-bf16"]
"""In the order of recipes and messages."""


@dataclass(frozen=True)
class Precision:
    name: PrecisionName
    safety_rank: int
    """0 is the safest.  The rank follows the bits that a value keeps: a mantissa of 23, 10 or 7 bits; then 8 bits, with
    one scale for many values; last, 8 bits beside 16-bit floats."""

    is_quantized: bool
    """The graph is exported from an int8 checkpoint."""

    stored_floats: Literal["float32", "float16", "bfloat16"]
    """The type in which the graph stores its floats."""

    min_opset: int
    """The first ONNX opset whose operators take these types; 18 is the least that a recipe may name."""

    min_sqnr_db: float
    """Least signal-to-noise ratio of the worst sample's features: 20 dB are cos = 0.995, 40 dB cos = 0.99995."""

    max_share_below: float
    """Largest share of a tower's samples whose SQNR may be below `min_sqnr_db`.  Wrong scales lower that of all."""

    min_top1_agreement: float
    """Least share of samples whose nearest caption (or image) among all samples stays the same."""

    marker: str
    """Matplotlib's name of its point."""

    symbol: str
    """Plotly's name of its point."""

    color: str | None = None
    """Its color in the chart of untrained students; None: `clipkd students` does not measure it."""

    instead: str = ""
    """The precisions to suggest when this one cannot be exported."""


# Colors: Wong, "Points of view: Color blindness", Nature Methods 8 (2011).
PRECISIONS: Mapping[str, Precision] = {
    row.name: row
    for row in (
        Precision(
            "fp32",
            safety_rank=0,
            is_quantized=False,
            stored_floats="float32",
            min_opset=18,
            # Reordered float32 sums give 110 dB; TF32 or a float16 constant gives 40 to 60 and must not pass as fp32.
            min_sqnr_db=80.0,
            max_share_below=0.0,
            min_top1_agreement=1.0,  # differences above parity.TIE count as changes
            marker="o",
            symbol="circle",
            color="#0072B2",
        ),
        Precision(
            "bf16",
            safety_rank=2,
            is_quantized=False,
            stored_floats="bfloat16",
            min_opset=22,  # the first in which every operator takes bfloat16
            # 8 bits give 18 dB less than fp16: 35 to 47 dB measured; wrong scales give 10.
            min_sqnr_db=20.0,
            max_share_below=0.0,
            min_top1_agreement=0.95,
            marker="^",
            symbol="triangle-up",
            color="#CC79A7",
        ),
        Precision(
            "fp16",
            safety_rank=1,
            is_quantized=False,
            stored_floats="float16",
            min_opset=18,
            # 11 bits in about twenty layers: 44 dB measured; bfloat16, with 8 bits, must not pass as fp16.
            min_sqnr_db=30.0,
            max_share_below=0.0,
            min_top1_agreement=0.99,  # noise at 30 dB changes a cosine by at most 0.03, and usually by a tenth of that
            marker="s",
            symbol="square",
            color="#009E73",
            instead="fp32 or bf16",
        ),
        Precision(
            "int8",
            safety_rank=3,
            is_quantized=True,
            stored_floats="float32",
            min_opset=18,
            # Both sides round to the same 8 bits, but may round ties differently: 25 dB measured; wrong scales give 10.
            min_sqnr_db=15.0,
            # x86 CPUs without VNNI saturate some 16-bit sums: 29 of 8,745 prompts of the quickstart, at worst 11 dB.
            max_share_below=0.01,
            min_top1_agreement=0.90,  # with its own frozen tower, not with fp32: only ties of rounding differ
            marker="D",
            symbol="diamond",
            color="#D55E00",
        ),
        Precision(
            "int8-fp16",
            safety_rank=4,
            is_quantized=True,
            stored_floats="float16",
            min_opset=19,  # the first in which QuantizeLinear takes float16
            # Compared with the int8 tower in float32: fp16 rounds more ties differently, 24 to 41 dB measured.
            min_sqnr_db=15.0,
            max_share_below=0.01,
            min_top1_agreement=0.90,  # as int8
            marker="P",
            symbol="hexagon",
            instead="int8",
        ),
        Precision(
            "int8-bf16",
            safety_rank=5,
            is_quantized=True,
            stored_floats="float32",  # the same graph as int8; OpenVINO computes its floats in bfloat16
            min_opset=18,
            min_sqnr_db=15.0,  # as for int8-fp16, which keeps more bits
            max_share_below=0.01,
            min_top1_agreement=0.90,
            marker="p",
            symbol="pentagon",
            instead="int8",
        ),
    )
}
"""Precisions by name, in the order of the report."""

REFERENCE_PRECISION: PrecisionName = "fp32"
"""The precision that the others are compared with."""

SAFEST_FIRST: tuple[PrecisionName, ...] = tuple(
    row.name for row in sorted(PRECISIONS.values(), key=lambda row: row.safety_rank)
)
