"""Worker processes that make parts of batches, and hand them over in a fixed amount of shared memory.

Each worker owns `SLOTS` slots of shared memory.  It fills one slot while the other waits to be read, so all workers
together share `workers * SLOTS` slots and never more.  Only what is small passes through a pipe.

On Linux the slots are anonymous shared memory, which forked workers inherit.  Nothing is written to /dev/shm, whose
size a container limits (to 64 MB by default).
"""

import atexit
import gc
import multiprocessing
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from mmap import mmap
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from toolchain.distillation.free_memory import free_bytes
from toolchain.errors import ClipkdError

SLOTS = 2
"""Slots of a worker: parts that it has made or makes, before the main process has read them."""

_ALIGNMENT = 64  # bytes; a view of another dtype must begin at a multiple of its size
_FORKS = sys.platform == "linux"  # elsewhere torch is not safe to fork
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_END = 5

Task = TypeVar("Task")
Rest = TypeVar("Rest")
Made = tuple[Mapping[str, Tensor], Rest]
"""Arrays by name, which pass through shared memory, and the rest, which is pickled."""


class _Worker(NamedTuple):
    process: BaseProcess
    connection: "Connection[Any, Any]"
    slots: Sequence[Tensor]
    """uint8 [bytes] each"""


class Workers(Generic[Task, Rest]):
    """Processes that call `make` for one task after another.  Call `end` when no more is needed."""

    def __init__(self, make: Callable[[Task], Made[Rest]], number: int, slot_bytes: int) -> None:
        """Start the processes.

        Raises:
            ClipkdError: the system refuses the memory or the processes.
        """
        slot_bytes = round_up(slot_bytes)
        self._shared_bytes = number * SLOTS * slot_bytes
        self._workers: list[_Worker] = []
        atexit.register(self.end)  # before multiprocessing waits for its children, which ignore its SIGTERM
        try:
            slots = _allocate(self._shared_bytes).view(number, SLOTS, slot_bytes)
            with _hold_signals():
                for own in slots:
                    self._workers.append(self._start(make, list(own)))
        except OSError as error:
            self.end()
            raise ClipkdError(
                f"data loader: {number} worker(s) with {self._shared_bytes / 1e6:,.0f} MB of shared memory cannot "
                f"start: {error.strerror}. Use fewer --workers"
            ) from None

    def _start(self, make: Callable[[Task], Made[Rest]], slots: Sequence[Tensor]) -> _Worker:
        context: Any = multiprocessing.get_context("fork" if _FORKS else None)
        ours, theirs = context.Pipe()
        # A worker ends when our end of its pipe is closed, also if this process is killed.  Other workers must not
        # keep copies of that end.
        inherited = [*(worker.connection for worker in self._workers), ours] if _FORKS else []
        process = context.Process(target=_serve, args=(theirs, inherited, slots, make), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, slots)

    def make(self, tasks: Iterable[Task]) -> Iterator[Made[Rest]]:
        """Yield what each task makes, in order.

        The arrays are views of shared memory that holds something else once the next item is requested.

        Raises:
            ClipkdError: `make` raised it, or a worker was killed.
            RuntimeError: `make` raised another error; the message is its traceback.
        """
        tasks = iter(tasks)
        turns: deque[tuple[_Worker, int]] = deque()
        for slot in range(SLOTS):
            for worker in self._workers:
                for task in islice(tasks, 1):
                    self._send(worker, slot, task)
                    turns.append((worker, slot))
        while turns:
            worker, slot = turns.popleft()
            yield self._receive(worker, slot)
            for task in islice(tasks, 1):
                self._send(worker, slot, task)
                turns.append((worker, slot))

    def end(self) -> None:
        """End the processes now, whatever they do.  A thread that iterates over `make` then gets an error."""
        atexit.unregister(self.end)
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)

    def _send(self, worker: _Worker, slot: int, task: Task) -> None:
        try:
            worker.connection.send((slot, task))
        except OSError:
            raise self._explain_end(worker) from None

    def _receive(self, worker: _Worker, slot: int) -> Made[Rest]:
        try:
            described, rest = worker.connection.recv()
        except (EOFError, OSError):
            raise self._explain_end(worker) from None
        if isinstance(described, ClipkdError):
            raise described
        if isinstance(described, str):
            raise RuntimeError(f"in a worker of the data loader:\n{described}")
        return {name: _view(worker.slots[slot], *place) for name, place in described.items()}, rest

    def _explain_end(self, worker: _Worker) -> ClipkdError:
        worker.process.join(_SECONDS_TO_END)
        code = worker.process.exitcode
        how = "unexpectedly" if code is None or code >= 0 else f"by {signal.Signals(-code).name}"
        free = free_bytes(torch.device("cpu"))
        left = "" if free is None else f", {free / 1e6:,.0f} MB are free now"
        return ClipkdError(
            f"data loader: worker process {worker.process.pid} was ended {how}. Usually the system ends a process "
            f"because memory is full: {len(self._workers)} worker(s) share {self._shared_bytes / 1e6:,.0f} MB{left}. "
            "Use fewer --workers or a smaller batch, or free memory; the same command then resumes"
        )


def round_up(num_bytes: int) -> int:
    """Return the bytes that an array takes of a slot."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _allocate(num_bytes: int) -> Tensor:
    """Return uint8 [bytes] shared with processes that are started later; a page takes memory once it is written."""
    if _FORKS:
        return torch.frombuffer(mmap(-1, num_bytes), dtype=torch.uint8)
    shared: Tensor = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
    return shared


def _view(slot: Tensor, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return slot[begin : begin + num_bytes].view(dtype).view(shape)


# In a worker ----------------------------------------------------------------------------------------------------------


def _serve(
    connection: "Connection[Any, Any]",
    inherited: Iterable["Connection[Any, Any]"],
    slots: Sequence[Tensor],
    make: Callable[[Task], Made[Rest]],
) -> None:
    """Make parts until the process that wants them has ended."""
    for other in inherited:
        other.close()
    for number in _SIGNALS:  # Ctrl-C reaches a worker as well as its rank, and a dead worker would end the run
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # collecting garbage would write to all objects of the parent, and so copy their memory
    with suppress(EOFError, OSError):
        while True:
            slot, task = connection.recv()
            connection.send(_fill(slots[slot], make, task))


def _fill(slot: Tensor, make: Callable[[Task], Made[Rest]], task: Task) -> tuple[Any, Any]:
    """Write the arrays of a task into a slot; return their places and the rest, or an error and None.

    A user's error passes as it is, any other as its traceback.
    """
    try:
        arrays, rest = make(task)
        places, begin = {}, 0
        for name, array in arrays.items():
            places[name] = begin, array.dtype, tuple(array.shape)
            _view(slot, *places[name]).copy_(array)
            begin += round_up(array.nbytes)
    except ClipkdError as error:
        return error, None
    except Exception:
        return traceback.format_exc(), None
    return places, rest


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Delay signals while workers start: a signal would kill a worker that does not ignore it yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
