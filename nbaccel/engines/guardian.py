"""The guardian: parent of the server, and the end of everything when the notebook's process is gone.

No threads, no torch. It adopts what is orphaned below it and ends that: a run's own process does so for its
run, so what comes here belongs to one that was killed. It watches the notebook's process and the server, and
when either ends kills every descendant, DataLoader workers and setsid'ed grandchildren included.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from nbaccel.engines.children import Children
from nbaccel.rank.process import become_subreaper, call_process, kill_children_but, kill_descendants

__all__ = ["main"]

# Seconds between looks: nothing tells a process that it has adopted another.
_LOOK = 1.0


def main(
    control: int, lifeline: int, notebook: int, log: int, start_method: str, lean: bool = False
) -> NoReturn:
    """Guard a server for process `notebook`.

    Args:
        control: descriptor of the server's end of its channel.
        lifeline: reading end of a pipe whose other end only the notebook's process holds.
        log: descriptor that takes what the processes here print.
        lean: whether torch alone is enough for that.
        start_method: "fork" warms the server up with torch; "spawn" keeps it bare.
    """
    become_subreaper()
    call_process("nb-guardian")
    os.dup2(log, 1)
    os.dup2(log, 2)
    me = os.getpid()
    server = os.fork()
    if server == 0:
        os.close(lifeline)
        from nbaccel.engines import server as room

        room.serve(control, guardian=me, start_method=start_method, lean=lean)
    os.close(control)
    children = Children()
    ends = [lifeline, *_pidfds(notebook)]
    while not children.wait(*ends, timeout=_LOOK):
        if any(children.reap(pid) is not None and pid == server for pid in children.ended()):
            break
        kill_children_but(server)
    kill_descendants()
    sys.exit(0)


def _pidfds(*pids: int) -> list[int]:
    """Descriptors that become readable when these processes end, where the platform has them."""
    if not hasattr(os, "pidfd_open"):
        return []
    found = []
    for pid in pids:
        try:
            found.append(os.pidfd_open(pid))
        except ProcessLookupError:
            sys.exit(0)  # already gone, and the server dies with us
        except OSError:
            return []  # an old Linux
    return found
