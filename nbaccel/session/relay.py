"""The one thread between a group of ranks and everything that watches them.

It reads every rank's channel and output, folds each event into the group's state, hands it to the call
under way and its sinks, starts each call once all ranks are ready, ends it when something asks for it,
and resolves its future. Nobody else reads, kills or closes.

        channel, stdout, stderr of each rank ─┐                         ┌─ call under way: sinks, future
        control (exits)                      ─┼─ wires → group → calls ─┤
        orders (call, interrupt, kill, post) ─┘            │            └─ the group's own sink
                                                           └─ Call, Join, Exit, Request, signals → ranks

This file is the thread, and what others may ask of it.
"""

from __future__ import annotations

import contextvars
import functools
import queue
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, final

from nbaccel.engines.base import Engine
from nbaccel.rank.spec import RunSpec
from nbaccel.session import parking
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.calls import Calls
from nbaccel.session.idle import Idle
from nbaccel.session.report import CellLabel
from nbaccel.session.sinks.base import Sink
from nbaccel.session.stacks import StackReport
from nbaccel.session.state import RunState

__all__ = ["Relay"]


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
        # the one queue whose `put` is safe in a signal handler
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = Idle(idle_sink, idle_stop)
        self._calls = Calls(
            engine,
            spec,
            delivery,
            first,
            start_limit=start_limit,
            say=say,
            label=label,
            idle=self._idle,
            park_for=park_for,
            later=self._order,
            on_parked=functools.partial(parking.park, self),
        )
        self._group = self._calls.group
        # in a copy of the caller's context: what a sink prints appears in the cell that launched
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="nbaccel-relay", daemon=True
        )
        self._thread.start()

    @property
    def ready(self) -> Future[None]:
        """Resolved when the ranks are first ready, or will never be."""
        return self._group.ready

    @property
    def state(self) -> RunState:
        """What is known of the ranks now."""
        return self._group.state

    @property
    def over(self) -> bool:
        """Whether the group has ended, or is about to: it takes no more calls."""
        return self._calls.over

    @property
    def parked(self) -> int | None:
        """The rank that is kept with its frames after a launch has failed; None without one."""
        return self._calls.parked

    @property
    def busy(self) -> bool:
        """Whether a call is under way or waits, or the group is being made."""
        return self._calls.busy

    @property
    def idle_for(self) -> float | None:
        """Seconds since the last call ended; None while one is under way, and once the group is over."""
        return None if self.busy else time.monotonic() - self._idle.since

    def look(self) -> StackReport:
        """Every rank's stacks now, and who waits for whom; from the thread that asks."""
        return self._group.watch.look()

    def submit(self, call: CallInFlight) -> None:
        """Make this call once those before it are over."""
        self._order(functools.partial(self._calls.submit, call))

    def interrupt(self, call: CallInFlight) -> None:
        """Ask for KeyboardInterrupt in the call's ranks; a second time, kill them. Safe in a signal handler."""
        self._order(functools.partial(self._calls.end, call))

    def interrupt_current(self) -> None:
        """As `interrupt`, for the call that is under way; nothing happens without one."""
        self._order(functools.partial(self._calls.end, None))

    def kill(self, call: CallInFlight) -> None:
        """End the call's ranks at once."""
        self._order(functools.partial(self._calls.end, call, kill=True))

    def post(
        self, message: Any, ranks: Collection[int] | None = None, call: CallInFlight | None = None
    ) -> None:
        """Send a message to ranks (None: all), if and as soon as `call` is under way (None: now)."""
        self._order(functools.partial(self._calls.post, message, ranks, call))

    def close(self) -> None:
        """End the group: idle ranks leave in order, a call under way is ended. Returns at once."""
        self._order(self._calls.close)

    def join(self) -> None:
        """Wait for the thread's last line."""
        self._thread.join()

    def _order(self, order: Callable[[], None]) -> None:
        """Have the thread do it."""
        self._orders.put(order)
        self._group.ranks.wires.wake()
        if self._group.phase == "over":
            self._take_orders()  # the thread does not

    def _take_orders(self) -> None:
        while not self._orders.empty():
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return  # another thread took it
            order()

    def _run(self) -> None:
        calls, wires, problem = self._calls, self._group.ranks.wires, None
        try:
            while not self._group.gone:
                wires.wait(calls.pause())
                self._take_orders()
                calls.on_time(time.monotonic())
        except BaseException as error:  # noqa: BLE001  # whoever waits for the run gets it
            problem = error
        finally:
            calls.finish(problem)
            self._take_orders()  # those that came too late
