"""The rank's end of its channel: what it tells, and what comes, sorted by who waits for it."""

from __future__ import annotations

import select
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar, final

from nbaccel.rank.spec import Call, Exit, Interrupt, Join
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.events import Event, Metric, Progress, Request

__all__ = ["Port"]

_Command = Call | Join | Exit
_Found = TypeVar("_Found")


@final
class Port:
    """The rank's end of the channel: `wire.events` speaks through it.

    Attributes:
        moves: how often each thread, by its ident, has told of progress in a loop or been given something to do.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.moves: Counter[int] = Counter()
        self._commands: deque[tuple[_Command, list[int]]] = deque()
        self._replies: dict[str, Any] = {}
        self._requests: list[Request] = []
        self._comms: deque[Request] = deque()
        self._interrupted = -1
        self._changed = threading.Condition()
        self._watched = False  # whether a thread waits at the channel, for all
        # no two threads may use one at the same time
        self._poll, self._glance = select.poll(), select.poll()
        self._poll.register(channel, select.POLLIN)
        self._glance.register(channel, select.POLLIN)

    def emit(self, event: Event, fds: tuple[int, ...] = ()) -> None:
        if isinstance(event, (Progress, Metric)):
            self.moves[threading.get_ident()] += 1
        self._channel.send(event, fds)

    def requests(self) -> list[Request]:
        with self._changed:
            if not self._watched:
                self._read()
            found, self._requests = self._requests, []
        return found

    def is_interrupted(self, call: int) -> bool:
        """Whether SIGINT is sent for this call, or has been before it began."""
        with self._changed:
            while self._watched and self._glance.poll(0):
                self._changed.wait()  # the thread that watches is about to sort it
            if not self._watched:
                self._read()
            return self._interrupted == call

    def wait_reply(self, id: str) -> Any:
        """The answer to the question of this id, once it is there."""
        return self._wait(lambda: id in self._replies, lambda: self._replies.pop(id))

    def wait_comm(self) -> Request:
        """The next message to a widget of this rank."""
        return self._wait(lambda: bool(self._comms), self._comms.popleft)

    def _wait(self, there: Callable[[], bool], take: Callable[[], _Found]) -> _Found:
        """One of the threads that wait does so at the channel, and sorts what comes for the others too."""
        with self._changed:
            while not there():
                if self._channel.eof:
                    raise ChannelClosed("the notebook is gone")
                if self._watched:
                    self._changed.wait()
                else:
                    self._watch()
            return take()

    def _watch(self) -> None:
        """Until something comes, without the lock."""
        self._watched = True
        self._changed.release()
        try:
            self._poll.poll()
        finally:
            self._changed.acquire()
            self._watched = False
            self._read()
            self._changed.notify_all()

    def _read(self) -> None:
        """Sort what has arrived by who it is for."""
        for message, fds in self._channel.drain():
            if isinstance(message, Interrupt):
                self._interrupted = message.call
            elif not isinstance(message, Request):
                self._requests.clear()
                self._commands.append((message, fds))
            elif message.kind == "input":
                self._replies[message.name] = message.value
            elif message.kind == "comm":
                self._comms.append(message)
            else:
                self._requests.append(message)

    def next_command(self) -> tuple[_Command, list[int]]:
        """Wait for what to do next; requests that come while nothing runs are for nobody."""
        command = self._wait(lambda: bool(self._commands), self._commands.popleft)
        # the same function called again may stand in frames of the same addresses
        self.moves[threading.get_ident()] += 1
        return command
