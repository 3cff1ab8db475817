"""Waiting for a message and for children at once, and reaping them in the right order."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from typing import Any, final

from nbaccel.wire.channel import Channel, ChannelClosed

__all__ = ["Children"]


@final
class Children:
    """Wakes this process when a child ends. One per process, made in its main thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._statuses: dict[int, int] = {}  # of children that had to be reaped to be seen
        # a handler must exist for the byte to be written
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def wait(self, *fds: int, timeout: float | None = None) -> bool:
        """Sleep until one of `fds` is readable, a child has ended or `timeout` seconds passed; whether it
        is the first."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        poll.register(self._read, select.POLLIN)
        readable = {number for number, _ in poll.poll(None if timeout is None else timeout * 1000)}
        if self._read in readable:
            try:
                os.read(self._read, 4096)
            except BlockingIOError:
                pass
        return not readable.isdisjoint(fds)

    def next_message(self, channel: Channel, timeout: float | None = None) -> tuple[Any, list[int]]:
        """The channel's next message; children that end meanwhile are reaped.

        Raises:
            TimeoutError: `timeout` seconds passed, or a child ended, without one.
            ChannelClosed: the other end is gone.
        """
        while True:
            for pid in self.ended():
                self.reap(pid)
            # one read may have brought two messages: then the second is here and not at the descriptor
            for message in channel.drain():
                return message
            if channel.eof:
                raise ChannelClosed("the other end of the channel is gone")
            if self.wait(channel.fileno(), timeout=timeout):
                continue
            if timeout is not None:
                raise TimeoutError

    def ended(self) -> Iterator[int]:
        """Process ids of children that have ended; each is still a zombie while it is yielded, except on macOS
        before Python 3.13."""
        try:
            while pid := self._next_ended():
                yield pid
        except ChildProcessError:
            return

    def _next_ended(self) -> int:
        """0 when none has."""
        if hasattr(os, "waitid"):
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return info.si_pid if info is not None else 0
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            self._statuses[pid] = status
        return pid

    def reap(self, pid: int) -> int:
        """The exit code of a child that has ended; negative for a signal."""
        status = self._statuses.pop(pid, None)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1] if status is None else status)

    def forget(self) -> None:
        """In a fresh fork of this process: leave the signal as a new process has it."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._read)
        os.close(self._write)
