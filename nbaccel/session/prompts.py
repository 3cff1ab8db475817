"""Questions of ranks to the person at the notebook: one at a time, each naming its rank."""

from __future__ import annotations

import getpass
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, final

from nbaccel.session.state import RunState
from nbaccel.wire.events import Event, InputRequest

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
    """

    def __init__(self, reply: Reply, *, interrupt: Callable[[], None], can_ask: bool, num_ranks: int) -> None:
        self._reply, self._interrupt, self._can_ask = reply, interrupt, can_ask
        self._alone = num_ranks == 1
        self._queue: queue.SimpleQueue[InputRequest] = queue.SimpleQueue()
        self._open: list[InputRequest] = []  # taken from the queue, by the thread that asks
        self._attended = time.monotonic()
        self._asking = False

    def handle(self, event: Event, state: RunState) -> None:
        if not isinstance(event, InputRequest):
            return
        if self._can_ask:
            self._queue.put(event)
        else:
            self._refuse(event, "nobody can be asked here: this front end takes no input")

    def tick(self, now: float) -> None:
        if now - self._attended > _UNATTENDED and not self._asking:
            self._refuse_all("no cell waits for this run: call result() on it, or use notebook_launcher")

    def close(self, state: RunState) -> None:
        self._refuse_all("the run is over")

    def meanwhile(self) -> None:
        """Called by the thread that waits for the run, ten times a second or more."""
        self._attended = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            return
        last: int | None = None
        while (question := self._next(last)) is not None:
            self._asking, last = True, question.rank
            try:
                self._reply(question.rank, question.id, self._ask(question))
            finally:
                self._asking, self._attended = False, time.monotonic()

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

    def _ask(self, question: InputRequest) -> str | BaseException:
        label = "" if self._alone else f"[rank {question.rank}] "
        # ■ must raise here: the front end's answer is waited for in a loop that nothing else ends
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            ask = getpass.getpass if question.password else input
            return ask(f"{label}{question.prompt}")
        except KeyboardInterrupt:
            self._interrupt()
            return KeyboardInterrupt("interrupted while it was asked")
        except Exception as problem:  # noqa: BLE001  # no input from this front end, a closed stdin: the rank's to know
            return EOFError(f"input() on rank {question.rank}: {problem or type(problem).__name__}")
        finally:
            signal.signal(signal.SIGINT, before)

    def _refuse_all(self, why: str) -> None:
        while self._open:
            self._refuse(self._open.pop(0), why)
        while not self._queue.empty():
            self._refuse(self._queue.get(), why)

    def _refuse(self, question: InputRequest, why: str) -> None:
        self._reply(question.rank, question.id, EOFError(f"input() on rank {question.rank}: {why}"))
