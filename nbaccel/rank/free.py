"""Letting go of a collective that will never end: its connections to the other ranks are closed.

A rank blocked in gloo reacts to neither signal nor `abort`; closing the sockets it waits on raises there
within a millisecond, and a KeyboardInterrupt that was pending surfaces. Runs in the reporter's thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection

__all__ = ["close_connections"]

_Ends = tuple[str, str]


def close_connections(pids: Collection[int]) -> int:
    """Shut down every TCP connection of this process to these; how many there were.

    Connections to anybody else, the store and the user's own servers among them, stay. Linux only: by
    proc(5), /proc/net/tcp and the descriptors of both sides.
    """
    ends = _connections()
    theirs = {ends[inode] for pid in pids for inode in _sockets(pid).values() if inode in ends}
    closed = 0
    for fd, inode in _sockets(os.getpid()).items():
        if inode in ends and ends[inode][::-1] in theirs:
            try:
                with socket.socket(fileno=os.dup(fd)) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
                closed += 1
            except OSError:
                continue  # closed meanwhile, from either side
    return closed


def _connections() -> dict[str, _Ends]:
    """(local, remote) address of each TCP connection of this network namespace, by inode."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as file:
                next(file)
                for line in file:
                    fields = line.split()
                    found[fields[9]] = (fields[1], fields[2])
        except OSError:
            continue
    return found


def _sockets(pid: int) -> dict[int, str]:
    """The inode of each socket of a process, by descriptor."""
    found = {}
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if target.startswith("socket:["):
                found[int(fd)] = target[8:-1]
    except OSError:
        pass  # it has ended
    return found
