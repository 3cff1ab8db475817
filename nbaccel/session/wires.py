"""The notebook's ends of a group of ranks, and one selector over all of them."""

from __future__ import annotations

import fcntl
import functools
import os
import selectors
import sys
import termios
from collections.abc import Callable
from typing import Any, Literal, final

from nbaccel.engines.base import Ports
from nbaccel.wire.channel import Channel
from nbaccel.wire.events import Event

__all__ = ["Wires"]

_READ = 1 << 18
_NOTHING = bytes(4)  # what FIONREAD says of an empty pipe
Stream = Literal["stdout", "stderr"]


@final
class Wires:
    """Everything of a group that is read. Belongs to the relay's thread.

    Args:
        ports: what is read first; `replace` and `watch_rank` take others up.
        on_control: called when whoever makes the ranks has said something or is gone.
        on_rank: called with a rank whose channel has something.
        on_output: called with a rank, the stream and what came.
    """

    def __init__(
        self,
        ports: Ports,
        *,
        on_control: Callable[[], None],
        on_rank: Callable[[int], None],
        on_output: Callable[[int, Stream, bytes], None],
    ) -> None:
        self.ports = ports
        self._on_control, self._on_rank, self._on_output = on_control, on_rank, on_output
        self._closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, selectors.SelectorKey] = {}
        self._watch(self._wake_read, self._woken)
        self._watch_all()

    def wake(self) -> None:
        """End `wait` now. Safe in a signal handler and from any thread."""
        if self._closed:
            return  # the number may be somebody else's descriptor by now
        try:
            os.write(self._wake_write, b"!")
        except OSError:
            pass  # it wakes up already

    def wait(self, timeout: float | None) -> None:
        """Call back for whatever comes within `timeout` seconds (None: until something does)."""
        for key, _ in self._selector.select(timeout):
            if self._watched.get(key.fd) is key:  # else the one before it let go of it
                key.data()

    def replace(self, ports: Ports) -> None:
        """Read these instead of all the present ones."""
        self._let_go()
        self.ports = ports
        self._watch_all()

    def drop_rank(self, rank: int) -> None:
        """Read nothing of this rank any more, and close what was read."""
        ports = self.ports
        self._forget([ports.channels[rank], ports.stdouts[rank], ports.stderrs[rank]])
        self._close_rank(rank)

    def watch_rank(self, rank: int) -> None:
        """Read what the ports now have for this rank."""
        self._watch(self.ports.channels[rank], functools.partial(self._on_rank, rank))
        self._watch(self.ports.stdouts[rank], functools.partial(self._read, rank, "stdout"))
        self._watch(self.ports.stderrs[rank], functools.partial(self._read, rank, "stderr"))

    def events(self, rank: int) -> list[tuple[Event, list[int]]]:
        """What has come over a rank's channel."""
        channel = self.ports.channels[rank]
        found = list(channel.drain())
        if channel.eof:
            self._forget([channel])
        return found

    def drain_output(self, rank: int) -> None:
        """Read what a rank had written until now; not what goes on being written meanwhile."""
        if (waiting := fcntl.ioctl(self.ports.stdouts[rank], termios.FIONREAD, _NOTHING)) != _NOTHING:
            self._read_all(rank, "stdout", int.from_bytes(waiting, sys.byteorder))
        if (waiting := fcntl.ioctl(self.ports.stderrs[rank], termios.FIONREAD, _NOTHING)) != _NOTHING:
            self._read_all(rank, "stderr", int.from_bytes(waiting, sys.byteorder))

    def forget_control(self) -> None:
        """Its other end is gone."""
        self._forget([self.ports.control])

    def close(self) -> None:
        """Close everything."""
        self._closed = True
        self._let_go()
        self._selector.close()
        os.close(self._wake_write)
        os.close(self._wake_read)

    def _woken(self) -> None:
        os.read(self._wake_read, 4096)

    def _watch_all(self) -> None:
        self._watch(self.ports.control, self._on_control)
        for rank in range(len(self.ports.channels)):
            self.watch_rank(rank)

    def _watch(self, source: int | Channel, callback: Callable[[], object]) -> None:
        key = self._selector.register(source, selectors.EVENT_READ, callback)
        self._watched[key.fd] = key

    def _read_all(self, rank: int, stream: Stream, waiting: int) -> None:
        """Read so many bytes, or what there is of them."""
        while waiting > 0 and (got := self._read(rank, stream)):
            waiting -= got

    def _read(self, rank: int, stream: Stream) -> int:
        """Read what is in a pipe; the number of bytes, 0 when there is nothing more for now."""
        fd = (self.ports.stdouts if stream == "stdout" else self.ports.stderrs)[rank]
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return 0
        if not data:
            self._forget([fd])
            return 0
        self._on_output(rank, stream, data)
        return len(data)

    def _forget(self, watched: list[Any]) -> None:
        for one in watched:
            if one in self._selector.get_map():
                del self._watched[self._selector.unregister(one).fd]

    def _let_go(self) -> None:
        ports = self.ports
        self._forget([ports.control, *ports.channels, *ports.stdouts, *ports.stderrs])
        ports.control.close()
        for rank in range(len(ports.channels)):
            self._close_rank(rank)

    def _close_rank(self, rank: int) -> None:
        self.ports.channels[rank].close()
        os.close(self.ports.stdouts[rank])
        os.close(self.ports.stderrs[rank])
