"""Text in a cell: as much as a page carries, in whole lines."""

from __future__ import annotations

from nbaccel.session.sinks.limit import Limit
from nbaccel.session.state import new_state

STATE = new_state(1, 0.0)


def test_text_stops_at_a_line_end_and_the_rest_is_counted() -> None:
    written: list[tuple[str, str]] = []
    limit = Limit(lambda text, stream: written.append((text, stream)), 25)
    limit("first line\n", "stdout")
    limit("second line\nthird line\nfourth\n", "stdout")
    limit("fifth\n", "stderr")
    limit.close(STATE)
    limit.close(STATE)
    assert [text for text, stream in written if stream == "stdout"] == ["first line\n", "second line\n"]
    notes = [text for text, stream in written if stream == "stderr"]
    assert len(notes) == 2
    assert "3 lines are not shown" in notes[1]


def test_short_text_is_left_alone() -> None:
    written: list[str] = []
    limit = Limit(lambda text, stream: written.append(text), 100)
    limit("a\n", "stdout")
    limit.close(STATE)
    assert written == ["a\n"]
