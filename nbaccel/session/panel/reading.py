"""What a run's state says to a person: rows, figures and one plain sentence when something dominates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from nbaccel.session.curves import Curve
from nbaccel.session.results import rank_ranges
from nbaccel.session.state import ENDED, Pace, RankState, RunState, Situation
from nbaccel.wire.events import ExceptionInfo, Progress

__all__ = [
    "PARTS",
    "Chart",
    "Heading",
    "Row",
    "View",
    "all_rows",
    "clock",
    "number",
    "read",
    "read_charts",
    "scaling",
    "shown_state",
    "size",
]

PARTS = ("data", "transfer", "forward", "backward", "communication", "optimizer", "checkpoint", "other")
"""Of a step's time, in the order they are shown."""

_DOMINATES = 0.4
_STRAGGLES = 1.3
_LATE = 5.0
_LATELY = 3.0
# Before that many steps what they took says little.
_ENOUGH_STEPS = 5
_MOST_CHARTS = 6
_MOST_METRICS = 4
_MOST_CURVES = 8
_MOST_ROWS = 16
_OUTLIERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What does not change while a run goes on."""

    name: str
    device: str = "cpu"
    precision: str | None = None
    folder: str | None = None
    attempt: str = ""
    """Which one it is of a run that was started again after a failure."""
    ideal: Mapping[str, float] = field(default_factory=dict)
    """By loop, the steps per second of each rank if nothing were lost by having several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rank."""

    rank: int
    state: str
    detail: str
    loop: str
    """Name of the loop that moved last; empty before one did."""
    step: int
    total: int | None
    epoch: int | None
    unit: str
    rate: float | None
    """Steps per second."""
    left: float | None
    """Seconds to the end of the loop at this rate."""
    metrics: tuple[tuple[str, float], ...]
    parts: tuple[tuple[str, float], ...]
    """Shares of the step's time, in `PARTS` order; they add up to 1."""
    memory: int | None
    """Bytes of host memory it holds."""
    device_memory: int | None
    utilization: int | None
    """Percent of the time its accelerator was busy."""
    last_line: str
    age: float | None
    """Seconds since its last sign of life; None once it has ended."""

    @property
    def fraction(self) -> float | None:
        """How much of the loop is behind it, 0 to 1; None when its length is not known."""
        return None if not self.total else min(1.0, self.step / self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The history of one metric: a line, or the band in which several ranks' lines lie."""

    name: str
    curves: tuple[Curve, ...]
    ranks: tuple[int, ...]
    """Whose they are, of many ranks a sample; empty when the value is one of all ranks together."""

    @property
    def last(self) -> float:
        """The newest value, the mean of the ranks'."""
        values = [curve.last[1] for curve in self.curves if curve.last is not None]
        return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is painted."""

    heading: Heading
    situation: Situation
    num_ranks: int
    elapsed: float
    left: float | None
    rate: float | None
    """Steps per second of the slowest rank: the others wait for it."""
    efficiency: float | None
    """What `rate` is of the ideal one; None when the same code has not run on one rank."""
    unit: str
    sentences: tuple[str, ...]
    rows: tuple[Row, ...]
    """Every rank up to 16; above that the outliers."""
    strip: tuple[tuple[int, str, float], ...]
    """Above 16 ranks: each rank, its state, and the fastest's own time for a step over its own, 0 to 1."""
    states: Mapping[str, tuple[int, ...]]
    """The ranks by state."""
    charts: tuple[Chart, ...]


def read(state: RunState, heading: Heading, now: float) -> View:
    """The view of a run at `now`, in seconds since the epoch."""
    if state.ended is not None:
        now = state.ended
    ranks = state.ranks
    loops = [_current(rank) for rank in ranks]
    rates = [rate for rank, loop in zip(ranks, loops, strict=True) if (rate := _rate(rank, loop)) is not None]
    timed = {rank.rank: pace for rank in ranks if (pace := _timed(rank)) is not None}
    own = {rank: _own_seconds(pace) for rank, pace in timed.items()}
    states: dict[str, list[int]] = {}
    for rank in ranks:
        states.setdefault(shown_state(rank, state), []).append(rank.rank)
    chosen = ranks if len(ranks) <= _MOST_ROWS else _outliers(state, own, states)
    rows = tuple(_row(rank, state, now) for rank in chosen)
    lefts = [row.left for row in rows if row.left is not None and row.state not in ENDED]
    precision = state.options.get("mixed_precision") or heading.precision
    return View(
        heading=replace(heading, precision=precision),
        situation=state.situation,
        num_ranks=len(ranks),
        elapsed=max(0.0, now - state.started),
        left=max(lefts, default=None) if state.ended is None else None,
        rate=min(rates, default=None),
        efficiency=_efficiency(heading, loops, rates),
        unit=rows[0].unit if rows else "it",
        sentences=() if state.failure or state.problem else tuple(_sentences(state, timed, now)),
        rows=rows,
        strip=_strip(states, own, len(ranks)) if len(ranks) > _MOST_ROWS else (),
        states={name: tuple(of) for name, of in states.items()},
        charts=read_charts(ranks),
    )


def all_rows(state: RunState, now: float) -> tuple[Row, ...]:
    """A row for every rank, however many there are."""
    at = now if state.ended is None else state.ended
    return tuple(_row(rank, state, at) for rank in state.ranks)


def _efficiency(heading: Heading, loops: Sequence[Progress | None], rates: Sequence[float]) -> float | None:
    names = {loop.name for loop in loops if loop is not None}
    ideal = heading.ideal.get(next(iter(names)), 0.0) if len(names) == 1 else 0.0
    return min(rates) / ideal if rates and ideal > 0 else None


def scaling(view: View) -> str:
    """How well it scales, in few words; empty when that is not known."""
    if view.efficiency is None:
        return ""
    return f"scaling {view.efficiency:.0%}, {number(view.efficiency * view.num_ranks, 2)}× one rank"


def _rate(rank: RankState, loop: Progress | None) -> float | None:
    pace = rank.paces.get(loop.name) if loop is not None else None
    return None if pace is None else pace.rate


def _timed(rank: RankState) -> Pace | None:
    """The pace of the loop that says where its time goes, the one that moved last; None without one."""
    return next((pace for pace in list(rank.paces.values())[::-1] if pace.parts and pace.rate), None)


def _row(rank: RankState, state: RunState, now: float) -> Row:
    shown, ended = shown_state(rank, state), state.ended is not None
    progress = _current(rank)
    rate = _rate(rank, progress)
    left = None
    if progress is not None and progress.total and rate:
        left = max(0.0, (progress.total - progress.step) / rate)
    lines, vitals = rank.last_lines(1), rank.vitals
    return Row(
        rank=rank.rank,
        state=shown,
        detail=_detail(rank, shown, progress),
        loop=progress.name if progress else "",
        step=progress.step if progress else 0,
        total=progress.total if progress else None,
        epoch=progress.epoch if progress else None,
        unit=progress.unit if progress else "it",
        rate=rate,
        left=None if rank.state in ENDED else left,
        metrics=_latest(rank),
        parts=_shares(_timed(rank)),
        memory=vitals.memory if vitals else None,
        device_memory=vitals.device_memory if vitals else None,
        utilization=vitals.utilization if vitals else None,
        last_line=lines[-1] if lines else "",
        age=None if ended or rank.seen is None or rank.state in ENDED else max(0.0, now - rank.seen),
    )


def _detail(rank: RankState, shown: str, progress: Progress | None) -> str:
    if shown == "compiling" and progress is not None:
        return f"step {max(progress.step, 1)} …"
    return "" if shown == "stopped" else rank.detail


def _current(rank: RankState) -> Progress | None:
    """The loop to show. Of those that go on and have moved lately: one that says where its time goes, else
    the fastest, which is the innermost; by name, so that the choice stays. When all are at their end, the last one
    that says where its time went, else the one that moved last."""
    moved = list(rank.progress.values())[::-1]
    if not moved:
        return None
    lately = [progress for progress in moved if moved[0].time - progress.time < _LATELY]
    going = [progress for progress in lately if progress.total is None or progress.step < progress.total]

    def is_timed(progress: Progress) -> bool:
        pace = rank.paces.get(progress.name)
        return bool(pace and pace.parts)

    def worth(progress: Progress) -> tuple[bool, float, str]:
        pace = rank.paces.get(progress.name)
        return is_timed(progress), round((pace and pace.rate) or 0.0, 1), progress.name

    if going:
        return max(going, key=worth)
    return next(filter(is_timed, lately), moved[0])


def _latest(rank: RankState) -> tuple[tuple[str, float], ...]:
    found = [(name, curve.last[1]) for name, curve in rank.curves.items() if curve.last is not None]
    return tuple(found[:_MOST_METRICS])


def _shares(pace: Pace | None) -> tuple[tuple[str, float], ...]:
    if pace is None or not pace.parts or pace.seconds <= 0:
        return ()
    spent = {name: pace.parts.get(name, 0.0) for name in PARTS}
    spent["other"] = max(0.0, pace.seconds - sum(pace.parts.values())) + sum(
        seconds for name, seconds in pace.parts.items() if name not in PARTS
    )
    whole = sum(spent.values())
    return tuple((name, seconds / whole) for name, seconds in spent.items() if seconds > 0.005 * whole)


def _outliers(
    state: RunState, own: Mapping[int, float], states: Mapping[str, Sequence[int]]
) -> Sequence[RankState]:
    """Of many ranks those worth a row: failed ones, those in a rare state, slow ones; else the first."""
    usual = median(own.values()) if own else 0.0
    rare = {rank for of in states.values() if len(of) <= len(state.ranks) / 4 for rank in of}

    def worth(rank: RankState) -> tuple[bool, bool, bool, float, int]:
        cause = state.failure is not None and state.failure.rank == rank.rank
        bad = rank.state in ("failed", "lost")
        return not cause, not bad, rank.rank not in rare, -own.get(rank.rank, 0.0), rank.rank

    odd = [rank for rank in state.ranks if rank.rank in rare or own.get(rank.rank, 0) > _STRAGGLES * usual]
    chosen = sorted(odd, key=worth)[:_OUTLIERS] or state.ranks[:1]
    return sorted(chosen, key=lambda rank: rank.rank)


def _strip(
    states: Mapping[str, Sequence[int]], own: Mapping[int, float], num_ranks: int
) -> tuple[tuple[int, str, float], ...]:
    of = {rank: name for name, ranks in states.items() for rank in ranks}
    fastest = min(own.values(), default=0.0)
    return tuple((rank, of[rank], fastest / own[rank] if own.get(rank) else 1.0) for rank in range(num_ranks))


def shown_state(rank: RankState, state: RunState) -> str:
    """The rank's state, but for one that was ended because another had failed, or on request."""
    first = state.failure
    if rank.error is not None and rank.error.type_name == "KeyboardInterrupt":
        return "stopped"
    if first is not None and first.asked and rank.state == "lost":
        return "stopped"
    if state.ended is not None and rank.state not in (*ENDED, "idle"):
        return "stopped"
    if first is None or first.rank == rank.rank or rank.state not in ("failed", "lost"):
        return rank.state
    if rank.state == "lost":
        return "stopped" if rank.exitcode in (-2, -9, -15) else "lost"
    # the same error is the same fault; another one is what the first failure did to its peers
    return "failed" if _headline(first.info) == _headline(rank.error) else "stopped"


def _headline(error: ExceptionInfo | None) -> str:
    """An error's beginning, by which faults are told apart: addresses and ports come later."""
    return "" if error is None else error.message[:60]


def read_charts(ranks: Sequence[RankState], most: int = _MOST_CHARTS) -> tuple[Chart, ...]:
    """The histories of the metrics that were logged first, at most so many."""
    names: dict[str, list[RankState]] = {}
    for rank in ranks:
        for name in rank.curves:
            names.setdefault(name, []).append(rank)
    charts = []
    for name, holders in list(names.items())[:most]:
        whole = [rank for rank in holders if (metric := rank.metrics.get(name)) and metric.reduced]
        shown = whole[:1] or holders
        if len(shown) > _MOST_CURVES:
            shown = [shown[at * (len(shown) - 1) // (_MOST_CURVES - 1)] for at in range(_MOST_CURVES)]
        charts.append(
            Chart(
                name=name,
                curves=tuple(rank.curves[name] for rank in shown),
                ranks=() if whole or len(ranks) == 1 else tuple(rank.rank for rank in shown),
            )
        )
    return tuple(charts)


# ── what dominates ────────────────────────────────────────────────────────────────────────────────────


# Seconds: a warm server has forked the ranks long before.
_COLD = 1.0


def _sentences(state: RunState, timed: Mapping[int, Pace], now: float) -> Iterable[str]:
    if state.ended is None:
        yield from state.stall.splitlines()[:2] or _late(state.ranks, now)
        nobody = all(known.state == "starting" and known.pid is None for known in state.ranks)
        if nobody and now - state.started > _COLD:
            yield "the process that ranks come from imports torch: once, later launches take a moment"
    if not timed or min(pace.step for pace in timed.values()) < _ENOUGH_STEPS:
        return
    straggler = _straggler(timed)
    if straggler:
        yield straggler
        return
    shares: dict[str, float] = {}
    for pace in timed.values():
        for name, share in _shares(pace):
            shares[name] = shares.get(name, 0.0) + share / len(timed)
    part = max(shares, key=lambda name: shares[name])
    if shares[part] >= _DOMINATES and part in _ADVICE:
        advice = _ADVICE[part] + (_why_data(state.ranks) if part == "data" else "")
        yield f"{shares[part]:.0%} of each step {advice}".replace("%", " %", 1)


def _why_data(ranks: Iterable[RankState]) -> str:
    """Why the loop waits for data, as far as its loader says it."""
    loops = [loop for rank in ranks for loop in rank.progress.values() if loop.times is not None]
    workers = {loop.workers for loop in loops if loop.workers is not None}
    if workers == {0}:
        return "num_workers is 0"
    if len(workers) == 1:
        (count,) = workers
        return f"its {count} worker{'s are' if count > 1 else ' is'} slower than the model (num_workers)"
    return "the loader is slower than the model (num_workers)"


_ADVICE = {
    "data": "waits for data: ",
    "transfer": "copies batches to the device: pin_memory=True lets it overlap",
    "communication": "is communication between the ranks: larger batches or accumulation make it rarer",
    "checkpoint": "goes into checkpoints: save less often, or in the background",
    "other": "goes outside the training step: logging, evaluation or code between the steps",
}


def _straggler(timed: Mapping[int, Pace]) -> str | None:
    """A rank whose own work takes clearly longer than the others': they wait for it in communication."""
    if len(timed) < 2:
        return None
    own = {rank: _own_seconds(pace) for rank, pace in timed.items()}
    slowest = max(own, key=lambda rank: own[rank])
    usual = median(seconds for rank, seconds in own.items() if rank != slowest)
    if usual <= 0 or own[slowest] < _STRAGGLES * usual:
        return None
    shares = [(share, name) for name, share in _shares(timed[slowest]) if name != "communication"]
    where = f", mostly in {max(shares)[1]}" if shares and max(shares)[1] != "other" else ""
    return f"rank {slowest} is {own[slowest] / usual:.1f}× slower than the others and holds them up{where}"


def _own_seconds(pace: Pace) -> float:
    """Seconds of a step that are not spent waiting for the other ranks."""
    return max(0.0, pace.seconds - pace.parts.get("communication", 0.0)) / max(pace.steps, 1e-9)


def _late(ranks: Sequence[RankState], now: float) -> Iterable[str]:
    """Who keeps the others waiting, once it has taken long."""
    waiting = [rank for rank in ranks if rank.state == "waiting" and rank.since is not None]
    absent = [rank for rank in ranks if rank.state in ("running", "compiling")]
    if not waiting or not absent:
        return
    seconds = now - min(rank.since for rank in waiting if rank.since is not None)
    if seconds < _LATE:
        return
    who = f"rank{'s' if len(absent) > 1 else ''} {rank_ranges([rank.rank for rank in absent])}"
    where = next((f", {rank.detail}" for rank in absent if rank.detail), "")
    yield f"{who} {'are' if len(absent) > 1 else 'is'} late by {seconds:.0f} s{where}"


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────


def clock(seconds: float) -> str:
    """`4.2 s`, `1:05`, `2:03:04`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def number(value: float, digits: int = 4) -> str:
    """A value in few characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{digits}g}"


def size(count: int) -> str:
    """Bytes as `312 MB`, `1.4 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
