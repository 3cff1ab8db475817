"""Two runs beside each other, as HTML in the panel's taste and as plain text. All of it pure.

The curves of both stand in one frame of small boxes: no `svg`, which notebooks that are not trusted lose.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from nbaccel.session.curves import Span, aligned, sparkline
from nbaccel.session.panel.ansi import plain
from nbaccel.session.panel.figures import clock, number
from nbaccel.session.panel.metrics import Chart
from nbaccel.session.panel.reading import View

__all__ = ["Difference", "Pair", "Side", "document", "html", "text"]

_COLOURS = ("#3b8fd0", "#e69f00")
_BOTH = "#8d8578"
"""Where the lines lie on each other."""
_RULE = "border-top:1px solid rgba(128,128,128,0.25)"
_MUTED = "opacity:0.7"
_CUT = "overflow:hidden;text-overflow:ellipsis;white-space:nowrap"
_COLUMNS, _WIDTH, _HEIGHT = 70, 300, 90
_THICK = 2
_LINES, _TEXT_WIDTH, _TEXT_DIFFERENCES, _CODE_LINES = 40, 108, 14, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two runs."""

    folder: Path
    view: View
    started: float
    """Seconds since the epoch."""
    charts: Mapping[str, Chart]
    """By metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that was not the same; None where a run does not say."""

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """All that is painted."""

    sides: tuple[Side, Side]
    differences: tuple[Difference, ...]
    code: tuple[str, ...]
    """How the launching cells differ: lines of a unified diff."""

    def charts(self) -> list[tuple[str, tuple[Chart | None, Chart | None]]]:
        """The metrics of either, those of both first."""
        a, b = (side.charts for side in self.sides)
        names = sorted(dict.fromkeys([*a, *b]), key=lambda name: not (name in a and name in b))
        return [(name, (a.get(name), b.get(name))) for name in names]


def document(pair: Pair) -> str:
    """The comparison as an HTML file of its own."""
    title = escape(" and ".join(side.folder.name for side in pair.sides))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        "<style>:root{color-scheme:light dark}body{font-family:system-ui,sans-serif;max-width:1100px;"
        f"margin:1.5em auto;padding:0 1em}}</style></head><body>\n{html(pair)}\n</body></html>\n"
    )


def html(pair: Pair) -> str:
    """The comparison for a cell."""
    heads = "".join(_head(side, at) for at, side in enumerate(pair.sides))
    frames = "".join(_frame(name, charts) for name, charts in pair.charts())
    curves = f'<div style="display:flex;flex-wrap:wrap;gap:10px 22px;margin:8px 0">{frames}</div>'
    same = f'<div style="{_MUTED};margin:4px 0">Nothing known about them differs.</div>'
    table = "".join(_row(one.name, one.a, one.b) for one in pair.differences) or same
    return (
        '<div style="font-size:13px;line-height:1.45;max-width:1100px">'
        f"{heads}{curves if frames else ''}<div><b>what differs</b></div>{table}{_code(pair.code)}</div>"
    )


def _head(side: Side, at: int) -> str:
    view = side.view
    figures = [
        view.situation,
        f"{view.num_ranks} rank{'s' if view.num_ranks != 1 else ''} · {escape(view.heading.device)}",
        clock(view.elapsed),
        *filter(None, [escape(view.speed)]),
        _when(side),
    ]
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:2px 12px;align-items:center">'
        f"{_swatch(_COLOURS[at])}<b>{escape(plain(view.heading.name))}</b>"
        f"<span>{' · '.join(figures)}</span>"
        f'<span style="{_MUTED};font-size:12px">{escape(side.folder.name)}</span></div>'
    )


def _swatch(colour: str) -> str:
    style = f"display:inline-block;width:11px;height:11px;border-radius:2px;background-color:{colour}"
    return f'<span style="{style}"></span>'


def _when(side: Side) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(side.started))


def _row(name: str, a: str | None, b: str | None) -> str:
    cells = "".join(
        f'<div style="flex:1 1 180px;min-width:0;overflow-wrap:anywhere">'
        f"{_swatch(_COLOURS[at])} {escape(plain(value)) if value is not None else '–'}</div>"
        for at, value in enumerate((a, b))
    )
    style = f"display:flex;flex-wrap:wrap;gap:0 12px;padding:1px 0;{_RULE}"
    return f'<div style="{style}"><div style="width:190px;{_CUT}">{escape(plain(name))}</div>{cells}</div>'


def _code(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    painted = "\n".join(
        f'<span style="color:{_COLOURS[line[0] == "+"]}">{escape(plain(line))}</span>'
        if line[:1] in ("+", "-")
        else escape(plain(line))
        for line in lines[:_CODE_LINES]
    )
    return (
        f'<details style="margin:4px 0"><summary style="cursor:pointer;{_MUTED}">their code differs</summary>'
        '<div style="font-family:monospace;font-size:12px;line-height:1.35;white-space:pre-wrap;'
        f'overflow-wrap:anywhere;padding:2px 10px">{painted}</div></details>'
    )


# ── curves ────────────────────────────────────────────────────────────────────────────────────────────


def _frame(name: str, charts: Sequence[Chart | None]) -> str:
    """One metric of both runs, over the same steps and with the same scale."""
    drawn = aligned([chart.curves if chart is not None else () for chart in charts], _COLUMNS)
    spans = [span for group in drawn for span in group if span is not None]
    if not spans:
        return ""
    low, high = min(span.low for span in spans), max(span.high for span in spans)
    scale = (_HEIGHT - _THICK) / (high - low) if high > low and high - low < float("inf") else 0.0
    boxes = "".join(
        _column([_pixels(group[at], low, scale) if at < len(group) else None for group in drawn])
        for at in range(max(map(len, drawn)))
    )
    values = " ".join(
        f"{_swatch(_COLOURS[at])} {number(chart.last) if chart is not None else '–'}"
        for at, chart in enumerate(charts)
    )
    title = f'<div style="{_CUT}"><b>{escape(plain(name))}</b> {values}{_change(charts)}</div>'
    steps = [chart.curves[0].last for chart in charts if chart is not None and chart.curves]
    until = max((point[0] for point in steps if point is not None), default=0)
    frame = (
        f'<div style="display:flex;align-items:flex-end;height:{_HEIGHT}px;'
        f'border-left:1px solid rgba(128,128,128,0.5);border-bottom:1px solid rgba(128,128,128,0.5)">{boxes}</div>'
    )
    words = f"{number(low)} to {number(high)} · to step {until}"
    return f'<div style="width:{_WIDTH}px">{title}{frame}<div style="font-size:11px;{_MUTED}">{words}</div></div>'


def _pixels(span: Span | None, low: float, scale: float) -> tuple[int, int] | None:
    """From which pixel to which above the frame's bottom a line goes in a column."""
    if span is None:
        return None
    bottom = round((span.low - low) * scale)
    return bottom, bottom + max(_THICK, round((span.high - span.low) * scale))


def _column(parts: Sequence[tuple[int, int] | None]) -> str:
    """One column of the frame: the boxes of both lines on top of each other, empty space between them."""
    edges = sorted({0, *(edge for part in parts if part is not None for edge in part)})
    boxes = []
    for below, above in pairwise(edges):
        inside = [
            at for at, part in enumerate(parts) if part is not None and part[0] <= below and above <= part[1]
        ]
        colour = (
            "" if not inside else f";background-color:{_COLOURS[inside[0]] if len(inside) == 1 else _BOTH}"
        )
        boxes.append(f'<b style="display:block;height:{above - below}px{colour}"></b>')
    return f'<i style="width:{100 / _COLUMNS:.2f}%">{"".join(reversed(boxes))}</i>'


def _change(charts: Sequence[Chart | None]) -> str:
    """By how much the second run's last value differs."""
    a, b = (chart.last if chart is not None else None for chart in charts)
    if a is None or b is None or a == b or not a or abs(b - a) == float("inf") or (b - a) != (b - a):
        return ""
    return f'<span style="{_MUTED}"> {(b - a) / abs(a):+.1%}</span>'


# ── plain text ────────────────────────────────────────────────────────────────────────────────────────


def text(pair: Pair) -> str:
    """The comparison in at most 40 lines."""
    lines = []
    for letter, side in zip("ab", pair.sides, strict=True):
        view = side.view
        ranks = f"{view.num_ranks} rank{'s' if view.num_ranks != 1 else ''} on {view.heading.device}"
        rate = f" · {view.speed}" if view.speed else ""
        lines.append(
            f"{letter}  {view.heading.name} · {view.situation} · {ranks} · {clock(view.elapsed)}{rate} · "
            f"{_when(side)} · {side.folder.name}"
        )
    told = [f"  {one.name}: {one.a or '–'} | {one.b or '–'}" for one in pair.differences]
    if len(told) > _TEXT_DIFFERENCES:
        told = [*told[: _TEXT_DIFFERENCES - 1], f"  … and {len(told) - _TEXT_DIFFERENCES + 1} more"]
    if pair.code:
        changed = [sum(line.startswith(sign) for line in pair.code) for sign in "-+"]
        told.append(f"  code: {changed[0]} lines of a, {changed[1]} of b")
    lines += ["what differs (a | b):", *told] if told else ["nothing known about them differs"]
    for name, charts in pair.charts():
        for letter, chart in zip("ab", charts, strict=True):
            if chart is not None:
                lines.append(f"  {name} {letter} {sparkline(chart.curves)} {number(chart.last)}")
    return "\n".join(
        line if len(line) <= _TEXT_WIDTH else line[: _TEXT_WIDTH - 1] + "…"
        for line in (plain(line) for line in lines[:_LINES])
    )
