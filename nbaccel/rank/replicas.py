"""Ranks that are threads of one process, as torch_xla has them: two cores of a v2 or v3 chip, and its CPU device.

        main thread ── SIGINT → KeyboardInterrupt in each thread that runs user code
        rank 0 ─ thread, channel, stdout, stderr, `__main__`, process groups, device
        rank 1 ─ thread, channel, stdout, stderr, `__main__`, process groups, device

Each speaks to the notebook over its own channel and has its own `__main__`, in which its functions and cells are at
home. A thread belongs to the rank that started it. What Python prints is written to the pipe of the rank whose thread
prints it; what C code prints goes to the first rank's. The ranks share imported modules, random generators and
environment variables (RANK is the first one's): ask `nbaccel.Accelerator` or torch.distributed for the rank. Their
process groups are apart by torch's own thread-local world, which torch's tests use (`multi_threaded_pg`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import io
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, final
from urllib.parse import parse_qsl, urlsplit

from nbaccel.rank import capture, here, rendezvous, shell, threads, tpu, worker
from nbaccel.rank.failure import describe
from nbaccel.rank.reporter import Reporter
from nbaccel.rank.spec import Place, RunSpec, rank_environ
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.events import Event, Raised, Request, Status

__all__ = ["start"]


def start(spec: RunSpec, places: Sequence[Place]) -> NoReturn:
    """Become the ranks of `places`, each a thread, and serve until all are told to leave. Never returns."""
    worker.enter(places[0])
    ports = [worker.Port(Channel.from_fd(place.fds[0])) for place in places]
    capture.redirect(places[0].fds[1], places[0].fds[2])
    shared = _Shared(
        stdout=_ByThread([sys.stdout, *(capture.unbuffered(place.fds[1]) for place in places[1:])]),
        stderr=_ByThread([sys.stderr, *(capture.unbuffered(place.fds[2]) for place in places[1:])]),
        main=_main_by_thread([worker.empty_main() for _ in places]),
    )
    code = 1
    try:
        worker.take_over(spec)
        shared.set_names()
        os.environ.update(rank_environ(spec, places[0].rank, places[0].port))
        worker.be_fresh()
        threads.limit(spec.threads)
        here.let_threads_follow()
        _separate_process_groups(spec, places[0].rank)
        devices = tpu.set_up(spec, places[0].rank // spec.replicas)
        worker.serve_libraries(spec, places[0].rank, _ThreadsPort(ports))
        code = _run(spec, places, ports, devices, shared)
    except ChannelClosed:
        pass  # the notebook is gone: so are we
    except BaseException as error:  # noqa: BLE001  # the notebook shows it
        for port in ports:
            port.emit(Raised(call=-1, info=describe(error)))
    finally:
        worker.leave(code)


def _run(
    spec: RunSpec,
    places: Sequence[Place],
    ports: Sequence[worker.Port],
    devices: Sequence[Any],
    shared: _Shared,
) -> int:
    """Serve all ranks to their end; the process's exit code: a failure of one has been told as its own."""
    ranks = [
        _Rank(index, spec, place, port, device, shared)
        for index, (place, port, device) in enumerate(zip(places, ports, devices, strict=True))
    ]

    def interrupt(*_: object) -> None:
        for rank in ranks:
            rank.interrupt()

    signal.signal(signal.SIGINT, interrupt)
    for rank in ranks:
        rank.thread.start()
    for rank in ranks:
        while rank.thread.is_alive():
            rank.thread.join(0.1)  # not for ever: a signal is handled between two waits
    return 0


@final
class _Rank:
    """One of the process's ranks; `worker.Replica` of its server.

    Args:
        index: its place among the process's ranks.
        shared: what it has together with the others.
    """

    def __init__(
        self,
        index: int,
        spec: RunSpec,
        place: Place,
        port: worker.Port,
        device: Any,
        shared: _Shared,
    ) -> None:
        self.alone: AbstractContextManager[Any] = shared.lock
        self.thread = threading.Thread(target=self._serve, name=f"rank-{place.rank}", daemon=True)
        self._index, self._spec, self._place, self._port, self._device = index, spec, place, port, device
        self._shared, self._interruptible = shared, False

    def interruptible(self, on: bool) -> None:
        """Whether user code runs in this thread, and an interrupt raises KeyboardInterrupt there."""
        self._interruptible = on
        self._shared.note(self._index, on)

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt there, when it next runs Python, if user code does. Source: C API,
        PyThreadState_SetAsyncExc."""
        if self._interruptible and self.thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.thread.ident), ctypes.py_object(KeyboardInterrupt)
            )

    def _serve(self) -> None:
        here.belong(self._index)
        spec, place, port = self._spec, self._place, self._port
        try:
            tpu.use(self._device)
            with self.alone:
                renew = rendezvous.install(Channel.from_fd(place.fds[3]), spec, place.rank, here=self.is_here)
                call = None if spec.keep else worker.open_call(place)
                reporter = Reporter(place.rank, moves=port.moves, thread=self.thread)
            membership = worker.join_session(spec, place, renew, self) if spec.keep else None
            port.emit(Status(state="idle", pid=os.getpid()), reporter.descriptors)
            reporter.start()
            worker.Server(port, call, membership, park=False, replica=self).serve()
        except ChannelClosed:
            pass  # the notebook is gone: so are we
        except BaseException as error:  # noqa: BLE001  # the notebook shows it
            port.emit(Raised(call=-1, info=describe(error)))

    def is_here(self) -> bool:
        """Whether the code that asks is this rank's; what belongs to none is the first one's."""
        return here.index() == self._index


@final
class _Shared:
    """What Python has once in a process, made to be each rank's own by its thread."""

    def __init__(self, stdout: _ByThread, stderr: _ByThread, main: types.ModuleType) -> None:
        self.lock = threading.RLock()
        self._stdout, self._stderr, self._main = stdout, stderr, main
        self._running: set[int] = set()
        """The ranks in which user code runs."""

    def note(self, index: int, running: bool) -> None:
        """User code begins or ends in this rank."""
        (self._running.add if running else self._running.discard)(index)
        if not self._running:
            # what `%%capture` or `%run` has put back on two ranks at once may be the other's
            self.set_names()

    def set_names(self) -> None:
        """Put them in place."""
        sys.stdout, sys.stderr = self._stdout, self._stderr
        sys.modules["__main__"] = self._main
        shell.set_displayhook()


def _main_by_thread(mains: Sequence[types.ModuleType]) -> types.ModuleType:
    """The `__main__` that each thread finds as its rank's own."""

    def own() -> types.ModuleType:
        return mains[here.index()]

    class Main(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            return getattr(own(), name)  # `__dict__` too: what pickle, dataclasses and IPython ask for

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(own(), name, value)

        def __delattr__(self, name: str) -> None:
            delattr(own(), name)

    return Main("__main__")


def _separate_process_groups(spec: RunSpec, first: int) -> None:
    """Give each thread its own default process group, which it joins as its own rank, and its own registry of groups.

    Args:
        first: the rank of the process's first thread.
    """
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    threaded: Any = importlib.import_module("torch.testing._internal.distributed.multi_threaded_pg")
    native: Any = importlib.import_module("torch._C._distributed_c10d")
    c10d._world = threaded.ThreadLocalWorld()
    native._set_thread_isolation_mode(True)
    # torch.distributed.rendezvous as an attribute is the function of that name, not the module
    handlers: Any = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    offset = 0 if spec.host is None else spec.host.first_rank
    handlers["env"] = functools.partial(_join_as_thread, handlers["env"], offset + first, spec)


def _join_as_thread(
    original: Callable[..., Any], first: int, spec: RunSpec, url: str, *args: Any, **kwargs: Any
) -> Any:
    """torch's own meeting of env://, with the thread's rank where it would read the process's.

    Raises:
        RuntimeError: the thread names the rank of another, which is what RANK gives it.
    """
    asked = dict(parse_qsl(urlsplit(url).query))
    rank = first + here.index()
    everyone = spec.num_processes if spec.host is None else spec.host.world_size
    if "rank" not in asked:
        url += f"{'&' if asked else '?'}rank={rank}"
    elif int(asked["rank"]) == first != rank and int(asked.get("world_size", everyone)) == everyone:
        raise RuntimeError(
            f"init_process_group on rank {rank} was given rank {first}, which is another thread of this process: the "
            "variable RANK is the first one's here. Leave rank and world_size out, or let Accelerator make the group."
        )
    return original(url, *args, **kwargs)


@final
class _ThreadsPort:
    """To the libraries that relay things: the port of the rank whose thread asks; the first one's elsewhere."""

    def __init__(self, ports: Sequence[worker.Port]) -> None:
        self._ports = ports

    def _own(self) -> worker.Port:
        return self._ports[here.index()]

    def emit(self, event: Event) -> None:
        self._own().emit(event)

    def requests(self) -> list[Request]:
        return self._own().requests()

    def wait_reply(self, id: str) -> Any:
        return self._own().wait_reply(id)


@final
class _ByThread(io.TextIOBase):
    """A standard stream that writes to the pipe of the rank whose thread writes."""

    encoding = "utf-8"

    def __init__(self, streams: Sequence[Any]) -> None:
        self._streams = streams

    def _own(self) -> Any:
        return self._streams[here.index()]

    def write(self, text: str) -> int:
        return int(self._own().write(text))

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def fileno(self) -> int:
        return int(self._own().fileno())

    def writable(self) -> bool:
        return True

    @property
    def buffer(self) -> Any:
        return self._own().buffer
