"""Notices by itself that ranks wait, and for whom: a word after 5 s, the full report after `stall_after`.
What ranks hold and are at comes the same way.

While a call runs for more than a second, a thread has every rank's reporter note twice a second where its
main thread is (0.1 ms each). Only when one has not moved for long are stacks and collectives compared.
Nothing runs between calls.
"""

from __future__ import annotations

import contextvars
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from nbaccel.session.diagnosis import diagnose, in_debugger
from nbaccel.session.probes import Probes
from nbaccel.session.stacks import CellLabel, StackReport
from nbaccel.wire.snapshot import Line, Vitals

__all__ = ["HINT_AFTER", "Stall", "Watch"]

HINT_AFTER = 5.0
_FIRST_LOOK = 1.0
_PERIOD = 0.5
# From the moment a rank stands still to the pulse that sees it.
_LAG = 1.0
_FIGURES = re.compile(r"\d+ (s|%)")

# A rank that nobody waits for may do nothing for long; its call is not ended for it.
_WAITS = frozenset({"mismatch", "absent", "slow", "peer", "start"})
_STUCK = frozenset({"loader", "stopped", "silent"})
_KINDS = {"word": _WAITS | _STUCK, "report": _WAITS | _STUCK | {"still"}, "end": _WAITS}


@dataclass(frozen=True, slots=True)
class Stall:
    """What the watch tells: that ranks wait, and for whom; or that they go on."""

    text: str
    report: StackReport | None
    """With every rank's stack, once it has lasted for `stall_after`."""
    final: bool = False
    """It has lasted too long: the call is to be ended."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What is done about a stall that has lasted so many seconds."""

    after: float
    does: Literal["word", "report", "end"]


@dataclass(frozen=True, slots=True)
class _Vigil:
    """A call that is looked after."""

    stages: tuple[_Stage, ...]
    tell: Callable[[Stall], None]
    beat: Callable[[Mapping[int, Vitals]], None]
    over: threading.Event


@final
class Watch:
    """Looks after the ranks of one run or session. `look` may be called from any thread, the rest belongs to
    one.

    Args:
        num_ranks: how many there are.
        ended: how the call of a rank ended, by rank; asked on any thread.
        first_rank: the number of the first one; on one of several hosts it is not 0.
        label: what the front end calls a file a cell was compiled from.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        ended: Callable[[], Mapping[int, str]],
        first_rank: int = 0,
        label: CellLabel = lambda _: None,
    ) -> None:
        self._first_rank = first_rank
        self._num_ranks, self._ended, self._label = num_ranks, ended, label
        self._probes = Probes()
        self._begins: Callable[[], _Vigil] | None = None  # what a call wants that has run for a moment only
        self._begins_at = 0.0
        self._vigil: _Vigil | None = None
        self._threads: list[threading.Thread] = []

    def add(self, rank: int, pid: int, descriptors: Sequence[int]) -> None:
        """A rank is there; takes over the descriptors its reporter sent."""
        self._probes.add(rank, pid, descriptors)

    def drop(self, rank: int) -> None:
        """A rank's process has ended."""
        self._probes.drop(rank)

    def free(self, rank: int, peers: Sequence[int]) -> None:
        """Have a rank let go of the collective it waits in, by closing its connections to these processes."""
        self._probes.free(rank, peers)

    def crash(self, rank: int) -> tuple[Line, ...]:
        """The Python stack of a rank that a signal has ended, the innermost frame first; empty when it is not
        known."""
        return self._probes.crash(rank)

    def began(
        self,
        stall_after: float,
        hang_after: float,
        tell: Callable[[Stall], None],
        beat: Callable[[Mapping[int, Vitals]], None],
    ) -> None:
        """A call runs from now on.

        Args:
            stall_after: seconds until the full report; 0 never looks for waits by itself.
            hang_after: seconds until the call is to be ended.
            tell: called on the watch's thread.
            beat: called there with what ranks hold and are at, by rank.
        """
        self.finished()
        self._begins_at = time.monotonic() + _FIRST_LOOK
        self._begins = lambda: _Vigil(_stages(stall_after, hang_after), tell, beat, threading.Event())

    def tick(self, now: float) -> None:
        """Called now and then while a call runs; `now` is `time.monotonic()`."""
        if self._begins is None or now <= self._begins_at:
            return
        self._vigil, self._begins = self._begins(), None
        # what it tells appears in the cell that called
        run, name = contextvars.copy_context().run, "nbaccel-watch"
        thread = threading.Thread(target=run, args=(self._look_after, self._vigil), name=name, daemon=True)
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()

    def finished(self) -> None:
        """The call has ended: nothing more is told of it."""
        self._begins = None
        if self._vigil is not None:
            self._vigil.over.set()
            self._vigil = None

    def look(self) -> StackReport:
        """Every rank's stacks now, and who waits for whom."""
        views = self._probes.look(self._num_ranks, self._ended(), first_rank=self._first_rank)
        return StackReport(views=views, findings=diagnose(views, self._label), label=self._label)

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        self.finished()
        for thread in self._threads:
            thread.join()
        self._probes.close()

    def _look_after(self, vigil: _Vigil) -> None:
        due, told, not_before = list(vigil.stages), False, 0.0
        said: set[str] = set()
        loader_since = math.inf
        self._probes.pulse()
        while not vigil.over.wait(_PERIOD):
            still = max(self._probes.pulse().values(), default=0.0)
            if vitals := self._probes.take_vitals():
                vigil.beat(vitals)
            if still < 2 * _PERIOD:
                # Who waits for a DataLoader looks up every 5 s, and waits on.
                waited = self._waited_for_loader() if len(due) < len(vigil.stages) else 0.0
                loader_since = time.monotonic() - waited if waited else math.inf
            still = max(still, time.monotonic() - loader_since)
            if still < 2 * _PERIOD:
                if told:
                    vigil.tell(Stall("the ranks go on", None))
                due, told, not_before = list(vigil.stages), False, 0.0
            elif due and still >= max(due[0].after - _LAG, not_before):
                stall = self._judge(due[0])
                if stall is not None:
                    # a wait that ends for a moment now and then is one and the same
                    findings = _timeless(stall.text)
                    if due[0].does != "word" or not findings <= said:
                        vigil.tell(stall)
                    said |= findings
                    due, told, not_before = due[1:], told or stall.report is not None, 0.0
                elif still > due[0].after + _LAG:
                    # it computes, or somebody debugs it: ask less often
                    due, not_before = (due[1:], 0.0) if due[0].does == "word" else (due, 2 * still)

    def _waited_for_loader(self) -> float:
        """For how many seconds a rank has waited for its DataLoader; 0.0 when none does."""
        return max((one.seconds for one in self.look().findings if one.kind == "loader"), default=0.0)

    def _judge(self, stage: _Stage) -> Stall | None:
        """What to tell of a stall that has come to this stage; None when there is nothing wrong."""
        report = self.look()
        if any(in_debugger(view) for view in report.views):
            return None
        kinds = _KINDS[stage.does]
        found = [one for one in report.findings if one.seconds >= stage.after - 0.2 and one.kind in kinds]
        if not found:
            return None
        text = "\n".join(one.text for one in found[:4])
        return Stall(text, None if stage.does == "word" else report, final=stage.does == "end")


def _timeless(text: str) -> set[str]:
    """The findings that are told, but for how long they have lasted and how busy ranks are."""
    return set(_FIGURES.sub("", text).splitlines())


def _stages(stall_after: float, hang_after: float) -> tuple[_Stage, ...]:
    """In their order; what would come after the end is left out. None if nobody is to look (`stall_after` is 0)."""
    if stall_after <= 0:
        return ()
    stages = [_Stage(HINT_AFTER, "word")] if stall_after > HINT_AFTER else []
    stages += [_Stage(stall_after, "report")] if stall_after < hang_after else []
    return (*(stage for stage in stages if stage.after < hang_after), _Stage(hang_after, "end"))
