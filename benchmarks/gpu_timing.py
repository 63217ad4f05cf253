"""Time work on a device, by events on a GPU and by the clock on a CPU, and measure the rates that bound it."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class DeviceClock:
    """Record the time that the parts of a step take on the device.

    On a GPU, both ends of a part are events of the current stream: they are passed when the work before them is done.
    Reading the times waits for that.  On a CPU, work is done when its call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: dict[str, torch.cuda.Event | float] = {}
        self._parts: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.begin(part)
        yield
        self.end(part)

    def begin(self, part: str) -> None:
        self._open[part] = self._now()

    def end(self, part: str) -> None:
        self._parts.append((part, self._open.pop(part), self._now()))

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of each part; the times of a part that ran several times add up."""
        found: dict[str, float] = {}
        for part, begin, end in self._parts:
            found[part] = found.get(part, 0.0) + _seconds_between(begin, end)
        return found

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def time_s(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        clock = DeviceClock(device)
        with clock("all"):
            work()
        taken.append(clock.parts["all"])
    return statistics.median(taken)


def gemm_tflops(device: torch.device, size: int, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Return the rate of a square matrix product of random numbers, in 10^12 operations per second.

    The numbers are random because products of zeros run faster.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = torch.empty(size, size, device=device, dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        seconds = time_s(lambda: torch.mm(a, b, out=found), device, 9)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / seconds / 1e12


def copy_gb_s(device: torch.device, megabytes: int) -> float:
    """Return the rate of a copy within the device's memory, bytes read plus bytes written, in 10^9 bytes per second."""
    source = torch.randint(256, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_s(lambda: target.copy_(source), device, 9) / 1e9


def to_device_gb_s(device: torch.device, megabytes: int) -> float:
    """Return the rate of a copy from pinned memory of the machine to the device, in 10^9 bytes per second."""
    source = torch.randint(256, (megabytes << 20,), dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(source.shape, dtype=torch.uint8, device=device)
    return source.numel() / time_s(lambda: target.copy_(source, non_blocking=True), device, 5) / 1e9
