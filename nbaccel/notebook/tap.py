"""Hearing our own widgets while a cell blocks the kernel's main thread.

ipykernel runs a cell in the thread that also handles comm messages, so a click is handled after the cell.
But the messages arrive earlier, and those for our own widgets are taken out of the way. So is what a page that is
loaded meanwhile asks before it shows any widget: what kernel this is, and the state of the widgets.

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


def listen(
    cell: Cell, comm_ids: Callable[[], frozenset[str]], *, on_page: Callable[[], None] | None = None
) -> Ear | None:
    """Handle messages to these comms from now on; None where this kernel's insides are not as we know them.

    Args:
        comm_ids: whose messages are ours, asked for every comm message.
        on_page: called before a page that was loaded meanwhile is told the state of the widgets, whichever ear hears
            it. None leaves its questions to others, at last to the kernel, which answers after the cell.
    """
    kernel = cell.kernel
    if not hasattr(kernel, "comm_manager") or not hasattr(getattr(kernel, "shell_stream", None), "on_recv"):
        return None
    if getattr(kernel, "shell_channel_thread", None) is not None:
        ready = hasattr(kernel, "shell_channel_thread_main") and hasattr(
            kernel.shell_channel_thread, "io_loop"
        )
        return _Tap(_Ours(cell, comm_ids, on_page)) if ready else None
    if hasattr(kernel, "msg_queue") and hasattr(kernel.shell_stream, "flush"):
        return _Pump(_Ours(cell, comm_ids, on_page))
    return None


_WHAT = "kernel_info_request"
_PAGE = "jupyter.widget.control"
"""Target of the comm through which a page asks for the state of all widgets."""
_on_pages: list[Callable[[], None]] = []
"""Of the ears that are open."""


@final
class _Ours:
    """Which messages are ours, and what becomes of them."""

    def __init__(
        self, cell: Cell, comm_ids: Callable[[], frozenset[str]], on_page: Callable[[], None] | None
    ) -> None:
        self.cell, self._comm_ids, self._on_page = cell, comm_ids, on_page
        self._pages: set[str] = set()
        if on_page is not None:
            _on_pages.append(on_page)

    def kind(self, frames: Any) -> str:
        """The kind of a message of ours, unverified; empty for one that is not, or cannot be read."""
        try:
            _, rest = self.cell.kernel.session.feed_identities(frames, copy=False)
            kind = str(json.loads(bytes(rest[1].buffer))["msg_type"])
            if kind == _WHAT:
                return kind if self._on_page is not None else ""
            if kind not in ("comm_open", "comm_msg", "comm_close"):
                return ""
            content = json.loads(bytes(rest[4].buffer))
            comm_id = str(content["comm_id"])
            if kind == "comm_open" and self._on_page is not None and content["target_name"] == _PAGE:
                self._pages.add(comm_id)
            return kind if comm_id in self._pages or comm_id in self._comm_ids() else ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return ""

    def handle(self, frames: Any) -> None:
        """One of them, verified, with the status messages its sender waits for."""
        kernel = self.cell.kernel
        idents, rest = kernel.session.feed_identities(frames, copy=False)
        try:
            message: Mapping[str, Any] = kernel.session.deserialize(rest, content=True, copy=False)
        except (ValueError, TypeError):
            return  # a wrong signature: whoever sent it is not the front end
        kind = message["header"]["msg_type"]
        if kind == "comm_open":
            for tell in tuple(_on_pages):
                tell()
        self.cell.send("status", {"execution_state": "busy"}, message)
        try:
            if kind == _WHAT:
                content = {"status": "ok", **kernel.kernel_info}
                kernel.session.send(kernel.shell_stream, "kernel_info_reply", content, message, ident=idents)
            else:
                getattr(kernel.comm_manager, kind)(None, idents, message)
        finally:
            self._over(message)

    def close(self) -> None:
        """No page is of interest any more. May be called twice."""
        if self._on_page in _on_pages:
            _on_pages.remove(self._on_page)

    def _over(self, message: Mapping[str, Any]) -> None:
        # without it ipywidgets' front end holds every further change back
        self.cell.send("status", {"execution_state": "idle"}, message)
        if self.cell.running:  # or the front end shows an idle kernel from here on
            self.cell.send("status", {"execution_state": "busy"})


@final
class _Tap:
    """ipykernel 7."""

    def __init__(self, ours: _Ours) -> None:
        self._ours = ours
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._kernel = ours.cell.kernel
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
        kind = "" if self._closed else self._ours.kind(frames)
        if kind == _WHAT:
            self._ours.handle(frames)  # its reply goes through a socket that is this thread's
        elif kind:
            self._queue.put(frames)
        else:
            await self._others(frames)

    def pump(self) -> None:
        """Nothing: another thread listens."""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ours.close()
        self._queue.put(None)
        _taps.remove(self)
        self._loop.add_callback(self._install)

    def _install(self) -> None:
        """The newest tap that is open stands first; a closed one in between passes everything on."""
        first = _taps[-1].main if _taps else self._kernel.shell_channel_thread_main
        self._kernel.shell_stream.on_recv(first, copy=False)

    def _serve(self) -> None:
        while (frames := self._queue.get()) is not None:
            self._ours.handle(frames)


_taps: list[_Tap] = []


@final
class _Pump:
    """ipykernel 6."""

    def __init__(self, ours: _Ours) -> None:
        import zmq

        self._ours, self._pollin, self._pollout = ours, zmq.POLLIN, zmq.POLLOUT
        self._closed = False

    def pump(self) -> None:
        """Handle what has arrived for us; the rest waits its turn, in order."""
        kernel = self._ours.cell.kernel
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
            if arguments and self._ours.kind(arguments[0]):
                self._ours.handle(arguments[0])
            else:
                kept.append(item)
        for item in kept:
            kernel.msg_queue.put_nowait(item)
        kernel.shell_stream.flush(self._pollout)  # or a reply leaves with the cell's

    def close(self) -> None:
        self._closed = True
        self._ours.close()
