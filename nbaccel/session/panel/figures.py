"""Times, values and amounts in few characters."""

from __future__ import annotations

import math

__all__ = ["clock", "count", "number", "scaled", "size", "speed"]


def clock(seconds: float) -> str:
    """`4.2 s`, `1:05`, `2:03:04`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def number(value: float, digits: int = 4) -> str:
    """A value in few characters."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1e6 and (value == int(value) or abs(value) >= 10**digits - 0.5):
        return str(round(value))
    return f"{value:.{digits}g}"


def scaled(value: float, divisor: int | None, digits: int = 4) -> tuple[str, str]:
    """A loop's figure and its prefix, which is empty without a divisor."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while divisor is not None and abs(value) >= 999.5 and (above := next(prefixes, None)):
        value, prefix = value / divisor, above
    return number(value, digits), prefix


def count(step: float, total: float | None, divisor: int | None) -> str:
    """How far a loop is: `240/400`, `1.2M/5M`; without the length where that is not known."""
    if divisor is None:
        return f"{step}/{total}" if total else f"{step}"
    return "/".join("".join(scaled(figure, divisor, 3)) for figure in (step, *([total] if total else [])))


def speed(rate: float | None, unit: str, divisor: int | None) -> str:
    """How fast a loop is: `5 batch/s`, `2.5 MB/s`; empty where that is not known."""
    if rate is None:
        return ""
    figure, prefix = scaled(rate, divisor, 3)
    return f"{figure} {prefix}{unit}/s"


def size(count: int) -> str:
    """Bytes as `312 MB`, `1.4 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
