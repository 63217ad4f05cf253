"""Samples that cannot be shown: the kinds of damage, and how many a run has met.

Importing this needs no torch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from toolchain.errors import ClipkdError

TRUNCATED = "truncated image"
BROKEN = "broken image"
NOT_AN_IMAGE = "not an image"
ZERO_BYTES = "zero-byte file"
TOO_LARGE = "too large an image"
NO_FILE = "no such file"
NO_IMAGE = "missing image"
NO_CAPTION = "missing caption"
BAD_UTF8 = "bad UTF-8"
BAD_JSON = "bad JSON"
BAD_ROW = "wrong number of columns"
OPEN_QUOTE = "unbalanced quote"
BROKEN_TAR = "broken tar"

REASONS = (
    TRUNCATED, BROKEN, NOT_AN_IMAGE, ZERO_BYTES, TOO_LARGE, NO_FILE, NO_IMAGE, NO_CAPTION, BAD_UTF8, BAD_JSON, BAD_ROW,
    OPEN_QUOTE, BROKEN_TAR,
)  # fmt: skip
"""Every kind of damage there is a name for."""

_JUDGED_FROM = 1000  # samples shown before a run may stop, or all there are: one in the first batch says nothing
_EXAMPLES = 5


class Damage(NamedTuple):
    """A sample that cannot be shown."""

    sample: int
    reason: str
    """The kind of damage, in few words, the same for every sample of the kind: what is counted by."""

    where: str
    """Which file, and where in it, and what was wrong there, for a message."""


class LeftOut(NamedTuple):
    """What a source holds that is no sample, as its listing already showed."""

    reason: str
    number: int
    examples: tuple[str, ...]
    """The first few, where they are."""


class UnusableError(Exception):
    """Inside of the readers: this sample cannot be shown; they make a `Damage` of it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def merge_left_out(left_out: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Return one entry for each reason: the numbers added, the first few named."""
    by_reason: dict[str, LeftOut] = {}
    for left in left_out:
        before = by_reason.get(left.reason)
        if before is not None:
            examples = (before.examples + left.examples)[:_EXAMPLES]
            left = LeftOut(left.reason, before.number + left.number, examples)
        by_reason[left.reason] = left
    return tuple(by_reason.values())


def describe_left_out(left_out: Iterable[LeftOut]) -> list[str]:
    """Return a sentence for each kind of sample that training will not show."""
    return [f"left out, {left.reason}: {left.number:,}, the first {left.examples[0]}" for left in left_out]


def describe(where: str, error: UnusableError) -> str:
    """Return where a corrupt sample is and what is wrong there."""
    return to_utf8(f"{where} ({error.detail})" if error.detail else where)


def to_utf8(text: str) -> str:
    """Return a file's name, which may hold any bytes, as text that messages and manifests can hold."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def strip_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Return captions without blanks around them, and without blank ones.

    Raises:
        UnusableError: none is left, or JSON spelt half a character.
    """
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise UnusableError(NO_CAPTION, "it is blank")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise UnusableError(BAD_UTF8, str(error)) from error
    return captions


@dataclass
class Ledger:
    """The distinct damaged samples of a run, exactly; what was left out before it counts along."""

    left_out: Sequence[LeftOut]
    num_samples: int
    max_damaged: float
    met: dict[int, Damage] = field(default_factory=dict)

    def add(self, damaged: Iterable[Damage]) -> list[str]:
        """Note them; a sentence for each reason met for the first time."""
        said = []
        known = {damage.reason for damage in self.met.values()}
        for damage in sorted(damaged):
            if self.met.setdefault(damage.sample, damage) is damage and damage.reason not in known:
                known.add(damage.reason)
                said.append(
                    f"{damage.reason}: {damage.where}; another sample is shown in its place, and so for all further"
                )
        return said

    def check(self, shown: int) -> None:
        """Stop a run that has met too many, once so many samples were shown that the share means something.

        What the listing left out counts as a share of all, what was met as a share of what was shown.

        Raises:
            ClipkdError: the share of damaged samples exceeds the recipe's bound.
        """
        missing, seen = sum(left.number for left in self.left_out), min(shown, self.num_samples)
        if seen < min(_JUDGED_FROM, self.num_samples):
            return
        share = (missing + len(self.met) / seen * self.num_samples) / (missing + self.num_samples)
        if share > self.max_damaged:
            first = self.examples()
            counts = "; ".join(f"{reason}: {number:,} ({first[reason][0]})" for reason, number in self.counts().items())
            raise ClipkdError(
                f"{share:.1%} of the samples are damaged, judged by the first {seen:,}; data.max_damaged permits "
                f"{self.max_damaged:.1%}. {counts}. Mend the data, or raise data.max_damaged, and the same command "
                "continues from the last checkpoint"
            )

    def counts(self) -> dict[str, int]:
        """Number of distinct samples by reason."""
        counts = Counter(damage.reason for damage in self.met.values())
        for left in self.left_out:
            counts[left.reason] += left.number
        return {reason: counts[reason] for reason in sorted(counts)}

    def examples(self) -> dict[str, list[str]]:
        """The first few by reason."""
        found: dict[str, list[str]] = {}
        told = [(left.reason, where) for left in self.left_out for where in left.examples]
        for reason, where in [*told, *((damage.reason, damage.where) for damage in self.met.values())]:
            if len(found.setdefault(reason, [])) < _EXAMPLES:
                found[reason].append(where)
        return found

    def summary(self) -> dict[str, Any]:
        """What a manifest says; nothing where nothing was damaged."""
        return {"damaged": self.counts(), "damaged_first": self.examples()} if self.counts() else {}

    def state(self) -> list[list[Any]]:
        """For a checkpoint."""
        return [list(damage) for damage in self.met.values()]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """From a checkpoint's state."""
        self.met = {int(sample): Damage(int(sample), reason, where) for sample, reason, where in state}
