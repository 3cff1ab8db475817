"""Stop and save requests reach ranks at different moments and are acted upon at the same step."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core import Accelerator
from nbaccel.core.control import Control
from nbaccel.core.knobs import Knobs
from nbaccel.core.world import single
from nbaccel.wire import events


class Inbox:
    """The rank's port, with requests put in by the test."""

    def __init__(self):
        self.emitted = []
        self.waiting = []
        self.lock = threading.Lock()

    def emit(self, event):
        self.emitted.append(event)

    def put(self, kind):
        with self.lock:
            self.waiting.append(events.Request(kind=kind))

    def requests(self):
        if not self.waiting:
            return []
        with self.lock:
            taken, self.waiting = self.waiting, []
        return taken


@pytest.fixture
def inbox():
    port = Inbox()
    events.connect(port)
    yield port
    events.connect(None)


def test_control_when_alone_acts_at_once(inbox):
    control = Control(single(), Knobs(single()))
    control.tick(1)
    assert not control.stopping
    inbox.put("save")
    inbox.put("stop")
    control.tick(2)
    assert control.stopping
    assert control.saving


def test_control_when_saving_every_so_many_steps():
    control = Control(single(), Knobs(single()), save_every=3)
    asked = []
    for step in range(1, 8):
        control.tick(step)
        if control.saving:
            asked.append(step)
            control.saved()
    assert asked == [3, 6]


def test_control_when_the_time_is_up():
    control = Control(single(), Knobs(single()), stop_after=0.02, save_every=0.01)
    control.tick(1)
    assert (control.stopping, control.saving) == (False, False)
    time.sleep(0.03)
    control.tick(2)
    assert (control.stopping, control.saving) == (True, True)


def _tiny():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def _stops(rounds, folder, by_loader):
    import torch.distributed as dist

    port = Inbox()
    events.connect(port)
    rng = random.Random(torch.initial_seed() ^ hash(by_loader))
    data = TensorDataset(torch.ones(64, 2))
    ended = []
    for number in range(rounds):
        acc = Accelerator(cpu=True)
        model, optimizer = acc.prepare(*_tiny())
        loader = acc.prepare(DataLoader(data, batch_size=4))
        delay = random.Random(number * 17 + acc.process_index).uniform(0, 0.1)
        timer = threading.Timer(delay, port.put, ["stop"])
        timer.start()
        while not acc.should_stop:
            for (x,) in loader:
                acc.step(model(x).mean(), optimizer)
                if rng.random() < 0.02:
                    time.sleep(0.002)
                if not by_loader and acc.should_stop:
                    break
        steps = acc.gather_object(acc.steps)
        assert len(set(steps)) == 1, f"round {number}: ranks stopped at {steps}"
        ended.append(acc.steps)
        if number % 10 == 0:
            path = acc.save_state(Path(folder) / f"{by_loader}-{number}")
            assert json.loads((Path(path) / "manifest.json").read_text())
        acc.end_training()
        timer.join()
        dist.barrier()
        port.waiting.clear()
        dist.barrier()
    return ended


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("by_loader", [True, False])
def test_stop_when_asked_at_random_moments_200_times(tmp_path, by_loader):
    values = run_ranks(_stops, 100, str(tmp_path), by_loader, num_processes=4, deadline=500)
    assert values[0] == values[1] == values[2] == values[3]
    assert min(values[0]) >= 1
    assert len(set(values[0])) > 1, "the stops came at different steps"


def test_stop_when_asked_a_few_times(tmp_path):
    values = run_ranks(_stops, 6, str(tmp_path), True, num_processes=2)
    assert values[0] == values[1]


def _save_once(folder):
    port = Inbox()
    events.connect(port)
    acc = Accelerator(cpu=True, project_dir=folder)
    model, optimizer = acc.prepare(*_tiny())
    loader = acc.prepare(DataLoader(TensorDataset(torch.ones(4000, 2)), batch_size=2))
    timer = threading.Timer(0.05 + 0.1 * acc.process_index, port.put, ["save"])
    timer.start()
    for (x,) in loader:
        acc.step(model(x).mean(), optimizer)
        time.sleep(0.0005)
    timer.join()
    folders = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    acc.end_training()
    return folders, acc.save_requested


def test_save_when_asked_once_is_made_once_though_ranks_hear_at_different_times(tmp_path):
    (folders, pending), other = run_ranks(_save_once, str(tmp_path))
    assert (folders, pending) == other
    assert len(folders) == 1
    assert not pending


def _limited(folder, options, epochs):
    acc = Accelerator(cpu=True, project_dir=folder, resume="auto", seed=3, **options)
    model, optimizer = _tiny()
    data = TensorDataset(torch.arange(40.0).reshape(20, 2) / 40)
    loader = DataLoader(data, batch_size=2, shuffle=True)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    passes = []
    for _ in range(epochs):
        passes.append(0)
        for (x,) in loader:
            loss = model(x).square().mean() + model(torch.rand(1, 2)).mean()  # draws random numbers too
            acc.step(loss, optimizer)
            passes[-1] += 1
            if options.get("stop_after"):
                time.sleep(0.02)
    if not acc.stopped_early:
        acc.save_state()
    weights = model.state_dict()
    acc.end_training()
    return acc.stopped_early, acc.steps, passes, {k.removeprefix("module."): v for k, v in weights.items()}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resume_when_the_time_was_up_goes_on_where_it_stopped(tmp_path, num_processes):
    whole = run_ranks(_limited, str(tmp_path / "whole"), {}, 3, num_processes=num_processes)[0]
    per_epoch = 20 // (2 * num_processes)
    assert whole[:3] == (False, 3 * per_epoch, [per_epoch] * 3)
    limit = {"stop_after": "0.15s", "save_every": 1000}
    stopped = run_ranks(_limited, str(tmp_path / "cut"), limit, 3, num_processes=num_processes)[0]
    assert stopped[0]
    assert 0 < stopped[1] < 3 * per_epoch
    resumed = run_ranks(_limited, str(tmp_path / "cut"), {}, 3, num_processes=num_processes)
    for value in resumed:
        assert not value[0]
        assert value[1] == 3 * per_epoch
        assert sum(value[2]) == 3 * per_epoch - stopped[1]
        assert value[2][: stopped[1] // per_epoch] == [0] * (stopped[1] // per_epoch)
        for name, tensor in whole[3].items():
            assert torch.equal(value[3][name], tensor), "bit for bit as if never interrupted"
