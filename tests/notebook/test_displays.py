"""What ranks display, grouped into the cell's outputs."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from nbaccel.notebook.displays import Displays
from nbaccel.notebook.widgets import RankWidgets
from nbaccel.session.state import new_state
from nbaccel.wire.events import Display
from tests.conftest import Kernel

STATE = new_state(4, 0.0)
PNG = base64.b64encode(b"not really").decode()


class Page:
    """The outputs of a cell, as the front end would show them."""

    captured = False

    def __init__(self) -> None:
        self.outputs: dict[str, dict[str, Any]] = {}
        self.sent = 0

    def show(self, data: Any, *, name: str, metadata: Any = None, update: bool = False) -> None:
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


def markdown(rank: int, text: str, **options: Any) -> Display:
    return Display(rank=rank, data={"text/markdown": text, "text/plain": text}, **options)


def test_images_become_part_of_the_grid_and_text_is_escaped() -> None:
    images = (Display(rank=rank, data={"image/png": PNG, "text/plain": "<Figure>"}) for rank in (0, 1))
    texts = (Display(rank=rank, data={"text/plain": f"<script> {rank}"}) for rank in (0, 1))
    image, text = shown(*images, *texts).html()
    assert f"data:image/png;base64,{PNG}" in image
    assert "ranks 0-1" in image
    assert "&lt;script&gt; 1" in text


def test_things_of_different_kinds_do_not_share_a_grid() -> None:
    image = {"image/png": PNG, "text/plain": "<Figure>"}
    first = (html(0, "table 0"), Display(rank=0, data=image))
    second = (Display(rank=1, data=image), html(1, "table 1"), html(1, "more"))
    tables, images, more = shown(*first, *second).html()
    assert "table 0" in tables
    assert "table 1" in tables
    assert "ranks 0-1" in images
    assert "rank 1" in more


def test_what_the_front_end_draws_has_a_place_of_its_own_below_a_label() -> None:
    page = shown(markdown(0, "# same"), markdown(1, "# same"), markdown(2, "# other"), html(3, "table"))
    contents = list(page.outputs.values())
    assert [data["text/plain"] for data in contents] == [
        "ranks 0-1",
        "# same",
        "rank 2",
        "# other",
        "[3] <table>",
    ]
    assert contents[1] == {"text/markdown": "# same", "text/plain": "# same"}


def test_first_rank_s_own_place_is_labelled_once_others_have_one() -> None:
    assert shown(markdown(0, "# alone")).plain() == ["", "# alone"]
    assert shown(markdown(0, "# a"), markdown(1, "# b")).plain() == ["rank 0", "# a", "rank 1", "# b"]
    assert shown(markdown(0, "# a"), num_ranks=1).plain() == ["# a"]


def test_update_to_what_cannot_stand_there_moves_and_other_ranks_stay() -> None:
    named = (html(rank, f"starts {rank}", name="x") for rank in (0, 1))
    page = shown(*named, markdown(1, "# done", name="x", update=True))
    assert page.html()[0] == "starts 0"
    assert page.plain()[1:] == ["rank 1", "# done"]


def test_places_of_what_was_cleared_are_taken_again_in_order() -> None:
    clear = [Display(rank=rank, data={}, clear="next") for rank in (0, 1)]
    loop = [e for i in range(50) for rank in (0, 1) for e in (clear[rank], markdown(rank, f"step {i}"))]
    assert [text for text in shown(*loop).plain() if text] == ["ranks 0-1", "step 49"]
    other = (clear[0], Display(rank=0, data={"image/png": PNG, "text/plain": "image"}), html(0, "below"))
    assert shown(html(0, "above"), *other).plain() == ["image", "<below>"]


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


def test_named_place_is_emptied_and_filled_again() -> None:
    empty = Display(rank=1, data={}, name="x", update=True)
    assert shown(html(1, "one", name="x"), empty).html() == [""]
    for update in (True, False):
        (text,) = shown(html(1, "one", name="x"), empty, html(1, "two", name="x", update=update)).html()
        assert "two" in text


def test_outputs_are_bounded_and_updates_are_few() -> None:
    page = shown(*(html(0, f"thing {i}") for i in range(500)))
    assert len(page.outputs) == 41
    assert page.html()[39] == "thing 499"
    assert page.plain()[40].startswith("460 displays of rank 0 are not shown")
    assert page.sent == 42


def test_what_is_not_shown_is_counted_by_rank_until_it_is_cleared() -> None:
    things = [html(rank, f"thing {i} of {rank}") for i in range(41) for rank in (0, 1)]
    page = shown(*things)
    assert "thing 40 of 1" in page.html()[39]
    assert page.plain()[40].startswith("2 displays of ranks 0-1 are not shown")
    cleared = shown(*things, Display(rank=1, data={}, clear="now"))
    assert cleared.plain()[40].startswith("1 display of rank 0 is not shown")


# ── in a real kernel ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.kernel
def test_markdown_latex_and_json_reach_the_page_as_they_are(kernel: Kernel) -> None:
    kernel.ok("""
def f():
    import os
    from IPython.display import JSON, Latex, Markdown, display
    rank = int(os.environ["RANK"])
    display(Markdown(f"# of {rank}"), Latex("$x$"), JSON({"rank": rank}))
""")
    shown = kernel.ok("notebook_launcher(f, num_processes=2)").displays
    for rank in (0, 1):
        assert {"text/markdown": f"# of {rank}", "text/plain": f"# of {rank}"} in shown
        assert any(data.get("application/json") == {"rank": rank} for data in shown)
    assert {"text/latex": "$x$", "text/plain": "$x$"} in shown
    said = [data.get("text/plain", "") for data in shown]
    assert {"rank 0", "rank 1", "ranks 0-1"} <= set(said)
    assert any('"rank": 1' in text for text in said)
    assert not any("object" in text for text in said)
    assert not any("<pre" in data.get("text/html", "") for data in shown)
    alone = [
        data
        for data in kernel.ok("notebook_launcher(f, num_processes=1)").displays
        if "text/markdown" in data
    ]
    assert alone == [{"text/markdown": "# of 0", "text/plain": "# of 0"}]


@pytest.mark.kernel
def test_kinds_are_paired_and_what_is_not_shown_is_said(kernel: Kernel) -> None:
    kernel.ok("""
def f():
    import os
    from IPython.display import HTML, display
    rank = int(os.environ["RANK"])
    things = [HTML(f"<b>table {rank}</b>"), {"words of": rank}]
    for thing in things if rank else things[::-1]:
        display(thing)
    for i in range(50):
        display(HTML(f"<i>{i}</i>"))
""")
    shown = kernel.ok("notebook_launcher(f, num_processes=2)").displays
    grids = [data["text/html"] for data in shown if "display:flex" in data.get("text/html", "")]
    assert any("table 0" in grid and "table 1" in grid for grid in grids)
    assert not any("table" in grid and "words of" in grid for grid in grids)
    assert shown[-1]["text/plain"].startswith("24 displays of ranks 0-1 are not shown")
