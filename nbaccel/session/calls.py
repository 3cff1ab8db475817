"""The calls that a group of ranks serves, one after another: what ends one, and what becomes of the ranks then.

A launch serves one: the ranks leave at its end, and its future is resolved when no process is left. In a session
they stay: a call that ended badly is resolved when the group is whole again (see `ending` for both schedules). A rank
that failed in a launch may be parked, and serves one more kind of call: a person's look at its frames.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, final

from nbaccel.engines.base import Engine
from nbaccel.errors import LaunchError
from nbaccel.rank.spec import Exit, Interrupt, RunSpec
from nbaccel.session import parking
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.ending import Action, Ending, Reason
from nbaccel.session.fates import fates, start_failure
from nbaccel.session.group import Group
from nbaccel.session.idle import Idle
from nbaccel.session.outcome import interrupted
from nbaccel.session.report import CellLabel, explain_exit
from nbaccel.session.results import rank_ranges
from nbaccel.session.state import RunState, for_next_call
from nbaccel.session.watch import Stall
from nbaccel.wire.events import Died, Event, Heartbeat, Raised, Request, Returned, Stalled, Status
from nbaccel.wire.snapshot import Vitals

__all__ = ["Calls"]

_TICK = 0.05
# In a session a second ■ kills no ranks that come back by themselves: they are interrupted and freed by then.
_SECOND_PRESS = 1.0
# The sinks' own work waits while the ranks come up, unless that takes longer.
_COMING_UP = 0.5


@final
class Calls:
    """Uses a group's ranks. Belongs to the relay's thread; its properties may be read by others.

    Args:
        later: calls back on the relay's thread, from any.
        on_parked: called when a rank is parked.
        engine, spec, delivery, first, start_limit, say, label, idle, park_for: as `Relay`.

    Attributes:
        group: the ranks.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        delivery: Delivery,
        first: CallInFlight | None,
        *,
        start_limit: float,
        say: Callable[[str], None],
        label: CellLabel,
        idle: Idle,
        park_for: float,
        later: Callable[[Callable[[], None]], None],
        on_parked: Callable[[], None],
    ) -> None:
        self._spec, self._delivery, self._say, self._label = spec, delivery, say, label
        self._idle, self._park_for, self._later, self._on_parked = idle, park_for, later, on_parked
        self._call = first
        self._waiting: deque[CallInFlight] = deque()
        self._settling: CallInFlight | None = None  # it is over; the group is made whole again
        self._number = 0
        self._leaving = first.ending if first is not None and not spec.keep else Ending(1.0)
        self._parked: int | None = None
        self._tick_at = time.monotonic() + _COMING_UP
        self.group = Group(engine, spec, delivery, self, start_limit=start_limit, say=say, label=label)

    # ── from any thread ───────────────────────────────────────────────────────────────────────────

    @property
    def over(self) -> bool:
        """Whether the group has ended, or is about to: it takes no more calls."""
        return self.group.phase in ("leaving", "stopping", "over")

    @property
    def parked(self) -> int | None:
        """The rank that is kept with its frames after a launch has failed; None without one."""
        return self._parked if self.group.phase == "parked" else None

    @property
    def busy(self) -> bool:
        """Whether a call is under way or waits, or the group is being made."""
        return self.group.phase != "ready" or self._call is not None or bool(self._waiting)

    def fates(self) -> dict[int, str]:
        """How the call of each rank ended, of those whose call has."""
        call = self._call
        return fates(self.group.state, range(self._spec.num_processes) if call is None else call.ranks)

    # ── time ──────────────────────────────────────────────────────────────────────────────────────

    def pause(self) -> float | None:
        """Seconds until something is due by itself; None when nothing will be."""
        call, group, now = self._call, self.group, time.monotonic()
        if call is not None and group.phase == "ready" and call.ending.reason is None:
            at = self._tick_at if call.deadline is None else min(self._tick_at, call.deadline)
            return max(0.0, at - now)
        times = [group.deadline, self._leaving.next_at(), self._idle_ends_at()]
        if call is not None:
            times += [call.next_at(), self._tick_at]
        due = [at - now for at in times if at is not None]
        if group.phase not in ("ready", "parked") or (call is None and self._idle.must_tick(now)):
            due.append(_TICK)
        return max(0.0, min(due)) if due else None

    def on_time(self, now: float) -> None:
        """Do what is due; `now` is `time.monotonic()`.

        Raises:
            LaunchError: whoever made the ranks does not end.
        """
        call = self._call
        if call is not None and self.group.phase == "ready" and call.ending.reason is None:
            self._on_time_running(call, now)
            return
        if call is None:
            self._idle.tick(now)
        else:
            self._on_time_of(call, now)
        if due := self._leaving.take_due(now):
            self._act(due, [rank for rank in self.group.living() if rank != self._parked])
        phase = self.group.phase
        if phase == "ready":
            self._on_time_idle(now)
        elif phase in ("leaving", "parked"):
            self._on_time_leaving(now)
        else:
            self.group.on_time(now)

    def _on_time_running(self, call: CallInFlight, now: float) -> None:
        """Nothing has asked for its end."""
        if now >= self._tick_at:
            self._tick(call, now)
            self.group.watch.tick(now)
        if call.deadline is not None and now >= call.deadline:
            self._end("timeout")

    def _on_time_of(self, call: CallInFlight, now: float) -> None:
        """The ranks come up, or the call is to end."""
        if now >= self._tick_at:
            self._tick(call, now)
        if self._spec.keep and self.group.phase == "ready":
            self._on_time_ending(call, now)

    def _tick(self, call: CallInFlight, now: float) -> None:
        self._tick_at = now + _TICK
        call.tick(now)
        if call.unread is not None and call.ending.reason is None:
            self._end("interrupted")

    def _on_time_ending(self, call: CallInFlight, now: float) -> None:
        """A session's call is to end."""
        if due := call.ending.take_due(now):
            self._act(due, call.unanswered())
        if not call.unanswered():
            self._settle(call)
        elif call.must_be_told(now):
            busy = rank_ranges(call.unanswered())
            call.notes.append(f"still busy, and given {call.limits.grace:g} s in all: rank {busy}")
            call.resolve()

    def _on_time_idle(self, now: float) -> None:
        ends_at = self._idle_ends_at()
        if ends_at is not None and now >= ends_at:
            self._say(f"the session had nothing to do for {self._idle.limit:g} s (idle_stop) and has ended")
            self.close()

    def _on_time_leaving(self, now: float) -> None:
        left, late = self.group.living(), self.group.deadline is not None and now > self.group.deadline
        if not left:
            self.group.stop()
        elif self.group.phase == "leaving" and left == [self._parked]:
            self._park(left[0])
        elif late:
            self.close()  # it has been parked for long enough

    def _idle_ends_at(self) -> float | None:
        return self._idle.ends_at if self._call is None and self.group.phase == "ready" else None

    # ── what is asked ─────────────────────────────────────────────────────────────────────────────

    def submit(self, call: CallInFlight) -> None:
        """Make this call once those before it are over."""
        if self.group.phase == "over":
            call.resolve(LaunchError("the session has ended"))
        elif self.group.phase == "parked" and self._call is None:
            self._call = call
            self._begin(call)
        else:
            self._waiting.append(call)
            self._begin_next()

    def end(self, call: CallInFlight | None, *, kill: bool = False) -> None:
        """Interrupt this call (None: the one under way), or kill its ranks; asked twice kills as well, in a session
        only those that did not come back within a second."""
        call = call or self._call
        if call is not None and call is self._call:
            again = call.ending.reason in ("interrupted", "failed", "timeout", "hung")
            if kill or not again:
                self._end("killed" if kill else "interrupted")
            elif not self._is_coming_back(call) and not call.ending.insist(time.monotonic()):
                self._end("killed")
        elif call is not None and call is self._settling:
            call.resolve()  # who presses again does not wait until the group is whole
        elif call is not None and call in self._waiting:
            self._waiting.remove(call)
            call.resolve(interrupted("interrupted before its turn came: the ranks go on with an earlier one"))

    def _is_coming_back(self, call: CallInFlight) -> bool:
        """Whether a session's ranks were asked so recently that they may still stop and keep their variables."""
        urged = call.ending.urged
        return call.keep and urged is not None and time.monotonic() < urged + _SECOND_PRESS

    def _can_stop_as_one(self, call: CallInFlight) -> bool:
        """Whether an Accelerator can interrupt its ranks at one step, and they need it: they compute one graph
        together, and what one of them had traced alone would keep its next one waiting for the others."""
        together = self._spec.runtime == "torch_xla" and len(call.ranks) > 1
        return together and bool(self.group.state.options)

    def post(self, message: Any, ranks: Collection[int] | None, call: CallInFlight | None) -> None:
        """Send a message to ranks (None: all), if and as soon as `call` is under way (None: now)."""
        coming_up = call is self._call and self.group.phase == "starting"
        if call is not None and (coming_up or call in self._waiting):
            call.posts.append((message, ranks))
        elif call is None or call is self._call:
            for rank in range(self._spec.num_processes) if ranks is None else ranks:
                self.group.ranks.send(rank, message)

    def close(self) -> None:
        """End the group: idle ranks leave in order, a call under way is ended."""
        if self.over:
            return
        if self.group.phase == "starting":
            self.group.give_up(LaunchError("the session was closed"))
            return
        reason: Reason = "returned"
        if self.group.phase == "parked":
            self._leaving, self._parked = Ending(1.0), None
            reason = "failed"  # as the ranks beside it: the next launch waits for its end
        self.group.enter("leaving")
        if self._call is not None:
            self._call.ending.begin("killed", time.monotonic())
            reason = "killed"
        self._leaving.begin(reason, time.monotonic())
        self.group.ranks.send_all(Exit())

    # ── what the group tells ──────────────────────────────────────────────────────────────────────

    def show(self, event: Event, state: RunState) -> None:
        """In the cell of the call under way, or of the last one."""
        if self._call is not None:
            self._call.handle(event, state)
        else:
            self._idle.handle(event, state)

    def on_ready(self, notes: Sequence[str]) -> None:
        """All ranks are there, and wait."""
        self._idle.since = time.monotonic()
        call, self._settling = self._settling, None
        self._tell_of(call, notes)
        if call is not None:
            call.resolve()
        if self._call is not None:
            self._begin(self._call)
        else:
            self._begin_next()

    def on_failed_start(self, event: Raised | Died) -> None:
        """A rank did not come up: nor does the group."""
        error = start_failure(event, self.group.state, self._label)
        if self._call is None:
            self.group.give_up(error)
            return
        self._call.failures.setdefault(event.rank, event)
        self.group.fail(error)
        self._end("failed")

    def on_answer(self, event: Returned | Raised, fds: Sequence[int]) -> None:
        """A rank's call has ended."""
        if self._call is not None and event.call == self._call.id:
            self.group.recovery.answered(event.rank, event.collectives)
            if reason := self._call.take(event, fds):
                self._end(reason)

    def ends_on_request(self) -> bool:
        """Whether a person has interrupted or killed the call under way."""
        return self._call is not None and self._call.ending.reason in ("interrupted", "killed")

    def on_death(self, event: Died) -> None:
        """A rank that was there is lost."""
        rank, call = event.rank, self._call
        if call is not None:
            if rank in call.values and event.exitcode != 0:
                what = explain_exit(event.exitcode)
                self._say(f"rank {rank} had returned, then {what} while it was leaving")
            if rank in call.ranks and (reason := call.take(event, ())):
                self._end(reason)
        elif self.group.phase == "ready":
            self._say(f"rank {rank} {explain_exit(event.exitcode)}, between two calls")
            self._tell_of(None, self.group.recover())

    def _on_stall(self, call: CallInFlight, stall: Stall) -> None:
        if call is not self._call or call.resolved:
            return
        call.stall = stall
        if stall.final:
            self._end("hung")
            return
        report = "" if stall.report is None else repr(stall.report)
        call.say(report or stall.text)
        self.group.fold(Stalled(rank=call.ranks[0], text=stall.text, report=report))

    def _on_beat(self, call: CallInFlight, vitals: Mapping[int, Vitals]) -> None:
        if call is self._call and not call.resolved:
            for rank, told in vitals.items():
                self.group.fold(Heartbeat(rank=rank, **asdict(told)))

    # ── a call's beginning and end ────────────────────────────────────────────────────────────────

    def _begin_next(self) -> None:
        if self.group.phase == "ready" and self._call is None and self._waiting:
            self._call = self._waiting.popleft()
            self.group.state = for_next_call(self.group.state, self._call.ranks, time.time())
            self._begin(self._call)

    def _begin(self, call: CallInFlight) -> None:
        """Let the ranks run the function."""
        now = time.monotonic()
        call.begin(self._number, self.group.state, now)
        self._number += 1
        self._tick_at = now + _TICK
        self._idle.follow(call.context)
        self.group.watch.began(
            call.limits.stall,
            call.limits.hang,
            lambda stall: self._later(lambda: self._on_stall(call, stall)),
            lambda vitals: self._later(lambda: self._on_beat(call, vitals)),
        )
        self.group.ranks.begin(call)
        # a session's state has them all running already: one event shows it
        for rank in call.ranks[:1] if self._spec.keep else call.ranks:
            self.group.fold(Status(rank=rank, state="running"))
        for message, ranks in call.posts:
            self.post(message, ranks, call)

    def _end(self, reason: Reason) -> None:
        """Something asks for the end of the call under way."""
        call, phase = self._call, self.group.phase
        if phase in ("stopping", "over") or call is None:
            return
        first = call.ending.reason is None
        call.ending.begin(reason, time.monotonic(), ask=self._can_stop_as_one(call))
        self.group.watch.finished()
        if phase == "parked":
            self._end_look(call, reason)
        elif self._spec.keep:
            if reason == "returned" and phase == "ready":
                self._settle(call)
            # else `on_time` does what is due, until all have answered
        elif phase == "starting" and reason != "failed":
            self.group.give_up(LaunchError("interrupted while the ranks started"))
        else:
            self._leave(call, reason, first=first)

    def _act(self, action: Action, ranks: Collection[int]) -> None:
        """A step of an ending."""
        if action == "free":
            for rank in ranks:
                self.group.free(rank)
            return
        if action == "ask":
            for rank in ranks:
                self.group.ranks.send(rank, Request(kind="interrupt"))
            return
        if self._call is not None:
            self._call.signalled.update(dict.fromkeys(ranks, action))
            if action == signal.SIGINT:
                for rank in ranks:
                    self.group.ranks.send(rank, Interrupt(self._call.id))
        self.group.ranks.kill(ranks, action)

    def _settle(self, call: CallInFlight) -> None:
        """A session's call is over: hand it out, once the group is whole again."""
        self._call = None
        self._idle.since = time.monotonic()
        if len(self.group.living()) == self._spec.num_processes and not self.group.recovery.is_needed(call):
            call.resolve()
            self._begin_next()
        else:
            self._settling = call
            self._tell_of(call, self.group.recover())

    def _tell_of(self, call: CallInFlight | None, notes: Sequence[str]) -> None:
        """Have the call's error say it, or say it now when there is none to come."""
        for note in notes:
            if call is not None and not call.resolved:
                call.notes.append(note)
            else:
                self._say(note)

    # ── a launch's ranks leave ────────────────────────────────────────────────────────────────────

    def _leave(self, call: CallInFlight, reason: Reason, *, first: bool) -> None:
        """They are to end, one of them perhaps later. `first`: nothing asked for it before."""
        if reason == "failed" and self.group.phase == "ready":
            self._parked = self._worth_a_look(call)
        elif reason in ("interrupted", "killed", "timeout", "hung"):
            self._release_parked()
        self.group.enter("leaving")
        if first:
            # also after a failure: a rank that has returned must not wait for its grace to pass
            for rank in range(self._spec.num_processes):
                if rank == self._parked:
                    self.group.free(rank)  # nobody is to wait for it
                else:
                    self.group.ranks.send(rank, Exit())

    def _worth_a_look(self, call: CallInFlight) -> int | None:
        """The rank to park: the first one that failed, if it has raised."""
        rank, event = next(iter(call.failures.items()))
        return rank if self._spec.park and isinstance(event, Raised) else None

    def _release_parked(self) -> None:
        if self._parked is not None:
            self.group.ranks.send(self._parked, Exit())
            self._parked = None

    def _park(self, rank: int) -> None:
        """All others have ended: the person is told, and may look at this one."""
        call = self._call
        assert call is not None
        if rank not in call.causes():
            self._release_parked()  # another was the cause: this one's frames tell nothing
            return
        self._call = None
        self.group.enter("parked", self._park_for)
        pid = self.group.state.ranks[rank].pid
        call.notes.append(parking.note(rank, pid, self._park_for, self._spec.device))
        self._on_parked()
        call.resolve()

    def _end_look(self, call: CallInFlight, reason: Reason) -> None:
        """The call with which a person looks at the parked rank: it is over, or has to be."""
        if reason in ("returned", "failed"):
            self._call = None
            call.resolve()
        elif reason == "killed":
            self.close()
        else:
            self.group.ranks.kill(call.ranks, signal.SIGINT)

    def finish(self, problem: BaseException | None) -> None:
        """Close everything, then resolve: whoever waits finds nothing left. Whatever of it fails, nobody waits on."""
        group = self.group
        try:
            group.finish(problem)
            self._idle.close(group.state)
        except Exception as error:  # noqa: BLE001  # whoever waits gets it
            problem = problem or error
            group.enter("over")  # calls to come are refused, not kept for a thread that has ended
        ended = problem or group.error or LaunchError("the session has ended")
        if not group.ready.done():
            group.ready.set_exception(ended)
        if self._call is not None:
            self._call.startup_error = group.error
            self._call.resolve(problem)
        if self._settling is not None:
            self._settling.resolve(problem)
        for call in self._waiting:
            call.resolve(ended)
        if self._delivery.fd is not None and (
            self._call is None or self._call.delivery is not self._delivery
        ):
            os.close(self._delivery.fd)
