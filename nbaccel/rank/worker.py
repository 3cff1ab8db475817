"""A rank from its first line to its last: set up, serve calls, leave.

The notebook's process sends `Call` and `Exit` over the channel; the rank answers with events. User code
runs in the main thread, but for ranks that are threads of one process (`rank.replicas`). `rank.boot` is where
a rank begins that was made ahead of its run or spawned, `start` where one does that was forked with its call
already opened.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps to make enums of handlers, at ten times the cost
import atexit
import functools
import logging
import multiprocessing.util
import os
import random
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol, final

from nbaccel import gloo
from nbaccel.errors import PayloadError
from nbaccel.rank import capture, debugger, display, rendezvous, threads, tpu
from nbaccel.rank.bars import relay_bars
from nbaccel.rank.comms import relay_comms
from nbaccel.rank.failure import describe
from nbaccel.rank.input import relay_input
from nbaccel.rank.membership import Membership
from nbaccel.rank.namespace import is_definition
from nbaccel.rank.notices import take_over_notices
from nbaccel.rank.pickling import by_value_in_main
from nbaccel.rank.port import Port
from nbaccel.rank.process import call_here, call_process, die_with_parent
from nbaccel.rank.reporter import Reporter
from nbaccel.rank.returned import make_whole
from nbaccel.rank.sharded import forget_broken_steps
from nbaccel.rank.spec import Call, Exit, Join, Place, RunSpec, rank_environ
from nbaccel.rank.trainer import relay_trainer
from nbaccel.wire import events, occasions, payload
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.events import Applied, Joined, Raised, Returned, Status

__all__ = [
    "Port",
    "Server",
    "be_fresh",
    "empty_main",
    "enter",
    "join_session",
    "leave",
    "open_call",
    "serve_libraries",
    "start",
    "take_over",
]


def take_over(spec: RunSpec) -> None:
    """Take the notebook's environment, folder, import path, arguments and settings of loggers and warnings, and
    an empty `__main__`."""
    os.environ.clear()
    os.environ.update(spec.environ)
    os.chdir(spec.cwd)
    sys.path[:] = spec.sys_path
    sys.argv[:] = spec.argv
    take_over_notices(spec.notices)
    sys.modules["__main__"] = empty_main()


def empty_main() -> types.ModuleType:
    """A `__main__` without the notebook's names."""
    made = types.ModuleType("__main__")
    made.__dict__["__builtins__"] = __builtins__
    return made


def open_call(place: Place) -> Any:
    """(function, args, kwargs), with the notebook's definitions in `__main__`."""
    content = place.fds[4] if len(place.fds) > 4 else None
    call, sidecar = payload.unpack(place.parcel, content)
    payload.install(sidecar, sys.modules["__main__"])
    return call


def start(spec: RunSpec, place: Place, call: Any = None) -> NoReturn:
    """Become rank `place.rank` and serve until told to leave. Never returns.

    Args:
        call: (function, args, kwargs) when it was opened before the fork.
    """
    enter(place)
    channel, stdout, stderr, stores, *_ = place.fds
    capture.redirect(stdout, stderr)
    port = Port(Channel.from_fd(channel))
    code = 1
    try:
        if call is None:
            take_over(spec)
        os.environ.update(rank_environ(spec, place.rank, place.port))
        be_fresh()
        threads.limit(spec.threads)
        _set_device(spec, place.rank)
        renew = rendezvous.install(Channel.from_fd(stores), spec, place.rank)
        membership = join_session(spec, place, renew) if spec.keep else None
        call = call or (None if spec.keep else open_call(place))
        serve_libraries(spec, place.rank, port)
        reporter = Reporter(place.rank, moves=port.moves)
        port.emit(Status(state="idle", pid=os.getpid()), reporter.descriptors)
        reporter.start()
        code = Server(port, call, membership, park=spec.park).serve()
    except ChannelClosed:
        pass  # the notebook is gone: so are we
    except BaseException as error:  # noqa: BLE001  # the notebook shows it
        port.emit(Raised(call=-1, info=describe(error)))
    finally:
        leave(code)


def enter(place: Place) -> None:
    """Be a rank's process: known by its name, ended as a group, and with its parent."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # its own group: a kill of the group reaches what the rank started
    die_with_parent(place.parent)
    call_process(f"nb-rank-{place.rank}")


def serve_libraries(spec: RunSpec, rank: int, port: Any) -> None:
    """Let events, bars, displays, questions and breakpoint() of this process go through `port`."""
    events.connect(port)
    relay_bars(quiet=spec.panel)
    relay_trainer()
    display.relay_displays()
    relay_input(port)
    relay_comms(port)
    debugger.install(rank)
    os.register_at_fork(after_in_child=lambda: events.connect(None))


@functools.cache
def be_fresh() -> None:
    """Random state, exit handlers and signals as a fresh process of its own would have them.

    Where a process waits for its place it is done before that comes: it copies 2 MB of what the process shares.
    """
    import torch

    _forget_exit_handlers()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until user code runs there is nothing to interrupt
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    torch.default_generator.seed()  # a fresh process draws it too; CUDA's is fixed until it is set
    gloo.keep_groups()
    by_value_in_main()


def _set_device(spec: RunSpec, rank: int) -> None:
    """The rank's own device, as the current one."""
    import torch

    if spec.device in ("cuda", "xpu"):
        getattr(torch, spec.device).set_device(rank)
    elif spec.runtime is not None:
        tpu.use(tpu.set_up(spec, process=rank)[0])


def join_session(
    spec: RunSpec,
    place: Place,
    renew: Callable[[int], None],
    replica: Replica | None = None,
) -> Membership:
    """The session's process group, and the names every cell finds.

    Args:
        replica: what is otherwise when this rank is a thread of its process.
    """
    import torch

    if replica is None:
        membership = Membership(spec, place.rank, renew)
    else:
        with replica.alone:
            membership = Membership(spec, place.rank, renew, here=replica.is_here)
    membership.join(place.generation)
    sys.modules["__main__"].__dict__.update(
        rank=place.rank,
        local_rank=place.rank,
        world_size=spec.num_processes,
        device=tpu.current_device()
        if spec.device == "tpu"
        else torch.device(spec.device, *([place.rank] if spec.device in ("cuda", "xpu") else [])),
        dist=torch.distributed,
    )
    return membership


def _forget_exit_handlers() -> None:
    """Leave at exit only what this rank registers: what it inherited was registered for the process it was
    forked from, whose temporary folders are not the rank's to delete. (174 finalizers of torch's took 0.1 s.)
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    atexit._clear()
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)


class Replica(Protocol):
    """A rank that is a thread of its process, beside others."""

    alone: AbstractContextManager[Any]
    """Held while what the process has once is changed."""

    def interruptible(self, on: bool) -> None:
        """Whether user code runs in this thread, and an interrupt raises KeyboardInterrupt there."""

    def is_here(self) -> bool:
        """Whether the code that asks runs in this thread."""


_ABSENT = object()
_IGNORE = int(signal.SIG_IGN)


@final
class Server:
    """Runs what the notebook asks for, until told to leave.

    Args:
        port: where it is told.
        opened: (function, args, kwargs) of the call that was delivered at the start.
        membership: in a session, whose ranks go on after a failure.
        park: whether to wait after a failure until told to leave: its frames may be looked at.
        replica: what is otherwise when this rank is a thread of its process.
    """

    def __init__(
        self,
        port: Port,
        opened: Any,
        membership: Membership | None,
        *,
        park: bool,
        replica: Replica | None = None,
    ) -> None:
        self._replica = replica
        self._interruptible = _interruptible if replica is None else replica.interruptible
        self._port, self._opened, self._membership = port, opened, membership
        self._stays = park or membership is not None
        self._came: dict[str, Any] = {}  # data of the notebook's, as it came

    def serve(self) -> int:
        """The exit code."""
        code = 0
        while True:
            command, fds = self._port.next_command()
            if isinstance(command, Exit):
                return code
            if isinstance(command, Join):
                self._rejoin(command)
            elif not self._perform(command, fds) and self._membership is None:
                code = 1
                if not self._stays:
                    return code

    def _rejoin(self, order: Join) -> None:
        assert self._membership is not None
        replicas = self._membership.rejoin(order)
        if order.keep_groups and self._replica is None:
            occasions.regroup(self._membership.exchange)
        self._port.emit(Joined(replicas=replicas))
        self._port.emit(Status(state="idle", pid=os.getpid()))

    def _perform(self, call: Call, fds: list[int]) -> bool:
        """Run a call and answer; whether it ended well."""
        thread = None if self._replica is None else threading.get_ident()
        occasions.call_begins(thread)
        try:
            try:
                self._interruptible(True)
                if self._port.is_interrupted(call.id):
                    raise KeyboardInterrupt
                function, args, kwargs = self._open(call, fds)
                debugger.forget_before(function)
                value = call_here(function, args, kwargs)
                if self._membership is None:  # a session's models live on, divided as they are
                    make_whole(value, keep=call.returns)
                display.show_figures()
                _tell_of_peers()
                occasions.call_ends(thread)
            finally:
                self._interruptible(False)
            self._answer(call, value)
        except SystemExit as error:
            if error.code not in (None, 0):
                self._fail(call, error)
                return False
            if self._membership is None:
                make_whole(None, keep=False)  # the others may wait for what this rank returns
            self._answer(call, None)
        except ChannelClosed:
            raise
        except BaseException as error:  # noqa: BLE001  # KeyboardInterrupt too: it is told
            self._interruptible(False)  # it may have come between the call and the line that ends it
            self._fail(call, error)
            if self._membership is not None:
                forget_broken_steps()
            return False
        return True

    def _open(self, call: Call, fds: list[int]) -> Any:
        if self._membership is not None:
            self._membership.begin_call()
        return self._opened if call.parcel is None else self._unpack(call.parcel, fds)

    def _unpack(self, parcel: payload.Parcel, fds: list[int]) -> Any:
        names = sys.modules["__main__"].__dict__
        before = dict(names)
        try:
            opened, sidecar = payload.unpack(parcel, fds[0] if fds else None)
        finally:
            for fd in fds:
                os.close(fd)
        payload.install(sidecar, sys.modules["__main__"], replace=True)
        self._keep_own(names, before)
        return opened

    def _keep_own(self, names: dict[str, Any], before: dict[str, Any]) -> None:
        """The notebook's data came along with a function that refers to it: what this rank has made under
        such a name stays."""
        for name, value in list(names.items()):
            if before.get(name, _ABSENT) is value:
                continue
            if is_definition(value) or name.startswith("__"):
                continue
            if name not in before or self._came.get(name, value) is before[name]:
                self._came[name] = value
            else:
                names[name] = before[name]

    def _num_collectives(self) -> int:
        return 0 if self._membership is None else self._membership.num_collectives()

    def _answer(self, call: Call, value: Any) -> None:
        """All output first, then the value."""
        fd = None
        try:
            parcel = None
            if call.returns and value is not None:
                try:
                    parcel, fd = payload.pack(value, outward=False)
                except PayloadError as error:
                    raise PayloadError(f"the function's return value cannot be sent back: {error}") from None
            capture.drain()
            answer = Returned(call=call.id, value=parcel, collectives=self._num_collectives())
            self._port.emit(answer, () if fd is None else (fd,))
        finally:
            if fd is not None:
                os.close(fd)

    def _fail(self, call: Call, error: BaseException) -> None:
        """All output first, then the error."""
        occasions.call_fails(None if self._replica is None else threading.get_ident())
        debugger.remember(error)
        info = describe(error)
        fd = None
        try:
            parcel, fd = payload.pack(error, outward=False)
        except Exception:  # noqa: BLE001  # an exception that cannot travel is still told in words
            parcel = None
        capture.drain()
        raised = Raised(call=call.id, info=info, error=parcel, collectives=self._num_collectives())
        self._port.emit(raised, () if fd is None else (fd,))
        if fd is not None:
            os.close(fd)


def _tell_of_peers() -> None:
    """Hugging Face Accelerate takes the precision we set for it: say so, as our own Accelerator does."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    shared = getattr(state, "_shared_state", None)
    if shared:
        events.emit(Applied(option="mixed_precision", value=str(shared.get("_mixed_precision"))))


def _interruptible(on: bool) -> None:
    """Whether SIGINT raises KeyboardInterrupt: only while user code runs."""
    _signal.signal(signal.SIGINT, signal.default_int_handler if on else _IGNORE)


def leave(code: int) -> NoReturn:
    """End as any Python process does: join the user's threads, run exit handlers, flush."""
    try:
        events.connect(None)
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls to join threads
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # ends DataLoader workers in order
        atexit._run_exitfuncs()
    except BaseException as error:  # noqa: BLE001  # nothing may keep this process
        sys.stderr.write(f"an exit handler failed: {error!r}\n")
    finally:
        capture.drain()
        os._exit(code)
