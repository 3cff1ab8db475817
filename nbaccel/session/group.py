"""A group of ranks as processes: how they come up, what is known of them, how one is replaced, how all end.

        starting ──→ ready ──→ leaving ──→ stopping ──→ over
           ↑ session's ↓          ↓            ↑
           └─ recovery ┘        parked ────────┘    (any of them: given up, or whoever made the ranks is gone)

Who uses the ranks, `calls`, is told what they answer and when one is lost, and says when they are to leave.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol, final

from nbaccel.engines.base import Control, Engine, Exited, Failed, Opening, Respawned, Retry, Started
from nbaccel.errors import LaunchError, NbaccelError
from nbaccel.rank.spec import RunSpec
from nbaccel.session.call import Delivery
from nbaccel.session.fates import (
    cause_of_exit,
    late_server,
    late_start,
    lost_parent,
    opening_failure,
)
from nbaccel.session.ranks import Ranks
from nbaccel.session.recovery import Recovery
from nbaccel.session.report import CellLabel
from nbaccel.session.resources import oom_kills
from nbaccel.session.state import RunState, fold, made_whole, new_state
from nbaccel.session.watch import Watch
from nbaccel.wire.events import Died, Display, Event, InputRequest, Joined, Output, Raised, Returned, Status

__all__ = ["Group", "User"]

Phase = Literal["starting", "ready", "leaving", "parked", "stopping", "over"]

# Importing torch in a cold server, on a slow disk: no fault of the ranks.
_SERVER_START = 300.0
_GONE = 30.0
_WITH_US = "the kernel or process that launched it has ended"


class User(Protocol):
    """Whoever uses a group's ranks. All methods are called on the relay's thread."""

    def show(self, event: Event, state: RunState) -> None:
        """An event, and the state after it."""

    def on_ready(self, notes: Sequence[str]) -> None:
        """All ranks are there and wait; what a person must know of how they came to be."""

    def on_failed_start(self, event: Raised | Died) -> None:
        """A rank did not come up."""

    def on_answer(self, event: Returned | Raised, fds: Sequence[int]) -> None:
        """A rank's call has ended; the descriptors are of its value."""

    def on_death(self, event: Died) -> None:
        """The process of a rank that was there has ended."""

    def ends_on_request(self) -> bool:
        """Whether a person has interrupted or killed the call under way."""
        ...

    def fates(self) -> dict[int, str]:
        """How the call of each rank ended, of those whose call has; asked on any thread."""
        ...


@final
class Group:
    """Belongs to the relay's thread; `state` and `phase` may be read by others.

    Args:
        engine: makes and ends the ranks.
        spec: the group.
        delivery: what the ranks are given at their start.
        user: who is told.
        start_limit: seconds until all ranks must be ready.
        say: tells the person one sentence about the group.
        label: what the front end calls a file a cell was compiled from.

    Attributes:
        ready: resolved when the ranks are first ready, or will never be.
        state: what is known of the ranks.
        phase: where the group is on its way.
        deadline: when this phase is to have ended, by `time.monotonic()`.
        error: why the group was given up; None while it was not.
        ranks: what they are told and what is done to them.
        watch: sees ranks that wait.
        recovery: what is known of the ranks' process group.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        delivery: Delivery,
        user: User,
        *,
        start_limit: float,
        say: Callable[[str], None],
        label: CellLabel,
    ) -> None:
        self.ready: Future[None] = Future()
        self.state = new_state(spec.num_processes, time.time())
        self.phase: Phase = "starting"
        self.deadline: float | None = time.monotonic() + _SERVER_START
        self.error: NbaccelError | None = None
        self.recovery = Recovery(spec.num_processes)
        self._spec, self._user, self._say, self._label = spec, user, say, label
        self._start_limit = start_limit
        self._opened = self._made_again = self._came_up = False
        self._retries: list[Retry] = []
        self._oom_kills, _ = oom_kills()
        first_rank = 0 if spec.host is None else spec.host.first_rank
        self.watch = Watch(spec.num_processes, ended=user.fates, first_rank=first_rank, label=label)
        self.ranks = Ranks(
            engine,
            spec,
            delivery,
            on_control=self._on_control,
            on_rank=self._on_rank,
            on_output=lambda rank, stream, data: self.fold(Output(rank=rank, stream=stream, data=data)),
        )
        self._tell_notes()

    # ── what is known ─────────────────────────────────────────────────────────────────────────────

    def fold(self, event: Event) -> None:
        """Learn from an event, and show it."""
        self.state = fold(self.state, event)
        self._user.show(event, self.state)

    def living(self) -> list[int]:
        """The ranks whose process has not ended, as far as we know."""
        return [known.rank for known in self.state.ranks if known.exitcode is None]

    @property
    def gone(self) -> bool:
        """Whether nothing is left to wait for. Before the run's own process exists that is at once: it will find
        us gone."""
        return self.phase == "stopping" and (not self._opened or self.ranks.parent_gone)

    # ── phases ────────────────────────────────────────────────────────────────────────────────────

    def enter(self, phase: Phase, seconds: float | None = None) -> None:
        """Begin a phase; `seconds` until something is done about its not having ended."""
        self.phase = phase
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def on_time(self, now: float) -> None:
        """Do what is due; `now` is `time.monotonic()`.

        Raises:
            LaunchError: whoever made the ranks does not end.
        """
        if self.deadline is None or now <= self.deadline:
            return
        if self.phase == "starting" and not self._opened:
            self.give_up(late_server(_SERVER_START, self.ranks.log()))
        elif self.phase == "starting":
            self.give_up(late_start(self.state, self._start_limit))
        elif self.phase == "stopping":
            raise LaunchError(f"the run's own process did not end in {_GONE:g} s.\n{self.ranks.log()}")

    def free(self, rank: int) -> None:
        """Break the connections a rank waits on for the others; the process group is made again afterwards."""
        others = [k.pid for k in self.state.ranks if k.pid is not None and k.rank != rank]
        self.watch.free(rank, others)

    def recover(self, *, everyone: bool = False) -> list[str]:
        """Replace the ranks that are lost, and make the process group of all again; what a person must know."""
        lost = [known.rank for known in self.state.ranks if everyone or known.exitcode is not None]
        order = self.recovery.begin(lost)
        if order is None:
            self.give_up(LaunchError("the ranks were lost again and again while they came up"))
            return []
        self.enter("starting", self._start_limit)
        self.state = made_whole(self.state, lost)
        for rank in range(self._spec.num_processes):
            if rank in lost:
                self.watch.drop(rank)
                self.ranks.replace(rank, order.generation)
            else:
                self.ranks.send(rank, order)
        return [self.recovery.name_lost(lost)] if lost else []

    def fail(self, error: NbaccelError) -> None:
        """This is why the group ends, unless another error was before it."""
        self.error = self.error or error

    def give_up(self, error: NbaccelError) -> None:
        """End it for this reason."""
        self.fail(error)
        self.stop()

    def stop(self) -> None:
        """Let the run's own process end whatever is left, and wait for its end."""
        self.enter("stopping", _GONE)
        self.ranks.stop()

    def finish(self, problem: BaseException | None) -> None:
        """Close everything. `problem`: of the thread that read them."""
        if problem is None:
            for rank in range(self._spec.num_processes):
                self.ranks.wires.drain_output(rank)
        self.enter("over")
        self.watch.close()
        self.ranks.wires.close()

    # ── what whoever makes them says ──────────────────────────────────────────────────────────────

    def _on_control(self) -> None:
        for message in self.ranks.news():
            if isinstance(message, Retry):
                self._retries.append(message)
                self._make_again()
                return
            self._on_news(message)
        if self.ranks.parent_gone:
            self.ranks.wires.forget_control()
            at_fault = self._opened and not self.ranks.server_lost()
            if self.phase == "starting" and not at_fault and not self._made_again:
                self._make_again()  # the launch met a server that was just being killed
            elif self.phase != "stopping":
                self._on_lost_parent()

    def _on_news(self, message: Control) -> None:
        if isinstance(message, Opening):
            self._opened = True
            self.deadline = time.monotonic() + self._start_limit
        elif isinstance(message, Failed):
            self.give_up(opening_failure(message, self._label))
        elif isinstance(message, Started):
            for rank, pid in enumerate(message.pids):
                self._on_pid(rank, pid)
        elif isinstance(message, Respawned):
            self.recovery.respawned(message.rank)
            self._on_pid(message.rank, message.pid)
        elif isinstance(message, Exited) and not self.recovery.is_replacing(message.rank):
            self._on_exit(message)

    def _on_pid(self, rank: int, pid: int) -> None:
        if self.state.ranks[rank].state == "starting":  # a quick rank has said "idle" before its parent this
            self.fold(Status(rank=rank, state="starting", pid=pid))

    def _make_again(self) -> None:
        """The same group again, made in the way the retries say."""
        self._made_again = True
        self.ranks.make_again(self._retries)
        self._tell_notes()

    def _on_lost_parent(self) -> None:
        """Whoever made the ranks is gone, and so are they."""
        starting = self.phase == "starting"
        if starting or self._spec.keep:
            self.fail(lost_parent(self.ranks.log(), starting=starting))
        self.enter("stopping", _GONE)
        for rank in self.living():
            gone = "the process that made it is gone"
            self._on_exit(Exited(rank, -signal.SIGKILL, _WITH_US if _we_leave() else gone))

    def _tell_notes(self) -> None:
        for note in self.ranks.notes:
            self._say(note)

    # ── what the ranks say ────────────────────────────────────────────────────────────────────────

    def _on_rank(self, rank: int) -> None:
        for event, fds in self.ranks.wires.events(rank):
            object.__setattr__(event, "rank", rank)  # it came just now: nobody else has it
            self._on_event(event, fds)

    def _on_event(self, event: Event, fds: list[int]) -> None:
        rank = event.rank
        if isinstance(event, (Returned, Raised, Display, InputRequest)):
            self.ranks.wires.drain_output(rank)  # what it printed before is seen before
        self.fold(event)
        if isinstance(event, Raised) and event.call < 0:
            self._on_failed_start(event)
        elif isinstance(event, (Returned, Raised)):
            self._user.on_answer(event, fds)
        elif isinstance(event, Joined):
            self.recovery.compared(rank, event.replicas)
        elif isinstance(event, Status) and event.state == "idle":
            if fds:
                self.watch.add(rank, event.pid or 0, fds)
            if self.recovery.is_back(rank) and self.phase == "starting":
                self._on_all_back()

    def _on_all_back(self) -> None:
        self._came_up = True
        self.enter("ready")
        if not self.ready.done():
            self.ready.set_result(None)
        self._user.on_ready(self.recovery.finish())

    def _on_exit(self, exited: Exited) -> None:
        rank = exited.rank
        self._on_rank(rank)
        self.ranks.wires.drain_output(rank)
        cause = cause_of_exit(exited, self.watch.crash(rank), self._oom_kills, self._label)
        asked = self._user.ends_on_request() or _we_leave()
        died = Died(rank=rank, exitcode=exited.exitcode, detail=cause, asked=asked)
        self.watch.drop(rank)
        self.fold(died)
        if self.phase == "starting":
            self._on_failed_start(died)
        else:
            self._user.on_death(died)

    def _on_failed_start(self, event: Raised | Died) -> None:
        """A rank did not come up, or was lost while the group was made again."""
        if self.phase != "starting":
            return
        if not self._came_up:
            self._user.on_failed_start(event)
            return
        for note in self.recover(everyone=True):
            self._say(note)


def _we_leave() -> bool:
    """Whether this process is at its exit, by which the servers and all their ranks end: nobody's failure. Python
    declares the main thread ended before it calls exit handlers."""
    return not threading.main_thread().is_alive()
