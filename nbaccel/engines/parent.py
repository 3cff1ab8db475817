"""A run's own process: opens the payload once, makes the ranks and the store, reaps them.

Forked from the template for one run. It stays single-threaded and touches no device, so that its ranks
may be forked from it; what it opened they share copy-on-write.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from nbaccel.engines import store
from nbaccel.engines.base import Exited, Failed, Opening, Retry, Started
from nbaccel.engines.children import Children
from nbaccel.rank import worker
from nbaccel.rank.failure import describe
from nbaccel.rank.process import become_subreaper, kill_descendants, unclean
from nbaccel.rank.spec import RunSpec
from nbaccel.rank.worker import Place
from nbaccel.wire import payload as payloads
from nbaccel.wire.channel import Channel, ChannelClosed, pair
from nbaccel.wire.payload import Parcel

__all__ = ["Kill", "run"]

Kill = tuple[tuple[int, ...], int]
"""What the notebook sends here: signal these ranks."""


def run(
    spec: RunSpec,
    parcel: Parcel,
    *,
    control: int,
    payload: int | None,
    ranks: Sequence[tuple[int, int, int]],
    open_in_ranks: bool,
    start_method: str,
) -> NoReturn:
    """Make the run's ranks and see them to their end. Never returns.

    Args:
        control: descriptor of the channel to the notebook; its end ends the run.
        payload: descriptor of the parcel's content.
        ranks: channel, stdout and stderr of each rank.
    """
    channel = Channel.from_fd(control)
    try:
        become_subreaper()
        channel.send(Opening())
        _take_over(spec, ranks[0])
        places = _Places(spec, ranks, parcel, payload)
        if start_method == "spawn":
            pids = places.spawn()
        else:
            inherited = None if open_in_ranks or parcel.on_device else _open(channel, parcel, payload)
            pids = places.fork(inherited, channel)
        places.close()
        channel.send(Started(tuple(pids), shared=start_method == "fork" and not open_in_ranks))
        _see_through(channel, pids)
    except ChannelClosed:
        pass  # the notebook ended the run
    except BaseException as error:  # noqa: BLE001  # the notebook shows it
        try:
            channel.send(Failed(describe(error)))
        except ChannelClosed:
            pass
    finally:
        kill_descendants()
        os._exit(0)


def _take_over(spec: RunSpec, first: tuple[int, int, int]) -> None:
    """Take the notebook's environment, folder and import path; what is printed here is rank 0's."""
    os.environ.clear()
    os.environ.update(spec.environ)
    os.chdir(spec.cwd)
    sys.path[:] = spec.sys_path
    sys.argv[:] = spec.argv
    os.dup2(first[1], 1)
    os.dup2(first[2], 2)
    worker.fresh_main()


def _open(channel: Channel, parcel: Parcel, fd: int | None) -> Any:
    """The call, opened once for all ranks; gives the run up when that leaves this process unsafe to fork."""
    gc.disable()  # a million new objects would be traversed again and again
    call, sidecar = payloads.unpack(parcel, fd)
    gc.enable()
    payloads.install(sidecar, sys.modules["__main__"])
    if reason := unclean():
        channel.send(
            Retry(f"opening the arguments makes a process unsafe to fork: {reason}", open_in_ranks=True)
        )
        os._exit(0)
    return call


class _Places:
    """The descriptors of a run while its processes are made."""

    def __init__(
        self, spec: RunSpec, ranks: Sequence[tuple[int, int, int]], parcel: Parcel, fd: int | None
    ) -> None:
        self._spec = spec
        self._stores = [pair() for _ in ranks]
        self._listening = store.listen()
        self._port = self._listening.getsockname()[1]
        self._payload = fd
        self._all = [
            Place(
                rank=rank,
                parent=os.getpid(),
                port=self._port,
                channel=channel,
                stdout=stdout,
                stderr=stderr,
                stores=self._stores[rank][1].fileno(),
                content=fd,
                parcel=parcel,
            )
            for rank, (channel, stdout, stderr) in enumerate(ranks)
        ]

    def fork(self, inherited: Any, channel: Channel) -> list[int]:
        gc.freeze()  # a collection in a rank would touch, and so copy, every object it shares
        pids = []
        for place in self._all:
            pid = os.fork()
            if pid == 0:
                channel.close()
                self._listening.close()
                self._keep_only(place)
                worker.start(self._spec, place, inherited=inherited)
            pids.append(pid)
        me = os.getpid()
        if os.fork() == 0:
            channel.close()
            mine = [ours.fileno() for ours, _ in self._stores]
            for place in self._all:
                _close_all(place.channel, place.stdout, place.stderr, place.stores)
            os.setpgid(0, 0)
            store.serve(self._listening, mine, me)
        return pids

    def spawn(self) -> list[int]:
        pids = [self._spawn_rank(place) for place in self._all]
        mine = [ours.fileno() for ours, _ in self._stores]
        listening = self._listening.fileno()
        me = os.getpid()
        _python(
            f"from nbaccel.engines import store; store.main({listening}, {mine}, {me})", (listening, *mine)
        )
        return pids

    def _spawn_rank(self, place: Place) -> int:
        ours, theirs = pair()
        fds = [place.channel, place.stdout, place.stderr, place.stores, theirs.fileno()]
        if place.content is not None:
            fds.append(place.content)
        pid = _python(f"from nbaccel.rank import worker; worker.main({theirs.fileno()})", fds)
        theirs.close()
        boot = Channel(ours)
        boot.send((self._spec, place))
        boot.close()
        return pid

    def _keep_only(self, place: Place) -> None:
        for ours, theirs in self._stores:
            ours.close()
            if theirs.fileno() == place.stores:
                theirs.detach()
            else:
                theirs.close()
        for other in self._all:
            if other.rank != place.rank:
                _close_all(other.channel, other.stdout, other.stderr)

    def close(self) -> None:
        """Forget what the children hold now."""
        self._listening.close()
        for ours, theirs in self._stores:
            ours.close()
            theirs.close()
        for place in self._all:
            _close_all(place.channel, place.stdout, place.stderr)
        if self._payload is not None:
            os.close(self._payload)


def _close_all(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _python(code: str, fds: Sequence[int]) -> int:
    """A fresh interpreter that finds nbaccel where this one did; its process id."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    bootstrap = f"import sys; sys.path[:] = {[*sys.path, home]!r}; {code}"
    process = subprocess.Popen([sys.executable, "-c", bootstrap], pass_fds=fds, start_new_session=True)
    process.returncode = 0  # reaped by `Children`, not by subprocess
    return process.pid


def _see_through(channel: Channel, pids: list[int]) -> None:
    """Pass signals on and report exits until the notebook closes the channel."""
    rank_of = {pid: rank for rank, pid in enumerate(pids)}
    children = Children()
    while True:
        for pid in children.ended():
            if pid in rank_of:
                _signal_group(pid)  # while the zombie holds the number, nobody else can have it
            code = children.reap(pid)
            if pid in rank_of:
                channel.send(Exited(rank_of.pop(pid), code))
        if children.wait(channel.fileno()):
            (ranks, number), _ = channel.recv()
            for pid, rank in rank_of.items():
                if rank in ranks:
                    _signal(pid, number)


def _signal(pid: int, number: int) -> None:
    if number == signal.SIGKILL:
        _signal_group(pid)
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _signal_group(pid: int) -> None:
    """SIGKILL the group a rank leads, if it lived long enough to lead one."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EPERM):
            raise
