"""The live panel below the cell that launched.

Three outputs, painted from the run's state at most four times a second on the relay's thread:

    header    HTML: name, state, times, what dominates
    controls  once the run has lasted a moment, core ipywidgets: Stop, Save now, knobs, whose output to show;
              at the end the error in their place
    body      HTML: ranks, where their time goes, curves

So a notebook that is saved half-way holds the whole panel as HTML. Where the widgets of its controls are gone,
JupyterLab writes "Loading widget..." in their place, or draws broken links; rules of style hide both and say that
the panel is cut off.

A page that is loaded while the run goes on has the outputs as they were saved, and Jupyter sends it no others of that
cell. It is told of widgets, so for it those of the controls hold header and body too, and its saved ones are hidden.

The number of widgets does not depend on the number of ranks, and a repaint touches none that is clicked.
"""

from __future__ import annotations

import contextvars
import math
import secrets
import threading
import time
from typing import final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.controls import CONTROLS, WHOLE, Actions, Controls
from nbaccel.session.panel import html
from nbaccel.session.panel.failure import error_lines, headline
from nbaccel.session.panel.pages import last_outputs, panel_bundle
from nbaccel.session.panel.reading import Heading, View, read
from nbaccel.session.panel.text import paint_text
from nbaccel.session.reopen import PastRun
from nbaccel.session.report import CellLabel
from nbaccel.session.run import Run
from nbaccel.session.scaling import compared
from nbaccel.session.state import RunState
from nbaccel.wire.events import Event

__all__ = ["Panel", "show"]

_REPAINT_SECONDS = 0.25
# With hundreds of ranks a repaint takes long: then there are fewer, down to one a second.
_PAINTING_SHARE = 1 / 20
_SLOWEST = 1.0
_CONTROLS_AFTER = 0.4
# The run's folder is filled, and the ranks are at work.
_COMPARED_AFTER = 1.5
# The thread that waits may be held up for a moment; after a `result(timeout=…)` it waits no longer.
_STILL_AWAITED = 1.0
_ROOM = '<div style="height:30px"></div>'
"""Where the controls will be: nothing jumps when they come."""
_CLASS = "nbaccel-panel"
_OURS = f".jp-OutputArea:has(>.jp-OutputArea-child .{_CLASS})"
_BROKEN = f".{CONTROLS}.jupyter-widgets-disconnected"
_WORD = f"{_OURS}:has({_BROKEN}) .{html.GOES_ON}"
_CUT_OFF = "○ cut off here: nbaccel.last_run().show() tells how it went on"
_EMPTY = ".jp-OutputArea-child>.jp-OutputArea-output.lm-Panel:not(:has(*))"
"""A widget's output that has no element in it: the front end's word that it has no such widget, or not yet."""
_HELD, _SAVED = f".{WHOLE}:not(.jupyter-widgets-disconnected)", f".jp-RenderedHTMLCommon>.{_CLASS}"
_STYLE = (
    "<style>"
    f"{_OURS}>{_EMPTY},"
    # of a kernel that was restarted, each widget is a broken link
    f"{_BROKEN}{{display:none}}"
    # header and body as they were saved, around widgets that hold both
    f".jp-OutputArea-child:has(+.jp-OutputArea-child {_HELD}) {_SAVED},"
    f".jp-OutputArea-child:has({_HELD})+.jp-OutputArea-child {_SAVED}{{display:none}}"
    f"{_WORD}{{font-size:0;color:inherit!important}}"
    f"{_WORD}::after{{font-size:13px;content:'{_CUT_OFF}'}}"
    # the widgets of a page that is loaded come late, or never: where they would be it is said then
    f".jp-OutputArea-child:has(.{html.GOES_ON})+{_EMPTY}{{display:block!important;font-size:0;visibility:hidden}}"
    f".jp-OutputArea-child:has(.{html.GOES_ON})+{_EMPTY}::after"
    f"{{font-size:13px;content:'{_CUT_OFF}';visibility:hidden;animation:nbaccel-late 0s 3s forwards}}"
    "@keyframes nbaccel-late{to{visibility:visible}}"
    "</style>"
)
"""For a page whose kernel is gone while the run goes on. Sanitisers drop it, and of the widgets show the HTML beside
them."""


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
        self,
        cell: Cell,
        heading: Heading,
        state: RunState,
        *,
        actions: Actions | None,
        label: CellLabel,
    ) -> None:
        self._cell, self._heading, self._label, self._state = cell, heading, label, state
        self._awaited = -math.inf  # when the thread that waits for the run was last here
        name = secrets.token_hex(6)
        self._header, self._middle, self._body = (f"nbaccel-{name}-{part}" for part in "hcb")
        self._actions = actions
        self._lock = threading.Lock()  # the relay's thread and the one that hears clicks
        self._controls: Controls | None = None
        self._began = time.monotonic()
        self._due = self._began + _REPAINT_SECONDS
        self._changed = True
        self._closed = self._compared = False
        view = read(state, heading, time.time())
        self._painted_body = html.body(view)
        cell.show(_bundle(html.header(view), paint_text(view), style=_STYLE), name=self._header)
        cell.show(_bundle(_ROOM if actions is not None else "", ""), name=self._middle)
        cell.show(_bundle(self._painted_body, ""), name=self._body)

    def handle(self, event: Event, state: RunState) -> None:
        self.update(state)

    def update(self, state: RunState) -> None:
        """What is known now."""
        self._state, self._changed = state, True

    def tick(self, now: float) -> None:
        if now < self._due or self._closed:
            return
        with self._lock:
            started = time.perf_counter()
            if self._controls is None and self._actions is not None and now - self._began > _CONTROLS_AFTER:
                self._controls = Controls.make(
                    self._cell,
                    self._actions,
                    self._state,
                    repaint=self._repaint_output,
                    on_page=self._paint_whole,
                )
                self._actions = None
                shown = _bundle("", "") if self._controls is None else self._controls.bundle()
                self._cell.show(shown, name=self._middle, update=True)
            if now - self._began > _COMPARED_AFTER:
                self._compare()
            self._paint()
            spent = time.perf_counter() - started
            self._due = now + min(max(_REPAINT_SECONDS, spent / _PAINTING_SHARE), _SLOWEST)

    def pump(self) -> None:
        """Called by the thread that waits for the run, ten times a second or more; ipykernel 6 hears clicks here."""
        self._awaited = time.monotonic()
        controls = self._controls
        if controls is not None:
            controls.ear.pump()

    def close(self, state: RunState) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed, self._state = True, state
            if any(rank.paces for rank in state.ranks):
                self._compare()
            # the cell's own error follows right below, unless it is caught
            brief = self._cell.running and time.monotonic() - self._awaited < _STILL_AWAITED
            header, error, body = _final(state, self._heading, self._label, brief=brief)
            self._cell.show(header, name=self._header, update=True)
            self._cell.show(error, name=self._middle, update=True)
            self._cell.show(body, name=self._body, update=True)
            if self._controls is not None:
                if self._controls.whole:
                    # its cell's error does not reach that page
                    above, error, below = _final(state, self._heading, self._label, brief=False)
                    self._controls.paint_whole(above["text/html"] + error["text/html"], below["text/html"])
                self._controls.close()

    def _compare(self) -> None:
        """Look, once, how fast one rank was with the same code."""
        if not self._compared:
            self._compared, self._heading = True, compared(self._heading)

    def _paint(self) -> None:
        view = read(self._state, self._heading, time.time())
        header = _bundle(html.header(view), paint_text(view), style=_STYLE)
        self._cell.show(header, name=self._header, update=True)
        if self._controls is not None:
            self._controls.paint(self._state)
            if self._controls.whole:
                self._controls.paint_whole(_html(html.header(view)), _html(html.body(view)))
                if self._cell.running:  # what the page asks besides ends in the word that the kernel is idle
                    self._cell.send("status", {"execution_state": "busy"})
        if not self._changed:
            return
        self._changed = False
        body = html.body(view)
        if body != self._painted_body:
            self._painted_body = body
            self._cell.show(_bundle(body, ""), name=self._body, update=True)

    def _repaint_output(self) -> None:
        with self._lock:
            if self._controls is not None and not self._closed:
                self._controls.paint_output(self._state)

    def _paint_whole(self) -> None:
        """A page was loaded: it is sent none of the cell's outputs."""
        with self._lock:
            if self._controls is None or self._closed:
                return
            view = read(self._state, self._heading, time.time())
            self._controls.paint_whole(_html(html.header(view)), _html(html.body(view)))


def show(
    cell: Cell,
    heading: Heading,
    run: Run | PastRun,
    *,
    actions: Actions | None = None,
    label: CellLabel = lambda _: None,
    every: float = _REPAINT_SECONDS,
) -> None:
    """A panel of a run below another cell, which goes on as long as the run does; inside an `Output` widget it is as
    the run is now.

    Args:
        every: seconds between two looks at its state.
    """
    if cell.captured:
        cell.show(panel_bundle(run.state, heading, label))
        return
    if run.done():
        Panel(cell, heading, run.state, actions=None, label=label).close(run.state)
        return
    panel = Panel(cell, heading, run.state, actions=actions, label=label)

    def follow() -> None:
        while not run.done():
            panel.update(run.state)
            panel.tick(time.monotonic())
            time.sleep(every)
        panel.close(run.state)

    copied = contextvars.copy_context()
    threading.Thread(target=copied.run, args=(follow,), name="nbaccel-show", daemon=True).start()


def _final(state: RunState, heading: Heading, label: CellLabel, *, brief: bool) -> tuple[Bundle, ...]:
    """The panel's three outputs in their last form; `brief`: the failure in one line, its traceback folded."""
    view = read(state, heading, time.time())
    error = html.failure(error_lines(state, label), headline=headline(state, label) if brief else "")
    plain = paint_text(view, error=error_lines(state, label, colour=False), hints=_hints(view))
    body = html.body(view) + html.outputs_folded(last_outputs(state, view)) + html.folder(view)
    return _bundle(html.header(view), plain), _bundle(error, ""), _bundle(body, "")


def _hints(view: View) -> list[str]:
    return [f"  logs: {view.heading.folder}"] if view.heading.folder else []


def _bundle(content: str, plain: str, *, style: str = "") -> Bundle:
    return {"text/html": style + _html(content) if content else "", "text/plain": plain}


def _html(content: str) -> str:
    return f'<div class="{_CLASS}" style="font-size:13px;line-height:1.45;max-width:1100px">{content}</div>'
