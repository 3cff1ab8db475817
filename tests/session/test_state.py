"""Folding event streams into what is known of a run."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterable
from functools import reduce

import pytest

from nbaccel.session.panel.reading import shown_state
from nbaccel.session.state import Failure, RunState, fold, for_next_call, new_state
from nbaccel.wire.events import (
    Applied,
    Died,
    Event,
    ExceptionInfo,
    Halted,
    Metric,
    Output,
    Progress,
    Raised,
    Returned,
    Status,
)

ERROR = ExceptionInfo(type_name="ValueError", message="ValueError: bad", frames=())


def replay(num_ranks: int, events: Iterable[Event]) -> RunState:
    return reduce(fold, events, new_state(num_ranks, started=0.0))


def out(rank: int, data: bytes, *, stream: str = "stdout", time: float = 1.0) -> Output:
    return Output(rank=rank, time=time, stream=stream, data=data)  # type: ignore[arg-type]


def test_run_ends_done_when_every_rank_returned() -> None:
    state = replay(
        2,
        [
            Status(rank=0, time=1, state="idle", pid=10),
            Status(rank=1, time=1, state="idle", pid=11),
            Status(rank=0, time=2, state="running"),
            Returned(rank=0, time=3, call=1),
        ],
    )
    assert (state.ranks[0].state, state.ranks[1].state, state.ended) == ("done", "idle", None)
    state = fold(state, Returned(rank=1, time=5, call=1))
    state = fold(state, Died(rank=0, time=6, exitcode=0))
    assert [(rank.state, rank.pid) for rank in state.ranks] == [("done", 10), ("done", 11)]
    assert (state.started, state.ended, state.failure) == (0.0, 5, None)
    assert state.ranks[0].exitcode == 0
    assert state.ranks[0].seen == 6


def test_first_failure_is_the_earliest_in_time_not_in_arrival() -> None:
    state = replay(
        3,
        [
            Raised(rank=2, time=7.5, call=1, info=ExceptionInfo("Late", "Late: x", ())),
            Raised(rank=1, time=7.0, call=1, info=ERROR),
            Died(rank=1, time=8.0, exitcode=1, detail="exit 1"),
            Died(rank=0, time=9.0, exitcode=-15, detail="ended by SIGTERM"),
        ],
    )
    assert state.failure == Failure(rank=1, time=7.0, info=ERROR, exitcode=1, detail="exit 1")
    assert [rank.state for rank in state.ranks] == ["lost", "failed", "failed"]
    assert state.failed_ranks == (0, 1, 2)
    assert state.ranks[1].error == ERROR
    assert state.ended == 9.0


@pytest.mark.parametrize(("kind", "situation"), [("ValueError", "failed"), ("KeyboardInterrupt", "stopped")])
def test_situation_when_a_rank_raised_or_was_interrupted(kind: str, situation: str) -> None:
    state = replay(2, [Status(rank=0, time=1, state="running")])
    assert state.situation == "starting"
    state = replay(2, [Status(rank=rank, time=1, state="running") for rank in range(2)])
    assert state.situation == "running"
    state = fold(state, Raised(rank=0, time=2, call=1, info=ExceptionInfo(kind, f"{kind}: x", ())))
    assert state.situation == situation
    state = fold(state, Died(rank=1, time=3, exitcode=-15))
    assert state.situation == situation


@pytest.mark.parametrize(("asked", "situation"), [(False, "failed"), (True, "stopped")])
def test_situation_when_ranks_were_killed(asked: bool, situation: str) -> None:
    running = [Status(rank=rank, time=1, state="running") for rank in range(2)]
    state = replay(2, [*running, *(Died(rank=rank, time=2, exitcode=-9, asked=asked) for rank in range(2))])
    assert state.situation == situation
    assert [shown_state(rank, state) for rank in state.ranks] == ["stopped" if asked else "lost", "stopped"]


def test_rank_that_dies_before_its_result_is_lost_even_with_exit_code_zero() -> None:
    state = replay(1, [Status(rank=0, time=1, state="running"), Died(rank=0, time=2, exitcode=0)])
    assert state.ranks[0].state == "lost"
    assert state.failure == Failure(rank=0, time=2, exitcode=0)


def test_next_call_and_new_process_clear_what_was_wrong() -> None:
    failed = replay(1, [Raised(rank=0, time=1, call=1, info=ERROR)])
    assert fold(failed, Status(rank=0, time=2, state="running")).ranks[0].error is None
    died = fold(failed, Died(rank=0, time=2, exitcode=-9))
    again = fold(died, Status(rank=0, time=3, state="starting", pid=5)).ranks[0]
    assert (again.exitcode, again.error, again.pid, again.state) == (None, None, 5, "starting")


def test_progress_and_metrics_keep_the_latest_by_name() -> None:
    state = replay(
        1,
        [
            Progress(rank=0, name="epoch", step=1),
            Progress(rank=0, name="batch", step=9),
            Progress(rank=0, name="epoch", step=2),
            Metric(rank=0, values={"loss": 3.0, "lr": 0.1}, step=1),
            Metric(rank=0, values={"loss": 2.0}, step=2),
        ],
    )
    rank = state.ranks[0]
    assert [(name, p.step) for name, p in rank.progress.items()] == [("batch", 9), ("epoch", 2)]
    assert {name: metric.values[name] for name, metric in rank.metrics.items()} == {"lr": 0.1, "loss": 2.0}
    assert rank.metrics["lr"].step == 1


def test_last_lines_collapse_bars_and_keep_the_order_of_streams() -> None:
    state = replay(
        1,
        [
            out(0, b"one\ntwo"),
            out(0, b"\rbar 1%\rbar 2%", stream="stderr"),
            out(0, b"three\n\xff"),
        ],
    )
    assert state.ranks[0].last_lines() == ("one", "two", "bar 2%", "three", "\ufffd")
    assert state.ranks[0].last_lines(2) == ("three", "\ufffd")
    assert state.ranks[0].last_lines(0) == ()


def test_tail_of_a_bar_keeps_the_lines_before_it() -> None:
    state = replay(1, [out(0, b"before\n")])
    for i in range(5000):
        state = fold(state, out(0, b"\rstep %d of 5000" % i))
    assert state.ranks[0].last_lines(2) == ("before", "step 4999 of 5000")


def test_bar_after_a_long_line_is_folded_at_once() -> None:
    state = replay(1, [out(0, b"x" * 100_000 + b"\n")])
    started = time.perf_counter()
    for i in range(100):
        state = fold(state, out(0, b"\rstep %d" % i))
    assert time.perf_counter() - started < 10  # a minute where the search begins at each byte
    assert state.ranks[0].last_lines(1) == ("step 99",)


@pytest.mark.parametrize("chunk", [b"a line of some forty characters, no more\n", b"no line end at all "])
def test_state_stays_small_under_very_many_lines(chunk: bytes) -> None:
    state = new_state(2, started=0.0)
    event = out(1, chunk * 1000)
    small = out(1, chunk)
    tracemalloc.start()
    try:
        for _ in range(200):
            state = fold(state, event)
        for i in range(3_000):
            state = fold(state, small)
            if i % 10 == 0:
                state = fold(state, Progress(rank=0, name=f"bar {i}", step=i))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 8 << 10 <= len(state.ranks[1].tail) <= 16 << 10
    assert len(state.ranks[0].progress) == 256
    assert next(reversed(state.ranks[0].progress)) == "bar 2990"
    assert peak < 1_000_000


def test_very_many_output_events_are_folded_in_reasonable_time() -> None:
    state = new_state(8, started=0.0)
    events = [out(i % 8, b"x" * 60 + b"\n") for i in range(1000)]
    started = time.thread_time()
    for _ in range(100):
        state = reduce(fold, events, state)
    # 0.4 s here; the bound only tells a cost that grows with what has been folded.
    assert time.thread_time() - started < 10


def test_event_without_a_rank_is_refused() -> None:
    with pytest.raises(IndexError, match="stamped"):
        fold(new_state(2, 0.0), Status(state="idle"))
    with pytest.raises(IndexError):
        fold(new_state(2, 0.0), Status(rank=2, state="idle"))


def test_pace_tells_the_recent_rate_and_where_the_time_went() -> None:
    events = [
        Progress(rank=0, time=i * 0.5, name="train", step=5 * i, times={"data": 0.3, "forward": 0.1})
        for i in range(1, 40)
    ]
    events.append(Progress(rank=0, time=21, name="eval", step=1))
    paces = replay(1, events).ranks[0].paces
    pace = paces["train"]
    assert pace.rate == pytest.approx(10.0)
    assert pace.parts["data"] / pace.seconds == pytest.approx(0.6, abs=0.01)
    assert paces["eval"].rate is None


def test_options_and_curves_are_kept_in_bounded_memory() -> None:
    state = replay(1, [Applied(rank=0, option="mixed_precision", value="bf16")])
    for step in range(10_000):
        values = {"loss": 10_000 - step, **{f"m{i}": float(i) for i in range(20)}}
        state = fold(state, Metric(rank=0, values=values, step=step))
    curves = state.ranks[0].curves
    assert state.options == {"mixed_precision": "bf16"}
    assert len(curves) == 12
    assert len(curves["loss"].points) <= 128
    assert curves["loss"].points[0] == (0, 10_000)
    assert curves["loss"].all_points()[-1] == (9999, 1)


def test_curves_of_what_people_look_at_take_the_place_of_others() -> None:
    first = {"loss": 1.0, **{f"m{i}": float(i) for i in range(20)}}
    told = [Metric(rank=0, values=values, step=1) for values in (first, {"eval/acc": 0.5}, first)]
    (rank,) = replay(1, told).ranks
    assert [*rank.curves] == ["loss", *(f"m{i}" for i in range(10)), "eval/acc"]
    assert len(rank.metrics) == 22


def test_run_whose_loops_were_left_before_their_end_is_stopped() -> None:
    halted = [Halted(rank=rank, time=4, step=120) for rank in range(2)]
    ended = [Returned(rank=rank, time=5, call=1) for rank in range(2)]
    assert replay(2, ended).situation == "done"
    assert replay(2, halted).situation != "stopped", "its ranks still save"
    state = replay(2, halted + ended)
    assert (state.situation, state.halted) == ("stopped", 120)
    assert for_next_call(state, (0, 1), 6).halted is None


def test_since_is_when_the_state_changed() -> None:
    state = replay(1, [Status(rank=0, time=3, state="running"), Status(rank=0, time=5, state="running")])
    assert state.ranks[0].since == 3
    assert fold(state, Returned(rank=0, time=7, call=1)).ranks[0].since == 7
