"""The one thread between a group of ranks and everything that watches them.

It reads every rank's channel and output, folds each event into the group's state, hands it to the call
under way and its sinks, starts each call once all ranks are ready, ends it when something asks for it,
and resolves its future. Nobody else reads, kills or closes. A launch is a group that serves one call: its
future is resolved when no process is left. In a session the ranks stay, and one that is lost is replaced.

        channel, stdout, stderr of each rank ─┐                        ┌─ call under way: sinks, future
        control (exits)                      ─┼─ select → fold ────────┤
        orders (call, interrupt, kill, post) ─┘     │                  └─ the group's own sink
                                                    └─ Call, Join, Exit, Request, signals → ranks

Longer than most files here: it is one state machine, whose every step changes what the others may do. What
needs no state of its own stands beside it: `call`, `ending`, `recovery`, `wires`, `watch`, `parking`, `fates`.
"""

from __future__ import annotations

import contextvars
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any, Literal, final

from nbaccel.engines.base import Engine, Exited, Failed, Opening, Respawned, Retry, Started
from nbaccel.errors import LaunchError, NbaccelError
from nbaccel.rank.spec import Call, Exit, RunSpec
from nbaccel.session import parking
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.ending import Action, Ending, Reason
from nbaccel.session.fates import cause_of_exit, fates, late_start, start_failure
from nbaccel.session.recovery import Recovery
from nbaccel.session.report import CellLabel, explain_exit, render
from nbaccel.session.resources import oom_kills
from nbaccel.session.results import rank_ranges
from nbaccel.session.sinks.base import Sink
from nbaccel.session.stacks import StackReport
from nbaccel.session.state import RankState, RunState, fold, new_state
from nbaccel.session.watch import Stall, Watch
from nbaccel.session.wires import Wires
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.events import (
    Died,
    Display,
    Event,
    Heartbeat,
    InputRequest,
    Joined,
    Output,
    Raised,
    Returned,
    Stalled,
    Status,
)
from nbaccel.wire.snapshot import Vitals

__all__ = ["Relay"]

_TICK = 0.05
# Importing torch in a cold server, on a slow disk: no fault of the ranks.
_SERVER_START = 300.0
_GONE = 10.0


@final
class Relay:
    """Drives a group of ranks from its start to the last process's end.

    Args:
        engine: makes and ends the ranks.
        spec: the group; `spec.keep` tells a session's from a launch's.
        delivery: what the ranks are given at their start; the first call's, or an empty one.
        first: the call that is made with it; None when calls come later.
        start_limit: seconds until all ranks must be ready.
        say: tells the person one sentence about the group.
        label: what the front end calls a file a cell was compiled from.
        idle_sink: shown what happens while no call is under way.
        idle_stop: seconds without a call after which the group ends by itself.
        park_for: seconds a rank is parked at most, if `spec.park` says that one may be.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        delivery: Delivery,
        first: CallInFlight | None = None,
        *,
        start_limit: float,
        say: Callable[[str], None],
        label: CellLabel = lambda _: None,
        idle_sink: Sink | None = None,
        idle_stop: float | None = None,
        park_for: float = 0.0,
    ) -> None:
        self.ready: Future[None] = Future()
        """Resolved when the ranks are first ready, or will never be."""
        self._engine, self._spec, self._delivery = engine, spec, delivery
        self._start_limit, self._say, self._label = start_limit, say, label
        self._idle_sink = idle_sink
        self._idle_stop = idle_stop
        self._park_for = park_for
        self._idle_context = contextvars.copy_context()
        self._idle_since = time.monotonic()
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._state = new_state(spec.num_processes, time.time())
        self._phase: Literal["starting", "ready", "leaving", "parked", "stopping", "over"] = "starting"
        self._parked: int | None = None
        self._call: CallInFlight | None = first
        self._waiting: deque[CallInFlight] = deque()
        self._settling: CallInFlight | None = None
        self._calls = 0
        self._leaving = first.ending if first is not None and not spec.keep else Ending(1.0)
        self._deadline: float | None = time.monotonic() + _SERVER_START
        # the sinks' own work waits while the ranks come up, unless that takes long
        self._quiet_until = time.monotonic() + 0.5
        self._opened = self._made_again = False
        self._started_once = False
        self._recovery = Recovery(spec.num_processes)
        self._oom_kills, _ = oom_kills()
        self._retries: list[Retry] = []
        self._startup_error: NbaccelError | None = None
        first_rank = 0 if spec.host is None else spec.host.first_rank
        self._watch = Watch(spec.num_processes, ended=self._fates, first_rank=first_rank, label=label)
        self._wires = Wires(
            engine.start(spec, delivery.parcel, delivery.fd),
            on_control=self._on_control,
            on_rank=self._on_channel,
            on_output=lambda rank, stream, data: self._fold(Output(rank=rank, stream=stream, data=data)),
        )
        self._tell()
        # in a copy of the caller's context: what a sink prints appears in the cell that launched
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="nbaccel-relay", daemon=True
        )
        self._thread.start()

    # ── from other threads ────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> RunState:
        """What is known of the ranks now."""
        return self._state

    @property
    def over(self) -> bool:
        """Whether the group has ended, or is about to: it takes no more calls."""
        return self._phase in ("leaving", "stopping", "over")

    @property
    def parked(self) -> int | None:
        """The rank that is kept with its frames after a launch has failed; None without one."""
        return self._parked if self._phase == "parked" else None

    def look(self) -> StackReport:
        """Every rank's stacks now, and who waits for whom; from the thread that asks."""
        return self._watch.look()

    @property
    def busy(self) -> bool:
        """Whether a call is under way or waits, or the group is being made."""
        return self._phase != "ready" or self._call is not None or bool(self._waiting)

    @property
    def idle_for(self) -> float | None:
        """Seconds since the last call ended; None while one is under way, and once the group is over."""
        return None if self.busy or self.over else time.monotonic() - self._idle_since

    def interrupt_current(self) -> None:
        """As `interrupt`, for the call that is under way; nothing happens without one."""
        self._order("interrupt", None)

    def submit(self, call: CallInFlight) -> None:
        """Make this call once those before it are over."""
        self._order("submit", call)

    def interrupt(self, call: CallInFlight) -> None:
        """Ask for KeyboardInterrupt in the call's ranks; a second time, kill them. Safe in a signal handler."""
        self._order("interrupt", call)

    def kill(self, call: CallInFlight) -> None:
        """End the call's ranks at once."""
        self._order("kill", call)

    def post(
        self, message: Any, ranks: Collection[int] | None = None, call: CallInFlight | None = None
    ) -> None:
        """Send a message to ranks (None: all), if and as soon as `call` is under way (None: now)."""
        self._order("post", (message, ranks, call))

    def close(self) -> None:
        """End the group: idle ranks leave in order, a call under way is ended. Returns at once."""
        self._order("close", None)

    def join(self) -> None:
        """Wait for the thread's last line."""
        self._thread.join()

    def _order(self, what: str, about: Any) -> None:
        self._orders.put((what, about))
        self._wires.wake()
        if self._phase == "over":
            self._refuse_orders()

    def _tell(self) -> None:
        for note in self._wires.ports.notes:
            self._say(note)

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            # before the run's own process exists there is nothing to wait for: it will find us gone
            while self._phase != "stopping" or (self._opened and not self._wires.ports.control.eof):
                self._wires.wait(self._pause())
                self._on_orders()
                self._on_time(time.monotonic())
        except BaseException as problem:  # noqa: BLE001  # whoever waits for the run gets it
            error = problem
        finally:
            self._finish(error)

    def _pause(self) -> float | None:
        """Seconds until the loop has something to do by itself; None when nothing will come."""
        call, now = self._call, time.monotonic()
        times = (self._deadline, self._leaving.next_at(), self._idle_at(), call and call.next_at())
        due = [at - now for at in times if at is not None]
        if call is not None or self._phase not in ("ready", "parked") or now < self._quiet_until:
            due.append(_TICK)
        return max(0.0, min(due)) if due else None

    def _idle_at(self) -> float | None:
        """When an idle group ends by itself."""
        if self._idle_stop is None or self._call is not None or self._phase != "ready":
            return None
        return self._idle_since + self._idle_stop

    def _on_time(self, now: float) -> None:
        call = self._call
        if call is not None:
            self._on_time_of(call, now)
        elif self._idle_sink is not None:
            self._idle_context.run(self._idle_sink.tick, now)
        if due := self._leaving.take_due(now):
            alive = [known.rank for known in self._state.ranks if known.exitcode is None]
            self._act(due, [rank for rank in alive if rank != self._parked])
        if self._idle_at() is not None and now >= (self._idle_at() or 0.0):
            self._say(f"the session had nothing to do for {self._idle_stop:g} s (idle_stop) and has ended")
            self._on_close()
        if self._phase == "starting" and self._deadline is not None and now > self._deadline:
            self._give_up(self._late())
        left = [known.rank for known in self._state.ranks if known.exitcode is None]
        if self._phase == "leaving" and self._parked is not None and left == [self._parked]:
            self._park(self._parked)
        elif self._phase in ("leaving", "parked") and not left:
            self._stop()
        if self._phase == "parked" and self._deadline is not None and now > self._deadline:
            self._on_close()
        if self._phase == "stopping" and self._deadline is not None and now > self._deadline:
            raise LaunchError(f"the run's own process did not end in {_GONE:g} s.\n{self._engine.log()}")

    def _on_time_of(self, call: CallInFlight, now: float) -> None:
        if self._phase != "starting" or now > self._quiet_until:
            call.tick(now)
        if self._phase == "ready" and call.ending.reason is None:
            self._watch.tick(now)
        if self._phase == "ready" and call.overdue(now):
            self._end("timeout")
        if not self._spec.keep or self._phase != "ready":
            return
        if due := call.ending.take_due(now):
            self._act(due, call.unanswered())
        if call.ending.reason is not None and not call.unanswered():
            self._settle(call)
        elif call.must_be_told(now):
            busy = rank_ranges(call.unanswered())
            call.notes.append(f"still busy, and given {call.limits.grace:g} s in all: rank {busy}")
            call.resolve()

    # ── what is asked ─────────────────────────────────────────────────────────────────────────────

    def _on_orders(self) -> None:
        while not self._orders.empty():
            what, about = self._orders.get()
            if what == "submit" and self._phase == "parked" and self._call is None:
                self._call = about
                self._begin(about)
            elif what == "submit":
                self._waiting.append(about)
                self._begin_next()
            elif what in ("interrupt", "kill"):
                self._on_stop_order(about, kill=what == "kill")
            elif what == "post":
                self._on_post(*about)
            elif what == "stall":
                self._on_stall(*about)
            elif what == "beat":
                self._on_beat(*about)
            else:
                self._on_close()

    def _on_stop_order(self, call: CallInFlight | None, *, kill: bool) -> None:
        call = call or self._call
        if call is not None and call is self._call:
            again = call.ending.reason in ("interrupted", "failed", "timeout", "hung")
            self._end("killed" if kill or again else "interrupted")
        elif call is not None and call is self._settling:
            call.resolve()  # who presses again does not wait until the group is whole
        elif call is not None and call in self._waiting:
            self._waiting.remove(call)
            call.resolve(KeyboardInterrupt("interrupted before its turn came"))

    def _on_post(self, message: Any, ranks: Collection[int] | None, call: CallInFlight | None) -> None:
        waits = call is not None and (
            call in self._waiting or (call is self._call and self._phase == "starting")
        )
        if waits and call is not None:
            call.posts.append((message, ranks))
        elif call is None or call is self._call:
            for rank in range(self._spec.num_processes) if ranks is None else ranks:
                self._send(rank, message)

    def _on_stall(self, call: CallInFlight, stall: Stall) -> None:
        if call is not self._call or call.resolved:
            return
        call.stall = stall
        if stall.final:
            self._end("hung")
            return
        call.say(stall.text if stall.report is None else repr(stall.report))
        report = "" if stall.report is None else repr(stall.report)
        self._fold(Stalled(rank=call.ranks[0], text=stall.text, report=report))

    def _on_beat(self, call: CallInFlight, vitals: Mapping[int, Vitals]) -> None:
        if call is self._call and not call.resolved:
            for rank, told in vitals.items():
                self._fold(Heartbeat(rank=rank, **asdict(told)))

    def _on_close(self) -> None:
        if self.over:
            return
        if self._phase == "starting":
            self._give_up(LaunchError("the session was closed"))
            return
        reason: Reason = "returned"
        if self._phase == "parked":
            self._leaving, self._parked = Ending(1.0), None
            reason = "failed"  # as the ranks beside it: the next launch waits for its end
        self._phase, self._deadline = "leaving", None
        call = self._call
        if call is not None:
            call.ending.begin("killed", time.monotonic())
            reason = "killed"
        self._leaving.begin(reason, time.monotonic())
        self._send_all(Exit())

    # ── what comes in ─────────────────────────────────────────────────────────────────────────────

    def _on_control(self) -> None:
        control = self._wires.ports.control
        for message in self._engine.exits(self._wires.ports):
            if isinstance(message, Opening):
                self._opened = True
                self._deadline = time.monotonic() + self._start_limit
            elif isinstance(message, Retry):
                self._retries.append(message)
                self._make_again()
                return
            elif isinstance(message, Failed):
                text = "\n".join(render(message.info, self._label, title="the ranks' parent", colour=False))
                self._give_up(
                    LaunchError(f"the function or its arguments could not be opened in the ranks.\n{text}")
                )
            elif isinstance(message, Started):
                for rank, pid in enumerate(message.pids):
                    self._on_pid(rank, pid)
            elif isinstance(message, Respawned):
                self._recovery.respawned(message.rank)
                self._on_pid(message.rank, message.pid)
            elif isinstance(message, Exited) and not self._recovery.is_replacing(message.rank):
                self._on_exit(message)
        if control.eof:
            self._wires.forget_control()
            at_fault = self._opened and not self._engine.lost()
            if self._phase == "starting" and not at_fault and not self._made_again:
                self._make_again()  # the launch met a server that was just being killed
            elif self._phase != "stopping":
                self._on_lost_parent()

    def _on_pid(self, rank: int, pid: int) -> None:
        if self._state.ranks[rank].state == "starting":  # a quick rank has said "idle" before its parent this
            self._fold(Status(rank=rank, state="starting", pid=pid))

    def _make_again(self) -> None:
        """The same group again, made in the way the retries say."""
        self._made_again = True
        sent = self._delivery
        self._wires.replace(self._engine.start(self._spec, sent.parcel, sent.fd, after=tuple(self._retries)))
        self._tell()

    def _on_lost_parent(self) -> None:
        """Whoever made the ranks is gone, and so are they."""
        if self._startup_error is None and (self._phase == "starting" or self._spec.keep):
            what = "there" if self._phase == "starting" else "done: the session has ended"
            self._startup_error = LaunchError(
                f"the process that makes the ranks ended before they were {what}.\n{self._engine.log()}"
            )
        self._phase = "stopping"
        for known in self._state.ranks:
            if known.exitcode is None:
                self._on_exit(Exited(known.rank, -signal.SIGKILL, "the process that made it is gone"))
        self._phase = "stopping"

    def _on_channel(self, rank: int) -> None:
        for event, fds in self._wires.events(rank):
            object.__setattr__(event, "rank", rank)  # it came just now: nobody else has it
            self._on_event(event, fds)

    def _on_event(self, event: Event, fds: list[int]) -> None:
        rank = event.rank
        if isinstance(event, (Returned, Raised, Display, InputRequest)):
            self._wires.drain_output(rank)  # what it printed before is seen before
        self._fold(event)
        if isinstance(event, Joined):
            self._recovery.compared(rank, event.replicas)
        elif isinstance(event, Status) and event.state == "idle":
            if fds:
                self._watch.add(rank, event.pid or 0, fds)
            if self._recovery.is_back(rank) and self._phase == "starting":
                self._on_ready()
        elif isinstance(event, Raised) and event.call < 0:
            self._on_failed_start(event)
        elif isinstance(event, (Returned, Raised)) and self._call is not None and event.call == self._call.id:
            self._recovery.answered(rank, event.collectives)
            if reason := self._call.take(event, fds):
                self._end(reason)

    def _on_exit(self, exited: Exited) -> None:
        rank, call = exited.rank, self._call
        self._on_channel(rank)
        self._wires.drain_output(rank)
        died = Died(rank=rank, exitcode=exited.exitcode, detail=self._cause(exited))
        self._watch.drop(rank)
        self._fold(died)
        if self._phase == "starting":
            self._on_failed_start(died)
        elif call is not None:
            if rank in call.values and exited.exitcode != 0:
                what = explain_exit(exited.exitcode)
                self._say(f"rank {rank} had returned, then {what} while it was leaving")
            if rank in call.ranks and (reason := call.take(died, ())):
                self._end(reason)
        elif self._phase == "ready":
            self._say(f"rank {rank} {explain_exit(exited.exitcode)}, between two calls")
            self._recover(None)

    def _cause(self, exited: Exited) -> str:
        return cause_of_exit(exited, self._watch.crash(exited.rank), self._oom_kills, self._label)

    def _fates(self) -> dict[int, str]:
        call = self._call
        return fates(self._state, range(self._spec.num_processes) if call is None else call.ranks)

    def _on_failed_start(self, event: Raised | Died) -> None:
        """A rank did not come up, or was lost while the group was made again."""
        if self._phase != "starting":
            return
        if self._started_once:
            self._recover(None, everyone=True)
        elif self._call is not None:
            self._call.failures.setdefault(event.rank, event)
            self._startup_error = self._startup_error or start_failure(event, self._state, self._label)
            self._end("failed")
        else:
            self._give_up(start_failure(event, self._state, self._label))

    def _fold(self, event: Event) -> None:
        self._state = fold(self._state, event)
        if self._call is not None:
            self._call.handle(event, self._state)
        elif self._idle_sink is not None:
            self._idle_context.run(self._idle_sink.handle, event, self._state)
            self._quiet_until = time.monotonic() + 0.5

    # ── what goes out ─────────────────────────────────────────────────────────────────────────────

    def _on_ready(self) -> None:
        """All ranks are there, and wait."""
        self._phase, self._deadline = "ready", None
        self._started_once = True
        self._idle_since = time.monotonic()
        if not self.ready.done():
            self.ready.set_result(None)
        call, self._settling = self._settling, None
        self._tell_of(call, self._recovery.finish())
        if call is not None:
            call.resolve()
        if self._call is not None:
            self._begin(self._call)
        else:
            self._begin_next()

    def _begin_next(self) -> None:
        if self._phase == "ready" and self._call is None and self._waiting:
            self._call = self._waiting.popleft()
            self._state = _for_next_call(self._state, self._call.ranks)
            self._begin(self._call)

    def _begin(self, call: CallInFlight) -> None:
        """Let the ranks run the function."""
        call.begin(self._calls, self._state, time.monotonic())
        self._idle_context = call.context
        limits = call.limits
        self._watch.began(
            limits.stall,
            limits.hang,
            lambda stall: self._order("stall", (call, stall)),
            lambda vitals: self._order("beat", (call, vitals)),
        )
        self._calls += 1
        delivered = call.delivery is self._delivery
        parcel, fd = (None, None) if delivered else (call.delivery.parcel, call.delivery.fd)
        frames: dict[bool, bytes] = {}
        for rank in call.ranks:
            if not self._spec.keep:
                self._fold(Status(rank=rank, state="running"))
            wanted = call.wants_value(rank)
            if fd is not None:
                self._send(rank, Call(call.id, wanted, parcel), (fd,))
                continue
            if wanted not in frames:
                frames[wanted] = Channel.encode(Call(call.id, wanted, parcel))
            self._send(rank, frames[wanted])
        if self._spec.keep:  # the state has them all running already: one event shows it
            self._fold(Status(rank=call.ranks[0], state="running"))
        for message, ranks in call.posts:
            self._on_post(message, ranks, call)

    def _send(self, rank: int, message: Any, fds: tuple[int, ...] = ()) -> None:
        try:
            channel = self._wires.ports.channels[rank]
            if isinstance(message, bytes):
                channel.send_encoded(message)
            else:
                channel.send(message, fds)
        except ChannelClosed:
            pass  # it died just now: its exit says so

    def _send_all(self, message: Any) -> None:
        for rank in range(self._spec.num_processes):
            self._send(rank, message)

    def _act(self, action: Action, ranks: Collection[int]) -> None:
        """A step of an ending."""
        if action == "free":
            for rank in ranks:
                self._free(rank)
            return
        if self._call is not None:
            self._call.signalled.update(dict.fromkeys(ranks, action))
        self._engine.kill(self._wires.ports, ranks, action)

    def _free(self, rank: int) -> None:
        """Break the connections a rank waits on for the others; the group is made again afterwards."""
        others = [k.pid for k in self._state.ranks if k.pid is not None and k.rank != rank]
        self._watch.free(rank, others)

    def _end(self, reason: Reason) -> None:
        call = self._call
        if self._phase in ("stopping", "over") or call is None:
            return
        before = call.ending.reason
        call.ending.begin(reason, time.monotonic())
        self._watch.finished()
        if self._phase == "parked":
            self._end_look(call, reason)
            return
        if self._spec.keep:
            return  # `_on_time` sees to it
        if self._phase == "starting" and reason != "failed":
            self._give_up(LaunchError("interrupted while the ranks started"))
            return
        if reason == "failed" and self._phase == "ready":
            self._parked = self._worth_a_look(call)
        elif reason in ("interrupted", "killed", "timeout", "hung"):
            self._release_parked()
        self._phase = "leaving"
        self._deadline = None
        if before is None:
            # also after a failure: a rank that has returned must not wait for its grace to pass
            for rank in range(self._spec.num_processes):
                if rank == self._parked:
                    self._free(rank)  # nobody is to wait for it
                else:
                    self._send(rank, Exit())

    def _worth_a_look(self, call: CallInFlight) -> int | None:
        """The rank to park: the first one that failed, if it has raised."""
        rank, event = next(iter(call.failures.items()))
        return rank if self._spec.park and isinstance(event, Raised) else None

    def _release_parked(self) -> None:
        if self._parked is not None:
            self._send(self._parked, Exit())
            self._parked = None

    def _park(self, rank: int) -> None:
        """All others have ended: the person is told, and may look at this one."""
        call = self._call
        assert call is not None
        if rank not in call.causes():
            self._release_parked()  # another was the cause: this one's frames tell nothing
            return
        self._phase, self._call = "parked", None
        self._deadline = time.monotonic() + self._park_for
        call.notes.append(parking.note(rank, self._state.ranks[rank].pid, self._park_for, self._spec.device))
        parking.park(self)
        call.resolve()

    def _end_look(self, call: CallInFlight, reason: Reason) -> None:
        """The call with which a person looks at the parked rank: it is over, or has to be."""
        if reason in ("returned", "failed"):
            self._call = None
            call.resolve()
        elif reason == "killed":
            self._on_close()
        else:
            self._engine.kill(self._wires.ports, call.ranks, signal.SIGINT)

    def _settle(self, call: CallInFlight) -> None:
        """A session's call is over: hand it out, once the group is whole again."""
        self._call = None
        self._idle_since = time.monotonic()
        all_live = all(known.exitcode is None for known in self._state.ranks)
        if all_live and not self._recovery.is_needed(call):
            call.resolve()
            self._begin_next()
        else:
            self._settling = call
            self._recover(call)

    def _recover(self, call: CallInFlight | None, *, everyone: bool = False) -> None:
        """Replace the ranks that are lost, and make the process group of all again."""
        lost = [known.rank for known in self._state.ranks if everyone or known.exitcode is not None]
        order = self._recovery.begin(lost)
        if order is None:
            self._give_up(LaunchError("the ranks were lost again and again while they came up"))
            return
        self._phase, self._deadline = "starting", time.monotonic() + self._start_limit
        self._state = replace(self._state, ranks=tuple(_between(known, lost) for known in self._state.ranks))
        for rank in range(self._spec.num_processes):
            if rank in lost:
                self._wires.drop_rank(rank)
                self._watch.drop(rank)
                self._engine.respawn(self._wires.ports, rank, order.generation)
                self._wires.watch_rank(rank)
            else:
                self._send(rank, order)
        if lost:
            self._tell_of(call, [self._recovery.name_lost(lost)])

    def _tell_of(self, call: CallInFlight | None, notes: list[str]) -> None:
        """Have the call's error say it, or say it now when there is none to come."""
        for note in notes:
            if call is not None and not call.resolved:
                call.notes.append(note)
            else:
                self._say(note)

    def _give_up(self, error: NbaccelError) -> None:
        self._startup_error = self._startup_error or error
        self._stop()

    def _stop(self) -> None:
        """Let the run's own process end whatever is left, and wait for its end."""
        self._phase = "stopping"
        self._deadline = time.monotonic() + _GONE
        self._engine.stop(self._wires.ports)

    def _late(self) -> LaunchError:
        if not self._opened:
            return LaunchError(
                f"the server that makes ranks was not ready in {_SERVER_START:g} s.\n{self._engine.log()}"
            )
        return late_start(self._state, self._start_limit)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────

    def _finish(self, problem: BaseException | None) -> None:
        """Close everything, then resolve: whoever waits finds nothing left."""
        if problem is None:
            for rank in range(self._spec.num_processes):
                self._wires.drain_output(rank)
        self._phase = "over"
        self._watch.close()
        self._wires.close()
        if self._idle_sink is not None:
            self._idle_sink.close(self._state)
        ended = problem or self._startup_error or LaunchError("the session has ended")
        if not self.ready.done():
            self.ready.set_exception(ended)
        if self._call is not None:
            self._call.startup_error = self._startup_error
            self._call.resolve(problem)
        if self._settling is not None:
            self._settling.resolve(problem)
        if self._delivery.fd is not None and (
            self._call is None or self._call.delivery is not self._delivery
        ):
            os.close(self._delivery.fd)
        for call in self._waiting:
            call.resolve(ended)
        self._refuse_orders()

    def _refuse_orders(self) -> None:
        """Calls that came too late."""
        while True:
            try:
                what, about = self._orders.get_nowait()
            except queue.Empty:
                return
            if what == "submit":
                about.resolve(LaunchError("the session has ended"))


def _for_next_call(state: RunState, taken: Collection[int]) -> RunState:
    """Of the call before, a new one shows nothing; these ranks run it."""
    now = time.time()
    ranks = tuple(
        RankState(
            known.rank, state="running" if known.rank in taken else "idle", pid=known.pid, seen=now, since=now
        )
        for known in state.ranks
    )
    return RunState(ranks=ranks, started=now)


def _between(known: RankState, lost: Collection[int]) -> RankState:
    """A rank while the group is made again."""
    return known._replace(state="starting", exitcode=None, pid=None if known.rank in lost else known.pid)
