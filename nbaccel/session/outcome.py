"""What a run that has ended amounts to: the ranks' values, or the error the cell raises."""

from __future__ import annotations

import functools
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nbaccel.errors import NbaccelError, PayloadError, RunTimeout, WorkerError
from nbaccel.session.ending import Limits, Reason
from nbaccel.session.report import CellLabel, Outcome, user_place, waited_in, worker_error
from nbaccel.session.results import Results, rank_ranges
from nbaccel.session.watch import Stall
from nbaccel.wire import payload
from nbaccel.wire.events import Died, Raised

__all__ = ["Ended", "conclude", "interrupted"]

Sent = tuple[payload.Parcel, int | None]
"""A parcel and the descriptor of its content."""


class Ended(NamedTuple):
    """What the relay knows once the call is over."""

    num_ranks: int
    ranks: tuple[int, ...]
    """Those that were to run it."""
    reason: Reason | None
    """What asked for the end first; None when the ranks never came to run."""
    startup_error: NbaccelError | None
    failures: Mapping[int, Raised | Died]
    signalled: Mapping[int, signal.Signals]
    """The last signal each rank was sent."""
    values: Mapping[int, tuple[payload.Parcel | None, int | None]]
    errors: Mapping[int, Sent]
    """The exceptions themselves, where they could travel."""
    last_words: Mapping[int, tuple[str, ...]]
    limits: Limits
    folder: str | None
    hung: Stall | None = None
    """What was seen of ranks that waited too long."""
    keep: bool = False
    """Whether the ranks stay: those that were interrupted then say where they were."""
    notes: tuple[str, ...] = ()
    """What else the person must know."""


def conclude(ended: Ended, label: CellLabel) -> Results | BaseException:
    """The values, or what to raise instead."""
    if ended.reason in ("interrupted", "killed"):
        results, notes = _came_back(ended)
        return interrupted("; ".join([_where(ended, label), *ended.notes, *notes]), results)
    if ended.startup_error is not None:
        return ended.startup_error
    if ended.reason == "timeout":
        results, notes = _came_back(ended)
        where = "\n".join([_where(ended, label), *notes])
        return RunTimeout(
            f"the run took longer than max_time={ended.limits.run:g} s.\n{where}", results=results
        )
    if ended.reason == "hung" and ended.hung is not None:
        return _hung(ended, ended.hung)
    if ended.failures:
        return _worker_error(ended, label)
    values = Results([None] * len(ended.ranks), ranks=ended.ranks)
    for at, rank in enumerate(ended.ranks):
        try:
            values[at] = _value(ended, rank)
        except Exception as error:  # noqa: BLE001  # opening it runs the person's own code
            return _cannot_open(rank, error)
    return values


def _value(ended: Ended, rank: int) -> Any:
    parcel, fd = ended.values.get(rank, (None, None))
    return None if parcel is None else payload.unpack(parcel, fd)[0]


def _came_back(ended: Ended) -> tuple[Results, list[str]]:
    """What ranks returned that were asked to stop, and what to say of it."""
    values, notes = Results([None] * len(ended.ranks), ranks=ended.ranks), []
    for at, rank in enumerate(ended.ranks):
        try:
            values[at] = _value(ended, rank)
        except Exception as error:  # noqa: BLE001  # opening it runs the person's own code
            notes.append(str(_cannot_open(rank, error)))
    if not ended.keep and any(value is not None for value in values):  # a session's call is no `last_run`
        notes.append("nbaccel.last_run().exception().results has what came back")
    return values, notes


def _cannot_open(rank: int, error: Exception) -> PayloadError:
    said = f"{type(error).__name__}: {error}"
    hint = ""
    if isinstance(error, (AttributeError, ImportError)):
        hint = "; if its module was edited since this process imported it, importlib.reload it"
    problem = PayloadError(f"rank {rank}'s value has come and cannot be opened here: {said}{hint}")
    problem.__cause__ = error
    return problem


def _hung(ended: Ended, stall: Stall) -> WorkerError:
    """Ranks waited for one that did not come."""
    found = stall.report.findings if stall.report is not None else ()
    culprits = tuple(dict.fromkeys(rank for one in found for rank in one.culprits))
    lines = [
        *repr(stall.report).splitlines(),
        "",
        f"WorkerError: {stall.text.splitlines()[0]}",
        f"the call was ended after {ended.limits.hang:g} s of waiting; collective_timeout=… gives it another time",
        *([f"logs of every rank: {ended.folder}"] if ended.folder else []),
    ]
    return WorkerError("\n".join(lines).replace("WorkerError: ", ""), ranks=culprits, rendered=tuple(lines))


def interrupted(text: str, results: Sequence[Any] = ()) -> KeyboardInterrupt:
    """A KeyboardInterrupt that a notebook shows without our own frames: where the ranks were is what matters.

    Args:
        results: what came back all the same.
    """
    error: Any = KeyboardInterrupt(text)
    error.results = results
    error._render_traceback_ = functools.partial(list, [f"KeyboardInterrupt: {text}"])  # IPython's protocol
    return error  # type: ignore[no-any-return]


def _where(ended: Ended, label: CellLabel) -> str:
    """Where each rank was when it was interrupted, ranks at the same place together."""
    places: dict[str, list[int]] = {}
    for rank in ended.ranks:
        places.setdefault(_place(ended, rank, label), []).append(rank)
    return "; ".join(
        f"ranks {rank_ranges(who)} {text.replace('was ', 'were ', 1)}"
        if len(who) > 1
        else f"rank {who[0]} {text}"
        for text, who in places.items()
    )


def _place(ended: Ended, rank: int, label: CellLabel) -> str:
    event = ended.failures.get(rank)
    if rank in ended.values:
        return "had returned"
    if isinstance(event, Raised) and (waited := waited_in(event.info, label)):
        return waited
    if isinstance(event, Raised) and event.info.frames:
        frame = event.info.frames[-1]
        where = user_place(event.info, label) or f"{frame.filename} line {frame.lineno}"
        inner = next((f for f in reversed(event.info.frames) if f.filename and label(f.filename)), frame)
        return f"was at {where}, in {inner.function}"
    if isinstance(event, Raised):  # in what it called at once, as `time.sleep`, or before it came to run
        return "was interrupted"
    if ended.reason == "killed":
        return "was killed"
    if ended.signalled.get(rank) == signal.SIGINT:
        return "was ended by SIGINT"
    if rank in ended.signalled:
        return f"did not react and was ended by {ended.signalled[rank].name}"
    return "was not running"


def _worker_error(ended: Ended, label: CellLabel) -> WorkerError:
    outcome = Outcome(
        num_ranks=ended.num_ranks,
        failures=ended.failures,
        ended_by_us=ended.signalled,
        returned=frozenset(ended.values),
        last_words=ended.last_words,
        folder=ended.folder,
        grace=ended.limits.grace,
        keep=ended.keep,
        notes=ended.notes,
        ranks=ended.ranks,
    )
    error = worker_error(outcome, label)
    sent = ended.errors.get(error.ranks[0])
    if sent is not None:
        try:
            error.__cause__ = payload.unpack(*sent)[0]
        except Exception:  # noqa: BLE001  # its class needs what is not here; the report has it in words
            error.__cause__ = None
    return error
