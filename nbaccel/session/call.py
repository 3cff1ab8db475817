"""One call on its way: who is asked, who shows it, what came back, and how it ends."""

from __future__ import annotations

import contextvars
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, Literal, final

from nbaccel.errors import NbaccelError, WorkerError
from nbaccel.session.ending import Ending, Limits, Reason
from nbaccel.session.outcome import Ended, conclude
from nbaccel.session.report import CellLabel, Outcome, first_failures
from nbaccel.session.results import Results
from nbaccel.session.sinks.base import Sink
from nbaccel.session.state import RunState, fold, new_state
from nbaccel.session.watch import Stall
from nbaccel.wire import payload
from nbaccel.wire.events import (
    Applied,
    CommMessage,
    Concluded,
    Died,
    Display,
    Event,
    InputRequest,
    Output,
    Raised,
    Returned,
)

__all__ = ["CallInFlight", "Delivery"]

_FORGOTTEN: Future[Results] = Future()
_FORGOTTEN.cancel()
_SHOWN = (Output, Display, CommMessage, InputRequest)
# A failed call tells its cell by then, whatever the other ranks are at.
_TOLD_BY = 1.2
_PROBLEM = 4000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The call on its way: what, and whose value is wanted."""

    parcel: payload.Parcel
    fd: int | None
    returns: Literal["all", "rank0", "none"]


@final
class CallInFlight:
    """A call from the moment it is asked for until its future is resolved. All but `future` belongs to the
    relay's thread.

    Args:
        delivery: what to call; its descriptor is closed at the end.
        sinks: shown every event of the call, and closed at its end.
        late_sinks: makes more of them when there is something to show; many calls show nothing.
        num_ranks: ranks of the group.
        ranks: those that are to run it; None is all.
        keep: whether the ranks stay when it is over.
        say: tells the person one sentence, where the call was made.
        label: what the front end calls a file a cell was compiled from.
        folder: the run's folder, for messages.
        expected: options some Accelerator must say it applied, with what to tell the person if none does.
    """

    def __init__(
        self,
        delivery: Delivery,
        sinks: Sequence[Sink],
        *,
        num_ranks: int,
        limits: Limits,
        say: Callable[[str], None],
        label: CellLabel = lambda _: None,
        ranks: Collection[int] | None = None,
        keep: bool = False,
        folder: str | None = None,
        expected: Mapping[str, str] | None = None,
        late_sinks: Callable[[], Sequence[Sink]] | None = None,
    ) -> None:
        self.future: Future[Results] = Future()
        self.delivery, self.limits, self.label = delivery, limits, label
        self._say = say
        self.ranks = tuple(range(num_ranks)) if ranks is None else tuple(sorted(set(ranks)))
        self.keep = keep
        self.id = -1
        """Its number in the group, once it has begun."""
        self.state = new_state(num_ranks, time.time())
        self.ending = Ending(limits.grace, keep=keep)
        self.deadline: float | None = None
        """When it has run for as long as it may."""
        self.failures: dict[int, Raised | Died] = {}
        self.values: dict[int, tuple[payload.Parcel | None, int | None]] = {}
        self.errors: dict[int, tuple[payload.Parcel, int | None]] = {}
        self.signalled: dict[int, signal.Signals] = {}
        self.startup_error: NbaccelError | None = None
        self.posts: list[tuple[Any, Collection[int] | None]] = []
        """Messages for its ranks that were sent before it began."""
        self.stall: Stall | None = None
        """The latest thing that was told of ranks that wait."""
        self.unread: BrokenPipeError | None = None
        """Nobody reads any more what the ranks print: as for any program in a pipe, that is the end."""
        self.notes: list[str] = []
        """What the error's last lines say besides: ranks that were replaced, replicas that differ."""
        self._sinks = list(sinks)
        self._late_sinks = late_sinks
        self._folder = folder
        self._expected = dict(expected or {})
        self._closed = False
        self._conclusion: Concluded | None = None
        # what a sink prints appears in the cell that made the call, whichever made the thread
        self.context = contextvars.copy_context()

    def begin(self, number: int, state: RunState, now: float) -> None:
        """The ranks are told now."""
        self.id, self.state = number, state
        self.deadline = None if self.limits.run is None else now + self.limits.run

    def wants_value(self, rank: int) -> bool:
        """Whether this rank's value is to come back."""
        return self.delivery.returns == "all" or (self.delivery.returns == "rank0" and rank == self.ranks[0])

    def take(self, event: Returned | Raised | Died, fds: Sequence[int]) -> Reason | None:
        """A rank's answer, or its end; what the call now has to end for."""
        rank, fd = event.rank, fds[0] if fds else None
        if isinstance(event, Returned):
            self.values[rank] = (event.value, fd)
            return None if self.unanswered() else "returned"
        if isinstance(event, Died):
            if rank in self.values or rank in self.failures:
                return None
            self.failures[rank] = event
            return "failed" if self.ending.reason in (None, "returned") else None
        self.failures[rank] = event
        if event.error is not None:
            self.errors[rank] = (event.error, fd)
        return "failed"

    def say(self, note: str) -> None:
        """Tell the person one sentence, in the cell that made the call."""
        self.context.run(self._say, note)

    def causes(self) -> tuple[int, ...]:
        """The rank whose failure is taken for the cause of the others, then those that failed the same way."""
        if not self.failures:
            return ()
        outcome = Outcome(
            num_ranks=len(self.state.ranks),
            failures=self.failures,
            ended_by_us=self.signalled,
            ranks=self.ranks,
        )
        return first_failures(outcome)

    def unanswered(self) -> list[int]:
        """The ranks that still run it."""
        return [rank for rank in self.ranks if rank not in self.values and rank not in self.failures]

    def handle(self, event: Event, state: RunState) -> None:
        """Show an event."""
        self.state = state if self._conclusion is None else fold(state, self._conclusion)
        if isinstance(event, Applied):
            self._expected.pop(event.option, None)
        elif self._late_sinks is not None and isinstance(event, _SHOWN):
            self._make_late_sinks(self._late_sinks)
        if self._sinks:
            self._tell_sinks(lambda sink: sink.handle(event, state))

    def _make_late_sinks(self, make: Callable[[], Sequence[Sink]]) -> None:
        self._late_sinks = None
        try:
            self._sinks += self.context.run(make)
        except Exception as error:  # noqa: BLE001  # whatever a front end may raise
            self.say(f"nothing is shown ({type(error).__name__}: {error}); the run goes on")

    def tick(self, now: float) -> None:
        """Let the sinks show what they held back."""
        self._tell_sinks(lambda sink: sink.tick(now))

    def next_at(self) -> float | None:
        """When something is due by itself, once it is to end."""
        due = [at for at in (self.ending.next_at(), self._told_by()) if at is not None]
        return min(due, default=None)

    def must_be_told(self, now: float) -> bool:
        """Whether a failure has been kept from the person for long enough."""
        told_by = self._told_by()
        return told_by is not None and now >= told_by

    def _told_by(self) -> float | None:
        if not self.keep or self._closed or self.ending.reason != "failed" or self.ending.began is None:
            return None
        return self.ending.began + _TOLD_BY

    def resolve(self, problem: BaseException | None = None) -> None:
        """Close the sinks, then hand out the values or the error; once. Raises nothing: whatever goes wrong here is
        for whoever waits, and must not keep the calls behind this one waiting."""
        if self._closed:
            return
        self._closed, self._late_sinks = True, None
        outcome: Results | BaseException
        try:
            outcome = problem or conclude(self._ended(), self.label)
            if self.ending.reason == "interrupted" and self.unread is not None:
                outcome = self.unread
        except BaseException as error:  # noqa: BLE001  # a value that cannot be loaded: the caller is told
            outcome = error
        try:
            self._close(outcome)
        except BaseException as error:  # noqa: BLE001  # a defect of ours: the caller is told, if of nothing worse
            outcome = outcome if isinstance(outcome, BaseException) else error
        future = self.future
        try:
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        except InvalidStateError:
            pass  # it was forgotten meanwhile

    def _close(self, outcome: Results | BaseException) -> None:
        """Let go of what came and was sent, and show the end."""
        for _, fd in (*self.values.values(), *self.errors.values()):
            if fd is not None:
                os.close(fd)
        if self.delivery.fd is not None:
            os.close(self.delivery.fd)
        self._conclude(outcome)
        self._tell_sinks(lambda sink: sink.close(self.state))
        if isinstance(outcome, Results):
            for complaint in self._expected.values():
                self.say(complaint)

    def _conclude(self, outcome: Results | BaseException) -> None:
        """The state says that it is over, and why, where no rank has."""
        hung = self.stall.text if self.ending.reason == "hung" and self.stall is not None else ""
        told = isinstance(outcome, (Results, KeyboardInterrupt)) or (
            isinstance(outcome, WorkerError) and not hung
        )
        problem = "" if told else (hung or str(outcome))[:_PROBLEM]
        if problem or self.state.ended is None:
            self._conclusion = Concluded(rank=self.ranks[0], problem=problem)
            self.handle(self._conclusion, self.state)

    @property
    def resolved(self) -> bool:
        """Whether the person has been told."""
        return self._closed

    def forget(self) -> None:
        """Keep the values no longer, once it has ended."""
        self.future = _FORGOTTEN

    def _ended(self) -> Ended:
        return Ended(
            num_ranks=len(self.state.ranks),
            ranks=self.ranks,
            reason=self.ending.reason,
            startup_error=self.startup_error,
            failures=self.failures,
            signalled=self.signalled,
            values=self.values,
            errors=self.errors,
            last_words={rank: self.state.ranks[rank].last_lines(20) for rank in self.failures},
            limits=self.limits,
            folder=self._folder,
            hung=self.stall,
            keep=self.keep,
            notes=tuple(self.notes),
        )

    def _tell_sinks(self, tell: Callable[[Sink], Any]) -> None:
        """In the cell that made the call."""
        self.context.run(self._tell_each, tell)

    def _tell_each(self, tell: Callable[[Sink], Any]) -> None:
        """A display that fails is dropped, with a word; the ranks' work goes on."""
        for sink in tuple(self._sinks):
            try:
                tell(sink)
            except BrokenPipeError as error:
                self._sinks.remove(sink)
                why = "whoever read what the ranks print has left; the run was interrupted"
                self.unread = BrokenPipeError(error.errno, why)
            except Exception as error:  # noqa: BLE001  # whatever a display or a disk may raise
                self._sinks.remove(sink)
                self._say(f"{type(sink).__name__} stopped ({type(error).__name__}: {error}); the run goes on")
