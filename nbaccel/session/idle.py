"""A session's ranks between two calls: what they print is shown, and after long they are ended."""

from __future__ import annotations

import contextvars
import time
from typing import final

from nbaccel.session.sinks.base import Sink
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Idle"]

# What is held back to be folded has been shown by then.
_SHOWN = 0.5


@final
class Idle:
    """Belongs to the relay's thread; `since` may be read by others.

    Args:
        sink: shown what comes while no call is under way.
        limit: seconds without a call after which the group ends by itself; None is never.

    Attributes:
        since: when the last call ended, by `time.monotonic()`.
    """

    def __init__(self, sink: Sink | None, limit: float | None) -> None:
        self._sink = sink
        self.limit = limit
        self.since = time.monotonic()
        self._context = contextvars.copy_context()
        self._busy_until = 0.0

    def follow(self, context: contextvars.Context) -> None:
        """From now on what comes appears in the cell of this call."""
        self._context = context

    def handle(self, event: Event, state: RunState) -> None:
        """Show an event."""
        if self._sink is not None:
            self._context.run(self._sink.handle, event, state)
            self._busy_until = time.monotonic() + _SHOWN

    def tick(self, now: float) -> None:
        """Show what was held back."""
        if self._sink is not None:
            self._context.run(self._sink.tick, now)

    def must_tick(self, now: float) -> bool:
        """Whether something may be held back."""
        return now < self._busy_until

    @property
    def ends_at(self) -> float | None:
        """When the group is to end if no call comes."""
        return None if self.limit is None else self.since + self.limit

    def close(self, state: RunState) -> None:
        """Show and let go of everything."""
        if self._sink is not None:
            self._sink.close(state)
