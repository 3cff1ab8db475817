"""Hearing our own widgets while a cell blocks the kernel's main thread.

ipykernel runs a cell in the thread that also handles comm messages, so a click is handled after the cell.
But the messages arrive earlier, and those for our own widgets are taken out of the way:

    ipykernel 7   a thread of its own reads the shell channel: its callback is wrapped (`_Tap`)
    ipykernel 6   the main thread, while it waits for the run, reads what has arrived and puts back what is
                  not ours, in order (`_Pump`)

Both touch what ipykernel does not document; where it is not there `listen` returns None and the panel has
no controls. Only the header of a message that is given back is read, and never through
`session.deserialize`, which would take its second reading for a replay.
"""

from __future__ import annotations

import contextvars
import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, final

from nbaccel.notebook.cell import Cell

__all__ = ["Ear", "listen"]


class Ear(Protocol):
    """Something that handles messages of our comms while the cell runs."""

    def pump(self) -> None:
        """Called by the main thread ten times a second or more while it waits for a run."""

    def close(self) -> None:
        """Leave the channel as it was. May be called twice, from any thread."""


def listen(cell: Cell, comm_ids: Callable[[], frozenset[str]]) -> Ear | None:
    """Handle messages to these comms from now on; None where this kernel's insides are not as we know them.

    Args:
        comm_ids: whose messages are ours, asked for every comm message.
    """
    kernel = cell.kernel
    if not hasattr(kernel, "comm_manager") or not hasattr(getattr(kernel, "shell_stream", None), "on_recv"):
        return None
    if getattr(kernel, "shell_channel_thread", None) is not None:
        ready = hasattr(kernel, "shell_channel_thread_main") and hasattr(
            kernel.shell_channel_thread, "io_loop"
        )
        return _Tap(cell, comm_ids) if ready else None
    if hasattr(kernel, "msg_queue") and hasattr(kernel.shell_stream, "flush"):
        return _Pump(cell, comm_ids)
    return None


_KINDS = ("comm_msg", "comm_close")


def _peek(kernel: Any, frames: Any) -> tuple[str, str]:
    """Kind and comm id of a message, unverified; ("", "") when it cannot be read."""
    try:
        _, rest = kernel.session.feed_identities(frames, copy=False)
        kind = json.loads(bytes(rest[1].buffer))["msg_type"]
        if kind not in _KINDS:
            return kind, ""
        return kind, str(json.loads(bytes(rest[4].buffer))["comm_id"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "", ""


def _handle(cell: Cell, frames: Any) -> None:
    """One message for a comm of ours, verified, with the status messages its sender waits for."""
    kernel = cell.kernel
    idents, rest = kernel.session.feed_identities(frames, copy=False)
    try:
        message: Mapping[str, Any] = kernel.session.deserialize(rest, content=True, copy=False)
    except (ValueError, TypeError):
        return  # a wrong signature: whoever sent it is not the front end
    cell.send("status", {"execution_state": "busy"}, message)
    try:
        getattr(kernel.comm_manager, message["header"]["msg_type"])(None, idents, message)
    finally:
        # without it ipywidgets' front end holds every further change back
        cell.send("status", {"execution_state": "idle"}, message)
        if cell.running:  # or the front end shows an idle kernel from here on
            cell.send("status", {"execution_state": "busy"})


@final
class _Tap:
    """ipykernel 7."""

    def __init__(self, cell: Cell, comm_ids: Callable[[], frozenset[str]]) -> None:
        self._cell, self._comm_ids = cell, comm_ids
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._kernel = cell.kernel
        self._others = self._kernel.shell_channel_thread_main
        self._loop = self._kernel.shell_channel_thread.io_loop
        self._closed = False
        before = _taps[-1] if _taps else None
        if before is not None:
            self._others = before.main
        _taps.append(self)
        self._loop.add_callback(self._install)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._serve,), name="nbaccel-widgets", daemon=True
        )
        self._thread.start()

    async def main(self, frames: Any) -> None:
        """In place of the kernel's own callback, in the channel's thread."""
        kind, comm_id = _peek(self._kernel, frames)
        if not self._closed and kind in _KINDS and comm_id in self._comm_ids():
            self._queue.put(frames)
        else:
            await self._others(frames)

    def pump(self) -> None:
        """Nothing: another thread listens."""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        _taps.remove(self)
        self._loop.add_callback(self._install)

    def _install(self) -> None:
        """The newest tap that is open stands first; a closed one in between passes everything on."""
        first = _taps[-1].main if _taps else self._kernel.shell_channel_thread_main
        self._kernel.shell_stream.on_recv(first, copy=False)

    def _serve(self) -> None:
        while (frames := self._queue.get()) is not None:
            _handle(self._cell, frames)


_taps: list[_Tap] = []


@final
class _Pump:
    """ipykernel 6."""

    def __init__(self, cell: Cell, comm_ids: Callable[[], frozenset[str]]) -> None:
        import zmq

        self._cell, self._comm_ids, self._pollin = cell, comm_ids, zmq.POLLIN
        self._closed = False

    def pump(self) -> None:
        """Handle what has arrived for us; the rest waits its turn, in order."""
        kernel = self._cell.kernel
        if self._closed or threading.current_thread() is not threading.main_thread():
            return
        kernel.shell_stream.flush(self._pollin)
        kept = []
        while True:
            try:
                item = kernel.msg_queue.get_nowait()
            except Exception as error:  # tornado's and asyncio's queues each have an exception of their own
                if type(error).__name__ not in ("QueueEmpty", "Empty"):
                    raise
                break
            arguments = item[2]
            kind, comm_id = _peek(kernel, arguments[0]) if arguments else ("", "")
            if kind in _KINDS and comm_id in self._comm_ids():
                _handle(self._cell, arguments[0])
            else:
                kept.append(item)
        for item in kept:
            kernel.msg_queue.put_nowait(item)

    def close(self) -> None:
        self._closed = True
