"""What is done to a session's ranks, and when, once their call is to end."""

from __future__ import annotations

from signal import SIGINT, SIGKILL

import pytest

from nbaccel.session.ending import Action, Ending


def due(ending: Ending, *, until: float) -> list[tuple[float, Action]]:
    """What is done by then, with when."""
    found: list[tuple[float, Action]] = []
    while (at := ending.next_at()) is not None and at <= until:
        action = ending.take_due(at)
        assert action is not None
        found.append((round(at, 3), action))
    return found


def test_ranks_that_can_stop_as_one_are_signalled_only_after_their_grace() -> None:
    ending = Ending(5.0, keep=True)
    ending.begin("interrupted", 0.0, ask=True)
    assert due(ending, until=4.9) == [(0.0, "ask")]
    assert due(ending, until=60.0) == [(5.0, SIGINT), (5.2, "free"), (10.2, SIGKILL)]
    assert ending.urged == 5.0


def test_ranks_that_were_asked_are_signalled_at_once_when_a_person_insists() -> None:
    ending = Ending(5.0, keep=True)
    ending.begin("interrupted", 0.0, ask=True)
    due(ending, until=2.0)
    assert ending.insist(2.0)
    assert due(ending, until=3.0) == [(2.0, SIGINT), (2.2, "free")]
    assert not ending.insist(3.0)
    assert (ending.reason, ending.urged) == ("interrupted", 2.0)


@pytest.mark.parametrize(("reason", "keep"), [("failed", True), ("hung", True), ("interrupted", False)])
def test_ranks_that_take_no_more_steps_are_not_asked(reason: str, keep: bool) -> None:
    ending = Ending(1.0, keep=keep)
    ending.begin(reason, 0.0, ask=True)  # type: ignore[arg-type]
    assert "ask" not in [action for _, action in due(ending, until=60.0)]
