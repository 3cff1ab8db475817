"""What recorded runs say: situation, rows, and the sentence about what dominates."""

from __future__ import annotations

from itertools import chain

from nbaccel.session.panel.figures import clock, number
from nbaccel.session.panel.html import header
from nbaccel.session.panel.text import paint_text
from nbaccel.wire.events import Died, Halted, Progress, Raised, Status
from tests.session.panel.streams import ERROR, failing, returned, started, training, view


def test_running_ranks_have_rate_time_left_metrics_and_shares() -> None:
    seen = view(2, training(2))
    row = seen.rows[1]
    assert (seen.situation, seen.heading.precision, seen.num_ranks) == ("running", "bf16", 2)
    assert (row.step, row.total, row.epoch, row.state, row.last_line) == (
        240,
        400,
        1,
        "running",
        "step 240 loss 1.100",
    )
    assert row.rate is not None
    assert row.left is not None
    assert abs(row.rate - 5) < 0.1
    assert abs(row.left - 32) < 1
    assert dict(row.parts)["backward"] > dict(row.parts)["forward"]
    assert abs(sum(share for _, share in row.parts) - 1) < 0.02
    assert [chart.name for chart in seen.charts] == ["loss", "accuracy"]
    assert seen.charts[0].ranks == (0, 1)


def test_value_of_all_ranks_is_one_line() -> None:
    seen = view(2, training(2, reduced=True))
    assert seen.charts[0].ranks == ()
    assert len(seen.charts[0].curves) == 1


def test_waiting_for_data_is_said() -> None:
    (sentence,) = view(2, training(2, data=0.15)).sentences
    assert sentence == "63 % of each step waits for data: num_workers is 0"
    (sentence,) = view(2, training(2, data=0.15, workers=2)).sentences
    assert (
        sentence == "63 % of each step waits for data: its 2 workers are slower than the model (num_workers)"
    )
    (sentence,) = view(2, training(2, data=0.15, workers=None)).sentences
    assert sentence == "63 % of each step waits for data: the loader is slower than the model (num_workers)"


def test_straggler_is_named_with_how_much_and_where() -> None:
    (sentence,) = view(4, training(4, slow=3)).sentences
    assert sentence == "rank 3 is 1.7× slower than the others and holds them up, mostly in backward"


def test_late_rank_is_named_after_five_seconds_of_waiting() -> None:
    events = [*training(3), *(Status(rank=rank, time=50, state="waiting") for rank in (0, 1))]
    assert not any("late" in sentence for sentence in view(3, iter(events), now=54).sentences)
    assert view(3, iter(events), now=56).sentences[0] == "rank 2 is late by 6 s"


def test_peers_we_ended_are_stopped_not_lost() -> None:
    seen = view(3, failing(3, rank=1))
    assert seen.situation == "failed"
    assert [row.state for row in seen.rows] == ["stopped", "failed", "stopped"]
    assert seen.elapsed == 50.0


def test_where_the_loops_were_left_is_said_of_a_stopped_run_and_its_ranks() -> None:
    stop = [Halted(rank=rank, time=8.1, step=40) for rank in range(2)]
    broken = [Raised(rank=1, time=90, call=0, info=ERROR), Died(rank=0, time=91, exitcode=-15)]
    shown = view(2, chain(training(2, until=40), stop, returned(2)))
    assert (shown.ending, shown.states) == ("stopped after step 40", {"stopped": (0, 1)})
    assert "■ stopped after step 40" in header(shown)
    assert paint_text(shown).startswith("train · 2 ranks on cpu bf16 · stopped after step 40 · 1:21 ")
    failed = view(2, chain(training(2, until=40), stop, returned(1), broken))
    assert failed.ending == "failed"
    assert failed.states == {"done": (0,), "failed": (1,)}, "it had returned"


def test_loop_shown_is_the_one_that_goes_on() -> None:
    events = [
        *started(1),
        Progress(rank=0, time=1, name="epochs", step=1, total=3),
        Progress(rank=0, time=2, name="eval", step=10, total=10),
    ]
    assert view(1, iter(events)).rows[0].loop == "epochs"


def test_loop_shown_at_the_end_is_the_one_that_says_where_its_time_went() -> None:
    events = [
        *started(1),
        *(
            Progress(rank=0, time=n, name="train", step=n, total=3, times={"forward": 0.5})
            for n in range(1, 4)
        ),
        Progress(rank=0, time=3.1, name="a bar around it", step=3, total=3),
    ]
    assert view(1, iter(events)).rows[0].loop == "train"


def test_many_ranks_are_a_strip_with_the_odd_ones_as_rows() -> None:
    seen = view(64, training(64, slow=17))
    assert [row.rank for row in seen.rows] == [17]
    assert len(seen.strip) == 64
    assert seen.strip[17][2] < 0.7 < seen.strip[16][2]
    failed = view(64, failing(64, rank=40))
    assert failed.rows[0].rank == 40
    assert failed.states["stopped"] == (*range(40), *range(41, 64))


def test_slow_rank_among_many_has_a_row_also_where_loops_say_nothing_of_their_time() -> None:
    bars = (
        Progress(rank=rank, time=step * (0.2 if rank == 7 else 0.1), name="bar", step=step, total=99)
        for step in range(20)
        for rank in range(20)
    )
    shown = view(20, chain(started(20), bars), now=4.0)
    assert [row.rank for row in shown.rows] == [7]
    assert [round(speed, 2) for rank, _, speed in shown.strip if rank in (6, 7)] == [1.0, 0.5]


def test_end_stands_still() -> None:
    seen = view(2, chain(training(2, until=400), returned(2)), now=1000)
    assert (seen.situation, seen.elapsed, seen.left) == ("done", 81.0, None)


def test_figures_are_short() -> None:
    assert [clock(seconds) for seconds in (4.21, 42.9, 65, 7384)] == ["4.2 s", "42 s", "1:05", "2:03:04"]
    assert [number(value) for value in (3.0, 0.123456, float("nan"), 1e9)] == ["3", "0.1235", "nan", "1e+09"]


def test_cold_server_is_the_reason_for_a_start_that_takes_long() -> None:
    cold = view(2, iter(()), now=3.0)
    assert any("imports torch" in sentence for sentence in cold.sentences)
    assert not view(2, iter(()), now=0.5).sentences
    assert not view(2, started(2), now=3.0).sentences
