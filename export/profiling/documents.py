"""The JSON documents of a measurement, as types: a latency, a grade, profile.json, a row of `clipkd profile`."""

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
    """Of the samples of all processes; None of too few samples."""

    n: int
    processes: int
    p50_by_process_ms: list[float]
    load_ms: float
    first_ms: float
    """These two are cold: of a process that has just begun."""


class ImageLatency(Latency):
    images_per_s: float


class TextLatency(Latency):
    texts_per_s: float


class Grade(TypedDict):
    """A grade for how far a measurement can be trusted."""

    grade: Literal["A", "B", "C"]
    """A: clocks locked, no flags.  B: no flags.  C: a flag."""

    flags: list[str]
    """UNSTABLE: the processes differ.  UNSTEADY: a warm-up never settled.  BUSY: other programs took the CPU.  SINGLE:
    one process has no interval."""


class _Versions(TypedDict, total=False):
    python: str
    numpy: str
    onnxruntime: str
    openvino: str
    tensorrt: str
    pytorch: str


class MeasuredMachine(Hardware, _Versions):
    """A machine, with the versions of what ran there."""


class ProfileDocument(Grade):
    """profile.json: what one exported model takes on one device."""

    call: str
    """The same for models whose processes took turns."""

    device: str
    machine: MeasuredMachine
    threads: int
    batch: int
    image: ImageLatency
    text: TextLatency
    e2e_p50_ms: float | None
    """From a JPEG's bytes to its class; None of a model without classes."""

    e2e_stages_ms: dict[str, float]
    """Medians of its stages: decoding, preprocessing, image tower, features @ class matrix and top-1."""

    images_per_s: float
    """The best over the batches of `sweep`."""

    sweep: dict[str, float]
    """Images per second, by batch."""

    peak_memory_bytes: int
    """The greater of the towers' processes, without the larger batches."""

    size_bytes: int
    to_lock_clocks: list[str]
    """The commands that would make an A possible; clipkd never runs them."""


class ProfileRow(ProfileDocument):
    """A model that `clipkd profile` measured."""

    model: str
    status: Literal["ok"]
    samples: str | None
    """The file of every latency, if it is kept."""


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
