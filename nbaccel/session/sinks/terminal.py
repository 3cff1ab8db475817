"""The panel in a terminal: rich's live table below the lines that scroll by."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, final

from nbaccel.session.lines import repainted
from nbaccel.session.panel.figures import clock, number, scaled, size
from nbaccel.session.panel.reading import Heading, Row, View, read
from nbaccel.session.panel.text import facts, paint_text
from nbaccel.session.sinks.held import Stream
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["TerminalPanel"]

_REPAINT_SECONDS = 0.25
# A line that goes on and on is cut here, in characters.
_LONGEST = 1 << 16
_COLOURS = {"running": "blue", "done": "green", "failed": "red", "lost": "red", "waiting": "magenta"}


@final
class TerminalPanel:
    """A sink that paints the run at the terminal's lower end; text written through `write` goes above it.

    Nothing is painted before there is a loop to show: a run that only prints looks as it always did.
    """

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        self._state: RunState | None = None
        self._lock = threading.RLock()  # the relay's thread paints and writes, the main one asks questions
        self._live: Any = None
        self._unfinished: dict[Stream, str] = {"stdout": "", "stderr": ""}
        self._began = self._aside = self._closed = False
        self._painted = 0.0

    def write(self, text: str, stream: Stream) -> None:
        """Text in the terminal, above the panel while there is one; stderr in its file where it has another."""
        file = sys.stdout if stream == "stdout" else sys.stderr
        with self._lock:
            if self._began:
                text = self._take_lines(text, stream)
            if self._live is None or not file.isatty():
                file.write(text)
                file.flush()
            elif text:
                from rich.text import Text

                self._live.console.print(Text.from_ansi(text), end="")

    def _take_lines(self, text: str, stream: Stream) -> str:
        """The lines that are whole by now: a bar, painted over again and again, has no place above the panel."""
        lines, newline, self._unfinished[stream] = repainted(self._unfinished[stream] + text).rpartition("\n")
        if len(self._unfinished[stream]) > _LONGEST:
            lines, newline = lines + newline + self._unfinished[stream], "\n"
            self._unfinished[stream] = ""
        return lines + newline

    def handle(self, event: Event, state: RunState) -> None:
        self._state = state

    def tick(self, now: float) -> None:
        state = self._state
        if now - self._painted < _REPAINT_SECONDS or state is None:
            return
        self._painted = now
        with self._lock:
            if not (self._aside or self._closed) and any(
                rank.progress or rank.curves for rank in state.ranks
            ):
                self._paint(state)

    def _paint(self, state: RunState) -> None:
        if self._live is None:
            from rich.live import Live

            # what others print goes above the table too, but for what is not printed to the terminal
            self._live = Live(auto_refresh=False, transient=True, redirect_stderr=sys.stderr.isatty())
            self._live.start()
            self._began = True
        self._live.update(_table(read(state, self._heading, time.time())), refresh=True)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While it is entered nothing is painted: somebody is asked something."""
        with self._lock:
            self._aside = True
            self._end_painting()
        try:
            yield
        finally:
            with self._lock:
                self._aside = False

    def _end_painting(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def close(self, state: RunState) -> None:
        with self._lock:
            self._end_painting()
            if self._began and not self._closed:
                sys.stdout.write(paint_text(read(state, self._heading, time.time())) + "\n")
            self._closed = True


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
    steps = row.steps if row.loop else ""
    epoch = f" epoch {row.epoch}" if row.epoch is not None else ""
    around = "".join(f" {words}" for words in row.outer)
    speed = "".join(scaled(row.rate, row.divisor, 3)) + "/s" if row.rate is not None else ""
    left = clock(row.left) if row.left is not None else ""
    memory = size(row.memory) if row.memory is not None else ""
    values = " ".join(f"{name} {number(value)}" for name, value in row.metrics[:3])
    words = Text.from_ansi(row.words[:80])
    words.no_wrap, words.overflow = True, "ellipsis"
    state = Text(row.state, style=_COLOURS.get(row.state, "dim"))
    return [str(row.rank), state, bar, Text(steps + epoch + around), speed, left, Text(values), memory, words]
