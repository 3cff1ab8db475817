"""The panel as plain text: golden lines, never more than forty."""

from __future__ import annotations

import time
from itertools import chain

from nbaccel.session.panel.text import LINES, paint_text
from nbaccel.wire.events import Metric, Output
from tests.session.panel.streams import failing, nested, returned, started, training, view


def test_text_of_a_finished_run() -> None:
    text = paint_text(
        view(2, chain(training(2, until=400, reduced=True, data=0.1), returned(2))), hints=["logs: x"]
    )
    assert text.splitlines() == [
        "train · 2 ranks on cpu bf16 · done 1:21 · 5 batch/s",
        "  ! 50 % of each step waits for data: num_workers is 0",
        "  0  done  ██████████  train 400/400 epoch 1  5 batch/s  loss 0.0395  accuracy 0.9835  data 50%  step 400 l…",
        "  1  done  ██████████  train 400/400 epoch 1  5 batch/s                                data 50%  step 400 l…",
        "  loss █▇▆▆▅▄▄▄▃▃▃▂▂▂▂▂▁▁▁▁▁▁▁▁ 0.0395, step 400",
        "  accuracy ▁▂▃▃▄▅▅▅▆▆▆▇▇▇▇▇████████ 0.9835, step 400",
        "logs: x",
    ]  # fmt: skip


def test_ranks_that_say_the_same_share_a_line() -> None:
    clock = time.strftime("%H:%M:%S", time.localtime(3))
    assert (
        paint_text(view(4, started(4), now=3.0))
        == f"train · 4 ranks on cpu bf16 · running 3.0 s · as of {clock}\n  0-3  running"
    )


def test_text_has_at_most_forty_lines_with_a_long_error_and_many_ranks() -> None:
    error = [f"frame {i}" for i in range(100)]
    for count in (16, 64):
        text = paint_text(view(count, failing(count, rank=2)), error=error, hints=["a", "b"])
        lines = text.splitlines()
        assert len(lines) <= LINES
        assert lines[-1] == "b"
        assert any("frame 99" in line for line in lines)
        assert any("frame 0" in line for line in lines)


def test_nested_bars_stand_on_one_line_with_what_they_say() -> None:
    text = paint_text(view(1, nested(), now=10.0)).splitlines()
    assert text[0].split(" · ")[3:5] == ["2 it/s", "12 s left"]
    assert "batches 5/10 epochs 0/3" in text[1]
    assert "loss 0.5" in text[1]
    assert "warming up · at it" in text[1]


def test_mean_is_of_all_ranks_also_of_those_whose_curves_are_left_out() -> None:
    values = (Metric(rank=rank, time=1, values={"loss": float(rank)}, step=1) for rank in range(20))
    seen = view(20, chain(started(20), values))
    assert len(seen.charts[0].curves) == 8
    assert seen.charts[0].last == 9.5
    assert "9.5 (mean of 20 ranks)" in paint_text(seen)


def test_control_sequences_do_not_reach_the_text() -> None:
    events = [*started(1), Output(rank=0, time=1, stream="stdout", data=b"\x1b[31mred\x07")]
    text = paint_text(view(1, iter(events)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "red" in text
