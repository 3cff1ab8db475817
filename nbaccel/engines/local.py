"""Ranks on this host, forked from the warm server (or spawned)."""

from __future__ import annotations

import fcntl
import os
import signal as _signal
from collections.abc import Collection, Sequence
from typing import TypeVar, final

from nbaccel.engines.base import Control, Opening, Ports, Retry
from nbaccel.engines.forkserver import ForkServer, server_for
from nbaccel.engines.parent import Launch, Respawn
from nbaccel.errors import LaunchError
from nbaccel.rank.spec import RunSpec
from nbaccel.wire.channel import Channel, ChannelClosed, pair
from nbaccel.wire.payload import Parcel

__all__ = ["LocalEngine"]

_T = TypeVar("_T")

_PIPE_SIZE = 1 << 18  # room for a burst of output while the notebook's process is busy


@final
class LocalEngine:
    """Makes ranks on this host.

    Args:
        start_method: "fork" from the warm server, or "spawn" fresh interpreters.
        lean: a server that is sooner ready will do, if there is none yet.
    """

    def __init__(self, start_method: str = "fork", *, lean: bool = False) -> None:
        self._lean = lean
        self._start_method = start_method
        self._server: ForkServer | None = None

    def start(self, spec: RunSpec, parcel: Parcel, fd: int | None, *, after: Sequence[Retry] = ()) -> Ports:
        try:
            return self._ask(spec, parcel, fd, after)
        except ChannelClosed:  # somebody killed it in this moment
            if self._server is not None:
                self._server.close()
        try:
            return self._ask(spec, parcel, fd, after)
        except ChannelClosed as error:
            raise LaunchError(f"the process that makes ranks is gone.\n{self.log()}") from error

    def _ask(self, spec: RunSpec, parcel: Parcel, fd: int | None, after: Sequence[Retry]) -> Ports:
        server, notes = server_for(spec.environ, self._start_method, lean=self._lean)
        self._server = server
        for retry in after[-1:]:
            if retry.package:
                server.do_without(retry.package)
                notes.append(f"{retry.reason}; it is left out")
            elif retry.open_in_ranks:
                notes.append(f"{retry.reason}; each rank opens its own")
        open_in_ranks = any(retry.open_in_ranks for retry in after)
        ends = _Ends(spec.num_processes)
        try:
            launch = Launch(spec, parcel, open_in_ranks, has_payload=fd is not None)
            fds = [ends.control[1].fileno(), *([] if fd is None else [fd]), *ends.theirs()]
            notes += server.launch(launch, fds)
        except ChannelClosed:
            ends.close()
            raise
        return ends.keep(notes)

    def lost(self) -> bool:
        return self._server is None or self._server.lost

    def exits(self, ports: Ports) -> list[Control]:
        messages: list[Control] = [message for message, _ in ports.control.drain()]
        for message in messages:
            ports.opening = message.pid if isinstance(message, Opening) else None
        return messages

    def kill(self, ports: Ports, ranks: Collection[int], signal: _signal.Signals) -> None:
        try:
            ports.control.send((tuple(ranks), int(signal)))
        except ChannelClosed:
            pass  # everything of the run is gone already

    def respawn(self, ports: Ports, rank: int, generation: int) -> None:
        ours, theirs = pair()
        pipes = _pipe(), _pipe()
        try:
            ports.control.send(Respawn(rank, generation), (theirs.fileno(), pipes[0][1], pipes[1][1]))
        except ChannelClosed:
            pass  # the group is gone: the end of the control channel says so
        theirs.close()
        for _, write in pipes:
            os.close(write)
        ports.channels = _with(ports.channels, rank, Channel(ours))
        ports.stdouts = _with(ports.stdouts, rank, pipes[0][0])
        ports.stderrs = _with(ports.stderrs, rank, pipes[1][0])

    def stop(self, ports: Ports) -> None:
        ports.control.shut_sending()
        if ports.opening is not None and not ports.control.eof:
            try:
                os.kill(ports.opening, _signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself

    def log(self) -> str:
        return self._server.log() if self._server else ""


@final
class _Ends:
    """Both ends of a run's connections until theirs have been handed over."""

    def __init__(self, num_processes: int) -> None:
        self.control = pair()
        self._channels = [pair() for _ in range(num_processes)]
        self._pipes = [_pipe() for _ in range(2 * num_processes)]

    def theirs(self) -> list[int]:
        """Channel, stdout and stderr of each rank."""
        found = []
        for rank, (_, channel) in enumerate(self._channels):
            found += [channel.fileno(), self._pipes[2 * rank][1], self._pipes[2 * rank + 1][1]]
        return found

    def keep(self, notes: list[str]) -> Ports:
        """Close theirs, keep ours."""
        self.control[1].close()
        for _, channel in self._channels:
            channel.close()
        for _, write in self._pipes:
            os.close(write)
        reads = [read for read, _ in self._pipes]
        return Ports(
            control=Channel(self.control[0]),
            channels=tuple(Channel(ours) for ours, _ in self._channels),
            stdouts=tuple(reads[::2]),
            stderrs=tuple(reads[1::2]),
            notes=notes,
        )

    def close(self) -> None:
        for ours, theirs in (self.control, *self._channels):
            ours.close()
            theirs.close()
        for read, write in self._pipes:
            os.close(read)
            os.close(write)


def _with(values: tuple[_T, ...], index: int, value: _T) -> tuple[_T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        try:
            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # this user's pipe buffers are used up: the ordinary size works too
    return read, write
