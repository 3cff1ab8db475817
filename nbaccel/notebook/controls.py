"""The panel's controls: core ipywidgets that work while the cell blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.tap import Ear, listen
from nbaccel.session.panel import html
from nbaccel.session.state import RunState
from nbaccel.wire.events import Knob

__all__ = ["CONTROLS", "WHOLE", "Actions", "Controls", "Stopped"]

CONTROLS = "nbaccel-controls"
"""The class of the box they are in."""
WHOLE = "nbaccel-whole"
"""The class it has besides while it holds the whole panel."""
_LIVE_LINES = 200
_SAID_SECONDS = 3.0
_MOST_KNOBS = 6
_ROUNDING = 1e-9


Stopped = Literal["", "asked", "interrupted", "killed"]
"""How the ranks of a run have been told to end; the empty word: not at all."""

_STOP: Mapping[Stopped, tuple[str, str, str]] = {
    "": ("Stop", "End all ranks", ""),
    "asked": (
        "Interrupt",
        "Raise KeyboardInterrupt in all ranks without waiting for a step",
        "all ranks stop at their next optimizer step",
    ),
    "interrupted": ("Stop at once", "Kill all ranks without waiting for them", "all ranks are interrupted"),
    "killed": ("Stop at once", "Kill all ranks without waiting for them", ""),
}
"""Of the button, what it says and what it tells one does next; then what stands beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What the controls do; called from any thread."""

    stop: Callable[[], None]
    """End all ranks, each time it is called less gently."""
    stopped: Callable[[], Stopped]
    """What `stop` has done so far, called from whichever panel of the run."""
    save: Callable[[], None]
    """Ask for a checkpoint at the next step; there only while something in the ranks listens."""
    turn: Callable[[str, Any], None]
    """Set a knob on all ranks."""


@dataclass(slots=True)
class _Turned:
    """A knob's widget."""

    widget: Any
    said: Any
    """What the ranks use."""
    asked: Any
    """What was asked of them last, or they have said since."""


@final
class Controls:
    """Stop, Save now, the output of one rank, the loop's knobs: core ipywidgets, and the ear that hears them.

    As many for a thousand ranks as for one; a knob adds one. A page that is loaded while the run goes on is sent no
    outputs of its cell, but it is told of widgets: for it they hold the whole panel.
    """

    def __init__(self, widgets: Any, actions: Actions, state: RunState, repaint: Callable[[], None]) -> None:
        self._actions = actions
        row = widgets.Layout(flex_flow="row wrap", align_items="center", width="100%")
        small = widgets.Layout(width="auto", height="26px")
        self._stop = widgets.Button(description="Stop", icon="stop", layout=small, tooltip="End all ranks")
        self._stop.on_click(self._on_stop)
        hidden = widgets.Layout(width="auto", height="26px", display="none")
        self._save = widgets.Button(description="Save now", icon="save", layout=hidden)
        self._save.on_click(self._on_save)
        self._save_said_until = 0.0
        options = [("output of …", -1), *((f"rank {known.rank}", known.rank) for known in state.ranks)]
        self._whose = widgets.Dropdown(options=options, value=-1, layout=widgets.Layout(width="120px"))
        self._output = widgets.HTML(layout=widgets.Layout(width="100%"))
        self._shown: tuple[int, bytes] | None = None
        self._stops = widgets.Label()
        line = widgets.HBox([self._stop, self._save, self._whose, self._stops], layout=row)
        self._knobs = widgets.HBox([], layout=row)
        self._turned: dict[str, _Turned] = {}
        wide = widgets.Layout(width="100%")
        # an output's HTML keeps as far from the right side
        place = widgets.Layout(margin="2px 20px 2px 0")
        self._above, self._below = widgets.HTML(layout=place), widgets.HTML(layout=place)
        self._whole = False
        self._box = widgets.VBox([line, self._knobs, self._output], layout=wide)
        self._box.add_class(CONTROLS)
        self._widgets = widgets
        self._lasting = [self._box, self._above, self._below]
        self._parts = [line, self._knobs, self._stop, self._save, self._whose, self._stops, self._output]
        self._ids = frozenset(widget.comm.comm_id for widget in [*self._lasting, *self._parts])
        self.ear: Ear
        self._whose.observe(lambda _: repaint(), names="value")

    @classmethod
    def make(
        cls,
        cell: Cell,
        actions: Actions,
        state: RunState,
        *,
        repaint: Callable[[], None],
        on_page: Callable[[], None],
    ) -> Controls | None:
        """The controls; None where there are no widgets or clicks could not be heard while the cell runs.

        Args:
            repaint: called when another rank's output is to be shown.
            on_page: called when a page is loaded while the run goes on, before it is told of the widgets.
        """
        try:
            import ipywidgets
        except ImportError:
            return None
        made = cls(ipywidgets, actions, state, repaint)
        ear = listen(cell, lambda: made._ids, on_page=on_page)
        if ear is None:
            made._box.close()
            return None
        made.ear = ear
        return made

    def bundle(self) -> Bundle:
        """The widgets as an output; nothing at all where they cannot be shown."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, "text/html": "", "text/plain": ""}

    def paint(self, state: RunState) -> None:
        """Bring the open output, the knobs and what is said beside the buttons up to date."""
        self._paint_stop()
        self._save.layout.display = "inline-block" if state.options else "none"
        for knob in list(state.knobs.values())[:_MOST_KNOBS]:
            self._paint_knob(knob)
        self.paint_output(state)

    def _paint_knob(self, knob: Knob) -> None:
        """A slider for a new knob; for a known one the value the ranks use, once they have taken another."""
        turned = self._turned.get(knob.name)
        if turned is None:
            widget = _knob_widget(self._widgets, knob)
            turned = self._turned[knob.name] = _Turned(widget, said=knob.value, asked=knob.value)
            self._parts.append(widget)
            self._ids |= {widget.comm.comm_id}
            self._knobs.children = (*self._knobs.children, widget)
            widget.observe(lambda change: self._on_turn(knob, change["new"]), names="value")
        elif knob.value != turned.said:
            turned.said = turned.asked = knob.value
            turned.widget.value = knob.value

    def _on_turn(self, knob: Knob, value: Any) -> None:
        """Ask for a value, also for the one the ranks still use while another has been asked for."""
        if isinstance(value, float) and knob.low is not None and knob.high is not None:
            value = min(max(value, knob.low), knob.high)  # a logarithmic slider's ends lie beside them
        turned = self._turned[knob.name]
        if value != turned.asked:
            turned.asked = value
            self._actions.turn(knob.name, value)

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

    def paint_whole(self, above: str, below: str) -> None:
        """Hold the whole panel from here on: what stands above the controls, and below them."""
        self._above.value, self._below.value = above, below
        if not self._whole:
            self._whole = True
            self._box.children = (self._above, *self._box.children, self._below)
            self._box.add_class(WHOLE)

    @property
    def whole(self) -> bool:
        """Whether a page needs the whole panel of them."""
        return self._whole

    def close(self) -> None:
        """End the widgets, once something else stands in their place; what holds the whole panel stays, for the page
        where nothing does."""
        self.ear.close()
        if self._whole:
            self._box.children = (self._above, self._below)
        for widget in self._parts if self._whole else [*self._lasting, *self._parts]:
            widget.close()

    def _on_stop(self, _: object) -> None:
        self._actions.stop()
        self._paint_stop()

    def _on_save(self, _: object) -> None:
        self._actions.save()
        self._save_said_until = time.monotonic() + _SAID_SECONDS
        self._paint_stop()

    def _paint_stop(self) -> None:
        stopped = self._actions.stopped()
        self._stop.description, self._stop.tooltip, said = _STOP[stopped]
        saving = not said and time.monotonic() < self._save_said_until
        self._stops.value = "all ranks save at their next optimizer step" if saving else said
        self._stop.button_style = "danger" if stopped else ""


def _knob_widget(widgets: Any, knob: Knob) -> Any:
    """What a knob of this kind is turned with; a change is told when the mouse is let go."""
    given: dict[str, Any] = {"value": knob.value, "description": knob.name, "continuous_update": False}
    if isinstance(knob.value, bool):
        return widgets.Checkbox(value=knob.value, description=knob.name)
    if isinstance(knob.value, str):
        return widgets.Text(**given)
    low, high = knob.low, knob.high
    if low is None or high is None or math.isinf(high - low):
        kind = widgets.IntText if isinstance(knob.value, int) else widgets.FloatText
        return kind(**given)
    if isinstance(knob.value, int):
        return widgets.IntSlider(min=math.ceil(low), max=math.floor(high), **given)
    if low > 0 and high / low >= 50:
        # an end that is rounded inwards would keep the slider from a value that is on it
        ends = {"min": math.log10(low) - _ROUNDING, "max": math.log10(high) + _ROUNDING}
        return widgets.FloatLogSlider(step=0.02, readout_format=".2g", **ends, **given)
    return widgets.FloatSlider(min=low, max=high, step=(high - low) / 100, readout_format=".3g", **given)
