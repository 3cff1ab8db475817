"""What is known of a run: a value that `fold` brings up to date with each event.

Displays, the run folder and error messages read it; nothing else keeps state about ranks. It is
immutable, so a display may hold on to it while the relay thread goes on, and bounded, so a rank that
floods us costs time but no memory.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from nbaccel.session.curves import Curve, is_telling
from nbaccel.session.lines import Lines
from nbaccel.session.report import causes
from nbaccel.wire.events import (
    Applied,
    Concluded,
    Died,
    Event,
    ExceptionInfo,
    Halted,
    Heartbeat,
    Knob,
    Metric,
    Output,
    Progress,
    Raised,
    Returned,
    Stalled,
    State,
    Status,
)

__all__ = [
    "ENDED",
    "Failure",
    "Pace",
    "RankState",
    "RunState",
    "Situation",
    "fold",
    "for_next_call",
    "made_whole",
    "new_state",
    "same_failure",
]

Situation = Literal["starting", "running", "done", "failed", "stopped"]
"""Of a run as a whole."""

ENDED: frozenset[State] = frozenset({"done", "failed", "lost"})
"""The states in which a rank has nothing more to do for this run."""

_TAIL_BYTES = 8 << 10
_MAX_NAMES = 256
_GO_ON = "the ranks go on"
_MAX_CURVES = 12
# Seconds after which what a step was like counts for a third.
_MEMORY = 10.0
# What a terminal would have overwritten: text before a "\r" that text follows. Looked for where a line begins only:
# from every byte of a long line it would take seconds.
_OVERWRITTEN = re.compile(rb"(?:(?<=[\r\n])|\A)[^\r\n]*\r(?=[^\r\n])")

_Value = TypeVar("_Value")


class Pace(NamedTuple):
    """How fast a loop is, of late: what is long ago counts ever less."""

    step: float
    at: float
    """When it was there, on the rank's clock."""
    steps: float = 0.0
    seconds: float = 0.0
    """In which `steps` were made."""
    parts: Mapping[str, float] = {}
    """Of these seconds, how many went where, as far as the rank says."""
    before: float | None = None
    """Steps per second of the loop in whose place it is, one of the same shape."""

    @property
    def rate(self) -> float | None:
        """Steps per second; until it has made one, those of the loop before it. None where neither is known."""
        return self.steps / self.seconds if self.seconds > 0 and self.steps > 0 else self.before


class RankState(NamedTuple):
    """What is known of one rank.

    A named tuple because one is made for every event: a frozen dataclass takes five times as long.
    """

    rank: int
    state: State = "starting"
    detail: str = ""
    """What the rank says about its state, or how its process ended."""
    pid: int | None = None
    progress: Mapping[str, Progress] = {}
    """The latest Progress of each name, the most recently moved one last."""
    metrics: Mapping[str, Metric] = {}
    """For each metric's name the latest Metric that holds it."""
    tail: bytes = b""
    """The last 8 to 16 KiB of output; `last_lines` reads it."""
    stream: str = ""
    """The stream the tail ends with."""
    exitcode: int | None = None
    """None while the process lives, as far as we know; negative: a signal."""
    error: ExceptionInfo | None = None
    seen: float | None = None
    """When it last gave a sign of life, in seconds since the epoch on the rank's clock."""
    paces: Mapping[str, Pace] = {}
    """How fast each loop is, the most recently moved one last."""
    curves: Mapping[str, Curve] = {}
    """The history of each metric, those first logged first; no more than twelve, losses and what evaluations found
    before others."""
    since: float | None = None
    """When it came into its present state."""
    vitals: Heartbeat | None = None
    """What was measured last."""

    def last_lines(self, count: int = 20) -> tuple[str, ...]:
        """The last `count` lines of output, stdout and stderr in the order they were written, the
        unfinished one too; without line ends."""
        lines = Lines(limit=2 * _TAIL_BYTES)
        found = lines.feed(self.tail) + lines.finish()
        return tuple(line.rstrip("\n") for line in found[-count:]) if count > 0 else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong first: an exception, or a process that ended on its own."""

    rank: int
    time: float
    info: ExceptionInfo | None = None
    exitcode: int | None = None
    detail: str = ""
    asked: bool = False
    """A person ended the run: it is the first end, and no failure."""


class RunState(NamedTuple):
    """What is known of a run. Made by `new_state`, brought up to date by `fold`. A named tuple as `RankState`."""

    ranks: tuple[RankState, ...]
    started: float
    """Seconds since the epoch."""
    ended: float | None = None
    """When the last rank ended, or the person was told of the end; None before."""
    failure: Failure | None = None
    """The first failure in time, by the ranks' clocks: it is taken for the cause of the others."""
    knobs: Mapping[str, Knob] = {}
    """The values that can be changed from outside, as the ranks use them now."""
    stall: str = ""
    """What is known of ranks that wait for one another; empty while all go on."""
    options: Mapping[str, str] = {}
    """What the ranks' code really uses of the run's options (precision, strategy)."""
    problem: str = ""
    """Why it came to nothing, where that is no failure of a rank: it could not start, took too long or hung."""
    halted: int | None = None
    """The optimizer step after which the ranks left their loops before the end, as they were asked to."""

    @property
    def situation(self) -> Situation:
        """Where the run as a whole is. One that was interrupted is stopped, and what ended it no failure of its own; so
        is one whose loops were left before their end."""
        if self.problem:
            return "failed"
        if self.failure is not None:
            return "stopped" if self.failure.asked else "failed"
        states = {rank.state for rank in self.ranks}
        if self.ended is not None:
            whole = self.halted is None and "done" in states and states <= {"done", "idle"}
            return "done" if whole else "stopped"
        return "starting" if "starting" in states or states == {"idle"} else "running"

    @property
    def failed_ranks(self) -> tuple[int, ...]:
        """The ranks that raised or died, in rank order."""
        return tuple(rank.rank for rank in self.ranks if rank.state in ("failed", "lost"))


def new_state(num_ranks: int, started: float) -> RunState:
    """The state of a run of `num_ranks` ranks of which nothing has been heard; `started`: epoch seconds."""
    return RunState(ranks=_unheard(num_ranks), started=started)


@functools.cache
def _unheard(num_ranks: int) -> tuple[RankState, ...]:
    return tuple(RankState(rank) for rank in range(num_ranks))


def for_next_call(state: RunState, taken: Collection[int], now: float) -> RunState:
    """The state when the same ranks begin another call at `now`, in epoch seconds: of the one before it shows
    nothing; `taken` run it."""
    ranks = tuple(
        RankState(
            known.rank, state="running" if known.rank in taken else "idle", pid=known.pid, seen=now, since=now
        )
        for known in state.ranks
    )
    return RunState(ranks=ranks, started=now)


def made_whole(state: RunState, lost: Collection[int]) -> RunState:
    """The state while the group is made again, the ranks of `lost` as fresh processes."""
    ranks = tuple(
        known._replace(state="starting", exitcode=None, pid=None if known.rank in lost else known.pid)
        for known in state.ranks
    )
    return state._replace(ranks=ranks)


def same_failure(rank: RankState, cause: RankState) -> bool:
    """Whether one traceback describes how both failed; `cause` is the rank that did first."""
    if rank.error is None or cause.error is None:
        # of those that a signal ended, the later ones may well have been ended by us
        return rank.error is cause.error and rank.exitcode == cause.exitcode and (cause.exitcode or 0) > 0
    return rank.error.type_name == cause.error.type_name and _places(rank.error) == _places(cause.error)


def _places(error: ExceptionInfo) -> list[tuple[str, int]]:
    return [(frame.filename, frame.lineno) for frame in error.frames]


def fold(state: RunState, event: Event) -> RunState:
    """`state` after `event`. About 4 µs for output, the most frequent event.

    Raises:
        IndexError: the event's rank is not one of the run (the relay has not stamped it).
    """
    ranks, number = state.ranks, event.rank
    if number < 0:
        raise IndexError(f"the event {type(event).__name__} has not been stamped with its rank")
    rank = ranks[number]
    changed = _with_output(rank, event) if type(event) is Output else _changed(rank, event)
    ranks = (*ranks[:number], changed, *ranks[number + 1 :])
    ended, failure = state.ended, state.failure
    if changed.state != rank.state or type(event) is Died:
        ended = _ended(state, ranks, event.time)
        failure = _first_failure(failure, rank, changed, event)
    options, stall, knobs, problem = state.options, state.stall, state.knobs, state.problem
    halted = event.step if type(event) is Halted else state.halted
    if type(event) is Applied:
        options = _updated(options, {event.option: event.value})
    elif type(event) is Knob:
        knobs = {**knobs, event.name: event}
    elif type(event) is Stalled:
        stall = "" if event.text == _GO_ON else event.text
    elif type(event) is Concluded:
        ended, problem = event.time if ended is None else ended, event.problem
    return RunState(ranks, state.started, ended, failure, knobs, stall, options, problem, halted)


def _with_output(rank: RankState, event: Output) -> RankState:
    tail, data = rank.tail, event.data
    if event.stream != rank.stream and tail and not tail.endswith(b"\n"):
        tail += b"\n"
    tail += data
    if len(tail) > 2 * _TAIL_BYTES:
        tail = _trimmed(tail)
    # By position: `_replace` takes four times as long.
    return RankState(*rank[:6], tail, event.stream, rank[8], rank[9], event.time, *rank[11:])


def _trimmed(tail: bytes) -> bytes:
    tail = tail[-16 * _TAIL_BYTES :]
    if b"\r" in tail:
        tail = _OVERWRITTEN.sub(b"", tail)
    start = len(tail) - _TAIL_BYTES
    if start <= 0:
        return tail
    line = tail.find(b"\n", start - 1) + 1  # at a line's start where there is one
    return tail[line or start :] or tail[start:]


def _changed(rank: RankState, event: Event) -> RankState:
    learn = _LEARN.get(type(event))
    news = {} if learn is None else learn(rank, event)
    if news.get("state", rank.state) != rank.state:
        news["since"] = event.time
    return rank._replace(seen=event.time, **news)


def _moved(rank: RankState, event: Progress) -> dict[str, Any]:
    before = rank.progress.get(event.name)
    if before is not None and before.serial is None and event.serial is not None:
        # a bar drawn around the loader of that name
        event = replace(event, name=f"{event.name} (bar)", label=event.label or event.name)
        before = rank.progress.get(event.name)
    pace = rank.paces.get(event.name)
    if before is None or pace is None:
        pace = Pace(event.step, event.time)
    elif before.serial != event.serial:
        pace = Pace(event.step, event.time, before=pace.rate if _is_next(before, event) else None)
    else:
        pace = _paced(pace, event)
    return {
        "progress": _updated(rank.progress, {event.name: event}),
        "paces": _updated(rank.paces, {event.name: pace}),
    }


def _logged(rank: RankState, event: Metric) -> dict[str, Any]:
    metrics = _updated(rank.metrics, dict.fromkeys(event.values, event))
    return {"metrics": metrics, "curves": _drawn(rank.curves, event)}


def _stated(rank: RankState, event: Status) -> dict[str, Any]:
    news = {
        "state": event.state,
        "detail": event.detail,
        "pid": rank.pid if event.pid is None else event.pid,
    }
    if event.state == "starting":  # a process in place of one that ended
        return {**news, "exitcode": None, "error": None}
    return {**news, "error": None} if event.state == "running" else news  # the next call


def _returned(rank: RankState, event: Returned) -> dict[str, Any]:
    return {"state": "done", "detail": ""}


def _raised(rank: RankState, event: Raised) -> dict[str, Any]:
    return {"state": "failed", "detail": "", "error": event.info}


def _died(rank: RankState, event: Died) -> dict[str, Any]:
    news = {"exitcode": event.exitcode, "detail": event.detail}
    # After its result the process ends as it must; before it, it is lost.
    return news if rank.state in ENDED else {**news, "state": "lost"}


def _measured(rank: RankState, event: Heartbeat) -> dict[str, Any]:
    """What a rank that works is at besides, as far as it can be seen from beside it."""
    news: dict[str, Any] = {"vitals": event}
    if rank.state not in ("running", "waiting", "compiling"):
        return news
    state = event.doing if event.doing in ("waiting", "compiling") else "running"
    return news if state == rank.state else {**news, "state": state, "detail": event.detail}


_LEARN: Mapping[type, Callable[[RankState, Any], dict[str, Any]]] = {
    Progress: _moved,
    Metric: _logged,
    Status: _stated,
    Heartbeat: _measured,
    Returned: _returned,
    Raised: _raised,
    Died: _died,
}
"""What an event changes of a rank, by the kind of event."""


def _is_next(before: Progress, event: Progress) -> bool:
    """Whether a bar is made anew in an outer loop, so that it will go as the one before did."""
    if not event.depth or event.total is None:
        return False
    return (before.total, before.unit, before.divisor) == (event.total, event.unit, event.divisor)


def _paced(pace: Pace, event: Progress) -> Pace:
    """The pace after a Progress; a loop that begins again goes on from its first step."""
    steps, seconds = event.step - pace.step, event.time - pace.at
    if steps < 0 or seconds < 0:
        return pace._replace(step=event.step, at=event.time)
    fade = math.exp(-seconds / _MEMORY)
    parts = {name: spent * fade for name, spent in pace.parts.items()}
    for name, spent in (event.times or {}).items():
        parts[name] = parts.get(name, 0.0) + spent
    known = pace.steps * fade + steps, pace.seconds * fade + seconds
    return Pace(event.step, event.time, *known, parts, pace.before)


def _drawn(curves: Mapping[str, Curve], event: Metric) -> Mapping[str, Curve]:
    drawn = dict(curves)
    for name, value in event.values.items():
        curve = drawn.get(name)
        if curve is None and len(drawn) >= _MAX_CURVES:
            spare = next((other for other in reversed(drawn) if not is_telling(other)), None)
            if spare is None or not is_telling(name):
                continue
            del drawn[spare]
        drawn[name] = (curve or Curve()).add(event.step, value)
    return drawn


def _updated(old: Mapping[str, _Value], new: Mapping[str, _Value]) -> Mapping[str, _Value]:
    """`old` with `new` in it, what changed last at the end, the oldest names forgotten past the bound."""
    merged = {name: value for name, value in old.items() if name not in new}
    merged.update(new)
    if len(merged) > _MAX_NAMES:
        merged = dict(list(merged.items())[-_MAX_NAMES:])
    return merged


def _ended(state: RunState, ranks: tuple[RankState, ...], time: float) -> float | None:
    for rank in ranks:
        if rank.state not in ENDED:
            return None
    return time if state.ended is None else state.ended


def _first_failure(
    first: Failure | None, before: RankState, after: RankState, event: Event
) -> Failure | None:
    if after.state not in ("failed", "lost"):
        return first
    if first is not None and first.rank == after.rank and isinstance(event, Died):
        return replace(first, exitcode=event.exitcode, detail=event.detail)
    if after.state == before.state:
        return first
    if first is not None and not causes(after.error, event.time, first.info, first.time):
        return first
    asked = event.asked if isinstance(event, Died) else _is_interrupt(after.error)
    return Failure(
        rank=after.rank,
        time=event.time,
        info=after.error,
        exitcode=after.exitcode,
        detail=after.detail,
        asked=asked,
    )


def _is_interrupt(error: ExceptionInfo | None) -> bool:
    return error is not None and error.type_name == "KeyboardInterrupt"
