"""The panel in a terminal: rich's live table below the lines that scroll by."""

from __future__ import annotations

import sys
import time
from typing import Any, final

from nbaccel.session.panel.reading import Heading, Row, View, clock, number, read, size
from nbaccel.session.panel.text import facts, paint_text
from nbaccel.session.sinks.held import Stream
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["TerminalPanel"]

_REPAINT_SECONDS = 0.25
_COLOURS = {"running": "blue", "done": "green", "failed": "red", "lost": "red", "waiting": "magenta"}


@final
class TerminalPanel:
    """A sink that paints the run at the terminal's lower end; text written through `write` goes above it.

    Nothing is painted before there is a loop to show: a run that only prints looks as it always did.
    """

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        self._state: RunState | None = None
        self._live: Any = None
        self._painted = 0.0

    def write(self, text: str, stream: Stream) -> None:
        """Text in the terminal, above the panel while there is one."""
        if self._live is None:
            (sys.stdout if stream == "stdout" else sys.stderr).write(text)
            return
        from rich.text import Text

        whole = text[: text.rfind("\n") + 1].lstrip("\r ")  # a bar that is painted over has no place above
        if whole:
            self._live.console.print(Text.from_ansi(whole), end="")

    def handle(self, event: Event, state: RunState) -> None:
        self._state = state

    def tick(self, now: float) -> None:
        state = self._state
        if now - self._painted < _REPAINT_SECONDS or state is None:
            return
        self._painted = now
        if self._live is None:
            if not any(rank.progress or rank.curves for rank in state.ranks):
                return
            from rich.live import Live

            self._live = Live(auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(_table(read(state, self._heading, time.time())), refresh=True)

    def close(self, state: RunState) -> None:
        if self._live is None:
            return
        live, self._live = self._live, None
        live.stop()
        sys.stdout.write(paint_text(read(state, self._heading, time.time())) + "\n")


def _table(view: View) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for row in view.rows:
        table.add_row(*_cells(row))
    said = [Text(f"! {sentence}", style="yellow") for sentence in view.sentences]
    return Group(Text(" · ".join(facts(view)), style="bold"), *said, table)


def _cells(row: Row) -> list[Any]:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar: Any = ProgressBar(total=row.total, completed=row.step, width=20) if row.total else ""
    total = f"/{row.total}" if row.total else ""
    steps = f"{row.step}{total}" if row.loop else ""
    epoch = f" epoch {row.epoch}" if row.epoch is not None else ""
    speed = f"{number(row.rate, 3)}/s" if row.rate is not None else ""
    left = clock(row.left) if row.left is not None else ""
    memory = size(row.memory) if row.memory is not None else ""
    values = " ".join(f"{name} {number(value)}" for name, value in row.metrics[:3])
    words = Text.from_ansi(row.last_line[:80])
    words.no_wrap, words.overflow = True, "ellipsis"
    state = Text(row.state, style=_COLOURS.get(row.state, "dim"))
    return [str(row.rank), state, bar, Text(steps + epoch), speed, left, Text(values), memory, words]
