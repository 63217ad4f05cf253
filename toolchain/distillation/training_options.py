"""The options of a training run that the command line sets; needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run that affect speed and checkpointing, never the result."""

    workers: int | None = None
    """Loader processes of each rank.  Absent: a command chooses by data and device, `distill` starts none."""

    checkpoint_steps: int | None = None
    """Steps between checkpoints, beside those by time."""

    checkpoint_minutes: float = 1.0
    keep_checkpoints: int = 2
