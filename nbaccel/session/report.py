"""The failure of a run in words: which rank, its traceback, what became of the others."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nbaccel.errors import LeftLoopError, WorkerError
from nbaccel.ownership import is_users, persons_part
from nbaccel.session.results import rank_ranges
from nbaccel.session.stacks import place
from nbaccel.wire.events import Died, ExceptionInfo, Frame, Raised
from nbaccel.wire.snapshot import Line

__all__ = [
    "CellLabel",
    "Outcome",
    "causes",
    "explain_exit",
    "first_failures",
    "of_several",
    "render",
    "user_place",
    "waited_in",
    "worker_error",
]

CellLabel = Callable[[str], str | None]
"""From a file name to what the front end calls it ("Cell In[3]"); None for an ordinary file."""

Failure = Raised | Died

# A killed rank's peers notice the broken connection before we hear of the kill, and those of one that raises
# may hear that it has left the loop before it has told its error.
_SAME_MOMENT = 1.0

_C10D = os.path.join("torch", "distributed", "distributed_c10d.py")
_BACKWARD = os.path.join("torch", "autograd", "graph.py")
# What torch raises in a collective whose other side is gone.
_BROKEN_TYPES = ("RuntimeError", "torch.distributed.DistBackendError", "torch.distributed.DistNetworkError")
_BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process")
_ON_PURPOSE = f"{LeftLoopError.__module__}."
_LEFT_LOOP = f"{LeftLoopError.__module__}.{LeftLoopError.__qualname__}"

_RED, _GREEN, _BOLD, _OFF = "\x1b[31m", "\x1b[32m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known once no rank runs any more."""

    num_ranks: int
    failures: Mapping[int, Failure]
    """By rank: the exception it raised, or how it ended without an answer."""
    ended_by_us: Mapping[int, signal.Signals] = field(default_factory=dict)
    """Ranks that had not ended by themselves, and the last signal they were sent."""
    returned: frozenset[int] = frozenset()
    last_words: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The last lines of output by rank."""
    folder: str | None = None
    grace: float = 1.0
    keep: bool = False
    """Whether the ranks stay: `ended_by_us` then says which were stopped."""
    ranks: tuple[int, ...] | None = None
    """Those that were to run it; None is all."""
    notes: tuple[str, ...] = ()
    """Last lines."""


def worker_error(outcome: Outcome, label: CellLabel) -> WorkerError:
    """The error the cell shows."""
    ranks = first_failures(outcome)
    plain = "\n".join(_lines(outcome, ranks, label, colour=False))
    coloured = tuple(_lines(outcome, ranks, label, colour=True))
    codes = {rank: event.exitcode for rank, event in outcome.failures.items() if isinstance(event, Died)}
    return WorkerError(plain, ranks=ranks, exitcodes=codes, rendered=coloured)


def first_failures(outcome: Outcome) -> tuple[int, ...]:
    """The rank whose failure caused the others (`causes`), then those that failed the same way."""
    own = {r: e for r, e in outcome.failures.items() if r not in outcome.ended_by_us or isinstance(e, Raised)}
    if not own:
        own = dict(outcome.failures)
    first, *others = sorted(own, key=lambda rank: own[rank].time)
    for rank in others:
        if causes(_info(own[rank]), own[rank].time, _info(own[first]), own[first].time):
            first = rank
    alike = [r for r in sorted(own) if r != first and _signature(own[r]) == _signature(own[first])]
    return (first, *alike)


def causes(info: ExceptionInfo | None, time: float, other: ExceptionInfo | None, then: float) -> bool:
    """Whether a failure is taken for the cause of another one, of another rank; None for a process that died.

    The earlier one by the ranks' clocks, in seconds; but in the same moment what ranks raise when another one is
    gone comes of the other's end.
    """
    if abs(time - then) < _SAME_MOMENT and _is_hearsay(info) != _is_hearsay(other):
        return _is_hearsay(other)
    return time < then


def _is_hearsay(info: ExceptionInfo | None) -> bool:
    """Whether it was raised because another rank was gone, by torch, by our checks, or from such an error."""
    if info is None:
        return False
    return _is_broken(info) or info.type_name == _LEFT_LOOP or _is_hearsay(info.cause or info.context)


def _info(event: Failure) -> ExceptionInfo | None:
    return event.info if isinstance(event, Raised) else None


def _signature(event: Failure) -> object:
    """Equal for failures that one traceback describes."""
    if isinstance(event, Died):
        return event.exitcode
    info = event.info
    return info.type_name, tuple((frame.filename, frame.lineno) for frame in info.frames)


def _lines(outcome: Outcome, ranks: tuple[int, ...], label: CellLabel, *, colour: bool) -> Iterable[str]:
    first = outcome.failures[ranks[0]]
    who = f"rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)} of {outcome.num_ranks}"
    # a plain traceback names the class by itself; IPython shows these lines alone
    title = "WorkerError: " if colour else ""
    if isinstance(first, Raised):
        yield from render(first.info, label, title=f"rank {ranks[0]}", colour=colour)
        yield ""
        at = f" (at {where})" if (where := user_place(first.info, label)) else ""
        yield _paint(f"{title}{who} failed: {first.info.headline}{at}", _BOLD + _RED, colour)
    else:
        end = of_several(explain_exit(first.exitcode, first.detail), len(ranks))
        yield _paint(f"{title}{who} {end}", _BOLD + _RED, colour)
        if first.detail:
            yield first.detail
        if words := outcome.last_words.get(ranks[0]):
            yield f"last words of rank {ranks[0]}:"
            yield from (f"  {word}" for word in words[-12:])
    yield from _fates(outcome, ranks, label)
    if outcome.folder:
        yield f"logs of every rank: {outcome.folder}"
    yield from outcome.notes


def _fates(outcome: Outcome, ranks: tuple[int, ...], label: CellLabel) -> Iterable[str]:
    """One line per group of other ranks with the same end."""
    fates: dict[str, list[int]] = {}
    for rank in range(outcome.num_ranks) if outcome.ranks is None else outcome.ranks:
        if rank not in ranks:
            fates.setdefault(_fate(outcome, rank, label), []).append(rank)
    for fate, who in fates.items():
        yield f"rank{'s' if len(who) > 1 else ''} {rank_ranges(who)} {of_several(fate, len(who))}"


def of_several(fate: str, count: int) -> str:
    """What became of a rank, said of so many."""
    return f"were {fate[4:]}" if count > 1 and fate.startswith("was ") else fate


def _fate(outcome: Outcome, rank: int, label: CellLabel) -> str:
    event = outcome.failures.get(rank)
    if isinstance(event, Raised) and (waited := waited_in(event.info, label)):
        return waited
    if outcome.keep and rank in outcome.ended_by_us and isinstance(event, Raised):
        where = user_place(event.info, label)
        return f"was stopped{f' at {where}' if where else ''}"
    if isinstance(event, Raised):
        return f"raised after it: {event.info.headline[:200]}"
    if rank in outcome.returned:  # what may have kept it from leaving is another matter
        return "had returned"
    if rank in outcome.ended_by_us:
        name = outcome.ended_by_us[rank].name
        return f"did not end in the {outcome.grace:g} s given: ended by {name}"
    return explain_exit(event.exitcode, event.detail) if isinstance(event, Died) else "ended by itself"


def waited_in(info: ExceptionInfo, label: CellLabel) -> str | None:
    """In which collective, called from where, a rank waited that was stopped or lost its peers."""
    op = _waited_in(info)
    if op is None and info.type_name == "KeyboardInterrupt" and info.context is not None:
        # it was stopped, then freed: it waited where its connection broke
        op = _waited_in(info.context)
        if op is None and _is_broken(info.context):
            op = "a collective"  # called by C++ code, as when DDP makes its buckets
    if op is None:
        return None
    where = user_place(info, label)
    return f"waited in {op}{f', called from {where}' if where else ''}"


def _waited_in(info: ExceptionInfo) -> str | None:
    """The collective whose peers were gone, or that was interrupted; None when it raised by itself."""
    if info.type_name != "KeyboardInterrupt" and not _is_broken(info):
        return None
    for frame in info.frames:  # the outermost of torch's is what the person called
        if frame.filename.endswith(_C10D) and not frame.function.startswith("_"):
            return frame.function
        if frame.filename.endswith(_BACKWARD):
            return "backward"
    return None


def _is_broken(info: ExceptionInfo) -> bool:
    """Whether it is what a rank raises whose connection to another one ended."""
    return info.type_name in _BROKEN_TYPES and any(word in info.message for word in _BROKEN)


def user_place(info: ExceptionInfo, label: CellLabel) -> str | None:
    """Where in the person's own code it was raised, as "Cell In[7] line 12" or "train.py:88"."""
    for frame in reversed(info.frames):
        if frame.filename and is_users(frame.filename):
            return place(Line(frame.filename, frame.lineno, frame.function), label)
    return None


def explain_exit(exitcode: int, detail: str = "") -> str:
    """An exit code as a sentence about the rank; what killed it is not guessed where `detail` tells."""
    if exitcode >= 0:
        return f"ended without a result, exit code {exitcode} (os._exit, or a library that ends the process)"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    hints = {
        "SIGKILL": ": something killed it; without a hand of yours that is usually the kernel running out of memory",
        "SIGSEGV": ": a crash in compiled code",
        "SIGABRT": ": compiled code gave up, often two ranks in one collective with different shapes",
        "SIGBUS": ": memory it had mapped went away, often a file overwritten while loaded or a full /dev/shm",
    }
    hint = "" if name == "SIGKILL" and detail else hints.get(name, "")
    return f"was ended by {name}{hint}"


def render(info: ExceptionInfo, label: CellLabel, *, title: str, colour: bool) -> Iterable[str]:
    """A remote traceback as Python prints one, cells called what the front end calls them."""
    if info.cause is not None:
        yield from render(info.cause, label, title=title, colour=colour)
        yield "\nThe above exception was the direct cause of the following exception:\n"
    elif info.context is not None:
        yield from render(info.context, label, title=title, colour=colour)
        yield "\nDuring handling of the above exception, another exception occurred:\n"
    if info.frames:
        yield f"Traceback on {title} (most recent call last):"
    for frame in _shown(info):
        if not frame.filename:
            yield f"  {frame.function}"
            continue
        place = label(frame.filename) or f'File "{frame.filename}"'
        where = f"{_paint(place, _GREEN, colour)}, line {_paint(str(frame.lineno), _GREEN, colour)}"
        yield f"  {where}, in {frame.function}"
        if frame.source:
            yield f"    {frame.source}"
    message = _with_cell_names(info.message, label)
    head, _, rest = message.partition(":")
    yield f"{_paint(head, _RED, colour)}:{rest}" if rest else _paint(head, _RED, colour)
    for number, inner in enumerate(info.exceptions, 1):
        yield f"  in it, {number} of {len(info.exceptions)}:"
        for text in render(inner, label, title=title, colour=colour):
            yield from (f"  {line}" for line in text.split("\n"))


def _shown(info: ExceptionInfo) -> Sequence[Frame]:
    """Its frames; of what nbaccel raises on purpose those down to the person's last line, which it is about."""
    if not info.type_name.startswith(_ON_PURPOSE):
        return info.frames
    return info.frames[: persons_part([frame.filename for frame in info.frames])]


def _with_cell_names(message: str, label: CellLabel) -> str:
    """A syntax error names its file in its message."""
    quoted = re.match(r'  File "([^"]+)"', message)
    name = label(quoted[1]) if quoted else None
    return message if name is None else message.replace(f'File "{quoted[1]}"', name, 1)  # type: ignore[index]


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_OFF}" if colour else text
