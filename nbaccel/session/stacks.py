"""What every rank is doing at one moment, and how a person reads it. Pure: `session.probes` looks.

Ranks with the same stack are shown once. What it means (who waits for whom) is `session.diagnosis`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from nbaccel.ownership import is_users
from nbaccel.session.results import rank_ranges
from nbaccel.wire.snapshot import Line, Peer, Records, Thread

__all__ = [
    "SURELY_SILENT",
    "Condition",
    "Finding",
    "Process",
    "RankView",
    "StackReport",
    "WorkerView",
    "place",
    "user_line",
    "who",
]

CellLabel = Callable[[str], str | None]
Condition = Literal["starting", "answers", "silent", "stopped", "gone"]
"""Of a rank: it has not said that it is there; its reporter answers; it does not, but its process lives;
SIGSTOP; no such process."""

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# What stands around the person's call, and around an import.
_AROUND = (*(_OURS + room + os.sep for room in ("rank", "wire", "engines")), "<frozen")
_STATES = {"R": "runs", "S": "sleeps", "D": "waits for a device", "T": "is stopped", "Z": "has ended"}
_MOST_FRAMES = 16
_INNERMOST = 3
# A machine with more work than cores keeps a thread waiting for a while.
SURELY_SILENT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process as the system sees it."""

    state: str = ""
    """R runs, S sleeps, D waits for a disk or device, T is stopped; empty when not known."""
    cpu: float | None = None
    """Percent of one core, all threads, over the last tenth of a second."""
    wchan: str = ""
    """The kernel function it sleeps in, where this user may know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A process a rank started with multiprocessing, most often a DataLoader worker."""

    pid: int
    name: str
    process: Process
    threads: tuple[Thread, ...] = ()
    """As faulthandler tells them; none when the process does not know our signal."""

    @property
    def frames(self) -> tuple[Line, ...]:
        """Its main thread's, the innermost first; below them are those it was forked with."""
        return next((thread.frames for thread in self.threads if thread.main), ())

    @property
    def idle(self) -> bool:
        """Whether it waits for something to do."""
        return self.process.state != "T" and any(line.function == "_poll" for line in self.frames[:4])


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """One rank at one moment."""

    rank: int
    pid: int | None
    condition: Condition
    seconds: float = 0.0
    """For so long its main thread has not moved, or it has not answered, as far as was looked."""
    threads: tuple[Thread, ...] = ()
    """The main thread first."""
    records: Records = field(default_factory=Records)
    peer: Peer | None = None
    process: Process = field(default_factory=Process)
    workers: tuple[WorkerView, ...] = ()
    ended: str = ""
    """How its call ended: "its function returned", "it raised ValueError"; empty while it runs."""

    @property
    def frames(self) -> tuple[Line, ...]:
        """The main thread's, the innermost first."""
        return next((thread.frames for thread in self.threads if thread.main), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or looks so."""

    kind: Literal["mismatch", "absent", "slow", "peer", "start", "loader", "stopped", "silent", "still"]
    text: str
    culprits: tuple[int, ...]
    waiting: tuple[int, ...]
    seconds: float
    """How long it has lasted, as far as it is known."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StackReport:
    """Who waits for whom, and the stacks of every rank. `repr` is the report for a person."""

    views: tuple[RankView, ...]
    findings: tuple[Finding, ...] = ()
    label: CellLabel = lambda _: None

    def __repr__(self) -> str:
        return "\n".join([*self.headlines(), *self._groups()])

    def headlines(self) -> list[str]:
        """The findings, or that there are none."""
        return [one.text for one in self.findings] or ["no rank waits for another"]

    def of(self, rank: int) -> RankView:
        """One rank's.

        Raises:
            KeyError: there is no such rank.
        """
        for view in self.views:
            if view.rank == rank:
                return view
        raise KeyError(f"there is no rank {rank}: there are {rank_ranges(v.rank for v in self.views)}")

    def _groups(self) -> Iterator[str]:
        groups: dict[object, list[RankView]] = {}
        for view in self.views:
            key = view.condition, view.ended, tuple(_position(line) for line in view.frames)
            groups.setdefault(key, []).append(view)
        for views in groups.values():
            yield f"{who([view.rank for view in views])}: {_state(views)}"
            yield from self._stack(views[0].frames)
            for view in views:
                yield from self._others(view)

    def _stack(self, frames: Sequence[Line], indent: str = "  ") -> Iterator[str]:
        """The person's own frames and the innermost few, outermost first."""
        frames = [line for line in frames if not line.filename.startswith(_AROUND)]
        if len(frames) > 1 and frames[-1].filename == "<string>":
            frames.pop()  # python -c, as the server was started
        shown = [line for at, line in enumerate(frames) if at < _INNERMOST or is_users(line.filename)]
        if len(shown) > _MOST_FRAMES:
            yield f"{indent}… {len(shown) - _MOST_FRAMES} frames around it …"
        for line in reversed(shown[:_MOST_FRAMES]):
            held = f" for {line.seconds:.0f} s" if line.seconds is not None and line.seconds >= 1 else ""
            yield f"{indent}{place(line, self.label)} in {line.function}{held}"

    def _others(self, view: RankView) -> Iterator[str]:
        """Its other threads with code of the user's, and its workers."""
        for thread in view.threads:
            if not thread.main and any(is_users(line.filename) for line in thread.frames):
                yield f"  rank {view.rank}, thread {thread.name}:"
                yield from self._stack(thread.frames, "    ")
        for worker in view.workers:
            if worker.idle:
                continue
            yield f"  rank {view.rank}, worker {worker.name} (pid {worker.pid}, {_words(worker.process)}):"
            yield from self._stack(worker.frames, "    ")


def who(ranks: Sequence[int]) -> str:
    """ "rank 2" or "ranks 0-1,3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)}"


def place(line: Line, label: CellLabel) -> str:
    """Where a line is, as a person says it: "Cell In[7] line 12" or "train.py:88"."""
    cell = label(line.filename)
    return f"{cell} line {line.lineno}" if cell else f"{os.path.basename(line.filename)}:{line.lineno}"


def user_line(frames: Sequence[Line]) -> Line | None:
    """The innermost frame that is the user's own."""
    return next((line for line in frames if is_users(line.filename)), None)


def _position(line: Line) -> tuple[str, int, str]:
    return line.filename, line.lineno, line.function


def _state(views: Sequence[RankView]) -> str:
    view = views[0]
    if view.ended:
        return view.ended
    if view.condition == "starting":
        return "starting"
    if view.condition == "gone":
        return "its process is gone"
    if view.condition == "stopped":
        return "stopped (SIGSTOP); it goes on at SIGCONT"
    states = sorted({one.process.state for one in views})
    used = [one.process.cpu for one in views if one.process.cpu is not None]
    words = " or ".join(_STATES.get(state, "lives") for state in states)
    if used:
        low, high = min(used), max(used)
        words += f", cpu {low:.0f} %" if round(low) == round(high) else f", cpu {low:.0f} to {high:.0f} %"
    if view.condition == "silent":
        why = "C code holds the interpreter's lock" if view.seconds > SURELY_SILENT else "so far"
        words += f"; it does not answer: {why}"
    return words


def _words(process: Process) -> str:
    return _STATES.get(process.state, "lives")
