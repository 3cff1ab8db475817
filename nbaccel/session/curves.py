"""A metric's history in bounded memory: what a curve, and a line of blocks, is drawn from."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["LIMIT", "Curve", "Span", "aligned", "columns", "is_telling", "sparkline"]

LIMIT = 128
"""The most points a curve keeps; then every second one is dropped and every second one is taken."""

_TELLING = frozenset({"acc", "accuracy", "eval", "evaluation", "test", "val", "valid", "validation"})
_BLOCKS = "▁▂▃▄▅▆▇█"


class Curve(NamedTuple):
    """Points (step, value) in the order they came; not finite values are left out of it."""

    points: tuple[tuple[int, float], ...] = ()
    stride: int = 1
    """One of this many points is kept."""
    skipped: int = 0
    """How many came since the last one that was kept."""
    last: tuple[int, float] | None = None
    """The newest, kept or not, finite or not."""
    finite_until: int | None = None
    """The step of the last finite value, where the newest is not finite; None where there was none before it."""

    def add(self, step: int, value: float) -> Curve:
        """The curve with one more point. A step before the last one begins a new curve (a second phase)."""
        point = step, value
        if not math.isfinite(value):
            until = self.finite_until
            if self.last is not None and math.isfinite(self.last[1]):
                until = self.last[0]
            return self._replace(last=point, finite_until=until)
        if self.points and step < self.points[-1][0]:
            return Curve((point,), last=point)
        if self.skipped + 1 < self.stride:
            return self._replace(skipped=self.skipped + 1, last=point, finite_until=None)
        points, stride = (*self.points, point), self.stride
        if len(points) >= LIMIT:
            points, stride = points[::2], stride * 2
        return Curve(points, stride, 0, point)

    def all_points(self) -> tuple[tuple[int, float], ...]:
        """The points kept, and the newest one."""
        last = self.last
        if last is None or not math.isfinite(last[1]) or (self.points and self.points[-1] == last):
            return self.points
        return (*self.points, last)


@functools.lru_cache(1024)
def is_telling(name: str) -> bool:
    """Whether a metric of this name is one that people look at first: a loss, an accuracy, what an evaluation found."""
    words = re.split("[^a-z]+", name.lower())
    return any(word in _TELLING or word.endswith("loss") for word in words)


class Span(NamedTuple):
    """What one column of a drawn curve covers."""

    low: float
    high: float
    mean: float
    """Of several curves."""


def columns(curves: Sequence[Curve], count: int) -> list[Span]:
    """At most `count` columns over the steps of all `curves`: between which values they lie there.

    Between two points a curve is a straight line, so neighbouring columns touch. Empty when there is no point.
    """
    (found,) = aligned([curves], count)
    return [span for span in found if span is not None]


def aligned(groups: Sequence[Sequence[Curve]], count: int) -> list[list[Span | None]]:
    """`columns` of each group over the steps of all groups together; None where a group has no line.

    A group all of whose points are at one step is one column.
    """
    drawn = [[points for curve in curves if (points := curve.all_points())] for curves in groups]
    lines = [points for group in drawn for points in group]
    if not lines:
        return [[] for _ in groups]
    first, last = min(points[0][0] for points in lines), max(points[-1][0] for points in lines)
    if first == last:
        return [[_span([points[-1][1]] * 2 for points in group)] for group in drawn]
    return [_spans(group, first, count / (last - first), count) for group in drawn]


def _spans(
    lines: Sequence[Sequence[tuple[int, float]]], first: int, scale: float, count: int
) -> list[Span | None]:
    """`count` columns of these lines; `scale` is columns per step, from step `first` on."""
    traced = []
    for points in lines:
        lows, highs = [math.inf] * count, [-math.inf] * count
        if len(points) == 1:
            at = min(count - 1, int((points[0][0] - first) * scale))
            lows[at] = highs[at] = points[0][1]
        _trace(points, first, scale, lows, highs)
        traced.append(list(zip(lows, highs, strict=True)))
    return [_span(there) for there in zip(*traced, strict=True)] if traced else [None] * count


def _span(there: Iterable[Sequence[float]]) -> Span | None:
    """What lines cover that lie between these (low, high); None where none is."""
    known = [(low, high) for low, high in there if low <= high]
    if not known:
        return None
    middle = sum(low + high for low, high in known) / 2 / len(known)
    return Span(min(low for low, _ in known), max(high for _, high in known), middle)


def _trace(
    points: Sequence[tuple[int, float]], first: int, scale: float, lows: list[float], highs: list[float]
) -> None:
    """Widen the columns by one line; `scale` is columns per step, from step `first` on."""
    most = len(lows) - 1
    for (x0, y0), (x1, y1) in pairwise(points):
        begin, end = (x0 - first) * scale, (x1 - first) * scale
        slope = (y1 - y0) / (end - begin) if end > begin else 0.0
        for at in range(min(most, int(begin)), min(most, int(end)) + 1):
            left = y0 + slope * (at - begin) if at > begin else y0
            right = y0 + slope * (at + 1 - begin) if at + 1 < end else y1
            low, high = (left, right) if left < right else (right, left)
            if low < lows[at]:
                lows[at] = low
            if high > highs[at]:
                highs[at] = high


def sparkline(curves: Sequence[Curve], width: int = 24) -> str:
    """Curves, or the middle between them, as a line of blocks for plain text; empty when there is no point."""
    spans = columns(curves, width)
    if not spans:
        return ""
    middles = [span.mean for span in spans]
    low, high = min(middles), max(middles)
    if high == low:
        return _BLOCKS[0] * len(middles)
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in middles)
