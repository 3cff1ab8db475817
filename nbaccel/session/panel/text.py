"""A run as plain text: for an editor, a markdown export, a log. At most 40 lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nbaccel.session.curves import sparkline
from nbaccel.session.panel.ansi import plain
from nbaccel.session.panel.figures import clock, number, size
from nbaccel.session.panel.metrics import Chart, more_metrics
from nbaccel.session.panel.reading import PARTS, Row, View, scaling
from nbaccel.session.results import rank_ranges

__all__ = ["LINES", "facts", "paint_text"]

LINES = 40
_ERROR_LINES = 12
_WIDTH = 108
_BAR = 10


def paint_text(view: View, *, error: Sequence[str] = (), hints: Sequence[str] = ()) -> str:
    """The view in at most 40 lines.

    Args:
        error: lines about the first failure; of many, the last are kept.
        hints: lines for the end: where the logs are, how to run it again.
    """
    lines = [
        " · ".join(filter(None, [*facts(view), view.as_of])),
        *(f"  ! {sentence}" for sentence in view.sentences),
    ]
    told = list(error)
    if len(told) > _ERROR_LINES:
        told = [told[0], "  …", *told[len(told) - _ERROR_LINES + 2 :]]
    ending = [*(f"  {line}" for line in told), *hints]
    charts = [_chart(chart) for chart in view.charts]
    charts += [f"  {words}" for words in filter(None, [more_metrics(view.others)])]
    room = LINES - len(lines) - len(ending) - len(charts) - bool(view.strip)
    lines += _table(view.rows, room)
    if view.strip:
        lines.append("  " + ", ".join(_group(state, ranks) for state, ranks in view.states.items()))
    return "\n".join(_cut(plain(line)) for line in [*lines, *charts, *ending][:LINES])


def facts(view: View) -> list[str]:
    """Name, ranks, state, time and speed, for a line."""
    heading = view.heading
    device = heading.device + (f" {heading.precision}" if heading.precision not in (None, "no") else "")
    found = [
        heading.name,
        f"{view.num_ranks} rank{'s' if view.num_ranks != 1 else ''} on {device}",
        *filter(None, [heading.attempt]),
        f"{view.ending}{'' if view.halted is None else ' ·'} {clock(view.elapsed)}",
    ]
    found += filter(None, [view.speed, scaling(view)])
    if view.left is not None:
        found.append(f"{clock(view.left)} left")
    return found


def _table(rows: Sequence[Row], room: int) -> list[str]:
    """Ranks in columns; those that say the same share a line."""
    cells = [_cells(row) for row in rows]
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, texts in zip(rows, cells, strict=True):
        groups.setdefault(texts, []).append(row.rank)
    lines = [(rank_ranges(ranks), *texts) for texts, ranks in groups.items()]
    dropped = len(lines) - max(1, room)
    if dropped > 0:
        lines = lines[: max(1, room - 1)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    table = [
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True) if width).rstrip()
        for line in lines
    ]
    if dropped > 0:
        table.append(f"  … and {dropped + 1} more")
    return table


def _cells(row: Row) -> tuple[str, ...]:
    bar = ""
    if row.fraction is not None:
        full = round(row.fraction * _BAR)
        bar = "█" * full + "░" * (_BAR - full)
    elif row.step:
        bar = "·" * _BAR
    steps = row.steps if row.step or row.total else ""
    epoch = f" epoch {row.epoch}" if row.epoch is not None else ""
    around = "".join(f" {words}" for words in row.outer)
    values = "  ".join(f"{name} {number(value)}" for name, value in row.metrics)
    parts = max(row.parts, key=lambda part: part[1], default=None)
    where = f"{parts[0]} {parts[1]:.0%}" if parts and parts[0] in PARTS else ""
    # in tens of MB: ranks that do the same share a line
    memory = "" if row.memory is None else size(round(row.memory, -7))
    if row.device_memory is not None:
        busy = "" if row.utilization is None else f" {row.utilization} %"
        memory += f" GPU {size(round(row.device_memory, -7))}{busy}"
    state = f"{row.state} ({row.detail})" if row.detail else row.state
    loop = f"{row.loop} {steps}{epoch}{around}".strip()
    return state, bar, loop, row.speed, memory, values, where, row.words[:60]


def _chart(chart: Chart) -> str:
    of = f" (mean of {chart.num_ranks} ranks)" if chart.num_ranks > 1 else ""
    return f"  {chart.name} {sparkline(chart.curves)} {number(chart.last)}{of}, {chart.when}"


def _group(state: str, ranks: Iterable[int]) -> str:
    known = list(ranks)
    return f"{len(known)} {state} ({rank_ranges(known)})"


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
