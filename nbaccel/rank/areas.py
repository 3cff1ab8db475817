"""`Output` widgets in a rank: they capture nothing; what is shown inside one is in the cell, and is cleared alone.

`ipywidgets.interact` clears its `Output` before each call of the function: nothing else that the rank has shown
may go with it.
"""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, final
from weakref import WeakKeyDictionary

from nbaccel.rank import here
from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import Display

__all__ = ["clear_entered", "emit_display", "forget_areas", "tell_outputs_apart"]

_MOST = 64
"""Names in one area: a cell has fewer places for displays."""

_entered: ContextVar[tuple[Any, ...]] = ContextVar("nbaccel_entered", default=())
"""The `Output` widgets whose `with` is open, the innermost last."""


def tell_outputs_apart() -> None:
    """Know from now on inside which `Output` widget this rank shows something."""
    when_imported("ipywidgets.widgets.widget_output", _follow)


def emit_display(event: Display) -> None:
    """Tell the notebook what to show, as a part of the `Output` widget it is shown in if there is one."""
    if widgets := _entered.get():
        _area(widgets[-1]).show(event)
    else:
        events.emit(event)


def clear_entered(wait: bool) -> bool:
    """Clear what was shown inside the open `Output` widget; False when none is open."""
    if not (widgets := _entered.get()):
        return False
    widgets[-1].outputs = ()  # what `append_stdout` and its like have put there
    _area(widgets[-1]).clear(wait)
    return True


def forget_areas() -> None:
    """The rank has cleared all it has shown, inside `Output` widgets too."""
    for area in list(_areas.values()):
        if area.rank == here.index():
            area.forget()


@final
class _Area:
    """What was shown inside one `Output` widget, by the names it was shown under."""

    def __init__(self) -> None:
        self.rank = here.index()
        self._prefix = secrets.token_hex(8)
        self.forget()

    def forget(self) -> None:
        self._used = 0  # names of its own, since the area was cleared
        self._users: list[str] = []  # names that the user gave
        self._clearing = False

    def show(self, event: Display) -> None:
        if self._clearing and not event.update:
            self._clear()
        if event.update:
            events.emit(event)
        elif event.name is not None:
            self._users = [*self._users[1 - _MOST :], event.name]
            events.emit(event)
        else:
            # after a clear the names come again, and take their places again: nothing piles up under a slider
            at = min(self._used, _MOST - 1)
            self._used = at + 1
            events.emit(replace(event, name=self._name(at)))

    def clear(self, wait: bool) -> None:
        self._clearing = True
        if not wait:
            self._clear()

    def _clear(self) -> None:
        for name in (*map(self._name, range(self._used)), *self._users):
            events.emit(Display(data={}, name=name, update=True))
        self._used, self._users, self._clearing = 0, [], False

    def _name(self, at: int) -> str:
        return f"{self._prefix}-{at}"


_areas: WeakKeyDictionary[Any, _Area] = WeakKeyDictionary()


def _area(widget: Any) -> _Area:
    return _areas.setdefault(widget, _Area())


def _follow(module: Any) -> None:
    output = module.Output
    if "nbaccel_follows" in vars(output):
        return  # ranks that are threads share the class
    enter, leave = output.__enter__, output.__exit__

    def __enter__(widget: Any) -> Any:  # takes the place of the method
        entered = enter(widget)
        _entered.set((*_entered.get(), widget))
        return entered

    def __exit__(widget: Any, *error: Any) -> Any:
        _entered.set(_entered.get()[:-1])
        return leave(widget, *error)

    output.__enter__, output.__exit__, output.nbaccel_follows = __enter__, __exit__, True
