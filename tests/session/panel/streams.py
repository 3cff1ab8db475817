"""Recorded event streams of runs worth looking at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

from nbaccel.session.panel.reading import Heading, View, read
from nbaccel.session.state import RunState, fold, new_state
from nbaccel.wire.events import (
    Applied,
    Died,
    Event,
    ExceptionInfo,
    Frame,
    Heartbeat,
    Metric,
    Output,
    Progress,
    Raised,
    Returned,
    Status,
)

HEADING = Heading(name="train", device="cpu", precision="bf16", folder="/home/ada/runs/1")
ERROR = ExceptionInfo(
    "ValueError",
    "ValueError: shapes (3,) and (4,) do not match",
    (Frame("train.py", 12, "train", "loss = model(batch).sum()"),),
)


def replay(num_ranks: int, events: Iterator[Event]) -> RunState:
    return reduce(fold, events, new_state(num_ranks, started=0.0))


def started(num_ranks: int) -> Iterator[Event]:
    for rank in range(num_ranks):
        yield Status(rank=rank, time=0.1, state="idle", pid=100 + rank)
        yield Status(rank=rank, time=0.2, state="running")


def measured(num_ranks: int, *, time: float = 49.0, waiting: tuple[int, ...] = ()) -> Iterator[Event]:
    """What the ranks hold; these wait for the others."""
    for rank in range(num_ranks):
        doing, detail = ("waiting", "all_reduce") if rank in waiting else ("", "")
        yield Heartbeat(
            rank=rank,
            time=time,
            memory=312_000_000 + rank,
            device_memory=1_400_000_000,
            utilization=90 + rank,
            doing=doing,
            detail=detail,
        )


def training(
    num_ranks: int,
    *,
    until: int = 240,
    slow: int | None = None,
    data: float = 0.02,
    reduced: bool = False,
    workers: int | None = 0,
) -> Iterator[Event]:
    """`until` of 400 steps, five steps a second; rank `slow` takes twice as long for its own part."""
    yield from started(num_ranks)
    yield Applied(rank=0, time=0.3, option="mixed_precision", value="bf16")
    for step in range(5, until + 1, 5):
        now = step * 0.2
        for rank in range(num_ranks):
            own = 0.16 if rank == slow else 0.08
            waits = 0.0 if slow is None or rank == slow else 0.08
            times = {"data": data, "forward": own * 0.3, "backward": own * 0.6, "optimizer": own * 0.1}
            times["communication"] = 0.01 + waits
            spent = {name: 5 * seconds for name, seconds in times.items()}
            yield Progress(
                rank=rank,
                time=now,
                name="train",
                step=step,
                total=400,
                epoch=1,
                unit="batch",
                times=spent,
                workers=workers,
            )
            if rank == 0 or not reduced:
                loss = 2.3 * math.exp(-step / 120) + 0.05 * math.sin(step + rank)
                values = {"loss": loss, "accuracy": 1 - loss / 2.4}
                yield Metric(
                    rank=rank, time=now, values=values, step=step, reduced="mean" if reduced else None
                )
            yield Output(
                rank=rank,
                time=now,
                stream="stdout",
                data=f"step {step} loss {2.3 - step / 200:.3f}\n".encode(),
            )


def nested(*, note: str = "loss=0.5, warming up") -> Iterator[Event]:
    """Bars in bars: 5 of 10 batches, two a second, of the first of 3 epochs."""
    yield from started(1)
    yield Progress(rank=0, time=1.0, name="epochs", step=0, total=3, depth=0)
    for step in range(6):
        yield Progress(
            rank=0, time=1 + step / 2, name="batches", step=step, total=10, depth=1, note=note if step else ""
        )
    yield Output(rank=0, time=3.5, stream="stdout", data=b"at it\n")


def returned(num_ranks: int, time: float = 81.0) -> Iterator[Event]:
    for rank in range(num_ranks):
        yield Returned(rank=rank, time=time, call=0)
        yield Died(rank=rank, time=time + 0.1, exitcode=0)


def failing(num_ranks: int, *, rank: int, time: float = 49.0) -> Iterator[Event]:
    yield from training(num_ranks)
    yield Raised(rank=rank, time=time, call=0, info=ERROR)
    for other in range(num_ranks):
        if other != rank:
            yield Died(rank=other, time=time + 1, exitcode=-15, detail="ended by SIGTERM")
    yield Died(rank=rank, time=time + 1, exitcode=1)


def view(num_ranks: int, events: Iterator[Event], now: float = 49.0) -> View:
    return read(replay(num_ranks, events), HEADING, now)
