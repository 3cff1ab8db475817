"""Of what ranks have logged, what is drawn and how the rest is told."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nbaccel.session.panel import html
from nbaccel.session.panel.pages import report
from nbaccel.session.panel.reading import View
from nbaccel.session.panel.text import paint_text
from nbaccel.wire.events import Metric
from tests.session.panel.streams import HEADING, replay, started, view

USUAL = ("loss", "lr", "grad_norm", "epoch", "tokens", "mem")


def logged(*values: Mapping[str, float], num_ranks: int = 2) -> list[Metric]:
    return [
        Metric(rank=rank, time=1.0, values=one, step=step)
        for step, one in enumerate(values)
        for rank in range(num_ranks)
    ]


def seen(*values: Mapping[str, float]) -> View:
    return view(2, iter([*started(2), *logged(*values)]))


def test_loss_of_an_evaluation_is_drawn_though_it_is_logged_last() -> None:
    found = seen(dict.fromkeys(USUAL, 1.0), {"val_loss": 0.5})
    assert [chart.name for chart in found.charts] == [
        "loss",
        "lr",
        "grad_norm",
        "epoch",
        "tokens",
        "val_loss",
    ]
    assert found.others == (("mem", 1.0),)


def test_metrics_that_are_not_drawn_are_told_in_a_line_and_all_in_the_report() -> None:
    values = {f"m{i}": i / 4 for i in range(40)}
    found = seen(values, {**values, "m9": -1.0})
    assert len(found.charts) == 6
    assert dict(found.others) == {**{f"m{i}": i / 4 for i in range(6, 40)}, "m9": -1.0}
    for words in (paint_text(found), html.body(found)):
        assert "34 more metrics: m6 1.5, m7 1.75, m8 2, m9 -1, m10 2.5, " in words
    state = replay(2, iter([*started(2), *logged(values)]))
    assert report(state, HEADING, lambda _: None, {}).values["metrics"] == values


def test_value_that_is_no_number_any_more_stands_beside_the_step_it_was_one_at() -> None:
    found = seen(*({"loss": 1.0 - step if step < 8 else math.nan} for step in range(20)))
    assert paint_text(found).endswith(" nan (mean of 2 ranks), after step 7")
    assert "nan<span" in html.body(found)
    assert "· after step 7<" in html.body(found)


def test_metric_that_has_never_been_a_number_is_told_and_not_drawn() -> None:
    found = seen({"loss": 1.0, "norm": math.nan})
    assert [chart.name for chart in found.charts] == ["loss"]
    assert paint_text(found).endswith("1 more metric: norm nan")
