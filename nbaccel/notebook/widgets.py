"""ipywidgets that ranks make: open in the page while the run goes on, heard while the cell blocks.

Their comms are opened here under the ids the ranks gave them. What a rank tells a widget goes to the page, and
what the page tells it to that rank. The last state of each is kept, as what the widget becomes at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.tap import Ear, listen
from nbaccel.session.panel.widgets import widget_html, widget_text
from nbaccel.session.state import RunState
from nbaccel.wire.events import CommMessage, Event, Request

__all__ = ["VIEW", "RankWidgets"]

VIEW = "application/vnd.jupyter.widget-view+json"
_MOST = 2000
"""Models of one run; those that come after are not shown."""


@final
class RankWidgets:
    """A sink for what ranks tell their widgets.

    Args:
        cell: where they are shown.
        tell: sends a request to a rank.
        live: whether a page is there that draws widgets; without one only their states are kept.
    """

    def __init__(self, cell: Cell, tell: Callable[[int, Request], None], *, live: bool) -> None:
        self._cell, self._tell, self._live = cell, tell, live
        self._models: dict[str, dict[str, Any]] = {}
        self._open: dict[str, _Comm] = {}
        self._ear: Ear | None = None

    def handle(self, event: Event, state: RunState) -> None:
        if not isinstance(event, CommMessage):
            return
        if event.kind == "comm_open" and len(self._models) < _MOST:
            self._models[event.comm] = {}
            self._begin(event)
        if event.comm not in self._models:
            return
        if event.kind != "comm_close":  # what is closed still is what it was
            self._learn(event.comm, event.data, event.buffers)
        if self._live:
            content: dict[str, Any] = {"comm_id": event.comm, "data": dict(event.data)}
            if event.kind == "comm_open":
                content |= {"target_name": event.target, "target_module": None}
            self._cell.send(event.kind, content, metadata=event.metadata, buffers=event.buffers)

    def tick(self, now: float) -> None:
        """Nothing: what is told is passed on at once."""

    def pump(self) -> None:
        """For ipykernel 6: called by the main thread while it waits for the run."""
        if self._ear is not None:
            self._ear.pump()

    def still(self, data: Bundle) -> Bundle:
        """What a display that shows a widget is without it."""
        model = str(data[VIEW].get("model_id", ""))
        shown = widget_html(model, self._models) if model in self._models else ""
        words = widget_text(model, self._models) or str(data.get("text/plain", ""))
        return {"text/html": shown, "text/plain": words} if shown else {"text/plain": words}

    def close(self, state: RunState) -> None:
        if self._ear is not None:
            self._ear.close()
        comms = getattr(self._cell.kernel.comm_manager, "comms", {}) if self._open else {}
        for comm_id in self._open:
            comms.pop(comm_id, None)
            self._cell.send("comm_close", {"comm_id": comm_id, "data": {}})
        self._open.clear()

    def _begin(self, event: CommMessage) -> None:
        if not self._live:
            return
        if self._ear is None:
            self._ear = listen(self._cell, lambda: frozenset(self._open))
        comm = self._open[event.comm] = _Comm(event.comm, event.target, event.rank, self._heard)
        self._cell.kernel.comm_manager.register_comm(comm)

    def _heard(self, rank: int, comm: str, data: Mapping[str, Any], buffers: Sequence[bytes]) -> None:
        """The page has changed a widget, or clicked it."""
        self._learn(comm, data, buffers)
        self._tell(
            rank, Request(kind="comm", name=comm, value={"data": dict(data), "buffers": tuple(buffers)})
        )

    def _learn(self, comm: str, data: Mapping[str, Any], buffers: Iterable[bytes]) -> None:
        """Remember what a message says of the model's state."""
        if data.get("method", "update") not in ("update", "echo_update"):
            return
        model = self._models[comm]
        model.update(data.get("state") or {})
        for path, buffer in zip(data.get("buffer_paths") or (), buffers, strict=False):
            if len(path) == 1:  # deeper ones are third parties' arrays, which nothing here draws
                model[str(path[0])] = bytes(buffer)


@final
class _Comm:
    """What the kernel's comm manager has for a widget of a rank."""

    primary = False

    def __init__(
        self,
        comm_id: str,
        target_name: str,
        rank: int,
        heard: Callable[[int, str, Mapping[str, Any], Sequence[bytes]], None],
    ) -> None:
        self.comm_id, self.target_name, self._rank, self._heard = comm_id, target_name, rank, heard

    def handle_msg(self, message: Mapping[str, Any]) -> None:
        """A message of the page."""
        buffers = [bytes(buffer) for buffer in message.get("buffers") or ()]
        self._heard(self._rank, self.comm_id, message["content"]["data"], buffers)

    def handle_close(self, message: Mapping[str, Any]) -> None:
        """The page has closed it: the rank's widget lives on, unseen."""

    def close(self, *_: Any, **__: Any) -> None:
        """The kernel ends."""
