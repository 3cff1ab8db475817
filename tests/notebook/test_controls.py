"""The panel's knobs without a page: what turning one asks of the ranks."""

from __future__ import annotations

from typing import Any

import ipywidgets
import pytest

from nbaccel.notebook.controls import Actions, Controls, Stopped
from nbaccel.session.state import fold, new_state
from nbaccel.wire.events import Knob


class Turning:
    """Controls with one knob, and what they have asked of the ranks."""

    def __init__(self, value: Any, *, low: float | None = None, high: float | None = None) -> None:
        self.asked: list[Any] = []
        self._low, self._high, self._state = low, high, new_state(2, started=0.0)
        actions = Actions(
            stop=lambda: None,
            stopped=lambda: "",
            save=lambda: None,
            turn=lambda _, wanted: self.asked.append(wanted),
        )
        self._controls = Controls(ipywidgets, actions, self._state, lambda: None)
        self.take(value)
        self.widget = self._controls._turned["knob"].widget

    def take(self, value: Any) -> None:
        """The ranks say which value they use."""
        said = Knob(rank=0, name="knob", value=value, step=1, low=self._low, high=self._high)
        self._state = fold(self._state, said)
        self._controls.paint(self._state)


def test_knob_turned_back_before_the_ranks_took_it_is_asked_for_again() -> None:
    knob = Turning(3, low=1, high=9)
    knob.widget.value = 5
    knob.widget.value = 3
    assert knob.asked == [5, 3]
    knob.take(5)
    knob.take(3)
    assert (knob.widget.value, knob.asked) == (3, [5, 3])


def test_value_that_the_ranks_took_from_elsewhere_is_shown_and_not_asked_for() -> None:
    knob = Turning(3, low=1, high=9)
    knob.take(7)
    assert (knob.widget.value, knob.asked) == (7, [])
    knob.widget.value = 3
    assert knob.asked == [3]


def test_slider_of_whole_numbers_stays_inside_limits_that_are_none() -> None:
    knob = Turning(5, low=0.5, high=9.5)
    assert (knob.widget.min, knob.widget.max) == (1, 9)


@pytest.mark.parametrize(("low", "high"), [(3e-4, 0.7), (1e-5, 1e-2), (7e-7, 6.02)])
def test_logarithmic_slider_reaches_its_limits_and_asks_for_nothing_beyond(low: float, high: float) -> None:
    knob = Turning(0.005, low=low, high=high)
    knob.widget.value = 0.0
    knob.widget.value = 1e9
    assert knob.asked == [low, high]
    knob.take(high)
    knob.take(low)
    assert knob.asked == [low, high]


def test_knob_without_an_end_is_a_box_for_a_number() -> None:
    assert isinstance(Turning(0.5, low=0.0, high=float("inf")).widget, ipywidgets.FloatText)
    assert isinstance(Turning(5, low=0).widget, ipywidgets.IntText)


def test_what_save_now_asks_is_said_beside_it_until_stop_has_more_to_say() -> None:
    told: list[str] = []
    stopped: list[Stopped] = [""]
    actions = Actions(
        stop=lambda: stopped.append("asked"),
        stopped=lambda: stopped[-1],
        save=lambda: told.append("save"),
        turn=lambda *_: None,
    )
    controls = Controls(ipywidgets, actions, new_state(2, started=0.0), lambda: None)
    controls._save.click()
    assert (told, controls._stops.value) == (["save"], "all ranks save at their next optimizer step")
    controls._stop.click()
    assert controls._stops.value == "all ranks stop at their next optimizer step"
