"""A template: the server's image plus the packages the notebook has imported; runs are forked from it.

A package that leaves it unsafe to fork (a thread, an open device) is named and the template refuses to
serve; the server, still clean, makes another without that package. Between launches it keeps a run's own
process and ranks standing by (`engines.parent`): forking takes time in proportion to the memory of what was
imported.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

from nbaccel.engines import hugepages, parent
from nbaccel.engines.base import Retry
from nbaccel.engines.children import Children
from nbaccel.rank import threads
from nbaccel.rank.process import call_process, die_with_parent, unclean
from nbaccel.wire.channel import Channel, ChannelClosed, pair

__all__ = ["Preload", "Preloaded", "outlive_children", "serve"]

# Not at once after a launch: its ranks want the cores now.
_STAND_BY_AFTER = 0.5
# How many ranks wait: as many as the largest run so far had. Each costs about 1 MB of page tables.
_LEAST_RANKS, _MOST_RANKS = 4, 16


@dataclass(frozen=True, slots=True)
class Preload:
    """To a template: import these too."""

    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preloaded:
    """From a template: packages that could not be imported there, with the reason."""

    failures: tuple[tuple[str, str], ...]


def serve(
    channel: Channel,
    *,
    start_method: str,
    sys_path: Sequence[str],
    modules: Sequence[str],
    without: Sequence[str],
) -> NoReturn:
    """Be a template until the notebook closes the channel and the last run forked here has ended.

    Args:
        sys_path: where the notebook finds installed packages.
        modules: what to import first.
        without: packages not to import: they made an earlier template unsafe.
    """
    call_process("nb-template")
    own_path = list(sys.path)
    sys.path[:] = [*sys_path, *(entry for entry in own_path if entry not in sys_path)]
    room = _Room(channel, start_method, without)
    try:
        room.preload(modules)
        while True:
            message, fds = room.next_message()
            if isinstance(message, Preload):
                room.preload(message.modules)
            else:
                room.launch(message, fds)
                for fd in fds:
                    os.close(fd)
    except ChannelClosed:
        room.dismiss()
        outlive_children()
        os._exit(0)


@final
class _Room:
    """A template's state."""

    def __init__(self, channel: Channel, start_method: str, without: Sequence[str]) -> None:
        self._channel = channel
        self._start_method = start_method
        self._skipped = set(without)
        self._children = Children()
        self._culprit: Retry | None = None
        self._standing_by: Channel | None = None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._ranks = min(max(cores, _LEAST_RANKS), _MOST_RANKS)

    def next_message(self) -> tuple[Any, list[int]]:
        """The next thing the notebook wants; while it wants nothing, have a fork stand by."""
        while True:
            idle = self._standing_by is None and self._culprit is None and self._start_method == "fork"
            try:
                return self._children.next_message(self._channel, timeout=_STAND_BY_AFTER if idle else None)
            except TimeoutError:
                pass  # left before forking: what a rank raises must not carry this as its context
            if self._settled():
                self._stand_by(self._ranks)

    def _settled(self) -> bool:
        """Make what was imported here quick to fork; False when the notebook wants something first."""
        for address in hugepages.own_ranges():
            if self._children.wait(self._channel.fileno(), timeout=0):
                return False
            if not hugepages.collapse(address):
                break
        return True

    def preload(self, modules: Sequence[str]) -> None:
        """Import module after module; stop at the first that makes this process unsafe to fork."""
        if self._start_method != "fork":
            return
        self.dismiss()
        failures = {}
        for name in modules:
            package = name.partition(".")[0]
            if self._culprit or package in self._skipped or name in sys.modules:
                continue
            if (why := _import(name)) and name == package:
                failures[package] = why
                self._skipped.add(package)
            if reason := unclean():
                problem = f"importing {package} makes a process unsafe to fork: {reason}"
                self._culprit = Retry(problem, package=package)
        threads.find_pools()
        gc.collect()
        gc.freeze()
        if failures:
            self._channel.send(Preloaded(tuple(failures.items())))

    def launch(self, launch: parent.Launch, fds: Sequence[int]) -> None:
        """Hand the run to the fork that stands by, else to a new one."""
        if self._culprit is not None:
            _refuse(self._culprit, fds[0])
            return
        if self._standing_by is None or not _sent(self._standing_by, launch, fds):
            self._stand_by(ranks=0).send(launch, fds)  # it makes them when it knows which
        self._ranks = min(max(self._ranks, launch.spec.num_processes), _MOST_RANKS)
        self.dismiss()

    def dismiss(self) -> None:
        """Let go of the fork that stands by: it has its run, or ends."""
        if self._standing_by is not None:
            self._standing_by.close()
            self._standing_by = None

    def _stand_by(self, ranks: int) -> Channel:
        ours, theirs = pair()
        me = os.getpid()
        if os.fork() == 0:
            self._channel.close()
            self._children.forget()
            ours.close()
            die_with_parent(me)
            parent.serve(Channel(theirs), start_method=self._start_method, ranks=ranks)
        theirs.close()
        self._standing_by = Channel(ours)
        return self._standing_by


def _sent(channel: Channel, launch: parent.Launch, fds: Sequence[int]) -> bool:
    """Whether the fork that stands by took the run; somebody may have killed it."""
    try:
        channel.send(launch, fds)
    except ChannelClosed:
        return False
    return True


def _refuse(culprit: Retry, control: int) -> None:
    """Tell the run's notebook why not, over its own control channel."""
    answer = Channel(socket.socket(fileno=os.dup(control)))
    try:
        answer.send(culprit)
    except ChannelClosed:
        pass  # the notebook gave the launch up meanwhile
    answer.close()


def _import(name: str) -> str | None:
    """Import a module; why it could not be, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  # an import may fail in any way
        return f"{type(error).__name__}: {error}"
    return None


def outlive_children() -> None:
    """Runs die with the process that forked them, so stay until the last has ended."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return
