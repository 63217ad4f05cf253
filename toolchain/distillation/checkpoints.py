"""Save and load the checkpoints of a training run.

Checkpoints are written atomically, every few steps or minutes.  The last few are kept, and loading skips corrupt ones.
A checkpoint's name holds its step and the hash of its bytes: step-00001200-9f86d081884c7d65.pt.
"""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toolchain.errors import ClipkdError

_PATTERN = "step-*-*.pt"
_HASH_DIGITS = 16


@dataclass
class Checkpoints:
    """The checkpoints in one folder."""

    folder: Path
    keep: int = 2
    every_steps: int | None = None
    every_s: float = 60.0
    _saved_at: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Return True if a checkpoint should be saved now that `step` steps are done."""
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_step or time.monotonic() - self._saved_at >= self.every_s

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, then remove all but the last `keep` checkpoints.

        Checkpoints of later steps are removed too: they are corrupt, and `load` skipped them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "checkpoint.partial"
        with partial.open("wb") as file:
            torch.save(state | {"step": step}, file)
            file.flush()
            os.fsync(file.fileno())  # the checkpoint must survive a power loss once its name exists
        saved = partial.replace(self.folder / f"step-{step:08}-{_hash(partial)}.pt")
        before = [path for path in self._newest_first() if _step(path) < step]
        for path in self._newest_first():
            if path != saved and path not in before[: self.keep - 1]:
                path.unlink()
        self._saved_at = time.monotonic()

    def load(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest intact checkpoint, or None if there is none; `say` reports those that fail their hash.

        Raises:
            ClipkdError: there are checkpoints and all of them are corrupt.
        """
        paths = self._newest_first()
        for path in paths:
            if _hash(path) == path.stem.rpartition("-")[2]:
                state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
                return state
            say(f"{path}: corrupt checkpoint, its hash is {_hash(path)}; using the one before it")
        if paths:
            raise ClipkdError(f"{self.folder}: every checkpoint is corrupt. Delete the folder to train from the start")
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:_HASH_DIGITS]
