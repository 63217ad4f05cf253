"""Types of the documents of an export: the planned export, the summary of an exported model, its parity check.

`manifest.json` of an exported model stores the summary under "summary". The other documents are parts of it, or are
stored in `measured/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, cast

from toolchain.precisions import PRECISIONS, Precision
from toolchain.runtimes import RUNTIMES, Runtime
from toolchain.stage import Stage


@dataclass(frozen=True)
class PlannedExport:
    """One model to export."""

    role: str
    """The role of the checkpoint, as in the report: teacher, baseline, student, adopted."""

    precision: str
    runtime: str = "onnxruntime"
    opset: int = 20
    """The lowest ONNX opset to use: 20 is the last whose QuantizeLinear ONNX Runtime optimizes correctly
    (onnxruntime#25526)."""

    batch: int | None = None
    """1 fixes the first dimension of every graph; None leaves it free."""

    uint8_input: bool = False
    """Also write image_uint8.onnx, which includes the preprocessing."""

    @property
    def name(self) -> str:
        """The directory of the exported model."""
        return f"{self.role}-{self.runtime}-{self.precision}"

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that it is exported from."""
        return f"{self.role}-int8" if self.in_precision.is_quantized else self.role

    @property
    def in_precision(self) -> Precision:
        return PRECISIONS[self.precision]

    @property
    def in_runtime(self) -> Runtime:
        return RUNTIMES[self.runtime]


class Comparison(TypedDict):
    """The difference of features from those of PyTorch: the worst sample's numbers."""

    min_cosine: float
    min_sqnr_db: float
    worst_sample: int
    num_samples: int
    num_below: int
    """The number of samples whose SQNR is below the precision's threshold."""

    num_not_finite: int


class TowerParity(Comparison):
    top1_agreement: float
    """The share of samples whose nearest neighbour in the other tower stays the same."""


class TextParity(TowerParity):
    worst_prompt: str
    num_prompts: int
    """The number of prompts that the evaluation set has: its texts times its templates; `num_samples` are compared."""


class Parity(TypedDict):
    """The content of parity.json."""

    image: TowerParity
    text: TextParity


class Uint8Parity(TypedDict):
    """The difference that preprocessing in the graph makes, in pixels (grey levels) and in features."""

    max_levels: float
    share_of_values: float
    min_cosine: float
    min_sqnr_db: float
    num_pictures: int
    size_bytes: int


class ExecutedGraph(TypedDict):
    """The numbers of operators that a runtime executes for a graph."""

    ops: dict[str, int]
    """By type, after the runtime's own optimization."""

    precisions: dict[str, int]
    """Matrix products and convolutions by executed precision; OpenVINO only."""

    integer: int
    """Products and convolutions that are executed in integers."""

    rounding: dict[str, int]
    """Remaining quantization operators, by type."""

    attention: dict[str, int]
    """Attentions that became one operator (`fused`), and those that did not (`open`)."""


class _Proof(TypedDict):
    parity: Parity


class Proof(_Proof, total=False):
    uint8_input: Uint8Parity
    """Present if image_uint8.onnx was requested."""

    nodes: dict[str, ExecutedGraph | None]
    """By tower, on a CPU; None if the package that reads the graph is not installed."""


class GraphSummary(TypedDict):
    """The facts about an exported model before its parity check."""

    role: str
    runtime: str
    precision: str
    params_image: int
    params_text: int
    opset: int
    batch: int | None
    size_bytes: int
    """The size of both towers' graphs together."""

    size_image_bytes: int
    size_text_bytes: int


class ExportSummary(GraphSummary, Proof):
    """The "summary" in the manifest of an exported model."""


def export_summary(exported: Stage) -> ExportSummary:
    """Return the summary in an exported model's manifest."""
    return cast(ExportSummary, exported.manifest["summary"])
