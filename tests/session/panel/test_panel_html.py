"""The panel as HTML: nothing a sanitiser drops, nothing a hostile rank can smuggle in."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from itertools import chain

import pytest

from nbaccel.session.panel import html
from nbaccel.session.panel.ansi import ansi_to_html, plain
from nbaccel.wire.events import Metric, Output, Progress, Status
from tests.session.panel.streams import failing, nested, returned, started, training, view

HOSTILE = "</div></details><script>alert(1)</script><img src=x onerror=alert(2)>&<svg onload=x>\"'"


class Tags(HTMLParser):
    """The tags and attributes of a text, and its words; fails on one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def hostile() -> str:
    """A panel of a run whose every text is an attack."""
    seen = view(
        1,
        iter(
            [
                *started(1),
                Status(rank=0, time=1, state="running", detail=HOSTILE),
                Progress(rank=0, time=1, name="around" + HOSTILE, step=0, total=2, depth=0),
                Progress(rank=0, time=1, name=HOSTILE, step=1, total=None, unit=HOSTILE, depth=1),
                Progress(
                    rank=0, time=2, name=HOSTILE, step=2, total=None, unit=HOSTILE, depth=1, note=HOSTILE
                ),
                Metric(rank=0, time=1, values={HOSTILE: 1.0}, step=1),
                Output(rank=0, time=1, stream="stdout", data=HOSTILE.encode()),
            ]
        ),
    )
    return html.panel(seen, error=[HOSTILE], outputs=[(0, [HOSTILE])])


@pytest.mark.parametrize(
    "text",
    [
        html.panel(view(4, failing(4, rank=2)), error=["\x1b[31mbad\x1b[0m"], outputs=[(0, ["line"])]),
        html.panel(view(64, training(64, slow=3))),
        html.panel(view(2, chain(training(2), returned(2)))),
        hostile(),
    ],
    ids=["failed", "many", "done", "hostile"],
)
def test_only_plain_tags_and_styles_are_used(text: str) -> None:
    found = Tags(text)
    assert found.tags <= {"div", "span", "b", "i", "details", "summary"}
    assert found.attributes <= {"style", "open", "class"}
    assert "var(" not in text
    assert "url(" not in text


def test_hostile_output_is_shown_as_text() -> None:
    words = Tags(hostile()).words
    assert words.count("<script>alert(1)</script>") >= 5


def test_empty_lines_of_output_do_not_end_the_html_in_a_markdown_export() -> None:
    lines = ["before", "", "after"]
    text = html.panel(view(2, training(2)), error=lines, outputs=[(0, lines)])
    text += html.failure(lines, headline="bad") + html.scrolling(lines)
    assert "\n" not in text
    assert Tags(text).words.count("before\n\nafter") == 4


def test_columns_without_anything_in_them_are_left_out_at_the_end() -> None:
    silent = [*started(1), Progress(rank=0, time=1, name="train", step=1, total=2)]
    assert "last output" in html.body(view(1, iter(silent)))
    assert "last output" not in html.body(view(1, chain(silent, returned(1))))


def test_every_fact_has_a_word_beside_its_colour() -> None:
    words = Tags(html.panel(view(4, training(4, slow=3)))).words
    for word in (
        "running",
        "data",
        "forward",
        "backward",
        "communication",
        "optimizer",
        "240/400",
        "epoch 1",
    ):
        assert word in words
    assert "rank 3 is 1.7× slower than the others" in words


def test_bytes_stay_few_with_many_ranks() -> None:
    assert len(html.panel(view(8, training(8)))) < 32_000
    assert len(html.panel(view(256, training(256, slow=17)))) < 64_000


def test_panel_says_when_it_was_so_until_the_run_has_ended() -> None:
    clock = time.strftime("as of %H:%M:%S", time.localtime(49))
    assert clock in Tags(html.header(view(2, training(2)))).words
    assert "as of" not in html.header(view(2, chain(training(2), returned(2))))


def test_failure_below_its_headline_is_folded() -> None:
    text = html.failure(["Traceback", "\x1b[31mValueError: x"], headline="rank 1 of 2 failed: ValueError: x")
    assert Tags(text).tags == {"div", "details", "summary", "span"}
    assert "<details open" not in text
    assert text.index("rank 1 of 2") < text.index("<details") < text.index("Traceback")
    assert "<details" not in html.failure(["it took too long"], headline="it took too long")


def test_nested_bars_stand_in_one_cell_with_what_they_say() -> None:
    seen = view(1, nested(), now=10.0)
    words = Tags(html.panel(seen)).words
    assert "5/10 · epochs 0/3 · 2/s · 12 s" in words
    assert "loss 0.5" in words
    assert "warming up · at it" in words


def test_failure_is_open_and_outputs_are_folded() -> None:
    text = html.panel(view(2, failing(2, rank=1)), error=["ValueError: x"], outputs=[(0, ["zero"])])
    assert "<details style" in text
    assert text.index("ValueError: x") < text.index("<details")


def test_document_stands_alone() -> None:
    seen = view(2, training(2))
    text = html.document(seen, html.panel(seen))
    assert text.startswith("<!doctype html>")
    assert "color-scheme:light dark" in text


def test_colours_of_a_terminal_become_styles() -> None:
    assert ansi_to_html("\x1b[1;31mred\x1b[0m plain") == (
        '<span style="font-weight:bold;color:#d1453b">red</span> plain'
    )
    assert ansi_to_html("\x1b[38;2;1;2;300mx\x1b[39my") == '<span style="color:#0102ff">x</span>y'
    assert ansi_to_html("\x1b[38;5;196mx") == '<span style="color:#ff0000">x</span>'
    assert ansi_to_html("\x1b]0;title\x07a\x1b[2Kb\x00\x1b") == "ab"
    assert plain("\x1b[32ma\x1b[0m\x07b") == "ab"


@pytest.mark.parametrize("text", ["\x1b[", "\x1b[38;5m", "\x1b[38;2;1m", "\x1b[;;m", "\x1b[999m", "\x1b]"])
def test_broken_sequences_are_harmless(text: str) -> None:
    assert re.fullmatch(r"(<span [^<>]*>)?[^<>]*x(</span>)?", ansi_to_html(text + "\nx"))
