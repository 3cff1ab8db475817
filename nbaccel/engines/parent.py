"""A run's own process: makes the ranks and the store, reaps them, ends what is left.

It exists before its run: forked from the template it stands by, and with it as many forks of itself as the
largest run so far had ranks, each waiting for a place. A call that is small goes to these, who open it for
themselves. A large one, or one that needs modules of the user's, is opened here once and ranks are forked
from here, so that they share it copy-on-write. This process stays single-threaded and touches no device.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, final

from nbaccel.engines import store
from nbaccel.engines.base import Exited, Failed, Opening, Respawned, Retry, Started
from nbaccel.engines.children import Children
from nbaccel.engines.tpu import with_launch_environment
from nbaccel.rank import boot, worker
from nbaccel.rank.failure import describe
from nbaccel.rank.process import become_subreaper, call_process, die_with_parent, kill_descendants, unclean
from nbaccel.rank.spec import Place, RunSpec
from nbaccel.wire import payload
from nbaccel.wire.channel import Channel, ChannelClosed, pair

__all__ = ["Launch", "Respawn", "serve"]


@dataclass(frozen=True, slots=True)
class Launch:
    """A run to be made. Descriptors beside it: control, then the payload's if it has one, then channel,
    stdout and stderr of each rank."""

    spec: RunSpec
    parcel: payload.Parcel
    open_in_ranks: bool
    has_payload: bool


@dataclass(frozen=True, slots=True)
class Respawn:
    """A session's rank to be made again. Descriptors beside it: its channel, stdout and stderr."""

    rank: int
    generation: int


def serve(orders: Channel, *, start_method: str, ranks: int) -> NoReturn:
    """Stand by for one run and see it to its end. Never returns.

    Args:
        orders: a `Launch` comes over it; its end means that none will.
        ranks: how many ranks to have waiting.
    """
    become_subreaper()
    call_process("nb-waiting")
    maker = _Maker(start_method, orders)
    if start_method == "fork":
        maker.prepare(ranks)
    try:
        launch, fds = orders.recv()
    except ChannelClosed:
        kill_descendants()
        os._exit(0)  # not needed after all
    control = Channel.from_fd(fds[0])
    call_process("nb-run")
    try:
        control.send(Opening(os.getpid()))
        launch = replace(launch, spec=with_launch_environment(launch.spec))
        pids, store_boot = _make_ranks(maker, launch, fds, control)
        control.send(Started(tuple(pids)))
        _Group(control, maker, launch.spec, pids, store_boot).see_through()
    except ChannelClosed:
        pass  # the notebook ended the run
    except BaseException as error:  # noqa: BLE001  # the notebook shows it
        try:
            control.send(Failed(describe(error)))
        except ChannelClosed:
            pass
    finally:
        kill_descendants()
        os._exit(0)


def _make_ranks(maker: _Maker, launch: Launch, fds: list[int], control: Channel) -> tuple[list[int], Channel]:
    """The run's ranks and its store, each in its place; the ranks' process ids and the line to the store."""
    spec, content = launch.spec, fds[1] if launch.has_payload else None
    ends = fds[2 if launch.has_payload else 1 :]
    listening = store.listen()
    stores = [pair() for _ in range(spec.num_processes)]
    places = [
        Place(
            rank=rank,
            parent=os.getpid(),
            port=listening.getsockname()[1],
            parcel=launch.parcel,
            fds=(
                *ends[3 * rank : 3 * rank + 3],
                stores[rank][1].fileno(),
                *([content] if content is not None else []),
            ),
        )
        for rank in range(spec.num_processes)
    ]
    ours = [*fds, listening.fileno(), *(end.fileno() for both in stores for end in both)]
    shares = maker.can_fork and spec.replicas == 1 and not launch.open_in_ranks
    if shares and _worth_sharing(launch.parcel):
        call = _open(spec, places[0], control)
        pids = [maker.fork_rank(spec, place, call, without=ours) for place in places]
    else:
        pids = []
        for first in range(0, spec.num_processes, spec.replicas):
            seat = maker.rank(without=ours)
            _send_places(seat, spec, places[first : first + spec.replicas])
            pids += [seat.pid] * spec.replicas
    store_boot = maker.store(without=ours).boot
    store_boot.send(os.getpid(), [listening.fileno(), *(end.fileno() for end, _ in stores)])
    maker.dismiss()
    if not spec.keep:
        store_boot.close()
    for fd in ours[1:]:  # all but the control channel
        os.close(fd)
    for sock in (listening, *(end for both in stores for end in both)):
        sock.detach()
    return pids, store_boot


def _send_places(seat: _Seat, spec: RunSpec, places: Sequence[Place]) -> None:
    """Tell a waiting process which rank it is, or which ranks."""
    seat.boot.send((spec, tuple(places)), [fd for place in places for fd in place.fds])


def _worth_sharing(parcel: payload.Parcel) -> bool:
    """Whether opening the call once for all ranks saves anything: memory, or the import of a module."""
    if parcel.on_device:
        return False  # this process must touch no device
    return parcel.inline is None or any(name not in sys.modules for name in parcel.modules)


def _open(spec: RunSpec, first: Place, control: Channel) -> Any:
    """The call, opened for all ranks; gives the run up when that leaves this process unsafe to fork."""
    _, stdout, stderr, *_ = first.fds
    os.dup2(stdout, 1)  # what opening it prints is rank 0's
    os.dup2(stderr, 2)
    worker.take_over(spec)
    gc.disable()  # a million new objects would be traversed again and again
    call = worker.open_call(first)
    gc.enable()
    gc.freeze()  # a collection in a rank would touch, and so copy, every object it shares
    if reason := unclean():
        why = f"opening the arguments makes a process unsafe to fork: {reason}"
        control.send(Retry(why, open_in_ranks=True))
        os._exit(0)
    return call


@dataclass(frozen=True, slots=True)
class _Seat:
    """A process that waits for its place in a run."""

    pid: int
    boot: Channel


@final
class _Maker:
    """Makes the processes of a run, some ahead of time.

    Args:
        start_method: "fork", or "spawn" for fresh interpreters.
        orders: a channel of this process, of no concern to its children.
    """

    def __init__(self, start_method: str, orders: Channel) -> None:
        self.can_fork = start_method == "fork"
        self._orders = orders
        self._ranks: list[_Seat] = []
        self._stores: list[_Seat] = []

    def prepare(self, ranks: int) -> None:
        """Have this many ranks and a store waiting."""
        for _ in range(ranks):
            self._ranks.append(self._new("worker", ()))
        self._stores.append(self._new("store", ()))

    def rank(self, *, without: Sequence[int], children: Children | None = None) -> _Seat:
        """A process waiting to be a rank. `without`: descriptors one made now must not keep; `children`:
        whose signal it must not inherit."""
        return self._ranks.pop() if self._ranks else self._new("worker", without, children)

    def store(self, *, without: Sequence[int]) -> _Seat:
        """A process waiting to be the store."""
        return self._stores.pop() if self._stores else self._new("store", without)

    def fork_rank(self, spec: RunSpec, place: Place, call: Any, *, without: Sequence[int]) -> int:
        """A rank that shares the opened call; its process id."""
        pid = os.fork()
        if pid == 0:
            self._leave(fd for fd in without if fd not in place.fds)
            worker.start(spec, place, call)
        return pid

    def dismiss(self) -> None:
        """Let go of those that were not needed: they end."""
        for seat in (*self._ranks, *self._stores):
            seat.boot.close()
        self._ranks, self._stores = [], []

    def _new(self, role: str, without: Sequence[int], children: Children | None = None) -> _Seat:
        ours, theirs = pair()
        if not self.can_fork:
            room = "rank.boot" if role == "worker" else "engines.store"
            code = f"from nbaccel.{room} import main; main({theirs.fileno()})"
            pid = _python(code, [theirs.fileno()])
        else:
            me = os.getpid()
            pid = os.fork()
            if pid == 0:
                ours.close()
                if children is not None:
                    children.forget()
                self._leave(without)
                die_with_parent(me)
                if role == "worker":
                    worker.be_fresh()
                (boot if role == "worker" else store).main(theirs.detach())
        theirs.close()
        return _Seat(pid, Channel(ours))

    def _leave(self, fds: Any) -> None:
        """In a fork: let go of what is the parent's."""
        self._orders.close()
        for seat in (*self._ranks, *self._stores):
            seat.boot.close()
        for fd in fds:
            os.close(fd)


def _python(code: str, fds: Sequence[int]) -> int:
    """A fresh interpreter that finds nbaccel where this one did; its process id."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    bootstrap = f"import sys; sys.path[:] = {[*sys.path, home]!r}; {code}"
    process = subprocess.Popen([sys.executable, "-c", bootstrap], pass_fds=fds, start_new_session=True)
    process.returncode = 0  # reaped by `Children`, not by subprocess
    return process.pid


@final
class _Group:
    """The ranks that were made, until the notebook closes the control channel.

    Args:
        control: to the notebook.
        maker: makes a session's lost ranks again.
        pids: by rank.
        store: the line to the store's process, which learns of a new rank over it.
    """

    def __init__(
        self, control: Channel, maker: _Maker, spec: RunSpec, pids: Sequence[int], store: Channel
    ) -> None:
        self._control, self._maker, self._spec, self._store = control, maker, spec, store
        self._ranks_of = {pid: [rank for rank, one in enumerate(pids) if one == pid] for pid in pids}
        self._orders: dict[
            int, tuple[Respawn, list[int]]
        ] = {}  # for ranks whose process has to wait for more

    def see_through(self) -> NoReturn:
        """Pass signals on, report exits and replace ranks, until `ChannelClosed` is raised; none is left then."""
        children = Children()
        try:
            self._serve(children)
        finally:
            for pid in self._ranks_of:  # outside Linux nothing else ends them, nor what they started
                _signal_group(pid)

    def _serve(self, children: Children) -> NoReturn:
        while True:
            for pid in children.ended():
                if pid in self._ranks_of:
                    _signal_group(pid)  # while the zombie holds the number, nobody else can have it
                code = children.reap(pid)
                for rank in self._ranks_of.pop(pid, ()):
                    self._control.send(Exited(rank, code))
            if children.wait(self._control.fileno()):
                message, fds = self._control.recv()
                if isinstance(message, Respawn):
                    self._respawn(message, fds, children)
                    continue
                ranks, number = message
                for pid, own in self._ranks_of.items():
                    if not set(own).isdisjoint(ranks):
                        _signal(pid, number)

    def _respawn(self, order: Respawn, fds: list[int], children: Children) -> None:
        """Make the process of a rank again, once all ranks that are to live in it are asked for."""
        for fd in self._orders.pop(order.rank, (order, []))[1]:
            os.close(fd)  # of a generation that never came up
        self._orders[order.rank] = order, fds
        first = order.rank - order.rank % self._spec.replicas
        own = list(range(first, first + self._spec.replicas))
        if any(
            rank not in self._orders or self._orders[rank][0] != Respawn(rank, order.generation)
            for rank in own
        ):
            return
        for pid, ranks in list(self._ranks_of.items()):
            if ranks == own:  # it lives, and is given up: its end is no news
                _signal(pid, signal.SIGKILL)
                del self._ranks_of[pid]
        places, theirs = [], []
        for rank in own:
            given, ends = self._orders.pop(rank)[1], pair()
            self._store.send(rank, (ends[0].fileno(),))
            ends[0].close()
            theirs.append(ends[1])
            places.append(
                Place(
                    rank=rank,
                    parent=os.getpid(),
                    port=0,
                    parcel=payload.Parcel(0, inline=b""),
                    fds=(*given, ends[1].fileno()),
                    generation=order.generation,
                )
            )
        ours = [fd for place in places for fd in place.fds]
        seat = self._maker.rank(
            without=[*ours, self._control.fileno(), self._store.fileno()], children=children
        )
        _send_places(seat, self._spec, places)
        seat.boot.close()
        for end in theirs:
            end.detach()
        for fd in ours:
            os.close(fd)
        self._ranks_of[seat.pid] = own
        for rank in own:
            self._control.send(Respawned(rank, seat.pid))


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
