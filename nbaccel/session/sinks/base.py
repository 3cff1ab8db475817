"""What the relay tells of a run, and to whom: the one seam for displays, logs and trackers."""

from __future__ import annotations

from typing import Protocol, final

from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Recorder", "Sink"]


class Sink(Protocol):
    """Something that shows or keeps what happens. All methods are called on the relay thread."""

    def handle(self, event: Event, state: RunState) -> None:
        """An event, in the order the relay read it, and the state after it."""

    def tick(self, now: float) -> None:
        """Called ten times a second or more while the run lives, whether or not there were events, so
        that what is held back can be shown. `now` is `time.monotonic()`."""

    def close(self, state: RunState) -> None:
        """Show and write all that is held back. May be called twice; nothing follows the first call."""


@final
class Recorder:
    """A sink that keeps all it is told, for tests and for looking at a run from code."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ticks: list[float] = []
        self.final: RunState | None = None
        """The state `close` was called with; None before."""

    def handle(self, event: Event, state: RunState) -> None:
        self.events.append(event)

    def tick(self, now: float) -> None:
        self.ticks.append(now)

    def close(self, state: RunState) -> None:
        self.final = state
