"""What a run's state says to a person: rows, figures and one plain sentence when something dominates."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from nbaccel.session.panel import loops
from nbaccel.session.panel.figures import count, number, speed
from nbaccel.session.panel.metrics import Chart, read_charts, read_others
from nbaccel.session.results import rank_ranges
from nbaccel.session.state import ENDED, Pace, RankState, RunState, Situation, same_failure
from nbaccel.wire.events import ExceptionInfo, Progress

__all__ = [
    "PARTS",
    "Heading",
    "Row",
    "View",
    "all_rows",
    "read",
    "scaling",
    "shown_state",
]

PARTS = ("data", "transfer", "forward", "backward", "communication", "optimizer", "checkpoint", "other")
"""Of a step's time, in the order they are shown."""

_DOMINATES = 0.4
_STRAGGLES = 1.3
_LATE = 5.0
# Before that many steps what they took says little.
_ENOUGH_STEPS = 5
_MOST_METRICS = 4
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
    """What the loop is called that moved last; empty before one did."""
    step: float
    total: float | None
    epoch: int | None
    outer: tuple[str, ...]
    """The loops that one stands in, outermost first, as `epochs 1/2`."""
    unit: str
    divisor: int | None
    """As in `Progress`."""
    rate: float | None
    """Steps per second."""
    left: float | None
    """Seconds to the end of the outermost loop, as far as that can be told."""
    metrics: tuple[tuple[str, float], ...]
    """Those logged, then what bars say beside them."""
    parts: tuple[tuple[str, float], ...]
    """Shares of the step's time, in `PARTS` order; they add up to 1."""
    memory: int | None
    """Bytes of host memory it holds."""
    device_memory: int | None
    utilization: int | None
    """Percent of the time its accelerator was busy."""
    note: str
    """What the loop says beside its bar and is no metric."""
    last_line: str
    age: float | None
    """Seconds since its last sign of life; None once it has ended."""

    @property
    def fraction(self) -> float | None:
        """How much of the loop is behind it, 0 to 1; None when its length is not known."""
        return None if not self.total else min(1.0, self.step / self.total)

    @property
    def steps(self) -> str:
        """How far it is."""
        return count(self.step, self.total, self.divisor)

    @property
    def speed(self) -> str:
        """How fast that is; empty where it is not known."""
        return speed(self.rate, self.unit, self.divisor)

    @property
    def words(self) -> str:
        """What it says beside its bar, and the line it printed last."""
        return " · ".join(filter(None, [self.note, self.last_line]))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is painted."""

    heading: Heading
    situation: Situation
    halted: int | None
    """Of a stopped run the optimizer step after which all ranks left their loops, where they did."""
    num_ranks: int
    elapsed: float
    at: float | None
    """When it was so, in seconds since the epoch; None once the run has ended."""
    left: float | None
    """Seconds until the last rank is at the end of its loops."""
    rate: float | None
    """Steps per second of the slowest rank: the others wait for it."""
    efficiency: float | None
    """What `rate` is of the ideal one; None when the same code has not run on one rank."""
    unit: str
    divisor: int | None
    """As in `Progress`."""
    sentences: tuple[str, ...]
    rows: tuple[Row, ...]
    """Every rank up to 16; above that the outliers."""
    strip: tuple[tuple[int, str, float], ...]
    """Above 16 ranks: each rank, its state, and the fastest's own time for a step over its own, 0 to 1."""
    states: Mapping[str, tuple[int, ...]]
    """The ranks by state."""
    charts: tuple[Chart, ...]
    others: tuple[tuple[str, float], ...]
    """The newest values of the metrics that are not drawn; means of the ranks', unless they are of all together."""

    @property
    def speed(self) -> str:
        """How fast that is; empty where it is not known."""
        return speed(self.rate, self.unit, self.divisor)

    @property
    def ending(self) -> str:
        """The situation, and where it was stopped."""
        return self.situation if self.halted is None else f"{self.situation} after step {self.halted}"

    @property
    def as_of(self) -> str:
        """When it was so, on the wall clock, for a copy that is painted no longer; empty once it has ended."""
        return "" if self.at is None else time.strftime("as of %H:%M:%S", time.localtime(self.at))


def read(state: RunState, heading: Heading, now: float) -> View:
    """The view of a run at `now`, in seconds since the epoch."""
    if state.ended is not None:
        now = state.ended
    ranks = state.ranks
    shown = [loops.current(rank) for rank in ranks]
    paces = [loops.pace(rank, loop) for rank, loop in zip(ranks, shown, strict=True)]
    rates = [rate for rate in paces if rate is not None]
    timed = {rank.rank: pace for rank in ranks if (pace := loops.timed(rank)) is not None}
    own = {rank: _own_seconds(pace) for rank, pace in timed.items()}
    # of loops that do not say where their time goes, what a step takes
    own = own or {rank.rank: 1 / rate for rank, rate in zip(ranks, paces, strict=True) if rate}
    states: dict[str, list[int]] = {}
    for rank in ranks:
        states.setdefault(shown_state(rank, state), []).append(rank.rank)
    chosen = ranks if len(ranks) <= _MOST_ROWS else _outliers(state, own, states)
    rows = tuple(_row(rank, state, now) for rank in chosen)
    charts = read_charts(ranks)
    lefts = [row.left for row in rows if row.left is not None and row.state not in ENDED]
    precision = state.options.get("mixed_precision") or heading.precision
    return View(
        heading=replace(heading, precision=precision),
        situation=state.situation,
        halted=state.halted if state.situation == "stopped" else None,
        num_ranks=len(ranks),
        elapsed=max(0.0, now - state.started),
        at=now if state.ended is None else None,
        left=max(lefts, default=None) if state.ended is None else None,
        rate=min(rates, default=None),
        efficiency=_efficiency(heading, shown, rates),
        unit=rows[0].unit if rows else "it",
        divisor=rows[0].divisor if rows else None,
        sentences=() if state.failure or state.problem else tuple(_sentences(state, timed, now)),
        rows=rows,
        strip=_strip(states, own, len(ranks)) if len(ranks) > _MOST_ROWS else (),
        states={name: tuple(of) for name, of in states.items()},
        charts=charts,
        others=read_others(ranks, charts),
    )


def all_rows(state: RunState, now: float) -> tuple[Row, ...]:
    """A row for every rank, however many there are."""
    at = now if state.ended is None else state.ended
    return tuple(_row(rank, state, at) for rank in state.ranks)


def _efficiency(heading: Heading, shown: Sequence[Progress | None], rates: Sequence[float]) -> float | None:
    names = {loop.name for loop in shown if loop is not None}
    ideal = heading.ideal.get(next(iter(names)), 0.0) if len(names) == 1 else 0.0
    return min(rates) / ideal if rates and ideal > 0 else None


def scaling(view: View) -> str:
    """How well it scales, in few words; empty when that is not known."""
    if view.efficiency is None:
        return ""
    return f"scaling {view.efficiency:.0%}, {number(view.efficiency * view.num_ranks, 2)}× one rank"


def _row(rank: RankState, state: RunState, now: float) -> Row:
    shown, ended = shown_state(rank, state), state.ended is not None
    progress = loops.current(rank)
    around = loops.outer(rank, progress)
    values, note = loops.postfix(rank, progress)
    lines, vitals = rank.last_lines(1), rank.vitals
    return Row(
        rank=rank.rank,
        state=shown,
        detail=_detail(rank, shown, progress),
        loop=loops.title(progress) if progress else "",
        step=progress.step if progress else 0,
        total=progress.total if progress else None,
        epoch=progress.epoch if progress else None,
        outer=tuple(f"{loops.title(loop)} {count(loop.step, loop.total, loop.divisor)}" for loop in around),
        unit=progress.unit if progress else "it",
        divisor=progress.divisor if progress else None,
        rate=loops.pace(rank, progress),
        left=None if rank.state in ENDED else loops.seconds_left(rank, progress, around),
        metrics=_latest(rank, values),
        parts=_shares(loops.timed(rank)),
        memory=vitals.memory if vitals else None,
        device_memory=vitals.device_memory if vitals else None,
        utilization=vitals.utilization if vitals else None,
        note=note,
        last_line=lines[-1] if lines else "",
        age=None if ended or rank.seen is None or rank.state in ENDED else max(0.0, now - rank.seen),
    )


def _detail(rank: RankState, shown: str, progress: Progress | None) -> str:
    if shown == "compiling" and progress is not None:
        return f"step {max(progress.step, 1)} …"
    return "" if shown == "stopped" else rank.detail


def _latest(rank: RankState, beside: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    logged = {name: curve.last[1] for name, curve in rank.curves.items() if curve.last is not None}
    logged |= {name: value for name, value in beside.items() if name not in logged}
    return tuple(logged.items())[:_MOST_METRICS]


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
    if state.halted is not None and rank.state == "done" and state.situation != "failed":
        return "stopped"
    if first is None or first.rank == rank.rank or rank.state not in ("failed", "lost"):
        return rank.state
    if rank.state == "lost":
        return "stopped" if rank.exitcode in (-2, -9, -15) else "lost"
    # another error is what the first failure did to its peers
    alike = same_failure(rank, state.ranks[first.rank]) or _headline(first.info) == _headline(rank.error)
    return "failed" if alike else "stopped"


def _headline(error: ExceptionInfo | None) -> str:
    """An error's beginning, by which faults are told apart: addresses and ports come later."""
    return "" if error is None else error.message[:60]


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
    known = [loop for rank in ranks for loop in rank.progress.values() if loop.times is not None]
    workers = {loop.workers for loop in known if loop.workers is not None}
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
