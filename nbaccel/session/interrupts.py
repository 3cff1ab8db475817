"""Waiting in the main thread so that a press of ■ becomes a message, never a half-done clean-up."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps to make enums of handlers, at ten times the cost
import queue
import signal
import threading
import time
from types import FrameType
from typing import Any, Literal, final

__all__ = ["Presses"]

_DOUBLE_PRESS = 0.2


@final
class Presses:
    """While it is entered, SIGINT queues "press" instead of raising; others may queue "done".

    A KeyboardInterrupt raised by the default handler can land between any two lines of a clean-up. The
    third press raises after all: whatever we do by then, the person must get out. In another thread
    than the main one no signal arrives and nothing is installed.
    """

    def __init__(self) -> None:
        # the one queue whose `put` is safe in a signal handler
        self._queue: queue.SimpleQueue[Literal["press", "done"]] = queue.SimpleQueue()
        self._count = 0
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Presses:
        if threading.current_thread() is threading.main_thread():
            self._before = _signal.signal(signal.SIGINT, self._pressed)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            _signal.signal(signal.SIGINT, self._before)
            self._installed = False

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._queue.put("press")
        if self._count > 2:
            raise KeyboardInterrupt

    @property
    def pressed(self) -> bool:
        return self._count > 0

    def absorb(self) -> None:
        """After a press: take in the second half of a double one, which else would hit the error's display."""
        if self._count:
            time.sleep(_DOUBLE_PRESS)

    def done(self) -> None:
        """Wake the waiting thread; may be called from any thread."""
        self._queue.put("done")

    def wait(self, timeout: float | None) -> Literal["press", "done"] | None:
        """The next thing that happened; None when `timeout` seconds passed."""
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
