"""Stop and save requests reach ranks at different moments and are acted upon at the same step."""

from __future__ import annotations

import contextlib
import io
import random
import re
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core import Accelerator
from nbaccel.core.loop import stopping
from nbaccel.core.loop.control import Control
from nbaccel.core.loop.knobs import Knobs
from nbaccel.core.world import single
from nbaccel.errors import ConfigError, TrustError
from nbaccel.wire import events, occasions


class Inbox:
    """The rank's port, with requests put in by the test."""

    def __init__(self):
        self.emitted = []
        self.waiting = []
        self.lock = threading.Lock()

    def emit(self, event):
        self.emitted.append(event)

    def put(self, request):
        with self.lock:
            self.waiting.append(request)

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
    inbox.put(events.Request(kind="save"))
    inbox.put(events.Request(kind="stop"))
    control.tick(2)
    assert control.stopping
    assert control.saving
    inbox.put(events.Request(kind="interrupt"))
    control.tick(3)
    with pytest.raises(KeyboardInterrupt):
        control.interrupt()
    assert not control.interrupting


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


def _interrupted():
    """Each rank hears of it at a moment of its own, in loops over a loader and without one; steps are whole."""
    port = Inbox()
    events.connect(port)
    acc = Accelerator(cpu=True, verify=False, measure=False)
    rng = random.Random(acc.process_index)
    model, optimizer = _tiny()
    before, rows = model.double().weight.detach().clone(), torch.ones(64, 2, dtype=torch.float64)
    model, optimizer, loader = acc.prepare(model, optimizer, DataLoader(rows, batch_size=4))

    def train(passes, batches):
        for _ in range(passes):
            for batch in batches:
                acc.step(model(batch).mean(), optimizer)

    for batches in (rows.split(4), loader):
        timer = threading.Timer(rng.uniform(0, 0.1), port.put, [events.Request(kind="interrupt")])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            train(10**6, batches)
        timer.join()
        port.requests()  # between two calls they are for nobody
        occasions.call_begins()
        train(1, batches)
        places = acc.gather_object((acc.steps, loader.position))
        assert len(set(places)) == 1, f"ranks were interrupted at {places}"
        assert not acc.should_stop
    moved = (before - acc.unwrap_model(model).weight)[0]
    assert moved.tolist() == pytest.approx([acc.steps / 100] * 2), "each gradient counts once"


def test_interrupt_when_ranks_hear_of_it_at_different_moments_is_at_one_step():
    run_ranks(_interrupted)


def _stops(rounds, folder):
    """Every round goes on from the save of the one before, saves when it was stopped, and says how far it is. Every
    other round leaves its loop itself, without the loader's help."""
    import torch.distributed as dist

    port = Inbox()
    events.connect(port)
    data = TensorDataset(torch.ones(64, 2))
    ended, last = [], 0
    for number in range(rounds):
        acc = Accelerator(cpu=True, verify=False, measure=False, project_dir=folder, keep=2)
        rng = random.Random(number * 31 + acc.process_index)
        model, optimizer = acc.prepare(*_tiny())
        loader = acc.prepare(DataLoader(data, batch_size=4))
        if last:
            acc.load_state()
        assert acc.steps == last
        timer = threading.Timer(rng.uniform(0, 0.1), port.put, [events.Request(kind="stop")])
        timer.start()
        while not acc.should_stop:
            for (x,) in loader:
                acc.step(model(x).mean(), optimizer)
                if rng.random() < 0.02:
                    time.sleep(0.002)
                if number % 2 and acc.should_stop:
                    break
        steps = acc.gather_object((acc.steps, loader.position))
        assert len(set(steps)) == 1, f"round {number}: ranks stopped at {steps}"
        path = acc.save_state()
        assert f'"step": {acc.steps}' in (Path(path) / "manifest.json").read_text()
        ended.append(acc.steps - last)
        last = acc.steps
        acc.end_training()
        timer.join()
        dist.barrier()
        port.waiting.clear()
        dist.barrier()
    return ended


@pytest.mark.parametrize(
    ("rounds", "num_processes"),
    [(12, 2), pytest.param(200, 4, marks=[pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)])],
)
def test_stop_when_asked_at_random_moments(tmp_path, rounds, num_processes):
    values = run_ranks(_stops, rounds, str(tmp_path), num_processes=num_processes, deadline=120 + 2 * rounds)
    assert values == [values[0]] * num_processes
    assert min(values[0]) >= 1
    if rounds > 12:  # a busy machine may stop a few of them at one step
        assert len(set(values[0])) > 1, "the stops came at different steps"


def _raw_loop():
    """Nothing prepared but the model and the loader: the ranks meet in backward."""
    port = Inbox()
    events.connect(port)
    acc = Accelerator(cpu=True, verify=False)
    model, optimizer = _tiny()
    model = acc.prepare(model)
    loader = acc.prepare(DataLoader(TensorDataset(torch.ones(64, 2)), batch_size=4))
    threading.Timer(0.1 + 0.1 * acc.process_index, port.put, [events.Request(kind="stop")]).start()
    batches = 0
    while not acc.should_stop:
        for (x,) in loader:
            acc.backward(model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
            batches += 1
    return batches, loader.position


def test_stop_when_no_optimizer_is_prepared():
    (batches, position), other = run_ranks(_raw_loop)
    assert (batches, position) == other
    assert batches > 0


def test_stop_when_only_a_loader_is_prepared_alone(inbox):
    acc = Accelerator(cpu=True, verify=False)
    loader = acc.prepare(DataLoader(TensorDataset(torch.ones(64, 2)), batch_size=4))
    seen = 0
    for _ in loader:
        seen += 1
        if seen == 3:
            inbox.put(events.Request(kind="stop"))
    assert seen == 3
    assert acc.stopped_early
    assert loader.position == 12


def _turned(folder):
    port = Inbox()
    events.connect(port)
    acc = Accelerator(cpu=True, verify=False, project_dir=folder)
    model, optimizer = acc.prepare(*_tiny())
    loader = acc.prepare(DataLoader(TensorDataset(torch.ones(400, 2)), batch_size=2))
    rank = acc.process_index
    asked = [("lr", 0.5), ("lr", 7.0), ("name", "b"), ("count", 3), ("count", 2.5), ("lr", "fast")]
    if rank == 0:
        asked.append(("flag", True))

    def ask():
        for name, value in asked:
            time.sleep(0.03 + 0.02 * rank)  # they arrive at other moments on each rank
            port.put(events.Request(kind="knob", name=name, value=value))

    thread = threading.Thread(target=ask)
    thread.start()
    history = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        while not history or not history[-1][-1]:
            for (x,) in loader:
                lr = acc.knob("lr", 0.1, low=0.0, high=1.0)
                history.append((lr, acc.knob("name", "a"), acc.knob("count", 1), acc.knob("flag", False)))
                acc.step(model(x).mean(), optimizer)
                time.sleep(0.001)
                if history[-1][-1]:
                    break
    thread.join()
    acc.save_state()
    told = [(e.name, e.value, e.step) for e in port.emitted if isinstance(e, events.Knob)]
    again = Accelerator(cpu=True, verify=False, project_dir=folder)
    again.prepare(*_tiny()), again.prepare(DataLoader(TensorDataset(torch.ones(400, 2)), batch_size=2))
    again.load_state()
    kept = again.knob("lr", 0.1, low=0.0, high=1.0), again.knob("name", "z"), again.knob("other", 4)
    return history, told, kept, sorted(str(one.message) for one in said)


def test_knobs_when_turned_change_at_the_same_step_on_every_rank(tmp_path):
    (history, told, kept, said), other = run_ranks(_turned, str(tmp_path))
    assert history == other[0]
    assert history[0] == (0.1, "a", 1, False)
    assert history[-1] == (0.5, "b", 3, True)
    assert [(name, value) for name, value, _ in told[:4]] == [
        ("lr", 0.1), ("name", "a"), ("count", 1), ("flag", False)
    ]  # fmt: skip
    changes = {name: (value, step) for name, value, step in told[4:]}
    assert {name: value for name, (value, _) in changes.items()} == {
        "lr": 0.5, "name": "b", "count": 3, "flag": True
    }  # fmt: skip
    first = next(i for i, values in enumerate(history) if values[0] == 0.5)
    assert changes["lr"][1] == first, "told with the number of steps made when it changed"
    assert other[1] == [], "the main rank tells it for all"
    assert kept == other[2] == (0.5, "b", 4)
    assert other[3] == []
    assert len(said) == 3
    assert "knob 'count' takes a value of type int, not 2.5; it stays" in said[0]
    assert "knob 'lr' cannot be 7.0: low=0.0, high=1.0; it stays" in said[1]
    assert "knob 'lr' takes a value of type float, not 'fast'" in said[2]


def test_knob_when_it_cannot_be():
    acc = Accelerator(cpu=True)
    assert acc.knob("rate", 0.5, low=0, high=1) == 0.5
    with pytest.raises(ConfigError, match="with low=0, high=2, and was with low=0, high=1"):
        acc.knob("rate", 0.5, low=0, high=2)
    with pytest.raises(ConfigError, match="cannot be 5: low=None, high=1"):
        acc.knob("more", 5, high=1)
    with pytest.raises(ConfigError, match="has a list for default"):
        acc.knob("list", [])


def _save_once(folder):
    port = Inbox()
    events.connect(port)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return (*_save_when_asked(folder, port), said.getvalue())


def _save_when_asked(folder, port):
    acc = Accelerator(cpu=True, project_dir=folder)
    model, optimizer = acc.prepare(*_tiny())
    loader = acc.prepare(DataLoader(TensorDataset(torch.ones(800, 2)), batch_size=2))
    timer = threading.Timer(0.05 + 0.1 * acc.process_index, port.put, [events.Request(kind="save")])
    timer.start()
    for (x,) in loader:
        acc.step(model(x).mean(), optimizer)
        time.sleep(0.002)
    timer.join()
    folders = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    acc.end_training()
    return folders, acc.save_requested


def test_save_when_asked_once_is_made_once_though_ranks_hear_at_different_times(tmp_path):
    (folders, pending, said), other = run_ranks(_save_once, str(tmp_path))
    assert (folders, pending, "") == other
    assert len(folders) == 1
    assert not pending
    assert re.fullmatch(rf"saved {re.escape(str(tmp_path / folders[0]))} at optimizer step \d+\n", said)


def test_save_that_nothing_can_make_is_said_once_and_no_loop_that_makes_it_is_told(inbox, tmp_path):
    acc = Accelerator(cpu=True)
    model, optimizer = acc.prepare(*_tiny())
    loader = acc.prepare(DataLoader(TensorDataset(torch.ones(12, 2)), batch_size=2))

    def train(answers):
        inbox.put(events.Request(kind="save"))
        for (x,) in loader:
            acc.step(model(x).mean(), optimizer)
            if answers and acc.save_requested:
                acc.save_state(tmp_path)

    train(answers=True)
    assert not acc.save_requested
    with pytest.warns(UserWarning, match="nowhere to put it") as told:
        train(answers=False)
    assert len(told) == 1
    acc.end_training()


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


def _whole_cut_and_resumed(folder):
    limit = {"stop_after": "0.15s", "save_every": 1000}
    return [
        _limited(f"{folder}/{name}", options, 3)
        for name, options in (("whole", {}), ("cut", limit), ("cut", {}))
    ]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resume_when_the_time_was_up_goes_on_where_it_stopped(tmp_path, num_processes):
    per_epoch = 20 // (2 * num_processes)
    for whole, stopped, resumed in run_ranks(
        _whole_cut_and_resumed, str(tmp_path), num_processes=num_processes
    ):
        assert whole[:3] == (False, 3 * per_epoch, [per_epoch] * 3)
        assert stopped[0]
        assert 0 < stopped[1] < 3 * per_epoch
        assert not resumed[0]
        assert resumed[1] == 3 * per_epoch
        assert sum(resumed[2]) == 3 * per_epoch - stopped[1]
        assert resumed[2][: stopped[1] // per_epoch] == [0] * (stopped[1] // per_epoch)
        for name, tensor in whole[3].items():
            assert torch.equal(resumed[3][name], tensor), "bit for bit as if never interrupted"


def _prepared(*lengths, **options):
    acc = Accelerator(cpu=True, verify=True, measure=False, **options)
    data = [DataLoader(TensorDataset(torch.ones(n, 2)), batch_size=2) for n in lengths]
    return acc, *acc.prepare(*_tiny(), *data)


def test_saving_when_an_iterator_over_another_loader_is_held(tmp_path):
    acc, model, optimizer, train, val = _prepared(12, 8, project_dir=tmp_path, save_every=2)
    held = iter(val)
    next(held)
    for (x,) in train:
        acc.step(model(x).mean(), optimizer)
    assert len(list(tmp_path.iterdir())) == 3
    again = iter(train)
    next(again)
    steps = acc.steps
    for (x,) in train:
        acc.step(model(x).mean(), optimizer)
    assert acc.steps == steps + 6
    assert len(list(tmp_path.iterdir())) == 6


def test_stopping_when_an_iterator_over_another_loader_is_held():
    acc, model, optimizer, train, val = _prepared(12, 8, stop_after="0s")
    held = iter(val)
    next(held)
    for (x,) in train:
        acc.step(model(x).mean(), optimizer)
    assert acc.steps == 1
    assert len(list(val)) == 4, "an evaluation after the stop gets its batches"


def test_stopping_when_another_loader_is_read_inside_the_one_that_trains():
    acc, model, optimizer, train, other = _prepared(12, 8, stop_after="0s")
    inside = iter(other)
    for (x,) in train:
        acc.step(model(x + next(inside)[0]).mean(), optimizer)
    assert acc.steps == 1
    assert len(next(inside)) == 1


def test_stopping_when_loops_over_two_loaders_are_nested():
    acc, model, optimizer, outer, inner = _prepared(12, 8, stop_after="0s")
    taken = 0
    for _ in outer:
        taken += 1
        for (x,) in inner:
            acc.step(model(x).mean(), optimizer)
    assert (taken, acc.steps) == (1, 1)


def _grows():
    acc = Accelerator(cpu=True, verify=False, measure=False, stop_after="1h")
    held = list(torch.ones(40, 2).unbind())
    loader = acc.prepare(DataLoader(held, batch_size=2))
    model, optimizer = acc.prepare(*_tiny())
    told = []
    for more in (40, 20000 + 20 * acc.process_index):
        for x in loader:
            acc.step(model(x).mean(), optimizer)
        held += torch.ones(more, 2).unbind()
        told.append(acc.steps)
    try:
        for x in loader:
            acc.step(model(x).mean(), optimizer)
    except TrustError as error:
        told.append(str(error))
    return told, acc.steps


def test_data_when_it_grows_on_some_ranks_only():
    (told, steps), (other, same) = run_ranks(_grows)
    assert steps == same < 5000
    assert told[:2] == other[:2] == [10, 30]
    assert "on rank 0 it has 20080 samples" in told[2]
    assert "on rank 1 it has 20100 samples" in other[2]


def test_stopping_when_the_loop_around_the_passes_waits_for_steps(monkeypatch):
    monkeypatch.setattr(stopping, "_EMPTY", (3, 7))
    acc, model, optimizer, train = _prepared(12, stop_after="0s")

    def passes(most):
        for _ in range(most):
            for (x,) in train:
                acc.step(model(x).mean(), optimizer)

    passes(3)
    with pytest.warns(UserWarning, match=r"3 passes over 'train' have given no batch.*acc\.should_stop"):
        passes(1)
    passes(3)
    with pytest.raises(ConfigError, match=r"7 passes over 'train'"):
        passes(1)
    assert acc.steps == 1
