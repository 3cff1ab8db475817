"""What is measured of ranks while they work: folded, shown, kept."""

from __future__ import annotations

import time
from pathlib import Path

from nbaccel import launch
from nbaccel.session.panel import html
from nbaccel.session.panel.text import paint_text
from nbaccel.session.reopen import runs
from nbaccel.session.state import RankState, fold
from nbaccel.wire.events import Heartbeat, Returned
from tests.conftest import wait_until
from tests.session.panel.streams import measured, replay, returned, started, training, view


def test_rank_waits_and_goes_on_as_it_is_measured() -> None:
    state = replay(2, iter([*started(2), *measured(2, waiting=(0,), time=5.0)]))
    assert [(rank.state, rank.detail, rank.since) for rank in state.ranks] == [
        ("waiting", "all_reduce", 5.0),
        ("running", "", 0.2),
    ]
    state = fold(state, Heartbeat(rank=0, time=9.0))
    assert (state.ranks[0].state, state.ranks[0].detail) == ("running", "")
    assert state.ranks[0].seen == 9.0


def test_measurement_does_not_wake_a_rank_that_is_done() -> None:
    state = replay(1, iter([*started(1), Returned(rank=0, time=3.0, call=0)]))
    assert fold(state, Heartbeat(rank=0, time=4.0, doing="waiting")).ranks[0].state == "done"


def test_memory_and_accelerator_are_shown_in_every_form() -> None:
    seen = view(2, iter([*training(2), *measured(2)]))
    assert (seen.rows[1].memory, seen.rows[1].device_memory, seen.rows[1].utilization) == (
        312_000_001,
        1_400_000_000,
        91,
    )
    page = html.panel(seen)
    assert "312 MB" in page
    for words in (">GPU<", ">1.4 GB<", ">91 %<"):
        assert words in page
    assert "310 MB GPU 1.4 GB 91 %" in paint_text(seen)
    ended = view(2, iter([*training(2), *measured(2), *returned(2)]))
    assert "312 MB" in html.panel(ended)


def test_measured_wait_names_the_late_rank() -> None:
    events = [*training(3), *measured(3, time=50.0, waiting=(0, 1))]
    assert view(3, iter(events), now=56.5).sentences[0] == "rank 2 is late by 6 s"


def late(seconds: float) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    held = torch.ones(25_000_000 * (1 + dist.get_rank()))
    if dist.get_rank():
        time.sleep(seconds)
    dist.all_reduce(held[:1])


def test_waiting_rank_and_its_memory_are_seen_while_it_is_blocked(clean: None, tmp_path: Path) -> None:
    run = launch(late, 4.5, num_processes=2, folder=tmp_path, dashboard=False)

    def waits() -> RankState | None:
        rank = run.state.ranks[0]
        return rank if rank.state == "waiting" else None

    rank = wait_until(waits, 90, "the rank that waits")
    assert rank.detail in ("all_reduce", "allreduce")
    first, second = (known.vitals for known in run.state.ranks)
    assert first.memory > 90e6
    assert 60e6 < second.memory - first.memory < 200e6
    run.result()
    again = runs(tmp_path)[0].report().values["ranks"]
    assert all(known["memory"] > 50e6 for known in again)
