"""No more text in a cell than a page can carry; the rest is in the run folder."""

from __future__ import annotations

from typing import final

from nbaccel.session.sinks.held import Stream
from nbaccel.session.sinks.text import Write
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Limit"]


@final
class Limit:
    """Writes until `limit` characters have been written, and says at the end how many lines were left out.

    A sink too, so that it is closed with the others; it has to come after the one that writes through it.
    """

    def __init__(self, write: Write, limit: int = 400_000) -> None:
        self._write, self._room = write, limit
        self._left_out = 0
        self._closed = False

    def __call__(self, text: str, stream: Stream) -> None:
        """What a `TextSink` writes through."""
        if self._room > 0:
            kept = text if len(text) <= self._room else text[: text.rfind("\n", 0, self._room) + 1]
            self._room = self._room - len(text)
            text = text[len(kept) :]
            if kept:
                self._write(kept, stream)
            if text:
                note = "… no more is printed here; the panel and run.logs(rank) have the rest\n"
                self._write(note, "stderr")
        self._left_out += text.count("\n")

    def handle(self, event: Event, state: RunState) -> None:
        pass

    def tick(self, now: float) -> None:
        pass

    def close(self, state: RunState) -> None:
        if self._left_out and not self._closed:
            self._write(f"… {self._left_out} lines are not shown here: run.logs(rank)\n", "stderr")
        self._closed = True
