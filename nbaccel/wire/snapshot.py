"""What a rank tells of itself while it is busy or blocked: its stacks and its collectives.

The notebook's process sends an `Ask` over the reporter's own socketpair and gets one answer of the same
number. Nothing here needs the rank's main thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Answer", "Ask", "Collective", "Line", "Peer", "Records", "Stacks", "Thread", "Vitals"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to a rank's reporter."""

    id: int
    what: Literal["pulse", "stacks", "records"]
    """"pulse": only note where the main thread is; "stacks": every thread's; "records": collectives."""


@dataclass(frozen=True, slots=True)
class Line:
    """Where one frame of a stack is."""

    filename: str
    lineno: int
    function: str
    seconds: float | None = None
    """It has been in this frame for at least so long; None when that is not known."""


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread's Python frames."""

    name: str
    native_id: int
    frames: tuple[Line, ...]
    """The innermost first."""
    main: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A wait for one other rank: torch does not record send and recv."""

    op: str
    peer: int | None
    """None: whoever sends first."""
    tag: int


@dataclass(frozen=True, slots=True)
class Stacks:
    """Answer to "stacks"."""

    threads: tuple[Thread, ...]
    peer: Peer | None = None
    children: tuple[tuple[int, str], ...] = ()
    """Process id and name of what this rank started with multiprocessing."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective as torch's flight recorder has it."""

    group: str
    seq: int
    op: str
    sizes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    pending: bool
    seconds: float
    """Since it was called."""


@dataclass(frozen=True, slots=True)
class Records:
    """Answer to "records": what this rank called, the oldest first."""

    collectives: tuple[Collective, ...] = ()
    members: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Global ranks of each process group."""
    counts: tuple[tuple[str, int], ...] = ()
    """Collectives called per group by torch's own count, where there is no flight recorder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What a rank's process holds and what its main thread is at; with the answer to a "pulse", now and then."""

    memory: int | None = None
    """Bytes of host memory: its own and its part of what it shares with other ranks."""
    device_memory: int | None = None
    """Bytes torch has reserved on its accelerator."""
    utilization: int | None = None
    """Percent of the time its accelerator was busy of late, with whatever process."""
    doing: str = ""
    """"waiting" for the other ranks, "compiling", or nothing special."""
    detail: str = ""
    """What it waits in."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the reporter answers with."""

    id: int
    body: Stacks | Records | None
    still: float = 0.0
    """For so long the main thread has not moved, as far as has been looked; seconds."""
    vitals: Vitals | None = None
