"""A process's place among those that torchrun started, read from its environment; needs no torch."""

import os


def rank() -> int:
    """Return this process's number, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Return True in the process of rank 0, which writes and reports."""
    return rank() == 0
