"""Training options set on the command line; this module needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run that affect speed, checkpointing and replaced stages, never the result."""

    workers: int | None = None
    """Data loader workers per rank, also of a teacher cache.  None: a command chooses, `distill` starts none."""

    checkpoint_steps: int | None = None
    """Steps between checkpoints, in addition to those by time."""

    checkpoint_minutes: float = 1.0
    keep_checkpoints: int = 2

    replace: bool = False
    """Replace finished or unfinished stages of another recipe that took more than a minute."""
