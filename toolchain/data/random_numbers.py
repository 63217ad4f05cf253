"""Compute random numbers as pure functions of (seed, sample, view), for every augmentation, order and mask."""

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: int, sample_B: NDArray[np.int64], view: int, count: int) -> NDArray[np.float64]:
    """Return [B, count] numbers in [0, 1), hashed from (seed, sample, view, column) by SplitMix64's finalizer."""
    mask = (1 << 64) - 1
    start = _mix_int(_mix_int(seed & mask) ^ (view & mask))
    with np.errstate(over="ignore"):
        state_B1 = _mix(sample_B.astype(np.uint64)[:, None] ^ np.uint64(start))
        columns = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))[None]
        bits_BR = _mix(state_B1 + columns)
    return (bits_BR >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    with np.errstate(over="ignore"):
        return int(_mix(np.array([x + 0x9E3779B97F4A7C15 & (1 << 64) - 1], np.uint64))[0])
