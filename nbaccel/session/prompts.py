"""Questions of ranks to the person at the notebook: one at a time, each naming its rank.

Two threads take part: the relay's is told of questions, of ranks that have ended and of the run's end; the one that
waits for the run, the main thread, asks. What it asks is withdrawn when its rank has ended: `input` is ended by the
SIGINT that ■ would send, for nothing else ends it.
"""

from __future__ import annotations

import contextlib
import getpass
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, final

from nbaccel.session.state import RunState
from nbaccel.wire.events import Died, Event, InputRequest, Raised, Returned

__all__ = ["Prompts", "Reply"]

Reply = Callable[[int, str, Any], None]
"""Sends an answer, a line or an exception, to a rank's question of this id."""

# A run nobody waits for: its questions are refused rather than left unanswered for ever.
_UNATTENDED = 2.0
# After an answer, the same rank's next question comes within this.
_SAME_RANK = 0.15


@final
class Prompts:
    """A sink that hands questions to the thread that waits for the run, which asks them in `meanwhile`.

    Args:
        reply: sends the answer.
        interrupt: called when the person answers with ■ or Ctrl-C.
        can_ask: whether somebody is there to be asked.
        num_ranks: of the run; one alone is not named.
        say: tells the person one sentence.
        aside: entered while a question is open: what is painted in its place makes room.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        interrupt: Callable[[], None],
        can_ask: bool,
        num_ranks: int,
        say: Callable[[str], None],
        aside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._reply, self._interrupt, self._can_ask = reply, interrupt, can_ask
        self._say, self._aside = say, aside
        self._alone = num_ranks == 1
        self._queue: queue.SimpleQueue[InputRequest] = queue.SimpleQueue()
        self._open: list[InputRequest] = []  # taken from the queue, by the thread that asks
        self._attended = time.monotonic()
        self._lock = threading.Lock()  # of the four below
        self._asker = 0
        self._asked: InputRequest | None = None
        self._ended: set[int] = set()  # ranks whose call is over
        self._withdrawn = False
        self._waits = False  # whether `input` is entered, which SIGINT is to end

    def handle(self, event: Event, state: RunState) -> None:
        if isinstance(event, (Returned, Raised, Died)):
            self._end([event.rank])
        elif not isinstance(event, InputRequest):
            return
        elif self._can_ask:
            self._queue.put(event)
        else:
            self._refuse(event, "nobody can be asked here: this front end takes no input")

    def tick(self, now: float) -> None:
        if now - self._attended > _UNATTENDED and self._asked is None:
            self._refuse_all(
                "nobody waits for this run in the main thread: call result() on it there, await it, "
                "or use notebook_launcher"
            )

    def close(self, state: RunState) -> None:
        self._end(range(len(state.ranks)))
        self._refuse_all("the run is over")

    def meanwhile(self) -> None:
        """Called by the thread that waits for the run, ten times a second or more."""
        if threading.current_thread() is not threading.main_thread():
            return  # no signal could end a question there
        self._attended = time.monotonic()
        last: int | None = None
        while (question := self._next(last)) is not None:
            last = question.rank
            self._put(question)

    def _next(self, last: int | None) -> InputRequest | None:
        """The next question: of the rank that has just been answered, if it has one soon, as in a debugger."""
        end = time.monotonic() + (_SAME_RANK if last is not None and not self._alone else 0.0)
        while True:
            while not self._queue.empty():
                self._open.append(self._queue.get())
            for question in self._open:
                if question.rank == last:
                    self._open.remove(question)
                    return question
            if time.monotonic() >= end:
                return self._open.pop(0) if self._open else None
            time.sleep(0.005)

    def _put(self, question: InputRequest) -> None:
        """Ask, and send the answer, unless the rank has ended by then."""
        with self._lock:
            if question.rank in self._ended:
                return
            self._asked, self._withdrawn, self._asker = question, False, threading.get_ident()
        # ■ must raise here: the front end's answer is waited for in a loop that nothing else ends
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            with self._aside():
                answer = self._ask(question)
        finally:
            with self._lock:
                self._asked, self._attended = None, time.monotonic()
            # what the relay has sent has come by this line: a handler is only replaced once those due have run
            signal.signal(signal.SIGINT, before)
        if self._withdrawn:
            self._say(f"rank {question.rank}'s question is over: its call has ended")
        else:
            self._reply(question.rank, question.id, answer)

    def _ask(self, question: InputRequest) -> str | BaseException:
        label = "" if self._alone else f"[rank {question.rank}] "
        ask = getpass.getpass if question.password else input
        try:
            try:
                self._waits = not self._withdrawn
                return ask(f"{label}{question.prompt}") if self._waits else ""
            finally:
                self._waits = False
        except KeyboardInterrupt:
            if sys.stdin.isatty():
                print()  # the cursor stands behind the prompt
            if not self._withdrawn:
                self._interrupt()
            return KeyboardInterrupt("interrupted while it was asked")
        except Exception as problem:  # noqa: BLE001  # no input from this front end, a closed stdin: the rank's to know
            return EOFError(f"input() on rank {question.rank}: {problem or type(problem).__name__}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """■, or the relay; in the main thread."""
        if self._waits:
            raise KeyboardInterrupt
        if not self._withdrawn:
            self._interrupt()

    def _end(self, ranks: Iterable[int]) -> None:
        """Nobody waits for an answer to the questions of these ranks."""
        with self._lock:
            self._ended.update(ranks)
            if self._asked is not None and self._asked.rank in self._ended and not self._withdrawn:
                self._withdrawn = True
                signal.pthread_kill(self._asker, signal.SIGINT)

    def _refuse_all(self, why: str) -> None:
        while self._open:
            self._refuse(self._open.pop(0), why)
        while not self._queue.empty():
            self._refuse(self._queue.get(), why)

    def _refuse(self, question: InputRequest, why: str) -> None:
        self._reply(question.rank, question.id, EOFError(f"input() on rank {question.rank}: {why}"))
