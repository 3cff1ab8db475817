"""A typed duplex pipe between two processes of one host: pickled values, and file descriptors beside them.

A frame is a header (length of the body, number of descriptors), then the body. Descriptors ride on the
header's first byte as SCM_RIGHTS; the kernel takes at most 253 at once, so further ones follow in
batches, each on one filler byte. Both ends are processes of ours, of the same user, connected by an
inherited socketpair: nothing listens, so nobody else can write here and pickle is safe.
"""

from __future__ import annotations

import array
import errno
import os
import pickle
import select
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, final

__all__ = ["Channel", "ChannelClosed", "pair"]

_HEADER = struct.Struct("!QI")
_BATCH = 200
_SMALL, _CHUNK = 1 << 13, 1 << 18
# Descriptors that arrive must not leak into a user's subprocess, which would keep our pipes open.
_FLAGS = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_FLAGS_NOW = _FLAGS | int(socket.MSG_DONTWAIT)
_READS_ALL = sys.platform == "linux"


class ChannelClosed(ConnectionError):
    """The other end is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets: one to keep, one to hand to another process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def _readable(sock: socket.socket, timeout: float | None) -> bool:
    """Whether something, or the end, can be read. Not `select`, which ends at descriptor 1023."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


@final
class Channel:
    """One end. `send` may be called from several threads; only one may receive.

    Args:
        sock: a connected AF_UNIX stream socket; the channel owns it from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._eof = False
        self._size = _SMALL

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """The channel on an inherited descriptor."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._sock.fileno()

    def send(self, value: Any, fds: Sequence[int] = ()) -> None:
        """Send one value, and duplicates of these descriptors.

        Blocks while the other end is slow.

        Raises:
            ChannelClosed: nobody is there any more.
        """
        self.send_encoded(self.encode(value, len(fds)), fds)

    @staticmethod
    def encode(value: Any, num_fds: int = 0) -> bytes:
        """What `send` would write, for `send_encoded`: one value for many channels."""
        body = pickle.dumps(value, protocol=5)
        return _HEADER.pack(len(body), num_fds) + body

    def send_encoded(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send what `encode` made, and duplicates of as many descriptors as it was told.

        Raises:
            ChannelClosed: nobody is there any more.
        """
        try:
            with self._lock:
                if fds:
                    self._send_with_fds(frame, fds)
                else:
                    self._sock.sendall(frame)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the other end of the channel is gone") from error
        except OSError as error:
            if error.errno == errno.EBADF:
                raise ChannelClosed("the channel is closed") from error
            raise

    def _send_with_fds(self, frame: bytes, fds: Sequence[int]) -> None:
        for start in range(0, len(fds), _BATCH):
            rights = array.array("i", fds[start : start + _BATCH])
            carrier = frame[:1] if start == 0 else b"\0"
            self._sock.sendmsg([carrier], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            if start == 0:
                self._sock.sendall(frame[1 : _HEADER.size])
        self._sock.sendall(frame[_HEADER.size :])

    def recv(self, timeout: float | None = None) -> tuple[Any, list[int]]:
        """The next value and its descriptors.

        Args:
            timeout: seconds to wait; None waits until the other end is gone.

        Raises:
            TimeoutError: nothing whole came in time.
            ChannelClosed: the other end is gone and all it sent has been read.
        """
        while True:
            if (found := self._frame()) is not None:
                return found
            if self._eof:
                raise ChannelClosed("the other end of the channel is gone")
            if not _readable(self._sock, timeout):
                raise TimeoutError(f"nothing came in {timeout} s")
            self._fill()

    def drain(self) -> Iterator[tuple[Any, list[int]]]:
        """Every whole value that can be read without waiting. Check `eof` afterwards."""
        more = True
        while more:
            more = not self._eof and self._fill(wait=False)
            while self._buffer and (found := self._frame()) is not None:
                yield found

    @property
    def eof(self) -> bool:
        """Whether the other end is gone and everything it sent has been read from the socket."""
        return self._eof

    def _fill(self, *, wait: bool = True) -> bool:
        """Read what is there, descriptors included; whether there may be more, or the end."""
        flags = _FLAGS if wait else _FLAGS_NOW
        try:
            data, ancillary, _, _ = self._sock.recvmsg(self._size, socket.CMSG_SPACE(_BATCH * 4), flags)
        except (ConnectionResetError, BrokenPipeError):
            data, ancillary = b"", []
        except BlockingIOError:
            return False
        whole = len(data) < self._size
        # a large buffer for each small message costs more than the message
        self._size = _SMALL if whole else min(4 * self._size, _CHUNK)
        if not data:
            self._eof = True
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                self._fds.extend(received)
        self._buffer += data
        # a read ends at a message with descriptors, outside Linux before one as well
        return not (whole and not ancillary and _READS_ALL)

    def _frame(self) -> tuple[Any, list[int]] | None:
        """The next whole frame in the buffer."""
        if len(self._buffer) < _HEADER.size:
            return None
        length, num_fds = _HEADER.unpack_from(self._buffer)
        start = _HEADER.size + (max(0, -(-num_fds // _BATCH) - 1) if num_fds else 0)
        end = start + length
        if len(self._buffer) < end:
            return None
        value = pickle.loads(memoryview(self._buffer)[start:end].toreadonly())
        del self._buffer[:end]
        return value, [self._fds.popleft() for _ in range(num_fds)]

    def shut_sending(self) -> None:
        """Let the other end see that nothing more comes, and go on receiving."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed, or the other end is gone: it sees that too

    def close(self) -> None:
        """Close this end; may be called twice."""
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())
