"""Types of the JSON documents that `runner.py` and `machine.py` print on a device.

The programs are copied to devices and are standalone, so they do not import these types.
"""

from typing import TypedDict


class Timed(TypedDict):
    """Latencies of single queries, one after another, in one process."""

    samples_ms: list[float]
    steady: bool
    """True if the warm-up settled within its time limit."""

    warm_up_s: float


class WholePath(Timed):
    """The time from a JPEG's bytes to its class."""

    stages_ms: dict[str, float]
    """Medians by stage: decode, preprocess, image_tower, match."""


class _OfClasses(TypedDict, total=False):
    e2e: WholePath
    """Present only for an image tower whose model has classes."""


class RunnerDocument(Timed, _OfClasses):
    """The document of one process of `runner.py` that timed one graph."""

    load_ms: float
    first_ms: float
    batches: dict[str, Timed]
    """Latencies of the larger batches, by batch size."""

    peak_rss_bytes: int
    batch: int
    threads: int
    versions: dict[str, str]
    """Versions of Python, numpy and the runtime, by name."""


class EncodedDocument(TypedDict):
    """The document of one process of `runner.py --encode`."""

    features: list[list[float]]


class Hardware(TypedDict):
    """A machine and its operating system; None for a value that cannot be read."""

    name: str
    cpu: str
    architecture: str
    cores: int
    logical_cores: int
    cpu_quota: float | None
    usable_cores: int
    isa: list[str]
    memory_bytes: int
    governor: str | None
    clocks_locked: bool
    os: str


class Machine(Hardware):
    """A machine as `machine.py` describes it."""

    to_lock_clocks: list[str]
    """The commands that would lock the clocks."""


class _Reached(TypedDict, total=False):
    destination: str
    """Present only for a device reached by ssh."""


class DeviceIdentity(_Reached):
    """The facts of a device that stay the same from one measurement to the next."""

    name: str
    architecture: str
    cpu_quota: float | None


class MachineDocument(TypedDict):
    """The document that `machine.py` prints."""

    machine: Machine
    other_cpu_share: float | None
    """Share of the machine's CPU time that other programs used; None if unknown."""
