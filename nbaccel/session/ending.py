"""How a run comes to its end once something asked for it: which signal is due when."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal, final

__all__ = ["Ending", "Limits", "Reason"]

Reason = Literal["returned", "failed", "interrupted", "timeout", "killed"]

# A rank that ignores SIGTERM has this long to change its mind.
_AFTER_SIGTERM = 0.2
# Exit handlers (a tracker's last upload) get longer than a rank that must not disturb the others' error.
_EXIT_HANDLERS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long things may take, in seconds."""

    start: float = 60.0
    """From the run's own process to the last rank being ready."""
    grace: float = 1.0
    """For the other ranks after a failure, and for all after an interrupt."""
    run: float | None = None
    """For the call; None is for ever."""


@dataclass(frozen=True, slots=True)
class _Due:
    at: float
    signal: signal.Signals


@final
class Ending:
    """The schedule of signals to ranks that do not end by themselves.

    Args:
        grace: seconds the ranks have to end by themselves after a failure or an interrupt.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._due: list[_Due] = []
        self.reason: Reason | None = None
        self.began: float | None = None

    def begin(self, reason: Reason, now: float) -> None:
        """Start to end for this reason; a later, harsher one takes over from "returned"."""
        if self.reason is None or self.reason == "returned" or reason == "killed":
            if self.reason is None or self.reason == "returned":
                self.reason = reason
            self.began = now
            grace = {"returned": _EXIT_HANDLERS, "killed": 0.0}.get(reason, self._grace)
            self._due = [
                _Due(now + grace, signal.SIGTERM),
                _Due(now + grace + _AFTER_SIGTERM, signal.SIGKILL),
            ]
            if reason == "killed":
                self._due = [_Due(now, signal.SIGKILL)]
            elif reason in ("interrupted", "timeout"):
                self._due.insert(0, _Due(now, signal.SIGINT))

    def next_at(self) -> float | None:
        """When the next signal is due; None when none is."""
        return self._due[0].at if self._due else None

    def take_due(self, now: float) -> signal.Signals | None:
        """The signal that is due now, once."""
        if self._due and self._due[0].at <= now:
            return self._due.pop(0).signal
        return None
