"""Metric histories: bounded, drawn in columns that touch, in a line of blocks."""

from __future__ import annotations

import itertools
import math
from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from nbaccel.session.curves import LIMIT, Curve, columns, is_telling, sparkline


def curve(*values: float) -> Curve:
    return reduce(lambda made, point: made.add(*point), enumerate(values), Curve())


def test_curve_thins_out_and_keeps_both_ends() -> None:
    long = curve(*map(float, range(100_000)))
    assert len(long.points) < LIMIT
    assert long.all_points()[0] == (0, 0.0)
    assert long.all_points()[-1] == (99_999, 99_999.0)


def test_not_finite_values_are_the_last_but_not_drawn() -> None:
    broken = curve(1.0, 2.0, math.nan)
    assert math.isnan(broken.last[1])  # type: ignore[index]
    assert broken.all_points() == ((0, 1.0), (1, 2.0))
    assert columns([curve(math.nan)], 10) == []
    found = [made.finite_until for made in (broken, broken.add(3, math.inf), broken.add(3, 1.0))]
    assert found == [1, 1, None]
    assert curve(math.nan, math.nan).finite_until is None


def test_losses_and_what_evaluations_find_are_told_from_other_names() -> None:
    telling = ["loss", "train/ctc_loss", "val_f1", "Eval/BLEU", "test accuracy", "top5-acc"]
    others = ["lr", "value", "interval", "accumulated", "lossy", "latest"]
    assert [name for name in (*telling, *others) if is_telling(name)] == telling


def test_earlier_step_begins_a_new_curve() -> None:
    assert curve(1.0, 2.0).add(0, 5.0).all_points() == ((0, 5.0),)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60), st.integers(2, 80))
def test_neighbouring_columns_touch_and_stay_in_range(values: list[float], count: int) -> None:
    spans = columns([curve(*values)], count)
    assert len(spans) == count
    slack = 1e-6 * (1 + max(map(abs, values)))
    for left, right in itertools.pairwise(spans):
        assert left.low <= right.high + slack
        assert right.low <= left.high + slack
    assert min(span.low for span in spans) >= min(values) - slack
    assert max(span.high for span in spans) <= max(values) + slack


def test_columns_of_several_curves_are_a_band() -> None:
    spans = columns([curve(1.0, 1.0), curve(3.0, 3.0)], 4)
    assert spans == [(1.0, 3.0, 2.0)] * 4


def test_sparkline_shows_the_shape() -> None:
    assert sparkline([curve(*map(float, range(8)))], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([curve(5.0, 5.0)], 4) == "▁▁▁▁"
    assert sparkline([Curve()]) == ""
