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


def test_bar_that_is_painted_over_takes_no_room() -> None:
    written: list[str] = []
    limit = Limit(lambda text, stream: written.append(text), 30)
    limit("step 0", "stderr")
    for step in range(1, 100):
        limit(f"\rstep {step}", "stderr")
    limit("\r       \rdone\nstep 100", "stderr")
    limit("\r        \r", "stderr")
    limit.close(STATE)
    assert len(written) == 102
    assert not any("no more" in text for text in written)


def test_text_stops_at_a_line_end_while_a_bar_is_painted() -> None:
    written: list[str] = []
    limit = Limit(lambda text, stream: written.append(text), 20)
    limit("step 0", "stderr")
    limit("\r      \rfirst line\nsecond line\nstep 1", "stderr")
    limit("\rstep 2", "stderr")
    assert written[:2] == ["step 0", "\r      \rfirst line\n"]
    assert written[2].startswith("… no more")
    assert len(written) == 3


def test_line_that_comes_in_pieces_takes_room_for_all_of_them() -> None:
    written: list[str] = []
    limit = Limit(lambda text, stream: written.append(text), 20)
    for _ in range(3):
        limit("a piece ", "stdout")
    assert [text for text in written if text == "a piece "] == ["a piece "] * 2
    assert written[2].startswith("\n… no more")
