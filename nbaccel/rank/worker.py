"""A rank from its first line to its last: set up, serve calls, leave.

The notebook's process sends `Call` and `Exit` over the channel; the rank answers with events. User code
runs in the main thread. `main` is where a rank begins that was made ahead of its run or spawned, `start`
where one does that was forked with its call already opened.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import random
import select
import signal
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, final

from nbaccel.errors import PayloadError
from nbaccel.rank import capture, debugger, display, groups, rendezvous, threads
from nbaccel.rank.bars import relay_bars
from nbaccel.rank.failure import describe
from nbaccel.rank.input import relay_input
from nbaccel.rank.membership import Membership
from nbaccel.rank.pickling import by_value_in_main
from nbaccel.rank.process import call_process, die_with_parent
from nbaccel.rank.reporter import Reporter
from nbaccel.rank.spec import Call, Exit, Join, Place, RunSpec, rank_environ
from nbaccel.wire import events, payload
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.events import Applied, Event, Joined, Raised, Request, Returned, Status

__all__ = ["main", "open_call", "start", "take_over"]


def main(boot: int) -> NoReturn:
    """Wait on this descriptor for a place, then be that rank: where one that was made ahead begins."""
    channel = Channel.from_fd(boot)
    try:
        (spec, place), fds = channel.recv()
    except ChannelClosed:
        os._exit(0)  # not needed after all
    channel.close()
    start(spec, replace(place, fds=tuple(fds)))


def take_over(spec: RunSpec) -> None:
    """Take the notebook's environment, folder, import path and arguments, and an empty `__main__`."""
    os.environ.clear()
    os.environ.update(spec.environ)
    os.chdir(spec.cwd)
    sys.path[:] = spec.sys_path
    sys.argv[:] = spec.argv
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main_module


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
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # its own group: a kill of the group reaches what the rank started
    die_with_parent(place.parent)
    call_process(f"nb-rank-{place.rank}")
    channel, stdout, stderr, stores, *_ = place.fds
    capture.redirect(stdout, stderr)
    port = _Port(Channel.from_fd(channel))
    code = 1
    try:
        if call is None:
            take_over(spec)
        os.environ.update(rank_environ(spec, place.rank, place.port))
        renew = _set_up(spec, place.rank, Channel.from_fd(stores))
        membership = _join_session(spec, place, renew) if spec.keep else None
        call = call or (None if spec.keep else open_call(place))
        events.connect(port)
        relay_bars(quiet=spec.panel)
        display.relay_displays()
        relay_input(port)
        debugger.install(place.rank)
        os.register_at_fork(after_in_child=lambda: events.connect(None))
        reporter = Reporter(place.rank)
        port.emit(Status(state="idle", pid=os.getpid()), reporter.descriptors)
        reporter.start()
        code = _Server(port, call, membership, park=spec.park).serve()
    except ChannelClosed:
        pass  # the notebook is gone: so are we
    except BaseException as error:  # noqa: BLE001  # the notebook shows it
        port.emit(Raised(call=-1, info=describe(error)))
    finally:
        _leave(code)


_Command = Call | Join | Exit


@final
class _Port:
    """The rank's end of the channel: `wire.events` speaks through it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._commands: deque[tuple[_Command, list[int]]] = deque()
        self._replies: dict[str, Any] = {}
        self._requests: list[Request] = []
        self._lock = threading.Lock()

    def emit(self, event: Event, fds: tuple[int, ...] = ()) -> None:
        self._channel.send(event, fds)

    def requests(self) -> list[Request]:
        with self._lock:
            self._read()
            found, self._requests = self._requests, []
        return found

    def wait_reply(self, id: str) -> Any:
        """The answer to the question of this id, once it is there."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            with self._lock:
                self._read()
                if id in self._replies:
                    return self._replies.pop(id)
            if self._channel.eof:
                raise ChannelClosed("the notebook is gone")
            poll.poll(200)  # not for ever: another thread may have read the answer

    def _read(self) -> None:
        """Sort what has arrived by who it is for."""
        for message, fds in self._channel.drain():
            if not isinstance(message, Request):
                self._commands.append((message, fds))
            elif message.kind == "input":
                self._replies[message.name] = message.value
            else:
                self._requests.append(message)

    def next_command(self) -> tuple[_Command, list[int]]:
        """Wait for what to do next; requests that come while nothing runs are for nobody."""
        while not self._commands:
            message, fds = self._channel.recv()
            if not isinstance(message, Request):
                self._commands.append((message, fds))
        return self._commands.popleft()


def _set_up(spec: RunSpec, rank: int, stores: Channel) -> Callable[[int], None]:
    """Random state, threads, device and rendezvous as a fresh process of its own would have them.

    Returns: what `rendezvous.install` does.
    """
    import torch

    _forget_exit_handlers()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until user code runs there is nothing to interrupt
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    torch.default_generator.seed()  # a fresh process draws it too; CUDA's is fixed until it is set
    threads.limit(spec.threads)
    if spec.device in ("cuda", "xpu"):
        getattr(torch, spec.device).set_device(rank)
    renew = rendezvous.install(stores, spec, rank)
    groups.keep_groups()
    by_value_in_main()
    return renew


def _join_session(spec: RunSpec, place: Place, renew: Callable[[int], None]) -> Membership:
    """The session's process group, and the names every cell finds."""
    import torch

    membership = Membership(spec, place.rank, renew)
    membership.join(place.generation)
    sys.modules["__main__"].__dict__.update(
        rank=place.rank,
        local_rank=place.rank,
        world_size=spec.num_processes,
        device=torch.device(spec.device, *([place.rank] if spec.device in ("cuda", "xpu") else [])),
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


@final
class _Server:
    """Runs what the notebook asks for, until told to leave.

    Args:
        port: where it is told.
        opened: (function, args, kwargs) of the call that was delivered at the start.
        membership: in a session, whose ranks go on after a failure.
        park: whether to wait after a failure until told to leave: its frames may be looked at.
    """

    def __init__(self, port: _Port, opened: Any, membership: Membership | None, *, park: bool) -> None:
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
        self._port.emit(Joined(replicas=self._membership.rejoin(order)))
        self._port.emit(Status(state="idle", pid=os.getpid()))

    def _perform(self, call: Call, fds: list[int]) -> bool:
        """Run a call and answer; whether it ended well."""
        try:
            try:
                _interruptible(True)
                function, args, kwargs = self._open(call, fds)
                debugger.forget_before(function)
                value = function(*args, **kwargs)
                display.show_figures()
                _tell_of_peers()
                events.call_ends()
            finally:
                _interruptible(False)
            self._answer(call, value)
        except SystemExit as error:
            if error.code not in (None, 0):
                self._fail(call, error)
                return False
            self._answer(call, None)
        except ChannelClosed:
            raise
        except BaseException as error:  # noqa: BLE001  # KeyboardInterrupt too: it is told
            _interruptible(False)  # it may have come between the call and the line that ends it
            self._fail(call, error)
            return False
        return True

    def _open(self, call: Call, fds: list[int]) -> Any:
        if self._membership is not None:
            self._membership.begin_call()
        if call.parcel is None:
            return self._opened
        names = sys.modules["__main__"].__dict__
        before = dict(names)
        try:
            opened, sidecar = payload.unpack(call.parcel, fds[0] if fds else None)
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
            if isinstance(value, (type, types.FunctionType, types.ModuleType)) or name.startswith("__"):
                continue
            if name not in before:
                self._came[name] = value
            elif before[name] is not value:
                if self._came.get(name, value) is before[name]:
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
    signal.signal(signal.SIGINT, signal.default_int_handler if on else signal.SIG_IGN)


def _leave(code: int) -> NoReturn:
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
