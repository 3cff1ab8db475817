"""Injected delays show up on the right rank under the right name."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nbaccel.core import Accelerator

STEPS = 25
DATA, FORWARD, COMMUNICATION = 0.005 * 4, 0.012, 0.016  # long enough to stand out on a busy machine


slept = {"data": 0.0, "forward": 0.0, "communication": 0.0}


def _sleep(name, seconds):
    """Sleeps, and notes for how long it really was: on a busy machine longer than asked."""
    started = time.perf_counter()
    time.sleep(seconds)
    slept[name] += time.perf_counter() - started


class Slow(Dataset):
    def __init__(self, delay):
        self.delay = delay

    def __len__(self):
        return 4 * STEPS * 2

    def __getitem__(self, index):
        _sleep("data", self.delay)
        return torch.ones(4)


class Model(nn.Module):
    def __init__(self, delay):
        super().__init__()
        self.layer, self.delay = nn.Linear(4, 1), delay

    def forward(self, x):
        _sleep("forward", self.delay)
        return self.layer(x)


def _late(state, bucket):
    """A network that takes longer, not a process that computes longer: a thread of its own waits."""
    future, work = torch.futures.Future(), dist.all_reduce(bucket.buffer(), async_op=True)

    def finish():
        work.wait()
        _sleep("communication", COMMUNICATION)
        future.set_result(bucket.buffer() / dist.get_world_size())

    threading.Thread(target=finish).start()
    return future


def _run(data, forward, communication):
    acc = Accelerator(cpu=True, measure=True)
    rank = acc.process_index
    model = Model(FORWARD if forward in ("both", rank) else 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Slow(DATA / 4 if data else 0.0), batch_size=4)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    if communication:
        _late.__annotations__ = {}
        model.register_comm_hook(None, _late)
    started = time.perf_counter()
    for x in loader:
        acc.step(model(x).mean(), optimizer)
    wall = time.perf_counter() - started
    times = acc.step_times()
    assert times.steps == STEPS
    assert sum(times.parts.values()) == pytest.approx(times.wall, rel=0.05)
    assert times.wall == pytest.approx(wall, rel=0.05)
    return times.per_step(), {name: seconds / STEPS for name, seconds in slept.items()}


@pytest.mark.parametrize(
    ("data", "forward", "communication"),
    [(True, None, False), (False, "both", False), (False, None, True), (False, 1, False), (True, 1, True)],
    ids=["data", "forward", "communication", "slow rank", "all"],
)
def test_step_times_when_delays_are_injected(data, forward, communication):
    plain = [times for times, _ in run_ranks(_run, False, None, False)]
    seen = run_ranks(_run, data, forward, communication)
    for rank, (times, injected) in enumerate(seen):
        if forward == 1 and rank == 0:
            # It waits for the slow rank inside its backward.
            injected["communication"] += seen[1][1]["forward"]
        for name, delay in injected.items():
            # Within 10 %, beside what the step takes by itself.
            margin = 0.1 * delay + 2 * plain[rank][name] + 0.002
            assert times[name] == pytest.approx(delay, abs=margin), (rank, name, times, injected, plain)
        for name in ("transfer", "backward", "optimizer", "checkpoint"):
            assert times[name] < 3 * plain[rank][name] + 0.005, (rank, name, times, plain)
