"""Stop, from one panel of a run or several: asked of an Accelerator, then an interrupt, then SIGKILL."""

from __future__ import annotations

import time
from pathlib import Path

import ipywidgets
import pytest

from nbaccel import launch
from nbaccel.notebook.controls import Actions, Controls, Stopped
from nbaccel.notebook.front import _controls
from nbaccel.session.state import new_state
from tests.conftest import wait_until


def evaluate(at_work: Path) -> None:
    from nbaccel import Accelerator

    Accelerator()
    at_work.touch()
    time.sleep(60)  # without one optimizer step


def deaf(at_work: Path) -> None:
    at_work.touch()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            at_work.with_name("refused").touch()


def shown(controls: Controls) -> tuple[str, str]:
    """What the button says, and what stands beside it."""
    return controls._stop.description, controls._stops.value


def test_second_stop_interrupts_when_no_optimizer_step_comes(clean: None, tmp_path: Path) -> None:
    run = launch(evaluate, tmp_path / "at work", num_processes=1, folder=False)
    actions, _ = _controls([run])
    wait_until((tmp_path / "at work").exists, 60, "the evaluation")
    wait_until(lambda: run.state.options, 10, "the Accelerator's word")
    actions.stop()
    assert actions.stopped() == "asked"
    assert not run.done()
    actions.stop()
    assert actions.stopped() == "interrupted"
    with pytest.raises(KeyboardInterrupt, match="in evaluate"):
        run.result(timeout=30)


def test_stop_interrupts_without_an_accelerator_and_then_kills(clean: None, tmp_path: Path) -> None:
    run = launch(deaf, tmp_path / "at work", num_processes=1, folder=False, grace=60)
    actions, _ = _controls([run])
    wait_until((tmp_path / "at work").exists, 60, "the work")
    actions.stop()
    assert actions.stopped() == "interrupted"
    wait_until((tmp_path / "refused").exists, 30, "the rank that refuses")
    actions.stop()
    assert actions.stopped() == "killed"
    with pytest.raises(KeyboardInterrupt, match="ended by SIGKILL"):
        run.result(timeout=30)


def test_every_panel_of_a_run_says_what_stop_does_next() -> None:
    stages: list[Stopped] = ["", "asked", "interrupted", "killed"]
    at = 0

    def stop() -> None:
        nonlocal at
        at += 1

    def nothing(*_: object) -> None:
        pass

    actions = Actions(stop=stop, stopped=lambda: stages[at], save=nothing, turn=nothing)
    state = new_state(2, 0.0)
    first, second = (Controls(ipywidgets, actions, state, nothing) for _ in range(2))
    try:
        for words in (("Stop", ""), ("Interrupt", "all ranks stop at their next optimizer step")):
            second.paint(state)
            assert shown(first) == shown(second) == words
            first._stop.click()
        second.paint(state)
        assert shown(second)[0] == "Stop at once"
    finally:
        for controls in (first, second):
            for widget in controls._parts:
                widget.close()
