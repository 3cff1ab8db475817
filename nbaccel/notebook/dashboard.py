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
from typing import final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.controls import Actions, Controls
from nbaccel.session.panel import html
from nbaccel.session.panel.failure import error_lines, headline
from nbaccel.session.panel.pages import last_outputs
from nbaccel.session.panel.reading import Heading, View, read
from nbaccel.session.panel.text import paint_text
from nbaccel.session.report import CellLabel
from nbaccel.session.run import Run
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Panel", "show"]

_REPAINT_SECONDS = 0.25
_CONTROLS_AFTER = 0.4


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
        self._controls: Controls | None = None
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
                self._controls = Controls.make(self._cell, self._actions, self._state, self._repaint_output)
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
    said = headline(state, label)
    top = html.header(view) + html.failure([said] if brief and said else error_lines(state, label))
    plain = paint_text(view, error=error_lines(state, label, colour=False), hints=_hints(view))
    details = html.body(view) + html.outputs_folded(last_outputs(state, view))
    return _bundle(top, plain), _bundle(details, "")


def _hints(view: View) -> list[str]:
    return [f"  logs: {view.heading.folder}"] if view.heading.folder else []


def _bundle(content: str, plain: str) -> Bundle:
    style = "font-size:13px;line-height:1.45;max-width:1100px"
    return {"text/html": f'<div style="{style}">{content}</div>', "text/plain": plain}
