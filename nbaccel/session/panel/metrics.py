"""What ranks have logged: which metrics are drawn, and the values of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nbaccel.numbered import numbered
from nbaccel.session.curves import Curve, is_telling
from nbaccel.session.panel.figures import number
from nbaccel.session.state import RankState

__all__ = ["Chart", "more_metrics", "read_charts", "read_others"]

_MOST_CHARTS = 6
_MOST_CURVES = 8
_MOST_TOLD = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The history of one metric: a line, or the band in which several ranks' lines lie."""

    name: str
    curves: tuple[Curve, ...]
    ranks: tuple[int, ...]
    """Whose they are, of many ranks a sample; empty when the value is one of all ranks together."""
    last: float
    """The newest value; the mean of all ranks that have one, also of those whose curves are left out."""
    num_ranks: int
    """Of how many."""

    @property
    def when(self) -> str:
        """Of which step that is, or after which one it was finite no more."""
        until = [curve.finite_until for curve in self.curves if curve.finite_until is not None]
        if until and not math.isfinite(self.last):
            return f"after step {min(until)}"
        steps = [curve.last[0] for curve in self.curves if curve.last is not None]
        return f"step {max(steps)}" if steps else ""


def read_charts(ranks: Sequence[RankState], most: int = _MOST_CHARTS) -> tuple[Chart, ...]:
    """The histories of at most so many metrics, those first logged first: losses and what evaluations found before
    others. One that has never been a number has none."""
    names: dict[str, list[RankState]] = {}
    for rank in ranks:
        for name in rank.curves:
            names.setdefault(name, []).append(rank)
    drawn = [name for name, holders in names.items() if any(rank.curves[name].points for rank in holders)]
    chosen = sorted(drawn, key=lambda name: not is_telling(name))[:most]
    charts = []
    for name in filter(chosen.__contains__, drawn):
        holders = names[name]
        whole = [rank for rank in holders if (metric := rank.metrics.get(name)) and metric.reduced]
        shown = whole[:1] or holders
        values = [last[1] for rank in shown if (last := rank.curves[name].last) is not None]
        num_ranks = len(shown)
        if num_ranks > _MOST_CURVES:
            shown = [shown[at * (len(shown) - 1) // (_MOST_CURVES - 1)] for at in range(_MOST_CURVES)]
        charts.append(
            Chart(
                name=name,
                curves=tuple(rank.curves[name] for rank in shown),
                ranks=() if whole or len(ranks) == 1 else tuple(rank.rank for rank in shown),
                last=sum(values) / len(values) if values else math.nan,
                num_ranks=num_ranks,
            )
        )
    return tuple(charts)


def read_others(ranks: Sequence[RankState], charts: Sequence[Chart]) -> tuple[tuple[str, float], ...]:
    """The newest values of the metrics that are not among `charts`; means of the ranks', unless they are of all."""
    drawn = {chart.name for chart in charts}
    values: dict[str, list[float]] = {}
    whole: dict[str, float] = {}
    for rank in ranks:
        for name, metric in rank.metrics.items():
            if name in drawn:
                continue
            values.setdefault(name, []).append(metric.values[name])
            if metric.reduced:
                whole.setdefault(name, metric.values[name])
    found = {name: whole.get(name, sum(of) / len(of)) for name, of in values.items()}
    return tuple(sorted(found.items(), key=lambda one: (not is_telling(one[0]), numbered(one[0]))))


def more_metrics(others: Sequence[tuple[str, float]]) -> str:
    """The metrics that are not drawn, in a line; empty without any."""
    told = [f"{name} {number(value)}" for name, value in others[:_MOST_TOLD]]
    rest = ", …" if len(others) > _MOST_TOLD else ""
    plural = "s" if len(others) > 1 else ""
    return f"{len(others)} more metric{plural}: {', '.join(told)}{rest}" if told else ""
