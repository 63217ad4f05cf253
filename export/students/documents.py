"""Types of the rows of students.json."""

from typing import Literal, TypedDict, TypeGuard

from export.profiling.documents import Grade, Latency

Worth = Literal["params_image", "gmacs", "published_fp32_top1"]


class GraphFacts(TypedDict):
    """Facts of an image tower that are known without running it."""

    params_image: int
    params_text: int
    """Parameters of the text tower that belongs to it, which is not measured."""

    gmacs: float
    """Multiply-accumulates of one image, in billions."""

    image_size: int
    size_bytes: int


class Timing(GraphFacts, Latency, Grade):
    """Latency, memory and facts of an image tower on a device."""

    status: Literal["ok"]
    peak_memory_bytes: int
    threads: int


class _Known(TypedDict):
    name: str
    precision: str
    device: str
    runtime: str
    published_fp32_top1: float | None
    """ImageNet zero-shot top-1 of the trained float model; int8 may be lower."""

    source: str
    weights: str
    licence: str
    """Licence of the published weights of the image tower; both are empty if none are known."""

    front: list[Worth]
    """The metrics of WORTH in which the row is on the Pareto front of its precision: no other row is as good and as
    fast."""


class MeasuredStudent(_Known, Timing):
    """A candidate in one precision that was measured."""


class FailedStudent(_Known):
    """A candidate in one precision that could not be built, exported or run."""

    status: str
    """The reason."""


StudentRow = MeasuredStudent | FailedStudent


def is_measured(row: StudentRow) -> TypeGuard[MeasuredStudent]:
    """Return True for a row with numbers, False for one with a reason."""
    return row["status"] == "ok"
