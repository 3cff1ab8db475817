"""What dispatched batches travel on: a local socket between ranks of one machine, else torch's send and recv.

A message through gloo wakes two threads of its own besides the reader; through a socket only the reader.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import weakref
from datetime import timedelta
from typing import Any, Protocol, final

import torch.distributed as dist
from torch import Tensor

from nbaccel.core.comm.collectives import broadcast_object_list
from nbaccel.core.world import World
from nbaccel.errors import ConfigError, WorkerError

__all__ = ["Pending", "Wire", "connect_wires"]

_TAG = 0x6E62
_BUFFER = 4 << 20  # bytes a socket may hold: the kernel gives what it allows
_PATIENCE = 300.0  # seconds a rank may be late to the making of its loader


class Pending(Protocol):
    """A message under way."""

    def wait(self) -> Any:
        """Returns when the memory may be used: written again by the sender, read by the receiver."""


class Wire(Protocol):
    """One rank's end of the line to another. Messages are uint8 tensors on the CPU, of a size both know."""

    def send(self, message: Tensor) -> Pending: ...
    def receive(self, into: Tensor) -> Pending: ...


def connect_wires(world: World) -> dict[int, Wire]:
    """By rank: on rank 0 the wires to all others, elsewhere the one to rank 0. Collective."""
    others = range(1, world.size) if world.rank == 0 else range(1)
    if world.local_size == world.size and hasattr(socket, "AF_UNIX"):
        return {rank: _SocketWire(sock, rank, world.rank) for rank, sock in _connect(world).items()}
    group = dist.group.WORLD
    if world.control_device.type != "cpu":  # the default group cannot carry what is on the CPU
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if group is None:
        raise ConfigError("dispatch needs the process group that the Accelerator makes; it is gone")
    return {rank: _GroupWire(group, rank) for rank in others}


def _connect(world: World) -> dict[int, socket.socket]:
    """A stream from rank 0 to every other rank, through a folder that only this user can enter."""
    if world.rank:
        path = broadcast_object_list([""], world=world)[0]
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        sock.sendall(world.rank.to_bytes(4, "little"))
        return {0: _roomy(sock)}
    folder = tempfile.mkdtemp(prefix="nbaccel-")
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = os.path.join(folder, "dispatch")
            listener.bind(path)
            listener.listen(world.size)
            listener.settimeout(_PATIENCE)
            broadcast_object_list([path], world=world)
            found = {}
            for _ in range(1, world.size):
                sock, _ = listener.accept()
                sock.settimeout(None)
                rank = int.from_bytes(_read(sock, bytearray(4)), "little")
                found[rank] = _roomy(sock)
            return found
    finally:
        shutil.rmtree(folder)


def _roomy(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return sock


def _read(sock: socket.socket, into: Any) -> Any:
    """Fills a writable buffer.

    Raises:
        EOFError: the other side is gone.
    """
    view = memoryview(into)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return into


@final
class _Arrived:
    """Nothing to wait for: the kernel has it."""

    def wait(self) -> None:
        pass


@final
class _Arriving:
    """Read when it is waited for."""

    def __init__(self, wire: _SocketWire, into: Tensor) -> None:
        self._wire, self._into = wire, into

    def wait(self) -> None:
        self._wire.read(self._into)


@final
class _SocketWire:
    """A stream socket. Sending blocks while the other side has more unread than the kernel holds."""

    def __init__(self, sock: socket.socket, peer: int, rank: int) -> None:
        self._sock, self._peer, self._rank = sock, peer, rank
        self._sent = _Arrived()
        weakref.finalize(self, sock.close)

    def send(self, message: Tensor) -> Pending:
        try:
            self._sock.sendall(message.numpy().data)
        except OSError as error:
            raise self._gone() from error
        return self._sent

    def receive(self, into: Tensor) -> Pending:
        return _Arriving(self, into)

    def read(self, into: Tensor) -> None:
        """Fills `into` with the next message."""
        try:
            _read(self._sock, into.numpy().data)
        except (EOFError, OSError) as error:
            raise self._gone() from error

    def _gone(self) -> WorkerError:
        return WorkerError(
            f"rank {self._peer} has ended, or is about to, while rank {self._rank} exchanges batches with it",
            ranks=(self._peer,),
        )


@final
class _GroupWire:
    """Point to point in a process group."""

    def __init__(self, group: Any, peer: int) -> None:
        # The group's own methods: `dist.isend` and `dist.irecv` check what is known here, at every message.
        self._group, self._peer = group, peer

    def send(self, message: Tensor) -> Pending:
        pending: Pending = self._group.send([message], self._peer, _TAG)
        return pending

    def receive(self, into: Tensor) -> Pending:
        pending: Pending = self._group.recv([into], self._peer, _TAG)
        return pending
