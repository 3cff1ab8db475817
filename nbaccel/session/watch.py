"""Notices by itself that ranks wait, and for whom: a word after 5 s, the full report after `stall_after`.

While a call runs for more than a second, a thread has every rank's reporter note twice a second where its
main thread is (0.1 ms each). Only when one has not moved for long are stacks and collectives compared.
Nothing runs between calls.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from nbaccel.session.diagnosis import diagnose, in_debugger
from nbaccel.session.probes import Probes
from nbaccel.session.stacks import CellLabel, StackReport

__all__ = ["HINT_AFTER", "Stall", "Watch"]

HINT_AFTER = 5.0
_FIRST_LOOK = 1.0
_PERIOD = 0.5
# From the moment a rank stands still to the pulse that sees it.
_LAG = 1.0


@dataclass(frozen=True, slots=True)
class Stall:
    """What the watch tells: ranks wait (`report` at first without, then with the stacks), or go on."""

    text: str
    report: StackReport | None
    seconds: float
    full: bool


@final
class Watch:
    """Looks after the ranks of one run or session.

    Args:
        num_ranks: how many there are.
        stall_after: seconds until the full report; 0 never looks by itself.
        tell: called on the watch's thread.
        ended: how the call of a rank ended, by rank; asked on any thread.
        label: what the front end calls a file a cell was compiled from.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        stall_after: float,
        tell: Callable[[Stall], None],
        ended: Callable[[], Mapping[int, str]],
        label: CellLabel = lambda _: None,
    ) -> None:
        self._num_ranks, self._stall_after = num_ranks, stall_after
        self._tell, self._ended, self._label = tell, ended, label
        self._probes = Probes()
        self._began: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._context = contextvars.copy_context()  # what is told appears in the cell that started us

    def add(self, rank: int, pid: int, descriptors: Sequence[int]) -> None:
        """A rank is there; takes over the descriptors its reporter sent."""
        self._probes.add(rank, pid, descriptors)

    def drop(self, rank: int) -> None:
        """A rank's process has ended."""
        self._probes.drop(rank)

    def began(self) -> None:
        """A call runs from now on."""
        self._began = time.monotonic()

    def tick(self, now: float) -> None:
        """Called now and then while a call runs; `now` is `time.monotonic()`."""
        due = self._began is not None and now - self._began > _FIRST_LOOK
        if due and self._stall_after > 0 and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._context.run, args=(self._look_after,), name="nbaccel-watch", daemon=True
            )
            self._thread.start()

    def finished(self) -> None:
        """The call has ended. Waits for a look that is under way."""
        self._began = None
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def look(self) -> StackReport:
        """Every rank's stacks now, and who waits for whom."""
        views = self._probes.look(self._num_ranks, self._ended())
        return StackReport(views=views, findings=diagnose(views, self._label), label=self._label)

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        self.finished()
        self._probes.close()

    def _look_after(self) -> None:
        stage: list[float] = (
            [HINT_AFTER, self._stall_after] if self._stall_after > HINT_AFTER else [self._stall_after]
        )
        due, told = list(stage), False
        not_before = 0.0
        while not self._stop.wait(_PERIOD):
            still = max(self._probes.pulse().values(), default=0.0)
            if still < 2 * _PERIOD:
                if told:
                    self._tell(Stall("the ranks go on", None, still, full=False))
                due, told, not_before = list(stage), False, 0.0
            elif due and still >= due[0] - _LAG and still >= not_before:
                full = due[0] == stage[-1]
                stall = self._judge(due[0], full=full)
                if stall is not None:
                    self._tell(stall)
                    due, told, not_before = due[1:], told or full, 0.0
                elif still > due[0] + _LAG:
                    not_before = 2 * still  # it computes, or somebody debugs it: ask less often
                    if not full:
                        due = due[1:]

    def _judge(self, after: float, *, full: bool) -> Stall | None:
        """What to tell of a stall that has lasted `after` seconds; None when there is nothing wrong."""
        report = self.look()
        if any(in_debugger(view) for view in report.views):
            return None
        found = [
            one for one in report.findings if one.seconds >= after - 0.2 and (full or one.kind != "still")
        ]
        if not found:
            return None
        text = "\n".join(one.text for one in found[:4])
        return Stall(text, report, found[0].seconds, full=full)
