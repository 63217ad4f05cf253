"""Statistics of latencies: percentiles, bootstrap intervals, throughput, and the grade of a measurement."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import numpy as np

from export.devices.documents import Hardware, RunnerDocument, Timed
from export.profiling.documents import Grade, Latency

MIN_SAMPLES_P90, MIN_SAMPLES_P99 = 64, 662
"""With fewer samples a percentile has no bound at 99 % confidence: the probability that at most one of them lies above
it exceeds 1 % (MLPerf's early stopping)."""

MAX_CV = 0.05
"""Coefficient of variation of the processes' medians above which a measurement is UNSTABLE."""

MAX_OTHER_CPU = 0.25
"""Share of the machine's CPU time used by other programs above which a measurement is BUSY."""
_RESAMPLES = 2000


def grade(towers: Sequence[Sequence[RunnerDocument]], machine: Hardware, flags: Sequence[str]) -> Grade:
    """Return the grade of a measurement from the runner's documents of each tower and the flags raised before."""
    raised = list(flags)
    if not all(result["steady"] for results in towers for result in results):
        raised.insert(0, "UNSTEADY")
    if any(_cv(process_medians(results)) > MAX_CV for results in towers):
        raised.insert(0, "UNSTABLE")
    if any(len(results) == 1 for results in towers):
        raised.append("SINGLE")
    return {"grade": "C" if raised else "A" if machine["clocks_locked"] else "B", "flags": raised}


def summarise(results: Sequence[RunnerDocument]) -> Latency:
    """Return the latency of one tower from the runner's documents, one per process; times in milliseconds."""
    medians = process_medians(results)
    low_ms, high_ms = bootstrap_interval(medians)
    pooled = np.concatenate([result["samples_ms"] for result in results])
    return {
        "p50_ms": statistics.median(medians),
        "p50_low_ms": low_ms,
        "p50_high_ms": high_ms,
        "p90_ms": float(np.percentile(pooled, 90)) if len(pooled) >= MIN_SAMPLES_P90 else None,
        "p99_ms": float(np.percentile(pooled, 99)) if len(pooled) >= MIN_SAMPLES_P99 else None,
        "n": len(pooled),
        "processes": len(results),
        "p50_by_process_ms": medians,
        "load_ms": statistics.median(result["load_ms"] for result in results),
        "first_ms": statistics.median(result["first_ms"] for result in results),
    }


def bootstrap_interval(medians: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median over resampled processes; exhaustive if there are few."""
    n = len(medians)
    if n**n <= _RESAMPLES:
        resamples = np.array(list(itertools.product(medians, repeat=n)))
    else:
        resamples = np.random.default_rng(0).choice(np.asarray(medians), (_RESAMPLES, n))
    low, high = np.percentile(np.median(resamples, axis=1), (2.5, 97.5))
    return float(low), float(high)


def process_medians(results: Sequence[Timed]) -> list[float]:
    return [statistics.median(result["samples_ms"]) for result in results]


def _cv(values: Sequence[float]) -> float:
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def images_per_second(results: Sequence[RunnerDocument]) -> dict[str, float]:
    """Return samples per second by batch size, from the median over processes of each process's median time."""
    rates = {"1": 1000 / statistics.median(process_medians(results))}
    for batch in sorted(set.intersection(*(set(result["batches"]) for result in results)), key=int):
        typical_ms = statistics.median(process_medians([result["batches"][batch] for result in results]))
        rates[batch] = int(batch) * 1000 / typical_ms
    return rates
