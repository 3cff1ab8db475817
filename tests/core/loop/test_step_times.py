"""Injected delays show up on the right rank under the right name."""

from __future__ import annotations

import statistics
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nbaccel.core import Accelerator

PAIRS = 24  # steps with the delays and without, taking turns: whatever else the machine does meets both
WARM = 4
# Ten times the 5, 3 and 4 ms that should be told apart: waking a sleeper takes a busy machine up to 2 ms.
DATA, FORWARD, COMMUNICATION = 0.05, 0.03, 0.04
PARTS = ("data", "forward", "communication")


class Delays:
    """Sleeps in every second step, and notes for how long it really was: on a busy machine longer than asked."""

    def __init__(self):
        self.step = 0
        self.slept = dict.fromkeys(PARTS, 0.0)

    def sleep(self, part, seconds):
        if self.step % 2:
            started = time.perf_counter()
            time.sleep(seconds)
            self.slept[part] += time.perf_counter() - started


delays = Delays()


class Slow(Dataset):
    def __init__(self, delay):
        self.delay = delay

    def __len__(self):
        return 2 * 2 * (PAIRS + WARM)  # on two ranks

    def __getitem__(self, index):
        if self.delay:
            delays.sleep("data", self.delay)
        return torch.ones(4)


class Model(nn.Module):
    def __init__(self, delay):
        super().__init__()
        self.layer, self.delay = nn.Linear(4, 1), delay

    def forward(self, x):
        if self.delay:
            delays.sleep("forward", self.delay)
        return self.layer(x)


def _late(state, bucket):
    """A network that takes longer, not a process that computes longer: a thread of its own waits."""
    future, work = torch.futures.Future(), dist.all_reduce(bucket.buffer(), async_op=True)

    def finish():
        work.wait()
        delays.sleep("communication", COMMUNICATION)
        future.set_result(bucket.buffer() / dist.get_world_size())

    threading.Thread(target=finish).start()
    return future


def _run(data, slow_rank, communication):
    """For each step what was measured, what was slept, and the step's wall time by a clock of our own."""
    acc = Accelerator(cpu=True, measure=True)
    model = Model(FORWARD if slow_rank in ("both", acc.process_index) else 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Slow(DATA if data else 0.0), batch_size=1)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    if communication:
        _late.__annotations__ = {}
        model.register_comm_hook(None, _late)
    rows, before, slept, clock = [], None, dict(delays.slept), time.perf_counter()
    for x in loader:
        acc.step(model(x).mean(), optimizer)
        times, now = acc.step_times(), time.perf_counter()
        if before is not None:
            measured = {name: times.parts[name] - before.parts[name] for name in times.parts}
            injected = {name: delays.slept[name] - slept[name] for name in PARTS}
            rows.append((measured, injected, times.wall - before.wall, now - clock))
        before, slept, clock = times, dict(delays.slept), now
        delays.step += 1
    total = acc.step_times()
    assert sum(total.parts.values()) == pytest.approx(total.wall, rel=0.05)
    return rows[WARM:]


def _difference(rows, value):
    """The median over the pairs of steps of what the one with the delays has more than the one after it."""
    pairs = zip(rows[0::2], rows[1::2], strict=False)
    return statistics.median(value(a) - value(b) for a, b in pairs)


def _check(seen, slow_rank):
    for rank, rows in enumerate(seen):
        injected = {part: _difference(rows, lambda row, part=part: row[1][part]) for part in PARTS}
        if slow_rank == 1 and rank == 0:
            # It waits for the slow rank inside its backward.
            injected["communication"] += _difference(seen[1], lambda row: row[1]["forward"])
        if injected["communication"]:
            # Who is woken by another process is late by what the machine is busy; this rank's clock tells.
            lost = _difference(rows, lambda row: row[3]) - injected["data"] - injected["forward"]
            assert 0.95 * injected["communication"] < lost < 1.5 * injected["communication"]
            injected["communication"] = lost
        for part in rows[0][0]:
            measured = _difference(rows, lambda row, part=part: row[0][part])
            # Without a delay a third of the least one: less is the machine's, not another part's time in this one.
            seconds = injected.get(part) or 0.0
            assert abs(measured - seconds) < (0.1 * seconds or FORWARD / 3), (rank, part, measured, seconds)
        wall = [row[2] for row in rows]
        parts = [sum(row[0].values()) for row in rows]
        assert statistics.median(parts) == pytest.approx(statistics.median(wall), rel=0.05)
        assert sum(wall) == pytest.approx(sum(row[3] for row in rows), rel=0.05)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("data", "slow_rank", "communication"),
    [(True, None, False), (False, "both", False), (False, None, True), (False, 1, False), (True, 1, True)],
    ids=["data", "forward", "communication", "slow rank", "all"],
)
def test_step_times_when_delays_are_injected(data, slow_rank, communication):
    # A busy machine may delay a whole run unevenly, hardly three; what is measured wrongly is so each time.
    for attempt in range(3):
        seen = run_ranks(_run, data, slow_rank, communication)
        try:
            _check(seen, slow_rank)
        except AssertionError:
            if attempt == 2:
                raise
        else:
            break


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Model(0.0)

    def forward(self, x, again=2):
        time.sleep(0.01)
        return self(x, again - 1) if again else self.inner(x)


def test_forward_when_models_nest_counts_once_and_needs_no_loader():
    acc = Accelerator(cpu=True, measure=True)
    outer = Nested()
    acc.prepare(outer.inner)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    outer, optimizer = acc.prepare(outer, optimizer)
    started = time.perf_counter()
    acc.step(outer(torch.ones(1, 4)).mean(), optimizer)
    elapsed = time.perf_counter() - started
    times = acc.step_times()
    assert 0.03 <= times.parts["forward"] <= times.wall <= elapsed
    assert sum(times.parts.values()) == pytest.approx(times.wall, rel=0.05)
