"""Read this process's rank under torchrun from the environment, and report its error; needs no torch."""

import json
import os
import signal
import time
from pathlib import Path


def rank() -> int:
    """Return this process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def leads() -> bool:
    """Return True on rank 0, which writes and reports."""
    return rank() == 0


def report_error(message: str) -> None:
    """Give torchrun the reason why this rank ends; its summary then has the reason instead of a missing traceback.

    torchrun sends SIGTERM as soon as another rank has ended; from here on it ends this rank without a word.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        partial = Path(f"{file}.partial")  # torchrun itself fails at half a file
        partial.write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
        partial.replace(file)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
