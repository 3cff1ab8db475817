"""The vocabulary between a rank and everything that watches it.

A rank says what happens by `emit(Event)`; it hears what is wanted of it by `requests()`. Both are
no-ops in a process that is not a rank, so the training core calls them without asking where it runs.
The relay in the notebook's process stamps `rank` from the connection an event arrived on; `time` is
taken where the event was made (seconds since the epoch).
"""

from __future__ import annotations

import functools
import operator
import time as _time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

__all__ = [
    "Applied",
    "CommMessage",
    "Concluded",
    "Died",
    "Display",
    "Event",
    "ExceptionInfo",
    "Frame",
    "Halted",
    "Heartbeat",
    "InputRequest",
    "Joined",
    "Knob",
    "Metric",
    "Output",
    "Port",
    "Progress",
    "Raised",
    "Request",
    "Returned",
    "Stalled",
    "Status",
    "active",
    "connect",
    "emit",
    "requests",
]

State = Literal["starting", "idle", "running", "compiling", "waiting", "done", "failed", "lost"]


@functools.cache
def _values(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    """What takes the fields' values out of an event."""
    return operator.attrgetter(*(one.name for one in fields(kind)))


@functools.cache
def _setters(kind: type) -> tuple[Callable[[Any, Any], None], ...]:
    return tuple(getattr(kind, one.name).__set__ for one in fields(kind))


def _made_again(kind: type, values: tuple[Any, ...]) -> Any:
    event: Any = object.__new__(kind)
    for put, value in zip(_setters(kind), values, strict=False):
        put(event, value)
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    rank: int = -1
    """The rank it comes from; -1 until the relay has stamped it."""
    time: float = field(default_factory=_time.time)
    """Seconds since the epoch, on the clock of the machine the rank runs on."""

    def __reduce__(self) -> tuple[Any, ...]:
        # a frozen dataclass with slots asks for its fields' names each time, on both sides
        kind: Any = type(self)
        return _made_again, (kind, _values(kind)(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(_Event):
    """Bytes a rank, or a process it started, wrote to file descriptor 1 or 2."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(_Event):
    """How far a loop is. `total` is None when the length is unknown."""

    name: str
    step: float
    total: float | None = None
    epoch: int | None = None
    unit: str = "it"
    times: Mapping[str, float] | None = None
    """Seconds spent per part of the step (data, transfer, forward, backward, communication, optimizer…)
    since the previous Progress of the same name."""
    note: str = ""
    """What the loop says beside its bar."""
    workers: int | None = None
    """Processes that fetch its batches; None when that is not known."""
    depth: int | None = None
    """How many loops it stands in; None when that is not known."""
    ended: bool = False
    """It does not go on, though it may not be at its end; false as well where nobody could tell."""
    divisor: int | None = None
    """Its figures are told with prefixes (k, M, G), each this many times the one before; None: as they are."""
    label: str | None = None
    """What it is called where it is shown; None: its name."""
    serial: int | None = None
    """Tells apart loops of one name; None: it is one loop, which begins again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(_Event):
    """Values logged at an optimizer step. `reduced` tells a value of all ranks from one of this rank."""

    values: Mapping[str, float]
    step: int
    reduced: Literal["mean", "sum"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob(_Event):
    """A value that can be changed from outside while the loop runs: said when the loop first asks for it, and
    again whenever it has changed. The main rank says it for all; a change is asked for by a `Request`."""

    name: str
    value: bool | int | float | str
    step: int
    """Optimizer steps made when it got this value."""
    low: float | None = None
    """The least value it takes; None: unlimited, or not a number."""
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Display(_Event):
    """Something to show beside the text: what `display`, `plt.show` and last expressions make."""

    data: Mapping[str, Any]
    """Contents by MIME type; binary ones in base64."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    """The display id, with which it can be updated."""
    update: bool = False
    """It takes the place of what was shown under this name."""
    clear: Literal["now", "next"] | None = None
    """Nothing to show: remove what this rank has shown, now or when it shows the next thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommMessage(_Event):
    """What a widget of the rank tells the notebook's page, as in Jupyter's messaging protocol; what the page
    tells it is a `Request` of kind "comm" with the comm's id for name, and for value data and buffers."""

    kind: Literal["comm_open", "comm_msg", "comm_close"]
    comm: str
    """The comm's id."""
    target: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRequest(_Event):
    """The rank waits for a line from a person; the answer is a `Request` of kind "input" with this id for name,
    and for value the line, or an EOFError when nobody can be asked."""

    id: str
    prompt: str
    password: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(_Event):
    """A change of what the rank is doing."""

    state: State
    detail: str = ""
    pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied(_Event):
    """An option of the run that the rank's code really uses, and with which value."""

    option: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted(_Event):
    """All ranks leave their loops after this optimizer step, before their end: it was asked for, or their time was
    over."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned(_Event):
    """The call ended well. `value` is a `wire.payload.Parcel`, or None when the value was not asked for."""

    call: int
    value: Any = None
    collectives: int = 0
    """How many collectives this rank has called in its session's process group; -1 when it is gone."""


_MOST_OF_HEADLINE = 500  # characters


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a remote traceback."""

    filename: str
    lineno: int
    function: str
    source: str
    """The line's text, without indentation; empty when it could not be found."""


@dataclass(frozen=True, slots=True)
class ExceptionInfo:
    """A remote exception in words, so that it can be shown even when its class cannot be loaded here."""

    type_name: str
    message: str
    """The last line(s) of the traceback, type included, as Python prints them, notes too."""
    frames: tuple[Frame, ...]
    cause: ExceptionInfo | None = None
    context: ExceptionInfo | None = None
    exceptions: tuple[ExceptionInfo, ...] = ()
    """Those in a group."""

    @property
    def headline(self) -> str:
        """Type and message in one line; "…" where the message goes on."""
        lines = self.message.splitlines() or [self.type_name]
        # not always the first line: a syntax error's is where it is
        at = next((at for at, line in enumerate(lines) if line.startswith(self.type_name)), len(lines) - 1)
        more = " …" if at + 1 < len(lines) or len(lines[at]) > _MOST_OF_HEADLINE else ""
        inner = f": {self.exceptions[0].headline}" if self.exceptions else ""
        return lines[at][:_MOST_OF_HEADLINE] + more + inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised(_Event):
    """The call ended with an exception. `error` is a Parcel of it, or None when it cannot be pickled."""

    call: int
    info: ExceptionInfo
    error: Any = None
    collectives: int = 0
    """As in `Returned`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(_Event):
    """A session's rank is in the process group again, after a call that left it broken."""

    replicas: Mapping[str, str]
    """Checksum of the parameters of each DistributedDataParallel, by its name in this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalled(_Event):
    """Not from a rank but seen from outside: ranks wait for one another, or go on again."""

    text: str
    report: str = ""
    """With every rank's stack, once it has lasted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(_Event):
    """Measured in the rank beside its main thread: it lives, what it holds, what it is at. `wire.snapshot.Vitals`
    tells what each means."""

    memory: int | None = None
    device_memory: int | None = None
    utilization: int | None = None
    doing: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Died(_Event):
    """The rank's process ended. Negative exit codes are signals; `asked`: somebody ended the run."""

    exitcode: int
    detail: str = ""
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Concluded(_Event):
    """Not from a rank: the run is over for whoever asked for it, whatever its ranks have said last."""

    problem: str = ""
    """What was raised instead of the values, where that is no rank's own failure: it could not start, took too long or
    hung."""


Event = (
    Applied
    | CommMessage
    | Concluded
    | Display
    | Halted
    | Heartbeat
    | InputRequest
    | Joined
    | Knob
    | Output
    | Progress
    | Metric
    | Status
    | Returned
    | Stalled
    | Raised
    | Died
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the notebook wants of a rank: stop, save now, set a knob, or be interrupted at a step of all ranks."""

    kind: Literal["stop", "save", "knob", "interrupt", "input", "comm"]
    name: str = ""
    value: Any = None


class Port(Protocol):
    """The rank's end of the channel: `rank.worker` supplies it."""

    def emit(self, event: Event) -> None: ...
    def requests(self) -> list[Request]: ...


_port: Port | None = None


def connect(port: Port | None) -> None:
    """Let `emit` and `requests` speak through `port` from now on (None: through nothing)."""
    global _port
    _port = port


def active() -> bool:
    """Whether anybody listens: lets a caller skip the work of making an event."""
    return _port is not None


def emit(event: Event) -> None:
    """Tell whoever watches this rank; nothing happens in a process that is not a rank."""
    if _port is not None:
        _port.emit(event)


def requests() -> list[Request]:
    """What has been asked of this rank since the last call, oldest first. Never blocks."""
    return [] if _port is None else _port.requests()
