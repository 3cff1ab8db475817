"""What any engine offers the session: ranks that start, end, and can be ended."""

from __future__ import annotations

import signal as _signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbaccel.rank.spec import RunSpec
from nbaccel.wire.channel import Channel
from nbaccel.wire.events import ExceptionInfo
from nbaccel.wire.payload import Parcel

__all__ = ["Control", "Engine", "Exited", "Failed", "Opening", "Ports", "Respawned", "Retry", "Started"]


@dataclass(frozen=True, slots=True)
class Opening:
    """The run's own process exists and opens the payload: the warm server was there."""

    pid: int


@dataclass(frozen=True, slots=True)
class Retry:
    """These ranks cannot be made this way; ask again with what this says."""

    reason: str
    package: str | None = None
    """A package the template must do without."""
    open_in_ranks: bool = False
    """Each rank must open the payload for itself."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The payload could not be opened, or a rank not be made."""

    info: ExceptionInfo


@dataclass(frozen=True, slots=True)
class Started:
    """The ranks exist."""

    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Respawned:
    """A rank exists again, in place of one that ended."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A rank's process ended. Negative codes are signals."""

    rank: int
    exitcode: int
    detail: str = ""


Control = Opening | Retry | Failed | Started | Respawned | Exited


@dataclass(slots=True, kw_only=True)
class Ports:
    """The notebook's ends of one run's ranks; whoever holds them closes them."""

    control: Channel
    """Answers from whoever made the ranks; its end means that no process of the run is left."""
    channels: tuple[Channel, ...]
    stdouts: tuple[int, ...]
    stderrs: tuple[int, ...]
    opening: int | None = None
    """The run's own process while it opens the payload: it does not listen, so it can only be killed."""
    notes: list[str] = field(default_factory=list)
    """What the person should know about how the ranks came to be."""


class Engine(Protocol):
    """How ranks come to be and end."""

    def start(self, spec: RunSpec, parcel: Parcel, fd: int | None, *, after: Sequence[Retry] = ()) -> Ports:
        """Ask for the ranks of a run; returns at once. What becomes of it comes over `Ports.control`.

        Raises:
            LaunchError: nobody is there who could make them.
        """
        ...

    def lost(self) -> bool:
        """Whether who was asked last has ended: then the end of a run's own process is no fault of the run."""
        ...

    def exits(self, ports: Ports) -> list[Control]:
        """What has come over the control channel; never blocks."""
        ...

    def respawn(self, ports: Ports, rank: int, generation: int) -> None:
        """Make a rank again whose process has ended, with new connections in `ports`, which the caller has
        closed before; `generation`: of the process group it is to join."""
        ...

    def kill(self, ports: Ports, ranks: Collection[int], signal: _signal.Signals) -> None:
        """Send a signal to ranks; SIGKILL ends what they started as well."""
        ...

    def stop(self, ports: Ports) -> None:
        """End whatever is left of the run; the control channel's end says that it is done."""
        ...

    def log(self) -> str:
        """The last words of the processes that make ranks, for an error message."""
        ...
