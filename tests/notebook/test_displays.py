"""What ranks display, grouped into the cell's outputs."""

from __future__ import annotations

import base64
import re
from typing import Any

from nbaccel.notebook.displays import Displays
from nbaccel.notebook.widgets import RankWidgets
from nbaccel.session.state import new_state
from nbaccel.wire.events import Display

STATE = new_state(4, 0.0)
PNG = base64.b64encode(b"not really").decode()


class Page:
    """The outputs of a cell, as the front end would show them."""

    def __init__(self) -> None:
        self.outputs: dict[str, dict[str, Any]] = {}
        self.sent = 0

    def show(self, data: Any, *, metadata: Any, name: str, update: bool) -> None:
        assert update == (name in self.outputs)
        self.outputs[name] = dict(data)
        self.sent += 1

    def html(self) -> list[str]:
        return [str(data.get("text/html", "")) for data in self.outputs.values()]

    def plain(self) -> list[str]:
        return [str(data.get("text/plain", "")) for data in self.outputs.values()]


def shown(*events: Display, num_ranks: int = 4) -> Page:
    page: Any = Page()
    widgets = RankWidgets(page, lambda *_: None, live=False)
    displays = Displays(page, num_ranks=num_ranks, before=lambda: None, widgets=widgets)
    for event in events:
        displays.handle(event, STATE)
    displays.close(STATE)
    return page  # type: ignore[no-any-return]


def html(rank: int, text: str, **options: Any) -> Display:
    data = {"text/html": text, "text/plain": f"<{text}>"}
    return Display(rank=rank, data=data, **options)


def test_first_rank_alone_is_shown_as_it_is() -> None:
    data = {"image/png": PNG, "text/plain": "<Figure>"}
    assert list(shown(Display(rank=0, data=data)).outputs.values()) == [data]


def test_another_rank_alone_is_labelled() -> None:
    page = shown(html(2, "two"))
    assert "rank 2" in page.html()[0]
    assert page.plain() == ["[2] <two>"]


def test_nth_things_of_all_ranks_stand_side_by_side() -> None:
    page = shown(*(html(rank, f"{what} of {rank}") for what in ("first", "second") for rank in (1, 0, 3)))
    assert len(page.outputs) == 2
    labels = re.findall(r">(ranks? [\d,-]+)<", page.html()[0])
    assert labels == ["rank 0", "rank 1", "rank 3"]
    assert "second of 3" in page.html()[1]


def test_ranks_that_show_the_same_share_a_place() -> None:
    (text,) = shown(*(html(rank, "same") for rank in range(4))).html()
    assert text.count("same") == 1
    assert "ranks 0-3" in text


def test_images_become_part_of_the_grid_and_text_is_escaped() -> None:
    image = Display(rank=0, data={"image/png": PNG, "text/plain": "<Figure>"})
    (text,) = shown(image, Display(rank=1, data={"text/plain": "<script>"})).html()
    assert f"data:image/png;base64,{PNG}" in text
    assert "&lt;script&gt;" in text


def test_update_changes_what_has_the_name_and_others_are_ignored() -> None:
    page = shown(html(0, "a", name="x"), html(1, "b", name="x"), html(1, "new", name="x", update=True))
    assert "new" in page.html()[0]
    assert "a" in page.html()[0]
    assert shown(html(0, "late", name="unknown", update=True)).outputs == {}


def test_clear_with_wait_reuses_the_place() -> None:
    steps = [e for i in range(5) for e in (Display(rank=0, data={}, clear="next"), html(0, f"step {i}"))]
    assert shown(*steps).html() == ["step 4"]


def test_clear_empties_only_that_rank() -> None:
    page = shown(html(0, "zero"), html(1, "one"), Display(rank=0, data={}, clear="now"))
    assert "one" in page.html()[0]
    assert "zero" not in page.html()[0]


def test_outputs_are_bounded_and_updates_are_few() -> None:
    page = shown(*(html(0, f"thing {i}") for i in range(500)))
    assert len(page.outputs) == 40
    assert page.html()[-1] == "thing 499"
    assert page.sent == 41
