"""Calls made in order by a thread of their own, for trackers whose calls wait for a server."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, final

__all__ = ["Behind"]

_MOST_WAITING = 10_000
_END_SECONDS = 30.0


@final
class Behind:
    """Takes calls and makes them later, in order. What one raises, the next `put` or `close` raises.

    Bounded: when the server is that far behind, `put` raises too, and what it was given is lost.
    """

    def __init__(self, name: str) -> None:
        self._waiting: queue.Queue[Callable[[], Any] | None] = queue.Queue(_MOST_WAITING)
        self._failed: queue.SimpleQueue[Exception | SystemExit] = queue.SimpleQueue()
        # a daemon: a server that does not answer must not hold up the end of the process
        self._thread = threading.Thread(target=self._work, name=f"nbaccel-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], Any]) -> None:
        """Have `call` made after those before it.

        Raises:
            Exception: what an earlier call raised; this one is made all the same.
            RuntimeError: too many are waiting.
        """
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            raise RuntimeError(f"{_MOST_WAITING} calls are waiting for its server") from None
        self._raise_failed()

    def close(self, timeout: float = _END_SECONDS) -> None:
        """Wait until every call was made; may be called twice.

        Raises:
            TimeoutError: they were not within `timeout` seconds; the rest is lost.
            Exception: what an earlier call raised.
        """
        end = time.monotonic() + timeout
        while self._thread.is_alive():
            try:
                self._waiting.put_nowait(None)
                break
            except queue.Full:
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            raise TimeoutError(f"its server did not take {self._waiting.qsize()} calls in {timeout:g} s")
        self._raise_failed()

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            try:
                call()
            # raised by the next put, where it is reported; sys.exit would end this thread and lose the rest
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self._failed.put(error)

    def _raise_failed(self) -> None:
        try:
            raise self._failed.get_nowait()
        except queue.Empty:
            return
