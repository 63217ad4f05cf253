"""What flows through exporting: a planned export, the summary of an exported model, and what its proof found.

The summary is what `manifest.json` of an exported model keeps under "summary"; the other documents are parts of it, or
stand in `measured/`.
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
    """Of the checkpoint, as a report names it: teacher, baseline, student, adopted."""

    precision: str
    runtime: str = "onnxruntime"
    opset: int = 20
    """At least this ONNX opset: 20 is the last whose QuantizeLinear ONNX Runtime optimises correctly
    (onnxruntime#25526)."""

    batch: int | None = None
    """1 fixes the first dimension of every graph; None leaves it free."""

    uint8_input: bool = False
    """Also write image_uint8.onnx, which preprocesses too."""

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
    """How far features are from those of PyTorch: the worst sample's numbers."""

    min_cosine: float
    min_sqnr_db: float
    worst_sample: int
    num_samples: int
    num_not_finite: int


class TowerParity(Comparison):
    top1_agreement: float
    """The share of samples whose nearest neighbour in the other tower stays the same."""


class Parity(TypedDict):
    """The content of parity.json."""

    image: TowerParity
    text: TowerParity


class Uint8Parity(TypedDict):
    """What preprocessing in the graph changes, of pixels in grey levels, and of features."""

    max_levels: float
    share_of_values: float
    min_cosine: float
    min_sqnr_db: float
    num_pictures: int
    size_bytes: int


class ExecutedGraph(TypedDict):
    """What a runtime made of a graph: numbers of operators."""

    ops: dict[str, int]
    """By type, after the runtime's own optimisation."""

    precisions: dict[str, int]
    """Of OpenVINO: matrix products and convolutions by the precision that they are executed in."""

    integer: int
    """Products and convolutions that are executed in integers."""

    rounding: dict[str, int]
    """What is left of quantization, by type."""

    attention: dict[str, int]
    """Attentions that became one operator (`fused`), and those that did not (`open`)."""


class _Proof(TypedDict):
    parity: Parity


class Proof(_Proof, total=False):
    uint8_input: Uint8Parity
    """Where image_uint8.onnx was asked for."""

    nodes: dict[str, ExecutedGraph | None]
    """By tower, on a CPU; None where what reads the graph is not installed."""


class GraphSummary(TypedDict):
    """What is known of an exported model before it is proven."""

    role: str
    runtime: str
    precision: str
    params_image: int
    params_text: int
    opset: int
    batch: int | None
    size_bytes: int
    """Of both towers' graphs."""


class ExportSummary(GraphSummary, Proof):
    """The "summary" in the manifest of an exported model."""


def export_summary(exported: Stage) -> ExportSummary:
    """Return the summary in an exported model's manifest."""
    return cast(ExportSummary, exported.manifest["summary"])
