"""A metric's history in bounded memory: what a curve, and a line of blocks, is drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["LIMIT", "Curve", "Span", "columns", "sparkline"]

LIMIT = 128
"""The most points a curve keeps; then every second one is dropped and every second one is taken."""

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

    def add(self, step: int, value: float) -> Curve:
        """The curve with one more point. A step before the last one begins a new curve (a second phase)."""
        point = step, value
        if not math.isfinite(value):
            return self._replace(last=point)
        if self.points and step < self.points[-1][0]:
            return Curve((point,), last=point)
        if self.skipped + 1 < self.stride:
            return self._replace(skipped=self.skipped + 1, last=point)
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


class Span(NamedTuple):
    """What one column of a drawn curve covers."""

    low: float
    high: float


def columns(curves: Sequence[Curve], count: int) -> list[Span]:
    """At most `count` columns over the steps of all `curves`: between which values they lie there.

    Between two points a curve is a straight line, so neighbouring columns touch. Empty when there is no point.
    """
    lines = [points for curve in curves if (points := curve.all_points())]
    if not lines:
        return []
    first = min(points[0][0] for points in lines)
    last = max(points[-1][0] for points in lines)
    if first == last:
        values = [points[-1][1] for points in lines]
        return [Span(min(values), max(values))]
    edges = [first + (last - first) * i / count for i in range(count + 1)]
    found = []
    sampled = [_sample(points, edges) for points in lines]
    for i in range(count):
        lows = [line[i].low for line in sampled if line[i] is not None]  # type: ignore[union-attr]
        highs = [line[i].high for line in sampled if line[i] is not None]  # type: ignore[union-attr]
        if lows:
            found.append(Span(min(lows), max(highs)))
    return found


def _sample(points: Sequence[tuple[int, float]], edges: Sequence[float]) -> list[Span | None]:
    """The lowest and highest value of one line between each two edges; None where it does not reach."""
    found: list[Span | None] = []
    at = 0
    for left, right in pairwise(edges):
        if right < points[0][0] or left > points[-1][0]:
            found.append(None)
            continue
        values = [
            value for value in (_value(points, left, at), _value(points, right, at)) if value is not None
        ]
        while at < len(points) and points[at][0] <= right:
            if points[at][0] >= left:
                values.append(points[at][1])
            at += 1
        at = max(0, at - 1)
        found.append(Span(min(values), max(values)) if values else None)
    return found


def _value(points: Sequence[tuple[int, float]], step: float, start: int) -> float | None:
    """The line's value at `step`, looking from the point `start` on; None outside it."""
    if step < points[0][0] or step > points[-1][0]:
        return None
    for (x0, y0), (x1, y1) in pairwise(points[start:]):
        if x0 <= step <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (step - x0) / (x1 - x0)
    return points[-1][1] if step == points[-1][0] else None


def sparkline(curves: Sequence[Curve], width: int = 24) -> str:
    """Curves, or the middle between them, as a line of blocks for plain text; empty when there is no point."""
    spans = columns(curves, width)
    if not spans:
        return ""
    middles = [(span.low + span.high) / 2 for span in spans]
    low, high = min(middles), max(middles)
    if high == low:
        return _BLOCKS[0] * len(middles)
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in middles)
