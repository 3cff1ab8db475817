"""No more text in a cell than a page can carry; the rest is in the run folder."""

from __future__ import annotations

import io
from typing import final

from nbaccel.session.lines import repainted
from nbaccel.session.sinks.held import Stream
from nbaccel.session.sinks.text import Write
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Limit"]


@final
class Limit:
    """Writes until `limit` characters stand in the cell, and says at the end how many lines were left out. What has
    been painted over does not count: a bar may run for days.

    A sink too, so that it is closed with the others; it has to come after the one that writes through it.
    """

    def __init__(self, write: Write, limit: int = 400_000) -> None:
        self._write, self._room = write, limit
        self._unfinished = 0  # characters of the last line, which what comes may paint over
        self._left_out = 0
        self._full = self._closed = False

    def __call__(self, text: str, stream: Stream) -> None:
        """What a `TextSink` writes through."""
        if not self._full:
            text = self._write_what_fits(text, stream)
        self._left_out += text.count("\n")

    def _write_what_fits(self, text: str, stream: Stream) -> str:
        """The rest, from the first line on for which there is no room."""
        if "\r" in text.partition("\n")[0]:
            self._unfinished = 0
        ended, newline, unfinished = repainted(text).rpartition("\n")
        length = self._unfinished + len(ended) + len(newline)
        if length + len(unfinished) <= self._room:
            self._write(text, stream)
            if newline:
                self._room, length = self._room - length, 0
            self._unfinished = length + len(unfinished)
            return ""
        self._full = True
        kept = self._whole_lines(text)
        if kept:
            self._write(kept, stream)
        behind = "\n" if self._unfinished and not kept else ""
        self._write(
            f"{behind}… no more is printed here; the panel and run.logs(rank) have the rest\n", "stderr"
        )
        return text[len(kept) :]

    def _whole_lines(self, text: str) -> str:
        """Those there is room for."""
        room, end = self._room - self._unfinished, 0
        for line in io.StringIO(text, newline="\n"):
            room -= len(repainted(line))
            if room < 0 or not line.endswith("\n"):
                break
            end += len(line)
        return text[:end]

    def handle(self, event: Event, state: RunState) -> None:
        pass

    def tick(self, now: float) -> None:
        pass

    def close(self, state: RunState) -> None:
        if self._left_out and not self._closed:
            self._write(f"… {self._left_out} lines are not shown here: run.logs(rank)\n", "stderr")
        self._closed = True
