"""Describe a stage of another recipe: the fields in which it differs, with both values, and how long it took."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

MADE_AGAIN = "made again"
"""Stands for the digest of an earlier stage that does not exist yet."""

_MAX_CHARACTERS = 60
_MAX_LISTED = 4
_MISSING = object()


def list_differences(recorded: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """Return each difference as `distill.steps 2000 -> 1999`: the recorded value, then the wanted one.

    Both mappings have the entries of `StageSpec.recorded`.  `recorded` is None if only a hash of it was written.
    """
    if recorded is None:
        return ("made with other fields, which were not recorded",)
    old, new = _as_json(recorded), _as_json(wanted)
    return (
        *_compare(old.get("fields") or {}, new["fields"]),
        *_compare_fingerprints(old, new),
        *_compare_inputs(old.get("inputs") or {}, new["inputs"]),
        *_compare({key: old.get(key) for key in ("kind", "version")}, {key: new[key] for key in ("kind", "version")}),
    )


def abridge(differences: tuple[str, ...]) -> str:
    """Return the first differences in one line, and the number of the others."""
    more = len(differences) - _MAX_LISTED
    return "; ".join(differences[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def describe_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: 42 s, 6.2 min or 3.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content as a manifest has it, where tuples are lists."""
    converted: dict[str, Any] = json.loads(json.dumps(content))
    return converted


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name in dict.fromkeys([*new, *old]):
        before, after = old.get(name, _MISSING), new.get(name, _MISSING)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _compare(before, after, f"{above}{name}.")
        elif before != after and MADE_AGAIN not in str(after):  # an export records the digest of its checkpoint
            yield f"{above}{name} {_show(before)} -> {_show(after)}"


def _compare_fingerprints(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is known of the content behind each hash that differs: its description, or the hash itself if JSON."""
    before, after = old.get("fingerprints") or {}, new["fingerprints"]
    for name in dict.fromkeys([*after, *before]):
        if before.get(name) == after.get(name):
            continue
        described = _describe(old, name), _describe(new, name)
        found = _compare(described[0], described[1], f"{name}.") if described[0] and described[1] else ()
        yield from list(found) or [f"{name}: other content"]


def _compare_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) == new.get(name):
            continue
        if new.get(name) == MADE_AGAIN:
            yield f"its {name} is made again"
        elif name not in new or name not in old:
            yield f"made {'without' if name in new else 'with'} a {name}"
        else:
            yield f"made from another {name}"


def _describe(content: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return what a fingerprint hashes; None if only the hash is recorded."""
    described: Any = (content.get("described") or {}).get(name)
    if described is None:
        try:
            described = json.loads((content.get("fingerprints") or {}).get(name) or "")  # a machine is not hashed
        except ValueError:
            return None
    return described if isinstance(described, dict) else None


def _show(value: Any) -> str:
    if value is _MISSING:
        return "(not set)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."
