"""Types of the JSON documents of a measurement: a latency, a grade, profile.json, a row of `clipkd profile`."""

from typing import Literal, TypedDict, TypeGuard

from export.devices.documents import Hardware


class Latency(TypedDict):
    """Latency of one graph at batch 1, over the processes that timed it."""

    p50_ms: float
    """The median over processes of the medians of their samples."""

    p50_low_ms: float
    p50_high_ms: float
    """The 95 % bootstrap interval of `p50_ms`, over processes."""

    p90_ms: float | None
    p99_ms: float | None
    """Percentiles of the samples of all processes; None if there are too few samples."""

    n: int
    processes: int
    p50_by_process_ms: list[float]
    load_ms: float
    first_ms: float
    """Time to open the graph and time of the first query, both in a process that has just started."""


class ImageLatency(Latency):
    images_per_s: float


class TextLatency(Latency):
    texts_per_s: float


class Grade(TypedDict):
    """A grade for how far a measurement can be trusted."""

    grade: Literal["A", "B", "C"]
    """A: clocks locked, no flags.  B: no flags.  C: a flag."""

    flags: list[str]
    """UNSTABLE: the processes differ.  UNSTEADY: a warm-up never settled.  BUSY: other programs used the CPU.  SINGLE:
    one process only, so there is no interval."""


class _Versions(TypedDict, total=False):
    python: str
    numpy: str
    onnxruntime: str
    openvino: str
    tensorrt: str
    pytorch: str


class MeasuredMachine(Hardware, _Versions):
    """A machine with the versions of the software that ran there."""


class ProfileDocument(Grade):
    """The content of profile.json: latency, throughput, memory and size of one exported model on one device."""

    call: str
    """Identifier shared by models whose processes were interleaved."""

    device: str
    machine: MeasuredMachine
    threads: int
    batch: int
    image: ImageLatency
    text: TextLatency
    e2e_p50_ms: float | None
    """Median time from a JPEG's bytes to its class; None for a model without classes."""

    e2e_stages_ms: dict[str, float]
    """Medians of the stages of `e2e`: decoding, preprocessing, image tower, features @ class matrix and top-1."""

    images_per_s: float
    """The maximum over the batches of `sweep`."""

    sweep: dict[str, float]
    """Images per second, by batch."""

    peak_memory_bytes: int
    """The maximum over the processes of both towers, before they run larger batches."""

    size_bytes: int
    size_image_bytes: int | None
    """None if one file holds both towers, as a checkpoint does."""

    size_text_bytes: int | None
    to_lock_clocks: list[str]
    """The commands that lock the clocks, which grade A needs; clipkd never runs them."""


class ProfileRow(ProfileDocument):
    """A model that `clipkd profile` measured."""

    model: str
    status: Literal["ok"]
    samples: str | None
    """The file with every latency, if it is kept."""


class FailedRow(TypedDict):
    """A model that `clipkd profile` could not measure."""

    model: str
    device: str
    status: str
    """The reason."""

    exit_code: int


def is_measured(row: ProfileRow | FailedRow) -> TypeGuard[ProfileRow]:
    """Return True for a row with numbers, False for one with a reason."""
    return row["status"] == "ok"
