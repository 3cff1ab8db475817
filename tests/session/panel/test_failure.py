"""Failures as a run's state tells them: grouped, the cause first."""

from __future__ import annotations

import os
import sysconfig

from nbaccel.session.panel.failure import error_lines, failed_alike, fates, headline
from nbaccel.session.panel.pages import report
from nbaccel.session.panel.reading import shown_state
from nbaccel.session.state import RunState, fold
from nbaccel.wire.events import Concluded, Died, Event, ExceptionInfo, Frame, Raised, Returned
from tests.session.panel.streams import ERROR, HEADING, failing, replay, started

C10D = os.path.join(sysconfig.get_paths()["purelib"], "torch", "distributed", "distributed_c10d.py")
BROKEN = ExceptionInfo(
    "RuntimeError",
    "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4711",
    (
        Frame("train.py", 20, "train", "dist.all_reduce(x)"),
        Frame(C10D, 2800, "all_reduce", "work.wait()"),
    ),
)


def state_of(num_ranks: int, *events: Event) -> RunState:
    return replay(num_ranks, iter([*started(num_ranks), *events]))


def test_ranks_that_failed_the_same_way_are_told_once() -> None:
    state = state_of(
        4,
        Raised(rank=2, time=5.0, call=0, info=ERROR),
        Raised(rank=0, time=5.1, call=0, info=ERROR),
        Raised(rank=1, time=5.2, call=0, info=BROKEN),
        Died(rank=3, time=6.4, exitcode=-15),
    )
    assert failed_alike(state) == (2, 0)
    said = "ranks 0,2 of 4 failed: ValueError: shapes (3,) and (4,) do not match (at train.py:12)"
    assert headline(state, lambda _: None) == said
    assert fates(state, lambda _: None) == [
        "rank 1 waited in all_reduce, called from train.py:20",
        "rank 3 ended with it",
    ]
    told = report(state, HEADING, lambda _: None, {}).values["error"]
    assert (told["rank"], told["ranks"]) == (2, [2, 0])
    assert told["others"] == fates(state, lambda _: None)
    assert told["lines"][-4:] == [ERROR.message, said, *told["others"]]
    assert sum("Traceback" in line for line in told["lines"]) == 1


def test_ranks_whose_messages_name_the_rank_failed_the_same_way_everywhere() -> None:
    errors = [
        ExceptionInfo("ValueError", f"ValueError: rank {rank}: no shard {rank}", ERROR.frames)
        for rank in (0, 1)
    ]
    state = state_of(3, *(Raised(rank=rank, time=5.0, call=0, info=errors[rank]) for rank in (0, 1)))
    state = fold(state, Raised(rank=2, time=5.1, call=0, info=BROKEN))
    assert headline(state, lambda _: None).startswith("ranks 0-1 of 3 failed: ")
    assert [shown_state(rank, state) for rank in state.ranks] == ["failed", "failed", "stopped"]


def test_colours_of_a_message_do_not_run_into_what_follows() -> None:
    error = ExceptionInfo("ValueError", "ValueError: \x1b[31mbad", ERROR.frames)
    state = state_of(1, Raised(rank=0, time=5.0, call=0, info=error))
    assert headline(state, lambda _: None) == "rank 0 of 1 failed: ValueError: bad (at train.py:12)"


def test_killed_rank_is_the_cause_though_its_peers_told_first() -> None:
    state = state_of(
        2, Raised(rank=0, time=5.00, call=0, info=BROKEN), Died(rank=1, time=5.02, exitcode=-9, detail="OOM")
    )
    assert failed_alike(state) == (1,)
    assert headline(state, lambda _: None).startswith("rank 1 of 2 was ended by SIGKILL")
    assert fates(state, lambda _: None) == ["rank 0 waited in all_reduce, called from train.py:20"]


def test_rank_that_we_ended_after_an_error_is_not_the_cause() -> None:
    state = state_of(2, Raised(rank=0, time=5.0, call=0, info=ERROR), Died(rank=1, time=5.02, exitcode=-15))
    assert failed_alike(state) == (0,)


def test_others_that_had_returned_or_died_are_told_so() -> None:
    state = state_of(
        3,
        Returned(rank=0, time=4.0, call=0),
        Raised(rank=1, time=5.0, call=0, info=ERROR),
        Died(rank=2, time=5.5, exitcode=-11),
    )
    first, second = fates(state, lambda _: None)
    assert first == "rank 0 had returned"
    assert second.startswith("rank 2 was ended by SIGSEGV")


def test_nothing_is_said_of_a_run_without_failure_nor_of_an_interrupt() -> None:
    interrupt = ExceptionInfo("KeyboardInterrupt", "KeyboardInterrupt", ())
    for state in (state_of(2), state_of(2, Raised(rank=0, time=5.0, call=0, info=interrupt))):
        assert failed_alike(state) == ()
        assert headline(state, lambda _: None) == ""
        assert error_lines(state, lambda _: None) == []


def test_report_stays_short_with_a_failure_of_many_ranks() -> None:
    text = report(replay(64, failing(64, rank=40)), HEADING, lambda _: None, {}).text
    assert "rank 40 of 64 failed: ValueError" in text
    assert "ranks 0-39,41-63 ended with it" in text
    assert len(text.splitlines()) <= 40


def test_report_stays_short_when_the_message_has_many_lines() -> None:
    long = ExceptionInfo(
        "ValueError", "ValueError: " + "\n".join(f"line {n}" for n in range(90)), ERROR.frames
    )
    text = report(state_of(2, Raised(rank=0, time=5.0, call=0, info=long)), HEADING, lambda _: None, {}).text
    assert "line 89" in text
    assert len(text.splitlines()) <= 40


def test_report_of_a_run_that_came_to_nothing_says_why() -> None:
    state = state_of(
        2, Concluded(rank=0, time=5.0, problem="not all ranks were ready in 2 s:\n  rank 0: starting")
    )
    found = report(state, HEADING, lambda _: None, {"sources": {"seed": "the launch"}})
    assert (found.values["state"], found.values["error"]["rank"]) == ("failed", None)
    assert "not all ranks were ready in 2 s" in found.text
    assert "sources" not in found.values["again"]
    assert {rank["state"] for rank in found.values["ranks"]} == {"stopped"}
