"""How a call, or a group of ranks, comes to its end once something asked for it: what is due when."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal, final

__all__ = ["Action", "Ending", "Limits", "Reason"]

Reason = Literal["returned", "failed", "interrupted", "timeout", "hung", "killed"]

Action = signal.Signals | Literal["ask", "free"]
"""A signal to the ranks, "ask" for those that can be interrupted at a step of all, "free" for those that wait in a
collective."""

# A rank that ignores SIGTERM has this long to change its mind.
_AFTER_SIGTERM = 0.2
# Exit handlers (a tracker's last upload) get longer than a rank that must not disturb the others' error.
_EXIT_HANDLERS = 30.0
# In a session the peers of a failed rank finish what they are at, are interrupted, and are freed.
_PEERS_GO_ON = 0.3
_AFTER_SIGINT = 0.2
# Who asks for this waits for a step; the other reasons are that ranks take none.
_ASKED: tuple[Reason, ...] = ("interrupted", "timeout")
# A collective that torch gives up raises in the rank; only where that ends nothing is the call ended.
_AFTER_TORCH = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long things may take, in seconds."""

    start: float = 60.0
    """From the run's own process to the last rank being ready."""
    grace: float = 1.0
    """For the other ranks after a failure, and for all after an interrupt."""
    run: float | None = None
    """For the call; None is for ever."""
    stall: float = 30.0
    """Until ranks that wait for one another are told with their stacks; 0 never."""
    hang: float = 1800.0
    """Until the call is ended because they still wait; nothing ends it when nobody looks (`stall` is 0)."""

    @classmethod
    def hang_after(cls, collective_timeout: float | None) -> float:
        """`hang` for this option: torch, which was given it too, has the first word."""
        return 1800.0 if collective_timeout is None else collective_timeout + _AFTER_TORCH


@dataclass(frozen=True, slots=True)
class _Due:
    at: float
    action: Action


@final
class Ending:
    """The schedule of what is done to ranks that do not end by themselves.

    Args:
        grace: seconds the ranks have to end by themselves after a failure or an interrupt.
        keep: whether the ranks stay when the call is over: they are interrupted, then freed from the
            collective they wait in, and only then killed.
    """

    def __init__(self, grace: float, *, keep: bool = False) -> None:
        self._grace = grace
        self._keep = keep
        self._due: list[_Due] = []
        self.reason: Reason | None = None
        self.began: float | None = None
        self.urged: float | None = None
        """When the ranks were last told to end."""

    def begin(self, reason: Reason, now: float, *, ask: bool = False) -> None:
        """Start to end for this reason; a later, harsher one takes over from "returned".

        Args:
            ask: ranks that stay are asked to be interrupted at one step, and are signalled after the grace.
        """
        if self.reason is None or self.reason == "returned" or reason == "killed":
            if self.reason is None or self.reason == "returned":
                self.reason = reason
            self.began = self.urged = now
            steps = self._last(reason)
            if self._keep:
                steps = self._asked(reason) if ask else self._kept(reason)
            self._plan(now, steps)

    def _plan(self, now: float, steps: list[tuple[float, Action]]) -> None:
        self._due = [_Due(now + after, action) for after, action in steps]

    def insist(self, now: float) -> bool:
        """Wait no longer for ranks that were asked; whether they still were waited for."""
        waits = self._keep and self.reason in _ASKED and any(d.action == signal.SIGINT for d in self._due)
        if waits and self.reason is not None:
            self.urged = now
            self._plan(now, self._kept(self.reason))
        return waits

    def _last(self, reason: Reason) -> list[tuple[float, Action]]:
        """The steps that end ranks for good."""
        if reason == "killed":
            return [(0.0, signal.SIGKILL)]
        grace = _EXIT_HANDLERS if reason == "returned" else self._grace
        first: list[tuple[float, Action]] = (
            [(0.0, signal.SIGINT)] if reason in ("interrupted", "timeout", "hung") else []
        )
        return [*first, (grace, signal.SIGTERM), (grace + _AFTER_SIGTERM, signal.SIGKILL)]

    def _kept(self, reason: Reason) -> list[tuple[float, Action]]:
        """The steps that make ranks stop a call and stay."""
        if reason == "returned":
            return []
        if reason == "killed":
            return [(0.0, signal.SIGKILL)]
        first = _PEERS_GO_ON if reason == "failed" else 0.0
        free = first + _AFTER_SIGINT
        return [(first, signal.SIGINT), (free, "free"), (free + self._grace, signal.SIGKILL)]

    def _asked(self, reason: Reason) -> list[tuple[float, Action]]:
        """The same, for ranks that can stop at one step."""
        steps = self._kept(reason)
        if reason not in _ASKED:
            return steps
        return [(0.0, "ask"), *((self._grace + after, action) for after, action in steps)]

    def next_at(self) -> float | None:
        """When the next action is due; None when none is."""
        return self._due[0].at if self._due else None

    def take_due(self, now: float) -> Action | None:
        """The action that is due now, once."""
        if not self._due or self._due[0].at > now:
            return None
        action = self._due.pop(0).action
        if action == signal.SIGINT:
            self.urged = now
        return action
