"""Widgets of ranks: told to the page, heard from it, still at the end."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

import pytest

from nbaccel.notebook.displays import Displays
from nbaccel.notebook.widgets import VIEW, RankWidgets
from nbaccel.session.state import new_state
from nbaccel.wire.events import CommMessage, Display, Request
from tests.conftest import Kernel, needs

STATE = new_state(2, 0.0)
SLIDER = {"_model_name": "IntSliderModel", "min": 0, "max": 9, "value": 3, "description": "level"}


class Page:
    """A cell of a kernel whose clicks cannot be heard early, and all that is sent to its page."""

    running = True
    captured = False

    def __init__(self) -> None:
        self.comms: dict[str, Any] = {}
        manager = SimpleNamespace(comms=self.comms, register_comm=self.register)
        self.kernel = SimpleNamespace(comm_manager=manager)
        self.sent: list[tuple[str, Any]] = []
        self.outputs: dict[str | None, Any] = {}

    def register(self, comm: Any) -> None:
        self.comms[comm.comm_id] = comm

    def send(self, kind: str, content: Any, **_: Any) -> None:
        self.sent.append((kind, content))

    def show(self, data: Any, *, metadata: Any = None, name: str | None = None, update: bool = False) -> None:
        self.outputs[name] = dict(data)


def opened(rank: int = 1, comm: str = "c1") -> CommMessage:
    data = {"state": SLIDER, "buffer_paths": []}
    return CommMessage(rank=rank, kind="comm_open", comm=comm, target="jupyter.widget", data=data)


def made(*, live: bool = True) -> tuple[Any, RankWidgets, list[tuple[int, Request]]]:
    page, told = Page(), list[tuple[int, Request]]()
    anything: Any = page
    return page, RankWidgets(anything, lambda rank, request: told.append((rank, request)), live=live), told


def test_what_a_rank_tells_goes_to_the_page_and_back() -> None:
    page, widgets, told = made()
    widgets.handle(opened(), STATE)
    assert page.sent[0][0] == "comm_open"
    assert page.sent[0][1]["target_name"] == "jupyter.widget"
    message = {"method": "update", "state": {"value": 5}, "buffer_paths": []}
    page.comms["c1"].handle_msg({"content": {"data": message}, "buffers": [memoryview(b"x")]})
    ((rank, request),) = told
    assert (rank, request.kind, request.name) == (1, "comm", "c1")
    assert request.value == {"data": message, "buffers": (b"x",)}
    assert widgets.still({VIEW: {"model_id": "c1"}})["text/plain"] == "level: 5"
    widgets.close(STATE)
    assert page.sent[-1] == ("comm_close", {"comm_id": "c1", "data": {}})
    assert page.comms == {}


def test_widget_has_an_output_of_its_own_and_is_still_at_the_end() -> None:
    page, widgets, _ = made()
    displays = Displays(page, num_ranks=2, before=lambda: None, widgets=widgets)
    for rank, comm in ((0, "c0"), (1, "c1")):
        widgets.handle(opened(rank, comm), STATE)
        data = {VIEW: {"model_id": comm}, "text/plain": "IntSlider(…)"}
        displays.handle(Display(rank=rank, data=data), STATE)
        displays.handle(Display(rank=rank, data={"text/plain": "words"}), STATE)
    live = [data for data in page.outputs.values() if VIEW in data]
    assert [data[VIEW]["model_id"] for data in live] == ["c0", "c1"]
    assert all("level" in data["text/html"] for data in live), "beside it what it looks like"
    update = {"method": "update", "state": {"value": 9}}
    widgets.handle(CommMessage(rank=1, kind="comm_msg", comm="c1", data=update), STATE)
    displays.close(STATE)
    widgets.close(STATE)
    assert not any(VIEW in data for data in page.outputs.values())
    said = [data["text/plain"] for data in page.outputs.values()]
    assert "level: 3" in said
    assert "level: 9" in said
    assert "rank 1" in said
    assert "[0-1] words" in said, "other things of several ranks still share an output"


def test_where_nobody_looks_on_no_widget_is_opened() -> None:
    page, widgets, _ = made(live=False)
    widgets.handle(opened(), STATE)
    assert page.sent == []
    assert page.comms == {}
    assert widgets.still({VIEW: {"model_id": "c1"}})["text/plain"] == "level: 3"
    widgets.close(STATE)


def test_widget_that_is_not_known_is_its_words() -> None:
    _, widgets, _ = made()
    assert widgets.still({VIEW: {"model_id": "x"}, "text/plain": "IntSlider()"}) == {
        "text/plain": "IntSlider()"
    }


@pytest.mark.kernel
@needs("ipywidgets")
@pytest.mark.parametrize("num", [1, 2])
def test_interact_clears_only_what_it_has_shown(kernel: Kernel, num: int) -> None:
    kernel.ok("""
def f():
    import ipywidgets as w
    from IPython.display import clear_output, display
    display("kept")
    display(w.IntSlider(value=4, description="level"))
    made = w.interact(lambda x: x * 2, x=5)
    made.widget.children[0].value = 6
    made.widget.children[0].value = 7
    out = w.Output()
    with out:
        display("gone")
    out.append_stdout("gone")
    out.clear_output()
    assert out.outputs == ()
""")
    shown = last_of(kernel, num)
    whose = "" if num == 1 else "[0-1] "
    assert f"{whose}'kept'" in shown
    assert "level: 4" in shown
    assert f"{whose}14" in shown
    assert not any("10" in text or "12" in text or "gone" in text for text in shown)


@pytest.mark.kernel
@needs("ipywidgets")
def test_clear_output_outside_of_output_widgets_clears_what_is_in_them_too(kernel: Kernel) -> None:
    kernel.ok("""
def f():
    import ipywidgets as w
    from IPython.display import clear_output, display
    out = w.Output()
    with out:
        display("inside")
    clear_output()
    with out:
        display("again")
""")
    assert [text for text in last_of(kernel, 1) if text] == ["'again'"]


def last_of(kernel: Kernel, num: int) -> list[str]:
    """The words of each output of a run of `f`, as they are at its end."""
    kernel.ok("""
from nbaccel.notebook.cell import Cell
from nbaccel.notebook import displays as module
if "said" not in globals():
    said, show = {}, Cell.show
    def seen(cell, data, *, name=None, **options):
        said[name] = data
        show(cell, data, name=name, **options)
    Cell.show = seen
said.clear()
""")
    cell = kernel.ok(f"""
notebook_launcher(f, num_processes={num})
[str(data.get("text/plain", "")) for name, data in said.items() if str(name).startswith("nbaccel-")]
""")
    texts: list[str] = ast.literal_eval(cell.result or "")
    return texts


def test_error_inside_an_output_widget_is_printed(kernel: Kernel) -> None:
    cell = kernel.ok("""
def f():
    import ipywidgets as w
    with w.Output():
        raise ValueError("inside a widget")
    return "went on"
notebook_launcher(f, num_processes=1)
""")
    assert "ValueError: inside a widget" in cell.stderr + cell.stdout
    assert "went on" in (cell.result or "")
