"""Format numbers for people: intervals, percent, megabytes, durations."""

from collections.abc import Callable, Mapping
from typing import Any


def or_dash(value: Any, text: Callable[[Any], str] = str) -> str:
    return "-" if value is None else text(value)


def format_interval(row: Mapping[str, Any], key: str, unit: str, text: Callable[[float], str]) -> str:
    value, low, high = row[f"{key}{unit}"], row[f"{key}_low{unit}"], row[f"{key}_high{unit}"]
    if value is None:
        return "-"
    return text(value) if low is None or high is None else f"{text(value)} [{text(low)}, {text(high)}]"


def format_number(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def format_count(value: float) -> str:
    return f"{value:,.0f}"


def format_megabytes(size_bytes: float) -> str:
    return f"{format_number(size_bytes / 1e6)}"


def format_percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def format_points(fraction: float) -> str:
    shown = f"{100 * fraction:.1f}"
    return f"{'0.0' if shown == '-0.0' else shown} pp"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{minutes} min {rest:02d} s" if hours == 0 else f"{hours} h {minutes_left:02d} min"
