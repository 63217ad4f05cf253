"""Corrupt samples: the reasons they are unusable, and a ledger of those a run has met.

Importing this module needs no torch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from toolchain.data.file_content import is_unread_suffix
from toolchain.errors import ClipkdError, name_some

TRUNCATED = "truncated image"
BROKEN = "broken image"
NOT_AN_IMAGE = "not an image"
UNREAD_FORMAT = "image format that is not read"
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
    TRUNCATED, BROKEN, NOT_AN_IMAGE, UNREAD_FORMAT, ZERO_BYTES, TOO_LARGE, NO_FILE, NO_IMAGE, NO_CAPTION, BAD_UTF8,
    BAD_JSON, BAD_ROW, OPEN_QUOTE, BROKEN_TAR,
)  # fmt: skip
"""Every reason for which a sample is unusable."""

_JUDGED_FROM = 1000  # samples shown (or all, if fewer) before a run may stop: a share of the first batch means nothing
_EXAMPLES = 5


class Damage(NamedTuple):
    """A corrupt sample met while data was read."""

    sample: int
    reason: str
    """One of `REASONS`; samples are counted by it."""

    where: str
    """The file, the position in it and the error, for a message."""


class LeftOut(NamedTuple):
    """Entries skipped while the data was listed, for one reason."""

    reason: str
    """One of `REASONS`; for files that are no samples, their suffix."""

    number: int
    examples: tuple[str, ...]
    """Locations of the first few."""

    is_sample: bool = True
    """False: files beside the samples, such as notes, which are counted by suffix and are not corrupt."""


class UnusableError(Exception):
    """Raised inside the readers for a corrupt sample; they turn it into a `Damage`.

    `number` is above 1 if one mistake cost several samples.
    """

    def __init__(self, reason: str, detail: str = "", number: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.number = reason, detail, number


def merge_left_out(left_out: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Return one entry per reason, with the numbers added up and the first few examples kept."""
    by_reason: dict[str, LeftOut] = {}
    for left in left_out:
        before = by_reason.get(left.reason)
        if before is not None:
            examples = (before.examples + left.examples)[:_EXAMPLES]
            left = before._replace(number=before.number + left.number, examples=examples)
        by_reason[left.reason] = left
    return tuple(by_reason.values())


def describe_left_out(left_out: Iterable[LeftOut]) -> list[str]:
    """Return one message per reason for the samples that training skips, and one for all other files."""
    left_out = tuple(left_out)
    messages = [
        f"skipped, {left.reason}: {left.number:,}, first: {left.examples[0]}" for left in left_out if left.is_sample
    ]
    others = count_passed_over(left_out)
    if others:
        first = next(left.examples[0] for left in left_out if not left.is_sample)
        messages.append(f"{describe_passed_over(others)}; first: {first}")
    return messages


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """Return a message about files that are no samples, given their number by suffix."""
    message = f"passed over, no samples: {name_some(f'{number:,} {suffix}' for suffix, number in counts.items())}"
    unread = [suffix for suffix in counts if is_unread_suffix(suffix)]
    if unread:
        message += f" ({name_some(unread)}: images in a format that is not read; convert them, for example to JPEG)"
    return message


def count_passed_over(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """Return the number of files that are no samples, by suffix, the most frequent first."""
    counts = {left.reason: left.number for left in left_out if not left.is_sample}
    return dict(sorted(counts.items(), key=lambda count: (-count[1], count[0])))


def describe(where: str, error: UnusableError) -> str:
    """Return the location of a corrupt sample and its error."""
    return to_utf8(f"{where} ({error.detail})" if error.detail else where)


def to_utf8(text: str) -> str:
    """Return a file name, which may contain any bytes, as valid UTF-8 text for messages and manifests."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def strip_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Return captions without surrounding white space; blank captions are dropped.

    Raises:
        UnusableError: no caption remains, or a JSON escape encodes half a character.
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
    """The exact set of corrupt samples that a run has met; entries skipped while listing count too."""

    left_out: Sequence[LeftOut]
    num_samples: int
    max_damaged: float
    met: dict[int, Damage] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set)
    """Reasons that a message has named; of hundreds of millions of samples, too many are met to look through."""

    def add(self, damaged: Iterable[Damage]) -> list[str]:
        """Record corrupt samples; return one message for each reason met for the first time."""
        messages = []
        for damage in sorted(damaged):
            if self.met.setdefault(damage.sample, damage) is damage and damage.reason not in self._announced:
                self._announced.add(damage.reason)
                messages.append(
                    f"{damage.reason}: {damage.where}; replaced by another sample; "
                    "later ones are replaced without a message"
                )
        return messages

    def check(self, shown: int) -> None:
        """Stop a run that has met too many corrupt samples, once enough were shown for a meaningful share.

        Entries skipped while listing count as a share of all; samples met in training as a share of those shown.

        Raises:
            ClipkdError: the share of corrupt samples exceeds the recipe's limit.
        """
        missing = sum(left.number for left in self.left_out if left.is_sample)
        seen = min(shown, self.num_samples)
        if seen < min(_JUDGED_FROM, self.num_samples):
            return
        share = (missing + len(self.met) / seen * self.num_samples) / (missing + self.num_samples)
        if share > self.max_damaged:
            first = self.examples()
            counts = "; ".join(f"{reason}: {number:,} ({first[reason][0]})" for reason, number in self.counts().items())
            raise ClipkdError(
                f"{share:.1%} of the samples are corrupt, estimated from the first {seen:,}; data.max_damaged allows "
                f"{self.max_damaged:.1%}. {counts}. Fix the data or raise data.max_damaged; the same command then "
                "resumes from the last checkpoint"
            )

    def counts(self) -> dict[str, int]:
        """Return the number of distinct samples by reason."""
        counts = Counter(damage.reason for damage in self.met.values())
        for left in self.left_out:
            if left.is_sample:
                counts[left.reason] += left.number
        return {reason: counts[reason] for reason in sorted(counts)}

    def examples(self) -> dict[str, list[str]]:
        """Return the first few locations by reason."""
        found: dict[str, list[str]] = {}
        listed = [(left.reason, where) for left in self.left_out if left.is_sample for where in left.examples]
        for reason, where in [*listed, *((damage.reason, damage.where) for damage in self.met.values())]:
            if len(found.setdefault(reason, [])) < _EXAMPLES:
                found[reason].append(where)
        return found

    def summary(self) -> dict[str, Any]:
        """Return the manifest's entries; empty if no sample was corrupt and no file passed over."""
        damaged = {"damaged": self.counts(), "damaged_first": self.examples()} if self.counts() else {}
        others = count_passed_over(self.left_out)
        return damaged | ({"passed_over": others} if others else {})

    def state(self) -> list[list[Any]]:
        """Return the state to store in a checkpoint."""
        return [list(damage) for damage in self.met.values()]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Restore the state stored in a checkpoint."""
        self.met = {int(sample): Damage(int(sample), reason, where) for sample, reason, where in state}
        self._announced = {damage.reason for damage in self.met.values()}
