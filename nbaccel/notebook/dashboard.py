"""The live panel below the cell that launched.

Two outputs, painted from the run's state at most four times a second on the relay's thread:

    top       the header; once the run has lasted a moment it is a row of core ipywidgets with Stop, Save now
              and whose output to show, at the end the header again, with the error
    durable   ranks, where their time goes, curves: HTML, also in a notebook that is saved half-way

The number of widgets does not depend on the number of ranks, and a repaint touches none that is clicked.
"""

from __future__ import annotations

import contextvars
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.tap import Ear, listen
from nbaccel.session.panel import html
from nbaccel.session.panel.pages import error_lines, last_outputs
from nbaccel.session.panel.reading import Heading, View, read
from nbaccel.session.panel.text import paint_text
from nbaccel.session.report import CellLabel
from nbaccel.session.run import Run
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Actions", "Panel", "show"]

_REPAINT_SECONDS = 0.25
_CONTROLS_AFTER = 0.4
_LIVE_LINES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What the controls do; called from any thread."""

    stop: Callable[[], None]
    """Ask all ranks to end; a second time, kill them."""
    save: Callable[[], None]
    """Ask for a checkpoint at the next step; there only while something in the ranks listens."""


@final
class Panel:
    """A sink that paints the run below its cell, from construction to `close`.

    Args:
        cell: made in the main thread while the cell that launches runs.
        state: what is known at the start.
        actions: what the controls do; None for a panel without them.
        label: what the front end calls a file a cell was compiled from.
    """

    def __init__(
        self, cell: Cell, heading: Heading, state: RunState, *, actions: Actions | None, label: CellLabel
    ) -> None:
        self._cell, self._heading, self._label, self._state = cell, heading, label, state
        name = secrets.token_hex(6)
        self._top, self._durable = f"nbaccel-{name}-top", f"nbaccel-{name}"
        self._actions = actions
        self._lock = threading.Lock()  # the relay's thread and the one that hears clicks
        self._controls: _Controls | None = None
        self._began = self._painted = time.monotonic()
        self._changed = True
        self._body = ""
        self._closed = False
        view = read(state, heading, time.time())
        cell.show(_bundle(html.header(view), paint_text(view)), name=self._top)
        self._body = html.body(view)
        cell.show(_bundle(self._body, ""), name=self._durable)

    def handle(self, event: Event, state: RunState) -> None:
        self.update(state)

    def update(self, state: RunState) -> None:
        """What is known now."""
        self._state, self._changed = state, True

    def tick(self, now: float) -> None:
        if now - self._painted < _REPAINT_SECONDS or self._closed:
            return
        with self._lock:
            self._painted = now
            if self._controls is None and self._actions is not None and now - self._began > _CONTROLS_AFTER:
                self._controls = _Controls.make(self._cell, self._actions, self._state, self._repaint_output)
                self._actions = None
                if self._controls is not None:
                    self._cell.show(self._controls.bundle(), name=self._top, update=True)
            self._paint()

    def pump(self) -> None:
        """For ipykernel 6: called by the main thread while it waits for the run."""
        controls = self._controls
        if controls is not None:
            controls.ear.pump()

    def close(self, state: RunState) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed, self._state = True, state
            # the cell's own error follows right below, traceback and all
            top, durable = _final(state, self._heading, self._label, brief=self._cell.running)
            self._cell.show(top, name=self._top, update=True)
            self._cell.show(durable, name=self._durable, update=True)
            if self._controls is not None:
                self._controls.close(html.header(read(state, self._heading, time.time())))

    def _paint(self) -> None:
        view = read(self._state, self._heading, time.time())
        header = html.header(view)
        if self._controls is not None:
            self._controls.paint(header, self._state)
        else:
            self._cell.show(_bundle(header, paint_text(view)), name=self._top, update=True)
        if not self._changed:
            return
        self._changed = False
        body = html.body(view)
        if body != self._body:
            self._body = body
            self._cell.show(_bundle(body, ""), name=self._durable, update=True)

    def _repaint_output(self) -> None:
        with self._lock:
            if self._controls is not None and not self._closed:
                self._controls.paint_output(self._state)


def show(cell: Cell, heading: Heading, run: Run, *, actions: Actions, label: CellLabel) -> None:
    """A panel of a run below another cell, which goes on as long as the run does."""
    panel = Panel(cell, heading, run.state, actions=None if run.done() else actions, label=label)
    if run.done():
        panel.close(run.state)
        return

    def follow() -> None:
        while not run.done():
            panel.update(run.state)
            panel.tick(time.monotonic())
            time.sleep(_REPAINT_SECONDS)
        panel.close(run.state)

    copied = contextvars.copy_context()
    threading.Thread(target=copied.run, args=(follow,), name="nbaccel-show", daemon=True).start()


def _final(state: RunState, heading: Heading, label: CellLabel, *, brief: bool) -> tuple[Bundle, Bundle]:
    """The panel's two outputs in their last form; `brief`: the failure in one line."""
    view = read(state, heading, time.time())
    error = error_lines(state, label)
    shown = [f"rank {state.failure.rank}: {error[-1]}"] if brief and error and state.failure else error
    top = html.header(view) + html.failure(shown)
    plain = paint_text(view, error=error_lines(state, label, colour=False), hints=_hints(view))
    details = html.body(view) + html.outputs_folded(last_outputs(state, view))
    return _bundle(top, plain), _bundle(details, "")


def _hints(view: View) -> list[str]:
    return [f"  logs: {view.heading.folder}"] if view.heading.folder else []


def _bundle(content: str, plain: str) -> Bundle:
    style = "font-size:13px;line-height:1.45;max-width:1100px"
    return {"text/html": f'<div style="{style}">{content}</div>', "text/plain": plain}


_remains: deque[tuple[Any, ...]] = deque()
_MOST_REMAINS = 16


@final
class _Controls:
    """Stop, Save now, and the output of one rank: core ipywidgets, and the ear that hears them."""

    def __init__(
        self, widgets: Any, cell: Cell, actions: Actions, state: RunState, repaint: Callable[[], None]
    ) -> None:
        self._actions = actions
        self._header = widgets.HTML(layout=widgets.Layout(margin="0 12px 0 0", flex="1 1 320px"))
        row = widgets.Layout(flex_flow="row wrap", align_items="center", width="100%")
        small = widgets.Layout(width="auto", height="26px")
        self._stop = widgets.Button(description="Stop", icon="stop", layout=small, tooltip="End all ranks")
        self._stop.on_click(self._on_stop)
        hidden = widgets.Layout(width="auto", height="26px", display="none")
        self._save = widgets.Button(description="Save now", icon="save", layout=hidden)
        self._save.on_click(lambda _: actions.save())
        options = [("output of …", -1), *((f"rank {known.rank}", known.rank) for known in state.ranks)]
        self._whose = widgets.Dropdown(options=options, value=-1, layout=widgets.Layout(width="120px"))
        self._output = widgets.HTML(layout=widgets.Layout(width="100%"))
        self._shown: tuple[int, bytes] | None = None
        line = widgets.HBox([self._header, self._stop, self._save, self._whose], layout=row)
        self._box = widgets.VBox([line, self._output], layout=widgets.Layout(width="100%"))
        self._widgets = widgets
        parts = [self._box, line, self._header, self._stop, self._save, self._whose, self._output]
        self._ids = frozenset(widget.comm.comm_id for widget in parts)
        self._parts = parts
        self.ear: Ear
        self._whose.observe(lambda _: repaint(), names="value")

    @classmethod
    def make(
        cls, cell: Cell, actions: Actions, state: RunState, repaint: Callable[[], None]
    ) -> _Controls | None:
        """The controls; None where there are no widgets or clicks could not be heard while the cell runs."""
        try:
            import ipywidgets
        except ImportError:
            return None
        made = cls(ipywidgets, cell, actions, state, repaint)
        ear = listen(cell, lambda: made._ids)
        if ear is None:
            made._box.close()
            return None
        made.ear = ear
        return made

    def bundle(self) -> Bundle:
        """The widgets as an output."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, "text/plain": ""}

    def paint(self, header: str, state: RunState) -> None:
        """Bring the header and the open output up to date."""
        self._header.value = header
        self._save.layout.display = "inline-block" if state.options else "none"
        self.paint_output(state)

    def paint_output(self, state: RunState) -> None:
        """Show what the chosen rank printed last; of a failed run, the first failure's rank by itself."""
        rank = self._whose.value
        if rank < 0:
            if self._shown is not None:
                self._output.value, self._shown = "", None
            return
        known = state.ranks[rank]
        if self._shown == (rank, known.tail):
            return
        self._shown = rank, known.tail
        lines = known.last_lines(_LIVE_LINES) or ("nothing yet",)
        self._output.value = html.scrolling(lines)

    def close(self, header: str) -> None:
        """End the widgets, once something else stands in their place.

        One stays a while: a page that was closed in mid-run was saved with it, and would find nothing.
        """
        self.ear.close()
        self._header.value = header
        self._box.children = (self._header,)
        for widget in self._parts:
            if widget not in (self._box, self._header):
                widget.close()
        _remains.append((self._box, self._header))
        while len(_remains) > _MOST_REMAINS:
            for widget in _remains.popleft():
                widget.close()

    def _on_stop(self, _: object) -> None:
        self._stop.description = "Stop at once"
        self._stop.tooltip = "Kill all ranks without waiting for them"
        self._stop.button_style = "danger"
        self._actions.stop()
