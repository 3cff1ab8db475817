"""The trials of a sweep as a table, HTML in the panel's taste and plain text. All of it pure."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nbaccel.session.panel.ansi import plain
from nbaccel.session.panel.figures import clock, number
from nbaccel.session.panel.html import MUTED, RULE, STATES, bar_cell, cell
from nbaccel.session.panel.reading import Row

__all__ = ["Line", "paint_html", "paint_text"]

_STATE_WIDTH, _ARGUMENT_WIDTH, _METRIC_WIDTH = 132, 92, 130
_WAITING = ("#8c8c8c", "○")
_MOST_ARGUMENTS, _MOST_METRICS = 6, 2
_TEXT_WIDTH = 108


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One trial."""

    number: int
    arguments: Any
    """Keyword arguments as a mapping, or the one argument."""
    state: str
    seconds: float
    row: Row | None
    """What its rank 0 is at; None before it began."""
    value: Any
    error: str


def paint_html(lines: Sequence[Line], name: str) -> str:
    """The table for a cell."""
    columns = _columns(lines)
    captions = "".join(
        cell(escape(plain(title)), width)
        for title, width in [("trial", _STATE_WIDTH), *((one, _ARGUMENT_WIDTH) for one in columns)]
    )
    head = (
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 14px;align-items:center"><b style="font-size:14px">'
        f'{escape(plain(name))}</b><span style="{MUTED}">{escape(_summary(lines))}</span></div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:0 12px;font-size:11px;{MUTED}">{captions}</div>'
    )
    body = "".join(_row(line, columns) for line in lines)
    return f'<div style="font-size:13px;line-height:1.45;max-width:1100px">{head}{body}</div>'


def _row(line: Line, columns: Sequence[str]) -> str:
    colour, sign = STATES.get(line.state, _WAITING)
    took = f' <span style="{MUTED}">{clock(line.seconds)}</span>' if line.seconds else ""
    cells = [
        cell(
            f'<b>{line.number}</b> <span style="color:{colour}">{sign}</span> {line.state}{took}',
            _STATE_WIDTH,
        )
    ]
    given = _arguments(line)
    cells += [cell(escape(plain(given.get(name, ""))), _ARGUMENT_WIDTH) for name in columns]
    row = line.row
    if row is not None and row.loop and line.state == "running":
        cells.append(bar_cell(row, named=True))
    if row is not None:
        metrics = " ".join(
            f"{escape(plain(name))} {number(value)}" for name, value in row.metrics[:_MOST_METRICS]
        )
        cells.append(cell(f'<span style="font-size:12px">{metrics}</span>', _METRIC_WIDTH) if metrics else "")
    words = _outcome(line)
    cells.append(
        f'<div style="flex:1 1 140px;min-width:0;overflow-wrap:anywhere">{escape(plain(words))}</div>'
    )
    style = f"display:flex;flex-wrap:wrap;gap:0 12px;align-items:center;padding:2px 0;{RULE}"
    return f'<div style="{style}">{"".join(cells)}</div>'


def _columns(lines: Sequence[Line]) -> list[str]:
    """The arguments worth a column: those that vary; all, when none does."""
    values: dict[str, set[str]] = {}
    for line in lines:
        for name, word in _arguments(line).items():
            values.setdefault(name, set()).add(word)
    varying = [name for name, words in values.items() if len(words) > 1]
    return (varying or list(values))[:_MOST_ARGUMENTS]


def _arguments(line: Line) -> dict[str, str]:
    if isinstance(line.arguments, Mapping):
        return {str(name): _brief(value) for name, value in line.arguments.items()}
    return {"argument": _brief(line.arguments)}


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) and len(value) < 40 else reprlib.repr(value)


def _outcome(line: Line) -> str:
    """What it returned, or why not; while it runs, what it said last."""
    if line.error:
        return line.error
    if line.state == "done":
        if isinstance(line.value, Mapping):
            return "  ".join(f"{name} {_brief(value)}" for name, value in list(line.value.items())[:8])
        return "" if line.value is None else f"→ {_brief(line.value)}"
    return line.row.words[:120] if line.row is not None else ""


def _summary(lines: Sequence[Line]) -> str:
    """How many are in each state."""
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.state] = counts.get(line.state, 0) + 1
    order = ("running", "waiting", "done", "failed", "stopped")
    told = ", ".join(f"{counts[state]} {state}" for state in order if state in counts)
    return f"{len(lines)} trial{'s' if len(lines) != 1 else ''}: {told}"


def paint_text(lines: Sequence[Line], name: str) -> str:
    """The table for a terminal or a log: a line for each trial."""
    columns = _columns(lines)
    table = [("trial", "", "took", *columns, "")]
    for line in lines:
        given = _arguments(line)
        took = clock(line.seconds) if line.seconds else ""
        metrics = "  ".join(
            f"{key} {number(value)}" for key, value in (line.row.metrics if line.row else ())[:2]
        )
        words = "  ".join(filter(None, [metrics, _outcome(line)]))
        table.append((str(line.number), line.state, took, *(given.get(key, "") for key in columns), words))
    table = [tuple(plain(word).replace("\n", " ") for word in row) for row in table]
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    painted = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    cut = [line if len(line) <= _TEXT_WIDTH else line[: _TEXT_WIDTH - 1] + "…" for line in painted]
    return "\n".join([f"{name} · {_summary(lines)}", *(f"  {line}" for line in cut)])
