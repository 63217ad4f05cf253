"""Decide which precision to ship in a runtime: two gates, accuracy and speed, that a candidate must both pass.

A precision below fp32 costs accuracy for certain and buys speed perhaps: in many runtimes, on many machines, 8-bit CLIP
is slower than fp16, and in some wrong in silence.  So the precisions are walked from the safest on, and one takes the
place of the one chosen so far only if it is within the budget and measurably faster; where none is, fp32 stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION
from toolchain.significance import PairedDrop

MAX_DROP = 0.01
"""Of top-1, where neither the command nor quantize.max_drop says: the default of NNCF's own accuracy control."""

MIN_PROCESSES = 5
"""Fresh processes per model, at least.  The interval of so few is their range, and of two equal models one has all five
of its medians below all of the other's once in C(10, 5) = 252 times; with three that would be once in 20."""


class Latency(NamedTuple):
    """The image tower's median at batch 1, and its 95 % interval."""

    p50_ms: float
    low_ms: float
    high_ms: float

    def __str__(self) -> str:
        return f"{self.p50_ms:.4g} [{self.low_ms:.4g}, {self.high_ms:.4g}]"


@dataclass(frozen=True)
class Candidate:
    """One precision in one runtime, as far as it is known."""

    precision: str

    problem: str | None = None
    """Why there is nothing to weigh: it was not made, not proven, or could not be run."""

    drop: PairedDrop | None = None
    """What top-1 loses to fp32 in the same runtime."""

    latency: Latency | None = None
    """Measured in turns with the others'."""


Count = Literal["chosen", "failed", "accuracy", "speed"]


@dataclass(frozen=True)
class Verdict:
    count: Count
    """On which count it was rejected, or that it was not."""

    reason: str = ""


def too_far(candidate: Candidate, max_drop: float) -> Verdict | None:
    """Return the verdict on a candidate that is out before anything is timed, or None.

    What counts is the drop itself and not the end of its interval, as for quantize.max_drop: of a few hundred images
    the interval alone is wider than any budget, and nothing would ever pass.  `doubts` says where it reaches beyond.
    """
    if candidate.problem is not None:
        return Verdict("failed", candidate.problem)
    if candidate.precision == REFERENCE_PRECISION:
        return None
    if candidate.drop is None or not candidate.drop.drop <= max_drop:  # not `>`: NaN must fail
        return Verdict("accuracy", f"top-1 drops by {_said(candidate.drop)}, more than {100 * max_drop:g} pp")
    return None


def decide(candidates: Sequence[Candidate], max_drop: float) -> dict[str, Verdict]:
    """Return the verdict on each candidate of one runtime, the safest first; one is chosen, or none if fp32 failed.

    From the safest on, a candidate within `max_drop` replaces the one chosen so far where its interval of the latency
    lies wholly below.
    """
    ordered = sorted(candidates, key=lambda candidate: PRECISIONS[candidate.precision].safety_rank)
    rejected = {candidate.precision: too_far(candidate, max_drop) or _untimed(candidate) for candidate in ordered}
    reference = rejected.get(REFERENCE_PRECISION, Verdict("failed", "it is not among the candidates"))
    if reference is not None:
        return {REFERENCE_PRECISION: reference} | _without_reference(ordered)
    chosen = ordered[0]  # nothing is safer than fp32
    for candidate in ordered[1:]:
        if rejected[candidate.precision] is not None:
            continue
        assert candidate.latency is not None
        assert chosen.latency is not None
        against = f"{candidate.latency} against {chosen.latency} ms"
        if candidate.latency.high_ms < chosen.latency.low_ms:
            why = f"{candidate.precision} is measurably faster: {against}"
            rejected[chosen.precision] = Verdict("speed", why)
            chosen = candidate
        else:
            why = f"not measurably faster than {chosen.precision}: {against}"
            rejected[candidate.precision] = Verdict("speed", why)
    return {precision: verdict or Verdict("chosen") for precision, verdict in rejected.items()}


def _without_reference(candidates: Sequence[Candidate]) -> dict[str, Verdict]:
    """Return the verdicts on the others where fp32 failed: their own problem, or the lack of fp32."""
    alone = f"there is no {REFERENCE_PRECISION} in this runtime to hold it against"
    others = [candidate for candidate in candidates if candidate.precision != REFERENCE_PRECISION]
    return {other.precision: Verdict("failed", alone if other.problem is None else other.problem) for other in others}


def doubts(candidate: Candidate, max_drop: float) -> list[str]:
    """Return what a user should know of a candidate that was chosen."""
    if candidate.drop is None or candidate.drop.high <= max_drop:
        return []
    return [
        f"{candidate.precision}: its drop is within {100 * max_drop:g} pp, but the 95 % interval reaches "
        f"{100 * candidate.drop.high:.2f} pp; a larger headline set would tell"
    ]


def _untimed(candidate: Candidate) -> Verdict | None:
    latency = candidate.latency
    if latency is not None and 0 < latency.low_ms <= latency.p50_ms <= latency.high_ms < math.inf:  # NaN is not
        return None
    return Verdict("failed", f"no latency was measured: {latency or 'nothing'}")


def _said(drop: PairedDrop | None) -> str:
    if drop is None:
        return "what nobody measured"
    return f"{100 * drop.drop:.2f} [{100 * drop.low:.2f}, {100 * drop.high:.2f}] pp"
