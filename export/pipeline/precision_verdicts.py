"""Decide which precision to ship in a runtime: two gates, accuracy and speed, that a candidate must both pass.

A precision below fp32 always costs accuracy and only sometimes gains speed: in many runtimes, on many machines, 8-bit
CLIP is slower than fp16, and in some it is silently wrong. Therefore `decide` tries the precisions from the safest on.
One replaces the precision chosen so far only if it is within the budget and measurably faster; if none is, fp32 stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION
from toolchain.significance import PairedDrop

MAX_DROP = 0.01
"""Permitted top-1 drop unless the command or quantize.max_drop sets one: the default of NNCF's own accuracy control."""

MIN_PROCESSES = 5
"""The least number of fresh processes per model. The interval of so few medians is their range. Of two equally fast
models, the second has all five medians below all of the first's once in C(10, 5) = 252 times; with three medians, once
in 20."""


class Latency(NamedTuple):
    """The image tower's median latency at batch 1, with its 95 % interval."""

    p50_ms: float
    low_ms: float
    high_ms: float

    def __str__(self) -> str:
        return f"{self.p50_ms:.4g} [{self.low_ms:.4g}, {self.high_ms:.4g}]"


@dataclass(frozen=True)
class Candidate:
    """One precision in one runtime, with the results known so far."""

    precision: str

    problem: str | None = None
    """Why it cannot be compared: it was not exported, failed its parity check, or could not be run."""

    drop: PairedDrop | None = None
    """The drop in top-1 compared with fp32 in the same runtime."""

    latency: Latency | None = None
    """Measured in runs interleaved with those of the other candidates."""


Count = Literal["chosen", "failed", "accuracy", "speed"]


@dataclass(frozen=True)
class Verdict:
    count: Count
    """The reason class: `chosen`, or the gate at which it was rejected."""

    reason: str = ""


def too_far(candidate: Candidate, max_drop: float) -> Verdict | None:
    """Return the verdict on a candidate that is rejected before anything is timed, or None.

    The drop itself is compared with the budget, not the end of its interval, as for quantize.max_drop: with a few
    hundred images the interval alone is wider than any budget, and nothing would ever pass. `doubts` warns if the
    interval reaches beyond the budget.
    """
    if candidate.problem is not None:
        return Verdict("failed", candidate.problem)
    if candidate.precision == REFERENCE_PRECISION:
        return None
    if candidate.drop is None:
        return Verdict("accuracy", "the top-1 drop was not measured")
    if not candidate.drop.drop <= max_drop:  # not `>`: NaN must fail
        return Verdict("accuracy", f"top-1 drops by {_format_drop(candidate.drop)}, more than {100 * max_drop:g} pp")
    return None


def decide(candidates: Sequence[Candidate], max_drop: float) -> dict[str, Verdict]:
    """Return the verdict on each candidate of one runtime, the safest first; one is chosen, or none if fp32 failed.

    From the safest on, a candidate within `max_drop` replaces the one chosen so far if its latency interval lies wholly
    below that of the chosen one.
    """
    ordered = sorted(candidates, key=lambda candidate: PRECISIONS[candidate.precision].safety_rank)
    rejected = {
        candidate.precision: too_far(candidate, max_drop) or _reject_untimed(candidate) for candidate in ordered
    }
    reference = rejected.get(REFERENCE_PRECISION, Verdict("failed", "it is not among the candidates"))
    if reference is not None:
        return {REFERENCE_PRECISION: reference} | _without_reference(ordered)
    chosen = ordered[0]  # nothing is safer than fp32
    for candidate in ordered[1:]:
        if rejected[candidate.precision] is not None:
            continue
        assert candidate.latency is not None
        assert chosen.latency is not None
        latencies = f"{candidate.latency} against {chosen.latency} ms"
        if candidate.latency.high_ms < chosen.latency.low_ms:
            why = f"{candidate.precision} is measurably faster: {latencies}"
            rejected[chosen.precision] = Verdict("speed", why)
            chosen = candidate
        else:
            why = f"not measurably faster than {chosen.precision}: {latencies}"
            rejected[candidate.precision] = Verdict("speed", why)
    return {precision: verdict or Verdict("chosen") for precision, verdict in rejected.items()}


def _without_reference(candidates: Sequence[Candidate]) -> dict[str, Verdict]:
    """Return the verdicts on the other candidates if fp32 failed: their own problem, or the lack of fp32."""
    alone = f"there is no {REFERENCE_PRECISION} in this runtime to compare it with"
    others = [candidate for candidate in candidates if candidate.precision != REFERENCE_PRECISION]
    return {other.precision: Verdict("failed", alone if other.problem is None else other.problem) for other in others}


def doubts(candidate: Candidate, max_drop: float) -> list[str]:
    """Return warnings about a chosen candidate: its drop may exceed the budget."""
    if candidate.drop is None or candidate.drop.high <= max_drop:
        return []
    return [
        f"{candidate.precision}: its drop is within {100 * max_drop:g} pp, but the 95 % interval reaches "
        f"{100 * candidate.drop.high:.2f} pp; use a larger headline set to be sure"
    ]


def _reject_untimed(candidate: Candidate) -> Verdict | None:
    latency = candidate.latency
    if latency is not None and 0 < latency.low_ms <= latency.p50_ms <= latency.high_ms < math.inf:  # NaN fails this
        return None
    return Verdict("failed", f"no latency was measured: {latency or 'nothing'}")


def _format_drop(drop: PairedDrop) -> str:
    return f"{100 * drop.drop:.2f} [{100 * drop.low:.2f}, {100 * drop.high:.2f}] pp"
