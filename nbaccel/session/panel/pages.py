"""A run in its last form: the panel, a report of plain text and of values, an HTML file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbaccel.session.panel import html
from nbaccel.session.panel.failure import error_lines, failed_alike, fates
from nbaccel.session.panel.reading import Heading, Row, View, all_rows, read
from nbaccel.session.panel.text import paint_text
from nbaccel.session.report import CellLabel
from nbaccel.session.state import RunState

__all__ = ["Report", "last_outputs", "page", "panel_bundle", "report"]

_LINES = 40
_OUTPUTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a run: `print` it, or take its values."""

    text: str
    """At most 40 lines."""
    values: Mapping[str, Any]
    """The same facts, of types that JSON has."""

    def to_json(self, indent: int | None = 1) -> str:
        """The values as JSON."""
        return json.dumps(self.values, indent=indent, allow_nan=False)

    def __repr__(self) -> str:
        return self.text


def report(state: RunState, heading: Heading, label: CellLabel, asked: Mapping[str, Any]) -> Report:
    """The report of a run as it is now.

    Args:
        asked: the options of the launch, for the line that tells how to run it again.
    """
    view = read(state, heading, time.time())
    error = error_lines(state, label, colour=False)
    again = how_to_repeat(heading.name, view.num_ranks, asked)
    hints = [*([f"  logs: {heading.folder}"] if heading.folder else []), f"  again: {again}"]
    values = {
        "name": heading.name,
        "state": view.situation,
        "started": state.started,
        "seconds": view.elapsed,
        "ranks": [_rank(row, state) for row in all_rows(state, time.time())],
        "metrics": {
            name: _finite(value)
            for name, value in [*((chart.name, chart.last) for chart in view.charts), *view.others]
        },
        "sentences": list(view.sentences),
        "scaling_efficiency": view.efficiency,
        "stall": state.stall or None,
        "error": _failure(state, label, error),
        "folder": heading.folder,
        "again": again,
    }
    return Report(text=paint_text(view, error=error, hints=hints), values=values)


def _failure(state: RunState, label: CellLabel, lines: Sequence[str]) -> dict[str, Any] | None:
    ranks = failed_alike(state)
    if not lines:
        return None
    return {
        "rank": ranks[0] if ranks else None,
        "ranks": list(ranks),
        "lines": list(lines),
        "others": fates(state, label),
    }


def how_to_repeat(name: str, num_ranks: int, asked: Mapping[str, Any]) -> str:
    """The call that launches the same again."""
    given = {
        "num_processes": num_ranks,
        **asked,
        "sources": None,
    }  # the configuration's own note of who asked
    words = [f"{option}={value!r}" for option, value in given.items() if value not in (None, (), [], {})]
    return f"notebook_launcher({name}, args=…, {', '.join(words)})"


def page(state: RunState, heading: Heading, label: CellLabel) -> str:
    """An HTML file of its own that shows the run."""
    view = read(state, heading, time.time())
    content = html.panel(view, error=error_lines(state, label), outputs=last_outputs(state, view))
    return html.document(view, content)


def panel_bundle(state: RunState, heading: Heading, label: CellLabel) -> dict[str, str]:
    """The panel by MIME type."""
    view = read(state, heading, time.time())
    plain = paint_text(view, error=error_lines(state, label, colour=False))
    content = html.panel(view, error=error_lines(state, label), outputs=last_outputs(state, view))
    return {"text/html": content, "text/plain": plain}


def last_outputs(state: RunState, view: View) -> list[tuple[int, Sequence[str]]]:
    """The last lines of the ranks that have a row; of a run that only printed none: its text says it all."""
    if not any(row.loop for row in view.rows) and not view.charts and state.failure is None:
        return []
    return [(row.rank, state.ranks[row.rank].last_lines(_LINES)) for row in view.rows[:_OUTPUTS]]


def _rank(row: Row, state: RunState) -> dict[str, Any]:
    known = state.ranks[row.rank]
    return {
        "rank": row.rank,
        "state": row.state,
        "detail": row.detail,
        "exitcode": known.exitcode,
        "step": row.step,
        "total": row.total,
        "epoch": row.epoch,
        "steps_per_second": row.rate,
        "step_time_shares": dict(row.parts),
        "metrics": {name: _finite(value) for name, value in row.metrics},
        "memory": row.memory,
        "device_memory": row.device_memory,
        "utilization": row.utilization,
        "last_line": row.last_line,
    }


def _finite(value: float) -> float | str:
    """JSON has no infinities."""
    return value if value - value == 0 else str(value)
